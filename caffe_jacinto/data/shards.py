"""Parts of one LMDB that several machines make, and joining them.

Shard ``i`` of ``n`` holds the images of the i-th of n equal parts of the whole order, under the keys that
they have in the whole. Caffe's data layer reads one LMDB, so a last step copies the shards into one; it
decodes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.common.text import count_of, duration, image_progress
from caffe_jacinto.data.listing import LABELS
from caffe_jacinto.data.lmdb_reader import LmdbReader, check_folder
from caffe_jacinto.data.lmdb_writer import MADE_FROM, SKIPPED, LmdbWriter, new_lmdb

_NAME = re.compile(r"\.shard-(\d{1,4})-of-(\d{1,4})")


@dataclass(frozen=True)
class Shard:
    """One part of an LMDB: ``number`` of ``count``, from 1."""

    number: int
    count: int

    @staticmethod
    def parse(text: str) -> Shard:
        """An argument type: ``1/4``."""
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not a shard: give 1/4 to 4/4 for four of them"
            )
        return Shard(int(match[1]), int(match[2]))

    @property
    def text(self) -> str:
        return f"{self.number} of {self.count}"

    def places(self, images: int) -> range:
        """The places in the order of ``images`` images that are this shard's."""
        return range(images * (self.number - 1) // self.count, images * self.number // self.count)

    def path(self, output: Path) -> Path:
        """The folder of this shard of the LMDB ``output``, beside it."""
        return output.with_name(f"{output.name}.shard-{self.number}-of-{self.count}")

    def next_step(self, output: Path) -> str:
        """What the user does once all shards of ``output`` are there."""
        return (
            f"when all {self.count} shards are there: python -m caffe_jacinto.create_lmdb --join"
            f" --output {shlex.quote(os.fspath(output))}"
        )


def find_shards(output: Path) -> list[Path]:
    """The shards beside ``output``, in order.

    Raises:
        UserError: there are none, one is missing, or they were not made alike.
    """
    if not output.parent.is_dir():
        raise UserError(f"folder {output.parent} does not exist: give the LMDB whose shards to join")
    found: dict[int, set[int]] = {}
    for item in output.parent.iterdir():
        match = _NAME.fullmatch(item.name.removeprefix(output.name))
        if match and item.name.startswith(output.name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if not found:
        raise UserError(
            f"there are no shards {output.name}.shard-1-of-N in {output.parent}: make them with --shard 1/N"
            " and so on"
        )
    if len(found) > 1:
        counts = " and ".join(f"of {count}" for count in sorted(found))
        raise UserError(f"the shards of {output} are {counts}: remove those that do not belong to it")
    count, numbers = found.popitem()
    missing = sorted({*range(1, count + 1)} - numbers)
    if missing:
        lacking = Shard(missing[0], count)
        raise UserError(f"{lacking.path(output)} is missing: make it with --shard {lacking.number}/{count}")
    shards = [Shard(number, count).path(output) for number in range(1, count + 1)]
    _check_same(shards)
    return shards


def _check_same(shards: Sequence[Path]) -> None:
    first: dict[str, Any] | None = None
    for shard in shards:
        check_folder(shard)
        facts = _made_from(shard)
        first = first or facts
        if facts != first:
            differing = next(name for name in {**first, **facts} if first.get(name) != facts.get(name))
            raise UserError(
                f"{shard} was made differently from {shards[0]} ({differing}: {facts.get(differing)} and"
                f" {first.get(differing)}): make one of them again"
            )


def _made_from(shard: Path) -> dict[str, Any]:
    """What a shard notes that it was made from, without its number."""
    try:
        facts: dict[str, Any] = parse_json((shard / MADE_FROM).read_text())
        facts.pop("shard", None)
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{shard} holds no readable {MADE_FROM}: make it again with --shard") from None
    return facts


def join_shards(output: Path, *, replace: bool, restart: bool) -> None:
    """Make the LMDB ``output`` of its shards; prints what happens. Raises as `find_shards` and `new_lmdb`."""
    shards = find_shards(output)
    count = count_of(len(shards), "shard")
    print(f"{output}: joining {count}", flush=True)
    made_from = _made_from(shards[0])
    start = time.monotonic()
    with new_lmdb(output, {**made_from, "joined": count}, replace=replace, restart=restart) as writer:
        images = _copy(shards, writer, output.name)
        writer.add_made_from(made_from)
    print(f"{output}: {count_of(images, 'image')}, in {duration(time.monotonic() - start)}")
    print(f"the shards can be removed: rm -r {shlex.quote(os.fspath(output))}.shard-*")


def _copy(shards: Sequence[Path], writer: LmdbWriter, name: str) -> int:
    """Copy the records of ``shards`` into one LMDB, from where ``writer`` is; returns their number."""
    there = writer.images
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(LmdbReader(shard)) for shard in shards]
        total = sum(map(len, readers))
        advance = stack.enter_context(image_progress(name, total, done=there))
        for reader in readers:
            if there < len(reader):
                for key, record in islice(reader.records(), there, None):
                    writer.put(key, record)
                    advance()
            there = max(there - len(reader), 0)
    labels = shards[0] / LABELS
    if labels.is_file():
        writer.add_file(LABELS, labels.read_bytes().decode("utf-8", "surrogateescape"))
    skipped = [
        (shard / SKIPPED).read_bytes().decode("utf-8", "surrogateescape")
        for shard in shards
        if (shard / SKIPPED).is_file()
    ]
    if skipped:
        writer.add_file(SKIPPED, "".join(skipped))
    return total
