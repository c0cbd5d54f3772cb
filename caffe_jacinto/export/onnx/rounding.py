"""Quantized values in an ONNX graph (QDQ form): QuantizeLinear makes numbers, DequantizeLinear values."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Protocol

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.record import Recorded
from caffe_jacinto.quantization.schemes import MOST_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

_MOST_APART = 0.01
"""Of a weight from its number, in steps; float32 holds 16 bits more exactly than that."""

OPSET_OF_16_BITS = 21
"""From this one on, QuantizeLinear gives numbers of 16 bits."""


class _Nodes(Protocol):
    """What of the graph is needed here."""

    def node(self, kind: str, inputs: list[str], output: str, **attributes: int) -> None: ...
    def constant(self, name: str, values: object) -> str: ...
    def inner(self, output: str, step: str) -> str: ...


class Rounding:
    """Adds the nodes that round what a recorded quantization rounds."""

    def __init__(self, recorded: Recorded, opset: int, where: str) -> None:
        """Raises UserError where ONNX has no form for this quantization."""
        self._recorded, self._where = recorded, where
        self._on_grid: dict[str, Grid] = {}
        """The values that are rounded already."""

        for name, grid in (*recorded.outputs.items(), *recorded.weight_grids.items()):
            if grid.offset:
                raise UserError(
                    f"{where}: layer {name}: the scheme {recorded.scheme} has no number for zero, which ONNX "
                    "cannot express; quantize with the scheme processor or power2"
                )
            if not isfinite(grid.high) or grid.bits > MOST_BITS:
                raise UserError(f"{where}: layer {name} has numbers without limits; quantize again")
            if grid.bits > 8 and opset < OPSET_OF_16_BITS:
                raise UserError(
                    f"{where}: layer {name} has {grid.bits} bits, and opset {opset} has 8; "
                    f"give --opset {OPSET_OF_16_BITS}"
                )

    def check_names(self, layers: Iterable[str], blobs: Iterable[str]) -> None:
        """Check that the network has what was quantized: ``layers``, and the ``blobs`` that are its inputs.

        Raises:
            UserError: it has not.
        """
        recorded = self._recorded
        known, named = {*layers, *blobs}, [*recorded.outputs, *recorded.weight_grids, *recorded.bias_grids]
        lost = next((name for name in named if name not in known), None)
        if lost is not None:
            raise UserError(
                f"{self._where}: has no layer {lost}, which quantization.json names; quantize again"
            )

    def grid_of(self, layer: str, bottoms: list[str]) -> Grid | None:
        """The grid of the output of ``layer``, the last of a unit or an input; None: it is not rounded."""
        if layer in self._recorded.keeping:
            return self._on_grid.get(bottoms[0])
        return self._recorded.outputs.get(layer)

    def round(self, graph: _Nodes, exact: str, output: str, grid: Grid) -> None:
        """Add the nodes that round the value ``exact``; ``output`` is the result."""
        import numpy as np

        if grid.bits not in (8, 16):  # the type has more numbers than the grid
            limited = graph.inner(output, "limited")
            ends = [
                graph.constant(f"{output}:{name}", np.array(end * grid.step, np.float32))
                for name, end in (("low", grid.low), ("high", grid.high))
            ]
            graph.node("Clip", [exact, *ends], limited)
            exact = limited
        scale = graph.constant(f"{output}:scale", np.array(grid.step, np.float32))
        zero = graph.constant(f"{output}:zero_point", np.zeros((), _number_type(grid)))
        numbers = graph.inner(output, "numbers")
        graph.node("QuantizeLinear", [exact, scale, zero], numbers)
        graph.node("DequantizeLinear", [numbers, scale, zero], output)
        self._on_grid[output] = grid

    def stays(self, output: str, bottom: str) -> None:
        """Note that ``output`` has values of ``bottom`` alone, which may be on a grid."""
        if bottom in self._on_grid:
            self._on_grid[output] = self._on_grid[bottom]

    def blob(self, graph: _Nodes, layer: str, name: str, values: Values) -> str:
        """The value that holds a layer's ``weights`` or ``bias``, as numbers with scales where it can be."""
        import numpy as np

        grids = self._recorded.bias_grids if name == "bias" else self._recorded.weight_grids
        grid, full = grids.get(layer), f"{layer}:{name}"
        if grid is None:
            return graph.constant(full, values)
        kind = "int32" if name == "bias" else _number_type(grid)
        several = grid.steps.size > 1
        steps = grid.steps if several else grid.steps.reshape(())
        if several and (grid.axis >= values.ndim or values.shape[grid.axis] != steps.size):
            raise UserError(
                f"{self._where}: layer {layer}: {steps.size} scales in quantization.json do not fit its "
                f"{name}; quantize again"
            )
        exact = values.astype(np.float64) / _along(steps, grid, values)
        numbers = np.clip(np.rint(exact), grid.low, grid.high)
        if name == "weights" and np.abs(numbers - exact).max(initial=0) > _MOST_APART:
            raise UserError(
                f"{self._where}: layer {layer}: its weights are not those that were quantized; quantize again"
            )
        stored = [
            graph.constant(f"{full}:numbers", numbers.astype(kind)),
            graph.constant(f"{full}:scale", steps),
            graph.constant(f"{full}:zero_point", np.zeros(steps.shape, kind)),
        ]
        result = graph.inner(layer, name)
        if several:
            graph.node("DequantizeLinear", stored, result, axis=grid.axis)
        else:
            graph.node("DequantizeLinear", stored, result)
        return result


def _along(steps: Values, grid: Grid, values: Values) -> Values:
    """The steps in a shape that broadcasts over ``values``."""
    if not steps.ndim:
        return steps
    shape = [1] * values.ndim
    shape[grid.axis] = -1
    return steps.reshape(shape)


def _number_type(grid: Grid) -> str:
    """The NumPy type that holds a grid's numbers."""
    return f"{'int' if grid.signed else 'uint'}{8 if grid.bits <= 8 else 16}"
