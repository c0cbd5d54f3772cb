"""How convolutions and batch norms are computed: on a CPU, and on a GPU as far as can be tried here."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from caffe_jacinto.engines.pytorch import convolutions, cpu_kernels, native
from caffe_jacinto.engines.pytorch.batch_norm import NormSettings
from caffe_jacinto.engines.pytorch.choices import Choices
from caffe_jacinto.engines.pytorch.convolutions import Convolution, Geometry, Way
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


def test_the_compiled_kernels_are_there() -> None:
    """Where tests run, there is a compiler; without it, PyTorch would be compared with itself below."""
    assert cpu_kernels.why_not() is None


@settings(max_examples=40)
@given(
    sizes=st.tuples(
        st.integers(1, 5), st.sampled_from([1, 3, 20, 32, 96]), st.integers(1, 9), st.integers(1, 9)
    ),
    bf16=st.booleans(),
    affine=st.booleans(),
    rectify=st.booleans(),
    pool=st.booleans(),
    mean=st.sampled_from([0.0, 3.0, 50.0]),
    seed=st.integers(0, 1 << 31),
)
def test_compiled_batch_norm_is_pytorchs(
    sizes: tuple[int, int, int, int],
    bf16: bool,
    affine: bool,
    rectify: bool,
    pool: bool,
    mean: float,
    seed: int,
) -> None:
    """Outputs, gradients and moments; those of bfloat16 against PyTorch in float32 on the same values."""
    torch.manual_seed(seed)
    batch, channels, height, width = (sizes[0] + 1, sizes[1], 2 * sizes[2], 2 * sizes[3])
    kind = torch.bfloat16 if bf16 else torch.float32
    images = (torch.randn(batch, channels, height, width) * 3 + mean).to(kind)
    images = images.contiguous(memory_format=torch.channels_last)
    scale, shift = (torch.randn(channels) if affine else None for _ in range(2))
    offset, moments = torch.randn(channels, requires_grad=True), torch.empty(2, channels)
    mine = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (images, scale, shift)]
    theirs = [None if t is None else t.float().clone().requires_grad_() for t in (images, scale, shift)]
    settings = NormSettings(1e-4, 0.9, False, rectify, pool)
    result = cpu_kernels.NormRectifyPool.apply(*mine, offset, moments, settings)
    average, variance = torch.zeros(channels), torch.zeros(channels)
    expected = F.batch_norm(theirs[0], average, variance, theirs[1], theirs[2], True, 1.0, 1e-4)
    # Rounding decides on which side of the ReLU's edge a value is that lies on it.
    assume(not rectify or float(expected.detach().abs().min()) > 2e-5)
    expected = torch.relu(expected) if rectify else expected
    expected = F.max_pool2d(expected, 2, 2) if pool else expected
    assert result.shape == expected.shape
    assert result.dtype == kind
    gradient = torch.randn_like(expected).to(kind)
    result.backward(gradient)
    expected.backward(gradient.float())
    close = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-4 + 1e-6 * mean}
    torch.testing.assert_close(result.float(), expected, **close)
    torch.testing.assert_close(moments[0], average + offset, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments[1], variance, rtol=1e-4, atol=1e-4)
    for own, other in zip(mine, theirs, strict=True):
        if own is not None:
            assert own.grad is not None
            assert other is not None
            torch.testing.assert_close(own.grad.float(), other.grad, **close)
    assert offset.grad is not None
    assert not offset.grad.any()


def test_compiled_batch_norm_does_not_depend_on_the_number_of_threads() -> None:
    images = torch.randn(8, 64, 40, 40).contiguous(memory_format=torch.channels_last)
    settings, threads = NormSettings(1e-4, 0.9, False, True, True), torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            given, moments = images.clone().requires_grad_(), torch.empty(2, 64)
            result = cpu_kernels.NormRectifyPool.apply(given, None, None, None, moments, settings)
            result.square().sum().backward()
            seen.append((result.detach(), moments, given.grad))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))  # type: ignore[arg-type]


def test_what_is_not_a_number_stays_so_in_compiled_batch_norm() -> None:
    settings = NormSettings(1e-4, 0.9, False, True, True)
    for kind in (torch.float32, torch.bfloat16):
        images = torch.full((2, 16, 4, 4), float("nan"), dtype=kind)
        images = images.contiguous(memory_format=torch.channels_last)
        result = cpu_kernels.NormRectifyPool.apply(images, None, None, None, torch.empty(2, 16), settings)
        assert result.isnan().all()


def test_compiled_kernels_run_on_pytorchs_own_threads() -> None:
    """A second OpenMP library would have threads of its own, which compete with PyTorch's."""
    cpu_kernels._library()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in mapped if "/libgomp" in line or "/libiomp5" in line}
    assert len(libraries) == 1


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (None, "there is no C++ compiler"),
        ("#!/bin/sh\necho 'cc1plus: error: bad value' >&2\nexit 1\n", "failed: cc1plus: error: bad value"),
        ("#!/bin/sh\nexit 0\n", "No such file"),
    ],
)
def test_without_a_compiler_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, message: str
) -> None:
    for name in ("bin", "cache"):
        (tmp_path / name).mkdir()
    if compiler is not None:
        (tmp_path / "bin/c++").write_text(compiler)
        (tmp_path / "bin/c++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.CompileError, match=re.escape(message)):
        native.load(Path(cpu_kernels.__file__).with_suffix(".cpp"))
    assert not list((tmp_path / "cache/caffe_jacinto").glob("*")), "nothing half-made is left"


def test_a_kept_library_that_was_cut_off_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: path)
    kept = Path(str(native.load(source)))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept.write_bytes(kept.read_bytes()[:100])
    assert native.load(source).seven() == 7


def test_a_net_without_compiled_kernels_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {"data": torch.randn(4, 3, 8, 8)}
    losses, gradients = [], []
    for reason in (None, "there is no C++ compiler"):
        monkeypatch.setattr(cpu_kernels, "why_not", lambda reason=reason: reason)
        net = Net(parse_net(NET, Dialect.BVLC, "net"), TRAIN, Dialect.BVLC, where="net", seed=1)
        loss = net(images).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: weights.grad for name, weights in net.named_parameters()})
        assert len(net.steps) == (2 if reason is None else 3)
    torch.testing.assert_close(*losses)
    # A bias in front of a batch norm changes nothing; PyTorch's gradient of it is what rounding leaves.
    assert not gradients[0].pop("conv_1.1").any()
    assert gradients[1].pop("conv_1.1").abs().max() < 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@given(
    group=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pad=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    biased=st.booleans(),
    bf16=st.booleans(),
    seed=st.integers(0, 1 << 31),
)
@settings(max_examples=50)
def test_every_way_on_the_cpu_is_the_same_convolution(
    group: int,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pad: tuple[int, int],
    biased: bool,
    bf16: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    assume(
        not Convolution(Geometry(stride, pad, dilation, group))._is_wrong_in(
            torch.bfloat16 if bf16 else torch.float32
        )
    )
    images = (
        torch.randn(3, group * inputs, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    )
    weights = torch.randn(group * outputs, inputs, *kernel, requires_grad=True)
    bias = torch.randn(group * outputs, requires_grad=True) if biased else None
    convolution = Convolution(Geometry(stride, pad, dilation, group))
    learned = [images, weights] if bias is None else [images, weights, bias]
    gradient: torch.Tensor | None = None

    def computed(way: Way) -> list[torch.Tensor]:
        nonlocal gradient
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            made = way(images, weights, bias)
        gradient = torch.randn_like(made) if gradient is None else gradient
        assert made.dtype == (torch.bfloat16 if bf16 else torch.float32)
        return [made, *torch.autograd.grad(made, learned, gradient)]

    expected = computed(convolution._direct)
    for way in (convolution._apart, convolution._dense, convolution._unfolded):
        for one, other in zip(computed(way), expected, strict=True):
            largest = float(other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=(3e-2 if bf16 else 1e-5) * max(largest, 1))


@pytest.mark.parametrize("pad", [(0, 0), (2, 0)])
def test_steps_through_dilated_kernels_are_right_in_bfloat16(pad: tuple[int, int]) -> None:
    """Where PyTorch's own function is not: outputs are left as they were in memory."""
    images, weights = torch.randn(3, 16, 9, 8).bfloat16(), torch.randn(16, 16, 4, 4).bfloat16()
    convolution = Convolution(Geometry((1, 2), pad, (1, 2), 1))
    expected = F.conv2d(images.float(), weights.float(), None, (1, 2), pad, (1, 2))
    torch.testing.assert_close(convolution(images, weights, None).float(), expected, rtol=2e-2, atol=0.2)


def test_a_choice_is_made_once_on_a_machine(tmp_path: Path) -> None:
    """Another process takes what is kept, whatever it would measure; a damaged file is measured again."""
    path = tmp_path / "choices.json"
    assert Choices(path).choose("a", ["one", "two"], lambda: "two") == "two"
    assert Choices(path).choose("a", ["one", "two"], lambda: pytest.fail("measured twice")) == "two"
    assert Choices(path).choose("a", ["one"], lambda: "one") == "one", "that way is no longer one"
    assert Choices(path).choose("b", ["one"], lambda: "one") == "one"
    for damaged in ("", "[1]", '{"a": ["one"]}', "\0"):
        path.write_text(damaged)
        assert Choices(path).choose("a", ["one", "two"], lambda: "one") == "one"
    assert json.loads(path.read_text()) == {"a": "one"}


@pytest.mark.parametrize("path", [None, Path("/proc/choices.json"), Path("/nowhere/choices.json")])
def test_where_nothing_can_be_kept_nothing_is_measured(path: Path | None) -> None:
    """The next process, of the same training, would choose otherwise."""
    assert Choices(path).choose("a", ["one", "two"], lambda: pytest.fail("measured")) == "one"


def test_without_a_cache_folder_kernels_are_compiled_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native.load(Path(cpu_kernels.__file__).with_suffix(".cpp"), *cpu_kernels._FLAGS).norm_forward
    assert not list(tmp_path.iterdir())


def test_convolutions_are_measured_only_where_pytorch_may_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Choices(tmp_path / "choices.json")
    monkeypatch.setattr(Choices, "of_this_machine", lambda: kept)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    convolution = Convolution(Geometry((1, 1), (1, 1), (1, 1), 1))
    images, weights = torch.randn(4, 64, 2, 2), torch.randn(64, 64, 3, 3, requires_grad=True)
    convolution(images, weights, None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    made = convolution(images, weights, None)
    torch.testing.assert_close(made, F.conv2d(images, weights, padding=1), rtol=1e-4, atol=1e-3)
    (way,) = json.loads((tmp_path / "choices.json").read_text()).values()
    assert way in ("_direct", "_unfolded")


@pytest.mark.parametrize(("direct", "chosen"), [(1.0, "_direct"), (4.0, "_in_blocks")])
def test_a_way_that_does_not_fit_into_the_memory_is_not_taken(
    direct: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; its measuring is replaced here."""
    convolution, emptied = Convolution(Geometry((1, 1), (1, 1), (1, 1), 4)), []

    def milliseconds(way: Way, *arguments: object) -> float:
        if way.__name__ == "_dense":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"_direct": direct, "_in_blocks": 3.0}[way.__name__]

    monkeypatch.setattr(convolutions, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    ways = [convolution._direct, convolution._dense, convolution._in_blocks]
    images, weights = torch.randn(1, 4, 2, 2), torch.randn(4, 1, 3, 3)
    assert convolution._fastest_on_gpu(ways, images, weights, None).__name__ == chosen
    assert len(emptied) == 1
    with pytest.raises(torch.OutOfMemoryError):  # without PyTorch's own way there is none
        convolution._fastest_on_gpu([convolution._dense], images, weights, None)


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
