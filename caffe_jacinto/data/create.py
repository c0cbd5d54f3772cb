"""Making an LMDB, or a shard of one, from images: finding them and storing them."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import count_of, duration, image_progress
from caffe_jacinto.data.archives import list_class_archive, list_flat_archive, list_from_archive
from caffe_jacinto.data.datum import ahead
from caffe_jacinto.data.devkit import read_devkit
from caffe_jacinto.data.encode import ImageForm, form_of, image_record, limit_decoder
from caffe_jacinto.data.index import Folder, ImageIndex, UnreadableImageError
from caffe_jacinto.data.listing import (
    LABELS,
    check_folder_exists,
    list_class_folders,
    list_flat_folder,
    list_from_file,
    read_labels,
)
from caffe_jacinto.data.lmdb_reader import check_lmdb
from caffe_jacinto.data.lmdb_writer import SKIPPED, LmdbWriter, new_lmdb, noted_form
from caffe_jacinto.data.shards import Shard

DEFAULT_SEED = 33
"""Seed of the shuffle for images in class folders."""


@dataclass(frozen=True)
class MaxBad:
    """How many images may be left out because they cannot be read."""

    number: float
    percent: bool = False
    """Whether ``number`` is a percentage of all images."""

    least: int = 0
    """This many may always be left out."""

    def of(self, images: int) -> int:
        """The limit for a set of ``images`` images."""
        return max(self.least, int(images * self.number / 100) if self.percent else int(self.number))

    @staticmethod
    def parse(text: str) -> MaxBad:
        """An argument type: ``100`` or ``0.5%``."""
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(%?)", text)
        if match is None or (not match[2] and "." in text) or (match[2] and float(match[1]) > 100):
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is neither a number of images nor a percentage: give 100, or 0.5%"
            )
        return MaxBad(float(match[1]), bool(match[2]))


DEFAULT_MAX_BAD = MaxBad(1, percent=True, least=10)


def make_lmdb(
    output: Path,
    images: tuple[ImageIndex, str],
    form: ImageForm,
    shard: Shard | None,
    workers: int,
    max_bad: MaxBad,
    *,
    replace: bool,
    restart: bool,
) -> None:
    """Store images in the LMDB ``output``, continuing where an interrupted run stopped; prints progress.

    Args:
        images: as `find_images` returns them.
        shard: the part that is stored; None for all.
        replace: whether an LMDB that exists may be replaced.
        restart: whether what an interrupted run left is discarded.

    Raises:
        UserError: ``output`` cannot be made, or too many images cannot be read.
        RunFailed: the disk is full or refuses to write.
    """
    limit_decoder()
    import cv2

    index, order = images
    places = shard.places(len(index)) if shard else range(len(index))
    if shard and not places:
        raise UserError(f"--shard {shard.text} holds none of {count_of(len(index), 'image')}")
    ignored = f" ({count_of(index.ignored, 'other item')} left out)" if index.ignored else ""
    part = f"shard {shard.text}, " if shard else ""
    print(
        f"{index.place.path}: {count_of(len(index), 'image')}, {index.source}{ignored}, {order}, {part}"
        f"{form.text}, {workers} at a time",
        flush=True,
    )
    made_from = {
        "images": f"{len(index)}, {index.source}",
        "listing": index.digest(),
        "order": order,
        "form": form.text,
        "OpenCV": cv2.__version__,
        **({"shard": shard.text} if shard else {}),
    }
    start = time.monotonic()
    with (
        _saying_how_to_continue(),
        new_lmdb(output, made_from, replace=replace, restart=restart) as writer,
    ):
        if writer.resumed:
            print(
                f"continuing after an interruption: {writer.resumed:,} of {count_of(len(places), 'image')}"
                " were done and have been checked",
                flush=True,
            )
        store_images(
            index, places, form, writer, workers=workers, max_bad=max_bad.of(len(places)), name=output.name
        )
        writer.add_made_from(made_from)
    _summarize(writer, output, len(places) - writer.resumed, time.monotonic() - start)
    for remark in index.remarks:
        print(f"{index.place.path}: {remark}")


def store_images(
    index: ImageIndex,
    places: range,
    form: ImageForm,
    writer: LmdbWriter,
    *,
    workers: int,
    max_bad: int,
    name: str,
) -> None:
    """Store the readable images at ``places`` in the order of ``index``, from the writer's position on.

    Keys are ``%08d_<path>`` with the place in the order, images that are left out counted.

    Args:
        max_bad: images that may be left out.
        name: the LMDB's, for the progress.

    Raises:
        UserError: more than ``max_bad`` images cannot be read, or none can.
    """
    left = places[writer.position :]

    def record(place: int) -> bytes | UnreadableImageError:
        number = index.at(place)
        try:
            return image_record(index.path(number), index.read(number), index.label(number), form)
        except UnreadableImageError as error:
            return error

    _check_bad(writer, len(places), max_bad)
    with image_progress(name, len(places), done=writer.position) as advance:
        for place, result in zip(left, ahead(record, left, workers), strict=True):
            path = index.path(index.at(place))
            if isinstance(result, UnreadableImageError):
                writer.skip(os.fsdecode(path), str(result))
                _check_bad(writer, len(places), max_bad)
            else:
                writer.put(b"%08d_%s" % (place, path), result)
            advance()
    if not writer.images:
        first = writer.skipped[0]
        raise UserError(
            f"no image below {index.place.path} can be read"
            f" ({count_of(len(writer.skipped), 'file')} tried); the first, {first.path}: {first.reason}"
        )
    if index.names is not None:
        writer.add_file(LABELS, "".join(f"{name}\n" for name in index.names))


def _check_bad(writer: LmdbWriter, images: int, max_bad: int) -> None:
    if len(writer.skipped) <= max_bad:
        return
    first, listed = writer.skipped[0], writer.partial / SKIPPED
    write_whole(listed, writer.skipped_text().encode("utf-8", "surrogateescape"))
    raise UserError(
        f"{count_of(len(writer.skipped), 'image')} of the first {writer.position:,} of {images:,} cannot be"
        f" read, more than --max-bad {max_bad}; all are listed in {listed}; the first, {first.path}:"
        f" {first.reason}"
    )


def _summarize(writer: LmdbWriter, output: Path, done: int, seconds: float) -> None:
    print(
        f"{output}: {count_of(writer.images, 'image')}, {writer.record_bytes / 1e6:,.1f} MB,"
        f" in {duration(seconds)} ({done / seconds:,.0f} images/s)",
        flush=True,
    )
    if not writer.skipped:
        return
    first = writer.skipped[0]
    print(
        f"warning: {count_of(len(writer.skipped), 'image')} left out, listed in {output / SKIPPED}; the"
        f" first, {first.path}: {first.reason}",
        file=sys.stderr,
    )
    reasons = Counter(image.reason for image in writer.skipped)
    if len(reasons) > 1:
        for reason, count in reasons.most_common(10):
            print(f"  {count:,}: {reason}", file=sys.stderr)


@contextlib.contextmanager
def _saying_how_to_continue() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("stopped; start the same command again to continue", file=sys.stderr)
        raise


def check_existing_lmdb(output: Path, form: ImageForm | None) -> None:
    """Print what an existing LMDB holds; raise UserError if its images do not have ``form`` (None: any).

    Size and channels are taken from a sample of its images, the rest from its own record.
    """
    noted = noted_form(output)
    asked = form or form_of(noted or "")
    channels = 1 if asked and not asked.colour else 3
    facts = check_lmdb(str(output), num_classes=None, min_images=1, min_size=1, sample=8, channels=channels)
    if form and form.width and (facts.width, facts.height) != (form.width, form.height):
        raise UserError(
            f"LMDB {output} holds images of {facts.width}x{facts.height} pixels, not"
            f" {form.width}x{form.height}: --force replaces it"
        )
    if form and noted not in (None, form.text):
        raise UserError(f"LMDB {output} was made as {noted}, not as {form.text}: --force replaces it")
    print(
        f"{output}: kept, {count_of(facts.images, 'image')} of {facts.width}x{facts.height}"
        " (--force makes it again)"
    )


def find_images(
    images: Path,
    list_file: Path | None = None,
    labels: Path | None = None,
    devkit: Path | None = None,
    *,
    shuffle: int | None = None,
    no_shuffle: bool = False,
) -> tuple[ImageIndex, str]:
    """The images below ``images``, a folder or a tar archive, in storage order, and that order's name.

    Args:
        list_file: names the images and their labels; without it and ``devkit``, folders are classes.
        labels: the class names, line N for label N.
        devkit: ILSVRC's development kit; the images are its validation set.
        shuffle: the seed of a random order; by default only images of classes are shuffled.
        no_shuffle: whether to store those sorted by name instead.

    Raises:
        UserError: something is missing, unfit or contradictory.
    """
    index = _unordered(images, list_file, labels, devkit)
    if shuffle is None and not (no_shuffle or list_file or devkit):
        shuffle = DEFAULT_SEED
    if shuffle is None:
        return index, "in the list's order" if list_file else "sorted by name"
    return index.shuffled(shuffle), f"shuffled with seed {shuffle}"


def _unordered(images: Path, list_file: Path | None, labels: Path | None, devkit: Path | None) -> ImageIndex:
    names = read_labels(labels) if labels else None
    archived = images.is_file()
    if devkit is not None:
        kit = read_devkit(devkit)
        if names is not None and names != kit.names:
            raise UserError(
                f"{labels} and the development kit {devkit} name different classes: the training set must be"
                " the kit's"
            )
        return kit.label(list_flat_archive(images) if archived else list_flat_folder(images))
    if list_file is not None:
        if archived:
            return list_from_archive(images, list_file, names)
        check_folder_exists(images)
        return list_from_file(list_file, Folder(images), names)
    return list_class_archive(images, names) if archived else list_class_folders(images, names)
