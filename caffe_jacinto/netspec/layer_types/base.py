"""What a type of layer is, and the rules that several types share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from caffe_jacinto.prototxt.tree import Message

Dim = int | None
Shape = tuple[Dim, ...]
Shapes = Sequence[Shape | None]

Role = Literal["convolution", "inner product", "pooling", "data", "follower", "other"]
"""What a layer is in a drawing; a follower shares the box of the layer before it."""

WEIGHTS = ("weights", "bias")
"""The blobs of a convolution or inner product."""


@dataclass(frozen=True)
class LayerType:
    """One type of layer."""

    tops: Callable[[Message, Shapes, int], Shapes]
    """The shapes of the tops, from the layer, the shapes of its bottoms and the number of its tops."""

    blobs: Callable[[Message, Shapes], list[Shape]] = lambda layer, bottoms: []
    """The shapes of the blobs."""

    blob_names: tuple[str, ...] = ()
    role: Role = "other"
    bottomless: bool = False
    """Whether it has blobs though it has no bottoms."""


def is_known(shape: Shape | None) -> bool:
    """Whether all of a shape is known."""
    return shape is not None and None not in shape


def first_of(bottoms: Shapes) -> Shape | None:
    """The shape of the first bottom, where it is known."""
    return bottoms[0] if bottoms else None


def channels_of(bottoms: Shapes) -> Dim:
    """The channels of the first bottom."""
    first = first_of(bottoms)
    if first is None:
        return None
    return first[1] if len(first) > 1 else 1


def product(dims: Sequence[Dim]) -> Dim:
    """The numbers in a shape, where it is known."""
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) if len(known) == len(dims) else None


def axis_of(parameter: Message, default: int, shape: Shape) -> int:
    """The field ``axis``, counted from the end where it is negative."""
    return parameter.integer("axis", default) % len(shape)


def image(bottoms: Shapes) -> Shape:
    """Batch x channels x spatial axes; two of these where nothing is known."""
    first = first_of(bottoms) or (None, None, None, None)
    if len(first) < 3:
        raise ValueError("the input is not an image")
    return first


def required(bottoms: Shapes) -> Shape:
    """The shape of the first bottom.

    Raises:
        ValueError: it is not known.
    """
    first = first_of(bottoms)
    if first is None:
        raise ValueError("the shape of the input is not known")
    return first


def same(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """The top of a layer that keeps the shape of its bottom."""
    return [first_of(bottoms)]


def with_bias(parameter: Message, weights: Shape) -> list[Shape]:
    """The weights, and a bias for each output where there is one."""
    return [weights, (parameter.integer("num_output"),)] if parameter.flag("bias_term", True) else [weights]
