"""The keys of a recipe: type, default and meaning of each (the guide is docs/recipes.md).

Types are strict: a string is never converted to a number, nor a number to a string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUseDefault

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.quantization.schemes import (
    LEAST_BITS,
    MOST_BIAS_BITS,
    MOST_BITS,
    RangeMethod,
    SchemeName,
)
from caffe_jacinto.recipes import rules

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38

PositiveInt = Annotated[int, Field(ge=1, le=INT32_MAX)]
NaturalInt = Annotated[int, Field(ge=0, le=INT32_MAX)]
PositiveFloat = Annotated[float, Field(gt=0, le=FLOAT32_MAX, allow_inf_nan=False)]
SignedFloat = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, allow_inf_nan=False)]
NaturalFloat = Annotated[float, Field(ge=0, le=FLOAT32_MAX, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
FileNamePart = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A string that becomes part of the names of files and folders."""

StageName = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]

MISTAKE = "mistake"
"""The type of pydantic's error for values that do not agree with each other."""

MOST_TESTS_APART = 10_000
"""Iterations: the largest default of ``test_interval``, and of ``snapshot`` if it allows for it."""


AUGMENTATIONS = (
    *("crop_min_area", "crop_max_aspect"),
    *("random_brightness", "random_contrast", "random_saturation", "mixup_alpha"),
)
"""Keys of `[data]` that are fields of a ``transform_param`` beyond Caffe's."""


def _none_if_empty(value: Any) -> Any:
    """TOML has no null: an empty string unsets an optional setting, so that an override can do it."""
    return None if value == "" else value


def _default_if_empty(value: Any) -> Any:
    if value == "":
        raise PydanticUseDefault
    return value


Optional = BeforeValidator(_none_if_empty)
OptionalText = Annotated[Text | None, Optional]
OptionalInt = Annotated[PositiveInt | None, Optional]
OptionalFloat = Annotated[PositiveFloat | None, Optional]
OptionalFraction = Annotated[Fraction | None, Optional]
IntWithDefault = Annotated[PositiveInt, BeforeValidator(_default_if_empty)]
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

    crop_min_area: Share = 0.0
    """Resized crops of training images (PyTorch): the least share of the area that one shows; 0: none."""

    crop_max_aspect: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = rules.CROP_MAX_ASPECT
    """The largest ratio of the sides of what a resized crop shows."""

    random_brightness: Share = 0.0
    """Training images times a random factor from 1 - this to 1 + this (PyTorch)."""

    random_contrast: Share = 0.0
    """The same about the mean grey of the image."""

    random_saturation: Share = 0.0
    """The same about the grey of each pixel."""

    mixup_alpha: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """Above 0, each training image is mixed with another of its batch, by a share of Beta(alpha, alpha)
    (PyTorch)."""

    mean_file: OptionalText = None
    """A .binaryproto with the mean image that is subtracted from every image, for networks that need one."""

    labels: OptionalText = None
    """A text file whose line N names class N; without it, ``labels.txt`` in the folder of ``train_lmdb``."""

    def augmentation(self) -> dict[str, float]:
        """What training images are changed by, beside crops and mirrors; defaults left out."""
        return {
            name: getattr(self, name)
            for name in AUGMENTATIONS
            if getattr(self, name) != type(self).model_fields[name].default
        }


class NetworkSettings(_Settings):
    """The network and its free parameters."""

    name: Text
    """Of a network of this program; with `prototxt`, part of the names of the run folder and of snapshots."""

    prototxt: OptionalText = None
    """A network of your own instead: its train_val.prototxt, or the one for training."""

    test_prototxt: Annotated[tuple[Text, ...], Ints] = ()
    """The networks that test it, where they are in other files; the first one also tests the result."""

    train_stages: Annotated[tuple[Text, ...], Ints] = ()
    """Caffe's `train_state.stage`, for `include` rules that ask for one."""

    train_level: NaturalInt = 0
    """Caffe's `train_state.level`."""

    test_stages: Annotated[tuple[Annotated[tuple[Text, ...], Ints], ...], Ints] = ()
    """Caffe's `test_state.stage`, a list for each network that tests."""

    test_levels: Annotated[tuple[NaturalInt, ...], Ints] = ()
    """Caffe's `test_state.level` of each."""

    test_iter: Annotated[tuple[PositiveInt, ...], Ints] = ()
    """Batches of one test of each; by default, as many as cover its LMDB once."""

    crop_size: OptionalInt = None
    """Height and width of the network's input, in pixels; required but with `prototxt`."""

    strides: Annotated[Annotated[tuple[PositiveInt, ...], Ints] | None, Optional] = None
    """Strides of the parts of the network, from the input on, where they can be chosen; by default, the
    published ones."""

    width: OptionalFloat = None
    """Width multiplier, on the channels of every layer, where it can be chosen; by default 1."""

    frozen: Annotated[tuple[Text, ...], Ints] = ()
    """Layers that keep their start weights; a convolution's batch norm is frozen with it."""

    head_lr_mult: PositiveFloat = 1.0
    """Learning rate of the last layer with weights, as a multiple of the published one."""

    @property
    def tests(self) -> int:
        """How many networks test."""
        return max(map(len, (self.test_prototxt, self.test_stages, self.test_levels, self.test_iter))) or 1


class TrainingSettings(_Settings):
    """Settings that all stages share."""

    batch_size: PositiveInt
    """The effective batch: images of one update of the weights, over all passes and GPUs."""

    iter_size: PositiveInt = 1
    """Forward and backward passes whose gradients one update accumulates."""

    val_batch_size: PositiveInt = 50
    gpus: Annotated[tuple[NaturalInt, ...], Ints] = ()
    """Device numbers; empty is the CPU."""

    nodes: PositiveInt = 1
    """Machines that train together (PyTorch, as a Slurm job), each on ``gpus`` or with ``cpu_ranks``."""

    cpu_ranks: PositiveInt = 1
    """Processes that train together on each machine's CPU (PyTorch), where ``gpus`` is empty."""

    random_seed: Annotated[int, Field(ge=-1, le=INT32_MAX)] = 33
    """Seeds the initial weights, mirroring and cropping; -1 takes a different seed each time, as in Caffe."""

    label_smoothing: Fraction = 0.0
    """Share of each target that all classes have alike."""

    keep: PositiveInt = 2
    """How many of the newest snapshots are kept, beside the best by top-1."""

    reestimate_batches: NaturalInt = 30
    """Training batches to recalibrate batch-norm statistics over (stock Caffe and PyTorch), at the end of a
    stage and before its scheduled tests; 0 leaves the running statistics."""

    recalibrate_tests: bool = True
    """Run the scheduled tests with recalibrated statistics (PyTorch; stock Caffe in stages that prune or hold
    zeros). Training itself is the same either way."""


def _tenth(max_iter: int) -> int:
    """A tenth of the stage, rounded up, but not more than `MOST_TESTS_APART`."""
    return min(-(-max_iter // 10), MOST_TESTS_APART)


def _snapshot_at_a_test(settings: Mapping[str, Any]) -> int:
    """A tenth of the stage, as in `_tenth`, rounded up to a multiple of ``test_interval``."""
    interval: int = settings["test_interval"]
    return -(-_tenth(settings["max_iter"]) // interval) * interval


class SolverSettings(_Settings):
    """A stage's solver: Caffe's own names and meanings (SolverParameter)."""

    max_iter: PositiveInt
    base_lr: PositiveFloat
    lr_policy: Literal[
        "fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid", "cosine", "one_cycle"
    ] = "poly"
    """Caffe's; `cosine` and `one_cycle` on PyTorch only."""

    warmup_iter: NaturalInt = 0
    """Iterations in which the learning rate rises to the policy's (PyTorch only)."""

    power: NaturalFloat = 1.0
    gamma: Annotated[SignedFloat | None, Optional] = None
    """Above 0; of the policy "sigmoid", whose rate falls where it is negative, of either sign."""

    stepsize: OptionalInt = None
    stepvalue: Annotated[tuple[PositiveInt, ...], Ints] = ()
    momentum: Fraction = 0.9
    momentum2: OptionalFraction = None
    rms_decay: OptionalFraction = None
    delta: OptionalFloat = None
    weight_decay: NaturalFloat
    regularization: Literal["L1", "L2"] = "L2"
    test_interval: IntWithDefault = Field(default_factory=lambda settings: _tenth(settings["max_iter"]))
    test_initialization: bool = True
    """Test before the first iteration, too."""

    snapshot: IntWithDefault = Field(default_factory=_snapshot_at_a_test)
    """A snapshot belongs to the test of its iteration, so by default there is a test for each."""

    snapshot_format: Literal["BINARYPROTO", "HDF5"] = "BINARYPROTO"
    """HDF5: snapshots are `.caffemodel.h5` and `.solverstate.h5`."""

    display: PositiveInt = 100
    type: Literal["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"] = "SGD"
    ema_decay: Annotated[PositiveFraction | None, Optional] = None
    """Of a moving average of the weights, with which the stage ends (PyTorch only)."""

    image_sizes: Annotated[tuple[Annotated[tuple[NaturalInt, ...], Ints], ...], Ints] = ()
    """Pairs of an iteration and the side, in pixels, that training images are resized to from there on
    (PyTorch only); by default they are not."""

    clip_gradients: OptionalFloat = None
    average_loss: PositiveInt = 1
    """The displayed loss is the mean of so many iterations."""

    def weights_name(self, prefix: str, iteration: int) -> str:
        """The name of the weight file of a snapshot."""
        form = ".h5" if self.snapshot_format == "HDF5" else ""
        return f"{prefix}_iter_{iteration}.caffemodel{form}"


@dataclass(frozen=True)
class SparseField:
    """How a setting of a sparse stage is called outside of recipes."""

    name: str
    """The solver field of caffe-jacinto, and the command-line flag of our own programs."""

    help: str
    in_solver: bool = True
    """Whether caffe-jacinto's solver has the field; our programs have the flag in any case."""

    left_out: bool = False
    """Whether a command line leaves it out where it has its default, the published rule."""


def _kept_of(text: str) -> tuple[int, int]:
    """n and m of an ``n:m`` pattern."""
    kept, _, together = text.partition(":")
    return int(kept), int(together)


def _is_pattern(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d?:[1-9]\d?", text) or _kept_of(text)[0] >= _kept_of(text)[1]:
        raise PydanticCustomError("pattern", 'give "n:m" with n below m, like "2:4"')
    return text


def _is_share(value: Any) -> Any:
    """A fraction of a table of targets; without this, pydantic's message would not say what it is of."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise PydanticCustomError("share", "give a number more than 0 and less than 1, like 0.8")
    return float(value)


_OURS = {"in_solver": False, "left_out": True}
_PATTERN = 'n of each m input channels keep their weights, like "2:4"'


class SparseSettings(_Settings):
    """The pruning rule: the sparsity schedule, the layers that it takes, and the caps of its thresholds.

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
        Literal["channel", "layer", "network"],
        SparseField(
            "sparsity_by",
            "one threshold for each output channel, for each layer, or for the network",
            in_solver=False,
        ),
    ] = "channel"
    method: Annotated[
        Literal["magnitude", "soft", "rigl"],
        SparseField(
            "sparsity_method",
            "magnitude: what is zero stays zero (published); soft: it may return until the last threshold; "
            "rigl: weights change places (RigL)",
            **_OURS,
        ),
    ] = "magnitude"
    schedule: Annotated[
        Literal["steps", "cubic"],
        SparseField(
            "sparsity_schedule",
            "how the fraction grows: in equal steps, or cubic, fast at first (Zhu and Gupta 2017)",
            **_OURS,
        ),
    ] = "steps"
    layers: Annotated[
        tuple[Text, ...], Ints, SparseField("sparsity_layers", "prune only these layers", **_OURS)
    ] = ()
    skip: Annotated[
        tuple[Text, ...], Ints, SparseField("sparsity_skip", "do not prune these layers", **_OURS)
    ] = ()
    min_kernel: Annotated[
        PositiveInt,
        SparseField(
            "sparsity_min_kernel", "prune convolutions with kernels of this size and larger", **_OURS
        ),
    ] = 3
    inner_products: Annotated[
        bool, SparseField("sparsity_inner_products", "prune and count inner products, too", **_OURS)
    ] = False
    targets: Annotated[
        dict[Text, Annotated[float, BeforeValidator(_is_share)]],
        SparseField("sparsity_targets", "a layer's own target, as NAME=0.5", **_OURS),
    ] = {}
    pattern: Annotated[
        Annotated[Text, AfterValidator(_is_pattern)] | None,
        Optional,
        SparseField("sparsity_pattern", _PATTERN, **_OURS),
    ] = None

    regrow_fraction: Annotated[
        PositiveFraction,
        SparseField("sparsity_regrow_fraction", "share of the weights that changes places at first", **_OURS),
    ] = rules.REGROWTH["regrow_fraction"]
    regrow_until: Annotated[
        PositiveFraction,
        SparseField("sparsity_regrow_until", "share of the stage after which none changes places", **_OURS),
    ] = rules.REGROWTH["regrow_until"]

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """n and m of the pattern: of each m consecutive input channels, n keep their weights."""
        return None if self.pattern is None else _kept_of(self.pattern)

    def beyond_published(self) -> dict[str, Any]:
        """The settings by which this is another rule than the published one, by recipe key."""
        return {
            key: getattr(self, key)
            for key, field in sparse_fields().items()
            if not field.in_solver and getattr(self, key) != type(self).model_fields[key].default
        }

    def by_name(self, *, solver: bool = False) -> dict[str, Any]:
        """The settings by their names outside of recipes; with ``solver``, those that a solver file has."""
        beyond = self.beyond_published()
        return {
            field.name: getattr(self, key)
            for key, field in sparse_fields().items()
            if (field.in_solver or not solver) and (key in beyond or not field.left_out)
        }


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
        settings = SparseSettings(
            **{key: values[field.name] for key, field in fields.items() if field.name in values}
        )
    except ValidationError as error:
        problems = [(fields[str(problem["loc"][0])].name, problem) for problem in error.errors()]
        raise UserError(
            "; ".join(
                f"{prefix}{name} is missing: add it"
                if problem["type"] == "missing"
                else f"{prefix}{name} is {problem['input']}; {_allowed(name) or problem['msg']}"
                for name, problem in problems
            )
        ) from None
    for key, what in rules.pruning_mistakes(settings.model_dump()):
        raise UserError(f"{prefix}{fields[key].name}: {what}")
    return settings


def _allowed(name: str) -> str:
    """What to do about a setting's value, where its type says which are allowed."""
    info = next(
        SparseSettings.model_fields[key] for key, field in sparse_fields().items() if field.name == name
    )
    choices = get_args(info.annotation)
    if get_origin(info.annotation) is Literal:
        return f"it has to be {' or '.join(map(str, choices))}"
    words = {"gt": "above {}", "ge": "{} or more", "lt": "below {}"}
    limits = [
        text.format(getattr(limit, kind))
        for limit in info.metadata
        for kind, text in words.items()
        if getattr(limit, kind, None) is not None
    ]
    return f"it has to be {' and '.join(limits)}" if limits else ""


Bits = Annotated[int, Field(ge=LEAST_BITS, le=MOST_BITS)]
BiasBits = Annotated[int, Field(ge=LEAST_BITS, le=MOST_BIAS_BITS)]
Percentile = Annotated[float, Field(gt=50, le=100, allow_inf_nan=False)]


class QuantizeSettings(_Settings):
    """How a network is quantized, by the names of the options of `caffe_jacinto.quantize`."""

    scheme: SchemeName = "processor"
    bits: Annotated[Bits | None, Optional] = None
    """Of weights and activations; without it, the scheme's."""

    weight_bits: Annotated[Bits | None, Optional] = None
    activation_bits: Annotated[Bits | None, Optional] = None
    bias_bits: Annotated[BiasBits | None, Optional] = None
    bits_of: dict[Text, Bits] = {}
    """Of the weights and the output of single layers."""

    keep_float: Annotated[tuple[Text, ...], Ints] = ()
    """Layers that are not quantized."""

    ranges: Annotated[RangeMethod | None, Optional] = None
    """How ranges of activations are chosen; without it, the scheme's way."""

    weight_ranges: Annotated[RangeMethod | None, Optional] = None
    percentile: Annotated[Percentile | None, Optional] = None
    """Of the values in a range."""

    bias_correction: bool = False
    batches: PositiveInt = 50
    """Of training images, for the calibration."""

    batch: PositiveInt = 50
    """Images of a pass."""

    sensitivity: bool = False
    """Test with each layer quantized alone, too."""

    input_shift: Annotated[Literal["power", "bias", "scale"] | None, Optional] = None
    """The layer that is written for what the network adds to images; without it, power."""

    settle_iter: Annotated[NaturalInt | None, Optional] = None
    """Of training: the iteration from which on ranges stay; without it, a quarter of the stage."""

    freeze_bn_iter: Annotated[NaturalInt | None, Optional] = None
    """Of training: the iteration from which on the statistics of batch norms stay; without it, half of it."""


class Stage(_Settings):
    """One run of a solver; or without one, the quantization of an earlier stage's network."""

    start: OptionalText = None
    """The earlier stage whose final weights this one starts from; random weights without it and `weights`."""

    weights: OptionalText = None
    """A .caffemodel to start from instead."""

    reinit: Annotated[tuple[Text, ...], Ints] = ()
    """Layers that start from random values instead of `weights`, because their shape or task differs. A
    convolution's batch norm is included."""

    teacher: OptionalText = None
    """A trained network to learn from beside the labels (PyTorch): an earlier stage, or a .caffemodel."""

    teacher_prototxt: OptionalText = None
    """With a .caffemodel: its deploy.prototxt."""

    distill: bool = False
    """Learn from the dense network that this one was made from, where `teacher` names no other."""

    teacher_weight: PositiveFraction = rules.TEACHING["teacher_weight"]
    """The part of the loss that is the teacher's; the labels' is the rest."""

    temperature: PositiveFloat = rules.TEACHING["temperature"]
    """What scores are divided by before they are compared with the teacher's."""

    solver: Annotated[SolverSettings | None, Optional] = None
    sparse: Annotated[SparseSettings | None, Optional] = None
    quantize: Annotated[QuantizeSettings | None, Optional] = None
    """Without a solver: quantize the network of `start`, and test it. With one: train for it."""

    freeze_zeros: bool = False
    """Keep at zero the weights of convolutions that are zero at the start."""

    freeze_inner_products: bool = False
    """With `freeze_zeros`, keep the zeros of inner products, too."""

    @property
    def max_iter(self) -> int:
        """Updates of the weights; 0 without a solver."""
        return self.solver.max_iter if self.solver is not None else 0


class Teacher(NamedTuple):
    """The network that a stage learns from: of an earlier stage of the recipe, or in files."""

    stage: str | None
    weights: str | None = None
    prototxt: str | None = None
    """With `weights`; None: the network is the recipe's own."""


class Recipe(_Settings):
    """A data set, a network and the stages that train it, in order."""

    name: Text
    data: DataSettings
    network: NetworkSettings
    training: TrainingSettings
    stages: Annotated[dict[StageName, Stage], Field(min_length=1)]
    """In the order of the file, which is the order of training."""

    @property
    def weights_prefix(self) -> str:
        """What the names of its weight files begin with, before ``_iter_N``."""
        return f"{self.data.dataset}_{self.network.name}"

    def weights_name(self, stage: str) -> str:
        """The name of the file of the final weights of a stage that trains."""
        solver = self.trained[stage].solver
        assert solver is not None
        return solver.weights_name(self.weights_prefix, solver.max_iter)

    @property
    def trained(self) -> dict[str, Stage]:
        """The stages with a solver, by their names, in order."""
        return {name: stage for name, stage in self.stages.items() if stage.solver is not None}

    def teacher_of(self, name: str) -> Teacher | None:
        """What a stage learns from beside the labels; None: nothing."""
        stage = self.stages[name]
        if stage.teacher in self.stages:
            return Teacher(stage.teacher)
        if stage.teacher is not None:
            return Teacher(None, stage.teacher, stage.teacher_prototxt)
        if not stage.distill:
            return None
        values = rules.Values(self.model_dump())
        source, is_result = rules.dense_source(values, values.stage(name))
        return Teacher(source.table[-1]) if is_result else Teacher(None, source["weights"])

    def counts_inner_products(self, name: str) -> bool:
        """Whether the zeros of inner products are held and counted in a stage.

        They are where it prunes them itself, or holds what an earlier stage, the nearest that prunes, has
        pruned.
        """
        stage = self.stages[name]
        if stage.sparse is not None:
            return stage.sparse.inner_products
        if not stage.freeze_zeros:
            return False
        return stage.freeze_inner_products or (
            stage.start is not None and self._pruned_inner_products(stage.start)
        )

    def _pruned_inner_products(self, name: str | None) -> bool:
        while name is not None:
            stage = self.stages[name]
            if stage.sparse is not None or stage.freeze_inner_products:
                return stage.freeze_inner_products or bool(stage.sparse and stage.sparse.inner_products)
            name = stage.start
        return False

    @model_validator(mode="after")
    def _values_agree(self) -> Recipe:
        found = list(rules.mistakes(rules.Values(self.model_dump())))
        if found:
            raise ValidationError.from_exception_data(
                "recipe", [_pydantic_error(mistake) for mistake in found]
            )
        return self


def _pydantic_error(mistake: rules.Mistake) -> InitErrorDetails:
    kind = PydanticCustomError(MISTAKE, "{what}", {"what": mistake.what})
    return InitErrorDetails(type=kind, loc=mistake.keys, input=None)
