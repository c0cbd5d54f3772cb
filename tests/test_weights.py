"""Weight files: shown, compared, converted, sparsified; against protobuf's own reader and pycaffe."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto.caffemodel.convert import convert, scale_name
from caffe_jacinto.caffemodel.diff import differences
from caffe_jacinto.caffemodel.net_file import find_dialect, open_net
from caffe_jacinto.caffemodel.show import CHUNK, blob_facts
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.weights import main

STOCK, FORK = Dialect.BVLC, Dialect.CAFFE_JACINTO


def add_layer(net: Any, name: str, kind: str, *blobs: Any, old: bool = False, **fields: Any) -> Any:
    layer = net.layer.add(name=name, type=kind, **fields)
    for values in blobs:
        values = np.asarray(values, np.float32)
        blob = layer.blobs.add(data=values.reshape(-1).tolist())
        if old:
            dims = (1,) * (4 - values.ndim) + values.shape
            blob.num, blob.channels, blob.height, blob.width = dims
        else:
            blob.shape.SetInParent()
            blob.shape.dim.extend(values.shape)
    return layer


def stock_net(factor: float = 4.0, seed: int = 0) -> Any:
    """An input shift, a convolution of 32 outputs in 2 groups, its batch norm and scale, an inner product."""
    random = np.random.default_rng(seed)
    net = messages(STOCK).NetParameter(name="net")
    shift = add_layer(net, "data/bias", "Power", bottom=["data"], top=["shifted"])
    shift.power_param.shift = -128
    weights = random.standard_normal((32, 4, 3, 3))
    conv = add_layer(net, "conv", "Convolution", weights, np.zeros(32), bottom=["shifted"], top=["conv"])
    conv.convolution_param.group = 2
    mean, variance = random.standard_normal(32) * factor, random.random(32) * factor
    add_layer(net, "conv/bn", "BatchNorm", mean, variance, [factor], bottom=["conv"], top=["conv"])
    gain, offset = random.standard_normal(32), random.standard_normal(32)
    add_layer(net, "conv/scale", "Scale", gain, offset, bottom=["conv"], top=["conv"])
    add_layer(net, "fc", "InnerProduct", random.standard_normal((5, 32)), bottom=["conv"], top=["fc"])
    return net


def write(path: Path, net: Any) -> Path:
    path.write_bytes(net.SerializeToString())
    return path


def blobs_of(path: Path, dialect: Dialect) -> dict[str, list[np.ndarray]]:
    """As protobuf's own reader has them."""
    net = messages(dialect).NetParameter.FromString(path.read_bytes())
    return {
        layer.name: [np.array(blob.data, np.float32).reshape(tuple(blob.shape.dim)) for blob in layer.blobs]
        for layer in net.layer
        if layer.blobs
    }


def test_show_says_what_numpy_says(tmp_path: Path) -> None:
    net = messages(STOCK).NetParameter(name="net")
    values = np.random.default_rng(0).standard_normal(3 * CHUNK + 5).astype(np.float32)
    values[::7] = 0
    values[[3, CHUNK, 2 * CHUNK + 1]] = [np.nan, np.inf, -np.inf]
    add_layer(net, "fc", "InnerProduct", values.reshape(1, -1), [2.5])
    weights, bias = blob_facts(write(tmp_path / "w", net), STOCK)
    finite = values[np.isfinite(values)]
    assert (weights.zeros, weights.not_finite) == (np.count_nonzero(values == 0), 3)
    assert (weights.smallest, weights.largest) == (finite.min(), finite.max())
    assert weights.mean_magnitude == pytest.approx(np.abs(finite).mean(dtype=np.float64), rel=1e-9)
    assert (weights.blob, weights.shape, bias.blob, bias.largest) == (
        "weights",
        (1, values.size),
        "bias",
        2.5,
    )


def test_show_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "w", stock_net()))
    assert main(["show", path]) == 0
    assert "sparsity of the 1 convolutions: 0 of 1,152 weights, 0.0%" in capsys.readouterr().out
    main(["show", path, "--format", "json"])
    blobs = json.loads(capsys.readouterr().out)["blobs"]
    main(["show", path, "--format", "csv"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["layer"] for line in lines] == [blob["layer"] for blob in blobs]
    assert (lines[0]["shape"], blobs[0]["shape"]) == ("32x4x3x3", [32, 4, 3, 3])


def test_there_and_back_gives_the_same_numbers(tmp_path: Path) -> None:
    stock = write(tmp_path / "stock", stock_net(factor=1))
    assert convert(stock, tmp_path / "fork", FORK) == [
        "input shifts made biases: 1",
        "batch norms merged with their scales: 1",
    ]
    assert (find_dialect(stock), find_dialect(tmp_path / "fork")) == (STOCK, FORK)
    convert(tmp_path / "fork", tmp_path / "back", STOCK)
    before, after = blobs_of(stock, STOCK), blobs_of(tmp_path / "back", STOCK)
    assert list(before) == list(after)
    for name, blobs in before.items():
        for one, other in zip(blobs, after[name], strict=True):
            np.testing.assert_array_equal(one, other)
    convert(tmp_path / "back", tmp_path / "fork again", FORK)
    assert (tmp_path / "fork again").read_bytes() == (tmp_path / "fork").read_bytes()


@given(factor=st.floats(1e-3, 1e4), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_folded_statistics_are_stock_caffes_over_its_factor(
    tmp_path_factory: pytest.TempPathFactory, factor: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("fold")
    stock = write(folder / "stock", stock_net(factor, seed))
    convert(stock, folder / "fork", FORK)
    mean, variance, stored_factor = blobs_of(stock, STOCK)["conv/bn"]
    inverse = 1 / stored_factor  # Caffe multiplies by the inverse.
    gain, offset = blobs_of(stock, STOCK)["conv/scale"]
    folded = blobs_of(folder / "fork", FORK)
    np.testing.assert_array_equal(folded["conv/bn"][0], mean * inverse)
    np.testing.assert_array_equal(folded["conv/bn"][1], variance * inverse)
    np.testing.assert_array_equal(folded["conv/bn"][2], [1])
    np.testing.assert_array_equal(folded["conv/bn"][3], gain)
    np.testing.assert_array_equal(folded["conv/bn"][4], offset)
    np.testing.assert_array_equal(folded["data/bias"][0], np.full(8, -128, np.float32))
    convert(folder / "fork", folder / "back", STOCK)
    np.testing.assert_array_equal(blobs_of(folder / "back", STOCK)["conv/bn"][0], mean * inverse)


def test_batch_norms_without_statistics_are_refused_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = write(tmp_path / "stock", stock_net(factor=0))
    with pytest.raises(UserError, match="without statistics, which no training has set: conv/bn; train"):
        convert(stock, tmp_path / "fork", FORK)
    assert not (tmp_path / "fork").exists()
    marked = {(fact.layer, fact.blob) for fact in blob_facts(stock, STOCK) if fact.no_statistics}
    assert marked == {("conv/bn", "factor")}
    assert main(["show", str(stock)]) == 0
    shown = capsys.readouterr().out
    assert "factor, no statistics" in shown
    assert "batch norms without statistics (factor 0): conv/bn\n" in shown
    # The fork's form: five blobs, whose factor says nothing.
    convert(write(tmp_path / "trained", stock_net()), tmp_path / "fork", FORK)
    fork = messages(FORK).NetParameter.FromString((tmp_path / "fork").read_bytes())
    norm = next(layer for layer in fork.layer if layer.name == "conv/bn")
    for blob in norm.blobs[:2]:
        blob.data[:] = [0] * 32
    with pytest.raises(UserError, match="without statistics, which no training has set: conv/bn"):
        convert(write(tmp_path / "zeros", fork), tmp_path / "stock2", STOCK)
    # Many layers: a line of a length that one reads.
    many = messages(STOCK).NetParameter(name="many")
    for number in range(9):
        add_layer(many, f"bn{number}", "BatchNorm", [0.0], [0.0], [0])
    with pytest.raises(UserError, match="set: bn0, bn1, bn2, bn3, bn4, 4 others; train"):
        convert(write(tmp_path / "many", many), tmp_path / "fork2", FORK)


def test_plain_averages_beside_a_factor_of_0_are_nvcaffes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message's own command writes the factor."""
    net = stock_net(factor=1)
    norm = next(layer for layer in net.layer if layer.name == "conv/bn")
    norm.blobs[2].data[:] = [0]
    nvcaffe = write(tmp_path / "nvcaffe", net)
    with pytest.raises(
        UserError, match="a factor of 0 beside means and variances: conv/bn; if NVCaffe"
    ) as caught:
        convert(nvcaffe, tmp_path / "fork", FORK)
    command = str(caught.value).partition("python -m caffe_jacinto.weights ")[2].replace("NEW", "")
    assert main([*command.split(), str(tmp_path / "stock")]) == 0
    before, after = blobs_of(nvcaffe, STOCK)["conv/bn"], blobs_of(tmp_path / "stock", STOCK)["conv/bn"]
    assert after[2].tolist() == [1]
    np.testing.assert_array_equal(after[:2], before[:2])


def test_old_files_of_the_fork_hold_channels_as_1xcx1x1(tmp_path: Path) -> None:
    net = messages(FORK).NetParameter(name="net")
    blobs = [np.full((1, 4, 1, 1), value) for value in (1, 2)]
    scales = [np.full((1, 4, 1, 1), value) for value in (3, 4)]
    norm = add_layer(net, "x_bn", "BatchNorm", *blobs, [1], *scales, old=True, bottom=["x"], top=["y"])
    norm.batch_norm_param.scale_bias = True
    convert(write(tmp_path / "fork", net), tmp_path / "stock", STOCK)
    after = blobs_of(tmp_path / "stock", STOCK)
    assert {name: [blob.shape for blob in found] for name, found in after.items()} == {
        "x_bn": [(4,), (4,), (1,)],
        "x_scale": [(4,), (4,)],
    }
    assert after["x_scale"][1].tolist() == [4] * 4


@pytest.mark.parametrize(
    ("norm", "scale"), [("conv/bn", "conv/scale"), ("a_bn2", "a_scale2"), ("norm", "norm/scale")]
)
def test_the_name_of_a_split_scale(norm: str, scale: str) -> None:
    assert scale_name(norm) == scale


@pytest.mark.parametrize("network", ["jacintonet11", "resnet10"])
def test_a_converted_file_fits_the_other_dialects_network(network: str, tmp_path: Path) -> None:
    """Names and shapes of all layers, for the built-in networks."""
    from caffe_jacinto.caffemodel.fit import check_fit, unused_layers
    from caffe_jacinto.netspec.shapes import blob_shapes

    nets = {}
    for dialect in Dialect:
        files = stage_files(
            load_recipe(f"imagenet_{network}", ["data.num_classes=5"]),
            "initial",
            dialect,
            folder="",
            gpus=(),
            iter_size=2,
            solver_mode_gpu=False,
        )
        nets[dialect] = parse_net(files["deploy.prototxt"], dialect, "deploy.prototxt")
    shapes = blob_shapes(nets[STOCK], "TEST")
    file = messages(STOCK).NetParameter()
    for layer in nets[STOCK].layer:
        added = file.layer.add()
        added.CopyFrom(layer)
        for shape in shapes.get(layer.name, []):
            blob = added.blobs.add(data=[1.0] * math.prod(dim or 1 for dim in shape))
            blob.shape.dim.extend(dim or 1 for dim in shape)
    convert(write(tmp_path / "stock", file), tmp_path / "fork", FORK)
    assert [str(item) for item in check_fit(tmp_path / "fork", nets[FORK])] == []
    assert unused_layers(tmp_path / "fork", nets[FORK]) == []
    convert(tmp_path / "fork", tmp_path / "back", STOCK)
    assert [str(item) for item in check_fit(tmp_path / "back", nets[STOCK])] == []


def test_diff_compares_what_a_batch_norm_computes_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The factor of stock Caffe's statistics is no difference, and neither is the dialect."""
    stock = write(tmp_path / "stock", stock_net(factor=4))
    convert(stock, tmp_path / "fork", FORK)
    convert(tmp_path / "fork", tmp_path / "back", STOCK)
    for a, b in (("stock", "back"), ("stock", "fork"), ("fork", "back")):
        assert main(["diff", str(tmp_path / a), str(tmp_path / b)]) == 0
    other = stock_net(factor=4)
    other.layer[2].blobs[0].data[3] += 1
    write(tmp_path / "other", other)
    found, same = differences(tmp_path / "fork", tmp_path / "other", FORK, STOCK)
    assert [(item.layer, item.blob, item.changed) for item in found] == [("conv/bn", "mean", 1)]
    assert found[0].largest == pytest.approx(0.25)
    assert same == 7  # Bias, weights and bias, variance, scale and bias, the inner product's weights.


def test_diff_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = stock_net(), stock_net()
    weights = b.layer[1].blobs[0].data
    weights[0], weights[1] = 0, weights[1] + 0.5
    b.layer[1].blobs[1].data[0] = float("nan")
    a.layer[1].blobs[1].data[0] = float("nan")
    b.layer[4].name = "fc2"
    paths = [str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b))]
    found, same = differences(*map(Path, paths), STOCK, STOCK)
    assert [(item.layer, item.blob) for item in found] == [("conv", "weights"), ("fc", ""), ("fc2", "")]
    assert (found[0].changed, found[0].count, found[0].zeros_gained, found[0].zeros_lost) == (2, 1152, 1, 0)
    assert found[0].largest == pytest.approx(max(0.5, abs(a.layer[1].blobs[0].data[0])))
    assert same == 5
    assert main(["diff", *paths]) == 1
    assert main(["diff", paths[0], paths[0]]) == 0
    assert "the same: all 7 blobs agree" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["channel", "layer"])
def test_sparsify_zeroes_the_smallest_and_nothing_else(tmp_path: Path, by: str) -> None:
    source, target = write(tmp_path / "a", stock_net()), tmp_path / "b"
    arguments = [
        "sparsify",
        str(source),
        "--target",
        "0.5",
        "--by",
        by,
        "--caps",
        "off",
        "--output",
        str(target),
    ]
    assert main(arguments) == 0
    before, after = blobs_of(source, STOCK), blobs_of(target, STOCK)
    weights, pruned = before["conv"][0], after["conv"][0]
    # 8 inputs are fewer than 32: half of the fraction.
    rows = weights.reshape(32 if by == "channel" else 1, -1)
    limits = np.sort(np.abs(rows), axis=1)[:, rows.shape[1] // 4 - 1]
    expected = np.where(np.abs(rows) <= limits[:, None], 0, rows)
    np.testing.assert_array_equal(pruned.reshape(rows.shape), expected)
    for name in ("conv/bn", "conv/scale", "fc"):
        for one, other in zip(before[name], after[name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_sparsify_by_other_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "a", stock_net()), tmp_path / "b"
    network = ["--by", "network", "--inner-products", "--caps", "off"]
    assert main(["sparsify", str(source), "--target", "0.5", "--output", str(target), *network]) == 0
    before, after = blobs_of(source, STOCK), blobs_of(target, STOCK)
    names = ("conv", "fc")
    together = [np.concatenate([blobs[name][0].ravel() for name in names]) for blobs in (before, after)]
    limit = np.sort(np.abs(together[0]))[together[0].size // 2 - 1]
    np.testing.assert_array_equal(together[1], np.where(np.abs(together[0]) <= limit, 0, together[0]))
    said = capsys.readouterr().out
    assert "pruned: conv, fc" in said
    zeros, every = together[0].size // 2, together[0].size
    assert f"of all 2 convolutions and inner products: {zeros:,} of {every:,} weights, 50.0%" in said
    pattern = ["--pattern", "2:4", "--target", "0.5", "--output", str(target)]
    assert main(["sparsify", str(source), *pattern]) == 0
    kept = np.count_nonzero(blobs_of(target, STOCK)["conv"][0].reshape(32, -1, 4, 3, 3), axis=2)
    assert (kept == 2).all()
    for arguments, says in (
        (["--skip", "cnv"], '--skip: no layer that counts is called "cnv"; did you mean conv?'),
        (["--layers", "fc"], '--layers: "fc" is an inner product; set inner_products = true, or remove it'),
        (["--pattern", "4:2"], '--pattern is 4:2; give "n:m"'),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            main(["sparsify", str(source), "--target", "0.5", "--output", str(target), *arguments])


def test_the_caps_hold_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "a", stock_net()), tmp_path / "b"
    main(["sparsify", str(source), "--target", "0.9", "--output", str(target)])
    before, after = blobs_of(source, STOCK)["conv"][0], blobs_of(target, STOCK)["conv"][0]
    taken = np.abs(before[(after == 0) & (before != 0)])
    assert 0 < taken.max() <= 0.2
    assert "below 90%: the published caps keep larger weights" in capsys.readouterr().out


def test_the_old_form_of_layers_is_read(tmp_path: Path) -> None:
    net = messages(STOCK).NetParameter(name="old")
    layer = net.layers.add(name="conv", type=4)
    layer.convolution_param.group = 2
    blob = layer.blobs.add(num=2, channels=1, height=1, width=1, data=[1, 0])
    assert blob.num == 2
    (facts,) = blob_facts(write(tmp_path / "w", net), STOCK)
    assert (facts.type, facts.shape, facts.zeros) == ("Convolution", (2, 1, 1, 1), 1)
    with open_net(tmp_path / "w", STOCK) as (name, (only,)):
        assert (name, only.header.convolution_param.group) == ("old", 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nowhere"], "nowhere: No such file"),
        (["show", "empty"], "empty: the file is empty"),
        (["show", "text"], "text: text, such as a prototxt; give a weight file"),
        (["show", "cut"], "cut: cut off or not a weight file"),
        (["show", "huge"], "huge: cut off or not a weight file"),
        (["convert", "stock", "--from", "bvlc", "--to", "bvlc", "--output", "x"], "nothing to convert"),
        (
            ["convert", "stock", "--from", "caffe_jacinto", "--to", "bvlc", "--output", "x"],
            "the wrong way round",
        ),
        (
            ["convert", "stock", "--from", "bvlc", "--to", "caffe_jacinto", "--output", "stock"],
            "the file itself",
        ),
        (
            ["convert", "stock", "--from", "bvlc", "--to", "caffe_jacinto", "--output", "no/x"],
            "its folder no does not exist",
        ),
        (["sparsify", "stock", "--target", "1.5", "--output", "x"], "is not a fraction between 0 and 1"),
        (["sparsify", "stock", "--target", "0.5", "--output", "."], ". is a folder; name a file in it"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write(Path("stock"), stock_net()).read_bytes()
    Path("empty").touch()
    Path("text").write_text("layer { name: 'x' }\n" * 100)
    Path("cut").write_bytes(content[: len(content) * 2 // 3])
    # A blob that says it has 10^12 numbers, and has four.
    net = messages(STOCK).NetParameter()
    blob = net.layer.add(name="x", type="InnerProduct").blobs.add(data=[1, 2, 3, 4])
    blob.shape.dim.extend([1_000_000, 1_000_000])
    write(Path("huge"), net)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert said in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_needs_caffe_or_numpy_to_say_help() -> None:
    import subprocess

    code = (
        "import sys, caffe_jacinto.weights as command\n"
        "try:\n    command.main(['--help'])\n"
        "except SystemExit:\n    assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.caffe
def test_converted_there_and_back_caffe_gives_the_same_outputs(caffe_root: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(caffe_root / "python"))
    import caffe

    recipe = load_recipe("demo_digits")
    files = stage_files(recipe, "initial", STOCK, folder="", gpus=(), iter_size=1, solver_mode_gpu=False)
    deploy = tmp_path / "deploy.prototxt"
    deploy.write_text(files["deploy.prototxt"])
    net = caffe.Net(str(deploy), caffe.TEST)
    random = np.random.default_rng(0)
    for name, blobs in net.params.items():
        for blob in blobs:
            blob.data[...] = np.abs(random.standard_normal(blob.data.shape)) + (
                3 if name.endswith("bn") else 0
            )
    net.save(str(tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "fork", FORK)
    convert(tmp_path / "fork", tmp_path / "b", STOCK)
    images = random.integers(0, 256, net.blobs["data"].data.shape).astype(np.float32)
    outputs = []
    for weights in ("a", "b"):
        net = caffe.Net(str(deploy), caffe.TEST, weights=str(tmp_path / weights))
        net.blobs["data"].data[...] = images
        outputs.append({name: value.copy() for name, value in net.forward().items()})
    for name, value in outputs[0].items():
        np.testing.assert_allclose(outputs[1][name], value, rtol=1e-4)
    assert list(read_weights(tmp_path / "b")) == list(read_weights(tmp_path / "a"))
