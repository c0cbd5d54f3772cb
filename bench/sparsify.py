"""The cost of pruning with stock Caffe, on JacintoNet11: applying the masks, and a threshold step.

    python bench/sparsify.py [--caffe PATH] [--iterations 6]

Limits: masks at most 2 % of an iteration, a threshold step over all layers at most 0.08 s. The images are
noise, since their content does not affect the time. Times are medians, but still depend on other work on
the machine. Prints a Markdown table; the exit code is 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.discovery import find_engine
from caffe_jacinto.engines.pycaffe.net import start_caffe
from caffe_jacinto.engines.pycaffe.stepper import Job, Stepper
from caffe_jacinto.networks.stage_files import stage_files, write_stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.prototxt.solver import read_solver
from caffe_jacinto.recipes.load import load_recipe

MASK_LIMIT = 0.02
THRESHOLD_LIMIT = 0.08
CASES = (
    ("224x224, strides 2,2,2,2,2", 224, (2, 2, 2, 2, 2), 16),
    ("32x32, strides 1,2,2,2,2", 32, (1, 2, 2, 2, 2), 64),
)
FACTORS = tuple(step / 10 for step in range(1, 9))
"""The factors of the threshold steps that are timed, up to the published target."""

BATCHES = 2


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caffe")
    parser.add_argument("--iterations", type=int, default=6)
    arguments = parser.parse_args(argv)
    info = find_engine(arguments.caffe, "bvlc").info
    if info.pycaffe is None:
        raise UserError("; ".join(info.notes))
    rows, within = [], True
    with tempfile.TemporaryDirectory() as scratch, _caffe_log_in(Path(scratch) / "caffe.log"):
        caffe, log = start_caffe(info.pycaffe, ())
        for number, (label, size, strides, batch) in enumerate(CASES):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            step, hold, threshold = _measure(
                _stepper(caffe, log, folder, size, strides, batch), arguments.iterations
            )
            share = hold / (step + hold)
            within = within and share <= MASK_LIMIT and threshold <= THRESHOLD_LIMIT
            rows.append(
                f"| {label}, batch {batch} | {step * 1e3:.0f} ms | {hold * 1e3:.2f} ms | {share:.2%} "
                f"| {threshold * 1e3:.0f} ms |"
            )
    print("| JacintoNet11 | step of Caffe's solver | masks | share of an iteration | threshold step |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    print(
        f"\nlimits: masks {MASK_LIMIT:.0%} of an iteration, threshold step {THRESHOLD_LIMIT * 1e3:.0f} ms: ",
        end="",
    )
    print("kept" if within else "BROKEN")
    return 0 if within else 1


@contextmanager
def _caffe_log_in(path: Path) -> Iterator[None]:
    """Send Caffe's log, which goes to standard error, to a file, and show it only after an error."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    except BaseException:
        os.write(terminal, path.read_bytes())
        raise
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _stepper(
    caffe: object, log: CaffeLog, folder: Path, size: int, strides: tuple[int, ...], batch: int
) -> Stepper:
    """A sparse stage of JacintoNet11 on noise, before its first threshold."""
    _noise(folder / "noise", size, batch * BATCHES)
    values = {
        "data.train_lmdb": str(folder / "noise"),
        "data.val_lmdb": str(folder / "noise"),
        "network.crop_size": size,
        "network.strides": list(strides),
        "training.batch_size": batch,
        "training.iter_size": 1,
    }
    recipe = load_recipe("imagenet_jacintonet11", [f"{key}={value!r}" for key, value in values.items()])
    files = stage_files(
        recipe, "sparse", Dialect.BVLC, folder=str(folder), gpus=(), iter_size=1, solver_mode_gpu=False
    )
    write_stage_files(files, folder)
    job = Job(
        read_solver(folder / "solver.prototxt", Dialect.BVLC), None, None, recipe.stages["sparse"].sparse, 0
    )
    return Stepper(caffe, job, StopRequests(), log)


def _noise(folder: Path, size: int, images: int) -> None:
    import lmdb
    import numpy as np

    datum = messages(Dialect.BVLC).Datum
    random = np.random.default_rng(0)
    environment = lmdb.open(str(folder), map_size=1 << 30)
    with environment.begin(write=True) as transaction:
        for index in range(images):
            pixels = random.integers(0, 256, (3, size, size), np.uint8).tobytes()
            message = datum(channels=3, height=size, width=size, data=pixels, label=index % 1000)
            transaction.put(f"{index:08d}".encode(), message.SerializeToString())
    environment.close()


def _measure(stepper: Stepper, iterations: int) -> tuple[float, float, float]:
    """Medians in seconds: a step of Caffe's solver, holding the zeros after it, a whole threshold step."""
    sparse = stepper.job.sparse
    assert sparse is not None
    stepper.solver.step(1)
    thresholds, steps, holds = [], [], []
    for factor in FACTORS:
        begin = time.perf_counter()
        stepper.pruner.apply_threshold(sparse, factor)
        thresholds.append(time.perf_counter() - begin)
    for _ in range(iterations):
        begin = time.perf_counter()
        stepper.solver.step(1)
        middle = time.perf_counter()
        stepper.pruner.zero_weights()
        steps.append(middle - begin)
        holds.append(time.perf_counter() - middle)
    return statistics.median(steps), statistics.median(holds), statistics.median(thresholds)


if __name__ == "__main__":
    sys.exit(run_command("bench/sparsify.py", main))
