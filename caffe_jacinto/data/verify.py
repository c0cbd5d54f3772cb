"""Read a whole LMDB of images, made by anyone, and say what is in it and what is wrong with it."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.progress import count_text, image_progress
from caffe_jacinto.data.check import check_folder, check_not_cut_off, parse_datum
from caffe_jacinto.data.create import ahead
from caffe_jacinto.data.encode import GIF_STARTS, JPEG_START, MAX_PIXELS, PNG_START, image_size, limit_decoder
from caffe_jacinto.data.listing import read_labels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_EXAMPLES = 10
"""Records that are named for each thing that is wrong."""

DIGEST_BYTES = 16
"""Of an image's hash: among a million images, two different ones share it with a chance of 1 in 10^26."""

SHUFFLED_SHARE = 0.5
"""An order with fewer changes of label than this share of a random order's is not shuffled."""

ENOUGH_FOR_ORDER = 20
"""With fewer records, any order may be chance."""


class Form(NamedTuple):
    """How an image is stored, and its size."""

    kind: str
    """JPEG, PNG, other (encoded), raw or float."""

    channels: int
    height: int
    width: int

    @property
    def text(self) -> str:
        return f"{self.kind}, {self.width}x{self.height}, {count_text(self.channels, 'channel')}"


class Record(NamedTuple):
    """What one record holds."""

    key: bytes
    size: int
    """Bytes of the record."""

    label: int | None
    form: Form | None
    digest: bytes
    """Of the image's bytes; empty where there is none."""

    error: str = ""
    """What makes Caffe fail at it."""


@dataclass
class Trouble:
    """Something wrong that records have in common."""

    what: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """Keys of some of them, with what is particular to each."""

    def add(self, example: str) -> None:
        """Count one more record."""
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
    """How often the label is another than that of the record before."""

    errors: dict[str, Trouble] = field(default_factory=dict)
    """What makes Caffe fail, or train on what is wrong."""

    warnings: dict[str, Trouble] = field(default_factory=dict)
    """What is allowed, and probably not wanted."""

    duplicates: int = 0
    """Records whose image an earlier one has, to the byte."""

    samples: list[Sample] = field(default_factory=list)

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
        """``shuffled``, ``by class`` or ``grouped``; ``too few`` or ``one class``, where none can be told."""
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


def verify_lmdb(folder: Path, *, workers: int, labels: Path | None = None, sample: int = 0) -> Findings:
    """Read every record of the LMDB ``folder``, decode every image, and return what was found.

    Memory is some 60 bytes a record, and that of the images that are being decoded. The LMDB is opened
    read-only and without its lock.

    Args:
        workers: threads that decode.
        labels: a file of class names; without it, the labels.txt beside the LMDB, if there is one.
        sample: evenly spaced records to keep, to be shown.

    Raises:
        UserError: the folder is no LMDB, or one that is cut off, empty or damaged.
    """
    import lmdb

    limit_decoder()
    check_folder(folder)
    own = folder / "labels.txt"
    names = read_labels(labels or own) if labels is not None or own.is_file() else None
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, readahead=True) as environment:
            check_not_cut_off(folder, environment)
            entries: int = environment.stat()["entries"]
            if not entries:
                raise UserError(f"LMDB {folder} is empty: make it again")
            before = environment.info()["last_txnid"]
            found = Findings(folder, entries, names=names)
            with environment.begin(buffers=True) as transaction:
                seen = _read_all(found, transaction, workers, sample)
                _find_duplicates(found, transaction, *seen)
            if environment.info()["last_txnid"] != before:
                _note(found.warnings, "the LMDB was written to while it was read").add("")
    except lmdb.Error as error:
        raise UserError(f"{folder} cannot be read as an LMDB ({error}): make it again") from None
    _judge(found)
    return found


def _read_all(
    found: Findings, transaction: Any, workers: int, sample: int
) -> tuple[bytearray, array[int], array[int]]:
    """Fill ``found`` record by record; returns the images' hashes, and the number and label of each."""
    digests, numbers, labels = bytearray(), array("q"), array("q")
    wanted = _spread(found.records, sample)
    kept: dict[int, bytes] = {}

    def records() -> Iterator[tuple[int, bytes, bytes]]:
        with transaction.cursor() as cursor:
            for number, (key, value) in enumerate(cursor):
                content = bytes(value)
                if number in wanted:
                    kept[number] = content
                yield number, bytes(key), content

    last: int | None = None
    with image_progress(found.folder.name, found.records, unit="records") as advance:
        for number, record in enumerate(ahead(lambda item: examine(item[1], item[2]), records(), workers)):
            key = os.fsdecode(record.key)
            found.record_bytes += record.size
            if record.error:
                _note(found.errors, record.error.split(":")[0]).add(f"{key!r} {record.error}")
            if record.form is not None:
                found.forms[record.form] += 1
            if record.label is not None:
                _take_label(found, record.label, last, repr(key))
                last = record.label
            if record.digest:
                digests += record.digest
                numbers.append(number)
                labels.append(-1 if record.label is None else record.label)
            if number in kept:
                found.samples.append(Sample(key, record.label, kept.pop(number), record.form, record.error))
            advance()
    return digests, numbers, labels


def _take_label(found: Findings, label: int, last: int | None, key: str) -> None:
    found.labels[label] += 1
    if last is not None and label != last:
        found.changes += 1
    if label < 0:
        _note(found.errors, "a label below 0").add(f"{key} label {label}")
    elif found.names is not None and label >= len(found.names):
        _note(found.errors, f"a label beyond the {len(found.names)} class names").add(f"{key} label {label}")


def examine(key: bytes, content: bytes) -> Record:
    """What the record ``content`` holds; its image is decoded as Caffe decodes it."""
    try:
        datum = parse_datum("", content)
    except UserError:
        return Record(key, len(content), None, None, b"", "not a Datum message")
    image: bytes = datum.data if datum.data else datum.SerializeToString() if datum.float_data else b""
    digest = blake2b(image, digest_size=DIGEST_BYTES).digest() if image else b""
    whole = Record(key, len(content), datum.label, None, digest)
    if datum.encoded:
        return _examine_encoded(whole, image)
    values = len(datum.data) or len(datum.float_data)
    form = Form("raw" if datum.data else "float", datum.channels, datum.height, datum.width)
    if not values or values != form.channels * form.height * form.width:
        return whole._replace(
            error=f"values that do not fill the image's size: {values} for {form.channels} x {form.height} x "
            f"{form.width} (channels x height x width)"
        )
    return whole._replace(form=form)


def _examine_encoded(record: Record, image: bytes) -> Record:
    import cv2
    import numpy as np

    if image.startswith(GIF_STARTS):
        return record._replace(error="a GIF image, which Caffe does not read")
    size = image_size(image)
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        return record._replace(
            error=f"an image of more than {MAX_PIXELS:,} pixels, not decoded: {size[0]} x {size[1]}"
        )
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED) if image else None
    except cv2.error:
        pixels = None
    if pixels is None:
        return record._replace(error="an image that cannot be decoded (cut off, or no image)")
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    kind = "JPEG" if image.startswith(JPEG_START) else "PNG" if image.startswith(PNG_START) else "other"
    record = record._replace(form=Form(kind, channels, pixels.shape[0], pixels.shape[1]))
    if pixels.dtype != np.uint8:
        return record._replace(error=f"an image that is not of 8 bits: {pixels.dtype}")
    return record


def _find_duplicates(
    found: Findings, transaction: Any, digests: bytearray, numbers: array[int], labels: array[int]
) -> None:
    """Count images that are there more than once, and name some, with their labels where these differ."""
    import numpy as np

    hashes = np.frombuffer(digests, np.dtype((np.void, DIGEST_BYTES)))
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) if len(order) > 1 else np.empty(0, int)
    found.duplicates = len(again)
    if not found.duplicates:
        return
    of, at = np.frombuffer(labels, np.int64), np.frombuffer(numbers, np.int64)
    differ = of[order[again]] != of[order[again + 1]]
    for what, chosen in (
        ("an image that is there more than once, with the same label", again[~differ]),
        ("an image that is there more than once, with different labels", again[differ]),
    ):
        if len(chosen):
            trouble = _note(found.warnings, what)
            trouble.count = len(chosen)
            trouble.examples = _pairs(transaction, order, at, of, chosen[:MOST_EXAMPLES])


def _pairs(
    transaction: Any,
    order: NDArray[np.intp],
    at: NDArray[np.int64],
    labels: NDArray[np.int64],
    chosen: NDArray[np.intp],
) -> list[str]:
    """The keys and labels of pairs of equal images."""
    pairs = [(int(order[i]), int(order[i + 1])) for i in chosen]
    wanted = {int(at[number]) for pair in pairs for number in pair}
    keys: dict[int, bytes] = {}
    with transaction.cursor() as cursor:
        for number, key in enumerate(cursor.iternext(keys=True, values=False)):
            if number in wanted:
                keys[number] = bytes(key)
                if len(keys) == len(wanted):
                    break
    told = []
    for first, second in pairs:
        one, other = (os.fsdecode(keys[int(at[number])]) for number in (first, second))
        said = f" (labels {labels[first]} and {labels[second]})" if labels[first] != labels[second] else ""
        told.append(f"{one!r} and {other!r}{said}")
    return told


def _judge(found: Findings) -> None:
    """What is wrong with the whole."""
    channels = {form.channels for form in found.forms}
    if len(channels) > 1:
        kinds = ", ".join(
            f"{count_text(sum(n for form, n in found.forms.items() if form.channels == c), 'image')} of {c}"
            for c in sorted(channels)
        )
        _note(found.errors, "images of different numbers of channels").add(kinds)
    sizes = {(form.width, form.height) for form in found.forms}
    if len(sizes) > 1:
        small, large = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
        _note(
            found.warnings, "images of different sizes: training needs a crop, and cannot use a mean image"
        ).add(f"{len(sizes):,} sizes, from {small[0]}x{small[1]} to {large[0]}x{large[1]}")
    if found.order in ("by class", "grouped"):
        how = "sorted by class" if found.order == "by class" else "in groups of one class"
        _note(
            found.warnings,
            f"records are {how}: Caffe reads in this order, so do not train on it; make it with --shuffle",
        ).add(
            f"the label changes {found.changes:,} times, in a random order about "
            f"{found.expected_changes:,.0f} times"
        )
    missing = _missing_labels(found)
    if missing:
        shown = ", ".join(map(str, missing[:MOST_EXAMPLES]))
        more = ", ..." if len(missing) > MOST_EXAMPLES else ""
        _note(found.warnings, "labels without an image").add(f"{len(missing):,} of them: {shown}{more}")


def _missing_labels(found: Findings) -> list[int]:
    highest = max((label for label in found.labels if label >= 0), default=-1)
    classes = max(highest + 1 if highest < 1_000_000 else 0, len(found.names or ()))
    return [label for label in range(classes) if label not in found.labels]


def _note(troubles: dict[str, Trouble], what: str) -> Trouble:
    return troubles.setdefault(what, Trouble(what))


def _spread(records: int, sample: int) -> frozenset[int]:
    """Numbers of ``sample`` records, evenly spaced from the first to the last."""
    count = min(sample, records)
    if count < 2:
        return frozenset(range(count))
    return frozenset(step * (records - 1) // (count - 1) for step in range(count))
