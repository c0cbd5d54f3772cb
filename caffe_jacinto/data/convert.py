"""A listing of images -> a complete LMDB: decoded by several threads, stored in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from caffe_jacinto.data.encode import ImageForm, UnreadableImageError, datum_record, encode_image
from caffe_jacinto.data.listing import Entry, Listing
from caffe_jacinto.data.lmdb_writer import new_lmdb
from caffe_jacinto.data.progress import count_text, image_progress
from caffe_jacinto.errors import UserError

IN_FLIGHT_PER_WORKER = 16
"""Images that are being read or wait to be stored, for each thread: bounds the memory."""


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What became of a listing: images stored, bytes of their records, and the images left out."""

    images: int
    record_bytes: int
    skipped: tuple[Skipped, ...]


def convert(listing: Listing, output: Path, form: ImageForm, *, workers: int, replace: bool) -> Conversion:
    """Store every readable image of ``listing`` in an LMDB at ``output``, with labels.txt and skipped.txt.

    Keys are ``%08d_<path>`` with the place in the listing, images that are left out counted.

    Raises:
        UserError: see `new_lmdb`; or not one of the images can be read.
        RunFailed: the disk is full or refuses to write.
    """
    record_bytes = 0
    skipped: list[Skipped] = []
    with new_lmdb(output, replace=replace) as writer:
        with image_progress(output.name, len(listing.entries)) as advance:
            for index, (entry, result) in enumerate(_records(listing, form, workers)):
                if isinstance(result, UnreadableImageError):
                    skipped.append(Skipped(entry.path, str(result)))
                else:
                    writer.put(b"%08d_%s" % (index, os.fsencode(entry.path)), result)
                    record_bytes += len(result)
                advance()
        if not writer.images:
            raise UserError(
                f"no image below {listing.folder} can be read ({count_text(len(skipped), 'file')} tried); the"
                f" first, {skipped[0].path}: {skipped[0].reason}"
            )
        if listing.names is not None:
            writer.add_file("labels.txt", "".join(f"{name}\n" for name in listing.names))
        if skipped:
            writer.add_file("skipped.txt", "".join(f"{image.path}\t{image.reason}\n" for image in skipped))
        return Conversion(writer.images, record_bytes, tuple(skipped))


def _records(
    listing: Listing, form: ImageForm, workers: int
) -> Iterator[tuple[Entry, bytes | UnreadableImageError]]:
    """The record of each entry, or why there is none, in the listing's order.

    Threads, not processes: OpenCV lets go of Python's lock while it decodes, resizes and encodes, which is
    nearly all of the time, and no image has to travel between processes.
    """
    import cv2

    cv2.setNumThreads(1)  # One thread an image: the images are what is worked on in parallel.
    waiting: deque[tuple[Entry, Future[bytes | UnreadableImageError]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for entry in listing.entries:
            waiting.append((entry, pool.submit(_record, listing.folder, entry, form)))
            if len(waiting) >= workers * IN_FLIGHT_PER_WORKER:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _record(folder: Path, entry: Entry, form: ImageForm) -> bytes | UnreadableImageError:
    try:
        return datum_record(encode_image(folder / entry.path, form), entry.label)
    except UnreadableImageError as error:
        return error
