"""The keys of a recipe: type, default and meaning of each (the guide is docs/recipes.md).

Types are strict: a string is never converted to a number, nor a number to a string.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from caffe_jacinto.common.errors import UserError

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38

PositiveInt = Annotated[int, Field(ge=1, le=INT32_MAX)]
NaturalInt = Annotated[int, Field(ge=0, le=INT32_MAX)]
PositiveFloat = Annotated[float, Field(gt=0, le=FLOAT32_MAX, allow_inf_nan=False)]
NaturalFloat = Annotated[float, Field(ge=0, le=FLOAT32_MAX, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
FileNamePart = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A string that becomes part of the names of files and folders."""

StageName = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]

RESERVED_STAGE_NAMES = ("test",)
"""Folders of a run that are not stages."""


def _none_if_empty(value: Any) -> Any:
    """TOML has no null: an empty string unsets an optional setting, so that an override can do it."""
    return None if value == "" else value


Optional = BeforeValidator(_none_if_empty)
OptionalText = Annotated[Text | None, Optional]
OptionalInt = Annotated[PositiveInt | None, Optional]
OptionalFloat = Annotated[PositiveFloat | None, Optional]
Ints = Field(strict=False)  # a TOML array is a list; its numbers are still strict


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSettings(_Settings):
    """The data set: LMDBs of images and their labels."""

    dataset: FileNamePart
    """Part of the names of the run folder and of the snapshots."""

    train_lmdb: Text
    val_lmdb: Text
    num_classes: Annotated[int, Field(ge=2, le=INT32_MAX)]
    mirror: bool = True
    """Mirror every other training image, at random."""

    mean_file: OptionalText = None
    """A .binaryproto with the mean image that is subtracted from every image, for networks that need one."""

    labels: OptionalText = None
    """A text file whose line N names class N; without it, ``labels.txt`` in the folder of ``train_lmdb``."""


class NetworkSettings(_Settings):
    """The network and its free parameters."""

    name: Text
    crop_size: PositiveInt
    """Height and width of the network's input, in pixels."""

    strides: Annotated[Annotated[tuple[PositiveInt, ...], Ints] | None, Optional] = None
    """Strides of the parts of the network, from the input on, where they can be chosen; by default, the
    published ones."""

    frozen: Annotated[tuple[Text, ...], Ints] = ()
    """Layers that keep their start weights; a convolution's batch norm is frozen with it."""

    head_lr_mult: PositiveFloat = 1.0
    """Learning rate of the last layer with weights, as a multiple of the published one."""

    @model_validator(mode="after")
    def _frozen_once(self) -> NetworkSettings:
        if len(set(self.frozen)) < len(self.frozen):
            raise _mistake(("frozen",), f"{list(self.frozen)} names a layer twice; name each once")
        return self


class TrainingSettings(_Settings):
    """Settings that all stages share."""

    batch_size: PositiveInt
    """The effective batch: images of one update of the weights, over all passes and GPUs."""

    iter_size: PositiveInt
    """Forward and backward passes whose gradients one update accumulates."""

    val_batch_size: PositiveInt = 50
    gpus: Annotated[tuple[NaturalInt, ...], Ints] = ()
    """Device numbers; empty is the CPU."""

    random_seed: Annotated[int, Field(ge=-1, le=INT32_MAX)] = 33
    """Seeds the initial weights, mirroring and cropping; -1 takes a different seed each time, as in Caffe."""

    keep: PositiveInt = 2
    """How many of the newest snapshots are kept, beside the best by top-1."""

    reestimate_batches: NaturalInt = 30
    """Training batches to recalibrate batch-norm statistics over (stock Caffe and PyTorch), at the end of a
    stage and before its scheduled tests; 0 leaves the running statistics."""

    recalibrate_tests: bool = True
    """Run the scheduled tests with recalibrated statistics (PyTorch; stock Caffe in stages that prune or hold
    zeros). Training itself is the same either way."""

    @model_validator(mode="after")
    def _gpus_once(self) -> TrainingSettings:
        if len(set(self.gpus)) < len(self.gpus):
            raise _mistake(("gpus",), f"{list(self.gpus)} names a GPU twice; name each once")
        return self


class SolverSettings(_Settings):
    """A stage's solver: Caffe's own names and meanings (SolverParameter)."""

    max_iter: PositiveInt
    base_lr: PositiveFloat
    lr_policy: Literal["fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid"] = "poly"
    power: NaturalFloat = 1.0
    gamma: OptionalFloat = None
    stepsize: OptionalInt = None
    stepvalue: Annotated[tuple[PositiveInt, ...], Ints] = ()
    momentum: Fraction = 0.9
    weight_decay: NaturalFloat
    regularization: Literal["L1", "L2"]
    test_interval: PositiveInt
    test_initialization: bool = True
    """Test before the first iteration, too."""

    snapshot: PositiveInt
    display: PositiveInt = 100
    type: Literal["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"] = "SGD"
    clip_gradients: OptionalFloat = None

    @model_validator(mode="after")
    def _policy_has_its_steps(self) -> SolverSettings:
        if self.lr_policy in ("step", "sigmoid") and self.stepsize is None:
            raise _mistake(("lr_policy",), f'"{self.lr_policy}" needs stepsize; add it beside lr_policy')
        if self.lr_policy == "multistep" and not self.stepvalue:
            raise _mistake(("lr_policy",), '"multistep" needs stepvalue, e.g. stepvalue = [1000, 2000]')
        if self.lr_policy not in ("fixed", "poly") and self.gamma is None:
            raise _mistake(
                ("lr_policy",), f'"{self.lr_policy}" needs gamma; add it beside lr_policy, e.g. gamma = 0.1'
            )
        if self.type in ("AdaGrad", "RMSProp") and self.momentum:
            raise _mistake(
                ("type",), f'Caffe\'s "{self.type}" takes no momentum; set momentum = 0.0 beside it'
            )
        if any(later <= earlier for earlier, later in zip(self.stepvalue, self.stepvalue[1:], strict=False)):
            raise _mistake(
                ("stepvalue",), f"{list(self.stepvalue)} does not grow; name the iterations in order"
            )
        return self


@dataclass(frozen=True)
class SparseField:
    """How a setting of a sparse stage is called outside of recipes."""

    name: str
    """The solver field of caffe-jacinto, and the command-line flag of our own programs."""

    help: str
    in_solver: bool = True
    """Whether caffe-jacinto's solver has the field; our programs have the flag in any case."""


class SparseSettings(_Settings):
    """The sparsity schedule and the caps of its thresholds.

    This is the one table of these settings. The flags of our own programs, the fields of caffe-jacinto's
    solver and the order in which templates/prototxt/solver.j2 writes them follow from it.
    """

    display: Annotated[
        PositiveInt, SparseField("display_sparsity", "iterations between two reports of sparsity in the log")
    ] = 1000
    target: Annotated[
        PositiveFraction,
        SparseField("sparsity_target", "prune until this fraction of the convolutions' weights is zero"),
    ] = 0.8
    step_factor: Annotated[
        PositiveFraction,
        SparseField("sparsity_step_factor", "growth of the fraction from one threshold to the next"),
    ] = 0.01
    step_iter: Annotated[
        PositiveInt, SparseField("sparsity_step_iter", "iterations between two thresholds")
    ] = 1000
    start_iter: Annotated[NaturalInt, SparseField("sparsity_start_iter", "iteration of the first threshold")]
    start_factor: Annotated[
        Fraction,
        SparseField(
            "sparsity_start_factor", "fraction that the first threshold adds sparsity_step_factor to"
        ),
    ] = 0.0
    threshold_maxratio: Annotated[
        PositiveFloat,
        SparseField("sparsity_threshold_maxratio", "no threshold above this fraction of the largest weight"),
    ] = 0.2
    threshold_value_max: Annotated[
        PositiveFloat, SparseField("sparsity_threshold_value_max", "no threshold above this value")
    ] = 0.2
    by: Annotated[
        Literal["channel", "layer"],
        SparseField(
            "sparsity_by", "one threshold for each output channel, or for each layer", in_solver=False
        ),
    ] = "channel"

    def by_name(self, *, solver: bool = False) -> dict[str, Any]:
        """The settings by their names outside of recipes; with ``solver``, those that a solver file has."""
        fields = sparse_fields().items()
        return {field.name: getattr(self, key) for key, field in fields if field.in_solver or not solver}


def sparse_fields() -> dict[str, SparseField]:
    """The table of `SparseSettings`, by recipe key."""
    return {
        key: field
        for key, info in SparseSettings.model_fields.items()
        for field in info.metadata
        if isinstance(field, SparseField)
    }


def sparse_settings(values: Mapping[str, Any], prefix: str) -> SparseSettings:
    """The settings that ``values`` has by their names outside of recipes.

    Raises:
        UserError: a value is missing or out of its range; the message has ``prefix`` before the name.
    """
    fields = sparse_fields()
    try:
        return SparseSettings(
            **{key: values[field.name] for key, field in fields.items() if field.name in values}
        )
    except ValidationError as error:
        problems = [(fields[str(problem["loc"][0])].name, problem) for problem in error.errors()]
        raise UserError(
            "; ".join(
                f"{prefix}{name} is missing: add it"
                if problem["type"] == "missing"
                else f"{prefix}{name} is {problem['input']}; it has to be {_allowed(name)}"
                for name, problem in problems
            )
        ) from None


def _allowed(name: str) -> str:
    """The values that a setting may have, in words."""
    info = next(
        SparseSettings.model_fields[key] for key, field in sparse_fields().items() if field.name == name
    )
    choices = get_args(info.annotation)
    if choices:
        return " or ".join(map(str, choices))
    words = {"gt": "above {}", "ge": "{} or more", "lt": "below {}"}
    return " and ".join(
        text.format(getattr(limit, kind))
        for limit in info.metadata
        for kind, text in words.items()
        if getattr(limit, kind, None) is not None
    )


class Stage(_Settings):
    """One run of a solver."""

    start: OptionalText = None
    """The earlier stage whose final weights this one starts from; random weights without it and `weights`."""

    weights: OptionalText = None
    """A .caffemodel to start from instead."""

    reinit: Annotated[tuple[Text, ...], Ints] = ()
    """Layers that start from random values instead of `weights`, because their shape or task differs. A
    convolution's batch norm is included."""

    solver: SolverSettings
    sparse: Annotated[SparseSettings | None, Optional] = None
    freeze_zeros: bool = False
    """Keep at zero the weights of convolutions that are zero at the start."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Stage:
        if self.start and self.weights:
            raise _mistake(
                ("weights",),
                'a stage starts from `start` or from `weights`, not from both; set one of them to ""',
            )
        if self.reinit and not self.weights:
            raise _mistake(
                ("reinit",),
                "only layers of `weights` can be left out, and this stage has none; remove reinit, or set "
                "`weights`",
            )
        if self.freeze_zeros and self.sparse:
            raise _mistake(("freeze_zeros",), "a sparse stage freezes its zeros itself; remove freeze_zeros")
        if self.freeze_zeros and not (self.start or self.weights):
            raise _mistake(
                ("freeze_zeros",), "random weights have no zeros to freeze; set `start` or `weights`"
            )
        if self.sparse and self.sparse.start_iter >= self.solver.max_iter:
            raise _mistake(
                ("sparse", "start_iter"),
                f"{self.sparse.start_iter} is not below the stage's max_iter {self.solver.max_iter}, "
                "so no weight would become zero; make it smaller",
            )
        return self


class Recipe(_Settings):
    """A data set, a network and the stages that train it, in order."""

    name: Text
    data: DataSettings
    network: NetworkSettings
    training: TrainingSettings
    stages: Annotated[dict[StageName, Stage], Field(min_length=1)]
    """In the order of the file, which is the order of training."""

    @model_validator(mode="after")
    def _stages_follow(self) -> Recipe:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if name.lower() in RESERVED_STAGE_NAMES:
                raise _mistake(
                    ("stages", name),
                    f'"{name}" is the name of another folder of a run; choose a different name for the stage',
                )
            if name.lower() in (other.lower() for other in earlier):
                raise _mistake(("stages", name), "the names of two stages differ only in case; rename one")
            if stage.start is not None and stage.start not in earlier:
                raise _mistake(("stages", name, "start"), _no_such_start(stage.start, earlier))
            if self.network.frozen and stage.start is None and stage.weights is None:
                raise _mistake(
                    ("stages", name),
                    f"network.frozen keeps {', '.join(self.network.frozen)} as they are at the start, and "
                    "this stage starts from random weights; set `weights`",
                )
            both = [layer for layer in stage.reinit if layer in self.network.frozen]
            if both:
                raise _mistake(
                    ("stages", name, "reinit"),
                    f"{both[0]} is also in network.frozen, so it would keep random values; remove it from "
                    "one of them",
                )
            earlier.append(name)
        return self


def _no_such_start(start: str, earlier: list[str]) -> str:
    known = f"earlier stages: {', '.join(earlier)}" if earlier else "it is the first one"
    return (
        f'no earlier stage produces the weights of "{start}" ({known}); '
        "name an earlier stage, or use `weights`"
    )


def _mistake(path: tuple[str, ...], what: str) -> PydanticCustomError:
    """An error at ``path`` below the model that raises it."""
    return PydanticCustomError("mistake", "{what}", {"what": what, "path": list(path)})
