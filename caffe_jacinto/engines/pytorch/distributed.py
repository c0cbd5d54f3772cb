"""Devices and ranks: one for each of several GPUs, by PyTorch's own launcher; the log of the first."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import FAILED, USER_ERROR, RunFailed, UserError
from caffe_jacinto.common.processes import keep_freed_memory
from caffe_jacinto.engines.caffe_log import CaffeLog, write_line
from caffe_jacinto.engines.pytorch.engine import PROGRAM, Options

_PATIENCE = timedelta(hours=2)
"""For a rank that writes a snapshot to a slow disk, or waits for its first batch."""


def device_of_rank(gpus: Sequence[int]) -> torch.device:
    """The device of this rank, made ready: that of ``gpus`` at its number on this machine; or the CPU.

    Raises:
        UserError: the GPU does not exist, or PyTorch cannot use it.
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
            f"GPU {gpus[local]} was requested, and this machine has {has}; leave -gpu out for the CPU"
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
            # Requests to stop are compared on the CPU, so that nothing waits for the device.
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

    def any(self, *requests: bool) -> tuple[bool, ...]:
        """Which requests at least one rank has."""
        if self.size == 1:
            return requests
        flags = torch.tensor(requests, dtype=torch.int32)
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


SOURCE = "caffe.cpp:0"
"""The file that Caffe's own command line logs from: readers of logs know it by that."""


@contextmanager
def open_log(ranks: Ranks, gpus: Sequence[int], options: Options) -> Iterator[CaffeLog]:
    """The log, written by the first rank alone. It begins with what this program is and where it runs.

    A `UserError` inside becomes a fatal line, as readers of the log expect it, and the exit code.
    """
    log = CaffeLog(_write_info if ranks.first else lambda message: None, SOURCE)
    log.info(
        f"This is caffe-torch {__version__} (PyTorch {torch.__version__}, files of dialect "
        f"{options.dialect.value}, {options.precision})"
    )
    # Over several machines the ranks count, wherever their GPUs are.
    log.using_devices(gpus if ranks.size in (1, len(gpus)) or not gpus else range(ranks.size))
    if ranks.size > 1 and not gpus:
        log.info(f"{ranks.size} ranks train together")
    try:
        yield log
    except UserError as error:
        log.fatal(str(error))
        raise SystemExit(FAILED if isinstance(error, RunFailed) else USER_ERROR) from None
    except torch.OutOfMemoryError as error:
        log.fatal(f"the GPU's memory is too small: use a smaller batch_size ({UserError(error)})")
        raise SystemExit(FAILED) from None


def _write_info(message: str) -> None:
    write_line("I", message, SOURCE)


_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Requests to stop, or for a snapshot."""


def all_gpus() -> tuple[int, ...]:
    """The GPUs of this machine.

    Raises:
        UserError: there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError("-gpu all: this machine has no GPU that PyTorch can use; leave -gpu out for the CPU")
    return tuple(range(count))


def is_rank() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ


def is_another_rank() -> bool:
    """Whether this is a rank that does not report for all."""
    return os.environ.get("RANK", "0") != "0"


def launch_ranks(argv: Sequence[str], ranks: int) -> int:
    """Run this program with ``argv`` once for each rank on this machine; returns the exit code.

    Signals are passed on to the ranks, which decide together. When one fails, all are ended.

    Raises:
        RunFailed: a rank was killed; one that failed by itself has reported why.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The rank that failed has reported why; the launcher's own messages add nothing.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        run_id=str(uuid.uuid4()),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        # Numbers: not every machine can look up "localhost" or its own name.
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        # Only this signal ends the ranks at once; requests to stop are passed on below.
        signals_to_handle="SIGQUIT",
    )
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _pass_on)
    try:
        elastic_launch(config, sys.executable)("-m", PROGRAM, *argv)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return int(first.exitcode)
        raise RunFailed(f"rank {rank} was killed by {first.signal_name()}; is there enough memory?") from None
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in _children():
        with suppress(ProcessLookupError):
            os.kill(child, number)


def _children() -> list[int]:
    """The processes that this one has started."""
    own, found = os.getpid(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # pid (name) state parent ...; the name may hold anything.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == own:
                    found.append(int(entry.name))
    return found


def describe_devices(gpus: tuple[int, ...]) -> int:
    """Print what the GPUs are, as Caffe's device_query; returns the exit code.

    Raises:
        UserError: there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for gpu in gpus:
        if gpu >= count:
            has = f"{count} GPU(s), numbered from 0" if count else "no GPU that PyTorch can use"
            raise UserError(f"-gpu {gpu}: this machine has {has}")
        properties = torch.cuda.get_device_properties(gpu)
        try:
            torch.ones(1, device=f"cuda:{gpu}").add_(1).item()
        except RuntimeError as error:  # built for other architectures, taken by another process, broken
            raise UserError(f"-gpu {gpu} ({properties.name}): {str(error).splitlines()[0]}") from None
        facts = {
            "Device id": gpu,
            "Name": properties.name,
            "Compute capability": f"{properties.major}.{properties.minor}",
            "Total global memory": properties.total_memory,
            "Number of multiprocessors": properties.multi_processor_count,
        }
        for name, value in facts.items():
            print(f"{name + ':':<32}{value}")
    return 0
