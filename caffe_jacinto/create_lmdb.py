"""Put a folder of images into an LMDB that Caffe reads.

    python -m caffe_jacinto.create_lmdb --images data/ilsvrc12/train --output data/ilsvrc12_train_lmdb
    python -m caffe_jacinto.create_lmdb --images data/ilsvrc12/val --list data/ilsvrc12/val.txt \\
        --labels data/ilsvrc12_train_lmdb/labels.txt --output data/ilsvrc12_val_lmdb
    python -m caffe_jacinto.create_lmdb --mean data/ilsvrc12_train_lmdb data/ilsvrc12_mean.binaryproto

Records are what Caffe's own convert_imageset stores with --encoded --encode_type jpg and the same size; the
mean image is what its compute_image_mean makes of an LMDB.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from caffe_jacinto.data.lmdb_writer import check_free
from caffe_jacinto.data.progress import count_text, time_text
from caffe_jacinto.errors import Parser, UserError, run_command

if TYPE_CHECKING:
    from caffe_jacinto.data.convert import Conversion
    from caffe_jacinto.data.encode import ImageForm
    from caffe_jacinto.data.listing import Listing

DEFAULT_SEED = 33
"""Seed of the shuffle of class folders."""

LARGEST_SIDE = 65_500
"""The longest side of a JPEG image that libjpeg writes, in pixels."""

MOST_WORKERS = 1024
"""More threads than any machine has a use for."""


def main(arguments: Sequence[str]) -> int:
    """Read the arguments, make the LMDB, say what became of the images; returns the exit code."""
    options = _read(arguments)
    signal.signal(signal.SIGTERM, _stop)
    if options.mean:
        return _make_mean(options)
    output: Path = options.output
    if options.keep and output.exists():
        return _keep(output, options)
    check_free(output, options.force)  # Before minutes are spent on the images.
    from caffe_jacinto.data.convert import convert
    from caffe_jacinto.data.encode import ImageForm

    width, height = options.size
    form = ImageForm(width, height, colour=not options.gray)
    listing, order = _listing(options)
    _announce(listing, order, form, options.workers)
    start = time.monotonic()
    conversion = convert(listing, output, form, workers=options.workers, replace=options.force)
    _summarize(conversion, output, time.monotonic() - start)
    return 0


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, either of a new LMDB or of a mean image."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.mean:
        missing = [name for name in ("images", "output") if getattr(options, name) is None]
        if missing:
            names = ", ".join(f"--{name}" for name in missing)
            parser.error(f"the following arguments are required: {names}")
        return options
    for name in ("images", "output", "list", "labels", "size", "shuffle", "no_shuffle", "gray"):
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for making an LMDB, and --mean reads one")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m caffe_jacinto.create_lmdb",
        "Put a folder of images into an LMDB that Caffe reads, or make the mean image of an LMDB.",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="images as DIR/<class>/*, labels being the rank of the class's name in sorted order;"
        " or, with --list, the folder that the list's paths start from",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the LMDB to make")
    parser.add_argument(
        "--mean",
        type=Path,
        nargs=2,
        metavar=("LMDB", "OUT"),
        help="make no LMDB, but the mean image of one, as the file OUT (like mean.binaryproto)",
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="lines 'path label' (the label after the last space)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="class names, line N for label N (the labels.txt in the training set's LMDB); class folders"
        " then get their label from it",
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=(256, 256),
        metavar="N|WxH",
        help="resize every image to N x N, or to width x height pixels (default: 256)",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help=f"store in a random order that SEED fixes (default for class folders, seed {DEFAULT_SEED})",
    )
    order.add_argument(
        "--no-shuffle", action="store_true", help="store in the order of the list (its default) or of names"
    )
    parser.add_argument("--gray", action="store_true", help="one channel (default: colour, three channels)")
    parser.add_argument(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="images worked on at a time (default: the cores this process may use)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace an LMDB or OUT that is there already")
    existing.add_argument(
        "--keep",
        action="store_true",
        help="an LMDB of this size, or an OUT, that is there already is good: do nothing",
    )
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a size: give 256, or 320x240 (width x height)"
        )
    return width, height


def _workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {MOST_WORKERS}")
    return int(text)


def _listing(options: argparse.Namespace) -> tuple[Listing, str]:
    """The images in the order in which they are stored, and that order in words."""
    from caffe_jacinto.data.listing import list_class_folders, list_from_file, read_labels

    names = read_labels(options.labels) if options.labels else None
    seed: int | None = options.shuffle
    if options.list:
        listing = list_from_file(options.list, options.images, names)
    else:
        listing = list_class_folders(options.images, names)
        if seed is None and not options.no_shuffle:
            seed = DEFAULT_SEED
    if seed is None:
        return listing, "in the list's order" if options.list else "sorted by name"
    return listing.shuffled(seed), f"shuffled with seed {seed}"


def _announce(listing: Listing, order: str, form: ImageForm, workers: int) -> None:
    ignored = f" ({count_text(listing.ignored, 'other item')} left out)" if listing.ignored else ""
    print(
        f"{listing.folder}: {count_text(len(listing.entries), 'image')}, {listing.source}{ignored}, {order},"
        f" {form.width}x{form.height} {'colour' if form.colour else 'gray'}, {workers} at a time",
        flush=True,
    )


def _summarize(conversion: Conversion, output: Path, seconds: float) -> None:
    print(
        f"{output}: {count_text(conversion.images, 'image')}, {conversion.record_bytes / 1e6:,.1f} MB,"
        f" in {time_text(seconds)} ({conversion.images / seconds:,.0f} images/s)",
        flush=True,
    )
    if conversion.skipped:
        first = conversion.skipped[0]
        print(
            f"warning: {count_text(len(conversion.skipped), 'image')} left out, listed in"
            f" {output / 'skipped.txt'}; the first, {first.path}: {first.reason}",
            file=sys.stderr,
        )


def _keep(output: Path, options: argparse.Namespace) -> int:
    """Say what is in an LMDB that is there already, if its images are of the size and kind asked for."""
    from caffe_jacinto.data.check import check_lmdb

    size: tuple[int, int] = options.size
    channels = 1 if options.gray else 3
    facts = check_lmdb(str(output), num_classes=None, min_images=1, min_size=1, sample=8, channels=channels)
    if (facts.width, facts.height) != size:
        raise UserError(
            f"LMDB {output} holds images of {facts.width}x{facts.height} pixels, not {size[0]}x{size[1]}:"
            " --force replaces it"
        )
    print(
        f"{output}: kept, {count_text(facts.images, 'image')} of {facts.width}x{facts.height}"
        " (--force makes it again)"
    )
    return 0


def _make_mean(options: argparse.Namespace) -> int:
    """Write the mean image of an LMDB."""
    lmdb, output = options.mean
    if options.keep and output.is_file():
        print(f"{output}: kept (--force makes it again)")
        return 0
    from caffe_jacinto.data.mean import check_place, mean_image, write_mean

    check_place(output, replace=options.force)
    start = time.monotonic()
    mean = mean_image(lmdb, workers=options.workers)
    write_mean(mean, output)
    channels, height, width = mean.image.shape
    print(
        f"{output}: mean of {count_text(mean.images, 'image')}, {width}x{height},"
        f" {count_text(channels, 'channel')} with means"
        f" {', '.join(f'{value:.2f}' for value in mean.image.mean(axis=(1, 2), dtype=float))},"
        f" in {time_text(time.monotonic() - start)}"
    )
    return 0


def _stop(signal_number: int, _frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C: what has been written so far is removed on the way out."""
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.create_lmdb", main))
