"""The engine on PyTorch: the same prototxts, logs and snapshots without a Caffe, in either dialect.

A stage is one command of `caffe-torch`, whatever it needs: pruning, recalibration, several GPUs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.processes import describe_exit
from caffe_jacinto.engines.contract import (
    DevicePlan,
    EngineInfo,
    ImageShape,
    Precision,
    QuantizeJob,
    StageFiles,
    TestJob,
    TrainJob,
    gpu_arguments,
    pruning_arguments,
    quantization_arguments,
    quantize_arguments,
    recalibration_arguments,
    test_arguments,
)
from caffe_jacinto.engines.snapshots import final_is_complete, is_marked_complete
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.schemes import Scheme, chosen_scheme
from caffe_jacinto.quantization.settling import has_ranges
from caffe_jacinto.recipes.model import QuantizeSettings, SparseSettings, Stage

PROGRAM = "caffe_jacinto.engines.pytorch"

DecodeChoice = Literal["cpu", "gpu", "both", "auto"]

GPU_SECONDS = 120
"""Longest time to wait for PyTorch's first result on GPUs, the start of their driver included."""


@dataclass
class Options:
    """The arguments of `caffe-torch`, with their defaults; not all of them belong to each action."""

    action: str = ""
    solver: Path = Path()
    model: Path = Path()
    weights: tuple[Path, ...] = ()
    """Start from these, the later ones over the earlier; or evaluate them."""

    snapshot: Path | None = None
    """Resume from this ``.solverstate``."""

    gpus: tuple[int, ...] | None = ()
    """Empty: the CPU; None: all GPUs."""

    nodes: int = 1
    cpu_ranks: int = 1
    """Machines that train together, and processes on the CPU of each where it has no GPUs to use."""

    dialect: Dialect = Dialect.BVLC
    precision: Precision = "fp32"
    workers: int | None = None
    """Processes that decode images, for each rank; None: as many as suit the machine."""

    shuffle: bool = False
    """Another order of the images in each epoch, even if the prototxt does not say so."""

    sparse: SparseSettings | None = None
    """Prune, where the dialect's solver file has no fields for it."""

    quantize: QuantizeSettings | None = None
    """Train in quantized values."""

    freeze_zeros: bool = False
    sparsity_inner_products: bool = False
    """With ``freeze_zeros``: hold the zeros of inner products, too."""

    graph: bool = True
    """On one GPU, record an iteration and replay it."""

    deterministic: bool = False
    """On a GPU, use algorithms that give the same bits each time."""

    decode: DecodeChoice = "auto"
    """Where images of the training are decoded; auto: where it measures faster."""

    bn_stats: Literal["mean", "first"] = "mean"
    """Which batch-norm statistics of several ranks are tested and saved."""

    reestimate_batches: int = 0
    recalibrate_tests: bool = False
    iterations: int = 50
    display_sparsity: bool = False
    level: int = 0
    stage: tuple[str, ...] = ()
    """With ``level``: the state of the network that is evaluated."""


NOTHING_DONE = "nothing was trained; start the same command again"
"""How to go on after a failure before the first iteration of a command."""


class TorchEngine:
    """The program `caffe-torch`, in this folder."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """As requested: zeros are the same on all GPUs."""
        return DevicePlan(gpus, iter_size, None)

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        """As `stage_check.check_stages` finds, in a process of its own: this one does not import PyTorch."""
        command = [str(self.info.executable), "-m", PROGRAM, "check", "-dialect", self.info.dialect.value]
        content = {
            "stages": {name: dict(files) for name, files in stages.items()},
            "images": dict(image_shapes),
        }
        ran = subprocess.run(command, input=json.dumps(content), capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            last = ran.stderr.strip()[-500:] or describe_exit(ran.returncode)
            raise RunFailed(f"the check of the networks failed ({' '.join(command)}): {last}; {NOTHING_DONE}")
        problems: list[str] = json.loads(ran.stdout)
        return problems

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        # Quantized values are computed in fp32, whatever the other stages compute in.
        command = [*self._program("train", job.quantize is None), "-solver", str(job.solver)]
        if job.snapshot is not None:
            command += ["-snapshot", str(job.snapshot)]
        elif job.weights is not None:
            command += ["-weights", str(job.weights)]
        command += recalibration_arguments(job)
        if self.info.dialect is Dialect.BVLC:  # the fork's solver file says the rest itself
            command += pruning_arguments(job)
        command += quantization_arguments(job)
        if job.nodes > 1:
            command += ["-nodes", str(job.nodes)]
        if job.cpu_ranks > 1 and not job.gpus:
            command += ["-cpu_ranks", str(job.cpu_ranks)]
        return [command + gpu_arguments(job.gpus)]

    def finished(self, job: TrainJob) -> bool:
        """Whether the final snapshot is complete and, if statistics are recalibrated, marked so; and in
        quantization-aware training, whether its ranges are beside it."""
        final = job.final_weights
        if not final_is_complete(final, self.info.dialect):
            return False
        if job.quantize is not None:
            return has_ranges(final)
        return job.reestimate_batches == 0 or is_marked_complete(final)

    def test_command(self, job: TestJob) -> list[str]:
        command = [*self._program("test"), "-model", str(job.model), "-weights", str(job.weights)]
        return [*command, *test_arguments(job)]

    def quantization(self, settings: QuantizeSettings) -> Scheme:
        """As requested."""
        return chosen_scheme(settings.model_dump())

    def quantize_files(self, settings: QuantizeSettings, files: StageFiles) -> dict[str, str]:
        """None: the command reads those of the trained stage."""
        return {}

    def quantize_command(self, job: QuantizeJob) -> list[str]:
        """On the GPUs of the test."""
        gpus = ["--gpus", ",".join(map(str, job.test.gpus))] if job.test.gpus else []
        return [str(self.info.executable), *quantize_arguments(job), *gpus]

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        """None: snapshots hold the factor."""
        return None

    def _program(self, action: str, with_precision: bool = True) -> list[str]:
        command = [str(self.info.executable), "-m", PROGRAM, action, "-dialect", self.info.dialect.value]
        if self.info.precision == "fp32" or not with_precision:
            return command
        return [*command, "-precision", self.info.precision]


def describe_torch(dialect: Dialect, precision: Precision = "fp32") -> EngineInfo:
    """What the PyTorch of this Python is, without importing it, which takes seconds.

    Raises:
        UserError: there is none.
    """
    found = util.find_spec("torch")
    if found is None or found.origin is None:
        raise UserError(
            f"--engine torch: {sys.executable} has no PyTorch; install it: "
            f"{sys.executable} -m pip install 'caffe-jacinto[torch]'"
        )
    cuda, hip = built_for(Path(found.origin).with_name("version.py"))
    return EngineInfo(
        kind="torch",
        executable=Path(sys.executable),
        version=metadata.version("torch"),
        dialect=dialect,
        gpu=bool(cuda or hip),
        multi_gpu=bool(cuda or hip),
        begins_data_again=False,
        own_rule=True,
        pycaffe=None,
        notes=(),
        precision=precision,
        maker="AMD" if hip else "NVIDIA",
        cuda=cuda,
    )


def has_torch() -> bool:
    """Whether this Python has PyTorch."""
    return util.find_spec("torch") is not None


def refused_gpus(gpus: tuple[int, ...]) -> str | None:
    """Why PyTorch itself cannot compute on these GPUs, in one line; None if it can.

    Asked in a process of its own, since this one does not import PyTorch.
    """
    command = [sys.executable, "-m", PROGRAM, "device_query", *gpu_arguments(gpus)]
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GPU_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it has not computed anything on them in {GPU_SECONDS} s"
    if ran.returncode == 0:
        return None
    lines = ran.stderr.strip().splitlines()
    return lines[-1].removeprefix("caffe-torch: error: ") if lines else f"exit code {ran.returncode}"


def built_for(version_file: Path) -> tuple[tuple[int, int] | None, bool]:
    """What PyTorch's ``version.py`` says of its build: the CUDA version, and whether it is for AMD's HIP."""
    try:
        text = version_file.read_text()
    except OSError:
        return None, False
    cuda = re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", text, re.MULTILINE)
    hip = re.search(r"^hip\b[^=]*= *'", text, re.MULTILINE)
    return (int(cuda[1]), int(cuda[2])) if cuda else None, hip is not None
