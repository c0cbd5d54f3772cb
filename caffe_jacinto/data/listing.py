"""Images as files, and the label of each one: class folders, a list file, or one flat folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.index import Archive, Folder, ImageIndex, IndexBuilder

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""What counts as an image in a class folder; a list file may name any file."""

LABELS = "labels.txt"
"""The file of class names beside an LMDB: line N for label N."""

MAX_LABEL = 2**31 - 1
"""A Datum's label is an int32."""

_LIST_LINE = re.compile(rb"(?P<path>.*\S)[ \t]+(?P<label>\S+)", re.DOTALL)


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of a labels file: line N (from 0) is the name of label N.

    Raises:
        UserError: the file is missing or empty, has a blank line between names, or has a name twice.
    """
    names = [line.strip() for line in _read_lines(path, "labels file")]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"labels file {path} is empty: it holds one class name per line, line N for label N")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{path}:{number}: blank line between class names: every line is one label")
        if name in seen:
            raise UserError(f"{path}:{number}: class name {name!r} is on line {seen[name]} already")
        seen[name] = number
    return tuple(names)


def list_class_folders(folder: Path, names: tuple[str, ...] | None = None) -> ImageIndex:
    """The images of ``folder/<class>/*``, sorted by path.

    A class's label is the rank of its folder's name in sorted order, or its place in ``names`` if given.
    Hidden files and folders are left out.

    Raises:
        UserError: the folder is missing or holds no class folders; or a class folder holds no images (without
            ``names``: its label would silently go unused), is not among ``names``, or has a name that cannot
            be a line of labels.txt.
    """
    files, folders = _look_into(folder)
    if not folders:
        raise UserError(_why_no_classes(folder, files))
    labels = class_labels(folders, names, f"class folder {folder}/")
    build = IndexBuilder(Folder(folder))
    empty: list[str] = []
    ignored = 0
    for name in folders:
        inside, nested = _look_into(folder / name)
        images = [file for file in inside if is_image_name(file)]
        ignored += len(inside) - len(images) + len(nested)
        for file in images:
            build.add(os.fsencode(f"{name}/{file}"), labels[name])
        if not images:
            empty.append(name)
    if not len(build):
        raise UserError(
            f"no images in the {count_of(len(folders), 'class folder')} of {folder}: they are expected as"
            f" {folder}/<class>/*.JPEG"
        )
    if empty and names is None:
        raise UserError(
            f"class folder {folder / empty[0]} holds no images{and_others(empty)}: fill it, or remove it"
            " so that the labels close up"
        )
    return build.index(names or tuple(folders), count_of(len(folders), "class folder"), ignored)


def class_labels(classes: Sequence[str], names: tuple[str, ...] | None, what: str) -> dict[str, int]:
    """The label of each class: its rank in sorted order, or its place in ``names`` where they are given.

    Args:
        classes: sorted.
        what: the words before a class's name in messages.

    Raises:
        UserError: a class is not among ``names``, or cannot be a line of labels.txt.
    """
    if names is None:
        _check_names(classes, what)
        return {name: label for label, name in enumerate(classes)}
    labels = {name: label for label, name in enumerate(names)}
    unknown = [name for name in classes if name not in labels]
    if unknown:
        raise UserError(
            f"{what}{unknown[0]} is not among the {len(names)} class names given"
            f"{and_others(unknown)}: labels must agree with the training set's"
        )
    return labels


def list_from_file(
    list_file: Path, place: Folder | Archive, names: tuple[str, ...] | None = None
) -> ImageIndex:
    """The images that ``list_file`` names, in its order: lines ``path label`` as convert_imageset takes them.

    Paths are relative to ``place`` and may hold spaces: the label is what follows the last space.
    Blank lines are ignored.

    Raises:
        UserError: a line has no label, or its label is not a whole number from 0, or is beyond ``names``.
    """
    build = IndexBuilder(place)
    for _, (path, label) in list_lines(list_file, names):
        build.add(path, label)
    return build.index(names, f"list {list_file}")


def list_lines(
    list_file: Path, names: tuple[str, ...] | None, *, least: int = 0
) -> Iterator[tuple[int, tuple[bytes, int]]]:
    """The number of each line that is not blank, with its path and label; see `list_from_file`.

    Labels are ``least`` and above.
    """
    found = False
    try:
        with list_file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    found = True
                    yield number, _list_line(list_file, number, text.rstrip(), names, least)
    except OSError as error:
        what = f"cannot read list file {list_file}: {error.strerror}"
        raise UserError(f"{what}; correct its path where it is named") from None
    if not found:
        raise UserError(f"list file {list_file} names no images: it holds lines of the form 'path label'")


def list_flat_folder(folder: Path) -> ImageIndex:
    """The images directly in ``folder``, sorted by name, without labels.

    Raises:
        UserError: the folder is missing or holds no images.
    """
    files, folders = _look_into(folder)
    images = [file for file in files if is_image_name(file)]
    if not images:
        raise UserError(f"{folder} holds no images")
    build = IndexBuilder(Folder(folder))
    for file in images:
        build.add(os.fsencode(file), 0)
    return build.index(None, "a flat folder", len(files) - len(images) + len(folders))


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out by its name, as ``._<name>`` and ``__MACOSX`` of macOS are."""
    return name.startswith(".") or name == "__MACOSX"


def check_folder_exists(folder: Path) -> None:
    """Raises UserError unless ``folder`` is a folder."""
    if not folder.is_dir():
        raise UserError(_missing_folder(folder))


def _list_line(
    list_file: Path, number: int, line: bytes, names: tuple[str, ...] | None, least: int
) -> tuple[bytes, int]:
    match = _LIST_LINE.fullmatch(line)
    if match is None:
        raise UserError(f"{list_file}:{number}: {_shown(line)} is not of the form 'path label'")
    text = match["label"]
    if not re.fullmatch(rb"-?[0-9]+" if least < 0 else rb"[0-9]+", text):
        raise UserError(f"{list_file}:{number}: label {_shown(text)} is not a whole number from {least}")
    if len(text) > 20 or int(text) > MAX_LABEL:
        raise UserError(
            f"{list_file}:{number}: label {_shown(text)} is above {MAX_LABEL:,}, the largest possible"
        )
    label = int(text)
    if label < least:
        raise UserError(f"{list_file}:{number}: label {label} is below {least}, the least possible")
    if names is not None and label >= len(names):
        raise UserError(
            f"{list_file}:{number}: label {label} is beyond the {len(names)} class names given"
            f" (labels 0 to {len(names) - 1})"
        )
    return match["path"], label


def _shown(text: bytes) -> str:
    """Text of a list in quotes, at most its first 80 bytes."""
    return f"{os.fsdecode(text)!r}" if len(text) <= 80 else f"{os.fsdecode(text[:79])!r}…"


def _look_into(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in ``folder``, each sorted, hidden ones left out."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as inside:
            for item in inside:
                if not is_hidden(item.name):
                    (folders if _is_folder(item) else files).append(item.name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_missing_folder(folder)) from None
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}") from None
    return sorted(files), sorted(folders)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # For example a link to itself: reading it will report the reason.
        return False


def _read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file; names that are not UTF-8 are kept byte for byte."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    # Not splitlines(): that would also split at characters that a file name may contain.
    return [line.removesuffix("\r") for line in text.split("\n")]


def _missing_folder(folder: Path) -> str:
    what = "is not a folder" if folder.exists() else "does not exist"
    return f"image folder {folder} {what}: give the folder that holds the images"


def _why_no_classes(folder: Path, files: Sequence[str]) -> str:
    """The message about an image folder that has no folders in it."""
    archives = [file for file in files if file.endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    if archives:
        return (
            f"{folder} holds archives ({archives[0]}{and_others(archives)}) and no class folders:"
            f" give one archive itself, or extract each into a folder of its own, {folder}/<class>/"
        )
    if images:
        return (
            f"{folder} holds {count_of(len(images), 'image')} directly and no class folders: give a list"
            " file with their labels (--list), or sort them into <class>/ folders"
        )
    return f"{folder} holds no class folders: images are expected as {folder}/<class>/*.JPEG"


def _check_names(names: Sequence[str], what: str) -> None:
    """Refuse class names that `read_labels` would not read back from labels.txt."""
    for name in names:
        if name != name.strip() or "\n" in name:
            raise UserError(
                f"{what}{name!r}: a class name becomes a line of labels.txt, so it cannot"
                " hold a newline, nor spaces at its ends: rename the folder"
            )


def and_others(names: Sequence[str]) -> str:
    """' (and 2 others)', where a message shows only the first of ``names``."""
    return f" (and {count_of(len(names) - 1, 'other')})" if len(names) > 1 else ""
