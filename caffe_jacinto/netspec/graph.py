"""The graph of a network: which layers a phase has, who reads which blob, which convolutions are pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from caffe_jacinto.prototxt.forks import DEPTHWISE
from caffe_jacinto.prototxt.tree import Message, tree_of

TRAIN, TEST = "TRAIN", "TEST"
"""The phases (caffe.Phase)."""


@dataclass(frozen=True)
class NetState:
    """What a layer's rules are held against (Caffe's NetState)."""

    phase: str
    level: int = 0
    stages: frozenset[str] = frozenset()


def state_of(net: Message, phase: str | None = None) -> NetState | None:
    """The state of ``net`` in ``phase``, or in its own; None where neither is stated."""
    state = net.message("state")
    phase = phase or state.string("phase")
    if not phase:
        return None
    return NetState(phase, state.integer("level"), frozenset(state.strings("stage")))


def included(layer: Message, state: NetState) -> bool:
    """Whether ``layer`` is part of the network in ``state``.

    It is where one of its ``include`` rules is met or, without any, where no ``exclude`` rule is
    (Net::FilterNet and Net::StateMeetsRule of Caffe's net.cpp).
    """

    def met(rule: Message) -> bool:
        return (
            rule.string("phase", state.phase) == state.phase
            and rule.integer("min_level", state.level) <= state.level
            and rule.integer("max_level", state.level) >= state.level
            and state.stages.issuperset(rule.strings("stage"))
            and state.stages.isdisjoint(rule.strings("not_stage"))
        )

    include = layer.messages("include")
    if include:
        return any(map(met, include))
    return not any(map(met, layer.messages("exclude")))


def layers_in(net: Message, phase: str | None = None) -> list[Message]:
    """The layers of ``net`` in ``phase``, or in its own state; all of them where neither is stated."""
    state = state_of(net, phase)
    layers = net.messages("layer")
    return layers if state is None else [layer for layer in layers if included(layer, state)]


def alone(net: Message, state: NetState) -> Message:
    """``net`` with the layers only that it has in ``state``, to which its own state adds."""
    own = net.message("state")
    stages = state.stages | set(own.strings("stage"))
    state = NetState(state.phase, state.level or own.integer("level"), stages)
    found = Message()
    found.fields = [(name, value) for name, value in net.fields if name not in ("layer", "state")]
    found.fields += [("layer", layer) for layer in net.messages("layer") if included(layer, state)]
    return found


def messages_in(net: Any, phase: str | None = None) -> list[Any]:
    """As `layers_in`, for a NetParameter message: its LayerParameter messages."""
    header = tree_of(net)
    state = state_of(header, phase)
    pairs = zip(net.layer, header.messages("layer"), strict=True)
    return [layer for layer, tree in pairs if state is None or included(tree, state)]


def with_a_source(net: Any) -> Any:
    """A NetParameter message in a state in which a layer gives images.

    It is the message itself where it states a phase, or where one does in the test phase; else the message in
    the first of the states of tests, and then of trainings, that a layer without inputs has a rule for.
    """
    if net.state.HasField("phase") or any(not layer.bottom for layer in messages_in(net, TEST)):
        return net
    sources = [layer for layer in net.layer if not layer.bottom]
    for phase in (TEST, TRAIN):
        for rule in (rule for layer in sources for rule in layer.include):
            stated = type(net)()
            stated.CopyFrom(net)
            stated.state.phase = (TRAIN, TEST).index(phase)
            stated.state.level = rule.min_level
            stated.state.stage.extend(rule.stage)
            if any(not layer.bottom for layer in messages_in(stated)):
                return stated
    return net


def shared_blobs(net: Any) -> dict[str, dict[int, tuple[str, int]]]:
    """The blobs of a NetParameter message that are an earlier layer's: by layer and index, that layer and the
    index there (``param.name``; Net::AppendParam of Caffe's net.cpp)."""
    owners: dict[str, tuple[str, int]] = {}
    found: dict[str, dict[int, tuple[str, int]]] = {}
    for layer in net.layer:
        for index, spec in enumerate(layer.param):
            if spec.name:
                owner = owners.setdefault(spec.name, (layer.name, index))
                if owner[0] != layer.name:
                    found.setdefault(layer.name, {})[index] = owner
    return found


class Node(NamedTuple):
    """A layer in the graph."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]


def nodes_of(layers: Iterable[Any]) -> list[Node]:
    """The nodes of layers, which are trees or LayerParameter messages, in order."""
    return [
        Node(
            layer.string("name"),
            layer.string("type"),
            tuple(layer.strings("bottom")),
            tuple(layer.strings("top")),
        )
        if isinstance(layer, Message)
        else Node(layer.name, layer.type, tuple(layer.bottom), tuple(layer.top))
        for layer in layers
    ]


def readers_of_each(nodes: Sequence[Node]) -> list[list[int]]:
    """For each layer, those that read what it writes, up to the one that overwrites it."""
    found: list[dict[int, None]] = [{} for _ in nodes]
    writers: dict[str, int] = {}
    for at, node in enumerate(nodes):
        for blob in node.bottoms:
            if blob in writers:
                found[writers[blob]][at] = None
        writers.update(dict.fromkeys(node.tops, at))
    return [list(of_one) for of_one in found]


def readers(nodes: Sequence[Node], at: int) -> list[int]:
    """The layers that read what layer ``at`` writes, up to the one that overwrites it."""
    return readers_of_each(nodes)[at]


def writer(nodes: Sequence[Node], before: int, blob: str) -> int | None:
    """The last layer before layer ``before`` that writes ``blob``; None for an input of the network."""
    return next((at for at in range(before - 1, -1, -1) if blob in nodes[at].tops), None)


def scale_after(nodes: Sequence[Node], at: int) -> int | None:
    """The Scale layer that alone reads the output of layer ``at``, a BatchNorm, and has no other input."""
    found = readers(nodes, at)
    if len(found) != 1 or nodes[found[0]].type != "Scale" or len(nodes[found[0]].bottoms) != 1:
        return None
    return found[0]


def output_blobs(nodes: Sequence[Node], inputs: Iterable[str] = ()) -> list[str]:
    """The blobs that no layer reads, in the order in which they are written."""
    unread = dict.fromkeys(inputs)
    for node in nodes:
        for blob in node.bottoms:
            unread.pop(blob, None)
        unread.update(dict.fromkeys(node.tops))
    return list(unread)


CONVOLUTIONS = ("Convolution", *DEPTHWISE)
"""The types of layers whose zeros count."""


def groups_of(layer: Any) -> int:
    """The groups of a convolution (a LayerParameter message): as many as outputs where its type says so."""
    parameters = layer.convolution_param
    return int(parameters.num_output if layer.type in DEPTHWISE else parameters.group)


def counted_convolutions(nodes: Sequence[Node]) -> list[str]:
    """The convolutions whose zeros count as sparsity: all but one whose output a softmax reads directly.

    Caffe puts a Split layer between a blob and its several readers, and saves it in weight files.
    """
    found = readers_of_each(nodes)
    return [
        node.name
        for at, node in enumerate(nodes)
        if node.type in CONVOLUTIONS and not _scores(nodes, found, at)
    ]


def counted_layers(nodes: Sequence[Node], *, inner_products: bool = False) -> list[str]:
    """The layers whose zeros count: `counted_convolutions`, or all convolutions and inner products."""
    if not inner_products:
        return counted_convolutions(nodes)
    return [node.name for node in nodes if node.type in (*CONVOLUTIONS, "InnerProduct")]


def _scores(nodes: Sequence[Node], found: Sequence[Sequence[int]], at: int) -> bool:
    """Whether a softmax reads the output of layer ``at``, with nothing but Split layers in between.

    ``found`` has the readers of each layer.
    """
    same = {at}  # the layers whose outputs hold what layer `at` writes
    waiting = [at]
    while waiting:
        writer_at = waiting.pop()
        for reader in found[writer_at]:
            node = nodes[reader]
            if node.type.startswith("Softmax") and node.bottoms[0] in nodes[writer_at].tops:
                return True
            if node.type == "Split" and reader not in same:
                same.add(reader)
                waiting.append(reader)
    return False
