"""Caffe's networks in memory, through pycaffe: their outputs, and the test networks of a solver."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.fit import in_binary_form
from caffe_jacinto.caffemodel.hdf5 import SUFFIX, is_hdf5
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import replacing, write_whole
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.snapshots import layer_of_no_numbers, no_numbers
from caffe_jacinto.prototxt.solver import SolverFile
from caffe_jacinto.pruning.pruner import Pruner
from caffe_jacinto.recipes.model import SparseSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.pruning.pruner import Arrays


def start_caffe(pycaffe: Path, gpus: Sequence[int]) -> tuple[Any, CaffeLog]:
    """The ``caffe`` module from the folder ``pycaffe``, on the first of ``gpus``, and its log (stderr).

    Raises:
        UserError: this Python cannot import it from there.
    """
    sys.path.insert(0, str(pycaffe))
    try:
        import caffe
    except ImportError as error:
        raise UserError(f"{pycaffe}: {sys.executable} cannot import pycaffe from there: {error}") from error

    caffe.init_log(0, True)
    log = CaffeLog(caffe.log)
    log.info(f"This is Caffe {caffe.__version__} with pycaffe in {pycaffe}")
    log.using_devices(gpus[:1])
    use_device(caffe, gpus)
    return caffe, log


def use_device(caffe: Any, gpus: Sequence[int]) -> None:
    """Compute on the first of ``gpus``, or on the CPU, in this thread: Caffe keeps its mode per thread."""
    if gpus:
        caffe.set_device(gpus[0])
        caffe.set_mode_gpu()
    else:
        caffe.set_mode_cpu()


class CaffePruner(Pruner):
    """Prunes a network of Caffe's, whose weights are NumPy views."""

    def __init__(
        self,
        net: Any,
        solver: SolverFile,
        layers: Sequence[Any],
        sparse: SparseSettings | None,
        log: CaffeLog,
        *,
        inner_products: bool = False,
    ) -> None:
        """``layers`` are the messages of the layers of ``net``, the train net of ``solver``."""
        super().__init__(
            layers,
            lambda layer: tuple(net.params[layer][0].shape),
            log.info,
            sparse=sparse,
            max_iter=solver.parameters.max_iter,
            inner_products=inner_products,
            unchanged=solver.frozen_layers(),
        )
        self._blobs = {layer: net.params[layer][0] for layer in self.layers}

    def read(self, layer: str) -> NDArray[np.float32]:
        return self._blobs[layer].data  # type: ignore[no-any-return]

    def write(self, layer: str, weights: NDArray[np.float32]) -> None:
        self._blobs[layer].data[...] = weights

    def gradient(self, layer: str) -> NDArray[np.float32]:
        return self._blobs[layer].diff  # type: ignore[no-any-return]

    def hold(self, masks: Arrays) -> None:
        """Nothing: the stepper zeroes the weights after each update."""

    def zero_weights(self) -> None:
        """Set the frozen weights to zero."""
        import numpy as np

        for layer, mask in self.masks.items():
            weights = self._blobs[layer].data
            np.multiply(weights, mask, out=weights)

    def zero_gradients(self) -> None:
        """Set the gradients of the frozen weights to zero."""
        import numpy as np

        for layer, mask in self.masks.items():
            gradients = self._blobs[layer].diff
            np.multiply(gradients, mask, out=gradients)


def check_numbers(net: Any, path: Path, log: CaffeLog) -> None:
    """End the program with a fatal line, before ``path`` is written, if a weight is not a number."""
    wrong = layer_of_no_numbers({name: [blob.data for blob in blobs] for name, blobs in net.params.items()})
    if wrong is not None:
        log.fatal(f"{path.name} is not written: {no_numbers(wrong)}")
        raise SystemExit(1)


def build_net(caffe: Any, file: Path, definition: Any) -> Any:
    """The network in ``file``, in the state of its NetParameter message: phase, level and stages."""
    state = definition.state
    return caffe.Net(str(file), state.phase, level=state.level, stages=list(state.stage))


def load_weights(net: Any, path: Path, definition: Any) -> None:
    """Fill ``net``, whose NetParameter message is ``definition``, from the weight file ``path``.

    An HDF5 file is given to Caffe in its binary form: see `fit.in_binary_form`.
    """
    if not is_hdf5(path):
        net.copy_from(str(path))
        return
    with tempfile.NamedTemporaryFile(suffix=".caffemodel") as file:
        file.write(in_binary_form(path, definition))
        file.flush()
        net.copy_from(file.name)


def save_weights(net: Any, path: Path) -> None:
    """Write the weights of ``net`` to ``path``, whole or not at all; a ``.h5`` file as HDF5."""
    if path.suffix != SUFFIX:
        with replacing(path) as (_, beside):
            net.save(str(beside))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name  # HDF5 opens no file that is locked, as one of `replacing` is
        net.save_hdf5(str(file))
        write_whole(path, file.read_bytes())


def output_values(net: Any) -> dict[str, list[float]]:
    """The outputs of the last forward pass by name, in Caffe's order."""
    return {name: [float(value) for value in net.blobs[name].data.flat] for name in net.outputs}


def loss_weights(net: Any) -> dict[str, float]:
    """The weight of each blob that is a loss."""
    return {name: float(weight) for name, weight in net.blob_loss_weights.items() if weight}


def loss(net: Any) -> float:
    """The weighted loss of the last forward pass."""
    return sum(weight * float(net.blobs[name].data.sum()) for name, weight in loss_weights(net).items())


class TestNets:
    """The test nets of ``solver``, sharing the weights of ``train_net``."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, caffe: Any, solver: SolverFile, train_net: Any, log: CaffeLog) -> None:
        self._train_net, self._log = train_net, log
        self._nets = []
        for index, test in enumerate(solver.tests):
            log.info(f"Creating test net (#{index}) specified by {test.source}")
            self._nets.append((build_net(caffe, test.file, test.definition), test.batches))

    def test(self, iteration: int, stop: Callable[[], bool], recalibrated_over: int = 0) -> bool:
        """Log the outputs of every net, averaged over its batches. False: ``stop`` requested an end.

        ``recalibrated_over``: the batches that the statistics were recalibrated over; 0: running averages.
        """
        for index, (net, batches) in enumerate(self._nets):
            self._log.test_begins(iteration, index, recalibrated_over)
            net.share_with(self._train_net)
            sums: dict[str, list[float]] = {}
            for _ in range(batches):
                if stop():
                    self._log.test_interrupted()
                    return False
                net.forward()
                for name, values in output_values(net).items():
                    before = sums.get(name, [0.0] * len(values))
                    sums[name] = [total + value for total, value in zip(before, values, strict=True)]
            means = {name: [total / batches for total in totals] for name, totals in sums.items()}
            self._log.outputs("Test", means, loss_weights(net))
        return True
