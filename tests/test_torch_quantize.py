"""Quantized networks on PyTorch: fake quantization is what integers give; the command and its files."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from deploy_nets import SMALL_CROPS, built, by_caffe, by_onnx, images, write_random
from fork_quantization import passes as fork_passes
from image_records import datum_of, write_lmdb
from integer_network import by_integers
from log_text import whole_stage
from onnx import numpy_helper
from small_stage import mnist
from small_stage import write_digits as write_mnist

from caffe_jacinto.caffemodel.net_file import NewLayer, write_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.data.datum import datum_pixels, parse_datum
from caffe_jacinto.data.lmdb_reader import LmdbReader
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.engines.pytorch.stage_check import check_stages
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.onnx import NEWEST_OPSET, OPSET
from caffe_jacinto.export.quantized import quantized_files
from caffe_jacinto.export.stock_net import StockNet, stock_net
from caffe_jacinto.inference.network import Sample
from caffe_jacinto.inference.quantize import (
    Images,
    Quantizer,
    batched,
    check_quantizable,
    described,
    on_caffe,
    on_pytorch,
)
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.quantization.fork_settings import fields_of, fork_settings
from caffe_jacinto.quantization.fork_settings import tested_network as network_and_settings
from caffe_jacinto.quantization.grids import magnitude_grid
from caffe_jacinto.quantization.network import computed_together, quantized_outputs, quantized_weights
from caffe_jacinto.quantization.record import record_of
from caffe_jacinto.quantization.results import Result
from caffe_jacinto.quantization.schemes import SCHEMES, Bits, Scheme, chosen_scheme
from caffe_jacinto.quantize import _parser, main
from caffe_jacinto.recipes.model import QuantizeSettings
from caffe_jacinto.report import main as report
from caffe_jacinto.weights import main as weights_main

MOST_DIFFERENT = 1e-4
"""Of the numbers, those on a rounding boundary, which may differ by one step."""


def folded(network: str, folder: Path) -> StockNet:
    """A network with random weights and its batch norms folded."""
    text = built(network, Dialect.BVLC, folder)
    weights = write_random(folder / "w.caffemodel", text, Dialect.BVLC)
    return merge_bn(text, "deploy.prototxt", None, weights).net


def real_images(count: int, size: int) -> Any:
    """Handwritten digits, enlarged to a colour image of ``size``."""
    pixels = mnist()[0].reshape(-1, 28, 28)[:: 5000 // count][:count]
    grown = [
        cv2.resize(image.astype(np.uint8), (size, size), interpolation=cv2.INTER_LINEAR) for image in pixels
    ]
    return np.repeat(np.stack(grown)[:, None].astype(np.float32), 3, axis=1)


def samples(pixels: Any, batch: int = 4) -> Images:
    listed = [Sample(str(number), number % 7, image) for number, image in enumerate(pixels)]
    return batched("images", len(listed), batch, lambda: iter(listed))


def quantized(net: StockNet, scheme: Scheme, pixels: Any, batch: int = 4) -> tuple[Quantizer, Result]:
    network = described(net, scheme, "deploy.prototxt", {}, ())
    quantizer = Quantizer(on_pytorch(net, network, (), "deploy.prototxt"), network, "deploy.prototxt")
    return quantizer, quantizer.quantize(samples(pixels, batch))


@pytest.mark.caffe
@pytest.mark.parametrize("scheme", ["processor", "power2"])
@pytest.mark.parametrize("network", ["jacintonet11", "resnet10"])
def test_fake_quantization_is_what_integers_give(
    network: str, scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every layer, for the same numbers, on random and on real images.

    Values on a rounding boundary may differ by one step.
    """
    size = SMALL_CROPS[network]
    pixels = np.rint(np.concatenate([images((4, 3, size, size)), real_images(4, size)]))
    net = folded(network, tmp_path)
    layers = {layer.name: layer for layer in net.layers}
    quantizer, result = quantized(net, SCHEMES[scheme], pixels)
    record = {unit["name"]: unit for unit in record_of(result)["layers"]}
    blobs: dict[str, tuple[Any, float]] = {}
    different = total = 0
    for unit, carried in quantizer.net.passing(pixels, result.quantization):
        found = carried.tensor.numpy()
        bottoms = layers[unit.layers[0]].message.bottom if unit.layers else ()
        want = by_integers(record[unit.name], layers, [blobs[name] for name in bottoms], pixels)
        assert found.shape == want.shape
        assert len(np.unique(found)) > 3, f"{unit.name} has hardly any values: the test says nothing"
        apart = np.abs(found - want)
        assert apart.max() <= 1, unit
        different, total = different + int(np.count_nonzero(apart)), total + apart.size
        assert carried.grid is not None
        blobs[unit.blob] = found.astype(np.int64), carried.grid.step
    with capsys.disabled():
        print(f"\n{network} {scheme}: {different} of {total:,} numbers differ by one step")
    assert different <= MOST_DIFFERENT * total


FORK_NET = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 12 dim: 12 } } }
layer { name: "data_bn" type: "BatchNorm" bottom: "data" top: "data_bn"
  batch_norm_param { scale_bias: true } }
layer { name: "c1" type: "Convolution" bottom: "data_bn" top: "c1"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "c1/bn" type: "BatchNorm" bottom: "c1" top: "c1" batch_norm_param { scale_bias: true } }
layer { name: "c1/relu" type: "ReLU" bottom: "c1" top: "c1" }
layer { name: "p1" type: "Pooling" bottom: "c1" top: "p1" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "c2" type: "Convolution" bottom: "p1" top: "c2"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 group: 2 bias_term: false } }
layer { name: "sum" type: "Eltwise" bottom: "p1" bottom: "c2" top: "sum" }
layer { name: "both" type: "Concat" bottom: "sum" bottom: "p1" top: "both" }
layer { name: "norm" type: "BatchNorm" bottom: "both" top: "norm" batch_norm_param { scale_bias: true } }
layer { name: "norm/relu" type: "ReLU" bottom: "norm" top: "norm" }
layer { name: "pool" type: "Pooling" bottom: "norm" top: "pool"
  pooling_param { pool: AVE global_pooling: true } }
layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc" inner_product_param { num_output: 5 } }
"""


def test_the_forks_arithmetic_is_that_of_an_implementation_of_its_own(tmp_path: Path) -> None:
    """Every blob of the fifth pass to 1e-6; values on a rounding boundary may differ by one step."""
    fork = Dialect.CAFFE_JACINTO
    path = write_random(tmp_path / "w.caffemodel", FORK_NET, fork, seed=3)
    net = parse_net(FORK_NET, fork, "deploy.prototxt")
    random = np.random.default_rng(5)
    batches = [random.normal(0, 1 + 0.2 * number, (6, 3, 12, 12)).astype(np.float32) for number in range(5)]
    blobs = {name: [blob.astype(np.float64) for blob in found] for name, found in read_weights(path).items()}
    want = fork_passes(net, blobs, [batch.astype(np.float64) for batch in batches])

    scheme = SCHEMES["caffe_jacinto"]
    stock = stock_net(FORK_NET, "deploy.prototxt", fork, path)
    network = described(stock, scheme, "deploy.prototxt", {}, ())
    quantizer = Quantizer(on_pytorch(stock, network, (), ""), network, "deploy.prototxt")
    result = quantizer.quantize(samples(np.concatenate(batches[:4]), batch=6))
    found = {unit.blob: made for unit, made in quantizer.net.passing(batches[4], result.quantization)}
    assert found.keys() == want.keys()
    different = total = 0
    for name, values in want.items():
        made = found[name]
        apart = np.abs(made.values.numpy() - values)
        step = made.grid.step if made.grid is not None else 0
        assert apart.max() <= step + 1e-6, name
        assert made.grid is None or len(np.unique(made.tensor)) > 4, name
        different, total = different + int(np.count_nonzero(apart > 1e-6)), total + apart.size
    assert different <= MOST_DIFFERENT * total
    assert [name for name, made in found.items() if made.grid is None] == ["data_bn"]


FORK_TEST = """
name: "small" quantize: true
net_quantization_param { bitwidth_activations: 8 range_expansion_factor: 1.25 ignored_layer_names: "none" }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { scale: 0.01 } data_param { source: "LMDB" batch_size: 6 backend: LMDB } }
"""
FORK_OUTPUTS = """
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
layer { name: "accuracy/top1" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy/top1" }
"""


def losses_of(
    folder: Path, text: str, capfd: pytest.CaptureFixture[str], iterations: int, *more: str
) -> tuple[list[float], str]:
    """The loss of each batch that `caffe-torch test` logs, and its log."""
    (folder / "val.prototxt").write_text(text)
    arguments = ["test", "-model", str(folder / "val.prototxt"), "-weights", str(folder / "w.caffemodel")]
    arguments += ["-iterations", str(iterations), "-dialect", "caffe_jacinto", "-workers", "1", *more]
    assert caffe_torch(arguments) == 0
    log = capfd.readouterr().err
    return [float(found) for found in re.findall(r"Batch \d+, loss = (\S+)", log)], log


def doubles(weights: Path) -> dict[str, list[Any]]:
    return {
        name: [blob.astype(np.float64) for blob in found] for name, found in read_weights(weights).items()
    }


def loss_of(scores: Any, batch: int) -> float:
    """Of six images, labelled 0 to 4 over and over from the first batch on."""
    labels = np.arange(batch * 6, batch * 6 + 6) % 5
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return float(-np.log(shares[np.arange(6), labels]).mean())


def test_caffe_torch_tests_a_network_that_says_quantize(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The loss of each batch is that of the implementation apart from the package."""
    fork = Dialect.CAFFE_JACINTO
    path = write_random(tmp_path / "w.caffemodel", FORK_NET, fork, seed=3)
    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
    write_lmdb(tmp_path / "lmdb", [datum_of(image, number % 5) for number, image in enumerate(pixels)])
    body = FORK_NET[FORK_NET.index('layer { name: "data_bn"') :]
    text = FORK_TEST.replace("LMDB", str(tmp_path / "lmdb"), 1).replace('ignored_layer_names: "none"', "")
    losses, log = losses_of(tmp_path, text + body + FORK_OUTPUTS, capfd, 4)
    assert "quantize: true" in log, "the report tells such a test by the network in its log"

    net, blobs = parse_net(FORK_NET, fork, "deploy.prototxt"), doubles(path)
    inputs = pixels.transpose(0, 3, 1, 2).astype(np.float64) * np.float32(0.01)
    batches = [inputs[at : at + 6] for at in range(0, 24, 6)]
    for number in range(4):
        scores = fork_passes(net, blobs, batches[: number + 1])["fc"]
        assert losses[number] == pytest.approx(loss_of(scores, number), rel=2e-5)
    exact, _ = losses_of(tmp_path, (text + body + FORK_OUTPUTS).replace("quantize: true", ""), capfd, 4)
    assert exact[0] == losses[0] and min(abs(np.subtract(exact, losses)[1:])) > 1e-4, (
        "only the first is in float"
    )

    ignored = "".join(f'ignored_layer_names: "{layer.name}" ' for layer in net.layer)
    without = (text + body + FORK_OUTPUTS).replace("range_exp", f"{ignored} range_exp")
    assert losses_of(tmp_path, without, capfd, 4)[0] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("ignored", "weights", "outputs"), [("c1", "c1", ""), ("c1/relu", "", "c1"), ("images", "", "data")]
)
def test_the_fork_ignores_a_layer_alone(ignored: str, weights: str, outputs: str, tmp_path: Path) -> None:
    """Not what is merged with it: its weights without their ReLU, or the ReLU without the weights."""
    fork = Dialect.CAFFE_JACINTO
    blobs = read_weights(write_random(tmp_path / "w.caffemodel", FORK_NET, fork))
    found = []
    for names in ("", f'net_quantization_param {{ ignored_layer_names: "{ignored}" }}'):
        text = f"quantize: true {names}" + FORK_NET.replace('name: "data" type', 'name: "images" type')
        net = parse_net(text, fork, "val.prototxt")
        settings = fork_settings(net, "val.prototxt")
        assert settings is not None
        network = settings.network(net.layer, blobs, "val.prototxt")
        units = quantized_weights(network), quantized_outputs(network)
        found.append([{unit.name for unit in each} for each in units])
    all_of_it, rest = found
    assert [before - after for before, after in zip(all_of_it, rest, strict=True)] == [
        {name} if name else set() for name in (weights, outputs)
    ]
    together = computed_together(SCHEMES["caffe_jacinto"], net.layer, [ignored], "val.prototxt")
    assert together == (["images"] if ignored == "images" else ["c1", "c1/bn", "c1/relu"])


@pytest.mark.caffe
@pytest.mark.parametrize("quantized", [False, True])
def test_several_ranks_test_as_one_does(
    quantized: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every batch, in order, and the means. Two ranks share five batches, but not where ranges move."""
    write_random(tmp_path / "w.caffemodel", FORK_NET, Dialect.CAFFE_JACINTO, seed=3)
    pixels = np.random.default_rng(5).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    write_lmdb(tmp_path / "lmdb", [datum_of(image, number % 5) for number, image in enumerate(pixels)])
    text = FORK_TEST.replace("LMDB", str(tmp_path / "lmdb"), 1).replace('ignored_layer_names: "none"', "")
    text = text if quantized else text.replace("quantize: true", "")
    text += FORK_NET[FORK_NET.index('layer { name: "data_bn"') :] + FORK_OUTPUTS
    logs = [losses_of(tmp_path, text, capfd, 5, *more)[1] for more in ([], ["-cpu_ranks", "2"])]
    assert "2 ranks test together" in logs[1]
    said = [re.findall(r"\] ((?:Batch|Loss|loss|accuracy).*)", log) for log in logs]
    assert len(said[0]) == 5 * 2 + 3 and said[0][0].startswith("Batch 0, accuracy/top1 = ")
    for one, other in zip(*said, strict=True):
        assert one.rpartition("= ")[0] == other.rpartition("= ")[0]
        numbers = [float(line.replace(" loss)", "").rsplit(" ", 1)[1]) for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


SOLVER = """
train_net: "train.prototxt" test_net: "val.prototxt" max_iter: 2
test_iter: 2 test_interval: 1 test_initialization: true
base_lr: 0.02 lr_policy: "fixed" momentum: 0.5 snapshot: 1 snapshot_prefix: "small" random_seed: 1
"""


def test_a_training_tests_in_quantized_values(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each test has the weights of its iteration, and the ranges go on; what is trained is not rounded."""
    fork = Dialect.CAFFE_JACINTO
    monkeypatch.chdir(tmp_path)
    start = write_random(tmp_path / "small_iter_0.caffemodel", FORK_NET, fork, seed=3)
    pixels = np.random.default_rng(5).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
    write_lmdb(tmp_path / "lmdb", [datum_of(image, number % 5) for number, image in enumerate(pixels)])
    body = FORK_NET[FORK_NET.index('layer { name: "data_bn"') :] + FORK_OUTPUTS
    val = (
        FORK_TEST.replace("LMDB", str(tmp_path / "lmdb"), 1).replace('ignored_layer_names: "none"', "") + body
    )
    train = val[val.index("layer") :].replace("phase: TEST", "phase: TRAIN")
    Path("solver.prototxt").write_text(SOLVER)
    Path("train.prototxt").write_text(train)
    Path("val.prototxt").write_text(val.replace("quantize: true", ""))
    command = ["train", "-solver", "solver.prototxt", "-weights", str(start), "-dialect", fork.value]
    assert caffe_torch(command) == 0
    exact = read_weights(tmp_path / "small_iter_2.caffemodel")
    capfd.readouterr()
    Path("val.prototxt").write_text(val)
    assert caffe_torch(command) == 0
    log = capfd.readouterr().err
    assert "quantize: true" in log
    for name, blobs in read_weights(tmp_path / "small_iter_2.caffemodel").items():
        for blob, other in zip(blobs, exact[name], strict=True):
            np.testing.assert_array_equal(blob, other)

    inputs = pixels.transpose(0, 3, 1, 2).astype(np.float64) * np.float32(0.01)
    net, weights, batches, wanted = parse_net(FORK_NET, fork, "deploy.prototxt"), [], [], []
    for iteration in range(3):
        found = []
        for batch in range(2):
            weights.append(doubles(tmp_path / f"small_iter_{iteration}.caffemodel"))
            batches.append(inputs[6 * batch : 6 * batch + 6])
            found.append(loss_of(fork_passes(net, weights, batches)["fc"], batch))
        wanted.append(np.mean(found))
    losses = [float(value) for value in re.findall(r"Test net output #\d+: loss = (\S+)", log)]
    assert losses == pytest.approx(wanted, rel=2e-5)

    Path("train.prototxt").write_text("quantize: true\n" + train)
    with pytest.raises(SystemExit):
        caffe_torch(command)
    said = "train.prototxt: field quantize: a network is tested in quantized values, not trained; give it in"
    assert said in capfd.readouterr().err
    val = val.replace("bitwidth_activations: 8", 'ignored_layer_names: "c3"')
    files = {"solver.prototxt": SOLVER, "train.prototxt": train, "val.prototxt": val}
    (line,) = check_stages({"initial": files}, {str(tmp_path / "lmdb"): (3, 12, 12)}, fork)
    assert line.startswith("val.prototxt: net_quantization_param.ignored_layer_names c3: the network has no")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rounding_scheme: QuantizationParameter_Rounding_STOCHASTIC", "only NEAREST is supported"),
        ("bitwidth_weights: 40", "40 bits for weights: give 2 to 16"),
        ("quantization_start: 0", "0 has to be 1 or more"),
        ("update_quantization_param: false", "remove it"),
        ("power2_scale_weights: true", "only both or neither"),
    ],
)
def test_settings_that_cannot_be_carried_out(setting: str, message: str) -> None:
    text = f"quantize: true net_quantization_param {{ {setting} }}"
    with pytest.raises(UserError, match=rf"val.prototxt: net_quantization_param.*{message}"):
        fork_settings(parse_net(text, Dialect.CAFFE_JACINTO, "val.prototxt"), "val.prototxt")


@pytest.mark.parametrize(
    "changes", [{}, {"bits": 4}, {"weight_bits": 8, "activation_bits": 16, "bias_bits": 32}]
)
def test_the_fields_of_a_scheme_are_read_as_that_scheme(changes: dict[str, int]) -> None:
    scheme = chosen_scheme(QuantizeSettings(scheme="caffe_jacinto", **changes).model_dump())
    text = fields_of(scheme, ["conv 1"])
    found = fork_settings(parse_net(text, Dialect.CAFFE_JACINTO, "val.prototxt"), "val.prototxt")
    assert found is not None
    assert (found.scheme, found.ignored) == (replace(scheme, moving=found.scheme.moving), ("conv 1",))
    assert found.scheme.moving is not None and scheme.moving is not None
    assert vars(found.scheme.moving) == pytest.approx(vars(scheme.moving))


def test_a_recipes_table_has_the_commands_options() -> None:
    options = vars(_parser().parse_args(["RUN", "--calibrate", "L"]))
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in QuantizeSettings()}
    defaults["bits_of"] = list(defaults["bits_of"])
    of_the_command = {
        *("network", "weights", "calibrate", "output", "val", "plot", "preprocessing", "resize")
    }
    of_the_command |= {"backend", "caffe", "gpus", "log"}
    of_training = {"settle_iter", "freeze_bn_iter"}
    assert defaults.keys() >= of_training
    shared = {key: value for key, value in defaults.items() if key not in of_training}
    assert {key: value for key, value in options.items() if key not in of_the_command} == shared


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0, 1.0, 2**-8), (0, 3, 2**-6), (-1, 0.5, 2**-7), (-3, 1, 2**-5)]
)
def test_the_forks_powers_of_two(low: float, high: float, step: float) -> None:
    """s = 2^(bits - bits needed); bits needed = ceil(log2 of the range), one more if signed."""
    assert magnitude_grid(low, high, 8, power_of_two=True).step == step


# ------------------------------------------------------------------------------------------------ the command

SMALL_NET = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 1 dim: 28 dim: 28 } } }
layer { name: "shift" type: "Power" bottom: "data" top: "shift" power_param { shift: -128 } }
layer { name: "conv1" type: "Convolution" bottom: "shift" top: "conv1"
  convolution_param { num_output: 24 kernel_size: 5 stride: 2 pad: 2 } }
layer { name: "conv1/bn" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "conv1/scale" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "conv1/relu" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool1" top: "fc" inner_product_param { num_output: 10 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""

VAL_NET = """
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  data_param { source: "val_lmdb" batch_size: 50 backend: LMDB } }
"""


@dataclass
class Trained:
    """A network that knows digits, and its LMDBs, in one folder."""

    folder: Path

    @property
    def arguments(self) -> list[str]:
        network = [str(self.folder / "deploy.prototxt"), str(self.folder / "w.caffemodel")]
        return [*network, "--calibrate", str(self.folder / "train_lmdb"), "--batches", "8", "--batch", "25"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Random features of real digits, and an inner product that is fitted to them by least squares."""
    folder = tmp_path_factory.mktemp("trained")
    write_mnist(folder / "all_lmdb", 2000)
    with LmdbReader(folder / "all_lmdb") as reader:
        records = [parse_datum(record) for _, record in reader.records()]
    write_lmdb(folder / "train_lmdb", records[:1000])
    write_lmdb(folder / "val_lmdb", records[1000:])
    (folder / "deploy.prototxt").write_text(SMALL_NET)
    (folder / "val.prototxt").write_text(VAL_NET.replace("val_lmdb", str(folder / "val_lmdb")))
    weights = write_random(folder / "w.caffemodel", SMALL_NET, Dialect.BVLC)
    stored = {name: list(blobs) for name, blobs in read_weights(weights).items()}
    stored["conv1"][0] /= 40  # pixels, not numbers about 1

    def written() -> StockNet:
        net = parse_net(SMALL_NET, Dialect.BVLC, "deploy.prototxt")
        layers = [NewLayer(layer, stored.get(layer.name, [])) for layer in net.layer]
        write_net(weights, "small", layers, Dialect.BVLC)
        return stock_net(SMALL_NET, "deploy.prototxt", None, weights)

    net = written()
    passes = on_pytorch(net, described(net, SCHEMES["processor"], "", {}, ()), (), "")
    pixels = np.stack([datum_pixels(record) for record in records[:1000]]).astype(np.float32)
    labels = [record.label for record in records[:1000]]
    features = next(c.values.numpy() for u, c in passes.passing(pixels, None) if u.name == "pool1")
    rows = np.concatenate([features.reshape(1000, -1), np.ones((1000, 1))], axis=1).astype(np.float64)
    wanted = np.eye(10)[labels]
    fitted = np.linalg.solve(rows.T @ rows + 300 * np.eye(rows.shape[1]), rows.T @ wanted)
    stored["fc"] = [fitted[:-1].T.astype(np.float32), fitted[-1].astype(np.float32)]
    written()
    return Trained(folder)


@pytest.fixture(scope="module")
def made(trained: Trained) -> tuple[Path, str]:
    """The folder that the command writes by default, and what it prints."""
    output = trained.folder / "quantized"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(
            [
                *trained.arguments,
                "--sensitivity",
                "--plot",
                str(output / "worst.png"),
            ]
        )
    assert code == 0
    return output, out.getvalue()


@pytest.mark.caffe
def test_the_command_tests_and_shows_what_quantizing_costs(made: tuple[Path, str]) -> None:
    folder, said = made
    record = json.loads((folder / "quantization.json").read_text())
    accuracy = record["accuracy"]
    assert accuracy["images"] == 1000 and record["calibration_images"] == 200
    assert accuracy["float"]["top1"] > 0.85
    assert abs(accuracy["quantized"]["top1"] - accuracy["float"]["top1"]) < 0.01
    assert accuracy["agreement"] >= 0.99
    assert said.startswith((folder / "table.txt").read_text())
    assert f"{100 * accuracy['quantized']['top1']:.2f} %" in said
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert [row["layer"] for row in rows] == ["data", "shift", "conv1", "fc"]
    assert [row["weight_bits"] for row in rows] == ["", "", "8", "8"]
    assert float(rows[2]["output_decibels"]) > 25 and float(rows[2]["zeros"]) > 0.4
    assert all(abs(float(row["top1_alone"])) < 0.02 for row in rows)
    assert cv2.imread(str(folder / "worst.png")).shape[0] > 100


@pytest.mark.caffe
def test_stock_caffe_and_the_forks_schema_read_what_it_writes(
    made: tuple[Path, str], trained: Trained, caffe_root: Path
) -> None:
    folder, _ = made
    weights = folder / "w_quantized.caffemodel"
    pixels = real_images(4, 28)[:, :1]
    (found,) = by_caffe(caffe_root, folder / "deploy_stock.prototxt", weights, pixels).values()
    (want,) = by_caffe(
        caffe_root, trained.folder / "deploy.prototxt", trained.folder / "w.caffemodel", pixels
    ).values()
    assert found.shape == want.shape and 0 < np.abs(found - want).max() < 0.05
    record = {unit["name"]: unit for unit in json.loads((folder / "quantization.json").read_text())["layers"]}
    net = parse_net((folder / "deploy.prototxt").read_text(), Dialect.CAFFE_JACINTO, "deploy.prototxt")
    layers = {layer.name: layer for layer in net.layer}
    assert list(layers) == ["data", "shift", "conv1", "conv1/relu", "pool1", "fc", "prob"]
    output = layers["conv1/relu"].quantization_param.qparam_out[0]
    assert (output.bitwidth, output.min, output.unsigned_quant) == (8, 0, True)
    assert output.scale_applied == pytest.approx(1 / record["conv1"]["output"]["scale"][0])
    assert output.max == pytest.approx(255 * record["conv1"]["output"]["scale"][0])
    assert [q.bitwidth for q in layers["conv1"].quantization_param.qparam_w] == [8, 32]
    assert not layers["prob"].HasField("quantization_param")
    for text in ((folder / name).read_text() for name in ("deploy.prototxt", "deploy_stock.prototxt")):
        read = stock_net(text, "", None, weights)
        passes = on_pytorch(read, described(read, SCHEMES["processor"], "", {}, ()), (), "")
        np.testing.assert_allclose(passes.scores(pixels, None), found.reshape(4, 10), atol=1e-5)
    bare, _ = network_and_settings(net, Dialect.CAFFE_JACINTO, "deploy.prototxt")
    assert not any(layer.HasField("quantization_param") for layer in bare.layer)
    stored = read_weights(weights)
    scales = np.array(record["fc"]["weights"]["scale"]).reshape(-1, 1)
    numbers = stored["fc"][0] / scales
    np.testing.assert_allclose(numbers, np.rint(numbers), atol=1e-4)
    assert (stored["conv1"][0] == 0).mean() > 0.4


LOSSES = """
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
layer { name: "accuracy/top1" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy/top1" }
layer { name: "accuracy/top5" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy/top5"
  accuracy_param { top_k: 5 } }
"""


def test_its_log_is_a_test_that_the_report_reads(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    val, output = tmp_path / "val.prototxt", tmp_path / "RUN" / "quantize"
    output.parent.mkdir()
    data = VAL_NET.replace("val_lmdb", str(trained.folder / "val_lmdb"))
    body = SMALL_NET[SMALL_NET.index('layer { name: "shift"') : SMALL_NET.index('layer { name: "prob"')]
    val.write_text(data + body + LOSSES)
    arguments = [*trained.arguments, "--preprocessing", str(val), "--val", str(trained.folder / "val_lmdb")]
    arguments += ["--bits", "6", "--weight-bits", "4", "--sensitivity", "--output", str(output), "--log"]
    assert main(arguments) == 0
    out, log = capfd.readouterr()
    assert out == ""
    (output / "run.log").write_text(log)
    assert "Quantizing: calibrate, 200 of 200 images" in log
    assert report([str(output.parent), "--format", "json"]) == 0
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    (stage,) = run["stages"]
    record = json.loads((output / "quantization.json").read_text())["accuracy"]
    digits = pytest.approx
    assert (stage["name"], stage["finished"]) == ("quantize", True)
    assert stage["iterations"] == record["images"] / 25
    assert stage["top1"] == digits(record["quantized"]["top1"], rel=1e-5)
    assert stage["top5"] == digits(record["quantized"]["top5"], rel=1e-5)
    assert stage["float_top1"] == digits(record["float"]["top1"], rel=1e-5)
    assert (stage["weight_bits"], stage["activation_bits"]) == (4, 6)
    weights = read_weights(trained.folder / "w.caffemodel")["conv1"][0]
    assert stage["sparsity"] == digits((weights == 0).mean(), abs=5e-4)
    conv1, fc = 24 * 25 * 14 * 14, 24 * 7 * 7 * 10
    assert stage["gigamacs"] == digits((conv1 + fc) / 1e9, rel=1e-3)
    assert stage["gigamacs_left"] == digits((conv1 * (1 - stage["sparsity"]) + fc) / 1e9, rel=1e-3)
    assert report([str(output.parent)]) == 0
    shown = capfd.readouterr().out
    sparse = f"{100 * stage['sparsity']:.1f} % sparse"
    assert f"RUN, quantize ({sparse}, 4-bit weights, 6-bit activations)" in shown
    assert f"{100 * (stage['top1'] - stage['float_top1']):+.2f} " in shown

    passed = [float(found) for found in re.findall(r"Batch \d+, accuracy/top1 = (\S+)", log)]
    assert np.mean(passed) == digits(stage["top1"], rel=1e-4)  # all batches are whole
    wrong = [*trained.arguments, "--output", str(output), "--log"]
    with pytest.raises(UserError, match="--log writes the log of a test: give its LMDB with --val"):
        main(wrong)


def val_images(trained: Trained) -> tuple[Any, list[int]]:
    """The pixels of the validation images, and their labels."""
    with LmdbReader(trained.folder / "val_lmdb") as reader:
        records = [parse_datum(record) for _, record in reader.records()]
    pixels = np.stack([datum_pixels(record) for record in records]).astype(np.float32)
    return pixels, [record.label for record in records]


@pytest.mark.caffe
@pytest.mark.parametrize("scheme", ["processor", "power2"])
def test_onnxruntime_gives_what_fake_quantization_does(scheme: str, trained: Trained, tmp_path: Path) -> None:
    """Within one step at the last layer on 1,000 real images, and at the first layer everywhere the same.

    Weights are 8-bit numbers. A value that an early layer rounds to the other side moves others in each layer
    after it: a network of 26 convolutions can be two steps off at its last layer.
    """
    assert main([*trained.arguments, "--scheme", scheme, "--output", str(tmp_path / "q")]) == 0
    out = tmp_path / "q.onnx"
    assert weights_main(["export", "--onnx", str(out), "--quantized", str(tmp_path / "q")]) == 0
    model = onnx.load(out)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + 4, "weights and biases of two layers"
    assert kinds["QuantizeLinear"] == 5, "the image, the shift, two layers and a pooling between them"
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert stored["conv1:weights:numbers"].dtype == np.int8 and stored["conv1:bias:numbers"].dtype == np.int32
    assert (stored["conv1:weights:numbers"] == 0).mean() > 0.4
    assert json.loads({p.key: p.value for p in model.metadata_props}["mean"]) == [0.0]

    stock = merge_bn(SMALL_NET, "deploy.prototxt", None, trained.folder / "w.caffemodel").net
    with LmdbReader(trained.folder / "train_lmdb") as reader:
        calibration = [
            datum_pixels(parse_datum(record)).astype(np.float32) for _, record in reader.spread(200)
        ]
    quantizer, result = quantized(stock, SCHEMES[scheme], np.stack(calibration), batch=25)
    pixels, labels = val_images(trained)
    assert len(pixels) == 1000
    made = {unit.name: carried for unit, carried in quantizer.net.passing(pixels, result.quantization)}
    grid, want = made["fc"].grid, made["fc"].values.numpy()
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    for name in (softmax.input[0], "pool1"):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    found = by_onnx(model.SerializeToString(), pixels)
    first = made["pool1"].values.numpy()
    assert first.size > 1_000_000 and len(np.unique(first)) > 100
    np.testing.assert_array_equal(found["pool1"], first)
    scores = found[softmax.input[0]]
    assert grid is not None and np.abs(scores - want).max() <= grid.step * 1.001
    top1 = [np.mean(values.argmax(axis=1) == labels) for values in (scores, want, found["prob"])]
    assert top1[0] == pytest.approx(top1[1], abs=0.001) and top1[2] == pytest.approx(top1[1], abs=0.001)
    assert top1[1] > 0.85
    assert (scores.argmax(axis=1) == want.argmax(axis=1)).mean() >= 0.999


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("scheme", "activation"), [("processor", "ReLU"), ("power2", "ReLU"), ("processor", "ReLU6")]
)
def test_stock_caffe_layer_by_layer_gives_what_pytorch_does(
    scheme: str, activation: str, trained: Trained, caffe_engine: Engine
) -> None:
    """The numbers of every layer, but for those on a rounding boundary, by one step."""
    text = SMALL_NET.replace('"ReLU"', f'"{activation}"')
    net = merge_bn(text, "deploy.prototxt", None, trained.folder / "w.caffemodel").net
    network = described(net, SCHEMES[scheme], "deploy.prototxt", {}, ())
    pixels = val_images(trained)[0][:40]
    by_torch, by_pycaffe = on_pytorch(net, network, (), ""), on_caffe(net, network, None, "deploy.prototxt")
    results = [Quantizer(net, network, "").quantize(samples(pixels, 8)) for net in (by_torch, by_pycaffe)]
    for unit, grid in results[0].quantization.outputs.items():
        assert results[1].quantization.outputs[unit].step == pytest.approx(grid.step, rel=1e-4)
    quantization = results[0].quantization
    want = {unit.name: carried.values.numpy() for unit, carried in by_torch.passing(pixels, quantization)}
    different = total = 0
    for unit, values in by_pycaffe.passing(pixels, quantization):
        grid = quantization.outputs.get(unit.name)
        apart = np.abs(values - want[unit.name])
        if grid is None:
            assert unit.output != "quantized"
            continue
        assert apart.max() <= grid.step * 1.001, unit
        different, total = different + int(np.count_nonzero(apart > grid.step / 2)), total + apart.size
    assert different <= MOST_DIFFERENT * total
    noise = [
        {u.name: (s, n) for u, s, n in net.signal_and_noise(pixels, quantization)}
        for net in (by_torch, by_pycaffe)
    ]
    errors = [{u.name: e for u, e in net.mean_errors(pixels, quantization)} for net in (by_torch, by_pycaffe)]
    for unit_name, found in noise[0].items():
        assert noise[1][unit_name] == pytest.approx(found, rel=1e-3, abs=1e-6)
    for unit_name, mean in errors[0].items():
        np.testing.assert_allclose(errors[1][unit_name], mean, rtol=1e-2, atol=1e-5)


@pytest.mark.caffe
@pytest.mark.parametrize("scheme", ["processor", "caffe_jacinto"])
def test_several_devices_give_what_one_gives(
    scheme: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nets on the CPU, in threads of their own, take the batches in turn."""
    net = stock_net(SMALL_NET, "deploy.prototxt", None, trained.folder / "w.caffemodel")
    chosen = replace(SCHEMES[scheme], bias_correction=scheme == "processor")
    network = described(net, chosen, "deploy.prototxt", {}, ())
    nets = [on_pytorch(net, network, (), "") for _ in range(3)]
    pixels, labels = val_images(trained)
    listed = [Sample(str(at), labels[at], pixels[at]) for at in range(110)]
    shown = batched("images", len(listed), 10, lambda: iter(listed))
    batches: Counter[int] = Counter()
    for number, each in enumerate(nets):
        monkeypatch.setattr(each, "scores", spied(each.scores, batches, number))
    records, seen = [], []
    for others in ([], nets[1:]):
        on_batch: list[Any] = []
        quantizer = Quantizer(nets[0], network, "deploy.prototxt", others=others, sampled=True)
        result = quantizer.quantize(shown)
        quantizer.measure_noise(result, shown)
        quantizer.test(result, shown, sensitivity=True, on_batch=on_batch.append)
        records.append(record_of(result))
        seen.append(on_batch)
    alone = len(result.alone)
    assert alone and batches == {0: (2 + alone) * (11 + 4), 1: (2 + alone) * 4, 2: (2 + alone) * 3}
    assert records[0] == records[1] and seen[0] == seen[1] and len(seen[0]) == 11


def spied(scores: Any, batches: Counter[int], number: int) -> Any:
    def counting(*arguments: Any) -> Any:
        batches[number] += 1
        return scores(*arguments)

    return counting


@pytest.mark.caffe
def test_the_command_on_stock_caffe(made: tuple[Path, str], trained: Trained, tmp_path: Path) -> None:
    assert main([*trained.arguments, "--backend", "caffe", "--output", str(tmp_path / "q")]) == 0
    records = [json.loads((folder / "quantization.json").read_text()) for folder in (made[0], tmp_path / "q")]
    for key in ("top1", "top5"):
        accuracies = [record["accuracy"]["quantized"][key] for record in records]
        assert accuracies[1] == pytest.approx(accuracies[0], abs=0.003)
    with pytest.raises(UserError, match="the scheme caffe_jacinto is computed on PyTorch only"):
        main(
            [
                *trained.arguments,
                "--backend",
                "caffe",
                "--scheme",
                "caffe_jacinto",
                "--output",
                str(tmp_path / "f"),
            ]
        )
    assert not (tmp_path / "f").exists()


@pytest.mark.caffe
def test_onnx_of_any_bits_and_opset(trained: Trained, tmp_path: Path) -> None:
    arguments = [*trained.arguments, "--bits", "5", "--bits-of", "fc=16", "--output", str(tmp_path / "q")]
    assert main(arguments) == 0
    export = ["export", "--onnx", str(tmp_path / "q.onnx"), "--quantized", str(tmp_path / "q")]
    with pytest.raises(UserError, match="layer fc has 16 bits, and opset 13 has 8; give --opset 21"):
        weights_main(export)
    with pytest.raises(UserError, match="opset 12: give 13 to 21"):
        weights_main([*export, "--opset", "12"])
    assert not (tmp_path / "q.onnx").exists()
    assert weights_main([*export, "--opset", "21", "--batch", "2"]) == 0
    pixels = val_images(trained)[0][:2]
    (found,) = by_onnx((tmp_path / "q.onnx").read_bytes(), pixels).values()
    net = stock_net(
        (tmp_path / "q/deploy_stock.prototxt").read_text(), "", None, tmp_path / "q/w_quantized.caffemodel"
    )
    assert found.shape == (2, 10) and len(net.layers) == 7
    model = onnx.load(tmp_path / "q.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    with pytest.raises(UserError, match="the scheme caffe_jacinto has no number for zero"):
        main([*trained.arguments, "--scheme", "caffe_jacinto", "--output", str(tmp_path / "f")])
        weights_main([*export[:3], "--quantized", str(tmp_path / "f")])


@pytest.mark.caffe
def test_every_opset_and_batch_gives_the_same(
    made: tuple[Path, str], trained: Trained, tmp_path: Path
) -> None:
    pixels, out = val_images(trained)[0][:20], tmp_path / "q.onnx"
    export = ["export", "--onnx", str(out), "--quantized", str(made[0])]
    outputs = []
    for opset in range(OPSET, NEWEST_OPSET + 1):
        assert weights_main([*export, "--opset", str(opset)]) == 0
        model = onnx.load(out)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", opset)]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        outputs += [by_onnx(out.read_bytes(), pixels[:count])["prob"][:3] for count in (3, 20)]
    assert weights_main([*export, "--batch", "4"]) == 0
    assert onnx.load(out).opset_import[0].version == OPSET == 13
    outputs.append(by_onnx(out.read_bytes(), pixels[:4])["prob"][:3])
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="Got: 3 Expected: 4"
    ):
        by_onnx(out.read_bytes(), pixels[:3])
    for each in outputs:
        np.testing.assert_allclose(each, outputs[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "give the folder that quantize has written"),
        ("{", "not JSON"),
        ('{"format": 2}', "format 2 is not 1"),
    ],
)
def test_a_folder_that_quantize_has_not_written(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "quantization.json").write_text(content)
    with pytest.raises(UserError, match=message):
        weights_main(["export", "--quantized", str(tmp_path)])


def scales_of_two(record: dict[str, Any]) -> None:
    record["layers"][2]["weights"]["scale"] = [1.0, 2.0]


def no_limits(record: dict[str, Any]) -> None:
    record["layers"][2]["output"]["limits"] = None


def limits_swapped(record: dict[str, Any]) -> None:
    record["layers"][2]["output"]["limits"].reverse()


def another_axis(record: dict[str, Any]) -> None:
    record["layers"][2]["weights"]["axis"] = 9


def another_name(record: dict[str, Any]) -> None:
    record["layers"][2].update(name="c", layers=["c"])


def another_scale(record: dict[str, Any]) -> None:
    (fc,) = (unit for unit in record["layers"] if unit["name"] == "fc")
    fc["weights"]["scale"][0] *= 0.7


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scales_of_two, "layer conv1: 2 scales in quantization.json do not fit its weights"),
        (no_limits, "layer conv1/relu has numbers without limits"),
        (limits_swapped, "quantization.json: damaged"),
        (another_axis, "layer conv1: 24 scales in quantization.json do not fit its weights"),
        (another_name, "has no layer c, which quantization.json names"),
        (another_scale, "layer fc: its weights are not those that were quantized"),
    ],
)
def test_what_does_not_fit_the_network_is_one_line(
    damage: Any, message: str, made: tuple[Path, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[0], tmp_path / "q")
    record = json.loads((folder / "quantization.json").read_text())
    damage(record)
    (folder / "quantization.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        weights_main(["export", "--quantized", str(folder), "--onnx", str(tmp_path / "q.onnx")])
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.caffe
def test_no_file_of_the_folder_is_written_over(made: tuple[Path, str]) -> None:
    for name in ("quantization.json", "deploy.prototxt", "deploy_stock.prototxt", "w_quantized.caffemodel"):
        before = (made[0] / name).read_bytes()
        with pytest.raises(UserError, match=f"--onnx .*{name} is the file itself"):
            weights_main(["export", "--quantized", str(made[0]), "--onnx", str(made[0] / name)])
        assert (made[0] / name).read_bytes() == before


@pytest.mark.caffe
def test_layers_of_their_own_bits_and_in_float(trained: Trained, tmp_path: Path) -> None:
    arguments = [
        *trained.arguments,
        "--scheme",
        "power2",
        "--bits",
        "4",
        "--bias-correction",
        "--ranges",
        "percentile",
    ]
    arguments += ["--bits-of", "fc=16", "--keep-float", "conv1", "--output", str(tmp_path / "q")]
    assert main([*arguments, "--input-shift", "bias"]) == 0
    for name in ("deploy.prototxt", "deploy_stock.prototxt"):
        assert re.findall('type: "(Power|Bias)"', (tmp_path / "q" / name).read_text()) == ["Bias"]
    record = json.loads((tmp_path / "q/quantization.json").read_text())
    layers = {unit["name"]: unit for unit in record["layers"]}
    assert layers["fc"]["weights"]["bits"] == layers["fc"]["output"]["bits"] == 16
    assert layers["conv1"]["weights"] is None and layers["conv1"]["output"] is None
    assert layers["fc"]["bias"] is None, "its input is on no grid"
    (scale,) = layers["shift"]["output"]["scale"]
    assert layers["shift"]["output"]["bits"] == 4 and np.frexp(scale)[0] == 0.5


AVERAGED = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 6 dim: 6 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "mean" type: "Pooling" bottom: "conv" top: "mean"
  pooling_param { pool: AVE global_pooling: true } }
layer { name: "flat" type: "Flatten" bottom: "mean" top: "flat" }
layer { name: "fc" type: "InnerProduct" bottom: "flat" top: "fc" inner_product_param { num_output: 3 } }
"""


def test_what_stays_in_float_is_made_of_values(tmp_path: Path) -> None:
    """A mean in float of numbers, which a layer then takes as it is."""
    weights = write_random(tmp_path / "w.caffemodel", AVERAGED, Dialect.BVLC)
    net, pixels = stock_net(AVERAGED, "", None, weights), images((4, 3, 6, 6))
    network = described(net, SCHEMES["processor"].with_bits(16), "", {}, ("mean", "fc"))
    quantizer = Quantizer(on_pytorch(net, network, (), ""), network, "")
    result = quantizer.quantize(samples(pixels))
    assert "mean" not in result.quantization.outputs and "conv" in result.quantization.outputs
    exact = quantizer.net.scores(pixels, None)
    for quantization in (result.quantization, result.quantization.only("conv")):
        np.testing.assert_allclose(quantizer.net.scores(pixels, quantization), exact, rtol=1e-2, atol=0.05)
    assert np.abs(exact).max() > 1


GATED = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 6 dim: 6 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "mean" type: "Pooling" bottom: "conv" top: "mean"
  pooling_param { pool: AVE global_pooling: true } }
layer { name: "gate" type: "Reshape" bottom: "mean" top: "gate" reshape_param { shape { dim: 0 dim: -1 } } }
layer { name: "gated" type: "KIND" bottom: "conv" bottom: "gate" top: "gated" PARAM { axis: 0 } }
layer { name: "clip" type: "Clip" bottom: "gated" top: "clip" clip_param { min: -2 max: 2 } }
layer { name: "flat" type: "Reshape" bottom: "clip" top: "flat" reshape_param { shape { dim: DIM dim: -1 } } }
layer { name: "fc" type: "InnerProduct" bottom: "flat" top: "fc" inner_product_param { num_output: 3 } }
"""


@pytest.mark.parametrize("kind", ["Scale", "Bias"])
def test_batches_of_another_size_than_the_files(kind: str, tmp_path: Path) -> None:
    """A deploy network says 1 image; some of its layers have a number for each."""
    text = GATED.replace("KIND", kind).replace("PARAM", f"{kind.lower()}_param").replace("DIM", "0")
    weights = write_random(tmp_path / "w.caffemodel", text, Dialect.BVLC)
    net, pixels = stock_net(text, "", None, weights), images((4, 3, 6, 6))
    quantizer, result = quantized(net, SCHEMES["processor"], pixels)
    for quantization in (None, result.quantization):
        alone = [quantizer.net.scores(pixels[at : at + 1], quantization) for at in range(4)]
        found = quantizer.net.scores(pixels, quantization)
        np.testing.assert_allclose(found, np.concatenate(alone), rtol=1e-4, atol=1e-4)
        assert len(np.unique(found)) > 9

    files = quantized_files(net, result, None, "deploy.prototxt")
    assert files.fork_text is None and 'type: "Clip"' in files.stock_text
    assert files.fork_lacks == "deploy.prototxt: layer clip (Clip): caffe-jacinto has no field clip_param"


def test_a_network_for_batches_of_one_size(tmp_path: Path) -> None:
    text = GATED.replace("KIND", "Scale").replace("PARAM", "scale_param").replace("DIM", "1")
    weights = write_random(tmp_path / "w.caffemodel", text, Dialect.BVLC)
    net, pixels = stock_net(text, "", None, weights), images((4, 3, 6, 6))
    with pytest.raises(
        RunFailed, match=r"^deploy.prototxt: cannot be computed: shape '\[1, 64\]' is invalid"
    ):
        quantized(net, SCHEMES["processor"], pixels)


@pytest.mark.caffe
def test_what_the_fork_has_no_form_for_is_written_without_it(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it can be exported; a network of an earlier quantization is not left beside it."""
    clip = 'layer { name: "clip" type: "Clip" bottom: "pool1" top: "clip" clip_param { min: 0 max: 60 } }\n'
    text = SMALL_NET.replace('layer { name: "fc"', f'{clip}layer {{ name: "fc"').replace(
        '"InnerProduct" bottom: "pool1"', '"InnerProduct" bottom: "clip"'
    )
    (tmp_path / "deploy.prototxt").write_text(text)
    shutil.copy(trained.folder / "val.prototxt", tmp_path)
    folder = tmp_path / "quantized"
    folder.mkdir()
    (folder / "deploy.prototxt").write_text("an earlier one")
    assert main([str(tmp_path / "deploy.prototxt"), *trained.arguments[1:]]) == 0
    said = capsys.readouterr()
    assert f"{folder / 'deploy.prototxt'}: not written: " in said.err and "no field clip_param" in said.err
    assert said.out.splitlines()[-1].startswith(f"{folder}: quantization.json, deploy_stock.prototxt, ")
    assert not (folder / "deploy.prototxt").exists()
    record = json.loads((folder / "quantization.json").read_text())
    assert record["network"] is None and record["accuracy"]["quantized"]["top1"] > 0.8
    assert weights_main(["export", "--quantized", str(folder), "--onnx", str(tmp_path / "q.onnx")]) == 0
    assert [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node].count("Clip") == 1


@pytest.mark.caffe
def test_a_network_that_gives_no_scores_is_quantized_and_not_tested(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers for an image are no classes, and one of them would pass for the best."""
    spread = SMALL_NET[: SMALL_NET.index('layer { name: "fc"')]
    chosen = SMALL_NET.replace('"prob" type: "Softmax"', '"best" type: "ArgMax"')
    ways = {
        "its output is 24x7x7 for an image, not the scores of classes": spread,
        "its output is the classes that best (ArgMax) chooses, not their scores": chosen,
    }
    val = ["--val", str(trained.folder / "val_lmdb")]
    shutil.copy(trained.folder / "val.prototxt", tmp_path)
    for why, text in ways.items():
        (tmp_path / "deploy.prototxt").write_text(text)
        arguments = [str(tmp_path / "deploy.prototxt"), *trained.arguments[1:]]
        for option in (val, ["--sensitivity"]):
            with pytest.raises(
                UserError, match=re.escape(f"{why}, which a test needs: leave {option[0]} out")
            ):
                main([*arguments, *option])
        assert not (tmp_path / "quantized").exists()
        files = {name: (tmp_path / name).read_text() for name in ("deploy.prototxt", "val.prototxt")}
        check_quantizable(files, tmp_path, QuantizeSettings(), SCHEMES["processor"], tested=False)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path}/deploy.prototxt: {why}")):
            check_quantizable(files, tmp_path, QuantizeSettings(), SCHEMES["processor"], tested=True)
        assert main(arguments) == 0
        assert f"{why}: the accuracy is not tested" in capsys.readouterr().err
        assert json.loads((tmp_path / "quantized/quantization.json").read_text())["accuracy"] is None
        shutil.rmtree(tmp_path / "quantized")


VANISHED = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "c1" type: "Convolution" bottom: "data" top: "c1"
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "c1/relu" type: "ReLU" bottom: "c1" top: "c1" }
layer { name: "c2" type: "Convolution" bottom: "c1" top: "c2"
  convolution_param { num_output: 5 kernel_size: 3 } }
"""


@pytest.mark.parametrize("bias_bits", [32, 10])
@pytest.mark.parametrize("size", [1e-25, 1e-7])
def test_a_channel_whose_weights_have_vanished_leaves_the_others_as_they_are(
    size: float, bias_bits: int, tmp_path: Path
) -> None:
    """It still has its bias, which fits into sums of 32 bits; `by_integers` refuses larger ones."""
    weights = write_random(tmp_path / "w.caffemodel", VANISHED, Dialect.BVLC)
    net, pixels = stock_net(VANISHED, "", None, weights), images((8, 3, 8, 8))
    layers = {layer.name: layer for layer in net.layers}
    filters, bias = layers["c1"].blobs
    filters[2], bias[2] = np.where(filters[2] < 0, -size, size), 1.0
    scheme = replace(SCHEMES["processor"], bits=Bits(bias=bias_bits))
    quantizer, result = quantized(net, scheme, pixels)
    record = {unit["name"]: unit for unit in record_of(result)["layers"]}
    blobs: dict[str, tuple[Any, float]] = {}
    for unit, carried in quantizer.net.passing(pixels, result.quantization):
        bottoms = layers[unit.layers[0]].message.bottom if unit.layers else ()
        want = by_integers(record[unit.name], layers, [blobs[name] for name in bottoms], pixels)
        assert np.abs(carried.tensor.numpy() - want).max() <= 1 and carried.grid is not None
        blobs[unit.blob] = want, carried.grid.step
    exact = quantizer.net.scores(pixels, None)
    found = quantizer.net.scores(pixels, result.quantization)
    noise = np.square(found - exact).mean() / np.square(exact).mean()
    assert noise < 10 ** (-3 if bias_bits == 32 else -2.3)


@pytest.mark.caffe
def test_few_bits_cost_accuracy(trained: Trained, tmp_path: Path) -> None:
    """So the test can tell a good quantization from a bad one."""
    assert main([*trained.arguments, "--bits", "2", "--output", str(tmp_path / "q")]) == 0
    accuracy = json.loads((tmp_path / "q/quantization.json").read_text())["accuracy"]
    assert accuracy["quantized"]["top1"] < accuracy["float"]["top1"] - 0.05


WRONG = [
    (["--bits", "1"], "1 bits for weights: give 2 to 16"),
    (["--weight-bits", "17"], "17 bits for weights: give 2 to 16"),
    (["--bits-of", "fc=1"], "--bits-of fc=1: 1 bits for weights: give 2 to 16"),
    (["--bits-of", "fc"], "is not a layer and its bits, like conv1=16"),
    (
        ["--keep-float", "fd"],
        "--keep-float fd: the network has no such layer; known: data, shift, conv1, pool1, fc",
    ),
    (
        ["--scheme", "caffe_jacinto", "--ranges", "mse"],
        "--ranges: the scheme caffe_jacinto has ranges of its own",
    ),
    (
        ["--scheme", "caffe_jacinto", "--input-shift", "bias"],
        "--input-shift: the scheme caffe_jacinto leaves layers as they are; leave it out",
    ),
    (["--percentile", "99"], "--percentile: only ranges by percentile have one"),
    (["--bits-of", "fc=4", "--bits-of", "fc=8"], "--bits-of fc: is there twice; give each layer once"),
    (
        ["--bits-of", "conv1=4", "--keep-float", "conv1/relu"],
        "--keep-float conv1/relu: --bits-of gives it bits",
    ),
    (
        ["--calibrate", "a.png", "b.png"],
        "b.png: one path too many; give each image its own --calibrate, or name their folder",
    ),
    (["--plot", "x.pdf"], "--plot x.pdf: the name must end in .png or .svg"),
    (["--val", "nowhere"], "nowhere"),
    (
        ["--preprocessing", "nowhere"],
        "nowhere: No such file or directory; name the validation network with --preprocessing",
    ),
    (["--calibrate", "nowhere"], "--calibrate nowhere: there is no such file or folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        main([*trained.arguments, "--output", str(tmp_path / "q"), *arguments])
    assert message in str(error.value)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("layer", "index", "value", "message"),
    [
        ("conv1/bn", 2, 0.0, "conv1/bn"),  # no statistics
        ("fc", 0, np.inf, "layer fc has weights that are not finite"),
        ("conv1", 1, np.nan, "not finite"),
        ("conv1/bn", 1, np.inf, r"conv1 with conv1/bn \(BatchNorm\) has weights that are not finite"),
        (
            "fc",
            1,
            3e38,
            "gives values from 3e\\+38 to 3e\\+38 on the calibration images, which is not a range",
        ),
    ],
)
def test_weights_that_cannot_be_quantized(
    layer: str, index: int, value: float, message: str, trained: Trained, tmp_path: Path
) -> None:
    stored = {name: list(blobs) for name, blobs in read_weights(trained.folder / "w.caffemodel").items()}
    stored[layer][index] = np.full_like(stored[layer][index], value)
    net = parse_net(SMALL_NET, Dialect.BVLC, "deploy.prototxt")
    wrong = tmp_path / "wrong.caffemodel"
    write_net(wrong, "", [NewLayer(item, stored.get(item.name, [])) for item in net.layer], Dialect.BVLC)
    arguments = [str(trained.folder / "deploy.prototxt"), str(wrong), *trained.arguments[2:]]
    with pytest.raises(UserError, match=message):
        main([*arguments, "--output", str(tmp_path / "q")])
    assert not (tmp_path / "q").exists()


def test_without_a_validation_network(trained: Trained, tmp_path: Path) -> None:
    shutil.copy(trained.folder / "deploy.prototxt", tmp_path)
    arguments = [str(tmp_path / "deploy.prototxt"), *trained.arguments[1:]]
    with pytest.raises(
        UserError, match=r"no val.prototxt, .*; name the validation network with --preprocessing"
    ):
        main(arguments)
    (tmp_path / "val.prototxt").write_text('name: "without data"')
    with pytest.raises(UserError, match=r"no Data or .*; name another file with --preprocessing"):
        main(arguments)


def test_no_image_that_can_be_read(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"no image")
    arguments = [*trained.arguments[:2], "--calibrate", str(tmp_path / "images"), "--resize", "28"]
    with pytest.raises(UserError, match="none of the images can be used"):
        main([*arguments, "--output", str(tmp_path / "q")])
    assert "a.jpg" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


@pytest.mark.caffe
def test_the_page_of_a_report_has_the_quantizations_in_the_runs_folder(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "initial").mkdir(parents=True)
    (run / "initial" / "run.log").write_text(whole_stage().text)
    shutil.copytree(made[0], run / "quantized")
    (run / "other").mkdir()
    (run / "other" / "quantization.json").write_text('{"format": 1, "accuracy": 3}')
    assert report([str(run), "--html", str(tmp_path / "page.html")]) == 0
    text = html.unescape((tmp_path / "page.html").read_text())
    record = json.loads((made[0] / "quantization.json").read_text())
    before, after = (record["accuracy"][which]["top1"] for which in ("float", "quantized"))
    cells = [f"{100 * before:.2f} %", f"{100 * after:.2f} %", f"{100 * (after - before):+.2f}"]
    assert f'<th scope="row">Top-1</th>{"".join(f"<td>{cell}</td>" for cell in cells)}' in text
    for unit in record["layers"]:
        bits = unit["weights"]["bits"] if unit.get("weights") else "-"
        shown = f'<tr><th scope="row">{unit["name"]}</th><td>{bits}</td>' in text
        assert shown is (unit["output"] is not None)  # a pooling that keeps the scale has no figures
        if unit.get("output_sqnr_db") is not None:
            assert f"<span>{unit['output_sqnr_db']:.1f}</span>" in text
    assert f"{run / 'other/quantization.json'}: is damaged, and left out" in text
