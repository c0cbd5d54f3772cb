"""Caffe's command line on PyTorch; installed as `caffe-torch`.

caffe-torch train -solver solver.prototxt [-weights W.caffemodel | -snapshot S.solverstate] [-gpu 0,1|all]
caffe-torch test -model val.prototxt -weights W.caffemodel -iterations 100 [-gpu 0,1|all]
caffe-torch time -model deploy.prototxt
caffe-torch device_query -gpu all
torchrun --nnodes 2 --nproc-per-node 4 ... -m caffe_jacinto.engines.pytorch train -solver solver.prototxt
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from caffe_jacinto import __version__
from caffe_jacinto.common.arguments import Parser, gpu_list, whole_number
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.processes import end_with_parent
from caffe_jacinto.engines.contract import (
    Precision,
    add_quantization_arguments,
    add_stage_arguments,
    pruning_settings,
    quantization_settings,
)
from caffe_jacinto.engines.pytorch import slurm
from caffe_jacinto.engines.pytorch.builds import pip_command
from caffe_jacinto.engines.pytorch.engine import DecodeChoice, Options, has_torch
from caffe_jacinto.prototxt.dialects import Dialect


def script() -> int:
    """The console script."""
    return run_command("caffe-torch", main)


def main(argv: Sequence[str]) -> int:
    """Carry out the action that the first argument names; returns the exit code."""
    if list(argv) in (["--version"], ["-version"]):
        print(f"caffe version {__version__} (caffe-torch)")
        return 0
    arguments = _parser().parse_args(argv)
    options = Options()
    for name in vars(arguments).keys() & vars(options).keys():
        setattr(options, name, getattr(arguments, name))
    options.sparse = pruning_settings(arguments)
    options.quantize = quantization_settings(arguments)
    if not has_torch():
        raise UserError(f"{sys.executable} has no PyTorch; install it: {pip_command()}")
    slurm.become_rank()
    # Before PyTorch is imported: what fails between ranks is reported here, without C++ stack traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from caffe_jacinto.engines.pytorch import distributed

    if options.action == "check":
        return _check(options)
    if options.gpus is None:
        options.gpus = distributed.all_gpus()
    if options.action == "device_query":
        return distributed.describe_devices(options.gpus)
    if options.action in ("train", "test") and not distributed.is_rank():
        ranks = len(options.gpus) or options.cpu_ranks
        if options.nodes > 1:
            return slurm.launch_ranks(argv, options.nodes, ranks, on_cpu=not options.gpus)
        if ranks > 1:
            if not options.gpus:
                distributed.share_cores(ranks)
            return distributed.launch_ranks(argv, ranks)
    if distributed.is_rank():
        end_with_parent(distributed.launcher())
    try:
        return _act(options)
    except (UserError, OSError) as error:
        distributed.report_of_rank(error)


def _act(options: Options) -> int:
    if options.action == "time":
        from caffe_jacinto.engines.pytorch.evaluate import time_net

        return time_net(options)
    if options.action == "test":
        from caffe_jacinto.engines.pytorch.evaluate import test

        return test(options)
    from caffe_jacinto.engines.pytorch.train import train

    return train(options)


def _check(options: Options) -> int:
    """Read stages' prototxts as JSON, and print what training would refuse in them, as JSON."""
    from caffe_jacinto.engines.pytorch.stage_check import check_stages

    content = json.load(sys.stdin)
    images = {path: tuple(shape) for path, shape in content["images"].items()}
    print(json.dumps(check_stages(content["stages"], images, options.dialect)))
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n")
    parser = Parser("caffe-torch", description, examples.strip("\n"))
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|test|time|device_query")
    train = _action(actions, "train", "train, or resume training")
    train.add_argument("-solver", "--solver", type=Path, required=True, metavar="FILE")
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "-weights", "--weights", type=_paths, default=(), metavar="FILE", help="start from these weights"
    )
    start.add_argument(
        "-snapshot", "--snapshot", type=Path, metavar="FILE", help="resume from this .solverstate"
    )
    train.add_argument(
        "-shuffle", "--shuffle", action="store_true", help="another order of the images each time through"
    )
    train.add_argument(
        *("-nodes", "--nodes"),
        type=whole_number(1),
        default=1,
        metavar="N",
        help="inside a Slurm job: machines that train together",
    )
    _add_cpu_ranks(train, "processes that train together on each machine's CPU")
    _add_gpu_arguments(train)
    add_stage_arguments(train, batches=0)
    add_quantization_arguments(train)
    test = _action(actions, "test", "evaluate weights by a model's outputs")
    test.add_argument("-weights", "--weights", type=_paths, required=True, metavar="FILE")
    test.add_argument(
        *("-display_sparsity", "--display_sparsity"), nargs="?", type=_flag, const=True, default=False
    )
    _add_cpu_ranks(test, "processes that share the batches out on the CPU")
    test.add_argument("-level", "--level", type=int, default=0, help="of the net's state")
    test.add_argument("-stage", "--stage", type=_stages, default=(), metavar="A,B", help="of the net's state")
    time = _action(actions, "time", "time a model's layers")
    for action in (test, time):
        action.add_argument("-model", "--model", type=Path, required=True, metavar="FILE")
        action.add_argument("-iterations", "--iterations", type=whole_number(1), default=50, metavar="N")
    query = actions.add_parser("device_query", help="what GPUs there are", description="What GPUs there are.")
    query.add_argument("-gpu", "--gpu", dest="gpus", type=_gpus, default=None, metavar="0,1|all")
    # For preflight; it is not in the list of actions.
    check = actions.add_parser("check", description="Check stages, read as JSON from standard input.")
    check.add_argument("-dialect", type=_dialect, required=True)
    return parser


def _add_cpu_ranks(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        *("-cpu_ranks", "--cpu_ranks"),
        type=whole_number(1),
        default=1,
        metavar="N",
        help=f"without -gpu: {what}",
    )


def _add_gpu_arguments(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        *("-decode", "--decode"),
        choices=get_args(DecodeChoice),
        default="auto",
        help="where JPEG images are decoded; both: every other batch on the GPU; auto: what measures fastest"
        " (default: %(default)s)",
    )
    train.add_argument(
        *("-graph", "--graph"),
        type=_flag,
        default=True,
        metavar="true|false",
        help="on one GPU: record an iteration as a CUDA graph and replay it (default: true)",
    )
    train.add_argument(
        *("-deterministic", "--deterministic"), action="store_true", help="the same bits on a GPU each time"
    )
    train.add_argument(
        *("-bn_stats", "--bn_stats"),
        choices=("mean", "first"),
        default="mean",
        help="batch-norm statistics of several GPUs that are tested and saved (default: %(default)s)",
    )


def _action(actions: argparse._SubParsersAction[Parser], name: str, what: str) -> argparse.ArgumentParser:
    """A subcommand, with the arguments that train, test and time share."""
    description = f"{what[0].upper()}{what[1:]}."
    parser = actions.add_parser(name, help=what, prog=f"caffe-torch {name}", description=description)
    parser.add_argument(
        *("-gpu", "--gpu"), dest="gpus", type=_gpus, default=(), metavar="0,1|all", help="default: the CPU"
    )
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
        choices=get_args(Precision),
        default="fp32",
        help="of convolutions and products; weights and statistics are fp32. auto: what measures fastest in"
        " training, fp32 elsewhere (default: %(default)s)",
    )
    parser.add_argument(
        "-workers", "--workers", type=whole_number(1), metavar="N", help="processes that decode images"
    )
    return parser


def _gpus(text: str) -> tuple[int, ...] | None:
    """A list of GPU numbers, or None for ``all``."""
    return None if text == "all" else gpu_list(text)


def _paths(text: str) -> tuple[Path, ...]:
    """One weight file or, as Caffe takes them, several with commas between them."""
    return (Path(text),) if Path(text).exists() else tuple(Path(part) for part in text.split(","))


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
