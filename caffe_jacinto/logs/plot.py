"""A picture of the curves of runs, all stages end to end."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs import curves
from caffe_jacinto.logs.curves import Axis, Part
from caffe_jacinto.logs.discover import Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6F47")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and brown."""
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (1, 3)))
_WIDTH = 9.0
_PANEL_HEIGHT = 1.75
_DOTS_PER_INCH = 150
_SMOOTHED_FROM = 40
"""A loss of fewer points is drawn without smoothing."""
_MARKED_BELOW = 25
_LOGARITHMIC_FROM = 5.0
"""Learning rates whose largest and smallest are further apart have a logarithmic axis."""
_NAME_LENGTH = 70

SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a run's name may hold a $
    "svg.hashsalt": "caffe_jacinto",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.edgecolor": "none",
    "legend.frameon": False,
}
"""matplotlib's, for every picture."""


@dataclass(frozen=True)
class _Line:
    """A run: its stages and its colour."""

    run: Run
    colour: str
    parts: list[Part]

    @property
    def tested(self) -> list[tuple[float, float]]:
        """Where a ``caffe test`` was, and its top-1 in float."""
        tests = curves.tests_of(self.run, [part.stage for part in self.parts])
        return [(self.parts[before - 1].end if before else 0.0, top1) for before, top1 in tests]


@dataclass
class _Curve:
    """What is drawn of a run in a panel; in several pieces where a stage does not go on with it."""

    line: _Line
    label: str
    """What tells it from the other curves of the run in this panel."""
    pieces: list[curves.Points]


@dataclass
class _Panel:
    title: str
    curves: list[_Curve] = field(default_factory=list)
    kind: str = ""
    """``loss``, ``speed``, ``rate``, ``percent`` or nothing."""
    points: list[tuple[_Line, float, float]] = field(default_factory=list)
    """Single results: run, place and value."""

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(curve.label for curve in self.curves))

    def values(self) -> list[float]:
        return [y for curve in self.curves for piece in curve.pieces for _, y in piece]


def plot_runs(
    runs: Sequence[Run], path: Path, *, axis: Axis = "iteration", names: Sequence[str] = ()
) -> None:
    """Draw ``runs`` (read with their history) over each other to ``path``, a .png or .svg file.

    ``names``: the curves to draw, a panel for each (see `curves.known_names` and `curves.known_accuracies`);
    by default training loss, accuracies, learning rate and sparsity.

    Raises:
        UserError: no run has a curve, or none of a name; the axis is not known; the file cannot be written.
    """
    lines: list[_Line] = []
    for run in runs:
        parts = curves.parts_of(run, axis)
        if parts:
            lines.append(_Line(run, COLOURS[len(lines) % len(COLOURS)], parts))
    if not lines:
        raise UserError(f"--plot {path}: the logs hold no curve, only single figures; give logs of training")
    known = curves.known_names(runs)
    accuracies = curves.known_accuracies(runs)
    for name in names:
        if name not in known and name not in accuracies:
            shown = ", ".join(printable(one) for one in [*known, *accuracies])
            raise UserError(f"--y {printable(name)}: no log has this curve; there are: {shown}")
    panels = [
        _named(lines, name) if name in known else _accuracy(lines, *accuracies[name]) for name in names
    ] or _usual(lines)
    image = _draw(lines, panels, axis, path.suffix.lower().lstrip("."))
    try:
        write_whole(path, image)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from None


# --- panels ---------------------------------------------------------------------------------------------


def _usual(lines: Sequence[_Line]) -> list[_Panel]:
    found = [_named(lines, curves.TRAIN_LOSS), _accuracy(lines)]
    found += [_named(lines, name) for name in (curves.LEARNING_RATE, curves.SPARSITY)]
    return [panel for panel in found if panel.curves]


def _named(lines: Sequence[_Line], name: str) -> _Panel:
    """The curve ``name`` of each run."""
    titles = {
        curves.TRAIN_LOSS: ("training loss", "loss"),
        curves.LEARNING_RATE: ("learning rate", "rate"),
        curves.SPARSITY: ("sparsity, %", "percent"),
        curves.SPEED: ("images/s", "speed"),
    }
    title, kind = titles.get(name, (printable(name), ""))
    panel = _Panel(title, kind=kind)
    for line in lines:
        pieces = [points for part in line.parts if (points := part.points(name))]
        if name not in (curves.TRAIN_LOSS, curves.LEARNING_RATE, curves.SPEED):
            pieces = _joined(pieces)
        if pieces:
            panel.curves.append(_Curve(line, "", pieces))
    return panel


def _accuracy(lines: Sequence[_Line], *wanted: str) -> _Panel:
    """Every accuracy of every test network, or those ``wanted``, and what ``caffe test`` found."""
    panel = _Panel(f"{wanted[0] if wanted else 'accuracy'}, %", kind="percent")
    for line in lines:
        labels = dict.fromkeys(label for part in line.parts for label in part.stage.figures.accuracies)
        if wanted:
            labels = dict.fromkeys(label for label in labels if label in wanted)
        for label in labels:
            pieces = [
                points
                for part in line.parts
                if (points := part.points(part.stage.figures.accuracies.get(label, "")))
            ]
            if pieces:
                panel.curves.append(_Curve(line, label, _joined(pieces)))
        if not wanted or wanted[0] == "top-1":
            panel.points.extend((line, place, top1) for place, top1 in line.tested)
    return panel


def _joined(pieces: Sequence[curves.Points]) -> list[curves.Points]:
    """One piece: the network that a stage ends with is the one that the next begins with."""
    return [[point for piece in pieces for point in piece]] if pieces else []


# --- drawing --------------------------------------------------------------------------------------------


def _draw(lines: Sequence[_Line], panels: Sequence[_Panel], axis: Axis, kind: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name's script that the font lacks
        heading = 0.3 + (0.19 * len(lines) if len(lines) > 1 else 0.15)
        height = _PANEL_HEIGHT * max(len(panels), 1.3) + heading + 0.4
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        unit, divisor, write = _unit(axis, max(line.parts[-1].end for line in lines))
        for panel, place in zip(panels, axes, strict=True):
            _draw_panel(place, panel, divisor)
            place.margins(x=0.01)
        figure.align_ylabels(axes)
        _boundaries(axes, lines, divisor)
        if len(lines) > 1:
            _name_runs(figure, axes[0], lines)
        several = ", all stages end to end" if any(len(line.parts) > 1 for line in lines) else ""
        axes[-1].set_xlabel(unit + several)
        axes[-1].xaxis.set_major_formatter(lambda value, _: write(value))
        return picture(figure, kind)


def picture(figure: Any, kind: str) -> bytes:
    """The bytes of a figure as a ``png`` or ``svg`` file, the same each time."""
    out = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(out, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
    return out.getvalue()


def _unit(axis: Axis, last: float) -> tuple[str, float, Callable[[float], str]]:
    """The axis's title, what its values are divided by, and how they are written."""
    if axis != "time":
        return axis, 1.0, short
    for name, seconds in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if last >= 3 * seconds:
            return f"time in {name}", seconds, short
    return "time in seconds", 1.0, short


def _draw_panel(place: Any, panel: _Panel, divisor: float) -> None:
    scale = 100 if panel.kind == "percent" else 1
    drawn: dict[str, Any] = {}
    for curve in panel.curves:
        style = _STYLES[panel.labels.index(curve.label) % len(_STYLES)]
        for piece in curve.pieces:
            x, y = [at / divisor for at, _ in piece], [scale * value for _, value in piece]
            noisy = panel.kind in ("loss", "speed")
            if noisy and len(y) >= _SMOOTHED_FROM:
                alpha = 0.25 if len(panel.curves) == 1 else 0.12
                place.plot(x, y, color=curve.line.colour, linewidth=0.6, alpha=alpha)
                y = _smoothed(y)
            found = _plot(place, curve.line.colour, x, y, style, marked=not noisy)
            drawn.setdefault(curve.label, found)
    for line, at, value in panel.points:
        (found,) = place.plot(
            [at / divisor], [scale * value], "D", color=line.colour, markersize=5, clip_on=False, zorder=5
        )
        drawn.setdefault("top-1, caffe test", found)
    place.set_ylabel(panel.title)
    _limits(place, panel, scale)
    if any(drawn) and (len(drawn) > 1 or panel.points):
        legend = place.legend(
            drawn.values(), drawn.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5
        )
        if len({curve.line.colour for curve in panel.curves}) > 1:
            for handle in legend.legend_handles:
                handle.set_color("#555555")


def _plot(
    place: Any, colour: str, x: Sequence[float], y: Sequence[float], style: Any, *, marked: bool
) -> Any:
    """Draw a curve in its run's colour; with its points, if they are few and ``marked``, or one."""
    marker = "o" if len(x) == 1 or (marked and len(x) < _MARKED_BELOW) else None
    (drawn,) = place.plot(x, y, color=colour, linestyle=style, linewidth=1.4, marker=marker, markersize=3)
    return drawn


def _limits(place: Any, panel: _Panel, scale: float) -> None:
    values = sorted(scale * value for value in panel.values())
    if panel.kind == "rate":
        if values[0] > 0 and values[-1] / values[0] >= _LOGARITHMIC_FROM:
            place.set_yscale("log")
            place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if values[-1] / values[0] >= 100:
                place.yaxis.set_minor_formatter(lambda value, _: "")
            else:
                place.yaxis.set_minor_formatter(lambda value, _: f"{value:.2g}")
        elif values[0] > 0:
            place.set_ylim(bottom=0)
    elif panel.kind in ("loss", "speed"):
        # The first losses of a training can be far above all others: they may leave the picture.
        top = values[-1 - len(values) // 200]
        low = min(0.0, values[0])
        place.set_ylim(low, top + 0.1 * ((top - low) or 1.0))
    elif panel.title == "sparsity, %":
        place.set_ylim(-2, 102)
    if place.get_yscale() == "linear":
        place.yaxis.set_major_formatter(lambda value, _: short(value))


def _boundaries(axes: Any, lines: Sequence[_Line], divisor: float) -> None:
    """A rule where each stage of a run ends; of a single run, also their names above the first panel."""
    several = len(lines) > 1
    whole = max(line.parts[-1].end for line in lines) or 1.0
    row, used = 0, 0.0
    for line in lines:
        for part in line.parts:
            for place in axes:
                if part.start > 0:
                    colour = line.colour if several else "#777777"
                    place.axvline(
                        part.start / divisor, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1
                    )
            if several:
                continue
            # A name that is wider than its stage goes above the one before it.
            name, middle = printable(part.stage.name), (part.start + part.end) / 2 / whole
            half = len(name) * 0.0055
            row = row + 1 if middle - half < used and row < 3 else 0
            used = max(used, middle + half)
            axes[0].annotate(
                name,
                ((part.start + part.end) / 2 / divisor, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 6 + 13 * row),
                textcoords="offset points",
                ha="center",
                color="#333333",
                annotation_clip=False,
            )


def _name_runs(figure: Any, place: Any, lines: Sequence[_Line]) -> None:
    """The runs and their stages, above all panels."""
    handles = [place.plot([], [], color=line.colour, label=_name(line))[0] for line in lines]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8.5)


def _name(line: _Line) -> str:
    name = printable(line.run.name)
    if len(name) > _NAME_LENGTH:
        name = f"{name[: _NAME_LENGTH // 2]}...{name[-_NAME_LENGTH // 2 :]}"
    return f"{name}: {', '.join(printable(part.stage.name) for part in line.parts)}"


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of 3 % of the points around each."""
    half = max(2, len(values) * 3 // 200)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[start]) / (end - start) for start, end in _windows(len(values), half)]


def _windows(count: int, half: int) -> Iterator[tuple[int, int]]:
    return ((max(0, at - half), min(count, at + half + 1)) for at in range(count))


def short(value: float) -> str:
    """``320000`` as ``320k``, ``80000000`` as ``80M``."""
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"
