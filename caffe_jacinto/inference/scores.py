"""What a network makes of images: the best classes of each, accuracies, and the confusion matrix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import Column, Line, printable, show_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


def softmax(scores: Values) -> NDArray[np.float64]:
    """The probabilities for scores, images x classes."""
    import numpy as np

    powers = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return result


def softmax_loss(scores: Values, labels: Sequence[int]) -> float:
    """The sum of -log(probability of the label) over images, for scores, images x classes."""
    import numpy as np

    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    logs = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return float(logs.sum())


class Tally:
    """Top-1, top-5 and the confusion matrix of labelled images, counted as they come."""

    def __init__(self, classes: int) -> None:
        import numpy as np

        self.matrix = np.zeros((classes, classes), np.int64)
        """True class x predicted class."""

        self.images = self.top1 = self.top5 = 0

    @property
    def has_top5(self) -> bool:
        """Whether there are enough classes: with fewer than five, Caffe's Accuracy layer refuses a top 5."""
        return len(self.matrix) >= 5

    def add(self, scores: Values, labels: list[int]) -> None:
        """Count a batch. As in Caffe's Accuracy layer, an equal score counts as a better one."""
        import numpy as np

        wrong = next((label for label in labels if not 0 <= label < len(self.matrix)), None)
        if wrong is not None:
            raise UserError(
                f"the LMDB has the label {wrong}, the network {len(self.matrix)} classes; "
                "use the network that was trained for it"
            )
        rows = np.arange(len(labels))
        better = (scores >= scores[rows, labels][:, None]).sum(axis=1) - 1
        self.images += len(labels)
        self.top1 += int((better < 1).sum())
        self.top5 += int((better < 5).sum())
        np.add.at(self.matrix, (labels, scores.argmax(axis=1)), 1)

    def by_class(self) -> list[tuple[int, int]]:
        """For each class, the images that were classified correctly, and all of them."""
        return [(int(row[i]), int(row.sum())) for i, row in enumerate(self.matrix)]

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: true class, predicted class, how often."""
        import numpy as np

        wrong = self.matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [tuple(int(i) for i in np.unravel_index(at, wrong.shape)) for at in order]
        return [(true, found, int(wrong[true, found])) for true, found in pairs if wrong[true, found]]


MOST_BEST = 5
MOST_CONFUSED = 20
MOST_CLASSES = 50
"""With more classes than this, the text shows only those with the lowest accuracy."""

MOST_IN_MATRIX = 20
"""With more classes than this, only the picture and CSV show the confusion matrix."""


def name_of(names: tuple[str, ...], index: int) -> str:
    """The name of a class, or its number where there are no names."""
    return printable(names[index]) if index < len(names) else str(index)


class BestClasses:
    """Writes the best classes of image after image."""

    def __init__(self, form: str, names: tuple[str, ...], out: TextIO) -> None:
        self._form, self._names, self._out = form, names, out
        self._csv = csv.writer(out, lineterminator="\n")
        if form == "csv":
            self._csv.writerow(("image", "place", "class", "name", "probability"))

    def write(self, image: str, probabilities: NDArray[np.float64]) -> None:
        """Write the most probable classes of one image; of equal ones the lower number comes first."""
        best = (-probabilities).argsort(kind="stable")[:MOST_BEST]
        found = [(int(i), name_of(self._names, int(i)), float(probabilities[i])) for i in best]
        if self._form == "csv":
            self._csv.writerows((image, place, *item) for place, item in enumerate(found, 1))
        elif self._form == "json":
            classes = [{"class": i, "name": name, "probability": p} for i, name, p in found]
            self._out.write(json.dumps({"image": image, "best": classes}) + "\n")
        else:
            lines = [printable(image), *(f"  {100 * p:6.2f} %  {name}" for _, name, p in found)]
            self._out.write("\n".join(lines) + "\n")


def write_tally(form: str, tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    """Write the scores of an LMDB as ``text``, ``json`` or ``csv``."""
    if form == "json":
        _write_json(tally, names, out)
    elif form == "csv":
        _write_csv(tally, names, out)
    else:
        for show in (_show_classes, _show_matrix, _show_confused):
            show(tally, names, out)
        out.write(f"{totals(tally)}\n")


def totals(tally: Tally) -> str:
    """The accuracies in one line."""
    parts = [f"top-1 {100 * tally.top1 / tally.images:.2f} %"]
    if tally.has_top5:
        parts.append(f"top-5 {100 * tally.top5 / tally.images:.2f} %")
    return f"{', '.join(parts)} of {tally.images:,} images"


def _write_json(tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    facts = {
        "images": tally.images,
        "top1": tally.top1 / tally.images,
        "top5": tally.top5 / tally.images if tally.has_top5 else None,
        "classes": [
            {"class": i, "name": name_of(names, i), "right": right, "images": images}
            for i, (right, images) in enumerate(tally.by_class())
        ],
        "confusion": tally.matrix.tolist(),
    }
    out.write(json.dumps(facts) + "\n")


def _write_csv(tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    classes = range(len(tally.matrix))
    writer.writerow(("class", "name", "right", "images", *(f"found_{i}" for i in classes)))
    for i, (right, images) in enumerate(tally.by_class()):
        writer.writerow((i, name_of(names, i), right, images, *tally.matrix[i].tolist()))


def _show_classes(tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    classes = tally.by_class()
    seen = [(i, right, images) for i, (right, images) in enumerate(classes) if images]
    title = "Accuracy by class"
    if len(seen) > MOST_CLASSES:
        title += f": the worst {MOST_CLASSES} of {len(seen)}; --format csv has all"
        seen = sorted(seen, key=lambda item: item[1] / item[2])[:MOST_CLASSES]
    elif len(seen) < len(classes):
        title += f": {len(seen)} of {len(classes)} have images"
    lines = [
        Line((name_of(names, i), f"{images:,}", f"{100 * right / images:.2f} %")) for i, right, images in seen
    ]
    columns = (Column("Class", words=True), Column("Images"), Column("Top-1"))
    show_table(out, title, columns, lines, "")


def _show_matrix(tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    """The confusion matrix; its columns are headed by class numbers, which are narrow."""
    if len(tally.matrix) > MOST_IN_MATRIX:
        return
    heads = [str(i) for i in range(len(tally.matrix))]
    lines = []
    for i, row in enumerate(tally.matrix.tolist()):
        true = [heads[i], name_of(names, i)] if names else [heads[i]]
        lines.append(Line([*true, *(f"{count:,}" if count else "-" for count in row)]))
    first: Sequence[Column] = [Column("True"), Column("class", words=True)] if names else [Column("True")]
    columns = [*first, *map(Column, heads)]
    show_table(out, "Confusion matrix: rows are true classes, columns predicted classes", columns, lines, "")


def _show_confused(tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    pairs = tally.confused(MOST_CONFUSED)
    if not pairs:
        return
    lines = [Line((name_of(names, true), name_of(names, found), f"{n:,}")) for true, found, n in pairs]
    columns = (Column("True class", words=True), Column("Predicted", words=True), Column("Images"))
    show_table(out, "Most confused", columns, lines, "")


_MOST_NAMES = 60
"""With more classes than this, names would not be legible; some classes are marked by numbers."""

_MOST_COUNTS = 25
"""With more classes than this, their counts do not fit into the cells."""

_MOST_LETTERS = 24
_SIDE, _LARGEST_SIDE = 0.36, 22.0
"""Of a cell with a name, and of the matrix, in inches."""


def draw_confusion(tally: Tally, names: tuple[str, ...], output: Path) -> None:
    """Draw the share of each true class (rows) predicted as each class (columns) to a .png or .svg file.

    The same tally gives the same bytes.

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
        axes.set(xlabel="predicted class", ylabel="true class")
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
    """The number of images in each cell that has any; white on dark cells."""
    for true, row in enumerate(matrix.tolist()):
        for found, count in enumerate(row):
            if count:
                colour = "white" if shares[true, found] > 0.5 else "#333333"
                axes.text(found, true, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"
