"""Caffe's command line on PyTorch; installed as `caffe-torch`.

caffe-torch train -solver solver.prototxt [-weights W.caffemodel | -snapshot S.solverstate] [-gpu 0,1|all]
caffe-torch test -model val.prototxt -weights W.caffemodel -iterations 100
caffe-torch time -model deploy.prototxt
caffe-torch device_query -gpu all
torchrun --nnodes 2 --nproc-per-node 4 ... -m caffe_jacinto.engines.pytorch train -solver solver.prototxt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from caffe_jacinto import __version__
from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import USER_ERROR, RunFailed, UserError, run_command
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.options import add_sparse_options, sparse_settings


def script() -> int:
    """The console script."""
    return run_command("caffe-torch", main)


def main(argv: Sequence[str]) -> int:
    """Do what the first argument says; returns the exit code."""
    if list(argv) in (["--version"], ["-version"]):
        print(f"caffe version {__version__} (caffe-torch)")
        return 0
    options = _parser().parse_args(argv)
    from caffe_jacinto.common import processes as parent
    from caffe_jacinto.engines.pytorch import distributed as launch

    gpus = launch.devices(options.gpu)
    if options.action == "device_query":
        return launch.describe_devices(gpus)
    if options.action == "train" and len(gpus) > 1 and not launch.is_rank():
        return launch.launch_ranks(argv, len(gpus))
    if launch.is_rank():
        parent.end_with_parent()
    try:
        return _act(options, gpus)
    except UserError as error:
        # What is wrong before the ranks have met is wrong in all of them: said once.
        if launch.is_another_rank() and not isinstance(error, RunFailed):
            return USER_ERROR
        raise


def _act(options: argparse.Namespace, gpus: tuple[int, ...]) -> int:
    if options.action == "time":
        from caffe_jacinto.engines.pytorch.timing import time_net

        return time_net(
            options.model, options.dialect, gpus, iterations=options.iterations, precision=options.precision
        )
    if options.action == "test":
        from caffe_jacinto.engines.pytorch.evaluate import TestOptions, test

        return test(
            TestOptions(
                model=options.model,
                weights=options.weights,
                iterations=options.iterations,
                dialect=options.dialect,
                gpus=gpus,
                precision=options.precision,
                display_sparsity=options.display_sparsity,
                workers=options.workers,
                level=options.level,
                stages=options.stage,
            )
        )
    from caffe_jacinto.engines.pytorch.train import TrainOptions, train

    return train(
        TrainOptions(
            solver=options.solver,
            dialect=options.dialect,
            weights=options.weights,
            snapshot=options.snapshot,
            gpus=gpus,
            precision=options.precision,
            shuffle=options.shuffle,
            workers=options.workers,
            sparse=sparse_settings(options),
            freeze_zeros=options.freeze_zeros,
            reestimate_batches=options.reestimate_batches,
        )
    )


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n")
    parser = Parser("caffe-torch", description, examples.strip("\n"))
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|test|time|device_query")
    train = _action(actions, "train", "train or go on training")
    train.add_argument("-solver", "--solver", type=Path, required=True, metavar="FILE")
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "-weights", "--weights", type=_paths, default=(), metavar="FILE", help="start from these weights"
    )
    start.add_argument(
        "-snapshot", "--snapshot", type=Path, metavar="FILE", help="go on from this .solverstate"
    )
    train.add_argument(
        "-shuffle", "--shuffle", action="store_true", help="another order of the images each time through"
    )
    train.add_argument(
        "-reestimate_batches",
        "--reestimate_batches",
        type=_number(0),
        default=0,
        metavar="N",
        help="training batches to estimate batch-norm statistics over at the end (default: %(default)s)",
    )
    add_sparse_options(train)
    test = _action(actions, "test", "score weights by a model's outputs")
    test.add_argument("-weights", "--weights", type=_paths, required=True, metavar="FILE")
    test.add_argument(
        *("-display_sparsity", "--display_sparsity"), nargs="?", type=_flag, const=True, default=False
    )
    test.add_argument("-level", "--level", type=int, default=0, help="of the net's state")
    test.add_argument("-stage", "--stage", type=_stages, default=(), metavar="A,B", help="of the net's state")
    time = _action(actions, "time", "time a model's layers")
    for action in (test, time):
        action.add_argument("-model", "--model", type=Path, required=True, metavar="FILE")
        action.add_argument("-iterations", "--iterations", type=_number(1), default=50, metavar="N")
    query = actions.add_parser("device_query", help="what GPUs there are", description="What GPUs there are.")
    query.add_argument("-gpu", "--gpu", default="all", metavar="0,1|all")
    return parser


def _action(actions: argparse._SubParsersAction[Parser], name: str, what: str) -> argparse.ArgumentParser:
    """A subcommand, with the arguments that train, test and time share."""
    description = f"{what[0].upper()}{what[1:]}."
    parser = actions.add_parser(name, help=what, prog=f"caffe-torch {name}", description=description)
    parser.add_argument("-gpu", "--gpu", default="", metavar="0,1|all", help="default: the CPU")
    parser.add_argument(
        "-dialect",
        "--dialect",
        type=_dialect,
        default=Dialect.BVLC,
        metavar="|".join(dialect.value for dialect in Dialect),
        help="of the prototxts and weights (default: bvlc, stock Caffe's)",
    )
    parser.add_argument(
        "-precision",
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of convolutions and products; weights and statistics are fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "-workers", "--workers", type=_number(1), metavar="N", help="processes that decode images"
    )
    return parser


def _number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= 2**31 - 1:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {least}")
        return int(text)

    return read


def _paths(text: str) -> tuple[Path, ...]:
    """Caffe takes several weight files with commas between them."""
    return tuple(Path(part) for part in text.split(","))


def _flag(text: str) -> bool:
    """A boolean as gflags reads it, behind ``=``."""
    words = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def _stages(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _dialect(text: str) -> Dialect:
    try:
        return Dialect(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {' or '.join(dialect.value for dialect in Dialect)}"
        ) from None


if __name__ == "__main__":
    sys.exit(script())
