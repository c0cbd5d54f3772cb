"""A session: its undisturbed runs, and its cases, a few at a time, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from caffe_jacinto.common.errors import RunFailed
from caffe_jacinto.common.text import duration
from faults import one_case
from faults.cases import ENGINES, Case, Result
from faults.knocks import kill_all

CASE_SECONDS = 900

SHOWN_LINES = 25
"""Of what a command said, where that is broken."""


class Session:
    """The cases of one call: their folders, and what they found."""

    def __init__(self, seed: int, folder: Path, jobs: int) -> None:
        """``jobs``: cases at a time."""
        self.seed, self.folder, self.shared = seed, folder, folder / "undisturbed"
        self._jobs, self._stopped = jobs, False
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
        with ThreadPoolExecutor(self._jobs) as pool:
            results = list(pool.map(self._undisturbed, engines))
        for engine, result in zip(engines, results, strict=True):
            if result.broken:
                raise RunFailed(
                    f"the undisturbed run on {ENGINES[engine]}: {result.broken}, in {self.folder}"
                )
            if result.not_run:
                self.missing[engine] = result.not_run
                say(f"not run: {ENGINES[engine]}: {result.not_run}")
            else:
                say(f"undisturbed run on {ENGINES[engine]}: {duration(result.seconds)}")
        if len(self.missing) == len(ENGINES):
            raise RunFailed("neither PyTorch nor stock Caffe is here: run tools/utils/setup.sh --torch")
        if self.missing and os.environ.get("CI"):
            raise RunFailed("where CI is set, both engines are needed")

    def _undisturbed(self, engine: str) -> Result:
        place = self.folder / f"prepare_{engine}"
        place.mkdir()
        words = [sys.executable, "-m", "faults.one_case", one_case.PREPARE, engine]
        return self._process([*words, str(self.shared), str(place)], place)

    def run(self, cases: Iterator[Case]) -> None:
        """All cases, a few at a time. Ctrl-C ends the session; what was in work does not count."""

        def work() -> None:
            while not self._stopped:
                with self._lock:
                    case = next(cases, None)
                if case is None:
                    return
                self._carry_out(case)

        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                futures = [pool.submit(work) for _ in range(self._jobs)]
                try:
                    for future in futures:
                        future.result()
                except KeyboardInterrupt:
                    self._stopped = (
                        True  # before the pool waits for the cases in work, which get the signal, too
                    )
                    raise
        except KeyboardInterrupt:
            say("interrupted")

    def _carry_out(self, case: Case) -> None:
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
        if self._stopped:
            return
        with self._lock:
            self.results.append((case, result))
            if result.broken:
                say(f"{case.title()}: BROKEN: {result.broken}; kept: {place}; again: {case.command()}")
                _show_end(place, result.broken)
            else:
                count = sum(result.done.values())
                say(
                    f"{case.title()}: survived ({duration(result.seconds)}, {count:,} things done or checked)"
                )
                shutil.rmtree(place, ignore_errors=True)

    def _process(self, command: Sequence[str], place: Path) -> Result:
        """Run a case's process; what it found."""
        with (place / "case.txt").open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            code = process.wait(CASE_SECONDS)
        except subprocess.TimeoutExpired:
            kill_all(process.pid)
            return Result(broken=f"it did not end within {CASE_SECONDS} s, see case.txt")
        path = place / one_case.RESULT
        if code != 0 or not path.exists():
            lines = (place / "case.txt").read_text(errors="replace").strip().splitlines()
            return Result(broken=f"the case itself failed: {lines[-1] if lines else code}, see case.txt")
        return Result.read(path)

    def notes(self) -> list[str]:
        return [f"not run: {what}: {why}" for what, why in self._why.items()]

    @property
    def broken(self) -> list[Case]:
        return [case for case, result in self.results if result.broken]


def _show_end(place: Path, broken: str) -> None:
    """Print the end of the file that a message tells to see: of a machine's log, nobody can open it later."""
    match = re.search(r"see (\S+)$", broken)
    if match and (place / match[1]).is_file():
        lines = (place / match[1]).read_text(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-SHOWN_LINES:]), flush=True)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
