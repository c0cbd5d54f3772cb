"""Ways to compute a convolution, and the choice of the fastest by measuring, as cuDNN chooses its algorithms.

All give the same numbers up to rounding. A library's own kernel is slow in some shapes: groups of a few
channels, an image of three channels that is convolved in steps, or images of a few pixels. On a CPU the
choice is kept for this machine (`choices.py`), so that every training there computes the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch import gpu_time
from caffe_jacinto.engines.pytorch.choices import Choices

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From images (batch x channels x height x width), weights and bias to the outputs."""

_MOST_IN_BLOCKS = 4
"""Channels of an image that is worth cutting into blocks."""

_VECTOR = 8
"""Channels that matrix units take at a time."""

_TIMED = 3
"""Timed runs of each way, after one that is not timed."""

_MOST_APART = 8
"""Groups that are worth a convolution each."""

_MOST_AT_ONCE = 128
"""Channels of all groups that a CPU multiplies at once: zeros take time, too."""

_MOST_UNFOLDED = 64
"""Output pixels of images that are worth unfolding."""

_POSITIONS = 1 << 13
"""Output pixels, of all images, that are enough to measure with on a CPU."""

_MARGIN = 0.9
"""Another way than PyTorch's own has to take at most this much of its time on a CPU, where others may run."""


@dataclass(frozen=True)
class Geometry:
    """What a convolution does, height before width."""

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    group: int

    def outputs(self, pixels: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the outputs."""
        high, wide = (
            (pixels[axis] + 2 * self.pad[axis] - self.dilation[axis] * (kernel[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return high, wide


class Convolution:
    """A convolution that is computed in the fastest way, if PyTorch may choose by measuring.

    That is ``torch.backends.cudnn.benchmark``; without it, PyTorch's own function computes it.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._chosen: dict[object, Way] = {}

    def __call__(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs: batch x outputs x height x width."""
        if not images.is_cuda and self._is_wrong_in(_product_type(images)):
            return self._unfolded(images, weights, bias)
        if not torch.backends.cudnn.benchmark:
            return self._direct(images, weights, bias)
        case = (images.shape, images.requires_grad, torch.is_grad_enabled(), _product_type(images))
        if case not in self._chosen:
            ways = self._ways(images, weights)
            choose = self._fastest_on_gpu if images.is_cuda else self._fastest_on_cpu
            self._chosen[case] = ways[0] if len(ways) == 1 else choose(ways, images, weights, bias)
        return self._chosen[case](images, weights, bias)

    def _is_wrong_in(self, kind: torch.dtype) -> bool:
        """Whether PyTorch's own function can give other numbers on a CPU.

        With steps through dilated kernels, in bfloat16, it leaves outputs as they were in memory (PyTorch
        2.13, oneDNN 3.12; seen with outputs that are one pixel wide).
        """
        both = (
            step > 1 and apart > 1
            for step, apart in zip(self._geometry.stride, self._geometry.dilation, strict=True)
        )
        return kind == torch.bfloat16 and any(both)

    def _fastest_on_gpu(self, ways: list[Way], images: Tensor, weights: Tensor, bias: Tensor | None) -> Way:
        taken = images.detach().requires_grad_(images.requires_grad)
        first, *others = ways
        times = {first: _milliseconds(first, taken, weights, bias)}
        for way in others:
            # Other ways may need more memory than PyTorch's own, without which there is no training.
            with suppress(torch.OutOfMemoryError):
                times[way] = _milliseconds(way, taken, weights, bias)
            if way not in times:
                torch.cuda.empty_cache()
        return min(times, key=lambda way: times[way])

    def _fastest_on_cpu(self, ways: list[Way], images: Tensor, weights: Tensor, bias: Tensor | None) -> Way:
        """Measured once on this machine, with some of the images."""
        shapes = (tuple(images.shape), tuple(weights.shape), bias is not None, images.requires_grad)
        case = (self._geometry, *shapes, torch.is_grad_enabled(), _product_type(images))
        names = {way.__name__: way for way in ways}

        def measure() -> str:
            pixels = images.shape[2] * images.shape[3]
            few = images.detach()[: max(_VECTOR, _POSITIONS // pixels)].requires_grad_(images.requires_grad)
            return _fastest(names, few, weights, bias)

        return names[Choices.of_this_machine().choose(str(case), list(names), measure)]

    def _ways(self, images: Tensor, weights: Tensor) -> list[Way]:
        """The ways that can compute this, PyTorch's own first."""
        return [self._direct, *(self._more_on_gpu if images.is_cuda else self._more_on_cpu)(images, weights)]

    def _more_on_gpu(self, images: Tensor, weights: Tensor) -> list[Way]:
        ways: list[Way] = []
        geometry, (height, width) = self._geometry, images.shape[2:]
        if geometry.group > 1 and weights.shape[0] % geometry.group == 0:
            ways.append(self._dense)
        (step, across), plain = geometry.stride, geometry.group == 1 and geometry.dilation == (1, 1)
        even = step == across > 1 and height % step == 0 and width % step == 0
        if plain and even and images.shape[1] <= _MOST_IN_BLOCKS:
            ways.append(self._in_blocks)
        return ways

    def _more_on_cpu(self, images: Tensor, weights: Tensor) -> list[Way]:
        ways: list[Way] = []
        channels, group = images.shape[1], self._geometry.group
        if 1 < group <= _MOST_APART:
            ways.append(self._apart)
            if channels <= _MOST_AT_ONCE:
                ways.append(self._dense)
        high, wide = self._geometry.outputs(images.shape[2:], weights.shape[2:])
        if group <= _MOST_APART and high * wide <= _MOST_UNFOLDED and weights[0, 0].numel() > 1:
            ways.append(self._unfolded)
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

    def _apart(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """A convolution for each group."""
        group, geometry = self._geometry.group, self._geometry
        parts = [
            F.conv2d(
                part.contiguous(memory_format=torch.channels_last),
                own,
                None if bias is None else shift,
                geometry.stride,
                geometry.pad,
                geometry.dilation,
            )
            for part, own, shift in zip(
                images.chunk(group, 1),
                weights.chunk(group),
                weights.new_empty(group, 0) if bias is None else bias.chunk(group),
                strict=True,
            )
        ]
        return torch.cat(parts, 1)

    def _unfolded(self, images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """A matrix product over the pixels that each output sees."""
        kind = _product_type(images)
        result: Tensor = _Unfolded.apply(
            images.to(kind), weights.to(kind), None if bias is None else bias.to(kind), self._geometry
        )
        return result

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

    return gpu_time.milliseconds(run)


def _fastest(ways: Mapping[str, Way], images: Tensor, weights: Tensor, bias: Tensor | None) -> str:
    """The name of the way that is fastest on a CPU; the first one, unless another is clearly faster."""
    first, *_ = ways
    for way in ways.values():
        _seconds(way, images, weights, bias)
    times = dict.fromkeys(ways, float("inf"))
    for _ in range(_TIMED):  # in turn: what else the machine does affects all of them
        for name, way in ways.items():
            times[name] = min(times[name], _seconds(way, images, weights, bias))
    best = min(times, key=lambda name: times[name])
    return best if times[best] < _MARGIN * times[first] else first


def _seconds(way: Way, images: Tensor, weights: Tensor, bias: Tensor | None) -> float:
    """The time of one run forward and, where gradients are taken, backward, on a CPU."""
    wanted = [tensor for tensor in (images, weights, bias) if tensor is not None and tensor.requires_grad]
    started = time.perf_counter()
    outputs = way(images, weights, bias)
    if wanted and torch.is_grad_enabled():
        torch.autograd.grad(outputs, wanted, torch.ones_like(outputs))
    return time.perf_counter() - started


class _Unfolded(torch.autograd.Function):
    """A convolution as one matrix product for each group: im2col, as Caffe computes it, for whole batches.

    Images, weights and bias are of one type. With G groups, K pixels of the kernel, and M output pixels of
    all images together, the factors are G x M x (K channels / G) and G x (K channels / G) x (outputs / G).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(images, weights)
        ctx.geometry, ctx.biased = geometry, bias is not None
        size = geometry.outputs(images.shape[2:], weights.shape[2:])
        product = torch.bmm(_unfold(images, weights, geometry), _as_factor(weights, geometry.group).mT)
        rows = product.transpose(0, 1).reshape(len(images), *size, len(weights))
        if bias is not None:
            rows += bias
        return rows.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weights = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        group, outputs = geometry.group, len(weights)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        by_group = rows.view(-1, group, outputs // group).transpose(0, 1)
        of_images = of_weights = of_bias = None
        if ctx.needs_input_grad[0]:
            spread = torch.bmm(by_group, _as_factor(weights, group))
            of_images = _fold(spread, images, weights, geometry)
        if ctx.needs_input_grad[1]:
            # Unfolded once more: to keep it would take many times the memory of the images.
            product = torch.bmm(by_group.mT, _unfold(images, weights, geometry))
            kernel = weights.shape[2:]
            of_weights = product.view(outputs, *kernel, -1).permute(0, 3, 1, 2)
        if ctx.biased and ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_images, of_weights, of_bias, None


def _as_factor(weights: Tensor, group: int) -> Tensor:
    """group x (outputs / group) x (kernel pixels x channels / group)."""
    return weights.permute(0, 2, 3, 1).reshape(group, len(weights) // group, -1)


def _unfold(images: Tensor, weights: Tensor, geometry: Geometry) -> Tensor:
    """What each output sees: group x output pixels of all images x (kernel pixels x channels / group)."""
    batch, channels = images.shape[:2]
    group, (high, wide) = geometry.group, weights.shape[2:]
    size = geometry.outputs(images.shape[2:], (high, wide))
    padded = _padded(images, geometry)
    image, row, column, one = padded.stride()
    (down, across), (below, beside) = geometry.stride, geometry.dilation
    seen = padded.as_strided(
        (group, batch, *size, high, wide, channels // group),
        (channels // group, image, down * row, across * column, below * row, beside * column, one),
    )
    return seen.reshape(group, batch * size[0] * size[1], -1)


def _padded(images: Tensor, geometry: Geometry) -> Tensor:
    """batch x rows x columns x channels, with zeros around the pixels."""
    above, before = geometry.pad
    return F.pad(images.permute(0, 2, 3, 1), (0, 0, before, before, above, above)).contiguous()


def _fold(spread: Tensor, images: Tensor, weights: Tensor, geometry: Geometry) -> Tensor:
    """The reverse of `_unfold`: what all outputs give back to each pixel, summed up."""
    (batch, channels, height, width), (high, wide) = images.shape, weights.shape[2:]
    (down, across), (below, beside), (above, before) = geometry.stride, geometry.dilation, geometry.pad
    size = geometry.outputs((height, width), (high, wide))
    parts = spread.view(geometry.group, batch, *size, high, wide, -1)
    folded = images.new_zeros(
        (batch, height + 2 * above, width + 2 * before, geometry.group, channels // geometry.group)
    )
    for row in range(high):
        for column in range(wide):
            rows = slice(row * below, row * below + (size[0] - 1) * down + 1, down)
            columns = slice(column * beside, column * beside + (size[1] - 1) * across + 1, across)
            folded[:, rows, columns] += parts[:, :, :, :, row, column].permute(1, 2, 3, 0, 4)
    inside = folded.flatten(3)[:, above : above + height, before : before + width]
    return inside.permute(0, 3, 1, 2)
