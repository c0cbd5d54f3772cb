"""Put images into an LMDB that Caffe reads: class folders, lists, or ImageNet's archives as downloaded.

    python -m caffe_jacinto.create_lmdb --images ILSVRC2012_img_train.tar --output data/ilsvrc12_train_lmdb
    python -m caffe_jacinto.create_lmdb --images ILSVRC2012_img_val.tar \\
        --devkit ILSVRC2012_devkit_t12.tar.gz --output data/ilsvrc12_val_lmdb
    python -m caffe_jacinto.create_lmdb --images data/train --output data/train_lmdb
    python -m caffe_jacinto.create_lmdb --images data/val --list data/val.txt --output data/val_lmdb
    python -m caffe_jacinto.create_lmdb --mean data/train_lmdb data/mean.binaryproto
    python -m caffe_jacinto.create_lmdb --verify data/train_lmdb

Records are those that Caffe's convert_imageset stores with --encoded --encode_type jpg and the same size; the
mean image is that of its compute_image_mean. After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from caffe_jacinto.common.arguments import LARGEST_SIDE, Parser, image_size, whole_number
from caffe_jacinto.common.errors import run_command

SAMPLES, MOST_SAMPLES = 100, 10_000
"""Images on the page of --verify: the default, and the most."""

_HELP = {
    "--output": "the LMDB to make, a folder",
    "--images": "images as DIR/<class>/*, or an unopened tar archive of class folders or of a tar for each"
    " class (ILSVRC2012_img_train.tar), a class's label being the rank of its name in sorted order; with"
    " --list or --devkit, the folder or archive that holds the images",
    "--list": "lines 'path label' (the label follows the last space)",
    "--devkit": "ILSVRC's development kit (ILSVRC2012_devkit_t12.tar.gz): the images are its validation set",
    "--labels": "class names, line N for label N (the labels.txt in the training set's LMDB)",
    "--size": "resize images to N x N, or to width x height pixels; 'original' does not resize, and stores"
    " JPEG files as they are (default: 256)",
    "--shorter-side": "resize the shorter side to N pixels, keeping the aspect ratio (training needs a crop)",
    "--gray": "store one channel (default: colour, three channels)",
    "--raw": "store uncompressed pixels (default: JPEG)",
    "--quality": "JPEG quality, 1 to 100 (default: 95)",
    "--fast": "decode JPEG files much larger than the stored size at a reduced size: faster, and slightly"
    " softer than convert_imageset's images",
    "--shuffle": "store in the random order of this seed (default for classes: seed 33)",
    "--no-shuffle": "store in the order of the list (its default), or sorted by name (default with --devkit)",
    "--max-bad": "how many unreadable images may be left out, listed in skipped.txt; more are an error"
    " (default: 1%%, but at least 10)",
    "--workers": "images processed at a time (default: the number of CPU cores available)",
    "--shard": "make only part I of N, LMDB.shard-I-of-N, each on another machine; then --join",
    "--force": "replace an existing LMDB or OUT",
    "--keep": "if LMDB exists and has the requested form, or OUT exists, keep it and do nothing",
    "--restart": "discard what an interrupted run left instead of continuing it",
    "--join": "join the shards LMDB.shard-*-of-N of --output LMDB into it",
    "--mean": "compute the mean image of an LMDB and write it to the file OUT (like mean.binaryproto)",
    "--verify": "read a whole LMDB, made by any program, and report its contents and every problem",
    "--sample": f"with --verify: images to show on the page --output (default with --output: {SAMPLES})",
    "--format": "form of the report of --verify (default: table)",
}

_MAKING = "images list labels devkit size shorter_side gray raw quality fast shuffle no_shuffle max_bad shard"
"""The options of making an LMDB from images."""


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments ask for; returns the exit code."""
    options = _read(arguments)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    if options.mean:
        from caffe_jacinto.data.mean import make_mean

        make_mean(*options.mean, workers=options.workers, replace=options.force, keep=options.keep)
        return 0
    if options.verify:
        from caffe_jacinto.data.verify_report import verify_and_report

        page, samples = options.output, options.sample or SAMPLES
        as_json = options.format == "json"
        fit = verify_and_report(options.verify, options.workers, options.labels, page, samples, as_json)
        return 0 if fit else 1
    from caffe_jacinto.data.create import check_existing_lmdb, find_images, make_lmdb
    from caffe_jacinto.data.encode import ImageForm
    from caffe_jacinto.data.lmdb_writer import check_free
    from caffe_jacinto.data.shards import join_shards

    output: Path = options.shard.path(options.output) if options.shard else options.output
    shorter = options.shorter_side or 0
    width, height = (0, 0) if shorter else options.size
    form = ImageForm(width, height, not options.gray, shorter, options.raw, options.quality, options.fast)
    making = {"replace": options.force, "restart": options.restart}
    if options.keep and output.exists():
        check_existing_lmdb(output, None if options.join else form)
        return 0
    check_free(output, options.force)  # Before minutes are spent on the images.
    if options.join:
        join_shards(output, **making)
        return 0
    sources = (options.images, options.list, options.labels, options.devkit)
    images = find_images(*sources, shuffle=options.shuffle, no_shuffle=options.no_shuffle)
    make_lmdb(output, images, form, options.shard, options.workers, options.max_bad, **making)
    if options.shard:
        print(options.shard.next_step(options.output))
    return 0


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, whose options fit together."""
    parser = _parser()
    options = parser.parse_args(arguments)

    def refuse(names: str, why: str) -> None:
        for name in names.split():
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for {why}")

    if options.mean:
        refuse(f"output join {_MAKING}", "making an LMDB, and --mean reads one")
        return options
    if options.verify:
        making = _MAKING.replace(" labels", "")  # The class names of an existing LMDB, here.
        refuse(f"join force keep restart {making}", "making an LMDB, and --verify reads one")
        if options.sample and not options.output:
            parser.error("--sample needs a page to write: name it with --output page.html")
        return options
    refuse("sample format", "--verify")
    if options.join:
        refuse(_MAKING, "making an LMDB from images, and --join reads shards")
    needed = ("output",) if options.join else ("images", "output")
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if options.list and options.devkit:
        parser.error("--list and --devkit both give the labels: use one of them")
    if options.raw and options.quality != parser.get_default("quality"):
        parser.error("--quality is for JPEG files, and --raw stores none")
    return options


def _parser() -> Parser:
    from caffe_jacinto.data.create import DEFAULT_MAX_BAD, MaxBad
    from caffe_jacinto.data.shards import Shard

    description, _, examples = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.create_lmdb", description, examples.strip("\n"))

    def option(group: argparse._ActionsContainer, name: str, **settings: Any) -> None:
        group.add_argument(name, help=_HELP[name], **settings)

    def switches(group: argparse._ActionsContainer, *names: str) -> None:
        for name in names:
            option(group, name, action="store_true")

    option(parser, "--output", type=Path, metavar="LMDB")
    images = parser.add_argument_group("images")
    option(images, "--images", type=Path, metavar="DIR|TAR")
    option(images, "--list", type=Path, metavar="FILE")
    option(images, "--devkit", type=Path, metavar="TAR.GZ")
    option(images, "--labels", type=Path, metavar="FILE")
    stored = parser.add_argument_group("what is stored")
    size = stored.add_mutually_exclusive_group()
    option(size, "--size", type=_size, default=(256, 256), metavar="N|WxH|original")
    option(size, "--shorter-side", type=whole_number(1, LARGEST_SIDE), metavar="N")
    switches(stored, "--gray", "--raw", "--fast")
    option(stored, "--quality", type=whole_number(1, 100), default=95, metavar="Q")
    order = parser.add_mutually_exclusive_group()
    option(order, "--shuffle", type=int, metavar="SEED")
    switches(order, "--no-shuffle")
    option(parser, "--max-bad", type=MaxBad.parse, default=DEFAULT_MAX_BAD, metavar="N|P%")
    cores = len(os.sched_getaffinity(0))
    option(parser, "--workers", type=whole_number(1, 1024), default=cores, metavar="N")
    option(parser, "--shard", type=Shard.parse, metavar="I/N")
    switches(parser.add_mutually_exclusive_group(), "--force", "--keep")
    switches(parser, "--restart")
    other = parser.add_argument_group("instead of making an LMDB from images")
    switches(other, "--join")
    option(other, "--mean", type=Path, nargs=2, metavar=("LMDB", "OUT"))
    option(other, "--verify", type=Path, metavar="LMDB")
    option(other, "--sample", type=whole_number(1, MOST_SAMPLES), metavar="N")
    option(other, "--format", choices=("table", "json"), default="table")
    return parser


def _size(text: str) -> tuple[int, int]:
    return (0, 0) if text == "original" else image_size(text)


def _stop(signal_number: int, _frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C: threads are waited for, and what is stored so far stays."""
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.create_lmdb", main))
