"""Batches copied to a GPU, and decoded there, ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.gpu_decode import cut, decode_jpegs

_SLOTS = 3
"""Batches on a GPU at once: one in use, one ready, one being copied."""

_CHECK_SECONDS = 0.2
"""How often a waiting thread checks whether to stop."""


class RawBatch(NamedTuple):
    """A batch before mean and scale."""

    images: Tensor
    """batch x height x width x channels, cut to their windows."""

    labels: Tensor
    windows: Tensor
    """batch x (top, left, mirrored)."""

    mixing: Tensor
    """batch x (number of the image that it is mixed with, its own share); empty where none is."""


HostBatch = tuple[RawBatch, tuple[int, ...]]
"""A batch in the host's memory. Where ends are given, joined JPEG files are in the place of its images."""


class _Slot(NamedTuple):
    """A batch on the device."""

    batch: RawBatch
    ready: torch.cuda.Event
    """The copy is done."""

    used: torch.cuda.Event
    """What reads the batch is done."""

    free: threading.Semaphore
    """``used`` is recorded."""


class CopyAhead:
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
            torch.empty_like(host[0].mixing, device=self._device),
        )
        # The thread sleeps where it waits for them, and leaves its core to those that decode.
        ready, used = torch.cuda.Event(blocking=True), torch.cuda.Event(blocking=True)
        return _Slot(batch, ready, used, threading.Semaphore(0))

    def _fill(self, place: RawBatch, host: HostBatch) -> list[Tensor]:
        """Copy or decode ``host`` to its ``place``; returns what has to stay until that is done."""
        batch, ends = host
        for to, part in zip(place[1:], batch[1:], strict=True):
            to.copy_(part, non_blocking=True)
        if not ends:
            place.images.copy_(batch.images, non_blocking=True)
            return []
        decoded = decode_jpegs(batch.images, ends, self._device)
        return [*decoded, cut(decoded, place.windows, place.images)]
