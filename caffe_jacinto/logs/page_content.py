"""Runs -> what the page shows of them: figures, curves, pruning and cost by layer, solver settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import duration, printable
from caffe_jacinto.logs import tables
from caffe_jacinto.logs.curves import tests_of
from caffe_jacinto.logs.discover import Run, Stage
from caffe_jacinto.logs.history import Bucket, Buckets, StageHistory, thinned
from caffe_jacinto.netspec.summary import Summary, summarize

MOST_NUMBERS = 240_000
"""Numbers in all curves of a page: with them it has less than 2 MB."""
MOST_BUCKETS = 2000
"""Of a curve that is thinned: a wide screen has as many pixels."""
FEWEST_BUCKETS = 40
MOST_FRACTIONS = 60_000
"""Fractions of zeros in all listings of a page."""
MOST_TIMES = 20_000
"""Iterations in all stages of a page whose time is in it; it is interpolated between them."""

TRAINING_LOSS = "training loss"


@dataclass(frozen=True)
class Note:
    """What is wrong, and with which stage of which run."""

    run: str
    text: str
    fatal: bool


def notes(runs: Sequence[Run], problems: Sequence[str] = ()) -> list[Note]:
    """The errors and notes of all stages, errors first; before them the ``problems`` of the whole."""
    found = [Note("", printable(problem), True) for problem in problems]
    for run in runs:
        for stage in run.stages:
            name, figures = printable(stage.name), stage.figures
            if figures.fatal:
                found.append(Note(printable(run.name), f"{name} stopped: {printable(figures.fatal)}", True))
            found += [
                Note(printable(run.name), f"{name}: {printable(note)}", False) for note in figures.notes
            ]
    return sorted(found, key=lambda note: not note.fatal)


@dataclass(frozen=True)
class Card:
    """A figure that stands out."""

    label: str
    value: str
    detail: str = ""


def cards(run: Run) -> list[Card]:
    """The figures that a run is judged by."""
    ends = [stage.figures for _, stage in tables.results([run])]
    found = []
    if ends and ends[-1].top1 is not None:
        first, last = ends[0], ends[-1]
        change = 100 * (last.top1 - first.top1) if first.top1 is not None and last.top1 is not None else 0.0
        start = printable(tables.results([run])[0][1].name)
        detail = (
            f"{change:+.2f} points since {start}".replace("-", "\N{MINUS SIGN}", 1) if len(ends) > 1 else ""
        )
        found.append(Card("Top-1", tables.percent(last.top1, 2), detail))
        if last.top5 is not None:
            found.append(Card("Top-5", tables.percent(last.top5, 2)))
    mean_ap = next((s.figures.mean_ap for s in reversed(run.stages) if s.figures.mean_ap is not None), None)
    if mean_ap is not None:
        found.append(Card(tables.MEAN_AP_HEADER, tables.percent(mean_ap, 2), "mean average precision"))
    for _, stage in tables.quantized(run):
        lost = tables.difference(run, stage)
        words = "" if lost is None else f"{100 * lost:+.2f} points to float"
        bits = f"Top-1 with {tables.bits_of(stage)}"
        found.append(
            Card(bits, tables.percent(stage.figures.top1, 2), words.replace("-", "\N{MINUS SIGN}", 1))
        )
    sparsity = next((s.figures.sparsity for s in reversed(run.stages) if s.figures.sparsity), None)
    if sparsity is not None:
        found.append(Card("Sparsity", tables.percent(sparsity, 1), "of the convolutions' weights"))
    gigamacs = next((s.figures.gigamacs for s in run.stages if s.figures.gigamacs is not None), None)
    if gigamacs is not None:
        found.append(Card("Complexity", tables.complexity(gigamacs), "GigaMACs for one crop"))
    speed = next((s for s in run.stages if s.figures.images_per_second is not None), None)
    if speed is not None:
        found.append(
            Card(
                "Speed", tables.speed(speed.figures.images_per_second), f"images/s in {printable(speed.name)}"
            )
        )
    seconds = [s.figures.seconds for s in run.stages if s.figures.seconds is not None]
    if seconds:
        found.append(Card("Time", duration(sum(seconds)), "all stages"))
    return found


# --- every figure ---------------------------------------------------------------------------------------


def figure_rows(run: Run) -> list[tuple[str, list[str]]]:
    """Every figure of the stages as the JSON has it: a row for each figure, a cell for each stage."""
    records = [tables.stage_record(stage) for stage in run.stages]
    names = [name for name in records[0] if name not in ("name", "outputs")] if records else []
    rows = [(name, [_json_cell(record[name]) for record in records]) for name in names]
    outputs = dict.fromkeys(name for record in records for name in record["outputs"])
    return rows + [
        (f"outputs: {printable(name)}", [_json_cell(record["outputs"].get(name)) for record in records])
        for name in outputs
    ]


def _json_cell(value: Any) -> str:
    if value is None:
        return tables.UNKNOWN
    if isinstance(value, str):
        return printable(value)
    return json.dumps(value)


# --- curves ---------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs with what their charts show, as JSON takes it; stages are laid end to end."""
    count = sum(len(_buckets_of(stage)) for run in runs for stage in run.stages)
    most = max(FEWEST_BUCKETS, min(MOST_BUCKETS, MOST_NUMBERS // (4 * max(count, 1))))
    stages = max(1, sum(len(run.stages) for run in runs))
    return [_run_curves(run, most, stages) for run in runs]


def _run_curves(run: Run, most: int, of_stages: int) -> dict[str, Any]:
    """A run; ``most`` buckets of each curve. ``of_stages``: how many stages the page has."""
    stages: list[dict[str, Any]] = []
    trained: list[Stage] = []
    start, begun = 0.0, 0.0
    for stage in run.stages:
        history = stage.history
        reached = [buckets.all()[-1].last for _, _, buckets in _buckets_of(stage)]
        if history is None or not reached or stage.figures.tested:
            continue
        last = max(stage.figures.iterations or 0, *reached)
        times = _fewer(list(history.seconds(stage.figures.year)), MOST_TIMES // of_stages)
        seconds = stage.figures.seconds or (times[-1][1] if times else 0.0)
        trained.append(stage)
        stages.append(
            {
                "name": printable(stage.name),
                "start": start,
                "end": start + last,
                "begun": round(begun, 1),
                "seconds": round(seconds, 1),
                "times": [[time[0] for time in times], [round(time[1], 1) for time in times]],
                "curves": [_curve(panel, name, buckets, most) for panel, name, buckets in _buckets_of(stage)],
            }
        )
        start, begun = start + last, begun + seconds
    pruning = [
        found for stage in run.stages if (found := _pruning(stage, MOST_FRACTIONS // of_stages)) is not None
    ]
    tested = tests_of(run, trained)
    return {"name": printable(run.name), "stages": stages, "pruning": pruning, "tested": tested}


def _buckets_of(stage: Stage) -> list[tuple[str, str, Buckets]]:
    """The curves of a stage: panel, name, points."""
    history = stage.history
    if history is None:
        return []
    called = {output: label for label, output in stage.figures.accuracies.items()}
    found = [("loss", TRAINING_LOSS, history.loss)]
    for name, buckets in sorted(history.outputs.items(), key=lambda item: called.get(item[0], "~")):
        shown = called.get(name, name)
        if shown == TRAINING_LOSS:
            shown += " (output of the test)"
        found.append((_panel_of(name, buckets, history), printable(shown), buckets))
    found += [
        ("rate", "learning rate", history.learning_rate),
        ("sparsity", "sparsity", history.sparsity),
    ]
    return [(panel, name, buckets) for panel, name, buckets in found if buckets.all()]


def _panel_of(name: str, buckets: Buckets, history: StageHistory) -> str:
    if name in history.losses:
        return "loss"
    inside = all(bucket.low >= 0 and bucket.high <= 1 for bucket in buckets.all())
    return "accuracy" if inside else "other"


def _curve(panel: str, name: str, buckets: Buckets, most: int) -> dict[str, Any]:
    """A curve: x and y; where it is thinned, with the lowest and highest value of each bucket."""
    whole = buckets.all()
    # Two points to a pixel are as good as a bucket of them.
    found = whole if len(whole) <= 2 * most else thinned(whole, most)
    curve: dict[str, Any] = {
        "panel": panel,
        "name": name,
        "x": [_middle(b) for b in found],
        "y": [_short(b.mean) for b in found],
    }
    points = sum(bucket.points for bucket in found)
    if points > len(found):
        curve |= {
            "low": [_short(b.low) for b in found],
            "high": [_short(b.high) for b in found],
            "of": points,
        }
    return curve


def _middle(bucket: Bucket) -> float:
    middle = (bucket.first + bucket.last) / 2
    return int(middle) if middle == int(middle) else middle


def _short(value: float) -> float:
    return float(f"{value:.6g}")


# --- pruning --------------------------------------------------------------------------------------------


def _pruning(stage: Stage, most: int) -> dict[str, Any] | None:
    """The sparsity of each convolution that counts, by listing; about ``most`` numbers.

    None where no weight was ever zero.
    """
    history, net = stage.history, stage.net
    if history is None or net is None:
        return None
    listed = {layer for listing in history.listings for layer in listing.layers}
    layers = [cost.name for cost in net.costs if cost.counted and cost.name in listed]
    if not layers or not any(any(listing.layers.values()) for listing in history.listings):
        return None
    listings = _fewer(history.listings, most // len(layers))
    return {
        "stage": printable(stage.name),
        "layers": [printable(layer) for layer in layers],
        "at": [listing.iteration for listing in listings],
        "sparsity": [[listing.layers.get(layer) for listing in listings] for layer in layers],
    }


_T = TypeVar("_T")


def _fewer(items: list[_T], most: int) -> list[_T]:
    """Every n-th item, the last one among them; at least two of several."""
    step = max(1, -(-len(items) // max(most, 2)))
    return items[::-1][::step][::-1]


# --- cost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """The cost of a network, and the runs that have it."""

    runs: list[str]
    summary: Summary
    listed: frozenset[str]
    """The layers whose sparsity the log lists."""


def costs(runs: Sequence[Run]) -> list[Cost]:
    """The distinct networks of the runs, with the zeros of the last listing, layer by layer."""
    found: list[Cost] = []
    for run in runs:
        cost = _cost(run)
        if cost is None:
            continue
        same = next((other for other in found if other.summary == cost.summary), None)
        if same is not None:
            same.runs.extend(cost.runs)
        else:
            found.append(cost)
    return found


def _cost(run: Run) -> Cost | None:
    """Of the last stage whose network is known, where there are listings of sparsity of the last with one."""
    known = [(stage.net, stage.history) for stage in run.stages if stage.net and stage.net.message]
    with_listing = [(net, history) for net, history in known if history and history.listings]
    if not known:
        return None
    net, history = (with_listing or known)[-1]
    assert net is not None and net.message is not None
    listed = history.listings[-1].layers if history and history.listings else {}
    weights = {cost.name: cost.weights or 0 for cost in net.costs}
    zeros = {name: round(listed.get(name, 0.0) * count) for name, count in weights.items()}
    try:
        summary = summarize(net.message, "the log's network", zeros if listed else None, net.shapes)
    except UserError:
        return None  # the log does not determine the cost
    return Cost([printable(run.name)], summary, frozenset(listed)) if summary.macs else None
