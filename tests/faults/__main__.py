"""Disturb real trainings and commands in every way that happens to them, and check that nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from caffe_jacinto.common.arguments import Parser, whole_number
from caffe_jacinto.common.errors import FAILED, RunFailed, run_command
from caffe_jacinto.common.text import Column, Line, count_of, duration, show_table
from faults import one_case, table
from faults.cases import ENGINES, ROTATION, Case, Result

PROGRAM = "tools/utils/faults.sh"
CASE_SECONDS = 900
TABLE = "table.md"


class Session:
    """The cases of one call: their folders, and what they found."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder, self.shared = seed, folder, folder / "undisturbed"
        self.results: list[tuple[Case, Result]] = []
        self.missing: dict[str, str] = {}
        """Why an engine is not here."""

        self._lock = threading.Lock()
        self._why: dict[str, str] = {}

    def prepare(self, engines: Sequence[str]) -> None:
        """Train the undisturbed runs.

        Raises:
            RunFailed: one does not end well, or there is no engine at all.
        """
        for engine in engines:
            place = self.folder / f"prepare_{engine}"
            place.mkdir(parents=True)
            words = [sys.executable, "-m", "faults.one_case", one_case.PREPARE, engine]
            result = self._process([*words, str(self.shared), str(place)], place)
            if result.broken:
                raise RunFailed(
                    f"the undisturbed run on {ENGINES[engine]}: {result.broken} (in {self.shared})"
                )
            if result.not_run:
                self.missing[engine] = result.not_run
                _say(f"not run: {ENGINES[engine]}: {result.not_run}")
            else:
                _say(f"undisturbed run on {ENGINES[engine]}: {duration(result.seconds)}")
        if len(self.missing) == len(ENGINES):
            raise RunFailed("neither PyTorch nor stock Caffe is here: run tools/utils/setup.sh --torch")
        if self.missing and os.environ.get("CI"):
            raise RunFailed("where CI is set, both engines are needed")

    def carry_out(self, case: Case) -> None:
        """One case; its folder goes if all is well."""
        why = self.missing.get(case.engine) or one_case.cannot_run(case)
        if why:
            with self._lock:
                self.results.append((case, Result(not_run=why)))
                self._why[f"{case.kind} on {ENGINES[case.engine]}" if case.engine else case.kind] = why
            return
        place = self.folder / f"case_{case.number}"
        place.mkdir()
        result = self._process(one_case.command(case, self.shared, place), place)
        with self._lock:
            self.results.append((case, result))
            if result.broken:
                _say(f"{case.title()}: BROKEN: {result.broken}; kept: {place}; again: {case.command()}")
            else:
                count = sum(result.done.values())
                _say(
                    f"{case.title()}: survived ({duration(result.seconds)}, {count:,} things done or checked)"
                )
                shutil.rmtree(place, ignore_errors=True)

    def _process(self, command: Sequence[str], place: Path) -> Result:
        """Run a case's process; what it found."""
        with (place / "case.txt").open("w") as said:
            try:
                done = subprocess.run(command, stdout=said, stderr=said, timeout=CASE_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                return Result(broken=f"it did not end within {CASE_SECONDS} s, see case.txt")
        path = place / one_case.RESULT
        if done.returncode != 0 or not path.exists():
            lines = (place / "case.txt").read_text(errors="replace").strip().splitlines()
            return Result(
                broken=f"the case itself failed: {lines[-1] if lines else done.returncode}, see case.txt"
            )
        return Result.read(path)

    def notes(self) -> list[str]:
        return [f"not run: {what}: {why}" for what, why in self._why.items()]

    @property
    def broken(self) -> list[Case]:
        return [case for case, result in self.results if result.broken]


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


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
    session = Session(seed, folder)
    _say(f"seed {seed}, in {folder}")
    engines = [ROTATION[options.only % len(ROTATION)][1]] if options.only is not None else list(ENGINES)
    session.prepare([engine for engine in engines if engine] or ["torch"])
    cases = _cases(seed, options.only, begun + 60 * options.minutes)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                case = next(cases, None)
            if case is None:
                return
            session.carry_out(case)

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(work) for _ in range(options.jobs)]:
            future.result()
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
