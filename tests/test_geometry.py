"""Kernels, strides, padding and dilation given by half, twice or not at all: where real Caffe stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import TEST, Net
from caffe_jacinto.inference.backends import last_words
from caffe_jacinto.netspec.layer_types import geometry_fault, spatial_axes
from caffe_jacinto.netspec.mistakes import geometry_mistakes
from caffe_jacinto.netspec.shapes import layer_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.tree import parse


def network(layer: str, axes: int = 2) -> str:
    dims = " ".join(f"dim: {size}" for size in (2, 4, 9, 11, 8)[: axes + 2])
    return (
        f'layer {{ name: "x" type: "Input" top: "x" input_param {{ shape {{ {dims} }} }} }}\n'
        f'layer {{ name: "l" bottom: "x" top: "y" {layer} }}\n'
    )


def half(draw: st.DrawFn, both: str, name: str, smallest: int) -> list[str]:
    """The field for both axes and those for one, each given or not; Caffe divides by a stride of 0."""
    ways = [[], [both], [f"{name}_h"], [f"{name}_w"], [f"{name}_h", f"{name}_w"], [both, f"{name}_h"]]
    ways += [[both, f"{name}_h", f"{name}_w"]]
    given_fields = draw(st.sampled_from(ways))
    return [f"{field}: {draw(st.integers(smallest, 3))}" for field in given_fields]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, int]:
    axes = draw(st.sampled_from([2, 2, 2, 1, 3]))
    fields = []
    for name, smallest in (("kernel_size", 0), ("stride", 1), ("pad", 0)):
        if draw(st.booleans()):
            fields += half(draw, name, name.removesuffix("_size"), smallest)
        else:
            fields += [f"{name}: {draw(st.integers(smallest, 3))}"] * draw(st.integers(name != "pad", 3))
    fields += [f"dilation: {draw(st.integers(1, 2))}"] * draw(st.sampled_from([0, 0, 1, 2, 3]))
    kind = draw(st.sampled_from(["Convolution", "Deconvolution", "Im2col"]))
    axis = draw(st.sampled_from([1, 1, 1, 2, -2]))
    outputs = "" if kind == "Im2col" else f"num_output: 4 group: {2 if axis == 1 else 1}"
    outputs += "" if axis == 1 else f" axis: {axis}"
    return f'type: "{kind}" convolution_param {{ {outputs} {" ".join(fields)} }}', axes


@st.composite
def poolings(draw: st.DrawFn) -> tuple[str, int]:
    fields = half(draw, "kernel_size", "kernel", 0) + half(draw, "pad", "pad", 0)
    fields += half(draw, "stride", "stride", 1)
    fields += draw(st.sampled_from([[], [], ["global_pooling: true"]]))
    fields += draw(st.sampled_from([[], ["pool: AVE"], ["pool: STOCHASTIC"]]))
    return f'type: "Pooling" pooling_param {{ {" ".join(fields)} }}', 2


@pytest.mark.caffe
@settings(max_examples=400, deadline=None)
@given(case=st.one_of(convolutions(), poolings()))
def test_caffe_takes_what_is_taken_and_stops_where_it_is_refused(
    case: tuple[str, int], pycaffe: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layer, axes = case
    path = tmp_path_factory.getbasetemp() / "geometry.prototxt"
    text = network(layer, axes)
    path.write_text(text)
    tree = parse(text)
    tested = tree.messages("layer")[1]
    fault = geometry_fault(tested, spatial_axes(tested, (1,) * (axes + 2)))
    said = last_words(lambda: pycaffe.Net(str(path), pycaffe.TEST))
    assert (fault is not None) == bool(said), f"{fault}; Caffe: {said}"
    shaped = layer_shapes(tree)[1]
    definition = parse_net(text, Dialect.BVLC, str(path))
    if fault is None:
        net = pycaffe.Net(str(path), pycaffe.TEST)
        assert shaped.tops == [(1, *net.blobs["y"].shape[1:])]
        blobs = net.params.get("l", [])
        assert shaped.blobs == [tuple(blob.shape) for blob in blobs]
        if axes == 2 and "axis" not in layer:
            ours = Net(definition, TEST, Dialect.BVLC, where=str(path), seed=1)
            assert ours.shapes["y"] == tuple(net.blobs["y"].shape)
    elif axes == 2 and "axis" not in layer:
        says = f"^{path}:2: layer l: {fault.field}: {fault.what}$".replace("_", ".")
        with pytest.raises(UserError, match=says):
            Net(definition, TEST, Dialect.BVLC, where=str(path), seed=1)


MISTAKES = [
    ("Convolution", "kernel_size: 3\n stride_h: 2", 3, "stride_w: is missing, and stride_h is given; add it"),
    ("Convolution", "kernel_h: 3\n pad: 1", 3, "kernel_w: is missing, and kernel_h is given; add it"),
    ("Convolution", "kernel_size: 3\n pad_h: 1 pad: 1", 4, "pad_h: pad is given, too; remove one of them"),
    ("Convolution", "kernel_size: 3\n pad: [1, 1, 1]", 4, "pad: is given 3 times; give it once, or 2 times"),
    ("Convolution", "pad: 1", 3, "kernel_size: is missing; add it"),
    ("Pooling", "stride: 2\n kernel_w: 3", 3, "kernel_h: is missing, and kernel_w is given; add it"),
    ("Pooling", "kernel_size: 2\n pad: 2", 4, "pad: is as large as the kernel; make it smaller"),
    ("Pooling", "global_pooling: true\n kernel_size: 2", 4, "kernel_size: global_pooling takes the whole"),
]


@pytest.mark.parametrize(("kind", "fields", "line", "says"), MISTAKES)
def test_a_mistake_has_its_file_line_and_field(
    tmp_path: Path, kind: str, fields: str, line: int, says: str
) -> None:
    path = tmp_path / "deploy.prototxt"
    message = f"{'pooling' if kind == 'Pooling' else 'convolution'}_param"
    outputs = "" if kind == "Pooling" else "num_output: 4 "
    path.write_text(network(f'type: "{kind}"\n {message} {{ {outputs}{fields} }}'))
    text = f"{path}:{line}: layer l: {message}.{says}"
    for act in (
        lambda: build_net(["--summary", str(path)]),
        lambda: Net(
            parse_net(path.read_text(), Dialect.BVLC, str(path)), TEST, Dialect.BVLC, where=str(path), seed=1
        ),
    ):
        with pytest.raises(UserError) as error:
            act()
        assert str(error.value).startswith(text)


def test_behind_a_layer_of_unknown_output_nothing_is_refused_for_its_number_of_axes() -> None:
    convolution = "convolution_param { num_output: 2 kernel_size: [1, 2, 3] }"
    tree = parse(
        'layer { name: "p" type: "Python" top: "x" }\n'
        f'layer {{ name: "l" type: "Convolution" bottom: "x" top: "y" {convolution} }}'
    )
    assert list(geometry_mistakes(tree, "net.prototxt")) == []
    assert layer_shapes(tree)[1].blobs == [(2, None, 1, 2, 3), (2,)]


def test_convolutions_over_three_axes_are_counted_and_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "volumes.prototxt"
    path.write_text(
        network('type: "Convolution" convolution_param { num_output: 2 kernel_size: [3, 2, 1] }', 3)
    )
    assert build_net(["--summary", str(path)]) == 0
    said = capsys.readouterr().out
    assert "3x2x1" in said and "2x7x10x8" in said
    with pytest.raises(
        UserError, match=r"layer l \(Convolution\): convolves batch x channels x height x width only"
    ):
        Net(parse_net(path.read_text(), Dialect.BVLC, str(path)), TEST, Dialect.BVLC, where=str(path), seed=1)
