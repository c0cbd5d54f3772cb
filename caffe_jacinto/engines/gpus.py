"""Whether the GPUs that a recipe asks for are there, and this Caffe can use them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from caffe_jacinto.engines.contract import EngineInfo
from caffe_jacinto.errors import UserError


def check_gpus(info: EngineInfo, gpus: tuple[int, ...]) -> None:
    """Refuse GPUs that are not there or that this Caffe cannot use; no GPU asked for is the CPU.

    Raises:
        UserError: says which it is, and what to do.
    """
    if not gpus:
        if info.kind == "caffe-jacinto":
            raise UserError(
                f"{info.executable} is caffe-jacinto, which trains on GPUs only: name them, e.g. --gpus 0"
            )
        return
    asked = ",".join(map(str, gpus))
    if not info.gpu:
        what, other = (
            (f"PyTorch {info.version}", "install a PyTorch for them")
            if info.kind == "torch"
            else (str(info.executable), "name a Caffe built with CUDA by --caffe")
        )
        raise UserError(
            f"GPUs {asked} are asked for, but {what} is built for the CPU only: "
            f"leave the GPUs out, or {other}"
        )
    if len(gpus) > 1 and not info.multi_gpu:
        raise UserError(
            f"GPUs {asked} are asked for, but {info.executable} is built without NCCL, for one GPU only: "
            "name one, or rebuild it with USE_NCCL"
        )
    there = visible_gpus()
    missing = [gpu for gpu in gpus if gpu not in range(there)]
    if missing:
        has = f"GPUs 0 to {there - 1}" if there > 1 else "GPU 0 only" if there else "no NVIDIA GPU"
        raise UserError(
            f"GPUs {asked} are asked for, but {', '.join(map(str, missing))} is not there: "
            f"this machine has {has}"
        )


def visible_gpus() -> int:
    """How many NVIDIA GPUs a CUDA program started here would see; it numbers them from 0."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA takes the list up to the first entry that is no device.
        named = [entry.strip() for entry in chosen.split(",")]
        bad = next((i for i, entry in enumerate(named) if entry in ("", "-1")), len(named))
        return min(bad, _gpus_of_machine())
    return _gpus_of_machine()


def _gpus_of_machine() -> int:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.SubprocessError):
        pass
    driver = Path("/proc/driver/nvidia/gpus")
    if driver.is_dir():
        return len(list(driver.iterdir()))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
