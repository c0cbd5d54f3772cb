"""How long a GPU takes for what a training will do, measured before it begins."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

_CYCLES = 4e9
"""Cycles that keep a GPU busy for a second at least: twice those of the fastest clocks."""

_REPEATED = 3


def milliseconds(run: Callable[[], object]) -> float:
    """The least time that the current GPU takes for ``run``, after one call that chooses algorithms.

    A training on one GPU replays its kernels as a graph. Here they are started one by one, which can take
    longer than they do: so the GPU is kept busy until all of them wait. Several ranks train without a graph;
    for them the time to start kernels counts.
    """
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    to_start = time.perf_counter() - started
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    keep_busy = getattr(torch.cuda, "_sleep", None) if alone else None
    times = []
    for _ in range(_REPEATED):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if keep_busy is not None:
            keep_busy(int(_CYCLES * to_start))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return min(times)
