"""The confusion matrix as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.errors import UserError
from caffe_jacinto.files import write_whole
from caffe_jacinto.inference.scoring import Tally
from caffe_jacinto.inference.tables import name_of, totals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_NAMES = 60
"""With more classes than this, their names cannot be read; numbers stand at some of them."""

_MOST_COUNTS = 25
"""With more classes than this, their counts do not fit into the cells."""

_MOST_LETTERS = 24
_SIDE, _LARGEST_SIDE = 0.36, 22.0
"""Of a cell with a name, and of the matrix, in inches."""


def draw_confusion(tally: Tally, names: tuple[str, ...], output: Path) -> None:
    """Draw the share of each true class (rows) found as each class (columns) to a .png or .svg file; twice
    the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = len(tally.matrix)
    shares = tally.matrix / np.maximum(tally.matrix.sum(axis=1, keepdims=True), 1)
    kind = output.suffix.lower().lstrip(".")
    side = min(max(5.0, _SIDE * classes if classes <= _MOST_NAMES else classes / 100), _LARGEST_SIDE)
    settings: Any = {"svg.hashsalt": "caffe_jacinto", "svg.fonttype": "none", "text.parse_math": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(side + 2.2, side + 1.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(totals(tally), fontsize=11)
        axes.set(xlabel="class found", ylabel="true class")
        if classes <= _MOST_NAMES:
            labels = [_short(name_of(names, i)) for i in range(classes)]
            axes.set_xticks(range(classes), labels, rotation=90 if max(map(len, labels)) > 2 else 0)
            axes.set_yticks(range(classes), labels)
        if classes <= _MOST_COUNTS:
            _write_counts(axes, tally.matrix, shares)
        figure.colorbar(image, label="share of the true class's images", fraction=0.045)
        content = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=120, metadata=metadata)
    try:
        write_whole(output, content.getvalue())
    except OSError as error:
        raise UserError(f"--picture {output}: cannot be written: {error.strerror}") from None


def _write_counts(axes: Any, matrix: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    """The number of images in each cell that has any, light on dark ones."""
    for true, row in enumerate(matrix.tolist()):
        for found, count in enumerate(row):
            if count:
                colour = "white" if shares[true, found] > 0.5 else "#333333"
                axes.text(found, true, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"
