"""Layers of forks on PyTorch, forward and backward.

Against layers of stock Caffe's that compute the same where there are any, and otherwise against formulas
written out here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from deploy_nets import TOLERANCE, by_onnx, difference, write_random
from deploy_nets import by_caffe as outputs_of_caffe
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_pair import Shape, close, inputs_text, numbers, shapes, thorough
from small_stage import SmallStage, sparse_settings, write_digits

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.classify import main as classify
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import TEST, TRAIN, Net
from caffe_jacinto.engines.pytorch.snapshot import array, load_weights, put, save_weights
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.onnx import export_onnx
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net

pytestmark = pytest.mark.caffe

Values = np.ndarray[Any, Any]
SEEDS = st.integers(0, 999)
few = settings(max_examples=40)


def ours(layer: str, bottoms: list[Shape], phase: int = TRAIN) -> Net:
    """A net of one layer, ``layer``, that reads all ``bottoms``."""
    names = [f"data{i}" for i in range(len(bottoms))]
    reads = " ".join(f'bottom: "{name}"' for name in names)
    text = inputs_text(dict(zip(names, bottoms, strict=True)))
    text += f'\nlayer {{ name: "tested" {layer} {reads} top: "top" }}'
    return Net(parse_net(text, Dialect.BVLC, "net"), phase, Dialect.BVLC, where="net", seed=3)


class Ran:
    """One pass: the top, and the gradients of the inputs and blobs where its gradient is random."""

    def __init__(self, net: Net, seed: int, given: dict[str, Values] | None = None) -> None:
        self.net = net
        self.inputs = given or numbers({name: net.shapes[name] for name in net.inputs}, seed)
        tensors = {name: torch.from_numpy(values).requires_grad_() for name, values in self.inputs.items()}
        made: list[torch.Tensor] = []
        step = net.steps[-1]
        made = list(step(*(tensors[name] for name in step.bottoms)))
        self.top = made[0].detach().numpy()
        assert self.top.shape == net.shapes["top"]
        self.weights = np.random.default_rng(seed + 1).standard_normal(self.top.shape).astype(np.float32)
        if made[0].requires_grad:
            made[0].backward(torch.from_numpy(self.weights))
        self.gradients = [None if t.grad is None else t.grad.numpy() for t in tensors.values()]
        self.blobs = net.layer_blobs.get("tested", [])

    def gradient(self, blob: int) -> Values:
        found = self.blobs[blob].tensor.grad
        assert found is not None
        return array(found)

    def differentiated(self, formula: Any, blobs: int = 0, least: float = 1.0) -> None:
        """Check top and gradients against ``formula``, of doubles: from the inputs and the first blobs.

        ``least`` is the size of what the gradients are the differences of.
        """
        arguments = [torch.from_numpy(values).double().requires_grad_() for values in self.inputs.values()]
        arguments += [blob.tensor.detach().double().requires_grad_() for blob in self.blobs[:blobs]]
        top = formula(*arguments)
        close(top.detach().numpy(), self.top, "top", 1e-2)
        top.backward(torch.from_numpy(self.weights).double())
        for number, argument in enumerate(arguments):
            expected = np.zeros(argument.shape) if argument.grad is None else argument.grad.numpy()
            at = number - len(self.inputs)
            found = self.gradients[number] if at < 0 else self.gradient(at)
            close(expected, np.zeros(argument.shape) if found is None else found, f"gradient {number}", least)


def randomize(net: Net, seed: int, positive: tuple[int, ...] = ()) -> None:
    """Give the tested layer's blobs random numbers."""
    random = np.random.default_rng(seed)
    for index, blob in enumerate(net.layer_blobs["tested"]):
        values = random.standard_normal(tuple(blob.tensor.shape))
        put((np.abs(values) if index in positive else values).astype(np.float32), blob.tensor)


def by_caffe(caffe: Any, folder: Path, ran: Ran, layers: str, phase: int = TRAIN) -> Any:
    """Stock Caffe's net of ``layers`` with the inputs of ``ran``; its blobs are still to fill."""
    shapes_by_name = {name: values.shape for name, values in ran.inputs.items()}
    text = f"force_backward: true\n{inputs_text(shapes_by_name)}\n{layers}"
    (folder / "caffe.prototxt").write_text(text)
    return caffe.Net(str(folder / "caffe.prototxt"), phase)


def compare(net: Any, ran: Ran, least: float = 1e-2) -> None:
    """One pass forward and backward in Caffe: top and the inputs' gradients as ours; ``least`` as above."""
    for name, values in ran.inputs.items():
        net.blobs[name].data[...] = values
    net.forward()
    close(net.blobs["top"].data, ran.top, "top", 1e-2)
    assert net.blobs["top"].data.shape == ran.top.shape
    net.blobs["top"].diff[...] = ran.weights
    net.backward()
    for (name, values), found in zip(ran.inputs.items(), ran.gradients, strict=True):
        close(net.blobs[name].diff, np.zeros_like(values) if found is None else found, name, least)


def stock(kind: str, more: str, bottoms: str = "data0", top: str = "top", name: str = "same") -> str:
    reads = " ".join(f'bottom: "{bottom}"' for bottom in bottoms.split())
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{top}" {more} }}\n'


def layer(name: str, kind: str, bottom: str, more: str = "") -> str:
    reads = " ".join(f'bottom: "{blob}"' for blob in bottom.split())
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{name}" {more} }}\n'


@thorough
@given(st.sampled_from(["MAX", "AVE"]), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data(), SEEDS)
def test_ceil_mode_is_caffes_round_mode(
    pycaffe: Any,
    tmp_path: Path,
    pool: str,
    kernel: int,
    stride: int,
    up: bool,
    data: st.DataObject,
    seed: int,
) -> None:
    pad = data.draw(st.integers(0, kernel - 1))
    stride = min(stride, kernel)
    size = data.draw(st.tuples(*[st.integers(max(kernel - 2 * pad, 1), 9)] * 2))
    fields = f"pool: {pool} kernel_size: {kernel} stride: {stride} pad: {pad}"
    layer = f'type: "Pooling" pooling_param {{ {fields} ceil_mode: {str(up).lower()} }}'
    ran = Ran(ours(layer, [(2, 2, *size)]), seed)
    rounding = "CEIL" if up else "FLOOR"
    net = by_caffe(
        pycaffe, tmp_path, ran, stock("Pooling", f"pooling_param {{ {fields} round_mode: {rounding} }}")
    )
    compare(net, ran)


@thorough
@given(
    st.sampled_from(["DepthwiseConvolution", "ConvolutionDepthwise"]),
    shapes(),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_a_depthwise_convolution_is_a_grouped_one(
    pycaffe: Any, tmp_path: Path, kind: str, shape: Shape, bias: bool, grouped: bool, seed: int
) -> None:
    channels = shape[1]
    fields = f"num_output: {channels} kernel_size: 3 pad: 1 stride: 2 bias_term: {str(bias).lower()}"
    fields += ' weight_filler { type: "msra" } bias_filler { type: "gaussian" }'
    group = f"group: {channels}"
    layer = f'type: "{kind}" convolution_param {{ {fields} {group if grouped else ""} }}'
    ran = Ran(ours(layer, [shape]), seed)
    net = by_caffe(pycaffe, tmp_path, ran, stock("Convolution", f"convolution_param {{ {fields} {group} }}"))
    for blob, own in zip(net.params["same"], ran.blobs, strict=True):
        assert blob.data.shape == tuple(own.tensor.shape)
        blob.data[...] = array(own.tensor)
    compare(net, ran)
    for index, blob in enumerate(net.params["same"]):
        close(blob.diff, ran.gradient(index), f"gradient of blob {index}", 1)


BN_LEARN = 'type: "BN" bn_param { scale_filler { value: 1 } shift_filler { value: 0.001 } }'
BN_AVERAGES = (
    'type: "BN" bn_param { slope_filler { value: 1 } bias_filler { value: 0 } momentum: 0.8 eps: 0.01 }'
)
_STATISTICS = 'name: "norm" param { lr_mult: 0 } param { lr_mult: 0 } param { lr_mult: 0 }'


def batch_norm_and_scale(eps: float, fixed: bool) -> str:
    fields = f"eps: {eps} use_global_stats: {str(fixed).lower()}"
    return stock("BatchNorm", f"batch_norm_param {{ {fields} }}", top="norm", name="norm") + stock(
        "Scale", "scale_param { bias_term: true }", "norm"
    )


@thorough
@given(shapes(size=5), st.sampled_from(["learn", "averages"]), st.sampled_from([TRAIN, TEST]), SEEDS)
def test_bn_is_batch_norm_and_scale(
    pycaffe: Any, tmp_path: Path, shape: Shape, kind: str, phase: int, seed: int
) -> None:
    """SegNet's takes each batch's own statistics, in tests too; PSPNet's averages them."""
    learn = kind == "learn"
    shape = (max(shape[0], 2), *shape[1:])
    fixed = not learn and phase == TEST
    own = ours(BN_LEARN if learn else BN_AVERAGES, [shape], phase)
    randomize(own, seed, positive=(3,))
    before = [array(blob.tensor).copy() for blob in own.layer_blobs["tested"]]
    if phase == TEST:
        for blob in own.layer_blobs["tested"]:
            blob.tensor.requires_grad_(False)
    ran = Ran(own, seed)
    net = by_caffe(pycaffe, tmp_path, ran, batch_norm_and_scale(1e-9 if learn else 0.01, fixed), phase)
    for index in (0, 1):
        net.params["same"][index].data[...] = before[index].reshape(-1)
    if fixed:
        for index, values in enumerate((before[2], before[3], np.ones(1))):
            net.params["norm"][index].data[...] = values.reshape(-1)
    data = ran.inputs["data0"].astype(np.float64)
    compare(net, ran, least=1 / np.sqrt(data.var((0, 2, 3)).min() + 1e-9) if not fixed else 1)
    if phase == TRAIN:
        for index in (0, 1):
            close(net.params["same"][index].diff, ran.gradient(index), f"gradient of blob {index}", 1)
    if phase == TRAIN and not learn:
        for index, seen in ((2, data.mean((0, 2, 3))), (3, data.var((0, 2, 3)))):
            expected = 0.8 * before[index].reshape(-1) + 0.2 * seen
            close(expected, array(ran.blobs[index].tensor), f"average {index}", 1)


@few
@given(shapes(), SEEDS)
def test_bn_in_inference_is_a_scale(shape: Shape, seed: int) -> None:
    own = ours(BN_LEARN.replace("bn_param {", "bn_param { bn_mode: INFERENCE"), [shape])
    randomize(own, seed)
    Ran(own, seed).differentiated(lambda data, scale, shift: data * scale + shift, blobs=2)


@few
@given(shapes(), SEEDS)
def test_a_frozen_bn_uses_its_averages_and_does_not_learn(shape: Shape, seed: int) -> None:
    own = ours(BN_AVERAGES.replace("bn_param {", "bn_param { frozen: true"), [shape])
    assert float(own.layer_blobs["tested"][3].tensor.min()) == 1
    randomize(own, seed, positive=(3,))
    ran = Ran(own, seed)
    slope, bias, mean, variance = (blob.tensor.double() for blob in ran.blobs)
    ran.differentiated(lambda data: (data - mean) / (variance + 0.01).sqrt() * slope + bias)
    assert [(blob.lr_mult, blob.decay_mult) for blob in ran.blobs[:2]] == [(0, 0)] * 2


def test_a_bn_of_one_value_a_channel_is_its_shift() -> None:
    own = ours(BN_LEARN, [(1, 3, 1, 1)])
    randomize(own, 1)
    ran = Ran(own, 1)
    np.testing.assert_array_equal(ran.top, array(ran.blobs[1].tensor))


@few
@given(
    shapes(size=5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-10, 0.5]),
    st.sampled_from([2.5, 20]),
    SEEDS,
)
def test_normalize(shape: Shape, across: bool, shared: bool, eps: float, scale: float, seed: int) -> None:
    layer = f"""type: "Normalize" norm_param {{ across_spatial: {str(across).lower()} eps: {eps}
        channel_shared: {str(shared).lower()} scale_filler {{ type: "constant" value: {scale} }} }}"""
    own = ours(layer, [shape])
    assert tuple(own.layer_blobs["tested"][0].tensor.shape) == (() if shared else (shape[1],))
    ran = Ran(own, seed)

    def formula(data: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        squares = (
            torch.einsum("nchw,nchw->n", data, data) if across else torch.einsum("nchw,nchw->nhw", data, data)
        )
        length = (squares + eps).sqrt().reshape((-1, 1, 1, 1) if across else (shape[0], 1, *shape[2:]))
        return data / length * (factor if shared else factor.reshape(1, -1, 1, 1))

    ones = torch.ones((), dtype=torch.float64)
    factors = formula(
        torch.from_numpy(ran.inputs["data0"]).double(), ones if shared else ones.expand(shape[1])
    )
    ran.differentiated(
        formula, blobs=1, least=scale * float((factors / torch.from_numpy(ran.inputs["data0"])).max())
    )


@few
@given(shapes(), SEEDS)
def test_relu6(shape: Shape, seed: int) -> None:
    net = ours('type: "ReLU6"', [shape])
    ran = Ran(net, seed, {"data0": 5 * numbers({"data0": shape}, seed)["data0"]})
    ran.differentiated(lambda data: torch.minimum(torch.maximum(data, torch.tensor(0.0)), torch.tensor(6.0)))
    np.testing.assert_array_equal(ran.top, np.clip(ran.inputs["data0"], 0, 6))


@few
@given(shapes(1, 5), st.data(), SEEDS)
def test_permute_names_the_first_axes(shape: Shape, data: st.DataObject, seed: int) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    named = data.draw(st.integers(0, len(shape)))
    fields = " ".join(f"order: {axis}" for axis in order[:named])
    ran = Ran(ours(f'type: "Permute" permute_param {{ {fields} }}', [shape]), seed)
    whole = [*order[:named], *sorted(order[named:])]
    np.testing.assert_array_equal(ran.top, np.transpose(ran.inputs["data0"], whole))
    assert ran.gradients[0] is not None
    np.testing.assert_array_equal(np.transpose(ran.gradients[0], whole), ran.weights)


@few
@given(shapes(), st.integers(1, 4), SEEDS)
def test_shuffle_channel(shape: Shape, group: int, seed: int) -> None:
    """Channel i of group g becomes channel g of group i, by indices here."""
    batch, each, height, width = shape
    layer = f'type: "ShuffleChannel" shuffle_channel_param {{ group: {group} }}'
    ran = Ran(ours(layer, [(batch, each * group, height, width)]), seed)
    assert ran.gradients[0] is not None
    for g in range(group):
        for i in range(each):
            np.testing.assert_array_equal(ran.top[:, i * group + g], ran.inputs["data0"][:, g * each + i])
            np.testing.assert_array_equal(ran.gradients[0][:, g * each + i], ran.weights[:, i * group + g])


@thorough
@given(shapes(), st.booleans(), SEEDS)
def test_axpy_is_scale_and_eltwise(pycaffe: Any, tmp_path: Path, shape: Shape, flat: bool, seed: int) -> None:
    factors = shape[:2] if flat else (*shape[:2], 1, 1)
    ran = Ran(ours('type: "Axpy"', [factors, shape, shape]), seed)
    layers = stock("Reshape", "reshape_param { shape { dim: 0 dim: 0 } }", "data0", "a", "a")
    if not flat:
        layers = stock("Flatten", "", "data0", "a", "a")
    layers += stock("Scale", "scale_param { axis: 0 }", "data1 a", "ax", "ax")
    compare(by_caffe(pycaffe, tmp_path, ran, layers + stock("Eltwise", "", "ax data2")), ran)


@st.composite
def interpolations(draw: st.DrawFn) -> tuple[str, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The fields, the size, what padding cuts off, and the size of the output."""
    before, behind = draw(st.sampled_from([(0, 0), (-1, 0), (-1, -2)]))
    size = draw(st.tuples(*[st.integers(1 - before - behind, 8)] * 2))
    left = [side + before + behind for side in size]
    shrink, zoom = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shrunk = [-(-side // shrink) for side in left]
    fields, made = draw(
        st.sampled_from(
            [
                ("height: 7 width: 3", [7, 3]),
                (f"zoom_factor: {zoom}", [(side - 1) * zoom + 1 for side in left]),
                (f"shrink_factor: {shrink}", shrunk),
                (f"shrink_factor: {shrink} zoom_factor: {zoom}", [(side - 1) * zoom + 1 for side in shrunk]),
            ]
        )
    )
    padding = f"pad_beg: {before} pad_end: {behind}"
    return f"{fields} {padding}", size, (before, behind), (made[0], made[1])


@few
@given(interpolations(), SEEDS)
def test_interp_is_bilinear_between_corners(
    drawn: tuple[str, tuple[int, int], tuple[int, int], tuple[int, int]], seed: int
) -> None:
    fields, size, (before, behind), made = drawn
    ran = Ran(ours(f'type: "Interp" interp_param {{ {fields} }}', [(2, 3, *size)]), seed)

    def weights(pixels: int, wanted: int) -> torch.Tensor:
        """The weight of each of ``pixels`` in each of the ``wanted``."""
        found = torch.zeros(wanted, pixels, dtype=torch.float64)
        for at in range(wanted):
            place = at * (pixels - 1) / (wanted - 1) if wanted > 1 else 0.0
            first = min(int(place), pixels - 1)
            found[at, first] += 1 - (place - first)
            found[at, min(first + 1, pixels - 1)] += place - first
        return found

    def formula(data: torch.Tensor) -> torch.Tensor:
        cut = data[:, :, -before : size[0] + behind, -before : size[1] + behind]
        down, across = weights(cut.shape[2], made[0]), weights(cut.shape[3], made[1])
        return torch.einsum("nchw,yh,xw->ncyx", cut, down, across)

    ran.differentiated(formula)
    # With a second bottom, the size is that one's, unless the settings give it: DeepLab v2's interp_layer.cpp
    for fit, second in ((f"pad_beg: {before} pad_end: {behind}", made), (fields, (5, 6))):
        ran = Ran(ours(f'type: "Interp" interp_param {{ {fit} }}', [(2, 3, *size), (1, 4, *second)]), seed)
        ran.differentiated(lambda data, other: formula(data) + 0 * other.sum())


@few
@given(shapes(), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_upsample_repeats_pixels(shape: Shape, down: int, across: int, seed: int) -> None:
    scale = f"scale: {down}" if down == across else f"scale_h: {down} scale_w: {across}"
    ran = Ran(ours(f'type: "Upsample" upsample_param {{ {scale} }}', [shape]), seed)
    ran.differentiated(
        lambda data: torch.einsum(
            "nchw,yx->nchywx", data, torch.ones(down, across, dtype=torch.float64)
        ).reshape(*shape[:2], shape[2] * down, shape[3] * across)
    )


@few
@given(shapes(), st.sampled_from(["", "scale: 2", "upsample_h: {0} upsample_w: {1}"]), SEEDS)
def test_upsample_puts_pixels_where_a_mask_says(shape: Shape, fields: str, seed: int) -> None:
    """The mask is a max pooling's second top: for each pixel, its place in the plane of its channel."""
    height, width = 2 * shape[2], 2 * shape[3]
    layer = f'type: "Upsample" upsample_param {{ {fields.format(height, width)} }}'
    random = np.random.default_rng(seed)
    rows = 2 * np.arange(shape[2])[:, None] + random.integers(0, 2, shape)
    columns = 2 * np.arange(shape[3]) + random.integers(0, 2, shape)
    mask = (rows * width + columns).astype(np.float32)
    values = random.standard_normal(shape).astype(np.float32)
    ran = Ran(ours(layer, [shape, shape]), seed, {"data0": values, "data1": mask})
    expected, gradient = np.zeros((*shape[:2], height, width), np.float32), np.zeros(shape, np.float32)
    for place in np.ndindex(*shape):
        to = (*place[:2], rows[place], columns[place])
        expected[to], gradient[place] = values[place], ran.weights[to]
    np.testing.assert_array_equal(ran.top, expected)
    np.testing.assert_array_equal(ran.gradients[0], gradient)


@thorough
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data(), SEEDS)
def test_the_mask_of_max_pooling_is_caffes(
    pycaffe: Any, tmp_path: Path, kernel: int, stride: int, whole: bool, data: st.DataObject, seed: int
) -> None:
    """Its values are the places; no gradient comes through it. Equal numbers: the first one counts."""
    pad = data.draw(st.integers(0, kernel // 2))
    size = data.draw(st.tuples(*[st.integers(max(kernel - 2 * pad, 1), 9)] * 2))
    rounding = data.draw(st.sampled_from(["", "round_mode: FLOOR"]))
    fields = f"kernel_size: {kernel} stride: {min(stride, kernel)} pad: {pad} {rounding}"
    fields = "global_pooling: true" if whole else fields
    shape = (2, 3, *size)
    text = inputs_text({"data": shape}) + (
        'layer { name: "pool" type: "Pooling" bottom: "data" top: "top" top: "mask"\n'
        f"  pooling_param {{ {fields} }} }}"
    )
    (tmp_path / "caffe.prototxt").write_text(text)
    theirs = pycaffe.Net(str(tmp_path / "caffe.prototxt"), TRAIN)
    net = Net(parse_net(text, Dialect.BVLC, "net"), TRAIN, Dialect.BVLC, where="net", seed=1)
    values = np.random.default_rng(seed).integers(0, 5, shape).astype(np.float32)
    theirs.blobs["data"].data[...] = values
    theirs.forward()
    outputs = net({"data": torch.from_numpy(values)}).outputs
    for name in ("top", "mask"):
        assert net.shapes[name] == theirs.blobs[name].data.shape
        np.testing.assert_array_equal(outputs[name].numpy(), theirs.blobs[name].data)


def test_the_mask_is_exact_in_bfloat16_and_has_to_fit() -> None:
    text = inputs_text({"data": (1, 1, 40, 30)}) + (
        layer("pool", "Pooling", "data", 'top: "mask" pooling_param { kernel_size: 2 stride: 2 }')
        + layer("up", "Upsample", "pool mask", "upsample_param { UPSAMPLED }")
    )

    def net(fields: str) -> Net:
        definition = parse_net(text.replace("UPSAMPLED", fields), Dialect.BVLC, "net")
        return Net(definition, TEST, Dialect.BVLC, where="net", seed=1)

    data = torch.randn(1, 1, 40, 30, generator=torch.Generator().manual_seed(1))
    pooling, unpooling = net("scale: 2").steps
    values, mask = pooling(data.bfloat16())
    (found,) = unpooling(values, mask)
    assert torch.equal(found.flatten()[mask.long().flatten()], values.flatten())
    assert torch.equal(found[found != 0], data.bfloat16()[found != 0])
    with pytest.raises(
        UserError,
        match=r"has 40x20 pixels \(upsample_h, upsample_w\), without the place \d+ in its bottom mask",
    ):
        net("scale_h: 2 scale_w: 2 upsample_h: 40 upsample_w: 20")({"data": data})


@pytest.mark.parametrize(
    ("settings", "bottoms", "says"),
    [
        ('type: "BN"', [(1, 2, 3, 3)], "its bn_param is empty, and two forks have this type: set bn_mode"),
        (BN_AVERAGES.replace("0.8", "1"), [(1, 2, 3, 3)], "bn_param.momentum 1 has to be from 0 to below 1"),
        (
            BN_AVERAGES.replace("eps", "bn_mode: LEARN eps"),
            [(1, 2, 3, 3)],
            "bn_param.bn_mode is not supported",
        ),
        (
            'type: "DepthwiseConvolution" convolution_param { num_output: 4 kernel_size: 1 }',
            [(1, 2, 3, 3)],
            "one filter for each of the 2 channels: convolution_param.num_output 4 has to be 2",
        ),
        ('type: "ROIPooling"', [(1, 2)], "this type of layer is not supported: it is of Fast R-CNN"),
        ('type: "ReLU6" relu_param { }', [(1, 2)], "field relu_param is not supported"),
        ('type: "Permute" permute_param { order: 0 order: 0 }', [(1, 2)], "each once at most"),
        ('type: "Permute" permute_param { order: 4 }', [(1, 2)], "has to name axes from 0 to 1"),
        ('type: "ShuffleChannel" shuffle_channel_param { group: 3 }', [(1, 4, 2, 2)], "does not divide"),
        ('type: "Axpy"', [(1, 2), (1, 3, 2, 2), (1, 3, 2, 2)], "the first has to be the batch and channels"),
        ('type: "Interp"', [(1, 2, 3, 3)], "is empty: give zoom_factor or shrink_factor"),
        (
            'type: "Interp" interp_param { zoom_factor: 2 pad_beg: 1 }',
            [(1, 2, 3, 3)],
            "padding that is 0 or cuts",
        ),
        ('type: "Interp"', [(1, 2, 3, 3), (1, 2)], "its second bottom (1, 2) has no height and width"),
        ('type: "Upsample" upsample_param { scale: 0 }', [(1, 2, 3, 3)], "scales images of four axes up"),
        ('type: "Upsample"', [(1, 2, 3, 3), (1, 2, 3, 4)], "is not a place for each of (1, 2, 3, 3)"),
        (
            'type: "Upsample" upsample_param { upsample_h: 4 upsample_w: 4 }',
            [(1, 2, 3, 3)],
            "with a second bottom",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: str, bottoms: list[Shape], says: str) -> None:
    with pytest.raises(UserError) as caught:
        ours(settings, bottoms)
    message = str(caught.value)
    assert message.startswith("net: layer tested (") and says in message and "\n" not in message


INPUT = 'name: "n" input: "data" input_shape { dim: 2 dim: 4 dim: 9 dim: 8 }\n'
AS_STOCK = INPUT + "".join(
    [
        layer("a", "Convolution", "data", "convolution_param { num_output: 6 kernel_size: 3 pad: 1 }"),
        layer("b", "BN", "a", BN_AVERAGES.removeprefix('type: "BN"')),
        layer("c", "ReLU6", "b"),
        layer(
            "d",
            "DepthwiseConvolution",
            "c",
            "convolution_param { num_output: 6 kernel_size: 3 bias_term: false }",
        ),
        layer("e", "BN", "d", "bn_param { bn_mode: INFERENCE }"),
        layer("f", "Pooling", "e", "pooling_param { kernel_size: 2 stride: 2 ceil_mode: false }"),
        layer("g", "BN", "data", "bn_param { bn_mode: INFERENCE }"),
        layer(
            "h", "ConvolutionDepthwise", "g", "convolution_param { num_output: 4 kernel_size: 2 stride: 2 }"
        ),
    ]
)
"""Layers that stock Caffe has, too, by other names."""

BEYOND = INPUT + "".join(
    [
        layer("a", "Permute", "data", "permute_param { order: 0 order: 2 order: 3 order: 1 }"),
        layer("b", "ShuffleChannel", "data", "shuffle_channel_param { group: 2 }"),
        layer("c", "Normalize", "b", "norm_param { across_spatial: false channel_shared: false }"),
        layer("d", "Normalize", "c", "norm_param { eps: 0.5 }"),
        layer("e", "Interp", "d", "interp_param { zoom_factor: 3 pad_beg: -1 pad_end: -2 }"),
        layer("f", "Interp", "d", "interp_param { height: 4 width: 11 }"),
        layer("g", "Upsample", "d", "upsample_param { scale: 2 }"),
        layer("l", "Pooling", "b", 'top: "mask" pooling_param { kernel_size: 3 stride: 2 pad: 1 }'),
        layer("m", "Upsample", "l mask", "upsample_param { upsample_h: 9 upsample_w: 8 }"),
        layer("h", "Pooling", "b", "pooling_param { pool: AVE global_pooling: true }"),
        layer("i", "Axpy", "h b d"),
        layer("j", "Flatten", "h"),
        layer("k", "Axpy", "j b d"),
    ]
)
"""Layers that it does not have."""


def by_pytorch(text: str, weights: Path, data: Values) -> dict[str, Values]:
    net = Net(parse_net(text, Dialect.BVLC, "net"), TEST, Dialect.BVLC, where="net", seed=1)
    load_weights(net, weights)
    with torch.no_grad():
        outputs = net({"data": torch.from_numpy(data)}).outputs
    return {name: outputs[name].numpy() for name in net.output_names}


@pytest.mark.parametrize("text", [AS_STOCK, BEYOND], ids=["as stock Caffe's", "beyond it"])
def test_onnx_and_stock_caffe_compute_the_same(text: str, caffe_root: Path, tmp_path: Path) -> None:
    weights = write_random(tmp_path / "w.caffemodel", text, Dialect.BVLC)
    data = numbers({"data": (2, 4, 9, 8)}, 1)["data"]
    expected = by_pytorch(text, weights, data)
    exported = by_onnx(export_onnx(text, "deploy.prototxt", None, weights), data)
    assert set(exported) == set(expected)
    for name, values in expected.items():
        assert difference(exported[name], values) < TOLERANCE, name
    merged = merge_bn(text, "deploy.prototxt", None, weights)
    if text == AS_STOCK:
        assert merged.merged == {"a": ["b", "b/scale"], "d": ["e"]}
        merged.write(tmp_path / "m.prototxt", tmp_path / "m.caffemodel")
        for name, values in outputs_of_caffe(
            caffe_root, tmp_path / "m.prototxt", tmp_path / "m.caffemodel", data
        ).items():
            assert difference(values, expected[name]) < TOLERANCE, name
    else:
        kinds = [
            remark.partition(", which")[0].removeprefix("stock Caffe has no type ")
            for remark in merged.remarks
        ]
        assert kinds == ["Permute", "ShuffleChannel", "Normalize", "Interp", "Upsample", "Axpy"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (layer("a", "BN", "data", "bn_param { bn_mode: LEARN }"), "layer a (BN) has bn_mode: LEARN"),
        (layer("a", "Permute", "data", "permute_param { order: 1 }"), "the first axis has to stay the batch"),
    ],
)
def test_what_onnx_cannot_say_of_a_fork_is_named(text: str, says: str, tmp_path: Path) -> None:
    whole = (
        INPUT
        + layer("fc", "Convolution", "data", "convolution_param { num_output: 1 kernel_size: 1 }")
        + text
    )
    weights = write_random(tmp_path / "w.caffemodel", whole, Dialect.BVLC)
    with pytest.raises(UserError) as caught:
        export_onnx(whole, "deploy.prototxt", None, weights)
    assert says in str(caught.value)


CLASSIFIER = AS_STOCK.replace("dim: 2 dim: 4", "dim: 1 dim: 3").replace(
    "num_output: 4", "num_output: 3"
) + "".join(
    [
        layer("pooled", "Pooling", "f", "pooling_param { pool: AVE global_pooling: true }"),
        layer("fc", "InnerProduct", "pooled", "inner_product_param { num_output: 5 }"),
        layer("prob", "Softmax", "fc"),
        'layer { name: "quiet" type: "Silence" bottom: "h" }\n',
    ]
)


def test_classify_and_the_summary_say_what_stock_caffe_cannot_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock Caffe classifies by its own layers of the same kind where it has them all."""
    monkeypatch.chdir(tmp_path)
    write_random(Path("w.caffemodel"), CLASSIFIER, Dialect.BVLC)
    Path("deploy.prototxt").write_text(CLASSIFIER)
    cv2.imwrite("x.png", np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8))
    source = 'source: "l" batch_size: 1 new_height: 9 new_width: 8'
    Path("val.prototxt").write_text(layer("data", "ImageData", "", f"image_data_param {{ {source} }}"))
    said = []
    for backend in ("caffe", "onnxruntime"):
        assert classify(["deploy.prototxt", "w.caffemodel", "x.png", "--backend", backend]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "%" in said[0]
    shuffled = CLASSIFIER.replace('type: "ReLU6"', 'type: "ShuffleChannel"')
    Path("deploy.prototxt").write_text(shuffled)
    with pytest.raises(UserError, match=r"no type ShuffleChannel.*; use --backend onnxruntime"):
        classify(["deploy.prototxt", "w.caffemodel", "x.png", "--backend", "caffe"])
    assert build_net(["--summary", "deploy.prototxt"]) == 0
    shown = capsys.readouterr().out
    assert "stock Caffe has no type ShuffleChannel, which is of ShuffleNet's forks (layer c)" in shown
    assert "stock Caffe has no type BN, which is of SegNet, ENet and PSPNet (layers b, e and 1 more)" in shown


KERNEL = 'kernel_size: 3 pad: 1 weight_filler { type: "msra" }'
TRAINED = "".join(
    [
        layer("c1", "Convolution", "data", f"convolution_param {{ num_output: 32 {KERNEL} }}"),
        layer("b1", "BN", "c1", "bn_param { slope_filler { value: 1 } }"),
        layer("r1", "ReLU6", "b1"),
        layer(
            "p1", "Pooling", "r1", 'top: "mask" pooling_param { kernel_size: 2 stride: 2 ceil_mode: false }'
        ),
        layer(
            "dw", "DepthwiseConvolution", "p1", f"convolution_param {{ num_output: 32 group: 32 {KERNEL} }}"
        ),
        layer("b2", "BN", "dw", "bn_param { scale_filler { value: 1 } }"),
        layer("sh", "ShuffleChannel", "b2", "shuffle_channel_param { group: 4 }"),
        layer("c2", "Convolution", "sh", f"convolution_param {{ num_output: 32 group: 4 {KERNEL} }}"),
        layer("g", "Pooling", "c2", "pooling_param { pool: AVE global_pooling: true }"),
        layer("ax", "Axpy", "g c2 sh"),
        layer("up", "Upsample", "ax mask", "upsample_param { scale: 2 }"),
        layer("it", "Interp", "up", "interp_param { shrink_factor: 3 }"),
        layer("nm", "Normalize", "it", "norm_param { scale_filler { value: 20 } }"),
        layer("pm", "Permute", "nm", "permute_param { order: 0 order: 2 order: 3 order: 1 }"),
        layer(
            "fc",
            "InnerProduct",
            "pm",
            'inner_product_param { num_output: 10 weight_filler { type: "msra" } }',
        ),
        layer("loss", "SoftmaxWithLoss", "fc label"),
    ]
)


def test_a_network_of_forks_layers_trains_and_goes_on_exactly(tmp_path: Path) -> None:
    """With pruning: depthwise convolutions keep their weights. The averages of BN are recalibrated."""
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb", 320))
    text = (tmp_path / "train.prototxt").read_text()
    data = text[: text.index('layer { name: "conv1"')]
    for phase in ("train", "val"):
        (tmp_path / f"{phase}.prototxt").write_text(data + TRAINED)
    stage.solver(base_lr=0.02)
    program = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-solver", "solver.prototxt"]
    program += ["-reestimate_batches", "3"]
    program += [
        part for name, value in sparse_settings().by_name().items() for part in (f"-{name}", str(value))
    ]
    log = stage.run([program])
    assert "Recalibrating the statistics of 1 batch-norm layers over 3 batches" in log
    tested = [float(loss) for loss in re.findall(r"Test net output #0: loss = (\S+)", log)]
    assert tested[-1] < tested[0]
    whole = (tmp_path / "small_iter_20.caffemodel").read_bytes()
    weights = read_weights(tmp_path / "small_iter_20.caffemodel")
    assert (weights["c2"][0] == 0).any() and not (weights["dw"][0] == 0).any()
    stage.run([[*program, "-snapshot", "small_iter_10.solverstate"]])
    assert (tmp_path / "small_iter_20.caffemodel").read_bytes() == whole


@pytest.mark.parametrize("form", [(1, 3), (1, 3, 1, 1), (3,)])
def test_weights_of_a_bn_are_read_in_every_form(form: Shape, tmp_path: Path) -> None:
    """Forks store a number for each channel as 1 x C or 1 x C x 1 x 1; these are written as the latter."""
    net = ours(BN_AVERAGES, [(2, 3, 4, 4)])
    randomize(net, 5)
    save_weights(net, tmp_path / "a.caffemodel")
    content = (tmp_path / "a.caffemodel").read_bytes()
    written = parse_net("", Dialect.BVLC, "a").FromString(content)
    (tested,) = [layer for layer in written.layer if layer.name == "tested"]
    assert [list(blob.shape.dim) for blob in tested.blobs] == [[1, 3, 1, 1]] * 4
    for blob in tested.blobs:
        blob.shape.dim[:] = form
    (tmp_path / "b.caffemodel").write_bytes(written.SerializeToString())
    other = ours(BN_AVERAGES, [(2, 3, 4, 4)])
    assert load_weights(other, tmp_path / "b.caffemodel") == ([], [])
    for blob, expected in zip(other.layer_blobs["tested"], net.layer_blobs["tested"], strict=True):
        assert torch.equal(blob.tensor, expected.tensor)
