"""Classify images with a trained network; of an LMDB, its accuracy and the confusion matrix.

    python -m caffe_jacinto.classify training/RUN -- photo.jpg folder/
    python -m caffe_jacinto.classify deploy.prototxt weights.caffemodel -- photo.jpg
    python -m caffe_jacinto.classify training/RUN --picture confusion.png -- data/val_lmdb

RUN is a run folder of train, or a stage's folder in one. Images are files, folders of them, or one LMDB.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.arguments import Parser, gpu_request, image_size, whole_number
from caffe_jacinto.common.errors import FAILED, UserError, run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.inference.backends import Scores
    from caffe_jacinto.inference.network import Sample

    Batches = Iterator[tuple[list[Sample], NDArray[np.float32]]]

PICTURES = (".png", ".svg")


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 where an image could not be read."""
    options = _read_arguments(argv)
    from caffe_jacinto.common.text import image_progress
    from caffe_jacinto.data.lmdb_reader import is_lmdb_folder
    from caffe_jacinto.inference import network
    from caffe_jacinto.inference.backends import open_backend

    lmdb = next((source for source in options.images if is_lmdb_folder(source)), None)
    _check_images(options, lmdb)
    paths = [] if lmdb else network.image_files(options.images)
    files = network.network_files(options.network, options.weights, options.val)
    trained = network.trained_network(files.deploy, files.weights)
    done = network.validation_preprocessing(files.val, trained.shape, files.base)
    if lmdb:
        total, samples = network.lmdb_samples(lmdb, done)
    else:
        form = network.file_form(done, options.resize)
        total, samples = len(paths), network.file_samples(paths, done, form)
    backend = open_backend(options.backend, trained, options.caffe, options.gpus)
    known = [folder for folder in (*files.folders, lmdb, done.lmdb) if folder]
    names = network.class_names(options.labels, tuple(known), backend.classes)
    print(f"{files.weights} on {backend.label}", file=sys.stderr)
    # On a terminal the classes of image after image show the progress; a bar would be drawn over them.
    quiet = lmdb is None and sys.stdout.isatty()
    progress = nullcontext(lambda: None) if quiet else image_progress("classify", total)
    batches = _batches(options.batch, samples, backend.scores, progress)
    return _score(options, total, batches, names) if lmdb else _classify(options, total, batches, names)


def _read_arguments(argv: Sequence[str]) -> Namespace:
    """The arguments; whether the first is a folder decides if weights come next."""
    parser = _parser()
    cut = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_intermixed_args(list(argv[:cut]))
    known = {name for action in parser._actions for name in action.option_strings}
    misplaced = [
        given for given in argv[cut + 1 :] if given.partition("=")[0] in known and not Path(given).exists()
    ]
    if misplaced:
        raise UserError(f"{misplaced[0]} comes after --, where only images are: put options before --")
    rest = [*options.rest, *map(Path, argv[cut + 1 :])]
    options.weights = None
    wanted = "give a run folder, or a deploy.prototxt and its .caffemodel"
    if options.network is None:
        raise UserError(f"no network: {wanted}; --help shows how")
    if not options.network.exists():
        raise UserError(f"{options.network}: there is no such file or folder; {wanted}")
    if not options.network.is_dir():
        if not options.rest:
            raise UserError(f"{options.network}: not the folder of a run; {wanted}")
        options.weights, *rest = rest
    elif options.rest and options.rest[0].name.endswith((".caffemodel", ".caffemodel.h5")):
        raise UserError(
            f"{options.network} is a folder, whose weights are found automatically; leave {rest[0]} out, "
            "or give a deploy.prototxt with it"
        )
    if not rest:
        raise UserError("no images: give files, a folder or an LMDB after the network; --help shows how")
    options.images = rest
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
    labels = "class names, one a line (default: labels.txt of RUN or of the LMDB)"
    val = "the val.prototxt that defines the preprocessing (default: the one beside DEPLOY)"
    resize = "size of image files before the crop (default: that of the val LMDB)"
    backends = ("caffe", "opencv", "onnxruntime")
    add("--val", type=Path, metavar="FILE", help=val)
    add("--labels", type=Path, metavar="FILE", help=labels)
    add("--backend", choices=backends, help="what computes the scores (default: the first that works)")
    add("--caffe", metavar="PATH", help="the caffe executable or its tree")
    gpus = "compute on the first of these GPUs, where the backend can (default: on the CPU)"
    add("--gpus", "--gpu", "-gpu", type=gpu_request, default=(), metavar="0|all", help=gpus)
    add("--resize", type=image_size, metavar="WIDTHxHEIGHT", help=resize)
    add("--batch", type=whole_number(1), default=50, metavar="N", help="batch size (default: %(default)s)")
    add("--format", choices=("text", "json", "csv"), default="text", help="(default: text)")
    add("--picture", type=Path, metavar="FILE", help="of an LMDB: the confusion matrix as .png or .svg")
    return parser


def _check_picture(path: Path) -> None:
    from caffe_jacinto.common.files import check_parent

    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--picture {path}: the name must end in {' or '.join(PICTURES)}")
    check_parent(path.absolute(), "--picture ")


def _check_images(options: Namespace, lmdb: Path | None) -> None:
    if lmdb and len(options.images) > 1:
        raise UserError(f"{lmdb} is an LMDB; give one LMDB alone, or images")
    if lmdb and options.resize:
        raise UserError("--resize is for image files, and those in an LMDB are not resized: leave it out")
    if options.picture is not None and not lmdb:
        raise UserError("--picture draws the confusion matrix of an LMDB: give one, or leave it out")


def _batches(
    size: int,
    samples: Iterator[Sample],
    scores: Scores,
    progress: AbstractContextManager[Callable[[], None]],
) -> Batches:
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


def _classify(options: Namespace, total: int, batches: Batches, names: tuple[str, ...]) -> int:
    from caffe_jacinto.inference.scores import BestClasses, softmax

    writer = BestClasses(options.format, names, sys.stdout)
    done = 0
    for batch, values in batches:
        for sample, probabilities in zip(batch, softmax(values), strict=True):
            writer.write(sample.name, probabilities)
            done += 1
    return 0 if done == total else FAILED


def _score(options: Namespace, total: int, batches: Batches, names: tuple[str, ...]) -> int:
    from caffe_jacinto.inference.scores import Tally, draw_confusion, write_tally

    tally = None
    for batch, values in batches:
        tally = tally or Tally(values.shape[1])
        tally.add(values, [sample.label or 0 for sample in batch])
    if tally is None:
        raise UserError("no record of the LMDB can be classified; see the lines above")
    write_tally(options.format, tally, names, sys.stdout)
    if options.picture:
        draw_confusion(tally, names, options.picture)
        print(f"drew {options.picture}", file=sys.stderr)
    return 0 if tally.images == total else FAILED


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.classify", main))
