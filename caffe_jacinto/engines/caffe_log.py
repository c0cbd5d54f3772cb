"""Log lines of the trainings that are written here: through Caffe's own logger, or as it would write them.

The wording of each line is Caffe's, or the fork's where stock Caffe has none, so that one reader serves all
logs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime


def write_line(severity: str, message: str, source: str = "solver.py:0") -> None:
    """A line on stderr in the form of Caffe's logger, glog; ``severity`` is I, W, E or F."""
    line = (
        f"{severity}{datetime.now():%Y%m%d %H:%M:%S.%f} {threading.get_native_id():5d} {source}] {message}\n"
    )
    os.write(2, line.encode(errors="replace"))


def _through_caffe(message: str) -> None:
    """Caffe has to be started."""
    from caffe import log

    log(message)


_write_info: Callable[[str], None] = _through_caffe


def log_with(write: Callable[[str], None]) -> None:
    """Write I lines with ``write`` from now on, and not through Caffe."""
    global _write_info
    _write_info = write


def info(message: str) -> None:
    """An I line."""
    _write_info(message)


def fatal(message: str) -> None:
    """An F line; ending the program is the caller's (pycaffe's logger has no such lines)."""
    write_line("F", message)


def number(value: float) -> str:
    """As C++ streams print a float: six digits, no trailing zeros."""
    return f"{value:g}"


def train_progress(iteration: int, seconds: float, iterations: int, loss: float) -> None:
    """``iterations`` are those since the last such line, done in ``seconds``."""
    rate = iterations / seconds if seconds > 0 else 0.0
    info(
        f"Iteration {iteration} ({number(rate)} iter/s, {number(seconds)}s/{iterations} iter), "
        f"loss = {number(loss)}"
    )


def net_output(kind: str, index: int, name: str, value: float, loss_weight: float) -> None:
    """One output of the ``Train`` or ``Test`` net."""
    loss = f" (* {number(loss_weight)} = {number(loss_weight * value)} loss)" if loss_weight else ""
    info(f"    {kind} net output #{index}: {name} = {number(value)}{loss}")


def sparsity(zeros: Mapping[str, int], counts: Mapping[str, int]) -> None:
    """Zeros and weights of each layer by name, and over all."""
    info("Sparsity after update:")
    info(f"Num Params({len(counts)}), Sparsity (zero_weights/count): ")
    for name in sorted(counts):
        info(f"{name}_param_0({zeros[name] / counts[name]:.3g}) ")
    total, count = sum(zeros.values()), sum(counts.values())
    info(
        f"Total Sparsity (zero_weights/count) =  ({number(total)}/{number(count)}) "
        f"{total / count if count else 0:.3g}"
    )


def using_devices(gpus: Sequence[int]) -> None:
    """Where the solver runs."""
    info(f"Using GPUs {', '.join(map(str, gpus))}" if gpus else "Use CPU.")
