"""Scores to probabilities, best classes and accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caffe_jacinto.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


def softmax(scores: Values) -> NDArray[np.float64]:
    """Probabilities of images x classes scores."""
    import numpy as np

    powers = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return result


class Tally:
    """Top-1, top-5 and the confusion matrix of labelled images, counted as they come."""

    def __init__(self, classes: int) -> None:
        import numpy as np

        self.matrix = np.zeros((classes, classes), np.int64)
        """True class x class found."""

        self.images = self.top1 = self.top5 = 0

    @property
    def has_top5(self) -> bool:
        """Whether a top 5 says anything: Caffe's Accuracy layer takes none of fewer classes."""
        return len(self.matrix) >= 5

    def add(self, scores: Values, labels: list[int]) -> None:
        """Count a batch. An equal score counts as a better one, as in Caffe's Accuracy layer."""
        import numpy as np

        wrong = next((label for label in labels if not 0 <= label < len(self.matrix)), None)
        if wrong is not None:
            raise UserError(
                f"the LMDB has the label {wrong}, the network {len(self.matrix)} classes; "
                "classify with the network trained for it"
            )
        rows = np.arange(len(labels))
        better = (scores >= scores[rows, labels][:, None]).sum(axis=1) - 1
        self.images += len(labels)
        self.top1 += int((better < 1).sum())
        self.top5 += int((better < 5).sum())
        np.add.at(self.matrix, (labels, scores.argmax(axis=1)), 1)

    def by_class(self) -> list[tuple[int, int]]:
        """Right ones and images, by class."""
        return [(int(row[i]), int(row.sum())) for i, row in enumerate(self.matrix)]

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: true class, class found, how often."""
        import numpy as np

        wrong = self.matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [tuple(int(i) for i in np.unravel_index(at, wrong.shape)) for at in order]
        return [(true, found, int(wrong[true, found])) for true, found in pairs if wrong[true, found]]
