"""The curves of runs: loss, accuracy, learning rate and sparsity over all stages, laid end to end."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs.series import Curve, StageCurves

if TYPE_CHECKING:
    from caffe_jacinto.logs.discover import Run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
_WIDTH = 9.0
_PANEL_HEIGHT = 1.75
_DOTS_PER_INCH = 150
_SMOOTHED_FROM = 40
"""A loss of fewer points is drawn without smoothing."""
_MARKED_BELOW = 25

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Part:
    """A stage of a run, moved to its place on the common axis."""

    name: str
    start: float
    end: float
    curves: StageCurves


@dataclass(frozen=True)
class _Line:
    """A run: its parts, its colour, and the accuracy that a last ``caffe test`` found."""

    name: str
    colour: str
    parts: list[_Part]
    tested: float | None


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw ``runs`` (read with their curves) over each other to ``path``, a .png or .svg file.

    Raises:
        UserError: no run has a curve, or the file cannot be written.
    """
    lines = _lines(runs)
    if not lines:
        raise UserError(f"--plot {path}: the logs hold no curve, only single figures; give logs of training")
    image = _draw(lines, path.suffix.lower().lstrip("."))
    try:
        write_whole(path, image)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from None


def _lines(runs: Sequence[Run]) -> list[_Line]:
    lines: list[_Line] = []
    for run in runs:
        parts, offset, tested = [], 0.0, None
        for stage in run.stages:
            if stage.curves is None or not stage.curves.loss.all():
                tested = stage.figures.top1 if stage.figures.tested else tested
                continue
            last = max(stage.figures.iterations or 0, stage.curves.loss.all()[-1][0])
            parts.append(_Part(stage.name, offset, offset + last, stage.curves))
            offset += last
        if offset > 0:
            lines.append(_Line(run.name, _COLOURS[len(lines) % len(_COLOURS)], parts, tested))
    return lines


def _draw(lines: Sequence[_Line], kind: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    panels = [panel for panel in (_loss, _accuracy, _learning_rate, _sparsity) if panel(None, lines)]
    settings: dict[Any, Any] = {
        "text.parse_math": False,  # a run's name may hold a $
        "svg.hashsalt": "caffe_jacinto",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name's script that the font lacks
        heading = 0.3 + 0.2 * len(lines)
        figure = Figure(figsize=(_WIDTH, _PANEL_HEIGHT * len(panels) + heading + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, axis in zip(panels, axes, strict=True):
            panel(axis, lines)
            axis.margins(x=0.01)
        figure.align_ylabels(axes)
        _boundaries(axes, lines)
        axes[-1].set_xlabel("iteration, all stages end to end")
        axes[-1].xaxis.set_major_formatter(lambda value, _: _short(value))
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
    return out.getvalue()


def _boundaries(axes: Any, lines: Sequence[_Line]) -> None:
    """A rule where each stage ends, and above the first panel a row of stage names for each run."""
    several = len(lines) > 1
    for row, line in enumerate(reversed(lines)):
        for part in line.parts:
            for axis in axes:
                if part.start > 0:
                    colour = line.colour if several else "#777777"
                    axis.axvline(part.start, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axes[0].annotate(
                printable(part.name),
                ((part.start + part.end) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 6 + 13 * row),
                textcoords="offset points",
                ha="center",
                color=line.colour if several else "#333333",
                annotation_clip=False,
            )
    if several:
        handles = [axes[0].plot([], [], color=line.colour, label=printable(line.name))[0] for line in lines]
        axes[0].legend(handles=handles, loc="upper right", fontsize=8.5)


def _moved(part: _Part, points: Points) -> tuple[list[float], list[float]]:
    """The points' coordinates on the common axis."""
    return [part.start + x for x, _ in points], [y for _, y in points]


def _joined(curves: Sequence[tuple[_Part, Curve]]) -> tuple[list[float], list[float]]:
    """One curve over all stages: the network that a stage ends with is the one that the next begins with."""
    points = [(part.start + x, y) for part, curve in curves for x, y in curve.all()]
    return [x for x, _ in points], [y for _, y in points]


def _curve(
    axis: Any,
    line: _Line,
    x: Sequence[float],
    y: Sequence[float],
    *,
    style: Any = "-",
    label: str | None = None,
    marked: bool = False,
) -> Any:
    """Draw a curve in its run's colour; with its points, if they are few and ``marked``, or one."""
    marker = "o" if len(x) == 1 or (marked and len(x) < _MARKED_BELOW) else None
    (drawn,) = axis.plot(
        x, y, color=line.colour, linestyle=style, linewidth=1.4, marker=marker, markersize=3, label=label
    )
    return drawn


def _loss(axis: Any, lines: Sequence[_Line]) -> bool:
    values = [y for line in lines for part in line.parts for _, y in part.curves.loss.all()]
    if axis is None:
        return bool(values)
    for line in lines:
        for part in line.parts:
            x, y = _moved(part, part.curves.loss.all())
            if len(y) < _SMOOTHED_FROM:
                _curve(axis, line, x, y)
            else:
                axis.plot(x, y, color=line.colour, linewidth=0.6, alpha=0.25)
                axis.plot(x, _smoothed(y), color=line.colour, linewidth=1.4)
    # The first losses of a training can be far above all others: they may leave the picture.
    top = sorted(values)[-1 - len(values) // 200]
    low = min(0.0, *values)
    axis.set_ylim(low, top + 0.1 * ((top - low) or 1.0))
    axis.set_ylabel("training loss")
    return True


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of 3 % of the points around each."""
    half = max(2, len(values) * 3 // 200)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = ((max(0, at - half), min(len(values), at + half + 1)) for at in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def _accuracy(axis: Any, lines: Sequence[_Line]) -> bool:
    if axis is None:
        return any(part.curves.top1.all() or part.curves.top5.all() for line in lines for part in line.parts)
    kinds: dict[str, Any] = {}
    for line in lines:
        for name, style in (("top-1", "-"), ("top-5", (0, (2, 1)))):
            curves = [
                (part, part.curves.top1 if name == "top-1" else part.curves.top5) for part in line.parts
            ]
            x, y = _joined(curves)
            if x:
                kinds.setdefault(
                    name,
                    _curve(axis, line, x, [100 * value for value in y], style=style, label=name, marked=True),
                )
        if line.tested is not None:
            found = axis.plot(
                [line.parts[-1].end], [100 * line.tested], "D", color=line.colour, markersize=5,
                clip_on=False, zorder=5, label="top-1, caffe test",
            )  # fmt: skip
            kinds.setdefault("top-1, caffe test", found[0])
    legend = axis.legend(handles=list(kinds.values()), loc="lower right", fontsize=8.5, ncols=len(kinds))
    if len(lines) > 1:
        for handle in legend.legend_handles:
            handle.set_color("#555555")
    axis.set_ylabel("accuracy, %")
    return True


def _learning_rate(axis: Any, lines: Sequence[_Line]) -> bool:
    if axis is None:
        return any(part.curves.learning_rate.all() for line in lines for part in line.parts)
    for line in lines:
        for part in line.parts:
            _curve(axis, line, *_moved(part, part.curves.learning_rate.all()))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate")
    return True


def _sparsity(axis: Any, lines: Sequence[_Line]) -> bool:
    if axis is None:
        return any(part.curves.sparsity.all() for line in lines for part in line.parts)
    for line in lines:
        x, y = _joined([(part, part.curves.sparsity) for part in line.parts])
        _curve(axis, line, x, [100 * value for value in y], marked=True)
    axis.set_ylim(-2, 102)
    axis.set_ylabel("sparsity, %")
    return True


def _short(value: float) -> str:
    """``320000`` as ``320k``."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
