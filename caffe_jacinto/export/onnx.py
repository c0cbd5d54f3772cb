"""A deploy network and its weights as an ONNX model, made with onnx's own helpers.

The model takes batches of any size. Height and width are those of the deploy network: Caffe's pooling rounds
its sizes up, and in ONNX that takes explicit padding. Weights keep their layout and their zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.stock_net import StockLayer, StockNet, stock_net
from caffe_jacinto.netspec.graph import nodes_of, scale_after
from caffe_jacinto.netspec.layer_types import geometry
from caffe_jacinto.netspec.shapes import FullShape as Shape
from caffe_jacinto.netspec.shapes import LayerShapes, layer_shapes
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

OPSET = 13
"""The oldest version of ONNX's operators that suffices: importers for embedded processors lag behind."""

IR_VERSION = 7
"""The file format that came with opset 13."""

REQUIREMENT = "onnx>=1.15"
"""The package to install; the extra `onnx` in pyproject.toml."""

_BATCH = "batch"
_MOST_NUMBERS = 2**31 - 1
"""In one blob, which Caffe counts in an int."""


def export_onnx(
    deploy_text: str,
    where: str,
    dialect: Dialect | None,
    weights: Path,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of a ``.onnx`` file: the deploy network ``deploy_text`` with the weights of a file.

    Inputs and outputs have the names of Caffe's blobs. ``where`` names the text in messages. Where
    ``dialect`` is None, the text may be in either. ``metadata`` becomes the model's ``metadata_props``.

    Raises:
        UserError: as `stock_net`; a layer or field cannot be exported (it is named); onnx is missing.
    """
    try:
        import onnx
    except ImportError:
        raise UserError(
            f"writing ONNX needs the Python package onnx: {sys.executable} -m pip install '{REQUIREMENT}'"
        ) from None
    net = stock_net(deploy_text, where, dialect, weights)
    model = _Graph(net, where).model()
    onnx.helper.set_model_props(model, dict(metadata or {}))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{where}: the ONNX model would not be valid: {reason}; correct the network"
        ) from error
    return bytes(model.SerializeToString())


class _Graph:
    """Builds the ONNX graph, layer by layer in the network's order."""

    def __init__(self, net: StockNet, where: str) -> None:
        self.where = where
        self.net = net
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.layer_graph = nodes_of(layer.message for layer in net.layers)
        self.inputs: dict[str, Shape] = {}
        self.current: dict[str, str] = {}
        """The ONNX value that each of Caffe's blobs holds at this point."""

        self.unread: dict[str, Shape] = {}
        """The values that no layer has read so far: in the end, the outputs."""

        self.taken: set[str] = set()
        self._name_free_batch()
        self.shapes = layer_shapes(tree.parse(net.text(), where))

    def model(self) -> Any:
        from onnx import TensorProto, helper

        self._declare_inputs()
        merged: set[str] = set()
        for at, (layer, shaped) in enumerate(zip(self.net.layers, self.shapes, strict=True)):
            if layer.name in merged or layer.type == "Input":
                continue
            scale = self._scale_after(at) if layer.type == "BatchNorm" else None
            if scale is not None:
                merged.add(scale.name)
            self._add_layer(layer, shaped, scale)

        def info(name: str, shape: Shape) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [_BATCH, *shape[1:]])

        graph = helper.make_graph(
            self.nodes,
            self.net.message.name or Path(self.where).stem,
            [info(name, shape) for name, shape in self.inputs.items()],
            [info(name, shape) for name, shape in self.unread.items()],
            self.initializers,
        )
        return helper.make_model(
            graph,
            producer_name="caffe_jacinto",
            producer_version=__version__,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )

    def _name_free_batch(self) -> None:
        """Let Reshape layers take the batch of their input, so that the model takes any batch."""
        net = self.net.message
        batch = net.input_shape[0].dim[0] if net.input_shape else (net.input_dim or [0])[0]
        for layer in self.net.layers:
            if layer.type == "Input" and layer.message.input_param.shape:
                batch = layer.message.input_param.shape[0].dim[0]
            parameters = layer.message.reshape_param
            if layer.type == "Reshape" and parameters.axis == 0 and parameters.shape.dim[:1] == [batch]:
                parameters.shape.dim[0] = 0

    def _declare_inputs(self) -> None:
        net = self.net.message
        dims = [tuple(shape.dim) for shape in net.input_shape]
        if not dims:
            dims = [tuple(net.input_dim[at : at + 4]) for at in range(0, len(net.input_dim), 4)]
        if len(dims) != len(net.input):
            raise UserError(
                f"{self.where}: {len(net.input)} inputs with {len(dims)} shapes; give each its shape"
            )
        shapes: dict[str, Shape | None] = dict(zip(net.input, dims, strict=True))
        for layer, shaped in zip(self.net.layers, self.shapes, strict=True):
            if layer.type == "Input":
                shapes.update(zip(layer.message.top, shaped.tops, strict=True))
        for name, shape in shapes.items():
            if not shape or min(shape) < 1:
                raise UserError(f"{self.where}: the shape of the input {name} is not known; specify it")
            self.inputs[name] = shape
            self.current[name] = name
            self.taken.add(name)

    def _scale_after(self, at: int) -> StockLayer | None:
        """The Scale that goes with a BatchNorm, where one ONNX node can do both."""
        found = scale_after(self.layer_graph, at)
        scale = self.net.layers[found] if found is not None else None
        return scale if scale is not None and _channelwise(scale.message.scale_param) else None

    def _add_layer(self, layer: StockLayer, shaped: LayerShapes, scale: StockLayer | None) -> None:
        if layer.type not in _LAYERS:
            raise UserError(
                f"{self.where}: layer {layer.name}: the type {layer.type} cannot be exported; "
                f"these can: {', '.join(sorted(_LAYERS))}"
            )
        for blob, shape in zip(layer.message.bottom, shaped.bottoms, strict=True):
            if blob not in self.current:
                raise UserError(
                    f"{self.where}: layer {layer.name} reads {blob}, which no layer before it writes"
                )
            if shape is None:
                raise UserError(
                    f"{self.where}: layer {layer.name} ({layer.type}): the shape of {blob} is not known"
                )
        several = layer.type in ("Eltwise", "Concat")
        if len(layer.message.top) != 1 or (len(layer.message.bottom) != 1 and not several):
            self.refuse(layer, "bottom and top", "only one input and one output")
        if shaped.tops[0] is None:
            self.refuse(layer, "input", "its size does not fit")
        if prod(shaped.tops[0] or ()) > _MOST_NUMBERS:
            self.refuse(layer, "output", "it is larger than a blob of Caffe's can be")
        bottoms = [self.current[blob] for blob in layer.message.bottom]
        for bottom in bottoms:
            self.unread.pop(bottom, None)
        writer = scale or layer
        top = writer.message.top[0]
        output = self._value_name(top, writer)
        _LAYERS[layer.type](self, layer, shaped, bottoms, output, *([scale] if scale else []))
        self.current[top] = output
        self.unread[output] = shaped.tops[0] or ()

    def _value_name(self, top: str, layer: StockLayer) -> str:
        """The blob's own name for its final value; values before that are named after the layer, too."""
        last = [other for other in self.net.layers if top in other.message.top][-1]
        name = top if last is layer and top not in self.taken else f"{top}:{layer.name}"
        while name in self.taken:
            name += "'"
        self.taken.add(name)
        return name

    def refuse(self, layer: StockLayer, field: str, can: str) -> None:
        raise UserError(
            f"{self.where}: layer {layer.name} ({layer.type}): its {field} cannot be exported: {can}"
        )

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        """Add a node, named after its output."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))

    def constant(self, name: str, values: Any) -> str:
        """Add an initializer; returns its name."""
        import numpy as np
        from onnx import numpy_helper

        while name in self.taken:
            name += "'"
        self.taken.add(name)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def number(self, layer: StockLayer, name: str, value: float) -> str:
        """An initializer of one number."""
        import numpy as np

        return self.constant(f"{layer.name}:{name}", np.array(value, np.float32))

    def inner(self, output: str, step: str) -> str:
        """A name for a value between two nodes of one layer."""
        name = f"{output}:{step}"
        while name in self.taken:
            name += "'"
        self.taken.add(name)
        return name


def _channelwise(parameters: Any) -> bool:
    return bool(parameters.axis == 1 and parameters.num_axes == 1)


def _shape(shaped: LayerShapes) -> Shape:
    return shaped.bottoms[0] or ()


def _by_channel(values: Values, rank: int) -> Values:
    """One number per channel, in a shape that broadcasts over a blob of ``rank`` axes."""
    return values.reshape(-1, *[1] * (rank - 2))


def _convolution(
    graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str
) -> None:
    parameters = layer.message.convolution_param
    if parameters.axis != 1 or len(_shape(shaped)) != 4:
        graph.refuse(layer, "convolution_param.axis", "only images, of four axes")
    kernel, strides, pads, dilations = geometry(shaped.layer)
    names = ("weights", "bias")
    blobs = [
        graph.constant(f"{layer.name}:{name}", blob) for name, blob in zip(names, layer.blobs, strict=False)
    ]
    graph.node(
        "Conv",
        [*bottoms, *blobs],
        output,
        kernel_shape=list(kernel),
        strides=list(strides),
        pads=[*pads, *pads],
        dilations=list(dilations),
        group=parameters.group,
    )


def _inner_product(
    graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str
) -> None:
    parameters = layer.message.inner_product_param
    if parameters.axis != 1:
        graph.refuse(layer, "inner_product_param.axis", "only 1")
    flat = bottoms[0]
    if len(_shape(shaped)) != 2:
        flat = graph.inner(output, "flat")
        graph.node("Flatten", bottoms, flat, axis=1)
    names = ("weights", "bias")
    blobs = [
        graph.constant(f"{layer.name}:{name}", blob) for name, blob in zip(names, layer.blobs, strict=False)
    ]
    graph.node("Gemm", [flat, *blobs], output, transB=0 if parameters.transpose else 1)


def _batch_norm(
    graph: _Graph,
    layer: StockLayer,
    shaped: LayerShapes,
    bottoms: list[str],
    output: str,
    scale: StockLayer | None = None,
) -> None:
    import numpy as np

    mean, variance = layer.blobs[:2]
    gain = scale.blobs[0] if scale else np.ones_like(mean)
    shift = scale.blobs[1] if scale and len(scale.blobs) > 1 else np.zeros_like(mean)
    values = {"scale": gain, "bias": shift, "mean": mean, "variance": variance}
    names = [graph.constant(f"{layer.name}:{name}", blob) for name, blob in values.items()]
    epsilon = float(layer.message.batch_norm_param.eps)
    graph.node("BatchNormalization", [*bottoms, *names], output, epsilon=epsilon)


def _scale(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    if not _channelwise(layer.message.scale_param):
        graph.refuse(layer, "scale_param.axis and num_axes", "only one number per channel")
    gain, *shifts = (_by_channel(blob, len(_shape(shaped))) for blob in layer.blobs)
    scaled = graph.inner(output, "scaled") if shifts else output
    graph.node("Mul", [*bottoms, graph.constant(f"{layer.name}:scale", gain)], scaled)
    if shifts:
        graph.node("Add", [scaled, graph.constant(f"{layer.name}:bias", shifts[0])], output)


def _bias(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    if not _channelwise(layer.message.bias_param):
        graph.refuse(layer, "bias_param.axis and num_axes", "only one number per channel")
    values = _by_channel(layer.blobs[0], len(_shape(shaped)))
    graph.node("Add", [*bottoms, graph.constant(f"{layer.name}:bias", values)], output)


def _power(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.power_param
    steps = [
        ("Mul", "scale", parameters.scale, 1),
        ("Add", "shift", parameters.shift, 0),
        ("Pow", "power", parameters.power, 1),
    ]
    needed = [(kind, name, value) for kind, name, value, nothing in steps if value != nothing]
    if not needed:
        graph.node("Identity", bottoms, output)
    value = bottoms[0]
    for number, (kind, name, factor) in enumerate(needed, 1):
        given = output if number == len(needed) else graph.inner(output, name)
        graph.node(kind, [value, graph.number(layer, name, factor)], given)
        value = given


def _relu(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    slope = layer.message.relu_param.negative_slope
    if slope:
        graph.node("LeakyRelu", bottoms, output, alpha=slope)
    else:
        graph.node("Relu", bottoms, output)


def _prelu(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    slopes = _by_channel(layer.blobs[0], len(_shape(shaped)))
    graph.node("PRelu", [*bottoms, graph.constant(f"{layer.name}:slope", slopes)], output)


def _pooling(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.pooling_param
    method = parameters.PoolMethod.Name(parameters.pool)
    if method not in ("MAX", "AVE"):
        graph.refuse(layer, "pooling_param.pool", "only MAX and AVE")
    if parameters.global_pooling:
        graph.node("GlobalMaxPool" if method == "MAX" else "GlobalAveragePool", bottoms, output)
        return
    sizes, pooled = _shape(shaped)[2:], (shaped.tops[0] or ())[2:]
    if len(sizes) != 2:
        graph.refuse(layer, "input", "only images, of four axes")
    kernel, stride, pad, _ = geometry(shaped.layer)
    # How far the last window reaches beyond the image: Caffe rounds the number of windows up.
    ends = [
        max((pooled[axis] - 1) * stride[axis] + kernel[axis] - sizes[axis] - pad[axis], 0) for axis in (0, 1)
    ]
    if any((pooled[axis] - 1) * stride[axis] - pad[axis] >= sizes[axis] for axis in (0, 1)):
        graph.refuse(layer, "stride", "it is larger than the kernel, and a window lies outside the image")
    shape = {"kernel_shape": list(kernel), "strides": list(stride)}
    if method == "MAX":
        graph.node("MaxPool", bottoms, output, pads=[*pad, *ends], **shape)
        return
    # Caffe divides by the part of the window inside the image and its padding. ONNX counts all padding or
    # none, so the padding becomes zeros of the image, and only what reaches beyond it is padding to ONNX.
    zeros = [min(end, own) for end, own in zip(ends, pad, strict=True)]
    beyond = [end - zero for end, zero in zip(ends, zeros, strict=True)]
    if not any(beyond):
        graph.node("AveragePool", bottoms, output, pads=[*pad, *ends], count_include_pad=1, **shape)
        return
    value = bottoms[0]
    if any(pad):
        import numpy as np

        padded = graph.inner(output, "padded")
        pads = graph.constant(f"{layer.name}:pads", np.array([0, 0, *pad, 0, 0, *zeros], np.int64))
        graph.node("Pad", [value, pads], padded)
        value = padded
    graph.node("AveragePool", [value], output, pads=[0, 0, *beyond], count_include_pad=0, **shape)


def _lrn(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.lrn_param
    if parameters.norm_region != parameters.ACROSS_CHANNELS:
        graph.refuse(layer, "lrn_param.norm_region", "only ACROSS_CHANNELS")
    graph.node(
        "LRN",
        bottoms,
        output,
        size=parameters.local_size,
        alpha=parameters.alpha,
        beta=parameters.beta,
        bias=parameters.k,
    )


def _dropout(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    # Caffe scales in training, so there is nothing to do here.
    graph.node("Identity", bottoms, output)


def _eltwise(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.eltwise_param
    kind = {parameters.SUM: "Sum", parameters.MAX: "Max"}.get(parameters.operation, "Mul")
    terms = list(bottoms)
    if parameters.coeff:
        if kind != "Sum" or len(parameters.coeff) != len(bottoms):
            graph.refuse(layer, "eltwise_param.coeff", "only SUM has them, one for each input")
        for number, factor in enumerate(parameters.coeff):
            if factor != 1:
                terms[number] = graph.inner(output, f"term{number}")
                coefficient = graph.number(layer, f"coeff{number}", factor)
                graph.node("Mul", [bottoms[number], coefficient], terms[number])
    if kind != "Mul":
        graph.node(kind, terms, output)
        return
    value = terms[0]
    for number, term in enumerate(terms[1:], 2):
        given = output if number == len(terms) else graph.inner(output, f"product{number}")
        graph.node("Mul", [value, term], given)
        value = given


def _concat(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.concat_param
    axis = parameters.concat_dim if parameters.HasField("concat_dim") else parameters.axis
    axis %= len(_shape(shaped))
    if axis == 0:
        graph.refuse(layer, "concat_param.axis", "the size of the batch is not fixed")
    graph.node("Concat", bottoms, output, axis=axis)


def _reshape(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    """Flatten and Reshape: the output's shape is known but for the batch."""
    import numpy as np

    shape = shaped.tops[0] or ()
    if shape[0] != 1:  # the shapes are those of a batch of one
        graph.refuse(layer, "first axis", "it has to be the batch")
    target = graph.constant(f"{layer.name}:shape", np.array([0, *shape[1:]], np.int64))
    graph.node("Reshape", [*bottoms, target], output)


def _softmax(graph: _Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    axis = layer.message.softmax_param.axis % len(_shape(shaped))
    graph.node("Softmax", bottoms, output, axis=axis)


_LAYERS: dict[str, Callable[..., None]] = {
    "BatchNorm": _batch_norm,
    "Bias": _bias,
    "Concat": _concat,
    "Convolution": _convolution,
    "Dropout": _dropout,
    "Eltwise": _eltwise,
    "Flatten": _reshape,
    "InnerProduct": _inner_product,
    "LRN": _lrn,
    "Pooling": _pooling,
    "PReLU": _prelu,
    "Power": _power,
    "ReLU": _relu,
    "Reshape": _reshape,
    "Scale": _scale,
    "Softmax": _softmax,
}
