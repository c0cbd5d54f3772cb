"""Values rounded to the numbers of a grid, with gradients that pass straight through.

Rounding has a gradient of zero almost everywhere. The straight-through estimator takes that of the identity
instead, and zero where a value is clipped (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018,
arXiv:1712.05877): with n = clip(round(x / step)), dn/dx is 1 / step where low <= round(x / step) <= high.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.quantization.grids import Grid


def rounded(values: Tensor, grid: Grid) -> Tensor:
    """The grid's number nearest to each of ``values``, as `Grid.numbers`; its gradient passes through."""
    numbers: Tensor = _Rounded.apply(values, steps_over(values, grid), grid.low, grid.high, grid.offset)
    return numbers


def steps_over(values: Tensor, grid: Grid) -> float | Tensor:
    """The grid's step, or its steps in a shape that broadcasts over ``values``."""
    if grid.steps.size == 1:
        return grid.step
    shape = [1] * values.dim()
    shape[grid.axis] = -1
    return torch.from_numpy(grid.steps).to(values.device, non_blocking=True).reshape(shape)


def stands_for(values: Tensor, numbers: Tensor, steps: Tensor) -> Tensor:
    """``numbers``, which were made of ``values`` elsewhere; the gradient is that of values / steps."""
    result: Tensor = _StandsFor.apply(values, numbers, steps)
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, steps: float | Tensor, low: float, high: float, offset: float
    ) -> Tensor:
        numbers = values / steps
        if offset:
            numbers += offset
        numbers.round_()
        if ctx.needs_input_grad[0]:
            ctx.steps = steps
            ctx.save_for_backward((numbers >= low) & (numbers <= high))
        return numbers.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside / ctx.steps, None, None, None, None


class _StandsFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, numbers: Tensor, steps: Tensor) -> Tensor:
        ctx.save_for_backward(steps)
        return numbers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (steps,) = ctx.saved_tensors
        return gradients[0] / steps, None, None
