"""What learned thresholds leave of the accuracy on Fashion-MNIST, in the place of the cubic schedule.

    python bench/learned_threshold.py DENSE.caffemodel [--decay 0.003] [--target 0.8] [--val LMDB]

Soft threshold reparameterization (STR, Kusupati et al. 2020, arXiv:2002.03231, section 3): a layer
computes with sign(w) max(|w| - sigmoid(s), 0), and learns its s beside its weights w. What drives the
sparsity is the decay of s towards 0, at which the threshold is 0.5. Here the dense weights are trained
already and the time is short, so s has a decay of its own. Once ``--target`` is reached, the zeros are frozen
and the weights that are left train on.

All else is the stage *cubic* of the recipe ``fashion_sparsity_table``, of which DENSE.caffemodel is the dense
network; run it in the folder that has ``data/``. Prints top-1, sparsity and operations; the exit code is 1
if the target was not reached.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from caffe_jacinto.common.errors import run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.train import Trainer
from caffe_jacinto.netspec.shapes import layer_costs
from caffe_jacinto.networks.stage_files import stage_files, write_stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import read_solver
from caffe_jacinto.prototxt.tree import parse
from caffe_jacinto.recipes.load import load_recipe

START = -8.0
"""s at first: a threshold of 0.0003, below nearly all weights."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--decay", type=float, default=0.003)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--val", default="data/fashion_val_lmdb")
    arguments = parser.parse_args(argv)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = _trainer(stack, folder, arguments.weights, arguments.val)
        thresholds = LearnedThresholds(trainer, arguments.decay, arguments.target)
        trainer._iterate = thresholds.iterate  # type: ignore[method-assign]
        trainer.train()
        left = _gigamacs_left(trainer, folder / "deploy.prototxt")
        print(
            f"sparsity {trainer.pruner.sparsity():.3f}, {left:.4f} GigaMACs left, "
            f"zeros frozen from iteration {thresholds.frozen_at}"
        )
        return 0 if thresholds.frozen_at is not None else 1


class LearnedThresholds:
    """Trains with thresholds that are learned, until the target is reached."""

    def __init__(self, trainer: Trainer, decay: float, target: float) -> None:
        self._trainer, self._decay, self._target = trainer, decay, target
        blobs = trainer.net.layer_blobs
        self._weights: Mapping[str, Tensor] = {name: blobs[name][0].tensor for name in trainer.pruner.layers}
        self._latent = {name: weights.detach().clone() for name, weights in self._weights.items()}
        self._s = dict.fromkeys(self._weights, START)
        self._momentum = dict.fromkeys(self._weights, 0.0)
        self._step = trainer._iterate
        self._keep_gradients = trainer.pruner.before_update
        self.frozen_at: int | None = None
        """The iteration from which zeros were frozen."""

    def iterate(self) -> None:
        if self.frozen_at is not None:
            self._step()
            return
        self._threshold()
        iteration = self._trainer.iteration
        sparsity = self._trainer.pruner.sparsity() if iteration % 20 == 0 else 0.0
        if iteration % 100 == 0:
            print(f"iteration {iteration}, sparsity {sparsity:.3f}", flush=True)
        if sparsity >= self._target:
            self.frozen_at = iteration
            self._trainer.pruner.before_update = self._keep_gradients  # type: ignore[method-assign]
            self._trainer.pruner.freeze_zeros()
        else:
            self._trainer.pruner.before_update = self._learn  # type: ignore[method-assign]
        self._step()

    @torch.no_grad()
    def _threshold(self) -> None:
        """Put what the layers compute with in the place of the weights."""
        for name, weights in self._weights.items():
            self._latent[name].copy_(weights)
            threshold = torch.sigmoid(torch.tensor(self._s[name]))
            weights.copy_(weights.sign() * torch.relu(weights.abs() - threshold))

    @torch.no_grad()
    def _learn(self, iteration: int) -> None:
        """Update each s, and leave the update of the weights themselves to the solver."""
        rate, momentum = self._trainer.solver.rate(iteration), self._trainer.parameters.momentum
        for name, weights in self._weights.items():
            gradient = weights.grad
            assert gradient is not None
            sigmoid = 1 / (1 + float(torch.exp(torch.tensor(-self._s[name]))))
            # Of the loss with respect to s: each weight that is left moves towards 0 as the threshold rises.
            slope = -float((gradient * weights.sign()).sum()) * sigmoid * (1 - sigmoid)
            gradient.mul_(weights != 0)
            step = slope + self._decay * self._s[name]
            self._momentum[name] = momentum * self._momentum[name] + rate * step
            self._s[name] -= self._momentum[name]
            weights.copy_(self._latent[name])


def _gigamacs_left(trainer: Trainer, deploy: Path) -> float:
    """Operations of an image without those of the zeros, in 10^9."""
    zeros, weights = trainer.pruner.counts()
    left = {layer: 1 - zeros[layer] / weights[layer] for layer in weights}
    costs = layer_costs(parse(deploy.read_text(), str(deploy)))
    return sum((cost.macs or 0) * left.get(cost.name, 1.0) for cost in costs) / 1e9


def _trainer(stack: ExitStack, folder: Path, weights: Path, val: str) -> Trainer:
    settings = [f"data.val_lmdb={val!r}", "stages.cubic.sparse=", "training.random_seed=1"]
    recipe = load_recipe("fashion_sparsity_table", settings)
    files = stage_files(
        recipe,
        "cubic",
        Dialect.BVLC,
        folder=str(folder),
        gpus=(),
        iter_size=1,
        solver_mode_gpu=False,
        val_images=5000,
    )
    write_stage_files(files, folder)
    solver = read_solver(folder / "solver.prototxt", Dialect.BVLC)
    options = Options(
        solver=folder / "solver.prototxt",
        weights=(weights,),
        precision="bf16",
        reestimate_batches=recipe.training.reestimate_batches,
        recalibrate_tests=True,
    )
    device = torch.device("cpu")
    ranks = Ranks(device)
    stack.callback(ranks.close)
    log = CaffeLog(lambda message: print(message, flush=True))
    return Trainer(options, solver, device, ranks, StopRequests(), stack, log)


if __name__ == "__main__":
    sys.exit(run_command("bench/learned_threshold.py", main))
