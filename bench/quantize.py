"""Calibration of JacintoNet11 at 224x224 compared with its forward passes alone, and its memory.

    python bench/quantize.py [--images 2500]

Both read the same images of noise; their making is not counted. CPU seconds of the process are compared, so
that other work on the machine matters little. The exit code is 1 if a limit is broken: at most 1.3 times the
forward passes, and no more memory for all images than for a quarter of them, within 5 %.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import run_command
from caffe_jacinto.export.stock_net import StockLayer, StockNet
from caffe_jacinto.inference.network import Sample
from caffe_jacinto.inference.quantize import Images, Quantizer, batched, on_pytorch
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.quantization.network import network_of
from caffe_jacinto.quantization.schemes import SCHEMES

TIME_LIMIT, MEMORY_LIMIT = 1.3, 1.05
BATCH = 50


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2500, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    quantizer, scores = network()
    for batch in stacked(BATCH):
        scores(batch)  # the first passes choose how to compute
    peaks = []
    for count in (options.images // 4, options.images):
        making = seconds(lambda count=count: [None for _ in stacked(count)])
        passes = seconds(lambda count=count: [scores(batch) for batch in stacked(count)]) - making
        calibration = seconds(lambda count=count: quantizer.quantize(images(count))) - making
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(
            f"{count} images: passes {passes:.1f} s, calibration {calibration:.1f} s "
            f"({calibration / passes:.2f} times), peak memory {peaks[-1]:,.0f} MB"
        )
    return int(calibration > TIME_LIMIT * passes or peaks[1] > MEMORY_LIMIT * peaks[0])


def network() -> tuple[Quantizer, Callable[[np.ndarray], np.ndarray]]:
    """JacintoNet11 with batch norms folded, random weights, and its forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        build_net(["--network", "jacintonet11", "--dialect", "bvlc", "--output", folder])
        text = (Path(folder) / "deploy.prototxt").read_text()
    whole = parse_net(text, Dialect.BVLC, "deploy.prototxt")
    random, layers = np.random.default_rng(0), []
    shapes = blob_shapes(whole, "TEST")
    for layer in whole.layer:
        if layer.type in ("BatchNorm", "Scale", "Softmax"):
            continue
        sizes = [[dim or 0 for dim in shape] for shape in shapes.get(layer.name, [])]
        blobs = [random.normal(0, (2 / max(np.prod(size[1:]), 1)) ** 0.5, size) for size in sizes]
        if layer.type == "Bias":
            blobs = [np.full(size, -128.0) for size in sizes]
        layers.append(StockLayer(layer, [blob.astype(np.float32) for blob in blobs]))
    net = StockNet(messages(Dialect.BVLC).NetParameter(name="jacintonet11"), layers)
    blobs = {layer.name: layer.blobs for layer in layers}
    described = network_of(
        SCHEMES["processor"], [layer.message for layer in layers], blobs, "deploy.prototxt"
    )
    passes = on_pytorch(net, described, (), "deploy.prototxt")
    return Quantizer(passes, described, "deploy.prototxt"), lambda batch: passes.scores(batch, None)


def samples(count: int) -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for number in range(count):
        yield Sample(str(number), 0, random.integers(0, 256, (3, 224, 224)).astype(np.float32))


def images(count: int) -> Images:
    return batched("noise", count, BATCH, lambda: samples(count))


def stacked(count: int) -> Iterator[np.ndarray]:
    for batch in images(count).batches():
        yield np.stack([sample.image for sample in batch if sample.image is not None])


def seconds(job: Callable[[], object]) -> float:
    """CPU seconds of this process for ``job``."""
    before = os.times()
    job()
    after = os.times()
    return after.user + after.system - before.user - before.system


if __name__ == "__main__":
    sys.exit(run_command("bench/quantize.py", main))
