"""Networks as ONNX: onnxruntime gives what Caffe gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from deploy_nets import SMALL_CROPS, TOLERANCE, built, by_caffe, by_onnx, difference, images, write_random
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from caffe_jacinto.caffemodel.convert import convert
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.onnx import OPSET, export_onnx
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.weights import main

STOCK, FORK = Dialect.BVLC, Dialect.CAFFE_JACINTO


def declared(channels: int, height: int, width: int, batch: int = 2) -> str:
    dims = " ".join(f"dim: {dim}" for dim in (batch, channels, height, width))
    return f'name: "n" input: "data" input_shape {{ {dims} }}\n'


def layer(name: str, kind: str, bottoms: str, parameters: str = "") -> str:
    reads = " ".join(f'bottom: "{blob}"' for blob in bottoms.split())
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{name}" {parameters} }}\n'


CONV = layer("c", "Convolution", "data", "convolution_param { num_output: 4 kernel_size: 3 pad: 1 }")

EVERY_LAYER = declared(4, 9, 8, batch=1) + "".join(
    [
        layer("power", "Power", "data", "power_param { shift: 2 scale: 0.01 power: 2 }"),
        layer("identity", "Power", "power"),
        layer("bias", "Bias", "identity"),
        layer(
            "conv",
            "Convolution",
            "bias",
            "convolution_param { num_output: 6 kernel_size: 3 group: 2 pad: 1 }",
        ),
        layer("norm", "BatchNorm", "conv", "batch_norm_param { eps: 0.01 }"),
        layer("scale", "Scale", "norm"),
        layer("norm2", "BatchNorm", "scale"),
        layer("prelu", "PReLU", "norm2"),
        layer("leaky", "ReLU", "norm2", "relu_param { negative_slope: 0.1 }"),
        layer("shared", "PReLU", "leaky", "prelu_param { channel_shared: true }"),
        layer("lrn", "LRN", "shared", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.6 k: 2 }"),
        layer("sum", "Eltwise", "prelu leaky lrn", "eltwise_param { coeff: 1 coeff: -0.5 coeff: 2 }"),
        layer("prod", "Eltwise", "prelu sum lrn", "eltwise_param { operation: PROD }"),
        layer("max", "Eltwise", "sum lrn", "eltwise_param { operation: MAX }"),
        layer("concat", "Concat", "sum max prod"),
        layer("wide", "Concat", "sum max", "concat_param { axis: -1 }"),
        layer("wide_sums", "Softmax", "wide", "softmax_param { axis: 3 }"),
        layer("relu", "ReLU", "concat"),
        layer("dropout", "Dropout", "relu"),
        layer("rows", "Flatten", "dropout", "flatten_param { axis: 1 end_axis: 2 }"),
        layer("split", "Reshape", "rows", "reshape_param { shape { dim: 6 dim: -1 } axis: 1 num_axes: 1 }"),
        layer("again", "Reshape", "split", "reshape_param { shape { dim: 1 dim: 0 dim: -1 } }"),
        layer("flat", "Flatten", "again"),
        layer("fc", "InnerProduct", "flat", "inner_product_param { num_output: 5 bias_term: false }"),
        layer("fc_norm", "BatchNorm", "fc"),
        layer("fc_scale", "Scale", "fc_norm", "scale_param { bias_term: true }"),
        layer("fc_plain", "Scale", "fc", "scale_param { bias_term: true }"),
        layer("both", "Eltwise", "fc_scale fc_plain"),
        layer("fc2", "InnerProduct", "both", "inner_product_param { num_output: 7 transpose: true }"),
        layer("prob", "Softmax", "fc2"),
    ]
)

ACTIVATIONS = declared(4, 5, 6, batch=1) + "".join(
    [
        layer("conv", "Convolution", "data", "convolution_param { num_output: 4 kernel_size: 1 }"),
        layer("small", "Power", "conv", "power_param { scale: 0.02 }"),
        layer("sigmoid", "Sigmoid", "small"),
        layer("tanh", "TanH", "sigmoid"),
        layer("elu", "ELU", "small", "elu_param { alpha: 0.5 }"),
        layer("swish", "Swish", "elu", "swish_param { beta: 0.5 }"),
        layer("plain", "Swish", "swish"),
        layer("bnll", "BNLL", "plain"),
        layer("log", "Log", "bnll", "log_param { base: 2 scale: 3 shift: 0.5 }"),
        layer("ln", "Log", "bnll"),
        layer("abs", "AbsVal", "log"),
        layer("exp", "Exp", "abs", "exp_param { base: 2 scale: -0.5 shift: 1 }"),
        layer("e", "Exp", "exp"),
        layer("clip", "Clip", "small", "clip_param { min: -1 max: 0.5 }"),
        layer("over", "Threshold", "clip", "threshold_param { threshold: 0.1 }"),
    ]
)

SHAPES = declared(6, 5, 7, batch=1) + "".join(
    [
        layer("conv", "Convolution", "data", "convolution_param { num_output: 6 kernel_size: 1 }"),
        layer("a", "Slice", "conv", 'top: "b" top: "c" slice_param { slice_point: 1 slice_point: 3 }'),
        layer("halves", "Slice", "c", "slice_param { axis: 3 }"),
        layer("one", "Split", "halves", 'top: "two"'),
        layer("tiled", "Tile", "one", "tile_param { axis: 2 tiles: 2 }"),
        layer("part", "Crop", "conv b", "crop_param { axis: 1 offset: 3 offset: 0 offset: 0 }"),
        layer("corner", "Crop", "conv one", "crop_param { axis: 1 offset: 0 }"),
        layer("small", "Pooling", "conv", "pooling_param { kernel_size: 3 stride: 2 }"),
        layer("middle", "Crop", "conv small", "crop_param { offset: 1 }"),
        layer("relu", "ReLU", "a"),
        layer("sum", "Reduction", "middle", "reduction_param { axis: 2 coeff: 2 }"),
        layer("magnitudes", "Reduction", "middle", "reduction_param { axis: -1 operation: ASUM }"),
        layer("squares", "Reduction", "middle", "reduction_param { axis: 1 operation: SUMSQ coeff: 0.5 }"),
        layer("mean", "Reduction", "middle", "reduction_param { axis: 2 operation: MEAN }"),
        layer("place", "ArgMax", "tiled", "argmax_param { axis: 1 }"),
        layer("places", "ArgMax", "relu", "argmax_param { axis: 3 top_k: 4 }"),
        layer("numbers", "ArgMax", "relu", "argmax_param { axis: -2 top_k: 3 out_max_val: true }"),
        layer("best", "ArgMax", "relu", "argmax_param { top_k: 3 }"),
        layer("both", "ArgMax", "relu", "argmax_param { top_k: 30 out_max_val: true }"),
        'layer { name: "quiet" type: "Silence" bottom: "two" }\n',
    ]
)


def exported(text: str, folder: Path, dialect: Dialect = STOCK) -> bytes:
    weights = write_random(folder / "w.caffemodel", text, dialect)
    return export_onnx(text, "deploy.prototxt", None, weights)


def check_in_caffe(text: str, folder: Path, caffe_root: Path, shape: tuple[int, ...]) -> None:
    model = exported(text, folder)
    (folder / "deploy.prototxt").write_text(text)
    data = images(shape) - 128
    want = by_caffe(caffe_root, folder / "deploy.prototxt", folder / "w.caffemodel", data)
    found = by_onnx(model, data)
    assert found.keys() == want.keys()
    for name, values in want.items():
        assert difference(found[name], values) < TOLERANCE, name


@pytest.mark.caffe
def test_every_kind_of_layer(caffe_root: Path, tmp_path: Path) -> None:
    """The same from the file as pycaffe saves it."""
    check_in_caffe(EVERY_LAYER, tmp_path, caffe_root, (1, 4, 9, 8))
    import caffe

    net = caffe.Net(str(tmp_path / "deploy.prototxt"), caffe.TEST, weights=str(tmp_path / "w.caffemodel"))
    net.save(str(tmp_path / "saved.caffemodel"))
    models = [
        export_onnx(EVERY_LAYER, "deploy.prototxt", None, tmp_path / f"{name}.caffemodel")
        for name in ("w", "saved")
    ]
    assert models[0] == models[1]


@pytest.mark.caffe
def test_every_activation(caffe_root: Path, tmp_path: Path) -> None:
    check_in_caffe(ACTIVATIONS, tmp_path, caffe_root, (1, 4, 5, 6))


SPATIAL = declared(4, 7, 6, batch=1) + "".join(
    [
        layer(
            "up",
            "Deconvolution",
            "data",
            "convolution_param { num_output: 6 kernel_h: 3 kernel_w: 4 stride: 2 pad: 1 group: 2 }",
        ),
        layer("small", "Power", "up", "power_param { scale: 0.05 }"),
        layer("mvn", "MVN", "small", "mvn_param { eps: 0.01 }"),
        layer("means", "MVN", "mvn", "mvn_param { normalize_variance: false across_channels: true }"),
        layer("pyramid", "SPP", "means", "spp_param { pyramid_height: 3 }"),
        layer("averages", "SPP", "small", "spp_param { pyramid_height: 3 pool: AVE }"),
        layer("places", "ArgMax", "pyramid", "argmax_param { top_k: 5 }"),
        layer("rows", "Flatten", "places"),
        layer("embed", "Embed", "rows", "embed_param { input_dim: 126 num_output: 3 }"),
    ]
)


@pytest.mark.caffe
def test_layers_over_space(caffe_root: Path, tmp_path: Path) -> None:
    check_in_caffe(SPATIAL, tmp_path, caffe_root, (1, 4, 7, 6))


@pytest.mark.caffe
def test_layers_that_cut_and_compare(caffe_root: Path, tmp_path: Path) -> None:
    """Also the places of numbers that are equal."""
    check_in_caffe(SHAPES, tmp_path, caffe_root, (1, 6, 5, 7))


@pytest.mark.caffe
@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("network", SMALL_CROPS)
def test_the_published_networks(network: str, dialect: Dialect, caffe_root: Path, tmp_path: Path) -> None:
    """In the fork's dialect: weights converted from those that stock Caffe runs; any batch."""
    stock = built(network, STOCK, tmp_path / "stock")
    weights = write_random(tmp_path / "w.caffemodel", stock, STOCK)
    (tmp_path / "deploy.prototxt").write_text(stock)
    text, given_weights = stock, weights
    if dialect is FORK:
        text, given_weights = built(network, FORK, tmp_path / "fork"), tmp_path / "fork.caffemodel"
        convert(weights, given_weights, FORK)
    model = export_onnx(text, "deploy.prototxt", None, given_weights)
    size = SMALL_CROPS[network]
    for batch in (1, 3):
        data = images((batch, 3, size, size))
        (want,) = by_caffe(caffe_root, tmp_path / "deploy.prototxt", weights, data).values()
        (found,) = by_onnx(model, data).values()
        assert difference(found, want) < TOLERANCE


@st.composite
def poolings(draw: st.DrawFn) -> tuple[tuple[int, int], str]:
    """Sizes of an image, and settings that Caffe takes: the padding is smaller than the kernel."""
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    stride = [draw(st.integers(1, size)) for size in kernel]
    pad = [draw(st.integers(0, size - 1)) for size in kernel]
    sizes = (draw(st.integers(3, 11)), draw(st.integers(3, 11)))
    for axis in range(2):  # no kernel that reaches over the padded image
        kernel[axis] = min(kernel[axis], sizes[axis] + 2 * pad[axis])
    method = draw(st.sampled_from(["MAX", "AVE"]))
    rounding = draw(st.sampled_from(["", "round_mode: FLOOR"]))
    names = ("kernel", kernel), ("stride", stride), ("pad", pad)
    fields = " ".join(f"{name}_h: {values[0]} {name}_w: {values[1]}" for name, values in names)
    return sizes, f"pool: {method} {fields} {rounding}"


def pooled(case: tuple[tuple[int, int], str]) -> str:
    (height, width), parameters = case
    return declared(4, height, width) + CONV + layer("p", "Pooling", "c", f"pooling_param {{ {parameters} }}")


@pytest.mark.caffe
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=poolings())
@example(case=((7, 8), "pool: AVE kernel_size: 3 stride: 2"))
@example(case=((7, 8), "pool: AVE kernel_size: 3 stride: 2 pad: 1"))
@example(case=((6, 6), "pool: AVE kernel_size: 2 stride: 2 pad: 1"))
@example(case=((4, 9), "pool: AVE global_pooling: true"))
@example(case=((4, 9), "pool: MAX global_pooling: true"))
@example(case=((9, 7), "pool: MAX kernel_size: 1 stride: 2"))
@example(case=((9, 9), "pool: AVE kernel_size: 2 stride: 4"))
def test_any_pooling(case: tuple[tuple[int, int], str], caffe_root: Path, tmp_path: Path) -> None:
    height, width = case[0]
    check_in_caffe(pooled(case), tmp_path, caffe_root, (2, 4, height, width))


@st.composite
def convolutions(draw: st.DrawFn) -> str:
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    axes = {
        "kernel": kernel,
        "stride": [draw(st.integers(1, 3)) for _ in range(2)],
        "pad": [draw(st.integers(0, 3)) for _ in range(2)],
    }
    fields = " ".join(f"{name}_h: {values[0]} {name}_w: {values[1]}" for name, values in axes.items())
    dilations = " ".join(f"dilation: {draw(st.integers(1, 2))}" for _ in range(draw(st.integers(0, 2))))
    bias = draw(st.sampled_from(["true", "false"]))
    return f"num_output: 8 group: {draw(st.sampled_from([1, 2, 4]))} bias_term: {bias} {fields} {dilations}"


@pytest.mark.caffe
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parameters=convolutions())
def test_any_convolution(parameters: str, caffe_root: Path, tmp_path: Path) -> None:
    text = declared(4, 8, 7) + layer("c", "Convolution", "data", f"convolution_param {{ {parameters} }}")
    check_in_caffe(text, tmp_path, caffe_root, (2, 4, 8, 7))


def test_zeros_are_kept_and_weights_are_those_of_the_file(tmp_path: Path) -> None:
    text = (
        declared(3, 9, 9) + CONV + layer("fc", "InnerProduct", "c", "inner_product_param { num_output: 5 }")
    )
    model = onnx.load_from_string(exported(text, tmp_path))
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    stored = read_weights(tmp_path / "w.caffemodel")
    for name in ("c", "fc"):
        np.testing.assert_array_equal(arrays[f"{name}:weights"], stored[name][0])
        assert 0.3 < np.mean(arrays[f"{name}:weights"] == 0) < 0.7


def test_the_model_says_what_it_is(tmp_path: Path) -> None:
    content = exported(EVERY_LAYER, tmp_path)
    model = onnx.load_from_string(content)
    assert model.opset_import[0].version == OPSET and model.ir_version == 7
    (given_input,) = model.graph.input
    dims = given_input.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch" and [dim.dim_value for dim in dims[1:]] == [4, 9, 8]
    assert {output.name for output in model.graph.output} == {"wide_sums", "prob"}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("BatchNormalization") == 3  # each with the scale that follows it, where one does
    assert by_onnx(content, images((3, 4, 9, 8)))["prob"].shape == (3, 7)  # though a Reshape says 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CONV + layer("x", "BatchReindex", "c"),
            "layer x: the type BatchReindex cannot be exported; these can: AbsVal, ",
        ),
        (CONV + layer("x", "Filter", "c c"), "layer x: the type Filter cannot be exported"),
        (CONV + layer("x", "Slice", "c", "slice_param { axis: 0 }"), "slice_param.axis cannot be exported"),
        (
            CONV + layer("x", "Reduction", "c"),
            "reduction_param.axis cannot be exported: the size of the batch",
        ),
        (CONV + layer("x", "Crop", "c c", "crop_param { axis: 0 }"), "crop_param.axis cannot be exported"),
        (CONV + layer("x", "Tile", "c", "tile_param { axis: 0 tiles: 2 }"), "tile_param.axis cannot"),
        (
            CONV + layer("x", "LRN", "c", "lrn_param { norm_region: WITHIN_CHANNEL }"),
            r"layer x \(LRN\): its lrn_param.norm_region cannot be exported: only ACROSS_CHANNELS",
        ),
        (
            CONV + layer("x", "Pooling", "c", "pooling_param { pool: STOCHASTIC kernel_size: 2 }"),
            r"layer x \(Pooling\): its pooling_param.pool cannot",
        ),
        (
            CONV + layer("x", "Pooling", "c", "pooling_param { kernel_size: 1 stride: 3 }"),
            r"layer x \(Pooling\): its stride cannot be exported: .* a window lies outside the image",
        ),
        (CONV + layer("x", "Concat", "c c", "concat_param { axis: 0 }"), r"concat_param.axis cannot"),
        (CONV + layer("x", "ReLU", "missing"), "layer x reads missing, which no layer before it writes"),
        (CONV + layer("x", "Eltwise", "c c", "eltwise_param { operation: MAX coeff: 1 coeff: 2 }"), "coeff"),
    ],
)
def test_what_cannot_be_exported_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        exported(declared(3, 9, 9) + text, tmp_path)


def test_an_image_larger_than_caffe_takes_is_refused(tmp_path: Path) -> None:
    weights = write_random(tmp_path / "w", declared(3, 9, 9) + CONV, STOCK)
    text = declared(3, 99999999, 99999999) + CONV + layer("flat", "Flatten", "c")
    with pytest.raises(UserError, match="larger than a blob of Caffe's can be"):
        export_onnx(text, "deploy.prototxt", None, weights)


def test_without_onnx_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_random(tmp_path / "w", declared(3, 9, 9) + CONV, STOCK)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs the Python package onnx: .* -m pip install 'onnx>="):
        export_onnx(declared(3, 9, 9) + CONV, "deploy.prototxt", None, weights)


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deploy.prototxt").write_text(declared(3, 9, 9) + CONV)
    weights = write_random(tmp_path / "w", declared(3, 9, 9) + CONV, STOCK)
    arguments = ["export", str(weights), str(tmp_path / "deploy.prototxt"), "--onnx"]
    assert main([*arguments, str(tmp_path / "new.onnx")]) == 0
    assert "new.onnx" in capsys.readouterr().out
    assert by_onnx((tmp_path / "new.onnx").read_bytes(), images((4, 3, 9, 9)))["c"].shape == (4, 4, 9, 9)
    with pytest.raises(UserError, match="is the file itself"):
        main([*arguments, str(weights)])
    with pytest.raises(UserError, match=r"its folder .* does not exist"):
        main([*arguments, str(tmp_path / "missing" / "new.onnx")])
