"""A network's summary and its picture."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree
from math import prod
from pathlib import Path
from typing import Any

import lmdb
import pytest
from google.protobuf import text_format

from caffe_jacinto.build_net import main
from caffe_jacinto.caffemodel.show import summary_with_zeros as summarize
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec import summary as summary_tables
from caffe_jacinto.netspec.drawing import boxes_of
from caffe_jacinto.netspec.summary import Summary
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.recipes.load import load_recipe

GIGAMACS = {"jacintonet11": 0.4063, "resnet10": 0.8892, "bvlc_alexnet": 0.7244}

TINY = """
name: "tiny"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc" inner_product_param { num_output: 5 } }
"""


def deploy(network: str, dialect: Dialect) -> str:
    files = stage_files(
        load_recipe(f"imagenet_{network}"),
        "initial",
        dialect,
        folder="",
        gpus=(),
        iter_size=1,
        solver_mode_gpu=False,
        val_images=None,
    )
    return files["deploy.prototxt"]


def weights_of_tiny(path: Path, zeros: int) -> Path:
    net = messages(Dialect.BVLC).NetParameter()
    for name, shape in (("conv", (4, 3, 3, 3)), ("fc", (5, 64))):
        layer = net.layer.add(name=name, type="x")
        count = shape[0] * shape[1] * (9 if name == "conv" else 1)
        empty = zeros if name == "conv" else 0
        layer.blobs.add(data=[0.0] * empty + [1.0] * (count - empty)).shape.dim.extend(shape)
        layer.blobs.add(data=[0.0] * shape[0]).shape.dim.append(shape[0])
    path.write_bytes(net.SerializeToString())
    return path


def test_rows_and_totals() -> None:
    summary = summarize(TINY, "tiny.prototxt")
    rows = {row.name: row for row in summary.rows}
    assert (rows["conv"].shape, rows["conv"].detail) == ((4, 4, 4), "3x3 stride 2")
    assert (rows["conv"].parameters, rows["conv"].macs) == (4 * 27 + 4, 4 * 27 * 16)
    assert (rows["fc"].parameters, rows["fc"].macs) == (5 * 64 + 5, 5 * 64)
    assert (rows["data"].parameters, rows["relu"].macs) == (0, 0)
    assert (summary.parameters, summary.macs, summary.macs_left) == (437, 2048, None)


def test_zeros_take_their_share_of_the_macs(tmp_path: Path) -> None:
    summary = summarize(TINY, "tiny.prototxt", weights=weights_of_tiny(tmp_path / "w", zeros=27))
    assert summary.macs_left == 3 * 27 * 16 + 320
    lines = list(csv.DictReader(io.StringIO(summary_tables.as_csv(summary))))
    assert [line["sparsity"] for line in lines] == ["", "0.25", "", "0.0", "0.25"]
    assert json.loads(summary_tables.as_json(summary))["macs_left"] == 3 * 27 * 16 + 320


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("network", GIGAMACS)
def test_the_published_networks(network: str, dialect: Dialect) -> None:
    summary = summarize(deploy(network, dialect), network)
    assert round(summary.macs / 1e9, 4) == GIGAMACS[network]
    assert sum(box.macs for box in boxes_of(summary)) == summary.macs


@pytest.mark.caffe
@pytest.mark.parametrize("network", GIGAMACS)
def test_totals_agree_with_pycaffes_own_blobs(network: str, caffe_root: Path, tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(caffe_root / "python"))
    import caffe

    text = deploy(network, Dialect.BVLC)
    (tmp_path / "deploy.prototxt").write_text(text)
    net = caffe.Net(str(tmp_path / "deploy.prototxt"), caffe.TEST)
    kinds = {name: layer.type for name, layer in zip(net._layer_names, net.layers, strict=True)}
    macs = parameters = 0
    for name, blobs in net.params.items():
        parameters += sum(blob.data.size for blob in blobs)
        if kinds[name] in ("Convolution", "InnerProduct"):
            output = net.blobs[net.top_names[name][0]].data
            macs += blobs[0].data.size * (output[0, 0].size if output.ndim == 4 else 1)
    summary = summarize(text, network)
    assert (summary.macs, summary.parameters) == (macs, parameters)


def test_a_train_network_has_the_parameters_of_its_deploy_network() -> None:
    recipe = load_recipe("demo_digits")
    files = stage_files(
        recipe, "initial", Dialect.BVLC, folder="", gpus=(), iter_size=1, solver_mode_gpu=False
    )
    counts = {summarize(files[f"{kind}.prototxt"], kind).parameters for kind in ("train", "val", "deploy")}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense {", "x:1: not a NetParameter"),
        ('name: "x"', "x: has no layers"),
        (
            TINY.replace("dim: 3 dim: 8 dim: 8", ""),
            "layer conv (Convolution): does not fit its input, of the",
        ),
        (
            TINY.replace("{ shape { dim: 4 dim: 3 dim: 8 dim: 8 } }", "{ }"),
            "layer conv (Convolution): layer data (Input) does not say the images' size",
        ),
        (TINY.replace('"ReLU"', '"Mystery"'), "since that of layer relu (Mystery) is not"),
    ],
)
def test_what_cannot_be_counted_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        summarize(text, "x")
    assert said in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = TINY.replace("num_output: 5", "num_output: 6")
    with pytest.raises(UserError, match=r"does not fit .*: fc"):
        summarize(other, "x", weights=weights_of_tiny(tmp_path / "w", 0))


def test_the_command_shows_and_draws_without_writing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.prototxt").write_text(TINY)
    assert main(["--summary", "a b.prototxt", "--draw", "net.svg"]) == 0
    assert "0.0000 GigaMACs" in capsys.readouterr().out
    assert main(["--summary", "--network", "resnet10", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split(",")[:6] == [
        "total",
        "",
        "",
        "",
        "5421054",
        "889229312",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.prototxt", "net.svg"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "x", "--format", "json"], "--format requires --summary"),
        (["--weights", "x.caffemodel"], "--weights requires --summary or --draw"),
        (["--output", "x", "--summary", "y.prototxt"], "leave out --output"),
        (["--draw", "x.jpg"], "must end in .png or .svg"),
        (["--summary", "nowhere.prototxt"], "nowhere.prototxt: No such file"),
        (["--summary", "--weights", "nowhere.caffemodel"], "nowhere.caffemodel: No such file"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


FROM_DATA = TINY.replace(
    'type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } }',
    'type: "Data" top: "data" top: "label" data_param { source: "lmdb" batch_size: 4 }',
)


def test_a_network_without_a_crop_has_the_size_of_its_lmdb_or_the_one_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(FROM_DATA)
    says = (
        r"layer data \(Data\) does not say the images' size, and lmdb, which it reads, cannot be read; "
        "give it with --input CxHxW"
    )
    with pytest.raises(UserError, match=says):
        main(["--summary", "net.prototxt"])

    def shown(*arguments: str) -> tuple[list[int], int]:
        assert main(["--summary", *arguments, "--format", "json"]) == 0
        content = json.loads(capsys.readouterr().out)
        return content["layers"][0]["output"], content["macs"]

    assert shown("net.prototxt", "--input", "3x8x8") == ([3, 8, 8], summarize(TINY, "x").macs)
    Path("tiny.prototxt").write_text(TINY)
    assert shown("tiny.prototxt", "--input", "3x16x8")[0] == [3, 16, 8]
    image = messages(Dialect.BVLC).Datum(channels=1, height=7, width=9, data=bytes(63), label=0)
    with lmdb.open("lmdb") as environment, environment.begin(write=True) as records:
        records.put(b"00000000", image.SerializeToString())
    assert shown("net.prototxt")[0] == [1, 7, 9]
    Path("net.prototxt").write_text(
        FROM_DATA.replace("data_param", "transform_param { crop_size: 5 } data_param")
    )
    assert shown("net.prototxt")[0] == [1, 5, 5]
    with pytest.raises(UserError, match="without it, give --crop-size"):
        main(["--summary", "--input", "3x8x8"])


@pytest.mark.parametrize(
    ("rules", "shape"),
    [
        (("phase: TRAIN", 'phase: TEST stage: "a"'), (5, 5)),
        (('phase: TEST stage: "a"', 'phase: TEST stage: "b"'), (4, 4)),
        (('phase: TRAIN stage: "a"', 'phase: TEST not_stage: "a" min_level: 2'), (5, 5)),
        (('phase: TRAIN stage: "a"', 'phase: TRAIN stage: "b"'), (4, 4)),
    ],
)
def test_a_network_is_counted_in_a_state_that_has_images(
    rules: tuple[str, str], shape: tuple[int, int]
) -> None:
    """As that of Caffe's autoencoder, whose tests each need a stage."""
    layers = [
        f'layer {{ name: "d" type: "Input" top: "d" include {{ {rule} }}\n'
        f"  input_param {{ shape {{ dim: 1 dim: 1 dim: {size} dim: {size} }} }} }}\n"
        for size, rule in zip((4, 5), rules, strict=True)
    ]
    layers.append('layer { name: "c" type: "Convolution" bottom: "d" top: "c"\n')
    layers.append("  convolution_param { num_output: 2 kernel_size: 1 } }")
    rows = summarize("".join(layers), "net").rows
    assert [(row.name, row.shape) for row in rows] == [("d", (1, *shape)), ("c", (2, *shape))]


def test_a_picture_is_the_same_twice_and_escapes_what_it_prints(tmp_path: Path) -> None:
    text = TINY.replace('"tiny"', '"<b> & $x$ \\\\001"').replace('"conv"', '"c<o>n&v"')
    (tmp_path / "net.prototxt").write_text(text)
    for name in ("one.svg", "two.svg", "one.png", "two.png"):
        main(["--summary", str(tmp_path / "net.prototxt"), "--draw", str(tmp_path / name)])
    for kind in ("svg", "png"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    root = xml.etree.ElementTree.parse(tmp_path / "one.svg").getroot()
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "c<o>n&v" in words


def names(summary: Summary) -> list[list[str]]:
    return [[row.name for row in box.rows] for box in boxes_of(summary)]


def test_a_layer_joins_the_box_before_it_only_where_it_alone_reads_that() -> None:
    assert names(summarize(TINY, "x")) == [["data"], ["conv", "relu"], ["fc"]]
    pre_activation = TINY.replace('bottom: "conv" top: "conv" }', 'bottom: "conv" top: "on" }') + (
        'layer { name: "sum" type: "Eltwise" bottom: "on" bottom: "conv" top: "sum" }'
    )
    assert names(summarize(pre_activation, "x")) == [["data"], ["conv"], ["relu"], ["fc"], ["sum"]]


def test_skip_connections_are_arrows_of_their_own() -> None:
    boxes = boxes_of(summarize(deploy("resnet10", Dialect.BVLC), "resnet10"))
    assert sum(len(box.inputs) == 2 for box in boxes) == 4


def test_the_dialects_say_the_same_network() -> None:
    stock = summarize(deploy("jacintonet11", Dialect.BVLC), "x")
    fork = summarize(deploy("jacintonet11", Dialect.CAFFE_JACINTO), "x")
    assert fork.macs == stock.macs
    assert (
        fork.parameters - stock.parameters == 3
    )  # the input's bias, which stock Caffe's Power layer has not


PUBLISHED_IMAGES = {
    "bvlc_googlenet_train_val": (3, 224),
    "cifar10_full_train_test": (3, 32),
    "lenet_train_test": (1, 28),
    "resnet18_holmes_train": (3, 224),
    "squeezenet_1.1_train_val": (3, 227),
    "v1_lenet_train_test": (1, 28),
}
"""Channels and pixels of a side of what their data layers give."""


@pytest.mark.caffe
def test_published_networks_count_as_pycaffes_blobs_do(pycaffe: Any, published: Path, tmp_path: Path) -> None:
    seen = 0
    for path in sorted((published / "networks").glob("*.prototxt")):
        if "solver" in path.name:
            continue
        net = parse_net(path.read_text(), Dialect.BVLC, path.name)
        for layer in net.layer:
            if layer.type in ("Data", "ImageData"):
                channels, side = PUBLISHED_IMAGES[path.stem]
                for field in ("data_param", "image_data_param", "transform_param"):
                    layer.ClearField(field)
                layer.type = "Input"
                layer.input_param.shape.add(dim=[1, channels, side, side])
                layer.input_param.shape.add(dim=[1])
        text = text_format.MessageToString(net)
        (tmp_path / path.name).write_text(text)
        built = pycaffe.Net(str(tmp_path / path.name), pycaffe.TEST)
        types = {name: layer.type for name, layer in zip(built._layer_names, built.layers, strict=True)}
        macs = 0
        for name, tops in built.top_names.items():
            if types[name] in ("Convolution", "InnerProduct"):
                positions = built.blobs[tops[0]].data.shape[2:] if types[name] == "Convolution" else ()
                macs += built.params[name][0].data.size * prod(positions)
        found = summarize(text, path.name)
        parameters = sum(blob.data.size for blobs in built.params.values() for blob in blobs)
        assert (path.name, found.parameters, found.macs) == (path.name, parameters, macs)
        seen += 1
    assert seen >= 15
