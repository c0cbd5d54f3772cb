"""The argument lists of the ``caffe`` executable, the same for stock Caffe and the fork."""

from __future__ import annotations

from pathlib import Path

from caffe_jacinto.engines.contract import TestJob, TrainJob
from caffe_jacinto.errors import UserError


def caffe_train(executable: Path, job: TrainJob) -> list[str]:
    """``caffe train`` for ``job``.

    Raises:
        UserError: the path of the weights has a comma, which Caffe takes for the end of one of several paths.
    """
    command = [str(executable), "train", "-solver", str(job.solver)]
    if job.snapshot is not None:
        command += ["-snapshot", str(job.snapshot)]
    elif job.weights is not None:
        if "," in str(job.weights):
            raise UserError(
                f"{job.weights}: Caffe splits the paths of weights at commas; rename the file or its folder"
            )
        command += ["-weights", str(job.weights)]
    return command + gpu_arguments(job.gpus)


def caffe_test(executable: Path, job: TestJob) -> list[str]:
    """``caffe test`` for ``job``; it runs on one device, the first."""
    command = [str(executable), "test", "-model", str(job.model), "-weights", str(job.weights)]
    return [*command, "-iterations", str(job.iterations), *gpu_arguments(job.gpus[:1])]


def gpu_arguments(gpus: tuple[int, ...]) -> list[str]:
    """``-gpu 0,1``, or nothing for the CPU."""
    return ["-gpu", ",".join(map(str, gpus))] if gpus else []
