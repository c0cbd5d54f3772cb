"""The series of runs as files for other programs: a table (CSV, JSON, Parquet), TensorBoard's event files.

Runs are read with every point (`StageHistory.every_point`).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs import curves
from caffe_jacinto.logs.discover import Run, Stage, start_of
from caffe_jacinto.logs.tables import as_cell, as_unicode, finite

SERIES_KINDS = (".csv", ".json", ".parquet")

PLACE = ("run", "stage", "iteration", "seconds", "epoch")
"""The first columns of the table."""
TEST_PREFIX = "test_"
"""Before the names of the tests' outputs, so that none is taken for another column."""

_TAGS = {
    curves.TRAIN_LOSS: "train/loss",
    curves.LEARNING_RATE: "train/learning_rate",
    curves.SPARSITY: "train/sparsity",
    curves.SPEED: "train/images_per_second",
}
"""TensorBoard groups what has the same word before the first slash."""
_EVENT_FILE = "events.out.tfevents.caffe_jacinto"

_Row = dict[str, Any]


def columns_of(runs: Sequence[Run]) -> list[str]:
    """The columns of the table."""
    outputs = dict.fromkeys(name for run in runs for stage in run.stages for name in _outputs(stage))
    return [*PLACE, *curves.OF_TRAINING, *(f"{TEST_PREFIX}{name}" for name in outputs)]


def rows_of(run: Run) -> Iterator[_Row]:
    """A row for each iteration of each stage at which the log says something; one for ``caffe test``."""
    for stage in run.stages:
        place = {"run": as_unicode(run.name), "stage": as_unicode(stage.name)}
        if stage.figures.tested:
            outputs = {f"{TEST_PREFIX}{name}": value for name, value in stage.figures.outputs.items()}
            yield {**place, **outputs}
            continue
        clock = curves.Clock(stage)
        found: dict[float, _Row] = {}
        of_tests = {f"{TEST_PREFIX}{name}": points for name, points in curves.test_curves(stage).items()}
        for column, points in (curves.training_curves(stage) | of_tests).items():
            for iteration, value in points:
                found.setdefault(iteration, {})[column] = value
        for iteration in sorted(found):
            seconds = round(clock.seconds(iteration), 6) if clock.iterations else None
            per_epoch = stage.iterations_per_epoch
            epoch = iteration / per_epoch if per_epoch else None
            at = {"iteration": int(iteration), "seconds": seconds, "epoch": epoch}
            yield {**place, **at, **found[iteration]}


def _outputs(stage: Stage) -> list[str]:
    if stage.figures.tested:
        return list(stage.figures.outputs)
    return list(curves.test_curves(stage))


# --- one table ------------------------------------------------------------------------------------------


def write_series(runs: Sequence[Run], path: Path) -> None:
    """Write the points of all stages as one table, in the form that the name of ``path`` ends with.

    Raises:
        UserError: it cannot be written, or Parquet is wanted and pyarrow is not installed.
    """
    writers = {".csv": _as_csv, ".json": _as_json, ".parquet": _as_parquet}
    content = writers[path.suffix.lower()](runs, columns_of(runs))
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"--series {path}: cannot be written: {error.strerror}") from None


def _as_csv(runs: Sequence[Run], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([as_cell(column) for column in columns])
    for run in runs:
        for row in rows_of(run):
            writer.writerow([as_cell(row.get(column)) for column in columns])
    return text.getvalue().encode()


def _as_json(runs: Sequence[Run], columns: Sequence[str]) -> bytes:
    """A list of records, each with every column."""
    lines = (
        json.dumps({column: finite(row.get(column)) for column in columns}, allow_nan=False)
        for run in runs
        for row in rows_of(run)
    )
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def check_series(path: Path) -> None:
    """Raise the UserError that `write_series` would end with, before anything is read."""
    if path.suffix.lower() not in SERIES_KINDS:
        *most, last = SERIES_KINDS
        raise UserError(f"--series {path}: the name must end in {', '.join(most)} or {last}")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "--series: Parquet files need pyarrow: pip install pyarrow; or end the name in .csv or .json"
        ) from None
    return pyarrow, parquet


def _as_parquet(runs: Sequence[Run], columns: Sequence[str]) -> bytes:
    pyarrow, parquet = _pyarrow()
    kinds = {"run": pyarrow.string(), "stage": pyarrow.string(), "iteration": pyarrow.int64()}
    rows = [row for run in runs for row in rows_of(run)]
    table = pyarrow.table(
        {
            column: pyarrow.array([row.get(column) for row in rows], kinds.get(column, pyarrow.float64()))
            for column in columns
        }
    )
    out = pyarrow.BufferOutputStream()
    parquet.write_table(table, out)
    return bytes(out.getvalue())


# --- TensorBoard ----------------------------------------------------------------------------------------


def check_tensorboard() -> None:
    """Raise the UserError that `write_tensorboard` would end with, before anything is read."""
    _tensorboard()


def _tensorboard() -> tuple[Any, Any, Any]:
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        raise UserError("--tensorboard: needs TensorBoard: pip install tensorboard") from None
    return event_pb2.Event, summary_pb2.Summary, RecordWriter


def write_tensorboard(runs: Sequence[Run], folder: Path) -> None:
    """Write an event file for each run, in a folder with its name; the stages stand end to end.

    A file that was written before is replaced.

    Raises:
        UserError: a file cannot be written, or TensorBoard is not installed.
    """
    taken: set[str] = set()
    for run in runs:
        name = _folder_name(run.name, taken)
        content = _event_file(run)
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_whole(folder / name / _EVENT_FILE, content)
        except OSError as error:
            raise UserError(f"--tensorboard {folder / name}: cannot be written: {error.strerror}") from None


def _folder_name(name: str, taken: set[str]) -> str:
    """A name that is a folder's everywhere, and no other run's."""
    plain = re.sub(r"[^\w.=@+,() -]", "_", as_unicode(printable(name))).strip(". ")[:150] or "run"
    found, number = plain, 2
    while found.lower() in taken:
        found, number = f"{plain} {number}", number + 1
    taken.add(found.lower())
    return found


def _event_file(run: Run) -> bytes:
    event, summary, writer = _tensorboard()
    out = io.BytesIO()
    records = writer(out)
    first = next((start for stage in run.stages if (start := start_of(stage)) is not None), None)
    begun = first.timestamp() if first is not None and first.year > 1970 else 0.0
    records.write(event(wall_time=begun, file_version="brain.Event:2").SerializeToString())
    parts = curves.parts_of(run, "iteration")

    def add(tag: str, value: float, seconds: float, step: float) -> None:
        values = [summary.Value(tag=tag, simple_value=value)]
        at = {"wall_time": begun + seconds, "step": int(step)}
        records.write(event(summary=summary(value=values), **at).SerializeToString())

    end = 0.0
    for stage in run.stages:
        if stage.figures.tested:
            for name, value in stage.figures.outputs.items():
                add(f"caffe_{as_unicode(stage.name)}/{as_unicode(name)}", value, 0.0, end)
        part = next((one for one in parts if one.stage is stage), None)
        if part is None:
            continue
        clock = curves.Clock(stage)
        tagged = {_TAGS[name]: points for name, points in curves.training_curves(stage).items()}
        for name, points in curves.test_curves(stage).items():
            tagged[f"test/{as_unicode(name)}"] = points
        for tag, points in tagged.items():
            for iteration, value in points:
                add(tag, value, clock.seconds(iteration), part.start + iteration)
        begun += stage.figures.seconds or 0.0
        end = part.end
    return out.getvalue()
