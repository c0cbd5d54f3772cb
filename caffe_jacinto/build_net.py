"""Write a network's train, val, deploy and solver prototxt.

    python -m caffe_jacinto.build_net --output DIR

gives JacintoNet11 for ImageNet as it was published, --network another one; --help tells the rest. Caffe is
not needed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.networks.registry import NETWORKS, PUBLISHED_WITH_THE_FORK, takes_strides
from caffe_jacinto.networks.stage_files import (
    IMAGENET_VAL_IMAGES,
    iterations_per_test,
    stage_files,
    write_stage_files,
)
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.load import built_in_recipes, load_recipe

if TYPE_CHECKING:
    from caffe_jacinto.recipes.model import Recipe

NETWORK = "jacintonet11"
"""Built where no network is named; its recipe's values stand where a network has no recipe of its own."""

INT32_MAX = 2**31 - 1

DESCRIPTION = """\
Write train.prototxt, val.prototxt, deploy.prototxt and solver.prototxt of a network into a folder.
With --output and --network alone: as in its published training on ImageNet. The defaults shown here are those
of the network that stands beside --help."""

EPILOG = """\
batch size: --batch-size counts the images behind one update of the weights. One update is accumulated over
--iter-size passes and all --gpus, so the file's batch_size is smaller; the dialects count it differently:
  bvlc           batch_size = batch / (iter-size x GPUs), that of each GPU
  caffe_jacinto  batch_size = batch / iter-size, which that Caffe shares out among its GPUs

CPU or GPU: `caffe train` without -gpu does what the solver file says. With --gpus that is the first of these.
Without, it is GPU 0 where the dialect is the one that the network was published in, as published, and in all
caffe_jacinto files (that Caffe needs a GPU); else the CPU. --cpu says CPU in any bvlc file.

paths: solver.prototxt names the other files as DIR/train.prototxt and so on, just as --output was given. If
that is a relative path, start Caffe in the folder where build_net was started; so too for the LMDBs.

examples:
  python -m caffe_jacinto.build_net --output net --dialect bvlc
  python -m caffe_jacinto.build_net --output net --network resnet10
  python -m caffe_jacinto.build_net --output net --gpus 0,1 --batch-size 512
  python -m caffe_jacinto.build_net --network resnet10 --summary --draw resnet10.svg
  python -m caffe_jacinto.build_net --summary deploy.prototxt --weights trained.caffemodel
  python -m caffe_jacinto.build_net --output net --dialect bvlc --num-classes 10 --crop-size 32 \\
      --strides 1,2,2,2,2 --batch-size 64 --iter-size 1 \\
      --train-lmdb data/train_lmdb --val-lmdb data/val_lmdb --val-images 10000
"""


def _whole(minimum: int) -> Callable[[str], int]:
    """Reads a whole number from ``minimum`` to what Caffe's files hold."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= INT32_MAX:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is no whole number from {minimum} to {INT32_MAX:,}"
            )
        return value

    return read


def _wholes(minimum: int, example: str) -> Callable[[str], tuple[int, ...]]:
    """Reads whole numbers with commas between them."""
    read_one = _whole(minimum)

    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(read_one(part) for part in text.split(","))
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is no list of whole numbers of {minimum} or more, like {example}"
            ) from None

    return read


def _gpus(text: str) -> tuple[int, ...]:
    gpus = _wholes(0, "0,1")(text)
    if len(set(gpus)) < len(gpus):
        raise argparse.ArgumentTypeError(f"{text!r} names a GPU twice")
    return gpus


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = Parser("python -m caffe_jacinto.build_net", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--output", type=_not_empty, metavar="DIR", help="folder for the files, made if missing")
    add(
        "--network",
        default=recipe.network.name,
        metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: {NETWORK})",
    )
    add(
        "--dialect",
        default=_published_dialect(recipe.network.name).value,
        choices=[dialect.value for dialect in Dialect],
        help="bvlc: stock Caffe 1.0; caffe_jacinto: the fork (default, as published: %(default)s)",
    )
    add(
        "--stage",
        default="initial",
        metavar="NAME",
        help=f"{', '.join(recipe.stages)} (default: %(default)s)",
    )
    add(
        "--num-classes",
        type=_whole(2),
        default=recipe.data.num_classes,
        metavar="N",
        help="(default: %(default)s)",
    )
    add(
        "--crop-size",
        type=_whole(1),
        default=recipe.network.crop_size,
        metavar="PIXELS",
        help="height and width of the network's input (default: %(default)s)",
    )
    add(
        "--strides",
        type=_wholes(1, "2,2,2,2,2"),
        default=recipe.network.strides,
        metavar="S,S,S,S,S",
        help=_strides_help(recipe),
    )
    for name, path in (("train", recipe.data.train_lmdb), ("val", recipe.data.val_lmdb)):
        add(f"--{name}-lmdb", type=_not_empty, default=path, metavar="PATH", help="(default: %(default)s)")
    mean_file = recipe.data.mean_file
    add(
        "--mean-file",
        type=_not_empty,
        default=mean_file,
        metavar="PATH",
        help=f".binaryproto of the mean image to subtract (default: {mean_file or 'none'})",
    )
    add(
        "--val-images",
        type=_whole(1),
        default=IMAGENET_VAL_IMAGES,
        metavar="N",
        help="in the validation LMDB; one test covers them all (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_whole(1),
        default=recipe.training.batch_size,
        metavar="N",
        help="images behind one update of the weights (default: %(default)s)",
    )
    add(
        "--iter-size",
        type=_whole(1),
        default=recipe.training.iter_size,
        metavar="N",
        help="passes that one update is accumulated over (default: %(default)s)",
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--gpus", type=_gpus, default=(), metavar="N,N", help="device numbers, e.g. 0,1 (default: see below)"
    )
    device.add_argument("--cpu", action="store_true", help="the solver says CPU (bvlc only)")
    look = parser.add_argument_group("to look at a network, with --output or without")
    look.add_argument(
        "--summary",
        nargs="?",
        const="",
        metavar="PROTOTXT",
        help="show its layers: shapes, parameters, MACs; of PROTOTXT, or of what the other arguments say",
    )
    look.add_argument("--format", choices=["text", "csv", "json"], help="of the summary (default: text)")
    look.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="its .caffemodel: show zeros, and the MACs that they leave",
    )
    look.add_argument("--draw", type=Path, metavar="FILE", help="draw it to FILE (.svg or .png)")
    return parser


def _strides_help(recipe: Recipe) -> str:
    name, strides = recipe.network.name, recipe.network.strides
    if name in NETWORKS and not takes_strides(name):
        return f"not with {name}, whose strides are fixed"
    default = f" (default: {','.join(map(str, strides))})" if strides else ""
    return f"of conv1a, pool1, pool2, pool3 and pool4 in jacintonet11{default}"


def _recipe_of(network: str | None) -> Recipe:
    """The published training of ``network``; for one without, JacintoNet11's, with that network in it."""
    name = network or NETWORK
    if f"imagenet_{name}" in built_in_recipes():
        return load_recipe(f"imagenet_{name}")
    recipe = load_recipe(f"imagenet_{NETWORK}")
    settings = recipe.network.model_copy(update={"name": name, "strides": None})
    return recipe.model_copy(update={"network": settings})


def _named_network(argv: Sequence[str]) -> str | None:
    """The network among the arguments, whose recipe gives the other ones' defaults."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--network", nargs="?")
    name: str | None = reader.parse_known_args(argv)[0].network
    return name


def _published_dialect(network: str) -> Dialect:
    return Dialect.CAFFE_JACINTO if network in PUBLISHED_WITH_THE_FORK else Dialect.BVLC


def main(argv: Sequence[str]) -> int:
    """Write the files; say what they are and which command trains them."""
    published = _recipe_of(_named_network(argv))
    arguments = _parser(published).parse_args(argv)
    looks = arguments.summary is not None or arguments.draw is not None
    _check_look(arguments, looks)
    if arguments.summary:
        _look(arguments, *_read(Path(arguments.summary)), None)
        return 0
    recipe = _recipe(published, arguments)
    dialect = Dialect(arguments.dialect)
    if arguments.cpu and dialect is Dialect.CAFFE_JACINTO:
        raise UserError("--cpu: caffe-jacinto needs a GPU; leave it out, or add --dialect bvlc")
    if dialect is Dialect.BVLC:
        _check_stock_caffe_can_say(recipe, arguments.stage)
    files = stage_files(
        recipe,
        arguments.stage,
        dialect,
        folder=arguments.output or "",
        gpus=arguments.gpus,
        iter_size=arguments.iter_size,
        solver_mode_gpu=_says_gpu(arguments, dialect),
        val_images=arguments.val_images,
    )
    if arguments.output:
        write_stage_files(files, Path(arguments.output))
        if arguments.format in (None, "text"):
            print(_written(recipe, arguments, dialect, list(files)))
    if looks:
        _look(arguments, files["deploy.prototxt"], recipe.network.name, dialect)
    return 0


def _check_look(arguments: argparse.Namespace, looks: bool) -> None:
    """Refuse arguments that have nothing to do."""
    if not looks and not arguments.output:
        raise UserError("give --output DIR for the files, or --summary or --draw FILE to look at the network")
    if arguments.summary and arguments.output:
        raise UserError(f"--summary {arguments.summary} shows a file that is there; leave --output out")
    for name in ("format", "weights"):
        if (
            getattr(arguments, name) is not None
            and arguments.summary is None
            and not (name == "weights" and looks)
        ):
            raise UserError(f"--{name} is of the summary: add --summary")


def _look(arguments: argparse.Namespace, text: str, where: str, dialect: Dialect | None) -> None:
    """Show and draw a network, as asked for."""
    from caffe_jacinto.netspec import summary as summary_tables
    from caffe_jacinto.netspec.summary import summarize
    from caffe_jacinto.prototxt.schema import parse_any_net
    from caffe_jacinto.prototxt.tree import tree_of
    from caffe_jacinto.pruning.weight_file import layer_zeros

    net = parse_any_net(text, where, dialect)
    zeros = layer_zeros(arguments.weights, net) if arguments.weights else None
    summary = summarize(tree_of(net), where, zeros)
    if arguments.draw is not None:
        from caffe_jacinto.netspec.drawing import draw

        draw(summary, arguments.draw)
    if arguments.summary is None:
        print(f"Drew {summary.name} to {arguments.draw}")
    elif arguments.format == "json":
        print(summary_tables.as_json(summary))
    elif arguments.format == "csv":
        print(summary_tables.as_csv(summary), end="")
    else:
        summary_tables.show(summary, sys.stdout)


def _read(path: Path) -> tuple[str, str]:
    """A prototxt's text, and its name for messages."""
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except OSError as error:
        raise UserError(f"--summary {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--summary {path}: not UTF-8 text ({error.reason} at byte {error.start}); give a prototxt"
        ) from None


def _check_stock_caffe_can_say(recipe: Recipe, stage_name: str) -> None:
    """Refuse files with which `caffe train` would train without the stage's sparsity, and say nothing."""
    stage = recipe.stages.get(stage_name)
    if stage and (stage.sparse or stage.freeze_zeros):
        raise UserError(
            f"--stage {stage_name}: stock Caffe's solver has no field for sparsity (sparse_mode and others); "
            f"train it with python -m caffe_jacinto.train {recipe.name}, or use --dialect caffe_jacinto"
        )


def _says_gpu(arguments: argparse.Namespace, dialect: Dialect) -> bool:
    if arguments.gpus or arguments.cpu:
        return bool(arguments.gpus)
    as_published = f"imagenet_{arguments.network}" in built_in_recipes()
    return dialect is Dialect.CAFFE_JACINTO or (
        as_published and dialect is _published_dialect(arguments.network)
    )


def _recipe(published: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The published recipe with the values of the command line, which the parser has checked."""
    data = {
        "num_classes": arguments.num_classes,
        "train_lmdb": arguments.train_lmdb,
        "val_lmdb": arguments.val_lmdb,
        "mean_file": arguments.mean_file,
    }
    network = {"name": arguments.network, "crop_size": arguments.crop_size, "strides": arguments.strides}
    training = {"batch_size": arguments.batch_size, "iter_size": arguments.iter_size}
    return published.model_copy(
        update={
            "data": published.data.model_copy(update=data),
            "network": published.network.model_copy(update=network),
            "training": published.training.model_copy(update=training),
        }
    )


def _written(recipe: Recipe, arguments: argparse.Namespace, dialect: Dialect, names: list[str]) -> str:
    network, data, training = recipe.network, recipe.data, recipe.training
    strides = f", strides {','.join(map(str, network.strides))}" if network.strides else ""
    if _says_gpu(arguments, dialect):
        devices = f"GPU {','.join(map(str, arguments.gpus or (0,)))}"
    else:
        devices = "the CPU"
    val_batch = training.val_batch_size
    tests = iterations_per_test(arguments.val_images, val_batch)
    batches = f"{tests} batch{'es' if tests > 1 else ''}"
    twice = tests * val_batch - arguments.val_images
    wraps = f"; the last batch wraps round, so {twice} images count twice" if twice else ""
    lines = [
        f"Wrote {', '.join(names)} into {arguments.output}:",
        f"  network  {network.name}, {data.num_classes} classes, "
        f"{network.crop_size}x{network.crop_size} crops{strides}",
        f"  dialect  {dialect.value} ({_CAFFE[dialect]})",
        f"  stage    {arguments.stage}, {recipe.stages[arguments.stage].solver.max_iter} iterations",
        f"  batch    {training.batch_size} images an update, in {training.iter_size} "
        f"pass{'es' if training.iter_size > 1 else ''} on {devices}",
        f"  test     {arguments.val_images} images in {batches} of {val_batch}{wraps}",
        *_next_step(recipe, arguments, dialect),
    ]
    return "\n".join(lines)


_CAFFE = {Dialect.BVLC: "stock Caffe 1.0", Dialect.CAFFE_JACINTO: "the fork caffe-jacinto"}


def _next_step(recipe: Recipe, arguments: argparse.Namespace, dialect: Dialect) -> list[str]:
    """The command that trains what was written."""
    stage = recipe.stages[arguments.stage]
    command = ["caffe", "train", "-solver", str(Path(arguments.output, "solver.prototxt"))]
    if stage.start:
        command += ["-weights", f"{stage.start.upper()}.caffemodel"]
    if arguments.gpus:
        command += ["-gpu", ",".join(map(str, arguments.gpus))]
    start = f" ({stage.start.upper()}.caffemodel: the final weights of {stage.start})" if stage.start else ""
    return [f"Train it with {_CAFFE[dialect]}{start}:", f"  {shlex.join(command)}"]


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.build_net", main))
