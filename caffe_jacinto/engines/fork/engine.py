"""The fork: ``caffe train`` for every stage, pruning by its own solver fields.

It runs on CUDA devices only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

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
    not_of_this_caffe,
    stage_solver,
    unwritable,
)
from caffe_jacinto.engines.snapshots import final_is_complete
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.pruning.schedule import is_step, next_factor
from caffe_jacinto.quantization.fork_settings import fields_of
from caffe_jacinto.quantization.network import computed_together
from caffe_jacinto.quantization.schemes import SCHEMES, Scheme, chosen_scheme
from caffe_jacinto.recipes.model import QuantizeSettings, SparseSettings, Stage

VAL = "val.prototxt"

_NOT_IN_THE_FORK = (
    *("bits_of", "ranges", "weight_ranges", "percentile", "bias_correction", "sensitivity", "input_shift"),
)
"""Settings of a quantization that its test network has no field for."""


class CaffeJacintoEngine:
    """caffe-jacinto (on NVCaffe 0.16 or 0.17)."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """As requested: the fork divides a batch among its GPUs in every stage."""
        return DevicePlan(gpus, iter_size, None)

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        """Whether the prototxts parse in its schema; nothing of it runs without its GPUs."""
        problems: list[str] = []
        for files in stages.values():
            try:
                solver = stage_solver(files, self.info.dialect)
                solver.pruning()
            except UserError as error:
                problems.append(str(error))
                continue
            found = [*unwritable(solver), *not_of_this_caffe(solver)]
            problems += [line for line in found if line not in problems]
        return problems

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        return [caffe_train(self.info.executable, job)]

    def finished(self, job: TrainJob) -> bool:
        return final_is_complete(job.final_weights, self.info.dialect)

    def test_command(self, job: TestJob) -> list[str]:
        return caffe_test(self.info.executable, job)

    def quantization(self, settings: QuantizeSettings) -> Scheme:
        """Always its own, with the bits that are requested, and with powers of two where those are."""
        for key in _NOT_IN_THE_FORK:
            if getattr(settings, key) not in (None, False, {}):
                raise UserError(
                    f"{key}: caffe-jacinto's own quantized test has no field for it; remove it, and quantize "
                    "the finished run by python -m caffe_jacinto.quantize"
                )
        own = chosen_scheme({**settings.model_dump(), "scheme": "caffe_jacinto"})
        return replace(own, power_of_two=SCHEMES[settings.scheme].power_of_two)

    def quantize_files(self, settings: QuantizeSettings, files: StageFiles) -> dict[str, str]:
        """The test network with `quantize: true`.

        Its `ignored_layer_names` ignore a layer alone; `keep_float`, all that is computed together with it.
        """
        scheme, net = self.quantization(settings), parse_net(files[VAL], self.info.dialect, VAL)
        ignored = computed_together(scheme, messages_in(net, TEST), settings.keep_float, VAL)
        fields = fields_of(scheme, ignored)
        return {VAL: f"{fields}{files[VAL]}"}

    def quantize_command(self, job: QuantizeJob) -> list[str]:
        """Its own test, whose ranges follow the images that it tests."""
        return self.test_command(replace(job.test, model=job.folder / VAL))

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        return fork_start_factor(sparse, iteration, log)


def fork_start_factor(sparse: SparseSettings, iteration: int, log: str) -> float:
    """The factor that the fork had reached at its snapshot of ``iteration``, which does not hold it.

    It is read from the stage's ``log`` (of several runs, one after the other), up to the line that reports
    this snapshot. Without that line the steps are counted. The count is right as long as the target was not
    reached; after that the factor no longer matters, since zeros stay and no threshold follows.
    """
    factor = sparse.start_factor
    reached = None
    event = re.compile(
        r"^sparsity_start_factor: (?P<start>\S+)"
        r"|\] Initializing solver from (?P<fresh>parameters)"
        r"|\] Finding and applying sparsity: (?P<applied>\S+)"
        rf"|\] Snapshotting to (?:binary proto|HDF5) file .*_iter_(?P<snapshot>{iteration})\.caffemodel",
        re.MULTILINE,
    )
    for found in event.finditer(log):
        if found["fresh"]:
            factor = 0.0  # the schema's default, where the solver's text has no other
        elif found["snapshot"]:
            reached = factor
        else:
            factor = float(found["start"] or found["applied"])
    if reached is not None:
        return reached
    factor = sparse.start_factor
    for step in range(iteration):
        if is_step(sparse, step):
            factor = next_factor(sparse, factor, 0.0) or factor
    return factor
