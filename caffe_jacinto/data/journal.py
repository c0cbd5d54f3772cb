"""The journal of an unfinished LMDB, from which the same command continues after an interruption.

One JSON value a line. The first holds what the LMDB is made from. For each transaction there are the images
that were left out since the last one, and what it stores:

    {"made_from": {"size": "256x256", ...}}
    {"skipped": [17, "cat/17.JPEG", "the file is empty"]}
    {"end": 512, "records": 511, "crc": 2774321023}

After it, ``end`` images have been processed and ``records`` of them stored; ``crc`` is the CRC-32 of the
transaction's keys and values. A line is on the disk before its transaction begins, so the LMDB's number of
records shows which lines are valid; those after them belong to transactions that were lost.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.common.text import image_progress
from caffe_jacinto.data.lmdb_reader import check_not_cut_off


class Skipped(NamedTuple):
    """An image that was left out: its place in the order, its path, and why."""

    position: int
    path: str
    reason: str


class Commit(NamedTuple):
    """State after a transaction: images processed, records in the LMDB, and the transaction's CRC-32."""

    end: int
    records: int
    crc: int


@dataclass
class Stored:
    """What an unfinished LMDB holds.

    Attributes:
        end: images processed.
        records: those that are stored.
        record_bytes: of their values.
        skipped: those that were left out.
    """

    end: int = 0
    records: int = 0
    record_bytes: int = 0
    skipped: list[Skipped] = field(default_factory=list)


class Journal:
    """The journal file of one unfinished LMDB, open for appending."""

    def __init__(self, path: Path, made_from: Mapping[str, str]) -> None:
        """Open the journal at ``path``, or begin one.

        Raises:
            UserError: the unfinished LMDB is made from something else.
        """
        self._path = path
        self._lines = _read(path)
        # Without a transaction there is nothing to continue, whatever it was to be made from.
        self.continued = any("end" in line for line, _ in self._lines)
        if self.continued:
            _check_same(path.parent, self._lines[0][0].get("made_from"), made_from)
        self._file = path.open("ab")
        if not self.continued:
            self._file.truncate(0)
            self._write([{"made_from": dict(made_from)}])

    def add(self, skipped: Sequence[Skipped], commit: Commit) -> None:
        """Record a transaction that is about to begin, and wait until the record is on the disk."""
        self._write([*({"skipped": list(image)} for image in skipped), commit._asdict()])

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def check(self, what: str, environment: Any) -> Stored:
        """Read every record of the unfinished LMDB and return what it holds; drop what was lost.

        Raises:
            UserError: a record is not as it was written.
        """
        entries: int = environment.stat()["entries"]
        stored, kept, commits = Stored(), 1, list[Commit]()
        pending: list[Skipped] = []
        for number, (line, _) in enumerate(self._lines[1:], start=2):
            if "skipped" in line:
                pending.append(Skipped(*line["skipped"]))
                continue
            commit = Commit(**line)
            if commit.records > entries:
                break
            commits.append(commit)
            stored.end, stored.records, kept = commit.end, commit.records, number
            stored.skipped += pending
            pending = []
        if stored.records != entries:
            raise _damaged(self._path.parent, f"{entries:,} records, {stored.records:,} in its journal")
        stored.record_bytes = self._check_records(what, environment, commits)
        self._file.truncate(self._lines[kept - 1][1])
        return stored

    def _check_records(self, what: str, environment: Any, commits: Sequence[Commit]) -> int:
        total = 0
        entries = commits[-1].records if commits else 0
        try:
            check_not_cut_off(Path(environment.path()), environment)
        except UserError:
            raise _damaged(self._path.parent, "it is cut off") from None
        with (
            environment.begin(buffers=True) as transaction,
            transaction.cursor() as cursor,
            image_progress(f"{what}: checking what is there", entries) as advance,
        ):
            records = iter(cursor)
            before = 0
            for commit in commits:
                crc = 0
                for _ in range(commit.records - before):
                    key, value = next(records)
                    crc = zlib.crc32(value, zlib.crc32(key, crc))
                    total += len(value)
                    advance()
                if crc != commit.crc:
                    raise _damaged(
                        self._path.parent,
                        f"records {before + 1:,} to {commit.records:,} are not as they were written",
                    )
                before = commit.records
        return total

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _read(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The whole lines of a journal, each with the place in the file where it ends."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            value = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            break  # Cut off in the middle, or never on the disk.
        lines.append((value, end))
    return lines


def _check_same(folder: Path, before: Any, now: Mapping[str, str]) -> None:
    if before == now:
        return
    before = before if isinstance(before, dict) else {}
    differing = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    changes = ", ".join(
        f"{name}: {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in differing
    )
    raise UserError(
        f"{folder} is an unfinished LMDB that was made differently ({changes}): start that command again to"
        " continue it, or discard it with --restart"
    )


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}, an unfinished LMDB, is damaged ({reason}): --restart begins again")
