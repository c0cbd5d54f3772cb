"""The engine on PyTorch: the same prototxts, logs and snapshots without a Caffe, in either dialect.

All that a stage needs (thresholds, frozen zeros, the hand-over) is one command, on any number of GPUs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import (
    DevicePlan,
    EngineInfo,
    ImageShape,
    Precision,
    StageFiles,
    TestJob,
    TrainJob,
    gpu_arguments,
    sparse_arguments,
)
from caffe_jacinto.engines.snapshots import final_is_complete, is_handed_over
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.model import SparseSettings, Stage

PROGRAM = "caffe_jacinto.engines.pytorch"


class TorchEngine:
    """`caffe-torch`, the program in ``engines/torch/``."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """As asked for: zeros are the same on all GPUs."""
        return DevicePlan(gpus, iter_size, None)

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        return []

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        command = [*self._program("train"), "-solver", str(job.solver)]
        if job.snapshot is not None:
            command += ["-snapshot", str(job.snapshot)]
        elif job.weights is not None:
            command += ["-weights", str(job.weights)]
        command += ["-reestimate_batches", str(job.reestimate_batches)]
        if self.info.dialect is Dialect.BVLC:  # the fork's solver file says the rest itself
            if job.sparse:
                command += sparse_arguments(job.sparse)
            elif job.freeze_zeros:
                command += ["-freeze_zeros"]
        return [command + gpu_arguments(job.gpus)]

    def finished(self, job: TrainJob) -> bool:
        """Whether the final snapshot is complete and handed over."""
        return final_is_complete(job.final_weights, self.info.dialect) and is_handed_over(job.final_weights)

    def test_command(self, job: TestJob) -> list[str]:
        command = [*self._program("test"), "-model", str(job.model), "-weights", str(job.weights)]
        return [*command, "-iterations", str(job.iterations), *gpu_arguments(job.gpus[:1])]

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        """None: snapshots hold the factor."""
        return None

    def _program(self, action: str) -> list[str]:
        command = [str(self.info.executable), "-m", PROGRAM, action, "-dialect", self.info.dialect.value]
        return command if self.info.precision == "fp32" else [*command, "-precision", self.info.precision]


def describe_torch(dialect: Dialect, precision: Precision = "fp32") -> EngineInfo:
    """What the PyTorch of this Python is; nothing of it is run, which would take seconds.

    Raises:
        UserError: there is none.
    """
    found = util.find_spec("torch")
    if found is None or found.origin is None:
        raise UserError(
            f"--engine torch: {sys.executable} has no PyTorch; install it: "
            f"{sys.executable} -m pip install 'caffe-jacinto[torch]'"
        )
    gpu = _is_built_for_gpus(Path(found.origin).with_name("version.py"))
    return EngineInfo(
        kind="torch",
        executable=Path(sys.executable),
        version=metadata.version("torch"),
        dialect=dialect,
        gpu=gpu,
        multi_gpu=gpu,
        begins_data_again=False,
        own_rule=True,
        pycaffe=None,
        notes=(),
        precision=precision,
    )


def has_torch() -> bool:
    """Whether this Python has PyTorch."""
    return util.find_spec("torch") is not None


def _is_built_for_gpus(version_file: Path) -> bool:
    """Whether PyTorch's own record of its build names CUDA, or AMD's HIP."""
    try:
        text = version_file.read_text()
    except OSError:
        return False
    return re.search(r"^(?:cuda|hip)\b[^=]*= *'", text, re.MULTILINE) is not None
