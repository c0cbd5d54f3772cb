"""One layer in real Caffe and on PyTorch: the same text, weights and inputs, forward and backward."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.engines.pytorch.snapshot import array
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net

TOLERANCE = 1e-5
"""Of the largest number of a blob."""

Shape = tuple[int, ...]
Case = tuple[str, list[Shape]]
"""A layer's type and parameters as prototxt, and the shapes of its bottoms."""

thorough = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def shapes(least: int = 4, most: int = 4, size: int = 6) -> st.SearchStrategy[Shape]:
    return st.lists(st.integers(1, size), min_size=least, max_size=most).map(tuple)


class Pair:
    """The same network in Caffe and on PyTorch, with the same weights."""

    def __init__(self, caffe: Any, folder: Path, text: str, phase: int = TRAIN) -> None:
        definition = parse_net(text, Dialect.BVLC, "layer.prototxt")
        self.ours = Net(definition, phase, Dialect.BVLC, where="layer.prototxt", seed=1)
        file = folder / "layer.prototxt"
        file.write_text(text)
        self.theirs = caffe.Net(str(file), phase)
        for name, blobs in self.ours.layer_blobs.items():
            for blob, other in zip(blobs, self.theirs.params[name], strict=True):
                other.data[...] = array(blob.tensor)

    def compare(
        self,
        inputs: dict[str, Any],
        *,
        backward: bool = True,
        least: float = 1e-2,
        only: Collection[str] | None = None,
    ) -> None:
        """One pass through both: outputs, gradients of inputs and blobs, and the blobs themselves.

        ``least`` is the size of what a blob's numbers come from, 1 for the gradients of weights, which are
        sums: what is left of them may be far smaller. ``only`` names the inputs whose gradients are compared;
        all but labels otherwise.
        """
        given = {}
        only = [name for name in inputs if name != "label"] if only is None else only
        for name, values in inputs.items():
            self.theirs.blobs[name].data[...] = values
            tensor = torch.from_numpy(values)
            if values.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            given[name] = tensor.requires_grad_(backward and name in only)
        for blobs in self.theirs.params.values():
            for blob in blobs:
                blob.diff[...] = 0
        expected = self.theirs.forward()
        result = self.ours(given)
        assert list(result.outputs) == list(expected) or set(result.outputs) == set(expected)
        for name, values in expected.items():
            close(values, result.outputs[name].numpy(), f"output {name}", least)
        if not backward:
            return
        self.theirs.backward()
        result.loss.backward()
        for name, tensor in given.items():
            if name in only:
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                close(self.theirs.blobs[name].diff, gradient.numpy(), f"gradient of {name}", least)
        for layer, blobs in self.ours.layer_blobs.items():
            for index, (blob, other) in enumerate(zip(blobs, self.theirs.params[layer], strict=True)):
                close(other.data, array(blob.tensor), f"{layer}[{index}]", least)
                if blob.tensor.grad is not None:
                    close(other.diff, array(blob.tensor.grad), f"gradient of {layer}[{index}]", 1)
                    blob.tensor.grad = None


def close(expected: Any, found: Any, what: str, least: float) -> None:
    expected = np.asarray(expected)
    assert expected.size == found.size, what
    error = np.abs(expected.reshape(-1) - found.reshape(-1)).max(initial=0)
    assert error <= TOLERANCE * max(np.abs(expected).max(initial=0), least), f"{what}: {error}"


def inputs_text(shapes_by_name: dict[str, Shape]) -> str:
    return "\n".join(
        f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{'
        f"{''.join(f' dim: {dim}' for dim in shape)} }} }} }}"
        for name, shape in shapes_by_name.items()
    )


def learned(blob: str) -> str:
    """A layer that adds a learned number to each of a blob's: their gradient is the blob's.

    For layers with bottoms that Caffe has no gradient of: ``force_backward`` would ask for it.
    """
    return (
        f'layer {{ name: "learned {blob}" type: "Bias" bottom: "{blob}" top: "{blob}" '
        "bias_param { axis: 0 num_axes: -1 } }\n"
    )


def weighted(
    layer: str, bottoms: list[Shape], tops: int = 1, phase: int = TRAIN
) -> tuple[str, dict[str, Shape]]:
    """A network of one layer whose loss is the sum of its tops, each value by a weight from outside."""
    names = {f"data{i}": shape for i, shape in enumerate(bottoms)}
    head = "force_backward: true\n" + inputs_text(names)
    reads = " ".join(f'bottom: "{name}"' for name in names)
    gives = ["top", *(f"top{i}" for i in range(1, tops))]
    writes = " ".join(f'top: "{name}"' for name in gives)
    tested = f'\nlayer {{ name: "tested" {layer} {reads} {writes} }}\n'
    definition = parse_net(head + tested, Dialect.BVLC, "layer.prototxt")
    made = Net(definition, phase, Dialect.BVLC, where="layer.prototxt").shapes
    weights = {name.replace("top", "weights"): made[name] for name in gives}
    losses = "".join(
        f'layer {{ name: "loss of {name}" type: "Eltwise" bottom: "{name}" bottom: "{weight}" '
        f'top: "loss of {name}" loss_weight: 1 eltwise_param {{ operation: PROD }} }}\n'
        for name, weight in zip(gives, weights, strict=True)
    )
    return head + inputs_text(weights) + tested + losses, {**names, **weights}


def numbers(names: dict[str, Shape], seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in names.items()}


def loss_text(names: dict[str, Shape], layer: str, label: str = "label") -> str:
    reads = " ".join(f'bottom: "{name}"' for name in ("data", label))
    return (
        f"force_backward: true\n{inputs_text(names)}\nlayer {{ name: 'tested' {layer} {reads} top: 'top' }}"
    )


@st.composite
def scores_and_labels(draw: st.DrawFn) -> tuple[dict[str, Shape], int, int]:
    """Shapes of scores and labels, the axis of the classes, and how many classes."""
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(1, len(shape) - 1))
    labels = (*shape[:axis], 1, *shape[axis + 1 :])
    return {"data": shape, "label": labels}, axis, shape[axis]


def drawn_labels(shape: Shape, classes: int, ignored: int | None, random: Any) -> Any:
    labels = random.integers(0, classes, shape).astype(np.float32)
    if ignored is not None:
        labels[random.random(shape) < 0.3] = ignored
    return labels
