"""The confusion matrix as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from caffe_jacinto.errors import UserError
from caffe_jacinto.files import write_whole
from caffe_jacinto.inference.scoring import Tally

_MOST_NAMES = 50


def draw_confusion(tally: Tally, names: list[str], output: Path) -> None:
    """Draw the share of each true class (rows) found as each class (columns) to a .png or .svg file.

    Raises:
        UserError: the file cannot be written.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots()
    shares = tally.matrix / np.maximum(tally.matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="class found", ylabel="true class")
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    figure.colorbar(image, label="share of the true class")
    content = io.BytesIO()
    figure.savefig(content, format=output.suffix.lower()[1:], dpi=200)
    try:
        write_whole(output, content.getvalue())
    except OSError as error:
        raise UserError(f"--picture {output}: cannot be written: {error.strerror}") from None
