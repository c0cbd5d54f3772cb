"""Caffe's ``debug_info``: the mean size of every blob and every gradient of a pass, in Caffe's lines.

A net that is watched runs layer by layer. Its layers, and those that need a gradient, are Caffe's, with the
Split layers that Caffe inserts (Net::Init, Net::ForwardDebugInfo, Net::BackwardDebugInfo; insert_splits.cpp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.layer_setup import Forward
from caffe_jacinto.engines.pytorch.net import FED, LayerModule, Net, loss_weights

Top = tuple[str, int]
"""A top of the network's own layers: the layer's name and the top's number."""


@dataclass
class DebugLayer:
    """A layer as Caffe runs it."""

    name: str
    bottoms: list[str]
    tops: list[str]
    sources: list[Top]
    """Where the numbers of its tops come from."""

    splits: Top | None = None
    """The top that an inserted Split layer copies."""

    message: Any = None
    """The LayerParameter; None for an inserted Split layer."""

    backward: bool = False
    """Whether Caffe runs it backward."""

    down: list[bool] = field(default_factory=list)
    """Which bottoms get a gradient."""


class DebugInfo:
    """Watches the passes of one net and writes Caffe's lines about them."""

    def __init__(self, net: Net, log: CaffeLog) -> None:
        self._net, self._log = net, log
        self._blobs = {layer.name: net.tensors_of(layer.name) for layer in net.layers}
        self._layers = caffes_layers(net.layers, {name: len(own) for name, own in self._blobs.items()})
        self._split = {layer.splits for layer in self._layers if layer.splits}
        self._tops: dict[Top, Tensor] = {}
        """The mean size of each top, in float64 on the device, and of each blob and gradient below."""

        self._values: dict[str, list[Tensor]] = {}
        self._bottoms: dict[Top, Tensor] = {}
        """Of the gradient of each layer's bottom, by the layer's name and the bottom's number."""

        self._split_tops: dict[Top, Tensor] = {}
        self._parts: dict[Top, Tensor] = {}
        """What each layer adds to the gradient of each of its blobs."""

        self._gradients: dict[Tensor, Tensor] = {}
        """Of the passes before, since the last update."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Write the lines about each pass forward of the net inside."""
        modules = [module for module in self._net.modules() if isinstance(module, LayerModule)]
        hooks = [self._net.register_forward_pre_hook(self._begin), self._net.register_forward_hook(self._end)]
        for module in modules:
            module.observer = self
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in modules:
                module.observer = None

    def run(self, name: str, function: Forward, blobs: Sequence[Tensor], bottoms: Sequence[Tensor]) -> Any:
        """Compute the layer ``name`` and remember what its lines say."""
        given = [self._observed(bottom, self._bottoms, (name, at)) for at, bottom in enumerate(bottoms)]
        own = [self._part(blob, (name, at)) for at, blob in enumerate(blobs)]
        result = function(own, *given)
        for at, top in enumerate(result if isinstance(result, tuple) else (result,)):
            self._tops[name, at] = _mean_size(top)
            if (name, at) in self._split and top.requires_grad:
                self._watch(top, self._split_tops, (name, at))
        self._values[name] = [_mean_size(blob) for blob in blobs]
        return result

    def log_backward(self) -> None:
        """Write the lines about the pass backward that follows the last pass forward."""
        lines: list[tuple[str, Tensor]] = []
        none = torch.zeros((), dtype=torch.float64, device=self._net.device)
        for layer in reversed(self._layers):
            if not layer.backward:
                continue
            start = f"    [Backward] Layer {layer.name}, "
            for at, (bottom, down) in enumerate(zip(layer.bottoms, layer.down, strict=True)):
                if down:
                    found = self._bottoms.get((layer.name, at))
                    if layer.splits:
                        found = self._split_tops.get(layer.splits)
                    lines.append((f"{start}bottom blob {bottom} diff: ", none if found is None else found))
            for at, blob in enumerate(self._blobs.get(layer.name, ())):
                part = self._parts.pop((layer.name, at), None)
                if part is not None:
                    before = self._gradients.get(blob)
                    self._gradients[blob] = part if before is None else before + part
                if layer.message is not None and _rate(layer.message, at):
                    found = _mean_size(self._gradients[blob]) if blob in self._gradients else none
                    lines.append((f"{start}param blob {at} diff: ", found))
        self._write(lines)
        data = [learnable.tensor.detach().double() for learnable in self._net.learnables]
        diffs = [gradient.double() for gradient in self._gradients.values()]
        sums = [[float(tensor.abs().sum()) for tensor in tensors] for tensors in (data, diffs)]
        squares = [[float((tensor * tensor).sum()) for tensor in tensors] for tensors in (data, diffs)]
        self._log.all_parameters([sum(each) for each in sums], [sum(each) ** 0.5 for each in squares])

    def _begin(self, net: Any, given: tuple[Mapping[str, Tensor]]) -> None:
        self._bottoms, self._split_tops, self._parts = {}, {}, {}
        self._gradients = {
            learnable.tensor: learnable.tensor.grad.clone()
            for learnable in self._net.learnables
            if learnable.tensor.grad is not None
        }
        for layer in self._net.layers:
            if layer.type in FED:
                self._tops.update(
                    {(layer.name, at): _mean_size(given[0][top]) for at, top in enumerate(layer.top)}
                )

    def _end(self, net: Any, given: Any, result: Any) -> None:
        lines: list[tuple[str, Tensor]] = []
        for layer in self._layers:
            start = f"    [Forward] Layer {layer.name}, "
            for top, source in zip(layer.tops, layer.sources, strict=True):
                lines.append((f"{start}top blob {top} data: ", self._tops[source]))
            for at, value in enumerate(self._values.get(layer.name, ())):
                lines.append((f"{start}param blob {_shown(layer.message, at)} data: ", value))
        self._write(lines)

    def _write(self, lines: Sequence[tuple[str, Tensor]]) -> None:
        if lines:
            values = torch.stack([value for _, value in lines]).tolist()
            for (text, _), value in zip(lines, values, strict=True):
                self._log.debug_info(text, value)

    def _observed(self, tensor: Tensor, into: dict[Top, Tensor], at: Top) -> Tensor:
        """``tensor`` for one reader alone, whose gradient is that reader's."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        alias = tensor.view_as(tensor)
        self._watch(alias, into, at)
        return alias

    def _watch(self, tensor: Tensor, into: dict[Top, Tensor], at: Top) -> None:
        def remember(gradient: Tensor) -> None:
            into[at] = _mean_size(gradient)

        tensor.register_hook(remember)

    def _part(self, blob: Tensor, at: Top) -> Tensor:
        """A blob for one layer alone: several may share it."""
        if not (blob.requires_grad and torch.is_grad_enabled()):
            return blob
        alias = blob.view_as(blob)

        def remember(gradient: Tensor) -> None:
            self._parts[at] = gradient.detach().clone()

        alias.register_hook(remember)
        return alias


def watched(debug: DebugInfo | None) -> AbstractContextManager[None]:
    """Have the passes inside watched, by whom there is."""
    return nullcontext() if debug is None else debug.watched()


def caffes_layers(messages: Sequence[Any], blob_counts: Mapping[str, int]) -> list[DebugLayer]:
    """The layers that Caffe makes of those of a phase, with Split layers, and which of them run backward.

    ``blob_counts`` has the number of blobs of each layer that has any.
    """
    layers = _with_splits(messages)
    _mark_backward(layers, blob_counts)
    return layers


def _with_splits(messages: Sequence[Any]) -> list[DebugLayer]:
    """A Split layer follows each layer of which several others, or another and the loss, read one top."""
    made: dict[str, Top] = {}
    reads: list[list[Top]] = []
    readers: Counter[Top] = Counter()
    for message in messages:
        reads.append([made[name] for name in message.bottom])
        readers.update(reads[-1])
        made.update({name: (message.name, at) for at, name in enumerate(message.top)})
        readers.update((message.name, at) for at, weight in enumerate(message.loss_weight) if weight)
    layers: list[DebugLayer] = []
    taken: Counter[Top] = Counter()
    for message, sources in zip(messages, reads, strict=True):
        bottoms = list(message.bottom)
        for at, source in enumerate(sources):
            if readers[source] > 1:
                bottoms[at] = f"{bottoms[at]}_{source[0]}_{source[1]}_split_{taken[source]}"
                taken[source] += 1
        own = [(message.name, at) for at in range(len(message.top))]
        layers.append(DebugLayer(message.name, bottoms, list(message.top), own, message=message))
        for top, name in zip(own, message.top, strict=True):
            count = readers[top]
            if count > 1:
                split = f"{name}_{message.name}_{top[1]}_split"
                tops = [f"{split}_{number}" for number in range(count)]
                layers.append(DebugLayer(split, [name], tops, [top] * count, splits=top))
                # The first is the loss's.
                taken[top] = int(top[1] < len(message.loss_weight) and message.loss_weight[top[1]] != 0)
    return layers


def _mark_backward(layers: Sequence[DebugLayer], blob_counts: Mapping[str, int]) -> None:
    """Set what Caffe runs backward, in Net::Init's two passes."""
    needs: dict[str, bool] = {}
    for layer in layers:
        above = [needs.get(name, False) for name in layer.bottoms]
        layer.down = list(above)
        count = 0
        if layer.message is not None:
            layer.down = list(layer.message.propagate_down) or layer.down
            count = blob_counts.get(layer.name, 0)
        layer.backward = any(above) or any(_rate(layer.message, at) for at in range(count))
        if layer.backward:
            needs.update(dict.fromkeys(layer.tops, True))
        else:
            needs.update({name: needs.get(name, False) for name in layer.tops})
    losses = {
        (message.name, at)
        for message in (layer.message for layer in layers)
        if message is not None
        for at, weight in enumerate(loss_weights(message))
        if weight
    }
    under_loss: set[str] = set()
    skipped: set[str] = set()
    for layer in reversed(layers):
        contributes = any(
            source in losses or name in under_loss
            for name, source in zip(layer.tops, layer.sources, strict=True)
        )
        if layer.backward and all(name in skipped for name in layer.tops):
            layer.backward, layer.down = False, [False] * len(layer.down)
        layer.backward &= contributes
        if contributes:
            under_loss.update(layer.bottoms)
        else:
            layer.down = [False] * len(layer.down)
        skipped.update(name for name, down in zip(layer.bottoms, layer.down, strict=True) if not down)


def _rate(message: Any, at: int) -> float:
    """The lr_mult of a blob as the network's file has it."""
    return float(message.param[at].lr_mult) if at < len(message.param) else 1.0


def _shown(message: Any, at: int) -> str:
    """What Caffe calls a blob: by its name, or by its number."""
    return (message.param[at].name if at < len(message.param) else "") or str(at)


def _mean_size(tensor: Tensor) -> Tensor:
    """The mean of the absolute values, in float64."""
    values = tensor.detach()
    return values.abs().sum(dtype=torch.float64) / values.numel()
