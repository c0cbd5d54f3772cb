"""What was found, as text, JSON or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from caffe_jacinto.text_table import Column, Line, printable, show_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.inference.scoring import Tally

MOST_BEST = 5
MOST_CONFUSED = 20
MOST_CLASSES = 50
"""With more classes than this, the text shows those that do worst."""

MOST_IN_MATRIX = 20
"""With more classes than this, the text leaves the confusion matrix to the picture and CSV."""


def name_of(names: tuple[str, ...], index: int) -> str:
    """A class by its name; by its number where there are no names."""
    return printable(names[index]) if index < len(names) else str(index)


class BestClasses:
    """Writes the best classes of image after image."""

    def __init__(self, form: str, names: tuple[str, ...], out: TextIO) -> None:
        self._form, self._names, self._out = form, names, out
        self._csv = csv.writer(out, lineterminator="\n")
        if form == "csv":
            self._csv.writerow(("image", "place", "class", "name", "probability"))

    def write(self, image: str, probabilities: NDArray[np.float64]) -> None:
        """The best classes of one image, the likeliest first; of equal ones the lower number first."""
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
    """The accuracies in words."""
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
    """The confusion matrix; its columns are called by their classes' numbers, which are narrow."""
    if len(tally.matrix) > MOST_IN_MATRIX:
        return
    heads = [str(i) for i in range(len(tally.matrix))]
    lines = []
    for i, row in enumerate(tally.matrix.tolist()):
        true = [heads[i], name_of(names, i)] if names else [heads[i]]
        lines.append(Line([*true, *(f"{count:,}" if count else "-" for count in row)]))
    first: Sequence[Column] = [Column("True"), Column("class", words=True)] if names else [Column("True")]
    columns = [*first, *map(Column, heads)]
    show_table(out, "Confusion matrix: true classes down, classes found across", columns, lines, "")


def _show_confused(tally: Tally, names: tuple[str, ...], out: TextIO) -> None:
    pairs = tally.confused(MOST_CONFUSED)
    if not pairs:
        return
    lines = [Line((name_of(names, true), name_of(names, found), f"{n:,}")) for true, found, n in pairs]
    columns = (Column("True class", words=True), Column("Taken for", words=True), Column("Images"))
    show_table(out, "Most confused", columns, lines, "")
