"""How convolutions and batch norms are computed on a GPU, as far as that can be tried on the CPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.engines.pytorch.convolutions import Convolution, Geometry
from caffe_jacinto.engines.pytorch.memory import _largest
from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net


def test_the_kernels_are_pytorchs_functions() -> None:
    """In Triton's interpreter: batch norm in both dialects, with and without what is behind it; windows."""
    if find_spec("triton") is None and not os.environ.get("CI"):
        pytest.skip("needs Triton (pip install -e .[dev])")
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernels_on_cpu.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert len(found["errors"]) == 48
    assert {case: error for case, error in found["errors"].items() if not error < 1e-4} == {}
    assert found["wrong pixels"] == 0
    assert found["nan"], "a value that is not a number has to stay one"


@given(
    kernel=st.integers(1, 7),
    step=st.integers(2, 4),
    pad=st.integers(0, 3),
    blocks=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    channels=st.integers(1, 4),
    biased=st.booleans(),
)
def test_blocks_as_channels_are_the_same_convolution(
    kernel: int, step: int, pad: int, blocks: tuple[int, int], channels: int, biased: bool
) -> None:
    height, width = (max(size * step, -(-kernel // step) * step) for size in blocks)
    images = torch.randn(2, channels, height, width)
    weights = torch.randn(3, channels, kernel, kernel, requires_grad=True)
    bias = torch.randn(3) if biased else None
    convolution = Convolution(Geometry((step, step), (pad, pad), (1, 1), 1))
    results = []
    for way in (convolution._direct, convolution._in_blocks):
        made = way(images, weights, bias)
        (gradient,) = torch.autograd.grad(made.square().sum(), weights)
        results.append((made, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@given(group=st.integers(2, 4), inputs=st.integers(1, 3), outputs=st.integers(1, 3), stride=st.integers(1, 2))
def test_groups_at_once_are_the_same_convolution(group: int, inputs: int, outputs: int, stride: int) -> None:
    images = torch.randn(2, group * inputs, 6, 7)
    weights = torch.randn(group * outputs, inputs, 3, 3)
    convolution = Convolution(Geometry((stride, stride), (1, 1), (1, 1), group))
    one, other = (way(images, weights, None) for way in (convolution._direct, convolution._dense))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@given(each=st.integers(10**4, 10**8), rest=st.integers(0, 10**9), noise=st.integers(0, 10**8))
def test_the_largest_batch_follows_from_small_ones(each: int, rest: int, noise: int) -> None:
    """Whatever small passes take beside what grows with the batch. That batch fits; a larger one does not."""
    available = 10**11
    fits = _largest(lambda batch: max(rest + each * batch, noise), available)
    assert rest + each * fits <= available
    assert rest + each * 1.2 * (fits + 1) > 0.9 * available


NET = """name: "net"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv.1" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 6
  kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "forward" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "loss" type: "Eltwise" bottom: "conv" bottom: "conv" top: "loss" loss_weight: 1
  eltwise_param { operation: PROD } }
"""


def test_a_net_is_a_module_with_parameters_by_layer_and_blob() -> None:
    """Also where a layer's name has a dot, or is an attribute's; copies and hooks work as for any module."""
    net = Net(parse_net(NET, Dialect.BVLC, "net"), TRAIN, Dialect.BVLC, where="net", seed=1)
    names = ["conv_1.0", "conv_1.1", "forward.0", "forward.1", "forward.2", "scale.0", "scale.1"]
    assert list(net.state_dict()) == names
    assert {name for name, _ in net.named_buffers()} == {"forward.0", "forward.1", "forward.2"}
    images = {"data": torch.randn(4, 3, 8, 8)}
    other = copy.deepcopy(net)
    seen = []
    other._modules["conv_1"].register_forward_hook(lambda *arguments: seen.append(arguments))  # type: ignore[union-attr]
    before = net(images).loss
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(images).loss == 0
    assert len(seen) == 1
    assert net(images).loss == before
    assert not torch.equal(net.state_dict()["forward.0"], other.state_dict()["forward.0"])
