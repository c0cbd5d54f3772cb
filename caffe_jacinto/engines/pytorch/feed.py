"""What a net is fed: batches of its Data layers, in order; zeros where it has Input layers, as in Caffe.

Worker processes of PyTorch's DataLoader read and decode. On a GPU, a thread copies batches to the device
ahead of the training, and decodes JPEG there if that is requested. Workers crop and mirror what they decode;
the rest happens on the device.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.processes import end_with_parent, keep_freed_memory
from caffe_jacinto.data.batches import DataLayer, Images, data_layer
from caffe_jacinto.data.index import UnreadableImageError
from caffe_jacinto.data.lmdb_reader import why_reader_ended
from caffe_jacinto.engines.contract import ImageShape, image_shape
from caffe_jacinto.engines.pytorch.engine import DecodeChoice
from caffe_jacinto.engines.pytorch.gpu_decode import (
    DECODERS,
    Decode,
    can_decode,
    cut,
    decode_jpegs,
    faster_decode,
)
from caffe_jacinto.engines.pytorch.layer_setup import PHASE_NAMES, Shape
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.prototxt.solver import TRAIN

_AHEAD = 2
"""Batches that are decoded ahead, for each worker."""

_SLOTS = 3
"""Batches on a GPU at once: one in use, one ready, one being copied."""

_CHECK_SECONDS = 0.2
"""How often a waiting thread checks whether to stop."""

_SHARED_MEMORY = Path("/dev/shm")


class _Buffers(NamedTuple):
    """Memory of several batches that all processes see; a GPU reads it directly."""

    images: Tensor
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


class RawBatch(NamedTuple):
    """A batch before mean and scale."""

    images: Tensor
    """batch x height x width x channels, cut to their windows."""

    labels: Tensor
    windows: Tensor
    """batch x (top, left, mirrored)."""


HostBatch = tuple[RawBatch, tuple[int, ...]]
"""A batch in the host's memory. Where ends are given, joined JPEG files are in the place of its images."""


class _Batches(Dataset[_Done]):
    """The batches of a Data layer; read in the workers."""

    def __init__(self, images: Images, buffers: _Buffers) -> None:
        self._images, self._buffers = images, buffers

    def __getitem__(self, task: _Task) -> _Done:
        images, slot = self._images, task.slot
        space, labels, windows = (part[slot].numpy() for part in self._buffers)
        try:
            if not task.decoded:
                files = images.read_files(task.block, labels, windows)
                if files is not None and sum(map(len, files)) <= len(space):
                    joined = np.frombuffer(b"".join(files), np.uint8)
                    space[: len(joined)] = joined
                    return _Done(slot, tuple(accumulate(map(len, files))))
            images.read(task.block, _pixels(self._buffers, slot, images).numpy(), labels, windows)
        except UserError as error:
            return _Done(slot, trouble=str(error))
        return _Done(slot)


def _pixels(buffers: _Buffers, slot: int, images: Images) -> Tensor:
    """The decoded images in ``slot``: batch x height x width x channels."""
    return buffers.images[slot].view(_kind(images)).view(images.shape)


def _slots(workers: int) -> int:
    """Batches in the buffers: those in work, the one in use, and one that may still be copied to a GPU."""
    return _AHEAD * workers + 2


def _kind(images: Images) -> torch.dtype:
    return torch.uint8 if images.dtype == np.uint8 else torch.float32


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


class Feed:
    """Batches of one Data layer on the device, in order; `close` ends its workers."""

    def __init__(self, images: Images, device: torch.device, workers: int, decode: Decode = "cpu") -> None:
        self._images, self._device = images, device
        self._mean = self._mean_on(device)
        slots = _slots(workers)
        self._buffers = _Buffers(
            torch.empty((slots, images.batch_bytes), dtype=torch.uint8).share_memory_(),
            torch.empty((slots, images.batch_size), dtype=torch.int64).share_memory_(),
            torch.empty((slots, images.batch_size, 3), dtype=torch.int64).share_memory_(),
        )
        self._pinned = [part for part in self._buffers if device.type == "cuda" and _pin(part, device)]
        self.pinned = device.type != "cuda" or len(self._pinned) == len(self._buffers)
        self._tasks = _Tasks(slots, decode)
        self._loader: DataLoader[_Done] = DataLoader(
            _Batches(images, self._buffers),
            batch_size=None,  # an item is a batch
            sampler=self._tasks,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            persistent_workers=True,
            # Forked: a worker inherits the keys and buffers, and starts in milliseconds. It never touches the
            # device.
            multiprocessing_context="fork",
            worker_init_fn=_begin_worker,
        )
        self._next, self._stride = 0, 1
        self._classes: tuple[int, int | None] | None = None
        # This starts the workers. That one ended is noticed when its batch does not come; PyTorch's handler
        # of the signal would interrupt the training anywhere.
        before = signal.getsignal(signal.SIGCHLD)
        self._iterator: Iterator[_Done] = iter(self._loader)
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _CopyAhead | None = None

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
        return self._images.layer

    def limit_labels(self, classes: int, ignored: int | None) -> None:
        """From now on refuse labels not in [0, ``classes``), except for the label ``ignored``."""
        self._classes = (classes, ignored)

    def start_at(self, block: int, stride: int = 1, count: int | None = None) -> None:
        """Continue with batch ``block``, and then every ``stride``-th; decode ``count`` of them ahead."""
        self._stop_copying()
        self._next, self._stride = block, stride
        self._tasks.begin(block, stride, count)
        self._iterator = iter(self._loader)
        if self._stream is not None:
            self._ahead = _CopyAhead(
                self._host_batches(), self._stream, self._images.shape, _kind(self._images)
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

    def transformed(self, raw: RawBatch) -> Tensor:
        """The net's input: batch x channels x height x width, float32, channels last in memory."""
        transform = self._images.layer.transform
        pixels = raw.images.permute(0, 3, 1, 2).to(torch.float32, copy=True)
        if transform.mean_image is not None and self._mean is not None:
            pixels -= self._mean_windows(self._mean, raw.windows.to(pixels.device))
        elif self._mean is not None:
            pixels -= self._mean
        return pixels.mul_(transform.scale) if transform.scale != 1 else pixels

    def _mean_windows(self, mean: Tensor, windows: Tensor) -> Tensor:
        """Each image's window of the mean image: batch x channels x height x width."""
        _, height, width, _ = self._images.shape
        top, left, mirrored = windows[:, :, None].unbind(1)
        across = torch.arange(width, device=mean.device)
        rows = top + torch.arange(height, device=mean.device)
        columns = left + torch.where(mirrored.bool(), width - 1 - across, across)
        return mean[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)

    def _mean_on(self, device: torch.device) -> Tensor | None:
        layer = self._images.layer
        try:
            mean = layer.transform.mean_for(self._images.stored_shape)
        except UnreadableImageError as error:
            raise UserError(f"{layer.where}: {error}") from None
        return None if mean is None else torch.from_numpy(mean.copy()).to(device)

    def _host_batches(self) -> Iterator[HostBatch]:
        """The batches that the workers read, one by one, with labels that the net has."""
        while True:
            try:
                done = next(self._iterator)
            except StopIteration:
                return
            except RuntimeError:
                workers = getattr(self._iterator, "_workers", ())
                codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
                if not codes:
                    raise
                raise RunFailed(f"{self._images.layer.source}: {why_reader_ended(codes[0])}") from None
            if done.trouble:
                raise UserError(done.trouble)
            labels, windows = self._buffers.labels[done.slot], self._buffers.windows[done.slot]
            self._check_labels(labels.numpy())
            self._next += self._stride
            if done.ends:
                images = self._buffers.images[done.slot][: done.ends[-1]]
            else:
                images = _pixels(self._buffers, done.slot, self._images)
            yield RawBatch(images, labels, windows), done.ends

    def _check_labels(self, labels: Any) -> None:
        if self._classes is None:
            return
        classes, ignored = self._classes
        wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{self._images.place(self._next, at)}: its label is {labels[at]}, and the network has "
                f"{classes} classes, 0 to {classes - 1}"
            )

    def _stop_copying(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None


class _Slot(NamedTuple):
    """A batch on the device."""

    batch: RawBatch
    ready: torch.cuda.Event
    """The copy is done."""

    used: torch.cuda.Event
    """What reads the batch is done."""

    free: threading.Semaphore
    """``used`` is recorded."""


class _CopyAhead:
    """Copies batches to a GPU in a thread and on a stream of its own, a few ahead of their use.

    The thread waits for the device, so that the training need not.
    """

    def __init__(
        self,
        batches: Iterator[HostBatch],
        stream: torch.cuda.Stream,
        shape: tuple[int, ...],
        kind: torch.dtype,
    ) -> None:
        """``shape`` and ``kind`` are those of a batch of images."""
        self._batches, self._stream, self._device = batches, stream, stream.device
        self._shape, self._kind = shape, kind
        self._ready: queue.Queue[_Slot | BaseException | None] = queue.Queue()
        self._slots: list[_Slot | None] = [None] * _SLOTS
        self._given: _Slot | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> RawBatch:
        """The next batch; the current stream waits for it, this process only until it is decoded."""
        self._give_back()
        found = self._ready.get()
        if found is None:
            raise RuntimeError("more batches were requested than were announced")
        if isinstance(found, BaseException):
            raise found
        torch.cuda.current_stream(self._device).wait_event(found.ready)
        self._given = found
        return found.batch

    def stop(self) -> None:
        """End the thread; what was copied ahead is dropped."""
        self._ended.set()
        self._give_back()
        self._thread.join()
        # Nothing reads the host's memory or the slots any more.
        self._stream.synchronize()
        torch.cuda.current_stream(self._device).synchronize()

    def _give_back(self) -> None:
        if self._given is not None:
            self._given.used.record(torch.cuda.current_stream(self._device))
            self._given.free.release()
            self._given = None

    def _run(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            with torch.cuda.stream(self._stream):
                before: _Slot | None = None
                decoded: list[Tensor] = []
                for number, host in enumerate(self._batches):
                    slot = self._slots[number % _SLOTS]
                    if slot is not None:
                        if not self._is_free(slot):
                            return
                        # Bounds how far the training runs ahead of the device, and the memory that takes.
                        slot.used.synchronize()
                    self._slots[number % _SLOTS] = slot = slot or self._new_slot(host)
                    before_that, decoded = decoded, self._fill(slot.batch, host)
                    slot.ready.record(self._stream)
                    self._ready.put(slot)
                    # The next request lets a worker write into the host's memory of the batch before, and its
                    # decoded images may be overwritten.
                    if before is not None:
                        before.ready.synchronize()
                    before_that.clear()
                    before = slot
                    if self._ended.is_set():
                        return
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _is_free(self, slot: _Slot) -> bool:
        while not slot.free.acquire(timeout=_CHECK_SECONDS):
            if self._ended.is_set():
                return False
        return True

    def _new_slot(self, host: HostBatch) -> _Slot:
        batch = RawBatch(
            torch.empty(self._shape, dtype=self._kind, device=self._device),
            torch.empty_like(host[0].labels, device=self._device),
            torch.empty_like(host[0].windows, device=self._device),
        )
        return _Slot(batch, torch.cuda.Event(), torch.cuda.Event(), threading.Semaphore(0))

    def _fill(self, place: RawBatch, host: HostBatch) -> list[Tensor]:
        """Copy or decode ``host`` to its ``place``; returns what has to stay until that is done."""
        batch, ends = host
        for to, part in zip(place[1:], batch[1:], strict=True):
            to.copy_(part, non_blocking=True)
        if not ends:
            place.images.copy_(batch.images, non_blocking=True)
            return []
        decoded = decode_jpegs(batch.images, ends, self._device)
        cut(decoded, place.windows, place.images)
        return decoded


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
    import cv2

    # Ctrl-C goes to all processes of a terminal; the trainer ends its workers itself.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    cv2.setNumThreads(0)
    keep_freed_memory()
    end_with_parent()


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
        decode: DecodeChoice = "cpu",
        agree: Callable[[int], int] = lambda number: number,
    ) -> None:
        """``definition`` is the net's message, whose batch sizes are those of this rank. ``agree`` gives all
        ranks the first one's number.

        Raises:
            UserError: an LMDB or mean file that is missing or damaged, or images that do not fit.
        """
        self._device, self._agree = device, agree
        layers = messages_in(definition, PHASE_NAMES[phase])
        self.shapes: dict[str, Shape] = {}
        """Of the tops of Data layers."""

        self.batch_size = 0
        """Of the first Data layer."""

        self.notes: list[str] = []
        """What the log should say."""

        self._feeds: list[Feed] = []
        why = None if decode in ("cpu", "auto") else can_decode(device)
        if why:
            raise UserError(f"-decode {decode}: {why}; leave it out, or give -decode cpu")
        self._choice: DecodeChoice = "cpu" if device.type == "cpu" else decode
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
        if self._choice == "auto":
            found, note = faster_decode(images, self._device, workers)
            self._choice = DECODERS[self._agree(DECODERS.index(found))]
            self.notes.append(note)
        workers = self._most_workers(images, workers)
        if self.decode == "both" and workers % 2 == 0:
            # Workers take batches in turn: with an even number, some would get all that the CPU decodes.
            workers -= 1
        feed = Feed(images, self._device, workers, self.decode)
        if not feed.pinned:
            self.notes.append("The system refuses to pin memory: copies to the GPU are slower")
        self._feeds.append(feed)

    @property
    def decode(self) -> Decode:
        """Where the images are decoded."""
        return "cpu" if self._choice == "auto" else self._choice

    def _most_workers(self, images: Images, workers: int) -> int:
        """As many of ``workers`` as the shared memory holds the batches of."""
        size = images.batch_bytes
        room = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None
        if room is None or room >= _slots(workers) * size:
            return workers
        most = max((n for n in range(workers) if _slots(n) * size <= room), default=0)
        hint = f"{_SHARED_MEMORY} has {room >> 20} MiB free (a container's: --shm-size or --ipc=host)"
        if most < 1:
            raise UserError(f"{images.layer.where}: a batch is {size >> 20} MiB, and {hint}")
        self.notes.append(f"{most} processes decode images, not {workers}: {hint}")
        return most

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

    def raw(self) -> list[RawBatch]:
        """The next batch of each Data layer; see `Feed.raw`."""
        return [feed.raw() for feed in self._feeds]

    def transformed(self, raw: Sequence[RawBatch]) -> Mapping[str, Tensor]:
        """The blobs of a batch, by the names of the net's inputs: images as `Feed.transformed`, labels."""
        values = dict(self._zeros)
        for feed, batch in zip(self._feeds, raw, strict=True):
            # The labels' own memory is overwritten with the next batch.
            blobs = (feed.transformed(batch), batch.labels.clone())
            values.update(zip(feed.layer.tops, blobs, strict=False))
        return values

    def batch(self) -> Mapping[str, Tensor]:
        """The next batch, ready for the net."""
        return self.transformed(self.raw())

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
