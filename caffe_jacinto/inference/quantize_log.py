"""What `caffe_jacinto.quantize --log` writes: the lines of a Caffe that tests, and a few of its own.

`logs/messages.py` reads them: the network with caffe-jacinto's `quantize: true`, its sparsity, the
calibration, the float network's results, and then the quantized network's as `caffe test` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from caffe_jacinto import __version__
from caffe_jacinto.caffemodel.net_file import find_dialect
from caffe_jacinto.caffemodel.show import blob_facts
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import read_text
from caffe_jacinto.engines.caffe_log import CAFFE_SOURCE, CaffeLog, number, weighted, write_line
from caffe_jacinto.inference.network import as_tested
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.prototxt.schema import parse_any_net
from caffe_jacinto.prototxt.solver import TEST as TEST_PHASE
from caffe_jacinto.quantization.fork_settings import fields_of
from caffe_jacinto.quantization.network import Network
from caffe_jacinto.quantization.results import Accuracy, Result


class QuantizeLog:
    """Writes the log of one quantization on stderr."""

    def __init__(self, program: str, gpus: Sequence[int]) -> None:
        """``program``: what computes."""
        self._log = CaffeLog(lambda message: write_line("I", message, CAFFE_SOURCE), CAFFE_SOURCE)
        self._log.info(f"This is caffe_jacinto.quantize {__version__} ({program})")
        self._log.using_devices(gpus)
        self._accuracies: dict[int, str] = {}
        self._loss: str | None = None
        self._batch = 0

    def fatal(self, error: UserError) -> None:
        """Why it gives up."""
        self._log.fatal("; ".join(error.lines()))

    def network(self, val: Path, network: Network, shape: tuple[int, int, int], batch: int) -> None:
        """The validation network ``val`` as it is quantized; ``shape``: of an image that it takes."""
        from google.protobuf import text_format

        net = parse_any_net(read_text(val), str(val))
        shown = type(net)()
        shown.CopyFrom(net)
        del shown.layer[:]
        layers = messages_in(as_tested(net, val), TEST)
        shown.layer.extend(layers)
        shown.state.phase = TEST_PHASE
        fields = fields_of(network.scheme, sorted(network.floats))
        self._log.info(
            f"Initializing net from parameters: \n{fields}"
            f"{text_format.MessageToString(shown, as_utf8=True).rstrip()}"
        )
        self._log.info(f"output data size: {','.join(map(str, (batch, *shape)))}")
        self._log.info("Network initialization done.")
        for layer in layers:
            if layer.type == "Accuracy":
                self._accuracies[layer.accuracy_param.top_k] = layer.top[0]
            elif layer.type == "SoftmaxWithLoss":
                self._loss = layer.top[0]

    def sparsity(self, weights: Path, deploy: Path) -> None:
        """The zeros of the convolutions' weights, before they are quantized."""
        net = parse_any_net(read_text(deploy), str(deploy))
        facts = [fact for fact in blob_facts(weights, find_dialect(weights), net) if fact.counts]
        if facts:
            self._log.sparsity(
                {fact.layer: fact.zeros for fact in facts}, {fact.layer: fact.count for fact in facts}
            )

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Lines on how many of ``total`` images are done, as `image_progress` shows them.

        Those of a test come with `batch`.
        """
        done = 0

        def advance(count: int = 1) -> None:
            nonlocal done
            done += count
            if what != "test":
                self._log.info(f"Quantizing: {what}, {done} of {total} images")

        yield advance

    def test_begins(self, images: int, batch: int) -> None:
        """A test of ``images`` begins."""
        self._log.info(f"Running for {-(-images // batch)} iterations.")

    def batch(self, found: Accuracy) -> None:
        """One batch of the test, quantized."""
        for name, value, _ in self._outputs(found):
            self._log.info(f"Batch {self._batch}, {name} = {number(value)}")
        self._batch += 1

    def results(self, result: Result) -> None:
        """The results of the float and of the quantized network."""
        assert result.before is not None
        assert result.after is not None
        for name, value, _ in self._outputs(result.before):
            self._log.info(f"Float network: {name} = {number(value)}")
        self._log.info(f"Loss: {number(result.after.loss)}")
        for name, value, weight in self._outputs(result.after):
            self._log.info(f"{name} = {weighted(value, weight)}")

    def _outputs(self, found: Accuracy) -> Iterator[tuple[str, float, float]]:
        """The validation network's outputs that are known: name, value, loss weight."""
        values: Mapping[int, float | None] = {1: found.top1, 5: found.top5}
        for top_k, name in sorted(self._accuracies.items()):
            value = values.get(top_k)
            if value is not None:
                yield name, value, 0.0
        if self._loss is not None:
            yield self._loss, found.loss, 1.0
