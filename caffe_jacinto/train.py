"""Train the stages of a recipe one after the other, then test the result.

python -m caffe_jacinto.train demo_digits
python -m caffe_jacinto.train imagenet_jacintonet11 -gpu 0,1 --set training.batch_size=512
python -m caffe_jacinto.train my_recipe.toml --output training/first_try --dry-run
python -m caffe_jacinto.train demo_digits --engine torch
python -m caffe_jacinto.train demo_digits --sweep target=0.5,0.7,0.9
python -m caffe_jacinto.train demo_digits --max-loss 1.0
python -m caffe_jacinto.train --from solver.prototxt --weights trained.caffemodel
python -m caffe_jacinto.train --new my_recipe.toml --train-lmdb data/train_lmdb --val-lmdb data/val_lmdb
python -m caffe_jacinto.train imagenet_jacintonet11 --engine torch --slurm --nodes 2 --gpus-per-node 8
python -m caffe_jacinto.train --resume training/first_try
python -m caffe_jacinto.train --status training/first_try
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from caffe_jacinto.common.arguments import Parser, fraction, gpu_request, whole_number
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.engines.contract import EngineKind, Precision
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.load import built_in_recipes, toml_value
from caffe_jacinto.runs.slurm import SlurmRequest, sbatch_option, slurm_minutes

if TYPE_CHECKING:
    from caffe_jacinto.runs.start import Options

DEFAULT_TARGET = 0.8
"""As published."""


def main(arguments: Sequence[str]) -> int:
    """Start or resume a run, or print its status; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    what = (options.recipe, options.resume, options.status, options.new, options.solver)
    if sum(option is not None for option in what) != 1:
        parser.error("give one of RECIPE, --from SOLVER, --resume RUN, --status RUN and --new FILE")
    if options.open and (options.dry_run or options.status is not None):
        parser.error("--open goes with a training: RECIPE or --resume RUN")
    if options.solver is None and (options.weights or options.target is not None):
        parser.error(
            "--weights and --target go with --from SOLVER; a recipe has stages.NAME.weights and targets"
        )
    sweeps = options.sweep is not None or options.max_loss is not None
    if sweeps and (options.recipe is None or options.slurm or options.open):
        parser.error("--sweep and --max-loss go with RECIPE, and not with --slurm or --open")
    if options.new is not None:
        return _new_recipe(parser, options)
    if options.status is not None:
        from caffe_jacinto.runs.status import status_lines
        from caffe_jacinto.runs.sweep import is_sweep, sweep_status

        place = Path(options.status)
        print("\n".join(sweep_status(place) if is_sweep(place) else status_lines(place)))
        return 0
    from caffe_jacinto.runs.start import Options, full_disks_named, resume, start

    overrides = _overrides(options)
    wanted = Options(
        gpus=options.gpus if options.gpus_per_node is None else tuple(range(options.gpus_per_node)),
        caffe=options.caffe,
        engine=options.engine,
        dialect=None if options.dialect is None else Dialect(options.dialect),
        precision=options.precision,
        output=None if options.output is None else Path(options.output),
        keep=options.keep,
        dry_run=options.dry_run,
        accept_data=options.accept_data,
        slurm=_slurm(options),
        open_page=options.open,
    )
    if options.resume is None:
        if options.accept_data:
            parser.error("--accept-data goes with --resume")
        if options.solver is not None:
            return _start_from(options, overrides, wanted)
        if sweeps:
            from caffe_jacinto.runs.sweep import Request, start_sweep

            request = Request(tuple(dict.fromkeys(options.sweep or ())), options.max_loss)
            return start_sweep(options.recipe, overrides, wanted, request)
        return start(options.recipe, overrides, wanted)
    if overrides or options.output or options.dry_run or options.dialect or options.precision:
        raise UserError(
            "--resume continues with the run's own recipe: only --gpus, --caffe, --engine, --keep, "
            "--accept-data and the options for Slurm may be given with it; to change more, start a new run"
        )
    with full_disks_named(Path(options.resume)):
        from caffe_jacinto.runs.sweep import is_sweep, resume_sweep

        if is_sweep(Path(options.resume)):
            if options.slurm or options.open or options.accept_data:
                raise UserError(
                    f"{options.resume} is a sweep: --slurm, --open and --accept-data go with one of its runs"
                )
            return resume_sweep(Path(options.resume), wanted)
        return resume(Path(options.resume), wanted)


def _start_from(options: argparse.Namespace, overrides: Sequence[str], wanted: Options) -> int:
    """Derive a recipe from a solver, write it, and start it."""
    from caffe_jacinto.runs.from_solver import Request, write_recipe
    from caffe_jacinto.runs.start import start

    target = DEFAULT_TARGET if options.target is None else options.target
    request = Request(Path(options.solver), options.weights, target, options.train_lmdb, options.val_lmdb)
    recipe, folder, lines = write_recipe(request, wanted.output)
    print("\n".join(lines), flush=True)
    return start(str(recipe), overrides, replace(wanted, output=folder, must_reach=True))


def _new_recipe(parser: Parser, options: argparse.Namespace) -> int:
    """Write a recipe for a data set."""
    lmdbs = ("train_lmdb", "val_lmdb")
    given = (name for name, value in vars(options).items() if value != parser.get_default(name))
    others = set(given).difference(("new", *lmdbs))
    if others or not all(getattr(options, name) for name in lmdbs):
        parser.error("--new FILE takes --train-lmdb DIR and --val-lmdb DIR and nothing else")
    from caffe_jacinto.runs.new_recipe import write_new_recipe

    print("\n".join(write_new_recipe(Path(options.new), options.train_lmdb, options.val_lmdb)))
    return 0


def sweep_targets(text: str) -> tuple[float, ...]:
    """An argument type: what is swept, ``target=0.5,0.8``, and its values."""
    key, equals, values = text.partition("=")
    if key != "target" or not equals:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not target=F,F,..., like target=0.5,0.8")
    found = tuple(fraction(value) for value in values.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} has a target twice; give each once")
    return found


def points(text: str) -> float:
    """An argument type: points of accuracy, 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of points from 0 to 100, like 1.0")
    return value


def _parser() -> Parser:
    description, _, examples = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.train", description, examples.strip("\n"))
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help=f"a .toml file, or a built-in recipe: {', '.join(built_in_recipes())}",
    )
    count = whole_number(1)
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.add_argument(
        "--sweep",
        type=sweep_targets,
        action="extend",
        metavar="target=0.5,0.8",
        help="train the stages before pruning once, and the others for each of these sparsities",
    )
    parser.add_argument(
        "--max-loss",
        type=points,
        metavar="P",
        help="search the sparsest network that loses at most P points of the top-1 before pruning",
    )
    parser.add_argument("--status", metavar="RUN", help="print how far the run in this folder is")
    parser.add_argument(
        "--from",
        dest="solver",
        metavar="SOLVER",
        help="derive a recipe from this solver and its network, write it and train (docs/your-network.md)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="with --from: trained weights to start from; without, it trains them first",
    )
    parser.add_argument(
        "--target",
        type=fraction,
        metavar="F",
        help=f"with --from: the fraction of the weights to become zero (default: {DEFAULT_TARGET})",
    )
    new_help = "write a recipe for the data set in --train-lmdb and --val-lmdb, to train with and to change"
    parser.add_argument("--new", metavar="FILE", help=new_help)
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the recipe, e.g. stages.initial.solver.max_iter=1000; repeatable",
    )
    parser.add_argument(
        *("--gpus", "--gpu", "-gpu"),
        type=gpu_request,
        metavar="0,1|all",
        help='GPUs to train on; all: those of this machine, auto: the CPU if it has none, "": the CPU',
    )
    parser.add_argument("--caffe", metavar="PATH", help="the caffe executable, or the tree it was built in")
    parser.add_argument(
        "--engine",
        choices=get_args(EngineKind),
        help="require this kind of Caffe, or train on PyTorch (default: the Caffe that is found)",
    )
    parser.add_argument(
        "--dialect",
        choices=[dialect.value for dialect in Dialect],
        help="of the files for PyTorch (default: bvlc); each Caffe has its own",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="PyTorch only: bf16 computes convolutions and inner products in bfloat16 (default: fp32)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="the run folder (default: training/<dataset>_<network>_<time>)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="write every file and print every command, but run nothing"
    )
    parser.add_argument(
        "--open",
        action="store_true",
        help="print the address of the run's page (RUN/report.html), to follow the training in a browser",
    )
    parser.add_argument(
        "--accept-data",
        action="store_true",
        help="with --resume: go on although an LMDB is not the one that the run was started with",
    )
    parser.add_argument(
        "--keep", type=count, metavar="N", help="newest snapshots to keep, besides the best by top-1"
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="training.batch_size, the effective batch"
    )
    parser.add_argument("--iter-size", type=count, metavar="N", help="training.iter_size, passes per update")
    parser.add_argument("--train-lmdb", metavar="DIR", help="data.train_lmdb")
    parser.add_argument("--val-lmdb", metavar="DIR", help="data.val_lmdb")
    _add_slurm_arguments(parser)
    return parser


def _add_slurm_arguments(parser: Parser) -> None:
    slurm = parser.add_argument_group("as a Slurm job (docs/slurm.md)")
    slurm.add_argument(
        "--slurm", action="store_true", help="submit the run to Slurm instead of training here"
    )
    slurm.add_argument(
        "--nodes", type=whole_number(1), metavar="N", help="training.nodes: machines that train together"
    )
    slurm.add_argument(
        "--gpus-per-node", type=whole_number(0), metavar="G", help="GPUs of each node; 0 trains on the CPU"
    )
    slurm.add_argument(
        "--time",
        type=slurm_minutes,
        metavar="T",
        help="a job's time limit, as 90 (minutes), 12:00:00 or 2-12; the run goes on in the next job",
    )
    slurm.add_argument("--partition", metavar="P", help="Slurm's partition")
    slurm.add_argument(
        "--set-slurm",
        dest="slurm_options",
        type=sbatch_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another option of sbatch, e.g. cpus-per-task=8 or account=NAME; repeatable",
    )


def _slurm(options: argparse.Namespace) -> SlurmRequest | None:
    request = SlurmRequest(options.nodes, options.time, options.partition, tuple(options.slurm_options))
    if options.slurm:
        if options.gpus is not None:
            raise UserError("--gpus: a Slurm job's GPUs are numbered by Slurm; give --gpus-per-node")
        return request
    if request != SlurmRequest() or options.gpus_per_node is not None:
        raise UserError(
            "--nodes, --gpus-per-node, --time, --partition and --set-slurm are for a Slurm job: add --slurm"
        )
    return None


def _overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of the recipe: those of the short options, then those of --set."""
    shortcuts = {
        "training.batch_size": options.batch_size,
        "training.iter_size": options.iter_size,
        "training.keep": None if options.resume else options.keep,
        "data.train_lmdb": options.train_lmdb,
        "data.val_lmdb": options.val_lmdb,
    }
    given = [f"{key}={toml_value(value)}" for key, value in shortcuts.items() if value is not None]
    settings: list[str] = options.settings
    return given + settings


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.train", main))
