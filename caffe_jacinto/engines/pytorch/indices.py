"""Numbers in blobs that choose something: labels a class, those that Embed reads a row of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError

LABEL = "the label"
"""What a loss or an accuracy calls such a number."""


class Indices:
    """The numbers of one bottom of a layer, which have to be from 0 to ``count`` - 1.

    On a CPU the first other number ends the pass. On a GPU, asking would wait for the device: other numbers
    count as 0, and the first of them is kept until `check` asks for it.
    """

    def __init__(
        self, where: str, blob: str, what: str, count: int, ignored: int | None, kept: Tensor | None
    ) -> None:
        """``where`` is the file and the layer, ``what`` one such number in words, ``blob`` the bottom.

        ``ignored`` is allowed beside them. ``kept``, a 0 of the type int64 on the device, takes what is wrong
        until `check`; None: the pass ends.
        """
        self.where, self.blob, self.what, self.count, self.ignored = where, blob, what, count, ignored
        self.checked_before = False
        """What feeds the net checks them."""

        self._wrong = kept
        """0, which is never wrong, or the first number that is."""

    def __call__(self, values: Tensor) -> Tensor:
        """Whole numbers for ``values``, in the same shape.

        Raises:
            UserError: one is out of range.
        """
        numbers = values.detach().long()
        if self.checked_before:
            return numbers
        wrong = (numbers < 0) | (numbers >= self.count)
        if self.ignored is not None:
            wrong &= numbers != self.ignored
        if self._wrong is None:
            if bool(wrong.any()):
                raise self._error(int(numbers[wrong][0]))
            return numbers
        found = torch.where(wrong, numbers, 0)
        above, below = found.amax(), found.amin()
        found = torch.where(above > 0, above, below)
        self._wrong.copy_(torch.where(self._wrong == 0, found, self._wrong))
        return torch.where(wrong, 0, numbers)

    def check(self) -> None:
        """Wait for the device.

        Raises:
            UserError: a number of the passes so far was out of range.
        """
        number = 0 if self._wrong is None else int(self._wrong.item())
        if number:
            raise self._error(number)

    def _error(self, number: int) -> UserError:
        but = "" if self.ignored is None else f", or {self.ignored}, which is ignored"
        return UserError(
            f"{self.where}: {self.what} {number} in its bottom {self.blob}: it has to be from 0 to "
            f"{self.count - 1}{but}; correct the data, or the layers before"
        )
