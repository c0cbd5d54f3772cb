"""Runs beside each other: figures with their differences, sorted by any of them; settings that differ."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from caffe_jacinto.common.text import duration, printable
from caffe_jacinto.logs import tables
from caffe_jacinto.logs.discover import Run, Stage
from caffe_jacinto.logs.solver_settings import Settings, settings_of, side_by_side
from caffe_jacinto.logs.tables import UNKNOWN, Row, Table

NAME = "name"


@dataclass(frozen=True)
class Figure:
    """A figure of a run."""

    key: str
    title: str
    of: Callable[[Run], float | None]
    show: Callable[[float | None], str]
    difference: Callable[[float], str]
    more_is_better: bool


def _result(name: str) -> Callable[[Run], float | None]:
    """Of the stage that counts as the run's result; see `tables.results`."""

    def of(run: Run) -> float | None:
        found = tables.results([run])
        stage = found[-1][1] if found else run.stages[-1]
        value: float | None = getattr(stage.figures, name)
        return value

    return of


def _last(name: str) -> Callable[[Run], float | None]:
    """Of the last stage that has it."""

    def of(run: Run) -> float | None:
        values = [getattr(stage.figures, name) for stage in run.stages if not stage.figures.timed]
        return next((value for value in reversed(values) if value is not None), None)

    return of


def _sum(name: str) -> Callable[[Run], float | None]:
    """Of all stages that train; of the time, of all stages."""

    def of(run: Run) -> float | None:
        stages = [stage for stage in run.stages if name == "seconds" or stage.figures.trained]
        values = [value for stage in stages if (value := getattr(stage.figures, name)) is not None]
        return sum(values) if values else None

    return of


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _time(value: float | None) -> str:
    return UNKNOWN if value is None else duration(value, exact=True)


def _signed_time(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{duration(abs(value), exact=True)}"


def _percent(decimals: int) -> Callable[[float | None], str]:
    return lambda value: tables.percent(value, decimals)


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _signed(value: float) -> str:
    return f"{value:+.4g}"


FIGURES = (
    Figure("iterations", "Iterations", _sum("iterations"), _count, lambda value: f"{value:+,.0f}", True),
    Figure("top1", "Top-1", _result("top1"), _percent(2), _points, True),
    Figure("top5", "Top-5", _result("top5"), _percent(2), _points, True),
    Figure("mean_ap", "mAP", _result("mean_ap"), _percent(2), _points, True),
    Figure("loss", "Loss", _result("loss"), _number, _signed, False),
    Figure("train_loss", "Training loss", _last("train_loss"), _number, _signed, False),
    Figure("sparsity", "Sparsity", _last("sparsity"), _percent(1), _points, True),
    Figure("gigamacs", "GigaMACs", _last("gigamacs"), tables.complexity, _signed, False),
    Figure("images_per_second", "Images/s", _last("images_per_second"), tables.speed, _signed, True),
    Figure("seconds", "Time", _sum("seconds"), _time, _signed_time, False),
)
SORT_KEYS = (NAME, *(figure.key for figure in FIGURES))


def in_order(runs: Sequence[Run], key: str | None) -> list[Run]:
    """The runs, the best first by the figure ``key``, or by name; those without it are the last."""
    if key is None:
        return list(runs)
    if key == NAME:
        return sorted(runs, key=lambda run: run.name)
    figure = next(figure for figure in FIGURES if figure.key == key)

    def place(run: Run) -> tuple[bool, float]:
        value = figure.of(run)
        if value is None or value != value:
            return True, 0.0
        return False, -value if figure.more_is_better else value

    return sorted(runs, key=place)


# --- for people -----------------------------------------------------------------------------------------


def comparison(runs: Sequence[Run]) -> list[Table]:
    """The figures of the runs (of two, with the differences), and the settings that differ."""
    figures = _known(runs)
    return [_two(runs, figures) if len(runs) == 2 else _many(runs, figures), *_settings_tables(runs)]


def _known(runs: Sequence[Run]) -> list[Figure]:
    """The figures that any run has."""
    return [figure for figure in FIGURES if any(figure.of(run) is not None for run in runs)]


def _two(runs: Sequence[Run], figures: Sequence[Figure]) -> Table:
    first, second = runs
    table = Table("Comparison", ["", printable(first.name), printable(second.name), "Difference"])
    for figure in figures:
        before, after = figure.of(first), figure.of(second)
        known = before is not None and after is not None
        change = figure.difference(after - before) if after is not None and before is not None else UNKNOWN
        table.rows.append(
            Row([figure.title, figure.show(before), figure.show(after), change if known else UNKNOWN])
        )
    return table


def _many(runs: Sequence[Run], figures: Sequence[Figure]) -> Table:
    table = Table("Comparison", ["Run", *(figure.title for figure in figures)])
    for run in runs:
        table.rows.append(Row([printable(run.name), *(figure.show(figure.of(run)) for figure in figures)]))
    return table


def settings_that_differ(runs: Sequence[Run]) -> list[Settings]:
    """For each stage that several runs have, the settings in which they differ."""
    return [one for one in _settings_in_which(runs, Settings.differ) if one.rows]


def _settings_in_which(runs: Sequence[Run], wanted: Callable[[list[str]], bool]) -> list[Settings]:
    trained = [[stage for stage in run.stages if settings_of(stage) is not None] for run in runs]
    if all(len(stages) == 1 for stages in trained):
        columns = [(printable(run.name), stages[0]) for run, stages in zip(runs, trained, strict=True)]
        found = [side_by_side("", columns)]
    else:
        names = dict.fromkeys(stage.name for stages in trained for stage in stages)
        found = [_side_by_side(name, runs, trained) for name in names]
    return [
        Settings(one.title, one.columns, [row for row in one.rows if wanted(row[1])])
        for one in found
        if len(one.columns) > 1
    ]


def _side_by_side(name: str, runs: Sequence[Run], trained: Sequence[Sequence[Stage]]) -> Settings:
    columns = [
        (printable(run.name), stage)
        for run, stages in zip(runs, trained, strict=True)
        for stage in stages
        if stage.name == name
    ]
    return side_by_side(printable(name), columns)


def _settings_tables(runs: Sequence[Run]) -> list[Table]:
    found = []
    for one in settings_that_differ(runs):
        title = "Settings that differ" + (f": {one.title}" if one.title else "")
        rows = [Row([name, *cells]) for name, cells in one.rows]
        found.append(Table(title, ["Setting", *one.columns], rows))
    if not found and len(runs) > 1:
        several = _settings_in_which(runs, lambda cells: True)
        same = "the solver settings of stages with the same name are the same"
        none = "no two logs hold the solver settings of stages with the same name"
        note = same if several else none
        found.append(Table("Settings that differ", ["Setting"], [], [note]))
    return found


# --- for programs ---------------------------------------------------------------------------------------


def as_json(runs: Sequence[Run]) -> str:
    """The same as JSON: figures as in the report, differences to the first run, settings by stage."""
    records = [_record(run) for run in runs]
    for record in records[1:]:
        record["difference"] = {
            figure.key: _difference(records[0][figure.key], record[figure.key]) for figure in FIGURES
        }
    settings = [
        {
            "stage": one.title or None,
            "runs": one.columns,
            "settings": dict(one.rows),
        }
        for one in settings_that_differ(runs)
    ]
    return json.dumps({"runs": records, "settings": settings}, indent=2, allow_nan=False)


def _record(run: Run) -> dict[str, Any]:
    figures = {figure.key: tables.finite(figure.of(run)) for figure in FIGURES}
    return {NAME: tables.as_unicode(run.name), **figures}


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else float(f"{after - before:.10g}")


def as_csv(runs: Sequence[Run]) -> str:
    """The figures with plain numbers, a row for each run; after an empty line, the settings that differ."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SORT_KEYS)
    for run in runs:
        writer.writerow([tables.as_cell(run.name), *(figure.of(run) for figure in FIGURES)])
    for one in settings_that_differ(runs):
        writer.writerow([])
        writer.writerow(["stage", "setting", *map(tables.as_cell, one.columns)])
        for name, cells in one.rows:
            writer.writerow([tables.as_cell(cell) for cell in (one.title, name, *cells)])
    return text.getvalue()
