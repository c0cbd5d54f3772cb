"""What of a solver file the engine on PyTorch carries out, and what it refuses."""

from __future__ import annotations

from math import isfinite
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import unwritable
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.prototxt.render import number
from caffe_jacinto.prototxt.solver import LR_POLICIES, SolverFile
from caffe_jacinto.recipes.model import sparse_fields
from caffe_jacinto.recipes.rules import image_size_mistakes

_CARRIED_OUT = frozenset(
    {
        *("net", "train_net", "test_net", "train_state", "test_state", "test_iter", "test_interval"),
        *("net_param", "train_net_param", "test_net_param", "test_compute_loss"),
        *("test_initialization", "base_lr", "display", "average_loss", "max_iter", "iter_size", "lr_policy"),
        *("gamma", "power", "momentum", "momentum2", "rms_decay", "delta", "weight_decay"),
        *("regularization_type", "stepsize", "stepvalue", "clip_gradients", "snapshot", "snapshot_prefix"),
        *("random_seed", "type", "snapshot_after_train", "weights", "sparse_mode", "snapshot_format"),
        *("snapshot_diff", "debug_info", "warmup_iter", "ema_decay", "image_size"),
        *(field.name for field in sparse_fields().values()),
    }
)
_NO_EFFECT = frozenset(
    {
        # Where to compute, which -gpu decides here; what to show of networks that are not classifiers.
        *("solver_mode", "device_id", "layer_wise_reduce", "snapshot_log", "eval_type", "ap_version"),
        "show_per_class_result",
        # These matter only with a policy that is not supported.
        *("momentum_power", "max_momentum", "larc_policy", "larc_eta", "weight_decay_power"),
    }
)
_ONLY_DEFAULT: dict[str, Any] = {
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


def check_solver(solver: SolverFile) -> None:
    """Refuse what this engine cannot carry out of a solver file.

    Raises:
        UserError: names the file and the field, and what is supported.
    """
    fields, where = solver.parameters, str(solver.path)
    for descriptor, value in fields.ListFields():
        name = descriptor.name
        if name in _ONLY_DEFAULT:
            if value != _ONLY_DEFAULT[name]:
                raise UserError(f"{where}: {name}: only its default is supported; remove it")
        elif name not in _CARRIED_OUT | _NO_EFFECT:
            raise UserError(f"{where}: {name} is not supported; remove it")
    if fields.regularization_type not in ("L1", "L2"):
        raise UserError(f"{where}: regularization_type has to be L1 or L2")
    if not fields.HasField("max_iter") or fields.max_iter < 0:
        raise UserError(f"{where}: max_iter has to be given, and at least 0; with 0 nothing is trained")
    if fields.iter_size < 1:
        raise UserError(f"{where}: iter_size has to be at least 1")
    _check_rule(fields, where)
    _check_rates(solver)
    if not 0 <= fields.ema_decay < 1:
        raise UserError(
            f"{where}: ema_decay is {number(fields.ema_decay)}; it has to be at least 0 and less than 1"
        )
    steps = [(step.from_iter, step.size) for step in fields.image_size]
    for what in image_size_mistakes(steps, fields.max_iter):
        raise UserError(f"{where}: image_size: {what}")
    for why in unwritable(solver, splits=False):
        raise UserError(why)
    solver.pruning()


def _check_rule(fields: Any, where: str) -> None:
    """Refuse what the rule of the solver cannot compute with; Caffe's own limits, and divisions by zero."""
    solver = solver_class(fields, where)
    name = solver.__name__
    if "momentum" not in solver.decays and fields.momentum:
        raise UserError(f"{where}: {name} takes no momentum; remove it, or set it to 0")
    for field in solver.decays:
        value = getattr(fields, field)
        if not 0 <= value < 1:
            raise UserError(f"{where}: {field} is {number(value)}; it has to be at least 0 and less than 1")
    if solver.divides and not fields.delta > 0:
        raise UserError(
            f"{where}: delta is {number(fields.delta)}; {name} divides by it: it has to be above 0"
        )


def _check_rates(solver: SolverFile) -> None:
    """Refuse a learning-rate policy that is unknown, or that gives no number at the start or the end."""
    fields, where = solver.parameters, str(solver.path)
    policy = fields.lr_policy
    if policy not in LR_POLICIES:
        raise UserError(f"{where}: lr_policy {policy!r} is unknown; known: {', '.join(LR_POLICIES)}")
    if fields.warmup_iter and not 0 < fields.warmup_iter < fields.max_iter:
        raise UserError(
            f"{where}: warmup_iter is {fields.warmup_iter}; it has to be at least 0 and less than max_iter"
        )
    if policy == "one_cycle" and not fields.warmup_iter:
        raise UserError(f"{where}: lr_policy one_cycle needs warmup_iter, the iteration of its largest rate")
    if policy == "step" and fields.stepsize < 1:
        raise UserError(f"{where}: lr_policy step needs a stepsize of at least 1")
    for iteration in (0, fields.max_iter - 1) if fields.max_iter else ():
        if not isfinite(solver.rate(iteration)):
            raise UserError(
                f"{where}: lr_policy {policy} gives no finite learning rate at iteration {iteration}; "
                "check base_lr, gamma and power"
            )
