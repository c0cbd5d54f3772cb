"""Disturb real trainings and commands in every way that happens to them, and check that nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from caffe_jacinto.common.arguments import Parser, whole_number
from caffe_jacinto.common.errors import FAILED, run_command
from caffe_jacinto.common.text import Column, Line, count_of, duration, show_table
from faults import table
from faults.cases import ENGINES, Case
from faults.session import Session, say

PROGRAM = "tools/utils/faults.sh"
TABLE = "table.md"


def _cases(seed: int, only: int | None, end: float) -> Iterator[Case]:
    """The cases in turn, while there is time for another; or the one that is asked for."""
    if only is not None:
        yield Case(seed, only)
        return
    number = 0
    while time.monotonic() < end or number == 0:
        yield Case(seed, number)
        number += 1


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=options.folder))
    session = Session(seed, folder, options.jobs)
    say(f"seed {seed}, in {folder}")
    engines = list(ENGINES) if options.only is None else [Case(seed, options.only).engine or "torch"]
    session.prepare(engines)
    session.run(_cases(seed, options.only, begun + 60 * options.minutes))
    return _show(session, time.monotonic() - begun)


def _show(session: Session, seconds: float) -> int:
    body = table.rows(session.results)
    carried_out = sum(result.not_run is None for _, result in session.results)
    title = f"seed {session.seed}: {count_of(carried_out, 'case')} in {duration(seconds)}"
    columns = [Column("what was done", words=True), *map(Column, table.COLUMNS.values())]
    print()
    show_table(sys.stdout, title, columns, [Line(row) for row in body], *session.notes())
    text = "\n".join([table.markdown(title, body), *(f"\n{note}" for note in session.notes())]) + "\n"
    print(f"\n{text}")
    if not session.broken:
        shutil.rmtree(session.folder)
        return 0
    (session.folder / TABLE).write_text(text)
    for case in session.broken:
        print(f"{case.title()} is broken; again: {case.command()}", file=sys.stderr)
    print(f"kept: {session.folder}", file=sys.stderr)
    return FAILED


def _parser() -> Parser:
    parser = Parser(PROGRAM, (__doc__ or "").strip())
    parser.add_argument(
        "--minutes", type=whole_number(1), default=10, metavar="N", help="for how long (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), metavar="S", help="repeat a session (default: a new one)"
    )
    parser.add_argument("--only", type=whole_number(0), metavar="N", help="only case N of the session")
    parser.add_argument(
        "--jobs",
        type=whole_number(1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="cases at a time (default: the number of cores)",
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where to work (default: the system's temporary folder)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(PROGRAM, main))
