"""Caffe's solvers: how a gradient updates the weights, and what of a solver file is supported.

V = momentum V + lr lr_mult (gradient / passes + decay decay_mult w);  w = w - V

and the rules of Nesterov and Adam (Caffe's solvers/*.cpp; SolverParameter in its schema). All blobs are
updated by a few fused operations, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, sqrt
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import Learnable
from caffe_jacinto.prototxt.solver import SolverFile
from caffe_jacinto.recipes.model import sparse_fields

SOLVERS = ("SGD", "Nesterov", "Adam")
_OLD_NAMES = {0: "SGD", 1: "Nesterov", 5: "Adam"}
"""SolverParameter.solver_type, the older form."""

_CARRIED_OUT = frozenset(
    {
        *("net", "train_net", "test_net", "train_state", "test_state", "test_iter", "test_interval"),
        *("test_initialization", "base_lr", "display", "average_loss", "max_iter", "iter_size", "lr_policy"),
        *("gamma", "power", "momentum", "momentum2", "delta", "weight_decay", "regularization_type"),
        *("stepsize", "stepvalue", "clip_gradients", "snapshot", "snapshot_prefix", "random_seed", "type"),
        *("solver_type", "snapshot_after_train", "weights", "sparse_mode"),
        *(field.name for field in sparse_fields().values()),
    }
)
_NO_EFFECT = frozenset(
    {
        # Where to compute, which -gpu decides here; what to show of networks that are not classifiers.
        *("solver_mode", "device_id", "layer_wise_reduce", "snapshot_log", "eval_type", "ap_version"),
        *("show_per_class_result", "rms_decay"),
        # These matter only with a policy that is not supported.
        *("momentum_power", "max_momentum", "larc_policy", "larc_eta", "weight_decay_power"),
    }
)
_ONLY_DEFAULT: dict[str, Any] = {
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
    solver_type(fields, where)
    if fields.regularization_type not in ("L1", "L2"):
        raise UserError(f"{where}: regularization_type has to be L1 or L2")
    if fields.lr_policy == "step" and fields.stepsize < 1:
        raise UserError(f"{where}: lr_policy step needs a stepsize of at least 1")
    if fields.max_iter < 1 or fields.iter_size < 1:
        raise UserError(f"{where}: max_iter and iter_size have to be at least 1")
    if isnan(solver.rate(0)):
        raise UserError(f"{where}: lr_policy {fields.lr_policy!r} is unknown")
    solver.pruning()


class Updater:
    """Updates the learnables of a net by their gradients; keeps the history that the solver needs."""

    def __init__(self, parameters: Any, learnables: Sequence[Learnable], where: str) -> None:
        """``parameters`` is the SolverParameter of the file ``where``, which `check_solver` accepts."""
        self._type = solver_type(parameters, where)
        self._parameters, self._learnables = parameters, learnables
        times = 2 if self._type == "Adam" else 1
        self.history = [
            [torch.zeros_like(learnable.tensor, requires_grad=False) for learnable in learnables]
            for _ in range(times)
        ]
        """One tensor for each learnable, in Caffe's order; for Adam both moments."""

        self._moving = [i for i, learnable in enumerate(learnables) if learnable.tensor.requires_grad]
        self._weights = [learnables[i].tensor for i in self._moving]
        self._groups = _groups([learnables[i] for i in self._moving])

    def history_of(self) -> dict[int, list[Tensor]]:
        """The history of each learnable, by the id of its tensor."""
        return {
            id(learnable.tensor): [moment[i] for moment in self.history]
            for i, learnable in enumerate(self._learnables)
        }

    @torch.no_grad()
    def apply(self, iteration: int, rate: float, passes: int) -> None:
        """One update by the gradients that ``passes`` passes have summed up; they are gone then."""
        gradients = [
            torch.zeros_like(weights) if weights.grad is None else weights.grad for weights in self._weights
        ]
        if not gradients:
            return
        self._clip(gradients)
        if passes > 1:
            torch._foreach_mul_(gradients, 1 / passes)
        rule = {"SGD": self._sgd, "Nesterov": self._nesterov, "Adam": self._adam}[self._type]
        for (lr_mult, decay_mult), members in self._groups.items():
            weights = [self._weights[i] for i in members]
            grouped = [gradients[i] for i in members]
            self._regularize(weights, grouped, decay_mult)
            rule(weights, grouped, [self._moving[i] for i in members], rate * lr_mult, iteration)
        for updated in self._weights:
            updated.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients that the passes left, of everything that learns, in order."""
        for weights in self._weights:
            if weights.grad is None:
                weights.grad = torch.zeros_like(weights)
        return [weights.grad for weights in self._weights if weights.grad is not None]

    def _clip(self, gradients: list[Tensor]) -> None:
        """Scale all gradients down where their norm, of all together, is above ``clip_gradients``."""
        most = self._parameters.clip_gradients
        if most < 0:
            return
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (most / norm).clamp(max=1))

    def _regularize(self, weights: list[Tensor], gradients: list[Tensor], decay_mult: float) -> None:
        decay = self._parameters.weight_decay * decay_mult
        if not decay:
            return
        l1 = self._parameters.regularization_type == "L1"
        torch._foreach_add_(gradients, torch._foreach_sign(weights) if l1 else weights, alpha=decay)

    def _sgd(
        self, weights: list[Tensor], gradients: list[Tensor], at: list[int], rate: float, iteration: int
    ) -> None:
        momenta = [self.history[0][i] for i in at]
        torch._foreach_mul_(momenta, self._parameters.momentum)
        torch._foreach_add_(momenta, gradients, alpha=rate)
        torch._foreach_sub_(weights, momenta)

    def _nesterov(
        self, weights: list[Tensor], gradients: list[Tensor], at: list[int], rate: float, iteration: int
    ) -> None:
        momenta, momentum = [self.history[0][i] for i in at], self._parameters.momentum
        torch._foreach_add_(weights, momenta, alpha=momentum)
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients, alpha=rate)
        torch._foreach_sub_(weights, momenta, alpha=1 + momentum)

    def _adam(
        self, weights: list[Tensor], gradients: list[Tensor], at: list[int], rate: float, iteration: int
    ) -> None:
        first, second = ([moment[i] for i in at] for moment in self.history)
        beta1, beta2 = self._parameters.momentum, self._parameters.momentum2
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        correction = sqrt(1 - beta2 ** (iteration + 1)) / (1 - beta1 ** (iteration + 1))
        divisors = torch._foreach_sqrt(second)
        torch._foreach_add_(divisors, self._parameters.delta)
        torch._foreach_addcdiv_(weights, first, divisors, value=-rate * correction)


def solver_type(parameters: Any, where: str) -> str:
    """The solver that a SolverParameter names.

    Raises:
        UserError: one that is not supported.
    """
    name = str(parameters.type)
    if parameters.HasField("solver_type"):
        name = _OLD_NAMES.get(parameters.solver_type, f"number {parameters.solver_type}")
    if name not in SOLVERS:
        raise UserError(f"{where}: solver type {name!r} is not supported; supported: {', '.join(SOLVERS)}")
    return name


def _groups(learnables: Sequence[Learnable]) -> dict[tuple[float, float], list[int]]:
    """The places of those that learn and decay at the same pace."""
    groups: dict[tuple[float, float], list[int]] = {}
    for i, learnable in enumerate(learnables):
        groups.setdefault((learnable.lr_mult, learnable.decay_mult), []).append(i)
    return groups
