"""What the user gave (folder or archive; list, labels or development kit) -> images with labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.progress import image_progress
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.archives import list_class_archive, list_flat_archive, list_from_archive
from caffe_jacinto.data.datum import ahead
from caffe_jacinto.data.devkit import read_devkit
from caffe_jacinto.data.encode import ImageForm, UnreadableImageError, image_record
from caffe_jacinto.data.index import Folder, ImageIndex
from caffe_jacinto.data.journal import Skipped
from caffe_jacinto.data.listing import (
    check_folder_exists,
    list_class_folders,
    list_flat_folder,
    list_from_file,
    read_labels,
)
from caffe_jacinto.data.lmdb_writer import SKIPPED, LmdbWriter


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
        writer.add_file("labels.txt", "".join(f"{name}\n" for name in index.names))
    return Conversion(writer.images, writer.record_bytes, tuple(writer.skipped), writer.resumed, len(left))


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


def find_images(
    images: Path, *, list_file: Path | None = None, labels: Path | None = None, devkit: Path | None = None
) -> ImageIndex:
    """The images below ``images``, a folder or a tar archive, in the order of their names or of the list.

    Args:
        list_file: names the images and their labels; without it and ``devkit`` they come from classes.
        labels: the class names, line N for label N.
        devkit: ILSVRC's development kit; the images are its validation set.

    Raises UserError for whatever is missing, unfit or contradictory.
    """
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
