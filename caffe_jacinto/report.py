"""Read Caffe's logs and give the result tables.

    python -m caffe_jacinto.report training/                       every run in a folder
    python -m caffe_jacinto.report my_train.log --format json
    python -m caffe_jacinto.report RUN1 RUN2 --plot curves.svg
    python -m caffe_jacinto.report RUN1 RUN2 --html report.html    to look at in a browser

A PATH is a log file, a stage's folder, a run's folder or a folder of runs, of this project, stock Caffe,
NVCaffe or caffe-jacinto: finished, still running or cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import USER_ERROR, UserError, invoked_as, run_command
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs import compare, tables
from caffe_jacinto.logs.compare import SORT_KEYS, in_order
from caffe_jacinto.logs.curves import AXES
from caffe_jacinto.logs.discover import Run, find_runs

PROGRAM = "caffe_jacinto.report"
PLOT_KINDS = (".png", ".svg")
PAGE_KINDS = (".html", ".htm")


def main(argv: Sequence[str]) -> int:
    """Print the report. Returns 2 if a path could not be reported, 0 otherwise.

    Raises:
        UserError: the file of --plot, --html or --series has an unknown kind or cannot be written; what
            --plot is to draw is not in the logs; a package for --series or --tensorboard is not installed.
    """
    arguments = _arguments(argv)
    plot, page = arguments.plot, arguments.html
    files = (
        ("--plot", plot, PLOT_KINDS),
        ("--scatter", arguments.scatter, PLOT_KINDS),
        ("--html", page, PAGE_KINDS),
    )
    for option, path, kinds in files:
        if path is not None and path.suffix.lower() not in kinds:
            raise UserError(f"{option} {path}: the name must end in {' or '.join(kinds)}")
    if (arguments.x != AXES[0] or arguments.y) and plot is None:
        raise UserError("--x and --y say what --plot draws; give --plot FILE, too")
    if arguments.seeds and arguments.compare:
        raise UserError("--seeds and --compare are two ways to show the runs; give one of them")
    if arguments.sort is not None and not arguments.compare:
        instead = "leave out --sort, or give --compare" if arguments.seeds else "give --compare, too"
        raise UserError(f"--sort orders the runs of --compare; {instead}")
    if arguments.series is not None:
        from caffe_jacinto.logs.export import check_series

        check_series(arguments.series)
    if arguments.tensorboard is not None:
        from caffe_jacinto.logs.export import check_tensorboard

        check_tensorboard()
    runs, problems = find_runs(
        arguments.paths,
        history=plot is not None or page is not None,
        every_point=arguments.series is not None or arguments.tensorboard is not None,
    )
    for problem in problems:
        print(f"{invoked_as(PROGRAM)}: error: {printable(str(problem))}", file=sys.stderr)
    if arguments.sort is not None:
        runs = in_order(runs, arguments.sort)
    if runs or arguments.format == "json":
        _print(runs, arguments)
    if arguments.scatter is not None and runs:
        from caffe_jacinto.logs.scatter import draw_choices

        draw_choices(runs, arguments.scatter, tables.published_rows(runs, arguments.published))
    if plot is not None and runs:
        from caffe_jacinto.logs.plot import plot_runs

        plot_runs(runs, plot, axis=arguments.x, names=arguments.y or ())
    if arguments.series is not None and runs:
        from caffe_jacinto.logs.export import write_series

        write_series(runs, arguments.series)
    if arguments.tensorboard is not None and runs:
        from caffe_jacinto.logs.export import write_tensorboard

        write_tensorboard(runs, arguments.tensorboard)
    if page is not None and runs:
        _write_page(runs, page, arguments.published)
    return USER_ERROR if problems else 0


def _write_page(runs: Sequence[Run], path: Path, published: bool) -> None:
    from caffe_jacinto.logs.page import write_page

    try:
        write_page(runs, path, published=published)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror}") from None


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser(f"python -m {PROGRAM}", description, rest.strip("\n"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="log file or folder with logs")
    formats = ("table", "markdown", "csv", "json")
    parser.add_argument("--format", choices=formats, default="table", help="default: table")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw the curves to FILE ({' or '.join(PLOT_KINDS)})"
    )
    parser.add_argument(
        "--y", action="append", metavar="NAME",
        help="draw this curve in a panel of its own, instead of the usual ones; may be given several times: "
        "train_loss, learning_rate, sparsity, images_per_second, an output of a test, or top1, top5, mean_ap",
    )  # fmt: skip
    parser.add_argument("--x", choices=AXES, default=AXES[0], help=f"of --plot (default: {AXES[0]})")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with tables and interactive curves to FILE"
    )
    parser.add_argument(
        "--compare", action="store_true",
        help="show the runs beside each other, with differences, and the solver settings that differ",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", action="store_true",
        help="show mean and spread of runs that differ in their seed, named NAME-seed1, NAME-seed2 and so on",
    )  # fmt: skip
    parser.add_argument(
        "--sort", choices=SORT_KEYS, metavar="FIGURE",
        help=f"order the runs of --compare, the best first: {', '.join(SORT_KEYS)}",
    )  # fmt: skip
    parser.add_argument(
        "--scatter", type=Path, metavar="FILE",
        help=f"draw accuracy against sparsity and complexity to FILE ({' or '.join(PLOT_KINDS)})",
    )  # fmt: skip
    parser.add_argument(
        "--series", type=Path, metavar="FILE",
        help="write every point of every stage as one table (.csv, .json or .parquet; this needs pyarrow)",
    )  # fmt: skip
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR",
        help="write the curves as TensorBoard's event files, a folder for each run (needs tensorboard)",
    )  # fmt: skip
    help_text = (
        "show the published ImageNet results, also where they do not compare (default: only where they do)"
    )
    parser.add_argument("--published", action="store_true", help=help_text)
    return parser.parse_args(argv)


def _print(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    form, published = arguments.format, arguments.published
    views: tuple[Callable[[], str], Callable[[], str], Callable[[], list[tables.Table]]]
    if arguments.seeds:
        from caffe_jacinto.logs import seeds

        views = (lambda: seeds.as_json(runs), lambda: seeds.as_csv(runs), lambda: [seeds.spread_table(runs)])
    elif arguments.compare:
        views = (
            lambda: compare.as_json(runs),
            lambda: compare.as_csv(runs),
            lambda: compare.comparison(runs),
        )
    else:
        views = (
            lambda: tables.as_json(runs),
            lambda: tables.as_csv(runs, published=published),
            lambda: tables.tables(runs, published=published),
        )
    as_json, as_csv, as_tables = views
    if form == "json":
        print(as_json())
    elif form == "csv":
        print(as_csv(), end="")
    elif form == "markdown":
        print(tables.as_markdown(as_tables()))
    else:
        tables.show(as_tables(), sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(PROGRAM, main))
