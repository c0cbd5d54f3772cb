"""What settings beyond Caffe's cost an iteration of `caffe-torch train` on a CPU, on JacintoNet11 at 32x32.

    python bench/torch_settings.py [--iterations 40] [--only SETTING...]

Trainings without and with each setting take an iteration in turn, on one thread, and what is counted is the
processor's time, so that other work on the machine matters little; what the process that decodes images needs
is not in it. Images are noise, since their content does not affect the time; a teacher is the same network.
The cost is the median of the ratios to the plain iteration of the same turn; for the average of the weights,
which costs less than iterations differ, the update of the average itself is timed. Prints a Markdown table;
the exit code is 1 if that costs more than 5 %.
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
from torch_pruning import BATCH, write_noise

from caffe_jacinto.common.errors import run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.snapshot import save_weights
from caffe_jacinto.engines.pytorch.train import Trainer
from caffe_jacinto.networks.stage_files import stage_files, write_stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import TEST, read_solver
from caffe_jacinto.recipes.load import load_recipe

LIMIT = 0.05
"""Of the average of the weights."""

AVERAGE, TEACHER = "ema_decay", "teacher"
SETTINGS: dict[str, dict[str, object]] = {
    AVERAGE: {"stages.initial.solver.ema_decay": 0.999},
    "label_smoothing": {"training.label_smoothing": 0.1},
    "mixup_alpha": {"data.mixup_alpha": 0.2},
    "crop_min_area": {
        "data.crop_min_area": 0.3,
    },
    "image_sizes": {"stages.initial.solver.image_sizes": [[0, 24]]},
    TEACHER: {
        "stages.initial.teacher": "big.caffemodel",
        "stages.initial.teacher_prototxt": "deploy.prototxt",
    },
}
WARM_UP = 4


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_noise(scratch / "noise")
        trainers = {"plain": _trainer(stack, scratch, "plain", {})}
        for number, name in enumerate(arguments.only):
            trainers[name] = _trainer(stack, scratch, f"setting_{number}", SETTINGS[name])
        times: dict[str, list[float]] = {name: [] for name in trainers}
        updates: list[float] = []
        for _ in range(arguments.iterations + WARM_UP):
            for name, trainer in trainers.items():
                begin = time.process_time()
                trainer._iterate()
                times[name].append(time.process_time() - begin)
                if trainer.average is not None:
                    begin = time.process_time()
                    trainer.average.update(trainer.iteration)
                    updates.append(time.process_time() - begin)
    plain = times.pop("plain")[WARM_UP:]
    print(f"| setting | iteration of {BATCH} images | cost |\n|---|---|---|")
    print(f"| none | {median(plain) * 1e3:.1f} ms | |")
    costs = {}
    for name, found in times.items():
        ratios = [own / other for own, other in zip(found[WARM_UP:], plain, strict=True)]
        costs[name] = median(updates) / median(plain) if name == AVERAGE else median(ratios) - 1
        print(f"| {name} | {median(found[WARM_UP:]) * 1e3:.1f} ms | {costs[name]:+.1%} |")
    within = costs.get(AVERAGE, 0.0) <= LIMIT
    print(f"\nlimit of {AVERAGE}: {LIMIT:.0%}: {'kept' if within else 'BROKEN'}")
    return 0 if within else 1


def _trainer(stack: ExitStack, scratch: Path, name: str, more: dict[str, object]) -> Trainer:
    """A stage of JacintoNet11 with the values ``more`` in its recipe."""
    folder, noise = scratch / name, str(scratch / "noise")
    folder.mkdir()
    values = {
        "data.train_lmdb": noise,
        "data.val_lmdb": noise,
        "data.num_classes": 10,
        "data.dataset": "noise",
    }
    values |= {"network.crop_size": 32, "network.strides": [1, 2, 2, 2, 2]}
    values |= {"training.batch_size": BATCH, "training.iter_size": 1, **more}
    if TEACHER in "".join(more):
        values["stages.initial.teacher"] = str(folder / "big.caffemodel")
        values["stages.initial.teacher_prototxt"] = str(folder / "deploy.prototxt")
    recipe = load_recipe("imagenet_jacintonet11", [f"{key}={value!r}" for key, value in values.items()])
    files = stage_files(
        recipe, "initial", Dialect.BVLC, folder=str(folder), gpus=(), iter_size=1, solver_mode_gpu=False
    )
    write_stage_files(files, folder)
    deploy = parse_net(files["deploy.prototxt"], Dialect.BVLC, "deploy.prototxt")
    save_weights(Net(deploy, TEST, Dialect.BVLC, where="deploy", seed=1), folder / "big.caffemodel")
    solver = read_solver(folder / "solver.prototxt", Dialect.BVLC)
    device = torch.device("cpu")
    ranks = Ranks(device)
    stack.callback(ranks.close)
    options = Options(solver=folder / "solver.prototxt", workers=1)
    log = CaffeLog(lambda message: None)
    trainer = Trainer(options, solver, device, ranks, StopRequests(), stack, log)
    trainer.iterate.move_to(0)
    return trainer


if __name__ == "__main__":
    sys.exit(run_command("bench/torch_settings.py", main))
