"""Networks in one spelling, so that two prototxts that mean the same compare equal, field by field.

What is one and the same to Caffe: a value that is the default and one that is not there; ``input:`` and a
layer of type Input; the sizes of a convolution that are not there and the usual ones; layers of other phases.
"""

from __future__ import annotations

from typing import Any

from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net

REPEATED_DEFAULTS = {"pad": 0, "stride": 1, "dilation": 1}
"""Of ConvolutionParameter, whose repeated fields cannot have a default in the schema."""


def normalised_net(text: str, dialect: Dialect, phase: str, where: str = "net") -> Any:
    """The network of ``text`` as it is in ``phase`` ("TRAIN" or "TEST"): parsed in full, in one spelling.

    Data layers keep their batch, their crop, their mirroring and whether a mean image is subtracted; what
    they read (paths; lists of images or an LMDB; its reading threads) is left out.
    """
    net = parse_net(text, dialect, where)
    assert not net.layers, f"{where}: in the old form (layers, not layer), which is not compared"
    result = messages(dialect).NetParameter(name=net.name)
    result.layer.extend(_input_layers(net))
    result.layer.extend(layer for layer in net.layer if _in_phase(layer, phase))
    for layer in result.layer:
        layer.ClearField("include")
        _normalise_data(layer)
        _normalise_convolution(layer)
        _normalise_batch_norm(layer, phase)
        _normalise_loss(layer)
        if layer.type == "Input":
            layer.name = layer.top[0]
        _drop_default_params(layer)
    return result


def first_difference(ours: Any, theirs: Any) -> str | None:
    """The first field in which two messages differ once defaults are filled in, or None."""
    mine, other = _values(ours), _values(theirs)
    for index in range(max(len(mine), len(other))):
        a = mine[index] if index < len(mine) else ("the end", "")
        b = other[index] if index < len(other) else ("the end", "")
        if a != b:
            return f"ours {' = '.join(a)}, published {' = '.join(b)}"
    return None


def _values(message: Any, path: str = "") -> list[tuple[str, str]]:
    """Path and value of every field that is not its default, in the order of the schema."""
    found: list[tuple[str, str]] = []
    for field, value in message.ListFields():
        repeated = hasattr(value, "append")
        for index, one in enumerate(value if repeated else [value]):
            where = f"{path}.{field.name}" + (f"[{index}]" if repeated else "")
            if field.message_type:
                name = getattr(one, "name", "") if field.name == "layer" else ""
                if repeated:
                    found.append((where, name))
                found += _values(one, where + (f" ({name})" if name else ""))
            elif repeated or one != field.default_value:
                found.append((where, repr(one)))
    return found


def _in_phase(layer: Any, phase: str) -> bool:
    for rule in (*layer.include, *layer.exclude):
        assert {field.name for field, _ in rule.ListFields()} <= {"phase"}, "only rules by phase are known"
    wanted = layer.DESCRIPTOR.fields_by_name["phase"].enum_type.values_by_name[phase].number
    if layer.include:
        return any(not rule.HasField("phase") or rule.phase == wanted for rule in layer.include)
    return not any(not rule.HasField("phase") or rule.phase == wanted for rule in layer.exclude)


def _input_layers(net: Any) -> list[Any]:
    """The blobs of ``input:`` as layers, which is what Caffe itself makes of them."""
    layers = []
    for index, name in enumerate(net.input):
        layer = type(net)().layer.add(name=name, type="Input", top=[name])
        old = net.input_dim[4 * index : 4 * index + 4]
        dims = net.input_shape[index].dim if net.input_shape else old
        layer.input_param.shape.add(dim=dims)
        layers.append(layer)
    return layers


def _normalise_data(layer: Any) -> None:
    """Any source of labelled images as a Data layer of which only the batch is told."""
    parameters = {"Data": "data_param", "ImageData": "image_data_param"}
    if layer.type not in parameters:
        return
    batch = getattr(layer, parameters[layer.type]).batch_size
    layer.ClearField(parameters[layer.type])
    layer.type = "Data"
    layer.data_param.batch_size = batch
    if layer.transform_param.mean_file:
        layer.transform_param.mean_file = "a mean image"


def _normalise_convolution(layer: Any) -> None:
    parameter = layer.convolution_param
    if not layer.HasField("convolution_param"):
        return
    for side in ("kernel", "stride", "pad"):
        assert not parameter.HasField(f"{side}_h"), f"{layer.name}: sizes for each side are not compared"
    for name, default in REPEATED_DEFAULTS.items():
        values = getattr(parameter, name)
        if not values:
            values.append(default)


def _normalise_batch_norm(layer: Any, phase: str) -> None:
    """Stock Caffe's statistics never learn, and are the stored ones in a test; Scale begins with 1, 0."""
    norm, scale = layer.batch_norm_param, layer.scale_param
    if layer.type == "BatchNorm" and all(param.lr_mult == 0 for param in layer.param):
        layer.ClearField("param")
    if layer.type == "BatchNorm" and phase == "TEST":
        norm.ClearField("moving_average_fraction")
        if norm.use_global_stats:
            norm.ClearField("use_global_stats")
    if layer.type == "Scale":
        for name, value in (("filler", 1), ("bias_filler", 0)):
            filler = getattr(scale, name)
            if scale.HasField(name) and (filler.type, filler.value) == ("constant", value):
                scale.ClearField(name)


def _normalise_loss(layer: Any) -> None:
    if layer.type == "SoftmaxWithLoss" and list(layer.loss_weight) == [1]:
        layer.ClearField("loss_weight")


def _drop_default_params(layer: Any) -> None:
    """What Caffe takes for a blob without a ``param``."""
    while layer.param and not _values(layer.param[-1]):
        del layer.param[-1]
