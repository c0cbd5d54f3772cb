"""`train --new`: a recipe for the data set in two LMDBs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.common.files import check_parent, write_new
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.listing import LABELS, read_labels
from caffe_jacinto.data.lmdb_reader import LmdbFacts, check_lmdb, highest_label
from caffe_jacinto.recipes.suggest import DataSet, Suggestion, suggest

SAMPLE = 500
"""Images of each LMDB that are decoded to learn their sizes."""

LARGE_IMAGES = 320
"""Pixels of the shorter side from which on a note recommends smaller images."""


def write_new_recipe(path: Path, train_lmdb: str, val_lmdb: str) -> list[str]:
    """Write a recipe for the data set in two LMDBs to ``path``; returns what to show the user.

    Raises:
        UserError: ``path`` exists or cannot be made, or the LMDBs are not a data set to train on. Nothing was
            written.
    """
    _check_new_file(path)
    names = _class_names(Path(train_lmdb), Path(val_lmdb))
    problems = []
    facts: dict[str, LmdbFacts] = {}
    for lmdb in (train_lmdb, val_lmdb):
        try:
            facts[lmdb] = check_lmdb(
                lmdb,
                num_classes=len(names) or None,
                min_images=1,
                min_size=1,
                sample=SAMPLE,
                training=lmdb == train_lmdb,
            )
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserErrors(problems)
    data = _data_set(path, train_lmdb, val_lmdb, names, facts)
    suggestion = suggest(data, path)
    try:
        write_new(path, suggestion.text)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise UserError(f"--new {path}: cannot be written: {error.strerror}") from None
    return _what_was_written(path, data, suggestion, facts)


def _check_new_file(path: Path) -> None:
    if not path.name:
        raise UserError(f"--new {path}: is a folder; name a file that ends in .toml")
    if path.suffix != ".toml":
        raise UserError(f"--new {path}: the name of a recipe ends in .toml; use {path.with_suffix('.toml')}")
    if path.exists() or path.is_symlink():
        raise _exists(path)
    check_parent(path, "--new ")


def _exists(path: Path) -> UserError:
    return UserError(f"--new {path}: this file exists already and is left as it is; give another name")


def _class_names(train: Path, val: Path) -> tuple[str, ...]:
    """The class names in the LMDBs' folders, which must be the same in both; none where there are none."""
    found = [(lmdb, read_labels(lmdb / LABELS)) for lmdb in (train, val) if (lmdb / LABELS).is_file()]
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise UserError(
            f"{train / LABELS} and {val / LABELS} name different classes, so a label has two meanings; "
            f"make {val} again with create_lmdb --labels {shlex.quote(str(train / LABELS))}"
        )
    return found[0][1] if found else ()


def _data_set(
    path: Path, train_lmdb: str, val_lmdb: str, names: tuple[str, ...], facts: dict[str, LmdbFacts]
) -> DataSet:
    train, val = facts[train_lmdb], facts[val_lmdb]
    classes = len(names) or 1 + max(highest_label(Path(lmdb)) for lmdb in (train_lmdb, val_lmdb))
    if classes < 2:
        raise UserError(
            f"all images in {train_lmdb} and {val_lmdb} have label 0; a classifier needs two classes"
        )
    return DataSet(
        name=data_set_name(train_lmdb, path),
        train_lmdb=train_lmdb,
        val_lmdb=val_lmdb,
        classes=classes,
        class_names=names,
        train_images=train.images,
        val_images=val.images,
        smallest=(min(train.height, val.height), min(train.width, val.width)),
        largest=(max(train.largest[0], val.largest[0]), max(train.largest[1], val.largest[1])),
    )


def data_set_name(lmdb: str, recipe: Path) -> str:
    """``flowers`` for ``data/flowers_train_lmdb``; for ``data/train_lmdb`` the name of the recipe."""
    of_lmdb = re.sub(r"[._-]?(lmdb|train|training)\b", "", Path(lmdb).absolute().name.replace("_", "-"))
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", of_lmdb).strip("-.") or re.sub(
        r"[^A-Za-z0-9._-]+", "-", recipe.stem
    )
    return name.lstrip("-._")[:64] or "mine"


def _what_was_written(
    path: Path, data: DataSet, suggestion: Suggestion, facts: dict[str, LmdbFacts]
) -> list[str]:
    notes = [note for found in facts.values() for note in found.notes]
    side = min(data.smallest)
    if side >= LARGE_IMAGES:
        notes.append(
            f"images of {side} pixels take {(side / 256) ** 2:.1f} times the time of 256; if that size "
            "shows the classes, make the LMDBs with create_lmdb --size 256 and the recipe from those"
        )
    if data.train_images < 100 * data.classes:
        notes.append(
            f"{data.train_images:,} images of {count_of(data.classes, 'class')} are few to start from random "
            "weights; fine-tuning a trained network may do better (docs/finetuning.md)"
        )
    command = shlex.join(["python", "-m", "caffe_jacinto.train", str(path)])
    return [
        f"{path}: a recipe for {count_of(data.train_images, 'image')} of {count_of(data.classes, 'class')}: "
        f"{suggestion.network}, in {count_of(suggestion.iterations, 'iteration')}, which see each "
        f"image about {suggestion.passes:.0f} times",
        *(f"  note: {note}" for note in notes),
        f"check it: {command} --dry-run",
        f"train it: {command}",
    ]
