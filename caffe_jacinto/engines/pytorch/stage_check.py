"""What training refuses, before anything is built or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import ImageShape, stage_solver
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.feed import expected_shapes
from caffe_jacinto.engines.pytorch.image_sizes import sized_nets
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.solver_fields import check_solver
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import TEST, TRAIN, SolverFile
from caffe_jacinto.quantization.fork_settings import tested_network

T = TypeVar("T")


def check_quantized(options: Options, solver: SolverFile) -> None:
    """Refuse what does not go with quantization-aware training.

    Raises:
        UserError: says what.
    """
    if options.dialect is not Dialect.BVLC:
        raise UserError(
            f"-quantize: prototxts of the dialect {Dialect.BVLC.value} are needed, and these are of "
            f"{options.dialect.value}"
        )
    if options.precision not in ("fp32", "auto"):
        raise UserError(
            f"-precision {options.precision}: with -quantize everything is computed in fp32, in which sums "
            "of whole numbers are exact; leave it out"
        )
    if options.reestimate_batches:
        raise UserError(
            "-reestimate_batches: with -quantize the running statistics of batch norms are folded into the "
            "weights as they are; leave it out"
        )
    if options.sparse is not None:
        raise UserError("-sparsity_target: prune before a training with -quantize, and hold its zeros")
    if solver.parameters.debug_info:
        raise UserError(
            f"{solver.path}: debug_info: with -quantize, layers are not computed one by one; leave it out"
        )
    if solver.parameters.ema_decay:
        raise UserError(
            f"{solver.path}: ema_decay: with -quantize, the ranges would be of other weights than their "
            "average; leave it out"
        )
    if solver.parameters.image_size:
        raise UserError(
            f"{solver.path}: image_size: with -quantize, the ranges would be of images of other sizes than "
            "in tests; leave it out"
        )
    if not options.weights and options.snapshot is None:
        raise UserError("-quantize: trained weights are needed to start from; give them with -weights")


def check_stages(
    stages: Mapping[str, Mapping[str, str]], images: Mapping[str, ImageShape], dialect: Dialect
) -> list[str]:
    """What training would refuse in stages whose prototxts these are: one line for each problem.

    ``images`` has the channels, height and width of the images in each LMDB that could be read.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            if str(error) not in problems:
                problems.append(str(error))
            return None

    def built(definition: Any, file: Path, phase: int) -> Net | None:
        """The network; None where the size of its images is not known."""
        where, settings = str(file), None
        if phase == TEST:
            definition, settings = tested_network(definition, dialect, where)
        shapes = expected_shapes(definition, phase, where, images)
        if shapes is None:
            return None
        net = Net(definition, phase, dialect, where=where, seed=0, data_shapes=shapes, filled=False)
        if settings is not None:
            settings.network(net.layers, {}, where)
        return net

    for files in stages.values():
        solver = attempt(partial(stage_solver, files, dialect))
        if solver is None:
            continue
        attempt(partial(check_solver, solver))
        net = attempt(partial(built, solver.train_net, solver.train_file, TRAIN))
        if net is not None:
            attempt(partial(sized_nets, solver, net, filled=False))
        for test in solver.tests:
            tested = attempt(partial(built, test.definition, test.file, TEST))
            if net is not None and tested is not None:
                attempt(partial(tested.share_with, net))
    return problems
