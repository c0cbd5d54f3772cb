"""The words of a run's progress: where it is, how good, how fast, how long it will take."""

from __future__ import annotations

from dataclasses import dataclass

from caffe_jacinto.recipes.model import Recipe
from caffe_jacinto.runs.watch import StageView, top1_of

TEST_OUTPUTS = {
    "accuracy/top1": "top-1",
    "accuracy/top5": "top-5",
    "accuracy": "top-1",
    "top5": "top-5",
}
"""What the networks' accuracies are called on the screen."""


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


def progress_fields(view: StageView, place: Place, *, running: bool = True) -> list[str]:
    """What a progress line says, the most important first; of a stage that stands still, no speed."""
    fields = [place.title(), f"iteration {view.iteration:,}/{place.max_iter:,}{_doing(view, place, running)}"]
    if view.loss is not None:
        fields.append(f"loss {view.loss:.4g}")
    left = time_left(view, place) if running else []
    fields += left
    if view.sparsity is not None:
        fields.append(f"sparsity {view.sparsity:.3f}")
    if view.learning_rate is not None:
        fields.append(f"lr {view.learning_rate:.3g}")
    pace = view.seconds_per_iteration()
    if pace and running:
        fields.append(f"{place.recipe.training.batch_size / pace:.3g} images/s")
    return fields


def _doing(view: StageView, place: Place, running: bool) -> str:
    """What holds the iterations up, if anything does."""
    if running and view.in_test:
        return " (testing)"
    return " (finishing)" if running and view.iteration >= place.max_iter else ""


def time_left(view: StageView, place: Place) -> list[str]:
    """Of the stage, and of the run where other stages follow, at this stage's pace. Empty: not known yet."""
    pace = view.seconds_per_iteration()
    if pace is None:
        return []
    here = max(place.max_iter - view.iteration, 0)
    after = place.iterations_after()
    left = [f"{duration(here * pace)} left"] if here else []
    return [*left, f"{duration((here + after) * pace)} for the run"] if after else left


def test_line(outputs: dict[str, float]) -> str:
    """A test's results."""
    return "test: " + ", ".join(f"{_short(name)} {value:.4g}" for name, value in sorted(outputs.items()))


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
