"""A run's progress in words: how far it is, its figures, its speed, the time left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caffe_jacinto.common.text import duration
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.recipes.model import Recipe

SILENT_SECONDS = 30.0
"""A log without a new line for this long is worth mentioning."""

SHOWN = 8
"""Outputs of a test that are shown in a line."""


@dataclass(frozen=True)
class Place:
    """A stage's place in its recipe."""

    recipe: Recipe
    name: str

    @property
    def number(self) -> int:
        return list(self.recipe.stages).index(self.name) + 1

    @property
    def max_iter(self) -> int:
        return self.recipe.stages[self.name].solver.max_iter

    def title(self) -> str:
        return f"stage {self.number}/{len(self.recipe.stages)} {self.name}"

    def iterations_after(self) -> int:
        """Of the stages that follow."""
        following = list(self.recipe.stages.values())[self.number :]
        return sum(stage.solver.max_iter for stage in following)


@dataclass(frozen=True)
class Progress:
    """The progress of something that runs; in each list, the most important comes first."""

    place: list[str]
    """Which stage, which iteration."""

    figures: list[str] = field(default_factory=list)
    """What it is doing, loss, learning rate, sparsity, speed."""

    left: list[str] = field(default_factory=list)
    """The time left."""

    def fields(self) -> list[str]:
        return [*self.place, *self.figures, *self.left]


def progress(log: StageLog, place: Place, *, running: bool = True, silent: float = 0.0) -> Progress:
    """How far a stage is; without a speed unless it is ``running``.

    ``silent`` is how many seconds ago the last line of its log came.
    """
    where = [place.title(), f"iteration {log.iteration or 0:,}/{place.max_iter:,}"]
    # First among the figures, not in `where`: the bar's length depends on that and should not jump.
    figures = _doing(log, place) if running else []
    if log.loss is not None:
        figures.append(f"loss {log.loss:.4g}")
    if log.learning_rate is not None:
        figures.append(f"lr {log.learning_rate:.3g}")
    figures += sparsity_field(log)
    pace = log.seconds_per_iteration()
    if not running:
        return Progress(where, figures)
    if pace:
        figures.append(f"{place.recipe.training.batch_size / pace:.3g} images/s")
    return Progress(where, figures + last_heard(silent), time_left(log, place, silent))


def _doing(log: StageLog, place: Place) -> list[str]:
    """What keeps the iterations from advancing, if anything does."""
    if log.in_test:
        return ["testing"]
    return ["finishing"] if (log.iteration or 0) >= place.max_iter else []


def sparsity_field(log: StageLog) -> list[str]:
    """The sparsity by the report's rule, or where the network is not known, the log's own figure."""
    if log.sparsity is not None:
        return [f"sparsity {log.sparsity:.3f}"]
    return [] if log.sparsity_logged is None else [f"sparsity {log.sparsity_logged:.3f} (as logged)"]


def last_heard(silent: float) -> list[str]:
    """How long the log has not grown: slow iterations, a long test, or a Caffe that hangs."""
    return [f"last line {duration(silent)} ago"] if silent >= SILENT_SECONDS else []


def time_left(log: StageLog, place: Place, silent: float = 0.0) -> list[str]:
    """Of the stage and, where other stages follow, of the run, at this stage's pace. Empty: not known yet."""
    pace = log.seconds_per_iteration()
    if pace is None:
        return []
    here = max(place.max_iter - (log.iteration or 0), 0) * pace
    after = place.iterations_after() * pace
    here_now = max(here - silent, 0.0)
    left = [f"{duration(here_now)} left"] if here else []
    return [*left, f"{duration(here_now + after)} for the run"] if after else left


def outputs_line(log: StageLog, outputs: Mapping[str, float]) -> str:
    """A test's results, accuracies first: ``top-1 0.61, top-5 0.83, loss 1.67``."""
    names = log.accuracy_names()
    first = [(names[name], outputs[name]) for name in names if name in outputs]
    found = first + sorted((name, value) for name, value in outputs.items() if name not in names)
    more = [f"and {len(found) - SHOWN} more"] if found[SHOWN:] else []
    return ", ".join([f"{name} {value:.4g}" for name, value in found[:SHOWN]] + more)


def stage_summary(log: StageLog, place: Place, seconds: float) -> str:
    """A finished stage in one line."""
    parts = [f"{place.title()}: finished, {place.max_iter:,} iterations in {duration(seconds)}"]
    test = log.tests.get(place.max_iter)
    if test is not None and test.top1 is not None:
        # Such a test can differ much from the one before, which had running statistics.
        how = " with recalibrated batch-norm statistics" if test.recalibrated else ""
        parts.append(f"top-1 {test.top1:.4g}{how}")
    return ", ".join(parts + sparsity_field(log))
