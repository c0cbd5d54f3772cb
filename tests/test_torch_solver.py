"""The solver's arithmetic on PyTorch, update by update, against real Caffe's; solver states between both."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_stage import BATCH, SmallStage, write_digits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.engines.pytorch.net import TRAIN, Learnable, Net
from caffe_jacinto.engines.pytorch.snapshot import put, save_weights
from caffe_jacinto.engines.pytorch.solver_fields import check_solver
from caffe_jacinto.engines.pytorch.solvers import SOLVERS, CaffeSolver, solver_class
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net, parse_solver
from caffe_jacinto.prototxt.solver import SolverFile, Written, histories, learning_rate, read_solver
from caffe_jacinto.prototxt.upgrade import SOLVER_TYPES
from caffe_jacinto.weights import main as weights_command

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
        'type: "AdaGrad" delta: 1e-4',
        "solver_type: ADAGRAD",
        'type: "RMSProp" rms_decay: 0.9 delta: 1e-5',
        'type: "RMSProp"',
        'type: "AdaDelta" momentum: 0.95 delta: 1e-6',
        "solver_type: ADADELTA momentum: 0.5",
    ]
)
POLICIES = st.sampled_from(
    [
        'lr_policy: "fixed"',
        'lr_policy: "step" gamma: 0.5 stepsize: 3',
        'lr_policy: "exp" gamma: 0.9',
        'lr_policy: "inv" gamma: 0.1 power: 0.75',
        'lr_policy: "multistep" gamma: 0.3 stepvalue: 2 stepvalue: 3 stepvalue: 6',
        # Unordered, and one twice: Caffe takes one step an iteration.
        'lr_policy: "multistep" gamma: 0.3 stepvalue: 4 stepvalue: 2 stepvalue: 5 stepvalue: 5',
        'lr_policy: "poly" power: 1',
        'lr_policy: "poly" power: 2.5',
        'lr_policy: "sigmoid" gamma: 0.7 stepsize: 4',
    ]
)


class Both:
    """Caffe's solver, and this engine's updates of the same blobs by the gradients that Caffe finds."""

    def __init__(self, caffe: Any, folder: Path, text: str, capturable: bool) -> None:
        (folder / "net.prototxt").write_text(NET)
        path = folder / "solver.prototxt"
        path.write_text(
            f'train_net: "{folder}/net.prototxt"\nsnapshot_after_train: false\n'
            f'snapshot_prefix: "{folder}/theirs"\n{text}'
        )
        self.folder, self.theirs = folder, caffe.get_solver(str(path))
        self.parameters = parse_solver(path.read_text(), Dialect.BVLC, "solver")
        rates = {
            "conv": ((1, 1), (2, 0)),
            "bn": ((0, 1), (0, 1), (0, 1)),
            "scale": ((0.5, 2), (1, 1)),
            "fixed": ((0, 1),),
            "fc": ((1, 1), (3, 1)),
        }
        self.blobs = [
            (blob, Learnable(f"{layer}[{i}]", layer, torch.tensor(blob.data), *rates[layer][i]))
            for layer, blobs in self.theirs.net.params.items()
            for i, blob in enumerate(blobs)
        ]
        for _, learnable in self.blobs:
            learnable.tensor.requires_grad_(learnable.lr_mult != 0)
        learnables = [learnable for _, learnable in self.blobs]
        self.optimizer = solver_class(self.parameters, "solver")(
            learnables, self.parameters, capturable=capturable
        )
        self.theirs.add_callback(lambda: None, self._take_gradients)

    def _take_gradients(self) -> None:
        for blob, learnable in self.blobs:
            if learnable.lr_mult:
                learnable.tensor.grad = torch.tensor(blob.diff)
            elif learnable.layer == "bn":  # statistics, which the pass has moved on
                learnable.tensor.copy_(torch.tensor(blob.data))

    def step(self, iteration: int) -> None:
        self.theirs.step(1)
        self.optimizer.prepare(iteration, learning_rate(self.parameters, iteration))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self) -> tuple[Any, Any]:
        """Caffe's solver state, and the history in the order of that."""
        self.theirs.snapshot()
        return solver_state(next(self.folder.glob("*.solverstate"))), self.optimizer.history


@given(
    KINDS,
    POLICIES,
    st.sampled_from(["L1", "L2"]),
    st.sampled_from([0, 0.01]),
    st.sampled_from([1, 3]),
    st.sampled_from([-1, 0.5, 1000]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_update_is_caffes(
    tmp_path_factory: pytest.TempPathFactory,
    pycaffe: Any,
    kind: str,
    policy: str,
    regularization: str,
    decay: float,
    passes: int,
    clip: float,
    capturable: bool,
    diff: bool,
) -> None:
    both = Both(
        pycaffe,
        tmp_path_factory.mktemp("solver"),
        f'{kind} {policy} regularization_type: "{regularization}" weight_decay: {decay}\n'
        f"iter_size: {passes} clip_gradients: {clip} base_lr: 0.01 max_iter: {UPDATES} random_seed: 3\n"
        f"snapshot_diff: {str(diff).lower()}\n",
        capturable,
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
                atol=1e-5 * max(most, 1e-2),  # small gradients, divided by their own size, are rounded so
                err_msg=f"{learnable.name} after iteration {iteration}",
            )
            if diff:
                assert both.optimizer.updates is not None
                np.testing.assert_allclose(
                    both.optimizer.updates[learnable.tensor].numpy(),
                    blob.diff,
                    rtol=0,
                    atol=1e-5 * max(float(np.abs(blob.diff).max()), 1e-3),
                    err_msg=f"{learnable.name}: the update of iteration {iteration}",
                )
    for start, (_, learnable) in zip(began, both.blobs, strict=True):
        if learnable.layer != "bn":
            assert torch.equal(start, learnable.tensor) == (learnable.lr_mult == 0), learnable.name
    theirs, ours = both.states()
    assert len(theirs.history) == len(ours)
    for number, (blob, tensor) in enumerate(zip(theirs.history, ours, strict=True)):
        values = np.array(blob.data, dtype=np.float32).reshape(tensor.shape)
        most = max(float(np.abs(values).max()), 1e-12)
        np.testing.assert_allclose(
            tensor.numpy(), values, rtol=0, atol=2e-6 * most, err_msg=f"history {number}"
        )
    written = Written(Path("net"), "")
    file = SolverFile(Path("solver"), Dialect.BVLC, both.parameters, Path("net"), None, (), "net", written)
    assert (theirs.iter, theirs.current_step) == (UPDATES, file.current_step(UPDATES))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("SGD", {"base_lr": 0.01}),
        ("Nesterov", {"base_lr": 0.01}),
        ("AdaGrad", {"base_lr": 0.003, "momentum": 0}),
        ("RMSProp", {"base_lr": 0.0003, "momentum": 0, "rms_decay": 0.9}),
        ("AdaDelta", {"base_lr": 1, "momentum": 0.9, "delta": 1e-6}),
        ("Adam", {"base_lr": 0.001}),
    ],
)
@pytest.mark.parametrize("first", ["caffe", "torch"])
def test_a_training_goes_on_in_the_other(
    kind: str, fields: dict[str, object], first: str, caffe_engine: Engine, tmp_path: Path
) -> None:
    """Ten iterations see all images once, so that stock Caffe, which forgets its place in the data, has the
    right one again. Without the history, the losses are off by 0.015 (AdaDelta) to 0.058 (SGD)."""
    programs = {
        "caffe": [str(caffe_engine.info.executable), "train", "-solver", "solver.prototxt"],
        "torch": TORCH,
    }
    second = "torch" if first == "caffe" else "caffe"
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb", 10 * BATCH))
    settings = {"lr_policy": '"multistep"', "gamma": 0.5, "stepvalue": 20, "weight_decay": 1e-3, **fields}
    stage.solver(max_iter=30, snapshot=10, display=1, test_interval=1000, type=f'"{kind}"', **settings)
    expected = losses(stage.run([programs[first]]))[10:30]
    theirs = solver_state(tmp_path / "small_iter_30.solverstate")
    found = losses(stage.run([[*programs[second], "-snapshot", "small_iter_10.solverstate"]]))[:20]
    ours = solver_state(tmp_path / "small_iter_30.solverstate")
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert (ours.iter, ours.current_step) == (theirs.iter, theirs.current_step) == (30, 1)
    assert [list(blob.shape.dim) for blob in ours.history] == [
        list(blob.shape.dim) for blob in theirs.history
    ]


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"Iteration \d+ \(.*\), loss = (\S+)", log)]


def solver_state(path: Path) -> Any:
    state = messages(Dialect.BVLC).SolverState()
    state.ParseFromString(path.read_bytes())
    return state


def test_states_of_another_solver_or_dialect_are_refused(tmp_path: Path) -> None:
    """The blobs of both dialects may have the same shapes, and mean something else."""
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb", BATCH))
    stage.solver(max_iter=2)
    stage.run([TORCH])
    for changes, arguments, says in (
        ({"type": '"Adam"'}, [], "its history is that of solver type SGD, and solver.prototxt names Adam"),
        ({"type": '"Nesterov"'}, [], "that of solver type SGD, and solver.prototxt names Nesterov"),
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


def test_states_that_do_not_name_their_solver_are_read(tmp_path: Path) -> None:
    """Those of earlier versions; the number of histories is compared as before."""
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb", BATCH))
    stage.solver(max_iter=2)
    stage.run([TORCH])
    state = tmp_path / "small_iter_2.solverstate"
    content = state.read_bytes()
    place = content.rfind(b'{"seed"')
    said = json.loads(content[place:])
    assert said.pop("solver") == "SGD"
    earlier = {name: said[name] for name in ("seed", "images", "dialect")}
    shorter = json.dumps(earlier).encode()
    state.write_bytes(content[: place - 1] + bytes([len(shorter)]) + shorter)
    resume = [*TORCH, "-snapshot", state.name]
    for kind, says in (("Adam", f"{state.name}: holds"), ("Nesterov", "Optimization Done")):
        stage.solver(max_iter=4, type=f'"{kind}"')
        ran = subprocess.run(resume, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert says in ran.stderr, ran.stderr


def test_histories_of_each_type() -> None:
    assert list(SOLVERS) == list(SOLVER_TYPES.values())
    assert {name: solver.moments for name, solver in SOLVERS.items()} == {
        name: histories(name) for name in SOLVERS
    }


SETTINGS = {
    "SGD": "momentum: 0.9",
    "Nesterov": "momentum: 0.9",
    "AdaGrad": "",
    "RMSProp": "rms_decay: 0.9",
    "AdaDelta": "momentum: 0.9",
    "Adam": "momentum: 0.9",
}


def optimizer(
    kind: str,
    more: str = "",
    *,
    dialect: Dialect = Dialect.BVLC,
    capturable: bool = False,
    device: str = "cpu",
) -> CaffeSolver:
    """One for a layer of two blobs that learn and one that does not, the same each time."""
    text = f'type: "{kind}" {SETTINGS[kind]} base_lr: 0.1 weight_decay: 0.01 {more}'
    blobs = [
        Learnable(f"fc[{i}]", "fc", torch.linspace(-1 - i, 2, 7, device=device), lr_mult, 1)
        for i, lr_mult in enumerate((1, 2, 0))
    ]
    for blob in blobs:
        blob.tensor.requires_grad_(blob.lr_mult != 0)
    return SOLVERS[kind](blobs, parse_solver(text, dialect, "solver"), dialect=dialect, capturable=capturable)


def blobs_of(made: CaffeSolver) -> list[torch.Tensor]:
    return [tensor for group in made.param_groups for tensor in group["params"]]


def advance(made: CaffeSolver, iterations: range) -> None:
    """Updates by gradients that follow from the iteration and the weights."""
    for iteration in iterations:
        for number, blob in enumerate(blobs_of(made)):
            if blob.requires_grad:
                blob.grad = torch.sin(blob.detach() * (iteration + 2) + number)
        made.prepare(iteration, 0.1 / (iteration + 1))
        made.step()
        made.zero_grad()


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("capturable", [False, True])
def test_it_is_an_optimizer_as_any_other(kind: str, capturable: bool) -> None:
    """Groups, hooks and checkpoints as PyTorch's users know them."""
    made, other = (optimizer(kind, capturable=capturable) for _ in range(2))
    assert [(group["lr_mult"], group["param_names"]) for group in made.param_groups] == [
        (1, ["fc[0]"]),
        (2, ["fc[1]"]),
        (0, ["fc[2]"]),
    ]
    held, rates = other.history, [group["lr"] for group in other.param_groups]
    calls = []
    made.register_step_pre_hook(lambda *_: calls.append("before"))
    made.register_step_post_hook(lambda *_: calls.append("after"))
    advance(made, range(3))
    assert calls == ["before", "after"] * 3
    assert [float(group["lr"]) for group in made.param_groups] == pytest.approx([0.1 / 3, 0.2 / 3, 0])
    assert all(blob.grad is None for blob in blobs_of(made))

    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        for blob, value in zip(blobs_of(other), blobs_of(made), strict=True):
            blob.copy_(value)
    advance(made, range(3, 6))
    advance(other, range(3, 6))
    for found, expected in zip(
        [*blobs_of(other), *other.history], [*blobs_of(made), *made.history], strict=True
    ):
        assert torch.equal(found, expected)
    assert all(now is before for now, before in zip(other.history, held, strict=True))
    if capturable:
        assert all(group["lr"] is rate for group, rate in zip(other.param_groups, rates, strict=True))


def test_a_closure_computes_the_gradients() -> None:
    made = optimizer("SGD")
    weights = blobs_of(made)[0]

    def loss() -> float:
        value = (weights**2).sum()
        value.backward()
        return value.item()

    made.prepare(0, 0.1)
    first = made.step(loss)
    made.zero_grad()
    assert made.step(loss) < first


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_step_for_a_graph_never_waits_for_the_device(kind: str) -> None:
    """PyTorch's own stand-in for a GPU computes no values: whoever asks for one fails."""
    with FakeTensorMode():
        fields = "clip_gradients: 1 iter_size: 2 snapshot_diff: true"
        made = optimizer(kind, fields, capturable=True, device="cuda")
        rate = made.param_groups[1]["lr"]
        for iteration in range(2):
            for blob in blobs_of(made):
                blob.grad = torch.ones_like(blob) if blob.requires_grad else None
            made.prepare(iteration, 0.1)
            made.step()
            made.zero_grad()
        assert made.param_groups[1]["lr"] is rate
        assert rate.device.type == made.history[0].device.type == "cuda"
        with pytest.raises(RuntimeError):
            float(rate)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_what_is_frozen_has_a_history_of_weight_decay_in_stock_caffe(kind: str, dialect: Dialect) -> None:
    """The fork updates neither layers without gradients nor the statistics of batch norms."""
    made = optimizer(kind, dialect=dialect)
    frozen = blobs_of(made)[2]
    began = frozen.clone()
    advance(made, range(3))
    assert torch.equal(frozen, began)
    changes = any(moment.any() for moment in made.state[frozen]["history"])
    assert changes == (dialect is Dialect.BVLC and kind not in ("SGD", "Nesterov"))


@pytest.mark.parametrize(
    ("kind", "least"), [("AdaGrad", 1e-3), ("RMSProp", 1e-4), ("AdaDelta", 1e-3), ("Adam", 1e-4)]
)
def test_the_fork_raises_a_small_delta(kind: str, least: float) -> None:
    """NVCaffe 0.17 computes with at least these, whatever the solver file has."""

    def after(dialect: Dialect, delta: float) -> torch.Tensor:
        made = optimizer(kind, f"delta: {delta}", dialect=dialect)
        advance(made, range(4))
        return torch.cat([blob.detach() for blob in blobs_of(made)])

    def near(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-6, atol=1e-7)

    expected = after(Dialect.BVLC, least)
    assert near(after(Dialect.CAFFE_JACINTO, least / 100), expected)
    assert not near(after(Dialect.BVLC, least / 100), expected)
    assert near(after(Dialect.CAFFE_JACINTO, 10 * least), after(Dialect.BVLC, 10 * least))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"type": '"Adagrad"'}, "solver type 'Adagrad' is not supported; supported: SGD, Nesterov, AdaGrad"),
        ({"solver_type": "ADAM"}, "has both type and solver_type, its older form; remove solver_type: ADAM"),
        ({"type": '"AdaGrad"'}, "AdaGrad takes no momentum; remove it, or set it to 0"),
        ({"type": '"RMSProp"'}, "RMSProp takes no momentum; remove it, or set it to 0"),
        (
            {"type": '"RMSProp"', "momentum": 0, "rms_decay": 1},
            "rms_decay is 1; it has to be at least 0 and less than 1",
        ),
        ({"momentum": 9}, "momentum is 9; it has to be at least 0 and less than 1"),
        ({"type": '"Adam"', "momentum2": 1}, "momentum2 is 1; it has to be at least 0 and less than 1"),
        ({"type": '"AdaDelta"', "delta": 0}, "delta is 0; AdaDelta divides by it: it has to be above 0"),
        ({"lr_policy": '"plateau"'}, "lr_policy 'plateau' is unknown; known: fixed, step, exp, inv,"),
        ({"lr_policy": '"step"', "gamma": 0.1}, "lr_policy step needs a stepsize of at least 1"),
        ({"lr_policy": '"one_cycle"'}, "lr_policy one_cycle needs warmup_iter, the iteration of its largest"),
        ({"ema_decay": 1}, "ema_decay is 1; it has to be at least 0 and less than 1"),
        (
            {"image_size": "{ size: 14 from_iter: 5 }"},
            "image_size: the first size is that of iteration 5; begin",
        ),
        ({"image_size": "{ size: 0 }"}, "image_size: a size of 0 pixels; it has to be at least 1"),
        ({"warmup_iter": 20}, "warmup_iter is 20; it has to be at least 0 and less than max_iter"),
        (
            {"lr_policy": '"inv"', "gamma": -0.5, "power": 0.5},
            "lr_policy inv gives no finite learning rate at iteration 19; check base_lr, gamma and power",
        ),
        (
            {"lr_policy": '"exp"', "gamma": 1e30},
            "lr_policy exp gives no finite learning rate at iteration 19; check base_lr, gamma and power",
        ),
    ],
)
def test_what_a_solver_cannot_compute_with_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    SmallStage(tmp_path, tmp_path / "lmdb").solver(**fields)
    with pytest.raises(UserError) as refused:
        check_solver(read_solver(Path("solver.prototxt"), Dialect.BVLC))
    assert re.match(rf"solver\.prototxt(:\d+)?: {re.escape(says)}", str(refused.value))


def rates_of(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """The learning rates of the first iterations, as PyTorch's scheduler has them."""
    found = []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 60), st.floats(1e-4, 10), st.data())
def test_policies_beyond_caffes_are_those_of_pytorch(length: int, base: float, data: st.DataObject) -> None:
    """cosine with and without warm-up, and one_cycle, against torch.optim.lr_scheduler."""
    warmup = data.draw(st.integers(0, length - 2))

    def ours(policy: str, warmup: int) -> list[float]:
        fields = messages(Dialect.BVLC).SolverParameter(
            base_lr=base, lr_policy=policy, max_iter=length, warmup_iter=warmup, power=2
        )
        return [learning_rate(fields, iteration) for iteration in range(length)]

    def fresh() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1)], lr=float(np.float32(base)))

    optimizer = fresh()
    parts: list[LRScheduler] = [CosineAnnealingLR(optimizer, length - warmup)]
    if warmup:
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        parts = [SequentialLR(optimizer, [rise, *parts], milestones=[warmup])]
    near = {"rtol": 1e-5, "atol": 1e-7 * base}
    np.testing.assert_allclose(ours("cosine", warmup), rates_of(parts[0], optimizer, length), **near)

    plain, warmed = ours("poly", 0), ours("poly", warmup)
    assert warmed[warmup:] == plain[warmup:]
    steps = np.arange(1, warmup + 1) / (warmup + 1)
    np.testing.assert_allclose(warmed[:warmup], plain[warmup] * steps, **near)

    top = max(warmup, 1)
    optimizer, share = fresh(), (top + 1) / length
    cycle = OneCycleLR(optimizer, float(np.float32(base)), length, pct_start=share, cycle_momentum=False)
    np.testing.assert_allclose(ours("one_cycle", top), rates_of(cycle, optimizer, length), **near)


NETWORK = """
layer { name: "images" type: "DummyData" top: "x" dummy_data_param {
  shape { dim: 4 dim: 3 } data_filler { type: "constant" value: 0.5 } } }
layer { name: "labels" type: "DummyData" top: "y" dummy_data_param {
  shape { dim: 4 } data_filler { type: "constant" value: 2 } } }
layer { name: "fc" type: "InnerProduct" bottom: "x" top: "fc" inner_product_param {
  num_output: 4 weight_filler { type: "constant" value: 0.1 } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "y" top: "loss" loss_weight: 0.5
  include { phase: TRAIN } }
layer { name: "tested" type: "SoftmaxWithLoss" bottom: "fc" bottom: "y" top: "tested" loss_weight: 2
  include { phase: TEST } }
"""


@pytest.mark.caffe
def test_networks_inside_a_solver_and_its_log_are_caffes(caffe_engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "test.prototxt").write_text(NETWORK)
    (tmp_path / "solver.prototxt").write_text(
        f"net_param {{ {NETWORK} }}\n"
        'test_net: "test.prototxt" test_iter: [2, 3] test_interval: 3 test_compute_loss: true\n'
        'base_lr: 0.5 lr_policy: "multistep" gamma: 0.5 stepvalue: 4 stepvalue: 2 max_iter: 6 display: 2\n'
        "average_loss: 3 momentum: 0.9 solver_mode: CPU\n"
    )
    python = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-dialect", "bvlc"]
    lines = []
    for command in ([str(caffe_engine.info.executable), "train"], python):
        done = subprocess.run(
            [*command, "-solver", "solver.prototxt"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        text = re.sub(r"^.*?\] |\(.*?iters?\), ", "", done.stderr, flags=re.MULTILINE)
        lines.append(re.findall(r"^(?:Iteration|Creating t|Test loss|    Test net).*", text, re.MULTILINE))
        assert (tmp_path / "solver_iter_6.caffemodel").exists()
        (tmp_path / "solver_iter_6.caffemodel").unlink()
    caffes, ours = lines
    assert len(caffes) > 20
    assert [_rounded(line) for line in ours] == [_rounded(line) for line in caffes]


DEBUGGED = """name: "debugged"
layer { name: "data" type: "HDF5Data" top: "x" top: "y" hdf5_data_param { source: "list.txt" batch_size: 4 } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "c" param { lr_mult: 1 } param { lr_mult: 0 }
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "bn" type: "BatchNorm" bottom: "c" top: "c" }
layer { name: "scale" type: "Scale" bottom: "c" top: "c" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "pool" type: "Pooling" bottom: "c" top: "p"
  pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
layer { name: "left" type: "Convolution" bottom: "p" top: "l" param { name: "w" } param { name: "b" }
  convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "right" type: "Convolution" bottom: "l" top: "r" param { name: "w" } param { name: "b" }
  convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "sum" type: "Eltwise" bottom: "p" bottom: "r" bottom: "r" top: "sum" }
layer { name: "side" type: "InnerProduct" bottom: "p" top: "side" propagate_down: false
  inner_product_param { num_output: 4 } }
layer { name: "fixed" type: "InnerProduct" bottom: "sum" top: "f" param { lr_mult: 0 } param { lr_mult: 0 }
  inner_product_param { num_output: 5 } }
layer { name: "fc" type: "InnerProduct" bottom: "f" top: "fc" inner_product_param { num_output: 4 } }
layer { name: "lost" type: "SoftmaxWithLoss" bottom: "side" bottom: "y" top: "lost" loss_weight: 0.3 }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "y" top: "loss" }
layer { name: "right_ones" type: "Accuracy" bottom: "fc" bottom: "y" top: "right_ones" }
layer { name: "size" type: "Reduction" bottom: "fc" top: "size" loss_weight: 0.01
  reduction_param { operation: SUMSQ } include { phase: TRAIN } }
layer { name: "half" type: "Power" bottom: "size" top: "half" power_param { scale: 0.5 }
  include { phase: TRAIN } }
"""


@pytest.mark.caffe
@pytest.mark.parametrize("display", [1, 2])
def test_debug_info_and_snapshot_diff_are_caffes(
    caffe_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    display: int,
) -> None:
    """The mean of each blob and gradient, with the Split layers and the shared blobs that Caffe has."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    with h5py.File("data.h5", "w") as file:
        file["x"] = generator.normal(size=(8, 3, 8, 8)).astype(np.float32)
        file["y"] = (np.arange(8) % 4).astype(np.float32)
    Path("list.txt").write_text("data.h5\n")
    Path("net.prototxt").write_text(DEBUGGED)
    net = Net(
        parse_net(DEBUGGED, Dialect.BVLC, "net"),
        TRAIN,
        Dialect.BVLC,
        where="net",
        data_shapes={"x": (4, 3, 8, 8), "y": (4,)},
    )
    for _, _, blob in net.blobs:
        shape = tuple(blob.tensor.shape)
        put(generator.normal(scale=0.3, size=shape).astype(np.float32), blob.tensor)
    for blob in net.layer_blobs["bn"]:
        blob.tensor.zero_()
    save_weights(net, Path("start.caffemodel"))
    Path("solver.prototxt").write_text(
        'net: "net.prototxt" base_lr: 0.05 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.01 max_iter: 4 '
        f"iter_size: 2 display: {display} test_iter: 2 test_interval: 2 solver_mode: CPU debug_info: true\n"
        'snapshot_diff: true snapshot_prefix: "made"\n'
    )
    arguments = ["train", "-solver", "solver.prototxt", "-weights", "start.caffemodel"]
    logs, files = [], []
    for train in (
        lambda: subprocess.run([caffe_engine.info.executable, *arguments], check=True).returncode,
        lambda: caffe_torch(arguments),
    ):
        capfd.readouterr()
        assert train() == 0
        logs.append(capfd.readouterr().err)
        written = Path("made_iter_4.caffemodel").read_bytes()
        files.append(messages(Dialect.BVLC).NetParameter.FromString(written))
        assert weights_command(["show", "made_iter_4.caffemodel"]) == 0
    wanted = re.compile(r"[IE]    \[(?:Forward|Backward)\]|IIteration \d+(?:, Testing| \(|, loss)")
    said = []
    for log in logs:
        lines = re.sub(r"^(.).*?\] ", r"\1", log, flags=re.MULTILINE).splitlines()
        said.append([re.sub(r" \(\S+ iter/s.*", "", line) for line in lines if wanted.match(line)])
    caffes, ours = said
    number = re.compile(r"-?[\d.]+(?:e[-+]\d+)?(?=$|[,)])")
    assert [number.sub("#", line) for line in ours] == [number.sub("#", line) for line in caffes]
    for own, other in zip(ours, caffes, strict=True):
        values = [[float(value) for value in number.findall(line)] for line in (own, other)]
        np.testing.assert_allclose(values[0], values[1], rtol=2e-4, atol=1e-6, err_msg=own)
    assert any(line.startswith("E    [Backward] All net params (data, diff): L1 norm = (") for line in ours)
    theirs, own = ({layer.name: layer.blobs for layer in file.layer if layer.blobs} for file in files)
    assert theirs.keys() == own.keys()
    for name, blobs in theirs.items():
        for blob, mine in zip(blobs, own[name], strict=True):
            assert len(mine.diff) == len(blob.diff) == len(blob.data)
            np.testing.assert_allclose(mine.data, blob.data, rtol=0, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(
                mine.diff, blob.diff, rtol=0, atol=2e-4 * max(np.abs(blob.diff)) + 1e-7, err_msg=name
            )


@pytest.mark.caffe
def test_a_solver_of_no_iterations_does_what_caffe_does(
    caffe_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It loads, shows its loss, tests, and takes a snapshot, or leaves one of these out."""
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NETWORK)
    solvers = {
        "all": "test_iter: 2 test_interval: 3 test_initialization: false display: 2",
        "interval": "snapshot: 5 test_iter: 2 test_interval: 3",
        "none": "snapshot_after_train: false display: 1 average_loss: 2",
    }
    common = 'net: "net.prototxt" base_lr: 0.5 lr_policy: "poly" power: 1 max_iter: 0 solver_mode: CPU'
    for name, fields in solvers.items():
        Path("s.prototxt").write_text(f'{common} snapshot_prefix: "{name}" {fields}')
        caffes = subprocess.run(
            [caffe_engine.info.executable, "train", "-solver", "s.prototxt"], capture_output=True, text=True
        )
        assert caffes.returncode == 0
        files = sorted(path.name for path in tmp_path.glob(f"{name}_*"))
        for path in tmp_path.glob(f"{name}_*"):
            path.unlink()
        capfd.readouterr()
        assert caffe_torch(["train", "-solver", "s.prototxt"]) == 0
        said = [
            [
                _rounded(line)
                for line in re.sub(r"(?m)^.*?\] |\(.*?iters?\), ", "", text).splitlines()
                if re.match("Iteration|    T|Snapshotting|Optimization", line)
            ]
            for text in (capfd.readouterr().err, caffes.stderr)
        ]
        assert said[0] == list(dict.fromkeys(said[1])), name  # Caffe says twice that it is done
        assert sorted(path.name for path in tmp_path.glob(f"{name}_*")) == files


def _rounded(line: str) -> str:
    """A log line with its numbers to four digits: the last one depends on the order of sums."""
    return re.sub(r"\d+\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.4g}", line)


def test_which_networks_a_solver_has(tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text('layer { name: "a" type: "ReLU" }')
    net = f'"{tmp_path / "net.prototxt"}"'

    def read(text: str) -> SolverFile:
        (tmp_path / "solver.prototxt").write_text(text)
        return read_solver(tmp_path / "solver.prototxt", Dialect.BVLC)

    solver = read(f'net: {net} test_net: {net} test_net_param {{ name: "n" }} test_iter: [1, 2, 3, 4]')
    sources = [test.source.split(" ")[0] for test in solver.tests]
    assert sources == ["test_net_param", "test_net", "net", "net"]
    assert [test.batches for test in solver.tests] == [1, 2, 3, 4]
    assert solver.parameters.snapshot_prefix == str(tmp_path / "solver")
    assert read(f'net: {net} snapshot_prefix: "{tmp_path}"').parameters.snapshot_prefix == str(
        tmp_path / "solver"
    )
    for text, message in (
        ("base_lr: 1", "has no training network; give one of net, net_param, train_net and train_net_param"),
        (f"net: {net} train_net: {net}", "has net and train_net; give one of"),
        (f"train_net: {net} test_iter: 3", "0 of test_net and 1 of test_iter"),
        (f"net: {net} test_net: {net}", "1 of test_net and 0 of test_iter"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read(text)
