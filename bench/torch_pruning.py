"""What pruning costs an iteration of `caffe-torch train` on a CPU, by method, on JacintoNet11 at 32x32.

    python bench/torch_pruning.py [--iterations 40] [--every 100]

Trainings without pruning and with each method take an iteration in turn. Times are medians of the CPU time of
one thread, which other work on the machine hardly affects; images are noise, decoded by another process. A
threshold or a regrowth is timed every fourth iteration; its cost is then divided by ``--every`` iterations,
RigL's interval in its paper. Prints a Markdown table; the exit code is 1 if a method costs more than 5 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from caffe_jacinto.common.errors import run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.train import Trainer
from caffe_jacinto.networks.stage_files import stage_files, write_stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.prototxt.solver import read_solver
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import SparseSettings

LIMIT = 0.05
STEP = 4
BATCH, BATCHES = 64, 4
METHODS = ("magnitude", "soft", "rigl")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--every", type=int, default=100)
    arguments = parser.parse_args(argv)
    if arguments.iterations <= 2 * STEP:
        parser.error(f"--iterations: the steps that are timed come after iteration {2 * STEP}")
    torch.set_num_threads(1)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_noise(scratch / "noise")
        trainers = {name: _trainer(stack, scratch / name, name) for name in ("plain", *METHODS)}
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(arguments.iterations):
            for name, trainer in trainers.items():
                begin = time.process_time()
                trainer._iterate()
                times[name].append(time.process_time() - begin)
    print(
        f"| method | iteration | with a threshold or a regrowth | cost, one of these in {arguments.every} |"
    )
    print("|---|---|---|---|")
    plain = median(times["plain"][STEP:])
    print(f"| none | {plain * 1e3:.1f} ms | | |")
    within = True
    for name in METHODS:
        ordinary = median(time for at, time in enumerate(times[name]) if at > STEP and at % STEP)
        special = median(time for at, time in enumerate(times[name]) if at > STEP and at % STEP == 0)
        cost = (ordinary + (special - ordinary) / arguments.every) / plain - 1
        within = within and cost <= LIMIT
        print(f"| {name} | {ordinary * 1e3:.1f} ms | {special * 1e3:.1f} ms | {cost:+.1%} |")
    print(f"\nlimit: {LIMIT:.0%}: {'kept' if within else 'BROKEN'}")
    return 0 if within else 1


def write_noise(folder: Path) -> None:
    import lmdb
    import numpy as np

    random = np.random.default_rng(0)
    environment = lmdb.open(str(folder), map_size=1 << 28)
    with environment.begin(write=True) as transaction:
        for index in range(BATCH * BATCHES):
            pixels = random.integers(0, 256, (3, 32, 32), np.uint8).tobytes()
            image = messages(Dialect.BVLC).Datum(
                channels=3, height=32, width=32, data=pixels, label=index % 10
            )
            transaction.put(f"{index:08d}".encode(), image.SerializeToString())
    environment.close()


def _trainer(stack: ExitStack, folder: Path, method: str) -> Trainer:
    """A stage of JacintoNet11 whose schedule, if it has one, goes on for thousands of steps.

    RigL's reaches its target at once, since it is regrowth that is to be timed.
    """
    folder.mkdir()
    noise = str(folder.parent / "noise")
    values = {"data.train_lmdb": noise, "data.val_lmdb": noise, "data.num_classes": 10}
    values |= {"network.crop_size": 32, "network.strides": [1, 2, 2, 2, 2]}
    values |= {"training.batch_size": BATCH, "training.iter_size": 1}
    recipe = load_recipe("imagenet_jacintonet11", [f"{key}={value!r}" for key, value in values.items()])
    files = stage_files(
        recipe, "sparse", Dialect.BVLC, folder=str(folder), gpus=(), iter_size=1, solver_mode_gpu=False
    )
    write_stage_files(files, folder)
    sparse = None
    if method != "plain":
        rigl = method == "rigl"
        start_factor, step_factor, target = (0.7, 0.01, 0.7) if rigl else (0.0, 0.0001, 0.8)
        caps = {"threshold_maxratio": 1e9, "threshold_value_max": 1e9}
        caps |= {"start_factor": start_factor, "step_factor": step_factor}
        sparse = SparseSettings(start_iter=0, step_iter=STEP, method=method, target=target, **caps)
    solver = read_solver(folder / "solver.prototxt", Dialect.BVLC)
    options = Options(solver=folder / "solver.prototxt", sparse=sparse, workers=1)
    device = torch.device("cpu")
    ranks = Ranks(device)
    stack.callback(ranks.close)
    log = CaffeLog(lambda message: None)
    trainer = Trainer(options, solver, device, ranks, StopRequests(), stack, log)
    trainer.iterate.move_to(0)
    return trainer


if __name__ == "__main__":
    sys.exit(run_command("bench/torch_pruning.py", main))
