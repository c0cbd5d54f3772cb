"""Grids, ranges and units of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_nets import built
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_any_net
from caffe_jacinto.quantization.grids import activation_grid, magnitude_grid, offset_grid, weight_grid
from caffe_jacinto.quantization.network import network_of
from caffe_jacinto.quantization.ranges import BINS, Histogram, Range
from caffe_jacinto.quantization.schemes import SCHEMES, Bits, MovingRange
from caffe_jacinto.quantization.units import units_of

NUMBERS = st.floats(-1000, 1000, width=32)
BITS = st.integers(2, 16)
WEIGHTS = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6), st.just(3), st.just(3)), elements=NUMBERS
)


def noise(count: int = 20_000, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, count).astype(np.float32)


@given(weights=WEIGHTS, bits=BITS, by_channel=st.booleans(), power=st.booleans(), best=st.booleans())
def test_a_weight_of_zero_stays_zero_and_none_moves_further_than_half_a_step(
    weights: Any, bits: int, by_channel: bool, power: bool, best: bool
) -> None:
    axis = 0 if by_channel else None
    grid = weight_grid(weights, bits, axis=axis, power_of_two=power, squared_error=best)
    rounded = grid.rounded(weights)
    assert (rounded[weights == 0] == 0).all()
    numbers = grid.numbers(weights)
    assert np.abs(numbers).max() <= 2 ** (bits - 1) - 1
    assert grid.steps.size == (len(weights) if by_channel else 1)
    if power:
        assert (np.frexp(grid.steps)[0] == 0.5).all()
    if not best:
        steps = grid.steps.reshape(-1, 1, 1, 1)
        assert (np.abs(rounded - weights) <= steps * 0.5001).all()


def test_the_least_squared_error_is_not_above_that_of_the_whole_range() -> None:
    weights = noise().reshape(4, -1)
    weights[:, 0] = 20  # an outlier in each channel
    errors = [
        np.square(weight_grid(weights, 4, axis=0, squared_error=best).rounded(weights) - weights).sum()
        for best in (False, True)
    ]
    assert errors[1] < errors[0] / 2


@given(low=st.floats(-1e4, 0), size=st.floats(0, 1e4), bits=BITS, power=st.booleans())
def test_a_grid_of_activations_reaches_the_whole_range(
    low: float, size: float, bits: int, power: bool
) -> None:
    for start in (low, 0.0):
        grid = activation_grid(start, start + size, bits, power_of_two=power)
        assert grid.signed == (start < 0)
        ends = np.array([start, start + size, 0], np.float32)
        assert (np.abs(grid.rounded(ends) - ends) <= grid.step * 0.5001).all()
        assert grid.rounded(ends)[2] == 0


def test_pixels_less_128_have_a_step_of_one() -> None:
    assert activation_grid(-128, 127, 8).step == 1
    assert activation_grid(0, 255, 8).step == 1


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0, 1.0, 2**-7), (0, 0.996, 2**-8), (-3, 1, 2**-5), (-4, 1, 2**-5)]
)
def test_powers_of_two(low: float, high: float, step: float) -> None:
    assert activation_grid(low, high, 8, power_of_two=True).step == step


def test_the_forks_weights_reach_both_ends_and_miss_zero() -> None:
    """The offset is not rounded, so a pruned weight does not stay zero."""
    weights = np.array([-0.3, 0, 0.11, 0.7], np.float32)
    rounded = offset_grid(float(weights.min()), float(weights.max()), 8).rounded(weights)
    np.testing.assert_allclose(rounded[[0, 3]], weights[[0, 3]], atol=1e-6)
    assert 1e-5 < abs(rounded[1]) < 1 / 255


def test_the_forks_activations_and_biases() -> None:
    assert magnitude_grid(0, 2, 8).step == pytest.approx(2 / 255)
    signed = magnitude_grid(-1, 2, 8)
    assert (signed.step, signed.low, signed.high) == (pytest.approx(2 / 127), -128, 127)
    bias = magnitude_grid(-0.5, 0.25, 16, clipped=False)
    assert bias.rounded(np.array([700], np.float32))[0] == pytest.approx(700, rel=1e-4)


def test_a_moving_range_is_the_forks() -> None:
    """The first pass whole, then new = 0.99 x old + 0.01 x 1.25 x seen."""
    found = Range()
    found.moved(-1, 2, MovingRange())
    assert (found.low, found.high) == (-1.25, 2.5)
    found.moved(-2, 4, MovingRange())
    assert found.low == pytest.approx(0.99 * -1.25 + 0.01 * -2.5)
    assert found.high == pytest.approx(0.99 * 2.5 + 0.01 * 5)


@given(parts=st.lists(st.integers(1, 400), min_size=1, max_size=6), scale=st.floats(0.01, 100))
def test_a_histogram_loses_no_value_as_its_span_grows(parts: list[int], scale: float) -> None:
    histogram = Histogram()
    for number, part in enumerate(parts):
        histogram.add((noise(part, number) * scale * 3**number).astype(np.float32))
    assert histogram.counts.sum() == sum(parts)
    assert len(histogram.counts) == BINS


def test_percentiles_are_numpys_within_a_bin() -> None:
    values = np.abs(noise(200_000))
    found = Range(histogram=Histogram())
    for part in np.array_split(values, 7):
        found.add(float(part.min()), float(part.max()), part)
    assert found.histogram is not None
    low, high = found.chosen("percentile", 99.9, 8, power_of_two=False)
    assert low == values.min()
    assert high == pytest.approx(np.percentile(values, 99.9), abs=3 * 2 * found.histogram.span / BINS)
    assert found.chosen("minmax", 99.9, 8, power_of_two=False) == (values.min(), values.max())


@pytest.mark.parametrize("power", [False, True])
def test_the_squared_error_chooses_a_range_that_clips_an_outlier(power: bool) -> None:
    values = np.append(noise(100_000), np.float32(60))
    found = Range(histogram=Histogram())
    found.add(float(values.min()), float(values.max()), values)
    errors = []
    for method in ("minmax", "mse"):
        low, high = found.chosen(method, 100, 4, power_of_two=power)  # type: ignore[arg-type]
        grid = activation_grid(low, high, 4, power_of_two=power)
        errors.append(float(np.square(grid.rounded(values) - values).sum()))
    assert errors[1] < errors[0] / 2


def test_a_processor_computes_a_convolution_with_its_relu(tmp_path: Path) -> None:
    net = parse_any_net(built("jacintonet11", Dialect.BVLC, tmp_path), "deploy.prototxt")
    units = {unit.name: unit for unit in units_of(net.layer, ["data"], fork=False, where="deploy.prototxt")}
    assert units["conv1a"].layers == ("conv1a", "conv1a/bn", "conv1a/scale", "conv1a/relu")
    assert units["conv1a"].output == units["data"].output == units["pool5"].output == "quantized"
    assert units["pool1"].output == "kept"


@pytest.mark.parametrize(
    ("activation", "together"),
    [
        ('"ReLU6"', True),
        ('"Clip" clip_param { min: 0 max: 6 }', True),
        ('"Clip" clip_param { min: -1 max: 1 }', False),
        ('"ReLU" relu_param { negative_slope: 0.1 }', False),
    ],
)
def test_what_clips_from_zero_on_is_computed_with_the_layer_before(activation: str, together: bool) -> None:
    text = (
        'input: "data" layer { name: "c" type: "Convolution" bottom: "data" top: "c" '
        "convolution_param { num_output: 4 kernel_size: 1 } } "
        f'layer {{ name: "a" bottom: "c" top: "a" type: {activation} }}'
    )
    net = parse_any_net(text, "deploy.prototxt")
    units = units_of(net.layer, ["data"], fork=False, where="deploy.prototxt")
    assert [unit.layers for unit in units[1:]] == ([("c", "a")] if together else [("c",), ("a",)])


def test_what_only_orders_values_anew_keeps_their_scale() -> None:
    text = 'input: "data"\n' + "".join(
        f'layer {{ name: "{kind}" type: "{kind}" bottom: "data" top: "{kind}" }}\n'
        for kind in ("ShuffleChannel", "Permute")
    )
    net = parse_any_net(text, "deploy.prototxt")
    units = units_of(net.layer, ["data"], fork=False, where="deploy.prototxt")
    assert [unit.output for unit in units] == ["quantized", "kept", "kept"]


def test_what_the_fork_merges(tmp_path: Path) -> None:
    """A batch norm that comes before a convolution and not after one is merged with it."""
    net = parse_any_net(built("resnet10", Dialect.BVLC, tmp_path), "deploy.prototxt")
    units = {unit.name: unit for unit in units_of(net.layer, ["data"], fork=True, where="deploy.prototxt")}
    assert units["data_bn"].output == "float"
    assert units["conv1"].layers[-1] == "conv1_relu"
    assert units["layer_64_1_sum"].output == units["conv1_pool"].output == "quantized"
    assert units["layer_128_1_bn1"].layers[-1] == "layer_128_1_relu1"


@pytest.mark.parametrize(
    ("bits", "floats", "message"),
    [
        ({"conv9": 16}, (), "--bits-of conv9: the network has no such layer; "),
        ({"conv1a": 17}, (), "--bits-of conv1a=17: 17 bits for weights: give 2 to 16"),
        ({}, ("conv1",), "did you mean conv1b?"),
    ],
)
def test_a_wrong_request_is_one_line(
    bits: dict[str, int], floats: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    net = parse_any_net(built("jacintonet11", Dialect.BVLC, tmp_path), "deploy.prototxt")
    with pytest.raises(UserError, match=message.replace("?", "[?]")):
        network_of(SCHEMES["processor"], net.layer, {}, "deploy.prototxt", bits=bits, floats=floats)


def test_bits_out_of_range() -> None:
    with pytest.raises(UserError, match="1 bits for activations: give 2 to 16"):
        Bits(activations=1).checked()


def test_a_layer_that_no_scheme_knows() -> None:
    text = 'input: "data" layer { name: "m" type: "MVN" bottom: "data" top: "m" }'
    net = parse_any_net(text, "deploy.prototxt")
    with pytest.raises(
        UserError, match=r"deploy.prototxt: layer m \(MVN\) cannot be quantized: no scheme knows"
    ):
        network_of(SCHEMES["processor"], net.layer, {}, "deploy.prototxt")
