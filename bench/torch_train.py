"""Speed of `caffe-torch train`, compared with stock Caffe and with a hand-written PyTorch loop.

    python bench/torch_train.py [--caffe PATH] [--batch 8 32 64] [--images 768] [--rounds 3] [--against DIR]

JacintoNet11 at 224x224, and with the demo's strides and batch at 32x32, from the same prototxts and the same
LMDB of JPEG files. ``--against`` is a checkout of another revision, whose engine is timed in the same rounds.
Each program is a separate process, one after the other; images/s are measured between the log's first and
last iterations. The hand-written loop is the same network in torch.nn, channels last, on one batch that is
already in memory; it shows what PyTorch itself can reach. The share of the peak counts training as three
times the forward pass's multiply-accumulates; the peak is that of a large matrix product. Rounds of all
programs are interleaved, and speeds and ratios are medians over the rounds, so that other work on the machine
affects all of them. Prints a Markdown table per batch size; the exit code is 1 if a limit is broken. They are
limits at 224x224.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cv2
import lmdb
import numpy as np

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.data.encode import datum_record
from caffe_jacinto.engines.discovery import find_engine

LIMITS = {"fp32": 2.6, "bf16": 4.5}
"""Least speed at 224x224, as a multiple of stock Caffe's."""

LOOP_LIMIT = 1.05
"""Least speed at 224x224, as a fraction of the hand-written loop's."""

TORCH = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]
HAS_BF16 = re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text()) is not None


class Case(NamedTuple):
    """A network, and the images that it is trained with."""

    size: int
    """Of the crop; stored images are an eighth larger."""

    stride: int
    """Of conv1a."""

    classes: int
    gigamacs: float
    """Of the convolutions, forward, for one image."""

    times: int
    """How many times the images it is timed over."""


PUBLISHED = Case(224, 2, 1000, 0.4058, 1)
"""docs/complexity.md."""

DEMO = Case(32, 1, 10, 0.0331, 8)
"""The network of the recipe demo_digits."""

DEMO_BATCH = 128

WARM_UP = 3
"""Iterations that are not timed: in them, convolutions are chosen and batches decoded ahead."""

LOOP = """
import sys, time
import torch, torch.nn as nn
from caffe_jacinto.common.processes import keep_freed_memory

batch, iterations, bf16 = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "bf16"
size, first_stride, classes = map(int, sys.argv[4:])
keep_freed_memory()

def conv(inputs, outputs, kernel, stride=1, group=1):
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group),
            nn.BatchNorm2d(outputs, eps=1e-4, momentum=0.01), nn.ReLU(inplace=True)]

layers, inputs = [*conv(3, 32, 5, first_stride), *conv(32, 32, 3, group=4)], 32
for outputs in (64, 128, 256, 512):
    layers += [nn.MaxPool2d(2, 2, ceil_mode=True), *conv(inputs, outputs, 3)]
    layers += conv(outputs, outputs, 3, group=4)
    inputs = outputs
net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
net = net.to(memory_format=torch.channels_last)
solver = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True)
images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
labels = torch.randint(classes, (batch,))
for iteration in range(iterations):
    if iteration == WARM_UP:
        started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        scores = net(images)
    loss = nn.functional.cross_entropy(scores.float(), labels)
    loss.backward()
    solver.step()
    solver.zero_grad()
print(batch * (iterations - WARM_UP) / (time.perf_counter() - started))
""".replace("WARM_UP", str(WARM_UP))

PEAK = """
import sys, time
import torch

kind = torch.bfloat16 if sys.argv[1] == "bf16" else torch.float32
a, b = torch.randn(3072, 3072, dtype=kind), torch.randn(3072, 3072, dtype=kind)
a @ b
best = 0.0
for _ in range(5):
    started = time.perf_counter()
    a @ b
    best = max(best, 3072**3 / (time.perf_counter() - started))
print(best / 1e9)
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caffe")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--images", type=int, default=768, help="images that each program is timed over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="DIR", help="a checkout whose engine is timed, too")
    arguments = parser.parse_args(argv)
    caffe = find_engine(arguments.caffe, "bvlc").info.executable
    cases = [(PUBLISHED, batch) for batch in arguments.batch] + [(DEMO, DEMO_BATCH)]
    kept = [
        _bench(caffe, case, batch, arguments.images, arguments.rounds, arguments.against)
        for case, batch in cases
    ]
    limits = ", ".join(f"{precision} {limit} times" for precision, limit in LIMITS.items())
    missing = "" if HAS_BF16 else " (bf16 not required: this processor has no bf16 instructions)"
    print(f"limits at 224x224: {limits} stock Caffe{missing}; {LOOP_LIMIT:.0%} of the hand-written loop")
    return 0 if all(kept) else 1


def _bench(caffe: Path, case: Case, batch: int, images: int, rounds: int, against: Path | None) -> bool:
    """Print the table of one batch size; returns whether the limits are kept."""
    iterations = max(4, images * case.times // batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_images(folder / "lmdb", 4 * batch, case)
        solver = _write_solver(folder, case, batch, iterations + WARM_UP)
        # Stock Caffe is slow but steady: a third of the images is enough.
        few = _write_solver(folder / "few", case, batch, max(3, iterations // 3) + WARM_UP, folder / "lmdb")
        stock, ours, loops = list[float](), defaultdict(list[float]), defaultdict(list[float])
        others = defaultdict(list[float])
        for _ in range(rounds):
            stock.append(_speed([str(caffe), "train", "-solver", str(few)], batch))
            for precision in LIMITS:
                network = [str(case.size), str(case.stride), str(case.classes)]
                loop = [
                    sys.executable,
                    "-c",
                    LOOP,
                    str(batch),
                    str(iterations + WARM_UP),
                    precision,
                    *network,
                ]
                loops[precision].append(_number(loop))
                training = [*TORCH, "train", "-solver", str(solver), "-precision", precision]
                ours[precision].append(_speed(training, batch))
                if against is not None:
                    others[precision].append(_speed(training, batch, against))
    print(f"\nJacintoNet11, {case.size}x{case.size}, batch {batch}, training from an LMDB of JPEG files\n")
    than = "" if against is None else " times the other revision |"
    print(f"| program | images/s | times stock Caffe | of the hand-written loop | of the peak |{than}")
    print("|---|---:|---:|---:|---:|" + ("---:|" if than else ""))
    print(f"| stock Caffe 1.0 (OpenBLAS) | {median(stock):.1f} | 1 | | |" + (" |" if than else ""))
    kept = True
    for precision, limit in LIMITS.items():
        times, of_loop = _ratio(ours[precision], stock), _ratio(ours[precision], loops[precision])
        peak = _number([sys.executable, "-c", PEAK, precision])
        speed, loop = median(ours[precision]), median(loops[precision])
        other = f" {_ratio(ours[precision], others[precision]):.2f} |" if than else ""
        print(
            f"| `caffe-torch`, {precision} | {speed:.1f} | {times:.2f} | {of_loop:.1%} ({loop:.1f}) |"
            f" {3 * case.gigamacs * speed / peak:.0%} of {peak:.0f} GigaMACs/s |{other}"
        )
        if case is PUBLISHED:
            kept &= of_loop >= LOOP_LIMIT
            kept &= times >= limit or (precision == "bf16" and not HAS_BF16)
    print()
    return kept


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _write_images(folder: Path, count: int, case: Case) -> None:
    """An LMDB of smooth random pictures, an eighth larger than the crop, as JPEG files."""
    size = case.size * 8 // 7
    rng = np.random.default_rng(0)
    with lmdb.open(str(folder), map_size=1 << 30) as environment, environment.begin(write=True) as records:
        for number in range(count):
            small = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            picture = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
            picture = cv2.add(picture, rng.integers(0, 20, picture.shape, dtype=np.uint8))
            content = cv2.imencode(".jpg", picture)[1].tobytes()
            records.put(b"%08d" % number, datum_record(content, number % case.classes))


def _write_solver(folder: Path, case: Case, batch: int, iterations: int, images: Path | None = None) -> Path:
    """The solver file of a training from the LMDB ``images``, by default the one in ``folder``."""
    source = str(images or folder / "lmdb")
    arguments = ["--dialect", "bvlc", "--cpu", "--output", str(folder), "--batch-size", str(batch)]
    arguments += ["--iter-size", "1", "--train-lmdb", source, "--val-lmdb", source]
    arguments += ["--crop-size", str(case.size), "--num-classes", str(case.classes)]
    arguments += ["--strides", f"{case.stride},2,2,2,2"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = build_net(arguments)
    if code != 0:
        raise RunFailed("build_net failed")
    solver = folder / "solver.prototxt"
    text = solver.read_text()
    changes = {"max_iter": iterations, "display": 1, "base_lr": 0.01, "snapshot": 10**6}
    changes |= {"test_interval": 10**6}
    for field, value in changes.items():
        text = re.sub(rf"^{field}: .*$", f"{field}: {value}", text, flags=re.MULTILINE)
    text = text.replace("test_initialization: true", "test_initialization: false")
    solver.write_text(text.replace("snapshot_after_train: true", "snapshot_after_train: false"))
    return solver


def _speed(command: list[str], batch: int, checkout: Path | None = None) -> float:
    """Images per second between the iterations in the program's log, without the first ones."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)} if checkout else None
    # Python finds a module in the current folder first.
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=checkout)
    times = re.findall(r"(\d\d:\d\d:\d\d\.\d{6}) .*\] Iteration \d+ \(", ran.stderr)
    if ran.returncode != 0 or len(times) <= WARM_UP + 1:
        raise RunFailed(f"{command[0]} failed: {ran.stderr[-500:]}")
    first, last = (datetime.strptime(times[at], "%H:%M:%S.%f") for at in (WARM_UP, -1))
    return batch * (len(times) - 1 - WARM_UP) / (last - first).total_seconds()


def _number(command: list[str]) -> float:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RunFailed(f"{command[2][:40]!r} failed: {ran.stderr[-500:]}")
    return float(ran.stdout)


if __name__ == "__main__":
    sys.exit(run_command("bench/torch_train", main))
