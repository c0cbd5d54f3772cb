"""What a network in caffe-jacinto's dialect says of its test in quantized values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.quantization.network import Network, network_of
from caffe_jacinto.quantization.schemes import SCHEMES, Bits, MovingRange, Scheme

if TYPE_CHECKING:
    from caffe_jacinto.quantization.network import Blobs

FIELDS = ("quantize", "net_quantization_param")
"""Of a NetParameter."""

QUANTIZATION = "Quantization"
"""The fork's layer that rounds by itself."""

_FLOAT, _STOCHASTIC = 0, 1
"""QuantizationParameter_Precision and _Rounding."""


@dataclass(frozen=True)
class ForkSettings:
    """How a network is tested in quantized values."""

    scheme: Scheme
    weights: bool
    activations: bool
    """Whether these are quantized."""

    ignored: tuple[str, ...]
    """Layers that take no part."""

    def network(self, layers: Sequence[Any], blobs: Blobs, where: str) -> Network:
        """What is quantized of a network with these ``layers``, LayerParameter messages.

        Raises:
            UserError: as `network_of`.
        """
        named = f"{where}: net_quantization_param.ignored_layer_names"
        called = "", named
        return network_of(self.scheme, layers, blobs, where, floats=self.ignored, called=called, exactly=True)


def tested_network(net: Any, dialect: Dialect, where: str) -> tuple[Any, ForkSettings | None]:
    """``net`` without what only says how it is tested in quantized values, and that.

    The ranges of an earlier test, in a layer's ``quantization_param``, play no part: each test has its own.

    Raises:
        UserError: as `fork_settings`.
    """
    settings = fork_settings(net, where)
    bare = type(net)()
    bare.CopyFrom(net)
    if dialect is Dialect.CAFFE_JACINTO:
        for field in FIELDS:
            bare.ClearField(field)
        for layer in bare.layer:
            if layer.type != QUANTIZATION:
                layer.ClearField("quantization_param")
    return bare, settings


def fork_settings(net: Any, where: str) -> ForkSettings | None:
    """The settings of ``net``, a NetParameter; None where it is not quantized.

    Raises:
        UserError: one that cannot be carried out.
    """
    if not any(field.name == "quantize" for field, _ in net.ListFields()) or not net.quantize:
        return None
    given = net.net_quantization_param

    def refuse(field: str, why: str) -> None:
        raise UserError(f"{where}: net_quantization_param.{field}: {why}")

    if given.precision == _FLOAT:
        return None
    if given.rounding_scheme == _STOCHASTIC:
        refuse("rounding_scheme", "STOCHASTIC is for training; only NEAREST is supported")
    if not given.update_quantization_param:
        refuse(
            "update_quantization_param",
            "false needs ranges of an earlier test, which are not read; remove it",
        )
    if given.power2_scale_weights != given.power2_scale_activations:
        refuse(
            "power2_scale_weights", "only both or neither of it and power2_scale_activations are supported"
        )
    if not 0 < given.range_update_factor <= 1:
        refuse("range_update_factor", f"{given.range_update_factor:g} is not above 0 and up to 1")
    if not 0 < given.range_expansion_factor < float("inf"):
        refuse("range_expansion_factor", f"{given.range_expansion_factor:g} is not above 0")
    if given.quantization_start < 1:
        refuse(
            "quantization_start",
            f"{given.quantization_start} has to be 1 or more: a pass shows the ranges first",
        )
    bits = Bits(given.bitwidth_weights, given.bitwidth_activations, given.bitwidth_bias)
    moving = MovingRange(
        given.range_update_factor,
        given.range_expansion_factor,
        given.quantization_start,
        given.apply_offset_activations,
    )
    scheme = replace(
        SCHEMES["caffe_jacinto"],
        bits=bits.checked(f"{where}: net_quantization_param: "),
        power_of_two=given.power2_scale_weights,
        offset_weights=given.apply_offset_weights,
        moving=moving,
    )
    return ForkSettings(
        scheme, given.quantize_weights, given.quantize_activations, tuple(given.ignored_layer_names)
    )


def fields_of(scheme: Scheme, ignored: Sequence[str]) -> str:
    """The lines at the top of a network that say how it is tested in quantized values.

    caffe-jacinto computes by them where the scheme is its own; the bits are those of any. ``ignored``: layers
    that take no part.
    """
    from google.protobuf import text_format

    net = messages(Dialect.CAFFE_JACINTO).NetParameter(quantize=True)
    settings = net.net_quantization_param
    settings.bitwidth_weights = scheme.bits.weights
    settings.bitwidth_activations = scheme.bits.activations
    settings.bitwidth_bias = scheme.bits.bias
    settings.power2_scale_weights = settings.power2_scale_activations = scheme.power_of_two
    settings.apply_offset_weights = scheme.offset_weights
    if scheme.moving is not None:
        settings.apply_offset_activations = scheme.moving.offset_activations
        settings.range_update_factor = scheme.moving.pace
        settings.range_expansion_factor = scheme.moving.expansion
        settings.quantization_start = scheme.moving.start
    settings.ignored_layer_names.extend(ignored)
    return str(text_format.MessageToString(net, as_utf8=True))
