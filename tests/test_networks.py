"""What the networks are made of, without any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.errors import UserError
from caffe_jacinto.networks.layers import BatchNorm, Convolution, MaxPooling, Network, ReLU
from caffe_jacinto.networks.registry import build_network

STRIDES = (2, 2, 2, 2, 2)


def convolutions(network: Network) -> dict[str, Convolution]:
    return {layer.name: layer for layer in network.layers if isinstance(layer, Convolution)}


def test_jacintonet11_has_ten_convolutions_of_the_published_sizes() -> None:
    network = build_network("jacintonet11", 1000, 224, STRIDES)
    shapes = {
        name: (c.outputs, c.kernel, c.stride, c.pad, c.group) for name, c in convolutions(network).items()
    }
    assert shapes == {
        "conv1a": (32, 5, 2, 2, 1),
        "conv1b": (32, 3, 1, 1, 4),
        **{
            f"res{n}a_branch2{half}": (outputs, 3, 1, 1, group)
            for n, outputs in ((2, 64), (3, 128), (4, 256), (5, 512))
            for half, group in (("a", 1), ("b", 4))
        },
    }
    assert network.scores == "fc1000"


def test_every_blob_is_made_before_it_is_read_and_names_are_unique() -> None:
    network = build_network("jacintonet11", 10, 32, (1, 1, 2, 1, 2))
    made = {"data"}
    for layer in network.layers:
        assert set(layer.bottoms) <= made
        made.add(layer.top)
    names = [layer.name for layer in network.layers]
    assert len(set(names)) == len(names)
    for name in convolutions(network):
        assert (
            BatchNorm(f"{name}/bn", (name,), name, moving_average_fraction=0.99, eps=1e-4) in network.layers
        )
        assert ReLU(f"{name}/relu", (name,), name) in network.layers


@given(st.tuples(*[st.integers(1, 4)] * 5))
def test_strides_are_those_of_conv1a_and_the_poolings(strides: tuple[int, ...]) -> None:
    network = build_network("jacintonet11", 10, 4**5, strides)
    poolings = [layer for layer in network.layers if isinstance(layer, MaxPooling)]
    assert (convolutions(network)["conv1a"].stride, *(p.stride for p in poolings)) == strides
    assert all(p.kernel == p.stride for p in poolings)


@pytest.mark.parametrize(
    ("name", "crop", "strides", "says"),
    [
        ("jacintonet12", 224, STRIDES, "did you mean jacintonet11?"),
        ("vgg", 224, STRIDES, "known: bvlc_alexnet, jacintonet11, resnet10"),
        ("jacintonet11", 224, (2, 2, 2, 2), "five whole numbers"),
        ("jacintonet11", 224, (2, 2, 2, 2, 2, 2), "five whole numbers"),
        ("jacintonet11", 224, (2, 2, 2, 2, 0), "five whole numbers"),
        ("jacintonet11", 31, STRIDES, "a crop of at least 32"),
        ("jacintonet11", 0, STRIDES, "at least 2 classes and 1 pixel"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, crop: int, strides: tuple[int, ...], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        build_network(name, 1000, crop, strides)


def test_the_smallest_crop_that_the_strides_leave_a_pixel_of() -> None:
    assert build_network("jacintonet11", 1000, 32, STRIDES).crop_size == 32
