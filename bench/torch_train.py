"""Speed of `caffe-torch train`, compared with stock Caffe and with a hand-written PyTorch loop.

    python bench/torch_train.py [--caffe PATH] [--batch 8 32 64] [--images 384] [--rounds 3]

JacintoNet11 at 224x224, from the same prototxts and the same LMDB of 256x256 JPEG files. Each program is a
separate process, one after the other; images/s are measured between the log's first and last iterations.
The hand-written loop is the same network in torch.nn, channels last, on one batch that is already in
memory; it shows what PyTorch itself can reach. The share of the peak counts training as three times the
forward pass's multiply-accumulates; the peak is that of a large matrix product. Rounds of all programs are
interleaved, and speeds and ratios are medians over the rounds, so that other work on the machine affects
all of them. Prints a Markdown table per batch size; the exit code is 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

import cv2
import lmdb
import numpy as np

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.data.encode import datum_record
from caffe_jacinto.engines.discovery import find_engine

LIMITS = {"fp32": 2.6, "bf16": 4.5}
"""Least speed, as a multiple of stock Caffe's."""

LOOP_LIMIT = 0.92
"""Least speed, as a fraction of the hand-written loop's."""

TORCH = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]
HAS_BF16 = re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text()) is not None

GIGAMACS = 0.4058
"""JacintoNet11's convolutions, forward, for one image (docs/complexity.md)."""

WARM_UP = 2
"""Iterations that are not timed."""

LOOP = """
import sys, time
import torch, torch.nn as nn
from caffe_jacinto.common.processes import keep_freed_memory

batch, iterations, bf16 = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "bf16"
keep_freed_memory()

def conv(inputs, outputs, kernel, stride=1, group=1):
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group),
            nn.BatchNorm2d(outputs, eps=1e-4, momentum=0.01), nn.ReLU(inplace=True)]

layers, inputs = [*conv(3, 32, 5, 2), *conv(32, 32, 3, group=4)], 32
for outputs in (64, 128, 256, 512):
    layers += [nn.MaxPool2d(2, 2, ceil_mode=True), *conv(inputs, outputs, 3)]
    layers += conv(outputs, outputs, 3, group=4)
    inputs = outputs
net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
net = net.to(memory_format=torch.channels_last)
solver = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True)
images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
labels = torch.randint(1000, (batch,))
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
    parser.add_argument("--images", type=int, default=384, help="images that each program is timed over")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    caffe = find_engine(arguments.caffe, "bvlc").info.executable
    kept = [_bench(caffe, batch, arguments.images, arguments.rounds) for batch in arguments.batch]
    limits = ", ".join(f"{precision} {limit} times" for precision, limit in LIMITS.items())
    missing = "" if HAS_BF16 else " (bf16 not required: this processor has no bf16 instructions)"
    print(f"limits: {limits} stock Caffe{missing}; {LOOP_LIMIT:.0%} of the hand-written loop")
    return 0 if all(kept) else 1


def _bench(caffe: Path, batch: int, images: int, rounds: int) -> bool:
    """Print the table of one batch size; returns whether the limits are kept."""
    iterations = max(4, images // batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_images(folder / "lmdb", 4 * batch)
        solver = _write_solver(folder, batch, iterations + WARM_UP)
        # Stock Caffe is slow but steady: a third of the images is enough.
        few = _write_solver(folder / "few", batch, max(3, iterations // 3) + WARM_UP, folder / "lmdb")
        stock, ours, loops = list[float](), defaultdict(list[float]), defaultdict(list[float])
        for _ in range(rounds):
            stock.append(_speed([str(caffe), "train", "-solver", str(few)], batch))
            for precision in LIMITS:
                loop = [sys.executable, "-c", LOOP, str(batch), str(iterations + WARM_UP), precision]
                loops[precision].append(_number(loop))
                ours[precision].append(
                    _speed([*TORCH, "train", "-solver", str(solver), "-precision", precision], batch)
                )
    print(f"\nJacintoNet11, 224x224, batch {batch}, training from an LMDB of JPEG files\n")
    print("| program | images/s | times stock Caffe | of the hand-written loop | of the peak |")
    print("|---|---:|---:|---:|---:|")
    print(f"| stock Caffe 1.0 (OpenBLAS) | {median(stock):.1f} | 1 | | |")
    kept = True
    for precision, limit in LIMITS.items():
        times, of_loop = _ratio(ours[precision], stock), _ratio(ours[precision], loops[precision])
        peak = _number([sys.executable, "-c", PEAK, precision])
        speed, loop = median(ours[precision]), median(loops[precision])
        print(
            f"| `caffe-torch`, {precision} | {speed:.1f} | {times:.2f} | {of_loop:.1%} ({loop:.1f}) |"
            f" {3 * GIGAMACS * speed / peak:.0%} of {peak:.0f} GigaMACs/s |"
        )
        kept &= of_loop >= LOOP_LIMIT and (times >= limit or (precision == "bf16" and not HAS_BF16))
    print()
    return kept


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _write_images(folder: Path, count: int) -> None:
    """An LMDB of smooth random pictures, 256x256, as JPEG files."""
    rng = np.random.default_rng(0)
    with lmdb.open(str(folder), map_size=1 << 30) as environment, environment.begin(write=True) as records:
        for number in range(count):
            small = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            picture = cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC)
            picture = cv2.add(picture, rng.integers(0, 20, picture.shape, dtype=np.uint8))
            content = cv2.imencode(".jpg", picture)[1].tobytes()
            records.put(b"%08d" % number, datum_record(content, number % 1000))


def _write_solver(folder: Path, batch: int, iterations: int, images: Path | None = None) -> Path:
    """The solver file of a training from the LMDB ``images``, by default the one in ``folder``."""
    source = str(images or folder / "lmdb")
    arguments = ["--dialect", "bvlc", "--cpu", "--output", str(folder), "--batch-size", str(batch)]
    arguments += ["--iter-size", "1", "--train-lmdb", source, "--val-lmdb", source]
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


def _speed(command: list[str], batch: int) -> float:
    """Images per second between the iterations in the program's log, without the first ones."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
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
