"""Quantization-aware training on PyTorch: gradients, what is trained is what is tested, resume, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from deploy_nets import built, write_random
from digits_run import Trainer, recipe_of, tiny, write_lmdbs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from small_stage import SmallStage, write_digits

from caffe_jacinto.caffemodel.net_file import NewLayer, write_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.datum import datum_pixels, parse_datum
from caffe_jacinto.data.lmdb_reader import LmdbReader
from caffe_jacinto.engines.contract import Engine, add_quantization_arguments, quantization_settings
from caffe_jacinto.engines.pytorch import quantized
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.engine import TorchEngine, describe_torch
from caffe_jacinto.engines.pytorch.folding import Folding
from caffe_jacinto.engines.pytorch.net import TEST, TRAIN, Net
from caffe_jacinto.engines.pytorch.qat import QuantizedTraining
from caffe_jacinto.engines.pytorch.rounding import rounded, stands_for
from caffe_jacinto.engines.pytorch.snapshot import array, load_weights, read_ranges_state
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.inference.network import trained_network
from caffe_jacinto.inference.quantize import described, loaded, on_pytorch
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.network import quantization_of
from caffe_jacinto.quantization.schemes import SCHEMES, Scheme, chosen_scheme
from caffe_jacinto.quantization.settling import read_ranges
from caffe_jacinto.quantization.trained_part import check_tested, trained_part
from caffe_jacinto.quantize import main as quantize
from caffe_jacinto.recipes.model import QuantizeSettings
from caffe_jacinto.report import main as report

ENGINE = TorchEngine(describe_torch(Dialect.BVLC))
ITERATIONS = 16

# ------------------------------------------------------------------------------------------------ gradients


@given(
    values=npst.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)),
    steps=npst.arrays(np.float32, 4, elements=st.floats(2**-6, 4, width=32)),
    bits=st.integers(2, 8),
    signed=st.booleans(),
)
def test_gradients_pass_straight_through_rounding_and_stop_at_clipping(
    values: Any, steps: Any, bits: int, signed: bool
) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    grid = Grid(steps, low, high, axis=1)
    given_values = torch.from_numpy(values.copy()).requires_grad_()
    numbers = rounded(given_values, grid)
    np.testing.assert_array_equal(numbers.detach().numpy(), grid.numbers(values))
    weights = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    (numbers * torch.from_numpy(weights)).sum().backward()  # type: ignore[no-untyped-call]
    nearest = np.rint(values / steps)
    want = np.where((nearest >= low) & (nearest <= high), weights / steps, 0)
    assert given_values.grad is not None
    np.testing.assert_array_equal(given_values.grad.numpy(), want.astype(np.float32))


def test_the_gradient_of_a_bias_is_that_of_its_value() -> None:
    bias, steps = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([0.25, 0.5])
    numbers = stands_for(bias, torch.tensor([1.0, -4.0]), steps)
    (numbers * steps * torch.tensor([3.0, 5.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0, 5.0]


# -------------------------------------------------------------------------------------------------- folding

INPUT = (
    'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 9 dim: 9 } } }\n'
)
SHIFTED = f"""
{INPUT}
layer {{ name: "shift" type: "Bias" bottom: "data" top: "shift" }}
layer {{ name: "conv" type: "Convolution" bottom: "shift" top: "conv"
  convolution_param {{ num_output: 6 kernel_size: 3 group: 2 }} }}
layer {{ name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }}
layer {{ name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param {{ bias_term: true }} }}
layer {{ name: "more" type: "Bias" bottom: "conv" top: "conv" }}
layer {{ name: "moved" type: "Power" bottom: "conv" top: "moved" power_param {{ shift: -3 }} }}
layer {{ name: "fc" type: "InnerProduct" bottom: "moved" top: "fc"
  inner_product_param {{ num_output: 5 transpose: true bias_term: false }} }}
layer {{ name: "fc/scale" type: "Scale" bottom: "fc" top: "fc" }}
"""

UPSAMPLED = f"""
{INPUT}
layer {{ name: "up" type: "Deconvolution" bottom: "data" top: "up"
  convolution_param {{ num_output: 4 kernel_size: 2 stride: 2 bias_term: false }} }}
layer {{ name: "bn" type: "BatchNorm" bottom: "up" top: "up" }}
layer {{ name: "scale" type: "Scale" bottom: "up" top: "up" scale_param {{ bias_term: true }} }}
layer {{ name: "more" type: "Deconvolution" bottom: "up" top: "more"
  convolution_param {{ num_output: 6 kernel_size: 3 group: 2 }} }}
layer {{ name: "more/scale" type: "Scale" bottom: "more" top: "more" scale_param {{ bias_term: true }} }}
"""


@pytest.mark.caffe
@pytest.mark.parametrize("network", ["jacintonet11", "resnet10", "shifted", "upsampled"])
def test_folded_weights_in_training_are_those_of_the_merged_network(network: str, tmp_path: Path) -> None:
    """To the bit; where a sum goes over weights, to the last bits of float32."""
    own = {"shifted": SHIFTED, "upsampled": UPSAMPLED}
    text = own[network] if network in own else built(network, Dialect.BVLC, tmp_path)
    weights = write_random(tmp_path / "w.caffemodel", text, Dialect.BVLC)
    net = Net(
        parse_net(text, Dialect.BVLC, "deploy"), TEST, Dialect.BVLC, where="deploy", seed=0, fused=False
    )
    load_weights(net, weights)
    folding = Folding(net, net.layers, "deploy")
    merged = merge_bn(text, "deploy", Dialect.BVLC, weights)
    assert merged.merged, "nothing was folded: the test says nothing"
    seen = 0
    for layer in merged.net.layers:
        if layer.type not in ("Convolution", "Deconvolution", "InnerProduct"):
            continue
        folded = folding.folded(layer.name)
        np.testing.assert_array_equal(array(folded.weights), layer.blobs[0])
        if folded.added is None and folded.bias is not None:
            np.testing.assert_array_equal(array(folded.bias), layer.blobs[1])
        elif folded.bias is not None:
            np.testing.assert_allclose(array(folded.bias), layer.blobs[1], rtol=1e-6, atol=1e-7)
        seen += 1
    assert seen > 1


# -------------------------------------------------------------------------------------------------- a stage


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("lmdb") / "lmdb", 320)


@pytest.fixture(scope="module")
def start(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights; half of those of conv2 are zero."""
    stage = SmallStage(tmp_path_factory.mktemp("start"), digits)
    stage.solver(max_iter=60, display=20, test_interval=60, snapshot=60)
    stage.run(ENGINE.train_commands(stage.job(60)))
    weights = stage.folder / "small_iter_60.caffemodel"
    stored = {name: list(blobs) for name, blobs in read_weights(weights).items()}
    sizes = np.abs(stored["conv2"][0])
    stored["conv2"][0] = np.where(sizes <= np.median(sizes), 0, stored["conv2"][0]).astype(np.float32)
    net = parse_net((stage.folder / "train.prototxt").read_text(), Dialect.BVLC, "train.prototxt")
    layers = [NewLayer(layer, stored.get(layer.name, [])) for layer in net.layer]
    write_net(weights, "small", layers, Dialect.BVLC)
    return weights


class Stage(SmallStage):
    """A stage in quantized values, trained in this process."""

    def prepared(self, **changes: object) -> Stage:
        fields = {"max_iter": ITERATIONS, "snapshot": 4, "test_interval": 8, "test_iter": 10, "base_lr": 0.01}
        self.solver(**{**fields, **changes})
        return self

    def train(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str, **settings: Any
    ) -> str:
        """Train as the engine's command says; returns the log."""
        given = {"bits": 4, "batches": 3, "settle_iter": 6, "freeze_bn_iter": 10, **settings}
        quantize = QuantizeSettings(**given)
        job = self.job(ITERATIONS, reestimate_batches=0, quantize=quantize)
        (command,) = ENGINE.train_commands(job)
        monkeypatch.chdir(self.folder)
        capfd.readouterr()
        assert caffe_torch([*command[command.index("train") :], *flags]) == 0
        return capfd.readouterr().err

    @property
    def final(self) -> Path:
        return self.folder / f"small_iter_{ITERATIONS}.caffemodel"


def test_outputs(log: str) -> list[tuple[int, float]]:
    """Iteration and accuracy of each test."""
    pattern = r"Iteration (\d+), Testing net.*\n.*Test values: quantized\n.*accuracy = (\S+)"
    return [(int(iteration), float(value)) for iteration, value in re.findall(pattern, log)]


test_outputs.__test__ = False  # type: ignore[attr-defined]


BY_PERCENTILE = {"weight_ranges": "percentile", "percentile": 95.0}


@pytest.mark.parametrize(
    ("stopped_at", "settings"), [(4, BY_PERCENTILE), (8, {"weight_ranges": "mse"}), (12, {})]
)
def test_resumed_to_the_bit(
    stopped_at: int,
    settings: dict[str, Any],
    digits: Path,
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While ranges settle, when these are fixed and batch norms still learn, and when all is fixed."""
    whole = Stage(tmp_path / "whole", digits).prepared(iter_size=2)
    log = whole.train(capfd, monkeypatch, "-weights", str(start), "-freeze_zeros", **settings)
    resumed = Stage(tmp_path / "resumed", digits).prepared(iter_size=2)
    for name in (".caffemodel", ".solverstate", ".masks.npz"):
        file = f"small_iter_{stopped_at}{name}"
        (resumed.folder / file).write_bytes((whole.folder / file).read_bytes())
    snapshot = f"small_iter_{stopped_at}.solverstate"
    again = resumed.train(capfd, monkeypatch, "-snapshot", snapshot, "-freeze_zeros", **settings)
    assert "Calibrating" in log
    assert "Calibrating" not in again
    assert resumed.final.read_bytes() == whole.final.read_bytes()
    for name in (".solverstate", ".ranges.json"):
        assert resumed.final.with_suffix(name).read_bytes() == whole.final.with_suffix(name).read_bytes()
    assert test_outputs(again) == [pair for pair in test_outputs(log) if pair[0] >= stopped_at]
    assert [iteration for iteration, _ in test_outputs(log)] == [8, 16]


def test_zeros_hold_and_what_learns_moves(
    digits: Path,
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(tmp_path / "stage", digits).prepared()
    stage.train(capfd, monkeypatch, "-weights", str(start), "-freeze_zeros")
    before, after = read_weights(start), read_weights(stage.final)
    zeros = before["conv2"][0] == 0
    assert zeros.mean() == pytest.approx(0.5, abs=0.01)
    assert not after["conv2"][0][zeros].any()
    assert after["conv2"][0][~zeros].all()
    for name in ("conv1", "conv2", "conv2/scale", "fc"):
        for old, new in zip(before[name], after[name], strict=True):
            assert (old != new).mean() > 0.4, name
    fixed = {
        at: read_weights(stage.folder / f"small_iter_{at}.caffemodel")["conv1/bn"] for at in (4, 8, 12, 16)
    }
    assert not np.array_equal(fixed[4][0], fixed[8][0]), "the statistics stood still before the freeze"
    for one, other in zip(fixed[12], fixed[16], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("processor", {}),
        ("power2", {}),
        ("processor", {"weight_ranges": "mse"}),
        ("power2", BY_PERCENTILE),
    ],
)
def test_what_is_trained_is_what_quantize_tests(
    scheme: str,
    settings: dict[str, Any],
    digits: Path,
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit: the scores that the training computed its loss from; and the accuracy of its last test.

    `quantize` chooses the ranges of weights as the training did, unless it is asked for others.
    """
    stage = Stage(tmp_path / "stage", digits).prepared()
    log = stage.train(capfd, monkeypatch, "-weights", str(start), scheme=scheme, **settings)
    deploy = stage.folder / "deploy.prototxt"
    deploy.write_text(deploy_of(stage))
    options = ["--scheme", scheme, "--bits", "4", "--calibrate", str(digits), "--batches", "2"]
    assert quantize([str(deploy), str(stage.final), *options, "--output", str(tmp_path / "made")]) == 0
    said = capfd.readouterr()
    assert f"{stage.final.with_suffix('.ranges.json')}: these ranges are used" in said.err
    assert f"Scheme {scheme}, with the ranges that the training fixed" in said.out
    record = json.loads((tmp_path / "made/quantization.json").read_text())
    assert f"{record['accuracy']['quantized']['top1']:g}" == f"{test_outputs(log)[-1][1]:g}"
    assert record["settings"]["activation_ranges"] == "trained"
    assert record["settings"]["weight_ranges"] == settings.get("weight_ranges", "minmax")
    if settings:
        others = [str(deploy), str(stage.final), *options, "--weight-ranges", "minmax"]
        assert quantize([*others, "--output", str(tmp_path / "others")]) == 0
        assert "not used, and the ranges are calibrated: they are for ranges of weights by" in (
            capfd.readouterr().err
        )

    net = train_net(stage)
    load_weights(net, stage.final)
    chosen = chosen_scheme(QuantizeSettings(scheme=scheme, bits=4, **settings).model_dump())
    training = training_of(net, chosen)
    state = read_ranges_state(stage.final.with_suffix(".solverstate"))
    training.ranges.load(state, "")
    training.begin(ITERATIONS)
    given = batch_of(digits)
    values = training.predicted(given, *training.prepared(net, frozen=True))
    trained = trained_network(deploy, stage.final)
    stock = loaded(trained, chosen)
    network = described(stock, chosen, "", {}, ())
    passes = on_pytorch(stock, network, (), "")
    ranges = read_ranges(stage.final)
    assert ranges is not None
    scores = passes.scores(given["data"].numpy(), quantization_of(network, ranges.ranges, ""))
    np.testing.assert_array_equal(values["fc"].detach().numpy(), scores)
    assert len(np.unique(scores)) > 5, "hardly any values: the test says nothing"
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(scores), given["label"].long())
    assert float(training(given).loss.detach()) == pytest.approx(float(loss), rel=1e-6)


def test_a_teacher_in_float32_teaches_what_is_rounded(
    digits: Path,
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss is that of the rounded scores and the teacher's, whose images are not; resumed to the bit."""
    stages = [Stage(tmp_path / name, digits).prepared(display=1) for name in ("whole", "resumed")]
    (tmp_path / "deploy.prototxt").write_text(deploy_of(stages[0]))
    loss = (
        'layer { name: "distillation" type: "DistillationLoss" bottom: "fc" bottom: "data"\n'
        '  top: "distillation" distillation_param { temperature: 2 net: "../deploy.prototxt"\n'
        f'  weights: "{start}" }} }}\n'
    )
    for stage in stages:
        train = stage.folder / "train.prototxt"
        train.write_text(train.read_text() + loss)
    whole, resumed = stages
    log = whole.train(capfd, monkeypatch, "-weights", str(start))
    assert log.count(": distillation = ") == ITERATIONS
    for name in (".caffemodel", ".solverstate"):
        (resumed.folder / f"small_iter_8{name}").write_bytes(
            (whole.folder / f"small_iter_8{name}").read_bytes()
        )
    resumed.train(capfd, monkeypatch, "-snapshot", "small_iter_8.solverstate")
    assert resumed.final.read_bytes() == whole.final.read_bytes()

    monkeypatch.chdir(whole.folder)
    net, given = train_net(whole), batch_of(digits)
    load_weights(net, start)
    training = training_of(net, SCHEMES["processor"].with_bits(3))
    training.calibrate(given)
    training.choose()
    training.begin(0)
    found = float(training(given).outputs["distillation"].detach())
    exact, rounded_scores = (
        training.predicted(given, *training.prepared(net, frozen=True, exact=exact))["fc"].detach()
        for exact in (True, False)
    )
    wanted, learnt = (torch.log_softmax(scores / 2, 1) for scores in (exact, rounded_scores))
    divergence = float((wanted.exp() * (wanted - learnt)).sum(1).mean())
    assert divergence > 1e-3
    assert found == pytest.approx(4 * divergence, rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_in_16_bits_gradients_and_statistics_are_those_of_float32(
    frozen: bool, digits: Path, start: Path, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path / "stage", digits)
    given = batch_of(digits)
    plain, quantized = train_net(stage, frozen=frozen), train_net(stage)
    for net in (plain, quantized):
        load_weights(net, start)
    plain(given).loss.backward()
    scheme = replace(SCHEMES["processor"].with_bits(16), activation_ranges="minmax")  # nothing is clipped
    training = training_of(quantized, scheme, freeze=0 if frozen else 9)
    training.calibrate(given)
    training.choose()
    training.begin(0)
    assert float(training(given).loss.detach()) == pytest.approx(float(plain(given).loss.detach()), rel=1e-3)
    for net in (plain, quantized):
        load_weights(net, start)
        for _, _, blob in net.blobs:
            blob.tensor.grad = None
    plain(given).loss.backward()
    training(given).loss.backward()
    for (layer, index, want), (_, _, found) in zip(plain.blobs, quantized.blobs, strict=True):
        where = f"{layer}[{index}]"
        np.testing.assert_allclose(
            array(found.tensor), array(want.tensor), rtol=2e-3, atol=1e-6, err_msg=where
        )
        if want.tensor.grad is None:
            assert found.tensor.grad is None, where
            continue
        assert found.tensor.grad is not None, where
        apart = (found.tensor.grad - want.tensor.grad).norm()
        # A bias before a batch norm has no gradient but rounding.
        if not (layer in ("conv1", "conv2") and index == 1):
            assert float(apart) <= 0.005 * float(want.tensor.grad.norm()), where


def test_sums_are_exact_where_convolutions_of_float32_are_not(
    digits: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Winograd's and the FFT's algorithm round on a GPU; a stand-in for them computes on the CPU."""
    stage, given = SmallStage(tmp_path / "stage", digits), batch_of(digits)
    convolve, results = F.conv2d, []

    def rounding(images: torch.Tensor, *arguments: Any) -> torch.Tensor:
        made = convolve(images, *arguments)
        return made if images.dtype == torch.float64 else made + made.detach().abs().amax() * 1e-3

    for on_gpu in (False, True):
        net = train_net(stage)
        load_weights(net, start)
        training = training_of(net, SCHEMES["processor"])
        training.calibrate(given)
        training.choose()
        training.begin(0)
        if on_gpu:
            monkeypatch.setattr(quantized, "_may_round", lambda numbers: True)
            monkeypatch.setattr(F, "conv2d", rounding)
        loss = training(given).loss
        loss.backward()
        gradients = {name: blob.grad for name, blob in net.named_parameters() if blob.grad is not None}
        results.append((loss.detach(), gradients))
        with torch.no_grad():
            assert torch.equal(training(given).loss, loss)
    assert torch.equal(results[0][0], results[1][0])
    assert len(results[0][1]) > 5
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def train_net(stage: SmallStage, *, frozen: bool = False) -> Net:
    text = (stage.folder / "train.prototxt").read_text()
    if frozen:
        text = text.replace("batch_norm_param {", "batch_norm_param { use_global_stats: true ")
    shapes = {"data": (32, 1, 28, 28), "label": (32,)}
    message = parse_net(text, Dialect.BVLC, "train.prototxt")
    return Net(message, TRAIN, Dialect.BVLC, where="train.prototxt", seed=0, data_shapes=shapes, fused=False)


def training_of(net: Net, scheme: Scheme, freeze: int = 0) -> QuantizedTraining:
    ranks = Ranks(torch.device("cpu"))
    return QuantizedTraining(net, scheme, ranks, bits={}, floats=(), settle=0, freeze=freeze)


def batch_of(lmdb: Path) -> dict[str, torch.Tensor]:
    with LmdbReader(lmdb) as reader:
        data = [parse_datum(record) for _, record in islice(reader.records(), 32)]
    pixels = np.stack([datum_pixels(datum) for datum in data]).astype(np.float32) * np.float32(0.0039)
    labels = np.array([datum.label for datum in data], np.float32)
    return {"data": torch.from_numpy(pixels), "label": torch.from_numpy(labels)}


def deploy_of(stage: SmallStage) -> str:
    """The stage's network with a declared input, without what reads labels."""
    text = (stage.folder / "val.prototxt").read_text()
    layers = re.split(r"(?m)^(?=layer)", text)
    kept = [part for part in layers if '"label"' not in part]
    shape = "shape { dim: 1 dim: 1 dim: 28 dim: 28 }"
    return f'layer {{ name: "data" type: "Input" top: "data" input_param {{ {shape} }} }}\n' + "".join(kept)


# ---------------------------------------------------------------------------------------------------- a run

FOUR_BITS = """
[stages.qat]
start = "initial"

[stages.qat.solver]
max_iter = 4
base_lr = 1e-3
weight_decay = 1e-4
snapshot = 2
test_interval = 4

[stages.qat.quantize]
bits = 4
batches = 2

[stages.quantize]
start = "qat"

[stages.quantize.quantize]
bits = 4
batches = 2
"""


@pytest.mark.caffe
def test_a_run_trains_in_four_bits_on_two_ranks_and_quantizes_with_the_ranges_of_that(
    tmp_path: Path, caffe_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lmdbs(tmp_path)
    recipe = recipe_of(tmp_path, "initial")
    (tmp_path / recipe).write_text((tmp_path / recipe).read_text() + FOUR_BITS)
    arguments = [*tiny(recipe, ("initial",), initial=2), "--output", "run"]
    code, said = Trainer(caffe_engine.info.executable, tmp_path).run(*arguments)
    assert code == 2
    assert "stages.qat.quantize: only PyTorch trains in quantized values: add --engine torch" in said
    assert not (tmp_path / "run").exists()
    trainer = Trainer(None, tmp_path)
    code, said = trainer.run(*arguments, "--set", "training.cpu_ranks=2")
    assert code == 0, said
    assert "2 ranks train together" in trainer.log("run", "qat")
    assert trainer.states("run").values() == {"finished"} or set(trainer.states("run").values()) == {
        "finished"
    }
    assert "these ranges are used" in trainer.log("run", "quantize")
    record = json.loads((tmp_path / "run/quantize/quantization.json").read_text())
    tests = test_outputs(trainer.log("run", "qat").replace("accuracy/top1", "accuracy"))
    assert tests[-1] == (4, pytest.approx(record["accuracy"]["quantized"]["top1"]))
    assert report([str(tmp_path / "run")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "4 bits" in line]
    assert [re.search(r", (\w+) \(", row)[1] for row in rows] == ["qat", "quantize"]  # type: ignore[index]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-precision", "bf16"], "-precision bf16: with -quantize everything is computed in fp32"),
        (["-dialect", "caffe_jacinto"], "-quantize: prototxts of the dialect bvlc are needed"),
        (["-reestimate_batches", "3"], "-reestimate_batches: with -quantize"),
        (["-sparsity_target", "0.8", "-sparsity_start_iter", "3"], "-sparsity_target: prune before"),
        ([], "-quantize: trained weights are needed to start from"),
    ],
)
def test_refused_before_the_training(
    flags: list[str],
    says: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = SmallStage(tmp_path / "stage", digits)
    stage.solver()
    monkeypatch.chdir(stage.folder)
    with pytest.raises(UserError, match=re.escape(says)):
        caffe_torch(["train", "-solver", "solver.prototxt", "-quantize", *flags])
    assert not list(stage.folder.glob("*.caffemodel"))


ONE_LOSS = (
    INPUT
    + """
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param { num_output: 5 } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 1 } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
)


def test_only_the_layers_that_lead_to_the_prediction_are_rounded() -> None:
    aside = 'layer { name: "aside" type: "ReLU" bottom: "data" top: "aside" }\n'
    layers = parse_net(ONE_LOSS + aside, Dialect.BVLC, "net").layer
    assert [layer.name for layer in trained_part(layers, "net")] == ["data", "fc"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (INPUT, "net: quantization-aware training needs one prediction"),
        (
            ONE_LOSS + 'layer { name: "l2" type: "EuclideanLoss" bottom: "data" bottom: "label" top: "l2" }',
            "this network has 2 (data, fc)",
        ),
        (
            ONE_LOSS.replace('"InnerProduct"', '"BN"').replace("inner_product_param { num_output: 5 }", ""),
            "layer fc (BN): quantization-aware training folds only BatchNorm and Scale",
        ),
    ],
)
def test_networks_that_are_not_trained_in_quantized_values(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        trained_part(parse_net(text, Dialect.BVLC, "net").layer, "net")
    assert says in str(error.value)


def test_a_test_network_of_other_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"val: lacks layer conv of train, which is quantized there"):
        check_tested({"data", "conv"}, {"data", "fc"}, "train", "val")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("-quantize_bits 4", "-quantize_bits needs -quantize: add it"),
        ("-quantize -quantize_bits 17", "-quantize_bits: is 17; give 16 or less"),
        ("-quantize -quantize_scheme caffe_jacinto", '-quantize_scheme: "caffe_jacinto" is for tests only'),
        ("-quantize -quantize_scheme prozessor", "did you mean processor?"),
        ("-quantize -quantize_bits_of conv1=1", "-quantize_bits_of.conv1: is 1; give 2 or more"),
    ],
)
def test_flags_out_of_range_are_one_line(flags: str, says: str) -> None:
    from argparse import ArgumentParser

    parser = ArgumentParser()
    add_quantization_arguments(parser)
    with pytest.raises(UserError) as error:
        quantization_settings(parser.parse_args(flags.split()))
    assert says in str(error.value)


def test_the_flags_say_what_the_recipe_says() -> None:
    from argparse import ArgumentParser

    settings = QuantizeSettings(
        scheme="power2",
        weight_bits=4,
        bits_of={"conv1=a": 16},
        keep_float=("fc",),
        ranges="percentile",
        weight_ranges="mse",
        percentile=99.5,
        settle_iter=0,
    )
    stage_job = {
        "snapshot": None,
        "gpus": (),
        "final_weights": Path("x"),
        "sparse": None,
        "freeze_zeros": False,
    }
    from caffe_jacinto.engines.contract import TrainJob, quantization_arguments

    job = TrainJob(Path("s"), None, reestimate_batches=0, quantize=settings, **stage_job)  # type: ignore[arg-type]
    parser = ArgumentParser()
    add_quantization_arguments(parser)
    assert quantization_settings(parser.parse_args(quantization_arguments(job))) == settings


def test_a_snapshot_of_another_training_is_refused(
    digits: Path,
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = start.with_suffix(".solverstate")
    stage = Stage(tmp_path / "stage", digits).prepared()
    monkeypatch.chdir(stage.folder)
    with pytest.raises(SystemExit):
        caffe_torch(["train", "-solver", "solver.prototxt", "-quantize", "-snapshot", str(state)])
    assert "it has no ranges: it was not trained with -quantize" in capfd.readouterr().err


def test_ranges_of_other_weights_are_refused(
    digits: Path,
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(tmp_path / "stage", digits).prepared(max_iter=ITERATIONS)
    stage.train(capfd, monkeypatch, "-weights", str(start))
    found = read_ranges(stage.final)
    assert found is not None
    assert found.bits["conv1"] == 4
    job = stage.job(ITERATIONS, quantize=QuantizeSettings(bits=4), final_weights=stage.final)
    assert ENGINE.finished(job)
    stage.final.write_bytes(start.read_bytes())
    with pytest.raises(UserError, match="its ranges are of other weights"):
        read_ranges(stage.final)
    content: Mapping[str, Any] = json.loads(found.path.read_text())
    found.path.write_text(json.dumps({**content, "outputs": {"data": {"bits": 4, "range": [1, 0]}}}))
    with pytest.raises(UserError, match="damaged"):
        read_ranges(stage.final)
    assert not ENGINE.finished(job)
