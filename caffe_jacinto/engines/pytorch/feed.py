"""What a net is fed: batches of its data layers, in order; zeros where it has Input layers, as in Caffe."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.batches import BatchSource, Images, data_layer
from caffe_jacinto.data.sources import parameters_of, reading, source_of
from caffe_jacinto.engines.contract import ImageShape, image_shape
from caffe_jacinto.engines.pytorch.copy_ahead import RawBatch
from caffe_jacinto.engines.pytorch.engine import DecodeChoice
from caffe_jacinto.engines.pytorch.gpu_decode import DECODERS, Decode, can_decode, faster_decode
from caffe_jacinto.engines.pytorch.indices import LABEL, Indices
from caffe_jacinto.engines.pytorch.layer_setup import PHASE_NAMES, Shape
from caffe_jacinto.engines.pytorch.loading import AHEAD, Feed, slots_of
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.prototxt.solver import TRAIN

_SHARED_MEMORY = Path("/dev/shm")

_MOST_WORKERS = 16
"""Processes that decode for one net: more of them wait for memory."""


def default_workers(device: torch.device) -> int:
    """Processes that decode images: most cores where a GPU computes, few where the cores do it themselves."""
    cores = len(os.sched_getaffinity(0)) // _ranks_here()
    return max(1, min(_MOST_WORKERS, cores - 1 if device.type == "cuda" else cores // 4))


def _ranks_here() -> int:
    """The ranks of this machine, which share its cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _shared_memory() -> float:
    """The bytes that this rank may take of it: the ranks of a machine ask at about the same time."""
    if not _SHARED_MEMORY.is_dir():
        return inf
    usage = shutil.disk_usage(_SHARED_MEMORY)
    return min(usage.free, usage.total / _ranks_here())


def _feed(source: BatchSource, device: torch.device, workers: int, decode: Decode) -> Feed:
    """The batches of ``source``, decoded in this way by up to so many ``workers``."""
    if decode != "both":
        return Feed(source, device, workers, decode)
    # Workers take batches in turn: with an even number, some would get all that the CPU decodes.
    workers -= workers % 2 == 0
    # Of every two batches that a worker reads ahead, it decodes one.
    more = slots_of(workers, 2 * AHEAD) * source.batch_bytes <= _shared_memory()
    return Feed(source, device, workers, decode, 2 * AHEAD if more else AHEAD)


def _speed(source: BatchSource, device: torch.device, workers: int, decode: Decode) -> float:
    """Images that are fed in a second, once those that were read ahead at the start are used up."""
    ahead, timed = slots_of(workers, 2 * AHEAD), 2 * max(workers, 5)
    feed = _feed(source, device, workers, decode)
    try:
        # Each way reads other records: for the second one, those of the first would be in memory.
        feed.start_at(DECODERS.index(decode) * (ahead + timed))
        for _ in range(ahead):
            feed.raw()
        _wait(device)
        started = time.perf_counter()
        for _ in range(timed):
            feed.raw()
        _wait(device)
        return timed * source.batch_size / (time.perf_counter() - started)
    finally:
        feed.close()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
            UserError: data or a mean file that are missing or damaged, or images that do not fit.
        """
        self._device, self._agree = device, agree
        layers = messages_in(definition, PHASE_NAMES[phase])
        self.shapes: dict[str, Shape] = {}
        """Of the tops of data layers."""

        self.batch_size = 0
        """Of the first data layer."""

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
            for layer in reading(layers):
                self._add(source_of(layer, where, training=phase == TRAIN, seed=seed, shuffle=shuffle), count)
        except BaseException:
            self.close()
            raise

    def _add(self, source: BatchSource, workers: int) -> None:
        self.shapes.update(zip(source.layer.tops, source.top_shapes, strict=False))
        self.batch_size = self.batch_size or source.batch_size
        workers = self._most_workers(source, workers)
        decode = self._decode_of(source, workers) if isinstance(source, Images) else "cpu"
        feed = _feed(source, self._device, workers, decode)
        if not feed.pinned:
            self.notes.append("The system refuses to pin memory: copies to the GPU are slower")
        self._feeds.append(feed)

    def _decode_of(self, images: Images, workers: int) -> Decode:
        if images.augmentation.changes_pixels:
            if self._choice in ("gpu", "both"):
                raise UserError(
                    f"{images.layer.where}: images are augmented where the CPU decodes them; leave out "
                    f"-decode {self._choice}, or give -decode cpu"
                )
            return "cpu"
        if self._choice == "auto":
            found, note = faster_decode(
                images, self._device, workers, lambda way: _speed(images, self._device, workers, way)
            )
            self._choice = DECODERS[self._agree(DECODERS.index(found))]
            self.notes.append(note)
        return self.decode

    @property
    def decode(self) -> Decode:
        """Where the images are decoded."""
        return "cpu" if self._choice == "auto" else self._choice

    def _most_workers(self, source: BatchSource, workers: int) -> int:
        """As many of ``workers`` as the shared memory holds the batches of."""
        size = source.batch_bytes
        room = _shared_memory()
        if room >= slots_of(workers) * size:
            return workers
        most = max((n for n in range(workers) if slots_of(n) * size <= room), default=0)
        each = " for each rank" if _ranks_here() > 1 else ""
        hint = f"{_SHARED_MEMORY} has {int(room) >> 20} MiB{each} (a container's: --shm-size or --ipc=host)"
        if most < 1:
            raise UserError(f"{source.layer.where}: a batch is {size >> 20} MiB, and {hint}")
        self.notes.append(f"{most} processes read the data, not {workers}: {hint}")
        return most

    def fit(self, net: Net) -> None:
        """Check labels against the classes of ``net`` from now on, and feed its Input layers."""
        for name in net.inputs:
            if name not in self.shapes:
                self._zeros[name] = torch.zeros(net.shapes[name], device=self._device)
        labels = _labels_of_data(net)
        for feed in self._feeds:
            for top, name in enumerate(feed.layer.tops):
                for indices in labels.get(name, ()):
                    first = labels[name][0]
                    indices.checked_before = (indices.count, indices.ignored) == (first.count, first.ignored)
                    feed.limit_labels(top, first.count, first.ignored)

    def start_at(self, block: int, stride: int = 1, count: int | None = None) -> None:
        """Continue with batch number ``block`` and then every ``stride``-th, ``count`` of them."""
        for feed in self._feeds:
            feed.start_at(block, stride, count)

    def raw(self) -> list[RawBatch]:
        """The next batch of each data layer; see `Feed.raw`."""
        return [feed.raw() for feed in self._feeds]

    def transformed(
        self, raw: Sequence[RawBatch], *, mixed: bool = True, size: int | None = None
    ) -> Mapping[str, Tensor]:
        """The blobs of a batch, by the names of the net's inputs; see `Feed.tops`."""
        values = dict(self._zeros)
        for feed, batch in zip(self._feeds, raw, strict=True):
            values.update(zip(feed.layer.tops, feed.tops(batch, mixed=mixed, size=size), strict=False))
        return values

    def batch(self) -> Mapping[str, Tensor]:
        """The next batch, ready for the net; its images are not mixed."""
        return self.transformed(self.raw(), mixed=False)

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


def _labels_of_data(net: Net) -> dict[str, list[Indices]]:
    """The labels of ``net`` that come as its data have them, by their blob."""
    changed = {name for step in net.steps for name in step.tops}
    found: dict[str, list[Indices]] = {}
    for indices in net.indices:
        if indices.what == LABEL and indices.blob not in changed:
            found.setdefault(indices.blob, []).append(indices)
    return found


def expected_shapes(
    definition: Any, phase: int, where: str, images: Mapping[str, ImageShape]
) -> dict[str, Shape] | None:
    """The shapes of the tops of data layers, without LMDBs and mean files; None where that is not enough.

    ``images`` has the channels, height and width of the images in LMDBs that are known. Lists of images or
    HDF5 files are read.

    Raises:
        UserError: a field of a data layer that is not supported, or a list that cannot be used.
    """
    shapes: dict[str, Shape] = {}
    for layer in reading(messages_in(definition, PHASE_NAMES[phase])):
        known = type(layer)()
        known.CopyFrom(layer)
        if not Path(known.transform_param.mean_file).is_file():
            known.transform_param.ClearField("mean_file")
        if not known.transform_param.ListFields():
            known.ClearField("transform_param")
        if layer.type == "Data":
            settings = data_layer(known, where, training=phase == TRAIN)
            image = image_shape(layer, images)
            if image is None:
                return None
            names, tops = settings.tops, [(settings.batch_size, *image), (settings.batch_size,)]
        else:
            source = source_of(known, where, training=phase == TRAIN)
            names, tops = source.layer.tops, source.top_shapes
        shapes.update(zip(names, tops, strict=False))
    return shapes


def share_batches(definition: Any, phase: int, ranks: int) -> list[str]:
    """Divide the batch of each data layer among ``ranks``, as the fork does, in place.

    Returns a note for each batch that does not divide.
    """
    notes = []
    for layer in reading(messages_in(definition, PHASE_NAMES[phase])):
        whole = parameters_of(layer).batch_size
        share = -(-whole // ranks)
        if share * ranks != whole:
            notes.append(
                f"layer {layer.name}: a batch of {whole} does not divide among {ranks} GPUs; it is "
                f"{share * ranks} now"
            )
        parameters_of(layer).batch_size = share
    return notes
