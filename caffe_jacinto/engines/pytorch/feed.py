"""What a net is fed: batches of its Data layers, in order; zeros where it has Input layers, as in Caffe."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.processes import end_with_parent, keep_freed_memory
from caffe_jacinto.data.batches import DataLayer, Images, data_layer
from caffe_jacinto.data.index import UnreadableImageError
from caffe_jacinto.data.lmdb_reader import why_reader_ended
from caffe_jacinto.engines.contract import ImageShape, image_shape
from caffe_jacinto.engines.pytorch.layer_setup import PHASE_NAMES, Shape
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.prototxt.solver import TRAIN

_WAIT_SECONDS = 2.0
"""Between two checks that the other process is still alive."""

_AHEAD = 2
"""Batches that are decoded ahead, for each worker."""


@dataclass(frozen=True)
class _Buffers:
    """Memory of several batches that all processes see."""

    images: Tensor
    """slots x batch x height x width x channels."""

    labels: Tensor
    windows: Tensor

    def arrays(self, slot: int) -> tuple[Any, Any, Any]:
        return self.images[slot].numpy(), self.labels[slot].numpy(), self.windows[slot].numpy()


class Feed:
    """Batches of one Data layer on the device, in order; `close` ends its workers."""

    def __init__(self, images: Images, device: torch.device, workers: int) -> None:
        self._images, self._device = images, device
        self._mean = self._mean_on(device)
        self._workers = workers
        self._slots = _AHEAD * workers + 1
        shape = (self._slots, *images.shape)
        kind = torch.uint8 if images.dtype == np.uint8 else torch.float32
        self._buffers = _Buffers(
            torch.empty(shape, dtype=kind).share_memory_(),
            torch.empty((self._slots, images.batch_size), dtype=torch.int64).share_memory_(),
            torch.empty((self._slots, images.batch_size, 3), dtype=torch.int64).share_memory_(),
        )
        if device.type == "cuda":
            for tensor in (self._buffers.images, self._buffers.labels):
                _pin(tensor)
        # Forked: a worker inherits the keys and buffers, and starts in milliseconds. It never touches the
        # device.
        context = multiprocessing.get_context("fork")
        self._tasks: Any = context.Queue()
        self._done: Any = context.Queue()
        self._processes = [
            context.Process(target=_work, args=(images, self._buffers, self._tasks, self._done), daemon=True)
            for _ in range(workers)
        ]
        for process in self._processes:
            process.start()
        self._ready: dict[int, int] = {}
        self._copied: list[Any] = [None] * self._slots
        self._free = list(range(self._slots))
        self._asked = self._next = 0
        self._stride = 1
        self._end: int | None = None
        self._classes: tuple[int, int | None] | None = None

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for channel in (self._tasks, self._done):
            channel.cancel_join_thread()
            channel.close()

    @property
    def layer(self) -> DataLayer:
        """What is read."""
        return self._images.layer

    def limit_labels(self, classes: int, ignored: int | None) -> None:
        """From now on refuse labels not in [0, ``classes``), except for the label ``ignored``."""
        self._classes = (classes, ignored)

    def start_at(self, block: int, stride: int = 1, count: int | None = None) -> None:
        """Continue with batch ``block``, and then every ``stride``-th; decode ``count`` of them ahead."""
        while self._outstanding():
            self._take_done()
        self._free += self._ready.values()
        self._ready.clear()
        self._asked = self._next = block
        self._stride = stride
        self._end = None if count is None else block + stride * count
        self._ask()

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next images (batch x channels x height x width, float32, channels last in memory) and labels.

        Raises:
            UserError: a record that is not an image, or one that does not fit.
            RunFailed: a worker died.
        """
        while self._next not in self._ready:
            self._take_done()
        slot = self._ready.pop(self._next)
        self._check_labels(slot)
        self._next += self._stride
        images = self._buffers.images[slot].to(self._device, non_blocking=True)
        labels = self._buffers.labels[slot].to(self._device, non_blocking=True)
        result = self._transformed(images, self._buffers.windows[slot])
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._copied[slot] = event
        else:
            labels = labels.clone()  # on the CPU nothing was copied yet
        self._free.append(slot)
        self._ask()
        return result, labels

    def _transformed(self, images: Tensor, windows: Tensor) -> Tensor:
        transform = self._images.layer.transform
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, copy=True)
        if transform.mean_image is not None and self._mean is not None:
            height, width = images.shape[1:3]
            for i, (top, left, mirrored) in enumerate(windows.tolist()):
                mean = self._mean[:, top : top + height, left : left + width]
                pixels[i] -= mean.flip(2) if mirrored else mean
        elif self._mean is not None:
            pixels -= self._mean
        return pixels.mul_(transform.scale) if transform.scale != 1 else pixels

    def _mean_on(self, device: torch.device) -> Tensor | None:
        layer = self._images.layer
        try:
            mean = layer.transform.mean_for(self._images.stored_shape)
        except UnreadableImageError as error:
            raise UserError(f"{layer.where}: {error}") from None
        return None if mean is None else torch.from_numpy(mean.copy()).to(device)

    def _check_labels(self, slot: int) -> None:
        if self._classes is None:
            return
        labels = self._buffers.labels[slot].numpy()
        classes, ignored = self._classes
        wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{self._images.place(self._next, at)}: its label is {labels[at]}, and the network has "
                f"{classes} classes, 0 to {classes - 1}"
            )

    def _ask(self) -> None:
        """Give the free buffers out."""
        while self._free and (self._end is None or self._asked < self._end):
            slot = self._free.pop()
            event = self._copied[slot]
            if event is not None:
                event.synchronize()  # done long ago: other batches went through the device since
                self._copied[slot] = None
            self._tasks.put((slot, self._asked))
            self._asked += self._stride

    def _outstanding(self) -> int:
        return self._slots - len(self._free) - len(self._ready)

    def _take_done(self) -> None:
        while True:
            try:
                slot, block, trouble = self._done.get(timeout=_WAIT_SECONDS)
                break
            except queue.Empty:
                dead = [process for process in self._processes if not process.is_alive()]
                if dead:
                    raise RunFailed(
                        f"{self._images.layer.source}: {why_reader_ended(dead[0].exitcode)}"
                    ) from None
        if trouble:
            raise UserError(trouble)
        self._ready[block] = slot


def _pin(tensor: Tensor) -> None:
    """Let the GPU read the tensor's memory directly; where that is refused, copies are only slower."""
    torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)


def _work(images: Images, buffers: _Buffers, tasks: Any, done: Any) -> None:
    """A worker: decode what is requested until the parent process is gone."""
    import cv2

    # Ctrl-C goes to all processes of a terminal; the trainer ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    keep_freed_memory()
    torch.set_num_threads(1)
    parent = os.getppid()
    end_with_parent()
    while os.getppid() == parent:
        try:
            slot, block = tasks.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            continue
        trouble = None
        try:
            images.read(block, *buffers.arrays(slot))
        except UserError as error:
            trouble = str(error)
        done.put((slot, block, trouble))


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
        layers = messages_in(definition, PHASE_NAMES[phase])
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
                    self._add(data_layer(layer, where, training=phase == TRAIN), seed, count, shuffle)
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
        """Continue with batch number ``block`` and then every ``stride``-th, ``count`` of them."""
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
    """For each blob of labels, the number of classes and the label that is ignored."""
    limits: dict[str, tuple[int, int | None]] = {}
    for layer in net.layers:
        if layer.type not in ("SoftmaxWithLoss", "Accuracy"):
            continue
        fields = layer.accuracy_param if layer.type == "Accuracy" else layer.loss_param
        axis = layer.accuracy_param.axis if layer.type == "Accuracy" else layer.softmax_param.axis
        ignore = fields.ignore_label if fields.HasField("ignore_label") else None
        limits.setdefault(layer.bottom[1], (net.shapes[layer.bottom[0]][axis], ignore))
    return limits


def expected_shapes(
    definition: Any, phase: int, where: str, images: Mapping[str, ImageShape]
) -> dict[str, Shape] | None:
    """The shapes of the tops of Data layers, without their LMDBs; None where that is not enough.

    ``images`` has the channels, height and width of the images in LMDBs that are known.

    Raises:
        UserError: a field of a Data layer that is not supported.
    """
    shapes: dict[str, Shape] = {}
    for layer in messages_in(definition, PHASE_NAMES[phase]):
        if layer.type != "Data":
            continue
        known = type(layer)()
        known.CopyFrom(layer)
        if not Path(known.transform_param.mean_file).is_file():
            known.transform_param.ClearField("mean_file")
        settings = data_layer(known, where, training=phase == TRAIN)
        image = image_shape(layer, images)
        if image is None:
            return None
        tops: list[Shape] = [(settings.batch_size, *image), (settings.batch_size,)]
        shapes.update(zip(settings.tops, tops, strict=False))
    return shapes


def share_batches(definition: Any, phase: int, ranks: int) -> list[str]:
    """Divide the batch of each Data layer among ``ranks``, as the fork does, in place.

    Returns a note for each batch that does not divide.
    """
    notes = []
    for layer in messages_in(definition, PHASE_NAMES[phase]):
        if layer.type != "Data":
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
