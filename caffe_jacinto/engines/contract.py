"""The contract of the engines: what is asked of a Caffe, whichever kind it is.

An engine turns a job into commands (argument lists, never shell text). Whoever holds the job runs them one
after the other and asks `Engine.finished` how it ended: Caffe exits with 0 when it was interrupted, too, so
that an exit code alone does not say that a stage is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.model import SparseSettings, Stage

EngineKind = Literal["bvlc", "caffe-jacinto", "torch"]

Precision = Literal["fp32", "bf16"]
"""What convolutions and inner products compute in; weights, statistics and losses are fp32 in both."""

StageFiles = Mapping[str, str]
"""The texts of a stage's prototxts by file name, as `networks.stage_files` makes them."""

ImageShape = tuple[int, int, int]
"""Channels, height and width."""


@dataclass(frozen=True)
class EngineInfo:
    """What is known of a Caffe that was found."""

    kind: EngineKind
    executable: Path
    """The ``caffe`` program; of the engine on PyTorch, the Python that runs it."""

    version: str | None
    """As the executable itself says it, e.g. ``1.0.0``; None if it says nothing of the kind."""

    dialect: Dialect
    gpu: bool
    """False: built for the CPU only."""

    multi_gpu: bool
    """Can train on several GPUs at once (stock Caffe: built with NCCL)."""

    begins_data_again: bool
    """Reads its training LMDB from the beginning after a resume."""

    own_rule: bool
    """Zeros are taken and counted, and statistics re-estimated, by this project's code, not by the fork's."""

    pycaffe: Path | None
    """The folder to put on ``sys.path`` for ``import caffe``; None if this Python can import none."""

    notes: tuple[str, ...]
    """What the user should know of it, one line each."""

    precision: Precision = "fp32"
    """bf16: only on PyTorch."""


@dataclass(frozen=True)
class DevicePlan:
    """The devices a stage really runs on, and the passes behind one update there."""

    gpus: tuple[int, ...]
    """Empty: the CPU."""

    iter_size: int
    note: str | None
    """Why this is not what was asked for; None if it is."""


@dataclass(frozen=True)
class TrainJob:
    """One stage to train. Paths may be relative to the folder that the commands run in."""

    solver: Path
    weights: Path | None
    """Start from these weights; None with ``snapshot`` None: from random ones."""

    snapshot: Path | None
    """Go on from this ``.solverstate``; ``weights`` is not used then."""

    gpus: tuple[int, ...]
    final_weights: Path
    """The ``<prefix>_iter_<max_iter>.caffemodel`` that the stage ends with."""

    sparse: SparseSettings | None
    freeze_zeros: bool
    """Hold the convolutions' zeros of ``weights`` at zero."""

    reestimate_batches: int
    """Training batches to recalibrate batch-norm statistics over; 0: do not (the fork never does)."""

    recalibrate_tests: bool = False
    """Recalibrate a copy of the statistics before each scheduled test, too."""


@dataclass(frozen=True)
class TestJob:
    """Weights to score with a network's own accuracy layers."""

    __test__ = False  # its name is no sign for pytest

    model: Path
    weights: Path
    iterations: int
    gpus: tuple[int, ...]


class Engine(Protocol):
    """A Caffe that carries out stages."""

    @property
    def info(self) -> EngineInfo: ...

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """Where ``stage`` runs when the recipe asks for ``gpus`` and ``iter_size`` passes an update."""
        ...

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        """What this engine would refuse in ``stages`` when they begin: one line for each problem, in order.

        ``stages`` has the prototxts of each stage by its name; none of them need exist as files.
        ``image_shapes`` has the channels, height and width of the images in each LMDB that could be read, by
        the path that the prototxts give.
        """
        ...

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        """The commands that train the stage, in order; the next runs only after the one before exits with 0.

        Raises:
            UserError: this engine cannot do the job (for one, a sparse stage without pycaffe).
        """
        ...

    def finished(self, job: TrainJob) -> bool:
        """Whether the stage's final weights are there, whole, and ready to be handed over."""
        ...

    def test_command(self, job: TestJob) -> list[str]: ...

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        """``sparsity_start_factor`` for a solver file that goes on from the snapshot of ``iteration``.

        ``log`` is what the stage has printed so far. None: the snapshot itself carries the place in the ramp.
        """
        ...


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
