"""Seventy thousand real images in ImageNet's layout: Fashion-MNIST, ten classes of clothing.

    python -m caffe_jacinto.data.fashion --output data/fashion

writes, from the IDX files of Debian's package dataset-fashion-mnist (28x28 pixels, grey), as PNG files:

    data/fashion/train/<class>/<class>_<n>.png     55,000 images, 5,500 of each class
    data/fashion/val/fashion_val_<n>.png           5,000 of the training images, 500 of each class, held out
    data/fashion/test/fashion_test_<n>.png         the 10,000 test images, in the order of their file
    data/fashion/train.txt, val.txt, test.txt      lines 'path label', as Caffe's ImageNet lists
    data/fashion/labels.txt                        class names, line N for label N

Compare settings by the held-out images, and look at the test images once, at the end. ``--held-out 0`` trains
on all 60,000 images; val/ then has the test images, and there is no test/. Labels are the published ones.
"""

from __future__ import annotations

import gzip
import math
import random
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.arguments import Parser, not_empty, whole_number
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.files import check_parent
from caffe_jacinto.data.image_set import Part, check_image_set, write_image_set

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "dataset-fashion-mnist"
SOURCE = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts its files."""

CLASSES = (
    *("0_tshirt", "1_trouser", "2_pullover", "3_dress", "4_coat"),
    *("5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle_boot"),
)
"""By label; a class's label in ImageNet's layout is the rank of its folder's name."""

HELD_OUT_PER_CLASS = 500
MOST_HELD_OUT = 5000
SEED = 33

MOST_BYTES = 1 << 30
"""A larger IDX file is refused: the data set's own have 47 MB."""


def main(arguments: Sequence[str]) -> int:
    """Write the data set where there is none yet; returns the exit code."""
    parser = Parser(
        "python -m caffe_jacinto.data.fashion",
        "Write Fashion-MNIST, 70,000 images of clothing, as PNG files in ImageNet's layout.",
    )
    parser.add_argument("--output", type=Path, default=Path("data/fashion"), metavar="DIR")
    parser.add_argument(
        "--source",
        type=not_empty,
        default=str(SOURCE),
        metavar="DIR",
        help=f"the folder of the gzipped IDX files (default: %(default)s, of Debian's package {PACKAGE})",
    )
    parser.add_argument(
        "--held-out",
        type=whole_number(0, MOST_HELD_OUT),
        default=HELD_OUT_PER_CLASS,
        metavar="N",
        help="training images of each class that val/ gets instead of train/, to compare settings by "
        "(default: %(default)s); 0: val/ has the test images",
    )
    given = parser.parse_args(arguments)
    output: Path = given.output
    parts = ("train", "val", "test") if given.held_out else ("train", "val")
    if output.exists():
        expected: dict[str, int | None] = dict.fromkeys(parts)
        if given.held_out:
            expected["val"] = given.held_out * len(CLASSES)
        check_image_set(output, expected, "Fashion-MNIST")
        if not given.held_out and (output / "test").exists():
            raise UserError(f"{output} exists with images held out: remove it or choose another folder")
        print(f"{output}: kept, it is complete")
        return 0
    counts = write_fashion(output, Path(given.source), given.held_out)
    shown = ", ".join(f"{count:,} in {part}/" for part, count in counts.items())
    print(f"{output}: images of {len(CLASSES)} classes: {shown}")
    return 0


def write_fashion(output: Path, source: Path, held_out: int) -> dict[str, int]:
    """Write the data set to ``output``, whole or not at all; returns the number of images in each part.

    ``held_out`` training images of each class are in val/.

    Raises:
        UserError: the parent folder is missing, or a file of ``source`` is missing or damaged.
        RunFailed: ``output`` cannot be written to.
    """
    check_parent(output)
    images, labels = read_part(source, "train")
    test_images, test_labels = read_part(source, "t10k")
    train, val = split(labels.tolist(), held_out)
    names = [f"{CLASSES[label]}/{CLASSES[label]}_{n}.png" for n, label in enumerate(labels.tolist())]
    parts = {"train": _part(images, labels, {names[index]: index for index in train})}
    if held_out:
        parts["val"] = _part(images, labels, _numbered("val", val))
    last = "test" if held_out else "val"
    parts[last] = _part(test_images, test_labels, _numbered(last, range(len(test_labels))))
    write_image_set(output, CLASSES, parts)
    return {name: len(part.labels) for name, part in parts.items()}


def split(labels: Sequence[int], held_out: int) -> tuple[list[int], list[int]]:
    """The numbers of the training images, in order, and of the held-out ones, in random order.

    ``held_out`` of each class are chosen by a fixed seed. No two images of Fashion-MNIST are equal, so that
    no held-out image is trained on.

    Raises:
        UserError: a class has no more than ``held_out`` images.
    """
    chooser = random.Random(SEED)
    chosen: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, of in enumerate(labels) if of == label]
        if len(members) <= held_out:
            raise UserError(
                f"--held-out {held_out}: class {CLASSES[label]} has only {len(members)} training images, and "
                "some must be left to train on"
            )
        chosen += chooser.sample(members, held_out)
    chooser.shuffle(chosen)
    apart = set(chosen)
    return [index for index in range(len(labels)) if index not in apart], chosen


def read_part(source: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images, N x height x width, white on black, and their N labels; ``name`` is "train" or "t10k".

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST (arXiv:1708.07747).

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    image_file = source / f"{name}-images-idx3-ubyte.gz"
    label_file = source / f"{name}-labels-idx1-ubyte.gz"
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise UserError(f"{label_file}: has {len(labels):,} labels for {len(images):,} images; {_AGAIN}")
    if labels.max() >= len(CLASSES):
        where = int((labels >= len(CLASSES)).argmax())
        raise UserError(
            f"{label_file}: label {labels[where]} of image {where} is above {len(CLASSES) - 1}; {_AGAIN}"
        )
    return images, labels


_AGAIN = f"install it again: apt-get install --reinstall {PACKAGE}"


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The numbers in a gzipped IDX file of unsigned bytes, in its own shape.

    The form (http://yann.lecun.com/exdb/mnist): 0, 0, the type (8: unsigned byte), the number of dimensions;
    the length of each as a big-endian 32-bit integer; the numbers.

    Raises:
        UserError: the file is missing, damaged, or of another type, shape or length.
    """
    import numpy as np

    try:
        with gzip.open(path) as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(f"{path}: is not an IDX file of bytes in {dimensions} dimensions; {_AGAIN}")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            if not 0 < size <= MOST_BYTES:
                sides = " x ".join(map(str, shape))
                raise UserError(f"{path}: {sides} bytes cannot be Fashion-MNIST; {_AGAIN}")
            content = file.read(size + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; install it: apt-get install {PACKAGE}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be read ({reason}); {_AGAIN}") from None
    if len(content) != size:
        less = "fewer" if len(content) < size else "more"
        raise UserError(f"{path}: has {less} than the {size:,} bytes that its head states; {_AGAIN}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _numbered(part: str, indices: Sequence[int]) -> dict[str, int]:
    return {f"fashion_{part}_{n:08d}.png": index for n, index in enumerate(indices, start=1)}


def _part(images: NDArray[np.uint8], labels: NDArray[np.uint8], files: Mapping[str, int]) -> Part:
    """A part of these files; each is the image of a number."""
    by_path = {path: int(labels[index]) for path, index in files.items()}
    return Part(by_path, lambda path: _png(images[files[path]]))


def _png(image: NDArray[np.uint8]) -> bytes:
    import cv2

    _, encoded = cv2.imencode(".png", image)
    return encoded.tobytes()


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.data.fashion", main))
