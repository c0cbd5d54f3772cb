"""Write a network's train, val, deploy and solver prototxt, translate, show or draw a network.

    python -m caffe_jacinto.build_net
    python -m caffe_jacinto.build_net --network resnet10 --dialect bvlc --output nets/resnet10
    python -m caffe_jacinto.build_net --gpus 0,1 --batch-size 512
    python -m caffe_jacinto.build_net --network resnet10 --summary --draw resnet10.svg
    python -m caffe_jacinto.build_net --summary deploy.prototxt --weights trained.caffemodel
    python -m caffe_jacinto.build_net --summary train_val.prototxt --input 3x224x224
    python -m caffe_jacinto.build_net --upgrade old_train_val.prototxt --output train_val.prototxt
    python -m caffe_jacinto.build_net --from train_val.prototxt --dialect caffe_jacinto --output nets/fork
    python -m caffe_jacinto.build_net --output nets/digits --dialect bvlc --num-classes 10 --crop-size 32 \\
        --strides 1,2,2,2,2 --batch-size 64 --iter-size 1 \\
        --train-lmdb data/train_lmdb --val-lmdb data/val_lmdb --val-images 10000

Without arguments it writes JacintoNet11 as it was published for ImageNet, into training/jacintonet11. Where
--network is given, the defaults shown by --help are those of that network's published training.

batch size: --batch-size is the number of images of one update of the weights. An update accumulates
--iter-size passes on each of --gpus, so the batch_size in the file is smaller, and the dialects count it
differently:
  bvlc           batch_size = batch / (iter-size x GPUs), the batch of each GPU
  caffe_jacinto  batch_size = batch / iter-size, which that Caffe divides among its GPUs

CPU or GPU: `caffe train` without -gpu uses the device in the solver file. --gpus writes the first of its GPUs
there (all: those of this machine), --cpu writes CPU. By default it is GPU 0 in caffe_jacinto files (that
Caffe needs a GPU) and wherever the network was published so, otherwise CPU.

paths: solver.prototxt names the other files as DIR/train.prototxt and so on, with DIR as --output has it.
Start Caffe in the folder where a relative DIR, and relative LMDB paths, are valid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.arguments import (
    Parser,
    blob_shape,
    gpu_request,
    not_empty,
    whole_number,
    whole_numbers,
)
from caffe_jacinto.common.disk import why_not_written
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.files import read_text
from caffe_jacinto.engines.gpus import requested_gpus
from caffe_jacinto.networks import stage_files as stages
from caffe_jacinto.networks.registry import NETWORKS, takes
from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    from caffe_jacinto.recipes.model import Recipe

NETWORK = "jacintonet11"


def main(argv: Sequence[str]) -> int:
    """Write the files and say how to train them; or show and draw a network."""
    published = stages.published_recipe(_named_network(argv))
    parser = _parser(published)
    arguments = parser.parse_args(argv)
    if arguments.source is not None:
        return _translate(parser, arguments)
    if arguments.gpus is not None:
        arguments.gpus = requested_gpus(arguments.gpus, None)
    _check(arguments)
    if arguments.upgrade:
        from caffe_jacinto.caffemodel.upgrade_file import upgrade_file

        output = Path(arguments.output) if arguments.output else None
        print(*upgrade_file(arguments.upgrade, output), sep="\n")
        return 0
    if arguments.summary:
        _look(arguments, read_text(Path(arguments.summary), "give a network's prototxt"), arguments.summary)
        return 0
    looks = arguments.summary is not None or arguments.draw is not None
    folder = arguments.output or ("" if looks else f"training/{arguments.network}")
    dialect, gpus = Dialect(arguments.dialect), arguments.gpus or ()
    recipe = _recipe(published, arguments)
    if dialect is Dialect.BVLC:
        stages.check_caffe_train_suffices(recipe, arguments.stage)
    on_gpu = bool(gpus)
    if arguments.gpus is None and not arguments.cpu:
        on_gpu = stages.default_on_gpu(arguments.network, dialect)
    files = stages.stage_files(
        recipe,
        arguments.stage,
        dialect,
        folder=folder,
        gpus=gpus,
        iter_size=arguments.iter_size,
        solver_mode_gpu=on_gpu,
        val_images=arguments.val_images,
    )
    if folder:
        _write(files, Path(folder))
        if arguments.format in (None, "text"):
            device = f"GPU {','.join(map(str, gpus or (0,)))}" if on_gpu else "the CPU"
            print(
                stages.what_was_written(
                    recipe, arguments.stage, dialect, folder, device, arguments.val_images
                )
            )
            print(stages.how_to_train(recipe, arguments.stage, dialect, folder, gpus))
    if looks:
        _look(arguments, files[stages.DEPLOY], recipe.network.name, dialect)
    return 0


def _write(files: Mapping[str, str], folder: Path) -> None:
    """Write the files into ``folder``.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        stages.write_stage_files(files, folder)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is not a folder; choose another one for the files") from None
    except OSError as error:
        raise UserError(why_not_written(error, folder)) from None


def _width(text: str) -> float:
    """An argument type: a width multiplier."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a factor above 0, like 0.5")
    return value


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.build_net", description, rest.strip("\n"))
    network, data, training = recipe.network, recipe.data, recipe.training

    def add(name: str, metavar: str, kind: Callable[[str], Any], default: Any, help_text: str = "") -> None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default or "none")
        help_text = f"{help_text} (default: {shown})".lstrip().replace("%", "%%")
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=help_text)

    output_help = "folder to write to (default: training/NETWORK)"
    parser.add_argument("--output", type=not_empty, metavar="DIR", help=output_help)
    network_help = f"{', '.join(NETWORKS)} (default: {NETWORK})"
    parser.add_argument("--network", default=network.name, metavar="NAME", help=network_help)
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="write this network of the other dialect in --dialect, to --output or standard output",
    )
    dialects, published = [dialect.value for dialect in Dialect], stages.published_dialect(network.name).value
    dialect_help = f"bvlc: stock Caffe 1.0; caffe_jacinto: the fork (default: {published}, as published)"
    parser.add_argument("--dialect", default=published, choices=dialects, help=dialect_help)
    add(
        "stage",
        "NAME",
        str,
        "initial",
        ", ".join(recipe.trained),
    )
    count = whole_number(1)
    add("num-classes", "N", whole_number(2), data.num_classes)
    add("crop-size", "PIXELS", count, network.crop_size, "height and width of the network's input")
    strides_help = "of conv1a, pool1, pool2, pool3 and pool4 in jacintonet11"
    if network.name in NETWORKS and not takes(network.name, "strides"):
        strides_help = f"not for {network.name}, whose strides are fixed"
    add("strides", "S,S,S,S,S", whole_numbers(1, "2,2,2,2,2"), network.strides, strides_help)
    add("width", "FACTOR", _width, network.width, "of mobilenet_v1: multiplies the channels of every layer")
    add("train-lmdb", "PATH", not_empty, data.train_lmdb)
    add("val-lmdb", "PATH", not_empty, data.val_lmdb)
    add("mean-file", "PATH", not_empty, data.mean_file, ".binaryproto of the mean image to subtract")
    images_help = "in the validation LMDB; one test covers them all"
    add("val-images", "N", count, stages.IMAGENET_VAL_IMAGES, images_help)
    add("batch-size", "N", count, training.batch_size, "images of one update of the weights")
    add("iter-size", "N", count, training.iter_size, "passes that one update accumulates")
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--gpus", type=gpu_request, metavar="0,1|all", help="GPU numbers (default: see below)"
    )
    device.add_argument("--cpu", action="store_true", help="write CPU in the solver (bvlc only)")
    upgrade_help = (
        "write FILE, a prototxt or .caffemodel in an older form, in today's form to NAME_upgraded beside it, "
        "or to the file --output"
    )
    parser.add_argument("--upgrade", type=Path, metavar="FILE", help=upgrade_help)
    look = parser.add_argument_group("show and draw a network, with --output or without")
    look.add_argument(
        "--summary",
        nargs="?",
        const="",
        metavar="PROTOTXT",
        help="list layers, shapes, parameters and MACs of PROTOTXT, or of the network of the other arguments",
    )
    input_help = "the images' size, where PROTOTXT and its data do not say it, or another than they say"
    look.add_argument("--input", type=blob_shape, metavar="CxHxW", help=input_help)
    look.add_argument("--format", choices=["text", "csv", "json"], help="of the summary (default: text)")
    look.add_argument("--weights", type=Path, metavar="FILE", help="count the zeros in this .caffemodel")
    look.add_argument("--draw", type=Path, metavar="FILE", help="draw the network to FILE (.svg or .png)")
    return parser


def _translate(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Write a network's prototxt in the other dialect."""
    from caffe_jacinto.networks.translate import translate

    known = ("source", "output", "dialect")
    others = [n for n, value in vars(arguments).items() if value != parser.get_default(n) and n not in known]
    if others:
        raise UserError(
            f"--{others[0].replace('_', '-')}: --from FILE takes --dialect and --output only; leave it out"
        )
    source: Path = arguments.source
    done = translate(read_text(source, "give a network's prototxt"), str(source), Dialect(arguments.dialect))
    changes = ", ".join(f"{what}: {count}" for what, count in done.changes.items()) or "nothing differs"
    if arguments.output is None:
        print(done.text.removesuffix("\n"))
        print(changes, file=sys.stderr)
        return 0
    folder = Path(arguments.output)
    if (folder / source.name).exists() and (folder / source.name).samefile(source):
        raise UserError(f"--output {folder}: this would replace {source}; give another folder")
    _write({source.name: done.text}, folder)
    print(f"{folder / source.name}: {source} in the dialect {arguments.dialect} ({changes})")
    return 0


def _named_network(argv: Sequence[str]) -> str:
    """The network among the arguments, whose recipe gives the defaults of the others."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--network", nargs="?", default=NETWORK)
    return str(reader.parse_known_args(argv)[0].network or NETWORK)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other or would do nothing."""
    looks = arguments.summary is not None or arguments.draw or arguments.weights or arguments.format
    if arguments.input and not arguments.summary:
        raise UserError("--input gives the images' size of --summary PROTOTXT; without it, give --crop-size")
    if arguments.upgrade and looks:
        raise UserError("--upgrade only writes a file; leave out --summary, --draw, --weights and --format")
    if arguments.summary and arguments.output:
        raise UserError(f"--summary {arguments.summary} shows an existing file; leave out --output")
    if arguments.format and arguments.summary is None:
        raise UserError("--format requires --summary")
    if arguments.weights and arguments.summary is None and arguments.draw is None:
        raise UserError("--weights requires --summary or --draw")
    if arguments.summary:
        return
    fork = arguments.dialect == Dialect.CAFFE_JACINTO.value
    if fork and (arguments.cpu or arguments.gpus == ()):
        raise UserError("--cpu: caffe-jacinto needs a GPU; leave it out, or add --dialect bvlc")


def _recipe(published: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The published recipe with the values of the command line, which the parser has checked."""
    given = vars(arguments) | {"name": arguments.network}
    changes = {
        "data": ("num_classes", "train_lmdb", "val_lmdb", "mean_file"),
        "network": ("name", "crop_size", "strides", "width"),
        "training": ("batch_size", "iter_size"),
    }
    parts = {
        part: getattr(published, part).model_copy(update={name: given[name] for name in names})
        for part, names in changes.items()
    }
    return published.model_copy(update=parts)


def _look(arguments: argparse.Namespace, text: str, where: str, dialect: Dialect | None = None) -> None:
    """Show and draw a network, as the arguments ask for."""
    from caffe_jacinto.caffemodel.show import summary_with_zeros
    from caffe_jacinto.netspec import summary as summaries

    shapes = partial(_shapes_of_data, where, arguments.input)
    summary = summary_with_zeros(text, where, dialect, arguments.weights, shapes)
    if arguments.draw is not None:
        from caffe_jacinto.netspec.drawing import draw

        draw(summary, arguments.draw)
    if arguments.summary is None:
        print(f"Drew {summary.name} to {arguments.draw}")
    elif arguments.format == "json":
        print(summaries.as_json(summary))
    elif arguments.format == "csv":
        print(summaries.as_csv(summary), end="")
    else:
        summaries.show(summary, sys.stdout)


def _shapes_of_data(where: str, given: tuple[int, int, int] | None, net: Any) -> dict[str, tuple[int, ...]]:
    """What the layers of ``net`` that read data give, by their names, where it can be found out.

    ``given``, channels x height x width, is that of the first such layer or declared input. The others' comes
    from their LMDBs and lists, where these are there.
    """
    from caffe_jacinto.netspec.graph import TEST, messages_in
    from caffe_jacinto.netspec.layer_types import role_of

    phase = None if net.state.HasField("phase") else TEST
    readers = [layer for layer in messages_in(net, phase) if role_of(layer.type) == "data"]
    found: dict[str, tuple[int, ...]] = {}
    if any(layer.type in ("Data", "HDF5Data", "ImageData") for layer in readers[1 if given else 0 :]):
        from caffe_jacinto.data.sources import shapes_of_data

        found = shapes_of_data(net, phase, where)
    if given and not readers:
        raise UserError(f"--input: {where} has no layer that gives images; leave it out")
    return found | ({readers[0].name: (1, *given)} if given else {})


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.build_net", main))
