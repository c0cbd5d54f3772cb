"""What was done in a session, and what was kept, as a table for a page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from faults.cases import ENGINES, NO_ENGINE, Case, Result

COLUMNS = {**ENGINES, NO_ENGINE: "other commands"}

ORDER = ("killed:", "storm", "disk", "second", "resume", "refused", "nothing", "create", "hostile", "")
"""Rows begin with what was done to processes; damage to files follows."""

LAST = ("LMDBs at their end", "runs at their end", "frozen zeros followed")


def rows(results: Iterable[tuple[Case, Result]]) -> list[list[str]]:
    """A row for each thing done, with its count for each engine; the promises kept, and broken, are last."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    broken: Counter[str] = Counter()
    for case, result in results:
        for name, count in result.done.items():
            counts[name][case.engine] += count
        broken[case.engine] += result.broken is not None
    table = [[name, *_cells(counts[name])] for name in sorted(counts, key=_place) if counts[name].total()]
    return [*table, ["promises broken", *(f"{broken[engine]}" for engine in COLUMNS)]]


def _cells(counts: Counter[str]) -> list[str]:
    return [f"{counts[engine]:,}" if counts[engine] else "" for engine in COLUMNS]


def _place(name: str) -> tuple[bool, int, str]:
    """Kills by moment, then the rest; the last ones last."""
    who, _, moment = name.partition(" killed: ")
    start = next(place for place, word in enumerate(ORDER) if word in (f"{who} killed:" if moment else name))
    return name.startswith(LAST), start, f"{moment} {who}" if moment else name


def markdown(title: str, body: list[list[str]]) -> str:
    """The table ready to paste."""
    head = ["what was done", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * len(COLUMNS)]
    return "\n".join([title, "", *lines, *(f"| {' | '.join(row)} |" for row in body)])
