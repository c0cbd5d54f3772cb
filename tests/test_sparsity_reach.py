"""What a sparsity schedule can reach, known before the training: against the pruning itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparsify import ArrayPruner

from caffe_jacinto.engines.contract import EngineInfo
from caffe_jacinto.engines.pycaffe.engine import BvlcEngine
from caffe_jacinto.netspec.graph import TRAIN, messages_in
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.pruning.layers import CountedLayer, find_counted
from caffe_jacinto.pruning.reach import no_zeros, reach, thresholds_needed
from caffe_jacinto.recipes.load import built_in_recipes, load_recipe
from caffe_jacinto.recipes.model import SparseSettings
from caffe_jacinto.runs.plan import plan_run
from caffe_jacinto.runs.sparsity_check import Shortfall, held_back, shortfalls

SCHEDULES = st.builds(
    SparseSettings,
    target=st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.99]),
    start_iter=st.integers(0, 12),
    step_iter=st.integers(1, 5),
    step_factor=st.sampled_from([0.01, 0.07, 0.25, 0.6]),
    start_factor=st.sampled_from([0.0, 0.3]),
    threshold_maxratio=st.sampled_from([0.2, 10.0]),
    threshold_value_max=st.sampled_from([0.2, 1e9]),
    by=st.sampled_from(["channel", "layer", "network"]),
    schedule=st.sampled_from(["steps", "cubic"]),
)
PATTERNS = st.builds(
    SparseSettings,
    target=st.sampled_from([0.2, 0.5]),
    start_iter=st.integers(0, 12),
    step_factor=st.sampled_from([0.07, 0.25, 0.6]),
    pattern=st.sampled_from(["2:4", "1:2"]),
)


def pruned_for(weights: np.ndarray, sparse: SparseSettings, max_iter: int) -> ArrayPruner:
    """What the training's own pruner makes of weights that nothing else changes."""
    pruner = ArrayPruner(weights.copy(), sparse)
    pruner.freeze_zeros()
    for iteration in range(max_iter):
        pruner.after_update(iteration)
    return pruner


@given(
    st.one_of(SCHEDULES, PATTERNS),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_pruning_never_goes_beyond_it(
    sparse: SparseSettings, max_iter: int, inputs: int, seed: int, zeros: float
) -> None:
    random = np.random.default_rng(seed)
    weights = random.normal(0, 0.1, (32, inputs, 3, 3)).astype(np.float32)
    weights[random.random(weights.shape) < zeros * random.random((32, 1, 1, 1))] = 0
    convolution = CountedLayer("conv", weights.shape, 1, learns=True)
    start = {"conv": (weights == 0).reshape(32, -1).sum(axis=1)}
    most = reach([convolution], sparse, max_iter, start)
    pruner = pruned_for(weights, sparse, max_iter)
    assert pruner.sparsity() <= most.sparsity + 1e-12
    if sparse.by == "channel":
        assert ((pruner.weights == 0).reshape(32, -1).sum(axis=1) <= most.zeros["conv"]).all()
    applied = [line for line in pruner.reports if "applying" in line]
    assert len(applied) <= most.thresholds
    assert pruner.factor <= most.factor + 1e-12
    if thresholds_needed([convolution], sparse, start) is None:
        assert pruner.sparsity() < sparse.target


@settings(max_examples=20)
@given(SCHEDULES, st.integers(0, 2**32 - 1))
def test_without_caps_pruning_reaches_all_of_it(schedule: SparseSettings, seed: int) -> None:
    sparse = schedule.model_copy(update={"threshold_maxratio": 10.0, "threshold_value_max": 1e9})
    weights = np.arange(1, 32 * 32 * 9 + 1, dtype=np.float32)
    np.random.default_rng(seed).shuffle(weights)
    convolution = CountedLayer("conv", (32, 32, 3, 3), 1, learns=True)
    most = reach([convolution], sparse, 40, no_zeros([convolution]))
    pruner = pruned_for(weights.reshape(convolution.shape), sparse, 40)
    if most.sparsity < sparse.target:
        assert pruner.sparsity() == most.sparsity
    else:
        assert pruner.sparsity() >= sparse.target


def found(recipe: str, *overrides: str, dialect: Dialect = Dialect.BVLC) -> list[Shortfall]:
    """What is said of a built-in recipe with these settings; no Caffe is needed to know it."""
    info = EngineInfo("bvlc", Path("caffe"), None, dialect, False, False, True, True, None, ())
    loaded = load_recipe(recipe, overrides)
    run = plan_run(loaded, Path("run"), BvlcEngine(info), ())
    texts = {plan.name: run.files(plan) for plan in run.stages}
    return shortfalls(run, run.stages, texts, {})


@pytest.mark.parametrize("recipe", built_in_recipes())
def test_the_built_in_recipes_can_reach_their_targets(recipe: str) -> None:
    weights = ["stages.finetune.weights=none.caffemodel"] if "finetune" in recipe else []
    assert found(recipe, *weights) == []


SPARSE = "stages.sparse.sparse"
MAX_ITER = "stages.sparse.solver.max_iter"
EXPECTED = [
    ([f"{MAX_ITER}=12", f"{SPARSE}.start_iter=11"], "the first threshold comes after iteration 15, ", True),
    ([f"{MAX_ITER}=21"], "3 thresholds before max_iter 21 end at a factor of 0.06, ", False),
    ([f"{MAX_ITER}=11"], "1 threshold before max_iter 11 ends at a factor of 0.02, ", False),
    ([f"{SPARSE}.target=0.96"], "a factor of 0.96, ", False),
]


@pytest.mark.parametrize("settings_message_useless", EXPECTED)
def test_a_target_that_cannot_be_reached_and_what_would_do(
    settings_message_useless: tuple[list[str], str, bool],
) -> None:
    overrides, message, useless = settings_message_useless
    (shortfall,) = found("demo_digits", *overrides)
    assert message in shortfall.message
    assert shortfall.useless == useless
    ways = re.findall(r"stages\.sparse\.\S+=[\d.]*\d", shortfall.message.rpartition("; ")[2])
    assert ways
    for way in ways:
        assert found("demo_digits", *overrides, way) == [], way


def test_a_schedule_that_starts_beyond_its_end() -> None:
    (shortfall,) = found("demo_digits", f"{SPARSE}.start_factor=0.97")
    assert shortfall.useless
    assert "start_factor 0.97 is above 0.95" in shortfall.message


def test_layers_that_the_rule_leaves_alone_and_frozen_ones_are_counted() -> None:
    frozen = ['network.frozen=["res5a_branch2a"]', 'stages.initial.weights="none.caffemodel"']
    (shortfall,) = found("demo_digits", *frozen)
    weights = [512 * 256, 512 * 128, 256 * 128, 256 * 64, 128 * 64, 128 * 32, 64 * 32, 64 * 16, 32 * 8]
    share = 512 * 256 * 9 / (9 * sum(weights) + 32 * 3 * 25)
    assert f"(not pruned, frozen: 1 layer with {share:.1%} of the weights, res5a_" in shortfall.message
    assert not shortfall.useless
    way = shortfall.message.rpartition("; ")[2].partition(" ")[0]
    assert way.startswith(f"{SPARSE}.target=0.")
    assert found("demo_digits", *frozen, way) == []
    next_target = float(way.partition("=")[2]) + 0.001
    assert found("demo_digits", *frozen, f"{SPARSE}.target={next_target:.3f}")


def test_a_stage_that_starts_from_a_sparse_one_has_its_zeros() -> None:
    later = [f"stages.finetune.sparse.{name}" for name in ("target=0.7", "start_iter=0", "step_iter=50")]
    settings = [*later, "stages.finetune.freeze_zeros=false"]
    assert found("demo_digits", *settings) == []
    (shortfall,) = found("demo_digits", *settings, 'stages.finetune.start="l1reg"')
    assert shortfall.message.startswith("stage finetune: the sparsity cannot reach the target of 0.7")


def test_lenet_cannot_be_thinned_by_the_published_rule(published: Path) -> None:
    """Its first convolution is too small, the second is pruned by half, and its weights lie elsewhere."""
    net = parse_net((published / "networks" / "lenet_train_test.prototxt").read_text(), Dialect.BVLC, "lenet")
    layers = messages_in(net, TRAIN)
    shapes = blob_shapes(net, TRAIN, [(64, 1, 28, 28)])
    rule = SparseSettings(start_iter=0)

    def counted(sparse: SparseSettings) -> list[CountedLayer]:
        return find_counted(layers, lambda name: shapes[name][0], inner_products=sparse.inner_products)

    convolutions = counted(rule)
    most = reach(convolutions, rule, None, no_zeros(convolutions))
    assert most.sparsity == 50 * int(0.48 * 500) / (50 * 500 + 500)
    assert held_back(convolutions, rule) == [
        "pruned by half, fewer than 32 inputs or outputs: 1 layer with 98.0% of the weights, conv2",
        "not pruned, fewer than 32 inputs and outputs: 1 layer with 2.0% of the weights, conv1",
    ]
    every = rule.model_copy(update={"inner_products": True, "by": "network"})
    assert sum(layer.weights for layer in counted(every)) == 430_500
    assert thresholds_needed(counted(every), every, no_zeros(counted(every))) == 81


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (['layers=["res*", "conv9"]'], 'sparse.layers: no layer that counts is called "conv9"; did you mean'),
        (['skip=["fc10"]'], 'sparse.skip: "fc10" is an inner product; set inner_products = true'),
        (["targets={pool4=0.5}"], 'sparse.targets: "pool4" is of the type Pooling, which is not pruned'),
        (['layers=["conv1?"]', 'skip=["conv*"]'], "left out by layers or skip: 10 layers with 100.0%"),
    ],
)
def test_names_that_choose_nothing_are_refused(settings: list[str], says: str) -> None:
    (shortfall,) = found("demo_digits", *(f"{SPARSE}.{setting}" for setting in settings))
    assert says in shortfall.message
    assert shortfall.useless


def test_a_target_of_a_layer_that_is_not_pruned_is_named() -> None:
    for setting, says in (
        (f'{SPARSE}.skip=["conv1b"]', "conv1b is not pruned (left out by layers or skip)"),
        ('network.frozen=["conv1b"]', "conv1b is not pruned (frozen)"),
    ):
        settings = [f"{SPARSE}.targets={{conv1b=0.5}}", setting]
        if "frozen" in setting:
            settings.append("stages.initial.weights=trained.caffemodel")
        idle, *_ = found("demo_digits", *settings)
        assert says in idle.message
        assert not idle.useless
    assert found("demo_digits", f"{SPARSE}.targets={{conv1b=0.5}}") == []


def test_skipped_layers_hold_a_target_back_and_a_pattern_may_too() -> None:
    (shortfall,) = found("demo_digits", f'{SPARSE}.skip=["res5*"]')
    assert "(not pruned, left out by layers or skip: 2 layers with 75." in shortfall.message
    (shortfall,) = found("demo_digits", f"{SPARSE}.pattern=2:4", f"{SPARSE}.target=0.5")
    assert "input channels that 4 does not divide: 1 layer" in shortfall.message
    assert "would do" in shortfall.message


@pytest.mark.parametrize(
    ("max_iter", "says"),
    [
        (30, "end at a factor of 0.08, which is less than one weight of those that are pruned together"),
        (100, "end at a factor of 0.36, which makes at most 0.249 of the convolutions' weights zero"),
    ],
)
def test_a_lower_target_is_given_the_time_that_it_takes(max_iter: int, says: str) -> None:
    settings = [f"{SPARSE}.pattern=2:4", f"{SPARSE}.target=0.4999", f"{MAX_ITER}={max_iter}"]
    (shortfall,) = found("demo_digits", *settings)
    assert says in shortfall.message
    assert shortfall.useless == (max_iter == 30)
    remedy = shortfall.message.rpartition("; ")[2]
    assert re.fullmatch(rf"{SPARSE}\.target=0\.\d+ with {MAX_ITER}=\d+ would do", remedy)
    ways = re.findall(r"stages\.sparse\.\S+=[\d.]+", remedy)
    assert found("demo_digits", *settings, *ways) == []
    assert found("demo_digits", *settings, ways[0])


def test_networks_of_1x1_convolutions_are_told_what_would_do() -> None:
    """Half of ResNet-50's weights, and nearly all of MobileNet's, lie in kernels that it leaves alone."""
    recipe, small = "imagenet_jacintonet11_channelwise", "not pruned, kernel smaller than 3x3: "
    for network, left_alone, ways in (
        ("resnet50", "36 layers with 51.7% of the weights", ["min_kernel=1", "target=0.144"]),
        ("mobilenet_v1", "13 layers with 98.6% of the weights", ["min_kernel=1"]),
    ):
        settings = [f"network.name={network}", "network.strides="]
        (shortfall,) = found(recipe, *settings)
        assert small + left_alone in shortfall.message
        assert not shortfall.useless
        for way in ways:
            assert f"{SPARSE}.{way} would do" in shortfall.message
            assert found(recipe, *settings, f"{SPARSE}.{way}") == []
    assert f"{SPARSE}.target" not in shortfall.message
