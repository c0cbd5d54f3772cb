"""JPEG decoding on an NVIDIA GPU, by torchvision's nvJPEG, and whether it is faster than the processor's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import util
from typing import Literal

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.batches import Images
from caffe_jacinto.data.datum import decoded
from caffe_jacinto.data.encode import BadImageError
from caffe_jacinto.engines.pytorch.fusion import has_kernels

Decode = Literal["cpu", "gpu", "both"]
"""Where batches are decoded; both: every other one on the GPU."""

DECODERS: tuple[Decode, ...] = ("cpu", "gpu", "both")

_TRIED = 128
"""Images that are looked at before decoding on the GPU is tried."""


def can_decode(device: torch.device) -> str | None:
    """Why ``device`` does not decode JPEG files; None where it does."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    if util.find_spec("torchvision") is None:
        return "it needs torchvision, which is not installed"
    try:
        import torchvision.io  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one made for another PyTorch
        return f"it needs torchvision, which cannot be imported: {UserError(error)}"
    return None if has_kernels(device) else "it needs Triton and a GPU that Triton supports"


def decode_jpegs(files: Tensor, ends: Sequence[int], device: torch.device) -> list[Tensor]:
    """Decode JPEG files: each 3 (red, green, blue) x height x width, 8-bit, on ``device``.

    ``files`` are the bytes of all of them, in memory of the host, and ``ends`` where each ends. Where nvJPEG
    cannot decode one of them, as with some samplings of colours, the processor decodes all.

    Raises:
        UserError: one of them cannot be decoded at all.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        images: list[Tensor] = decode_jpeg(_parts(files, ends), mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Python shows the same warning once; the log has it, as all of stderr.
        warnings.warn(f"the processor decodes batches that nvJPEG refuses: {UserError(error)}", stacklevel=2)
        return [image.to(device) for image in decode_on_cpu(files, ends)]
    return images


def decode_on_cpu(files: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """As `decode_jpegs`, in memory of the host.

    Raises:
        UserError: one of them cannot be decoded.
    """
    try:
        images = [decoded(part.numpy().tobytes()) for part in _parts(files, ends)]
    except BadImageError as error:
        raise UserError(f"one of the JPEG files: {error}; -decode cpu says which") from None
    return [torch.from_numpy(image).flip(0) for image in images]


def _parts(files: Tensor, ends: Sequence[int]) -> list[Tensor]:
    return [files[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def cut(images: Sequence[Tensor], windows: Tensor, into: Tensor) -> Tensor:
    """Cut ``images`` (each 3 (red, green, blue) x height x width) to their ``windows``.

    ``windows`` are batch x (top, left, mirrored), ``into`` is batch x height x width x 3 (blue, green, red),
    all on one GPU. Returns what the GPU reads, which has to stay until that is done.
    """
    from caffe_jacinto.engines.pytorch.gpu_kernels import cut_windows

    together = torch.stack(list(images))
    cut_windows(together, windows, into)
    return together


def faster_decode(
    images: Images, device: torch.device, workers: int, speed: Callable[[Decode], float]
) -> tuple[Decode, str]:
    """Where to decode, and a line for the log that says so; ``speed`` feeds images, and returns images/s."""
    begin = f"Images are decoded by {workers} processes"
    if can_decode(device):
        return "cpu", begin
    if not images.are_colour_jpegs(_TRIED):
        return "cpu", f"{begin}: not all are colour JPEG files of one size"
    speeds: dict[Decode, float] = {}
    for way in DECODERS:
        with suppress(UserError, torch.OutOfMemoryError):
            speeds[way] = speed(way)
    where: Decode = max(speeds, key=lambda way: speeds[way], default="cpu")
    names = {"cpu": f"by {workers} processes", "gpu": "on the GPU", "both": "by both in turn"}
    found = ", ".join(f"{names[way]} {one:,.0f} images/s" for way, one in speeds.items())
    return where, f"Images are decoded {names[where]}; measured: {found or 'nothing'}"
