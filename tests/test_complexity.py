"""GigaMACs and weights, counted from prototxt text."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.shapes import batch_size, gigamacs, layer_costs
from caffe_jacinto.prototxt import tree

INPUT = (
    'layer { name: "data" type: "Input" top: "data" '
    "input_param { shape { dim: 4 dim: 8 dim: %d dim: %d } } }\n"
)


def net(*layers: str, size: tuple[int, int] = (13, 10)) -> tree.Message:
    """A network of 8 channels, each layer above the one before."""
    text, bottom = INPUT % size, "data"
    for number, layer in enumerate(layers):
        text += f'layer {{ name: "l{number}" bottom: "{bottom}" top: "t{number}" {layer} }}\n'
        bottom = f"t{number}"
    return tree.parse(text)


def conv(**settings: int) -> str:
    fields = " ".join(f"{name}: {value}" for name, value in settings.items())
    return f'type: "Convolution" convolution_param {{ {fields} }}'


FULLY = 'type: "InnerProduct" inner_product_param { num_output: 3 }'


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("jacintonet11_imagenet_caffe_jacinto", 0.4063),
        ("resnet10_cvgj", 0.8892),
        ("bvlc_alexnet", 0.7244),
    ],
)
def test_the_published_networks(published: Path, folder: str, expected: float) -> None:
    files = [
        path
        for path in sorted((published / "prototxt" / folder).glob("*.prototxt"))
        if "solver" not in path.name
    ]
    assert files
    for path in files:
        message = tree.parse(path.read_text(), path.name)
        # A mean file does not tell the crop's channels; a log does.
        crop = 227 if folder == "bvlc_alexnet" else 224
        counted = gigamacs(message, [(1, 3, crop, crop)] * 2)
        assert counted is not None
        assert round(counted, 4) == expected, path


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (conv(num_output=16, kernel_size=3), 11 * 8 * 16 * 8 * 9),
        (conv(num_output=16, kernel_size=3, pad=1), 13 * 10 * 16 * 8 * 9),
        (conv(num_output=16, kernel_size=3, pad=1, stride=2), 7 * 5 * 16 * 8 * 9),
        (conv(num_output=16, kernel_size=3, group=4), 11 * 8 * 16 * 2 * 9),
        (conv(num_output=8, kernel_size=3, group=8), 11 * 8 * 8 * 9),
        (conv(num_output=16, kernel_size=3, dilation=2), 9 * 6 * 16 * 8 * 9),
        (conv(num_output=16, kernel_h=1, kernel_w=5, pad_h=0, pad_w=2), 13 * 10 * 16 * 8 * 5),
        (conv(num_output=16, kernel_size=3, stride_h=2, stride_w=1), 6 * 8 * 16 * 8 * 9),
        (
            'type: "Deconvolution" convolution_param { num_output: 4 kernel_size: 2 stride: 2 }',
            13 * 10 * 8 * 4 * 4,
        ),
        (FULLY, 13 * 10 * 8 * 3),
    ],
)
def test_one_layer(layer: str, macs: int) -> None:
    assert gigamacs(net(layer)) == macs / 1e9


@pytest.mark.parametrize(
    ("pooling", "height", "width"),
    [
        ("kernel_size: 2 stride: 2", 7, 5),  # rounds up
        ("kernel_size: 3 stride: 2", 6, 5),
        ("kernel_size: 3 stride: 2 pad: 1", 7, 6),
        ("kernel_size: 2 stride: 2 pad: 1", 7, 6),
        ("kernel_size: 2 stride: 3 pad: 1", 5, 4),
        ("kernel_size: 1 stride: 1", 13, 10),
        ("kernel_h: 1 kernel_w: 2 stride_h: 1 stride_w: 2", 13, 5),
        ("kernel_size: 2 stride: 2 round_mode: FLOOR", 6, 5),
        ("global_pooling: true", 1, 1),
    ],
)
def test_pooling_rounds_up_and_drops_windows_beyond_the_padding(
    pooling: str, height: int, width: int
) -> None:
    counted = gigamacs(net(f'type: "Pooling" pooling_param {{ pool: MAX {pooling} }}', FULLY))
    assert counted == height * width * 8 * 3 / 1e9


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4)
)  # fmt: skip
def test_pooling_is_caffes_own_formula(height: int, width: int, kernel: int, stride: int, pad: int) -> None:
    pad = min(pad, kernel - 1)
    if min(height, width) + 2 * pad < kernel:
        return

    def size(length: int) -> int:
        windows = 0  # so many windows begin before the end of the image and its padding on the left
        while windows * stride + kernel < length + 2 * pad + stride and (
            not pad or windows * stride < length + pad
        ):
            windows += 1
        return windows

    layer = f'type: "Pooling" pooling_param {{ kernel_size: {kernel} stride: {stride} pad: {pad} }}'
    expected = size(height) * size(width) * 8 * 3 / 1e9
    assert gigamacs(net(layer, FULLY, size=(height, width))) == expected


def test_branches_meet() -> None:
    text = INPUT % (6, 6)
    for name, outputs in (("a", 4), ("b", 12)):
        layer = conv(num_output=outputs, kernel_size=1)
        text += f'layer {{ name: "{name}" bottom: "data" top: "{name}" {layer} }}\n'
    text += 'layer { name: "c" type: "Concat" bottom: "a" bottom: "b" top: "c" }\n'
    text += 'layer { name: "s" type: "Slice" bottom: "c" top: "x" top: "y" slice_param { slice_point: 6 } }\n'
    text += 'layer { name: "f" type: "Flatten" bottom: "y" top: "f" }\n'
    text += f'layer {{ name: "p" bottom: "f" top: "p" {FULLY} }}\n'
    costs = {cost.name: cost.weights for cost in layer_costs(tree.parse(text))}
    assert costs == {"a": 8 * 4, "b": 8 * 12, "p": 10 * 36 * 3}


def test_what_the_text_does_not_say_is_not_guessed() -> None:
    assert gigamacs(net('type: "Python"', FULLY)) is None
    assert (
        gigamacs(net('type: "DeformableConvolution" convolution_param { num_output: 8 kernel_size: 3 }'))
        is None
    )
    assert gigamacs(net(conv(num_output=4, kernel_size=30))) is None
    data = 'layer { name: "d" type: "Data" top: "data" data_param { batch_size: 7 } }\n'
    message = tree.parse(f'{data} layer {{ name: "f" bottom: "data" top: "f" {FULLY} }}')
    assert gigamacs(message) is None
    assert gigamacs(message, [(7, 1, 4, 5)]) == 60 / 1e9
    assert batch_size(message) == 7
    # A layer that nothing is built on may be of any kind.
    assert gigamacs(net(FULLY, 'type: "Python"')) is not None


def test_a_convolution_is_the_classifier_only_directly_before_the_softmax() -> None:
    last = conv(num_output=8, kernel_size=1)
    for between, expected in (((), True), (('type: "ReLU"',), False)):
        costs = layer_costs(net(last, *between, 'type: "SoftmaxWithLoss"'))
        assert [cost.counted for cost in costs] == [not expected]


def test_layers_of_another_phase_do_not_count() -> None:
    rules = "include { phase: TEST }"
    text = 'state { phase: TRAIN } layer { name: "f" bottom: "data" top: "f" %s %s }'
    only_test = tree.parse(INPUT % (4, 4) + text % (FULLY, rules))
    assert layer_costs(only_test) == []
    assert len(layer_costs(tree.parse(INPUT % (4, 4) + text % (FULLY, "exclude { phase: TEST }")))) == 1


def test_text_format() -> None:
    message = tree.parse(
        """
        name: 'it\\'s "so"'  # a comment
        dim: [1, 2, 3] on: true rate: 1e-05 hex: 0x10 kind: MAX
        inner < value: -7 >  text: "a\\n" "\\303\\251"; nested { nested { deep: .5 } }
        """
    )
    assert message.string("name") == 'it\'s "so"'
    assert message.integers("dim") == [1, 2, 3]
    assert message.flag("on") is True
    assert message.all("rate") == [1e-05]
    assert message.integer("hex") == 16
    assert message.string("kind") == "MAX"
    assert message.message("inner").integer("value") == -7
    assert message.string("text") == "a\né"
    assert message.message("nested").message("nested").all("deep") == [0.5]


@pytest.mark.parametrize(
    "text", ["layer {", "layer }", "a:", 'a: "x', "{", "a: {b: 1", "a: [1", "a" + "{a" * 200]
)
def test_broken_text_is_an_error_with_its_line(text: str) -> None:
    with pytest.raises(UserError, match=r"net\.prototxt, line 2"):
        tree.parse("\n" + text, "net.prototxt")


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UserError):
        gigamacs(tree.parse(text))
