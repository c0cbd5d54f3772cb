"""A solver.prototxt and the networks that it names, parsed; Caffe's learning rate policies.

What an engine cannot carry out of them is that engine's own check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf, nan
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import looked_for, read_text
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.model import SparseSettings, sparse_fields, sparse_settings


def histories(kind: str) -> int:
    """How many blobs of history a solver of this type keeps for each blob of weights (solvers/*.cpp)."""
    return 2 if kind in ("AdaDelta", "Adam") else 1


@dataclass(frozen=True)
class TestNet:
    """A network that tests what is trained."""

    __test__ = False  # not a test, whatever pytest makes of its name

    file: Path
    definition: Any
    """Its NetParameter message, with the state that it is tested in."""

    batches: int
    """Batches of one test."""


@dataclass(frozen=True)
class SolverFile:
    """A solver and its networks."""

    path: Path
    dialect: Dialect
    parameters: Any
    """The SolverParameter message."""

    train_file: Path
    train_net: Any
    """The training network's NetParameter message, with the state that it is trained in."""

    tests: tuple[TestNet, ...]

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return learning_rate(self.parameters, iteration)

    def current_step(self, updates: int) -> int:
        """How often the learning rate had stepped in the last of ``updates``; solver states have it."""
        return _steps(self.parameters, max(updates - 1, 0))

    def snapshot(self, iteration: int, extension: str) -> Path:
        """The file of a snapshot of ``iteration``."""
        return Path(f"{self.parameters.snapshot_prefix}_iter_{iteration}{extension}")

    def pruning(self) -> SparseSettings | None:
        """The sparsity schedule in caffe-jacinto's own fields; None where they do not prune.

        Raises:
            UserError: a value is out of its range.
        """
        from caffe_jacinto.prototxt.render import number

        fields = self.parameters
        if not self.holds_zeros or fields.sparsity_target <= 0:
            return None
        names = [field.name for field in sparse_fields().values() if field.in_solver]
        values: dict[str, Any] = {name: getattr(fields, name) for name in names}
        for name, value in values.items():
            if isinstance(value, float):  # what the file says, which float32 holds only nearly
                values[name] = float(number(value))
        values["sparsity_step_iter"] = max(fields.sparsity_step_iter, 1)
        values["display_sparsity"] = fields.display_sparsity or 1000
        return sparse_settings(values, f"{self.path}: ")

    @property
    def holds_zeros(self) -> bool:
        """Whether caffe-jacinto's own fields hold zeros."""
        return self.dialect is Dialect.CAFFE_JACINTO and bool(self.parameters.sparse_mode)

    def frozen_layers(self) -> frozenset[str]:
        """The layers of the training network that training leaves as they are."""
        return frozenset(layer.name for layer in self.train_net.layer if is_frozen(layer))


def read_solver(path: Path, dialect: Dialect, texts: Mapping[str, str] | None = None) -> SolverFile:
    """Parse the solver ``path`` and the networks that it names.

    ``texts`` are files that are not written yet, by path.

    Raises:
        UserError: a file cannot be read or parsed, or the solver does not name its networks as files.
    """
    texts = texts or {}

    def text_of(file: Path) -> str:
        return texts[str(file)] if str(file) in texts else read_text(file)

    def net(file: str, phase: int, state: Any) -> Any:
        return parse_net_in(text_of(Path(file)), dialect, file, phase, state)

    parameters = parse_solver(text_of(path), dialect, str(path))
    train_file = parameters.train_net or parameters.net
    if not train_file or parameters.test_net_param or parameters.HasField("train_net_param"):
        raise UserError(f"{path}: name the networks as files, by train_net and test_net, or net")
    files = list(parameters.test_net) or [parameters.net] * len(parameters.test_iter)
    if len(parameters.test_iter) != len(files):
        raise UserError(
            f"{path}: {len(files)} of test_net and {len(parameters.test_iter)} of test_iter; "
            "give each test network its number of batches"
        )
    states = list(parameters.test_state) or [None] * len(files)
    if len(states) != len(files):
        raise UserError(f"{path}: {len(states)} of test_state for {len(files)} test networks; give each one")
    tests = tuple(
        TestNet(Path(file), net(file, TEST, state), batches)
        for file, batches, state in zip(files, parameters.test_iter, states, strict=True)
    )
    train_state = parameters.train_state if parameters.HasField("train_state") else None
    return SolverFile(path, dialect, parameters, Path(train_file), net(train_file, TRAIN, train_state), tests)


TRAIN, TEST = 0, 1
"""caffe.Phase, as both schemas number it."""


def parse_net_in(text: str, dialect: Dialect, where: str, phase: int, state: Any = None) -> Any:
    """The NetParameter of a prototxt, its state that of ``phase`` with what ``state`` adds.

    Raises:
        UserError: it cannot be parsed.
    """
    net = parse_net(text, dialect, where)
    if state is not None:
        net.state.MergeFrom(state)
    net.state.phase = phase
    return net


def check_snapshot_folder(solver: SolverFile) -> None:
    """Raise UserError unless the folder exists that the solver's snapshots go to."""
    prefix = solver.parameters.snapshot_prefix
    folder = Path(prefix).parent
    if not prefix or not folder.is_dir():
        raise UserError(
            f"{solver.path}: snapshot_prefix {prefix!r}: its folder is missing{looked_for(folder)}; "
            "make it first"
        )


def is_frozen(layer: Any) -> bool:
    """Whether training leaves a layer as it is: its learning rates are 0, or its statistics are fixed."""
    if layer.type == "BatchNorm":
        # In stock Caffe its blobs are statistics, whose learning rates are always 0.
        return bool(layer.batch_norm_param.use_global_stats)
    return bool(layer.param) and all(parameter.lr_mult == 0 for parameter in layer.param)


LR_POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid")
"""The learning-rate policies of Caffe 1.0."""


def learning_rate(solver: Any, iteration: int) -> float:
    """The learning rate of the update of ``iteration``; ``solver`` is a SolverParameter message.

    Formulas: SolverParameter.lr_policy in Caffe's schema. NaN for a policy that Caffe 1.0 does not have, and
    where a formula gives no real number.
    """
    base, gamma, power = float(solver.base_lr), float(solver.gamma), float(solver.power)
    policy = solver.lr_policy
    if policy == "fixed":
        return base
    if policy in ("step", "multistep"):
        return base * _power(gamma, _steps(solver, iteration))
    if policy == "exp":
        return base * _power(gamma, iteration)
    if policy == "inv":
        return base * _power(1 + gamma * iteration, -power)
    if policy == "poly":
        return base * _power(1 - iteration / solver.max_iter, power)
    if policy == "sigmoid":
        exponent = gamma * (iteration - solver.stepsize)
        small = exp(-abs(exponent))  # exp of the other sign could overflow
        return base * (1 if exponent > 0 else small) / (1 + small)
    return nan


def _steps(solver: Any, iteration: int) -> int:
    """How often the learning rate has stepped at ``iteration``; once an iteration at most, as in Caffe."""
    if solver.lr_policy == "step":
        return int(iteration // solver.stepsize)
    steps, at = 0, -1
    for value in solver.stepvalue if solver.lr_policy == "multistep" else ():
        at = max(at + 1, value)
        if iteration < at:
            break
        steps += 1
    return steps


def _power(base: float, exponent: float) -> float:
    """C's pow: infinite where the result is too large, NaN where it is not real."""
    try:
        result = base**exponent
    except (OverflowError, ZeroDivisionError):
        return inf
    return nan if isinstance(result, complex) else float(result)
