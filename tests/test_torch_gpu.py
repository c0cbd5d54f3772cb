"""The engine on PyTorch on a GPU, against itself on the CPU. Left out where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from image_records import MEAN, datum_of, encoded, write_lmdb
from small_stage import sparse_settings

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.engines.contract import settings_as_flags
from caffe_jacinto.engines.pytorch import fusion
from caffe_jacinto.engines.pytorch.convolutions import Convolution, Geometry
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.gpu_decode import can_decode
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.layers import LAYERS
from caffe_jacinto.engines.pytorch.memory import largest_batch
from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.engines.pytorch.precision import allow_tf32, autocast
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import read_solver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"),
]

GPU = torch.device("cuda", 0)
TOLERANCE = 1e-5
"""In fp32, of a blob's norm."""

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]
CLASSES = 10


@pytest.fixture(autouse=True)
def exact() -> None:
    """Sums in fp32, with cuDNN's and our own choice of algorithms."""
    allow_tf32("fp32")
    torch.backends.cudnn.benchmark = True


def inputs_text(**shapes: tuple[int, ...]) -> str:
    return "".join(
        f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{'
        f"{''.join(f' dim: {dim}' for dim in shape)} }} }} }}\n"
        for name, shape in shapes.items()
    )


IMAGES = (4, 8, 12, 12)
ONE_LAYER = {
    "Axpy": 'type: "Axpy" bottom: "factors" bottom: "images" bottom: "images"',
    "BN": """type: "BN" bottom: "images" bn_param { slope_filler { type: "gaussian" mean: 1 std: 0.2 }
        bias_filler { type: "gaussian" } momentum: 0.8 eps: 0.01 }""",
    "ConvolutionDepthwise": """type: "ConvolutionDepthwise" bottom: "images" convolution_param { num_output: 8
        kernel_size: 3 pad: 1 weight_filler { type: "msra" } }""",
    "DepthwiseConvolution": """type: "DepthwiseConvolution" bottom: "images" convolution_param { num_output: 8
        kernel_size: 3 stride: 2 group: 8 weight_filler { type: "msra" } }""",
    "Interp": 'type: "Interp" bottom: "images" interp_param { zoom_factor: 2 }',
    "Normalize": """type: "Normalize" bottom: "images" norm_param { across_spatial: false
        scale_filler { type: "gaussian" mean: 10 } channel_shared: false }""",
    "Permute": 'type: "Permute" bottom: "images" permute_param { order: 0 order: 2 order: 3 order: 1 }',
    "ReLU6": 'type: "ReLU6" bottom: "images"',
    "ShuffleChannel": 'type: "ShuffleChannel" bottom: "images" shuffle_channel_param { group: 4 }',
    "Upsample": 'type: "Upsample" bottom: "images" upsample_param { scale: 2 }',
    "AbsVal": 'type: "AbsVal" bottom: "images"',
    "Accuracy": 'type: "Accuracy" bottom: "rows" bottom: "label"',
    "BatchNorm": 'type: "BatchNorm" bottom: "images"',
    "ArgMax": 'type: "ArgMax" bottom: "rows" argmax_param { top_k: 3 }',
    "BNLL": 'type: "BNLL" bottom: "images"',
    "BatchReindex": 'type: "BatchReindex" bottom: "images" bottom: "numbers"',
    "Bias": 'type: "Bias" bottom: "images" bias_param { filler { type: "gaussian" } }',
    "Clip": 'type: "Clip" bottom: "images" clip_param { min: -1 max: 0.5 }',
    "Concat": 'type: "Concat" bottom: "images" bottom: "images"',
    "Convolution": """type: "Convolution" bottom: "images" convolution_param { num_output: 12 kernel_size: 3
        pad: 1 group: 4 weight_filler { type: "msra" } bias_filler { type: "gaussian" } }""",
    "ContrastiveLoss": 'type: "ContrastiveLoss" bottom: "rows" bottom: "others" bottom: "label"',
    "Crop": 'type: "Crop" bottom: "images" bottom: "part" crop_param { offset: 2 }',
    "Deconvolution": """type: "Deconvolution" bottom: "images" convolution_param { num_output: 12
        kernel_size: 4 stride: 2 pad: 1 group: 4 weight_filler { type: "msra" } }""",
    "Dropout": 'type: "Dropout" bottom: "images" dropout_param { dropout_ratio: 0 }',
    "DummyData": """type: "DummyData" dummy_data_param { shape { dim: 4 dim: 3 }
        data_filler { type: "constant" value: 2 } }""",
    "ELU": 'type: "ELU" bottom: "images"',
    "Eltwise": 'type: "Eltwise" bottom: "images" bottom: "images" eltwise_param { operation: MAX }',
    "Embed": """type: "Embed" bottom: "numbers" embed_param { num_output: 6 input_dim: 5
        weight_filler { type: "gaussian" } bias_filler { type: "gaussian" } }""",
    "EuclideanLoss": 'type: "EuclideanLoss" bottom: "rows" bottom: "others"',
    "Exp": 'type: "Exp" bottom: "images" exp_param { base: 2 scale: 0.5 }',
    "Filter": 'type: "Filter" bottom: "images" bottom: "numbers"',
    "Flatten": 'type: "Flatten" bottom: "images"',
    "HingeLoss": 'type: "HingeLoss" bottom: "rows" bottom: "label"',
    "Im2col": 'type: "Im2col" bottom: "images" convolution_param { kernel_size: 3 stride: 2 pad: 1 }',
    "InfogainLoss": 'type: "InfogainLoss" bottom: "rows" bottom: "label" bottom: "matrix"',
    "InnerProduct": """type: "InnerProduct" bottom: "images" inner_product_param { num_output: 7
        weight_filler { type: "xavier" } bias_filler { type: "gaussian" } }""",
    "LRN": 'type: "LRN" bottom: "images" lrn_param { local_size: 5 alpha: 0.1 beta: 0.75 }',
    "Log": 'type: "Log" bottom: "images" log_param { base: 2 scale: 0.1 shift: 3 }',
    "LSTM": """type: "LSTM" bottom: "series" bottom: "goes_on" recurrent_param { num_output: 5
        weight_filler { type: "gaussian" } bias_filler { type: "gaussian" } }""",
    "LSTMUnit": 'type: "LSTMUnit" bottom: "cells" bottom: "sums" bottom: "on" top: "c"',
    "MVN": 'type: "MVN" bottom: "images"',
    "MultinomialLogisticLoss": 'type: "MultinomialLogisticLoss" bottom: "positive" bottom: "label"',
    "Parameter": 'type: "Parameter" parameter_param { shape { dim: 3 dim: 2 } }',
    "Pooling": 'type: "Pooling" bottom: "images" pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }',
    "Power": 'type: "Power" bottom: "images" power_param { scale: 2 shift: -1 }',
    "PReLU": 'type: "PReLU" bottom: "images"',
    "ReLU": 'type: "ReLU" bottom: "images" relu_param { negative_slope: 0.1 }',
    "Reduction": 'type: "Reduction" bottom: "images" reduction_param { operation: SUMSQ axis: 1 }',
    "Reshape": 'type: "Reshape" bottom: "images" reshape_param { shape { dim: 0 dim: -1 } }',
    "RNN": """type: "RNN" bottom: "series" bottom: "goes_on" recurrent_param { num_output: 5
        weight_filler { type: "gaussian" } bias_filler { type: "gaussian" } }""",
    "SPP": 'type: "SPP" bottom: "images" spp_param { pyramid_height: 3 pool: AVE }',
    "Scale": """type: "Scale" bottom: "images" scale_param { bias_term: true filler { type: "gaussian" }
        bias_filler { type: "gaussian" } }""",
    "Sigmoid": 'type: "Sigmoid" bottom: "images"',
    "SigmoidCrossEntropyLoss": 'type: "SigmoidCrossEntropyLoss" bottom: "rows" bottom: "others"',
    "Silence": 'type: "Silence" bottom: "images"',
    "Slice": 'type: "Slice" bottom: "images" top: "other" slice_param { slice_point: 3 }',
    "Split": 'type: "Split" bottom: "images" top: "other"',
    "Softmax": 'type: "Softmax" bottom: "rows"',
    "SoftmaxWithLoss": 'type: "SoftmaxWithLoss" bottom: "rows" bottom: "label"',
    "Swish": 'type: "Swish" bottom: "images"',
    "TanH": 'type: "TanH" bottom: "images"',
    "Threshold": 'type: "Threshold" bottom: "images"',
    "Tile": 'type: "Tile" bottom: "images" tile_param { tiles: 2 }',
}

CHAIN = """layer { name: "conv" type: "Convolution" bottom: "images" top: "conv" convolution_param {
    num_output: 32 kernel_size: 5 stride: 2 pad: 2 weight_filler { type: "msra" }
    bias_filler { type: "gaussian" } } }
layer { name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" NORM }
SCALE
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool"
    pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
"""
SCALE = """layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true
    filler { type: "gaussian" mean: 1 std: 0.2 } bias_filler { type: "gaussian" } } }"""


def pair(text: str, dialect: Dialect = Dialect.BVLC) -> tuple[Net, Net]:
    """The same net on the CPU and on the GPU."""
    definition = parse_net(text, dialect, "net")
    nets = [
        Net(definition, TRAIN, dialect, where="net", seed=3, device=at) for at in (torch.device("cpu"), GPU)
    ]
    return nets[0], nets[1]


def one_pass(net: Net, values: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    """Outputs, gradients of inputs and blobs, and the blobs themselves, by name."""
    given = {}
    for name, value in values.items():
        tensor = torch.from_numpy(value).to(net.device)
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        given[name] = tensor.requires_grad_(name not in ("label", "numbers", "goes_on", "on"))
    weights = np.random.default_rng(7)
    with autocast(net.device, precision):
        values_of = {}
        loss = torch.zeros((), device=net.device)
        state = dict(given)
        for step in net.steps:
            state.update(zip(step.tops, step(*(state[name] for name in step.bottoms)), strict=True))
        for name in net.output_names:
            top = state[name].float()
            values_of[name] = top.detach()
            drawn = torch.from_numpy(weights.standard_normal(tuple(top.shape)).astype(np.float32))
            if top.requires_grad:
                loss = loss + (top * drawn.to(net.device)).sum()
    if loss.requires_grad:
        loss.backward()
    found = {f"output {name}": value for name, value in values_of.items()}
    for name, tensor in given.items():
        if tensor.grad is not None:
            found[f"gradient of {name}"] = tensor.grad
    for layer, index, blob in net.blobs:
        found[f"{layer}[{index}]"] = blob.tensor.detach()
        if blob.tensor.grad is not None:
            found[f"gradient of {layer}[{index}]"] = blob.tensor.grad
    return {name: value.cpu() for name, value in found.items()}


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float, least: float = 1e-2
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / max(value.norm(), least * value.numel() ** 0.5)
        assert error <= tolerance, f"{name}: {error:.2g}"


def drawn(net: Net, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    values = {name: random.standard_normal(net.shapes[name]).astype(np.float32) for name in net.inputs}
    if "positive" in values:
        values["positive"] = np.abs(values["positive"])
    for name, count in (("label", CLASSES), ("numbers", 4), ("goes_on", 2), ("on", 2)):
        if name in values:
            values[name] = random.integers(0, count, net.shapes[name]).astype(np.float32)
    return values


def test_every_layer_is_tested() -> None:
    assert ONE_LAYER.keys() == LAYERS.keys()


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_each_layer_is_the_cpus(kind: str) -> None:
    shapes = {
        **{"images": IMAGES, "part": (*IMAGES[:2], 7, 5), "factors": IMAGES[:2]},
        **{"rows": (4, CLASSES), "others": (4, CLASSES), "positive": (4, CLASSES)},
        **{"series": (6, 4, 7), "goes_on": (6, 4), "cells": (1, 4, 3), "sums": (1, 4, 12), "on": (1, 4)},
        **{"label": (4,), "numbers": (4,), "matrix": (CLASSES, CLASSES)},
    }
    read = {name: shape for name, shape in shapes.items() if f'bottom: "{name}"' in ONE_LAYER[kind]}
    top = "" if kind == "Silence" else 'top: "top"'
    layer = f'layer {{ name: "tested" {ONE_LAYER[kind]} {top} }}\n'
    cpu, gpu = pair(f"force_backward: true\n{inputs_text(**read)}{layer}")
    values = drawn(cpu)
    assert_close(one_pass(gpu, values), one_pass(cpu, values), TOLERANCE)


def chain(dialect: Dialect) -> str:
    if dialect is Dialect.BVLC:
        return CHAIN.replace("NORM", "batch_norm_param { moving_average_fraction: 0.9 }").replace(
            "SCALE", SCALE
        )
    norm = """batch_norm_param { moving_average_fraction: 0.9 scale_bias: true
        scale_filler { type: "gaussian" mean: 1 std: 0.2 } bias_filler { type: "gaussian" } }"""
    return CHAIN.replace("NORM", norm).replace("SCALE", "")


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.15)])
@pytest.mark.parametrize("size", [28, 30])
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
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
DROPOUT = """layer { name: "drop" type: "Dropout" bottom: "pool2" top: "pool2"
  dropout_param { dropout_ratio: 0.3 } }"""


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

    def bits(self, iteration: int) -> list[bytes]:
        names = (f"out_iter_{iteration}.caffemodel", f"out_iter_{iteration}.solverstate")
        return [(self.folder / name).read_bytes() for name in names]


@pytest.fixture
def run(stage: Path, tmp_path: Path) -> Run:
    """Trains in a new folder by the program; returns what came of it."""
    count = 0

    def train(
        *arguments: str, dropout: bool = False, folder: Path | None = None, **changes: object
    ) -> Trained:
        nonlocal count
        count += 1
        if folder is None:
            folder = tmp_path / str(count)
            folder.mkdir()
            (folder / "lmdb").symlink_to(stage / "lmdb")
            (folder / "train.prototxt").write_text(NET.replace("DROPOUT", DROPOUT if dropout else ""))
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
        ran = subprocess.run(
            [*PROGRAM, "train", "-solver", "solver.prototxt", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        assert "Traceback" not in ran.stderr, ran.stderr[-3000:]
        return Trained(folder, ran.returncode, ran.stderr)

    return train


def test_the_losses_are_the_cpus(run: Run) -> None:
    cpu, gpu = run(), run("-gpu", "0")
    assert len(cpu.losses) == len(gpu.losses) == 24
    assert cpu.losses[-1] < cpu.losses[0]
    np.testing.assert_allclose(gpu.losses, cpu.losses, atol=1e-3)


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 0.02), ("bf16", 0.05)])
def test_lower_precision_stays_within_its_bound(run: Run, precision: str, bound: float) -> None:
    exactly, less = run("-gpu", "0"), run("-gpu", "0", "-precision", precision)
    assert less.losses != exactly.losses
    np.testing.assert_allclose(less.losses, exactly.losses, atol=bound)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_graph_changes_no_bit_and_a_resume_neither(run: Run, dropout: bool, passes: int) -> None:
    settings = {"dropout": dropout, "iter_size": passes}
    recorded = run("-gpu", "0", "-deterministic", **settings)
    kernels = run("-gpu", "0", "-deterministic", "-graph", "false", **settings)
    assert recorded.bits(24) == kernels.bits(24)
    ends = recorded.bits(24)
    resumed = run(
        *("-gpu", "0", "-deterministic", "-snapshot", "out_iter_12.solverstate"),
        folder=recorded.folder,
        **settings,
    )
    assert resumed.code == 0
    assert resumed.bits(24) == ends


def test_pruned_weights_stay_zero_in_a_graph(run: Run) -> None:
    """The masks come after the graph was recorded, and change under it."""
    sparse = sparse_settings(target=0.6, start_iter=6, step_iter=3)
    trained = run("-gpu", "0", *settings_as_flags(sparse))
    assert trained.code == 0, trained.log[-2000:]
    (before, after) = (read_weights(trained.folder / f"out_iter_{at}.caffemodel") for at in (12, 24))
    zeros = before["conv2"][0] == 0
    assert 0.1 < zeros.mean() < 0.9
    assert not after["conv2"][0][zeros].any()
    assert (before["conv2"][0] != after["conv2"][0]).any()


def test_nothing_waits_for_the_device(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises an error at whatever waits, in iterations without display, test or snapshot."""
    monkeypatch.chdir(stage)
    (stage / "train.prototxt").write_text(NET.replace("DROPOUT", DROPOUT))
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


def test_out_of_memory_says_which_batch_fits(run: Run, stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "lmdb").symlink_to(stage / "lmdb")
    large = NET.replace("DROPOUT", "").replace("num_output: 32", "num_output: 16384")
    (folder / "train.prototxt").write_text(large.replace("batch_size: 32", "batch_size: 40000"))
    trained = run("-gpu", "0", "-workers", "1", folder=folder)
    assert trained.code != 0
    (line,) = [line for line in trained.log.splitlines() if re.match(r"F\d{8} ", line)]
    said = re.search(r"memory is too small: a batch_size of ([\d,]+) should fit", line)
    assert said, line
    fits = int(said[1].replace(",", ""))
    assert 32 <= fits < 40000


def test_the_batch_that_fits_does(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small share of the memory: that batch runs, and four times as large a one does not."""
    monkeypatch.chdir(stage)
    (stage / "train.prototxt").write_text(NET.replace("DROPOUT", ""))
    (stage / "solver.prototxt").write_text('train_net: "train.prototxt" max_iter: 1 lr_policy: "fixed"')
    solver = read_solver(Path("solver.prototxt"), Dialect.BVLC)
    torch.cuda.empty_cache()
    share = 1.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        shapes: dict[str, tuple[int, ...]] = {"data": (1, 3, 28, 28), "label": (1,)}
        fits = largest_batch(solver, shapes, GPU, "fp32")
        assert fits is not None

        def one(batch: int) -> None:
            sized = {"data": (batch, 3, 28, 28), "label": (batch,)}
            net = Net(solver.train_net, TRAIN, Dialect.BVLC, where="", device=GPU, data_shapes=sized)
            net({name: torch.zeros(shape, device=GPU) for name, shape in sized.items()}).loss.backward()

        one(fits)
        torch.cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError):
            one(4 * fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_loss_that_is_not_a_number_ends_the_training(run: Run) -> None:
    trained = run("-gpu", "0", base_lr=1e30, display=4)
    assert trained.code != 0
    assert "the loss is not a number" in trained.log


def test_a_gpu_that_is_not_there(run: Run) -> None:
    trained = run("-gpu", "77")
    assert trained.code != 0
    assert "77" in trained.log


def test_the_kernels_are_used() -> None:
    assert fusion.has_kernels(GPU)
