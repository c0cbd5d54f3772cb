"""Runs that differ in their seed: the mean of each stage's figures, and how far the runs are apart.

What belongs together is in the names: ``thin-seed1`` and ``thin-seed2`` are two runs of ``thin``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from caffe_jacinto.common.text import printable
from caffe_jacinto.logs import tables
from caffe_jacinto.logs.compare import settings_that_differ
from caffe_jacinto.logs.discover import Run, Stage
from caffe_jacinto.logs.tables import UNKNOWN, Row, Table

_SEED = re.compile(r"[-_. ]?seed[-_. ]?\d+", re.IGNORECASE)
_MAY_DIFFER = ("random_seed", "snapshot_prefix", "net", "train_net", "test_net")
"""Settings of a solver that are not the same in runs of different seeds: their folders differ."""


@dataclass(frozen=True)
class Spread:
    """A figure over several runs."""

    mean: float
    deviation: float | None
    """The standard deviation of the runs (of a sample: divided by n - 1); None for a single one."""


@dataclass(frozen=True)
class Configuration:
    """A stage of the runs of one name."""

    name: str
    stage: str
    bits: str
    stages: list[Stage]
    """Of each run."""

    def spread(self, figure: str) -> Spread | None:
        """Of a figure of the stages; None where a run lacks it, or it is not a finite number."""
        values = [getattr(stage.figures, figure) for stage in self.stages]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) < len(values):
            return None
        return Spread(mean(known), stdev(known) if len(known) > 1 else None)


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The stages that have finished and have an accuracy, in the order of the runs."""
    found: dict[tuple[str, str, str], Configuration] = {}
    for run in runs:
        for stage in run.stages:
            if stage.figures.finished and stage.figures.top1 is not None:
                key = (_name(run), stage.name, tables.bits_of(stage))
                found.setdefault(key, Configuration(*key, [])).stages.append(stage)
    return list(found.values())


def spread_table(runs: Sequence[Run]) -> Table:
    """The mean and the standard deviation of each stage of runs that differ in their seed."""
    found = configurations(runs)
    columns = [one for one in _FIGURES if any(row.spread(one.name) is not None for row in found)]
    titles = [column.title for column in columns]
    table = Table("Mean and standard deviation over seeds", ["Configuration", "Runs", *titles])
    for one in found:
        name = f"{printable(one.name)}, {printable(one.stage)}" + (f" ({one.bits})" if one.bits else "")
        cells = [column.show(one.spread(column.name)) for column in columns]
        table.rows.append(Row([name, str(len(one.stages)), *cells]))
    table.notes.extend(_notes(runs))
    return table


def as_json(runs: Sequence[Run]) -> str:
    """The same for scripts: ``mean`` and ``deviation`` of each figure."""
    return json.dumps({"configurations": [_record(one) for one in configurations(runs)]}, indent=2)


def as_csv(runs: Sequence[Run]) -> str:
    """The same with plain numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{figure.name}{part}" for figure in _FIGURES for part in ("", "_deviation")]
    writer.writerow(["configuration", "stage", "bits", "runs", *parts])
    for one in configurations(runs):
        spreads = [one.spread(figure.name) for figure in _FIGURES]
        numbers = [
            number
            for spread in spreads
            for number in ((None, None) if spread is None else (spread.mean, spread.deviation))
        ]
        names = [tables.as_cell(name) for name in (one.name, one.stage, one.bits)]
        writer.writerow([*names, len(one.stages), *numbers])
    return text.getvalue()


def _record(one: Configuration) -> dict[str, Any]:
    spreads = {figure.name: one.spread(figure.name) for figure in _FIGURES}
    figures = {
        figure: None if spread is None else {"mean": spread.mean, "deviation": spread.deviation}
        for figure, spread in spreads.items()
    }
    names = {"configuration": one.name, "stage": one.stage, "bits": one.bits}
    return {
        **{key: tables.as_unicode(name) for key, name in names.items()},
        "runs": len(one.stages),
        **figures,
    }


def _name(run: Run) -> str:
    own = run.name.rsplit("/", 1)[-1]  # without the folders that tell it from others of its name
    return _SEED.sub("", own) or own


def _notes(runs: Sequence[Run]) -> list[str]:
    """Stages that are left out, and what is not the same in runs of one name, other than the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_name(run), []).append(run)
    notes = [
        f"{printable(run.name)}, {printable(stage.name)}: left out, it has not finished"
        for run in runs
        for stage in run.stages
        if not stage.figures.finished and stage.figures.top1 is not None
    ]
    for name, group in groups.items():
        seeds = [tuple(_SEED.findall(run.name)) for run in group]
        again = [
            printable(run.name)
            for run, seed in zip(group, seeds, strict=True)
            if seed and seeds.count(seed) > 1
        ]
        if again:
            notes.append(
                f"{printable(name)}: runs with the same seed are counted together: {', '.join(again)}; "
                "name a folder with one of each to leave the others out"
            )
        differing = [
            f"{setting} of {stages.title}" if stages.title else setting
            for stages in settings_that_differ(group)
            for setting, _ in stages.rows
            if setting not in _MAY_DIFFER
        ]
        if differing:
            notes.append(f"{printable(name)}: its runs differ in more than the seed: {', '.join(differing)}")
    return notes


def _percent(decimals: int) -> Callable[[Spread | None], str]:
    def show(spread: Spread | None) -> str:
        if spread is None:
            return UNKNOWN
        apart = "" if spread.deviation is None else f" ± {100 * spread.deviation:.{decimals}f}"
        return f"{100 * spread.mean:.{decimals}f}{apart} %"

    return show


def _number(spread: Spread | None) -> str:
    if spread is None:
        return UNKNOWN
    apart = "" if spread.deviation is None else f" ± {spread.deviation:.2g}"
    return f"{spread.mean:.4g}{apart}"


def _complexity(spread: Spread | None) -> str:
    return tables.complexity(None if spread is None else spread.mean)


class _Figure(NamedTuple):
    """A column: its heading, the figure of a stage, and how it is shown."""

    title: str
    name: str
    show: Callable[[Spread | None], str]


_FIGURES = (
    _Figure("Top-1", "top1", _percent(2)),
    _Figure("Top-5", "top5", _percent(2)),
    _Figure("Loss", "loss", _number),
    _Figure("Sparsity", "sparsity", _percent(1)),
    _Figure("GigaMACs", "gigamacs", _complexity),
    _Figure(tables.LEFT_HEADER, "gigamacs_left", _complexity),
)
