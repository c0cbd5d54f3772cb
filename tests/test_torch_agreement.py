"""Training on PyTorch against real Caffe: the same weights and records give the same losses and weights.

The start weights are trained ones. From random ones the two agree to 1e-5 for some six iterations; then the
rounding of the last digits, different in any two libraries, grows with the steepness of an untrained network
with batch norm, whoever computes it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from small_stage import write_digits

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

pytestmark = pytest.mark.caffe

CROPS = {"jacintonet11": 64, "resnet10": 33, "bvlc_alexnet": 67}
START = {"jacintonet11": 60, "resnet10": 40, "bvlc_alexnet": 1}
"""Iterations by Caffe that the start weights come from."""

CLASSES, BATCH, ITERATIONS, TESTED = 7, 16, 20, 32
TORCH = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]


def write_images(folder: Path, size: int) -> None:
    """An LMDB of 64 raw images of noise, as large as the crop, whose brightness is their class."""
    rng = np.random.default_rng(0)
    with (
        lmdb.open(str(folder), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for index in range(64):
            pixels = rng.integers(0, 30 * (1 + index % CLASSES), (3, size, size), dtype=np.uint8)
            datum = messages(Dialect.BVLC).Datum(
                channels=3, height=size, width=size, data=pixels.tobytes(), label=index % CLASSES
            )
            transaction.put(b"%08d" % index, datum.SerializeToString())


@pytest.fixture(scope="module", params=CROPS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A stage of each network, without dropout and mirroring, and start weights from real Caffe."""
    network, folder = request.param, tmp_path_factory.mktemp(request.param)
    write_images(folder / "lmdb", CROPS[network])
    arguments = ["--network", network, "--dialect", "bvlc", "--cpu", "--output", str(folder)]
    arguments += ["--num-classes", str(CLASSES), "--crop-size", str(CROPS[network])]
    arguments += ["--batch-size", str(BATCH), "--iter-size", "1", "--val-images", str(TESTED)]
    arguments += ["--train-lmdb", str(folder / "lmdb"), "--val-lmdb", str(folder / "lmdb")]
    if network == "bvlc_alexnet":
        assert create_lmdb(["--mean", str(folder / "lmdb"), str(folder / "mean.binaryproto")]) == 0
        arguments += ["--mean-file", str(folder / "mean.binaryproto")]
    assert build_net(arguments) == 0
    train = folder / "train.prototxt"
    text = train.read_text().replace("mirror: true", "mirror: false")
    train.write_text(re.sub(r"dropout_ratio: \S+", "dropout_ratio: 0", text))
    return folder, network


def solver(folder: Path, prefix: str, iterations: int) -> Path:
    """The stage's solver with another prefix and length, at a learning rate of 0.01."""
    text = (folder / "solver.prototxt").read_text()
    changes = {
        "max_iter": iterations,
        "test_interval": 1000,
        "test_initialization": "false",
        "display": 1,
        "base_lr": 0.01,
        "lr_policy": '"fixed"',
        "snapshot": 1000,
        "snapshot_prefix": f'"{folder / prefix}"',
    }
    for name, value in changes.items():
        text, found = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
        if not found:
            text += f"{name}: {value}\n"
    path = folder / f"{prefix}_solver.prototxt"
    path.write_text(text)
    return path


def run(command: list[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"Iteration \d+ \(.*\), loss = (\S+)", log)]


def test_twenty_iterations_agree_with_caffe(stage: tuple[Path, str], caffe_engine: Engine) -> None:
    folder, network = stage
    caffe = caffe_engine.info.executable
    run([caffe, "train", "-solver", solver(folder, "start", START[network])])
    start = folder / f"start_iter_{START[network]}.caffemodel"
    logs = {
        "theirs": run([caffe, "train", "-solver", solver(folder, "theirs", ITERATIONS), "-weights", start]),
        "ours": run([*TORCH, "train", "-solver", solver(folder, "ours", ITERATIONS), "-weights", start]),
    }
    theirs, ours = losses(logs["theirs"]), losses(logs["ours"])
    assert len(theirs) == len(ours) == ITERATIONS
    # A small loss has the absolute rounding of the probabilities, which are about 1.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    found, expected = (
        read_weights(folder / f"{name}_iter_{ITERATIONS}.caffemodel") for name in ("ours", "theirs")
    )
    assert list(found) == list(expected)
    for layer, blobs in expected.items():
        for index, (blob, other) in enumerate(zip(found[layer], blobs, strict=True)):
            most = max(float(np.abs(other).max()), 1e-3)
            error = float(np.abs(blob - other).max())
            assert error <= 1e-3 * most, f"{layer}[{index}]: {error} of {most}"


def test_the_same_weights_score_the_same(stage: tuple[Path, str], caffe_engine: Engine) -> None:
    """``test`` of weights that Caffe trained, and Caffe's own test of weights from PyTorch."""
    folder, _ = stage
    batches = str(TESTED // BATCH)
    for weights in ("theirs", "ours"):
        arguments = ["test", "-model", folder / "val.prototxt"]
        arguments += ["-weights", folder / f"{weights}_iter_{ITERATIONS}.caffemodel", "-iterations", batches]
        scores = []
        for program in ([caffe_engine.info.executable], TORCH):
            log = run([*program, *arguments])
            named = re.findall(r"\] (?!Batch)(\S+) = (\S+)", log)
            scores.append({name: float(value) for name, value in named})
        assert scores[0].keys() == scores[1].keys()
        assert scores[0]
        for name, value in scores[0].items():
            assert scores[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


CONVOLUTION = (
    'layer { name: "conv" type: "Convolution" bottom: "%s" top: "conv" convolution_param { %s %s } }\n'
)
FILLED = 'weight_filler { type: "xavier" }'
ODD_NETWORKS = {
    "padding for one axis": CONVOLUTION % ("data", "num_output: 4 kernel_h: 1 kernel_w: 7 pad_w: 3", FILLED),
    "rates of statistics": CONVOLUTION
    % ("data", "num_output: 6 kernel_size: 3", FILLED)
    + 'layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" '
    "param { lr_mult: 1 } param { lr_mult: 1 } param { lr_mult: 1 } }\n",
    "rows": CONVOLUTION
    % ("data", "num_output: 6 kernel_size: 3", FILLED)
    + 'layer { name: "rows" type: "InnerProduct" bottom: "conv" top: "rows" inner_product_param { axis: 3 '
    f"num_output: 5 {FILLED} }} }}\n",
    "reshaped": 'layer { name: "turn" type: "Reshape" bottom: "data" top: "turned" reshape_param { shape { '
    "dim: 0 dim: 4 dim: 14 dim: 14 } } }\n"
    + CONVOLUTION
    % ("turned", "num_output: 6 kernel_size: 3", FILLED),
    "scale of all axes": CONVOLUTION
    % ("data", "num_output: 6 kernel_size: 3", FILLED)
    + 'layer { name: "sc" type: "Scale" bottom: "conv" top: "conv" scale_param { axis: 1 num_axes: -1 '
    "filler { value: 1 } } }\n",
    "shared": "".join(
        f'layer {{ name: "{name}" type: "InnerProduct" bottom: "data" top: "{name}" param {{ name: "w" }} '
        f'param {{ name: "b" }} inner_product_param {{ num_output: 10 {FILLED} }} }}\n{more}'
        for name, more in (("a", 'layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }\n'), ("b", ""))
    )
    + 'layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "b" top: "conv" }\n',
    "stray input": 'input: "data"\n' + CONVOLUTION % ("data", "num_output: 6 kernel_size: 3", FILLED),
}
"""Of each kind that once was read otherwise than Caffe reads it."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "lmdb", images=64)


@pytest.mark.parametrize("kind", ODD_NETWORKS)
def test_odd_networks_train_and_resume_as_in_caffe(
    kind: str,
    digits: Path,
    caffe_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From the weights that Caffe fills, and from its solver state of iteration 4."""
    monkeypatch.chdir(tmp_path)
    last = "rows" if kind == "rows" else "conv"

    def trained_here(*arguments: str) -> list[float]:
        capfd.readouterr()
        assert caffe_torch(["train", *arguments]) == 0
        return losses(capfd.readouterr().err)

    Path("net.prototxt").write_text(
        f'layer {{ name: "data" type: "Data" top: "data" top: "label" data_param {{ source: "{digits}" '
        "batch_size: 4 backend: LMDB } transform_param { scale: 0.01 } }\n"
        f'{ODD_NETWORKS[kind]}layer {{ name: "fc" type: "InnerProduct" bottom: "{last}" top: "fc" '
        f"inner_product_param {{ num_output: 10 {FILLED} }} }}\n"
        'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }\n'
    )
    text = 'net: "net.prototxt" base_lr: 0.01 lr_policy: "fixed" momentum: 0.9 display: 1 solver_mode: CPU '
    for name, iterations in (("start", 0), ("theirs", 5), ("ours", 5)):
        snapshots = f'max_iter: {iterations} snapshot: 2 snapshot_prefix: "{name}"'
        snapshots = snapshots.replace(" snapshot: 2", "") if not iterations else snapshots
        Path(f"{name}.prototxt").write_text(f"{text} random_seed: 3 {snapshots}\n")
    caffe = caffe_engine.info.executable
    run([caffe, "train", "-solver", "start.prototxt"])
    theirs = losses(run([caffe, "train", "-weights=start_iter_0.caffemodel", "-solver=theirs.prototxt"]))
    ours = trained_here("-weights", "start_iter_0.caffemodel", "-solver", "ours.prototxt")
    assert len(theirs) == len(ours) == 5
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    expected = read_weights(Path("theirs_iter_5.caffemodel"))
    found = read_weights(Path("ours_iter_5.caffemodel"))
    assert list(found) == list(expected)
    for layer, blobs in expected.items():
        for blob, other in zip(found[layer], blobs, strict=True):
            np.testing.assert_allclose(blob, other, rtol=1e-4, atol=1e-4, err_msg=layer)
    resumed = trained_here("-snapshot", "theirs_iter_4.solverstate", "-solver", "ours.prototxt")
    np.testing.assert_allclose(resumed, theirs[4:], rtol=1e-4)
