"""The solver settings of runs and stages, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caffe_jacinto.common.text import printable
from caffe_jacinto.logs.discover import Run, Stage
from caffe_jacinto.logs.tables import UNKNOWN
from caffe_jacinto.prototxt.tree import Message, Value


@dataclass(frozen=True)
class Settings:
    """Solver settings side by side: a column for each run or stage, a row for each setting."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]

    @staticmethod
    def differ(cells: list[str]) -> bool:
        return len(set(cells)) > 1


def solver_settings(runs: Sequence[Run]) -> list[Settings]:
    """Of one run, its stages side by side; of several, the runs, for each stage that they have."""
    if len(runs) == 1:
        stages = [stage for stage in runs[0].stages if settings_of(stage) is not None]
        columns = [(printable(stage.name), stage) for stage in stages]
        return [side_by_side("", columns)] if columns else []
    names = dict.fromkeys(s.name for run in runs for s in run.stages if settings_of(s) is not None)
    return [
        side_by_side(
            printable(name), [(printable(run.name), stage) for run, stage in _stages_called(runs, name)]
        )
        for name in names
    ]


def _stages_called(runs: Sequence[Run], name: str) -> Iterator[tuple[Run, Stage]]:
    for run in runs:
        for stage in run.stages:
            if stage.name == name and settings_of(stage) is not None:
                yield run, stage


def settings_of(stage: Stage) -> Message | None:
    """The settings of the stage's solver, if the log holds any."""
    found = stage.figures.settings
    return found if found is not None and found.fields else None


def side_by_side(title: str, columns: list[tuple[str, Stage]]) -> Settings:
    """The settings of stages, with the names of their columns."""
    solvers = [settings_of(stage) or Message() for _, stage in columns]
    names = dict.fromkeys(name for solver in solvers for name, _ in solver.fields)
    rows = [("Caffe", [printable(stage.figures.caffe_version or UNKNOWN) for _, stage in columns])]
    for name in names:
        cells = [", ".join(map(_setting, solver.all(name))) or UNKNOWN for solver in solvers]
        rows.append((printable(name), cells))
    return Settings(title, [column for column, _ in columns], rows)


def _setting(value: Value) -> str:
    if isinstance(value, Message):
        return "{ " + " ".join(f"{name}: {_setting(inner)}" for name, inner in value.fields) + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    return printable(str(value)) or '""'
