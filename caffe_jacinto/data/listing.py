"""Which images there are and what label each one has: class folders, or a list file."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from caffe_jacinto.data.progress import count_text
from caffe_jacinto.errors import UserError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""What counts as an image in a class folder; a list file may name any file."""

MAX_KEY_BYTES = 511
"""LMDB's limit for a key as it is compiled everywhere (MDB_MAXKEYSIZE)."""

KEY_NUMBER_BYTES = 9
"""A key begins with eight digits and an underscore."""

_LIST_LINE = re.compile(r"(?P<path>.*\S)[ \t]+(?P<label>\S+)", re.DOTALL)


class Entry(NamedTuple):
    """One image: its path below the image folder, as it stands in the LMDB's key, and its label."""

    path: str
    label: int


@dataclass(frozen=True)
class Listing:
    """The images to store, in the order in which they are stored.

    Attributes:
        folder: what the entries' paths are relative to.
        entries: at least one.
        names: class names, line N for label N; None where only a list of numbers is known.
        source: how the labels were found, for messages ("10 class folders", "list val.txt").
        ignored: files in the class folders that are no images by their suffix, and folders in them.
    """

    folder: Path
    entries: Sequence[Entry]
    names: tuple[str, ...] | None
    source: str
    ignored: int = 0

    def shuffled(self, seed: int) -> Listing:
        """The same images in an order that depends on ``seed`` and the paths alone."""
        entries = list(self.entries)
        random.Random(seed).shuffle(entries)
        return replace(self, entries=entries)


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of a labels file: line N (from 0) is the name of label N.

    Raises UserError for a missing or empty file, a blank line between names, or a name that comes twice.
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
            raise UserError(f"{path}:{number}: class name {name!r} stands on line {seen[name]} already")
        seen[name] = number
    return tuple(names)


def list_class_folders(folder: Path, names: tuple[str, ...] | None = None) -> Listing:
    """The images of ``folder/<class>/*``, sorted by path.

    A class's label is the rank of its folder's name in sorted order, or its place in ``names`` if given.
    Hidden files and folders are left out.

    Raises UserError when the folder is missing or holds no class folders, when a class folder holds no
    images (without ``names``: its label would silently go unused), is not among ``names``, or has a name that
    cannot be a line of labels.txt.
    """
    files, folders = _look_into(folder)
    if not folders:
        raise UserError(_why_no_classes(folder, files))
    if names is None:
        _check_names(folder, folders)
        labels = {name: label for label, name in enumerate(folders)}
    else:
        labels = {name: label for label, name in enumerate(names)}
        unknown = [name for name in folders if name not in labels]
        if unknown:
            raise UserError(
                f"class folder {folder / unknown[0]} is not among the {len(names)} class names given"
                f"{_and_others(unknown)}: labels must agree with the training set's"
            )
    entries: list[Entry] = []
    empty: list[str] = []
    ignored = 0
    for name in folders:
        inside, nested = _look_into(folder / name)
        images = [file for file in inside if file.lower().endswith(IMAGE_SUFFIXES)]
        ignored += len(inside) - len(images) + len(nested)
        entries += [Entry(f"{name}/{file}", labels[name]) for file in images]
        if not images:
            empty.append(name)
    if not entries:
        raise UserError(
            f"no images in the {count_text(len(folders), 'class folder')} of {folder}: they are expected as"
            f" {folder}/<class>/*.JPEG"
        )
    if empty and names is None:
        raise UserError(
            f"class folder {folder / empty[0]} holds no images{_and_others(empty)}: fill it, or remove it"
            " so that the labels close up"
        )
    _check_keys(entries)
    return Listing(
        folder, entries, names or tuple(folders), count_text(len(folders), "class folder"), ignored
    )


def list_from_file(list_file: Path, folder: Path, names: tuple[str, ...] | None = None) -> Listing:
    """The images that ``list_file`` names, in its order: lines ``path label`` as convert_imageset takes them.

    Paths are relative to ``folder`` and may hold spaces: the label is what follows the last space.
    Blank lines are passed over.

    Raises UserError, with file and line, for a line without a label, a label that is not a whole number
    from 0, or one beyond ``names``.
    """
    if not folder.is_dir():
        raise UserError(_missing_folder(folder))
    entries: list[Entry] = []
    for number, line in enumerate(_read_lines(list_file, "list file"), start=1):
        if not line.strip():
            continue
        match = _LIST_LINE.fullmatch(line.rstrip())
        if match is None:
            raise UserError(f"{list_file}:{number}: {line!r} is not of the form 'path label'")
        label = match["label"]
        if not re.fullmatch(r"[0-9]{1,9}", label):
            raise UserError(f"{list_file}:{number}: label {label!r} is not a whole number from 0")
        if names is not None and int(label) >= len(names):
            raise UserError(
                f"{list_file}:{number}: label {int(label)} is beyond the {len(names)} class names given"
                f" (labels 0 to {len(names) - 1})"
            )
        entries.append(Entry(match["path"], int(label)))
    if not entries:
        raise UserError(f"list file {list_file} names no images: it holds lines of the form 'path label'")
    _check_keys(entries)
    return Listing(folder, entries, names, f"list {list_file}")


def _look_into(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in ``folder``, each sorted, hidden ones left out."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as inside:
            for item in inside:
                if not item.name.startswith("."):
                    (folders if _is_folder(item) else files).append(item.name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_missing_folder(folder)) from None
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}") from None
    return sorted(files), sorted(folders)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # A link that leads back to itself, for one: reading it tells what is wrong.
        return False


def _read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file; names that are not UTF-8 survive as they stand on the disk."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    # Not splitlines(): that would also split at characters that may stand in a file name.
    return [line.removesuffix("\r") for line in text.split("\n")]


def _missing_folder(folder: Path) -> str:
    what = "is not a folder" if folder.exists() else "does not exist"
    return f"image folder {folder} {what}: give the folder that holds the images"


def _why_no_classes(folder: Path, files: Sequence[str]) -> str:
    """What to tell a user whose image folder has no folders in it."""
    archives = [file for file in files if file.endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    if archives:
        return (
            f"{folder} holds archives ({archives[0]}{_and_others(archives)}) and no class folders:"
            f" extract each into a folder of its own, {folder}/<class>/"
        )
    if images:
        return (
            f"{folder} holds {count_text(len(images), 'image')} directly and no class folders: give a list"
            " file with their labels (--list), or sort them into <class>/ folders"
        )
    return f"{folder} holds no class folders: images are expected as {folder}/<class>/*.JPEG"


def _check_names(folder: Path, names: Sequence[str]) -> None:
    """Refuse class names that `read_labels` would not read back from labels.txt."""
    for name in names:
        if name != name.strip() or "\n" in name:
            raise UserError(
                f"class folder {folder}/{name!r}: a class name becomes a line of labels.txt, so it cannot"
                " hold a newline, nor spaces at its ends: rename the folder"
            )


def _and_others(names: Sequence[str]) -> str:
    return f" (and {count_text(len(names) - 1, 'other')})" if len(names) > 1 else ""


def _check_keys(entries: Sequence[Entry]) -> None:
    for entry in entries:
        # Measured only where it can matter: a character has at most four bytes.
        if len(entry.path) * 4 + KEY_NUMBER_BYTES > MAX_KEY_BYTES:
            size = len(os.fsencode(entry.path)) + KEY_NUMBER_BYTES
            if size > MAX_KEY_BYTES:
                raise UserError(
                    f"path {entry.path[:60]!r}… is too long for an LMDB key: {size} bytes with its number,"
                    f" {MAX_KEY_BYTES} at most"
                )
