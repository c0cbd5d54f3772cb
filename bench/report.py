"""Speed of the report on long logs, compared with Caffe's parse_log.py, and start-up time of the commands.

    python bench/report.py [--log FILE] [--parse-log tools/extra/parse_log.py] [--megabytes 75] [--runs 3]

A real log (``--log``; by default that of a small training with Caffe, made for the occasion) is repeated,
with increasing iteration numbers, until it has the size, and again until it is ten times as long. Both
programs run as whole processes, in turn; the fastest run of each counts, by the processor's time (user and
system), which other work on the machine changes little. They are compiled before, as `pip install` does.
parse_log.py is Python 2, so its print statements are converted; it cannot read the year in the dates of glog
0.6 and later, so the year is removed from the log. Prints Markdown tables; the exit code is 1 if a limit is
broken: the report at least 5 times as fast, its memory independent of the length of the log, `--help` of a
command within 0.5 s.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from caffe_jacinto.common.errors import RunFailed, UserError, run_command
from caffe_jacinto.engines.discovery import find_engine

SPEED_LIMIT = 5.0
START_LIMIT = 0.5
GROWTH_LIMIT = 1.2
"""Peak memory on the log ten times as long, as a multiple of that on the shorter one."""

ROOT = Path(__file__).resolve().parents[1]

_MEASURE = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
print(os.waitstatus_to_exitcode(status), seconds, peak, file=sys.stderr)
"""
"""Runs a command and prints its exit code, seconds and MiB. A small process: Linux counts the memory of the
process that starts another into the peak of that one.
"""
_PROGRESS = re.compile(rb"^I.*\] Iteration (\d+)[ ,(].*loss = .*\n", re.MULTILINE)
_ITERATION = re.compile(rb"(?<=\] Iteration )(\d+)")
_YEAR = re.compile(rb"^([IWEF])\d{4}(?=\d{4} )", re.MULTILINE)

NET = """
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } shape { dim: 4 }
    data_filler { type: "gaussian" } data_filler { type: "constant" value: 3 } } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc"
  inner_product_param { num_output: 5 weight_filler { type: "msra" } } }
layer { name: "top1" type: "Accuracy" bottom: "fc" bottom: "label" top: "top1" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
SOLVER = """
net: "net.prototxt" test_iter: 1 test_interval: 200 base_lr: 0.001 display: 10 max_iter: 20000
lr_policy: "fixed" snapshot_after_train: false solver_mode: CPU
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path)
    parser.add_argument("--parse-log", type=Path)
    parser.add_argument("--megabytes", type=int, default=75)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = arguments.log or _train(folder)
        within = _compare(
            folder, log, arguments.parse_log or _parse_log(), arguments.megabytes, arguments.runs
        )
        within = _starts(folder) and within
    return 0 if within else 1


def _compare(folder: Path, log: Path, parse_log: Path, megabytes: int, runs: int) -> bool:
    """Print the table of both programs on both logs; returns whether the limits hold."""
    theirs = [sys.executable, str(_converted(parse_log, folder)), "{}", str(folder)]
    ours = [sys.executable, "-m", "caffe_jacinto.report", "{}", "--format", "json"]
    within, ours_peak = True, 0.0
    print(
        f"Log: {log.name}, repeated. Processor time of the whole process, fastest of {runs} runs, "
        "and its peak memory.\n"
    )
    print("| log | report | parse_log.py | times as fast |")
    print("| --- | ---: | ---: | ---: |")
    for size, times in ((megabytes, runs), (10 * megabytes, 1)):
        long = folder / "long_train.log"
        lines = _repeat(log, long, size * 1_000_000)
        measured = [(_run(ours, folder, long), _run(theirs, folder, long)) for _ in range(times)]
        (seconds, peak), (their_seconds, their_peak) = (min(pair) for pair in zip(*measured, strict=True))
        print(
            f"| {long.stat().st_size / 1e6:.0f} MB, {lines:,} lines | {seconds:.2f} s, {peak:.0f} MiB "
            f"| {their_seconds:.2f} s, {their_peak:.0f} MiB | {their_seconds / seconds:.1f} |"
        )
        within = within and their_seconds / seconds >= SPEED_LIMIT
        within = within and (not ours_peak or peak <= GROWTH_LIMIT * ours_peak)
        ours_peak = peak
    return within


def _starts(folder: Path) -> bool:
    """Print how long `--help` of the commands takes; returns whether the limit holds."""
    within = True
    print("\n| command | start |\n| --- | ---: |")
    for module in ("caffe_jacinto.build_net", "caffe_jacinto.report"):
        seconds = min(_run([sys.executable, "-m", module, "--help"], folder)[0] for _ in range(5))
        print(f"| `python -m {module} --help` | {seconds:.2f} s |")
        within = within and seconds <= START_LIMIT
    return within


def _run(command: Sequence[str], folder: Path, log: Path | None = None) -> tuple[float, float]:
    """Processor seconds and peak memory in MiB of a process; compiled modules are kept in ``folder``.

    Raises:
        RunFailed: it ended with an error.
    """
    argv = [part.replace("{}", str(log)) for part in command]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    measured = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MEASURE, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    *errors, last = measured.stderr.splitlines()
    code, seconds, peak = (float(part) for part in last.split())
    if code:
        raise RunFailed(f"{' '.join(argv)}: ended with code {code:.0f}: {' '.join(errors)}")
    return seconds, peak


def _repeat(log: Path, into: Path, size: int) -> int:
    """Write ``log`` to ``into``, its training repeated up to ``size`` bytes; returns the number of lines."""
    text = _YEAR.sub(rb"\1", log.read_bytes())
    lines = list(_PROGRESS.finditer(text))
    if len(lines) < 100:
        raise UserError(f"--log {log}: not a training log with at least 100 lines of progress")
    begin, end, step = lines[0].start(), lines[-1].start(), int(lines[-1][1])
    written = count = repeats = 0
    with into.open("wb") as file:
        for part in (text[:begin], None, text[end:]):
            if part is not None:
                file.write(part)
                count += part.count(b"\n")
            while part is None and written < size:
                counted = _counted_on(text[begin:end], repeats * step)
                written += file.write(counted)
                count += counted.count(b"\n")
                repeats += 1
    return count


def _counted_on(text: bytes, offset: int) -> bytes:
    return _ITERATION.sub(lambda match: b"%d" % (int(match[1]) + offset), text)


def _train(folder: Path) -> Path:
    """The log of a small training with the Caffe that is found."""
    (folder / "net.prototxt").write_text(NET)
    (folder / "solver.prototxt").write_text(SOLVER)
    caffe = find_engine(None, None).info.executable
    log = folder / "small_train.log"
    with log.open("wb") as out:
        command = [str(caffe), "train", "-solver", "solver.prototxt"]
        subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, check=True)
    return log


def _parse_log() -> Path:
    """parse_log.py of the Caffe that is found: beside it in its source tree, or under the prefix's src/."""
    executable = find_engine(None, None).info.executable.resolve()
    for folder in executable.parents:
        for place in (folder, folder / "src"):
            if (place / "tools" / "extra" / "parse_log.py").is_file():
                return place / "tools" / "extra" / "parse_log.py"
    raise UserError(f"no tools/extra/parse_log.py beside {executable}: give it with --parse-log")


def _converted(parse_log: Path, folder: Path) -> Path:
    """Copy parse_log.py and its module to ``folder``, with print statements converted to calls."""
    for name in ("parse_log.py", "extract_seconds.py"):
        text = (parse_log.parent / name).read_text()
        (folder / name).write_text(re.sub(r"^( *)print (.*)$", r"\1print(\2)", text, flags=re.MULTILINE))
    return folder / "parse_log.py"


if __name__ == "__main__":
    sys.exit(run_command("bench/report.py", main))
