"""Frozen zeros and the ramp of thresholds, by the rule that all engines share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pytorch.net import Convolution
from caffe_jacinto.engines.pytorch.snapshot import array, put
from caffe_jacinto.pruning.masks import Masks
from caffe_jacinto.pruning.rule import is_pruned, layer_fraction, next_factor, small_weights
from caffe_jacinto.recipes.model import SparseSettings


class Zeros:
    """The zeros of the convolutions' weights, held at zero; on all ranks the same, as their weights are."""

    def __init__(
        self, convolutions: Sequence[Convolution], history: Sequence[Sequence[Tensor]], factor: float
    ) -> None:
        """``history`` has, for each convolution, the tensors that the solver keeps for its weights."""
        self._convolutions, self._history = convolutions, history
        self._free: list[Tensor] = []
        self.factor = factor
        """The fraction of the last threshold."""

    def freeze(self) -> None:
        """Freeze every weight that is zero now; what momentum it has is gone."""
        self.take([(layer.weights.detach() != 0) for layer in self._convolutions])
        caffe_log.info("All zero weights of convolution layers are frozen")

    def take(self, free: Sequence[Tensor]) -> None:
        """Hold at zero what is False in ``free``, a mask of each convolution's weights."""
        self._free = [
            mask.to(layer.weights).contiguous(memory_format=_format(layer.weights))
            for mask, layer in zip(free, self._convolutions, strict=True)
        ]
        with torch.no_grad():
            for mask, layer, history in zip(self._free, self._convolutions, self._history, strict=True):
                for values in (layer.weights, *history):
                    values.mul_(mask)

    def hold_gradients(self) -> None:
        """Let no gradient move what is frozen: with no momentum and no decay of a zero, nothing does."""
        if not self._free:
            return
        with torch.no_grad():
            pairs = [
                (layer.weights.grad, mask)
                for layer, mask in zip(self._convolutions, self._free, strict=True)
                if layer.weights.grad is not None
            ]
            torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    def take_threshold(self, sparse: SparseSettings, frozen_layers: Collection[str]) -> None:
        """Zero the small weights, if the ramp has not come to its end."""
        factor = next_factor(sparse, self.factor, self.sparsity())
        if factor is None:
            return
        self.factor = factor
        caffe_log.info(f"Finding and applying sparsity: {caffe_log.number(factor)}")
        for layer in self._convolutions:
            shape = tuple(layer.weights.shape)
            if layer.name in frozen_layers or not is_pruned(shape, layer.group):
                continue
            weights = array(layer.weights).copy()
            small = small_weights(
                weights,
                layer_fraction(shape, layer.group, factor),
                maxratio=sparse.threshold_maxratio,
                value_max=sparse.threshold_value_max,
                by=sparse.by,
            )
            weights[small] = 0
            put(weights, layer.weights)
        self.freeze()

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Zeros and weights of each convolution, by name."""
        zeros = {layer.name: int((layer.weights == 0).sum()) for layer in self._convolutions}
        return zeros, {layer.name: layer.weights.numel() for layer in self._convolutions}

    def sparsity(self) -> float:
        """Zeros over weights of all convolutions."""
        zeros, weights = self.counts()
        return sum(zeros.values()) / max(sum(weights.values()), 1)

    def display(self) -> None:
        """Log the sparsity of each layer and of all."""
        caffe_log.sparsity(*self.counts())

    def masks(self) -> Masks:
        """What is frozen, as snapshots keep it."""
        return Masks(
            {layer.name: array(mask) for layer, mask in zip(self._convolutions, self._free, strict=False)}
        )

    def weights(self) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        """The weights of each convolution by name."""
        return {layer.name: array(layer.weights) for layer in self._convolutions}

    def take_masks(self, masks: Masks) -> None:
        """Go on with the masks of a snapshot."""
        if masks.free:
            self.take([torch.from_numpy(masks.free[layer.name] != 0) for layer in self._convolutions])


def _format(weights: Tensor) -> torch.memory_format:
    return torch.channels_last if weights.dim() == 4 else torch.contiguous_format
