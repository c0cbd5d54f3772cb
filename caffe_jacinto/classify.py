"""Classify images with a trained network; of an LMDB, its accuracy and the confusion matrix.

    python -m caffe_jacinto.classify training/RUN -- photo.jpg folder/
    python -m caffe_jacinto.classify deploy.prototxt weights.caffemodel -- photo.jpg
    python -m caffe_jacinto.classify training/RUN --picture confusion.png -- data/val_lmdb

RUN is a run folder of train, or a stage's folder in one. Images are files, folders of them, or one LMDB.
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import FAILED, UserError, run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.data.encode import ImageForm
    from caffe_jacinto.data.images import Sample
    from caffe_jacinto.inference.backends import Scores
    from caffe_jacinto.inference.network import Preprocessing

PICTURES = (".png", ".svg")


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 where an image could not be read."""
    options = _read_arguments(argv)
    from caffe_jacinto.common.progress import image_progress
    from caffe_jacinto.data.check import is_lmdb_folder
    from caffe_jacinto.data.images import file_samples, lmdb_samples
    from caffe_jacinto.inference.backends import open_backend
    from caffe_jacinto.inference.network import (
        class_names,
        image_files,
        network_files,
        trained_network,
        validation_preprocessing,
    )

    lmdb = next((source for source in options.images if is_lmdb_folder(source)), None)
    _check_images(options, lmdb)
    paths = [] if lmdb else image_files(options.images)
    files = network_files(options.network, options.weights, options.val)
    network = trained_network(files.deploy, files.weights)
    done = validation_preprocessing(files.val, network.shape, files.base)
    if lmdb:
        total, samples = lmdb_samples(lmdb, done.transform)
    else:
        form = _file_form(options, done)
        total, samples = len(paths), file_samples(paths, done.transform, form)
    backend = open_backend(options.backend, network, options.caffe)
    known = [folder for folder in (*files.folders, lmdb, done.lmdb) if folder]
    names = class_names(options.labels, tuple(known), backend.classes)
    print(f"{files.weights} on {backend.label}", file=sys.stderr)
    # On a terminal the classes of image after image show how far it is; a bar would be drawn over them.
    quiet = lmdb is None and sys.stdout.isatty()
    progress = nullcontext(lambda: None) if quiet else image_progress("classify", total)
    batches = _batches(options.batch, samples, backend.scores, progress)
    return _score(options, total, batches, names) if lmdb else _classify(options, total, batches, names)


def _read_arguments(argv: Sequence[str]) -> Namespace:
    """The arguments; ``images`` and ``weights`` are told apart by whether the network is a run folder."""
    parser = _parser()
    cut = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_intermixed_args(list(argv[:cut]))
    rest = [*options.rest, *map(Path, argv[cut + 1 :])]
    options.weights = None
    wanted = "give a run folder, or a deploy.prototxt and its .caffemodel"
    if options.network is None:
        raise UserError(f"no network: {wanted}; --help shows how")
    if not options.network.exists():
        raise UserError(f"{options.network}: there is no such file or folder; {wanted}")
    if not options.network.is_dir():
        if not options.rest:
            raise UserError(f"{options.network}: no folder of a run; {wanted}")
        options.weights, *rest = rest
    elif options.rest and options.rest[0].suffix == ".caffemodel":
        raise UserError(
            f"{options.network} is a folder, whose weights are found by themselves; leave {rest[0]} out, "
            "or give a deploy.prototxt with it"
        )
    if not rest:
        raise UserError("no images: give files, a folder or an LMDB behind the network; --help shows how")
    options.images = rest
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}: give 1 or more")
    if options.picture is not None:
        _check_picture(options.picture)
    return options


def _parser() -> Parser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.classify", description, rest.strip("\n"))
    parser.usage = "%(prog)s [OPTION...] RUN|DEPLOY [WEIGHTS] -- IMAGE..."
    add = parser.add_argument
    add("network", type=Path, nargs="?", metavar="RUN|DEPLOY", help="a run folder, or a deploy.prototxt")
    add("rest", type=Path, nargs="*", metavar="WEIGHTS", help="with DEPLOY: the .caffemodel")
    add("--val", type=Path, metavar="FILE", help="the val.prototxt to preprocess by (default: beside DEPLOY)")
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="class names, one a line (default: labels.txt of RUN or LMDB)",
    )
    add(
        "--backend",
        choices=("caffe", "opencv", "onnxruntime"),
        help="who computes (default: the first that can)",
    )
    add("--caffe", metavar="PATH", help="the caffe executable or its tree")
    add(
        "--resize",
        type=_resize,
        metavar="WIDTHxHEIGHT",
        help="of image files, before the crop (default: as in the val LMDB)",
    )
    add("--batch", type=int, default=50, metavar="N", help="images at a time (default: %(default)s)")
    add("--format", choices=("text", "json", "csv"), default="text", help="(default: text)")
    add("--picture", type=Path, metavar="FILE", help="of an LMDB: the confusion matrix as .png or .svg")
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


def _check_images(options: Namespace, lmdb: Path | None) -> None:
    if lmdb and len(options.images) > 1:
        raise UserError(f"{lmdb} is an LMDB; give one LMDB alone, or images")
    if lmdb and options.resize:
        raise UserError("--resize is for image files; those in an LMDB are taken as they are: leave it out")
    if options.picture is not None and not lmdb:
        raise UserError("--picture draws the confusion matrix of an LMDB: give one, or leave it out")


def _file_form(options: Namespace, done: Preprocessing) -> ImageForm:
    """What image files are made: as in the validation LMDB, or as --resize says."""
    from caffe_jacinto.data.encode import ImageForm
    from caffe_jacinto.data.images import lmdb_file_form

    transform = done.transform
    colour = transform.channels == 3
    form = done.file_form or (lmdb_file_form(done.lmdb) if done.lmdb else None)
    if options.resize:
        width, height = options.resize
        if width < transform.width or height < transform.height:
            crop = f"{transform.width}x{transform.height}"
            raise UserError(f"--resize {width}x{height} is smaller than the network's input of {crop}")
        return replace(form or ImageForm(0, 0, colour), width=width, height=height, shorter=0)
    if form is None:
        mean = transform.mean_image
        size = (transform.width, transform.height) if mean is None else (mean.shape[2], mean.shape[1])
        print(
            f"the size of images before the crop is not known ({done.lmdb or 'the val LMDB'} is not there): "
            f"they are resized to {size[0]}x{size[1]}; --resize WIDTHxHEIGHT says another",
            file=sys.stderr,
        )
        return ImageForm(size[0], size[1], colour)
    return form


def _batches(
    size: int,
    samples: Iterator[Sample],
    scores: Scores,
    progress: AbstractContextManager[Callable[[], None]],
) -> Iterator[tuple[list[Sample], NDArray[np.float32]]]:
    """Readable samples and their scores, a batch at a time; a line on stderr for each of the others."""
    import numpy as np

    with progress as advance:
        while batch := list(islice(samples, size)):
            good = []
            for sample in batch:
                if sample.image is None:
                    print(UserError(f"{sample.name}: {sample.reason}"), file=sys.stderr)
                else:
                    good.append(sample)
            if good:
                yield good, scores(np.stack([sample.image for sample in good if sample.image is not None]))
            for _ in batch:
                advance()


def _classify(options: Namespace, total: int, batches: Any, names: tuple[str, ...]) -> int:
    from caffe_jacinto.inference.scores import BestClasses, softmax

    writer = BestClasses(options.format, names, sys.stdout)
    done = 0
    for batch, values in batches:
        for sample, probabilities in zip(batch, softmax(values), strict=True):
            writer.write(sample.name, probabilities)
            done += 1
    return 0 if done == total else FAILED


def _score(options: Namespace, total: int, batches: Any, names: tuple[str, ...]) -> int:
    from caffe_jacinto.inference.scores import Tally, write_tally

    tally = None
    for batch, values in batches:
        tally = tally or Tally(values.shape[1])
        tally.add(values, [sample.label or 0 for sample in batch])
    if tally is None:
        raise UserError("no record of the LMDB can be classified; see the lines above")
    write_tally(options.format, tally, names, sys.stdout)
    if options.picture:
        from caffe_jacinto.inference.scores import draw_confusion

        draw_confusion(tally, names, options.picture)
        print(f"drew {options.picture}", file=sys.stderr)
    return 0 if tally.images == total else FAILED


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.classify", main))
