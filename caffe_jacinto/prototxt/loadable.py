"""Whether a Caffe can load a network or carry out a solver that has what forks or this project added."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.forks import FIELDS, INSTEAD, LR_POLICIES, TYPES
from caffe_jacinto.prototxt.schema import own_field_names
from caffe_jacinto.prototxt.tree import Message

_WHO = {Dialect.BVLC: "stock Caffe", Dialect.CAFFE_JACINTO: "caffe-jacinto"}

_SHOWN = 2
"""Layers that a line names."""


def not_loadable(net: Message, dialect: Dialect) -> list[str]:
    """What a Caffe of ``dialect`` cannot load of ``net``, a line for each type and field, with its layers.

    Only what `FIELDS` and `TYPES` know is found.
    """
    own = _own_fields(dialect)
    found: dict[tuple[str, str], list[str]] = {}
    for layer in net.messages("layer"):
        name, kind = layer.string("name"), layer.string("type")
        known = TYPES.get(kind)
        if known is not None and known.field not in own:
            what = f"type {kind}, which is of {known.fork}"
            found.setdefault((what, known.advice(own)), []).append(name)
            continue
        for path, field, value in _fork_fields(layer):
            if field not in own:
                advice = INSTEAD.get((field, value), "") if isinstance(value, bool) else ""
                found.setdefault((f"field {path}, which is of {FIELDS[field]}", advice), []).append(name)
    return [
        f"{_WHO[dialect]} has no {what} ({_layers(names)})" + (f"; {advice}" if advice else "")
        for (what, advice), names in found.items()
    ]


def not_carried_out(solver: Any, dialect: Dialect) -> list[str]:
    """What a Caffe of ``dialect`` does not know of a SolverParameter message, a line for each setting."""
    own, policy = _own_fields(dialect), solver.lr_policy
    names = [descriptor.name for descriptor, _ in solver.ListFields()]
    found = [
        f"field {name}, which is of {FIELDS[name]}; remove it"
        for name in names
        if name in FIELDS and name not in own
    ]
    if policy in LR_POLICIES:
        found.append(f"lr_policy {policy}, which is of {LR_POLICIES[policy]}; name another")
    return [f"{_WHO[dialect]} has no {what}" for what in found]


def _layers(names: list[str]) -> str:
    more = len(names) - _SHOWN
    listed = ", ".join(names[:_SHOWN])
    return f"layer{'s' * (len(names) > 1)} {listed}" + (f" and {more} more" if more > 0 else "")


def _fork_fields(layer: Message) -> Iterator[tuple[str, str, object]]:
    """Path, name and value of each field of ``layer``, or of its parameters, that is in `FIELDS`."""
    for field, value in layer.fields:
        if field in FIELDS:
            yield field, field, value
        elif isinstance(value, Message):
            for inner, part in value.fields:
                if inner in FIELDS:
                    yield f"{field}.{inner}", inner, part


@cache
def _own_fields(dialect: Dialect) -> frozenset[str]:
    return own_field_names(dialect)
