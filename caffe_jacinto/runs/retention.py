"""Which snapshots of a stage are kept: the newest, the best by top-1, and the last."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from caffe_jacinto.engines.snapshots import complete_snapshots, weights_are_finite
from caffe_jacinto.logs.solver_tests import SolverTest
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.prototxt.dialects import Dialect

SECONDS_BETWEEN = 1.0
"""The least time between two looks at a running stage's snapshots."""

BREAK = 20.0
"""The least time from one look to the next, as a multiple of the time that it took."""


class Keeper:
    """Deletes the other snapshots while a stage runs."""

    def __init__(
        self,
        prefix: Path,
        dialect: Dialect,
        keep: int,
        max_iter: int,
        start: int,
        *,
        masks: bool = False,
        averaged_before: int = 0,
    ) -> None:
        """``start`` is the iteration that the stage resumes at; 0: its beginning. The rest: as `survey`."""
        self._prefix = prefix
        self._dialect = dialect
        self._keep = keep
        self._max_iter = max_iter
        self._masks = masks
        self._averaged_before = averaged_before
        self._start = start
        self.spoiled: int | None = None
        """The first iteration whose snapshot was deleted since its weights were not numbers."""
        self._seen: tuple[int, int] | None = None
        self._next_look = float("-inf")

    def clean_now_and_then(self, log: StageLog) -> None:
        """`clean`, if the log has named a snapshot or a test since; it takes a small part of the time."""
        seen = (len(log.snapshots), len(log.tests))
        if seen != self._seen and time.monotonic() >= self._next_look:
            begun = time.monotonic()
            # The log names a snapshot before its files are complete: look again until they are.
            if self.clean(log):
                self._seen = seen
            ended = time.monotonic()
            self._next_look = ended + max(SECONDS_BETWEEN, BREAK * (ended - begun))

    def clean(self, log: StageLog) -> bool:
        """Delete what is not kept; False when a snapshot that the log names is not complete yet.

        One with weights that are not numbers is never kept: see `spoiled`. Snapshots beyond the iteration
        that the stage has reached are of an earlier try. They are neither counted nor deleted: the stage will
        write them again.
        """
        complete = {
            snapshot.iteration: snapshot.caffemodel
            for snapshot in complete_snapshots(
                self._prefix, self._dialect, masks=self._masks, averaged_before=self._averaged_before
            )
            if snapshot.iteration <= self._start or snapshot.iteration in log.snapshots
        }
        spoiled = {iteration for iteration, file in complete.items() if not weights_are_finite(file)}
        if spoiled:
            self.spoiled = min(spoiled)
            remove_snapshots(self._prefix, spoiled)
        own = complete.keys() - spoiled
        kept = kept_iterations(own, comparable_top1(log.tests), self._keep, self._max_iter)
        remove_others(self._prefix, own, kept)
        return max(log.snapshots, default=0) in {0, *complete}


def comparable_top1(tests: Mapping[int, SolverTest]) -> dict[int, float]:
    """Top-1 accuracy by iteration, of tests whose numbers can be compared.

    A test on recalibrated batch-norm statistics and one on running statistics cannot be: running ones lag
    behind. Where there are both, the recalibrated ones count, unless it is a single one: stock Caffe's
    ``train`` tests on running statistics, and only the final weights are tested on recalibrated ones.
    """
    found: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for iteration, test in tests.items():
        if test.top1 is not None:
            found[test.recalibrated][iteration] = test.top1
    return found[True] if len(found[True]) > 1 or not found[False] else found[False]


def kept_iterations(
    complete: Iterable[int], top1: Mapping[int, float], keep: int, max_iter: int
) -> frozenset[int]:
    """The iterations whose snapshots are kept, of those with complete snapshots.

    ``top1`` holds the accuracy of the tests by iteration. Of equally good snapshots the latest is kept.
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

    All files of an iteration are deleted together. Files newer than the newest complete snapshot may still be
    being written, and are left alone. Returns the iterations that were removed.
    """
    newest = max(complete, default=0)
    removed = sorted(
        iteration for iteration in snapshot_files(prefix) if iteration < newest and iteration not in kept
    )
    remove_snapshots(prefix, removed)
    return removed


def remove_snapshots(prefix: Path, iterations: Collection[int]) -> None:
    """Delete all files of the snapshots of these iterations."""
    for iteration, files in snapshot_files(prefix).items():
        if iteration in iterations:
            for file in files:
                file.unlink(missing_ok=True)


def snapshot_files(prefix: Path) -> dict[int, list[Path]]:
    """The files ``<prefix>_iter_N.<anything>`` by N."""
    pattern = re.compile(re.escape(prefix.name) + r"_iter_(\d+)\..+", re.DOTALL)
    found: dict[int, list[Path]] = {}
    for path in prefix.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), []).append(path)
    return found
