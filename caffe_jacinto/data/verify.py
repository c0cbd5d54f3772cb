"""Reading a whole LMDB of images, made by any program: what it contains, and every problem in it."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.common.text import count_of, image_progress
from caffe_jacinto.data.datum import ahead, check_depth, parse_datum, stored_pixels
from caffe_jacinto.data.encode import JPEG_START, PNG_START, BadImageError, ImageProblem, limit_decoder
from caffe_jacinto.data.listing import LABELS, read_labels
from caffe_jacinto.data.lmdb_reader import ENOUGH_FOR_ORDER, LmdbReader, evenly_spaced

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_EXAMPLES = 10
"""Examples kept of each problem."""

DIGEST_BYTES = 16
"""Of an image's hash: among a million images, two different ones share it with a chance of 1 in 10^26."""

SHUFFLED_SHARE = 0.5
"""An order with fewer changes of label than this share of a random order's is not shuffled."""


_UNSHUFFLED = "Caffe reads in this order, so do not train on it; make it with --shuffle"


class LmdbProblem(Enum):
    """What can be wrong beside single images (`ImageProblem`); the value is the wording."""

    LABEL_BELOW_ZERO = "a label below 0"
    LABEL_BEYOND_NAMES = "a label beyond the {names} class names"
    CHANNELS_DIFFER = "images of different numbers of channels"
    WRITTEN_TO = "the LMDB was written to while it was read"
    SAME_IMAGE = "an image that is there more than once, with the same label"
    SAME_IMAGE_OTHER_LABEL = "an image that is there more than once, with different labels"
    SIZES_DIFFER = "images of different sizes: training needs a crop, and cannot use a mean image"
    BY_CLASS = f"records are sorted by class: {_UNSHUFFLED}"
    GROUPED = f"records are in groups of one class: {_UNSHUFFLED}"
    NO_IMAGE_OF_LABEL = "labels without an image"


Problem = ImageProblem | LmdbProblem

ERRORS = frozenset(
    {
        *ImageProblem,
        LmdbProblem.LABEL_BELOW_ZERO,
        LmdbProblem.LABEL_BEYOND_NAMES,
        LmdbProblem.CHANNELS_DIFFER,
    }
)
"""What makes Caffe fail, or train on wrong data; the others are allowed, but probably not intended."""


class Form(NamedTuple):
    """How an image is stored, and its size."""

    kind: str
    """JPEG, PNG, other (encoded), raw or float."""

    channels: int
    height: int
    width: int

    @property
    def text(self) -> str:
        return f"{self.kind}, {self.width}x{self.height}, {count_of(self.channels, 'channel')}"


class Record(NamedTuple):
    """The contents of one record."""

    key: bytes
    size: int
    """Bytes of the record."""

    label: int | None
    form: Form | None
    digest: bytes
    """Of the image's bytes; empty where there is none."""

    error: BadImageError | None = None


@dataclass
class Occurrences:
    """How often a problem was found, and some examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The key of a record and what is particular to it, or what is particular to the whole LMDB."""

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(example)


@dataclass(frozen=True)
class Sample:
    """A record that was picked to be shown."""

    key: str
    label: int | None
    content: bytes
    """The serialized Datum."""

    form: Form | None
    error: str


@dataclass
class Findings:
    """What was found in an LMDB."""

    folder: Path
    records: int
    record_bytes: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    """Records of each label."""

    names: tuple[str, ...] | None = None
    """The class names in the labels.txt beside it."""

    forms: Counter[Form] = field(default_factory=Counter)
    """Images of each kind and size."""

    changes: int = 0
    """How often a record's label differs from that of the record before."""

    problems: dict[Problem, Occurrences] = field(default_factory=dict)
    duplicates: int = 0
    """Records whose image is the same, byte for byte, as that of an earlier one."""

    samples: list[Sample] = field(default_factory=list)

    def note(self, problem: Problem, example: str = "") -> None:
        """Count one more occurrence of ``problem``."""
        self.problems.setdefault(problem, Occurrences()).add(example)

    @property
    def errors(self) -> dict[Problem, Occurrences]:
        return {problem: found for problem, found in self.problems.items() if problem in ERRORS}

    @property
    def warnings(self) -> dict[Problem, Occurrences]:
        return {problem: found for problem, found in self.problems.items() if problem not in ERRORS}

    def wording(self, problem: Problem) -> str:
        """``problem`` in words."""
        wording: str = problem.value
        return wording.format(names=len(self.names or ()))

    @property
    def expected_changes(self) -> float:
        """How often the label would change in a random order of the same records."""
        total = sum(self.labels.values())
        if total < 2:
            return 0.0
        same = sum(count * (count - 1) for count in self.labels.values()) / total
        return total - 1 - same

    @property
    def order(self) -> str:
        """``shuffled``, ``by class`` or ``grouped``; ``one class`` or ``too few`` where it has no order."""
        if len(self.labels) < 2:
            return "one class"
        if sum(self.labels.values()) < ENOUGH_FOR_ORDER:
            return "too few"
        if self.changes == len(self.labels) - 1:
            return "by class"
        return "shuffled" if self.changes >= SHUFFLED_SHARE * self.expected_changes else "grouped"

    def name(self, label: int) -> str:
        """The class name of ``label``, where there is one."""
        return self.names[label] if self.names is not None and 0 <= label < len(self.names) else ""


@dataclass
class _Images:
    """The hash, number and label of every record with an image."""

    digests: bytearray = field(default_factory=bytearray)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("q"))


def verify_lmdb(folder: Path, *, workers: int, labels: Path | None = None, sample: int = 0) -> Findings:
    """Read every record of the LMDB ``folder``, decode every image, and return what was found.

    Memory: some 60 bytes a record, and the images that are being decoded.

    Args:
        workers: threads that decode.
        labels: a file of class names; without it, the labels.txt beside the LMDB, if there is one.
        sample: evenly spaced records to keep, to be shown.

    Raises:
        UserError: the LMDB cannot be read.
    """
    limit_decoder()
    with LmdbReader(folder) as reader:
        own = folder / LABELS
        names = read_labels(labels or own) if labels is not None or own.is_file() else None
        before = reader.last_change
        found = Findings(folder, len(reader), names=names)
        images = _read_all(found, reader, workers, sample)
        _find_duplicates(found, reader, images)
        if reader.last_change != before:
            found.note(LmdbProblem.WRITTEN_TO)
    _judge_whole(found)
    return found


def _read_all(found: Findings, reader: LmdbReader, workers: int, sample: int) -> _Images:
    """Fill ``found`` record by record."""
    images = _Images()
    wanted = frozenset(evenly_spaced(0, found.records - 1, min(sample, found.records)))
    kept: dict[int, bytes] = {}

    def records() -> Iterator[tuple[bytes, bytes]]:
        for number, (key, content) in enumerate(reader.records()):
            if number in wanted:
                kept[number] = content
            yield key, content

    last: int | None = None
    with image_progress(found.folder.name, found.records, unit="records") as advance:
        for number, record in enumerate(ahead(lambda item: examine(*item), records(), workers)):
            key = os.fsdecode(record.key)
            found.record_bytes += record.size
            if record.error is not None:
                found.note(record.error.problem, f"{key!r} {record.error}")
            if record.form is not None:
                found.forms[record.form] += 1
            if record.label is not None:
                _count_label(found, record.label, last, repr(key))
                last = record.label
            if record.digest:
                images.digests += record.digest
                images.numbers.append(number)
                images.labels.append(-1 if record.label is None else record.label)
            if number in kept:
                error = str(record.error or "")
                found.samples.append(Sample(key, record.label, kept.pop(number), record.form, error))
            advance()
    return images


def _count_label(found: Findings, label: int, last: int | None, key: str) -> None:
    found.labels[label] += 1
    if last is not None and label != last:
        found.changes += 1
    if label < 0:
        found.note(LmdbProblem.LABEL_BELOW_ZERO, f"{key} label {label}")
    elif found.names is not None and label >= len(found.names):
        found.note(LmdbProblem.LABEL_BEYOND_NAMES, f"{key} label {label}")


def examine(key: bytes, content: bytes) -> Record:
    """The contents of one record; its image is decoded as Caffe decodes it."""
    try:
        datum = parse_datum(content)
    except BadImageError as error:
        return Record(key, len(content), None, None, b"", error)
    image: bytes = datum.data if datum.data else datum.SerializeToString() if datum.float_data else b""
    digest = blake2b(image, digest_size=DIGEST_BYTES).digest() if image else b""
    record = Record(key, len(content), datum.label, None, digest)
    try:
        pixels = stored_pixels(datum)
        record = record._replace(form=Form(_kind(datum), *pixels.shape))
        if datum.encoded:
            check_depth(pixels)
    except BadImageError as error:
        return record._replace(error=error)
    return record


def _kind(datum: Any) -> str:
    if not datum.encoded:
        return "raw" if datum.data else "float"
    starts = {"JPEG": JPEG_START, "PNG": PNG_START}
    return next((kind for kind, start in starts.items() if datum.data.startswith(start)), "other")


def _find_duplicates(found: Findings, reader: LmdbReader, images: _Images) -> None:
    """Count images that are there more than once, and name some, with their labels where these differ."""
    import numpy as np

    hashes = np.frombuffer(images.digests, np.dtype((np.void, DIGEST_BYTES)))
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) if len(order) > 1 else np.empty(0, int)
    found.duplicates = len(again)
    if not found.duplicates:
        return
    labels = np.frombuffer(images.labels, np.int64)
    differ = labels[order[again]] != labels[order[again + 1]]
    for problem, chosen in (
        (LmdbProblem.SAME_IMAGE, again[~differ]),
        (LmdbProblem.SAME_IMAGE_OTHER_LABEL, again[differ]),
    ):
        if len(chosen):
            examples = _pairs(reader, order, images, chosen[:MOST_EXAMPLES])
            found.problems[problem] = Occurrences(len(chosen), examples)


def _pairs(
    reader: LmdbReader, order: NDArray[np.intp], images: _Images, chosen: NDArray[np.intp]
) -> list[str]:
    """The keys of pairs of equal images, and their labels where these differ."""
    pairs = [(int(order[i]), int(order[i + 1])) for i in chosen]
    wanted = {images.numbers[image] for pair in pairs for image in pair}
    keys = {number: os.fsdecode(key) for number, key in enumerate(reader.read_keys()) if number in wanted}
    examples = []
    for pair in pairs:
        one, other = (keys[images.numbers[image]] for image in pair)
        first, second = (images.labels[image] for image in pair)
        labels = f" (labels {first} and {second})" if first != second else ""
        examples.append(f"{one!r} and {other!r}{labels}")
    return examples


def _judge_whole(found: Findings) -> None:
    """Note what is wrong with all records together."""
    channels = sorted({form.channels for form in found.forms})
    if len(channels) > 1:
        counts = {c: sum(n for form, n in found.forms.items() if form.channels == c) for c in channels}
        kinds = ", ".join(f"{count_of(n, 'image')} of {c}" for c, n in counts.items())
        found.note(LmdbProblem.CHANNELS_DIFFER, kinds)
    sizes = {(form.width, form.height) for form in found.forms}
    if len(sizes) > 1:
        small, large = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
        found.note(
            LmdbProblem.SIZES_DIFFER,
            f"{len(sizes):,} sizes, from {small[0]}x{small[1]} to {large[0]}x{large[1]}",
        )
    if found.order in ("by class", "grouped"):
        found.note(
            LmdbProblem.BY_CLASS if found.order == "by class" else LmdbProblem.GROUPED,
            f"the label changes {found.changes:,} times, in a random order about "
            f"{found.expected_changes:,.0f} times",
        )
    missing = _missing_labels(found)
    if missing:
        shown = ", ".join(map(str, missing[:MOST_EXAMPLES]))
        more = ", ..." if len(missing) > MOST_EXAMPLES else ""
        found.note(LmdbProblem.NO_IMAGE_OF_LABEL, f"{len(missing):,} of them: {shown}{more}")


def _missing_labels(found: Findings) -> list[int]:
    highest = max((label for label in found.labels if label >= 0), default=-1)
    classes = max(highest + 1 if highest < 1_000_000 else 0, len(found.names or ()))
    return [label for label in range(classes) if label not in found.labels]
