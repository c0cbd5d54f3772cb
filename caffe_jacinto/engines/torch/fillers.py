"""How blobs begin: Caffe's fillers, seeded.

Formulas: Caffe's include/caffe/filler.hpp. The numbers are drawn by PyTorch's generator, so that they are of
the same distribution as Caffe's, and not the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.errors import UserError

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
        raise ValueError("the blob is no square kernel")
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
