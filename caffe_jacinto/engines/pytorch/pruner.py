"""Pruning on PyTorch: the rule and the schedule that all engines share, on tensors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.snapshot import array, put
from caffe_jacinto.pruning.pruner import Pruner
from caffe_jacinto.recipes.model import SparseSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from caffe_jacinto.pruning.pruner import Arrays


class TorchPruner(Pruner):
    """Prunes a net; on all ranks the same, as their weights are."""

    def __init__(
        self,
        net: Net,
        report: Callable[[str], None],
        *,
        sparse: SparseSettings | None = None,
        max_iter: int = 0,
        inner_products: bool = False,
        unchanged: Collection[str] = (),
        history: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> None:
        """``history`` has the tensors that the solver keeps for each blob, by the id of the blob's tensor."""
        super().__init__(
            net.layers,
            lambda layer: net.layer_blobs[layer][0].tensor.shape,
            report,
            sparse=sparse,
            max_iter=max_iter,
            inner_products=inner_products,
            unchanged=unchanged,
        )
        self._weights = {layer: net.layer_blobs[layer][0].tensor for layer in self.layers}
        self._history = {layer: (history or {}).get(id(self._weights[layer]), ()) for layer in self.layers}
        self._held: dict[str, Tensor] = {}
        self.holds = 0
        """Counts the changes of which tensors `hold_gradients` reads."""

    def read(self, layer: str) -> NDArray[np.float32]:
        return array(self._weights[layer])

    def write(self, layer: str, weights: NDArray[np.float32]) -> None:
        put(weights, self._weights[layer])

    def gradient(self, layer: str) -> NDArray[np.float32]:
        found = self._weights[layer].grad
        return array(torch.zeros_like(self._weights[layer]) if found is None else found)

    def hold(self, masks: Arrays) -> None:
        """Set the frozen weights and their momentum to zero; `hold_gradients` keeps them there."""
        if masks.keys() != self._held.keys():
            self.holds += 1
            self._held = {}
        for layer, mask in masks.items():
            weights, new = self._weights[layer], torch.from_numpy(mask)
            if layer in self._held:
                self._held[layer].copy_(new)  # in its place: a recorded graph reads it there
            else:
                layout = torch.channels_last if weights.dim() == 4 else torch.contiguous_format
                self._held[layer] = new.to(weights).contiguous(memory_format=layout)
            with torch.no_grad():
                for values in (weights, *self._history[layer]):
                    values.mul_(self._held[layer])

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The masks that are held, by layer: 0 where a weight is frozen."""
        return self._held

    def hold_gradients(self) -> None:
        """Let no gradient move a frozen weight; zeros have no momentum and no decay, so nothing else does."""
        pairs = [(self._weights[layer].grad, mask) for layer, mask in self._held.items()]
        moved = [(gradient, mask) for gradient, mask in pairs if gradient is not None]
        if moved:
            with torch.no_grad():
                torch._foreach_mul_([gradient for gradient, _ in moved], [mask for _, mask in moved])

    def checksums(self) -> dict[str, int]:
        """For each layer a number that differs, with near certainty, between other zeros.

        They are those of its mask; without one, where zeros may still return, those of its weights.
        """
        free = {
            layer: self.masks[layer] if layer in self.masks else self.read(layer) for layer in self.layers
        }
        return {layer: zlib.crc32(np.packbits(values != 0).tobytes()) for layer, values in free.items()}

    def count_zeros(self, layer: str) -> tuple[int, int]:
        weights = self._weights[layer]
        return int((weights == 0).sum()), weights.numel()
