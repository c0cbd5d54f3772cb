"""Tar archives with links, devices, doubles, hidden names, lies about sizes, and damage."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

from fuzzing import damaged
from ilsvrc import tar_of, val_images, write_devkit

from faults.hostile_images import CLASSES, hostile_image

NAMES = (
    "{}/0.JPEG",
    "./{}/1.JPEG",
    "{}/._0.JPEG",
    "{}/.DS_Store",
    "__MACOSX/{}/._0.JPEG",
    "/{}/2.JPEG",
    "../{}/3.JPEG",
    "{}/../../4.JPEG",
    "{}//5.JPEG",
    "{}/" + "d/" * 60 + "6.JPEG",
    "{}/" + "n" * 180 + ".JPEG",
    "{}/ä\n.JPEG",
    "{}",
    "",
)
TARGETS = ("{}/0.JPEG", "0.JPEG", "../{}/0.JPEG", "/etc/passwd", "../../../etc/passwd", "link", "none", "")
KINDS = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.CONTTYPE,
    b"Z",
)
FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
VALIDATION_IMAGES = 4


def hostile_archive(folder: Path, dice: random.Random) -> tuple[Path, tuple[str, ...]]:
    """An archive in ``folder``, and the options of create_lmdb that belong to it."""
    kind = dice.choice(("classes", "tar of tars", "validation"))
    options: tuple[str, ...] = ("--max-bad", dice.choice(("0", "1000")))
    if kind == "classes":
        content = _tar(dice, [name for name in CLASSES for _ in range(dice.randint(1, 4))])
    elif kind == "tar of tars":
        content = tar_of({f"{name}.tar": _tar(dice, [name] * dice.randint(1, 3)) for name in CLASSES})
    else:
        content = tar_of(val_images(dice.choice((VALIDATION_IMAGES, VALIDATION_IMAGES + 1))))
        kit = write_devkit(folder, [0, 1, 2, 3])
        if dice.random() < 0.4:
            kit.write_bytes(_damaged(kit.read_bytes(), dice))
        options += ("--devkit", str(kit))
    if dice.random() < 0.3:
        content = damaged(content, [content], dice)
    if dice.random() < 0.1:
        content = gzip.compress(content, 1, mtime=0)
        content = _damaged(content, dice) if dice.random() < 0.5 else content
    path = folder / dice.choice(("images.tar", "images.tar.gz", "images"))
    path.write_bytes(content)
    return path, options


def _damaged(content: bytes, dice: random.Random) -> bytes:
    return damaged(content, [content], dice)


def _tar(dice: random.Random, classes: list[str]) -> bytes:
    """Images of these classes, one each, and members of every other kind."""
    form = dice.choice(FORMATS)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for number, name in enumerate(classes):
            usual = dice.random() < 0.7
            member = tarfile.TarInfo(f"{name}/{number}.JPEG" if usual else dice.choice(NAMES).format(name))
            if dice.random() < 0.2:
                member.type = dice.choice(KINDS)
                member.linkname = dice.choice(TARGETS).format(name)
            if form == tarfile.PAX_FORMAT and dice.random() < 0.1:
                member.pax_headers = dice.choice(
                    (
                        {"path": "x\ny"},
                        {"size": "-5"},
                        {"size": "99999999999999999999"},
                        {"GNU.sparse.map": "1,2"},
                    )
                )
            content = hostile_image(dice)
            member.size = len(content) if member.isreg() else 0
            try:
                tar.addfile(member, io.BytesIO(content))
            except ValueError:
                continue  # a name that this format cannot hold
    return stream.getvalue()
