"""Which snapshots of a stage stay: the newest ones, the best by top-1, and the last."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from caffe_jacinto.engines.snapshots import complete_snapshots
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.runs.start_point import weights_are_finite
from caffe_jacinto.runs.watch import StageView

SECONDS_BETWEEN = 5.0
"""The least time between two looks at a running stage's snapshots."""


class Keeper:
    """Keeps the rule while a stage runs."""

    def __init__(self, prefix: Path, dialect: Dialect, keep: int, max_iter: int, start: int) -> None:
        """``start`` is the iteration that the stage goes on from; 0: from its beginning."""
        self._prefix = prefix
        self._dialect = dialect
        self._keep = keep
        self._max_iter = max_iter
        self._start = start
        self._seen: tuple[int, int] | None = None
        self._looked = float("-inf")

    def clean_now_and_then(self, view: StageView) -> None:
        """`clean`, if the log has told of a snapshot or a test since, and not more often than every 5 s."""
        seen = (len(view.written), len(view.tests))
        if seen != self._seen and time.monotonic() - self._looked >= SECONDS_BETWEEN:
            self._looked = time.monotonic()
            # A snapshot is told of before it is whole: this look counts only once it has found it.
            if self.clean(view):
                self._seen = seen

    def clean(self, view: StageView) -> bool:
        """Delete what need not stay; False when a snapshot that the log tells of is not whole yet.

        Snapshots beyond the point that the stage has come to are of an earlier try, and are neither counted
        nor deleted: it will write them anew.
        """
        own = {
            snapshot.iteration
            for snapshot in complete_snapshots(self._prefix, self._dialect)
            if snapshot.iteration <= self._start or snapshot.iteration in view.written
            # Weights gone wrong between two displays must not push the last good ones out.
            if weights_are_finite(snapshot.caffemodel)
        }
        remove_others(self._prefix, own, kept_iterations(own, view.top1(), self._keep, self._max_iter))
        return max(view.written, default=0) in own | {0}


def kept_iterations(
    complete: Iterable[int], top1: Mapping[int, float], keep: int, max_iter: int
) -> frozenset[int]:
    """The iterations whose snapshots stay, of those whose snapshots are complete.

    ``top1`` holds the accuracy of the tests by iteration; of equally good snapshots the latest stays.
    """
    newest_first = sorted(complete, reverse=True)
    kept = set(newest_first[: max(keep, 1)])
    tested = [iteration for iteration in newest_first if iteration in top1]
    if tested:
        kept.add(max(tested, key=lambda iteration: (top1[iteration], iteration)))
    kept.update(iteration for iteration in newest_first if iteration == max_iter)
    return frozenset(kept)


def remove_others(prefix: Path, complete: Iterable[int], kept: frozenset[int]) -> list[int]:
    """Delete every snapshot of ``prefix`` that is older than the newest complete one and not kept.

    All files of an iteration go together. What is newer than the newest complete snapshot may still be being
    written, and stays. Returns the iterations that were removed.
    """
    newest = max(complete, default=0)
    removed = []
    for iteration, files in sorted(snapshot_files(prefix).items()):
        if iteration < newest and iteration not in kept:
            for file in files:
                file.unlink(missing_ok=True)
            removed.append(iteration)
    return removed


def snapshot_files(prefix: Path) -> dict[int, list[Path]]:
    """The files ``<prefix>_iter_N.<anything>`` by N."""
    pattern = re.compile(re.escape(prefix.name) + r"_iter_(\d+)\..+", re.DOTALL)
    found: dict[int, list[Path]] = {}
    for path in prefix.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), []).append(path)
    return found
