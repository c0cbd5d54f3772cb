"""Thresholds, masks and the sparsity schedule, against the rule read literally."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.fork.engine import fork_start_factor
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.prototxt.solver import learning_rate
from caffe_jacinto.pruning.layers import CountedLayer, layer_fraction, target_of, why_not_pruned
from caffe_jacinto.pruning.pruner import Pruner, load_masks, masks_file, save_masks
from caffe_jacinto.pruning.regrow import regrow_share, regrown
from caffe_jacinto.pruning.rule import outside_pattern, pruned_weights, small_weights
from caffe_jacinto.pruning.schedule import COARSE, FINE, factor_cap, factors, is_step, next_factor
from caffe_jacinto.recipes.model import SparseSettings

PUBLISHED = SparseSettings(start_iter=20000)


def literal(weights: np.ndarray, fraction: float, maxratio: float, value_max: float) -> np.ndarray:
    """Of each row of ``weights``, a channel or a layer: the largest of its magnitudes that the rule allows.

    Between two neighbouring magnitudes a threshold zeroes the same weights: these and the cap are enough.
    """
    result = np.zeros(weights.shape, bool)
    for channel, values in enumerate(weights):
        sizes = np.abs(values)
        cap = min(np.float32(value_max), np.float32(maxratio) * sizes.max())
        best = None
        for threshold in [*sizes.ravel(), cap]:
            allowed = np.count_nonzero(sizes <= threshold) <= fraction * sizes.size + 1e-6
            if threshold <= cap and allowed and (best is None or threshold > best):
                best = threshold
        if best is not None:
            result[channel] = sizes <= best
    return result


# Few different values, so that there are ties and zeros; and any values.
FEW = st.sampled_from([0.0, -0.0, 0.01, -0.01, 0.05, 0.1, -0.1, 0.3, -0.7, 1.0])
ANY = st.floats(-2, 2, width=32)
WEIGHTS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.just(3), st.just(3)).flatmap(
    lambda shape: st.one_of(arrays(np.float32, shape, elements=kind) for kind in (FEW, ANY))
)


@given(WEIGHTS, st.floats(0, 1), st.sampled_from([0.2, 0.5, 1.0, 2.0]), st.sampled_from([0.05, 0.2, 5.0]))
def test_small_weights_are_those_of_the_rule(
    weights: np.ndarray, fraction: float, maxratio: float, value_max: float
) -> None:
    found = small_weights(weights, fraction, maxratio=maxratio, value_max=value_max)
    assert (found == literal(weights, fraction, maxratio, value_max)).all()


@given(WEIGHTS, st.floats(0, 1), st.sampled_from([0.2, 2.0]), st.sampled_from([0.05, 5.0]))
def test_thresholds_by_layer_are_those_of_a_layer_taken_as_one_channel(
    weights: np.ndarray, fraction: float, maxratio: float, value_max: float
) -> None:
    found = small_weights(weights, fraction, maxratio=maxratio, value_max=value_max, by="layer")
    assert (found == literal(weights[np.newaxis], fraction, maxratio, value_max)[0]).all()


@given(WEIGHTS, st.floats(0, 1))
def test_zeroing_again_at_the_same_fraction_changes_nothing(weights: np.ndarray, fraction: float) -> None:
    zeroed = weights.copy()
    zeroed[small_weights(weights, fraction, maxratio=9, value_max=9)] = 0
    again = zeroed.copy()
    again[small_weights(zeroed, fraction, maxratio=9, value_max=9)] = 0
    assert (again == zeroed).all()


def test_no_more_than_the_fraction_of_each_channel() -> None:
    """2.88 of 288 weights are two: the published log's 0.00694 for res2a_branch2a at a factor of 0.01."""
    weights = np.random.default_rng(0).normal(size=(64, 32, 3, 3)).astype(np.float32)
    small = small_weights(weights, 0.01, maxratio=9, value_max=9)
    assert (small.reshape(64, -1).sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("shape", "group", "expected"),
    [
        ((32, 3, 5, 5), 1, True),  # conv1a: 32 outputs
        ((32, 8, 3, 3), 4, True),  # conv1b: 4 x 8 inputs
        ((16, 16, 3, 3), 1, False),  # too few of both
        ((64, 1, 3, 3), 64, False),  # depthwise
        ((64, 64, 1, 1), 1, False),
        ((64, 64, 2, 2), 1, False),
        ((10, 512), 1, False),  # an inner product
    ],
)
def test_which_layers_are_pruned(shape: tuple[int, ...], group: int, expected: bool) -> None:
    layer = CountedLayer("a", shape, group, inner_product=len(shape) == 2)
    counted = not layer.inner_product  # the published rule does not even count these
    assert (counted and why_not_pruned(layer, PUBLISHED) is None) is expected


def test_layers_with_few_inputs_or_outputs_are_pruned_by_half() -> None:
    assert layer_fraction(CountedLayer("a", (32, 3, 5, 5)), PUBLISHED, 0.8) == 0.4
    assert layer_fraction(CountedLayer("a", (16, 64, 3, 3)), PUBLISHED, 0.8) == 0.4
    assert layer_fraction(CountedLayer("a", (32, 8, 3, 3), 4), PUBLISHED, 0.8) == 0.8


@given(WEIGHTS, st.floats(0, 1), st.sampled_from(["channel", "layer"]))
def test_pruning_a_layer_is_the_rule_applied_to_it(weights: np.ndarray, factor: float, by: str) -> None:
    wide = np.concatenate([weights] * 32)[:40]
    before = wide.copy()
    layer = CountedLayer("a", wide.shape)
    sparse = SparseSettings(start_iter=0, by=by, threshold_maxratio=0.5)
    ((_, pruned),) = pruned_weights([layer], sparse, factor, lambda _: wide)
    fraction = layer_fraction(layer, sparse, factor)
    small = small_weights(wide, fraction, maxratio=0.5, value_max=0.2, by=by)
    np.testing.assert_array_equal(pruned, np.where(small, 0, wide))
    np.testing.assert_array_equal(wide, before)


def test_the_schedule_takes_steps_until_the_target_is_reached() -> None:
    assert [i for i in range(22001) if is_step(PUBLISHED, i)] == [20000, 21000, 22000]
    assert next_factor(PUBLISHED, 0.0, achieved=0.0) == 0.01
    assert next_factor(PUBLISHED, 0.81, achieved=0.79) == 0.82
    assert next_factor(PUBLISHED, 0.81, achieved=0.8) is None


def test_the_schedule_ends_above_its_cap() -> None:
    assert (factor_cap(0.5), factor_cap(0.9)) == (0.65, 0.95)
    factor, steps = 0.0, 0
    while (higher := next_factor(PUBLISHED, factor, achieved=0.5)) is not None:
        factor, steps = higher, steps + 1
    assert (factor, steps) == (0.96, 96)


@pytest.mark.parametrize(
    ("method", "schedule"), [("magnitude", "cubic"), ("soft", "steps"), ("rigl", "steps"), ("rigl", "cubic")]
)
def test_a_coarse_step_ends_at_the_target(method: str, schedule: str) -> None:
    """Where layers of few channels leave the sparsity just below it, the next one is fine."""
    rule: dict[str, Any] = {"method": method, "schedule": schedule, "target": 0.8, "start_iter": 0}
    once = SparseSettings(**rule, step_factor=0.8)
    assert next_factor(once, 0.0, achieved=0.0) == pytest.approx(0.8)
    assert next_factor(once, 0.8, achieved=0.799) == pytest.approx(0.81)
    assert next_factor(once, 0.8, achieved=0.8) is None
    if schedule == "steps":
        coarse = SparseSettings(**rule, step_factor=0.3)
        assert [next_factor(coarse, factor, achieved=factor) for factor in (0.3, 0.6)] == [0.6, 0.8]


def test_a_factor_never_passes_one() -> None:
    steep = SparseSettings(target=0.9, start_iter=0, step_factor=0.5)
    assert next_factor(steep, 0.9, achieved=0.1) == 1.0


def pruned(
    layers: list[CountedLayer], sparse: SparseSettings, factor: float, *weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The weights of all layers after one threshold."""
    before = {layer.name: values for layer, values in zip(layers, weights, strict=True)}
    return before | dict(pruned_weights(layers, sparse, factor, before.__getitem__))


@given(WEIGHTS, WEIGHTS, st.floats(0, 1), st.sampled_from([0.2, 2.0]), st.sampled_from([0.05, 5.0]))
def test_one_threshold_for_the_network_is_that_of_all_its_weights_in_one_row(
    one: np.ndarray, two: np.ndarray, factor: float, maxratio: float, value_max: float
) -> None:
    weights = [np.concatenate([values] * 32)[:40] for values in (one, two)]
    flat = [values.reshape(len(values), -1) for values in weights]
    layers = [
        CountedLayer("conv", weights[0].shape),
        CountedLayer("ip", flat[1].shape, inner_product=True),
        CountedLayer("frozen", weights[0].shape, learns=False),
    ]
    caps = {"threshold_maxratio": maxratio, "threshold_value_max": value_max}
    sparse = SparseSettings(start_iter=0, by="network", inner_products=True, **caps)
    after = pruned(layers, sparse, factor, weights[0], flat[1], weights[0])
    together = np.concatenate([weights[0].ravel(), flat[1].ravel()])[np.newaxis]
    # Of all weights, at least the factor becomes zero, if no cap and no equal weight is in the way.
    share = np.ceil(factor * together.size - 1e-6) / together.size
    expected = np.where(literal(together, share, maxratio, value_max)[0], 0, together[0])
    np.testing.assert_array_equal(np.concatenate([after["conv"].ravel(), after["ip"].ravel()]), expected)
    np.testing.assert_array_equal(after["frozen"], weights[0])


def literal_pattern(weights: np.ndarray, fraction: float, kept: int, together: int) -> np.ndarray:
    """Block by block: of each run of input channels, the smallest that may go; of equal ones the first."""
    result = np.zeros(weights.shape, bool)
    zeros = min(together - kept, int(fraction * together + 1e-6))
    for output, row, column in np.ndindex(weights.shape[0], *weights.shape[2:]):
        for start in range(0, weights.shape[1], together):
            sizes = [(abs(weights[output, start + at, row, column]), at) for at in range(together)]
            for _, at in sorted(sizes)[:zeros]:
                result[output, start + at, row, column] = True
    return result


@given(
    st.sampled_from(["1:2", "2:4", "3:4", "1:4", "3:5"]),
    st.integers(1, 3),
    st.floats(0, 1),
    st.sampled_from([FEW, ANY]),
    st.data(),
)
def test_a_pattern_prunes_each_run_of_input_channels(
    pattern: str, runs: int, factor: float, values: st.SearchStrategy[float], data: st.DataObject
) -> None:
    kept, together = map(int, pattern.split(":"))
    drawn = data.draw(arrays(np.float32, (2, runs * together, 2, 1), elements=values))
    found = outside_pattern(drawn, factor, kept, together)
    np.testing.assert_array_equal(found, literal_pattern(drawn, factor, kept, together))
    left = np.count_nonzero(~found.reshape(2, runs, together, 2), axis=2)
    assert (left >= kept).all()
    assert factor < (together - kept) / together or (left == kept).all()


def test_a_pattern_takes_no_caps_and_leaves_out_what_it_does_not_divide() -> None:
    sparse = SparseSettings(start_iter=0, target=0.5, pattern="2:4", threshold_value_max=1e-9)
    weights = np.random.default_rng(0).normal(size=(64, 32, 3, 3)).astype(np.float32)
    after = pruned([CountedLayer("a", weights.shape)], sparse, 0.5, weights)["a"]
    assert (np.count_nonzero(after.reshape(64, 8, 4, 3, 3), axis=2) == 2).all()
    first = CountedLayer("first", (64, 3, 7, 7))
    assert why_not_pruned(first, sparse) == "input channels that 4 does not divide"


@given(WEIGHTS, st.floats(0, 1), st.sampled_from(["channel", "layer", "network"]))
def test_weights_stored_inputs_first_are_pruned_alike(weights: np.ndarray, factor: float, by: str) -> None:
    matrix = np.concatenate([weights.reshape(len(weights), -1)] * 32)[:40]
    sparse = SparseSettings(start_iter=0, by=by, inner_products=True)
    plain = CountedLayer("a", matrix.shape, inner_product=True)
    turned = CountedLayer("a", matrix.T.shape, inner_product=True, transposed=True)
    old = CountedLayer("a", (1, 1, *matrix.shape), inner_product=True)
    assert (plain.outputs, plain.inputs) == (turned.outputs, turned.inputs) == (old.outputs, old.inputs)
    after = pruned([plain], sparse, factor, matrix)["a"]
    np.testing.assert_array_equal(pruned([turned], sparse, factor, matrix.T)["a"], after.T)
    np.testing.assert_array_equal(pruned([old], sparse, factor, matrix[None, None])["a"], after[None, None])


def test_which_layers_the_settings_choose() -> None:
    layers = {
        "conv1": CountedLayer("conv1", (64, 3, 7, 7)),
        "narrow": CountedLayer("narrow", (20, 1, 5, 5)),
        "res/1x1": CountedLayer("res/1x1", (64, 64, 1, 1)),
        "res/dw": CountedLayer("res/dw", (64, 1, 3, 3), 64),
        "res/3x3": CountedLayer("res/3x3", (64, 64, 3, 3)),
        "fc": CountedLayer("fc", (10, 64), inner_product=True),
    }

    def chosen(**settings: object) -> list[str]:
        sparse = SparseSettings(start_iter=0, **settings)
        return [name for name, layer in layers.items() if why_not_pruned(layer, sparse) is None]

    assert chosen() == ["conv1", "res/3x3", "fc"]
    assert chosen(min_kernel=1) == ["conv1", "res/1x1", "res/3x3", "fc"]
    assert chosen(min_kernel=4) == ["conv1", "fc"]
    assert chosen(min_kernel=1, layers=["res/*"]) == ["res/1x1", "res/3x3"]
    assert chosen(min_kernel=1, layers=["res/*"], skip=["res/3x3"]) == ["res/1x1"]
    assert chosen(skip=["fc", "conv?"]) == ["res/3x3"]
    # A target of its own takes a layer in that has few channels.
    assert chosen(targets={"narrow": 0.5}) == ["conv1", "narrow", "res/3x3", "fc"]


@given(st.floats(0.01, 0.99), st.floats(0, 1), st.sampled_from(["channel", "layer", "network"]))
def test_a_layer_with_a_target_of_its_own_gets_there_with_the_network_and_no_further(
    own: float, factor: float, by: str
) -> None:
    sparse = SparseSettings(start_iter=0, by=by, targets={"b": own, "[ab]*": 0.25}, threshold_maxratio=9.0)
    a, b, c = (CountedLayer(name, (32, 32, 3, 3)) for name in ("ab", "b", "c"))
    assert [target_of(layer, sparse) for layer in (a, b, c)] == [0.25, own, None]
    fraction = layer_fraction(b, sparse, factor)
    assert fraction == pytest.approx(own * min(factor / 0.8, 1))
    weights = (1 + np.arange(32 * 32 * 9, dtype=np.float32).reshape(32, 32, 3, 3)) * np.float32(1e-6)
    after = pruned([a, b, c], sparse, factor, weights, weights, weights)
    assert np.mean(after["b"] == 0) <= fraction + 1e-9
    assert np.mean(after["b"] == 0) > fraction - 1 / 288
    assert np.mean(after["c"] == 0) == pytest.approx(factor, abs=1 / 288)


def test_the_schedule_goes_on_until_layers_are_at_their_own_targets() -> None:
    sparse = SparseSettings(start_iter=0, targets={"a": 0.9})
    assert next_factor(sparse, 0.7, achieved=0.85) == 0.71
    assert next_factor(sparse, 0.8, achieved=0.85) is None


@given(st.integers(1, 400), st.floats(0.05, 0.99), st.floats(0, 0.9))
def test_the_cubic_schedule_is_that_of_zhu_and_gupta(steps: int, target: float, start: float) -> None:
    """s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3 at t_0 + dt, t_0 + 2 dt, ... (arXiv:1710.01878)."""
    start *= target
    growth = (target - start) / steps
    sparse = SparseSettings(
        start_iter=1000,
        step_iter=100,
        target=target,
        start_factor=start,
        step_factor=growth,
        schedule="cubic",
    )
    found = list(factors(sparse))
    t_0 = sparse.start_iter - sparse.step_iter  # the first threshold is already one step on
    for k, factor in enumerate(found[:steps]):
        t = sparse.start_iter + k * sparse.step_iter
        expected = target + (start - target) * (1 - (t - t_0) / (steps * sparse.step_iter)) ** 3
        assert factor == pytest.approx(expected)
    assert found[steps - 1] == target
    # Where the target is not reached, it goes on in steps of that size, or in fine ones.
    beyond = growth if growth <= COARSE else FINE
    rest = found[steps - 1 :]
    most = factor_cap(target)
    assert rest[1:] == pytest.approx([min(factor + beyond, most) for factor in rest[:-1]], abs=1e-8)
    assert rest[-1] >= most - 1e-8


def test_fork_goes_on_from_the_factor_of_its_snapshot_not_of_its_log_end() -> None:
    log = (
        "I0815 09:50:28.1 1 solver.cpp:45] Initializing solver from parameters: \n"
        "sparsity_start_factor: 0.1\n"
        "I0815 10:42:23.9 2 solver.cpp:409] Finding and applying sparsity: 0.11\n"
        "I0815 10:45:10.3 2 solver.cpp:639] Snapshotting to binary proto file /x y/a_iter_21000.caffemodel\n"
        "I0815 10:45:10.3 2 solver.cpp:409] Finding and applying sparsity: 0.12\n"
        "I0815 10:48:16.1 2 solver.cpp:409] Finding and app"
    )
    assert fork_start_factor(PUBLISHED, 21000, log) == 0.11


def test_fork_goes_on_a_second_time() -> None:
    first = (
        "I0815 09:50:28.1 1 solver.cpp:45] Initializing solver from parameters: \n"
        "I0815 10:42:23.9 2 solver.cpp:409] Finding and applying sparsity: 0.01\n"
        "I0815 10:45:10.3 2 solver.cpp:639] Snapshotting to binary proto file a_iter_21000.caffemodel\n"
        "I0815 10:45:10.3 2 solver.cpp:409] Finding and applying sparsity: 0.02\n"
    )
    second = (
        "I0815 11:50:28.1 1 solver.cpp:45] Initializing solver from parameters: \n"
        "sparsity_start_factor: 0.01\n"
        "I0815 11:50:28.1 1 solver.cpp:639] Snapshotting to binary proto file a_iter_21500.caffemodel\n"
    )
    assert fork_start_factor(PUBLISHED, 21500, first + second) == 0.01
    assert fork_start_factor(PUBLISHED, 21000, first + second) == 0.01


@pytest.mark.parametrize(("iteration", "factor"), [(20000, 0.0), (20001, 0.01), (70000, 0.5), (159000, 0.96)])
def test_fork_without_its_log_counts_the_steps(iteration: int, factor: float) -> None:
    assert fork_start_factor(PUBLISHED, iteration, "") == factor


def test_fork_start_factor_of_the_published_log(published: Path) -> None:
    log = (published / "logs" / "imagenet_jacintonet11_sparse.log").read_text(errors="replace")
    # The snapshot of 50,000 comes before the threshold of that iteration; the schedule ends at 0.81.
    assert fork_start_factor(PUBLISHED, 50000, log) == 0.3
    assert fork_start_factor(PUBLISHED, 150000, log) == 0.81


class ArrayPruner(Pruner):
    """Prunes one convolution ``conv``, whose weights are an array."""

    def __init__(
        self,
        weights: np.ndarray,
        sparse: SparseSettings | None = None,
        *,
        unchanged: bool = False,
        max_iter: int = 0,
    ) -> None:
        net = messages(Dialect.BVLC).NetParameter()
        net.layer.add(name="conv", type="Convolution", top=["conv"])
        self.weights, self.held, self.reports = weights, dict[str, np.ndarray](), list[str]()
        super().__init__(
            net.layer,
            lambda _: weights.shape,
            self.reports.append,
            sparse=sparse,
            max_iter=max_iter,
            unchanged=["conv"] if unchanged else [],
        )
        self.gradients = np.zeros_like(weights)

    def read(self, layer: str) -> np.ndarray:
        return self.weights

    def write(self, layer: str, weights: np.ndarray) -> None:
        self.weights = weights

    def gradient(self, layer: str) -> np.ndarray:
        return self.gradients

    def hold(self, masks: Mapping[str, np.ndarray]) -> None:
        self.held = dict(masks)


@given(WEIGHTS)
def test_what_is_zero_is_frozen(weights: np.ndarray) -> None:
    pruner = ArrayPruner(weights)
    pruner.freeze_zeros()
    assert ((pruner.held["conv"] == 0) == (weights == 0)).all()
    assert pruner.counts() == ({"conv": int((weights == 0).sum())}, {"conv": weights.size})


def test_the_schedule_prunes_at_its_steps_and_ends_at_its_target() -> None:
    weights = np.arange(1, 32 * 32 * 9 + 1, dtype=np.float32).reshape(32, 32, 3, 3)
    caps = {"threshold_maxratio": 10.0, "threshold_value_max": 1e9}
    sparse = SparseSettings(target=0.5, start_iter=2, step_iter=2, step_factor=0.25, **caps)
    pruner, sparsity = ArrayPruner(weights, sparse), []
    for iteration in range(8):
        pruner.after_update(iteration)
        sparsity.append(pruner.sparsity())
    assert sparsity == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert [line for line in pruner.reports if "applying" in line] == [
        f"Finding and applying sparsity: {factor}" for factor in ("0.25", "0.5")
    ]
    unchanged = ArrayPruner(weights, sparse, unchanged=True)
    unchanged.after_update(2)
    assert unchanged.factor == 0.25 and unchanged.sparsity() == 0


@given(data=st.data(), share=st.floats(0, 1))
def test_regrowth_against_sorting(data: st.DataObject, share: float) -> None:
    """By the paper's words: the smallest of the weights that are left go, the largest gradients come."""
    size = data.draw(st.integers(1, 40))
    numbers = st.lists(st.integers(-5, 5), min_size=size, max_size=size)
    free = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    weights = np.where(free, np.array(data.draw(numbers), np.float32), np.float32(0))
    gradients = np.array(data.draw(numbers), np.float32)
    count = int(share * free.sum() + 1e-6)
    expected = free.copy()
    order = sorted(np.flatnonzero(free), key=lambda at: (abs(weights[at]), at))
    expected[order[:count]] = False
    order = sorted(np.flatnonzero(~expected), key=lambda at: (-abs(gradients[at]), at))
    expected[order[:count]] = True
    found = regrown(weights, free, gradients, share)
    np.testing.assert_array_equal(found, expected)
    assert found.sum() == free.sum()


def test_the_share_that_regrows_falls_as_a_cosine_to_nothing() -> None:
    """Equation 1 of the RigL paper, with its defaults: 0.3 at first, half of it half way, 0 at 3/4."""
    sparse = SparseSettings(start_iter=100, method="rigl")
    found = [regrow_share(sparse, iteration, 1000) for iteration in (100, 425, 749, 750, 999)]
    assert found == pytest.approx([0.3, 0.15, 0, 0, 0], abs=1e-4)
    assert found[2] > 0 and found[3] == found[4] == 0


NO_CAPS = {"threshold_maxratio": 10.0, "threshold_value_max": 1e9}


def test_regrowth_keeps_the_sparsity_and_what_grows_is_not_counted_as_zero() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=(32, 32, 3, 3)).astype(np.float32)
    sparse = SparseSettings(target=0.5, start_iter=2, step_iter=2, step_factor=0.5, method="rigl", **NO_CAPS)
    pruner = ArrayPruner(weights, sparse, max_iter=20)
    for iteration in range(6):
        pruner.gradients = random.normal(size=weights.shape).astype(np.float32)
        asked = pruner.needs_gradients(iteration)
        assert asked == (iteration in (2, 4))
        pruner.before_update(iteration)
        assert pruner.after_update(iteration) == asked
    zero, left = pruner.weights == 0, weights.size // 2
    (line,) = (line for line in pruner.reports if line.startswith("Regrowth"))
    moved = int(re.search(r"(\d+) of \d+ weights have changed places", line)[1])  # type: ignore[index]
    assert line == f"Regrowth by 0.283: {moved} of {left} weights have changed places"
    assert 0 < moved < 0.283 * left  # some were dropped and grew at once
    assert pruner.sparsity() == 0.5  # as the masks have it
    assert zero.sum() == left + moved and (pruner.held["conv"] == 0).sum() == left
    assert zero[pruner.held["conv"] == 0].all()


def test_soft_zeros_may_return_until_the_last_threshold(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=(32, 32, 3, 3)).astype(np.float32)
    sparse = SparseSettings(target=0.5, start_iter=2, step_iter=2, step_factor=0.25, method="soft", **NO_CAPS)
    pruner, sparsity = ArrayPruner(weights, sparse, max_iter=20), []
    for iteration in range(8):
        if iteration == 3:  # as if stopped here
            pruner.save(tmp_path / "a_iter_3.solverstate")
            pruner = ArrayPruner(pruner.weights, sparse, max_iter=20)
            pruner.load(tmp_path / "a_iter_3.solverstate")
        update = random.normal(size=weights.shape).astype(np.float32) / 10
        pruner.weights = (pruner.weights + update) * pruner.held.get("conv", 1)
        pruner.after_update(iteration)
        sparsity.append(pruner.sparsity())
    assert sparsity == [0, 0, 0.25, 0, 0.5, 0.5, 0.5, 0.5]
    assert (pruner.held["conv"] == 0).mean() == 0.5
    pruner.save(tmp_path / "a_iter_8.solverstate")
    again = ArrayPruner(pruner.weights, sparse, max_iter=20)
    again.load(tmp_path / "a_iter_8.solverstate")
    assert not again.soft and not again.after_update(8)


def test_soft_zeros_are_frozen_by_the_last_threshold_that_there_is_time_for() -> None:
    weights = np.arange(1, 32 * 32 * 9 + 1, dtype=np.float32).reshape(32, 32, 3, 3)
    sparse = SparseSettings(target=0.8, start_iter=2, step_iter=2, step_factor=0.25, method="soft", **NO_CAPS)
    pruner = ArrayPruner(weights, sparse, max_iter=5)
    for iteration in range(5):
        assert pruner.soft
        pruner.after_update(iteration)
    assert not pruner.soft and (pruner.held["conv"] == 0).mean() == 0.5


@given(values=WEIGHTS, factor=st.floats(0, 1))
def test_masks_and_factor_come_back_from_their_file(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, factor: float
) -> None:
    snapshot = tmp_path_factory.getbasetemp() / "a_iter_7.solverstate"
    pruner = ArrayPruner(values)
    pruner.freeze_zeros()
    pruner.factor = factor
    pruner.save(snapshot)
    back = ArrayPruner(values)
    back.load(snapshot)
    assert back.factor == factor
    assert (back.held["conv"] == pruner.held["conv"]).all()


def test_masks_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    snapshot = tmp_path / "a_iter_7.solverstate"
    weights = {"conv": np.array([[[[0.0, 1.0]]]], np.float32)}
    with pytest.raises(UserError, match="is missing"):
        load_masks(snapshot, weights)
    save_masks(snapshot, {"conv": np.array([[[[0.0, 1.0]]]], np.float32)}, 0.5, weights)
    with pytest.raises(
        UserError, match=r"npz is of other weights, and does not belong to .*a_iter_7\.solver"
    ):
        load_masks(snapshot, {"conv": np.ones((1, 1, 1, 2), np.float32)})
    save_masks(snapshot, {"conv": np.array([[[[0.0, 1.0]]]], np.float32)}, 0.5, {})
    with pytest.raises(UserError, match="1 frozen weights are not zero"):
        load_masks(snapshot, {"conv": np.ones((1, 1, 1, 2), np.float32)})
    with pytest.raises(UserError, match="is of another network"):
        load_masks(snapshot, {"other": weights["conv"]})
    whole = masks_file(snapshot).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        masks_file(snapshot).write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be used"):
            load_masks(snapshot, weights)


@pytest.mark.parametrize(
    ("fields", "iteration", "rate"),
    [
        ({"lr_policy": "fixed"}, 7, 0.1),
        ({"lr_policy": "step", "gamma": 0.5, "stepsize": 10}, 25, 0.025),
        ({"lr_policy": "exp", "gamma": 0.5}, 2, 0.025),
        ({"lr_policy": "inv", "gamma": 1, "power": 2}, 1, 0.025),
        ({"lr_policy": "multistep", "gamma": 0.1, "stepvalue": [10, 20]}, 20, 0.001),
        ({"lr_policy": "multistep", "gamma": 0.1, "stepvalue": [10, 10]}, 10, 0.01),
        ({"lr_policy": "multistep", "gamma": 0.1, "stepvalue": [10, 10]}, 11, 0.001),
        ({"lr_policy": "multistep", "gamma": 0.1, "stepvalue": [10, 5]}, 9, 0.1),
        ({"lr_policy": "exp", "gamma": 1e9}, 100, np.inf),
        ({"lr_policy": "poly", "power": 1, "max_iter": 100}, 50, 0.05),
        ({"lr_policy": "sigmoid", "gamma": 1, "stepsize": 5}, 5, 0.05),
        ({"lr_policy": "sigmoid", "gamma": 1, "stepsize": 5}, 3, 0.1 / (1 + np.exp(2))),
        ({"lr_policy": "sigmoid", "gamma": 1, "stepsize": 5}, 7, 0.1 / (1 + np.exp(-2))),
        ({"lr_policy": "sigmoid", "gamma": 0.1, "stepsize": 10000}, 0, 0.0),
        ({"lr_policy": "sigmoid", "gamma": -0.1, "stepsize": 10000}, 0, 0.1),
    ],
)
def test_learning_rates(fields: dict[str, object], iteration: int, rate: float) -> None:
    solver = messages(Dialect.BVLC).SolverParameter(base_lr=0.1, **fields)
    assert learning_rate(solver, iteration) == pytest.approx(rate)
