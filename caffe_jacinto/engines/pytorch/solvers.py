"""Caffe's solvers: what a gradient does to the weights.

V = momentum V + lr lr_mult (gradient / passes + decay decay_mult w);  w = w - V

and its kin (Caffe's solvers/*.cpp; SolverParameter in its schema). All blobs are updated by a few fused
operations, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import Learnable

SOLVERS = ("SGD", "Nesterov", "Adam")
_OLD_NAMES = {0: "SGD", 1: "Nesterov", 5: "Adam"}
"""SolverParameter.solver_type, the older way to say it."""


class Updater:
    """Updates the learnables of a net by their gradients; keeps the history that the solver needs."""

    def __init__(self, parameters: Any, learnables: Sequence[Learnable], where: str) -> None:
        """``parameters`` is the SolverParameter message of the file ``where``.

        Raises:
            UserError: a solver or regularization that is not supported.
        """
        self._type = solver_type(parameters, where)
        self._parameters = parameters
        if parameters.regularization_type not in ("L1", "L2"):
            raise UserError(f"{where}: regularization_type has to be L1 or L2")
        times = 2 if self._type == "Adam" else 1
        self.history = [
            [torch.zeros_like(learnable.tensor, requires_grad=False) for learnable in learnables]
            for _ in range(times)
        ]
        """One tensor for each learnable, in Caffe's order; for Adam both moments."""

        self._moving = [i for i, learnable in enumerate(learnables) if learnable.tensor.requires_grad]
        self._weights = [learnables[i].tensor for i in self._moving]
        self._groups = _groups([learnables[i] for i in self._moving])

    @torch.no_grad()
    def apply(self, iteration: int, rate: float, passes: int) -> None:
        """One update by the gradients that ``passes`` passes have summed up, which are used up by it."""
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
        """Those that the passes left, of what is learnt, in order."""
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
