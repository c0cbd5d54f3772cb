"""Classify images with a trained network; of an LMDB, its accuracy and the confusion matrix.

    python -m caffe_jacinto.classify training/RUN -- photo.jpg folder/
    python -m caffe_jacinto.classify deploy.prototxt weights.caffemodel -- photo.jpg
    python -m caffe_jacinto.classify training/RUN --picture confusion.png -- data/val_lmdb

After -- stand image files, folders of images, or one LMDB. RUN is a run folder of train.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.errors import FAILED, Parser, UserError, run_command

if TYPE_CHECKING:
    import argparse

    from caffe_jacinto.inference.preprocess import Sample, Transform
    from caffe_jacinto.inference.scoring import Tally

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MOST_BEST = 5
MOST_CONFUSED = 20
MOST_CLASSES = 50
"""With more classes than this, the text shows those that do worst."""

PICTURES = (".png", ".svg")


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 where an image could not be read."""
    options = _parser().parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    sources = [Path(item) for item in argv[argv.index("--") + 1 :]] if "--" in argv else []
    if not sources:
        raise UserError("no images: give files, a folder or an LMDB after --; --help shows how")
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}: give 1 or more")
    if options.picture is not None:
        _check_picture(options.picture)
    from caffe_jacinto.data.lmdb_writer import is_lmdb_folder
    from caffe_jacinto.inference.backends import open_backend
    from caffe_jacinto.inference.network import trained_network, validation_transform
    from caffe_jacinto.inference.preprocess import file_samples, lmdb_image_size, lmdb_samples

    is_lmdb = is_lmdb_folder(sources[0])
    if is_lmdb and len(sources) > 1:
        raise UserError(f"{sources[0]} is an LMDB; give one LMDB alone, or images")
    if options.picture is not None and not is_lmdb:
        raise UserError("--picture draws the confusion matrix of an LMDB: give one after --, or leave it out")
    paths = [] if is_lmdb else _image_files(sources)
    deploy, weights, val, base = _network_files(options)
    network = trained_network(deploy, weights)
    transform, source = validation_transform(val, network.shape, base)
    names = _names(options, deploy, base, source, sources[0])
    backend, scores = open_backend(options.backend, network, options.caffe)
    print(f"{weights} on {backend}", file=sys.stderr)
    if is_lmdb:
        total, samples = lmdb_samples(sources[0], transform)
        return _score_lmdb(options, total, samples, scores, names)
    size = _size(options, lmdb_image_size(base / source) if source else None, transform)
    return _classify_files(options, len(paths), file_samples(paths, transform, size), scores, names)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.classify", description, rest.strip("\n"))
    parser.add_argument("network", type=Path, metavar="RUN|DEPLOY", help="a run folder, or a deploy.prototxt")
    parser.add_argument("weights", type=Path, nargs="?", help="with DEPLOY: the .caffemodel")
    parser.add_argument("--val", type=Path, help="the val.prototxt to preprocess by (default: beside DEPLOY)")
    parser.add_argument(
        "--labels", type=Path, help="class names, one a line (default: labels.txt of RUN or LMDB)"
    )
    parser.add_argument("--backend", choices=("caffe", "opencv", "onnxruntime"), help="who computes")
    parser.add_argument("--caffe", help="the caffe executable or its tree")
    parser.add_argument(
        "--resize",
        type=_resize,
        metavar="WIDTHxHEIGHT",
        help="size before the crop (default: the val LMDB's)",
    )
    parser.add_argument("--batch", type=int, default=50, help="images at a time (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text")
    parser.add_argument("--picture", type=Path, help="with an LMDB: the confusion matrix as a .png or .svg")
    return parser


def _resize(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    sides = [int(side) if side.isdecimal() and len(side) < 6 else 0 for side in (width, height or width)]
    if not all(0 < side < 65536 for side in sides):
        raise ArgumentTypeError(f"{text[:40]!r} is no size in pixels: give 256, or 320x240 (width x height)")
    return sides[0], sides[1]


def _check_picture(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--picture {path}: the name must end in {' or '.join(PICTURES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: its folder is not there; make it first")


def _network_files(options: argparse.Namespace) -> tuple[Path, Path, Path, Path]:
    """Deploy, weights, val, and the folder where relative paths of val begin."""
    place: Path = options.network
    if not place.is_dir():
        if options.weights is None:
            raise UserError(f"{place}: no run folder; with a deploy.prototxt give its .caffemodel too")
        return place, options.weights, options.val or place.parent / "val.prototxt", Path()
    if options.weights is not None:
        raise UserError(f"{place} is a run folder and has its own weights; leave {options.weights} out")
    from caffe_jacinto.engines.snapshots import complete_snapshots
    from caffe_jacinto.prototxt.dialects import Dialect
    from caffe_jacinto.runs import folder

    record = folder.load(place)
    prefix = f"{record.recipe.data.dataset}_{record.recipe.network.name}"
    for stage in reversed(record.recipe.stages):
        found = complete_snapshots(place / stage / prefix, Dialect(record.engine.dialect))
        if found:
            if record.stages[stage].state != "finished":
                print(f"stage {stage} is not finished: iteration {found[0].iteration:,}", file=sys.stderr)
            val = options.val or place / stage / "val.prototxt"
            return place / stage / "deploy.prototxt", found[0].caffemodel, val, Path(record.start_folder)
    raise UserError(f"{place}: no stage has weights yet; train it first (train --resume {place})")


def _names(
    options: argparse.Namespace, deploy: Path, base: Path, source: str, first: Path
) -> tuple[str, ...]:
    from caffe_jacinto.data.listing import read_labels

    if options.labels:
        return read_labels(options.labels)
    places = (options.network, deploy.parent, first, base / source if source else first)
    labels = next((place / "labels.txt" for place in places if (place / "labels.txt").is_file()), None)
    return read_labels(labels) if labels else ()


def _size(
    options: argparse.Namespace, stored: tuple[int, int] | None, transform: Transform
) -> tuple[int, int]:
    if options.resize is None:
        if stored is None:
            stored = (transform.width, transform.height)
            print(
                f"no val LMDB to see the size of: images are resized to {stored[0]}x{stored[1]}",
                file=sys.stderr,
            )
        return stored
    given: tuple[int, int] = options.resize
    if given[0] < transform.width or given[1] < transform.height:
        raise UserError(
            f"--resize {given[0]}x{given[1]} is smaller than the crop of {transform.width}x{transform.height}"
        )
    return given


def _image_files(sources: list[Path]) -> list[Path]:
    paths = []
    for source in sources:
        if not source.is_dir():
            paths.append(source)
            continue
        inside = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
        if not inside:
            raise UserError(f"{source}: no images in this folder ({', '.join(IMAGE_ENDINGS)})")
        paths += inside
    return paths


def _batches(
    options: argparse.Namespace, total: int, samples: Iterator[Sample], scores: Any
) -> Iterator[tuple[list[Sample], Any]]:
    """Readable samples and their scores, a batch at a time; a line on stderr for each of the others."""
    import numpy as np

    from caffe_jacinto.data.progress import image_progress

    with image_progress("classify", total) as advance:
        while batch := list(islice(samples, options.batch)):
            for sample in batch:
                advance()
                if sample.image is None:
                    print(UserError(f"{sample.name}: {sample.reason}"), file=sys.stderr)
            good = [sample for sample in batch if sample.image is not None]
            if good:
                yield good, scores(np.stack([sample.image for sample in good if sample.image is not None]))


def _name(names: tuple[str, ...], index: int) -> str:
    from caffe_jacinto.text_table import printable

    return printable(names[index]) if index < len(names) else str(index)


def _classify_files(
    options: argparse.Namespace, total: int, samples: Iterator[Sample], scores: Any, names: tuple[str, ...]
) -> int:
    from caffe_jacinto.inference.scoring import softmax
    from caffe_jacinto.text_table import printable

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if options.format == "csv":
        writer.writerow(("image", "place", "class", "name", "probability"))
    done = 0
    for batch, values in _batches(options, total, samples, scores):
        for sample, row in zip(batch, softmax(values), strict=True):
            best = row.argsort()[::-1][:MOST_BEST]
            done += 1
            found = [(int(i), _name(names, int(i)), float(row[i])) for i in best]
            if options.format == "csv":
                writer.writerows((sample.name, at, *item) for at, item in enumerate(found, 1))
            elif options.format == "json":
                classes = [{"class": i, "name": name, "probability": p} for i, name, p in found]
                print(json.dumps({"image": sample.name, "best": classes}))
            else:
                print(printable(sample.name))
                for _, name, p in found:
                    print(f"  {100 * p:6.2f} %  {name}")
    return 0 if done == total else FAILED


def _score_lmdb(
    options: argparse.Namespace, total: int, samples: Iterator[Sample], scores: Any, names: tuple[str, ...]
) -> int:
    from caffe_jacinto.inference.scoring import Tally

    tally = None
    for batch, values in _batches(options, total, samples, scores):
        tally = tally or Tally(values.shape[1])
        tally.add(values, [sample.label or 0 for sample in batch])
    if tally is None:
        raise UserError("no record of the LMDB can be classified; see the lines above")
    print_tally(options.format, tally, names)
    if options.picture:
        from caffe_jacinto.inference.picture import draw_confusion

        draw_confusion(tally, [_name(names, i) for i in range(len(tally.matrix))], options.picture)
    return 0 if tally.images == total else FAILED


def print_tally(form: str, tally: Tally, names: tuple[str, ...]) -> None:
    """Print the scores of an LMDB as ``text``, ``json`` or ``csv``."""
    from caffe_jacinto.text_table import Column, Line, show_table

    classes = list(enumerate(tally.by_class()))
    if form == "json":
        facts = {
            "images": tally.images,
            "top1": tally.top1 / tally.images,
            "top5": tally.top5 / tally.images,
            "classes": [
                {"class": i, "name": _name(names, i), "right": r, "images": n} for i, (r, n) in classes
            ],
            "confusion": tally.matrix.tolist(),
        }
        print(json.dumps(facts))
        return
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("class", "name", "right", "images", *(f"found_{i}" for i, _ in classes)))
        writer.writerows((i, _name(names, i), r, n, *tally.matrix[i].tolist()) for i, (r, n) in classes)
        return
    seen = [(i, (r, n)) for i, (r, n) in classes if n]
    if len(seen) > MOST_CLASSES:
        seen = sorted(seen, key=lambda item: item[1][0] / item[1][1])[:MOST_CLASSES]
    lines = [Line((_name(names, i), str(n), f"{100 * r / n:.2f} %")) for i, (r, n) in seen]
    columns = (Column("Class", words=True), Column("Images"), Column("Top-1"))
    which = "" if len(seen) == len(classes) else f": {len(seen)} of {len(classes)} classes, see --format csv"
    show_table(sys.stdout, f"Accuracy by class{which}", columns, lines)
    pairs = [Line((_name(names, a), _name(names, b), str(n))) for a, b, n in tally.confused(MOST_CONFUSED)]
    columns = (Column("True class", words=True), Column("Taken for", words=True), Column("Images"))
    totals = (
        f"top-1 {100 * tally.top1 / tally.images:.2f} %, top-5 {100 * tally.top5 / tally.images:.2f} %"
        f" of {tally.images:,} images"
    )
    show_table(sys.stdout, "Most confused", columns, pairs, totals)


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.classify", main))
