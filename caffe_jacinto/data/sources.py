"""What the user gave (folder or archive; list, labels or development kit) -> images with labels."""

from __future__ import annotations

from pathlib import Path

from caffe_jacinto.data.archives import list_class_archive, list_flat_archive, list_from_archive
from caffe_jacinto.data.devkit import read_devkit
from caffe_jacinto.data.index import Folder, ImageIndex
from caffe_jacinto.data.listing import (
    check_folder_exists,
    list_class_folders,
    list_flat_folder,
    list_from_file,
    read_labels,
)
from caffe_jacinto.errors import UserError


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
