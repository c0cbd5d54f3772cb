"""The fork: ``caffe train`` for every stage, pruning by its own solver fields.

It runs on CUDA devices only.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    stage_solver,
)
from caffe_jacinto.engines.snapshots import final_is_complete
from caffe_jacinto.pruning.rule import fork_start_factor
from caffe_jacinto.recipes.model import SparseSettings, Stage


class CaffeJacintoEngine:
    """caffe-jacinto (on NVCaffe 0.16 or 0.17)."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """As requested: the fork divides a batch among its GPUs in every stage."""
        return DevicePlan(gpus, iter_size, None)

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        """Whether the prototxts parse in its schema; nothing of it runs without its GPUs."""
        problems = []
        for files in stages.values():
            try:
                stage_solver(files, self.info.dialect).pruning()
            except UserError as error:
                problems.append(str(error))
        return problems

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        return [caffe_train(self.info.executable, job)]

    def finished(self, job: TrainJob) -> bool:
        return final_is_complete(job.final_weights, self.info.dialect)

    def test_command(self, job: TestJob) -> list[str]:
        return caffe_test(self.info.executable, job)

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        return fork_start_factor(sparse, iteration, log)
