"""The tests of a stage, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffe_jacinto.logs import events


@dataclass
class NetTests:
    """The outputs of one test net: of the test being printed, and of the complete one before it."""

    current: dict[int, events.TestOutput] = field(default_factory=dict)
    ended: bool = False
    """Whether a later line of the solver shows that ``current`` has all its outputs."""
    whole: dict[int, events.TestOutput] = field(default_factory=dict)
    expected: int | None = None

    def start(self, expected: int | None) -> None:
        if self.current:
            self.whole = self.last(None)
        self.current, self.ended, self.expected = {}, False, expected

    def last(self, net_outputs: int | None) -> dict[int, events.TestOutput]:
        """The last test that has all its outputs."""
        # A blob can print several numbers, so an earlier test is a better guide than the network.
        needed = self.expected or len(self.whole) or net_outputs or 1
        return self.current if self.current and (self.ended or len(self.current) >= needed) else self.whole


@dataclass(frozen=True)
class SolverTest:
    """A complete test of the solver."""

    outputs: dict[str, float]
    top1: float | None
    """By the printed test network's Accuracy layer."""
    recalibrated: bool
    """Whether the batch-norm statistics were recalibrated for it: running ones can lag far behind."""


def by_name(outputs: dict[int, events.TestOutput]) -> dict[str, float]:
    """Values by name; further numbers of one blob as ``name[1]``, ``name[2]``."""
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for _, output in sorted(outputs.items()):
        times = seen.get(output.name, 0)
        found[f"{output.name}[{times}]" if times else output.name] = output.value
        seen[output.name] = times + 1
    return found
