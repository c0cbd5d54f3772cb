"""Images -> a complete LMDB: decoded by several threads, stored in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from caffe_jacinto.data.encode import ImageForm, UnreadableImageError, image_record
from caffe_jacinto.data.index import ImageIndex
from caffe_jacinto.data.journal import Skipped
from caffe_jacinto.data.lmdb_writer import SKIPPED, LmdbWriter
from caffe_jacinto.data.progress import count_text, image_progress
from caffe_jacinto.errors import UserError
from caffe_jacinto.files import write_whole

IN_FLIGHT_PER_WORKER = 16
"""Images that are being read or wait to be stored, for each thread: bounds the memory."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Conversion:
    """What became of the images.

    Attributes:
        images: stored.
        record_bytes: of their records.
        skipped: left out.
        resumed: images that an earlier, interrupted run had dealt with.
        done: images that this one dealt with.
    """

    images: int
    record_bytes: int
    skipped: tuple[Skipped, ...]
    resumed: int
    done: int


def convert(
    index: ImageIndex,
    places: range,
    form: ImageForm,
    writer: LmdbWriter,
    *,
    workers: int,
    max_bad: int,
    name: str,
) -> Conversion:
    """Store the readable images at ``places`` of the order of ``index``, from where ``writer`` is.

    Keys are ``%08d_<path>`` with the place in the order, images that are left out counted.

    Args:
        max_bad: images that may be left out.
        name: the LMDB's, for the progress.

    Raises:
        UserError: more images than that cannot be read, or not one can.
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
        for place, result in in_order(record, left, workers):
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
            f" ({count_text(len(writer.skipped), 'file')} tried); the first, {first.path}: {first.reason}"
        )
    if index.names is not None:
        writer.add_file("labels.txt", "".join(f"{name}\n" for name in index.names))
    return Conversion(writer.images, writer.record_bytes, tuple(writer.skipped), writer.resumed, len(left))


def _check_bad(writer: LmdbWriter, images: int, max_bad: int) -> None:
    if len(writer.skipped) <= max_bad:
        return
    first, listed = writer.skipped[0], writer.partial / SKIPPED
    write_whole(listed, writer.skipped_text().encode("utf-8", "surrogateescape"))
    raise UserError(
        f"{count_text(len(writer.skipped), 'image')} of the first {writer.position:,} of {images:,} cannot be"
        f" read, more than --max-bad {max_bad}; all are listed in {listed}; the first, {first.path}:"
        f" {first.reason}"
    )


def in_order(job: Callable[[int], _Result], numbers: range, workers: int) -> Iterator[tuple[int, _Result]]:
    """``job`` of each of ``numbers``, done by several threads, in order.

    Threads, not processes: OpenCV lets go of Python's lock while it decodes, resizes and encodes, which is
    nearly all of the time, no image has to travel between processes, and the index is there once. At most
    ``IN_FLIGHT_PER_WORKER`` results for each thread wait for one before them.
    """
    import cv2

    cv2.setNumThreads(1)  # One thread an image: the images are what is worked on in parallel.
    tasks: SimpleQueue[int | None] = SimpleQueue()
    done: SimpleQueue[tuple[int, _Result | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        while (number := tasks.get()) is not None:
            try:
                done.put((number, job(number), None))
            except BaseException as error:
                done.put((number, None, error))

    threads = [Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    ahead = workers * IN_FLIGHT_PER_WORKER
    try:
        for number in numbers[:ahead]:
            tasks.put(number)
        ready: dict[int, _Result] = {}
        for place, number in enumerate(numbers):
            while number not in ready:
                finished, result, error = done.get()
                if error is not None:
                    raise error
                ready[finished] = result  # type: ignore[assignment]
            if place + ahead < len(numbers):
                tasks.put(numbers[place + ahead])
            yield number, ready.pop(number)
    finally:
        with contextlib.suppress(Empty):
            while True:
                tasks.get_nowait()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()
