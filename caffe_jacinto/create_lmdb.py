"""Put images into an LMDB that Caffe reads: class folders, lists, or ImageNet's archives as downloaded.

    python -m caffe_jacinto.create_lmdb --images ILSVRC2012_img_train.tar --output data/ilsvrc12_train_lmdb
    python -m caffe_jacinto.create_lmdb --images ILSVRC2012_img_val.tar \\
        --devkit ILSVRC2012_devkit_t12.tar.gz --output data/ilsvrc12_val_lmdb
    python -m caffe_jacinto.create_lmdb --images data/train --output data/train_lmdb
    python -m caffe_jacinto.create_lmdb --images data/val --list data/val.txt --output data/val_lmdb
    python -m caffe_jacinto.create_lmdb --mean data/train_lmdb data/mean.binaryproto
    python -m caffe_jacinto.create_lmdb --verify data/train_lmdb

Records are what Caffe's own convert_imageset stores with --encoded --encode_type jpg and the same size; the
mean image is what its compute_image_mean makes of an LMDB. The same command goes on after any interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.text import count_of, duration
from caffe_jacinto.data.lmdb_writer import MADE_FROM, check_free, new_lmdb
from caffe_jacinto.data.shards import Shard

if TYPE_CHECKING:
    from caffe_jacinto.data.create import Conversion
    from caffe_jacinto.data.encode import ImageForm
    from caffe_jacinto.data.index import ImageIndex
    from caffe_jacinto.data.lmdb_writer import LmdbWriter

DEFAULT_SEED = 33
"""Seed of the shuffle of classes."""

LARGEST_SIDE = 65_500
"""The longest side of a JPEG image that libjpeg writes, in pixels."""

MOST_WORKERS = 1024
"""More threads than any machine has a use for."""

SAMPLES, MOST_SAMPLES = 100, 10_000
"""Images on the page of --verify, if not said, and at most."""

MAX_BAD_SHARE, MAX_BAD_LEAST = 0.01, 10
"""Images that may be left out, if not said: this share of all, or this number if that is more."""


def main(arguments: Sequence[str]) -> int:
    """Read the arguments, make the LMDB, say what became of the images; returns the exit code."""
    options = _read(arguments)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    if options.mean:
        return _make_mean(options)
    if options.verify:
        return _verify(options)
    output: Path = options.shard.path(options.output) if options.shard else options.output
    if options.keep and output.exists():
        return _keep(output, options)
    check_free(output, options.force)  # Before minutes are spent on the images.
    return _join(output, options) if options.join else _make(output, options)


def _make(output: Path, options: argparse.Namespace) -> int:
    """Make an LMDB, or a shard of one, from images."""
    from caffe_jacinto.data.encode import limit_decoder

    limit_decoder()
    import cv2

    from caffe_jacinto.data.create import convert

    form = _form(options)
    index, order = _index(options)
    places = options.shard.places(len(index)) if options.shard else range(len(index))
    if not places:
        raise UserError(f"--shard {options.shard.text} holds none of {count_of(len(index), 'image')}")
    _announce(index, order, form, options)
    made_from = {
        "images": f"{len(index)}, {index.source}",
        "listing": index.digest(),
        "order": order,
        "form": form.text,
        "OpenCV": cv2.__version__,
        **({"shard": options.shard.text} if options.shard else {}),
    }
    start = time.monotonic()
    with (
        _telling_how_to_go_on(),
        new_lmdb(output, made_from, replace=options.force, restart=options.restart) as writer,
    ):
        _tell_resumed(writer, len(places))
        conversion = convert(
            index,
            places,
            form,
            writer,
            workers=options.workers,
            max_bad=_max_bad(options.max_bad, len(places)),
            name=output.name,
        )
        _add_made_from(writer, made_from)
    _summarize(conversion, output, time.monotonic() - start)
    if options.shard:
        _tell_next(options)
    return 0


def _join(output: Path, options: argparse.Namespace) -> int:
    """Make an LMDB of its shards."""
    from caffe_jacinto.data.shards import find_shards, join, made_from

    shards = find_shards(output)
    print(f"{output}: joining {count_of(len(shards), 'shard')}", flush=True)
    facts = made_from(shards)
    start = time.monotonic()
    joined = {**facts, "joined": count_of(len(shards), "shard")}
    with new_lmdb(output, joined, replace=options.force, restart=options.restart) as writer:
        images = join(shards, writer, output.name)
        _add_made_from(writer, facts)
    print(f"{output}: {count_of(images, 'image')}, in {duration(time.monotonic() - start)}")
    print(f"the shards may go: rm -r {shlex.quote(os.fspath(output))}.shard-*")
    return 0


def _add_made_from(writer: LmdbWriter, made_from: Mapping[str, str]) -> None:
    writer.add_file(MADE_FROM, json.dumps(made_from, indent=1) + "\n")


def _tell_resumed(writer: LmdbWriter, images: int) -> None:
    if writer.resumed:
        print(
            f"going on after an interruption: {writer.resumed:,} of {count_of(images, 'image')} were done"
            " and are checked",
            flush=True,
        )


def _tell_next(options: argparse.Namespace) -> None:
    output = shlex.quote(os.fspath(options.output))
    print(
        f"when all {options.shard.count} shards are there: python -m caffe_jacinto.create_lmdb --join"
        f" --output {output}"
    )


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, either of a new LMDB, of joining one, or of a mean image."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.mean:
        _refuse(parser, options, "making an LMDB, and --mean reads one", ("output", "join", *_MAKING))
        return options
    if options.verify:
        making = ("join", "force", "keep", "restart", *(name for name in _MAKING if name != "labels"))
        _refuse(parser, options, "making an LMDB, and --verify reads one", making)
        if options.sample and not options.output:
            parser.error("--sample makes a page: name it with --output page.html")
        return options
    _refuse(parser, options, "--verify", ("sample", "format"))
    if options.join:
        _refuse(parser, options, "making an LMDB from images, and --join takes its shards", _MAKING)
    missing = [
        f"--{name}"
        for name in ("images", "output")
        if getattr(options, name) is None and not (name == "images" and options.join)
    ]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if options.list and options.devkit:
        parser.error("--list and --devkit both say the labels: give one of them")
    if options.raw and options.quality != parser.get_default("quality"):
        parser.error("--quality is of JPEG files, and --raw stores none")
    return options


_MAKING = (
    *("images", "list", "labels", "devkit", "size", "shorter_side", "gray", "raw", "quality", "fast"),
    *("shuffle", "no_shuffle", "max_bad", "shard"),
)
"""The options of making an LMDB from images."""


def _refuse(
    parser: argparse.ArgumentParser, options: argparse.Namespace, why: str, names: Sequence[str]
) -> None:
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for {why}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m caffe_jacinto.create_lmdb",
        "Put images into an LMDB that Caffe reads, or make the mean image of an LMDB. After an interruption,"
        " the same\ncommand goes on.",
    )
    parser.add_argument("--output", type=Path, metavar="LMDB", help="the LMDB to make, a folder")
    _add_sources(parser.add_argument_group("images"))
    _add_form(parser.add_argument_group("what is stored"))
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help=f"store in a random order that SEED fixes (default for classes, seed {DEFAULT_SEED})",
    )
    order.add_argument(
        "--no-shuffle",
        action="store_true",
        help="store in the order of the list (its default), or of names (default with --devkit)",
    )
    parser.add_argument(
        "--max-bad",
        type=_share,
        metavar="N|P%",
        help="images that cannot be read and are left out, listed in skipped.txt: more of them are an error"
        f" (default: {100 * MAX_BAD_SHARE:.0f} %%, but at least {MAX_BAD_LEAST})",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="images worked on at a time (default: the cores this process may use)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="make only the I-th of N parts, LMDB.shard-I-of-N, one on each machine; then --join",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace an LMDB or OUT that is there already")
    existing.add_argument(
        "--keep",
        action="store_true",
        help="an LMDB of this size, or an OUT, that is there already is good: do nothing",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw away what an interrupted run left, instead of going on with it",
    )
    other = parser.add_argument_group("instead of making an LMDB from images")
    other.add_argument(
        "--join", action="store_true", help="join all shards LMDB.shard-*-of-N of --output LMDB into it"
    )
    other.add_argument(
        "--mean",
        type=Path,
        nargs=2,
        metavar=("LMDB", "OUT"),
        help="make the mean image of an LMDB, as the file OUT (like mean.binaryproto)",
    )
    other.add_argument(
        "--verify",
        type=Path,
        metavar="LMDB",
        help="read all of an LMDB, made by anyone, and say what is in it and what is wrong",
    )
    other.add_argument(
        "--sample",
        type=_samples,
        metavar="N",
        help=f"with --verify: show N images on the page --output (default with --output: {SAMPLES})",
    )
    other.add_argument(
        "--format", choices=["table", "json"], default="table", help="of what --verify says (default: table)"
    )
    return parser


def _add_sources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR|TAR",
        help="images as DIR/<class>/*, or an unopened tar archive of class folders or of a tar for each class"
        " (ILSVRC2012_img_train.tar), labels being the rank of the class's name in sorted order; or, with"
        " --list or --devkit, the folder or archive that holds the images",
    )
    group.add_argument(
        "--list", type=Path, metavar="FILE", help="lines 'path label' (the label after the last space)"
    )
    group.add_argument(
        "--devkit",
        type=Path,
        metavar="TAR.GZ",
        help="ILSVRC's development kit (ILSVRC2012_devkit_t12.tar.gz): the images are its validation set",
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="class names, line N for label N (the labels.txt in the training set's LMDB); classes then get"
        " their label from it",
    )


def _add_form(group: argparse._ArgumentGroup) -> None:
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--size",
        type=_size,
        default=(256, 256),
        metavar="N|WxH|original",
        help="resize every image to N x N, or to width x height pixels; 'original' resizes none and stores"
        " JPEG files as they are (default: 256)",
    )
    size.add_argument(
        "--shorter-side",
        type=_side,
        metavar="N",
        help="resize so that the shorter side has N pixels, the aspect kept (training then needs a crop)",
    )
    group.add_argument("--gray", action="store_true", help="one channel (default: colour, three channels)")
    group.add_argument("--raw", action="store_true", help="store pixels as they are (default: as JPEG)")
    group.add_argument(
        "--quality", type=_quality, default=95, metavar="Q", help="of the JPEG stored, 1 to 100 (default: 95)"
    )
    group.add_argument(
        "--fast",
        action="store_true",
        help="JPEG files much larger than the size stored are scaled while they are decoded: faster, and a"
        " little softer than convert_imageset's",
    )


def _size(text: str) -> tuple[int, int]:
    if text == "original":
        return 0, 0
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a size: give 256, 320x240 (width x height), or original"
        )
    return width, height


def _side(text: str) -> int:
    return _number(text, LARGEST_SIDE)


def _samples(text: str) -> int:
    return _number(text, MOST_SAMPLES)


def _workers(text: str) -> int:
    return _number(text, MOST_WORKERS)


def _quality(text: str) -> int:
    return _number(text, 100)


def _number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {most}")
    return int(text)


def _share(text: str) -> tuple[float, bool]:
    """A number of images, or a percentage of them: the number, and whether it is a percentage."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(%?)", text)
    if match is None or (not match[2] and "." in text) or (match[2] and float(match[1]) > 100):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a number of images, nor a percentage: give 100, or 0.5%"
        )
    return float(match[1]), bool(match[2])


def _max_bad(share: tuple[float, bool] | None, images: int) -> int:
    if share is None:
        return max(MAX_BAD_LEAST, int(images * MAX_BAD_SHARE))
    number, percent = share
    return int(images * number / 100) if percent else int(number)


def _shard(text: str) -> Shard:
    match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a shard: give 1/4 to 4/4 for four of them")
    return Shard(int(match[1]), int(match[2]))


def _form(options: argparse.Namespace) -> ImageForm:
    from caffe_jacinto.data.encode import ImageForm

    width, height = (0, 0) if options.shorter_side else options.size
    return ImageForm(
        width,
        height,
        colour=not options.gray,
        shorter=options.shorter_side or 0,
        raw=options.raw,
        quality=options.quality,
        fast=options.fast,
    )


def _index(options: argparse.Namespace) -> tuple[ImageIndex, str]:
    """The images in the order in which they are stored, and that order in words."""
    from caffe_jacinto.data.create import find_images

    index = find_images(options.images, list_file=options.list, labels=options.labels, devkit=options.devkit)
    seed: int | None = options.shuffle
    if seed is None and not (options.no_shuffle or options.list or options.devkit):
        seed = DEFAULT_SEED
    if seed is None:
        return index, "in the list's order" if options.list else "sorted by name"
    return index.shuffled(seed), f"shuffled with seed {seed}"


def _announce(index: ImageIndex, order: str, form: ImageForm, options: argparse.Namespace) -> None:
    ignored = f" ({count_of(index.ignored, 'other item')} left out)" if index.ignored else ""
    shard = f"shard {options.shard.text}, " if options.shard else ""
    print(
        f"{index.place.path}: {count_of(len(index), 'image')}, {index.source}{ignored}, {order}, {shard}"
        f"{form.text}, {options.workers} at a time",
        flush=True,
    )


def _summarize(conversion: Conversion, output: Path, seconds: float) -> None:
    print(
        f"{output}: {count_of(conversion.images, 'image')}, {conversion.record_bytes / 1e6:,.1f} MB,"
        f" in {duration(seconds)} ({conversion.done / seconds:,.0f} images/s)",
        flush=True,
    )
    if conversion.skipped:
        first = conversion.skipped[0]
        print(
            f"warning: {count_of(len(conversion.skipped), 'image')} left out, listed in"
            f" {output / 'skipped.txt'}; the first, {first.path}: {first.reason}",
            file=sys.stderr,
        )
        reasons = Counter(image.reason for image in conversion.skipped)
        if len(reasons) > 1:
            for reason, count in reasons.most_common(10):
                print(f"  {count:,}: {reason}", file=sys.stderr)


def _keep(output: Path, options: argparse.Namespace) -> int:
    """Say what is in an LMDB that is there already, if its images are of the size and kind asked for."""
    from caffe_jacinto.data.lmdb_reader import check_lmdb

    size: tuple[int, int] = options.size
    channels = 1 if options.gray else 3
    facts = check_lmdb(str(output), num_classes=None, min_images=1, min_size=1, sample=8, channels=channels)
    fixed = size != (0, 0) and not options.shorter_side and not options.join
    if fixed and (facts.width, facts.height) != size:
        raise UserError(
            f"LMDB {output} holds images of {facts.width}x{facts.height} pixels, not {size[0]}x{size[1]}:"
            " --force replaces it"
        )
    made = _form_of_made(output)
    if made is not None and not options.join and made != _form(options).text:
        raise UserError(
            f"LMDB {output} was made as {made}, not as {_form(options).text}: --force replaces it"
        )
    print(
        f"{output}: kept, {count_of(facts.images, 'image')} of {facts.width}x{facts.height}"
        " (--force makes it again)"
    )
    return 0


def _form_of_made(output: Path) -> str | None:
    """The form that an LMDB's own record says; None where it has none."""
    try:
        form = json.loads((output / MADE_FROM).read_text()).get("form")
    except (OSError, ValueError, AttributeError):
        return None
    return form if isinstance(form, str) else None


def _verify(options: argparse.Namespace) -> int:
    """Say what is in an LMDB; the exit code is 1 where it is not fit for training."""
    from caffe_jacinto.data import verify_report
    from caffe_jacinto.data.verify import verify_lmdb

    page: Path | None = options.output
    if page is not None:
        verify_report.check_page(page)  # Before minutes are spent on the records.
    sample = (options.sample or SAMPLES) if page is not None else 0
    found = verify_lmdb(options.verify, workers=options.workers, labels=options.labels, sample=sample)
    if options.format == "json":
        print(verify_report.as_json(found), flush=True)
    else:
        verify_report.show(found, sys.stdout)
    if page is not None:
        verify_report.write_page(found, page)
        if options.format != "json":
            print(f"{page}: {count_of(len(found.samples), 'image')} with their labels")
    return 1 if found.errors else 0


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
        f"{output}: mean of {count_of(mean.images, 'image')}, {width}x{height},"
        f" {count_of(channels, 'channel')} with means"
        f" {', '.join(f'{value:.2f}' for value in mean.image.mean(axis=(1, 2), dtype=float))},"
        f" in {duration(time.monotonic() - start)}"
    )
    return 0


@contextlib.contextmanager
def _telling_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("stopped; start the same command again to go on where it was", file=sys.stderr)
        raise


def _stop(signal_number: int, _frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C: threads are waited for, and what is stored so far stays."""
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.create_lmdb", main))
