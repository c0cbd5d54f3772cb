"""One layer while it is built: its message, the shapes around it (by netspec) and a place for its blobs.

A builder takes from the message the fields that it understands. Any other field that is set is an error, so
that nothing in a prototxt is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, sqrt
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.indices import Indices
from caffe_jacinto.netspec.layer_types import (
    Geometry,
    blob_shapes_of,
    geometry,
    geometry_fault,
    is_known,
    output_shapes,
)
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.places import place_in
from caffe_jacinto.prototxt.solver import TRAIN
from caffe_jacinto.prototxt.tree import Message, tree_of

Shape = tuple[int, ...]

_FAN_IN, _FAN_OUT, _AVERAGE = 0, 1, 2
"""FillerParameter.VarianceNorm."""


def fill(shape: Shape, filler: Any, generator: torch.Generator, where: str) -> Tensor:
    """A new float32 tensor of ``shape`` on the CPU, filled as the FillerParameter ``filler`` says.

    Raises:
        UserError: Caffe has no such filler, or it does not fit the shape; ``where`` names the layer.
    """
    if filler.type not in FILLERS:
        raise UserError(f"{where}: filler type {filler.type!r} is unknown; known: {', '.join(FILLERS)}")
    tensor = torch.empty(shape)
    try:
        FILLERS[filler.type](tensor, filler, generator)
    except ValueError as error:
        raise UserError(f"{where}: filler {filler.type!r}: {error}") from None
    return tensor


def _constant(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    tensor.fill_(filler.value)


def _uniform(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    if filler.min > filler.max:
        raise ValueError(f"min {filler.min:g} is above max {filler.max:g}")
    tensor.uniform_(filler.min, filler.max, generator=generator)


def _gaussian(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    """``sparse`` of each output's weights, on average, are not zero; the rest are."""
    if filler.std < 0:
        raise ValueError(f"std {filler.std:g} is negative")
    tensor.normal_(filler.mean, filler.std, generator=generator)
    if filler.sparse >= 0:
        share = min(filler.sparse / tensor.shape[0], 1.0)
        tensor.mul_(torch.empty_like(tensor).bernoulli_(share, generator=generator))


def _positive_unitball(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    tensor.uniform_(0, 1, generator=generator)
    rows = tensor.view(tensor.shape[0], -1)
    rows.div_(rows.sum(dim=1, keepdim=True))


def _xavier(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    limit = sqrt(3 / _fan(tensor, filler))
    tensor.uniform_(-limit, limit, generator=generator)


def _msra(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    tensor.normal_(0, sqrt(2 / _fan(tensor, filler)), generator=generator)


def _bilinear(tensor: Tensor, filler: Any, generator: torch.Generator) -> None:
    if tensor.dim() != 4 or tensor.shape[2] != tensor.shape[3]:
        raise ValueError("the blob is not a square kernel")
    size = tensor.shape[3]
    factor = ceil(size / 2)
    centre = (2 * factor - 1 - factor % 2) / (2 * factor)
    slope = 1 - (torch.arange(size, dtype=torch.float32) / factor - centre).abs()
    tensor.copy_((slope[:, None] * slope[None, :]).expand_as(tensor))


def _fan(tensor: Tensor, filler: Any) -> float:
    """The inputs of an output, the outputs of an input, or their mean, as ``variance_norm`` says."""
    count = tensor.numel()
    fan_in = count / tensor.shape[0]
    fan_out = count / tensor.shape[1] if tensor.dim() > 1 else count
    return {_FAN_IN: fan_in, _FAN_OUT: fan_out, _AVERAGE: (fan_in + fan_out) / 2}[filler.variance_norm]


FILLERS: dict[str, Callable[[Tensor, Any, torch.Generator], None]] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "positive_unitball": _positive_unitball,
    "xavier": _xavier,
    "msra": _msra,
    "bilinear": _bilinear,
}
"""By FillerParameter.type."""


Blobs = Sequence[Tensor]
"""A layer's blobs, in Caffe's order."""

Forward = Callable[..., Tensor | tuple[Tensor, ...]]
"""From a layer's blobs and then its bottoms to its top or tops. Images are batch x channels x height x width,
channels last in memory."""

PHASE_NAMES = ("TRAIN", "TEST")

NO_EFFECT = frozenset({"engine", "cudnn_convolution_algo_seeker", "conv_algos_override", "force_nd_im2col"})
"""Fields of layers' parameters that say how to compute and not what."""

_EVERY_LAYER = frozenset(
    {
        *("name", "type", "bottom", "top", "phase", "include", "exclude", "param", "loss_weight"),
        *("propagate_down", "blobs", "debug"),
    }
)
_FORK_MATH = frozenset({"forward_type", "backward_type", "forward_math", "backward_math"})
_FLOAT = 0
"""caffe.Type of the fork: FLOAT32."""


@dataclass
class Blob:
    """A layer's blob: weights that learn, or a statistic."""

    tensor: Tensor
    """float32, on the net's device: a parameter, or for a statistic a plain tensor."""

    lr_mult: float = 1.0
    decay_mult: float = 1.0
    shared_as: str = ""
    """``param.name``: blobs of one such name are one."""


@dataclass
class LayerSetup:
    """One layer while it is built."""

    message: Any
    """Its LayerParameter."""

    where: str
    """The file and the layer, for messages."""

    phase: int
    dialect: Dialect
    device: torch.device
    generator: torch.Generator
    bottoms: Sequence[Shape]
    """The shapes of its bottoms, in order."""

    filled: bool = True
    """False: blobs keep what is in their memory; only whether their fillers fit is checked."""

    blobs: list[Blob] = field(default_factory=list)

    draws: bool = False
    """Whether each pass draws random numbers."""

    recordable: bool = True
    """Whether a pass can be recorded as a CUDA graph: not if it draws on the CPU, or if the sizes of its tops
    depend on values."""

    indices: list[Indices] = field(default_factory=list)
    """Of its bottoms."""

    @cached_property
    def tree(self) -> Message:
        """The message in the form that netspec reads."""
        return tree_of(self.message)

    @cached_property
    def tops(self) -> list[Shape]:
        """The shapes of its tops; a dimension below 1 means that nothing is left.

        Raises:
            UserError: they do not follow from its bottoms.
        """
        found = output_shapes(self.tree, self.bottoms, len(self.message.top))
        if not all(map(is_known, found)):
            self.refuse(f"its output does not follow from inputs of {', '.join(map(str, self.bottoms))}")
        return [tuple(dim for dim in shape if dim is not None) for shape in found if shape is not None]

    @cached_property
    def _blob_shapes(self) -> list[Shape]:
        return [
            tuple(dim for dim in shape if dim is not None)
            for shape in blob_shapes_of(self.tree, self.bottoms)
        ]

    def parameters(self, name: str, *known: str, also: tuple[str, ...] = ()) -> Any:
        """The layer's parameters ``name``; the builder understands their fields ``known``.

        ``also`` names the other parameters that a layer of this type has.

        Raises:
            UserError: another field is set, here or in the layer itself.
        """
        self.only(name, *also)
        parameters = getattr(self.message, name)
        for descriptor, _ in parameters.ListFields():
            if descriptor.name not in known and descriptor.name not in NO_EFFECT:
                self.refuse(f"{name}.{descriptor.name} is not supported; supported: {', '.join(known)}")
        return parameters

    def only(self, *names: str) -> None:
        """Refuse any field of the layer but these and those that every layer has."""
        for descriptor, _ in self.message.ListFields():
            if descriptor.name in _FORK_MATH:
                if getattr(self.message, descriptor.name) != _FLOAT:
                    self.refuse(f"{descriptor.name}: only FLOAT is supported; remove it (-precision sets it)")
            elif descriptor.name not in _EVERY_LAYER and descriptor.name not in names:
                self.refuse(f"field {descriptor.name} is not supported in a layer of this type; remove it")

    def geometry(self) -> Geometry:
        """Its kernel, stride, pad and dilation, for height and width.

        Raises:
            UserError: Caffe stops at one of them.
        """
        fault = geometry_fault(self.tree)
        if fault is not None:
            file = self.where.removesuffix(f": layer {self.message.name} ({self.message.type})")
            place = place_in(file, self.message.name, fault.field)
            raise UserError(f"{place}: layer {self.message.name}: {fault.field}: {fault.what}")
        return geometry(self.tree)

    def refuse(self, why: str) -> NoReturn:
        """Raise a UserError that names the layer."""
        raise UserError(f"{self.where}: {why}")

    def takes(self, least: int, most: int | None = None, *, tops: int = 1) -> None:
        """Refuse another number of bottoms than ``least`` to ``most``; more than ``tops`` tops, or none."""
        most = least if most is None else most
        if not least <= len(self.bottoms) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            self.refuse(f"takes {wanted} bottom(s), and has {len(self.bottoms)}")
        if not min(tops, 1) <= len(self.message.top) <= tops:
            self.refuse(f"gives {tops} top(s), and has {len(self.message.top)}")

    def indices_of(self, bottom: int, what: str, count: int, ignored: int | None = None) -> Indices:
        """The numbers of a bottom, which choose one of ``count``; ``what`` is one of them in words."""
        on_cpu = self.device.type == "cpu"
        kept = None if on_cpu else torch.zeros((), dtype=torch.int64, device=self.device)
        self.indices.append(Indices(self.where, self.message.bottom[bottom], what, count, ignored, kept))
        return self.indices[-1]

    def axis(self, value: int, bottom: int = 0) -> int:
        """``value``, counted from the end if it is negative, as an axis of a bottom."""
        axes = len(self.bottoms[bottom])
        if not -axes <= value < axes:
            self.refuse(f"axis {value} is not one of the {axes} axes of {self.message.bottom[bottom]}")
        return value % axes

    def blob(self, filler: Any = None, *, constant: float = 0.0) -> None:
        """Make the layer's next blob, filled; its learning rate and decay are those of its ``param``."""
        index = len(self.blobs)
        shape, specs = self._blob_shapes[index], self.message.param
        if filler is None or min(shape, default=1) < 1:
            values = torch.full(shape, constant)
        elif self.filled:
            values = fill(shape, filler, self.generator, self.where)
        else:
            fill((1, 1, *shape[2:])[: len(shape)], filler, self.generator, self.where)
            values = torch.empty(shape)
        if values.dim() == 4 and self.filled:
            values = values.contiguous(memory_format=torch.channels_last)
        lr_mult, decay_mult, shared_as = 1.0, 1.0, ""
        if index < len(specs):
            lr_mult, decay_mult, shared_as = specs[index].lr_mult, specs[index].decay_mult, specs[index].name
        learns = self.phase == TRAIN and lr_mult != 0
        weights = Parameter(values.to(self.device), requires_grad=learns)
        self.blobs.append(Blob(weights, lr_mult, decay_mult, shared_as))

    def statistic(self, constant: float = 0.0) -> None:
        """Make the layer's next blob, which no gradient moves."""
        index = len(self.blobs)
        shape, specs = self._blob_shapes[index], self.message.param
        if index < len(specs) and specs[index].lr_mult != 0 and specs[index].HasField("lr_mult"):
            self.refuse(f"param {index} is a statistic and does not learn: its lr_mult has to be 0")
        tensor = torch.full(shape, constant, device=self.device)
        # Weight decay does not move it either, but stock Caffe's solver states have its squares.
        decay_mult, shared_as = 1.0, ""
        if index < len(specs):
            decay_mult, shared_as = specs[index].decay_mult, specs[index].name
        self.blobs.append(Blob(tensor, 0.0, decay_mult, shared_as))


Builder = Callable[[LayerSetup], Forward]
"""Builds a layer: makes its blobs and returns what it computes.

Raises UserError for settings that are not supported."""
