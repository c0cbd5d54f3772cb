"""Devices and ranks: one for each of several GPUs, by PyTorch's own launcher; the log of the first."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import (
    FAILED,
    LOST,
    RunFailed,
    UserError,
    UserErrors,
    WorkLost,
    exit_code,
)
from caffe_jacinto.common.processes import WARNINGS, keep_freed_memory
from caffe_jacinto.engines.caffe_log import CAFFE_SOURCE, CaffeLog, write_line
from caffe_jacinto.engines.pytorch.engine import PROGRAM, Options
from caffe_jacinto.engines.pytorch.precision import allow_tf32

if TYPE_CHECKING:
    from caffe_jacinto.engines.pytorch.net import Net
    from caffe_jacinto.engines.pytorch.qat import QuantizedTraining

    Trained: TypeAlias = "Net | QuantizedTraining"

_PATIENCE = timedelta(hours=2)
"""For a rank that writes a snapshot to a slow disk, or waits for its first batch."""

MEETING_SECONDS = "CAFFE_JACINTO_RENDEZVOUS_SECONDS"
"""The environment variable with the time in which all ranks have to start; default: 10 minutes."""


def device_of_rank(gpus: Sequence[int], options: Options) -> torch.device:
    """The device of this rank, made ready: that of ``gpus`` at its number on this machine; or the CPU.

    ``options`` say how exactly it has to compute.

    Raises:
        UserError: the GPU does not exist, or PyTorch cannot use it.
    """
    torch.backends.cudnn.benchmark = not options.deterministic  # all batches have one size
    if not gpus:
        if options.precision == "tf32":
            raise UserError("-precision tf32 needs a GPU: give -gpu, or leave it out for fp32")
        keep_freed_memory()
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    # Every rank of a machine checks for all of them, so that one can report.
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local + 1)
    if here > len(gpus):
        raise UserError(f"{here} ranks of this machine have no GPU each: -gpu names {len(gpus)}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [gpu for gpu in gpus if gpu >= there]
    if missing:
        has = f"{there} GPU(s) that PyTorch can use, from 0" if there else "no GPU that PyTorch can use"
        raise UserError(
            f"GPU {missing[0]} was requested, and this machine has {has}; leave -gpu out for the CPU"
        )
    device = torch.device("cuda", gpus[local])
    torch.cuda.set_device(device)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    allow_tf32(options.precision)
    return device


class FoundByAll(RunFailed):
    """What all ranks have found together: the first one reports it."""


class Ranks:
    """This process among those that train or test together; alone, all of it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self._device = device
        self._control: Any = None
        if self.size > 1:
            store = _meet(self.rank, self.size)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
            )
            # Requests to stop are compared on the CPU, so that nothing waits for the device.
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this rank logs and writes the files."""
        return self.rank == 0

    def parallel(self, net: Trained) -> Trained | DistributedDataParallel:
        """``net``, whose gradients are averaged over the ranks while they are computed."""
        if self.size == 1:
            return net
        # Kernels for one input channel, and those of 1x1, have two names for the same order in memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            # PyTorch 2.13 recommends another argument, which copies the first rank's statistics here.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                net,
                broadcast_buffers=False,  # batch-norm statistics stay those of each rank
                gradient_as_bucket_view=True,
                find_unused_parameters=net.has_unused_weights(),
            )

    def no_exchange(self, net: Trained | DistributedDataParallel) -> AbstractContextManager[None]:
        """A context in which backward passes add to the gradients of this rank only."""
        return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()

    def different(self, numbers: Mapping[str, int]) -> list[str]:
        """The names whose numbers are not the same on all ranks; all of them have the same names."""
        if self.size == 1 or not numbers:
            return []
        own = torch.tensor([*numbers.values()], dtype=torch.int64)
        limits = torch.stack([own, -own])
        dist.all_reduce(limits, op=dist.ReduceOp.MAX, group=self._control)
        differ = (limits[0] != -limits[1]).tolist()
        return [name for name, differs in zip(numbers, differ, strict=True) if differs]

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


def _meet(rank: int, size: int) -> Any:
    """Wait until all ranks are there; returns their common store.

    They meet where torchrun or Slurm says: at $MASTER_PORT of $MASTER_ADDR, the first rank's machine.

    Raises:
        RunFailed: not all of them came within the limit.
    """
    limit = _meeting_limit()
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise UserError("$MASTER_ADDR and $MASTER_PORT must name where the ranks meet, as torchrun sets them")
    at, seconds = f"{host}:{port}", f"{limit.total_seconds():g} s (${MEETING_SECONDS})"
    c10d: Any = dist  # its type stubs lack the stores
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = c10d.TCPStore(host, int(port), size, own, timeout=limit, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        what = "cannot be opened for the other ranks" if own else f"was not open within {seconds}"
        raise RunFailed(
            f"rank {rank} of {size}: {at}, where the ranks meet, {what}: {_first_line(error)}"
        ) from None
    store = c10d.PrefixStore(f"caffe-torch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        if store.add("ranks", 1) == size:
            store.set("all", "")
        store.wait(["all"], limit)
    except RuntimeError:
        with suppress(RuntimeError):
            raise RunFailed(
                f"only {store.add('ranks', 0)} of {size} ranks came to {at} within {seconds}: "
                "start the others within that time, and see what those that ended have said"
            ) from None
        raise WorkLost(f"rank {rank} of {size}: the first rank ended before all had come to {at}") from None
    return store


def _meeting_limit() -> timedelta:
    text = os.environ.get(MEETING_SECONDS, "600")
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 10**6:
        raise UserError(f"${MEETING_SECONDS} is {text[:40]!r}, not a number of seconds")
    return timedelta(seconds=int(text))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def open_log(
    ranks: Ranks,
    gpus: Sequence[int],
    options: Options,
    batch_that_fits: Callable[[], int | None] = lambda: None,
) -> Iterator[CaffeLog]:
    """The log, written by the first rank alone. It begins with what this program is and where it runs.

    A `UserError` inside becomes a fatal line, as readers of the log expect it, and the exit code.
    ``batch_that_fits`` is asked where the GPU's memory is too small.
    """
    log = CaffeLog(_write_info if ranks.first else lambda message: None, CAFFE_SOURCE)
    log.info(
        f"This is caffe-torch {__version__} (PyTorch {torch.__version__}, files of dialect "
        f"{options.dialect.value}, {options.precision})"
    )
    # Over several machines the ranks count, wherever their GPUs are.
    log.using_devices(gpus if ranks.size in (1, len(gpus)) or not gpus else range(ranks.size))
    if ranks.size > 1 and not gpus:
        log.info(f"{ranks.size} ranks {options.action} together")
    try:
        yield log
    except UserError as error:
        if isinstance(error, FoundByAll) and not ranks.first:
            _let_first_report()
        log.fatal(_here() + str(error))
        raise SystemExit(exit_code(error)) from None
    except torch.OutOfMemoryError as error:
        why = _first_line(error)
        traceback.clear_frames(error.__traceback__)  # they hold what is in the memory
        fits = batch_that_fits()
        hint = f"a batch_size of {fits:,} should fit" if fits else "use a smaller batch_size"
        log.fatal(f"{_here()}the GPU's memory is too small: {hint}; the rest by iter_size ({why})")
        raise SystemExit(FAILED) from None
    except OSError as error:
        if not _several_machines():
            raise
        log.fatal(f"{_here()}{UserError(error)}")
        raise SystemExit(FAILED) from None
    except RuntimeError as error:
        if ranks.size == 1 or not _is_lost_connection(error):
            raise
        reason = re.sub(r"^\[[^\]]*\]\s*", "", _first_line(error))  # without the place in gloo's source
        # Not fatal: the other rank's own line says why it ended, and may come later.
        log.warning(f"{_here()}rank {ranks.rank} lost another rank: {reason[:200]}")
        raise SystemExit(LOST) from None


def _write_info(message: str) -> None:
    write_line("I", message, CAFFE_SOURCE)


_LAUNCHER = "CAFFE_JACINTO_LAUNCHER_PID"
"""The environment variable with the process that started the ranks of this machine."""

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
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


def launcher() -> int:
    """The process that started this rank; of torchrun and Slurm's, the one that is this rank's parent now."""
    return int(os.environ.get(_LAUNCHER, os.getppid()))


_FIRST_REPORTS_SECONDS = 10
"""For the first rank, or that of a machine, to report a mistake that all of them find."""


def _let_first_report() -> None:
    """Wait to be ended with the rank that reports."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the launcher ends the others
    time.sleep(_FIRST_REPORTS_SECONDS)


def report_of_rank(error: Exception) -> NoReturn:
    """Raise what ended this process before its log was open, for one line of the program's.

    What is wrong for one rank before the ranks have met is wrong for all on its machine, as a rule: the first
    one says so, and its end ends the others.
    """
    if isinstance(error, UserError) and not isinstance(error, RunFailed):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            _let_first_report()
        raise UserErrors([_here() + line for line in error.lines()]) from None
    raise error


def _several_machines() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")


def _here() -> str:
    """Begins a message with this machine's name, where there are several."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"on {name}: " if _several_machines() else ""


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether it is gloo's, NCCL's or the store's error for a rank that is gone."""
    return isinstance(error, dist.DistError) or re.search(r"\bgloo\b|NCCL", str(error)) is not None


def share_cores(ranks: int) -> None:
    """Have each of ``ranks`` processes on this machine's CPU compute with its share of the cores.

    The user's own $OMP_NUM_THREADS is kept.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))


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
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)("-m", PROGRAM, *argv)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        killed = {r: failure for r, failure in error.failures.items() if failure.exitcode < 0}
        if first.exitcode > 0 and not (first.exitcode == LOST and killed):
            return int(first.exitcode)
        rank, first = next(iter(killed.items()))
        raise WorkLost(f"rank {rank} was killed by {first.signal_name()}; is there enough memory?") from None
    finally:
        del os.environ[_LAUNCHER]
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
