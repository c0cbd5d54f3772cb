"""Nothing waits for the device between displays, tests and snapshots, tried with a stand-in for a device.

Kernels of a GPU (`gpu_kernels.py`), graphs and the copying of batches are tried on one (`test_torch_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from no_reads import Waited, nothing_is_read
from small_stage import SmallStage, write_digits
from test_torch_gpu import CLASSES, IMAGES, ONE_LAYER, chain, drawn, inputs_text
from torch import Tensor

from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.loading import Feed
from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.engines.pytorch.precision import autocast
from caffe_jacinto.engines.pytorch.train import Trainer
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import read_solver

CPU = torch.device("cpu")


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2 if gradients[0].sum() else gradients[0]


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.sum().item(),
        lambda values: float(values.detach()[0]),
        lambda values: bool((values > 0).any()),
        lambda values: values.tolist(),
        lambda values: values.detach().numpy(),
        lambda values: np.asarray(values.detach()),
        lambda values: values.cpu(),
        lambda values: torch.equal(values, values),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.masked_select(values > 0),
        lambda values: values.unique(),
        lambda values: values.isfinite().all() and values,
        lambda values: values.long().bincount(minlength=3),
        lambda values: torch.tensor([1.0]),
        lambda values: torch.from_numpy(np.zeros(3)),
        lambda values: _Doubled.apply(values).sum().backward(),
    ],
)
def test_the_stand_in_sees_what_is_read(read: Callable[[Tensor], object]) -> None:
    values = torch.rand(3, requires_grad=True)
    with nothing_is_read():
        assert (values * 2).sum().dim() == 0
        with pytest.raises(Waited):
            read(values)
    read(values)


def passes(text: str, dialect: Dialect = Dialect.BVLC, precision: str = "fp32") -> None:
    """Forward and backward through a net, with nothing read in the second pass of each."""
    net = Net(parse_net(text, dialect, "net"), TRAIN, dialect, where="net", seed=3)
    for indices in net.indices:
        indices._wrong = torch.zeros((), dtype=torch.int64)  # as on a GPU
    fixed = ("label", "numbers", "goes_on", "on")
    values = {
        name: torch.from_numpy(given).requires_grad_(name not in fixed) for name, given in drawn(net).items()
    }

    def one_pass() -> None:
        state = dict(values)
        with autocast(CPU, precision):
            net(values)
            for step in net.steps:
                state.update(zip(step.tops, step(*(state[name] for name in step.bottoms)), strict=True))
        tops = [state[name] for name in net.output_names if state[name].requires_grad]
        if tops:
            torch.stack([top.float().sum() for top in tops]).sum().backward()

    one_pass()  # a first pass may choose how to compute
    with nothing_is_read():
        one_pass()


def layer_text(kind: str) -> str:
    shapes = {
        **{"images": IMAGES, "part": (*IMAGES[:2], 7, 5), "factors": IMAGES[:2]},
        **{"rows": (4, CLASSES), "others": (4, CLASSES), "positive": (4, CLASSES)},
        **{"series": (6, 4, 7), "goes_on": (6, 4), "cells": (1, 4, 3), "sums": (1, 4, 12), "on": (1, 4)},
        **{"label": (4,), "numbers": (4,), "matrix": (CLASSES, CLASSES)},
    }
    layer = ONE_LAYER[kind].replace("dropout_ratio: 0", "dropout_ratio: 0.3")
    read = {name: shape for name, shape in shapes.items() if f'bottom: "{name}"' in layer}
    top = "" if kind == "Silence" else 'top: "top"'
    return f'force_backward: true\n{inputs_text(**read)}layer {{ name: "tested" {layer} {top} }}\n'


@pytest.mark.parametrize("kind", sorted(ONE_LAYER.keys() - {"Filter"}))
def test_no_layer_waits(kind: str) -> None:
    passes(layer_text(kind))


def test_a_layer_that_has_to_wait_says_so() -> None:
    """The size of Filter's top is that of what it lets through: it is in no graph."""
    with pytest.raises(Waited):
        passes(layer_text("Filter"))
    assert not Net(
        parse_net(layer_text("Filter"), Dialect.BVLC, "net"), TRAIN, Dialect.BVLC, where="net"
    ).recordable


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_that_run_as_one_do_not_wait(dialect: Dialect, precision: str) -> None:
    passes(inputs_text(images=(6, 3, 28, 28)) + chain(dialect), dialect, precision)


DROPOUT = """layer { name: "drop" type: "Dropout" bottom: "pool" top: "pool"
  dropout_param { dropout_ratio: 0.3 } }
"""


@pytest.mark.caffe  # for its time
@pytest.mark.parametrize(
    ("fields", "transform", "precision"),
    [
        ({}, "", "fp32"),
        ({"type": '"Adam"', "clip_gradients": 1, "iter_size": 2}, "mirror: true", "bf16"),
        (
            {"ema_decay": 0.8, "regularization_type": '"L1"', "average_loss": 3, "type": '"Nesterov"'},
            "crop_size: 24 crop_min_area: 0.5 mixup_alpha: 0.4 mean_value: 12",
            "fp32",
        ),
        ({"image_size": "{ from_iter: 0 size: 16 }"}, "crop_size: 24", "fp32"),
    ],
    ids=["plain", "Adam, bf16, two passes", "averaged, mixed", "resized"],
)
def test_no_iteration_waits(
    fields: dict[str, object],
    transform: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between displays, tests and snapshots: the loop, passes, update, zeros that hold, and the average."""
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb"))
    stage.solver(display=100, test_interval=100, snapshot=100, max_iter=100, base_lr=0.01, **fields)
    train = tmp_path / "train.prototxt"
    text = train.read_text().replace("transform_param {", f"transform_param {{ {transform}")
    train.write_text(text.replace('layer { name: "fc"', f'{DROPOUT}layer {{ name: "fc"'))
    monkeypatch.chdir(tmp_path)
    options = Options(solver=Path("solver.prototxt"), precision=precision, workers=1, freeze_zeros=True)  # type: ignore[arg-type]
    solver = read_solver(options.solver, options.dialect)
    with ExitStack() as stack:
        log = CaffeLog(lambda message: None)
        trainer = Trainer(options, solver, CPU, Ranks(CPU), StopRequests(), stack, log)
        weights = trainer.net.layer_blobs["conv2"][0].tensor
        with torch.no_grad():
            weights[::2] = 0
        trainer.pruner.freeze_zeros()
        trainer.iterate.move_to(0)
        for _ in range(3):  # the first one is displayed, and what is computed how is chosen
            trainer._iterate()
        (feed,) = trainer.inputs._feeds
        # A GPU's batches are copied to it by another thread.
        batches = [type(raw)(*(part.clone() for part in raw)) for raw in (feed.raw() for _ in range(8))]
        monkeypatch.setattr(Feed, "raw", lambda feed: batches.pop(0))
        before = weights.detach().clone()
        with nothing_is_read():
            for _ in range(4):
                trainer._iterate()
        assert trainer.iteration == 7
        assert (weights[::2] == 0).all()
        assert (weights[1::2] != before[1::2]).any()
        with pytest.raises(Waited), nothing_is_read():
            trainer._check_losses()
