"""Channels without effect taken out of a network: a smaller prototxt and weight file with the same outputs.

Pruning leaves zeros, which only some processors pass over. A channel all of whose weights are zero costs time
on every processor until it is removed: here, with the inputs that read it (`removable.py` finds which can
go). The output is in the dialect of the input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer, net_parts, open_net
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.export.removable import Cut, find_cuts
from caffe_jacinto.export.stock_net import StockLayer, StockNet, stock_net
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.netspec.summary import Summary, summarize
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.edit import Edits
from caffe_jacinto.prototxt.schema import brought_up_to_date, dialect_of, parse_any_net

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

_PARAMETERS = {"convolution": "convolution_param", "inner product": "inner_product_param"}
"""Where a layer says how many outputs it has, by its role."""


@dataclass
class Shrunk:
    """A network without the channels that have no effect."""

    deploy: str
    """The deploy prototxt."""

    weights: Path
    """The whole network's."""

    dialect: Dialect
    before: Summary
    after: Summary
    cuts: Mapping[str, Cut]
    """What is left of each layer that changes."""

    _layers: Mapping[str, StockLayer]
    """The whole network's convolutions and inner products."""

    _names: Collection[str]
    """All layers of the deploy network."""

    _network: Any
    """Its NetParameter message."""

    @property
    def removed(self) -> dict[str, int]:
        """How many channels each convolution or inner product has lost."""
        lost = {name: int((~cut.outputs).sum()) for name, cut in self.cuts.items() if name in self._layers}
        return {name: count for name, count in lost.items() if count}

    def weight_bytes(self) -> bytes:
        """The weight file that goes with `deploy`."""
        return b"".join(self._parts())

    def write(self, deploy: Path, weights: Path) -> None:
        """Write both files, each whole or not at all."""
        write_whole(weights, self._parts())
        write_whole(deploy, self.deploy)

    def _parts(self) -> Iterator[Any]:
        """As the weight file of the whole network, without what a deploy network does not read."""
        with open_net(self.weights, self.dialect, self._network) as (name, layers):
            kept = (layer for layer in layers if layer.name in self._names or not layer.blobs)
            yield from net_parts(name, (self._cut(layer) for layer in kept), self.dialect)

    def _cut(self, layer: NetLayer) -> NewLayer:
        cut = self.cuts.get(layer.name)
        if cut is None or not layer.blobs:
            return NewLayer(layer.header, [(layer.view, blob) for blob in layer.blobs])
        if layer.name not in self._layers:
            blobs = [_along_channels(layer.values(at), cut.outputs) for at in range(len(layer.blobs))]
            return NewLayer(layer.header, blobs)
        whole = self._layers[layer.name]
        parameters = getattr(layer.header, _PARAMETERS[role_of(layer.type)])
        for field, value in _settings(whole, cut).items():
            setattr(parameters, field, value)
        return NewLayer(layer.header, _cut_blobs(whole, cut))

    def other_form(self, text: str, where: str) -> str | None:
        """The prototxt ``text`` of the same network in another form (train, val) with fewer channels, too.

        None where it is of another network: a layer that changes has other outputs there.

        Raises:
            UserError: it is not a network's.
        """
        return _edited(_today(text, where), where, self._layers, self.cuts)


def shrink(deploy_text: str, where: str, dialect: Dialect | None, weights: Path) -> Shrunk:
    """The deploy network ``deploy_text`` without the channels that have no effect on its outputs.

    ``where`` names the text in messages. Where ``dialect`` is None, the text may be in either.

    Raises:
        UserError: as `stock_net`; or the weights are not finite.
    """
    text = _today(deploy_text, where)
    net = parse_any_net(text, where, dialect)
    stock = stock_net(text, where, dialect, weights)
    _check_finite(stock, weights)
    cuts = find_cuts(stock, _sharing(net))
    layers = {layer.name: layer for layer in stock.layers if role_of(layer.type) in _PARAMETERS}
    smaller = _edited(text, where, layers, cuts)
    assert smaller is not None
    names = {layer.name for layer in messages_in(net, TEST)}
    before, after = (summarize(tree.parse(part, where), where) for part in (text, smaller))
    return Shrunk(smaller, weights, dialect_of(net), before, after, cuts, layers, names, net)


def _today(text: str, where: str) -> str:
    """A prototxt whose layers are in today's form; one that has them stays as it is written."""
    if not tree.parse(text, where).has("layers"):
        return text
    return brought_up_to_date(text, where)[0]


def _check_finite(net: StockNet, weights: Path) -> None:
    import numpy as np

    for layer in net.layers:
        if not all(np.isfinite(blob).all() for blob in layer.blobs):
            raise UserError(
                f"{weights}: {layer.name} ({layer.type}) has weights that are not finite; the training went"
                " wrong, use an earlier snapshot"
            )


def _sharing(net: Any) -> set[str]:
    """The layers that share a blob with another: Caffe lets them by its name."""
    users: dict[str, list[str]] = {}
    for layer in messages_in(net, TEST):
        for parameter in layer.param:
            if parameter.name:
                users.setdefault(parameter.name, []).append(layer.name)
    return {layer for layers in users.values() if len(layers) > 1 for layer in layers}


def _settings(layer: StockLayer, cut: Cut) -> dict[str, Any]:
    """The fields of a convolution or inner product that change, and their values."""
    outputs = int(cut.outputs.sum())
    found: dict[str, Any] = {"num_output": outputs}
    if _is_depthwise(layer, cut):
        found["group"] = outputs
    if len(layer.blobs) == 1 and cut.carried[cut.outputs].any():
        found["bias_term"] = True
    return found


def _is_depthwise(layer: StockLayer, cut: Cut) -> bool:
    groups = layer.message.convolution_param.group if layer.type == "Convolution" else 1
    return bool(groups == len(cut.inputs) == len(cut.outputs) > 1)


def _cut_blobs(layer: StockLayer, cut: Cut) -> list[Values]:
    """The weights and the bias that are left of a convolution or inner product."""
    import numpy as np

    weights = layer.blobs[0]
    if layer.type == "Convolution":
        groups = layer.message.convolution_param.group
        if _is_depthwise(layer, cut):
            left = weights[cut.outputs]
        else:
            parts = weights.reshape(groups, -1, *weights.shape[1:])
            outputs, inputs = cut.outputs.reshape(groups, -1), cut.inputs.reshape(groups, -1)
            left = np.concatenate([parts[at][outputs[at]][:, inputs[at]] for at in range(groups)])
    else:
        transposed = layer.message.inner_product_param.transpose
        matrix = weights.T if transposed else weights
        columns = np.repeat(cut.inputs, matrix.shape[1] // len(cut.inputs))
        left = matrix[cut.outputs][:, columns]
        left = left.T if transposed else left
    carried = cut.carried[cut.outputs]
    if len(layer.blobs) > 1:
        bias = layer.blobs[1].reshape(-1)[cut.outputs].astype(np.float64) + carried
    elif carried.any():
        bias = carried
    else:
        return [np.ascontiguousarray(left)]
    return [np.ascontiguousarray(left), bias.astype(np.float32)]


def _along_channels(values: Values, kept: NDArray[np.bool_]) -> Values:
    """A blob with a number for each channel (C, or 1xCx1x1) without those that go; another as it is."""
    axes = [axis for axis, size in enumerate(values.shape) if size == len(kept)]
    return values.compress(kept, axis=axes[0]) if axes and values.size == len(kept) else values


def _edited(text: str, where: str, layers: Mapping[str, StockLayer], cuts: Mapping[str, Cut]) -> str | None:
    """``text`` with the settings of the layers that change; None where one has other outputs in it."""
    edits = Edits(text)
    for layer in tree.parse(text, where).messages("layer"):
        name, role = layer.string("name"), role_of(layer.string("type"))
        if name not in cuts or name not in layers:
            continue
        parameters = layer.message(_PARAMETERS.get(role, ""))
        if parameters.integer("num_output") != len(cuts[name].outputs):
            return None
        for field, value in _settings(layers[name], cuts[name]).items():
            if field == "group" and layer.string("type") != "Convolution":
                continue  # its type says that there is a group for each channel
            edits.set(parameters, field, str(value).lower())
    return edits.text()


def show(shrunk: Shrunk, out: TextIO) -> None:
    """Write the table of convolutions and inner products before and after."""
    before, after = shrunk.before, shrunk.after
    columns = [
        Column("Layer", words=True, total="total"),
        Column("Channels"),
        Column("left"),
        Column("Parameters", total=f"{before.parameters:,}"),
        Column("left", total=f"{after.parameters:,}"),
        Column("GigaMACs", total=f"{before.macs / 1e9:.4f}"),
        Column("left", total=f"{after.macs / 1e9:.4f}"),
    ]
    lines = []
    for whole, small in zip(before.rows, after.rows, strict=True):
        if role_of(whole.type) not in _PARAMETERS or not whole.shape or not small.shape:
            continue
        cells = [whole.name, f"{whole.shape[0]:,}", f"{small.shape[0]:,}"]
        cells += [f"{whole.parameters:,}", f"{small.parameters:,}"]
        cells += [f"{whole.macs / 1e9:.4f}", f"{small.macs / 1e9:.4f}"]
        lines.append(Line(cells, "dim" if whole.parameters == small.parameters else ""))
    show_table(out, before.name, columns, lines)
