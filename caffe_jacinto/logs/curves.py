"""The curves of runs by name, their stages end to end, over iterations, epochs or time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Literal, get_args

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs.discover import Run, Stage

Axis = Literal["iteration", "epoch", "time"]
AXES: tuple[Axis, ...] = get_args(Axis)

TRAIN_LOSS = "train_loss"
LEARNING_RATE = "learning_rate"
SPARSITY = "sparsity"
SPEED = "images_per_second"
OF_TRAINING = (TRAIN_LOSS, LEARNING_RATE, SPARSITY, SPEED)
"""The curves that do not come from tests. Those of tests have the names of the outputs in the JSON."""

Points = list[tuple[float, float]]


class Clock:
    """The time of a stage's training at each of its iterations."""

    def __init__(self, stage: Stage) -> None:
        times = list(stage.history.seconds(stage.figures.year)) if stage.history is not None else []
        self.iterations = [iteration for iteration, _ in times]
        self._seconds = [seconds for _, seconds in times]

    def seconds(self, iteration: float) -> float:
        """Seconds from the first line of training to ``iteration``, between two lines in proportion."""
        after = bisect_right(self.iterations, iteration)
        if not self.iterations:
            return 0.0
        if after == 0 or after == len(self.iterations):
            return self._seconds[min(after, len(self._seconds) - 1)]
        first, last = self.iterations[after - 1 : after + 1]
        begin, end = self._seconds[after - 1 : after + 1]
        return begin + (end - begin) * (iteration - first) / (last - first)

    def speeds(self, images: int | None) -> Iterator[tuple[int, float]]:
        """Images per second from one line of training to the next, by the iteration of the later one."""
        pairs = list(zip(self.iterations, self._seconds, strict=True))
        for (first, begin), (last, end) in pairwise(pairs):
            if images and end > begin and last > first:
                yield last, images * (last - first) / (end - begin)


def names_of(stage: Stage) -> list[str]:
    """The curves that a stage has."""
    return list(dict.fromkeys([*training_curves(stage), *test_curves(stage)]))


def points_of(stage: Stage, name: str) -> Points:
    """Iterations and values of a curve; empty where the stage has none of this name.

    That of training where a test has an output of the same name.
    """
    return _of_training(stage, name) or _of_tests(stage, name)


def training_curves(stage: Stage) -> dict[str, Points]:
    """Iterations and values of those of `OF_TRAINING` that a stage has."""
    return {name: points for name in OF_TRAINING if (points := _of_training(stage, name))}


def test_curves(stage: Stage) -> dict[str, Points]:
    """Iterations and values of the outputs of a solver's tests."""
    names = stage.history.outputs if stage.history is not None else ()
    return {name: points for name in names if (points := _of_tests(stage, name))}


def _of_training(stage: Stage, name: str) -> Points:
    history = stage.history
    if history is None:
        return []
    if name == SPEED:
        return [(float(at), value) for at, value in Clock(stage).speeds(stage.figures.images_per_iteration)]
    own = {TRAIN_LOSS: history.loss, LEARNING_RATE: history.learning_rate, SPARSITY: history.sparsity}
    return own[name].points() if name in own else []


def _of_tests(stage: Stage, name: str) -> Points:
    buckets = stage.history.outputs.get(name) if stage.history is not None else None
    return buckets.points() if buckets is not None else []


@dataclass(frozen=True)
class Part:
    """A stage of a run at its place on the common axis."""

    stage: Stage
    start: float
    end: float
    axis: Axis

    def points(self, name: str) -> Points:
        """A curve's points on the common axis."""
        place = _place(self.stage, self.axis)
        return [(self.start + place(iteration), value) for iteration, value in points_of(self.stage, name)]


def parts_of(run: Run, axis: Axis) -> list[Part]:
    """The stages of a run that trained, end to end.

    Raises:
        UserError: the axis is in epochs, and a log does not say how many training images there are.
    """
    found: list[Part] = []
    start = 0.0
    for stage in run.stages:
        reached = [points[-1][0] for name in names_of(stage) if (points := points_of(stage, name))]
        if not reached or stage.figures.tested:
            continue
        last = max(stage.figures.iterations or 0, *reached)
        if axis == "epoch" and stage.iterations_per_epoch is None:
            raise UserError(
                f"--x epoch: {printable(str(stage.log))} does not say how many training images there are; "
                "take --x iteration or --x time"
            )
        end = start + _place(stage, axis)(last)
        found.append(Part(stage, start, end, axis))
        start = end
    return found


def tests_of(run: Run, trained: Sequence[Stage]) -> list[tuple[int, float]]:
    """What each ``caffe test`` found: how many of the stages ``trained`` come before it, and top-1.

    In float. Of several after the same stage, the last.
    """
    found: dict[int, float] = {}
    before = 0
    for stage in run.stages:
        figures = stage.figures
        before += any(stage is one for one in trained)
        if figures.tested and not figures.quantized and figures.top1 is not None and isfinite(figures.top1):
            found[before] = figures.top1
    return list(found.items())


def _place(stage: Stage, axis: Axis) -> Callable[[float], float]:
    """From a stage's iteration to its place on the axis, counted from the stage's start."""
    if axis == "time":
        return Clock(stage).seconds
    per_unit = 1.0 if axis == "iteration" else stage.iterations_per_epoch or 1.0
    return lambda iteration: iteration / per_unit


def known_names(runs: Sequence[Run]) -> list[str]:
    """The curves of all runs."""
    return list(dict.fromkeys(name for run in runs for stage in run.stages for name in names_of(stage)))


_FIGURES = {"top-1": "top1", "top-5": "top5", "mAP": "mean_ap"}
"""How the JSON calls the accuracies that most networks have."""


def known_accuracies(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What the accuracies of all runs are called whatever their outputs are, as ``top1``.

    For each such name, its keys in `StageFigures.accuracies`: of the first test network, and of further ones.
    """
    found: dict[str, list[str]] = {}
    for run in runs:
        for stage in run.stages:
            drawn = test_curves(stage)
            for label, output in stage.figures.accuracies.items():
                kind = label.partition(" (#")[0]
                if output in drawn:
                    labels = found.setdefault(_FIGURES.get(kind, kind.replace("-", "")), [kind])
                    labels += [] if label in labels else [label]
    return found
