"""Batches of a data layer by PyTorch's DataLoader: worker processes read and decode into shared memory.

On a GPU, a thread copies them to the device ahead of the training, and decodes JPEG there if requested.
Workers crop and mirror what they decode; the rest happens on the device.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.processes import end_with_parent, keep_freed_memory
from caffe_jacinto.data.batches import BatchSource, DataLayer, Images
from caffe_jacinto.data.hdf5_rows import Rows
from caffe_jacinto.data.index import UnreadableImageError
from caffe_jacinto.data.lmdb_reader import why_reader_ended
from caffe_jacinto.engines.pytorch.copy_ahead import CopyAhead, HostBatch, RawBatch
from caffe_jacinto.engines.pytorch.gpu_decode import Decode

AHEAD = 2
"""Batches that are read ahead, for each worker."""


class _Buffers(NamedTuple):
    """Memory of several batches that all processes see; a GPU reads it directly."""

    values: Tensor
    """slots x bytes."""

    labels: Tensor
    """slots x batch."""

    windows: Tensor
    """slots x batch x (top, left, mirrored)."""


class _Task(NamedTuple):
    """A batch that a worker is to read."""

    block: int
    """Its number in the training."""

    slot: int
    """Where in the buffers it goes."""

    decoded: bool
    """False: its JPEG files go there as they are, for the GPU."""


class _Done(NamedTuple):
    """A worker's report on a batch."""

    slot: int
    ends: tuple[int, ...] = ()
    """The end of each JPEG file; none where pixels were decoded, cut to their windows."""

    trouble: str = ""
    """Why there is no such batch."""


class _Batches(Dataset[_Done]):
    """The batches of a data layer; read in the workers."""

    def __init__(self, source: BatchSource, buffers: _Buffers) -> None:
        self._source, self._buffers = source, buffers

    def __getitem__(self, task: _Task) -> _Done:
        source, slot = self._source, task.slot
        space, labels, windows = (part[slot].numpy() for part in self._buffers)
        try:
            if not task.decoded:
                files = source.read_files(task.block, labels, windows)
                if files is not None and sum(map(len, files)) <= len(space):
                    ends = tuple(accumulate(map(len, files)))
                    for file, end in zip(files, ends, strict=True):
                        space[end - len(file) : end] = np.frombuffer(file, np.uint8)
                    return _Done(slot, ends)
            source.read(task.block, _values(self._buffers, slot, source).numpy(), labels, windows)
        except UserError as error:
            return _Done(slot, trouble=str(error))
        return _Done(slot)


def _values(buffers: _Buffers, slot: int, source: BatchSource) -> Tensor:
    """What was read into ``slot``, in the shape of ``source``; images: batch x height x width x channels."""
    return buffers.values[slot].view(_kind(source)).view(source.shape)


def slots_of(workers: int, ahead: int = AHEAD) -> int:
    """Batches in the buffers: those in work, the one in use, and one that may still be copied to a GPU."""
    return ahead * workers + 2


def _kind(source: BatchSource) -> torch.dtype:
    return torch.uint8 if source.dtype == np.uint8 else torch.float32


class _Tasks(Sampler[_Task]):
    """What is read: batches from any place on, in steps of a stride, each into the next slot."""

    def __init__(self, slots: int, decode: Decode) -> None:
        self._slots, self._decode = slots, decode
        self._blocks = range(0)

    def begin(self, first: int, stride: int, count: int | None) -> None:
        """Continue with batch ``first``; without a ``count`` there is no end."""
        self._blocks = range(first, 1 << 62 if count is None else first + stride * count, stride)

    def __iter__(self) -> Iterator[_Task]:
        for number, block in enumerate(self._blocks):
            # Which batches the GPU decodes follows from their place alone.
            odd = block // self._blocks.step % 2
            decoded = self._decode == "cpu" or (self._decode == "both" and bool(odd))
            yield _Task(block, number % self._slots, decoded)


class _RowTops:
    """The tops of rows: each its columns, in its own shape."""

    def __init__(self, source: BatchSource) -> None:
        assert isinstance(source, Rows)
        self._source = source

    def __call__(self, raw: RawBatch, *, mixed: bool, size: int | None = None) -> list[Tensor]:
        return [
            raw.images[:, self._source.columns(top)].reshape(shape).clone()
            for top, shape in enumerate(self._source.top_shapes)
        ]


class _ImageTops:
    """Images less their mean, scaled, and their labels.

    Images are batch x channels x height x width, float32, channels last in memory. Where images are mixed,
    the labels are 3 x batch: each image's own label, that of the one it is mixed with, and its own share.
    """

    def __init__(self, source: Images, device: torch.device) -> None:
        """Raises UserError if the mean does not fit the images."""
        self._source = source
        self._mean = self._mean_on(device)

    def __call__(self, raw: RawBatch, *, mixed: bool, size: int | None = None) -> list[Tensor]:
        transform = self._source.layer.transform
        pixels = raw.images.permute(0, 3, 1, 2).to(torch.float32, copy=True)
        if transform.mean_image is not None and self._mean is not None:
            pixels -= self._mean_windows(self._mean, raw.windows.to(pixels.device))
        elif self._mean is not None:
            pixels -= self._mean
        if transform.scale != 1:
            pixels.mul_(transform.scale)
        if size is not None and size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if raw.mixing.numel():
            return _mixed(pixels, raw) if mixed else [pixels, _as_mixed(raw.labels)]
        # The labels' own memory is overwritten with the next batch.
        return [pixels, raw.labels.clone()]

    def _mean_windows(self, mean: Tensor, windows: Tensor) -> Tensor:
        """Each image's window of the mean image: batch x channels x height x width."""
        _, height, width, _ = self._source.shape
        top, left, mirrored = windows[:, :, None].unbind(1)
        across = torch.arange(width, device=mean.device)
        rows = top + torch.arange(height, device=mean.device)
        columns = left + torch.where(mirrored.bool(), width - 1 - across, across)
        return mean[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)

    def _mean_on(self, device: torch.device) -> Tensor | None:
        layer = self._source.layer
        try:
            mean = layer.transform.mean_for(self._source.stored_shape)
        except UnreadableImageError as error:
            raise UserError(f"{layer.where}: {error}") from None
        return None if mean is None else torch.from_numpy(mean.copy()).to(device)


def _mixed(pixels: Tensor, raw: RawBatch) -> list[Tensor]:
    other, share = raw.mixing[:, 0].long(), raw.mixing[:, 1]
    images = torch.lerp(pixels[other], pixels, share[:, None, None, None])
    labels = raw.labels.float()
    return [images, torch.stack([labels, labels[other], share])]


def _as_mixed(labels: Tensor) -> Tensor:
    """The labels of images that are not mixed, as those that are have them."""
    return torch.stack([labels.float(), labels.float(), torch.ones_like(labels, dtype=torch.float32)])


class Feed:
    """Batches of one data layer on the device, in order; `close` ends its workers."""

    def __init__(
        self,
        source: BatchSource,
        device: torch.device,
        workers: int,
        decode: Decode = "cpu",
        ahead: int = AHEAD,
    ) -> None:
        """``ahead``: batches that each of the ``workers`` reads ahead."""
        self._source, self._device = source, device
        self._finish = _ImageTops(source, device) if isinstance(source, Images) else _RowTops(source)
        slots = slots_of(workers, ahead)
        self._buffers = _Buffers(
            torch.empty((slots, source.batch_bytes), dtype=torch.uint8).share_memory_(),
            torch.zeros((slots, source.batch_size), dtype=torch.int64).share_memory_(),
            torch.zeros((slots, source.batch_size, 3), dtype=torch.int64).share_memory_(),
        )
        self._pinned = [part for part in self._buffers if device.type == "cuda" and _pin(part, device)]
        self.pinned = device.type != "cuda" or len(self._pinned) == len(self._buffers)
        self._tasks = _Tasks(slots, decode)
        self._loader: DataLoader[_Done] = DataLoader(
            _Batches(source, self._buffers),
            batch_size=None,  # an item is a batch
            sampler=self._tasks,
            num_workers=workers,
            prefetch_factor=ahead,
            persistent_workers=True,
            # Forked: a worker inherits the keys and buffers, and starts in milliseconds. It never touches the
            # device.
            multiprocessing_context="fork",
            worker_init_fn=_begin_worker,
        )
        self._next, self._stride = 0, 1
        self._classes: dict[int, tuple[int, int | None]] = {}
        # This starts the workers. That one ended is noticed when its batch does not come; PyTorch's handler
        # of the signal would interrupt the training anywhere.
        before = signal.getsignal(signal.SIGCHLD)
        self._iterator: Iterator[_Done] = iter(self._loader)
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: CopyAhead | None = None

    def close(self) -> None:
        """End the workers."""
        self._stop_copying()
        workers = getattr(self._iterator, "_workers", ())
        self._iterator = iter(())
        del self._loader
        for worker in workers:  # none is left, unless an error still holds the iterator
            worker.kill()
        for part in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(part.data_ptr())
        self._pinned = []

    @property
    def layer(self) -> DataLayer:
        """What is read."""
        return self._source.layer

    def limit_labels(self, top: int, classes: int, ignored: int | None) -> None:
        """From now on refuse labels not in [0, ``classes``) in a top, except for the label ``ignored``."""
        self._classes[top] = (classes, ignored)

    def start_at(self, block: int, stride: int = 1, count: int | None = None) -> None:
        """Continue with batch ``block``, and then every ``stride``-th; decode ``count`` of them ahead."""
        self._stop_copying()
        self._next, self._stride = block, stride
        self._tasks.begin(block, stride, count)
        with self._dead_workers_named():
            self._iterator = iter(self._loader)
        if self._stream is not None:
            self._ahead = CopyAhead(
                self._host_batches(), self._stream, self._source.shape, _kind(self._source)
            )

    def raw(self) -> RawBatch:
        """The next batch. It may be overwritten once the one after it is requested.

        Raises:
            UserError: a record that is not an image, or one that does not fit.
            RunFailed: a worker died.
        """
        if self._ahead is not None:
            return self._ahead.take()
        return next(self._host_batches())[0]

    def tops(self, raw: RawBatch, *, mixed: bool, size: int | None = None) -> list[Tensor]:
        """The layer's tops, in memory of their own: for images see `_ImageTops`.

        Not ``mixed``: images that are mixed in training are left as they are. ``size``: the side, in pixels,
        that images are resized to.
        """
        return self._finish(raw, mixed=mixed, size=size)

    def _host_batches(self) -> Iterator[HostBatch]:
        """The batches that the workers read, one by one, with labels that the net has."""
        while True:
            with self._dead_workers_named():
                done = next(self._iterator, None)
            if done is None:
                return
            if done.trouble:
                raise UserError(done.trouble)
            labels, windows = self._buffers.labels[done.slot], self._buffers.windows[done.slot]
            if done.ends:
                values = self._buffers.values[done.slot][: done.ends[-1]]
            else:
                values = _values(self._buffers, done.slot, self._source)
            for top, limits in self._classes.items():
                self._check_labels(self._source.labels_of(top, values.numpy(), labels.numpy()), *limits)
            mixing = self._mixing(self._next)
            self._next += self._stride
            yield RawBatch(values, labels, windows, mixing), done.ends

    @contextmanager
    def _dead_workers_named(self) -> Iterator[None]:
        """Say which signal ended a worker, where PyTorch only says that one ended."""
        try:
            yield
        except RuntimeError:
            workers = getattr(self._iterator, "_workers", ())
            codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
            if not codes:
                raise
            raise RunFailed(f"{self._source.layer.source}: {why_reader_ended(codes[0])}") from None

    def _mixing(self, block: int) -> Tensor:
        """As `RawBatch` has it."""
        found = self._source.mixing(block) if isinstance(self._source, Images) else None
        if found is None:
            return torch.empty((0, 2))
        share, others = found
        return torch.stack([torch.from_numpy(others).float(), torch.full((len(others),), share)], 1)

    def _check_labels(self, labels: Any, classes: int, ignored: int | None) -> None:
        """``labels``: batch x numbers."""
        wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"{self._source.place(self._next, int(row))}: its label is {labels[row, column]:g}, and the"
                f" network has {classes} classes, 0 to {classes - 1}"
            )

    def _stop_copying(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None


def _pin(tensor: Tensor, device: torch.device) -> bool:
    """Let the GPU read the tensor's memory directly; False where the system refuses."""
    size = tensor.numel() * tensor.element_size()
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA reports the refusal again at the next kernel
        torch.zeros(1, device=device)
    return False


def _begin_worker(number: int) -> None:
    """A worker's own settings; it lives no longer than the training."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with_parent(parent.pid)
    # Ctrl-C goes to all processes of a terminal; the trainer ends its workers itself.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    import cv2

    cv2.setNumThreads(0)
    keep_freed_memory()
