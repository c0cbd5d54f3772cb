"""Caffe's six solvers as optimizers of PyTorch: how gradients update the weights.

The gradient g of a blob w, before the rule of the solver (Caffe's solvers/sgd_solver.cpp):

    g = clipped(sum of the gradients of iter_size passes) / iter_size + weight_decay decay_mult reg(w)

where reg(w) is w for L2 and sign(w) for L1. The learning rate of a blob, r below, is that of the iteration
times the blob's lr_mult. The rules are those of Caffe's solvers/*.cpp; momentum, momentum2, rms_decay and
delta are fields of SolverParameter. All blobs with the same multipliers are updated by a few fused
operations, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import Learnable
from caffe_jacinto.prototxt.dialects import Dialect

Tensors = list[Tensor]

Rate = float | Tensor
"""A learning rate: a number, or a tensor of no dimensions on the device."""


class CaffeSolver(Optimizer):
    """A solver of Caffe; each subclass is one.

    ``param_groups`` has a group for each pair of multipliers, with ``lr``, ``lr_mult``, ``decay_mult`` and
    ``weight_decay``, the products of the multipliers with the solver's own. ``state[tensor]["history"]`` is
    the list of the solver's moments of that blob, each of the blob's shape.

    Each iteration: `prepare`, `step`, ``zero_grad``. `step` computes in the gradients' own memory.

    Blobs with an lr_mult of 0 never change, batch norm's statistics among them. Their histories change as in
    stock Caffe: by weight decay, where squares of gradients are summed up. One difference: stock Caffe's SGD
    and Nesterov move a blob that is frozen in the middle of a training by what is left of its momentum.
    """

    moments: ClassVar[int] = 1
    """How many tensors the history has for each blob."""

    least_delta: ClassVar[float] = 0.0
    """The fork raises a smaller ``delta`` to this (NVCaffe 0.17, src/caffe/solvers)."""

    decays: ClassVar[tuple[str, ...]] = ("momentum",)
    """The fields that say how much of a moment stays: each at least 0, and less than 1."""

    divides: ClassVar[bool] = True
    """Whether the gradient is divided by a measure of its own size, which ``delta`` keeps above 0."""

    def __init__(
        self,
        learnables: Sequence[Learnable],
        parameters: Any,
        *,
        dialect: Dialect = Dialect.BVLC,
        capturable: bool = False,
    ) -> None:
        """``learnables`` are in Caffe's order, ``parameters`` a SolverParameter that `check_solver` accepts.

        ``capturable``: `step` can be captured in a CUDA graph. What changes from iteration to iteration is
        then in tensors on the device, which `prepare` fills; otherwise it is in numbers. The results are the
        same up to rounding.
        """
        self._parameters, self._dialect, self._capturable = parameters, dialect, capturable
        self._order = [learnable.tensor for learnable in learnables]
        self._learning = [learnable.tensor for learnable in learnables if learnable.lr_mult]
        self._device = self._order[0].device if self._order else torch.device("cpu")
        self.updates: dict[Tensor, Tensor] | None = None
        """What the last step subtracted from each blob; only with ``snapshot_diff``."""

        if parameters.snapshot_diff:
            self.updates = {tensor: torch.zeros_like(tensor, requires_grad=False) for tensor in self._order}
        self._delta = float(parameters.delta)
        if dialect is Dialect.CAFFE_JACINTO:
            self._delta = max(self._delta, self.least_delta)
        super().__init__(_groups(learnables, parameters.weight_decay), {})
        for tensor in self._order:
            self.state[tensor]["history"] = [
                torch.zeros_like(tensor, requires_grad=False) for _ in range(self.moments)
            ]
        self.prepare(0, parameters.base_lr)

    @property
    def history(self) -> list[Tensor]:
        """The history in the order of Caffe's SolverState: all blobs' first moments, then the second ones."""
        return [
            self.state[tensor]["history"][moment] for moment in range(self.moments) for tensor in self._order
        ]

    def gradients(self) -> list[Tensor]:
        """The gradients of everything that learns, in Caffe's order; zeros where the passes left none."""
        for tensor in self._learning:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return [tensor.grad for tensor in self._learning if tensor.grad is not None]

    def prepare(self, iteration: int, rate: float) -> None:
        """Set what the next `step` needs: the number of updates before it, and its learning rate.

        With a captured step, the tensors that the graph reads are filled; nothing waits for the device.
        """
        for group in self.param_groups:
            group["lr"] = self._variable(rate * group["lr_mult"], group.get("lr"))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by the gradients that ``iter_size`` passes have summed up, which are overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clip_and_average(self.gradients())
        for group in self.param_groups:
            weights = group["params"]
            if not weights:
                continue
            if group["lr_mult"]:
                gradients = [tensor.grad for tensor in weights]
            elif self.divides and self._dialect is Dialect.BVLC:
                gradients = [torch.zeros_like(tensor) for tensor in weights]
            else:
                continue
            self._regularize(weights, gradients, group["weight_decay"])
            histories = [self.state[tensor]["history"] for tensor in weights]
            by_moment = [list(moment) for moment in zip(*histories, strict=True)]
            if self.updates is None:
                self._update(weights, gradients, by_moment, group["lr"])
            else:
                self._update_and_keep(weights, gradients, by_moment, group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the tensors of the history stay the same ones, for those who hold them."""
        own = {tensor: self.state[tensor]["history"] for tensor in self._order}
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for tensor, moments in own.items():
            torch._foreach_copy_(moments, self.state[tensor]["history"])
            self.state[tensor]["history"] = moments
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = self._variable(float(group["lr"]), rate)

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        """The solver's rule, for blobs that learn at ``rate``; ``gradients`` may be overwritten."""
        raise NotImplementedError

    def _update_and_keep(
        self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate
    ) -> None:
        """As `_update`; `updates` has then what it subtracted, as Caffe's blobs have it in their diff."""
        assert self.updates is not None
        updates = [self.updates[tensor] for tensor in weights]
        torch._foreach_zero_(updates)
        self._update(updates, gradients, history, rate)  # from zero: the update with its sign turned
        torch._foreach_add_(weights, updates)
        torch._foreach_neg_(updates)

    def _variable(self, value: float, into: Rate | None) -> Rate:
        """A number that changes between steps: of type float, or a tensor that keeps its place."""
        if not self._capturable:
            return value
        if isinstance(into, Tensor):
            return into.fill_(value)
        return torch.tensor(value, dtype=torch.float32, device=self._device)

    def _clip_and_average(self, gradients: list[Tensor]) -> None:
        """Scale down if the norm, of all together, is above ``clip_gradients``; then average over passes."""
        if not gradients:
            return
        most, passes = self._parameters.clip_gradients, self._parameters.iter_size
        if most >= 0:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, (most / norm).clamp(max=1).nan_to_num_(nan=1))
        if passes > 1:
            torch._foreach_mul_(gradients, 1 / passes)

    def _regularize(self, weights: list[Tensor], gradients: list[Tensor], decay: float) -> None:
        if decay:
            l1 = self._parameters.regularization_type == "L1"
            torch._foreach_add_(gradients, torch._foreach_sign(weights) if l1 else weights, alpha=decay)


class SGD(CaffeSolver):
    """h = momentum h + r g;  w = w - h."""

    divides = False

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        (momenta,) = history
        torch._foreach_mul_(momenta, self._parameters.momentum)
        _add_scaled(momenta, gradients, rate)
        torch._foreach_sub_(weights, momenta)


class Nesterov(CaffeSolver):
    """h' = momentum h + r g;  w = w + momentum h - (1 + momentum) h'."""

    divides = False

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        (momenta,), momentum = history, self._parameters.momentum
        torch._foreach_add_(weights, momenta, alpha=momentum)
        torch._foreach_mul_(momenta, momentum)
        _add_scaled(momenta, gradients, rate)
        torch._foreach_sub_(weights, momenta, alpha=1 + momentum)


class AdaGrad(CaffeSolver):
    """h = h + g^2;  w = w - r g / (sqrt(h) + delta)."""

    least_delta = 1e-3
    decays = ()

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        (squares,) = history
        torch._foreach_addcmul_(squares, gradients, gradients)
        _subtract_quotients(weights, gradients, _roots(squares, self._delta), rate)


class RMSProp(CaffeSolver):
    """h = rms_decay h + (1 - rms_decay) g^2;  w = w - r g / (sqrt(h) + delta)."""

    least_delta = 1e-4
    decays = ("rms_decay",)

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        (squares,) = history
        _average(squares, self._parameters.rms_decay, gradients)
        _subtract_quotients(weights, gradients, _roots(squares, self._delta), rate)


class AdaDelta(CaffeSolver):
    """h = momentum h + (1 - momentum) g^2;  u = g sqrt((k + delta) / (h + delta));
    k = momentum k + (1 - momentum) u^2;  w = w - r u.
    """

    moments = 2
    least_delta = 1e-3

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        (squares, updates), momentum = history, self._parameters.momentum
        _average(squares, momentum, gradients)
        ratios = torch._foreach_add(updates, self._delta)
        torch._foreach_div_(ratios, torch._foreach_add(squares, self._delta))
        torch._foreach_sqrt_(ratios)
        torch._foreach_mul_(gradients, ratios)
        _average(updates, momentum, gradients)
        _add_scaled(weights, gradients, -rate)


class Adam(CaffeSolver):
    """m = momentum m + (1 - momentum) g;  v = momentum2 v + (1 - momentum2) g^2;
    w = w - r c m / (sqrt(v) + delta), where after t updates c = sqrt(1 - momentum2^t) / (1 - momentum^t).
    """

    moments = 2
    least_delta = 1e-4
    decays = ("momentum", "momentum2")
    _correction: Rate | None = None

    def prepare(self, iteration: int, rate: float) -> None:
        super().prepare(iteration, rate)
        beta1, beta2 = self._parameters.momentum, self._parameters.momentum2
        correction = sqrt(1 - beta2 ** (iteration + 1)) / (1 - beta1 ** (iteration + 1))
        self._correction = self._variable(correction, self._correction)

    def _update(self, weights: Tensors, gradients: Tensors, history: list[Tensors], rate: Rate) -> None:
        first, second = history
        beta1 = self._parameters.momentum
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        _average(second, self._parameters.momentum2, gradients)
        assert self._correction is not None
        _subtract_quotients(weights, first, _roots(second, self._delta), rate * self._correction)


SOLVERS: dict[str, type[CaffeSolver]] = {
    solver.__name__: solver for solver in (SGD, Nesterov, AdaGrad, RMSProp, AdaDelta, Adam)
}
"""By Caffe's names."""


def solver_class(parameters: Any, where: str) -> type[CaffeSolver]:
    """The solver that a SolverParameter names; ``where`` is its file, for messages.

    Raises:
        UserError: Caffe has no such solver.
    """
    name = str(parameters.type)
    if name not in SOLVERS:
        raise UserError(f"{where}: solver type {name!r} is not supported; supported: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _groups(learnables: Sequence[Learnable], weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups: what learns and decays at the same pace."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for learnable in learnables:
        lr_mult, decay_mult = learnable.lr_mult, learnable.decay_mult
        group = groups.setdefault(
            (lr_mult, decay_mult),
            {
                "params": [],
                "lr_mult": lr_mult,
                "decay_mult": decay_mult,
                "weight_decay": weight_decay * decay_mult,
            },
        )
        group["params"].append((learnable.name, learnable.tensor))
    return list(groups.values()) or [{"params": [], "lr_mult": 1.0, "decay_mult": 1.0, "weight_decay": 0.0}]


def _add_scaled(to: Tensors, values: Tensors, factor: Rate) -> None:
    """to += factor values. A factor on the device overwrites ``values``."""
    if isinstance(factor, Tensor):
        torch._foreach_mul_(values, factor)
        torch._foreach_add_(to, values)
    else:
        torch._foreach_add_(to, values, alpha=factor)


def _average(squares: Tensors, decay: float, values: Tensors) -> None:
    """squares = decay squares + (1 - decay) values^2."""
    torch._foreach_mul_(squares, decay)
    torch._foreach_addcmul_(squares, values, values, value=1 - decay)


def _roots(squares: Tensors, delta: float) -> Tensors:
    """sqrt(squares) + delta."""
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, delta)
    return list(roots)


def _subtract_quotients(weights: Tensors, values: Tensors, divisors: Tensors, rate: Rate) -> None:
    """weights -= rate values / divisors."""
    if isinstance(rate, Tensor):
        quotients = torch._foreach_div(values, divisors)
        torch._foreach_mul_(quotients, rate)
        torch._foreach_sub_(weights, quotients)
    else:
        torch._foreach_addcdiv_(weights, values, divisors, value=-rate)
