"""From an LMDB to batches on the device: worker processes decode ahead into buffers that the device reads.

The buffers are shared by the processes and, where there is a GPU, pinned; a batch goes to the device as
bytes, and mean and scale are applied there.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.data.mean import read_mean
from caffe_jacinto.engines.torch.parent import end_with_parent
from caffe_jacinto.engines.torch.records import DataLayer, Images
from caffe_jacinto.errors import RunFailed, UserError
from caffe_jacinto.memory import keep_freed_memory

_WAIT_SECONDS = 2.0
"""Between two looks at whether the other side still lives."""

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
        """Refuse, from now on, labels that are none of so many classes; but for the one ``ignored``."""
        self._classes = (classes, ignored)

    def start_at(self, block: int, stride: int = 1, count: int | None = None) -> None:
        """Go on with batch number ``block``, and then every ``stride``-th; decode ``count`` of them ahead."""
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
            UserError: a record that is no image, or one that does not fit.
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
        layer = self._images.layer
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, copy=True)
        if layer.mean_file is not None and self._mean is not None:
            height, width = images.shape[1:3]
            for i, (top, left, mirrored) in enumerate(windows.tolist()):
                mean = self._mean[:, top : top + height, left : left + width]
                pixels[i] -= mean.flip(2) if mirrored else mean
        elif self._mean is not None:
            pixels -= self._mean
        return pixels.mul_(layer.scale) if layer.scale != 1 else pixels

    def _mean_on(self, device: torch.device) -> Tensor | None:
        layer, (height, width, channels) = self._images.layer, self._images.stored_shape
        if layer.mean_file is not None:
            mean = read_mean(layer.mean_file)
            if mean.shape != (channels, height, width):
                sizes = "x".join(map(str, mean.shape)), f"{channels}x{height}x{width}"
                raise UserError(
                    f"{layer.mean_file}: the mean image is {sizes[0]}, the LMDB's images {sizes[1]}"
                )
            return torch.from_numpy(mean.copy()).to(device)
        values = layer.mean_values
        if not any(values):
            return None
        if len(values) not in (1, channels):
            raise UserError(
                f"{layer.where}: {len(values)} of mean_value for {channels} channels; give one for each"
            )
        return torch.tensor(values, device=device).reshape(1, -1, 1, 1)

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
                event.synchronize()  # long past: other batches went through the device since
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
                        f"{self._images.layer.source}: a process that reads it ended with exit code "
                        f"{dead[0].exitcode}; is there enough memory?"
                    ) from None
        if trouble:
            raise UserError(trouble)
        self._ready[block] = slot


def _pin(tensor: Tensor) -> None:
    """Let the GPU read the tensor's memory directly; where that is refused, copies are only slower."""
    torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)


def _work(images: Images, buffers: _Buffers, tasks: Any, done: Any) -> None:
    """A worker: decode what is asked for until the process that asks is gone."""
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
