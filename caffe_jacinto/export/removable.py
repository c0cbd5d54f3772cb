"""Which channels of a network can go without a change to its outputs, and what must be carried instead.

A channel is *constant* if its value is the same everywhere in every image, as that of a convolution's output
without weights: its bias, and what batch norm and ReLU make of it. A reader can do without a constant channel
if it can add the constant's effect to its own bias. A convolution that pads cannot, unless the constant is 0:
at the border, zeros take the channel's place. A reader can also do without a channel that it gives no weight.

All channels of all blobs are taken as removed first; then each layer puts back those that it cannot do
without, until nothing changes. What is left is the largest set of channels that can go together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from caffe_jacinto.export.channelwise import by_channel, gain_and_shift
from caffe_jacinto.export.stock_net import StockLayer, StockNet
from caffe_jacinto.netspec.layer_types import geometry
from caffe_jacinto.netspec.shapes import FullShape, layer_shapes
from caffe_jacinto.prototxt.tree import Message, tree_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    Flags = NDArray[np.bool_]


@dataclass
class Cut:
    """What is left of a layer."""

    inputs: Flags
    """Of the channels of its first bottom: True where one stays."""

    outputs: Flags
    """Of the channels of its first top."""

    carried: Doubles
    """For each of all its outputs, what is added to its bias for the constant inputs that go."""


@dataclass(eq=False)
class _Blob:
    """What one layer writes, before another overwrites it."""

    positions: int
    """Numbers of a channel in one image."""

    constant: Doubles
    """By channel: its value, or NaN where that depends on the image or the place."""

    removed: Flags
    """By channel."""

    def keep(self, channels: Any = slice(None)) -> None:
        self.removed[channels] = False


@dataclass(eq=False)
class _Step:
    """A layer between its blobs; None is a blob whose channels are not known."""

    layer: StockLayer
    tree: Message
    bottoms: list[_Blob | None]
    tops: list[_Blob | None]
    kind: _Kind = field(init=False)

    def __post_init__(self) -> None:
        self.kind = _KINDS.get(self.layer.type, _RIGID)
        known = bool(self.bottoms and self.tops) and None not in (*self.bottoms, *self.tops)
        if not known or not self.kind.fits(self):
            self.kind = _RIGID

    @property
    def bottom(self) -> _Blob:
        """The first bottom, of a layer whose kind needs one."""
        (blob, *_) = self.bottoms
        assert blob is not None
        return blob

    @property
    def top(self) -> _Blob:
        (blob, *_) = self.tops
        assert blob is not None
        return blob

    @property
    def blobs(self) -> list[_Blob]:
        return [blob for blob in (*self.bottoms, *self.tops) if blob is not None]


@dataclass(frozen=True)
class _Kind:
    """What is known of a type of layer."""

    fits: Callable[[_Step], bool]
    """Whether the rest holds for this layer."""

    constants: Callable[[_Step], Doubles | None]
    """The constants of the top, from those of the bottoms; None: none are known."""

    restrict: Callable[[_Step], None]
    """Put back the channels that the layer cannot do without."""


def find_cuts(net: StockNet, shared: Collection[str] = ()) -> dict[str, Cut]:
    """For each layer of which something can go, by name, what is left of it.

    ``shared`` are layers whose blobs others use, too; they keep all channels.
    """
    import numpy as np

    steps = _steps(net, shared)
    with np.errstate(all="ignore"):
        for step in steps:
            found = step.kind.constants(step)
            if found is not None:
                for top in step.tops:
                    assert top is not None
                    top.constant[:] = found
    while True:
        before = [blob.removed.copy() for step in steps for blob in step.blobs]
        for step in reversed(steps):
            step.kind.restrict(step)
        after = [blob.removed for step in steps for blob in step.blobs]
        if all(np.array_equal(*pair) for pair in zip(before, after, strict=True)):
            break
    return {
        step.layer.name: Cut(~step.bottom.removed, ~step.top.removed, _carried(step))
        for step in steps
        if step.kind is not _RIGID and any(blob.removed.any() for blob in step.blobs)
    }


def _steps(net: StockNet, shared: Collection[str]) -> list[_Step]:
    """The layers with what they read and write; the network's inputs and outputs keep their channels."""
    whole = type(net.message)()
    whole.CopyFrom(net.message)
    whole.layer.extend(layer.message for layer in net.layers)
    blobs: dict[str, _Blob | None] = {}
    unread: dict[str, _Blob | None] = {}
    steps = []
    for layer, item in zip(net.layers, layer_shapes(tree_of(whole)), strict=True):
        bottoms = [blobs.get(name) for name in layer.message.bottom]
        tops = [_blob(shape) for shape in item.tops]
        step = _Step(layer, item.layer, bottoms, tops)
        if layer.name in shared:
            step.kind = _RIGID
        steps.append(step)
        for name in layer.message.bottom:
            unread.pop(name, None)
        blobs.update(zip(layer.message.top, tops, strict=True))
        unread.update(zip(layer.message.top, tops, strict=True))
    for blob in unread.values():
        if blob is not None:
            blob.keep()
    return steps


def _blob(shape: FullShape | None) -> _Blob | None:
    import numpy as np

    if shape is None or len(shape) < 2:
        return None
    return _Blob(int(np.prod(shape[2:])), np.full(shape[1], np.nan), np.ones(shape[1], bool))


# ------------------------------------------------------------------------- layers that keep their channels


def _keep_all(step: _Step) -> None:
    for blob in step.blobs:
        blob.keep()


_RIGID = _Kind(lambda step: True, lambda step: None, _keep_all)
"""A layer of which nothing is known."""


# ---------------------------------------------------------------------------- layers that work by channel


def _same_channels(step: _Step) -> bool:
    return len({len(blob.removed) for blob in step.blobs}) == 1


def _together(step: _Step) -> None:
    """A channel goes from all blobs or from none."""
    import numpy as np

    all_of_them = np.logical_and.reduce([blob.removed for blob in step.blobs])
    for blob in step.blobs:
        blob.removed[:] = all_of_them


def _by_channel(constants: Callable[[_Step], Doubles | None]) -> _Kind:
    return _Kind(lambda step: len(step.bottoms) == 1 and _same_channels(step), constants, _together)


def _unknown(step: _Step) -> Doubles | None:
    return None


def _unchanged(step: _Step) -> Doubles:
    return step.bottom.constant


def _relu(step: _Step) -> Doubles:
    import numpy as np

    values = step.bottom.constant
    slope = step.layer.message.relu_param.negative_slope
    result: Doubles = np.where(values < 0, values * slope, values) + 0.0  # -0 becomes 0
    return result


def _prelu(step: _Step) -> Doubles:
    import numpy as np

    values = step.bottom.constant
    slopes = step.layer.blobs[0].reshape(-1).astype(np.float64)
    result: Doubles = np.where(values < 0, values * slopes, values) + 0.0
    return result


def _clip(step: _Step) -> Doubles:
    import numpy as np

    limits = step.layer.message.clip_param
    result: Doubles = np.clip(step.bottom.constant, limits.min, limits.max)
    return result


def _abs(step: _Step) -> Doubles:
    import numpy as np

    result: Doubles = np.abs(step.bottom.constant)
    return result


def _linear(step: _Step) -> Doubles | None:
    """Power, where its power is 1."""
    parameters = step.layer.message.power_param
    return parameters.shift + parameters.scale * step.bottom.constant if parameters.power == 1 else None


def _sigmoid(step: _Step) -> Doubles:
    import numpy as np

    result: Doubles = 1 / (1 + np.exp(-step.bottom.constant))
    return result


def _tanh(step: _Step) -> Doubles:
    import numpy as np

    result: Doubles = np.tanh(step.bottom.constant)
    return result


def _affine(step: _Step) -> Doubles:
    """A channel that is multiplied by 0 is constant, whatever it was."""
    import numpy as np

    gain, shift = gain_and_shift(step.layer)
    result: Doubles = np.where(gain == 0, shift, step.bottom.constant * gain + shift)
    return result


_AFFINE = _Kind(lambda step: by_channel(step.layer) and _same_channels(step), _affine, _together)


def _pooling(step: _Step) -> Doubles | None:
    """A constant stays what it is unless zeros of the padding enter an average, or a window is empty."""
    import numpy as np

    parameters = step.layer.message.pooling_param
    values = step.bottom.constant
    if parameters.pool == type(parameters).STOCHASTIC:
        return None
    if parameters.global_pooling:
        return values
    kernel, stride, pad, _ = geometry(step.tree)
    if any(step_size > size for step_size, size in zip(stride, kernel, strict=True)):
        return None
    if parameters.pool == type(parameters).AVE and any(pad):
        result: Doubles = np.where(values == 0, values, np.nan)
        return result
    return values


def _one_top(step: _Step) -> bool:
    return len(step.bottoms) == 1 and len(step.tops) == 1 and _same_channels(step)


def _eltwise(step: _Step) -> Doubles:
    import numpy as np

    parameters = step.layer.message.eltwise_param
    values = np.stack([blob.constant for blob in step.bottoms if blob is not None])
    result: Doubles
    if parameters.operation == type(parameters).SUM:
        factors = np.array(list(parameters.coeff) or [1.0] * len(values))
        result = (values * factors[:, np.newaxis]).sum(axis=0)
    elif parameters.operation == type(parameters).PROD:
        result = np.where((values == 0).any(axis=0), 0.0, values.prod(axis=0))
    else:
        result = values.max(axis=0)
    return result


# --------------------------------------------------------------------------- layers that join and reshape


def _joins_channels(step: _Step) -> bool:
    parameters = step.layer.message.concat_param
    axis = parameters.concat_dim if parameters.HasField("concat_dim") else parameters.axis
    return bool(axis == 1 and sum(len(blob.removed) for blob in _inputs(step)) == len(step.top.removed))


def _inputs(step: _Step) -> list[_Blob]:
    return [blob for blob in step.bottoms if blob is not None]


def _joined_constants(step: _Step) -> Doubles:
    import numpy as np

    return np.concatenate([blob.constant for blob in _inputs(step)])


def _concat(step: _Step) -> None:
    start = 0
    for blob in _inputs(step):
        part = step.top.removed[start : start + len(blob.removed)]
        part &= blob.removed
        blob.removed[:] = part
        start += len(part)


def _flattens(step: _Step) -> bool:
    parameters = step.layer.message.flatten_param
    return bool(
        parameters.axis == 1
        and parameters.end_axis == -1
        and len(step.top.removed) == len(step.bottom.removed) * step.bottom.positions
    )


def _flat_constants(step: _Step) -> Doubles:
    import numpy as np

    return np.repeat(step.bottom.constant, step.bottom.positions)


def _flatten(step: _Step) -> None:
    import numpy as np

    bottom, top = step.bottom, step.top
    bottom.removed &= top.removed.reshape(-1, bottom.positions).all(axis=1)
    top.removed[:] = np.repeat(bottom.removed, bottom.positions)


# ------------------------------------------------------------------------------------ layers with weights


def _convolves(step: _Step) -> bool:
    parameters = step.layer.message.convolution_param
    return bool(
        len(step.bottoms) == len(step.tops) == 1
        and parameters.axis == 1
        and step.layer.blobs
        and len(step.bottom.removed) == step.layer.blobs[0].shape[1] * parameters.group
    )


def _multiplies(step: _Step) -> bool:
    parameters = step.layer.message.inner_product_param
    return bool(
        len(step.bottoms) == len(step.tops) == 1
        and parameters.axis == 1
        and step.layer.blobs
        and _matrix(step).shape[1] == len(step.bottom.removed) * step.bottom.positions
    )


def _groups(step: _Step) -> int:
    return int(step.layer.message.convolution_param.group) if step.layer.type == "Convolution" else 1


def _matrix(step: _Step) -> Doubles:
    """Outputs x inputs / group x what of each input is multiplied."""
    import numpy as np

    weights = step.layer.blobs[0].astype(np.float64)
    if step.layer.type == "InnerProduct" and step.layer.message.inner_product_param.transpose:
        weights = weights.T
    return weights


def _by_group(step: _Step) -> Doubles:
    """Groups x outputs / group x inputs / group x what of each input is multiplied."""
    weights, groups = _matrix(step), _groups(step)
    return weights.reshape(groups, len(weights) // groups, len(step.bottom.removed) // groups, -1)


def _bias(step: _Step) -> Doubles:
    import numpy as np

    blobs = step.layer.blobs
    return blobs[1].reshape(-1).astype(np.float64) if len(blobs) > 1 else np.zeros(len(step.top.removed))


def _absorbed(step: _Step) -> Flags:
    """Of the bottom's channels: whether the layer can add the effect of this constant to its bias."""
    import numpy as np

    values = step.bottom.constant
    if step.layer.type == "Convolution" and any(geometry(step.tree, _axes(step)).pad):
        return np.asarray(values == 0)
    return np.asarray(~np.isnan(values))


def _axes(step: _Step) -> int:
    return step.layer.blobs[0].ndim - 2


def _weighted_constants(step: _Step) -> Doubles:
    """An output is constant if all inputs that have a weight in it can be absorbed."""
    import numpy as np

    weights, groups = _by_group(step), _groups(step)
    absorbed = _absorbed(step)
    varies = (weights != 0).any(axis=3) & ~absorbed.reshape(groups, 1, -1)
    values = np.where(absorbed, step.bottom.constant, 0.0).reshape(groups, 1, -1)
    found = (weights.sum(axis=3) * values).sum(axis=2).reshape(-1) + _bias(step)
    result: Doubles = np.where(varies.any(axis=2).reshape(-1), np.nan, found)
    return result


def _carried(step: _Step) -> Doubles:
    """What the constant channels that go add to each output."""
    import numpy as np

    if step.layer.type not in _WEIGHTED or _is_depthwise(step):
        return np.zeros(len(step.top.removed))
    gone = step.bottom.removed & ~np.isnan(step.bottom.constant) & _absorbed(step)
    values = np.where(gone, step.bottom.constant, 0.0).reshape(_groups(step), 1, -1)
    result: Doubles = (_by_group(step).sum(axis=3) * values).sum(axis=2).reshape(-1)
    return result


def _is_depthwise(step: _Step) -> bool:
    return _groups(step) > 1 and _groups(step) == len(step.bottom.removed) == len(step.top.removed)


def _weighted(step: _Step) -> None:
    bottom, top, groups = step.bottom, step.top, _groups(step)
    if _is_depthwise(step):
        _together(step)
        if top.removed.all():
            _keep_first(step)
        return
    weights = (_by_group(step) != 0).any(axis=3)
    weights &= ~top.removed.reshape(groups, -1, 1)
    bottom.removed &= _absorbed(step) | ~weights.any(axis=1).reshape(-1)
    for blob in (bottom, top):
        _even_out(blob.removed.reshape(groups, -1))


def _keep_first(step: _Step) -> None:
    for blob in step.blobs:
        blob.keep(0)


def _even_out(removed: Flags) -> None:
    """Put back channels, the last of a group first, until all groups lose as many, and none all of them."""
    import numpy as np

    counts = removed.sum(axis=1)
    most = min(int(counts.min()), removed.shape[1] - 1)
    for group in removed:
        group[np.flatnonzero(group)[most:]] = False


_WEIGHTED = {
    "Convolution": _Kind(_convolves, _weighted_constants, _weighted),
    "InnerProduct": _Kind(_multiplies, _weighted_constants, _weighted),
}

_KINDS: dict[str, _Kind] = {
    **_WEIGHTED,
    **dict.fromkeys(("BatchNorm", "Scale", "Bias"), _AFFINE),
    **dict.fromkeys(("Dropout", "Split"), _by_channel(_unchanged)),
    **dict.fromkeys(("BNLL", "ELU", "Exp", "Log", "Swish", "Threshold"), _by_channel(_unknown)),
    "AbsVal": _by_channel(_abs),
    "Clip": _by_channel(_clip),
    "Concat": _Kind(_joins_channels, _joined_constants, _concat),
    "Eltwise": _Kind(_same_channels, _eltwise, _together),
    "Flatten": _Kind(_flattens, _flat_constants, _flatten),
    "PReLU": _by_channel(_prelu),
    "Pooling": _Kind(_one_top, _pooling, _together),
    "Power": _by_channel(_linear),
    "ReLU": _by_channel(_relu),
    "Sigmoid": _by_channel(_sigmoid),
    "TanH": _by_channel(_tanh),
}
