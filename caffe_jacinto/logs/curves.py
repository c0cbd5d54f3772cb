"""Curves of a stage in bounded memory, however long its log."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_POINTS = 3000


class Curve:
    """Points (iteration, value) in order; when there are too many, neighbours are averaged pairwise."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._width = 1
        self._waiting: list[tuple[float, float]] = []

    def add(self, iteration: float, value: float) -> None:
        """Add a point. A stage that was resumed goes back: points from there on are of the past."""
        while self._waiting and self._waiting[-1][0] >= iteration:
            self._waiting.pop()
        if not self._waiting:
            while self.points and self.points[-1][0] >= iteration:
                self.points.pop()
        self._waiting.append((iteration, value))
        if len(self._waiting) >= self._width:
            self.points.append(_mean(self._waiting))
            self._waiting.clear()
        if len(self.points) >= MOST_POINTS:
            self.points = [_mean(self.points[at : at + 2]) for at in range(0, len(self.points), 2)]
            self._width *= 2

    def all(self) -> list[tuple[float, float]]:
        """Every point, the last ones not yet averaged."""
        return [*self.points, *self._waiting]


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


@dataclass
class StageCurves:
    """What a plot shows of one stage."""

    loss: Curve = field(default_factory=Curve)
    learning_rate: Curve = field(default_factory=Curve)
    top1: Curve = field(default_factory=Curve)
    top5: Curve = field(default_factory=Curve)
    sparsity: Curve = field(default_factory=Curve)
