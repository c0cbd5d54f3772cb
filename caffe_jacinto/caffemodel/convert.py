"""Weight files converted from one dialect to the other: batch normalization and the input's bias.

Stock Caffe has a BatchNorm of three blobs (mean and variance times a factor, and the factor), then a Scale
of two. caffe-jacinto has one BatchNorm with ``scale_bias`` and five blobs: its statistics are plain averages,
its factor is 1. To shift the images, stock Caffe's networks have a Power layer, which has no weights, and the
fork's have a Bias layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.batch_norm import averages, lacks_statistics, require_statistics
from caffe_jacinto.caffemodel.net_file import (
    NetLayer,
    NewLayer,
    open_net,
    require_types,
    write_net,
)
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.graph import nodes_of, scale_after
from caffe_jacinto.prototxt.dialects import Dialect, scale_name
from caffe_jacinto.prototxt.schema import translated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


MOST_CHANNELS = 1 << 16
"""More than any image has: a file that claims more is damaged."""


def convert(source: Path, target: Path, to: Dialect, network: Any | None = None) -> list[str]:
    """Write the weights of ``source``, which is in the other dialect, to ``target`` in the dialect ``to``.

    ``network``: that of an HDF5 file, as for `open_net`. Returns what was done, a line for each kind of
    change. All other layers are copied byte for byte.

    Raises:
        UserError: the file is not in the other dialect, its layers cannot be expressed in ``to``, or its
            batch norms have no statistics.
    """
    origin = Dialect.BVLC if to is Dialect.CAFFE_JACINTO else Dialect.CAFFE_JACINTO
    with open_net(source, origin, network) as (name, layers):
        require_types(source, layers)
        _check_origin(source, layers, to)
        require_statistics(
            source,
            {
                layer.name: [layer.values(index) for index in range(3)]
                for layer in layers
                if norm_lacks_statistics(layer, origin)
            },
        )
        done: dict[str, int] = {}
        translate = as_fork if to is Dialect.CAFFE_JACINTO else as_stock
        write_net(target, name, translate(source, layers, done), to)
    return [f"{what}: {count}" for what, count in done.items()]


def _check_origin(source: Path, layers: list[NetLayer], to: Dialect) -> None:
    """Refuse a file that is already in the dialect ``to``."""
    own = 5 if to is Dialect.CAFFE_JACINTO else 3
    for layer in layers:
        if (
            layer.type == "BatchNorm"
            and len(layer.blobs) == own
            and _is_of(layer, to)
            # NVCaffe wrote plain averages beside a factor of 0.
            and not norm_lacks_statistics(layer, to)
        ):
            raise UserError(
                f"{source}: layer {layer.name} is a batch norm of {own} blobs, the form of {to.value}; "
                "the file needs no conversion, or --from and --to are the wrong way round"
            )


def _is_of(layer: NetLayer, to: Dialect) -> bool:
    return to is Dialect.CAFFE_JACINTO or not getattr(layer.header.batch_norm_param, "scale_bias", False)


def as_fork(source: Path, layers: list[NetLayer], done: dict[str, int]) -> Iterator[NewLayer]:
    """Stock Caffe's layers as the fork's; ``done`` counts the changes by their description.

    Raises:
        UserError: the blobs of a batch norm and its scale do not fit, or a shift's channels are not known.
    """
    scale_of = _scales(layers)
    folded = {id(scale) for scale in scale_of.values()}
    for at, layer in enumerate(layers):
        if id(layer) in folded:
            continue
        if layer.type == "BatchNorm" and len(layer.blobs) == 3:
            _check_norm(source, layer)
            _count(done, "batch norms merged with their scales")
            yield _folded(source, layer, scale_of.get(at))
        elif shift := _shift_of(layer):
            channels = _channels_of(layer.header.top[0], layers[at + 1 :])
            if channels is None or channels > MOST_CHANNELS:
                raise UserError(
                    f"{source}: layer {layer.name}: the file does not say how many channels it shifts"
                )
            _count(done, "input shifts made biases")
            yield _as_bias(layer, shift, channels)
        else:
            yield _copied(layer, Dialect.CAFFE_JACINTO)


def _folded(source: Path, norm: NetLayer, scale: NetLayer | None) -> NewLayer:
    import numpy as np

    mean, variance = norm_averages(norm)
    header, _ = translated(norm.header, Dialect.CAFFE_JACINTO)
    one = np.ones(1, np.float32)
    if scale is None:
        return NewLayer(header, [mean, variance, one])
    header.batch_norm_param.scale_bias = True
    header.top[:] = scale.header.top
    gain = scale.values(0).reshape(-1)
    shift = scale.values(1).reshape(-1) if len(scale.blobs) > 1 else np.zeros_like(gain)
    if gain.shape != mean.shape:
        raise UserError(
            f"{source}: layer {scale.name} scales {gain.size} channels, and {norm.name} has {mean.size}"
        )
    return NewLayer(header, [mean, variance, one, gain, shift])


def _check_norm(source: Path, norm: NetLayer) -> None:
    """Refuse a batch norm whose blobs are not one number per channel, and the factor."""
    counts = [prod(blob.shape) for blob in norm.blobs]
    channels = counts[0]
    if counts not in ([channels, channels, 1], [channels, channels, 1, channels, channels]) or not channels:
        raise UserError(
            f"{source}: layer {norm.name}: a batch norm with blobs of {', '.join(map(str, counts))} numbers; "
            "the file is damaged or was written by another Caffe"
        )


def norm_averages(norm: NetLayer) -> tuple[Values, Values]:
    """Mean and variance of a BatchNorm in stock Caffe's form, by channel."""
    mean, variance, factor = (norm.values(index).reshape(-1) for index in range(3))
    return averages(mean, variance, factor[0])


def norm_lacks_statistics(layer: NetLayer, dialect: Dialect) -> bool:
    """Whether ``layer``, of a file in the ``dialect``, is a BatchNorm that has not seen an image."""
    if layer.type != "BatchNorm" or len(layer.blobs) < 3:
        return False
    blobs = [layer.values(index) for index in range(3)]
    return lacks_statistics(blobs, plain=dialect is Dialect.CAFFE_JACINTO)


def _scales(layers: list[NetLayer]) -> dict[int, NetLayer]:
    """The Scale layer that goes with a BatchNorm, by the BatchNorm's index."""
    nodes = nodes_of(layer.header for layer in layers)
    pairs = {at: scale_after(nodes, at) for at, node in enumerate(nodes) if node.type == "BatchNorm"}
    return {at: layers[scale] for at, scale in pairs.items() if scale is not None and layers[scale].blobs}


def as_stock(source: Path, layers: list[NetLayer], done: dict[str, int]) -> Iterator[NewLayer]:
    """The fork's layers as stock Caffe's."""
    import numpy as np

    for layer in layers:
        if layer.type == "BatchNorm" and len(layer.blobs) == 5:
            _check_norm(source, layer)
            _count(done, "batch norms split from their scales")
            # The fork ignores its factor; old files store the channels as 1xCx1x1.
            mean, variance, gain, shift = (layer.values(index).reshape(-1) for index in (0, 1, 3, 4))
            header, _ = translated(layer.header, Dialect.BVLC)
            yield NewLayer(header, [mean, variance, np.ones(1, np.float32)])
            scale = type(header)(name=scale_name(layer.name), type="Scale")
            scale.bottom.append(header.top[0] if header.top else layer.name)
            scale.top.append(scale.bottom[0])
            scale.scale_param.bias_term = True
            yield NewLayer(scale, [gain, shift])
        elif layer.type == "BatchNorm" and layer.blobs:
            _check_norm(source, layer)
            mean, variance = (layer.values(index).reshape(-1) for index in (0, 1))
            header, _ = translated(layer.header, Dialect.BVLC)
            yield NewLayer(header, [mean, variance, np.ones(1, np.float32)])
        elif layer.type == "Bias" and layer.blobs and _is_uniform(values := layer.values(0)):
            _count(done, "input biases made shifts")
            header, _ = translated(layer.header, Dialect.BVLC)
            header.type = "Power"
            header.ClearField("bias_param")
            header.ClearField("param")
            header.power_param.shift = float(values.flat[0])
            yield NewLayer(header, [])
        else:
            yield _copied(layer, Dialect.BVLC)


def _is_uniform(values: Values) -> bool:
    return bool(values.size and (values == values.flat[0]).all())


def _shift_of(layer: NetLayer) -> float:
    """What a Power layer adds, if it does nothing else; otherwise 0."""
    parameters = layer.header.power_param
    only_shifts = layer.type == "Power" and parameters.power == 1 and parameters.scale == 1
    return float(parameters.shift) if only_shifts and layer.header.top else 0.0


def _as_bias(layer: NetLayer, shift: float, channels: int) -> NewLayer:
    import numpy as np

    header, _ = translated(layer.header, Dialect.CAFFE_JACINTO)
    header.type = "Bias"
    header.ClearField("power_param")
    header.ClearField("param")
    header.param.add(lr_mult=0, decay_mult=0)
    header.bias_param.filler.type = "constant"
    header.bias_param.filler.value = shift
    return NewLayer(header, [np.full(channels, shift, np.float32)])


def _channels_of(blob: str, layers: list[NetLayer]) -> int | None:
    """The channels of a blob, by the first convolution that reads it."""
    for layer in layers:
        reads = blob in layer.header.bottom and layer.type == "Convolution" and layer.blobs
        if reads and len(layer.blobs[0].shape) > 1:
            return int(layer.blobs[0].shape[1] * layer.header.convolution_param.group)
    return None


def _copied(layer: NetLayer, to: Dialect) -> NewLayer:
    return NewLayer(translated(layer.header, to)[0], [(layer.view, blob) for blob in layer.blobs])


def _count(done: dict[str, int], what: str) -> None:
    done[what] = done.get(what, 0) + 1
