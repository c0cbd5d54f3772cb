"""Three networks trained on real digits and quantized: how often 8 bits choose the class that float32 does.

    python bench/quantized_digits.py [--networks resnet10 squeezenet_v1_1] [--folder DIR]

Trains JacintoNet11, ResNet10 (32x32) and SqueezeNet 1.1 (64x64) on 4,000 handwritten digits with PyTorch,
calibrates on 2,500 of them, and tests on the 1,000 others. The ONNX model of each is computed by onnxruntime
on the same 1,000 and compared with fake quantization. Prints a Markdown table; the exit code is 1 if a limit
is broken: at least 95 % top-1 in float, the same class for at least 99 % of the images, onnxruntime within
one step at the last layer and within 0.1 points of top-1. DIR keeps images, runs and quantized networks, and
what is in it already is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime

from caffe_jacinto.common.errors import run_command
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.data.digits import main as write_digits
from caffe_jacinto.inference.network import (
    lmdb_samples,
    network_files,
    trained_network,
    validation_preprocessing,
)
from caffe_jacinto.inference.quantize import Quantizer, Tallied, batched, described, loaded, on_pytorch
from caffe_jacinto.quantization.schemes import SCHEMES
from caffe_jacinto.quantize import main as quantize
from caffe_jacinto.train import main as train
from caffe_jacinto.weights import main as weights

AGREEMENT, TOP1_BY_ONNX = 0.99, 0.001
"""Shares of the images."""

STEPS = 1
"""A value on a boundary may be rounded to the other side."""

LEARNT = 0.95
"""The least top-1 in float: a network that has learnt nothing loses nothing either."""

BATCH, BATCHES, IMAGES = 50, 50, 1000
"""The calibration takes as many batches as can be had by default, the test all images."""

RECIPE = """
[data]
dataset = "digits"
train_lmdb = "{folder}/train_{size}_lmdb"
val_lmdb = "{folder}/val_{size}_lmdb"
num_classes = 10
mirror = false

[network]
name = "{name}"
crop_size = {size}
{strides}

[training]
batch_size = 64
iter_size = 1
val_batch_size = 50

[stages.initial.solver]
type = "{solver}"
max_iter = {iterations}
base_lr = {rate}
warmup_iter = {warmup}
weight_decay = {decay}
regularization = "L2"
test_interval = {iterations}
snapshot = {iterations}
display = 50
"""


class Training(NamedTuple):
    """How a network is trained."""

    iterations: int
    rate: float
    decay: float
    strides: str = ""
    size: int = 32
    warmup: int = 0
    solver: str = "SGD"


NETWORKS = {
    "jacintonet11": Training(200, 0.05, 1e-4, "strides = [1, 2, 2, 2, 2]"),
    "resnet10": Training(200, 0.05, 1e-4),
    # With SGD, the ReLUs behind its last layer die, and classes with them.
    "squeezenet_v1_1": Training(1200, 3e-4, 2e-4, size=64, warmup=100, solver="Adam"),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, help="(default: a temporary one)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        for name in options.networks:
            write_lmdbs(folder, NETWORKS[name].size)
        rows, within = [], True
        for name in options.networks:
            run = trained(folder, name)
            for scheme in ("processor", "power2"):
                row, kept = compared(folder, run, name, scheme)
                rows.append(row)
                within = within and kept
    print("| network | scheme | float | 8 bits | same class | onnxruntime: steps apart | its top-1 |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print("limits " + ("kept" if within else "BROKEN"))
    return 0 if within else 1


def write_lmdbs(folder: Path, size: int) -> None:
    """The digits as LMDBs of ``size`` x ``size`` pixels."""
    write_digits(["--output", str(folder / "digits")])
    for part in ("train", "val"):
        images, lmdb = folder / "digits" / part, folder / f"{part}_{size}_lmdb"
        listed = folder / "digits" / f"{part}.txt"
        words = ["--images", str(images), "--list", str(listed), "--output", str(lmdb), "--size", str(size)]
        if not lmdb.exists():
            labels = ["--labels", str(folder / "digits/labels.txt")]
            create_lmdb([*words, *labels, *(["--shuffle", "1"] if part == "train" else [])])


def trained(folder: Path, name: str) -> Path:
    """The run folder of the trained network."""
    run, recipe = folder / f"run_{name}", folder / f"{name}.toml"
    if not run.exists():
        recipe.write_text(RECIPE.format(folder=folder.absolute(), name=name, **NETWORKS[name]._asdict()))
        started = time.monotonic()
        assert train([str(recipe), "--engine", "torch", "--output", str(run)]) == 0
        print(f"{name}: trained in {time.monotonic() - started:.0f} s")
    return run


def compared(folder: Path, run: Path, name: str, scheme: str) -> tuple[str, bool]:
    """Quantize with ``scheme``: a row of the table, and whether the limits are kept."""
    quantized, model = folder / f"{name}_{scheme}", folder / f"{name}_{scheme}.onnx"
    size = NETWORKS[name].size
    calibrate = ["--calibrate", str(folder / f"train_{size}_lmdb"), "--output", str(quantized)]
    with redirect_stdout(StringIO()):
        assert quantize([str(run), "--scheme", scheme, *calibrate]) == 0
        assert weights(["export", "--quantized", str(quantized), "--onnx", str(model)]) == 0
    accuracy = json.loads((quantized / "quantization.json").read_text())["accuracy"]
    assert accuracy["images"] == IMAGES
    steps, top1 = by_onnxruntime(folder, run, scheme, model, size)
    kept = accuracy["float"]["top1"] >= LEARNT and accuracy["agreement"] >= AGREEMENT and steps <= STEPS
    kept = kept and abs(top1 - accuracy["quantized"]["top1"]) <= TOP1_BY_ONNX + 1e-9
    shares = (accuracy["float"]["top1"], accuracy["quantized"]["top1"], accuracy["agreement"])
    cells = [name, scheme, *(f"{100 * share:.2f} %" for share in shares), f"{steps:g}", f"{100 * top1:.2f} %"]
    return f"| {' | '.join(cells)} |", kept


def by_onnxruntime(folder: Path, run: Path, scheme: str, model: Path, size: int) -> tuple[float, float]:
    """The largest difference of onnxruntime's last layer from fake quantization, in steps, and its top-1."""
    files = network_files(run, None, None)
    network = trained_network(files.deploy, files.weights)
    done = validation_preprocessing(files.val, network.shape, files.base)
    net = loaded(network, SCHEMES[scheme])
    what = described(net, SCHEMES[scheme], str(files.deploy), {}, ())
    passes = on_pytorch(net, what, (), str(files.deploy))

    def images(lmdb: Path, most: int) -> Any:
        return batched(str(lmdb), most, BATCH, lambda: lmdb_samples(lmdb, done, most)[1])

    calibrated = Quantizer(passes, what, "").quantize(images(folder / f"train_{size}_lmdb", BATCH * BATCHES))
    whole = onnx.load(model)
    last = next(node.input[0] for node in whole.graph.node if node.op_type == "Softmax")
    whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    largest, tally = 0.0, Tallied()
    for batch in images(folder / f"val_{size}_lmdb", IMAGES).batches():
        pixels = np.stack([sample.image for sample in batch])
        for unit, made in passes.passing(pixels, calibrated.quantization):
            if made.grid is not None:
                end, want, step = unit.name, made.values.numpy(), made.grid.step
        (found,) = session.run([last], {session.get_inputs()[0].name: pixels})
        assert found.size == want.size, end
        largest = max(largest, float(np.abs(found.reshape(want.shape) - want).max()) / step)
        tally.add(found.reshape(len(batch), -1), [sample.label for sample in batch])
    return round(largest, 3), tally.accuracy("val").top1


if __name__ == "__main__":
    sys.exit(run_command("bench/quantized_digits.py", main))
