"""Mistakes in a network's layers that Caffe aborts at, or trains something else for: each with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.netspec.layer_types import geometry_fault, role_of, spatial_axes
from caffe_jacinto.netspec.shapes import DataShapes, layer_shapes
from caffe_jacinto.prototxt.places import line_of_field, place_in
from caffe_jacinto.prototxt.tree import Message


def mistakes(net: Message, where: str, data_shapes: DataShapes = ()) -> Iterator[str]:
    """Each mistake in ``net``, which has the layers of one phase, as ``FILE:LINE: layer NAME: FIELD: ...``.

    ``where`` is the file; ``data_shapes`` as in `layer_shapes`.
    """
    layers = net.messages("layer")
    yield from _twice(layers, where)
    yield from _blobs(layers, net.strings("input"), where)
    yield from geometry_mistakes(net, where, data_shapes)
    yield from _top_k(net, where, data_shapes)


def geometry_mistakes(net: Message, where: str, data_shapes: DataShapes = ()) -> Iterator[str]:
    """As `mistakes`, of kernels, strides, padding and dilation; a line that ``net`` lacks is looked up."""
    for item in layer_shapes(net, data_shapes):
        if item.kind != "Im2col" and role_of(item.kind) not in ("convolution", "pooling"):
            continue
        source = item.bottoms[0] if item.bottoms else None
        fault = geometry_fault(item.layer, spatial_axes(item.layer, source))
        if fault is not None:
            name = item.layer.string("name")
            place = f"{where}:{line_of_field(item.layer, fault.field)}"
            if not item.layer.places:
                place = place_in(where, name, fault.field)
            yield f"{place}: layer {name}: {fault.field}: {fault.what}"


def named_twice(layers: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """The layers, each its name and type, that have the name of an earlier one: that one's index, and theirs.

    Losses and accuracies may have one name: they have no weights, and nothing goes on from them. Two losses
    of Caffe's own example of an autoencoder do.
    """
    seen: dict[str, int] = {}
    for at, (name, kind) in enumerate(layers):
        before = seen.setdefault(name, at)
        if before != at and not (_is_an_end(kind) and _is_an_end(layers[before][1])):
            yield before, at


def _is_an_end(kind: str) -> bool:
    return kind.endswith("Loss") or kind == "Accuracy"


def _twice(layers: Sequence[Message], where: str) -> Iterator[str]:
    for before, at in named_twice([(layer.string("name"), layer.string("type")) for layer in layers]):
        name, line = layers[at].string("name"), layers[at].line_of("name")
        yield (
            f"{where}:{line}: layer {name}: name: line {layers[before].line_of('name')} has a layer of this "
            "name already, for the same phase; rename one"
        )


def _blobs(layers: Sequence[Message], inputs: Sequence[str], where: str) -> Iterator[str]:
    """Bottoms that nothing makes, and tops that two layers make (Net::AppendBottom and AppendTop)."""
    made = dict.fromkeys(inputs, 0)
    for layer in layers:
        name, bottoms = layer.string("name"), layer.strings("bottom")
        for bottom, place in zip(bottoms, layer.places_of("bottom"), strict=False):
            if bottom not in made:
                later = next((other for other in layers if bottom in other.strings("top")), None)
                hint = (
                    f"layer {later.string('name')} makes it, and comes later; move it up"
                    if later is not None and later is not layer
                    else did_you_mean(bottom, made)
                )
                yield f"{where}:{place.line}: layer {name}: bottom: no layer makes {bottom}; {hint}"
        for index, (top, place) in enumerate(zip(layer.strings("top"), layer.places_of("top"), strict=False)):
            in_place = index < len(bottoms) and bottoms[index] == top
            if top in made and not in_place:
                yield (
                    f"{where}:{place.line}: layer {name}: top: {top} is made by an earlier layer already; "
                    "give it another name"
                )
            made[top] = place.line


def _top_k(net: Message, where: str, data_shapes: DataShapes) -> Iterator[str]:
    for item in layer_shapes(net, data_shapes):
        parameter = item.layer.message("accuracy_param")
        scores = item.bottoms[0] if item.bottoms else None
        if item.kind != "Accuracy" or scores is None:
            continue
        axis, top_k = parameter.integer("axis", 1), parameter.integer("top_k", 1)
        if -len(scores) <= axis < len(scores) and top_k > scores[axis]:
            yield (
                f"{where}:{parameter.line_of('top_k')}: layer {item.layer.string('name')}: "
                f"accuracy_param.top_k: the {top_k} largest of {scores[axis]} scores; make it smaller, or "
                "remove the layer"
            )
