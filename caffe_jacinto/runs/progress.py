"""The words of a run's progress: where it is, how good, how fast, how long it will take."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffe_jacinto.recipes.model import Recipe
from caffe_jacinto.runs.watch import StageView, top1_of

TEST_OUTPUTS = {
    "accuracy/top1": "top-1",
    "accuracy/top5": "top-5",
    "accuracy": "top-1",
    "top5": "top-5",
}
"""What the networks' accuracies are called on the screen."""

SILENT_SECONDS = 30.0
"""A log that has had no line for so long is worth a word."""


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
    """What is said of something that runs, of each kind the most important first."""

    place: list[str]
    """Which stage, which iteration."""

    figures: list[str] = field(default_factory=list)
    """What it does beside iterations, loss, learning rate, sparsity, speed."""

    left: list[str] = field(default_factory=list)
    """The time left."""

    def fields(self) -> list[str]:
        return [*self.place, *self.figures, *self.left]


def progress(view: StageView, place: Place, *, running: bool = True, silent: float = 0.0) -> Progress:
    """How far a stage is; of one that stands still, no speed.

    ``silent`` is how many seconds ago its log's last line came.
    """
    where = [place.title(), f"iteration {view.iteration:,}/{place.max_iter:,}"]
    # Among the figures: the first fields decide how long the bar is, which should not come and go.
    figures = _doing(view, place) if running else []
    if view.loss is not None:
        figures.append(f"loss {view.loss:.4g}")
    if view.learning_rate is not None:
        figures.append(f"lr {view.learning_rate:.3g}")
    if view.sparsity is not None:
        figures.append(f"sparsity {view.sparsity:.3f}")
    pace = view.seconds_per_iteration()
    if not running:
        return Progress(where, figures)
    if pace:
        figures.append(f"{place.recipe.training.batch_size / pace:.3g} images/s")
    return Progress(where, figures + last_heard(silent), time_left(view, place, silent))


def _doing(view: StageView, place: Place) -> list[str]:
    """What holds the iterations up, if anything does."""
    if view.in_test:
        return ["testing"]
    return ["finishing"] if view.iteration >= place.max_iter else []


def last_heard(silent: float) -> list[str]:
    """That the log has not grown for a while: slow iterations, a long test, or a Caffe that hangs."""
    return [f"last line {duration(silent)} ago"] if silent >= SILENT_SECONDS else []


def time_left(view: StageView, place: Place, silent: float = 0.0) -> list[str]:
    """Of the stage, and of the run where other stages follow, at this stage's pace. Empty: not known yet."""
    pace = view.seconds_per_iteration()
    if pace is None:
        return []
    here = max(place.max_iter - view.iteration, 0) * pace
    after = place.iterations_after() * pace
    here_now = max(here - silent, 0.0)
    left = [f"{duration(here_now)} left"] if here else []
    return [*left, f"{duration(here_now + after)} for the run"] if after else left


def test_line(outputs: dict[str, float]) -> str:
    """A test's results."""
    return f"test: {outputs_line(outputs)}"


def outputs_line(outputs: dict[str, float]) -> str:
    return ", ".join(f"{_short(name)} {value:.4g}" for name, value in sorted(outputs.items()))


def stage_summary(view: StageView, place: Place, seconds: float, *, reestimated: bool) -> str:
    """A finished stage in one line.

    ``reestimated``: its last test was of the weights with batch-norm statistics estimated anew, and can
    differ much from the test before.
    """
    parts = [f"{place.title()}: finished, {place.max_iter:,} iterations in {duration(seconds)}"]
    outputs = view.tests.get(place.max_iter, {})
    accuracy = top1_of(outputs)
    if accuracy is not None:
        of_what = " with re-estimated batch-norm statistics" if reestimated else ""
        parts.append(f"top-1 {accuracy:.4g}{of_what}")
    if view.sparsity is not None:
        parts.append(f"sparsity {view.sparsity:.3f}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _short(name: str) -> str:
    return TEST_OUTPUTS.get(name, name)
