"""The schemes of quantization: what each does, as a few lines of data.

Sources: caffe-jacinto's NetQuantizationParameter (its defaults are those of the scheme `caffe_jacinto`), TI's
guide to post-training quantization, and ONNX's QuantizeLinear, which says what a processor computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from caffe_jacinto.common.errors import UserError

LEAST_BITS, MOST_BITS = 2, 16
"""Of weights and activations."""

MOST_BIAS_BITS = 32

SchemeName = Literal["processor", "power2", "caffe_jacinto"]
RangeMethod = Literal["minmax", "percentile", "mse"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse")
"""How a range is chosen: all values, all but a few, or where the squared error is least."""

TRAINED: Literal["trained"] = "trained"
"""The other way: quantization-aware training has fixed it."""


@dataclass(frozen=True)
class Bits:
    """The number of bits of each kind of number."""

    weights: int = 8
    activations: int = 8
    bias: int = 32

    def checked(self, what: str = "") -> Bits:
        """Itself.

        Raises:
            UserError: a number is out of range; ``what`` names where it was given.
        """
        for name, number, most in (
            ("weights", self.weights, MOST_BITS),
            ("activations", self.activations, MOST_BITS),
            ("biases", self.bias, MOST_BIAS_BITS),
        ):
            if not LEAST_BITS <= number <= most:
                raise UserError(f"{what}{number} bits for {name}: give {LEAST_BITS} to {most}")
        return self


@dataclass(frozen=True)
class MovingRange:
    """Ranges that follow the batches: new = (1 - pace) x old + pace x expansion x what the batch has."""

    pace: float = 0.01
    expansion: float = 1.25
    start: int = 1
    """The pass, counted from 0, from which on values are quantized."""

    offset_activations: bool = False
    """Activations run from the least to the largest value, as weights do with `Scheme.offset_weights`."""


@dataclass(frozen=True)
class Scheme:
    """How a network is quantized."""

    name: SchemeName
    bits: Bits = Bits()
    folded: bool = True
    """Batch norms are folded into the convolutions first."""

    by_channel: bool = True
    """Each output channel's weights have a scale of their own; else each layer's."""

    power_of_two: bool = False
    """Scales are powers of two."""

    offset_weights: bool = False
    """Weights run from their least to their largest value, which are both exact, and zero is not."""

    activation_ranges: RangeMethod | Literal["trained"] = "mse"
    weight_ranges: RangeMethod = "minmax"
    percentile: float = 99.99
    """Of the values that the range of `percentile` covers."""

    moving: MovingRange | None = None
    bias_correction: bool = False
    """The mean error of each output channel is taken off its bias."""

    @property
    def weights_chosen_by(self) -> tuple[RangeMethod, float | None]:
        """The method of `weight_ranges`, and the percentile where that has one."""
        return self.weight_ranges, self.percentile if self.weight_ranges == "percentile" else None

    def with_bits(self, bits: int) -> Scheme:
        """With this many bits for weights and activations."""
        return replace(self, bits=replace(self.bits, weights=bits, activations=bits))


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("processor"),
        Scheme("power2", by_channel=False, power_of_two=True),
        Scheme(
            "caffe_jacinto",
            Bits(weights=12, activations=8, bias=16),
            folded=False,
            by_channel=False,
            offset_weights=True,
            activation_ranges="minmax",
            moving=MovingRange(),
        ),
    )
}
"""By name; the first is the default."""

_BITS = {"weight_bits": "weights", "activation_bits": "activations", "bias_bits": "bias"}
_OF_CHOSEN_RANGES = ("ranges", "weight_ranges", "percentile", "bias_correction")


def scheme_mistakes(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Which settings do not go with their scheme: key, as in a recipe's `quantize`, and what."""
    scheme = SCHEMES[settings["scheme"]]
    if scheme.moving is not None:
        for key in _OF_CHOSEN_RANGES:
            if settings[key]:
                yield key, f"the scheme {scheme.name} has ranges of its own; leave it out"
    elif settings["percentile"] and "percentile" not in (settings["ranges"], settings["weight_ranges"]):
        yield "percentile", "only ranges by percentile have one; leave it out, or set ranges or weight_ranges"
    if settings["input_shift"] and not scheme.folded:
        yield "input_shift", f"the scheme {scheme.name} leaves layers as they are; leave it out"


def training_mistakes(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Which settings do not go with training: key, as in a recipe's `quantize`, and what."""
    if SCHEMES[settings["scheme"]].moving is not None:
        others = " or ".join(f'"{name}"' for name, scheme in SCHEMES.items() if scheme.moving is None)
        yield "scheme", f'"{settings["scheme"]}" is for tests only; train with {others}'
    if settings["bias_correction"]:
        yield "bias_correction", "a training corrects the biases by itself; leave it out"


def chosen_scheme(settings: Mapping[str, Any]) -> Scheme:
    """The scheme with what ``settings`` change of it, by the keys of a recipe's `quantize`.

    Raises:
        UserError: a number of bits is out of range.
    """
    scheme = SCHEMES[settings["scheme"]]
    changed = scheme if settings["bits"] is None else scheme.with_bits(settings["bits"])
    given = {name: settings[key] for key, name in _BITS.items() if settings[key] is not None}
    return replace(
        changed,
        bits=replace(changed.bits, **given).checked(),
        activation_ranges=settings["ranges"] or scheme.activation_ranges,
        weight_ranges=settings["weight_ranges"] or scheme.weight_ranges,
        percentile=settings["percentile"] or scheme.percentile,
        bias_correction=settings["bias_correction"] or scheme.bias_correction,
    )
