"""Runs tests/test_torch_gpu.py within some seconds, by several processes that take the tests in turn.

    python tests/gpu_session.py --limit SECONDS --outcomes FILE [--processes N] [TESTS...]

It needs no more than pytest. A process that dies or hangs takes one test with it, which has failed then; the
others go on. What is not done in time is stopped, and counts as not run. FILE (JSON) has the numbers, and of
each test that failed its name and one line of why. In each process, this module is a plugin of pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha1
from pathlib import Path
from typing import Any, NoReturn

import pytest

from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.processes import describe_exit, end_with_parent

TESTS = Path(__file__).with_name("test_torch_gpu.py")
MOST_PROCESSES = 6
RESTARTS = 6
"""Processes that may take the place of ones that died."""

# ------------------------------------------------------------------------------------- inside each process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shared-folder", type=Path, help="where the processes agree on who takes which test")
    parser.addoption("--driver", type=int, help="the process that started this one")


def pytest_configure(config: pytest.Config) -> None:
    end_with_parent(config.getoption("--driver"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Trainings last: they take longest."""
    items.sort(key=lambda item: "run" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session: pytest.Session) -> None:
    names = [item.nodeid for item in session.items]
    write_whole(session.config.getoption("--shared-folder") / "collected.json", json.dumps(names))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Whoever makes a test's file first runs it."""
    folder = item.config.getoption("--shared-folder")
    try:
        with (folder / f"{sha1(item.nodeid.encode()).hexdigest()}.taken").open("x") as file:
            file.write(item.nodeid)
    except FileExistsError:
        return True
    return None


class _Reports:
    """What came of the tests, for the driver."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._file = session.config.getoption("--shared-folder") / f"{os.getpid()}.outcomes"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        entry = {"test": report.nodeid, "outcome": report.outcome, "why": ""}
        if report.failed:
            entry["why"] = _reason(report)
            if "CUDA error" in report.longreprtext:
                # Nothing runs on the GPU in this process any more.
                self._session.shouldstop = "a CUDA error"
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Reports(session))


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash is not None else report.longreprtext).strip().splitlines()
    return lines[0][:300] if lines else "no reason was given"


# ----------------------------------------------------------------------------------------------- the driver


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--outcomes", type=Path, required=True, metavar="FILE")
    parser.add_argument("--processes", type=int, metavar="N")
    parser.add_argument("tests", nargs="*", default=[str(TESTS)])
    arguments = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    processes = arguments.processes or max(1, min(MOST_PROCESSES, cores // 2))
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        session = Session(Path(name), arguments.tests)
        try:
            session.run(processes, arguments.limit)
        except (RunFailed, KeyboardInterrupt) as error:
            session.troubles.append(str(error) or "interrupted")
        finally:
            session.end()
        outcome = session.outcome()
        write_whole(arguments.outcomes, json.dumps(outcome, indent=1) + "\n")
        session.show()
    for failed in outcome["failures"]:
        print(f"FAILED {failed['test']}: {failed['why']}")
    print(f"Tests: {outcome['summary']}", flush=True)
    return 0 if outcome["good"] else 1


def _stop(number: int, frame: object) -> NoReturn:
    raise RunFailed("it was told to stop (SIGTERM)")


class Session:
    """The processes, and what they leave in ``folder``."""

    def __init__(self, folder: Path, tests: Sequence[str]) -> None:
        self._folder, self._tests = folder, tests
        self._running: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self._begin = time.monotonic()
        self.troubles: list[str] = []
        """What went wrong beside tests, a line each."""

    def run(self, processes: int, limit: float) -> None:
        """Run the tests, for so many seconds at most."""
        for _ in range(processes):
            self._start()
        while self._running:
            time.sleep(0.1)
            if time.monotonic() - self._begin > limit:
                self.troubles.append(f"not all was done within {limit:.0f} s")
                return
            for process in list(self._running):
                if process.poll() is not None:
                    self._ended(process, processes)

    def _start(self) -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu_session"]
        command += ["--shared-folder", str(self._folder), "--driver", str(os.getpid()), "-m", "gpu"]
        here = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        with (self._folder / f"{self._started}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *self._tests],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Several processes share the cores.
                env={"OMP_NUM_THREADS": "2", **os.environ, "PYTHONPATH": here},
                start_new_session=True,
            )
        self._started += 1
        self._running.append(process)

    def _ended(self, process: subprocess.Popen[bytes], processes: int) -> None:
        """Another takes its place where it died before all tests were taken."""
        self._running.remove(process)
        _kill(process)
        if process.returncode not in (0, 1, 5):
            self.troubles.append(f"a process of pytest ended with {describe_exit(process.returncode)}")
        names, taken = self._collected(), len(list(self._folder.glob("*.taken")))
        if taken < len(names) and self._started < processes + RESTARTS:
            self._start()

    def end(self) -> None:
        for process in self._running:
            _kill(process)
        self._running.clear()

    def _collected(self) -> list[str]:
        with suppress(OSError):
            names: list[str] = json.loads((self._folder / "collected.json").read_text())
            return names
        return []

    def outcome(self) -> dict[str, Any]:
        """What came of the tests."""
        names = self._collected()
        found: dict[str, dict[str, str]] = {}
        for file in sorted(self._folder.glob("*.outcomes")):
            for line in file.read_text().splitlines():
                with suppress(ValueError):  # the last one, of a process that was killed
                    entry = json.loads(line)
                    if entry["test"] not in found or entry["outcome"] == "failed":
                        found[entry["test"]] = entry
        for file in self._folder.glob("*.taken"):
            test = file.read_text()
            if test and test not in found:
                why = "it did not end: its process died, hung, or was stopped"
                found[test] = {"test": test, "outcome": "failed", "why": why}
        ways = [entry["outcome"] for entry in found.values()]
        counts = {way: ways.count(way) for way in ("passed", "failed", "skipped")}
        counts["not run"] = len([name for name in names if name not in found])
        troubles = list(self.troubles)
        if not names:
            troubles.append("no test was found")
        elif len(names) == counts["skipped"]:
            troubles.append("all tests were skipped")
        good = not (counts["failed"] or counts["not run"] or troubles)
        said = ", ".join(f"{count} {way}" for way, count in counts.items() if count or way == "passed")
        return {
            "good": good,
            "summary": "; ".join([f"{said} in {time.monotonic() - self._begin:.0f} s", *troubles]),
            **counts,
            "troubles": troubles,
            "failures": [
                {"test": entry["test"], "why": entry["why"]}
                for entry in found.values()
                if entry["outcome"] == "failed"
            ],
        }

    def show(self) -> None:
        """What the processes said, where something failed."""
        for log in sorted(self._folder.glob("*.log")):
            said = log.read_text(errors="replace")
            if "FAILURES" in said or "ERRORS" in said or "rror" in said[-3000:]:
                print(said[-20000:], flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process, and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(run_command("tests/gpu_session", main))
