"""A solver.prototxt and the networks that it names, parsed; Caffe's learning rate policies.

What an engine cannot carry out of them is that engine's own check.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, exp, inf, nan, pi
from pathlib import Path
from typing import Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import looked_for, read_text
from caffe_jacinto.prototxt import forks
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.prototxt.tree import Message, parse, tree_of
from caffe_jacinto.prototxt.upgrade import keep_lines
from caffe_jacinto.recipes.model import SparseSettings, sparse_fields, sparse_settings
from caffe_jacinto.recipes.rules import step_iterations


def histories(kind: str) -> int:
    """How many blobs of history a solver of this type keeps for each blob of weights (solvers/*.cpp)."""
    return 2 if kind in ("AdaDelta", "Adam") else 1


class Written(NamedTuple):
    """Where a network is written: a file's text, and the field where it is inside a solver."""

    file: Path
    text: str
    field: str = ""
    number: int = 0
    """Of several such fields."""

    def tree(self, today: Any) -> Message:
        """The network, with the lines of the file. ``today`` is its message, brought up to date."""
        found = parse(self.text, str(self.file))
        if self.field:
            found = found.messages(self.field)[self.number]
        if not (found.has("layers") or found.has("input")):
            return found
        tree = tree_of(today)
        keep_lines(tree, found)
        return tree


@dataclass(frozen=True)
class TestNet:
    """A network that tests what is trained."""

    __test__ = False  # not a test, whatever pytest makes of its name

    file: Path
    """Its own, or the solver's where it is inside that."""

    definition: Any
    """Its NetParameter message, with the state that it is tested in."""

    batches: int
    """Batches of one test."""

    source: str
    """Where it comes from, in the words of Caffe's log: ``test_net file: val.prototxt``."""

    written: Written


@dataclass(frozen=True)
class SolverFile:
    """A solver and its networks."""

    path: Path
    dialect: Dialect
    parameters: Any
    """The SolverParameter message."""

    train_file: Path
    """Its own, or the solver's where it is inside that."""

    train_net: Any
    """The training network's NetParameter message, with the state that it is trained in."""

    tests: tuple[TestNet, ...]
    train_source: str
    """As `TestNet.source`."""

    written: Written
    """The training network's text."""

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return learning_rate(self.parameters, iteration)

    def image_size(self, iteration: int) -> int | None:
        """The side, in pixels, that training images are resized to in an iteration; None: they are not."""
        sizes = [step.size for step in self.parameters.image_size if step.from_iter <= iteration]
        return sizes[-1] if sizes else None

    def current_step(self, updates: int) -> int:
        """How often the learning rate had stepped in the last of ``updates``; solver states have it."""
        return _steps(self.parameters, max(updates - 1, 0))

    def snapshot(self, iteration: int, extension: str) -> Path:
        """The file of a snapshot of ``iteration``: ``extension`` and, in HDF5, ``.h5`` behind it."""
        form = ".h5" if self.in_hdf5 else ""
        return Path(f"{self.parameters.snapshot_prefix}_iter_{iteration}{extension}{form}")

    @property
    def in_hdf5(self) -> bool:
        """Whether snapshots are HDF5 files."""
        return bool(self.parameters.snapshot_format == self.parameters.HDF5)

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
        UserError: a file cannot be read or parsed, or the solver does not name its networks.
    """
    texts = texts or {}

    def text_of(file: Path) -> str:
        return texts[str(file)] if str(file) in texts else read_text(file)

    own = text_of(path)
    parameters = parse_solver(own, dialect, str(path))
    _complete_snapshot_prefix(parameters, path)

    def read(place: _Place, phase: int, state: Any) -> Any:
        if place.file is not None:
            return parse_net_in(text_of(place.file), dialect, str(place.file), phase, state)
        return _in_state(place.inside, phase, state)

    def written(place: _Place) -> Written:
        if place.file is not None:
            return Written(place.file, text_of(place.file))
        return Written(path, own, place.source, place.number)

    train = _training_place(parameters, path)
    places = _test_places(parameters, path)
    states = list(parameters.test_state) or [None] * len(places)
    if len(states) != len(places):
        raise UserError(f"{path}: {len(states)} of test_state for {len(places)} test networks; give each one")
    tests = tuple(
        TestNet(place.file or path, read(place, TEST, state), batches, place.source, written(place))
        for place, batches, state in zip(places, parameters.test_iter, states, strict=True)
    )
    train_state = parameters.train_state if parameters.HasField("train_state") else None
    train_net = read(train, TRAIN, train_state)
    return SolverFile(
        path, dialect, parameters, train.file or path, train_net, tests, train.source, written(train)
    )


class _Place(NamedTuple):
    """Where a solver has a network: a file, or a message inside it."""

    source: str
    """As Caffe's log says it."""

    file: Path | None
    inside: Any = None
    number: int = 0


def _training_place(parameters: Any, path: Path) -> _Place:
    """The training network, by the one field that gives it (Solver::InitTrainNet)."""
    given = [
        name for name in ("net", "net_param", "train_net", "train_net_param") if parameters.HasField(name)
    ]
    if len(given) != 1:
        raise UserError(
            f"{path}: has {' and '.join(given) or 'no training network'}; give one of net, net_param, "
            "train_net and train_net_param"
        )
    return _place(parameters, given[0])


def _place(parameters: Any, name: str) -> _Place:
    value = getattr(parameters, name)
    return (
        _Place(name, None, value) if name.endswith("param") else _Place(f"{name} file: {value}", Path(value))
    )


def _test_places(parameters: Any, path: Path) -> list[_Place]:
    """The test networks in Caffe's order: test_net_param, test_net, and net for the rest of test_iter."""
    batches = len(parameters.test_iter)
    places = [
        _Place("test_net_param", None, net, number) for number, net in enumerate(parameters.test_net_param)
    ]
    places += [_Place(f"test_net file: {name}", Path(name)) for name in parameters.test_net]
    for name in ("net", "net_param"):
        if parameters.HasField(name):
            places += [_place(parameters, name)] * (batches - len(places))
    if len(places) != batches:
        raise UserError(
            f"{path}: {len(places)} of test_net and {batches} of test_iter; "
            "give each test network its number of batches"
        )
    return places


def _complete_snapshot_prefix(parameters: Any, path: Path) -> None:
    """Name snapshots after the solver where that only names a folder, or nothing, as Caffe does."""
    if not parameters.HasField("snapshot_prefix"):
        parameters.snapshot_prefix = str(path.with_suffix(""))
    elif Path(parameters.snapshot_prefix).is_dir():
        parameters.snapshot_prefix = str(Path(parameters.snapshot_prefix) / path.stem)


def require_network_files(solver: SolverFile) -> None:
    """Raise UserError where a network is inside the solver, and not a file of its own."""
    if solver.path in (solver.train_file, *(test.file for test in solver.tests)):
        raise UserError(f"{solver.path}: name the networks as files, by train_net and test_net, or net")


TRAIN, TEST = 0, 1
"""caffe.Phase, as both schemas number it."""


def parse_net_in(text: str, dialect: Dialect, where: str, phase: int, state: Any = None) -> Any:
    """The NetParameter of a prototxt, its state that of ``phase`` with what ``state`` adds.

    Raises:
        UserError: it cannot be parsed.
    """
    return _in_state(parse_net(text, dialect, where), phase, state)


def _in_state(given: Any, phase: int, state: Any) -> Any:
    net = type(given)()
    net.CopyFrom(given)
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


LR_POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid", *forks.LR_POLICIES)
"""The learning-rate policies: of Caffe 1.0, and of the engine on PyTorch."""

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4
"""Where one_cycle begins, as a part of base_lr, and where it ends, as a part of that."""


def learning_rate(solver: Any, iteration: int) -> float:
    """The learning rate of the update of ``iteration``; ``solver`` is a SolverParameter message.

    Caffe's policies: SolverParameter.lr_policy in its schema. Beyond Caffe, with W = warmup_iter:

    - In the first W iterations of any policy but one_cycle, the rate of iteration W times (iteration + 1) /
      (W + 1): the gradual warm-up of Goyal et al. 2017 (arXiv:1706.02677), section 2.2.
    - cosine: from base_lr at iteration W to 0 at max_iter along half a cosine (Loshchilov and Hutter 2017,
      arXiv:1608.03983, equation 5, without restarts).
    - one_cycle: up to base_lr at iteration W and down again to the last one (Smith and Topin 2017,
      arXiv:1708.07120, section 3). It begins at `ONE_CYCLE_START`, ends at `ONE_CYCLE_END`, and goes along
      half cosines, as torch.optim.lr_scheduler.OneCycleLR does; momentum stays as it is.

    NaN for a policy that is unknown, and where a formula gives no real number.
    """
    warmup = int(solver.warmup_iter)
    if solver.lr_policy == "one_cycle":
        return _one_cycle(float(solver.base_lr), iteration, warmup, solver.max_iter - 1)
    if iteration < warmup:
        return _policy_rate(solver, warmup) * (iteration + 1) / (warmup + 1)
    return _policy_rate(solver, iteration)


def _one_cycle(most: float, iteration: int, top: int, last: int) -> float:
    start = most * ONE_CYCLE_START
    if iteration < top:
        return _half_cosine(start, most, iteration / top)
    return _half_cosine(most, start * ONE_CYCLE_END, (iteration - top) / max(last - top, 1))


def _half_cosine(start: float, end: float, part: float) -> float:
    """Between ``start`` and ``end``, ``part`` of the way along half a cosine."""
    return end + (start - end) * (1 + cos(pi * part)) / 2


def _policy_rate(solver: Any, iteration: int) -> float:
    """The learning rate after the warm-up."""
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
    if policy == "cosine":
        warmup = int(solver.warmup_iter)
        return _half_cosine(base, 0.0, (iteration - warmup) / max(solver.max_iter - warmup, 1))
    if policy == "sigmoid":
        exponent = gamma * (iteration - solver.stepsize)
        small = exp(-abs(exponent))  # exp of the other sign could overflow
        return base * (1 if exponent > 0 else small) / (1 + small)
    return nan


def _steps(solver: Any, iteration: int) -> int:
    """How often the learning rate has stepped at ``iteration``; once an iteration at most, as in Caffe."""
    if solver.lr_policy == "step":
        return int(iteration // solver.stepsize)
    values = solver.stepvalue if solver.lr_policy == "multistep" else ()
    return bisect_right(step_iterations(values), iteration)


def _power(base: float, exponent: float) -> float:
    """C's pow: infinite where the result is too large, NaN where it is not real."""
    try:
        result = base**exponent
    except (OverflowError, ZeroDivisionError):
        return inf
    return nan if isinstance(result, complex) else float(result)
