"""A picture to choose a network by: the accuracy of runs against their sparsity and their complexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs import tables
from caffe_jacinto.logs.discover import Run
from caffe_jacinto.logs.plot import COLOURS, SETTINGS, picture, short

_MARKERS = "osD^vP*X"
_WIDTH = 9.0
_HEIGHT = 4.2
_LOGARITHMIC_FROM = 5.0
_DECADES_ALONE_FROM = 200.0
_NAME_LENGTH = 48


@dataclass(frozen=True)
class Choice:
    """A run: its name, and points (x, top-1) for each picture; several points are its results in order."""

    name: str
    sparsity: list[tuple[float, float]]
    gigamacs: list[tuple[float, float]]


def choices(runs: Sequence[Run]) -> list[Choice]:
    """The runs whose top-1 accuracy is known."""
    found = []
    for run in runs:
        figures = [stage.figures for _, stage in tables.results([run])]
        sparsity = [
            (one.sparsity, one.top1) for one in figures if one.sparsity is not None and one.top1 is not None
        ]
        costs = [(one.gigamacs, one.top1) for one in figures if one.gigamacs and one.top1 is not None]
        if sparsity or costs:
            found.append(Choice(_shortened(printable(run.name)), sparsity, costs[-1:]))
    return found


def draw_choices(runs: Sequence[Run], path: Path, published: Sequence[tables.Published] = ()) -> None:
    """Draw ``runs``, and ``published`` results beside them, to ``path``, a .png or .svg file.

    Raises:
        UserError: no run has an accuracy and a sparsity or a complexity, or the file cannot be written.
    """
    found = choices(runs)
    if not found:
        raise UserError(
            f"--scatter {path}: no run has a top-1 accuracy together with a sparsity or a complexity"
        )
    image = draw(found, path.suffix.lower().lstrip("."), published)
    try:
        write_whole(path, image)
    except OSError as error:
        raise UserError(f"--scatter {path}: cannot be written: {error.strerror}") from None


def draw(
    found: Sequence[Choice],
    kind: str,
    published: Sequence[tables.Published] = (),
    cost: str = "complexity, GigaMACs for one crop",
) -> bytes:
    """The picture, of the ``kind`` png or svg; ``cost`` is what the x of `Choice.gigamacs` is."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [panel for panel in ("sparsity", "gigamacs") if any(getattr(one, panel) for one in found)]
    with matplotlib.rc_context(SETTINGS):
        height = max(_HEIGHT, 0.19 * (len(found) + len(published)) + 0.6)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for panel, place in zip(panels, places, strict=True):
            scale = 100 if panel == "sparsity" else 1
            for number, one in enumerate(found):
                points = getattr(one, panel)
                if points:
                    drawn = _points(place, points, number, scale)
                    handles.setdefault(f"{number + 1}  {one.name}", drawn)
            _number_points(place, [getattr(one, panel)[-1:] for one in found], scale)
            if panel == "gigamacs":
                for row in published:
                    (drawn,) = place.plot(
                        [row.gigamacs], [100 * row.top1], "+", color="#666666", markersize=9
                    )
                    handles[f"+  {row.name} (published)"] = drawn
        _axes(dict(zip(panels, places, strict=True)), cost)
        names = sorted(
            handles, key=lambda name: (name[0] == "+", int(name.split()[0]) if name[0] != "+" else 0)
        )
        figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8.5)
        return picture(figure, kind)


def _points(place: Any, points: Sequence[tuple[float, float]], number: int, scale: float) -> Any:
    (drawn,) = place.plot(
        [scale * x for x, _ in points],
        [100 * top1 for _, top1 in points],
        color=COLOURS[number % len(COLOURS)],
        marker=_MARKERS[number // len(COLOURS) % len(_MARKERS)],
        markersize=6,
        linewidth=0.8,
        linestyle=(0, (3, 2)),
    )
    return drawn


def _number_points(place: Any, last: Sequence[Sequence[tuple[float, float]]], scale: float) -> None:
    """Write the runs' numbers beside their results; equal results share a place."""
    numbers: dict[tuple[float, float], list[str]] = {}
    for number, points in enumerate(last):
        for x, top1 in points:
            numbers.setdefault((float(f"{x:.3g}"), round(top1, 3)), []).append(str(number + 1))
    for (x, top1), found in numbers.items():
        place.annotate(
            ", ".join(found),
            (scale * x, 100 * top1),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color="#333333",
        )


def _axes(places: dict[str, Any], cost: str) -> None:
    from matplotlib.ticker import LogLocator

    next(iter(places.values())).set_ylabel("top-1 accuracy, %")
    for panel, place in places.items():
        place.margins(0.08)
        if panel == "sparsity":
            place.set_xlabel("sparsity of the convolutions, %")
            continue
        place.set_xlabel(cost)
        low, high = place.get_xlim()
        low = max(low, min(x for line in place.lines for x in line.get_xdata()))
        if high / low >= _LOGARITHMIC_FROM:
            place.set_xscale("log")
            if high / low < _DECADES_ALONE_FROM:  # powers of ten would be one label, or none
                place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.xaxis.set_minor_formatter(lambda value, _: "")
        else:
            place.locator_params(axis="x", nbins=4)  # so that long numbers have room
        place.xaxis.set_major_formatter(lambda value, _: short(value))


def _shortened(name: str) -> str:
    half = _NAME_LENGTH // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[:half]}...{name[-half:]}"
