"""Batch norms folded into convolutions: the same outputs in OpenCV, onnxruntime and real Caffe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_nets import (
    SMALL_CROPS,
    TOLERANCE,
    Values,
    built,
    by_caffe,
    by_onnx,
    by_opencv,
    difference,
    images,
    write_random,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from caffe_jacinto.caffemodel.convert import convert
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.input_shift import INPUT_SHIFTS, InputShift
from caffe_jacinto.export.merge_bn import Merged, merge_bn
from caffe_jacinto.export.onnx import export_onnx
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.weights import main

STOCK, FORK = Dialect.BVLC, Dialect.CAFFE_JACINTO

INPUT = 'name: "n" input: "data" input_shape { dim: 1 dim: 3 dim: 9 dim: 9 }\n'
NORM = 'layer { name: "NAME/bn" type: "BatchNorm" bottom: "NAME" top: "NAME" }\n'
SCALE = (
    'layer { name: "NAME/scale" type: "Scale" bottom: "NAME" top: "NAME" scale_param { bias_term: true } }\n'
)
RELU = 'layer { name: "NAME/relu" type: "ReLU" bottom: "NAME" top: "NAME" }\n'
FORK_NORM = (
    'layer { name: "NAME/bn" type: "BatchNorm" bottom: "NAME" top: "NAME" '
    "batch_norm_param { scale_bias: true eps: 1e-06 } }\n"
)


def conv(name: str, bottom: str, settings: str = "pad: 1", outputs: int = 6) -> str:
    parameters = f"num_output: {outputs} kernel_size: 3 {settings}"
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        f"convolution_param {{ {parameters} }} }}\n"
    )


def after(name: str, *layers: str) -> str:
    return "".join(layers).replace("NAME", name)


def fc(bottom: str) -> str:
    return (
        f'layer {{ name: "fc" type: "InnerProduct" bottom: "{bottom}" top: "fc" '
        "inner_product_param { num_output: 5 } }\n"
    )


def merged_of(
    text: str, folder: Path, dialect: Dialect = STOCK, shift: InputShift = "power", **form: Any
) -> tuple[Merged, Path]:
    weights = write_random(folder / "w.caffemodel", text, dialect, **form)
    return merge_bn(text, "deploy.prototxt", dialect, weights, shift), weights


def types(merged: Merged) -> list[str]:
    return [layer.type for layer in merged.net.layers if layer.type != "Input"]


def surrounded(data: Values, remarks: list[str]) -> Values:
    """The images as the lines about the merged network say that it takes them."""
    for line in remarks:
        said = re.search(r"with (\d+) rows above and below and (\d+) columns left and right of (.*)$", line)
        if said:
            rows, columns = int(said[1]), int(said[2])
            values = [float(value) for value in said[3].removesuffix(" (by channel)").split(", ")]
            count, channels, height, width = data.shape
            grown = np.empty((count, channels, height + 2 * rows, width + 2 * columns), np.float32)
            grown[:] = np.reshape(values, (-1, 1, 1))
            grown[:, :, rows : rows + height, columns : columns + width] = data
            data = grown
    return data


def check(
    text: str, folder: Path, dialect: Dialect = STOCK, shift: InputShift = "power", **form: Any
) -> Merged:
    """Merge a network with random weights; OpenCV and onnxruntime agree with the one that is not merged."""
    merged, weights = merged_of(text, folder, dialect, shift, **form)
    data = images((2, 3, 9, 9))
    whole = by_onnx(export_onnx(text, "deploy.prototxt", dialect, weights), data)
    small = folder / "merged.caffemodel"
    small.write_bytes(merged.weight_bytes())
    data = surrounded(data, merged.remarks)
    found = by_onnx(export_onnx(merged.deploy(), "merged.prototxt", STOCK, small), data)
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert difference(found[name], values) < TOLERANCE
    if len(whole) == 1 and "Bias" not in types(merged):
        (values,) = whole.values()
        opened = by_opencv(merged.deploy(), merged.weight_bytes(), data)
        assert difference(opened.reshape(values.shape), values) < TOLERANCE
    return merged


@pytest.mark.parametrize("settings", ["pad: 1", "group: 3 bias_term: false", "dilation: 2 pad: 2 stride: 2"])
def test_norm_and_scale_go_into_convolution_and_inner_product(settings: str, tmp_path: Path) -> None:
    text = (
        INPUT
        + conv("c", "data", settings)
        + after("c", NORM, SCALE, RELU)
        + fc("c")
        + after("fc", NORM, SCALE)
    )
    merged = check(text, tmp_path)
    assert types(merged) == ["Convolution", "ReLU", "InnerProduct"]
    assert merged.merged == {"c": ["c/bn", "c/scale"], "fc": ["fc/bn", "fc/scale"]}
    assert merged.remarks == []


@pytest.mark.parametrize("settings", ["stride: 2", "group: 3 bias_term: false", "pad: 1 stride: 2 group: 2"])
def test_norm_and_scale_go_into_a_deconvolution(settings: str, tmp_path: Path) -> None:
    """Its weights have the inputs first, and then the outputs of one group."""
    up = conv("d", "c", settings).replace('"Convolution"', '"Deconvolution"')
    text = INPUT + conv("c", "data") + up + after("d", NORM, SCALE, RELU)
    merged = check(text, tmp_path)
    assert types(merged) == ["Convolution", "Deconvolution", "ReLU"]
    assert merged.merged == {"d": ["d/bn", "d/scale"]}


def test_zeros_stay_zero(tmp_path: Path) -> None:
    text = INPUT + conv("c", "data") + after("c", NORM, SCALE)
    merged, weights = merged_of(text, tmp_path)
    before = read_weights(weights)["c"][0]
    assert 0.3 < np.mean(before == 0) < 0.7
    np.testing.assert_array_equal(before == 0, merged.net.layers[1].blobs[0] == 0)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("dialect", "norm"), [(STOCK, NORM + SCALE), (FORK, FORK_NORM)])
def test_both_dialects_and_the_old_form_of_blobs(
    dialect: Dialect, norm: str, old: bool, tmp_path: Path
) -> None:
    text = INPUT + conv("c", "data") + after("c", norm, RELU) + fc("c") + after("fc", norm)
    merged = check(text, tmp_path, dialect, old=old)
    assert types(merged) == ["Convolution", "ReLU", "InnerProduct"]


def test_the_forks_numbers_are_those_of_a_formula(tmp_path: Path) -> None:
    """The fork passes over the factor, and takes no eps below 1e-5."""
    text = INPUT + conv("c", "data", "bias_term: false") + after("c", FORK_NORM)
    merged, weights = merged_of(text, tmp_path, FORK)
    stored = read_weights(weights)
    mean, variance, _, gain, shift = (blob.astype(np.float64) for blob in stored["c/bn"])
    root = np.sqrt(variance + 1e-5)
    got = merged.net.layers[1]
    np.testing.assert_allclose(got.blobs[0], stored["c"][0] * (gain / root)[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(got.blobs[1], shift - mean * gain / root, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (after("data", NORM) + conv("c", "data"), "data/bn (BatchNorm) stays: it reads the network's input"),
        (
            conv("c", "data") + after("c", RELU, NORM, SCALE),
            "c/bn (BatchNorm) stays: it reads c, the output of c/relu (ReLU)",
        ),
        (
            conv("c", "data")
            + 'layer { name: "n" type: "BatchNorm" bottom: "c" top: "n" }'
            + 'layer { name: "sum" type: "Eltwise" bottom: "c" bottom: "n" top: "sum" }',
            "n (BatchNorm) stays: sum also reads c",
        ),
    ],
)
def test_what_cannot_be_folded_stays_and_is_named(text: str, reason: str, tmp_path: Path) -> None:
    merged = check(INPUT + text, tmp_path)
    assert "BatchNorm" in types(merged)
    assert merged.remarks == [reason]


BIAS = 'layer { name: "bias" type: "Bias" bottom: "data" top: "shifted" }\n'
POWER = 'layer { name: "bias" type: "Power" bottom: "data" top: "shifted" power_param { shift: -128 } }\n'


@pytest.mark.parametrize("shift", [BIAS, POWER])
@pytest.mark.parametrize("reader", [conv("c", "shifted", "group: 3"), fc("shifted")])
def test_an_input_bias_is_folded_where_nothing_pads(shift: str, reader: str, tmp_path: Path) -> None:
    merged = check(INPUT + shift + reader, tmp_path)
    assert len(types(merged)) == 1


@pytest.mark.parametrize("shift", [BIAS, POWER])
def test_an_input_bias_before_padding_is_a_power(shift: str, tmp_path: Path) -> None:
    merged = check(INPUT + shift + conv("c", "shifted", "pad_h: 0 pad_w: 1"), tmp_path)
    assert types(merged) == ["Power", "Convolution"]
    assert merged.net.layers[1].message.power_param.shift == -128


def test_an_input_bias_that_differs_by_channel_is_a_scale(tmp_path: Path) -> None:
    text = INPUT + BIAS + conv("c", "shifted")
    stored = messages(STOCK).NetParameter.FromString(write_random(tmp_path / "w", text, STOCK).read_bytes())
    stored.layer[1].blobs[0].data[:] = [-104, -117, -123]
    (tmp_path / "w").write_bytes(stored.SerializeToString())
    merged = merge_bn(text, "deploy.prototxt", None, tmp_path / "w")
    assert types(merged) == ["Scale", "Convolution"]
    data = images((1, 3, 9, 9))
    (want,) = by_onnx(export_onnx(text, "deploy.prototxt", None, tmp_path / "w"), data).values()
    assert difference(by_opencv(merged.deploy(), merged.weight_bytes(), data), want) < TOLERANCE


@pytest.mark.parametrize("source", [BIAS, POWER])
@pytest.mark.parametrize(
    ("form", "left"),
    [
        ("power", ["Power", "Convolution"]),
        ("bias", ["Bias", "Convolution"]),
        ("scale", ["Scale", "Convolution"]),
        ("conv", ["Convolution"]),
    ],
)
def test_an_input_shift_before_padding_in_every_form(
    form: InputShift, left: list[str], source: str, tmp_path: Path
) -> None:
    merged = check(INPUT + source + conv("c", "shifted", "pad_h: 2 pad_w: 1 group: 3"), tmp_path, shift=form)
    assert types(merged) == left
    if form == "conv":
        assert merged.merged == {"c": ["bias"]}
        (line,) = merged.remarks
        assert line == (
            "c pads no more: data is 13x11 (height x width) now; surround the images with "
            "2 rows above and below and 1 columns left and right of 128"
        )
        assert re.findall(r"pad\w*: \d", merged.deploy()) == ["pad: 0"]


def test_a_shift_that_differs_by_channel_goes_into_the_convolution(tmp_path: Path) -> None:
    text = INPUT + BIAS + conv("c", "shifted")
    stored = messages(STOCK).NetParameter.FromString(write_random(tmp_path / "w", text, STOCK).read_bytes())
    stored.layer[1].blobs[0].data[:] = [-104, -117, -123.5]
    (tmp_path / "w").write_bytes(stored.SerializeToString())
    merged = merge_bn(text, "deploy.prototxt", None, tmp_path / "w", "conv")
    assert merged.remarks[0].endswith("of 104, 117, 123.5 (by channel)")
    data = images((1, 3, 9, 9))
    (want,) = by_onnx(export_onnx(text, "deploy.prototxt", None, tmp_path / "w"), data).values()
    grown = surrounded(data, merged.remarks)
    assert difference(by_opencv(merged.deploy(), merged.weight_bytes(), grown), want) < TOLERANCE


def test_for_an_importer_without_power_other_layers_take_its_place(tmp_path: Path) -> None:
    """What it adds goes into the convolution before it; what it multiplies by is a Scale."""
    power = 'layer { name: "NAME" type: "Power" bottom: "BOTTOM" top: "NAME" power_param { SETTINGS } }\n'
    text = INPUT + power.replace("NAME", "p").replace("BOTTOM", "data").replace(
        "SETTINGS", "scale: 0.5 shift: 3"
    )
    text += conv("c", "p") + power.replace("NAME", "q").replace("BOTTOM", "c").replace("SETTINGS", "shift: 5")
    text += after("q", RELU) + power.replace("NAME", "r").replace("BOTTOM", "q").replace(
        "SETTINGS", "power: 2"
    )
    merged = check(text, tmp_path, shift="bias")
    assert types(merged) == ["Scale", "Convolution", "ReLU", "Power"]
    assert merged.remarks == ["r (Power): TI's importer does not list this type of layer"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (conv("c", "shifted") + conv("d", "data"), "another layer reads data, too"),
        (conv("c", "shifted") + conv("d", "shifted"), "not one convolution alone reads its output"),
        (after("shifted", RELU) + conv("c", "shifted"), "not one convolution alone reads its output"),
    ],
)
def test_a_shift_that_cannot_go_into_a_convolution(text: str, reason: str, tmp_path: Path) -> None:
    message = (
        rf"deploy.prototxt: layer bias \(Bias\) cannot go into a convolution: {reason}; .* --input-shift bias"
    )
    with pytest.raises(UserError, match=message):
        merged_of(INPUT + BIAS + text, tmp_path, shift="conv")


def test_a_bias_is_not_folded_past_a_layer_that_writes_over_its_input(tmp_path: Path) -> None:
    merged = check(INPUT + BIAS + after("data", RELU) + conv("c", "shifted", "") + fc("data"), tmp_path)
    assert types(merged)[0] == "Power"


@st.composite
def networks(draw: st.DrawFn) -> str:
    """Layers after one another and beside one another, in place and not, on blobs that earlier ones wrote.

    Caffe takes no layer in place on a blob that another one reads.
    """
    text, sizes = INPUT, {"data": (3, 9)}
    read = {"data"}
    for number in range(draw(st.integers(2, 9))):
        name = f"l{number}"
        bottom = draw(st.sampled_from([*sizes, list(sizes)[-1]]))
        channels, size = sizes[bottom]
        kinds = ["Convolution", "BatchNorm", "Scale", "Bias", "Power", "ReLU", "Eltwise"]
        kind = draw(st.sampled_from([*kinds, "Convolution", "BatchNorm"]))
        top = name if kind in ("Convolution", "Eltwise") else draw(st.sampled_from([bottom, name]))
        top = name if bottom in read else top
        bottoms, parameters, shape = [bottom], "", (channels, size)
        if kind == "Convolution":
            pad = draw(st.integers(0, 1)) if size > 3 else 1
            bias = draw(st.sampled_from(["true", "false"]))
            shape = (draw(st.sampled_from([3, 6])), size - 2 + 2 * pad)
            group = 3 if draw(st.booleans()) else 1
            parameters = (
                f"convolution_param {{ num_output: {shape[0]} kernel_size: 3 pad: {pad} group: {group} "
                f"bias_term: {bias} }}"
            )
        elif kind == "Scale":
            parameters = f"scale_param {{ bias_term: {draw(st.sampled_from(['true', 'false']))} }}"
        elif kind == "Power":
            parameters = "power_param { shift: 0.5 }"
        elif kind == "Eltwise":
            bottoms.append(draw(st.sampled_from([blob for blob in sizes if sizes[blob] == shape])))
        sizes.pop(top, None)
        read |= set(bottoms) - {top}
        sizes[top] = shape
        reads = " ".join(f'bottom: "{blob}"' for blob in bottoms)
        text += f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{top}" {parameters} }}\n'
    return text + conv("last", list(sizes)[-1])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=networks(), shift=st.sampled_from(INPUT_SHIFTS))
def test_networks_of_any_order_give_the_same(text: str, shift: InputShift, tmp_path: Path) -> None:
    try:
        merged = check(text, tmp_path, shift=shift)
    except UserError as error:
        assume("cannot go into a convolution" not in str(error))
        raise
    assert shift == "power" or "Power" not in types(merged)


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path) -> None:
    text = INPUT + conv("c", "data") + after("c", NORM)
    weights = write_random(tmp_path / "w", text, STOCK)
    stored = messages(STOCK).NetParameter.FromString(weights.read_bytes())
    stored.layer[2].blobs[1].data[2] = -1
    weights.write_bytes(stored.SerializeToString())
    with pytest.raises(UserError, match=r"c/bn .* not finite"):
        merge_bn(text, "deploy.prototxt", STOCK, weights)
    stored.layer[2].blobs[1].data[2] = 1
    stored.layer[2].blobs[2].data[0] = 0
    weights.write_bytes(stored.SerializeToString())
    with pytest.raises(
        UserError, match=r"a factor of 0 beside means and variances: c/bn; if NVCaffe wrote them"
    ):
        merge_bn(text, "deploy.prototxt", STOCK, weights)
    for blob in stored.layer[2].blobs[:2]:
        blob.data[:] = [0] * len(blob.data)
    (tmp_path / "none").write_bytes(stored.SerializeToString())
    for write_as in (merge_bn, export_onnx):
        with pytest.raises(UserError, match=r"without statistics, which no training has set: c/bn; train"):
            write_as(text, "deploy.prototxt", STOCK, tmp_path / "none")
    batch = text.replace('"c" }', '"c" batch_norm_param { use_global_stats: false } }')
    with pytest.raises(UserError, match="use_global_stats"):
        merge_bn(batch, "deploy.prototxt", STOCK, weights)
    with pytest.raises(UserError, match=r"c: blob 0 is 6 x 3 x 3 x 3 in the weight file"):
        merge_bn(text.replace("num_output: 6", "num_output: 8"), "deploy.prototxt", STOCK, weights)
    for group in (0, 4):
        with pytest.raises(
            UserError, match=f"c .Convolution.: its 6 outputs do not divide into {group} groups"
        ):
            grouped = text.replace("num_output: 6", f"num_output: 6 group: {group}")
            merge_bn(grouped, "deploy.prototxt", STOCK, weights)
    with pytest.raises(UserError, match="has no layers"):
        merge_bn(INPUT, "deploy.prototxt", None, weights)
    data = 'layer { name: "d" type: "Data" top: "data" data_param { source: "x" } }'
    with pytest.raises(UserError, match="reads data; give the deploy network"):
        merge_bn(data + conv("c", "data"), "train.prototxt", None, weights)


def test_what_only_the_fork_can_say_is_refused(tmp_path: Path) -> None:
    pool = (
        'layer { name: "p" type: "Pooling" bottom: "c" top: "p" '
        "pooling_param { kernel_size: 2 stride: 2 torch_pooling: true } }"
    )
    text = INPUT + conv("c", "data") + after("c", FORK_NORM) + pool
    with pytest.raises(
        UserError, match=r"p \(Pooling\): stock Caffe has no field pooling_param.torch_pooling"
    ):
        merged_of(text, tmp_path, FORK)


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = INPUT + conv("c", "data") + after("c", NORM, SCALE, RELU, NORM.replace("/bn", "/bn2"))
    (tmp_path / "deploy.prototxt").write_text(text)
    weights = write_random(tmp_path / "w.caffemodel", text, STOCK)
    arguments = ["merge-bn", str(weights), str(tmp_path / "deploy.prototxt"), "--output"]
    assert main([*arguments, str(tmp_path / "new" / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "merged into c: c/bn, c/scale"
    assert printed[1] == "c/bn2 (BatchNorm) stays: it reads c, the output of c/relu (ReLU)"
    parse_net((tmp_path / "new/out/deploy_merged.prototxt").read_text(), STOCK, "merged")
    assert list(read_weights(tmp_path / "new/out/w_merged.caffemodel")) == ["c", "c/bn2"]
    with pytest.raises(UserError, match=r"a weight file, not text; give the deploy"):
        main(["merge-bn", str(weights), str(weights), "--output", str(tmp_path)])


@pytest.mark.caffe
@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("network", SMALL_CROPS)
def test_the_published_networks_in_caffe_and_opencv(
    network: str, dialect: Dialect, caffe_root: Path, tmp_path: Path
) -> None:
    """The unmerged network is stock Caffe's; the fork's files are converted from it."""
    stock = built(network, STOCK, tmp_path / "stock")
    weights = write_random(tmp_path / "w.caffemodel", stock, STOCK)
    (tmp_path / "deploy.prototxt").write_text(stock)
    text, given_weights = stock, weights
    if dialect is FORK:
        text, given_weights = built(network, FORK, tmp_path / "fork"), tmp_path / "fork.caffemodel"
        convert(weights, given_weights, FORK)
    merged = merge_bn(text, "deploy.prototxt", None, given_weights)
    merged.write(tmp_path / "merged.prototxt", tmp_path / "merged.caffemodel")
    size = SMALL_CROPS[network]
    data = images((2, 3, size, size))
    (want,) = by_caffe(caffe_root, tmp_path / "deploy.prototxt", weights, data).values()
    assert np.ptp(want) > 0.1
    (got,) = by_caffe(caffe_root, tmp_path / "merged.prototxt", tmp_path / "merged.caffemodel", data).values()
    assert difference(got, want) < TOLERANCE
    opened = by_opencv(merged.deploy(), merged.weight_bytes(), data)
    assert difference(opened.reshape(want.shape), want) < TOLERANCE
    assert ("BatchNorm" in types(merged)) == (network == "resnet10")
    assert len(merged.remarks) == {"resnet10": 5, "jacintonet11": dialect is FORK, "bvlc_alexnet": 0}[network]
    layers = len(types(merged))
    for shift in INPUT_SHIFTS[1:] if network == "jacintonet11" else ():
        merged = merge_bn(text, "deploy.prototxt", None, given_weights, shift)
        assert ("Bias" in types(merged), "Scale" in types(merged)) == (shift == "bias", shift == "scale")
        assert len(types(merged)) == layers - (shift == "conv") and "Power" not in types(merged)
        merged.write(tmp_path / "merged.prototxt", tmp_path / "merged.caffemodel")
        grown = surrounded(data, merged.remarks)
        files = tmp_path / "merged.prototxt", tmp_path / "merged.caffemodel"
        (got,) = by_caffe(caffe_root, *files, grown).values()
        assert difference(got, want) < TOLERANCE
        if shift != "bias":  # which OpenCV does not read
            opened = by_opencv(merged.deploy(), merged.weight_bytes(), grown)
            assert difference(opened.reshape(want.shape), want) < TOLERANCE


@pytest.mark.caffe
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=networks())
def test_networks_of_any_order_give_the_same_in_caffe(text: str, caffe_root: Path, tmp_path: Path) -> None:
    merged, weights = merged_of(text, tmp_path)
    (tmp_path / "deploy.prototxt").write_text(text)
    merged.write(tmp_path / "merged.prototxt", tmp_path / "merged.caffemodel")
    data = images((2, 3, 9, 9))
    want = by_caffe(caffe_root, tmp_path / "deploy.prototxt", weights, data)
    found = by_onnx(export_onnx(text, "deploy.prototxt", STOCK, weights), data)
    assert want.keys() == found.keys()
    got = by_caffe(caffe_root, tmp_path / "merged.prototxt", tmp_path / "merged.caffemodel", data)
    for name, values in want.items():
        assert difference(got[name], values) < TOLERANCE
        assert difference(found[name], values) < TOLERANCE
