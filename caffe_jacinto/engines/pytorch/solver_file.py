"""A solver.prototxt as this engine takes it: read, and every field either understood or refused."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.layer_setup import TEST, TRAIN
from caffe_jacinto.engines.pytorch.solvers import solver_type
from caffe_jacinto.engines.snapshots import check_prefix
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.prototxt.solver import learning_rate
from caffe_jacinto.recipes.model import SparseSettings

_KNOWN = frozenset(
    {
        *("net", "train_net", "test_net", "train_state", "test_state", "test_iter", "test_interval"),
        *("test_initialization", "base_lr", "display", "average_loss", "max_iter", "iter_size", "lr_policy"),
        *("gamma", "power", "momentum", "momentum2", "delta", "weight_decay", "regularization_type"),
        *("stepsize", "stepvalue", "clip_gradients", "snapshot", "snapshot_prefix", "random_seed", "type"),
        *("solver_type", "snapshot_after_train", "weights"),
        *("display_sparsity", "sparse_mode", "sparsity_target", "sparsity_step_factor", "sparsity_step_iter"),
        *("sparsity_start_iter", "sparsity_start_factor", "sparsity_threshold_maxratio"),
        "sparsity_threshold_value_max",
    }
)
_NO_EFFECT = frozenset(
    {
        *("solver_mode", "device_id", "layer_wise_reduce", "snapshot_log", "eval_type", "ap_version"),
        *("show_per_class_result", "rms_decay"),
    }
)
"""Where to compute, which -gpu says here; what to show of networks that are no classifiers."""

_ONLY: dict[str, Any] = {
    "debug_info": False,
    "test_compute_loss": False,
    "snapshot_diff": False,
    "snapshot_format": 1,
    "rampup_interval": 0,
    "rampup_lr": 0.0,
    "min_lr": 0.0,
    "momentum_policy": "fixed",
    "larc": False,
    "weight_decay_policy": "fixed",
    "solver_data_type": 0,
    "store_blobs_in_old_format": False,
    "test_and_snapshot_last_epochs": 0,
    "sparsity_itr_increment_bfr_applying": True,
}
"""Fields that have to be as they are by default."""


@dataclass(frozen=True)
class TestNet:
    """A net that tests what is trained."""

    __test__ = False  # its name is no sign for pytest

    file: Path
    definition: Any
    batches: int


@dataclass(frozen=True)
class SolverFile:
    """A solver and its nets, parsed."""

    path: Path
    dialect: Dialect
    parameters: Any
    """The SolverParameter message."""

    train_file: Path
    train_net: Any
    """The train net's NetParameter message."""

    tests: tuple[TestNet, ...]

    @property
    def sparse(self) -> SparseSettings | None:
        """What the fork's own fields say of sparsity; None where they say nothing."""
        fields = self.parameters
        if self.dialect is not Dialect.CAFFE_JACINTO or not fields.sparse_mode or fields.sparsity_target <= 0:
            return None
        return SparseSettings(
            target=float(f"{fields.sparsity_target:g}"),
            start_iter=fields.sparsity_start_iter,
            step_iter=max(fields.sparsity_step_iter, 1),
            step_factor=float(f"{fields.sparsity_step_factor:g}"),
            start_factor=float(f"{fields.sparsity_start_factor:.9g}"),
            threshold_maxratio=float(f"{fields.sparsity_threshold_maxratio:g}"),
            threshold_value_max=float(f"{fields.sparsity_threshold_value_max:g}"),
            display=fields.display_sparsity or 1000,
        )

    @property
    def freezes_zeros(self) -> bool:
        """Whether the fork's fields hold the zeros of the start weights."""
        return self.dialect is Dialect.CAFFE_JACINTO and bool(self.parameters.sparse_mode)

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return learning_rate(self.parameters, iteration)

    def current_step(self, iteration: int) -> int:
        """How many steps of the rate have been taken: a number that Caffe's solver state has."""
        fields = self.parameters
        if fields.lr_policy == "multistep":
            return sum(iteration >= value for value in fields.stepvalue)
        return iteration // fields.stepsize if fields.lr_policy == "step" else 0

    def snapshot(self, iteration: int, extension: str) -> Path:
        """The file of a snapshot of ``iteration``."""
        return Path(f"{self.parameters.snapshot_prefix}_iter_{iteration}{extension}")


def read_solver(path: Path, dialect: Dialect) -> SolverFile:
    """Parse the solver ``path`` and the nets that it names.

    Raises:
        UserError: a file that cannot be read or parsed, or a field that is not supported.
    """
    parameters = parse_solver(_text(path), dialect, str(path))
    _check_fields(parameters, path)
    train_file = parameters.train_net or parameters.net
    if not train_file:
        raise UserError(f"{path}: names no net; give train_net or net")
    files = list(parameters.test_net) or [parameters.net] * len(parameters.test_iter)
    if len(parameters.test_iter) != len(files):
        raise UserError(
            f"{path}: {len(files)} of test_net and {len(parameters.test_iter)} of test_iter; "
            "give each test net its batches"
        )
    states = list(parameters.test_state) or [None] * len(files)
    if len(states) != len(files):
        raise UserError(f"{path}: {len(states)} of test_state for {len(files)} test nets; give one for each")
    tests = tuple(
        TestNet(Path(file), read_net(Path(file), dialect, TEST, state), batches)
        for file, batches, state in zip(files, parameters.test_iter, states, strict=True)
    )
    train_state = parameters.train_state if parameters.HasField("train_state") else None
    train_net = read_net(Path(train_file), dialect, TRAIN, train_state)
    return SolverFile(path, dialect, parameters, Path(train_file), train_net, tests)


def read_net(path: Path, dialect: Dialect, phase: int, state: Any = None) -> Any:
    """The NetParameter of the file ``path``, its state that of ``phase`` and what ``state`` adds.

    Raises:
        UserError: it cannot be read or parsed.
    """
    net = parse_net(_text(path), dialect, str(path))
    if state is not None:
        net.state.MergeFrom(state)
    net.state.phase = phase
    return net


def is_frozen(layer: Any) -> bool:
    """Whether training leaves all of a layer as it is: what learns has learning rates of 0, and batch-norm
    statistics are those that are there."""
    if layer.type == "BatchNorm":
        # Stock Caffe's learns nothing: its blobs' learning rates are 0 in any case.
        return bool(layer.batch_norm_param.use_global_stats)
    return bool(layer.param) and all(parameter.lr_mult == 0 for parameter in layer.param)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _check_fields(parameters: Any, path: Path) -> None:
    for descriptor, value in parameters.ListFields():
        name = descriptor.name
        if name in _KNOWN or name in _NO_EFFECT:
            continue
        if name in _ONLY:
            if value != _ONLY[name]:
                raise UserError(f"{path}: {name}: only its default is supported; remove it")
        elif name not in ("momentum_power", "max_momentum", "larc_policy", "larc_eta", "weight_decay_power"):
            raise UserError(f"{path}: {name} is not supported; remove it")
    solver_type(parameters, str(path))
    if parameters.lr_policy == "step" and parameters.stepsize < 1:
        raise UserError(f"{path}: lr_policy step needs a stepsize of at least 1")
    if isnan(learning_rate(parameters, 0)):
        raise UserError(f"{path}: lr_policy {parameters.lr_policy!r} is unknown")
    if parameters.max_iter < 1 or parameters.iter_size < 1:
        raise UserError(f"{path}: max_iter and iter_size have to be at least 1")
    check_prefix(path, parameters.snapshot_prefix)
