"""What a net is fed: batches of its Data layers, in order; zeros where it has Input layers, as in Caffe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.engines.torch.feed import Feed
from caffe_jacinto.engines.torch.fillers import Shape
from caffe_jacinto.engines.torch.net import Net
from caffe_jacinto.engines.torch.phases import is_in
from caffe_jacinto.engines.torch.records import Images, data_layer
from caffe_jacinto.errors import UserError

_MOST_WORKERS = 16
"""Processes that decode for one net: more of them wait for memory."""


def default_workers(device: torch.device) -> int:
    """Processes that decode images: most cores where a GPU computes, few where the cores do it themselves."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, cores - 1 if device.type == "cuda" else cores // 4))


class Inputs:
    """The inputs of one net, pass by pass. A context manager: its end ends the processes that decode."""

    def __init__(
        self,
        definition: Any,
        phase: int,
        where: str,
        *,
        device: torch.device,
        seed: int,
        workers: int | None,
        shuffle: bool = False,
    ) -> None:
        """``definition`` is the net's message, whose batch sizes are those of this rank.

        Raises:
            UserError: an LMDB or mean file that is missing or damaged, or images that do not fit.
        """
        self._device = device
        layers = [layer for layer in definition.layer if is_in(layer, phase, definition.state)]
        self.shapes: dict[str, Shape] = {}
        """Of the tops of Data layers."""

        self.batch_size = 0
        """Of the first Data layer."""

        self._feeds: list[Feed] = []
        self._zeros: dict[str, Tensor] = {}
        count = default_workers(device) if workers is None else workers
        try:
            for layer in layers:
                if layer.type == "Data":
                    self._add(data_layer(layer, phase, where), seed, count, shuffle)
        except BaseException:
            self.close()
            raise

    def _add(self, layer: Any, seed: int, workers: int, shuffle: bool) -> None:
        images = Images(layer, layer.batch_size, seed, shuffle=shuffle)
        batch, height, width, channels = images.shape
        shapes: list[Shape] = [(batch, channels, height, width), (batch,)]
        self.shapes.update(zip(layer.tops, shapes, strict=False))
        self.batch_size = self.batch_size or batch
        self._feeds.append(Feed(images, self._device, workers))

    def fit(self, net: Net) -> None:
        """Check labels against the classes of ``net`` from now on, and feed its Input layers."""
        for name in net.inputs:
            if name not in self.shapes:
                self._zeros[name] = torch.zeros(net.shapes[name], device=self._device)
        limits = _label_limits(net)
        for feed in self._feeds:
            tops = feed.layer.tops
            if len(tops) > 1 and tops[1] in limits:
                feed.limit_labels(*limits[tops[1]])

    def start_at(self, block: int, stride: int = 1, count: int | None = None) -> None:
        """Go on with batch number ``block`` and then every ``stride``-th, ``count`` of them."""
        for feed in self._feeds:
            feed.start_at(block, stride, count)

    def batch(self) -> Mapping[str, Tensor]:
        """The next batch, by the names of the net's inputs; as `Feed.batch`."""
        values = dict(self._zeros)
        for feed in self._feeds:
            values.update(zip(feed.layer.tops, feed.batch(), strict=False))
        return values

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that decode."""
        for feed in self._feeds:
            feed.close()


def _label_limits(net: Net) -> dict[str, tuple[int, int | None]]:
    """Of each blob of labels, how many classes it has to be within, and the label that is passed over."""
    limits: dict[str, tuple[int, int | None]] = {}
    for layer in net.layers:
        if layer.type not in ("SoftmaxWithLoss", "Accuracy"):
            continue
        fields = layer.accuracy_param if layer.type == "Accuracy" else layer.loss_param
        axis = layer.accuracy_param.axis if layer.type == "Accuracy" else layer.softmax_param.axis
        ignore = fields.ignore_label if fields.HasField("ignore_label") else None
        limits.setdefault(layer.bottom[1], (net.shapes[layer.bottom[0]][axis], ignore))
    return limits


def share_batches(definition: Any, phase: int, ranks: int) -> list[str]:
    """Divide the batch of each Data layer among ``ranks``, as the fork does, in place.

    Returns what has to be said of batches that do not divide.
    """
    notes = []
    for layer in definition.layer:
        if layer.type != "Data" or not is_in(layer, phase, definition.state):
            continue
        whole = layer.data_param.batch_size
        share = -(-whole // ranks)
        if share * ranks != whole:
            notes.append(
                f"layer {layer.name}: a batch of {whole} does not divide among {ranks} GPUs; it is "
                f"{share * ranks} now"
            )
        layer.data_param.batch_size = share
    return notes


def check_has_data(inputs: Inputs, where: str) -> None:
    """Refuse a net that nothing feeds.

    Raises:
        UserError: it has no Data layer.
    """
    if not inputs.shapes:
        raise UserError(f"{where}: has no Data layer to read images from; give the train or val prototxt")
