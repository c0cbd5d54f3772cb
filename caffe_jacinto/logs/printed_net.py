"""The networks that a log prints: phase, outputs, accuracies, costs; sparsity over the convolutions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs import events
from caffe_jacinto.logs.loss import SoftmaxLosses, softmax_losses
from caffe_jacinto.netspec import graph
from caffe_jacinto.netspec import shapes as complexity
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.upgrade import V1_TYPES

_PHASE = re.compile(r"^state \{\s*phase: (\w+)", re.MULTILINE)
_READ_SCORES = ("Accuracy", "SoftmaxWithLoss")
_DECLARED = ("Input", "DummyData", "MemoryData", "Parameter")
"""Layers without inputs that state their shapes."""
_MOST_SHAPES = 1000
_MOST_NETS = 16

DETECTIONS = "detection_eval"
"""The name that the examples of SSD give the output of their DetectionEvaluate layer."""

_TOP_1 = re.compile(r"(?i)top[-_ @]?1(?!\d)|(?<![a-z])acc(?:uracy)?(?:[-_ @/]?1)?$")
_TOP_5 = re.compile(r"(?i)top[-_ @]?5(?!\d)|(?<![a-z])acc(?:uracy)?[-_ @/]?5$")


@dataclass
class PrintedNet:
    """A printed network, and the shapes that were printed after it."""

    printed: events.NetPrinted
    given: list[tuple[int, ...]] = field(default_factory=list)
    """What its data layers gave, in order."""
    named: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of each layer's first output."""
    images: int | None = None
    """How many its data layer has, where that says so."""

    @cached_property
    def phase(self) -> str | None:
        match = _PHASE.search(self.printed.text)
        return match.group(1) if match else None

    @cached_property
    def message(self) -> tree.Message | None:
        """The network; None where the log holds only a part of it."""
        return self._head if self.printed.complete else None

    @cached_property
    def _head(self) -> tree.Message | None:
        """The network, or the whole layers of the part of it that was printed."""
        text = self.printed.text
        if not self.printed.complete:
            text = text[: text.rfind("\n}") + 2]
        try:
            return _of_today(tree.parse(text, "network in the log"))
        except UserError:
            return None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that data layers gave, by layer."""
        found: dict[str, tuple[int, ...]] = {}
        given = iter(self.given)
        for layer in self._sources:
            name = layer.string("name")
            shape = self.named.get(name) or next(given, None)
            if shape is not None:
                found[name] = shape
        return found

    @property
    def _sources(self) -> list[tree.Message]:
        """The layers that read a data set."""
        layers = graph.layers_in(self._head) if self._head else []
        return [
            layer
            for layer in layers
            if not layer.has("bottom") and layer.has("top") and layer.string("type") not in _DECLARED
        ]

    @cached_property
    def costs(self) -> list[complexity.LayerCost]:
        return complexity.layer_costs(self.message, self.shapes) if self.message else []

    @cached_property
    def gigamacs(self) -> float | None:
        return complexity.gigamacs(self.message, self.shapes) if self.message else None

    @cached_property
    def batch(self) -> int | None:
        """Images of one pass, by the network or else by the shapes that were printed."""
        stated = complexity.batch_size(self._head) if self._head else None
        for layer in self._sources if stated is None else ():
            messages = [value for _, value in layer.fields if isinstance(value, tree.Message)]
            stated = next((m.integer("batch_size") for m in messages if m.integer("batch_size") > 0), None)
            shape = self.shapes.get(layer.string("name"))
            stated = stated or (shape[0] if shape else None)
            break
        return stated

    @cached_property
    def accuracies(self) -> dict[int, str]:
        """top_k -> the output that holds it; of several (auxiliary classifiers), the last."""
        found = {}
        for layer in graph.layers_in(self.message) if self.message else ():
            if layer.string("type") == "Accuracy" and layer.strings("top"):
                found[layer.message("accuracy_param").integer("top_k", 1)] = layer.strings("top")[0]
        return found

    @cached_property
    def mean_ap(self) -> str | None:
        """The output that SSD's solver prints as mean average precision."""
        layers = graph.layers_in(self.message) if self.message else ()
        found = [layer.strings("top")[:1] for layer in layers if layer.string("type") == "DetectionEvaluate"]
        return found[-1][0] if found and found[-1] else None

    @cached_property
    def classes(self) -> int | None:
        """Number of classes: the scores of one image that the last accuracy or loss reads."""
        scores = [shaped.bottoms[:1] for shaped in self._layers if shaped.kind in _READ_SCORES]
        return prod(scores[-1][0][1:]) if scores and scores[-1] and scores[-1][0] else None

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the network's images, after the crop."""
        tops = [top for shaped in self._layers if role_of(shaped.kind) == "data" for top in shaped.tops[:1]]
        return (tops[0][2], tops[0][3]) if tops and tops[0] and len(tops[0]) == 4 else None

    @cached_property
    def _layers(self) -> list[complexity.LayerShapes]:
        return complexity.layer_shapes(self.message, self.shapes) if self.message else []

    @cached_property
    def softmax_losses(self) -> SoftmaxLosses | None:
        """Its losses, if all of them are softmax losses."""
        return softmax_losses(self.message, self.classes) if self.message else None

    @cached_property
    def outputs(self) -> list[str] | None:
        """The blobs that the network produces and does not use, in Caffe's order, which is by name."""
        if self.message is None:
            return None
        unused: set[str] = set()
        for layer in graph.layers_in(self.message):
            unused.difference_update(layer.strings("bottom"))
            unused.update(layer.strings("top"))
        return sorted(unused)

    def loss_weight(self, output: str) -> float | None:
        """What a loss with this name counts; None for an output that is not a loss."""
        for layer in graph.layers_in(self.message) if self.message else ():
            if output in layer.strings("top"):
                weights = layer.all("loss_weight") or [1.0] * layer.string("type").endswith("Loss")
                at = layer.strings("top").index(output)
                weight = weights[at] if at < len(weights) else None
                return float(weight) if isinstance(weight, (int, float)) and weight else None
        return None

    @property
    def quantized(self) -> bool:
        """Whether it is computed in quantized values."""
        return self._head is not None and self._head.flag("quantize")

    @property
    def bits(self) -> tuple[int, int] | None:
        """Of weights and of activations, where it is quantized; defaults as in the fork's schema."""
        if not self.quantized or self._head is None:
            return None
        settings = self._head.message("net_quantization_param")
        return settings.integer("bitwidth_weights", 12), settings.integer("bitwidth_activations", 8)


def _of_today(net: tree.Message) -> tree.Message:
    """A network with the layers of 2014 (V1LayerParameter) in today's form, as far as figures need it."""
    for at, (name, value) in enumerate(net.fields):
        if name == "layers" and isinstance(value, tree.Message):
            value.fields = [
                (key, V1_TYPES.get(item, item) if key == "type" and isinstance(item, str) else item)
                for key, item in value.fields
            ]
            net.fields[at] = ("layer", value)
    return net


def named_accuracies(outputs: Iterable[str]) -> dict[int, str]:
    """top_k -> the output whose name says that it is this accuracy; of several, the last."""
    found = {}
    for name in outputs:
        for top_k, pattern in ((5, _TOP_5), (1, _TOP_1)):
            if pattern.search(name):
                found[top_k] = name
                break
    return found


class PrintedNets:
    """The networks of the process that printed them last."""

    def __init__(self, test_net: str | None = None) -> None:
        """``test_net``: the text of the test network, used where the log does not hold all of it."""
        self._test_net = test_net
        self._given: PrintedNet | None = None
        self._nets: list[PrintedNet] = []
        self._all_are_old = False
        self._losses: tuple[SoftmaxLosses | None] | None = None
        """What `softmax_losses` has found, once it has looked."""

    def start_process(self) -> None:
        """A new process: its first network replaces those that were printed before."""
        self._all_are_old = True

    def add(self, printed: events.NetPrinted) -> None:
        if self._all_are_old:
            self._nets.clear()
            self._all_are_old = False
        if len(self._nets) < _MOST_NETS:
            self._nets.append(PrintedNet(printed))
            self._losses = None

    def add_shape(self, event: events.DataShape | events.TopShape | events.DataSize) -> None:
        """A layer of the network that was printed last has printed a shape, or how many images there are."""
        net = self._nets[-1] if self._nets and self._nets[-1].printed.thread == event.thread else None
        if net is None:
            return
        if isinstance(event, events.DataSize):
            net.images = event.images
        elif isinstance(event, events.DataShape):
            if len(net.given) < _MOST_SHAPES:
                net.given.append(event.shape)
        elif event.layer is not None:
            if len(net.named) < _MOST_SHAPES:
                net.named.setdefault(event.layer, event.shape)
        elif not net.given:
            net.given.append(event.shape)  # the first layer's

    def of(self, phase: str, number: int = 0) -> PrintedNet | None:
        """The network number ``number`` of a phase, ``TRAIN`` or ``TEST``."""
        found = [net for net in self._nets if net.phase == phase]
        net = found[number] if number < len(found) else None
        if phase == "TEST" and number == 0 and self._test_net and (net is None or not net.printed.complete):
            return self._given_net(self._test_net, net)
        return net

    def _given_net(self, text: str, printed: PrintedNet | None) -> PrintedNet:
        """The network of the text that `__init__` was given, with the shapes of the ``printed`` one."""
        given = list(printed.given) if printed else []
        named = dict(printed.named) if printed else {}
        if self._given is None or (self._given.given, self._given.named) != (given, named):
            net = events.NetPrinted(text, thread=0, complete=True)
            self._given = PrintedNet(net, given, named)
        return self._given

    def main(self) -> PrintedNet | None:
        """The network to count: the test net, or where the log does not give all of one, the train net."""
        nets = [net for net in (self.of("TEST"), self.of("TRAIN"), *self._nets) if net is not None]
        nets = [net for net in nets if net.message is not None]
        return next((net for net in nets if net.gigamacs is not None), nets[0] if nets else None)

    def softmax_losses(self) -> SoftmaxLosses | None:
        """The losses of the training network, or where the log has no complete one, of the test network."""
        if self._losses is None:
            train = self.of("TRAIN")
            net = train if train is not None and train.message is not None else self.main()
            self._losses = (net.softmax_losses if net is not None else None,)
        return self._losses[0]

    def accuracies(self, number: int) -> dict[int, str]:
        """top_k -> the output that holds it, of test net number ``number``."""
        net = self.of("TEST", number)
        return net.accuracies if net else {}

    @property
    def any_is_printed(self) -> bool:
        """Whether the log holds a network."""
        return bool(self._nets)

    def any_is_cut(self) -> bool:
        """Whether glog has cut a network."""
        return any(not net.printed.complete for net in self._nets)


def conv_sparsity(listed: events.Sparsity, net: PrintedNet) -> float | None:
    """Zeros over weights of the convolutions, from a listing and the printed network; None if they differ.

    The listing's total may count inner products too, and its fractions by layer have three digits only. So
    the zeros of the other layers are subtracted from the total; or, where the other layers have more weights
    than the convolutions, the convolutions' own fractions are added up. Either loses fewer digits.

    Where the listing says that the rule prunes inner products, the total is the sparsity.
    """
    if not listed.blobs:
        return None
    if listed.inner_products:
        return listed.total
    costs = {cost.name: cost for cost in net.costs}
    counted = {name for name, cost in costs.items() if cost.counted}
    if any((name, 0) not in listed.blobs for name in counted):
        return None
    conv_weights = conv_zeros = other_weights = other_zeros = 0.0
    for (name, blob), fraction in listed.blobs.items():
        cost = costs.get(name)
        if cost is None or cost.weights is None:
            return None
        size = cost.weights if blob == 0 else cost.outputs
        if name in counted and blob == 0:
            conv_weights += size
            conv_zeros += fraction * size
        else:
            other_weights += size
            other_zeros += fraction * size
    # The listing must be of this network, or its weights are not the ones counted here.
    if not conv_weights or abs(conv_weights + other_weights - listed.weights) > 1e-5 * listed.weights:
        return None
    if other_weights <= conv_weights:
        conv_zeros = listed.zeros - other_zeros
    return float(f"{min(1.0, max(0.0, conv_zeros / conv_weights)):.3g}")
