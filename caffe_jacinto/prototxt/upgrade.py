"""Old forms of networks and solvers brought up to date, as Caffe does when it reads a file.

The three ages of a layer are V0 (``layers { layer { type: "conv" } }``), V1
(``layers { type: CONVOLUTION }``) and today's ``layer { type: "Convolution" }``. Beside them are the older
forms of a network's inputs (``input_dim``), of the transformations in V1 data layers, of batch norms with
three ``param``, and of a solver's type. Rules: src/caffe/util/upgrade_proto.cpp of Caffe 1.0.

Messages are of either dialect and are changed in place. What Caffe stops at is a `UserError`; what it leaves
out with a warning is returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.places import place_in
from caffe_jacinto.prototxt.tree import Message, Place

SOLVER_TYPES = {
    "SGD": "SGD",
    "NESTEROV": "Nesterov",
    "ADAGRAD": "AdaGrad",
    "RMSPROP": "RMSProp",
    "ADADELTA": "AdaDelta",
    "ADAM": "Adam",
}
"""SolverParameter.type, by the name in its older form, the enumeration ``solver_type``."""

V1_TYPES = {
    **{"NONE": "", "ABSVAL": "AbsVal", "ACCURACY": "Accuracy", "ARGMAX": "ArgMax", "BNLL": "BNLL"},
    **{"CONCAT": "Concat", "CONTRASTIVE_LOSS": "ContrastiveLoss", "CONVOLUTION": "Convolution"},
    **{"DATA": "Data", "DECONVOLUTION": "Deconvolution", "DROPOUT": "Dropout", "DUMMY_DATA": "DummyData"},
    **{"EUCLIDEAN_LOSS": "EuclideanLoss", "ELTWISE": "Eltwise", "EXP": "Exp", "FLATTEN": "Flatten"},
    **{"HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output", "HINGE_LOSS": "HingeLoss", "IM2COL": "Im2col"},
    **{"IMAGE_DATA": "ImageData", "INFOGAIN_LOSS": "InfogainLoss", "INNER_PRODUCT": "InnerProduct"},
    **{"LRN": "LRN", "MEMORY_DATA": "MemoryData", "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss"},
    **{"MVN": "MVN", "POOLING": "Pooling", "POWER": "Power", "RELU": "ReLU", "SIGMOID": "Sigmoid"},
    **{"SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss", "SILENCE": "Silence", "SLICE": "Slice"},
    **{"SOFTMAX": "Softmax", "SOFTMAX_LOSS": "SoftmaxWithLoss", "SPLIT": "Split", "TANH": "TanH"},
    **{"THRESHOLD": "Threshold", "WINDOW_DATA": "WindowData"},
    # of forks: forks.proto
    **{"BN": "BN", "INTERP": "Interp", "UPSAMPLE": "Upsample"},
}
"""LayerParameter.type, by the name in V1LayerParameter.LayerType."""

_V0_TYPES = {
    **{"accuracy": "ACCURACY", "bnll": "BNLL", "concat": "CONCAT", "conv": "CONVOLUTION", "data": "DATA"},
    **{"dropout": "DROPOUT", "euclidean_loss": "EUCLIDEAN_LOSS", "flatten": "FLATTEN"},
    **{"hdf5_data": "HDF5_DATA", "hdf5_output": "HDF5_OUTPUT", "im2col": "IM2COL", "images": "IMAGE_DATA"},
    **{"infogain_loss": "INFOGAIN_LOSS", "innerproduct": "INNER_PRODUCT", "lrn": "LRN"},
    **{"multinomial_logistic_loss": "MULTINOMIAL_LOGISTIC_LOSS", "pool": "POOLING", "relu": "RELU"},
    **{"sigmoid": "SIGMOID", "softmax": "SOFTMAX", "softmax_loss": "SOFTMAX_LOSS", "split": "SPLIT"},
    **{"tanh": "TANH", "window_data": "WINDOW_DATA"},
}
"""V1LayerParameter.LayerType, by V0LayerParameter.type."""

_WEIGHTED = {"conv": "convolution_param", "innerproduct": "inner_product_param"}
_WINDOWS = {"conv": "convolution_param", "pool": "pooling_param"}
_LRN = {"lrn": "lrn_param"}
_READERS = {
    "data": "data_param",
    "hdf5_data": "hdf5_data_param",
    "images": "image_data_param",
    "window_data": "window_data_param",
}
_IMAGES = {"images": "image_data_param"}
_DETECTION = {"window_data": "window_data_param"}

_V0_FIELDS: dict[str, tuple[dict[str, str], str]] = {
    "num_output": (_WEIGHTED, "num_output"),
    "biasterm": (_WEIGHTED, "bias_term"),
    "weight_filler": (_WEIGHTED, "weight_filler"),
    "bias_filler": (_WEIGHTED, "bias_filler"),
    "pad": (_WINDOWS, "pad"),
    "kernelsize": (_WINDOWS, "kernel_size"),
    "group": ({"conv": "convolution_param"}, "group"),
    "stride": (_WINDOWS, "stride"),
    "pool": ({"pool": "pooling_param"}, "pool"),
    "dropout_ratio": ({"dropout": "dropout_param"}, "dropout_ratio"),
    "local_size": (_LRN, "local_size"),
    "alpha": (_LRN, "alpha"),
    "beta": (_LRN, "beta"),
    "k": (_LRN, "k"),
    "source": ({**_READERS, "infogain_loss": "infogain_loss_param"}, "source"),
    "batchsize": (_READERS, "batch_size"),
    "rand_skip": ({"data": "data_param", "images": "image_data_param"}, "rand_skip"),
    "shuffle_images": (_IMAGES, "shuffle"),
    "new_height": (_IMAGES, "new_height"),
    "new_width": (_IMAGES, "new_width"),
    "concat_dim": ({"concat": "concat_param"}, "concat_dim"),
    "det_fg_threshold": (_DETECTION, "fg_threshold"),
    "det_bg_threshold": (_DETECTION, "bg_threshold"),
    "det_fg_fraction": (_DETECTION, "fg_fraction"),
    "det_context_pad": (_DETECTION, "context_pad"),
    "det_crop_mode": (_DETECTION, "crop_mode"),
}
"""Where V0's settings stand in V1: the message, by the layer's V0 type, and the field in it."""

_V0_TRANSFORMATIONS = {
    "scale": "scale",
    "meanfile": "mean_file",
    "cropsize": "crop_size",
    "mirror": "mirror",
}
_TRANSFORMATIONS = ("scale", "mean_file", "crop_size", "mirror")
_TRANSFORMED = {"DATA": "data_param", "IMAGE_DATA": "image_data_param", "WINDOW_DATA": "window_data_param"}
"""The V1 data layers whose own message could have transformations."""

_AXES = 4
"""``input_dim`` has num, channels, height and width of each input."""


class _File(NamedTuple):
    """What is upgraded: the name of its file, and its text."""

    where: str
    text: str

    def place(self, layer: str, field: str = "") -> str:
        """The file, with the line if it is known."""
        return place_in(self.where, layer, field, self.text)


def upgrade_net(net: Any, where: str, text: str = "") -> list[str]:
    """Bring a NetParameter message to today's form; ``where`` names its file in messages.

    ``text`` is what it was parsed from, if it was: messages then have the line. Returns what could not be
    kept, a line for each setting.

    Raises:
        UserError: Caffe would stop at it: ``layer`` and ``layers`` together, a V0 type that is unknown, a
            padding layer that nothing can take, an input without its dimensions.
    """
    remarks: list[str] = []
    file = _File(where, text)
    if any(layer.HasField("layer") for layer in net.layers):
        remarks += _upgrade_v0(net, file)
    if any(_has_transformations(layer) for layer in net.layers):
        _upgrade_transformations(net)
    if net.layers:
        _upgrade_v1(net, file)
    if net.input:
        _upgrade_inputs(net, file)
    for layer in net.layer:
        # Their three blobs are statistics, which no learning rate changes.
        if layer.type == "BatchNorm" and len(layer.param) == 3:
            for parameter in layer.param:
                parameter.lr_mult = parameter.decay_mult = 0
    return remarks


def upgrade_solver(solver: Any, where: str, text: str = "") -> list[str]:
    """Bring a SolverParameter message to today's form, with the networks inside it; as `upgrade_net`.

    Raises:
        UserError: it has ``solver_type`` and ``type``; as `upgrade_net`.
    """
    if solver.HasField("solver_type"):
        old = solver.DESCRIPTOR.fields_by_name["solver_type"].enum_type.values_by_number[solver.solver_type]
        if solver.HasField("type"):
            raise UserError(
                f"{_File(where, text).place('', 'solver_type')}: has both type and solver_type, its older "
                f"form; remove solver_type: {old.name}"
            )
        solver.type = SOLVER_TYPES[old.name]
        solver.ClearField("solver_type")
    inside = [solver.net_param] if solver.HasField("net_param") else []
    inside += [solver.train_net_param] if solver.HasField("train_net_param") else []
    return [remark for net in (*inside, *solver.test_net_param) for remark in upgrade_net(net, where, text)]


def _upgrade_v0(net: Any, file: _File) -> list[str]:
    """V0 layers to V1; of the network's own settings, the form keeps these."""
    remarks: list[str] = []
    old = type(net)()
    old.CopyFrom(net)
    net.Clear()
    if old.HasField("name"):
        net.name = old.name
    for layer in _without_padding(old, file):
        if not layer.HasField("layer"):
            raise UserError(
                f"{file.place(layer.name)}: layers {layer.name!r} has settings of its own and others have "
                "them in layers { layer { } }; write all of them in one form"
            )
        remarks += _upgrade_v0_layer(layer, net.layers.add(), file)
    net.input.extend(old.input)
    net.input_dim.extend(old.input_dim)
    if old.HasField("force_backward"):
        net.force_backward = old.force_backward
    return remarks


def _without_padding(net: Any, file: _File) -> list[Any]:
    """V0 layers without padding layers, each of which becomes the ``pad`` of the layer that reads it."""
    kept: list[Any] = []
    writers: dict[str, Any] = dict.fromkeys(net.input)
    for layer in net.layers:
        old = type(layer)()
        old.CopyFrom(layer)  # a layer that is kept is changed; writers keeps the original ones
        padding = layer.layer.type == "padding"
        if not padding:
            kept.append(old)
        for index, bottom in enumerate(layer.bottom):
            if bottom not in writers:
                place = file.place(layer.layer.name)
                raise UserError(f"{place}: layer {layer.layer.name!r} reads {bottom!r}, which nothing makes")
            source = writers[bottom]
            if source is None or source.layer.type != "padding":
                continue
            counts = [len(blobs) for blobs in (layer.bottom, source.bottom, source.top)]
            if layer.layer.type not in _WINDOWS or counts != [1, 1, 1]:
                raise UserError(
                    f"{file.place(layer.layer.name)}: layer {layer.layer.name!r} reads the padding layer "
                    f"{source.layer.name!r}, which only a conv or pool with one bottom can"
                )
            old.layer.pad = source.layer.pad
            old.bottom[index] = source.bottom[0]
        writers.update(dict.fromkeys(layer.top, layer))
    return kept


def _upgrade_v0_layer(old: Any, new: Any, file: _File) -> list[str]:
    settings, kind = old.layer, old.layer.type
    new.bottom.extend(old.bottom)
    new.top.extend(old.top)
    if settings.HasField("name"):
        new.name = settings.name
    if settings.HasField("type"):
        if kind not in _V0_TYPES:
            raise UserError(
                f"{file.place(settings.name, 'type')}: layer {settings.name!r}: no V0 layer has the type "
                f"{kind!r}; known: {', '.join(_V0_TYPES)}, padding"
            )
        new.type = _V0_TYPES[kind]
    new.blobs.extend(settings.blobs)
    new.blobs_lr.extend(settings.blobs_lr)
    new.weight_decay.extend(settings.weight_decay)
    remarks = []
    for descriptor, value in settings.ListFields():
        name = descriptor.name
        if name in _V0_TRANSFORMATIONS:
            setattr(new.transform_param, _V0_TRANSFORMATIONS[name], value)
        elif name == "hdf5_output_param" and kind == "hdf5_output":
            new.hdf5_output_param.CopyFrom(value)
        elif name in _V0_FIELDS and kind in _V0_FIELDS[name][0]:
            messages, field = _V0_FIELDS[name]
            _set(getattr(new, messages[kind]), field, value)
        elif name not in ("name", "type", "blobs", "blobs_lr", "weight_decay"):
            place = file.place(settings.name, name)
            remarks.append(f"{place}: layer {settings.name!r}: {name} has no meaning for {kind!r}; left out")
    return remarks


def _set(message: Any, field: str, value: Any) -> None:
    """Set a field: one number, the only one of several, or a message. Enumerations have equal numbers."""
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    if descriptor.message_type is not None:
        getattr(message, field).CopyFrom(value)
    elif hasattr(getattr(message, field), "append"):
        getattr(message, field).append(value)
    else:
        setattr(message, field, value)


def _v1_type(layer: Any) -> str:
    return str(layer.DESCRIPTOR.fields_by_name["type"].enum_type.values_by_number[layer.type].name)


def _has_transformations(layer: Any) -> bool:
    parameter = _TRANSFORMED.get(_v1_type(layer))
    return parameter is not None and any(
        getattr(layer, parameter).HasField(name) for name in _TRANSFORMATIONS
    )


def _upgrade_transformations(net: Any) -> None:
    for layer in net.layers:
        if _v1_type(layer) not in _TRANSFORMED:
            continue
        parameter = getattr(layer, _TRANSFORMED[_v1_type(layer)])
        layer.transform_param.SetInParent()
        parameter.SetInParent()
        for name in _TRANSFORMATIONS:
            if parameter.HasField(name):
                setattr(layer.transform_param, name, getattr(parameter, name))
                parameter.ClearField(name)


def _upgrade_v1(net: Any, file: _File) -> None:
    if net.layer:
        raise UserError(
            f"{file.place(net.layers[0].name)}: has both layer and layers, its older form; Caffe reads "
            f'either: write {net.layers[0].name!r} and the like as layer {{ type: "..." }}'
        )
    for old in net.layers:
        _upgrade_v1_layer(old, net.layer.add())
    net.ClearField("layers")


def _upgrade_v1_layer(old: Any, new: Any) -> None:
    """Fields of V1 have today's names and meanings, but for those of its ``param`` and its type."""
    for descriptor, value in old.ListFields():
        name = descriptor.name
        if name == "type":
            new.type = V1_TYPES[_v1_type(old)]
        elif name in _V1_PARAM_FIELDS:
            while len(new.param) < len(value):
                new.param.add()
            for parameter, setting in zip(new.param, value, strict=False):
                setattr(parameter, _V1_PARAM_FIELDS[name], setting)
        elif hasattr(value, "append"):
            getattr(new, name).extend(value)
        elif descriptor.message_type is not None:
            getattr(new, name).CopyFrom(value)
        else:
            setattr(new, name, value)


_V1_PARAM_FIELDS = {
    "param": "name",
    "blob_share_mode": "share_mode",
    "blobs_lr": "lr_mult",
    "weight_decay": "decay_mult",
}
"""ParamSpec's fields, by the V1 field with one value for each blob."""


def _upgrade_inputs(net: Any, file: _File) -> None:
    """``input`` with its shapes to a layer before all others; without shapes it says nothing."""
    shapes = [list(shape.dim) for shape in net.input_shape]
    dims = list(net.input_dim)
    if not shapes:
        shapes = [dims[start : start + _AXES] for start in range(0, len(dims), _AXES)]
    if shapes:
        whole = len(shapes) >= len(net.input) and (net.input_shape or not len(dims) % _AXES)
        if not whole:
            raise UserError(
                f"{file.place('', 'input')}: {len(net.input)} of input with {len(net.input_shape)} of "
                f"input_shape and {len(dims)} of input_dim; give each input its input_shape, or {_AXES} of "
                "input_dim"
            )
        layers = [type(layer).FromString(layer.SerializeToString()) for layer in net.layer]
        net.ClearField("layer")
        layer = net.layer.add(name="input", type="Input")
        layer.top.extend(net.input)
        for shape in shapes[: len(net.input)]:
            layer.input_param.shape.add().dim.extend(shape)
        net.layer.extend(layers)
    for field in ("input", "input_shape", "input_dim"):
        net.ClearField(field)


def keep_lines(today: Message, older: Message) -> None:
    """Give the layers of ``today`` and their fields the lines that they have in ``older``, the same network.

    A field that has another name there gets its layer's line.
    """
    layers = [*older.messages("layers"), *older.messages("layer")]
    at = 0
    for layer in today.messages("layer"):
        name = layer.string("name")
        found = next((n for n in range(at, len(layers)) if name in _names(layers[n])), None)
        if found is None:
            continue
        at = found + 1
        lines: dict[str, list[int]] = {}
        for field, line in _lines(layers[found]):
            lines.setdefault(field, []).append(line)
        _set_lines(layer, layers[found].line, lines, Counter())


def _names(layer: Message) -> set[str]:
    return {layer.string("name"), layer.message("layer").string("name")}


def _lines(message: Message) -> Iterator[tuple[str, int]]:
    for (name, value), place in zip(message.fields, message.places, strict=True):
        yield name, place.line
        if isinstance(value, Message):
            yield from _lines(value)


def _set_lines(message: Message, line: int, lines: dict[str, list[int]], seen: Counter[str]) -> None:
    own = message.place or Place(line, 0, 0, 0)
    message.place = own._replace(line=line)
    places = message.places or [Place(line, 0, 0, 0)] * len(message.fields)
    message.places = []
    for (name, value), place in zip(message.fields, places, strict=True):
        known = lines.get(name, [line])
        here = known[min(seen[name], len(known) - 1)]
        seen[name] += 1
        message.places.append(place._replace(line=here))
        if isinstance(value, Message):
            _set_lines(value, here, lines, seen)
