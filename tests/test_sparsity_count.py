"""Which zeros count as sparsity: `show`, `sparsify`, the summary, the report and training agree.

The network is fully convolutional. Its last convolution, whose output the softmax reads, does not count.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_stage import SmallStage, sparse_settings, write_digits

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.caffemodel.show import blob_facts, sparsity
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.netspec.shapes import layer_costs
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.prototxt.tree import tree_of
from caffe_jacinto.report import main as report
from caffe_jacinto.weights import main as weights

HEAD = (
    'layer { name: "head" type: "Convolution" bottom: "pool" top: "fc"\n'
    '  convolution_param { num_output: 10 kernel_size: 1 weight_filler { type: "msra" } } }\n'
)
INPUT = (
    'layer { name: "data" type: "Input" top: "data"\n'
    "  input_param { shape { dim: 1 dim: 1 dim: 28 dim: 28 } } }\n"
)


def fully_convolutional(text: str) -> str:
    """A `SmallStage` network with a convolution in the place of its inner product."""
    head = re.search(r'layer \{ name: "fc" .*?\} \} \}\n', text, re.DOTALL)
    assert head is not None
    return text.replace(head.group(), HEAD)


def deploy(text: str) -> str:
    """The network ``text`` for images, with a Softmax for its loss."""
    layers = text.split("\nlayer {")
    kept = [layer for layer in layers[1:] if not re.search(r'"(data|accuracy|loss)" type', layer)]
    softmax = 'layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }\n'
    return INPUT + "".join("layer {" + layer + "\n" for layer in kept) + softmax


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, int, int]:
    """Convolutions, zeros and weights, as `weights show` says."""
    capsys.readouterr()
    assert weights(["show", str(path)]) == 0
    return counts(capsys.readouterr().out)


def counts(said: str) -> tuple[int, int, int]:
    found = re.search(r"sparsity of the (\d+) convolutions: ([\d,]+) of ([\d,]+) weights", said)
    assert found is not None, said
    layers, zeros, all_weights = (int(text.replace(",", "")) for text in found.groups())
    return layers, zeros, all_weights


def summarized(net: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    assert build_net(["--summary", str(net), "--weights", str(path), "--format", "json"]) == 0
    return float(json.loads(capsys.readouterr().out)["sparsity"])


@pytest.fixture
def stage(tmp_path: Path) -> SmallStage:
    made = SmallStage(tmp_path / "stage", tmp_path / "no lmdb")
    for name in ("train", "val"):
        file = made.folder / f"{name}.prototxt"
        file.write_text(fully_convolutional(file.read_text()))
    (made.folder / "deploy.prototxt").write_text(deploy((made.folder / "val.prototxt").read_text()))
    return made


def saved(text: str, *, split: bool) -> Any:
    """The network as Caffe saves it: with weights, and a Split where two layers read the scores."""
    net = parse_net(text, Dialect.BVLC, "net")
    for layer in list(net.layer):
        if layer.type == "Convolution":
            inputs = {"conv1": 1, "conv2": 32, "head": 32}[layer.name]
            kernel = layer.convolution_param.kernel_size[0]
            values = np.ones((layer.convolution_param.num_output, inputs, kernel, kernel), np.float32)
            values[: len(values) // 4] = 0
            blob = layer.blobs.add(data=values.reshape(-1).tolist())
            blob.shape.dim.extend(values.shape)
        elif layer.type == "SoftmaxWithLoss" and split:
            layer.bottom[0] = "fc_split_0"
    if split:
        loss = net.layer.pop()
        net.layer.add(name="fc_split", type="Split", bottom=["fc"], top=["fc_split_0", "fc_split_1"])
        net.layer.append(loss)
    return net


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dialect", Dialect)
def test_show_sparsify_and_the_costs_count_the_same(
    dialect: Dialect, split: bool, stage: SmallStage, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sparser = stage.folder / "w.caffemodel", stage.folder / "s.caffemodel"
    text = (stage.folder / "train.prototxt").read_text()
    net = messages(dialect).NetParameter.FromString(saved(text, split=split).SerializeToString())
    path.write_bytes(net.SerializeToString())
    assert shown(path, capsys) == (2, 8 * 9 + 8 * 288, 32 * 9 + 32 * 288)
    counted = {cost.name for cost in layer_costs(tree_of(net)) if cost.counted}
    assert {fact.layer for fact in blob_facts(path, dialect) if fact.counts} == counted == {"conv1", "conv2"}
    assert weights(["sparsify", str(path), "--target", "0.5", "--caps", "off", "--output", str(sparser)]) == 0
    said = capsys.readouterr().out
    assert counts(said) == shown(sparser, capsys)
    assert "head" not in said


def test_a_convolution_that_an_activation_follows_counts(stage: SmallStage) -> None:
    """Only what the softmax reads directly is left out."""
    text = (stage.folder / "train.prototxt").read_text()
    relu = 'layer { name: "relu" type: "ReLU" bottom: "fc" top: "fc" }\n'
    net = saved(text.replace('layer { name: "loss"', relu + 'layer { name: "loss"'), split=False)
    path = stage.folder / "w.caffemodel"
    path.write_bytes(net.SerializeToString())
    assert sparsity(blob_facts(path, Dialect.BVLC)).layers == 3


def test_the_old_form_of_layers_counts_the_same(stage: SmallStage) -> None:
    old = messages(Dialect.BVLC).NetParameter(name="old")
    types = {"Convolution": 4, "Split": 22, "SoftmaxWithLoss": 21}
    for layer in saved((stage.folder / "train.prototxt").read_text(), split=True).layer:
        if layer.type in types:
            form = {"type": types[layer.type], "bottom": layer.bottom, "top": layer.top, "blobs": layer.blobs}
            old.layers.add(name=layer.name, **form)
    path = stage.folder / "w.caffemodel"
    path.write_bytes(old.SerializeToString())
    assert sparsity(blob_facts(path, Dialect.BVLC)) == (8 * 9 + 8 * 288, 32 * 9 + 32 * 288, 2)


def test_the_summary_agrees(stage: SmallStage, capsys: pytest.CaptureFixture[str]) -> None:
    net = saved((stage.folder / "train.prototxt").read_text(), split=False)
    for name in ("conv1", "conv2"):
        for suffix, kind, sizes in (("bn", "BatchNorm", (32, 32, 1)), ("scale", "Scale", (32, 32))):
            layer = next(layer for layer in net.layer if layer.name == f"{name}/{suffix}")
            assert layer.type == kind
            for size in sizes:
                layer.blobs.add(data=[1.0] * size).shape.dim.append(size)
    for layer in net.layer:
        if layer.type == "Convolution":
            outputs = layer.convolution_param.num_output
            layer.blobs.add(data=[0.0] * outputs).shape.dim.append(outputs)
    path = stage.folder / "w.caffemodel"
    path.write_bytes(net.SerializeToString())
    _, zeros, all_weights = shown(path, capsys)
    assert summarized(stage.folder / "deploy.prototxt", path, capsys) == pytest.approx(zeros / all_weights)


@pytest.mark.caffe
def test_training_logs_what_show_the_summary_and_the_report_say(
    caffe_engine: Engine, stage: SmallStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits(tmp_path / "no lmdb", images=320)
    stage.solver(max_iter=20, snapshot=20, test_interval=20)
    stage.run(caffe_engine.train_commands(stage.job(20, sparse=sparse_settings())))
    path = stage.folder / "small_iter_20.caffemodel"
    layers, zeros, all_weights = shown(path, capsys)
    assert layers == 2 and zeros / all_weights > 0.4
    log = (stage.folder / "run.log").read_text()
    said = re.findall(r"Total Sparsity \(zero_weights/count\) =  \((\S+)/(\S+)\) (\S+)", log)[-1]
    assert said == (f"{zeros:g}", f"{all_weights:g}", f"{zeros / all_weights:.3g}")
    assert summarized(stage.folder / "deploy.prototxt", path, capsys) == pytest.approx(zeros / all_weights)
    assert report([str(stage.folder / "run.log"), "--format", "json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["stages"][-1]["sparsity"] == pytest.approx(zeros / all_weights, abs=1e-3)


@pytest.mark.caffe
def test_a_file_that_pycaffe_saves_has_splits_and_counts_the_same(
    caffe_root: Path, stage: SmallStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    sys.path.insert(0, str(caffe_root / "python"))
    import caffe

    write_digits(tmp_path / "no lmdb", images=320)
    net = caffe.Net(str(stage.folder / "val.prototxt"), caffe.TEST)
    net.params["conv1"][0].data[:16] = 0
    net.save(str(stage.folder / "saved.caffemodel"))
    stored = messages(Dialect.BVLC).NetParameter.FromString((stage.folder / "saved.caffemodel").read_bytes())
    assert any(layer.type == "Split" and layer.bottom[0] == "fc" for layer in stored.layer)
    assert shown(stage.folder / "saved.caffemodel", capsys) == (2, 144, 9504)
