"""The engine on PyTorch on a GPU, against itself on the CPU. Left out where there is none.

With REHEARSE_GPU_TESTS in the environment, the CPU stands in for the GPU, by other ways to compute: this
shows that the tests are written right and that their bounds hold there, and nothing of a GPU
(tests/test_torch_gpu_rehearsal.py).
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from image_records import MEAN, datum_of, encoded, write_lmdb
from one_layer import CLASSES, ONE_LAYER, chain, drawn, inputs_text, net_on, one_pass, text_of, write_teacher
from small_stage import RIGL, sparse_settings

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.engines.contract import settings_as_flags
from caffe_jacinto.engines.pytorch import fusion, gpu_time, memory
from caffe_jacinto.engines.pytorch.convolutions import Convolution, Geometry
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.gpu_decode import can_decode
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.memory import largest_batch
from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.engines.pytorch.precision import allow_tf32
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import read_solver

REHEARSED = "REHEARSE_GPU_TESTS" in os.environ

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or REHEARSED), reason="needs a GPU that PyTorch can use"
    ),
]
only_there = pytest.mark.skipif(REHEARSED, reason="says nothing without a GPU")

GPU = torch.device("cpu") if REHEARSED else torch.device("cuda", 0)
ON_GPU = ("-gpu", "0", "-decode", "cpu")
"""Flags of a training on the GPU, of the same pixels as on the CPU."""

STAND_IN = {"PATH": "", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""The environment of a program that is to compute in another way on the CPU: without kernels of our own, for
which there is no compiler, and with other convolutions."""

TOLERANCE = 1e-5
"""In fp32, of a blob's norm."""

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]

PATIENCE = 100
"""Seconds for a test: some take ten, and all of them together have three minutes (tools/utils/gpu.sh)."""


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A test that hangs fails; where the process does not even take signals, it ends."""

    def fail(number: int, frame: object) -> None:
        raise TimeoutError(f"the test was not done after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    faulthandler.dump_traceback_later(PATIENCE + 10, exit=True, file=sys.__stderr__ or sys.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def exact() -> None:
    """Sums in fp32, with cuDNN's and our own choice of algorithms."""
    allow_tf32("fp32")
    torch.backends.cudnn.benchmark = True


def pair(text: str, dialect: Dialect = Dialect.BVLC) -> tuple[Net, Net]:
    """The same net on the CPU and on the GPU."""
    return net_on(torch.device("cpu"), text, dialect), net_on(GPU, text, dialect)


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float, least: float = 1e-2
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / max(value.norm(), least * value.numel() ** 0.5)
        assert error <= tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_each_layer_is_the_cpus(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path)
    cpu, gpu = pair(text_of(kind))
    values = drawn(cpu)
    assert_close(one_pass(gpu, values), one_pass(cpu, values), TOLERANCE)


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.15)])
@pytest.mark.parametrize("size", [28, 30])
@only_there
def test_layers_that_run_as_one_are_the_cpus(
    dialect: Dialect, precision: str, tolerance: float, size: int
) -> None:
    """30 pixels leave 15 behind the convolution, which the kernel does not pool.

    In bf16, the largest of four pixels can be another one: its gradient then goes elsewhere.
    """
    cpu, gpu = pair(inputs_text(images=(6, 3, size, size)) + chain(dialect), dialect)
    assert len(gpu.steps) == 1
    values = drawn(cpu)
    found, expected = one_pass(gpu, values, precision), one_pass(cpu, values)
    # A batch norm takes out what a bias adds: its gradient is 0, and the CPU's is what rounding leaves of it.
    assert not found.pop("gradient of conv[1]").any()
    assert expected.pop("gradient of conv[1]").abs().max() < 1e-2
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "pad", "group"),
    [
        (3, 32, 5, 2, 2, 1),
        (3, 16, 7, 2, 3, 1),
        (3, 8, 11, 4, 0, 1),
        (32, 32, 3, 1, 1, 4),
        (8, 16, 3, 2, 1, 2),
    ],
)
@only_there
def test_ways_to_convolve_agree(
    channels: int, outputs: int, kernel: int, stride: int, pad: int, group: int
) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, channels, 32, 32, device=GPU).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(outputs, channels // group, kernel, kernel, device=GPU, requires_grad=True)
    bias = torch.randn(outputs, device=GPU)
    convolution = Convolution(Geometry((stride,) * 2, (pad,) * 2, (1, 1), group))
    ways = convolution._ways(images, weights)
    assert len(ways) == 2
    results = []
    for way in ways:
        made = way(images, weights, bias)
        made.square().sum().backward()
        results.append({"output": made.detach().cpu(), "gradient": weights.grad.cpu()})
        weights.grad = None
    assert_close(results[1], results[0], TOLERANCE)


# ------------------------------------------------------------------------------------------------- training

NET = """name: "small"
layer { name: "data" type: "Data" top: "data" top: "label" transform_param { crop_size: 28 mirror: true
  mean_value: 120 scale: 0.01 } data_param { source: "lmdb" batch_size: 32 backend: LMDB } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1" convolution_param { num_output: 32
  kernel_size: 5 stride: 2 pad: 2 weight_filler { type: "msra" } } }
layer { name: "norm1" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "scale1" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "conv2" type: "Convolution" bottom: "pool1" top: "conv2" convolution_param { num_output: 64
  kernel_size: 3 pad: 1 group: 4 weight_filler { type: "msra" } } }
layer { name: "norm2" type: "BatchNorm" bottom: "conv2" top: "conv2" }
layer { name: "scale2" type: "Scale" bottom: "conv2" top: "conv2" scale_param { bias_term: true } }
layer { name: "relu2" type: "ReLU" bottom: "conv2" top: "conv2" }
layer { name: "pool2" type: "Pooling" bottom: "conv2" top: "pool2" pooling_param { pool: AVE
  global_pooling: true } }
DROPOUT
layer { name: "fc" type: "InnerProduct" bottom: "pool2" top: "fc" inner_product_param { num_output: 10
  weight_filler { type: "xavier" } } }
ACCURACY
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
ACCURACY = 'layer { name: "accuracy" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy" }'
DROPOUT = """layer { name: "drop" type: "Dropout" bottom: "pool2" top: "pool2"
  dropout_param { dropout_ratio: 0.3 } }"""


def net_text(*, dropout: bool = False, tested: bool = False, augmented: str = "") -> str:
    text = NET.replace("DROPOUT", DROPOUT if dropout else "").replace("ACCURACY", ACCURACY if tested else "")
    return text.replace("mirror: true", "" if tested else f"mirror: true {augmented}")


def picture(label: int, seed: int) -> np.ndarray[Any, Any]:
    """A smooth random image, brighter where its class says."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 120, (5, 5, 3), dtype=np.uint8)
    small[label % 5, label // 5] = 250
    return cv2.resize(small, (32, 32), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an LMDB of JPEG files and a stage's prototxts."""
    folder = tmp_path_factory.mktemp("stage")
    labels = [seed % CLASSES for seed in range(320)]
    files = [encoded(picture(label, seed), ".jpg") for seed, label in enumerate(labels)]
    write_lmdb(folder / "lmdb", [datum_of(*each) for each in zip(files, labels, strict=True)])
    return folder


Run = Callable[..., "Trained"]


class Trained:
    def __init__(self, folder: Path, code: int, log: str) -> None:
        self.folder, self.code, self.log = folder, code, log
        found = re.findall(r"Iteration \d+ \(.*\), loss = (\S+)", log)
        self.losses = [float(loss) for loss in found]
        self.tests = [float(loss) for loss in re.findall(r"Test net output #\d+: loss = (\S+)", log)]

    def weights(self, iteration: int, ending: str = "") -> dict[str, list[np.ndarray[Any, Any]]]:
        return read_weights(self.folder / f"out_iter_{iteration}{ending}.caffemodel")

    def bits(self, iteration: int) -> list[bytes]:
        names = (f"out_iter_{iteration}.caffemodel", f"out_iter_{iteration}.solverstate")
        return [(self.folder / name).read_bytes() for name in names]


def said(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and the log of the program."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    if REHEARSED and "-gpu" in arguments:
        number = arguments.index("-gpu")
        arguments = (*arguments[:number], *arguments[number + 2 :])
        environment |= STAND_IN
    ran = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert "Traceback" not in ran.stderr, ran.stderr[-3000:]
    return ran.returncode, ran.stderr


@pytest.fixture
def run(stage: Path, tmp_path: Path) -> Run:
    """Trains in a new folder by the program; returns what came of it."""
    count = 0

    def train(
        *arguments: str,
        dropout: bool = False,
        augmented: str = "",
        folder: Path | None = None,
        **changes: object,
    ) -> Trained:
        nonlocal count
        count += 1
        if folder is None:
            folder = tmp_path / str(count)
            folder.mkdir()
            (folder / "lmdb").symlink_to(stage / "lmdb")
            (folder / "train.prototxt").write_text(net_text(dropout=dropout, augmented=augmented))
            (folder / "val.prototxt").write_text(net_text(tested=True))
        fields = {
            "train_net": '"train.prototxt"',
            "base_lr": 0.02,
            "lr_policy": '"poly"',
            "power": 1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "display": 1,
            "max_iter": 24,
            "snapshot": 12,
            "snapshot_prefix": '"out"',
            "random_seed": 33,
            **changes,
        }
        solver = "".join(f"{name}: {value}\n" for name, value in fields.items())
        (folder / "solver.prototxt").write_text(solver)
        command = ["train", "-solver", "solver.prototxt", "-workers", "2", *arguments]
        return Trained(folder, *said(folder, *command))

    return train


def test_the_losses_are_the_cpus(run: Run) -> None:
    cpu, gpu = run(), run(*ON_GPU)
    assert len(cpu.losses) == len(gpu.losses) == 24
    assert cpu.losses[-1] < cpu.losses[0]
    np.testing.assert_allclose(gpu.losses, cpu.losses, atol=1e-3)


@pytest.mark.parametrize(
    ("precision", "bound"), [pytest.param("tf32", 0.02, marks=only_there), ("bf16", 0.05)]
)
def test_lower_precision_stays_within_its_bound(run: Run, precision: str, bound: float) -> None:
    exactly, less = run(*ON_GPU), run(*ON_GPU, "-precision", precision)
    assert less.losses != exactly.losses
    np.testing.assert_allclose(less.losses, exactly.losses, atol=bound)


@only_there
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_graph_changes_no_bit_and_a_resume_neither(run: Run, dropout: bool, passes: int) -> None:
    settings = {"dropout": dropout, "iter_size": passes}
    recorded = run(*ON_GPU, "-deterministic", **settings)
    kernels = run(*ON_GPU, "-deterministic", "-graph", "false", **settings)
    assert recorded.bits(24) == kernels.bits(24)
    ends = recorded.bits(24)
    resumed = run(
        *(*ON_GPU, "-deterministic", "-snapshot", "out_iter_12.solverstate"),
        folder=recorded.folder,
        **settings,
    )
    assert resumed.code == 0
    assert resumed.bits(24) == ends


def test_pruned_weights_stay_zero_in_a_graph(run: Run) -> None:
    """The masks come after the graph was recorded, and change under it.

    Images are decoded where that is fastest.
    """
    sparse = sparse_settings(target=0.6, start_iter=6, step_iter=3)
    trained = run("-gpu", "0", *settings_as_flags(sparse))
    assert trained.code == 0, trained.log[-2000:]
    assert REHEARSED or "Images are decoded " in trained.log
    before, after = trained.weights(12), trained.weights(24)
    zeros = before["conv2"][0] == 0
    assert 0.1 < zeros.mean() < 0.9
    assert not after["conv2"][0][zeros].any()
    assert (before["conv2"][0] != after["conv2"][0]).any()


TESTED = {"test_net": '"val.prototxt"', "test_iter": 4, "test_interval": 8, "test_initialization": "false"}
SIZES = "{ size: 14 } image_size { from_iter: 8 size: 20 } image_size { from_iter: 16 size: 28 }"


def assert_near(found: Trained, expected: Trained, *, bound: float, ending: str = "", at: int = 24) -> None:
    """Losses, those of tests, and weights: within ``bound``, of blobs by their norm."""
    assert found.code == expected.code == 0, found.log[-2000:]
    assert len(found.losses) == len(expected.losses) > 0
    np.testing.assert_allclose(found.losses, expected.losses, atol=bound)
    assert len(found.tests) == len(expected.tests)
    np.testing.assert_allclose(found.tests, expected.tests, atol=bound)
    theirs = expected.weights(at, ending)
    for name, blobs in found.weights(at, ending).items():
        for index, (blob, other) in enumerate(zip(blobs, theirs[name], strict=True)):
            size = max(float(np.linalg.norm(other)), 1e-2 * other.size**0.5)
            error = float(np.linalg.norm(blob - other)) / size
            assert error <= 10 * bound, f"{name}[{index}]: {error:.2g}"


def test_recalibrated_tests_are_the_cpus(run: Run) -> None:
    flags = ("-reestimate_batches", "3", "-recalibrate_tests")
    cpu, gpu = run(*flags, **TESTED), run(*ON_GPU, *flags, **TESTED)
    assert gpu.log.count("recalibrated over 3 batches") == len(gpu.tests) == 3
    assert_near(gpu, cpu, bound=2e-3)


def test_the_average_of_the_weights_is_the_cpus(run: Run) -> None:
    settings = {**TESTED, "ema_decay": 0.8}
    cpu, gpu = run(**settings), run(*ON_GPU, **settings)
    assert gpu.log.count("Test weights") == 2 < len(gpu.tests)
    assert_near(gpu, cpu, bound=2e-3)
    assert_near(gpu, cpu, bound=2e-3, ending=".ema", at=12)
    assert any(
        (a != b).any() for a, b in zip(gpu.weights(12)["fc"], gpu.weights(12, ".ema")["fc"], strict=True)
    )


@pytest.mark.parametrize(
    ("augmented", "settings"),
    [("mixup_alpha: 0.4 crop_min_area: 0.5 random_contrast: 0.2", {}), ("", {"image_size": SIZES})],
    ids=["mixed and resized crops", "small images first"],
)
def test_changed_images_are_the_cpus(run: Run, augmented: str, settings: dict[str, object]) -> None:
    cpu = run(augmented=augmented, **settings)
    gpu = run(*ON_GPU, augmented=augmented, **settings)
    sizes = re.findall(r"Training images are resized to (\d+)x", gpu.log)
    assert sizes == (["14", "20", "28"] if settings else [])
    assert_near(gpu, cpu, bound=2e-3)


def test_regrowth_is_the_cpus(run: Run) -> None:
    """Thresholds at 4, 6 and 8, then weights change places; what is zero in between stays so."""
    flags = settings_as_flags(sparse_settings(**RIGL))
    cpu, gpu = run(*flags, snapshot=1), run(*ON_GPU, *flags, snapshot=1)
    assert gpu.code == 0, gpu.log[-2000:]
    np.testing.assert_allclose(gpu.losses, cpu.losses, atol=0.02)
    said = [re.findall(r"Regrowth by (\S+): (\d+) of (\d+) weights", each.log) for each in (cpu, gpu)]
    assert len(said[1]) > 1
    for (share, moved, left), (other_share, others_moved, others_left) in zip(*said, strict=True):
        assert share == other_share
        np.testing.assert_allclose([int(moved), int(left)], [int(others_moved), int(others_left)], rtol=0.02)
    zeros = {at: gpu.weights(at)["conv2"][0] == 0 for at in range(9, 25)}
    changed = [at for at in range(10, 25) if (zeros[at] & ~zeros[at - 1]).any()]
    assert changed == [at for at in range(11, 25, 2) if at - 1 <= changed[-1]]
    for at in range(10, 25):
        # The weights that are free begin at zero, and move in the next iteration.
        assert zeros[at].mean() >= 0.3
        if at not in changed and at - 1 not in changed:
            assert not (zeros[at - 1] & ~zeros[at]).any()


def test_training_in_quantized_values_is_the_cpus(run: Run) -> None:
    """A value at the edge of two may be rounded either way: the bounds are wider. Zeros stay zero."""
    folder = run(max_iter=12).folder
    weights = folder / "out_iter_12.caffemodel"
    flags = ["-weights", str(weights), "-freeze_zeros", "-quantize", "-quantize_bits", "6"]
    flags += ["-quantize_batches", "3", "-quantize_settle_iter", "6", "-quantize_freeze_bn_iter", "10"]
    settings = {**TESTED, "base_lr": 0.005, "max_iter": 16, "snapshot": 16}
    cpu, gpu = run(*flags, **settings), run(*ON_GPU, *flags, **settings)
    assert gpu.log.count("Test values: quantized") == 2
    assert_near(gpu, cpu, bound=0.02, at=16)


def test_a_trained_network_is_tested_and_timed(run: Run) -> None:
    trained = run(max_iter=12)
    command = ["test", "-model", "val.prototxt", "-weights", "out_iter_12.caffemodel", "-iterations", "4"]
    outputs = []
    for where in ([], ["-gpu", "0"]):
        code, log = said(trained.folder, *command, *where)
        assert code == 0, log[-2000:]
        outputs.append([float(value) for value in re.findall(r"\] Batch \d+, loss = (\S+)", log)])
    assert len(outputs[0]) == 4
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4)
    timed = ["time", "-model", "train.prototxt", "-iterations", "2", "-gpu", "0"]
    code, log = said(trained.folder, *timed)
    assert code == 0, log[-2000:]
    assert re.search(r"fc\s+backward: \S+ ms", log)
    assert "Average Forward-Backward: " in log


@only_there
def test_nothing_waits_for_the_device(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises an error at whatever waits, in iterations without display, test or snapshot."""
    monkeypatch.chdir(stage)
    (stage / "train.prototxt").write_text(net_text(dropout=True))
    (stage / "solver.prototxt").write_text(
        'train_net: "train.prototxt" base_lr: 0.01 lr_policy: "fixed" momentum: 0.9 max_iter: 99\n'
        'snapshot_prefix: "out" clip_gradients: 1 regularization_type: "L1" weight_decay: 0.001'
    )
    solver = read_solver(Path("solver.prototxt"), Dialect.BVLC)
    for graph in (False, True):
        with Inputs(
            solver.train_net, TRAIN, "train.prototxt", device=GPU, seed=1, workers=2, decode="cpu"
        ) as inputs:
            net = Net(
                solver.train_net, TRAIN, Dialect.BVLC, where="net", device=GPU, data_shapes=inputs.shapes
            )
            optimizer = solver_class(solver.parameters, "")(
                net.learnables, solver.parameters, capturable=True
            )
            pruner = TorchPruner(net, lambda line: None)
            pruner.freeze_zeros()
            iterate = Iteration(
                *(net, inputs, optimizer, pruner, Ranks(torch.device("cpu"))),
                seed=1,
                passes=1,
                precision="bf16",
                graph=graph,
            )
            iterate.move_to(0)
            for iteration in range(6):  # algorithms are chosen by waiting for them
                iterate(iteration, 0.01)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for iteration in range(6, 20):
                    iterate(iteration, 0.01)
            finally:
                torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------- what is fed


def feed_text(more: str, batch: int = 16) -> str:
    return (
        'layer { name: "data" type: "Data" top: "data" top: "label" transform_param { crop_size: 28'
        f' mirror: true {more} }}\n  data_param {{ source: "lmdb" batch_size: {batch} backend: LMDB }} }}\n'
    )


@pytest.mark.parametrize("mean", ["", "mean_value: 104 mean_value: 117 mean_value: 123 scale: 0.1", "file"])
def test_batches_are_the_cpus_and_decoded_on_the_gpu_nearly(
    mean: str, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage)
    if mean == "file":
        image = cv2.GaussianBlur(
            np.random.default_rng(1).random((32, 32, 3)).astype(np.float32) * 255, (5, 5), 2
        )
        write_mean(Mean(image.transpose(2, 0, 1).copy(), 1), stage / MEAN)
        mean = f'mean_file: "{MEAN}"'
    definition = parse_net(feed_text(mean), Dialect.BVLC, "net")

    def batches(device: torch.device, decode: str) -> list[Any]:
        with Inputs(definition, TRAIN, "net", device=device, seed=5, workers=2, decode=decode) as inputs:  # type: ignore[arg-type]
            inputs.start_at(3)
            return [{name: blob.cpu() for name, blob in inputs.batch().items()} for _ in range(9)]

    expected, copied = batches(torch.device("cpu"), "cpu"), batches(GPU, "cpu")
    for one, other in zip(expected, copied, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    if why := can_decode(GPU):
        pytest.skip(f"decoding on the GPU: {why}")
    scale = 0.1 if "scale" in mean else 1.0
    decoded, both = batches(GPU, "gpu"), batches(GPU, "both")
    for number, (one, other) in enumerate(zip(expected, decoded, strict=True)):
        assert torch.equal(one["label"], other["label"])
        # nvJPEG rounds otherwise, and spreads colour otherwise between pixels; a wrong window is far off.
        assert (one["data"] - other["data"]).abs().mean() < 6 * scale
        assert torch.equal(both[number]["data"], (other if (number + 3) % 2 == 0 else one)["data"])


# -------------------------------------------------------------------------------------- what goes wrong


@only_there
def test_out_of_memory_says_which_batch_fits(run: Run, stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "lmdb").symlink_to(stage / "lmdb")
    large = net_text().replace("num_output: 32", "num_output: 16384")
    (folder / "train.prototxt").write_text(large.replace("batch_size: 32", "batch_size: 40000"))
    trained = run("-gpu", "0", "-workers", "1", folder=folder)
    assert trained.code != 0
    (line,) = [line for line in trained.log.splitlines() if re.match(r"F\d{8} ", line)]
    said = re.search(r"memory is too small: a batch_size of ([\d,]+) should fit", line)
    assert said, line
    fits = int(said[1].replace(",", ""))
    assert 32 <= fits < 40000


@only_there
def test_the_batch_that_should_fit_takes_nearly_all_memory(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is of an iteration after the first one, which tries algorithms: such a one is measured.

    It has a small share of the card, and a quarter more to try them. Convolutions are computed in one way:
    which one is fastest, and with it the memory, can be another for another batch.
    """
    torch.backends.cudnn.benchmark = False
    monkeypatch.chdir(stage)
    (stage / "train.prototxt").write_text(net_text())
    (stage / "solver.prototxt").write_text('train_net: "train.prototxt" max_iter: 1 lr_policy: "fixed"')
    solver = read_solver(Path("solver.prototxt"), Dialect.BVLC)
    shapes: dict[str, tuple[int, ...]] = {"data": (1, 3, 28, 28), "label": (1,)}
    available = 1.5 * 2**30
    share = available / torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        fits = largest_batch(solver, shapes, GPU, "fp32")
        assert fits is not None
        torch.cuda.set_per_process_memory_fraction(1.25 * share)
        assert 0.75 * available <= memory._peak(solver, shapes, GPU, "fp32", fits) <= available
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_loss_that_is_not_a_number_ends_the_training(run: Run) -> None:
    """Noticed at the next display, in whose place comes the reason."""
    trained = run(*ON_GPU, base_lr=1e30, display=4)
    assert trained.code != 0
    assert re.search(r"Iteration [1-4]: the loss is not a number", trained.log)
    assert len(trained.losses) == 1, "that of iteration 0"


@only_there
def test_a_gpu_that_is_not_there(run: Run) -> None:
    trained = run("-gpu", "77")
    assert trained.code != 0
    assert "77" in trained.log


@only_there
def test_what_is_measured_is_the_gpus_own_time() -> None:
    """Four hundred short kernels take a few microseconds each, and longer to be started."""
    number = torch.zeros((), device=GPU)

    def run() -> None:
        for _ in range(400):
            number.add_(1)

    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    assert gpu_time.milliseconds(run) < 1000 * (time.perf_counter() - started)


@only_there
def test_the_kernels_are_used() -> None:
    assert fusion.has_kernels(GPU)
