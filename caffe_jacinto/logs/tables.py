"""Runs -> the two tables of the report, its CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import PureWindowsPath
from typing import Any, TextIO

from caffe_jacinto.common.text import Column, Line, duration, printable, show_table
from caffe_jacinto.logs.discover import Run, Stage

UNKNOWN = "-"


@dataclass(frozen=True)
class Published:
    """A row of the published result table."""

    name: str
    top1: float
    top5: float
    gigamacs: float
    decimals: int
    """Decimals of the accuracies in percent."""


PUBLISHED = (
    Published("JacintoNet11", 0.6091, 0.8305, 0.410, 2),
    Published("ResNet10", 0.639, 0.852, 0.910, 1),
    Published("BVLC AlexNet, 227x227 crop", 0.571, 0.802, 0.687, 1),
)
"""ImageNet, one crop, 1000 classes: tidsp/caffe-jacinto-models; cvjena/cnn-models (arXiv:1612.01452);
BVLC/caffe models/bvlc_alexnet. Complexity as the first of them gives it."""

PUBLISHED_CLASSES = 1000
PUBLISHED_CROPS = ((224, 224), (227, 227))
"""Of the published rows: results for other classes or image sizes do not compare with them."""


@dataclass(frozen=True)
class Row:
    """Cells as text, and the kind of row, which decides its colour."""

    cells: list[str]
    kind: str = ""
    """``published``, ``unfinished`` or nothing."""


@dataclass(frozen=True)
class Table:
    """A table for people to read. All columns but the first are aligned right."""

    title: str
    headers: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


CHANGE_HEADER = "Change of top-1"
MEAN_AP_HEADER = "mAP"
STAGE_HEADERS = (
    "Stage",
    "Iterations",
    "Top-1",
    "Top-5",
    "Loss",
    "Sparsity",
    CHANGE_HEADER,
    "Images/s",
    "Time",
)
RESULT_HEADERS = ("Configuration", "Top-1 accuracy", "Top-5 accuracy", "Complexity (GigaMACs)")
LEFT_HEADER = "Left without zeros"
"""Of the complexity, when weights that are zero cost nothing."""


def tables(runs: Sequence[Run], *, published: bool = False) -> list[Table]:
    """A table of stages for each run, then the result table if it has rows; see `published_rows`."""
    results = result_table(runs, published_rows(runs, published))
    return [*(stage_table(run) for run in runs), *([results] if results.rows else [])]


def published_rows(runs: Sequence[Run], wanted: bool = False) -> tuple[Published, ...]:
    """The published rows, where they are ``wanted`` or compare with one of the results; else none."""
    compares = any(
        stage.figures.classes == PUBLISHED_CLASSES and stage.figures.image_size in PUBLISHED_CROPS
        for _, stage in results(runs)
    )
    return PUBLISHED if wanted or compares else ()


def stage_table(run: Run) -> Table:
    """The stages of a run in their order."""
    detects = any(stage.figures.mean_ap is not None for stage in run.stages)
    headers = [*STAGE_HEADERS[:4], MEAN_AP_HEADER, *STAGE_HEADERS[4:]] if detects else STAGE_HEADERS
    table = Table(printable(run.name), headers)
    for stage in run.stages:
        figures, change = stage.figures, difference(run, stage)
        name = printable(stage.name)
        cells = [
            name if figures.finished else f"{name} (unfinished)",
            UNKNOWN if figures.iterations is None else f"{figures.iterations:,}",
            percent(figures.top1, 2),
            percent(figures.top5, 2),
            *([percent(figures.mean_ap, 2)] if detects else []),
            UNKNOWN if figures.loss is None else f"{figures.loss:.4g}",
            percent(figures.sparsity, 1),
            UNKNOWN if change is None else f"{100 * change:+.2f}",
            speed(figures.images_per_second),
            UNKNOWN if figures.seconds is None else duration(figures.seconds, exact=True),
        ]
        table.rows.append(Row(cells, "" if figures.finished else "unfinished"))
        if stage is run.stages[0] and figures.start_weights and figures.start_top1 is not None:
            start = printable(PureWindowsPath(figures.start_weights).name)
            table.notes.append(f"{name}: starts from {start}, top-1 {percent(figures.start_top1, 2)}")
        if figures.fatal:
            table.notes.append(f"{name} stopped: {printable(figures.fatal)}")
        table.notes.extend(f"{name}: {printable(note)}" for note in figures.notes)
    return table


def result_table(runs: Sequence[Run], published: Sequence[Published]) -> Table:
    """Each run's first and last stage and its quantized networks, below the ``published`` rows."""
    shown = shown_results(runs)
    with_left = any(stage.figures.gigamacs_left is not None for _, stage in shown)
    table = Table("Results", (*RESULT_HEADERS, LEFT_HEADER) if with_left else RESULT_HEADERS)
    for row in published:
        cells = [
            f"{row.name} (published, ImageNet)",
            percent(row.top1, row.decimals),
            percent(row.top5, row.decimals),
            f"{row.gigamacs:.3f}",
            *([UNKNOWN] if with_left else []),
        ]
        table.rows.append(Row(cells, "published"))
    for run, stage in shown:
        figures = stage.figures
        cells = [configuration(run, stage), percent(figures.top1, 2), percent(figures.top5, 2)]
        left = [complexity(figures.gigamacs_left)] if with_left else []
        table.rows.append(Row([*cells, complexity(figures.gigamacs), *left]))
    return table


def results(runs: Sequence[Run]) -> list[tuple[Run, Stage]]:
    """Of each run, the first and the last stage with an accuracy; else the last whose network is known.

    Where stages have a sparsity, the last of those is the result: stock Caffe's test does not report it.
    Where several start from the same weights, each of those is that no other stage goes on from.
    Tests in quantized values count only where nothing else has an accuracy; see `quantized`.
    """
    found: list[tuple[Run, Stage]] = []
    for run in runs:
        scored = [stage for stage in run.stages if stage.figures.top1 is not None]
        scored = [stage for stage in scored if not stage.figures.quantized] or scored[:1]
        scored = scored or [stage for stage in run.stages if stage.figures.gigamacs is not None][-1:]
        later = [stage for stage in scored[1:] if stage.figures.sparsity is not None] or scored[1:]
        found.extend((run, stage) for stage in scored[:1] + (_branches(scored[1:]) or later[-1:]))
    return found


def _branches(stages: Sequence[Stage]) -> list[Stage]:
    """Those finished whose weights no other one starts from; none if no two start from the same.

    What was stopped and begun anew from the same weights does not make a branch.
    """
    begun = {stage.name: stage for stage in stages if stage.figures.finished and stage.figures.start_weights}
    starts = [str(stage.figures.start_weights) for stage in begun.values()]
    if len(set(starts)) == len(starts):
        return []
    passed = {PureWindowsPath(start).parent.name for start in starts}
    return [stage for name, stage in begun.items() if name not in passed]


def shown_results(runs: Sequence[Run]) -> list[tuple[Run, Stage]]:
    """The rows of the result table."""
    return [pair for run in runs for pair in (*results([run]), *quantized(run))]


def quantized(run: Run) -> list[tuple[Run, Stage]]:
    """The run's tests in quantized values that are not among its `results`."""
    shown = [stage for _, stage in results([run])]
    tests = [stage for stage in run.stages if stage.figures.quantized and stage.figures.top1 is not None]
    return [(run, stage) for stage in tests if not any(stage is one for one in shown)]


def configuration(run: Run, stage: Stage) -> str:
    """The name of a row of the result table."""
    sparsity, bits = _sparsity(run, stage), bits_of(stage)
    what = [f"{percent(sparsity, 1)} sparse"] if sparsity else []
    what += [bits] if bits else []
    ending = f" ({', '.join(what)})" if what else ""
    return f"{printable(run.name)}, {printable(stage.name)}{ending}"


def bits_of(stage: Stage) -> str:
    """The bits of a test in quantized values, in words; else nothing."""
    weights, activations = stage.figures.weight_bits, stage.figures.activation_bits
    if weights is None:
        return ""
    return (
        f"{weights} bits"
        if weights == activations
        else f"{weights}-bit weights, {activations}-bit activations"
    )


def _sparsity(run: Run, stage: Stage) -> float | None:
    """That of the stage; of a test in quantized values that does not report it, that of the last before."""
    known = stage.figures.sparsity
    if known is not None or not stage.figures.quantized:
        return known
    return next((one.figures.sparsity for one in _before(run, stage) if one.figures.sparsity), None)


def _before(run: Run, stage: Stage) -> list[Stage]:
    """The stages before one, the nearest first."""
    return list(takewhile(lambda one: one is not stage, run.stages))[::-1]


def percent(value: float | None, decimals: int) -> str:
    """``0.608705`` as ``60.87 %``."""
    return UNKNOWN if value is None else f"{100 * value:.{decimals}f} %"


def complexity(gigamacs: float | None) -> str:
    """GigaMACs with four decimals, or three digits where those would be too few."""
    if gigamacs is None:
        return UNKNOWN
    return f"{gigamacs:.4f}" if gigamacs >= 0.001 else f"{gigamacs:.3g}"


def difference(run: Run, stage: Stage) -> float | None:
    """Top-1 of the stage minus that of the run's first; in quantized values, minus that of the float one."""
    figures = stage.figures
    first = next((one for one in run.stages if one.figures.top1 is not None), stage)
    base = _before_quantization(run, stage) if figures.quantized else first.figures.top1
    if base is None or figures.top1 is None or (stage is first and not figures.quantized):
        return None
    return round(figures.top1 - base, 6)


def _before_quantization(run: Run, stage: Stage) -> float | None:
    """By the same log, or else of the last stage before that is not quantized."""
    if stage.figures.float_top1 is not None:
        return stage.figures.float_top1
    scored = [one.figures.top1 for one in _before(run, stage) if not one.figures.quantized]
    return next((value for value in scored if value is not None), None)


def speed(value: float | None) -> str:
    """Images/s, whole from 100 on."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(runs: Sequence[Run]) -> str:
    """The report for scripts."""
    return json.dumps({"runs": [_run_record(run) for run in runs]}, indent=2, allow_nan=False)


def _run_record(run: Run) -> dict[str, Any]:
    return {"name": as_unicode(run.name), "stages": [stage_record(stage) for stage in run.stages]}


JSON_FIELDS = (
    *("caffe_version", "finished", "iterations", "top1", "top5", "mean_ap", "loss", "train_loss", "outputs"),
    *("sparsity", "sparsity_logged", "gigamacs", "images_per_second", "images_per_second_logged", "seconds"),
    *("classes", "image_size", "gigamacs_left", "weight_bits", "activation_bits", "float_top1", "start_top1"),
    "notes",
)


def stage_record(stage: Stage) -> dict[str, Any]:
    """A stage as the JSON has it."""
    figures = {name: finite(getattr(stage.figures, name)) for name in JSON_FIELDS}
    return {"name": as_unicode(stage.name), "log": as_unicode(str(stage.log)), **figures}


def finite(value: Any) -> Any:
    """The value; None for nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {as_unicode(name): finite(number) for name, number in value.items()}
    if isinstance(value, str):
        return as_unicode(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_unicode(text: str) -> str:
    """Names of files that are not UTF-8, in a form that JSON holds."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


STAGE_FIELDS = (
    *("run", "stage", "finished", "iterations", "top1", "top5", "loss", "sparsity", "top1_change"),
    *("images_per_second", "seconds", "gigamacs", "sparsity_logged", "images_per_second_logged"),
    *("caffe_version", "log", "mean_ap", "train_loss", "outputs", "notes"),
    *("gigamacs_left", "weight_bits", "activation_bits", "float_top1", "start_top1"),
)
RESULT_FIELDS = ("configuration", "top1", "top5", "gigamacs", "published", "gigamacs_left")


def as_csv(runs: Sequence[Run], *, published: bool = False) -> str:
    """Both tables with plain numbers (fractions, seconds); an empty line between them.

    For ``published`` see `published_rows`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(STAGE_FIELDS)
    for run in runs:
        for stage in run.stages:
            values = vars(stage.figures) | {"run": run.name, "stage": stage.name, "log": str(stage.log)}
            values["top1_change"] = difference(run, stage)
            values["outputs"] = "; ".join(
                f"{name} = {number:g}" for name, number in stage.figures.outputs.items()
            )
            values["notes"] = "; ".join(stage.figures.notes)
            writer.writerow([as_cell(values[name]) for name in STAGE_FIELDS])
    writer.writerow([])
    writer.writerow(RESULT_FIELDS)
    for row in published_rows(runs, published):
        writer.writerow([row.name, row.top1, row.top5, row.gigamacs, "true", None])
    for run, stage in shown_results(runs):
        figures = stage.figures
        costs = (figures.gigamacs, False, figures.gigamacs_left)
        cells = (configuration(run, stage), figures.top1, figures.top5, *costs)
        writer.writerow([as_cell(cell) for cell in cells])
    return text.getvalue()


def as_cell(value: object) -> object:
    """Text that a spreadsheet would read as a formula is marked as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return value


def as_markdown(found: Sequence[Table]) -> str:
    """The tables as GitHub's Markdown."""
    parts = []
    for table in found:
        aligns = ["---", *["---:"] * (len(table.headers) - 1)]
        lines = [
            f"### {_markdown_text(table.title)}",
            "",
            _markdown_row(table.headers),
            _markdown_row(aligns),
        ]
        lines.extend(_markdown_row([_markdown_text(cell) for cell in row.cells]) for row in table.rows)
        if table.notes:
            lines.extend(["", *(f"- {_markdown_text(note)}" for note in table.notes)])
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_text(text: str) -> str:
    """``text`` with the characters that Markdown or HTML would read as markup escaped."""
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>|~#" else char for char in text.replace("&", "&amp;"))


def show(found: Sequence[Table], out: TextIO) -> None:
    """Write the tables to ``out``."""
    for number, table in enumerate(found):
        if number:
            out.write("\n")
        columns = [Column(header, words=at == 0) for at, header in enumerate(table.headers)]
        lines = [
            Line(row.cells, [_style(table, row, at) for at in range(len(columns))]) for row in table.rows
        ]
        show_table(out, table.title, columns, lines, *table.notes, note_style="red")


def _style(table: Table, row: Row, column: int) -> str:
    cell = row.cells[column]
    if row.kind == "published":
        return "dim"
    if table.headers[column] == CHANGE_HEADER:
        return {"+": "green", "-": "red"}.get(cell[:1], "") if cell.strip("+-0.") else ""
    if column == 0:
        return "yellow" if row.kind == "unfinished" else "cyan"
    return ""
