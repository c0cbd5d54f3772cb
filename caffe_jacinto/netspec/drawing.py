"""A picture of a network: a box for each convolution with what follows it, from the input down."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.netspec.summary import LayerRow, Summary

KINDS = (".png", ".svg")
_COLOURS = {
    "convolution": "#cfe3f5",
    "inner product": "#f8dcc0",
    "pooling": "#d5ead0",
    "data": "#e8e8e8",
    "other": "#f3eccb",
}
_BOX_WIDTH, _BOX_HEIGHT, _PITCH = 4.6, 0.62, 0.98
"""In inches: of a box, and from one to the next."""

_LEFT, _RIGHT = 1.9, 1.7
"""Room for the arrows that pass boxes by, and for the bars of MACs."""

_DOTS_PER_INCH = 120


@dataclass
class Box:
    """Layers that are drawn as one."""

    rows: list[LayerRow]
    inputs: list[int] = field(default_factory=list)
    """The boxes whose outputs it reads."""

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def kind(self) -> str:
        role = role_of(self.rows[0].type)
        return role if role in _COLOURS else "other"


def draw(summary: Summary, path: Path) -> None:
    """Draw the network to ``path``, a .png or .svg file; twice the same bytes.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"--draw {path}: the name must end in {' or '.join(KINDS)}")
    image = _image(summary, boxes_of(summary), kind.lstrip("."))
    try:
        write_whole(path, image)
    except OSError as error:
        raise UserError(f"--draw {path}: cannot be written: {error.strerror}") from None


def boxes_of(summary: Summary) -> list[Box]:
    """The layers in boxes: a layer that alone reads the last one of the box before it may join that box."""
    sources = _sources(summary.rows)
    readers = Counter(maker for makers in sources for maker in makers)
    boxes: list[Box] = []
    box_of: list[int] = []
    for at, row in enumerate(summary.rows):
        makers = sources[at]
        follows = role_of(row.type) == "follower" and makers == [at - 1] and readers[at - 1] == 1
        if follows:
            boxes[-1].rows.append(row)
        else:
            boxes.append(Box([row], sorted({box_of[maker] for maker in makers})))
        box_of.append(len(boxes) - 1)
    return boxes


def _sources(rows: Sequence[LayerRow]) -> list[list[int]]:
    """For each layer the layers that make its bottoms."""
    makers: dict[str, int] = {}
    found = []
    for at, row in enumerate(rows):
        found.append([makers[name] for name in row.bottoms if name in makers])
        makers.update(dict.fromkeys(row.tops, at))
    return found


def _image(summary: Summary, boxes: Sequence[Box], kind: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": "caffe_jacinto",
        "svg.fonttype": "none",
        "font.size": 9,
        "text.usetex": False,
        "text.parse_math": False,
    }
    lanes = _lanes(boxes)
    left = _LEFT if lanes else 0.3
    width, height = left + _BOX_WIDTH + _RIGHT, len(boxes) * _PITCH + 0.9
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-left, _BOX_WIDTH + _RIGHT)
        axes.set_ylim(-(len(boxes) * _PITCH), 0.9)
        axes.axis("off")
        axes.text(0, 0.5, _printable(summary.name, 48), weight="bold", size=12, va="center")
        total = f"{summary.macs / 1e9:.4f} GigaMACs, {summary.parameters / 1e6:.4g} million parameters"
        axes.text(0, 0.2, total, color="#555555", va="center")
        most = max((box.macs for box in boxes), default=0)
        for at, box in enumerate(boxes):
            _draw_box(axes, box, at, summary.macs, most)
            for source in box.inputs:
                _draw_arrow(axes, boxes[source], source, at, lanes.get((source, at)))
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
    return out.getvalue()


def _top_of(at: int) -> float:
    """The y of the upper edge of box number ``at``."""
    return -at * _PITCH


def _draw_box(axes: Any, box: Box, at: int, macs: int, most: int) -> None:
    """A box and, at its right, its share of the MACs; the bars are relative to the largest."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    top = _top_of(at)
    axes.add_patch(
        FancyBboxPatch(
            (0, top - _BOX_HEIGHT),
            _BOX_WIDTH,
            _BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=_COLOURS[box.kind],
            edgecolor="#777777",
            linewidth=0.8,
        )
    )
    first = box.rows[0]
    axes.text(0.12, top - 0.2, _printable(first.name, 44), weight="bold", va="center")
    axes.text(0.12, top - 0.44, _printable(_words(box), 70), size=8, color="#333333", va="center")
    if box.macs:
        x, bar = _BOX_WIDTH + 0.15, (_RIGHT - 0.3) * box.macs / most
        axes.add_patch(Rectangle((x, top - 0.5), bar, 0.14, facecolor="#3778b7"))
        axes.text(x, top - 0.18, f"{box.macs / macs:.1%} of MACs", size=8, color="#333333", va="center")


def _words(box: Box) -> str:
    """What the box does: ``Convolution 3x3 group 4 + BatchNorm + Scale + ReLU``."""
    names = [" ".join(filter(None, (row.type, row.detail))) for row in box.rows]
    return " + ".join(names)


def _draw_arrow(axes: Any, source: Box, start: int, end: int, lane: int | None) -> None:
    """From box to box: straight down, or round those in between, with the shape that flows."""
    shape = source.rows[-1].shape
    label = "x".join(map(str, shape)) if shape else ""
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "color": "#555555",
        "linewidth": 1,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    if lane is None:
        x = _BOX_WIDTH / 2
        bottom = _top_of(start) - _BOX_HEIGHT
        axes.annotate("", (x, _top_of(end)), (x, bottom), arrowprops=style)
        axes.text(x + 0.1, (bottom + _top_of(end)) / 2, label, size=8, color="#555555", va="center")
        return
    x = -0.25 - 0.28 * lane
    begin, stop = _top_of(start) - _BOX_HEIGHT * 0.75, _top_of(end) - _BOX_HEIGHT * 0.4
    axes.plot([0, x, x], [begin, begin, stop], color="#555555", linewidth=1, solid_joinstyle="round")
    axes.annotate("", (0, stop), (x, stop), arrowprops=style)
    # Not in the middle, where arrows of nearer lanes begin and end.
    middle, behind = begin + (stop - begin) * 0.35, {"facecolor": "white", "edgecolor": "none", "pad": 1}
    centred: dict[str, Any] = {"va": "center", "ha": "center", "rotation": 90, "bbox": behind}
    axes.text(x, middle, label, size=8, color="#555555", **centred)


def _lanes(boxes: Sequence[Box]) -> dict[tuple[int, int], int]:
    """A lane on the left for each arrow that passes boxes by: 0 is the nearest; none cross in one lane."""
    passing = sorted(
        ((source, at) for at, box in enumerate(boxes) for source in box.inputs if at - source > 1),
        key=lambda arrow: (arrow[1] - arrow[0], arrow),
    )
    lanes: dict[tuple[int, int], int] = {}
    for start, end in passing:
        taken = {lane for (a, b), lane in lanes.items() if a < end and start < b}
        lanes[start, end] = next(lane for lane in range(len(passing)) if lane not in taken)
    return lanes


def _printable(text: str, most: int) -> str:
    """What fits, without characters that a font lacks or XML forbids."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"
