"""Caffe 1.0's learning rate policies, for display: pycaffe need not tell the rate."""

from __future__ import annotations

from math import exp
from typing import Any


def learning_rate(solver: Any, iteration: int) -> float:
    """The rate of ``iteration``'s update; ``solver`` is a SolverParameter message.

    Formulas: SolverParameter.lr_policy in Caffe's schema. NaN for a policy that Caffe 1.0 does not have.
    """
    base, gamma = solver.base_lr, solver.gamma
    policy = solver.lr_policy
    if policy == "fixed":
        return float(base)
    if policy == "step":
        return float(base * gamma ** (iteration // solver.stepsize))
    if policy == "exp":
        return float(base * gamma**iteration)
    if policy == "inv":
        return float(base * (1 + gamma * iteration) ** -solver.power)
    if policy == "multistep":
        return float(base * gamma ** sum(iteration >= value for value in solver.stepvalue))
    if policy == "poly":
        return float(base * (1 - iteration / solver.max_iter) ** solver.power)
    if policy == "sigmoid":
        exponent = gamma * (iteration - solver.stepsize)
        small = exp(-abs(exponent))  # the other sign's power may be too large for a float
        return float(base * (1 if exponent > 0 else small) / (1 + small))
    return float("nan")
