"""Networks without the channels that have no effect: the same outputs, in real Caffe and on PyTorch.

The drawn networks compute with small whole numbers, so that every sum is exact in float32 in any order: their
outputs must be equal to the last bit. With other weights the order of the sums shows in the last bits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_nets import built, by_caffe, by_onnx, difference, images, write_random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.caffemodel.net_file import NewLayer, write_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import sha256_of
from caffe_jacinto.export.onnx import export_onnx
from caffe_jacinto.export.shrink import Shrunk, shrink
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_any_net, parse_net
from caffe_jacinto.quantization.settling import ranges_file, read_ranges
from caffe_jacinto.weights import main

Values = NDArray[np.float32]
Blobs = dict[str, list[Values]]

STOCK, FORK = Dialect.BVLC, Dialect.CAFFE_JACINTO
SIDE, CHANNELS = 8, 3
INPUT = f'name: "n" input: "data" input_shape {{ dim: 1 dim: {CHANNELS} dim: {SIDE} dim: {SIDE} }}\n'


def layer(name: str, kind: str, bottoms: str, rest: str = "", top: str = "") -> str:
    reads = " ".join(f'bottom: "{bottom}"' for bottom in bottoms.split())
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{top or name}" {rest} }}\n'


def conv(name: str, bottom: str, outputs: int = 4, rest: str = "kernel_size: 3 pad: 1") -> str:
    return layer(name, "Convolution", bottom, f"convolution_param {{ num_output: {outputs} {rest} }}")


def relu(name: str) -> str:
    return layer(f"{name}/relu", "ReLU", name, top=name)


def fc(bottom: str, name: str = "fc") -> str:
    return layer(name, "InnerProduct", bottom, "inner_product_param { num_output: 2 }")


def filled(text: str, dialect: Dialect = STOCK, value: float = 1.0) -> Blobs:
    """Blobs of ones; a batch norm that changes nothing."""
    found = {}
    for name, shapes in blob_shapes(parse_net(text, dialect, "net"), TEST).items():
        found[name] = [np.full([dim or 1 for dim in shape], value, np.float32) for shape in shapes]
    for described in parse_net(text, dialect, "net").layer:
        if described.type == "BatchNorm":
            found[described.name][0][:] = 0
    return found


def stored(path: Path, text: str, blobs: Blobs, dialect: Dialect = STOCK) -> Path:
    layers = messages_in(parse_net(text, dialect, "net"), TEST)
    write_net(path, "n", [NewLayer(item, blobs.get(item.name, [])) for item in layers], dialect)
    return path


def shrunk_of(folder: Path, text: str, blobs: Blobs, dialect: Dialect = STOCK) -> tuple[Shrunk, Blobs]:
    """The smaller network, whose weights fit it, and its weights."""
    result = shrink(text, "net", dialect, stored(folder / "whole.caffemodel", text, blobs, dialect))
    small = folder / "small.caffemodel"
    result.write(folder / "small.prototxt", small)
    assert check_fit(small, parse_net(result.deploy, dialect, "small")) == []
    return result, {name: list(values) for name, values in read_weights(small).items()}


def outputs_of(result: Shrunk) -> dict[str, int]:
    net = parse_any_net(result.deploy, "small")
    return {item.name: item.convolution_param.num_output for item in net.layer if item.type == "Convolution"}


# ------------------------------------------------------------------------------------------ what can go


def test_a_channel_without_weights_goes_with_the_inputs_that_read_it(tmp_path: Path) -> None:
    text = INPUT + "# the first\n" + conv("a", "data") + relu("a") + conv("b", "a") + fc("b")
    blobs = filled(text)
    blobs["a"][0][1:3] = 0
    blobs["a"][1][:] = [5, -1, 0, 7]  # ReLU makes both 0
    result, small = shrunk_of(tmp_path, text, blobs)
    assert result.removed == {"a": 2}
    assert [values.shape for values in small["a"]] == [(2, 3, 3, 3), (2,)]
    assert list(small["a"][1]) == [5, 7]
    assert small["b"][0].shape == (4, 2, 3, 3)
    assert "# the first" in result.deploy and result.deploy.count("num_output: 2") == 2  # of a and of fc


def test_a_constant_is_carried_into_the_next_bias_unless_that_layer_pads(tmp_path: Path) -> None:
    plain = "kernel_size: 3 bias_term: false"
    text = INPUT + conv("a", "data") + conv("b", "a", 4, plain) + fc("b")
    blobs = filled(text)
    blobs["a"][0][1] = 0
    blobs["a"][1][1] = 3
    result, small = shrunk_of(tmp_path, text, blobs)
    assert result.removed == {"a": 1}
    assert "bias_term: true" in result.deploy
    assert list(small["b"][1]) == [27] * 4  # nine weights of 1
    padded = text.replace("bias_term: false", "pad: 1")
    result, small = shrunk_of(tmp_path, padded, filled(padded) | {"a": blobs["a"]})
    assert result.removed == {} and small["a"][0].shape == blobs["a"][0].shape


def test_a_channel_that_nobody_reads_goes(tmp_path: Path) -> None:
    text = INPUT + conv("a", "data") + conv("b", "a") + conv("c", "b") + fc("c")
    blobs = filled(text)
    blobs["c"][0][:, 2] = 0
    blobs["b"][0][[0, 1, 3], 1] = 0  # a's second channel is read by b's third alone, and that by nobody
    result, _ = shrunk_of(tmp_path, text, blobs)
    assert outputs_of(result) == {"a": 3, "b": 3, "c": 4}


@pytest.mark.parametrize(("dialect", "names"), [(STOCK, ["a/bn", "a/scale"]), (FORK, ["a/bn"])])
def test_batch_norm_of_both_dialects(dialect: Dialect, names: list[str], tmp_path: Path) -> None:
    norm = layer(
        "a/bn", "BatchNorm", "a", "batch_norm_param { scale_bias: true }" if dialect is FORK else "", "a"
    )
    scale = layer("a/scale", "Scale", "a", "scale_param { bias_term: true }", "a")
    text = INPUT + conv("a", "data") + norm + (scale if dialect is STOCK else "") + relu("a")
    text += conv("b", "a") + fc("b")
    blobs = filled(text, dialect)
    blobs["a"][0][0] = 0
    blobs[names[-1]][-1][:] = [-2, 1, 1, 1]  # the bias: below 0 in the first channel
    result, small = shrunk_of(tmp_path, text, blobs, dialect)
    assert result.removed == {"a": 1}
    assert {values.size for name in names for values in small[name]} == {3, 1}


def test_a_sum_loses_a_channel_only_where_all_its_terms_do(tmp_path: Path) -> None:
    text = (
        INPUT + conv("a", "data") + conv("b", "a") + layer("sum", "Eltwise", "a b") + relu("sum") + fc("sum")
    )
    blobs = filled(text)
    for name, channels in (("a", [0, 1]), ("b", [1, 2])):
        for values in blobs[name]:
            values[channels] = 0
    result, _ = shrunk_of(tmp_path, text, blobs)
    assert outputs_of(result) == {"a": 3, "b": 3}


def test_groups_lose_as_many_each_and_a_depthwise_convolution_loses_groups(tmp_path: Path) -> None:
    grouped = conv("g", "a", 8, "kernel_size: 1 group: 2")
    depthwise = conv("d", "g", 8, "kernel_size: 3 pad: 1 group: 8")
    text = INPUT + conv("a", "data", 8) + grouped + depthwise + fc("d")
    blobs = filled(text)
    for values in blobs["a"]:
        values[[0, 1, 5]] = 0  # two of the first group, one of the second
    for values in blobs["g"]:
        values[[1, 6]] = 0
    for values in blobs["d"]:
        values[[1, 6]] = 0
    result, small = shrunk_of(tmp_path, text, blobs)
    assert outputs_of(result) == {"a": 6, "g": 6, "d": 6}
    assert small["g"][0].shape == (6, 3, 1, 1)
    assert "group: 6" in result.deploy and "group: 2" in result.deploy


def test_groups_of_one_input_and_several_outputs(tmp_path: Path) -> None:
    """They are not depthwise: the outputs go, the groups stay."""
    text = INPUT + conv("a", "data", 9, "kernel_size: 3 group: 3") + fc("a")
    blobs = filled(text)
    for values in blobs["a"]:
        values[[0, 4, 8]] = 0
    result, small = shrunk_of(tmp_path, text, blobs)
    assert outputs_of(result) == {"a": 6}
    assert small["a"][0].shape == (6, 1, 3, 3) and "group: 3" in result.deploy


@pytest.mark.parametrize("pool", ["MAX", "AVE"])
def test_zeros_of_padding_enter_an_average(pool: str, tmp_path: Path) -> None:
    pooling = layer("p", "Pooling", "a", f"pooling_param {{ pool: {pool} kernel_size: 3 stride: 2 pad: 1 }}")
    text = INPUT + conv("a", "data") + pooling + fc("p")
    blobs = filled(text)
    blobs["a"][0][0] = 0
    blobs["a"][1][0] = 2
    result, _ = shrunk_of(tmp_path, text, blobs)
    assert result.removed == ({"a": 1} if pool == "MAX" else {})


def test_what_stays(tmp_path: Path) -> None:
    shared = 'param { name: "w" }'
    text = INPUT + conv("a", "data") + conv("b", "a").replace("}\n", f"{shared} }}\n")
    text += conv("c", "b").replace("}\n", f"{shared} }}\n")
    blobs = filled(text)
    for values in blobs["a"]:
        values[:] = 0  # all of them, but a convolution has outputs
    for values in blobs["c"]:
        values[:2] = 0  # the network's outputs
    result, _ = shrunk_of(tmp_path, text, blobs)
    assert result.removed == {}  # b and c share their weights: they read all of a
    alone = text.replace(shared, "")
    result, _ = shrunk_of(tmp_path, alone, blobs)
    assert outputs_of(result) == {"a": 1, "b": 4, "c": 4}  # c pads, and b is 1


# ---------------------------------------------------------------------------------------- drawn networks


class Drawn:
    """A network, layer by layer, with blobs of small whole numbers."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.text = INPUT
        self.count = 0
        self.random = np.random.default_rng(draw(st.integers(0, 1 << 30)))

    def name(self) -> str:
        self.count += 1
        return f"l{self.count}"

    def convolution(self, bottom: str, channels: int, outputs: int, *, keeps_size: bool = False) -> str:
        name = self.name()
        groups = [g for g in (1, 2, channels) if channels % g == 0 and outputs % g == 0]
        group = self.draw(st.sampled_from(groups))
        kernel = self.draw(st.sampled_from(["kernel_size: 1", "kernel_size: 3 pad: 1", "kernel_size: 3"]))
        if keeps_size and kernel == "kernel_size: 3":
            kernel = "kernel_size: 1"
        bias = self.draw(st.sampled_from(["", "bias_term: false"]))
        self.text += conv(name, bottom, outputs, f"{kernel} group: {group} {bias}")
        for follower in ("norm", "scale", "relu"):
            if self.draw(st.booleans()):
                self.follow(name, follower)
        return name

    def follow(self, name: str, kind: str) -> None:
        rest = {
            "norm": ("BatchNorm", "batch_norm_param { eps: 0 }"),
            "scale": ("Scale", "scale_param { bias_term: true }"),
            "relu": ("ReLU", ""),
        }[kind]
        self.text += layer(f"{name}/{kind}", rest[0], name, rest[1], name)

    def blobs(self) -> Blobs:
        """Whole numbers from -2 to 2, many rows and columns of them 0."""
        found = {}
        kinds = {item.name: item.type for item in parse_net(self.text, STOCK, "n").layer}
        for name, shapes in blob_shapes(parse_net(self.text, STOCK, "n"), TEST).items():
            arrays = [self.random.integers(-2, 3, [dim or 1 for dim in shape]) for shape in shapes]
            if kinds[name] == "BatchNorm":
                arrays[1][:], arrays[2][:] = 4, 1
            elif arrays[0].ndim > 1:
                arrays[0][self.random.random(len(arrays[0])) < 0.5] = 0
                arrays[0][:, self.random.random(arrays[0].shape[1]) < 0.2] = 0
            found[name] = [values.astype(np.float32) for values in arrays]
            if kinds[name] in ("Convolution", "Scale"):
                for values in found[name][1:]:
                    values[self.random.random(len(values)) < 0.5] = 0
        return found


@st.composite
def drawn_networks(draw: Any) -> Drawn:
    net = Drawn(draw)
    blob, channels = "data", CHANNELS
    for _ in range(draw(st.integers(2, 4))):
        outputs = draw(st.sampled_from([2, 4, 6]))
        kind = draw(st.sampled_from(["plain", "sum", "concat", "pool"]))
        if kind == "plain":
            blob, channels = net.convolution(blob, channels, outputs, keeps_size=True), outputs
        elif kind == "pool":
            name, pool = net.name(), draw(st.sampled_from(["MAX", "AVE"]))
            size = draw(
                st.sampled_from(["kernel_size: 2", "kernel_size: 2 stride: 1 pad: 1", "kernel_size: 1"])
            )
            net.text += layer(name, "Pooling", blob, f"pooling_param {{ pool: {pool} {size} }}")
            blob = name
        else:
            first = net.convolution(blob, channels, outputs, keeps_size=True)
            second = net.convolution(blob, channels, outputs, keeps_size=True)
            name = net.name()
            how = draw(st.sampled_from(["SUM", "PROD", "MAX"]))
            if kind == "sum":
                net.text += layer(
                    name, "Eltwise", f"{first} {second}", f"eltwise_param {{ operation: {how} }}"
                )
            else:
                net.text += layer(name, "Concat", f"{first} {second}")
            blob, channels = name, outputs * (2 if kind == "concat" else 1)
    blob = net.convolution(blob, channels, 4, keeps_size=True)
    net.text += fc(blob)
    if draw(st.booleans()):
        net.text += fc(blob, "other")
    return net


def by_torch(text: str, weights: Path, data: Values) -> dict[str, Values]:
    import torch

    from caffe_jacinto.engines.pytorch.net import Net
    from caffe_jacinto.engines.pytorch.snapshot import load_weights

    net = Net(parse_net(text, STOCK, "n"), 1, STOCK, where="n", seed=0)
    load_weights(net, weights)
    with torch.no_grad():
        outputs = net({"data": torch.from_numpy(data)}).outputs
    return {name: values.numpy() for name, values in outputs.items()}


@pytest.mark.caffe
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=drawn_networks())
def test_drawn_networks_compute_the_same_to_the_last_bit(
    net: Drawn, caffe_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    result, _ = shrunk_of(folder, net.text, net.blobs())
    deploy = folder / "whole.prototxt"
    deploy.write_text(net.text)
    data = net.random.integers(-2, 3, (2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    whole = by_caffe(caffe_root, deploy, folder / "whole.caffemodel", data)
    assert all(np.abs(values).max() < 1 << 24 for values in whole.values())
    left = by_caffe(caffe_root, folder / "small.prototxt", folder / "small.caffemodel", data)
    torch_whole = by_torch(net.text, folder / "whole.caffemodel", data)
    torch_left = by_torch(result.deploy, folder / "small.caffemodel", data)
    assert whole.keys() == left.keys() == torch_whole.keys() == torch_left.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(left[name], values)
        np.testing.assert_array_equal(torch_left[name], torch_whole[name])
    shutil.rmtree(folder)


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("network", "dialect"),
    [
        *(("jacintonet11", STOCK), ("jacintonet11", FORK)),
        # Sums, depthwise convolutions, both, and joins of two branches.
        *((network, STOCK) for network in ("resnet10", "mobilenet_v1", "mobilenet_v2", "squeezenet_v1_1")),
    ],
)
def test_networks_of_this_program(
    network: str, dialect: Dialect, tmp_path: Path, caffe_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = built(network, dialect, tmp_path)
    weights = write_random(tmp_path / "w.caffemodel", text, dialect)
    random = np.random.default_rng(1)
    blobs: Blobs = {name: [np.array(b) for b in found] for name, found in read_weights(weights).items()}
    for found in blobs.values():
        if found[0].ndim == 4:
            found[0][random.random(len(found[0])) < 0.4] = 0
    result, _ = shrunk_of(tmp_path, text, blobs, dialect)
    assert sum(result.removed.values()) > 200
    assert result.after.macs < 0.85 * result.before.macs
    data = images((2, 3, 64, 64))
    files = [(text, tmp_path / "whole.caffemodel"), (result.deploy, tmp_path / "small.caffemodel")]
    if dialect is STOCK:
        deploy = tmp_path / "whole.prototxt"
        deploy.write_text(text)
        whole = by_caffe(caffe_root, deploy, files[0][1], data)
        small = by_caffe(caffe_root, tmp_path / "small.prototxt", files[1][1], data)
    else:
        whole, small = (by_onnx(export_onnx(part, "net", dialect, file), data) for part, file in files)
    for name, values in whole.items():
        assert difference(small[name], values) < 2e-6


# --------------------------------------------------------------------------------------------- the command


def written(folder: Path) -> tuple[Path, Path]:
    """A network whose first convolution has a channel without weights, and its validation network."""
    text = INPUT + conv("a", "data") + relu("a") + fc("a")
    blobs = filled(text)
    for values in blobs["a"]:
        values[1] = 0
    (folder / "deploy.prototxt").write_text(text)
    labels = layer("label", "DummyData", "", "dummy_data_param { shape { dim: 1 } }")
    loss = layer("loss", "SoftmaxWithLoss", "fc label")
    (folder / "val.prototxt").write_text(text + labels + loss)
    return folder / "deploy.prototxt", stored(folder / "w.caffemodel", text, blobs)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy, weights = written(tmp_path)
    (tmp_path / "train.prototxt").write_text(INPUT + conv("a", "data", 9) + fc("a"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["shrink", str(weights), str(deploy), "--check"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "shrunk"
    assert {path.name for path in folder.iterdir()} == {
        "deploy.prototxt",
        "val.prototxt",
        "w_shrunk.caffemodel",
    }
    assert {path: path.read_bytes() for path in before} == before
    rows = [line.split() for line in said.splitlines()]
    assert ["a", "4", "3", "112", "84", "0.0000", "0.0000"] in rows
    assert (
        f"{folder / 'w_shrunk.caffemodel'}: 1 channel removed; its network is {folder / 'deploy.prototxt'}"
        in said
    )
    assert f"{tmp_path / 'train.prototxt'}: not written, it is of another network" in said
    assert "the scores of both networks differ by at most " in said
    val = parse_net((folder / "val.prototxt").read_text(), STOCK, "val")
    assert check_fit(folder / "w_shrunk.caffemodel", val) == []
    assert val.layer[-1].type == "SoftmaxWithLoss"


def test_trained_ranges_go_with_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy, weights = written(tmp_path)
    content: dict[str, Any] = {"format": 1, "weights": weights.name, "sha256": sha256_of(weights)}
    content |= {"scheme": "processor", "outputs": {"a": {"bits": 8, "range": [0.0, 2.5]}}}
    ranges, shrunk = tmp_path / "w.ranges.json", tmp_path / "shrunk" / "w_shrunk.caffemodel"
    ranges.write_text(json.dumps(content))
    assert main(["shrink", str(weights), str(deploy)]) == 0
    assert f"{ranges_file(shrunk)}: the ranges that it was trained with" in capsys.readouterr().out
    found, before = read_ranges(shrunk), read_ranges(weights)
    assert found is not None and before is not None
    assert (found.ranges, found.bits, found.scheme) == (before.ranges, before.bits, before.scheme)
    ranges.unlink()
    assert main(["shrink", str(weights), str(deploy)]) == 0
    assert read_ranges(shrunk) is None


def test_what_the_command_refuses(tmp_path: Path) -> None:
    deploy, weights = written(tmp_path)
    with pytest.raises(UserError, match="after it, or the folder of a run"):
        main(["shrink", str(weights)])
    with pytest.raises(UserError, match="is a file; name a folder"):
        main(["shrink", str(weights), str(deploy), "--output", str(deploy)])
    with pytest.raises(UserError, match="is the file itself"):
        main(["shrink", str(weights), str(deploy), "--output", str(tmp_path)])
    blobs = filled(deploy.read_text())
    blobs["a"][0][0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"w.caffemodel: a \(Convolution\) has weights that are not finite"):
        main(["shrink", str(stored(weights, deploy.read_text(), blobs)), str(deploy)])


def test_nothing_to_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = INPUT + conv("a", "data") + fc("a")
    (tmp_path / "deploy.prototxt").write_text(text)
    weights = stored(tmp_path / "w.caffemodel", text, filled(text))
    assert (
        main(["shrink", str(weights), str(tmp_path / "deploy.prototxt"), "--output", str(tmp_path / "out")])
        == 0
    )
    assert "no channel can be removed" in capsys.readouterr().out
    assert (tmp_path / "out" / "deploy.prototxt").read_text() == text
