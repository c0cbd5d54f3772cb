"""An ONNX graph, built layer by layer from a network in stock Caffe's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.onnx.rounding import Rounding
from caffe_jacinto.export.stock_net import StockLayer, StockNet
from caffe_jacinto.netspec.graph import nodes_of, scale_after
from caffe_jacinto.netspec.shapes import FullShape as Shape
from caffe_jacinto.netspec.shapes import LayerShapes, layer_shapes
from caffe_jacinto.prototxt import tree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

OPSET = 13
"""The oldest version of ONNX's operators that suffices: importers for embedded processors lag behind."""

NEWEST_OPSET = 21
"""The newest one that models are tested with."""

_SEVERAL_INPUTS = ("Axpy", "Concat", "Crop", "Eltwise", "Silence", "Upsample")
_SEVERAL_OUTPUTS = ("Pooling", "Silence", "Slice", "Split")
"""Types whose operators get the names of all the values that they give, in a list."""

_BATCH = "batch"
_MOST_NUMBERS = 2**31 - 1
"""In one blob, which Caffe counts in an int."""

Operator = Callable[..., None]
"""Adds the nodes of a layer to the graph: from the `Graph`, the `StockLayer`, its `LayerShapes`, the names of
the values that it reads and the name of the value that it gives."""


class Graph:
    """Builds the ONNX graph, layer by layer in the network's order."""

    def __init__(
        self,
        net: StockNet,
        where: str,
        operators: Mapping[str, Operator],
        *,
        opset: int = OPSET,
        batch: int | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """
        Args:
            operators: what adds the nodes of a layer, by its type.
            opset: the version of ONNX's operators.
            batch: the number of images that the model takes at a time; None: any.
            rounding: what is quantized.
        """
        self.operators = operators
        self.opset, self.batch, self.rounding = opset, batch, rounding
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
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.batch or _BATCH, *shape[1:]])

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
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=helper.OP_SET_ID_VERSION_MAP["ai.onnx", self.opset],
        )

    def _name_free_batch(self) -> None:
        """Let Reshape layers take the batch of their input, so that the model takes any batch."""
        batch = 0
        for layer in self.net.layers:
            if layer.type == "Input" and layer.message.input_param.shape:
                batch = layer.message.input_param.shape[0].dim[0]
            parameters = layer.message.reshape_param
            if layer.type == "Reshape" and parameters.axis == 0 and parameters.shape.dim[:1] == [batch]:
                parameters.shape.dim[0] = 0

    def _declare_inputs(self) -> None:
        shapes: dict[str, Shape | None] = {}
        for layer, shaped in zip(self.net.layers, self.shapes, strict=True):
            if layer.type == "Input":
                shapes.update(zip(layer.message.top, shaped.tops, strict=True))
        for name, shape in shapes.items():
            if not shape or min(shape) < 1:
                raise UserError(f"{self.where}: the shape of the input {name} is not known; specify it")
            self.inputs[name] = shape
            self.current[name] = name
            self.taken.add(name)
            grid = self.rounding.grid_of(name, []) if self.rounding else None
            if self.rounding and grid is not None:
                self.current[name] = self.inner(name, "rounded")
                self.rounding.round(self, name, self.current[name], grid)

    def _scale_after(self, at: int) -> StockLayer | None:
        """The Scale that goes with a BatchNorm, where one ONNX node can do both."""
        found = scale_after(self.layer_graph, at)
        scale = self.net.layers[found] if found is not None else None
        return scale if scale is not None and channelwise(scale.message.scale_param) else None

    def _add_layer(self, layer: StockLayer, shaped: LayerShapes, scale: StockLayer | None) -> None:
        if layer.type not in self.operators:
            raise UserError(
                f"{self.where}: layer {layer.name}: the type {layer.type} cannot be exported; "
                f"these can: {', '.join(sorted(self.operators))}"
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
        several_inputs, several_outputs = layer.type in _SEVERAL_INPUTS, layer.type in _SEVERAL_OUTPUTS
        if (len(layer.message.bottom) != 1 and not several_inputs) or (
            len(layer.message.top) != 1 and not several_outputs
        ):
            self.refuse(layer, "bottom and top", "only one input and one output")
        for shape in shaped.tops:
            if shape is None:
                self.refuse(layer, "input", "its size does not fit")
            if prod(shape or ()) > _MOST_NUMBERS:
                self.refuse(layer, "output", "it is larger than a blob of Caffe's can be")
        bottoms = [self.current[blob] for blob in layer.message.bottom]
        for bottom in bottoms:
            self.unread.pop(bottom, None)
        writer = scale or layer
        outputs = [self._value_name(top, writer) for top in writer.message.top]
        grid = self.rounding.grid_of(writer.name, bottoms) if self.rounding else None
        # What is cut into several values keeps the grid of its input.
        rounded = grid is not None and len(outputs) == 1
        exact = [self.inner(outputs[0], "exact")] if rounded else outputs
        given = exact if several_outputs else exact[0]
        self.operators[layer.type](self, layer, shaped, bottoms, given, *([scale] if scale else []))
        if self.rounding and grid is not None:
            if rounded:
                self.rounding.round(self, exact[0], outputs[0], grid)
            else:
                for output in outputs:
                    self.rounding.stays(output, bottoms[0])
        for top, output, shape in zip(writer.message.top, outputs, shaped.tops, strict=True):
            self.current[top] = output
            self.unread[output] = shape or ()

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

    def node(self, kind: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> None:
        """Add a node, named after its first output."""
        from onnx import helper

        outputs = [output] if isinstance(output, str) else list(output)
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))

    def constant(self, name: str, values: Any) -> str:
        """Add an initializer; returns its name."""
        import numpy as np

        from onnx import numpy_helper

        while name in self.taken:
            name += "'"
        self.taken.add(name)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def weights_and_bias(self, layer: StockLayer) -> list[str]:
        """The values that hold a convolution's or inner product's blobs."""
        names = zip(("weights", "bias"), layer.blobs, strict=False)
        if self.rounding is not None:
            return [self.rounding.blob(self, layer.name, name, blob) for name, blob in names]
        return [self.constant(f"{layer.name}:{name}", blob) for name, blob in names]

    def number(self, layer: StockLayer, name: str, value: float) -> str:
        """An initializer of one number."""
        import numpy as np

        return self.constant(f"{layer.name}:{name}", np.array(value, np.float32))

    def integers(self, layer: StockLayer, name: str, values: Sequence[int]) -> str:
        """An initializer of integers along one axis."""
        import numpy as np

        return self.constant(f"{layer.name}:{name}", np.array(values, np.int64))

    def inner(self, output: str, step: str) -> str:
        """A name for a value between two nodes of one layer."""
        name = f"{output}:{step}"
        while name in self.taken:
            name += "'"
        self.taken.add(name)
        return name


def channelwise(parameters: Any) -> bool:
    """Whether a Scale or Bias has one number for each channel."""
    return bool(parameters.axis == 1 and parameters.num_axes == 1)


def input_shape(shaped: LayerShapes) -> Shape:
    """The shape of the first bottom."""
    return shaped.bottoms[0] or ()


def by_channel(values: Values, rank: int) -> Values:
    """One number per channel, in a shape that broadcasts over a blob of ``rank`` axes."""
    return values.reshape(-1, *[1] * (rank - 2))
