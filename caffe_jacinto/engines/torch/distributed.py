"""Several ranks that train one network: gradients averaged, decisions taken together.

Started by torch.distributed's launcher, which says each process its rank in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caffe_jacinto.errors import UserError
from caffe_jacinto.memory import keep_freed_memory

_PATIENCE = timedelta(hours=2)
"""For a rank that writes a snapshot to a slow disk, or waits for its first batch."""


def device_of_rank(gpus: Sequence[int]) -> torch.device:
    """The device of this rank, made ready: that of ``gpus`` at its number on this machine; or the CPU.

    Raises:
        UserError: there is no such GPU, or PyTorch cannot use it.
    """
    if not gpus:
        keep_freed_memory()
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= len(gpus):
        raise UserError(f"rank {local} of this machine has no GPU: -gpu names {len(gpus)}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus[local] >= there:
        has = f"{there} GPU(s) that PyTorch can use, from 0" if there else "no GPU that PyTorch can use"
        raise UserError(
            f"GPU {gpus[local]} is asked for, and this machine has {has}; leave -gpu out for the CPU"
        )
    device = torch.device("cuda", gpus[local])
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # all batches have one size
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says; -precision bf16 is the fast one
    return device


class Ranks:
    """This process among those that train together; alone, all of it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self._device = device
        self._control: Any = None
        if self.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
            # Wishes to stop are compared on the CPU, so that nothing waits for the device.
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this rank logs and writes the files."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set each tensor to its mean over the ranks, in one exchange."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Set each tensor to that of the first rank."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                values = tensor.detach().contiguous()
                dist.broadcast(values, 0)
                tensor.copy_(values)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each number."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._control)
        return [float(value) for value in summed]

    def any(self, *wishes: bool) -> tuple[bool, ...]:
        """Which wishes at least one rank has."""
        if self.size == 1:
            return wishes
        flags = torch.tensor(wishes, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(flag) for flag in flags)

    def agree(self, number: int) -> int:
        """The first rank's number."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(shared, 0, group=self._control)
        return int(shared[0])

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            dist.destroy_process_group()
