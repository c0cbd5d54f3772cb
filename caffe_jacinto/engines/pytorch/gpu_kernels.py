"""Triton kernels: batch norm in training with what is behind it, and windows of decoded images.

Batch norm, ReLU and 2x2 max pooling take four passes over the images where PyTorch's own layers take nine:
statistics; normalize, rectify and pool; in the backward pass two sums for each channel, and the gradient. The
ReLU's output is not kept: the backward pass computes it again. Images are channels last; the kernels see them
as rows (pixels) of channels.

The formulas are those of batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1 and
section 3); partial means and variances are put together as in Chan, Golub and LeVeque 1983 ("Algorithms for
computing the sample variance", equation 1.5).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from caffe_jacinto.engines.pytorch.batch_norm import NormSettings

_TILE = 4096
"""Elements that a program works on at a time."""

_WIDEST = 64
"""Channels of a tile, at most."""

_PROGRAMS = 528
"""Of a pass that sums: four for each multiprocessor of a large card. More leave more sums to put together."""

_CHUNK = 64
"""Partial sums that are put together at a time."""


class NormRectifyPool(torch.autograd.Function):
    """Batch norm by the statistics of the batch, then ReLU and max pooling as the settings say."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        offset: Tensor | None,
        moving: tuple[Tensor, Tensor, Tensor],
        settings: NormSettings,
    ) -> Tensor:
        """``images``: batch x channels x height x width, channels last. ``moving`` (mean, variance, factor)
        takes in the batch. ``offset``: for each channel, what a convolution's bias would have added: it
        shifts the mean and changes nothing else.
        """
        batch, channels, height, width = images.shape
        rows, (tile, wide) = batch * height * width, _tile(channels)
        sums = _programs(rows, tile)
        partial = images.new_empty((3, sums, channels), dtype=torch.float32)
        _statistics[(sums, triton.cdiv(channels, wide))](
            images, partial, rows, channels, sums, TILE=tile, WIDE=wide
        )
        saved = images.new_empty((4, channels), dtype=torch.float32)
        _finish_statistics[(triton.cdiv(channels, 16),)](
            *(partial, saved, scale, shift, offset, *moving, rows, channels, sums),
            *(settings.eps, settings.fraction),
            FORK=settings.fork,
            SCALE=scale is not None,
            SHIFT=shift is not None,
            OFFSET=offset is not None,
            CHUNK=_CHUNK,
            WIDE=16,
        )
        size = (height // 2, width // 2) if settings.pool else (height, width)
        result = torch.empty(
            (batch, channels, *size),
            dtype=images.dtype,
            device=images.device,
            memory_format=torch.channels_last,
        )
        written = batch * size[0] * size[1]
        _normalize[(triton.cdiv(written, tile), triton.cdiv(channels, wide))](
            *(images, saved, result, written, channels, size[0], size[1]),
            RECTIFY=settings.rectify,
            POOL=settings.pool,
            TILE=tile,
            WIDE=wide,
        )
        ctx.save_for_backward(images, saved)
        ctx.settings, ctx.size = settings, size
        ctx.given = (scale is not None, shift is not None, offset is not None)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, saved = ctx.saved_tensors
        settings: NormSettings = ctx.settings
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = images.shape
        tile, wide = _tile(channels)
        if settings.pool:
            tile //= 4
        rows, read = batch * height * width, batch * ctx.size[0] * ctx.size[1]
        sums = _programs(read, tile)
        partial = images.new_empty((2, sums, channels), dtype=torch.float32)
        shape = (channels, ctx.size[0], ctx.size[1])
        flags = {"RECTIFY": settings.rectify, "POOL": settings.pool, "TILE": tile, "WIDE": wide}
        _sum_gradients[(sums, triton.cdiv(channels, wide))](
            gradient, images, saved, partial, read, *shape, sums, **flags
        )
        # For each channel: the gradients of scale and shift, and two factors of the images' gradient.
        found = images.new_empty((4, channels), dtype=torch.float32)
        _finish_gradients[(triton.cdiv(channels, 16),)](
            partial, saved, found, rows, channels, sums, CHUNK=_CHUNK, WIDE=16
        )
        result = torch.empty_like(images)
        _spread_gradients[(triton.cdiv(read, tile), triton.cdiv(channels, wide))](
            gradient, images, saved, found, result, read, *shape, **flags
        )
        scale, shift, offset = ctx.given
        # The batch norm subtracts what a bias adds: it gets no gradient.
        return (
            result,
            found[0] if scale else None,
            found[1] if shift else None,
            torch.zeros_like(found[0]) if offset else None,
            None,
            None,
        )


def _tile(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    wide = min(max(triton.next_power_of_2(channels), 16), _WIDEST)
    return _TILE // wide, wide


def _programs(rows: int, tile: int) -> int:
    return min(_PROGRAMS, triton.cdiv(rows, tile))


@triton.jit
def _statistics(x, partial, rows, channels, sums, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Count, mean and sum of squared differences from it, of the rows that a program sees.

    Differences are taken from the mean of the first few rows: close to the mean, so that nothing is lost.
    """
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < channels
    begin = tl.program_id(0) * TILE
    near = begin + tl.arange(0, 16)
    seen = (near < rows)[:, None] & inside[None, :]
    first = tl.load(x + near[:, None].to(tl.int64) * channels + column[None, :], seen, 0.0).to(tl.float32)
    pivot = tl.sum(first, 0) / tl.minimum(rows - begin, 16)
    apart = tl.zeros((TILE, WIDE), tl.float32)
    squares = tl.zeros((TILE, WIDE), tl.float32)
    count = 0
    for start in range(begin, rows, sums * TILE):
        row = start + tl.arange(0, TILE)
        mask = (row < rows)[:, None] & inside[None, :]
        values = tl.load(x + row[:, None].to(tl.int64) * channels + column[None, :], mask, 0.0).to(tl.float32)
        values = tl.where(mask, values - pivot[None, :], 0.0)
        apart += values
        squares += values * values
        count += tl.minimum(rows - start, TILE)
    total = tl.sum(apart, 0)
    at = partial + tl.program_id(0) * channels + column
    tl.store(at, pivot + total / count, inside)
    tl.store(at + sums * channels, tl.sum(squares, 0) - total * total / count, inside)
    tl.store(at + 2 * sums * channels, tl.zeros((WIDE,), tl.float32) + count, inside)


@triton.jit
def _finish_statistics(
    partial,
    saved,
    scale,
    shift,
    offset,
    moving_mean,
    moving_variance,
    factor,
    rows,
    channels,
    sums,
    eps,
    fraction,
    FORK: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean, 1 / deviation, factor and summand that normalize; the moving averages take in the batch."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = column < channels
    part = tl.arange(0, CHUNK)
    mean = tl.zeros((WIDE,), tl.float32)
    for start in range(0, sums, CHUNK):
        mask = (start + part < sums)[:, None] & inside[None, :]
        at = partial + (start + part)[:, None] * channels + column[None, :]
        mean += tl.sum(tl.load(at, mask, 0.0) * tl.load(at + 2 * sums * channels, mask, 0.0), 0)
    mean /= rows
    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, sums, CHUNK):
        mask = (start + part < sums)[:, None] & inside[None, :]
        at = partial + (start + part)[:, None] * channels + column[None, :]
        apart = tl.load(at, mask, 0.0) - mean[None, :]
        count = tl.load(at + 2 * sums * channels, mask, 0.0)
        squares += tl.sum(tl.load(at + sums * channels, mask, 0.0) + apart * apart * count, 0)
    inverse = 1 / tl.sqrt(squares / rows + eps)
    times = inverse
    if SCALE:
        times = times * tl.load(scale + column, inside, 0.0)
    plus = -mean * times
    if SHIFT:
        plus += tl.load(shift + column, inside, 0.0)
    tl.store(saved + column, mean, inside)
    tl.store(saved + channels + column, inverse, inside)
    tl.store(saved + 2 * channels + column, times, inside)
    tl.store(saved + 3 * channels + column, plus, inside)
    if OFFSET:
        mean += tl.load(offset + column, inside, 0.0)
    share = 1.0
    if FORK:
        share = 1 - fraction
    kept = tl.load(moving_mean + column, inside, 0.0) * fraction
    tl.store(moving_mean + column, kept + share * mean, inside)
    kept = tl.load(moving_variance + column, inside, 0.0) * fraction
    tl.store(moving_variance + column, kept + share * squares / (rows - 1), inside)
    if not FORK:
        if tl.program_id(0) == 0:
            tl.store(factor, tl.load(factor) * fraction + 1)


@triton.jit
def _rectified(values, times, plus, RECTIFY: tl.constexpr):
    """A value that is not a number stays one."""
    result = values.to(tl.float32) * times + plus
    if RECTIFY:
        result = tl.where(result <= 0, 0.0, result)
    return result


@triton.jit
def _corner(row, high, wide):
    """The first of the four pixels that pooled pixel number ``row`` is the largest of."""
    image = row // (high * wide)
    down = row // wide % high
    across = row % wide
    return (image * high * 2 + down * 2) * (wide * 2) + across * 2


@triton.jit
def _normalize(
    x,
    saved,
    result,
    rows,
    channels,
    high,
    wide,
    RECTIFY: tl.constexpr,
    POOL: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < channels
    times = tl.load(saved + 2 * channels + column, inside, 0.0)[None, :]
    plus = tl.load(saved + 3 * channels + column, inside, 0.0)[None, :]
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & inside[None, :]
    if POOL:
        at = x + _corner(row, high, wide)[:, None] * channels + column[None, :]
        largest = _rectified(tl.load(at, mask, 0.0), times, plus, RECTIFY)
        for place in tl.static_range(1, 4):
            behind = (place // 2 * wide * 2 + place % 2) * channels
            value = _rectified(tl.load(at + behind, mask, 0.0), times, plus, RECTIFY)
            largest = tl.where((value > largest) | (value != value), value, largest)
    else:
        at = x + row[:, None] * channels + column[None, :]
        largest = _rectified(tl.load(at, mask, 0.0), times, plus, RECTIFY)
    tl.store(result + row[:, None] * channels + column[None, :], largest, mask)


@triton.jit
def _sum_gradients(
    gradient,
    x,
    saved,
    partial,
    rows,
    channels,
    high,
    wide,
    sums,
    RECTIFY: tl.constexpr,
    POOL: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sums of the gradient behind the ReLU, and of it times the normalized images."""
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < channels
    mean = tl.load(saved + column, inside, 0.0)[None, :]
    inverse = tl.load(saved + channels + column, inside, 0.0)[None, :]
    times = tl.load(saved + 2 * channels + column, inside, 0.0)[None, :]
    plus = tl.load(saved + 3 * channels + column, inside, 0.0)[None, :]
    plain = tl.zeros((TILE, WIDE), tl.float32)
    scaled = tl.zeros((TILE, WIDE), tl.float32)
    for start in range(tl.program_id(0) * TILE, rows, sums * TILE):
        row = (start + tl.arange(0, TILE)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        passed = tl.load(gradient + row[:, None] * channels + column[None, :], mask, 0.0).to(tl.float32)
        if POOL:
            at = x + _corner(row, high, wide)[:, None] * channels + column[None, :]
            chosen = tl.load(at, mask, 0.0).to(tl.float32)
            largest = _rectified(chosen, times, plus, RECTIFY)
            for place in tl.static_range(1, 4):
                behind = (place // 2 * wide * 2 + place % 2) * channels
                own = tl.load(at + behind, mask, 0.0).to(tl.float32)
                value = _rectified(own, times, plus, RECTIFY)
                chosen = tl.where(value > largest, own, chosen)
                largest = tl.where(value > largest, value, largest)
        else:
            at = x + row[:, None] * channels + column[None, :]
            chosen = tl.load(at, mask, 0.0).to(tl.float32)
            largest = _rectified(chosen, times, plus, RECTIFY)
        if RECTIFY:
            passed = tl.where(largest > 0, passed, 0.0)
        plain += passed
        scaled += passed * (chosen - mean)
    at_sum = partial + tl.program_id(0) * channels + column
    tl.store(at_sum, tl.sum(plain, 0), inside)
    tl.store(at_sum + sums * channels, tl.sum(scaled * inverse, 0), inside)


@triton.jit
def _finish_gradients(partial, saved, found, rows, channels, sums, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Gradients of scale and shift. With g behind the ReLU, that of x is times g + found[2] x + found[3]."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = column < channels
    part = tl.arange(0, CHUNK)
    plain = tl.zeros((WIDE,), tl.float32)
    scaled = tl.zeros((WIDE,), tl.float32)
    for start in range(0, sums, CHUNK):
        mask = (start + part < sums)[:, None] & inside[None, :]
        at = partial + (start + part)[:, None] * channels + column[None, :]
        plain += tl.sum(tl.load(at, mask, 0.0), 0)
        scaled += tl.sum(tl.load(at + sums * channels, mask, 0.0), 0)
    mean = tl.load(saved + column, inside, 0.0)
    inverse = tl.load(saved + channels + column, inside, 0.0)
    times = tl.load(saved + 2 * channels + column, inside, 0.0)
    slope = -times * inverse * scaled / rows
    tl.store(found + column, scaled, inside)
    tl.store(found + channels + column, plain, inside)
    tl.store(found + 2 * channels + column, slope, inside)
    tl.store(found + 3 * channels + column, -times * plain / rows - slope * mean, inside)


@triton.jit
def _spread_gradients(
    gradient,
    x,
    saved,
    found,
    result,
    rows,
    channels,
    high,
    wide,
    RECTIFY: tl.constexpr,
    POOL: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of the images."""
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < channels
    times = tl.load(saved + 2 * channels + column, inside, 0.0)[None, :]
    plus = tl.load(saved + 3 * channels + column, inside, 0.0)[None, :]
    slope = tl.load(found + 2 * channels + column, inside, 0.0)[None, :]
    rest = tl.load(found + 3 * channels + column, inside, 0.0)[None, :]
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & inside[None, :]
    passed = tl.load(gradient + row[:, None] * channels + column[None, :], mask, 0.0).to(tl.float32)
    if POOL:
        first = _corner(row, high, wide)[:, None] * channels + column[None, :]
        largest = _rectified(tl.load(x + first, mask, 0.0), times, plus, RECTIFY)
        chosen = tl.zeros((TILE, WIDE), tl.int32)
        for place in tl.static_range(1, 4):
            behind = (place // 2 * wide * 2 + place % 2) * channels
            value = _rectified(tl.load(x + first + behind, mask, 0.0), times, plus, RECTIFY)
            chosen = tl.where(value > largest, place, chosen)
            largest = tl.where(value > largest, value, largest)
        if RECTIFY:
            passed = tl.where(largest > 0, passed, 0.0)
        for place in tl.static_range(0, 4):
            behind = (place // 2 * wide * 2 + place % 2) * channels
            own = tl.load(x + first + behind, mask, 0.0).to(tl.float32)
            taken = tl.where(chosen == place, passed, 0.0)
            tl.store(result + first + behind, times * taken + slope * own + rest, mask)
    else:
        at = row[:, None] * channels + column[None, :]
        own = tl.load(x + at, mask, 0.0).to(tl.float32)
        if RECTIFY:
            passed = tl.where(_rectified(own, times, plus, RECTIFY) > 0, passed, 0.0)
        tl.store(result + at, times * passed + slope * own + rest, mask)


def cut_windows(images: Tensor, windows: Tensor, into: Tensor) -> None:
    """Windows of planar images (batch x channels x height x width), channels last and in reverse order.

    ``windows`` are batch x (top, left, mirrored); ``into`` is batch x rows x columns x channels.
    """
    batch, channels, height, width = images.shape
    _, rows, columns, _ = into.shape
    across = triton.next_power_of_2(columns)
    _cut_row[(batch * rows,)](*(images, windows, into, channels, height, width, rows, columns), ACROSS=across)


@triton.jit
def _cut_row(images, windows, into, channels, height, width, rows, columns, ACROSS: tl.constexpr):
    """One row of one image."""
    image = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    top = tl.load(windows + image * 3)
    left = tl.load(windows + image * 3 + 1)
    mirrored = tl.load(windows + image * 3 + 2)
    column = tl.arange(0, ACROSS)
    source = left + tl.where(mirrored != 0, columns - 1 - column, column)
    mask = column < columns
    for channel in range(channels):
        plane = image.to(tl.int64) * channels + (channels - 1 - channel)
        pixels = tl.load(images + (plane * height + top + row) * width + source, mask, 0)
        at = (tl.program_id(0).to(tl.int64) * columns + column) * channels + channel
        tl.store(into + at, pixels, mask)
