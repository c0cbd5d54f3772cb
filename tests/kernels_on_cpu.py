"""Compare the Triton kernels with PyTorch's functions, on the CPU in Triton's interpreter; errors as JSON.

Run by tests/test_torch_kernels.py: the interpreter is chosen before Triton is imported.
"""

from __future__ import annotations

import json
from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch import gpu_kernels
from caffe_jacinto.engines.pytorch.batch_norm import NormSettings
from caffe_jacinto.engines.pytorch.gpu_kernels import NormRectifyPool, cut_windows

# Small tiles and few programs: the images below take several of each.
gpu_kernels._TILE, gpu_kernels._PROGRAMS = 512, 5


def largest(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found - expected).detach().abs().max())


def error_of(channels: int, fork: bool, affine: bool, rectify: bool, pool: bool) -> float:
    """The largest error of outputs, gradients and moving averages."""
    images = (torch.randn(3, channels, 6, 10) * 3 + 1).contiguous(memory_format=torch.channels_last)
    scale, shift = (torch.randn(channels) if affine else None for _ in range(2))
    offset = torch.randn(channels).requires_grad_()
    moving = (torch.rand(channels), torch.rand(channels), torch.rand(1))
    before = [tensor.clone() for tensor in moving]
    mine, theirs = (
        [None if tensor is None else tensor.clone().requires_grad_() for tensor in (images, scale, shift)]
        for _ in range(2)
    )
    settings = NormSettings(1e-4, 0.9, fork, rectify, pool)
    result = NormRectifyPool.apply(*mine, offset, moving, settings)
    mean, variance = torch.zeros(channels), torch.zeros(channels)
    expected = F.batch_norm(theirs[0], mean, variance, theirs[1], theirs[2], True, 1.0, 1e-4)
    expected = torch.relu(expected) if rectify else expected
    expected = F.max_pool2d(expected, 2, 2) if pool else expected
    gradient = torch.randn_like(expected)
    result.backward(gradient)
    expected.backward(gradient)
    share = 0.1 if fork else 1.0
    factor = before[2] if fork else before[2] * 0.9 + 1
    errors = [
        largest(result, expected),
        largest(moving[0], before[0] * 0.9 + share * (mean + offset)),
        largest(moving[1], before[1] * 0.9 + share * variance),
        largest(moving[2], factor),
        largest(offset.grad, torch.zeros(channels)),
    ]
    errors += [largest(m.grad, t.grad) for m, t in zip(mine, theirs, strict=True) if m is not None]
    return max(errors)


def wrong_pixels() -> int:
    """Pixels that differ between windows that the kernel cut and windows that slices cut."""
    images = torch.randint(0, 256, (3, 3, 9, 11), dtype=torch.uint8)
    windows = torch.tensor([[0, 0, 0], [2, 3, 1], [1, 4, 1]])
    found = torch.zeros(3, 7, 6, 3, dtype=torch.uint8)
    cut_windows(images, windows, found)
    wrong = 0
    for image, (top, left, mirrored), window in zip(images, windows.tolist(), found, strict=True):
        expected = image[:, top : top + 7, left : left + 6].flip(0).permute(1, 2, 0)
        wrong += int((window != (expected.flip(1) if mirrored else expected)).sum())
    return wrong


def main() -> None:
    torch.manual_seed(0)
    flags = (False, True)
    cases = product((32, 20, 96), flags, flags, flags, flags)
    errors = {" ".join(map(str, case)): error_of(*case) for case in cases}
    not_a_number = torch.full((2, 16, 4, 4), float("nan"))
    moving = (torch.zeros(16), torch.zeros(16), torch.zeros(1))
    settings = NormSettings(1e-4, 0.9, False, True, True)
    passed = NormRectifyPool.apply(not_a_number, None, None, None, moving, settings)
    print(json.dumps({"errors": errors, "wrong pixels": wrong_pixels(), "nan": bool(passed.isnan().all())}))


if __name__ == "__main__":
    main()
