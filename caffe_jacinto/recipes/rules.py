"""Which values of a recipe must agree with each other.

A rule whose values are missing or wrong themselves is left out, so that a recipe with several mistakes gets
all that are certain at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from caffe_jacinto.quantization.schemes import scheme_mistakes, training_mistakes

Keys = tuple[str, ...]

RESERVED_STAGE_NAMES = ("test",)
"""Folders of a run that are not stages."""


class Mistake(NamedTuple):
    """The key that a mistake is at, and what to say about it."""

    keys: Keys
    what: str


class Place(NamedTuple):
    """Where a key stands: what messages call the place, and what they are sorted by."""

    name: str
    order: tuple[int, ...]


class _UnknownValue(Exception):  # noqa: N818 - not an error: the rule that needs it says nothing
    """A rule needs a value that is missing or wrong itself."""


class Values:
    """A recipe's values, defaults included, by their dotted keys below a table."""

    def __init__(self, content: Mapping[str, Any], wrong: Collection[Keys] = (), table: Keys = ()) -> None:
        """``wrong`` are the keys, from the top of the recipe, whose values are missing or wrong."""
        self._content = content
        self._wrong = wrong
        self.table = table

    def __getitem__(self, dotted: str) -> Any:
        keys = (*self.table, *dotted.split("."))
        if any(keys[: len(wrong)] == wrong for wrong in self._wrong):
            raise _UnknownValue
        value: Any = self._content
        for key in keys:
            if value is None:  # an optional table that is not there
                return None
            if not isinstance(value, Mapping) or key not in value:
                raise _UnknownValue
            value = value[key]
        if not isinstance(value, Mapping) and any(wrong[: len(keys)] == keys for wrong in self._wrong):
            raise _UnknownValue  # something in a list is wrong
        return value

    def stages(self) -> list[Values]:
        """The stages, in order; none where the table of stages is wrong itself."""
        try:
            names = self["stages"]
        except _UnknownValue:
            return []
        return [self.stage(name) for name in names]

    def stage(self, name: str) -> Values:
        """The stage of that name, which need not exist."""
        return Values(self._content, self._wrong, ("stages", name))

    def mistake(self, dotted: str, what: str) -> Mistake:
        """A mistake at a key below the table, or with "" at the table itself."""
        return Mistake((*self.table, *filter(None, dotted.split("."))), what)


REGROWTH = {"regrow_fraction": 0.3, "regrow_until": 0.75}
"""The defaults of the settings of `method = "rigl"`, which are those of its paper."""

TEACHING = {"teacher_weight": 0.5, "temperature": 4.0}
"""The defaults of the settings of a stage that learns from a teacher."""

CROP_MAX_ASPECT = 1.333
"""The default of the setting of resized crops."""

Rule = Callable[[Values], Iterator[Mistake]]


def mistakes(recipe: Values, rules: Sequence[Rule] = ()) -> Iterator[Mistake]:
    """Every disagreement among the values of a whole recipe, by the rules of this page and by ``rules``."""
    for rule in (*_RECIPE_RULES, *rules):
        yield from _found(rule, recipe)
    for stage in recipe.stages():
        for rule in _STAGE_RULES:
            yield from _found(rule, stage)


def _found(rule: Rule, values: Values) -> list[Mistake]:
    try:
        return list(rule(values))
    except _UnknownValue:
        return []


# ------------------------------------------------------------------------------------ of a whole recipe


def _frozen_once(recipe: Values) -> Iterator[Mistake]:
    frozen = recipe["network.frozen"]
    if len(set(frozen)) < len(frozen):
        yield recipe.mistake("network.frozen", f"{list(frozen)} names a layer twice; name each once")


def _crops_are_resized(recipe: Values) -> Iterator[Mistake]:
    if recipe["data.crop_min_area"] and recipe["data.mean_file"]:
        yield recipe.mistake(
            "data.crop_min_area", "resized crops do not fit the mean image of data.mean_file; remove one"
        )
    if recipe["data.crop_max_aspect"] != CROP_MAX_ASPECT and not recipe["data.crop_min_area"]:
        yield recipe.mistake(
            "data.crop_max_aspect", "no effect without crop_min_area; add it, or remove this"
        )


def _gpus_once(recipe: Values) -> Iterator[Mistake]:
    gpus = recipe["training.gpus"]
    if len(set(gpus)) < len(gpus):
        yield recipe.mistake("training.gpus", f"{list(gpus)} names a GPU twice; name each once")


def _names_make_folders(recipe: Values) -> Iterator[Mistake]:
    earlier: set[str] = set()
    for stage in recipe.stages():
        name = stage.table[-1]
        if name.lower() in RESERVED_STAGE_NAMES:
            yield stage.mistake(
                "", f'"{name}" is the name of another folder of a run; choose a different name for the stage'
            )
        elif name.lower() in earlier:
            yield stage.mistake("", "the names of two stages differ only in case; rename one")
        earlier.add(name.lower())


def _stages_follow(recipe: Values) -> Iterator[Mistake]:
    earlier: list[str] = []
    for stage in recipe.stages():
        yield from _found(lambda stage: _starts_after(stage, earlier), stage)
        if not _only_quantizes(stage):
            earlier.append(stage.table[-1])


def _only_quantizes(stage: Values) -> bool:
    """Whether the stage has no solver, and is known not to lack one."""
    try:
        return stage["solver"] is None and bool(stage["quantize"])
    except _UnknownValue:
        return False


def _some_stage_trains(recipe: Values) -> Iterator[Mistake]:
    stages = recipe.stages()
    if stages and all(map(_only_quantizes, stages)):
        yield recipe.mistake(
            "stages",
            "none of them has a solver, so nothing is trained; a network that is trained already is "
            "quantized by python -m caffe_jacinto.quantize",
        )


def _starts_after(stage: Values, earlier: list[str]) -> Iterator[Mistake]:
    start = stage["start"]
    if start is not None and start not in earlier:
        known = f"earlier stages: {', '.join(earlier)}" if earlier else "it is the first one"
        yield stage.mistake(
            "start",
            f'no earlier stage produces the weights of "{start}" ({known}); name an earlier stage, or use '
            "`weights`",
        )


def _teachers_are_trained(recipe: Values) -> Iterator[Mistake]:
    earlier: list[str] = []
    for stage in recipe.stages():
        yield from _found(lambda stage: _learns_from(stage, recipe, earlier), stage)
        if not _only_quantizes(stage):
            earlier.append(stage.table[-1])


def _learns_from(stage: Values, recipe: Values, earlier: list[str]) -> Iterator[Mistake]:
    teacher, prototxt = stage["teacher"], stage["teacher_prototxt"]
    if teacher is None and prototxt is not None:
        yield stage.mistake("teacher_prototxt", "no effect without teacher; add it, or remove this")
    if teacher is None and not stage["distill"]:
        for key, default in TEACHING.items():
            if stage[key] != default:
                yield stage.mistake(
                    key, "no effect without distill = true or a teacher; add one, or remove it"
                )
        return
    if recipe["network.prototxt"] is not None:
        yield stage.mistake(
            "distill" if teacher is None else "teacher",
            "the losses are those of network.prototxt; add a layer DistillationLoss there (docs/torch.md), "
            "and remove it",
        )
    if teacher is None:
        yield from _has_a_dense_network(stage, recipe)
        return
    if teacher in earlier and prototxt is not None:
        yield stage.mistake("teacher_prototxt", f'that of the stage "{teacher}" is known; remove it')
    if teacher not in earlier and prototxt is None:
        known = f"earlier stages: {', '.join(earlier)}" if earlier else "there is no earlier stage"
        yield stage.mistake(
            "teacher",
            f'"{teacher}" is not an earlier stage ({known}); name one, or a .caffemodel with its deploy '
            "prototxt as teacher_prototxt",
        )


def _has_a_dense_network(stage: Values, recipe: Values) -> Iterator[Mistake]:
    source, is_result = dense_source(recipe, stage)
    if is_result:
        return
    if source["weights"] is None:
        yield stage.mistake(
            "distill",
            "no dense network is trained before this stage; set `start` or `weights`, or name a teacher",
        )
    elif source["reinit"]:
        yield stage.mistake(
            "distill",
            f"the dense network is {source['weights']}, of which {source['reinit'][0]} is not used (reinit); "
            "name a teacher",
        )


def dense_source(recipe: Values, stage: Values) -> tuple[Values, bool]:
    """Where the dense network is that a stage was made from.

    That is the nearest stage back along `start` that prunes nothing, holds no zeros and rounds nothing, with
    True. If there is none, it is the stage where `start` ends, whose `weights` are the network, with False.
    """
    passed = set()
    while (name := stage["start"]) is not None:
        if name in passed:
            raise _UnknownValue  # the stages start from each other
        passed.add(name)
        stage = recipe.stage(name)
        if not (stage["sparse"] or stage["freeze_zeros"] or stage["quantize"]):
            return stage, True
    return stage, False


def _frozen_layers_have_weights(recipe: Values) -> Iterator[Mistake]:
    frozen = recipe["network.frozen"]
    for stage in recipe.stages():
        yield from _found(lambda stage: _keeps_trained_weights(stage, frozen), stage)


def _keeps_trained_weights(stage: Values, frozen: Collection[str]) -> Iterator[Mistake]:
    if frozen and stage["start"] is None and stage["weights"] is None:
        yield stage.mistake(
            "",
            f"network.frozen keeps {', '.join(frozen)} as they are at the start, and this stage starts from "
            "random weights; set `weights`",
        )
    both = [layer for layer in stage["reinit"] if layer in frozen]
    if both:
        yield stage.mistake(
            "reinit",
            f"{both[0]} is also in network.frozen, so it would keep random values; remove it from one of "
            "them",
        )


_OF_A_PROTOTXT = ("test_prototxt", "train_stages", "train_level", "test_stages", "test_levels", "test_iter")
"""Keys of `[network]` that say how a network of the user's own is used."""

_OF_EACH_TEST = ("test_prototxt", "test_stages", "test_levels", "test_iter")


def _network_has_its_keys(recipe: Values) -> Iterator[Mistake]:
    if recipe["network.prototxt"] is None:
        for key in _OF_A_PROTOTXT:
            if recipe[f"network.{key}"]:
                yield recipe.mistake(f"network.{key}", "goes with network.prototxt only; remove it")
        if recipe["network.crop_size"] is None:
            yield recipe.mistake("network.crop_size", "missing; add it")
        return
    for key, whose in (("strides", "the strides are those"), ("width", "the width is that")):
        if recipe[f"network.{key}"] is not None:
            yield recipe.mistake(f"network.{key}", f"{whose} of network.prototxt; remove it")
    given = {key: len(recipe[f"network.{key}"]) for key in _OF_EACH_TEST if recipe[f"network.{key}"]}
    if len(set(given.values())) > 1:
        lengths = ", ".join(f"{length} of {key}" for key, length in given.items())
        yield recipe.mistake(
            f"network.{next(iter(given))}", f"{lengths}; give one for each network that tests"
        )


def _losses_are_smoothed_where_they_are(recipe: Values) -> Iterator[Mistake]:
    if recipe["network.prototxt"] is not None and recipe["training.label_smoothing"]:
        yield recipe.mistake(
            "training.label_smoothing",
            "the losses are those of network.prototxt; smooth them there (docs/recipes.md), and remove it",
        )


_RECIPE_RULES: tuple[Rule, ...] = (
    _network_has_its_keys,
    _losses_are_smoothed_where_they_are,
    _frozen_once,
    _crops_are_resized,
    _gpus_once,
    _names_make_folders,
    _some_stage_trains,
    _stages_follow,
    _teachers_are_trained,
    _frozen_layers_have_weights,
)


# ------------------------------------------------------------------------------------------ of one stage


def _one_start(stage: Values) -> Iterator[Mistake]:
    if stage["start"] and stage["weights"]:
        yield stage.mistake(
            "weights",
            'a stage starts from `start` or from `weights`, not from both; set one of them to ""',
        )


def _reinit_needs_weights(stage: Values) -> Iterator[Mistake]:
    if stage["reinit"] and not stage["weights"]:
        yield stage.mistake(
            "reinit",
            "only layers of `weights` can be left out, and this stage has none; remove reinit, or set "
            "`weights`",
        )


def _zeros_frozen_once(stage: Values) -> Iterator[Mistake]:
    if stage["freeze_zeros"] and stage["sparse"]:
        yield stage.mistake("freeze_zeros", "a sparse stage freezes its zeros itself; remove freeze_zeros")


def _there_are_zeros(stage: Values) -> Iterator[Mistake]:
    if stage["freeze_zeros"] and not (stage["start"] or stage["weights"]):
        yield stage.mistake(
            "freeze_zeros", "random weights have no zeros to freeze; set `start` or `weights`"
        )


def _has_a_solver(stage: Values) -> Iterator[Mistake]:
    if stage["solver"] is None and not stage["quantize"]:
        yield stage.mistake("solver", "missing; add it")


_OF_TRAINING = (
    *("weights", "reinit", "teacher", "distill"),
    *("sparse", "freeze_zeros", "freeze_inner_products"),
)
"""Keys of a stage that a stage without a solver cannot have."""


def _quantizes_a_stage(stage: Values) -> Iterator[Mistake]:
    if not _only_quantizes(stage):
        return
    for key in _OF_TRAINING:
        if stage[key]:
            yield stage.mistake(
                key, "a stage without a solver quantizes a trained network; remove it, or add a solver"
            )
    if stage["start"] is None:
        yield stage.mistake("start", "missing; name the stage whose network is quantized")


def _quantization_settings_agree(stage: Values) -> Iterator[Mistake]:
    if stage["quantize"]:
        names = ("scheme", "ranges", "weight_ranges", "percentile", "bias_correction", "input_shift")
        for key, what in scheme_mistakes({name: stage[f"quantize.{name}"] for name in names}):
            yield stage.mistake(f"quantize.{key}", what)
        kept = stage["quantize.keep_float"]
        if len(set(kept)) < len(kept):
            yield stage.mistake("quantize.keep_float", f"{list(kept)} has a name twice; name each once")
        both = [layer for layer in stage["quantize.bits_of"] if layer in kept]
        if both:
            yield stage.mistake(
                "quantize.bits_of", f"{both[0]} is in keep_float, too; remove it from one of them"
            )


_OF_TESTS = {"batch": 50, "sensitivity": False, "input_shift": None}
"""Keys of `quantize` that a stage with a solver cannot have, and their defaults."""


def _trains_quantized(stage: Values) -> Iterator[Mistake]:
    solver, quantize = stage["solver"] is not None, bool(stage["quantize"])
    if not quantize:
        return
    if not solver:
        for key in ("settle_iter", "freeze_bn_iter"):
            if stage[f"quantize.{key}"] is not None:
                yield stage.mistake(f"quantize.{key}", "only a stage with a solver has it; remove it")
        return
    names = ("scheme", "bias_correction")
    for key, what in training_mistakes({name: stage[f"quantize.{name}"] for name in names}):
        yield stage.mistake(f"quantize.{key}", what)
    for key, default in _OF_TESTS.items():
        if stage[f"quantize.{key}"] != default:
            yield stage.mistake(f"quantize.{key}", "only a stage without a solver has it; remove it")
    if stage["sparse"]:
        yield stage.mistake(
            "sparse", "a stage with `quantize` prunes nothing; prune in an earlier one, and set freeze_zeros"
        )
    if stage["solver.ema_decay"] is not None:
        yield stage.mistake(
            "solver.ema_decay",
            "with `quantize`, the ranges would be of other weights than their average; leave it out",
        )
    if stage["start"] is None and stage["weights"] is None:
        yield stage.mistake(
            "start", "missing: training in quantized values begins with trained weights; name their stage"
        )


def _ranges_settle(stage: Values) -> Iterator[Mistake]:
    if not stage["quantize"] or stage["solver"] is None:
        return
    end = stage["solver.max_iter"]
    for key in ("settle_iter", "freeze_bn_iter"):
        value = stage[f"quantize.{key}"]
        if value is not None and value > end:
            yield stage.mistake(
                f"quantize.{key}", f"{value} is above the stage's max_iter {end}; make it smaller"
            )


def _pruning_begins(stage: Values) -> Iterator[Mistake]:
    begin, end = stage["sparse.start_iter"], stage["solver.max_iter"]
    if begin is not None and end is not None and begin >= end:
        yield stage.mistake(
            "sparse.start_iter",
            f"{begin} is not below the stage's max_iter {end}, so no weight would become zero; make it "
            "smaller",
        )


def _regrowth_begins(stage: Values) -> Iterator[Mistake]:
    if stage["sparse.method"] != "rigl":
        return
    begin, end, until = stage["sparse.start_iter"], stage["solver.max_iter"], stage["sparse.regrow_until"]
    if end is not None and begin >= until * end:
        yield stage.mistake(
            "sparse.regrow_until",
            f"{until:g} of max_iter {end} is not above start_iter {begin}, so no weight would change places; "
            "make it larger",
        )


def _pruning_settings_agree(stage: Values) -> Iterator[Mistake]:
    if stage["sparse"]:
        names = ["by", "pattern", "targets", "target", "schedule", "start_factor", "layers", "skip"]
        names += ["method", *REGROWTH]
        for key, what in pruning_mistakes({name: stage[f"sparse.{name}"] for name in names}):
            yield stage.mistake(f"sparse.{key}", what)


def pruning_mistakes(sparse: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Which settings of a pruning rule, all of them given by recipe key, do not go together: key and what."""
    pattern, target = sparse["pattern"], sparse["target"]
    if pattern is not None:
        kept, together = map(int, pattern.split(":"))
        if sparse["by"] != "channel":
            yield (
                "by",
                f"the pattern {pattern} prunes each {together} input channels by themselves; remove by",
            )
        if sparse["targets"]:
            yield (
                "targets",
                f"the pattern {pattern} prunes the same share of every layer; choose with layers or skip",
            )
        most = (together - kept) / together
        if target > most + 1e-9:
            yield (
                "target",
                f"{target:g} is more than the {most:.4g} that the pattern {pattern} makes zero; "
                f"set target = {math.floor(most * 1000) / 1000:g}",
            )
    if sparse["schedule"] == "cubic" and sparse["start_factor"] >= target:
        yield (
            "start_factor",
            f"the cubic schedule goes from start_factor up to target, and {sparse['start_factor']:g} is not "
            f"below {target:g}; make it smaller",
        )
    rigl = sparse["method"] == "rigl"
    for key, default in REGROWTH.items():
        if sparse[key] != default and not rigl:
            yield key, 'no effect without method = "rigl"; add that, or remove it'
    if rigl and pattern is not None:
        yield "pattern", f'method = "rigl" moves weights out of the pattern {pattern}; remove one of the two'
    for key in ("layers", "skip"):
        if len(set(sparse[key])) < len(sparse[key]):
            yield key, f"{list(sparse[key])} has a name twice; name each once"


def _inner_products_are_frozen_with_zeros(stage: Values) -> Iterator[Mistake]:
    if stage["freeze_inner_products"] and not stage["freeze_zeros"]:
        yield stage.mistake("freeze_inner_products", "no effect without freeze_zeros = true; add it")


POLICY_SETTINGS = {
    "exp": ("gamma",),
    "inv": ("gamma",),
    "step": ("gamma", "stepsize"),
    "sigmoid": ("gamma", "stepsize"),
    "multistep": ("gamma", "stepvalue"),
    "one_cycle": ("warmup_iter",),
}
"""What a learning-rate policy needs besides the rate itself (`prototxt.solver.learning_rate`)."""

_EXAMPLES = {
    "gamma": "gamma = 0.1",
    "stepsize": "stepsize = 1000",
    "stepvalue": "stepvalue = [1000, 2000]",
    "warmup_iter": "warmup_iter = 1000",
}


def _policy_has_its_settings(stage: Values) -> Iterator[Mistake]:
    policy = stage["solver.lr_policy"]
    lacking = [name for name in POLICY_SETTINGS.get(policy, ()) if not stage[f"solver.{name}"]]
    if lacking:
        examples = ", ".join(_EXAMPLES[name] for name in lacking)
        yield stage.mistake(
            "solver.lr_policy",
            f'"{policy}" needs {" and ".join(lacking)}; add to the solver, for example, {examples}',
        )
    gamma = stage["solver.gamma"]
    falls = policy == "sigmoid" and (gamma or 0) < 0
    if gamma is not None and gamma <= 0 and not falls and "gamma" not in lacking:
        signs = '; only that of "sigmoid" may be negative, and the rate falls with it' if gamma < 0 else ""
        yield stage.mistake("solver.gamma", f"{gamma:g} is not above 0{signs}")


def _warmup_ends(stage: Values) -> Iterator[Mistake]:
    warmup, end = stage["solver.warmup_iter"], stage["solver.max_iter"]
    if warmup and warmup >= end:
        yield stage.mistake(
            "solver.warmup_iter", f"{warmup} is not below the stage's max_iter {end}; make it smaller"
        )


def _momentum_fits_type(stage: Values) -> Iterator[Mistake]:
    kind = stage["solver.type"]
    if kind in ("AdaGrad", "RMSProp") and stage["solver.momentum"]:
        yield stage.mistake(
            "solver.type", f'Caffe\'s "{kind}" takes no momentum; set momentum = 0.0 beside it'
        )


FIELDS_OF_TYPES = {
    "momentum2": ("Adam",),
    "rms_decay": ("RMSProp",),
    "delta": ("AdaGrad", "RMSProp", "AdaDelta", "Adam"),
}
"""The solvers that read a setting (ComputeUpdateValue in Caffe's solvers/*.cpp)."""


def _settings_fit_type(stage: Values) -> Iterator[Mistake]:
    kind = stage["solver.type"]
    for name, kinds in FIELDS_OF_TYPES.items():
        if stage[f"solver.{name}"] is not None and kind not in kinds:
            yield stage.mistake(
                f"solver.{name}", f'no effect with type "{kind}", only with {", ".join(kinds)}; remove it'
            )


def step_iterations(stepvalue: Sequence[int]) -> list[int]:
    """When Caffe steps by these values of `multistep`: in their order, and once an iteration at most."""
    return list(accumulate(stepvalue, lambda before, value: max(before + 1, value)))


def _steps_grow(stage: Values) -> Iterator[Mistake]:
    steps = list(stage["solver.stepvalue"] or ())
    if any(later <= earlier for earlier, later in pairwise(steps)):
        what = f"{steps} does not grow: Caffe would step at {step_iterations(steps)}"
        yield stage.mistake("solver.stepvalue", f"{what}; name the iterations that you want, in order")


def _image_sizes_grow(stage: Values) -> Iterator[Mistake]:
    steps = stage["solver.image_sizes"] or ()
    for step in steps:
        if len(step) != 2:
            yield stage.mistake(
                "solver.image_sizes",
                f"{list(step)} is not an iteration and the size from there on, like [5000, 128]",
            )
            return
    for what in image_size_mistakes(steps, stage["solver.max_iter"]):
        yield stage.mistake("solver.image_sizes", what)
    if steps and stage["quantize"]:
        yield stage.mistake(
            "solver.image_sizes",
            "with `quantize`, the ranges would be of images of other sizes than in tests; remove it",
        )


def image_size_mistakes(steps: Sequence[Sequence[int]], max_iter: int) -> Iterator[str]:
    """What is wrong with ``steps``, each an iteration and the size of training images from there on."""
    iterations = [iteration for iteration, _ in steps]
    if iterations and iterations[0] != 0:
        yield f"the first size is that of iteration {iterations[0]}; begin with that of iteration 0"
    if any(later <= earlier for earlier, later in pairwise(iterations)):
        yield f"the iterations {', '.join(map(str, iterations))} do not grow; name them in order"
    if iterations and iterations[-1] >= max_iter:
        yield f"{iterations[-1]} is not below the stage's max_iter {max_iter}; make it smaller"
    for _, size in steps:
        if size < 1:
            yield f"a size of {size} pixels; it has to be at least 1"


_STAGE_RULES: tuple[Rule, ...] = (
    _has_a_solver,
    _quantizes_a_stage,
    _quantization_settings_agree,
    _trains_quantized,
    _ranges_settle,
    _one_start,
    _reinit_needs_weights,
    _zeros_frozen_once,
    _there_are_zeros,
    _pruning_begins,
    _regrowth_begins,
    _pruning_settings_agree,
    _inner_products_are_frozen_with_zeros,
    _policy_has_its_settings,
    _warmup_ends,
    _momentum_fits_type,
    _settings_fit_type,
    _steps_grow,
    _image_sizes_grow,
)
