"""Ways to compute a convolution, and the choice of the fastest by measuring, as cuDNN chooses its algorithms.

All give the same numbers up to rounding. A library's own kernel is slow in some shapes: groups of a few
channels, or an image of three channels that is convolved in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From images (batch x channels x height x width), weights and bias to the outputs."""

_MOST_IN_BLOCKS = 4
"""Channels of an image that is worth cutting into blocks."""

_VECTOR = 8
"""Channels that matrix units take at a time."""

_TIMED = 3
"""Timed runs of each way, after one that is not timed."""


@dataclass(frozen=True)
class Geometry:
    """What a convolution does, height before width."""

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    group: int


class Convolution:
    """A convolution that is computed in the fastest way on a GPU, and by PyTorch's own function elsewhere."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._chosen: dict[object, Way] = {}

    def __call__(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs: batch x outputs x height x width."""
        if not images.is_cuda or not torch.backends.cudnn.benchmark:
            return self._direct(images, weights, bias)
        case = (images.shape, images.requires_grad, torch.is_grad_enabled(), _product_type(images))
        if case not in self._chosen:
            self._chosen[case] = self._fastest(images, weights, bias)
        return self._chosen[case](images, weights, bias)

    def _fastest(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Way:
        ways = self._ways(images, weights)
        if len(ways) == 1:
            return ways[0]
        taken = images.detach().requires_grad_(images.requires_grad)
        times = [_milliseconds(way, taken, weights, bias) for way in ways]
        return ways[times.index(min(times))]

    def _ways(self, images: Tensor, weights: Tensor) -> list[Way]:
        """The ways that can compute this."""
        ways: list[Way] = [self._direct]
        geometry, (height, width) = self._geometry, images.shape[2:]
        if geometry.group > 1 and weights.shape[0] % geometry.group == 0:
            ways.append(self._dense)
        (step, across), plain = geometry.stride, geometry.group == 1 and geometry.dilation == (1, 1)
        even = step == across > 1 and height % step == 0 and width % step == 0
        if plain and even and images.shape[1] <= _MOST_IN_BLOCKS:
            ways.append(self._in_blocks)
        return ways

    def _direct(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        geometry = self._geometry
        stride, pad, dilation = geometry.stride, geometry.pad, geometry.dilation
        return F.conv2d(images, weights, bias, stride, pad, dilation, geometry.group)

    def _dense(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """All groups at once, with zeros for the weights between them."""
        geometry = self._geometry
        group, (outputs, inputs, *kernel) = geometry.group, weights.shape
        apart = torch.eye(group, device=weights.device, dtype=weights.dtype).view(group, 1, group, 1, 1, 1)
        blocks = weights.reshape(group, outputs // group, 1, inputs, *kernel) * apart
        whole = blocks.reshape(outputs, group * inputs, *kernel).contiguous(memory_format=torch.channels_last)
        return F.conv2d(images, whole, bias, geometry.stride, geometry.pad, geometry.dilation)

    def _in_blocks(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """Blocks of stride x stride pixels as channels, which are convolved in steps of one."""
        step, (batch, channels, height, width) = self._geometry.stride[0], images.shape
        images = images.to(_product_type(images))
        fill = -channels * step * step % _VECTOR
        pixels = images.permute(0, 2, 3, 1).reshape(
            batch, height // step, step, width // step, step, channels
        )
        blocks = pixels.permute(0, 1, 3, 2, 4, 5).reshape(batch, height // step, width // step, -1)
        blocks = F.pad(blocks, (0, fill)).permute(0, 3, 1, 2)
        margins: list[int] = []
        kernels: list[int] = []
        for axis in (1, 0):  # width first, as F.pad has it
            size, pad = weights.shape[2 + axis], self._geometry.pad[axis]
            first, last = -pad // step, (size - 1 - pad) // step
            before = -pad - first * step
            kernels += [before, (last - first + 1) * step - size - before]
            outputs = (images.shape[2 + axis] + 2 * pad - size) // step + 1
            margins += [-first, outputs + last - images.shape[2 + axis] // step]
        padded = F.pad(weights, kernels)
        outputs, _, high, wide = padded.shape
        parts = padded.view(outputs, channels, high // step, step, wide // step, step)
        taken = parts.permute(0, 3, 5, 1, 2, 4).reshape(outputs, -1, high // step, wide // step)
        taken = F.pad(taken, (0, 0, 0, 0, 0, fill)).contiguous(memory_format=torch.channels_last)
        if margins[0] == margins[1] >= 0 and margins[2] == margins[3] >= 0:
            return F.conv2d(blocks, taken, bias, padding=(margins[2], margins[0]))
        return F.conv2d(F.pad(blocks, margins), taken, bias)


def _product_type(images: Tensor) -> torch.dtype:
    """What a convolution computes in here."""
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype


def _milliseconds(way: Way, images: Tensor, weights: Tensor, bias: Tensor | None) -> float:
    """The time of one run forward and, where gradients are taken, backward."""
    wanted = [tensor for tensor in (images, weights, bias) if tensor is not None and tensor.requires_grad]

    def run() -> None:
        outputs = way(images, weights, bias)
        if wanted and torch.is_grad_enabled():
            torch.autograd.grad(outputs, wanted, torch.ones_like(outputs))

    run()  # chooses algorithms
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_TIMED):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _TIMED
