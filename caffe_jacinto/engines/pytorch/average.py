"""A moving average of the weights, beside the ones that are trained.

An exponential moving average (EMA) with the bias correction of Kingma and Ba 2015 (arXiv:1412.6980, section
7.2, "temporal averaging"): after update t, from 1 on, with decay d,

    average = average + (1 - d) / (1 - d^t) (weights - average)

so that the first one is the weights themselves, and what a training starts from has no part in it. All blobs
are averaged: those of batch norm are sums or averages already, and theirs is one over more batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from caffe_jacinto.caffemodel.hdf5 import without_suffix
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.snapshot import load_weights, save_weights
from caffe_jacinto.engines.snapshots import AVERAGE_SUFFIX


def average_file(snapshot: Path) -> Path:
    """The averaged weights beside a ``.solverstate`` or ``.caffemodel``."""
    return without_suffix(snapshot).with_suffix(AVERAGE_SUFFIX)


class WeightAverage:
    """The average of the weights of a net in training."""

    def __init__(self, net: Net, decay: float) -> None:
        """``decay`` is more than 0 and less than 1."""
        self._net, self._decay = net, decay
        self._weights = [blob.tensor for _, _, blob in net.blobs]
        with torch.no_grad():
            self._average = [tensor.detach().clone() for tensor in self._weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after so many updates, by one fused operation."""
        share = (1 - self._decay) / (1 - self._decay**updates)
        torch._foreach_lerp_(self._average, self._weights, share)

    @torch.no_grad()
    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Make zero what ``masks`` freeze, by layer; weights that are zero keep it so."""
        of_tensor = {
            id(tensor): average for tensor, average in zip(self._weights, self._average, strict=True)
        }
        for layer, mask in masks.items():
            of_tensor[id(self._net.layer_blobs[layer][0].tensor)].mul_(mask)

    @torch.no_grad()
    def end(self, pruned: Collection[str]) -> None:
        """Make the average the weights of the net; what is zero in the layers ``pruned`` stays zero."""
        self.hold({layer: self._net.layer_blobs[layer][0].tensor != 0 for layer in pruned})
        torch._foreach_copy_(self._weights, self._average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the weights of the net for the average; what is changed meanwhile is the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        own = [tensor.detach().clone() for tensor in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        torch._foreach_copy_(self._average, own)

    def save(self, snapshot: Path) -> None:
        """Write the average to a file beside ``snapshot``, atomically.

        Raises:
            RunFailed: a weight is not a number. Nothing was written.
        """
        with self.in_place():
            save_weights(self._net, average_file(snapshot))

    def load(self, snapshot: Path) -> None:
        """Continue with the average beside ``snapshot``.

        Raises:
            UserError: the file is missing or damaged, or of another network.
        """
        path = average_file(snapshot)
        if not path.exists():
            raise UserError(
                f"{path} is missing, with which ema_decay continues; put it back, or take another snapshot"
            )
        with self.in_place():
            missing, _ = load_weights(self._net, path)
        if missing:
            raise UserError(f"{path}: lacks layer {missing[0]} of {self._net.where}; use another snapshot")
