"""Pruning on PyTorch: the rule and the schedule that all engines share, on tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.snapshot import array, put
from caffe_jacinto.pruning.pruner import Pruner
from caffe_jacinto.recipes.model import SparseSettings

if TYPE_CHECKING:
    import numpy as np
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
        unchanged: Collection[str] = (),
        history: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> None:
        """``history`` has the tensors that the solver keeps for each blob, by the id of the blob's tensor."""
        super().__init__(net.layers, sparse, unchanged, report)
        self._weights = {layer: net.layer_blobs[layer][0].tensor for layer in self.groups}
        self._history = {layer: (history or {}).get(id(self._weights[layer]), ()) for layer in self.groups}
        self._held: list[tuple[Tensor, Tensor]] = []

    def read(self, layer: str) -> NDArray[np.float32]:
        return array(self._weights[layer])

    def write(self, layer: str, weights: NDArray[np.float32]) -> None:
        put(weights, self._weights[layer])

    def hold(self, masks: Arrays) -> None:
        """Set the frozen weights and their momentum to zero; `hold_gradients` keeps them there."""
        self._held = []
        for layer, mask in masks.items():
            weights = self._weights[layer]
            layout = torch.channels_last if weights.dim() == 4 else torch.contiguous_format
            held = torch.from_numpy(mask).to(weights).contiguous(memory_format=layout)
            self._held.append((weights, held))
            with torch.no_grad():
                for values in (weights, *self._history[layer]):
                    values.mul_(held)

    def hold_gradients(self) -> None:
        """Let no gradient move a frozen weight; zeros have no momentum and no decay, so nothing else does."""
        pairs = [(weights.grad, mask) for weights, mask in self._held if weights.grad is not None]
        if pairs:
            with torch.no_grad():
                torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    def count_zeros(self, layer: str) -> tuple[int, int]:
        weights = self._weights[layer]
        return int((weights == 0).sum()), weights.numel()
