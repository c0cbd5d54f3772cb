"""Quantize a trained network: calibrate on images, measure the noise, and test before and after.

Images come one batch at a time, and only ranges and sums of them are kept: memory does not grow with their
number.
"""

from __future__ import annotations

import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from caffe_jacinto.caffemodel.net_file import NewLayer, write_net
from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.text import image_progress
from caffe_jacinto.export.input_shift import InputShift
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.stock_net import StockNet, stock_net
from caffe_jacinto.inference.network import (
    Sample,
    TrainedNetwork,
    trained_network,
    validation_preprocessing,
    why_no_scores,
)
from caffe_jacinto.inference.scores import Tally, softmax_loss
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.schema import dialect_of, parse_any_net
from caffe_jacinto.quantization.network import Network, Quantization, network_of, quantization_of
from caffe_jacinto.quantization.passes import Passes
from caffe_jacinto.quantization.ranges import Histogram, Range
from caffe_jacinto.quantization.results import Accuracy, Energy, Result
from caffe_jacinto.quantization.schemes import TRAINED, MovingRange, Scheme
from caffe_jacinto.recipes.model import QuantizeSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.engines.pycaffe.quantized import CaffeQuantizedNet
    from caffe_jacinto.engines.pytorch.quantized import QuantizedNet

    Values = NDArray[np.float32]

T = TypeVar("T")
R = TypeVar("R")

NOISE_BATCHES = 4
"""Batches over which the noise of each layer's output, and a bias correction, is measured."""

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""What is done, of how many images; the block is given a function that takes how many more are done."""

Batches = Callable[[], Iterator[list[Sample]]]
"""The batches of a set of images, from its beginning each time."""


@dataclass(frozen=True)
class Images:
    """A set of images for calibration or a test."""

    what: str
    total: int
    """Images in all."""

    batches: Batches


def loaded(trained: TrainedNetwork, scheme: Scheme, input_shift: InputShift = "power") -> StockNet:
    """The network as ``scheme`` quantizes it: with its batch norms folded, or as it is.

    ``input_shift``: as for `merge_bn`; only of use where batch norms are folded.

    Raises:
        UserError: as `merge_bn`.
    """
    where = str(trained.where)
    if scheme.folded:
        return merge_bn(trained.text, where, trained.dialect, trained.weights, input_shift).net
    return stock_net(trained.text, where, trained.dialect, trained.weights)


def described(
    net: StockNet, scheme: Scheme, where: str, bits: dict[str, int], floats: Sequence[str]
) -> Network:
    """What of ``net`` is quantized.

    Raises:
        UserError: as `network_of`.
    """
    blobs = {layer.name: layer.blobs for layer in net.layers}
    return network_of(scheme, [layer.message for layer in net.layers], blobs, where, bits=bits, floats=floats)


def on_each_gpu(net: StockNet, network: Network, gpus: Sequence[int], where: str) -> list[QuantizedNet]:
    """The network on PyTorch, once on each of ``gpus``; without any, on the CPU.

    Raises:
        UserError: as `on_pytorch`.
    """
    return [on_pytorch(net, network, (gpu,), where) for gpu in gpus] or [on_pytorch(net, network, (), where)]


def on_pytorch(net: StockNet, network: Network, gpus: Sequence[int], where: str) -> QuantizedNet:
    """The network on PyTorch, on the first of ``gpus`` or the CPU.

    Raises:
        UserError: a layer that the engine does not support, or no such GPU.
    """
    from caffe_jacinto.engines.pytorch.quantized import quantized_net

    whole: Any = type(net.message)()
    whole.CopyFrom(net.message)
    whole.layer.extend(layer.message for layer in net.layers)
    return quantized_net(whole, network, gpus, where)


def on_caffe(net: StockNet, network: Network, path: str | None, where: str) -> CaffeQuantizedNet:
    """The network on stock Caffe, on the CPU; ``path``: of its executable, or its tree.

    Raises:
        UserError: there is no Caffe with pycaffe, it cannot load the network, or the scheme's ranges move.
    """
    from caffe_jacinto.engines.discovery import find_engine
    from caffe_jacinto.engines.pycaffe.quantized import CaffeQuantizedNet
    from caffe_jacinto.inference.backends import NO_PYCAFFE, last_words, quiet_pycaffe

    if network.scheme.moving is not None:
        raise UserError(f"the scheme {network.scheme.name} is computed on PyTorch only: --backend torch")
    info = find_engine(path).info
    if info.pycaffe is None:
        raise UserError(NO_PYCAFFE)
    caffe = quiet_pycaffe(info.pycaffe)
    with tempfile.TemporaryDirectory() as scratch:
        deploy = Path(scratch) / "deploy.prototxt"
        deploy.write_text(net.text(), encoding="utf-8")
        said = last_words(lambda: _forward(caffe.Net(str(deploy), caffe.TEST)))
        if said:
            raise UserError(f"{where}: Caffe cannot compute it: {said}")
        return CaffeQuantizedNet(caffe, deploy, network)


def _forward(net: Any) -> None:
    """A pass with more images than the file says, which some networks are not made for."""
    for name in net.inputs:
        images = net.blobs[name]
        images.reshape(images.shape[0] + 1, *tuple(images.shape)[1:])
    net.reshape()
    net.forward()


def check_quantizable(
    files: Mapping[str, str], folder: Path, settings: QuantizeSettings, scheme: Scheme, *, tested: bool
) -> None:
    """Check that a network which is not trained yet can be quantized and, if it is to be, ``tested``.

    ``files`` are the prototxts of its stage by name; ``folder``, where they will be, is for messages.

    Raises:
        UserError: it cannot, for another reason than its weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name in ("deploy.prototxt", "val.prototxt"):
            (place / name).write_text(files[name], encoding="utf-8")
        weights = place / "weights.caffemodel"
        try:
            _write_ones(files["deploy.prototxt"], weights)
            trained = trained_network(place / "deploy.prototxt", weights)
            validation_preprocessing(place / "val.prototxt", trained.shape, Path())
            why = why_no_scores(trained) if tested else None
            if why is not None:
                raise UserError(f"{trained.where}: {why}, which the test needs")
            net = loaded(trained, scheme, settings.input_shift or "power")
            described(net, scheme, str(trained.where), settings.bits_of, settings.keep_float)
        except UserError as error:
            raise UserError(str(error).replace(str(place), str(folder))) from None


def _write_ones(deploy: str, path: Path) -> None:
    """Write weights for a deploy network, all of them 1."""
    import numpy as np

    net = parse_any_net(deploy, "deploy.prototxt")
    shapes = blob_shapes(net, TEST)
    layers = [
        NewLayer(layer, [np.ones([dim or 1 for dim in shape], np.float32) for shape in shapes[layer.name]])
        for layer in messages_in(net, TEST)
        if layer.name in shapes
    ]
    write_net(path, net.name, layers, dialect_of(net))


class Quantizer:
    """Quantizes one network on one engine."""

    def __init__(
        self,
        net: QuantizedNet | CaffeQuantizedNet,
        network: Network,
        where: str,
        *,
        others: Sequence[QuantizedNet] = (),
        sampled: bool = False,
        progress: Progress = image_progress,
    ) -> None:
        """
        Args:
            others: the same network on other devices, which share the batches with ``net``.
            sampled: keep histograms even where the scheme chooses ranges without them.
        """
        self._progress = progress
        self._nets = (net, *others)
        self.where = where
        self.network = network
        self.net = net
        self._sampled = sampled or (
            network.scheme.moving is None and network.scheme.activation_ranges not in ("minmax", TRAINED)
        )

    def quantize(
        self, images: Images, label: str = "calibrate", trained: Mapping[str, Range] | None = None
    ) -> Result:
        """Calibrate on ``images``; not for ranges, by unit, that are ``trained``.

        Raises:
            UserError: none of them can be read, or a range is not finite.
        """
        if self.network.scheme.moving is not None:
            ranges, counted = self._follow(images, self.network.scheme.moving, label)
        elif trained is not None and not self._sampled:
            ranges, counted = trained, 0
        else:
            ranges, counted = self._collect(images, label)
        if not counted and ranges is not trained:
            raise UserError(f"{images.what}: none of the images can be used; see the lines above")
        if trained is not None:
            ranges = {
                name: replace(trained.get(name, seen), histogram=seen.histogram)
                for name, seen in ranges.items()
            }
        result = Result(
            self.network, quantization_of(self.network, ranges, self.where), ranges, calibrated_on=counted
        )
        if self.network.scheme.bias_correction:
            self._correct(result, images)
        return result

    def _follow(self, images: Images, moving: MovingRange, label: str) -> tuple[Mapping[str, Range], int]:
        """The ranges of passes that quantize by the ranges so far, and the number of images."""
        from caffe_jacinto.engines.pytorch.quantized import MovingPasses, QuantizedNet

        assert isinstance(self.net, QuantizedNet)
        passes, counted = MovingPasses(self.net, moving, self.where, sampled=self._sampled), 0
        with self._progress(label, images.total) as advance:
            for batch in _stacked(images):
                with self._failing():
                    passes.run(batch)
                counted += len(batch)
                advance(len(batch))
        return passes.ranges, counted

    def _collect(self, images: Images, label: str) -> tuple[Mapping[str, Range], int]:
        """The ranges of passes in float32, and the number of images."""
        ranges = {
            unit.name: Range(histogram=Histogram() if self._sampled else None)
            for unit in self.network.units
            if unit.output == "quantized"
        }
        counted = 0
        with self._progress(label, images.total) as advance:
            for batch, found in self._each(
                lambda net, batch: list(net.seen(batch, None, sampled=self._sampled)), _stacked(images)
            ):
                for seen in found:
                    ranges[seen.unit.name].add(seen.low, seen.high, seen.sample)
                counted += len(batch)
                advance(len(batch))
        return ranges, counted

    def _correct(self, result: Result, images: Images) -> None:
        """Take the mean error that quantized weights make in each output channel off its bias."""
        sums: dict[str, Any] = {}
        counted = 0
        for batch, found in self._each(
            lambda net, batch: list(net.mean_errors(batch, result.quantization)),
            islice(_stacked(images), NOISE_BATCHES),
        ):
            for unit, errors in found:
                sums[unit.name] = sums.get(unit.name, 0) + errors * len(batch)
            counted += len(batch)
        corrected = {}
        for unit in self.network.units:
            bias = self.network.bias(unit) if unit.name in sums else None
            if bias is not None:
                corrected[unit.name] = (bias - sums[unit.name] / counted).astype("float32")
        result.quantization = replace(result.quantization, corrected=corrected)

    def measure_noise(self, result: Result, images: Images) -> None:
        """Measure the noise of each output over the first batches."""
        result.noise = {}
        for batch, found in self._each(
            lambda net, batch: list(net.signal_and_noise(batch, result.quantization)),
            islice(_stacked(images), NOISE_BATCHES),
        ):
            result.noise_images += len(batch)
            for unit, signal, noise in found:
                result.noise.setdefault(unit.name, Energy()).add(signal, noise)

    def test(
        self,
        result: Result,
        images: Images,
        *,
        sensitivity: bool,
        on_batch: Callable[[Accuracy], None] | None = None,
    ) -> None:
        """Test the network before and after; with ``sensitivity``, with each unit quantized alone.

        ``on_batch`` is given what each batch has shown of the quantized network.

        Raises:
            UserError: no image can be used, or a label is not one of the network's.
        """
        before, after, same, tested = Tallied(), Tallied(), 0, 0
        with self._progress("test", images.total) as advance:
            for (_, labels), (exact, rounded) in self._each(
                lambda net, item: (net.scores(item[0], None), net.scores(item[0], result.quantization)),
                _labelled(images),
            ):
                before.add(exact, labels)
                after.add(rounded, labels)
                same += int((exact.argmax(axis=1) == rounded.argmax(axis=1)).sum())
                tested += len(labels)
                if on_batch is not None:
                    one = Tallied()
                    one.add(rounded, labels)
                    on_batch(one.accuracy(images.what))
                advance(len(labels))
        result.before, result.after = before.accuracy(images.what), after.accuracy(images.what)
        result.agreement = same / tested
        if sensitivity:
            self._test_alone(result, images)

    def _test_alone(self, result: Result, images: Images) -> None:
        quantization = result.quantization
        names = [
            u.name for u in self.network.units if u.name in {*quantization.weights, *quantization.outputs}
        ]
        with self._progress("sensitivity", images.total * len(names)) as advance:
            for name in names:
                alone, tally = quantization.only(name), Tallied()
                work = partial(_scores, quantization=alone)
                for (_, labels), scores in self._each(work, _labelled(images)):
                    tally.add(scores, labels)
                    advance(len(labels))
                result.alone[name] = tally.accuracy(images.what).top1

    def _each(self, work: Callable[[Any, T], R], items: Iterator[T]) -> Iterator[tuple[T, R]]:
        """Each item with what ``work`` gives for it on one of the nets, which take turns; in order."""

        def done_by(net: Any, item: T) -> R:
            with self._failing():
                return work(net, item)

        if len(self._nets) == 1:
            yield from ((item, done_by(self.net, item)) for item in items)
            return
        from concurrent.futures import Future, ThreadPoolExecutor

        with ThreadPoolExecutor(len(self._nets)) as pool:
            waiting: deque[tuple[T, Future[R]]] = deque()
            for item, net in zip(items, cycle(self._nets), strict=False):
                waiting.append((item, pool.submit(done_by, net, item)))
                # The oldest has the net whose turn comes next.
                if len(waiting) == len(self._nets):
                    done, result = waiting.popleft()
                    yield done, result.result()
            for done, result in waiting:
                yield done, result.result()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What PyTorch cannot compute, or has no memory for, is one line."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise RunFailed(f"{self.where}: cannot be computed: {reason}") from error


def _scores(net: Passes, item: tuple[Values, list[int]], *, quantization: Quantization) -> Values:
    return net.scores(item[0], quantization)


class Tallied:
    """A `Tally` that begins with the first batch, which says how many classes there are."""

    def __init__(self) -> None:
        self._tally: Tally | None = None
        self._loss = 0.0

    def add(self, scores: Values, labels: list[int]) -> None:
        self._tally = self._tally or Tally(scores.shape[1])
        self._tally.add(scores, labels)
        self._loss += softmax_loss(scores, labels)

    def accuracy(self, what: str) -> Accuracy:
        tally = self._tally
        if tally is None:
            raise UserError(f"{what}: none of the images can be used; see the lines above")
        top5 = tally.top5 / tally.images if tally.has_top5 else None
        return Accuracy(tally.top1 / tally.images, top5, tally.images, self._loss / tally.images)


def batched(what: str, total: int, batch: int, samples: Callable[[], Iterator[Sample]]) -> Images:
    """``total`` images in batches; a line on stderr for each that cannot be read, the first time."""
    said: set[str] = set()

    def batches() -> Iterator[list[Sample]]:
        left = iter(samples())
        while chunk := list(islice(left, batch)):
            for sample in chunk:
                if sample.image is None and sample.name not in said:
                    said.add(sample.name)
                    print(UserError(f"{sample.name}: {sample.reason}; left out"), file=sys.stderr)
            yield [sample for sample in chunk if sample.image is not None]

    return Images(what, total, batches)


def _stacked(images: Images) -> Iterator[Values]:
    import numpy as np

    for batch in images.batches():
        if batch:
            yield np.stack([sample.image for sample in batch if sample.image is not None])


def _labelled(images: Images) -> Iterator[tuple[Values, list[int]]]:
    import numpy as np

    for batch in images.batches():
        if batch:
            pixels = [sample.image for sample in batch if sample.image is not None]
            yield np.stack(pixels), [sample.label or 0 for sample in batch]
