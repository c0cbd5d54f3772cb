"""Writes image data sets as files in ImageNet's layout, whole or not at all, and checks what is there.

FOLDER/train/<class>/...     one folder for each class
FOLDER/<part>/...            other parts: all images together
FOLDER/<part>.txt            lines 'path label', as Caffe's ImageNet lists
FOLDER/labels.txt            class names, line N for label N
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.files import check_parent, sync_folder
from caffe_jacinto.data.listing import LABELS


@dataclass(frozen=True)
class Part:
    """The images of one part of a data set: the label of each, by its path in the part's folder."""

    labels: Mapping[str, int]
    content: Callable[[str], bytes]
    """The file's content, by the same path."""


def write_image_set(output: Path, classes: Sequence[str], parts: Mapping[str, Part]) -> None:
    """Write a data set to ``output``; ``parts`` are by name.

    Raises:
        UserError: the parent folder is missing.
        RunFailed: it cannot be written to.
    """
    check_parent(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name, part in parts.items():
            _write_part(partial, name, part)
        (partial / LABELS).write_text("".join(f"{name}\n" for name in classes))
        partial.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{output} could not be written: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_part(folder: Path, name: str, part: Part) -> None:
    for below in {Path(path).parent for path in part.labels}:
        (folder / name / below).mkdir(parents=True, exist_ok=True)
    for path in part.labels:
        (folder / name / path).write_bytes(part.content(path))
    lines = (f"{path} {label}\n" for path, label in sorted(part.labels.items()))
    (folder / f"{name}.txt").write_text("".join(lines))


def check_image_set(output: Path, parts: Mapping[str, int | None], what: str) -> None:
    """Raise UserError unless every image is there that the lists of ``parts`` name.

    ``parts`` has the number of images of each part, or None where any will do; ``what`` is the set's name in
    the message.
    """
    for part, expected in parts.items():
        try:
            lines = (output / f"{part}.txt").read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        missing = [line for line in lines if not _has_content(output / part / line.rpartition(" ")[0])]
        if not lines or missing:
            lacks = f"{part}/{missing[0].rpartition(' ')[0]}" if missing else f"{part}.txt"
            raise UserError(
                f"{output} exists and is not the whole set of {what} ({lacks} is missing): remove it"
                " or choose another folder"
            )
        if expected is not None and len(lines) != expected:
            raise UserError(
                f"{output} exists with {len(lines):,} images in {part}/, and {expected:,} are requested:"
                " remove it or choose another folder"
            )


def _has_content(path: Path) -> bool:
    # Files are not synced one by one: after a power cut some may exist and be empty.
    return path.is_file() and path.stat().st_size > 0
