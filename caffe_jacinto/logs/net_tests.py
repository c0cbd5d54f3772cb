"""The tests of a network, as a log prints them: which is the last one that is there whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffe_jacinto.logs import events


@dataclass
class NetTests:
    """The outputs of one test net: the test being printed and the whole one before it."""

    current: dict[int, events.TestOutput] = field(default_factory=dict)
    ended: bool = False
    """Whether a later line of the solver shows that all outputs of ``current`` are there."""
    whole: dict[int, events.TestOutput] = field(default_factory=dict)
    expected: int | None = None

    def start(self, expected: int | None) -> None:
        if self.current:
            self.whole = self.last(None)
        self.current, self.ended, self.expected = {}, False, expected

    def last(self, net_outputs: int | None) -> dict[int, events.TestOutput]:
        """The last test whose outputs are all there."""
        # A blob can print several numbers, so that a test before tells more surely than the network.
        needed = self.expected or len(self.whole) or net_outputs or 1
        return self.current if self.current and (self.ended or len(self.current) >= needed) else self.whole


def by_name(outputs: dict[int, events.TestOutput]) -> dict[str, float]:
    """Values by name; further numbers of one blob as ``name[1]``, ``name[2]``."""
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for _, output in sorted(outputs.items()):
        times = seen.get(output.name, 0)
        found[f"{output.name}[{times}]" if times else output.name] = output.value
        seen[output.name] = times + 1
    return found
