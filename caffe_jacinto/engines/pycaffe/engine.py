"""Stock Caffe 1.0: ``caffe train``, or its solver stepped through pycaffe in stages that hold zeros.

Batch-norm statistics are recalibrated at the end of every stage: they lag behind weights that change fast.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caffe_jacinto.caffemodel.hdf5 import without_suffix
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import (
    DevicePlan,
    EngineInfo,
    ImageShape,
    QuantizeJob,
    StageFiles,
    TestJob,
    TrainJob,
    caffe_test,
    caffe_train,
    gpu_arguments,
    image_shape,
    not_of_this_caffe,
    pruning_arguments,
    quantize_arguments,
    recalibration_arguments,
    stage_solver,
    unwritable,
)
from caffe_jacinto.engines.snapshots import final_is_complete, is_marked_complete
from caffe_jacinto.prototxt.solver import SolverFile
from caffe_jacinto.quantization.schemes import Scheme, chosen_scheme
from caffe_jacinto.recipes.model import QuantizeSettings, SparseSettings, Stage

TRIAL_SECONDS = 60
"""Longest time to wait for Caffe to build a stage's networks."""


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
        """What Caffe says when it builds their solvers and networks, for a batch of one image, on the CPU.

        A network is not built if the size of its images is not known.
        """
        problems: dict[str, None] = {}
        seen = set()
        with tempfile.TemporaryDirectory() as name:
            for files in stages.values():
                try:
                    solver = stage_solver(files, self.info.dialect)
                except UserError as error:
                    problems[str(error)] = None
                    continue
                unknown = [*unwritable(solver), *not_of_this_caffe(solver)]
                problems.update(dict.fromkeys(unknown))
                if unknown:
                    continue
                trial = _write_trial(solver, image_shapes, Path(name))
                if trial is not None and trial not in seen:
                    seen.add(trial)
                    trouble = self._trouble(Path(name) / "solver.prototxt")
                    if trouble:
                        place = _place_of_trouble(trouble, solver)
                        why = _why(trouble)
                        problems[f"{place}: {self.info.executable} refuses it: {why}"] = None
        return list(problems)

    def _trouble(self, solver: Path) -> str | None:
        """What Caffe prints when it aborts at building ``solver``; None if it does not."""
        command = [str(self.info.executable), "train", "-solver", str(solver)]
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=TRIAL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return None  # not refused, only slow
        return None if ran.returncode == 0 else ran.stderr.strip() or f"exit code {ran.returncode}"

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        """``caffe train`` and then the recalibration, or the stepper, which does both.

        Only the recalibration if the snapshot is the final one.
        """
        final = without_suffix(job.final_weights).stem
        if job.snapshot is not None and without_suffix(job.snapshot).stem == final:
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

    def quantization(self, settings: QuantizeSettings) -> Scheme:
        """As requested, but for ranges that move."""
        scheme = chosen_scheme(settings.model_dump())
        if scheme.moving is not None:
            raise UserError(
                f'scheme: "{scheme.name}" is for PyTorch and caffe-jacinto only; choose another one'
            )
        return scheme

    def quantize_files(self, settings: QuantizeSettings, files: StageFiles) -> dict[str, str]:
        """None: the command reads those of the trained stage."""
        return {}

    def quantize_command(self, job: QuantizeJob) -> list[str]:
        """Through pycaffe, on the CPU."""
        self._pycaffe("quantizing needs pycaffe", "remove the stage that quantizes")
        executable = str(self.info.executable)
        return [sys.executable, *quantize_arguments(job), "--backend", "caffe", "--caffe", executable]

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

    def _pycaffe(
        self,
        what: str = "holding zeros and recalibrating batch-norm statistics need pycaffe",
        without: str = "training.reestimate_batches=0 leaves the statistics as they are",
    ) -> Path:
        if self.info.pycaffe is None:
            raise UserError(
                f"{what}, and {self.info.executable} has none that {sys.executable} can import "
                f"({'; '.join(self.info.notes)}): build it, or run tools/utils/install_caffe.sh; {without}"
            )
        return self.info.pycaffe


def _why(printed: str) -> str:
    """The reason in what Caffe has printed: its fatal line, or what the Python of a Python layer says."""
    fatal = re.search(r"^F\d{4,8} .*?\] (.+)", printed, re.MULTILINE)
    if fatal is not None:
        return fatal[1].strip()
    own = re.compile(r"[IWE]\d{4,8} |\s+@ |\*\*\* |PC: @|terminate called|\s*$")
    lines = printed.splitlines()
    said = [line for line in lines if not own.match(line)]
    return (said or lines)[-1].strip()


def _place_of_trouble(printed: str, solver: SolverFile) -> str:
    """``FILE: layer NAME (TYPE)`` of the layer that Caffe was building, or the solver's path."""
    built = re.split(r"\] Creating (?:training|test) net\b", printed)[1:]
    if not built:
        return str(solver.path)
    test = solver.tests[len(built) - 2] if len(built) > 1 else None
    file, net = (solver.train_file, solver.train_net) if test is None else (test.file, test.definition)
    if "] Network initialization done." in built[-1]:
        names = re.findall(r"weights from layer '(.+?)';", printed)  # Net::ShareTrainedLayersWith
    else:
        names = re.findall(r"\] Creating [Ll]ayer (.+)", built[-1])
    types = [layer.type for layer in net.layer if names and layer.name == names[-1].rstrip()]
    return f"{file}: layer {names[-1].rstrip()} ({types[0]})" if types else str(solver.path)


def _write_trial(
    solver: SolverFile, image_shapes: Mapping[str, ImageShape], folder: Path
) -> tuple[str, ...] | None:
    """Write a solver that builds the networks of ``solver`` without data and does nothing; its files' texts.

    None where the size of the images is not known.
    """
    from google.protobuf import text_format

    trial = type(solver.parameters)()
    trial.CopyFrom(solver.parameters)
    # What matters only in training would make stages differ that build the same.
    for field in ("net", "test_net", "test_iter", "base_lr", "power", "gamma", "stepsize", "stepvalue"):
        trial.ClearField(field)
    for field in ("weight_decay", "regularization_type", "snapshot", "display", "device_id", "iter_size"):
        trial.ClearField(field)
    trial.max_iter, trial.snapshot_after_train, trial.test_initialization = 0, False, False
    trial.base_lr, trial.snapshot_prefix, trial.solver_mode = 0.1, str(folder / "trial"), trial.CPU
    nets = {"train.prototxt": solver.train_net}
    nets.update({f"test{index}.prototxt": test.definition for index, test in enumerate(solver.tests)})
    for name, definition in nets.items():
        net = type(definition)()
        net.CopyFrom(definition)
        for layer in net.layer:
            shape = image_shape(layer, image_shapes) if layer.type == "Data" else ()
            if shape is None:
                return None
            if shape:
                _replace_data(layer, shape)
        (folder / name).write_text(text_format.MessageToString(net, as_utf8=True), encoding="utf-8")
    trial.train_net = str(folder / "train.prototxt")
    for index in range(len(solver.tests)):
        trial.test_net.append(str(folder / f"test{index}.prototxt"))
        trial.test_iter.append(1)
    if solver.tests:
        trial.test_interval = 1
    text = text_format.MessageToString(trial, as_utf8=True)
    (folder / "solver.prototxt").write_text(text, encoding="utf-8")
    return (text, *((folder / name).read_text(encoding="utf-8") for name in nets))


def _replace_data(layer: Any, shape: ImageShape) -> None:
    """Make a Data layer one that gives zeros, a single image's."""
    layer.type = "DummyData"
    layer.ClearField("data_param")
    layer.ClearField("transform_param")
    for dims in [(1, *shape), (1,)][: len(layer.top)]:
        layer.dummy_data_param.shape.add().dim.extend(dims)
