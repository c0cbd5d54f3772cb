"""Speed of training on a GPU: end to end, and of each part alone.

    python bench/torch_gpu.py [--batch 128 256 512 1024] [--images 20000] [--json FILE] [--limit 330]

JacintoNet11 at 224x224, from an LMDB of 256x256 JPEG files (quality 95) that it makes. It measures

    the card        a large matrix product in each precision, and a large copy (bytes read and written)
    compute         the training's iteration on a batch that is already on the card
    by hand         the same network in torch.nn: eager, as a CUDA graph, and compiled by torch.compile
    feed            batches decoded and copied to the card, with nothing computed
    end to end      `caffe-torch train`, between the first and the last iterations of its log

and prints a Markdown table. Shares of the matrix product count training as three times the forward pass's
multiply-accumulates, two operations each. Shares of the bandwidth count `PASSES` over the outputs of the
convolutions. What does not fit into --limit seconds is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import RunFailed, UserError, run_command
from caffe_jacinto.data.encode import datum_record
from caffe_jacinto.engines.pytorch.copy_ahead import RawBatch
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.feed import Inputs, default_workers
from caffe_jacinto.engines.pytorch.gpu_decode import can_decode
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.precision import allow_tf32, autocast
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import TRAIN, SolverFile, read_solver

GIGAMACS = 0.4063
"""JacintoNet11's convolutions and inner product, forward, for one image (docs/complexity.md)."""

OUTPUTS = 1_555_456
"""Numbers that JacintoNet11's convolutions give for an image: 2 x (112x112x32 + 56x56x64 + ... + 7x7x512)."""

PASSES = 14
"""Over these, in one iteration. Forward, a convolution writes them, the statistics read them, and normalizing
reads them and writes the next input, which is read: 5. Backward, the sums read them with a gradient, and so
does the pass that writes the gradient before the batch norm: 5. Two convolutions read that, one also the
input, and one writes the input's gradient: 4."""

WARM_UP, TIMED = 8, 30
"""Iterations."""

GPU = torch.device("cuda", 0)
WAYS = ("eager", "graph", "compiled")
"""To run the hand-written loop; compiled: also as a graph."""

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]


class Clock:
    """What is left of the time."""

    def __init__(self, limit: float) -> None:
        self._end = time.monotonic() + limit
        self.left_out: list[str] = []

    def allows(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` more fit; what does not is noted."""
        fits = time.monotonic() + seconds < self._end
        if not fits:
            self.left_out.append(what)
        return fits


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024, 128])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--limit", type=float, default=330, metavar="SECONDS")
    parser.add_argument("--by-hand", choices=WAYS, help="only this, at the first batch: prints images/s")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("this machine has no GPU that PyTorch can use")
    torch.backends.cudnn.benchmark = True
    if arguments.by_hand:
        print(_network_speed(arguments.by_hand, arguments.batch[0]))
        return 0
    clock, rows = Clock(arguments.limit), list[dict[str, Any]]()
    card = _card()
    results = arguments.json.resolve() if arguments.json else None
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        print(f"Making {arguments.images:,} images", flush=True)
        card["jpeg bytes"] = _write_images(Path("lmdb"), arguments.images)
        decoders = ["cpu"] if can_decode(GPU) else ["cpu", "gpu", "both"]
        first, *others = arguments.batch
        rows += _compute(clock, "bf16", first)
        for decode in decoders:
            rows += _feed(clock, decode, first)
        for decode in reversed(decoders):
            rows += _end_to_end(clock, "bf16", decode, first)
        rows += _by_hand(clock, "bf16", first)
        rows += _end_to_end(clock, "bf16", decoders[-1], 2 * first)
        for batch in others:
            rows += _compute(clock, "bf16", batch)
        for precision in ("tf32", "fp32"):
            rows += _compute(clock, precision, first)
        rows += _end_to_end(clock, "tf32", decoders[-1], first)
    _print(card, rows, clock.left_out)
    if results:
        results.write_text(json.dumps({"card": card, "rows": rows}, indent=1) + "\n")
    return 0


# ------------------------------------------------------------------------------------------------- measuring


def _milliseconds(run: Callable[[], object], times: int = TIMED, warm_up: int = WARM_UP) -> float:
    for _ in range(warm_up):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def _card() -> dict[str, Any]:
    """What the card can do at most."""
    facts: dict[str, Any] = {
        "card": torch.cuda.get_device_name(GPU),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    for precision in ("bf16", "tf32", "fp32"):
        allow_tf32(precision)
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        one, other = (torch.randn(8192, 8192, device=GPU, dtype=kind) for _ in range(2))
        times = 3 if precision == "fp32" else 10
        facts[f"{precision} TFLOP/s"] = 2 * 8192**3 / _milliseconds(lambda: one @ other, times, 3) / 1e9  # noqa: B023
    values = torch.randn(2**28, device=GPU)
    copy = torch.empty_like(values)
    facts["TB/s"] = 2 * 4 * 2**28 / _milliseconds(lambda: copy.copy_(values)) / 1e9
    for name, value in facts.items():
        print(f"{name}: {value:,.2f}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    return facts


def _row(part: str, precision: str, batch: int, speed: float, **more: Any) -> list[dict[str, Any]]:
    row = {"part": part, "precision": precision, "batch": batch, "images/s": speed, **more}
    print(
        " ".join(f"{value:,.0f}" if isinstance(value, float) else str(value) for value in row.values()),
        flush=True,
    )
    return [row]


# ------------------------------------------------------------------------------------------------- the parts


class _Ready:
    """Inputs whose batch is always the same one, on the card."""

    def __init__(self, inputs: Inputs) -> None:
        inputs.start_at(0)
        self._batch = [RawBatch(*(part.clone() for part in batch)) for batch in inputs.raw()]
        self.transformed = inputs.transformed
        self.shapes = inputs.shapes

    def raw(self) -> list[RawBatch]:
        return self._batch


def _speed(iterate: Iteration, batch: int) -> float:
    return 1000 * batch / _milliseconds(lambda: iterate(0, 0.01))


@contextlib.contextmanager
def _inputs(solver: SolverFile, workers: int, decode: str) -> Iterator[Inputs]:
    with Inputs(
        solver.train_net,
        TRAIN,
        "train.prototxt",
        device=GPU,
        seed=1,
        workers=workers,
        decode=decode,  # type: ignore[arg-type]
    ) as inputs:
        yield inputs


def _compute(clock: Clock, precision: str, batch: int) -> list[dict[str, Any]]:
    """The iteration alone, as a graph and kernel by kernel."""
    what = f"compute {precision} {batch}"
    if not clock.allows(what, 40 if precision == "fp32" else 25):
        return []
    allow_tf32(precision)
    solver = _stage(batch, 1)
    with _inputs(solver, 1, "cpu") as inputs:
        ready = _Ready(inputs)
    net = Net(
        solver.train_net, TRAIN, Dialect.BVLC, where="net", seed=1, device=GPU, data_shapes=ready.shapes
    )
    optimizer = solver_class(solver.parameters, "")(net.learnables, solver.parameters, capturable=True)
    pruner, ranks = TorchPruner(net, print), Ranks(torch.device("cpu"))
    torch.cuda.reset_peak_memory_stats()
    speeds = [
        _speed(
            Iteration(
                *(net, ready, optimizer, pruner, ranks),  # type: ignore[arg-type]
                seed=1,
                passes=1,
                precision=precision,
                graph=graph,
            ),
            batch,
        )
        for graph in (True, False)
    ]
    memory = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    return _row("compute", precision, batch, speeds[0], GiB=memory, eager=speeds[1])


def _by_hand(clock: Clock, precision: str, batch: int) -> list[dict[str, Any]]:
    """The same network as one writes it in torch.nn, each way in a process of its own."""
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        if clock.allows(f"by hand {way}", 35 if way == "compiled" else 15):
            command = [sys.executable, __file__, "--by-hand", way, "--batch", str(batch)]
            rows += _row(f"by hand, {way}", precision, batch, float(_said(command).split()[-1]))
    return rows


def _said(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RunFailed(f"{' '.join(command)} failed: {ran.stderr[-800:]}")
    return ran.stdout


def _network_speed(way: str, batch: int) -> float:
    """Images per second of the hand-written loop in bf16."""
    net = _network()
    optimizer = torch.optim.SGD(
        net.parameters(), torch.tensor(0.01, device=GPU), 0.9, weight_decay=1e-4, fused=True
    )
    images = torch.randint(0, 255, (batch, 3, 224, 224), device=GPU, dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=GPU)
    forward: Any = torch.compile(net) if way == "compiled" else net

    def iterate() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(GPU, "bf16"):
            loss = F.cross_entropy(forward(images.float() - 128), labels)
        loss.backward()
        optimizer.step()

    if way == "eager":
        return 1000 * batch / _milliseconds(iterate)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(4):
            iterate()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    return 1000 * batch / _milliseconds(graph.replay)


def _network() -> nn.Module:
    def convolution(
        inputs: int, outputs: int, kernel: int, stride: int = 1, group: int = 1
    ) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group),
            nn.BatchNorm2d(outputs, eps=1e-4, momentum=0.01),
            nn.ReLU(inplace=True),
        ]

    layers, inputs = [*convolution(3, 32, 5, 2), *convolution(32, 32, 3, group=4)], 32
    for outputs in (64, 128, 256, 512):
        layers += [nn.MaxPool2d(2, 2), *convolution(inputs, outputs, 3)]
        layers += convolution(outputs, outputs, 3, group=4)
        inputs = outputs
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    return net.to(GPU).to(memory_format=torch.channels_last)


def _feed(clock: Clock, decode: str, batch: int) -> list[dict[str, Any]]:
    """Decoding and copying alone."""
    if not clock.allows(f"feed {decode}", 10):
        return []
    with _inputs(_stage(batch, 1), default_workers(GPU), decode) as inputs:
        inputs.start_at(0)
        for _ in range(2 * default_workers(GPU) + 5):
            inputs.raw()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(60):
            inputs.raw()
        torch.cuda.synchronize()
        return _row(f"feed, decoded by {decode}", "", batch, 60 * batch / (time.perf_counter() - started))


def _end_to_end(clock: Clock, precision: str, decode: str, batch: int) -> list[dict[str, Any]]:
    """The program that users run."""
    if not clock.allows(f"end to end {precision} {decode} {batch}", 30):
        return []
    iterations = max(300, 160_000 // batch)
    _stage(batch, iterations)
    command = [*PROGRAM, "train", "-solver", "net/solver.prototxt", "-gpu", "0"]
    ran = subprocess.run(
        [*command, "-precision", precision, "-decode", decode],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    times = re.findall(r"(\d\d:\d\d:\d\d\.\d{6}) .*\] Iteration (\d+) \(", ran.stderr)
    if ran.returncode != 0 or len(times) < 4:
        raise RunFailed(f"{' '.join(command)} failed: {ran.stderr[-800:]}")
    (first, begin), (last, end) = times[2], times[-1]
    spent = datetime.strptime(last, "%H:%M:%S.%f") - datetime.strptime(first, "%H:%M:%S.%f")
    speed = batch * (int(end) - int(begin)) / spent.total_seconds()
    return _row(f"end to end, decoded by {decode}", precision, batch, speed)


# ------------------------------------------------------------------------------------------------- the files


def _write_images(folder: Path, count: int) -> int:
    """An LMDB of smooth random pictures with some noise; returns their average size in bytes."""
    size = 0
    with (
        ProcessPoolExecutor() as pool,
        lmdb.open(str(folder), map_size=1 << 36) as environment,
        environment.begin(write=True) as records,
    ):
        for number, record in enumerate(pool.map(_picture, range(count), chunksize=64)):
            records.put(b"%08d" % number, record)
            size += len(record)
    return size // count


def _picture(number: int) -> bytes:
    random = np.random.default_rng(number)
    small = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    picture = cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC)
    picture = cv2.add(picture, random.integers(0, 20, picture.shape, dtype=np.uint8))
    content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return datum_record(content, number % 1000)


def _stage(batch: int, iterations: int) -> SolverFile:
    arguments = [
        "--dialect",
        "bvlc",
        "--cpu",
        "--output",
        "net",
        "--batch-size",
        str(batch),
        "--iter-size",
        "1",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        code = build_net([*arguments, "--train-lmdb", "lmdb", "--val-lmdb", "lmdb"])
    if code != 0:
        raise RunFailed("build_net failed")
    path = Path("net/solver.prototxt")
    text = path.read_text()
    changes = {"max_iter": iterations, "display": max(iterations // 12, 1), "base_lr": 0.01, "snapshot": 0}
    for field, value in {**changes, "test_interval": 10**6}.items():
        text = re.sub(rf"^{field}: .*$", f"{field}: {value}", text, flags=re.MULTILINE)
    text = text.replace("test_initialization: true", "test_initialization: false")
    path.write_text(text.replace("snapshot_after_train: true", "snapshot_after_train: false"))
    return read_solver(path, Dialect.BVLC)


# ------------------------------------------------------------------------------------------------ the tables


def _print(card: dict[str, Any], rows: list[dict[str, Any]], left_out: list[str]) -> None:
    print(f"\n{card['card']}, {card['cores']} cores, PyTorch {card['torch']}.")
    print(f"The JPEG files have {card['jpeg bytes']:,} bytes on average.")
    print(
        f"Matrix product: bf16 {card['bf16 TFLOP/s']:.0f}, tf32 {card['tf32 TFLOP/s']:.0f}, fp32"
        f" {card['fp32 TFLOP/s']:.0f} TFLOP/s. Copy: {card['TB/s']:.2f} TB/s.\n"
    )
    print("| part | precision | batch | images/s | of the matrix product | of the bandwidth | memory |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        peak = bandwidth = memory = ""
        if row["precision"]:
            share = 6 * GIGAMACS * row["images/s"] / 1000 / card[f"{row['precision']} TFLOP/s"]
            size = 2 if row["precision"] == "bf16" else 4
            peak = f"{share:.1%}"
            bandwidth = f"{PASSES * OUTPUTS * size * row['images/s'] / 1e12 / card['TB/s']:.0%}"
        if "GiB" in row:
            memory = f"{row['GiB']:.1f} GiB"
        print(
            f"| {row['part']} | {row['precision']} | {row['batch']:,} | {row['images/s']:,.0f} | {peak} |"
            f" {bandwidth} | {memory} |"
        )
        if "eager" in row:
            print(
                f"| compute, -graph false | {row['precision']} | {row['batch']:,} |"
                f" {row['eager']:,.0f} | | | |"
            )
    for what in left_out:
        print(f"\nLeft out for lack of time: {what}")


if __name__ == "__main__":
    sys.exit(run_command("bench/torch_gpu", main))
