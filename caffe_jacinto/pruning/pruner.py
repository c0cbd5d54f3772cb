"""Pruning while a network trains: masks, the sparsity schedule, and their file beside each snapshot.

Both training loops prune with this class. They differ only in how weights are read, written and held at zero.

Its methods: ``magnitude`` freezes what a threshold has made zero, as published. ``soft`` lets it learn on and
return, until the last threshold freezes what is zero then: iterative hard thresholding (Jin, Yuan, Feng and
Yan 2016, "Training Skinny Deep Neural Networks with Iterative Hard Thresholding Methods", arXiv:1607.05423),
with the schedule of thresholds. ``rigl`` is in `regrow.py`.

Snapshot file ``<prefix>_iter_N.masks.npz``: a NumPy archive of plain arrays. ``factor`` is the
schedule's current factor; ``frozen/<layer>`` has one bit for each weight of the flattened blob (1: free).
``snapshot`` is the name ``<prefix>_iter_N``; ``weights/<layer>`` is the SHA-256 of a layer's weights
there. Files of earlier versions lack these two. ``soft`` is there while zeros may still return.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.hdf5 import without_suffix
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.pruning.layers import CountedLayer, find_counted, why_not_pruned, wrong_names
from caffe_jacinto.pruning.regrow import regrow_share, regrown
from caffe_jacinto.pruning.rule import pruned_weights
from caffe_jacinto.pruning.schedule import is_step, next_factor
from caffe_jacinto.recipes.model import SparseSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.float32]]

MASKS_SUFFIX = ".masks.npz"
_MASK, _WEIGHTS, _SOFT = "frozen/", "weights/", "soft"


class Pruner(ABC):
    """The zeros of a network: which are held, when more are added, how many there are."""

    def __init__(
        self,
        layers: Sequence[Any],
        shape_of: Callable[[str], Sequence[int] | None],
        report: Callable[[str], None],
        *,
        sparse: SparseSettings | None = None,
        max_iter: int = 0,
        inner_products: bool = False,
        unchanged: Collection[str] = (),
    ) -> None:
        """``layers`` are the LayerParameter messages of the network, ``shape_of`` gives the shape of a
        layer's weights. ``report`` writes a log line. ``sparse`` is the rule and its schedule (None: no
        thresholds), ``max_iter`` the iterations of its stage; ``inner_products`` counts and holds them where
        there is no ``sparse`` that says it; ``unchanged`` are layers that training leaves as they are.

        Raises:
            UserError: the network has no layer of a name in ``sparse``.
        """
        self.inner_products = inner_products if sparse is None else sparse.inner_products
        """Whether inner products count, too."""

        for key, what in wrong_names(layers, sparse) if sparse else ():
            raise UserError(f"sparsity_{key}: {what}")
        counted = find_counted(layers, shape_of, inner_products=self.inner_products, frozen=unchanged)
        self.layers = {layer.name: layer for layer in counted}
        """The layers whose zeros count."""

        self.sparse = sparse
        self.factor = sparse.start_factor if sparse else 0.0
        """The schedule's fraction of weights to zero, as last applied."""

        self.masks: dict[str, NDArray[np.float32]] = {}
        """For each of these an array of its weights' shape: 1 where a weight is free, 0 where frozen."""

        self.soft = sparse is not None and sparse.method == "soft"
        """Whether what a threshold has zeroed may still return."""

        self._max_iter = max_iter
        self._report = report
        self._gradients: dict[str, NDArray[np.float32]] = {}

    @abstractmethod
    def read(self, layer: str) -> NDArray[np.float32]:
        """The weights of a layer: a view or a copy."""

    @abstractmethod
    def write(self, layer: str, weights: NDArray[np.float32]) -> None:
        """Set the weights of a layer."""

    @abstractmethod
    def hold(self, masks: Arrays) -> None:
        """From now on keep at zero what ``masks`` freeze."""

    @abstractmethod
    def gradient(self, layer: str) -> NDArray[np.float32]:
        """The gradient of the weights of a layer, frozen ones included, after the passes of an iteration."""

    def count_zeros(self, layer: str) -> tuple[int, int]:
        """The zeros and the weights of a layer."""
        import numpy as np

        weights = self.read(layer)
        return weights.size - int(np.count_nonzero(weights)), weights.size

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """The zeros and the weights of each layer that counts, by name."""
        counted = {layer: self._count(layer) for layer in self.layers}
        zeros = {layer: count for layer, (count, _) in counted.items()}
        return zeros, {layer: count for layer, (_, count) in counted.items()}

    def _count(self, layer: str) -> tuple[int, int]:
        """As `count_zeros`; what has grown does not count, though it is zero until its first update."""
        import numpy as np

        mask = self.masks.get(layer) if self._method == "rigl" else None
        if mask is None:
            return self.count_zeros(layer)
        return mask.size - int(np.count_nonzero(mask)), mask.size

    @property
    def _method(self) -> str:
        return "magnitude" if self.sparse is None else self.sparse.method

    def sparsity(self) -> float:
        """Zeros over weights of all layers that count."""
        zeros, weights = self.counts()
        return sum(zeros.values()) / max(sum(weights.values()), 1)

    def freeze_zeros(self) -> None:
        """Freeze every weight that is zero now."""
        import numpy as np

        self.masks = {layer: (self.read(layer) != 0).astype(np.float32) for layer in self.layers}
        self.hold(self.masks)
        kinds = "convolution and inner product" if self.inner_products else "convolution"
        self._report(f"All zero weights of {kinds} layers are frozen")

    def needs_gradients(self, iteration: int) -> bool:
        """Whether weights may grow after the update of ``iteration``, by its gradients."""
        if self.sparse is None or self.sparse.method != "rigl" or not is_step(self.sparse, iteration):
            return False
        return regrow_share(self.sparse, iteration, self._max_iter) > 0

    def before_update(self, iteration: int) -> None:
        """Keep the gradients, before those of frozen weights are set to zero, if `needs_gradients`."""
        if self.needs_gradients(iteration):
            self._gradients = {layer.name: self.gradient(layer.name).copy() for layer in self._taken()}

    def after_update(self, iteration: int) -> bool:
        """Prune if that is due after the update of ``iteration``; whether weights have changed."""
        if self.sparse is None or not is_step(self.sparse, iteration):
            return False
        factor = next_factor(self.sparse, self.factor, self.sparsity())
        if factor is not None:
            self._threshold(self.sparse, factor)
        if self.soft and (factor is None or self._is_last(self.sparse, iteration)):
            self.soft = False
            self.freeze_zeros()
            return True
        return factor is not None or self._regrow(iteration)

    def _threshold(self, sparse: SparseSettings, factor: float) -> None:
        self.factor = factor
        self._report(f"Finding and applying sparsity: {factor:g}")
        self.apply_threshold(sparse, factor)

    def apply_threshold(self, sparse: SparseSettings, factor: float) -> None:
        """Prune every layer that the rule takes, and freeze the zeros unless they may return."""
        for layer, weights in pruned_weights(list(self.layers.values()), sparse, factor, self.read):
            self.write(layer, weights)
        if not self.soft:
            self.freeze_zeros()

    def _is_last(self, sparse: SparseSettings, iteration: int) -> bool:
        """Whether no threshold comes after that of ``iteration``."""
        ends = iteration + sparse.step_iter >= self._max_iter > 0
        return ends or next_factor(sparse, self.factor, self.sparsity()) is None

    def _taken(self) -> list[CountedLayer]:
        """The layers that the rule prunes."""
        assert self.sparse is not None
        return [layer for layer in self.layers.values() if why_not_pruned(layer, self.sparse) is None]

    def _regrow(self, iteration: int) -> bool:
        """Let weights change places by the gradients that `before_update` has kept; whether any did."""
        import numpy as np

        gradients, self._gradients = self._gradients, {}
        if not gradients or not self.masks:
            return False
        assert self.sparse is not None
        share = regrow_share(self.sparse, iteration, self._max_iter)
        moved = left = 0
        for layer in self._taken():
            name = layer.name
            weights, free = self.read(name), self.masks[name] != 0
            after = regrown(weights, free, gradients[name], share)
            self.write(name, np.where(after, weights, np.float32(0)))
            self.masks[name] = after.astype(np.float32)
            moved += int(np.count_nonzero(free & ~after))
            left += int(np.count_nonzero(free))
        self.hold(self.masks)
        self._report(f"Regrowth by {share:.3g}: {moved} of {left} weights have changed places")
        return True

    def _counted_weights(self) -> dict[str, NDArray[np.float32]]:
        return {layer: self.read(layer) for layer in self.layers}

    def save(self, snapshot: Path) -> None:
        """Write the masks and the schedule's factor to a file beside ``snapshot``, atomically."""
        save_masks(snapshot, self.masks, self.factor, self._counted_weights(), soft=self.soft)

    def load(self, snapshot: Path) -> None:
        """Load the masks and the factor beside ``snapshot``, whose weights the network already has.

        Raises:
            UserError: as `load_masks`.
        """
        self.masks, self.factor = load_masks(snapshot, self._counted_weights())
        if self.masks:
            self.hold(self.masks)
        self.soft = self.soft and zeros_may_return(snapshot)
        if self.sparse:
            self._report(f"The sparsity schedule continues from {self.factor:g}")


def save_masks(snapshot: Path, masks: Arrays, factor: float, weights: Arrays, *, soft: bool = False) -> None:
    """Write ``masks`` and the schedule's ``factor`` to a file beside ``snapshot``, atomically.

    ``weights`` are those of every layer in the snapshot that counts; the file says which they were.
    ``soft``: what the thresholds have zeroed may still return.
    """
    import numpy as np

    arrays: dict[str, NDArray[Any]] = {_MASK + layer: np.packbits(mask != 0) for layer, mask in masks.items()}
    arrays |= {_WEIGHTS + layer: _digest(values) for layer, values in weights.items()}
    if soft:
        arrays[_SOFT] = np.array(1, np.uint8)
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        factor=np.float64(factor),
        snapshot=np.frombuffer(without_suffix(snapshot).stem.encode(), np.uint8),
        **arrays,
    )
    write_whole(masks_file(snapshot), content.getvalue())


def load_masks(snapshot: Path, weights: Arrays) -> tuple[dict[str, NDArray[np.float32]], float]:
    """The masks beside ``snapshot``, whose layers have these ``weights``, and the schedule's factor.

    Files of earlier versions do not say which weights they belong to. Of these only the frozen weights are
    compared, which must be zero.

    Raises:
        UserError: they are missing, cut off, or belong to other weights.
    """
    import numpy as np

    path = masks_file(snapshot)
    masks, moved = {}, 0
    try:
        with np.load(path, allow_pickle=False) as archive:
            factor = float(archive["factor"])
            for key in (key for key in archive.files if key.startswith(_WEIGHTS)):
                if (archive[key] != _digest(weights[key.removeprefix(_WEIGHTS)])).any():
                    raise UserError(_of_another(path, snapshot, archive))
            for key in (key for key in archive.files if key.startswith(_MASK)):
                values = weights[key.removeprefix(_MASK)]
                if archive[key].size != -(-values.size // 8):
                    raise UserError(_of_another(path, snapshot, archive))
                bits = np.unpackbits(archive[key], count=values.size)
                masks[key.removeprefix(_MASK)] = mask = bits.reshape(values.shape).astype(np.float32)
                moved += int(np.count_nonzero(values[mask == 0]))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, which says which zeros are frozen") from error
    except KeyError as error:
        raise UserError(f"{path} is of another network: {error}") from error
    except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be used ({error})") from error
    if moved:
        raise UserError(f"{path} does not belong to {snapshot}: {moved} frozen weights are not zero")
    return masks, factor


def zeros_may_return(snapshot: Path) -> bool:
    """Whether the masks beside ``snapshot``, which `load_masks` has read, say so."""
    import numpy as np

    with np.load(masks_file(snapshot), allow_pickle=False) as archive:
        return _SOFT in archive


def _digest(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The SHA-256 of the weights' bytes."""
    import numpy as np

    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(weights, np.float32).data).digest(), np.uint8)


def _of_another(path: Path, snapshot: Path, archive: Mapping[str, NDArray[Any]]) -> str:
    """That the masks belong to other weights, and to which, if they say so."""
    own = without_suffix(snapshot).stem
    name = archive["snapshot"].tobytes().decode(errors="replace") if "snapshot" in archive else own
    whose = f"is of {name}" if name != own else "is of other weights"
    return f"{path} {whose}, and does not belong to {snapshot}"


def masks_file(snapshot: Path) -> Path:
    """The masks beside a ``.solverstate`` or ``.caffemodel``."""
    return without_suffix(snapshot).with_suffix(MASKS_SUFFIX)
