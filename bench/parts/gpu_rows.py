"""The rows of bench/torch_gpu.py, measured one after the other in a process of their own.

It is asked on standard input, a line of JSON for each row, and answers with a line of JSON each: what was
measured, or an "error" of one line. The working folder has the LMDB "lmdb".
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import RunFailed, UserError, run_command
from caffe_jacinto.common.processes import end_with_parent
from caffe_jacinto.engines.pytorch.batch_norm import Statistics
from caffe_jacinto.engines.pytorch.copy_ahead import RawBatch
from caffe_jacinto.engines.pytorch.distributed import Ranks, device_of_rank
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.feed import Inputs, default_workers
from caffe_jacinto.engines.pytorch.gpu_decode import can_decode
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.precision import allow_tf32, autocast
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import TRAIN, SolverFile, read_solver

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]

WARM_UP = 6
"""Iterations before the clock runs: the first three choose algorithms, and the fourth is recorded."""

MOST, LEAST, SECONDS = 30, 5, 0.6
"""Iterations that are timed: as many as take so long, within these bounds."""

END_TO_END = {"bf16": 120_000, "tf32": 80_000, "fp32": 60_000}
"""Images of a training."""

FED = 15_000
"""Images that are fed to be timed."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, as little as runs")
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args(argv)
    end_with_parent(arguments.parent)
    # Answers go where standard output was; what libraries print there goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if not arguments.rehearse and not torch.cuda.is_available():
        print(json.dumps({"error": "this machine has no GPU that PyTorch can use"}), file=answers, flush=True)
        return 1
    measure = Measure(torch.device("cpu") if arguments.rehearse else torch.device("cuda", 0))
    for line in sys.stdin:
        print(json.dumps(answer(measure, json.loads(line))), file=answers, flush=True)
    return 0


def answer(measure: Measure, request: dict[str, Any]) -> dict[str, Any]:
    """What ``request`` asks for: a part, with its precision, batch and way."""
    try:
        if request["part"] == "card":
            return measure.card()
        run = {
            "compute": measure.compute,
            "feed": measure.feed,
            "end to end": measure.end_to_end,
            "by hand": measure.by_hand,
        }[request["part"]]
        return run(request["precision"], request["batch"], request["way"])
    except Exception as error:
        return {"error": reason(error)}


def reason(error: BaseException) -> str:
    """One line."""
    first = next(iter(str(error).strip().splitlines()), "")
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name}{first}"[:300]


class Measure:
    """The parts of a training, on one device; on the CPU only to try this program."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._gpus = (0,) if self._on_gpu else ()

    def card(self) -> dict[str, Any]:
        """What the card can do at most, and why it does not decode images if so."""
        facts: dict[str, Any] = {
            "card": torch.cuda.get_device_name(self._device) if self._on_gpu else "the CPU, a rehearsal",
            "torch": torch.__version__,
            "cores": len(os.sched_getaffinity(0)),
            "no decoding": can_decode(self._device),
        }
        size, count = (8192, 2**28) if self._on_gpu else (256, 2**16)
        for precision in ("bf16", "tf32", "fp32"):
            allow_tf32(precision)
            kind = torch.bfloat16 if precision == "bf16" else torch.float32
            one, other = (torch.randn(size, size, device=self._device, dtype=kind) for _ in range(2))
            product = self._milliseconds(lambda: one @ other, 3)  # noqa: B023 - called at once
            facts[f"{precision} TFLOP/s"] = 2 * size**3 / product / 1e9
        values = torch.randn(count, device=self._device)
        copy = torch.empty_like(values)
        facts["TB/s"] = 2 * 4 * count / self._milliseconds(lambda: copy.copy_(values)) / 1e9
        return facts

    def compute(self, precision: str, batch: int, way: str) -> dict[str, Any]:
        """The iteration on a batch that is there already, made as `Stage` makes it for the program.

        As a graph; in the ``way`` "both" also kernel by kernel.
        """
        options = Options(gpus=self._gpus, precision=precision)  # type: ignore[arg-type]
        self._make_ready(options)
        solver, ranks = _stage(batch, 1), Ranks(self._device)
        with self._inputs(solver, 1, "cpu") as inputs:
            net = Net(
                solver.train_net,
                TRAIN,
                solver.dialect,
                where=str(solver.train_file),
                seed=1,
                device=self._device,
                data_shapes=inputs.shapes,
                fused=True,
            )
            inputs.fit(net)
            ready = _Ready(inputs)
        optimizer = solver_class(solver.parameters, str(solver.path))(
            net.learnables, solver.parameters, dialect=solver.dialect, capturable=self._on_gpu
        )
        Statistics(net, ranks, options.bn_stats)
        pruner = TorchPruner(
            net,
            print,
            sparse=None,
            max_iter=solver.parameters.max_iter,
            inner_products=False,
            unchanged=solver.frozen_layers(),
            history={id(blob): state["history"] for blob, state in optimizer.state.items()},
        )
        found: dict[str, Any] = {}
        for name, graph in (("images/s", True), ("eager", False)):
            if not graph and way != "both":
                continue
            iterate = Iteration(
                *(net, ready, optimizer, pruner, ranks),  # type: ignore[arg-type]
                seed=1,
                passes=1,
                precision=precision,
                graph=graph,
            )
            found[name] = 1000 * batch / self._milliseconds(lambda: iterate(0, 0.01))  # noqa: B023
            found.setdefault("GiB", self._peak())
        return found

    def by_hand(self, precision: str, batch: int, way: str) -> dict[str, Any]:
        """The same network as one writes it in torch.nn: eager, as a graph, or compiled and as a graph."""
        self._make_ready(Options(gpus=self._gpus, precision=precision))  # type: ignore[arg-type]
        net = _network(self._device)
        optimizer = torch.optim.SGD(
            net.parameters(), torch.tensor(0.01, device=self._device), 0.9, weight_decay=1e-4, fused=True
        )
        images = torch.randint(0, 255, (batch, 3, 224, 224), device=self._device, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(1000, (batch,), device=self._device)
        forward: Any = torch.compile(net) if way == "compiled" else net

        def iterate() -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast(self._device, precision):
                loss = F.cross_entropy(forward(images.float() - 128), labels)
            loss.backward()
            optimizer.step()

        run: Callable[[], object] = iterate
        if way != "eager" and self._on_gpu:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(4):
                    iterate()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iterate()
            run = graph.replay
        found = {"images/s": 1000 * batch / self._milliseconds(run), "GiB": self._peak()}
        if way == "compiled":
            torch.compiler.reset()  # what it keeps
        return found

    def feed(self, precision: str, batch: int, way: str) -> dict[str, Any]:
        """Decoding and copying alone."""
        self._make_ready(Options(gpus=self._gpus))
        workers = default_workers(self._device)
        count = max(FED // batch, 10) if self._on_gpu else 3
        with self._inputs(_stage(batch, 1), workers, way) as inputs:
            inputs.start_at(0)
            for _ in range(4 * workers + 5 if self._on_gpu else 1):  # what was read ahead
                inputs.raw()
            self._wait()
            started = time.perf_counter()
            for _ in range(count):
                inputs.raw()
            self._wait()
            speed = count * batch / (time.perf_counter() - started)
            return {"images/s": speed, "notes": inputs.notes}

    def end_to_end(self, precision: str, batch: int, way: str) -> dict[str, Any]:
        """The program that users run, between the third line of its log and the last.

        Its memory is what it takes of the card as a whole, PyTorch's cache and CUDA's own part included.
        """
        iterations = max(END_TO_END[precision] // batch, 60) if self._on_gpu else 8
        _stage(batch, iterations)
        command = [*PROGRAM, "train", "-solver", "net/solver.prototxt", "-precision", precision]
        command += ["-gpu", "0", "-decode", way] if self._on_gpu else []
        _free()
        before, most = self._taken(), 0.0
        log = Path("train.log")
        with log.open("w") as file:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
            trainer = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )
            while trainer.poll() is None:
                most = max(most, self._taken() - before)
                time.sleep(0.1)
        said = log.read_text(errors="replace")
        times = re.findall(r"(\d\d:\d\d:\d\d\.\d{6}) .*\] Iteration (\d+) \(", said)
        if trainer.returncode != 0 or len(times) < 4:
            raise RunFailed(f"the training failed: {_last_words(said)}")
        (first, begin), (last, end) = times[2], times[-1]
        spent = datetime.strptime(last, "%H:%M:%S.%f") - datetime.strptime(first, "%H:%M:%S.%f")
        seconds = spent.total_seconds() % 86400
        found: dict[str, Any] = {"images/s": batch * (int(end) - int(begin)) / seconds}
        return {**found, "GiB of the card": most} if most else found

    def _make_ready(self, options: Options) -> None:
        """As the program does; and nothing of the row before is left."""
        _free()
        device_of_rank(self._gpus, options)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self._on_gpu else None

    def _taken(self) -> float:
        """GiB of the card that are not free."""
        if not self._on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return float(total - free) / 2**30

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _milliseconds(self, run: Callable[[], object], warm_up: int = WARM_UP) -> float:
        """The time of ``run``, on average."""
        for _ in range(warm_up if self._on_gpu else 1):
            run()
        first = self._seconds(run, 1)
        times = min(max(int(SECONDS / first), LEAST), MOST) if self._on_gpu else 1
        return 1000 * self._seconds(run, times) / times

    def _seconds(self, run: Callable[[], object], times: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(times):
            run()
        self._wait()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def _inputs(self, solver: SolverFile, workers: int, decode: str) -> Iterator[Inputs]:
        with Inputs(
            solver.train_net,
            TRAIN,
            str(solver.train_file),
            device=self._device,
            seed=1,
            workers=workers,
            decode=decode,  # type: ignore[arg-type]
        ) as inputs:
            yield inputs


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _last_words(log: str) -> str:
    """Of a training that failed: its fatal line, or else the last one."""
    lines = [line for line in log.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4,8} ", line)]
    return (fatal or lines or ["it said nothing"])[-1]


class _Ready:
    """Inputs whose batch is always the same one, on the card."""

    def __init__(self, inputs: Inputs) -> None:
        inputs.start_at(0)
        self._batch = [RawBatch(*(part.clone() for part in batch)) for batch in inputs.raw()]
        self.transformed = inputs.transformed
        self.shapes = inputs.shapes

    def raw(self) -> list[RawBatch]:
        return self._batch


def _network(device: torch.device) -> nn.Module:
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
    return net.to(device).to(memory_format=torch.channels_last)


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


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(run_command("bench/parts/gpu_rows", main))
