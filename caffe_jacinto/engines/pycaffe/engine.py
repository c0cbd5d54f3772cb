"""Stock Caffe 1.0: ``caffe train``, or its solver stepped through pycaffe in stages that hold zeros.

Batch-norm statistics are recalibrated at the end of every stage: they lag behind weights that change fast.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import (
    DevicePlan,
    EngineInfo,
    ImageShape,
    StageFiles,
    TestJob,
    TrainJob,
    caffe_test,
    caffe_train,
    gpu_arguments,
    pruning_arguments,
    recalibration_arguments,
)
from caffe_jacinto.engines.snapshots import final_is_complete, is_marked_complete
from caffe_jacinto.recipes.model import SparseSettings, Stage


class BvlcEngine:
    """Stock Caffe, with pycaffe for sparsification."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """One device if zeros are held in place; more passes make up for the other GPUs."""
        if len(gpus) < 2 or not (stage.sparse or stage.freeze_zeros):
            return DevicePlan(gpus, iter_size, None)
        passes = iter_size * len(gpus)
        note = (
            f"stock Caffe holds zeros in place on one device: GPU {gpus[0]} takes the batch of "
            f"{len(gpus)} GPUs in {passes} passes instead of {iter_size}"
        )
        return DevicePlan(gpus[:1], passes, note)

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        return []

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        """``caffe train`` and then the recalibration, or the stepper, which does both.

        Only the recalibration if the snapshot is the final one.
        """
        if job.snapshot is not None and job.snapshot.stem == job.final_weights.stem:
            return [self._recalibrate(job)] if job.reestimate_batches else []
        if job.sparse or job.freeze_zeros:
            return [self._stepper(job)]
        training = caffe_train(self.info.executable, job)
        return [training, self._recalibrate(job)] if job.reestimate_batches else [training]

    def finished(self, job: TrainJob) -> bool:
        """Whether the final snapshot is complete and, if the job says so, recalibrated."""
        if not final_is_complete(job.final_weights, self.info.dialect):
            return False
        return job.reestimate_batches == 0 or is_marked_complete(job.final_weights)

    def test_command(self, job: TestJob) -> list[str]:
        return caffe_test(self.info.executable, job)

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        """None: the stepper's snapshots hold the factor."""
        return None

    def _recalibrate(self, job: TrainJob) -> list[str]:
        return [
            *self._python("recalibrate", job),
            *("-weights", str(job.final_weights), "-batches", str(job.reestimate_batches)),
            *gpu_arguments(job.gpus[:1]),
        ]

    def _stepper(self, job: TrainJob) -> list[str]:
        command = self._python("stepper", job)
        if job.snapshot is not None:
            command += ["-snapshot", str(job.snapshot)]
        elif job.weights is not None:
            command += ["-weights", str(job.weights)]
        command += [*recalibration_arguments(job), *pruning_arguments(job)]
        return command + gpu_arguments(job.gpus[:1])

    def _python(self, module: str, job: TrainJob) -> list[str]:
        return [
            *(sys.executable, "-m", f"caffe_jacinto.engines.pycaffe.{module}"),
            *("-pycaffe", str(self._pycaffe()), "-solver", str(job.solver)),
        ]

    def _pycaffe(self) -> Path:
        if self.info.pycaffe is None:
            raise UserError(
                "holding zeros and recalibrating batch-norm statistics need pycaffe, and "
                f"{self.info.executable} has none that {sys.executable} can import "
                f"({'; '.join(self.info.notes)}): build it, or run tools/utils/install_caffe.sh; "
                "training.reestimate_batches=0 leaves the statistics as they are"
            )
        return self.info.pycaffe
