"""The argument lists of the ``caffe`` executable, the same for all engines, and of what it lacks."""

from __future__ import annotations

from pathlib import Path

from caffe_jacinto.engines.contract import TestJob, TrainJob
from caffe_jacinto.errors import UserError
from caffe_jacinto.recipes.model import SparseSettings


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


def sparse_arguments(sparse: SparseSettings) -> list[str]:
    """What stock Caffe's solver has no fields for, named as the fork's; of ``by`` it has none."""
    values = {
        "sparsity_target": sparse.target,
        "sparsity_start_iter": sparse.start_iter,
        "sparsity_step_iter": sparse.step_iter,
        "sparsity_step_factor": sparse.step_factor,
        "sparsity_start_factor": sparse.start_factor,
        "sparsity_by": sparse.by,
        "sparsity_threshold_maxratio": sparse.threshold_maxratio,
        "sparsity_threshold_value_max": sparse.threshold_value_max,
        "display_sparsity": sparse.display,
    }
    return [part for name, value in values.items() for part in (f"-{name}", str(value))]
