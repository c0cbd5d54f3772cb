"""What a training loss shows when it goes wrong: it is not a number, cannot get worse, or stays at chance.

SoftmaxWithLoss takes the logarithm of no probability below the smallest normal float32. A network that gives
every true class a probability of 0 therefore has a loss of 87.3365; one that gives all classes the same
probability, of ln(classes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from caffe_jacinto.netspec.graph import layers_in
from caffe_jacinto.prototxt.tree import Message

Kind = Literal["not a number", "stuck", "high", "chance"]

USELESS: tuple[Kind, ...] = ("not a number", "stuck")
"""From these a training does not recover."""

LARGEST = 87.3365
"""-ln of the smallest normal float32, as logs print it."""

HIGH = 76.0
"""Above this, seven of eight true classes have a probability of 0."""

STUCK_DISPLAYS = 3
"""So many displays in a row at the largest loss are not a coincidence."""

HIGH_DISPLAYS = 10
"""A bad start may be this high for a few displays, and recover."""

CHANCE_ITERATIONS = 3000
"""A large network may need thousands of iterations before its loss begins to fall."""

CHANCE_SPREAD = 0.01
"""How far from ln(classes) the loss of a network that guesses may be, as a fraction."""


@dataclass(frozen=True)
class SoftmaxLosses:
    """What the softmax losses of a network make of its loss; the network has no others."""

    weight: float
    """The sum of their weights."""

    classes: int | None
    """None where the network does not determine them."""


def softmax_losses(net: Message, classes: int | None) -> SoftmaxLosses | None:
    """The softmax losses of a network of ``classes``; None where it has none, or others, too."""
    weight = 0.0
    for layer in layers_in(net):
        kind = layer.string("type")
        weights = layer.all("loss_weight") or [1.0] * kind.endswith("Loss")
        own = sum(value for value in weights if isinstance(value, (int, float)))
        if kind == "SoftmaxWithLoss":
            weight += own
        elif own:
            return None
    return SoftmaxLosses(weight, classes) if weight else None


@dataclass
class _Streak:
    """Displays in a row of one kind."""

    first: int
    displays: int = 0


@dataclass
class LossCheck:
    """Follows the losses of a training, and names what goes wrong."""

    found: dict[Kind, str] = field(default_factory=dict)
    """What has gone wrong so far in words, the first time of each kind."""

    sound: int | None = None
    """The last iteration that this process displayed with a loss that was not wrong."""

    _streaks: dict[Kind, _Streak] = field(default_factory=dict)
    _last: float = 0.0
    _losses: SoftmaxLosses | None = None

    def take(self, iteration: int, loss: float, losses: SoftmaxLosses | None) -> None:
        """Take the loss displayed at ``iteration``; ``losses`` are those of the network, where known."""
        kinds = _kinds(loss, losses)
        self._last, self._losses = loss, losses
        if not kinds and not self._streaks:  # nearly always
            self.sound = iteration
            return
        for kind in self._streaks.keys() - kinds:
            del self._streaks[kind]
        for kind in kinds:
            streak = self._streaks.setdefault(kind, _Streak(iteration))
            streak.first = min(streak.first, iteration)
            streak.displays += 1
            if kind not in self.found and self._is_certain(kind, iteration):
                self.found[kind] = self._words(kind, iteration)
        if kinds <= {"chance"}:
            self.sound = iteration

    def restart(self) -> None:
        """Another process goes on, perhaps from an earlier iteration, with other weights."""
        self._streaks.clear()
        self.sound = None
        for kind in USELESS:
            self.found.pop(kind, None)

    def at_end(self, iteration: int) -> str | None:
        """What is wrong with the last loss of a log, in words; None if nothing is."""
        for kind, streak in self._streaks.items():
            # A summary sees few of the displays: the first and the last between two tests.
            seen = kind == "stuck" or (
                kind == "high" and streak.displays > 1 and "stuck" not in self._streaks
            )
            if seen or self._is_certain(kind, iteration):
                return self._words(kind, iteration)
        return None

    def _is_certain(self, kind: Kind, iteration: int) -> bool:
        streak = self._streaks[kind]
        if kind == "stuck":
            return streak.displays >= STUCK_DISPLAYS
        if kind == "high":
            return streak.displays >= HIGH_DISPLAYS and "stuck" not in self._streaks
        return kind == "not a number" or iteration - streak.first >= CHANCE_ITERATIONS

    def _words(self, kind: Kind, iteration: int) -> str:
        first = self._streaks[kind].first
        if kind == "not a number":
            return f"the loss is not a number ({self._last}) at iteration {first}"
        if kind == "stuck":
            times = self._last / LARGEST
            multiple = "" if abs(times - 1) < 1e-4 else f" ({LARGEST} times its loss_weight, {times:.4g})"
            return (
                f"the loss is stuck at {self._last:g}{multiple} at iteration {iteration}: the network gives "
                "the true class of every image a probability of 0"
            )
        if kind == "high":
            weight = self._losses.weight if self._losses else 1.0
            return (
                f"the loss has been between {HIGH * weight:g} and {LARGEST * weight:g} since iteration "
                f"{first}: the network gives the true class of nearly every image a probability of 0; the "
                "learning rate is probably too high"
            )
        classes = self._losses.classes if self._losses else None
        return (
            f"the loss has stayed at {self._last:.4g}, that of guessing among {classes} classes "
            f"(ln {classes}), since iteration {first}: the network does not learn; the learning rate may be "
            "far too high or too low, or the labels may not belong to the images"
        )


def _kinds(loss: float, losses: SoftmaxLosses | None) -> set[Kind]:
    """What a loss looks like. Without the network, a whole multiple of the largest loss is one, too."""
    if not math.isfinite(loss):
        return {"not a number"}
    kinds: set[Kind] = set()
    weight = losses.weight if losses else float(max(round(loss / LARGEST), 1))
    if abs(loss - LARGEST * weight) <= 2e-5 * LARGEST * weight:
        kinds.add("stuck")
    if losses is None:
        return kinds
    if HIGH * weight <= loss <= LARGEST * weight * (1 + 2e-5):
        kinds.add("high")
    if losses.classes and losses.classes > 1:
        chance = math.log(losses.classes) * weight
        if abs(loss - chance) <= CHANCE_SPREAD * chance:
            kinds.add("chance")
    return kinds
