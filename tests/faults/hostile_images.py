"""Folders of images, odd, bad and damaged, and lists as people and programs write them."""

from __future__ import annotations

import random
from pathlib import Path

from bad_images import BAD, ODD, encoded, photograph
from fuzzing import damaged

CLASSES = ("ant", "bee", "cat")
SOUND = [encoded(photograph()), encoded(photograph(), ".png"), *(image.content for image in ODD.values())]
STRANGE_NAMES = (
    "a b.JPEG",
    "-x.JPEG",
    "ü\udcff.jpg",
    "new\nline.jpg",
    "'quote\".jpg",
    ".hidden.jpg",
    "x" * 200,
)


def hostile_image(dice: random.Random) -> bytes:
    """The content of a file that is named as an image."""
    kind = dice.random()
    if kind < 0.3:
        return dice.choice(SOUND)
    if kind < 0.4:
        return dice.choice(list(BAD.values())).content
    return damaged(dice.choice(SOUND), SOUND, dice)


def hostile_folder(folder: Path, dice: random.Random) -> Path:
    """Class folders with a few images each."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(dice.choice((0, 2, 3, 3, 4, 4, 4, 5))):
            strange = dice.random() < 0.2
            file = dice.choice(STRANGE_NAMES) if strange else f"{number}.JPEG"
            (folder / name / file).write_bytes(hostile_image(dice))
    for link, target in (("loop", "."), ("nowhere", "none"), ("other.JPEG", "../ant")):
        if dice.random() < 0.1:
            (folder / dice.choice(CLASSES) / link).symlink_to(target)
    return folder


def hostile_list(folder: Path, dice: random.Random) -> bytes:
    """A list of the images in ``folder``, with the faults of lists."""
    names = [
        str(path.relative_to(folder)).encode(errors="surrogateescape") for path in folder.rglob("*.JPEG")
    ]
    lines = [name + b" %d" % dice.randrange(3) for name in names]
    strange = (
        b"",
        b"   ",
        b"# comment",
        b"ant\\0.JPEG 0",
        b"C:/images/0.JPEG 1",
        b"ant/0.JPEG 0 1",
        b"ant/0.JPEG",
        b"ant/0.JPEG -1",
        b"ant/0.JPEG 2147483647",
        b"ant/0.JPEG 2147483648",
        b"ant/0.JPEG 1.5",
        b"../../../etc/passwd 0",
        b"/dev/zero 0",
        b"/dev/stdin 1",
        b"ant 0",
        b"\xff\xfe 0",
        b"ant/0.JPEG\t0",
        b"x" * 5000 + b" 0",
        b"none.JPEG 0",
    )
    for _ in range(dice.choice((0, 1, 1, 3))):
        lines.insert(dice.randrange(len(lines) + 1), dice.choice(strange))
    text = dice.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)
    if dice.random() < 0.2:
        text = b"\xef\xbb\xbf" + text
    if dice.random() < 0.1:
        text = text.decode("latin-1").encode("utf-16")
    return damaged(text, [text], dice) if text and dice.random() < 0.2 else text
