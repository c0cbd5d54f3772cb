"""Speed of training on a GPU: end to end, and of each part alone.

    python bench/torch_gpu.py [--batch 256 512 1024 128] [--images 20000] [--json FILE] [--limit 330]

JacintoNet11 at 224x224, from an LMDB of 256x256 JPEG files (quality 95) that it makes. It measures

    the card        a large matrix product in each precision, and a large copy (bytes read and written)
    compute         the training's iteration on a batch that is already on the card
    by hand         the same network in torch.nn: eager, as a CUDA graph, and compiled by torch.compile
    feed            batches decoded and copied to the card, with nothing computed
    end to end      `caffe-torch train`, between the third and the last display of its log

the most important first: bf16 at the first batch, then other batches, then tf32 and fp32. It prints a
Markdown table. Shares of the matrix product count training as three times the forward pass's
multiply-accumulates, two operations each. Shares of the bandwidth count `PASSES` over the outputs of the
convolutions. Memory is what PyTorch has allocated at most; end to end, what the program takes of the card.

After --limit seconds it ends: what does not fit is left out, and named. A row that fails, or hangs, is noted
with the reason, and the others follow; the exit code is then 1. The JSON file is written anew after each row.
Rows are measured in one process (bench/parts/gpu_rows.py), and in another one after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import cv2
import lmdb
import numpy as np

from caffe_jacinto.common.errors import RunFailed, UserError, run_command
from caffe_jacinto.common.files import read_text, write_whole
from caffe_jacinto.common.processes import describe_exit
from caffe_jacinto.data.encode import datum_record

GIGAMACS = 0.4063
"""JacintoNet11's convolutions and inner product, forward, for one image (docs/complexity.md)."""

OUTPUTS = 1_555_456
"""Numbers that JacintoNet11's convolutions give for an image: 2 x (112x112x32 + 56x56x64 + ... + 7x7x512)."""

PASSES = 14
"""Over these, in one iteration. Forward, a convolution writes them, the statistics read them, and normalizing
reads them and writes the next input, which is read: 5. Backward, the sums read them with a gradient, and so
does the pass that writes the gradient before the batch norm: 5. Two convolutions read that, one also the
input, and one writes the input's gradient: 4."""

WORKER = [sys.executable, str(Path(__file__).resolve().parent / "parts" / "gpu_rows.py")]

FASTEST = "fastest"
"""To decode: the way that was fastest in the rows before."""

START = 90.0
"""Seconds that a new process may take before its first answer, in addition."""


@dataclass(frozen=True)
class Row:
    """One thing that is measured."""

    part: str
    precision: str
    batch: int
    way: str
    """compute: "both" is also kernel by kernel; feed, end to end: who decodes; by hand: how it runs."""

    seconds: float
    """That it takes, about. It is not begun where less is left, and stopped after three times as long."""

    @property
    def name(self) -> str:
        way = "" if self.part == "compute" else self.way
        return " ".join(filter(None, (self.part, way, self.precision, str(self.batch))))


def plan(batches: Sequence[int], decoders: Sequence[str]) -> list[Row]:
    """Every row, the most important ones first. ``batches``: the first one is the main one."""
    main, *others = batches

    def compute(precision: str, batch: int, way: str = "graph") -> Row:
        return Row("compute", precision, batch, way, {"bf16": 10, "tf32": 12, "fp32": 18}[precision])

    def feed(batch: int, decode: str = FASTEST) -> Row:
        return Row("feed", "", batch, decode, 7)

    def end_to_end(precision: str, batch: int, decode: str = FASTEST) -> Row:
        return Row("end to end", precision, batch, decode, {"bf16": 18, "tf32": 20, "fp32": 25}[precision])

    by_hand = [
        Row("by hand", "bf16", main, way, seconds)
        for way, seconds in (("eager", 6), ("graph", 6), ("compiled", 40))
    ]
    return [
        compute("bf16", main, "both"),
        *(feed(main, decode) for decode in decoders),
        *(end_to_end("bf16", main, decode) for decode in reversed(decoders)),
        *by_hand,
        *(compute("bf16", batch) for batch in others),
        *(end_to_end("bf16", batch) for batch in others),
        *(compute(precision, main, "both") for precision in ("tf32", "fp32")),
        *(end_to_end(precision, main) for precision in ("tf32", "fp32")),
        *(compute("tf32", batch) for batch in others),
        *(compute("fp32", batch) for batch in others),
        *(feed(batch) for batch in others),
        *(end_to_end(precision, batch) for precision in ("tf32", "fp32") for batch in others),
    ]


class Clock:
    """What is left of the time."""

    def __init__(self, limit: float) -> None:
        self._end = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


class RowFailed(Exception):  # noqa: N818 - a row that failed is what it is
    """In one line."""


class RowStopped(RowFailed):
    """It took longer than it might."""


Ask = Callable[[dict[str, Any], float], dict[str, Any]]
"""Measures what is asked for, within some seconds; raises `RowFailed`."""


class Worker:
    """The process that measures; a new one after each failure."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """Start it, in ``folder``."""
        self._command, self._folder = [*command, "--parent", str(os.getpid())], folder
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""
        self.start()

    def start(self) -> float:
        """Start it if it does not run; returns the seconds that it may take to be ready."""
        if self._process is not None and self._process.poll() is None:
            return 0
        self.close()
        with (self._folder / "worker.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,
            )
        self._said = b""
        return START

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to ``request``.

        Raises:
            RowFailed: there is none: in one line, why. What was running is ended.
        """
        try:
            self.start()
            assert self._process is not None and self._process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: there will be no answer
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            line = self._line(time.monotonic() + seconds, seconds)
            try:
                answer: dict[str, Any] = json.loads(line)
            except ValueError:
                raise RowFailed(f"the process that measures answered {line[:100]!r}") from None
            if "error" in answer:
                raise RowFailed(answer["error"])
        except BaseException:
            self.close()
            raise
        return answer

    def _line(self, until: float, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        while b"\n" not in self._said:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise RowStopped(f"stopped after {seconds:.0f} s")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                code = self._process.wait()
                raise RowFailed(
                    f"the process that measures ended, {describe_exit(code)}: {self._last_line()}"
                )
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _last_line(self) -> str:
        lines = (self._folder / "worker.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def close(self) -> None:
        """End it, and all that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._process = None


class Results:
    """What was found so far, and its file."""

    def __init__(self, file: Path | None, tests: dict[str, Any] | None) -> None:
        self._file = file
        self.tests = tests
        self.card: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.left_out: list[str] = []
        self.complete = False
        """Whether it came to its end."""

        self.write()

    def write(self) -> None:
        if self._file is None:
            return
        content = {
            "complete": self.complete,
            "tests": self.tests,
            "card": self.card,
            "rows": self.rows,
            "failed": self.failed,
            "left out": self.left_out,
        }
        write_whole(self._file, json.dumps(content, indent=1) + "\n")

    def add(self, row: Row, figures: dict[str, Any]) -> None:
        found = {"part": row.part, "precision": row.precision, "batch": row.batch, "way": row.way}
        self.rows.append({**found, **{name: value for name, value in figures.items() if value}})
        print(f"{row.name}: {figures['images/s']:,.0f} images/s", flush=True)
        for note in figures.get("notes", ()):
            print(f"  {note}", flush=True)
        self.write()

    def fail(self, name: str, why: str) -> None:
        self.failed.append({"row": name, "why": why})
        print(f"{name} FAILED: {why}", flush=True)
        self.write()

    def leave_out(self, name: str) -> None:
        self.left_out.append(name)
        self.write()


def measure(rows: Iterable[Row], clock: Clock, ask: Ask, results: Results) -> None:
    """Measure ``rows`` while there is time; whatever happens to one, the others follow."""
    for planned in rows:
        row = planned
        if row.way == FASTEST:
            row = replace(row, way=fastest_decoder(results.rows))
        if clock.left < row.seconds:
            results.leave_out(row.name)
            continue
        most = max(3 * row.seconds, 30)
        seconds = min(most, clock.left)
        try:
            figures = ask(
                {"part": row.part, "precision": row.precision, "batch": row.batch, "way": row.way}, seconds
            )
        except RowFailed as error:
            if isinstance(error, RowStopped) and (seconds < most or clock.left < 1):
                results.leave_out(f"{row.name} (begun)")
            else:
                results.fail(row.name, str(error))
        else:
            results.add(row, figures)


def fastest_decoder(rows: Sequence[dict[str, Any]]) -> str:
    """Who decoded where the program was fastest; feeding alone where that is not known."""
    for part in ("end to end", "feed"):
        speeds = {row["way"]: row["images/s"] for row in reversed(rows) if row["part"] == part}
        if speeds:
            return str(max(speeds, key=lambda way: speeds[way]))
    return "cpu"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024, 128])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--limit", type=float, default=330, metavar="SECONDS")
    parser.add_argument("--tests", type=Path, metavar="FILE", help="what tests/gpu_session.py wrote")
    parser.add_argument("--rehearse", action="store_true", help="try it on the CPU; the figures say nothing")
    arguments = parser.parse_args(argv)
    clock = Clock(arguments.limit)
    tests = json.loads(read_text(arguments.tests)) if arguments.tests else None
    results = Results(arguments.json.resolve() if arguments.json else None, tests)
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        worker = Worker([*WORKER, *(["--rehearse"] if arguments.rehearse else [])], Path(name))
        try:
            _measure_all(worker, Path(name), arguments, clock, results)
        except NoGpu:
            raise
        except (Exception, KeyboardInterrupt) as error:
            results.fail("the rest", f"{type(error).__name__} {error}".strip())
        finally:
            worker.close()
        results.write()
        show(results)
    return 1 if results.failed else 0


class NoGpu(UserError):  # noqa: N818 - what is missing
    """There is nothing to measure on."""


def _stop(number: int, frame: object) -> NoReturn:
    raise RunFailed("it was told to stop (SIGTERM)")


def _measure_all(
    worker: Worker, folder: Path, arguments: argparse.Namespace, clock: Clock, results: Results
) -> None:
    print(f"Making {arguments.images:,} images", flush=True)  # while the worker starts
    average = write_images(folder / "lmdb", arguments.images)
    try:
        results.card = worker.ask({"part": "card"}, min(90, clock.left))
    except RowFailed as error:
        if "has no GPU" in str(error):
            raise NoGpu(str(error)) from None
        results.fail("the card", str(error))
    results.card["jpeg bytes"] = average
    for name, value in results.card.items():
        print(f"{name}: {value:,.2f}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    why = results.card.get("no decoding", "it is not known whether it can")
    if why:
        results.leave_out(f"images decoded on the GPU: {why}")

    def ask(request: dict[str, Any], seconds: float) -> dict[str, Any]:
        return worker.ask(request, min(seconds + worker.start(), clock.left))

    rows = plan(arguments.batch, ["cpu"] if why else ["cpu", "gpu", "both"])
    measure(rehearsed(rows) if arguments.rehearse else rows, clock, ask, results)
    results.complete = True


def rehearsed(rows: Sequence[Row]) -> list[Row]:
    """One of each kind that a CPU can do."""
    kinds = {
        (row.part, row.precision): replace(row, seconds=60)
        for row in reversed(rows)
        if row.precision != "tf32" and row.way not in ("graph", "compiled")
    }
    return list(kinds.values())


# ------------------------------------------------------------------------------------------------- the files


def write_images(folder: Path, count: int) -> int:
    """An LMDB of smooth random pictures with some noise; returns their average size in bytes."""
    size = 0
    with (
        ProcessPoolExecutor() as pool,
        lmdb.open(str(folder), map_size=1 << 36, sync=False) as environment,
        environment.begin(write=True) as records,
    ):
        for number, record in enumerate(pool.map(_picture, range(count), chunksize=64)):
            records.put(b"%08d" % number, record)
            size += len(record)
    return size // count


def _picture(number: int) -> bytes:
    random = np.random.default_rng(number)
    small = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    picture = cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC)
    picture = cv2.add(picture, random.integers(0, 20, picture.shape, dtype=np.uint8))
    content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return datum_record(content, number % 1000)


# ------------------------------------------------------------------------------------------------ the tables


def show(results: Results) -> None:
    """The card, the tests, the table, and what is not in it."""
    card = results.card
    if "card" in card:
        print(f"\n{card['card']}, {card['cores']} cores, PyTorch {card['torch']}.")
        print(
            f"Matrix product: bf16 {card['bf16 TFLOP/s']:.0f}, tf32 {card['tf32 TFLOP/s']:.0f}, fp32"
            f" {card['fp32 TFLOP/s']:.0f} TFLOP/s. Copy: {card['TB/s']:.2f} TB/s."
        )
    if "jpeg bytes" in card:
        print(f"The JPEG files have {card['jpeg bytes']:,} bytes on average.")
    if results.tests is not None:
        print(f"Tests: {results.tests['summary']}.")
    print("\n| part | precision | batch | images/s | of the matrix product | of the bandwidth | memory |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in results.rows:
        for line in table_lines(row, card):
            print(line)
    for failed in results.failed:
        print(f"\nFailed: {failed['row']}: {failed['why']}")
    for what in results.left_out:
        print(f"\nLeft out{'' if ': ' in what else ' for lack of time'}: {what}")
    sys.stdout.flush()


def table_lines(row: dict[str, Any], card: dict[str, Any]) -> list[str]:
    """A row of the table, and one more where it was also measured kernel by kernel."""
    part = {
        "feed": f"feed, decoded by {row['way']}",
        "end to end": f"end to end, decoded by {row['way']}",
        "by hand": f"by hand, {row['way']}",
    }.get(row["part"], row["part"])
    speeds = [(part, row["images/s"], _memory(row))]
    if "eager" in row:
        speeds.append((f"{part}, -graph false", row["eager"], ""))
    lines = []
    for name, speed, memory in speeds:
        peak, bandwidth = _shares(row["precision"], speed, card)
        cells = (name, row["precision"], f"{row['batch']:,}", f"{speed:,.0f}", peak, bandwidth, memory)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shares(precision: str, speed: float, card: dict[str, Any]) -> tuple[str, str]:
    """Of the matrix product and of the bandwidth."""
    if f"{precision} TFLOP/s" not in card:
        return "", ""
    share = 6 * GIGAMACS * speed / 1000 / card[f"{precision} TFLOP/s"]
    size = 2 if precision == "bf16" else 4
    return f"{share:.1%}", f"{PASSES * OUTPUTS * size * speed / 1e12 / card['TB/s']:.0%}"


def _memory(row: dict[str, Any]) -> str:
    if "GiB" in row:
        return f"{row['GiB']:.1f} GiB"
    return f"{row['GiB of the card']:.1f} GiB in all" if "GiB of the card" in row else ""


if __name__ == "__main__":
    sys.exit(run_command("bench/torch_gpu", main))
