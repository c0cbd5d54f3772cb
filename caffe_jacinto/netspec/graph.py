"""Which layers of a prototxt are in the network of a phase: Caffe's NetStateRule."""

from __future__ import annotations

from typing import Any


def is_in(layer: Any, phase: int, state: Any) -> bool:
    """Whether ``layer`` is in the net of ``phase`` with the level and stages of the NetState ``state``.

    It is where one of its ``include`` rules is met, or, without any, where none of ``exclude`` is.
    """
    if layer.include:
        return any(_met(rule, phase, state) for rule in layer.include)
    return not any(_met(rule, phase, state) for rule in layer.exclude)


def _met(rule: Any, phase: int, state: Any) -> bool:
    stages = set(state.stage)
    return (
        (not rule.HasField("phase") or rule.phase == phase)
        and (not rule.HasField("min_level") or state.level >= rule.min_level)
        and (not rule.HasField("max_level") or state.level <= rule.max_level)
        and stages.issuperset(rule.stage)
        and stages.isdisjoint(rule.not_stage)
    )
