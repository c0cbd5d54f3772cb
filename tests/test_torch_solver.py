"""The solver's arithmetic on PyTorch, update by update, against real Caffe's; solver states between both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_stage import BATCH, SmallStage, write_digits

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pytorch.net import Learnable
from caffe_jacinto.engines.pytorch.solvers import Updater
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_solver
from caffe_jacinto.prototxt.solver import learning_rate

pytestmark = pytest.mark.caffe

TORCH = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-solver", "solver.prototxt"]
UPDATES = 8

NET = """
layer { name: "data" type: "DummyData" top: "data" top: "wanted"
  dummy_data_param { shape { dim: 4 dim: 3 dim: 6 dim: 6 } shape { dim: 4 dim: 5 }
    data_filler { type: "gaussian" std: 2 } data_filler { type: "gaussian" std: 3 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "bn" }
layer { name: "scale" type: "Scale" bottom: "bn" top: "scale"
  param { lr_mult: 0.5 decay_mult: 2 } scale_param { bias_term: true } }
layer { name: "fixed" type: "InnerProduct" bottom: "scale" top: "fixed" param { lr_mult: 0 }
  inner_product_param { num_output: 6 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "fc" type: "InnerProduct" bottom: "fixed" top: "fc" param { lr_mult: 1 } param { lr_mult: 3 }
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "fc" bottom: "wanted" top: "loss" }
"""

KINDS = st.sampled_from(
    [
        'type: "SGD" momentum: 0.9',
        'type: "SGD"',
        'type: "Nesterov" momentum: 0.95',
        'type: "Adam" momentum: 0.9 momentum2: 0.99 delta: 1e-7',
        "solver_type: ADAM momentum: 0.8",
    ]
)
POLICIES = st.sampled_from(
    [
        'lr_policy: "fixed"',
        'lr_policy: "step" gamma: 0.5 stepsize: 3',
        'lr_policy: "exp" gamma: 0.9',
        'lr_policy: "inv" gamma: 0.1 power: 0.75',
        'lr_policy: "multistep" gamma: 0.3 stepvalue: 2 stepvalue: 3 stepvalue: 6',
        'lr_policy: "poly" power: 1',
        'lr_policy: "poly" power: 2.5',
        'lr_policy: "sigmoid" gamma: 0.7 stepsize: 4',
    ]
)


class Both:
    """Caffe's solver, and this engine's updates of the same blobs by the gradients that Caffe finds."""

    def __init__(self, caffe: Any, folder: Path, text: str) -> None:
        (folder / "net.prototxt").write_text(NET)
        path = folder / "solver.prototxt"
        path.write_text(f'train_net: "{folder}/net.prototxt"\nsnapshot_after_train: false\n{text}')
        self.theirs = caffe.get_solver(str(path))
        self.parameters = parse_solver(path.read_text(), Dialect.BVLC, "solver")
        rates = {
            "conv": ((1, 1), (2, 0)),
            "scale": ((0.5, 2), (1, 1)),
            "fixed": ((0, 1),),
            "fc": ((1, 1), (3, 1)),
        }
        self.blobs = [
            (blob, Learnable(f"{layer}[{i}]", layer, torch.tensor(blob.data), *rates[layer][i]))
            for layer, blobs in self.theirs.net.params.items()
            if layer in rates
            for i, blob in enumerate(blobs)
        ]
        for _, learnable in self.blobs:
            learnable.tensor.requires_grad_(learnable.lr_mult != 0)
        self.updater = Updater(self.parameters, [learnable for _, learnable in self.blobs], "solver")
        self.theirs.add_callback(lambda: None, self._take_gradients)

    def _take_gradients(self) -> None:
        for blob, learnable in self.blobs:
            if learnable.lr_mult:
                learnable.tensor.grad = torch.tensor(blob.diff)

    def step(self, iteration: int) -> None:
        self.theirs.step(1)
        self.updater.apply(iteration, learning_rate(self.parameters, iteration), self.parameters.iter_size)


@given(
    KINDS,
    POLICIES,
    st.sampled_from(["L1", "L2"]),
    st.sampled_from([0, 0.01]),
    st.sampled_from([1, 3]),
    st.sampled_from([-1, 0.5, 1000]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_update_is_caffes(
    tmp_path_factory: pytest.TempPathFactory,
    pycaffe: Any,
    kind: str,
    policy: str,
    regularization: str,
    decay: float,
    passes: int,
    clip: float,
) -> None:
    both = Both(
        pycaffe,
        tmp_path_factory.mktemp("solver"),
        f'{kind} {policy} regularization_type: "{regularization}" weight_decay: {decay}\n'
        f"iter_size: {passes} clip_gradients: {clip} base_lr: 0.01 max_iter: {UPDATES} random_seed: 3\n",
    )
    began = [learnable.tensor.detach().clone() for _, learnable in both.blobs]
    for iteration in range(UPDATES):
        both.step(iteration)
        for blob, learnable in both.blobs:
            most = float(np.abs(blob.data).max())
            np.testing.assert_allclose(
                learnable.tensor.detach().numpy(),
                blob.data,
                rtol=0,
                atol=1e-6 * max(most, 1e-3),
                err_msg=f"{learnable.name} after iteration {iteration}",
            )
    for start, (_, learnable) in zip(began, both.blobs, strict=True):
        assert torch.equal(start, learnable.tensor) == (learnable.lr_mult == 0), learnable.name


@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "Adam"])
def test_each_goes_on_from_the_others_snapshot(kind: str, caffe_engine: Engine, tmp_path: Path) -> None:
    """All batches are the same one here, so that the place in the data, which stock Caffe forgets, is no
    matter."""
    lmdb = write_digits(tmp_path / "lmdb", BATCH)
    caffe = [str(caffe_engine.info.executable), "train", "-solver", "solver.prototxt"]
    ends = {}
    for name, (first, second) in {
        "caffe": (caffe, caffe),
        "torch, then caffe": (TORCH, caffe),
        "caffe, then torch": (caffe, TORCH),
    }.items():
        stage = SmallStage(tmp_path / name, lmdb)
        shorter = {"base_lr": 0.001, "type": f'"{kind}"', "lr_policy": '"multistep"', "gamma": 0.5}
        stage.solver(max_iter=5, stepvalue=3, random_seed=7, **shorter)
        if name == "caffe":
            stage.run([caffe])
            (stage.folder / "small_iter_5.caffemodel").rename(tmp_path / "start.caffemodel")
        stage.run([[*first, "-weights", str(tmp_path / "start.caffemodel")]])
        stage.solver(max_iter=8, stepvalue=3, random_seed=7, **shorter)
        stage.run([[*second, "-snapshot", "small_iter_5.solverstate"]])
        ends[name] = read_weights(stage.folder / "small_iter_8.caffemodel")
    for name in ("torch, then caffe", "caffe, then torch"):
        for layer in ("conv1", "conv2", "fc"):
            # Not the biases before batch norms: their gradients are roundings, which Adam makes large.
            found, expected = ends[name][layer][0], ends["caffe"][layer][0]
            error, most = np.abs(found - expected).max(), np.abs(expected).max()
            assert error <= 1e-3 * most, f"{name}: {layer}: {error} of {most}"


def test_states_of_another_solver_or_dialect_are_refused(tmp_path: Path) -> None:
    """The blobs of both dialects may have the same shapes, and mean something else."""
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb", BATCH))
    stage.solver(max_iter=2)
    stage.run([TORCH])
    for changes, arguments, says in (
        ({"type": '"Adam"'}, [], "small_iter_2.solverstate: holds"),
        ({}, ["-dialect", "caffe_jacinto"], "small_iter_2.solverstate: it was trained with -dialect bvlc"),
    ):
        stage.solver(max_iter=4, **changes)
        ran = subprocess.run(
            [*TORCH, *arguments, "-snapshot", "small_iter_2.solverstate"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 2
        assert says in ran.stderr
        assert "Traceback" not in ran.stderr
