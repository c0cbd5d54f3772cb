"""Each layer of the engine on PyTorch, alone, forward and backward, against pycaffe's."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_pair import (
    Case,
    Pair,
    Shape,
    inputs_text,
    learned,
    numbers,
    shapes,
    thorough,
    weighted,
)

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.layers import LAYERS, REFUSED
from caffe_jacinto.engines.pytorch.net import FED, TEST, TRAIN, Net
from caffe_jacinto.engines.pytorch.snapshot import array, put
from caffe_jacinto.netspec.layer_types import LAYER_TYPES
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net

pytestmark = pytest.mark.caffe


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    group = draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pad = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    sizes = [
        draw(st.integers(max((k - 1) * d + 1 - 2 * p, 1), 9))
        for k, d, p in zip(kernel, dilation, pad, strict=True)
    ]
    fields = f"""num_output: {group * draw(st.integers(1, 3))} group: {group}
        kernel_h: {kernel[0]} kernel_w: {kernel[1]} stride_h: {stride[0]} stride_w: {stride[1]}
        pad_h: {pad[0]} pad_w: {pad[1]} dilation: {dilation[0]} dilation: {dilation[1]}
        bias_term: {str(draw(st.booleans())).lower()} weight_filler {{ type: "msra" }}
        bias_filler {{ type: "gaussian" }}"""
    shape = (draw(st.integers(1, 3)), group * draw(st.integers(1, 3)), *sizes)
    return f'type: "Convolution" convolution_param {{ {fields} }}', [shape]


@st.composite
def poolings(draw: st.DrawFn) -> Case:
    batch, channels, height, width = draw(shapes(size=9))
    kind = draw(st.sampled_from(["MAX", "AVE"]))
    if draw(st.booleans()):
        return f'type: "Pooling" pooling_param {{ pool: {kind} global_pooling: true }}', [
            (batch, channels, height, width)
        ]
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    pad = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    size = tuple(max(s, k - 2 * p) for s, k, p in zip((height, width), kernel, pad, strict=True))
    rounding = draw(st.sampled_from(["", "round_mode: FLOOR", "round_mode: CEIL"]))
    fields = f"""pool: {kind} kernel_h: {kernel[0]} kernel_w: {kernel[1]} stride_h: {stride[0]}
        stride_w: {stride[1]} pad_h: {pad[0]} pad_w: {pad[1]} {rounding}"""
    return f'type: "Pooling" pooling_param {{ {fields} }}', [(batch, channels, *size)]


@st.composite
def inner_products(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    fields = f"""num_output: {draw(st.integers(1, 5))} axis: {draw(st.integers(1, len(shape) - 1))}
        bias_term: {str(draw(st.booleans())).lower()} transpose: {str(draw(st.booleans())).lower()}
        weight_filler {{ type: "xavier" }} bias_filler {{ type: "uniform" min: -1 max: 1 }}"""
    return f'type: "InnerProduct" inner_product_param {{ {fields} }}', [shape]


@st.composite
def scales_and_biases(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    kind = draw(st.sampled_from(["Scale", "Bias"]))
    axis = draw(st.integers(0, len(shape) - 1))
    axes = draw(st.integers(1, len(shape) - axis))
    fields = f'axis: {axis} filler {{ type: "gaussian" }}'
    bottoms = [shape]
    if draw(st.booleans()):
        bottoms.append(shape[axis : axis + axes])
    else:
        fields += f" num_axes: {draw(st.sampled_from([axes, -1, 0]))}"
    if kind == "Scale" and draw(st.booleans()):
        fields += ' bias_term: true bias_filler { type: "gaussian" }'
    return f'type: "{kind}" {kind.lower()}_param {{ {fields} }}', bottoms


@st.composite
def local_response_norms(draw: st.DrawFn) -> Case:
    region = draw(st.sampled_from(["ACROSS_CHANNELS", "WITHIN_CHANNEL"]))
    fields = f"""local_size: {draw(st.sampled_from([1, 3, 5]))} alpha: {draw(st.floats(0.01, 2))}
        beta: {draw(st.floats(0.1, 2))} norm_region: {region}"""
    if region == "ACROSS_CHANNELS":
        fields += f" k: {draw(st.floats(1, 3))}"
    return f'type: "LRN" lrn_param {{ {fields} }}', [draw(shapes(size=7))]


@st.composite
def eltwises(draw: st.DrawFn) -> Case:
    shape, count = draw(shapes(1, 4)), draw(st.integers(2, 4))
    operation = draw(st.sampled_from(["SUM", "PROD", "MAX"]))
    fields = f"operation: {operation}"
    if operation == "SUM" and draw(st.booleans()):
        fields += "".join(f" coeff: {draw(st.floats(-2, 2)):g}" for _ in range(count))
    return f'type: "Eltwise" eltwise_param {{ {fields} }}', [shape] * count


@st.composite
def concats(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    bottoms = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
    return f'type: "Concat" concat_param {{ axis: {axis - draw(st.sampled_from([0, len(shape)]))} }}', bottoms


@st.composite
def flattens_and_reshapes(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(0, len(shape) - 1))
    end = draw(st.integers(axis, len(shape) - 1))
    if draw(st.booleans()):
        return f'type: "Flatten" flatten_param {{ axis: {axis} end_axis: {end} }}', [shape]
    middle = math.prod(shape[axis : end + 1])
    dims = draw(st.sampled_from(["dim: -1", f"dim: {middle} dim: 1", "dim: 1 dim: -1", f"dim: {middle}"]))
    return (
        f'type: "Reshape" reshape_param {{ axis: {axis} num_axes: {end - axis + 1} shape {{ {dims} }} }}',
        [shape],
    )


@st.composite
def activations(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    powers = f"scale: {draw(st.floats(-2, 2)):g} shift: {draw(st.floats(-1, 1)):g}"
    choices = {
        "ReLU": f"relu_param {{ negative_slope: {draw(st.sampled_from([0, 0.1, -0.5]))} }}",
        "PReLU": f"prelu_param {{ channel_shared: {str(draw(st.booleans())).lower()} }}",
        "Power": f"power_param {{ {powers} power: {draw(st.sampled_from([0, 1, 2, 3]))} }}",
        "Softmax": f"softmax_param {{ axis: {draw(st.integers(-1, len(shape) - 1))} }}",
        "Dropout": "dropout_param { dropout_ratio: 0 }",
        "AbsVal": "",
        "BNLL": "",
        "Clip": f"clip_param {{ min: {draw(st.floats(-2, 0)):g} max: {draw(st.floats(0, 2)):g} }}",
        "ELU": f"elu_param {{ alpha: {draw(st.floats(0, 2)):g} }}",
        "Exp": f"exp_param {{ {powers} base: {draw(st.sampled_from([-1, 0.5, 1, 2, 10]))} }}",
        "Sigmoid": "",
        "Swish": f"swish_param {{ beta: {draw(st.floats(-2, 2)):g} }}",
        "TanH": "tanh_param { engine: CAFFE }",
    }
    kind = draw(st.sampled_from(sorted(choices)))
    return f'type: "{kind}" {choices[kind]}', [shape]


@st.composite
def of_positive_numbers(draw: st.DrawFn) -> Case:
    """Functions that not every number has a value of."""
    fields = f"scale: {draw(st.floats(0.1, 2)):g} shift: {draw(st.floats(0, 2)):g}"
    if draw(st.booleans()):
        power = draw(st.floats(-2, 3))
        return f'type: "Power" power_param {{ {fields} power: {power:g} }}', [draw(shapes(1, 4))]
    base = draw(st.sampled_from([-1, 0.5, 2, 10]))
    return f'type: "Log" log_param {{ {fields} base: {base} }}', [draw(shapes(1, 4))]


@st.composite
def slices(draw: st.DrawFn) -> tuple[str, list[Shape], int]:
    """With the number of tops."""
    shape = list(draw(shapes(1, 4)))
    axis, tops = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 4))
    field = draw(st.sampled_from([f"axis: {axis}", f"axis: {axis - len(shape)}", f"slice_dim: {axis}"]))
    if draw(st.booleans()):
        shape[axis] *= tops
    else:
        sizes = draw(st.lists(st.integers(1, 3), min_size=tops, max_size=tops))
        shape[axis] = sum(sizes)
        field += "".join(f" slice_point: {sum(sizes[:at])}" for at in range(1, tops))
    return f'type: "Slice" slice_param {{ {field} }}', [tuple(shape)], tops


def splits() -> st.SearchStrategy[tuple[str, list[Shape], int]]:
    return st.tuples(st.just('type: "Split"'), shapes(1, 4).map(lambda shape: [shape]), st.integers(1, 3))


@st.composite
def tiles(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 4, 4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return f'type: "Tile" tile_param {{ axis: {axis} tiles: {draw(st.integers(1, 3))} }}', [shape]


@st.composite
def crops(draw: st.DrawFn) -> Case:
    part = draw(shapes(2, 4, 4))
    axis = draw(st.integers(0, len(part) - 1))
    starts = draw(st.lists(st.integers(0, 3), min_size=len(part) - axis, max_size=len(part) - axis))
    form = draw(st.sampled_from(["none", "one", "each"]))
    if form != "each":
        starts = [starts[0] if form == "one" else 0] * len(starts)
    rest = [draw(st.integers(0, 2)) for _ in starts]
    whole = [size + start + more for size, start, more in zip(part[axis:], starts, rest, strict=True)]
    given = {"none": [], "one": starts[:1], "each": starts}[form]
    offsets = "".join(f" offset: {start}" for start in given)
    return f'type: "Crop" crop_param {{ axis: {axis} {offsets} }}', [(*part[:axis], *whole), part]


@st.composite
def reductions(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 4))
    operation = draw(st.sampled_from(["SUM", "ASUM", "SUMSQ", "MEAN"]))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    fields = f"operation: {operation} axis: {axis} coeff: {draw(st.floats(-2, 2)):g}"
    return f'type: "Reduction" reduction_param {{ {fields} }}', [shape]


@st.composite
def deconvolutions(draw: st.DrawFn) -> Case:
    text, ((batch, channels, height, width),) = draw(convolutions())
    shape = (batch, channels, min(height, 3) + 4, min(width, 3) + 4)  # whose padding leaves something
    return text.replace('"Convolution"', '"Deconvolution"'), [shape]


@st.composite
def windows(draw: st.DrawFn) -> Case:
    text, bottoms = draw(convolutions())
    fields = re.findall(r"(?:kernel|stride|pad|dilation)(?:_[hw])?: \d+", text)
    return f'type: "Im2col" convolution_param {{ {" ".join(fields)} }}', bottoms


@st.composite
def pyramids(draw: st.DrawFn) -> Case:
    height = draw(st.integers(1, 3))
    sides = st.sampled_from([side for side in range(2, 13) if height < 3 or side not in (2, 3, 5)])
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(sides), draw(sides))
    kind = draw(st.sampled_from(["MAX", "AVE"]))
    return f'type: "SPP" spp_param {{ pyramid_height: {height} pool: {kind} }}', [shape]


@st.composite
def mean_variances(draw: st.DrawFn) -> Case:
    shape = (*draw(shapes(2, 2)), *draw(st.sampled_from([(7,), (3, 3), (2, 5)])))
    flags = " ".join(
        f"{name}: {str(draw(st.booleans())).lower()}" for name in ("normalize_variance", "across_channels")
    )
    eps = draw(st.sampled_from(["1e-9", "0.001", "0.5"]))
    return f'type: "MVN" mvn_param {{ {flags} eps: {eps} }}', [shape]


ANY: dict[str, st.SearchStrategy[Any]] = {
    "convolution": convolutions(),
    "pooling": poolings(),
    "inner product": inner_products(),
    "scale, bias": scales_and_biases(),
    "LRN": local_response_norms(),
    "eltwise": eltwises(),
    "concat": concats(),
    "flatten, reshape": flattens_and_reshapes(),
    "activation": activations(),
    "deconvolution": deconvolutions(),
    "windows": windows(),
    "pyramid": pyramids(),
    "mean, variance": mean_variances(),
    "slice": slices(),
    "split": splits(),
    "tile": tiles(),
    "crop": crops(),
    "reduction": reductions(),
    "parameter": shapes(1, 4).map(
        lambda dims: (
            f'type: "Parameter" parameter_param {{ shape {{ {" ".join(f"dim: {dim}" for dim in dims)} }} }}',
            [],
        )
    ),
}
MORE_EXAMPLES = {"activation": 200}


@pytest.mark.parametrize("kind", ANY)
def test_forward_and_backward_are_caffes(kind: str, pycaffe: Any, tmp_path: Path) -> None:
    @settings(thorough, max_examples=MORE_EXAMPLES.get(kind, thorough.max_examples))
    @given(ANY[kind], st.integers(0, 2**32 - 1))
    def compare(case: Any, seed: int) -> None:
        text, names = weighted(*case)
        Pair(pycaffe, tmp_path, text).compare(numbers(names, seed))

    compare()


def test_functions_of_positive_numbers_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    @thorough
    @given(of_positive_numbers(), st.integers(0, 2**32 - 1))
    def compare(case: Case, seed: int) -> None:
        text, names = weighted(*case)
        values = numbers(names, seed)
        values["data0"] = np.abs(values["data0"]) + np.float32(0.3)
        Pair(pycaffe, tmp_path, text).compare(values)

    compare()


def test_places_of_the_largest_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """Also where numbers are equal."""

    @thorough
    @given(shapes(1, 4), st.data(), st.booleans(), st.integers(0, 2**32 - 1))
    def compare(shape: Shape, data: st.DataObject, numbered: bool, seed: int) -> None:
        axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
        top_k = data.draw(st.integers(1, math.prod(shape[1:]) if axis is None else shape[axis]))
        fields = f"top_k: {top_k} out_max_val: {str(numbered).lower()}"
        if axis is not None:
            fields += f" axis: {axis}"
        text, names = weighted(f'type: "ArgMax" argmax_param {{ {fields} }}', [shape])
        values = numbers(names, seed)
        values["data0"] = values["data0"].round()
        Pair(pycaffe, tmp_path, text).compare(values, backward=False)

    compare()


def test_reordered_items_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    @thorough
    @given(shapes(1, 4), st.integers(1, 7), st.integers(0, 2**32 - 1))
    def compare(shape: Shape, items: int, seed: int) -> None:
        names = {"data": shape, "numbers": (items,), "weights": (items, *shape[1:])}
        text = inputs_text(names) + learned("data")
        text += """
            layer { name: "tested" type: "BatchReindex" bottom: "data" bottom: "numbers" top: "top" }
            layer { name: "loss" type: "Eltwise" bottom: "top" bottom: "weights" top: "loss" loss_weight: 1
              eltwise_param { operation: PROD } }"""
        values = numbers(names, seed)
        values["numbers"] = np.random.default_rng(seed).integers(0, shape[0], items).astype(np.float32)
        Pair(pycaffe, tmp_path, text).compare(values, only=())

    compare()


def test_selected_items_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """Two bottoms of which a Filter keeps the same items."""

    @thorough
    @given(
        shapes(1, 4), st.lists(st.booleans(), min_size=1, max_size=6).filter(any), st.integers(0, 2**32 - 1)
    )
    def compare(shape: Shape, kept: list[bool], seed: int) -> None:
        names = {"a": (len(kept), *shape[1:]), "b": (len(kept), 2), "kept": (len(kept), 1)}
        text = inputs_text(names) + learned("a") + learned("b")
        text += """
            layer { name: "tested" type: "Filter" bottom: "a" bottom: "b" bottom: "kept" top: "x" top: "y" }
            layer { name: "sum" type: "Reduction" bottom: "x" top: "sum" loss_weight: 1
              reduction_param { operation: SUMSQ } }
            layer { name: "mean" type: "Reduction" bottom: "y" top: "mean" loss_weight: 2
              reduction_param { operation: MEAN } }"""
        values = numbers(names, seed)
        values["kept"] = np.float32(kept).reshape(-1, 1)
        Pair(pycaffe, tmp_path, text).compare(values, only=())

    compare()


def branch(name: str, convolution: str) -> str:
    """Of a siamese network."""
    return f"""
        layer {{ name: "conv {name}" type: "Convolution" bottom: "{name}" top: "conv {name}" {convolution}
          convolution_param {{ num_output: 3 kernel_size: 3 weight_filler {{ type: "msra" }}
            bias_filler {{ type: "gaussian" }} }} }}
        layer {{ name: "norm {name}" type: "BatchNorm" bottom: "conv {name}" top: "norm {name}"
          param {{ name: "mean" lr_mult: 0 }} param {{ name: "variance" lr_mult: 0 }}
          param {{ name: "factor" lr_mult: 0 }} }}
        layer {{ name: "scale {name}" type: "Scale" bottom: "norm {name}" top: "scale {name}"
          param {{ name: "scale" }} }}
        layer {{ name: "fc {name}" type: "InnerProduct" bottom: "scale {name}" top: "fc {name}"
          param {{ name: "fc" lr_mult: 1 }}
          inner_product_param {{ num_output: 4 bias_term: false weight_filler {{ type: "xavier" }} }} }}
        """


SIAMESE = {"a": (3, 2, 4, 4), "b": (3, 2, 4, 4), "similar": (3,)}
CONTRAST = """
    layer { name: "loss" type: "ContrastiveLoss" bottom: "fc a" bottom: "fc b" bottom: "similar" top: "loss"
      contrastive_loss_param { margin: 3 } }"""


def test_weights_shared_by_name_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """Two branches with the same weights and statistics, of which each has a bias of its own."""
    text = inputs_text(SIAMESE) + branch("a", 'param { name: "w" }')
    text += branch("b", 'param { name: "w" lr_mult: 3 decay_mult: 2 }') + CONTRAST
    pair = Pair(pycaffe, tmp_path, text)
    assert {(blob[0], blob[1]): (blob[2].lr_mult, blob[2].decay_mult) for blob in pair.ours.blobs} == {
        **{("conv a", 0): (3, 2), ("conv a", 1): (1, 1), ("conv b", 1): (1, 1)},
        **{("norm a", index): (0, 0) for index in range(3)},  # as Caffe reads three params
        **{("scale a", 0): (1, 1), ("fc a", 0): (1, 1)},
    }
    for seed in range(3):
        values = numbers(SIAMESE, seed)
        values["similar"] = np.float32([0, 1, 1])
        pair.compare(values, only=(), least=1)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            "name: 'w' lr_mult: 1",
            "name: 'w' lr_mult: 2",
            "layer conv b (Convolution): param 'w': lr_mult 2, and in layer conv a, with which it is shared,",
        ),
        (
            "name: 'fc'",
            "name: 'v'",
            "layer fc a (InnerProduct): param 'fc' has the shape (4, 12), and in layer",
        ),
    ],
)
def test_params_that_cannot_be_shared_are_named(first: str, second: str, says: str) -> None:
    text = inputs_text(SIAMESE) + branch("a", f"param {{ {first} }}")
    text += branch("b", f"param {{ {second} }}") + CONTRAST
    with pytest.raises(UserError) as error:
        Net(parse_net(text, Dialect.BVLC, "net.prototxt"), TRAIN, Dialect.BVLC, where="net.prototxt")
    assert says in str(error.value)


def test_embedded_numbers_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    @thorough
    @given(shapes(1, 3), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
    def compare(shape: Shape, outputs: int, rows: int, biased: bool, seed: int) -> None:
        names = {"numbers": shape, "weights": (*shape, outputs)}
        text = (
            inputs_text(names)
            + f"""
            layer {{ name: "tested" type: "Embed" bottom: "numbers" top: "top" embed_param {{
              num_output: {outputs} input_dim: {rows} bias_term: {str(biased).lower()}
              weight_filler {{ type: "gaussian" }} bias_filler {{ type: "gaussian" }} }} }}
            layer {{ name: "loss" type: "Eltwise" bottom: "top" bottom: "weights" top: "loss" loss_weight: 1
              eltwise_param {{ operation: PROD }} }}"""
        )
        values = numbers(names, seed)
        values["numbers"] = np.random.default_rng(seed).integers(0, rows, shape).astype(np.float32)
        Pair(pycaffe, tmp_path, text).compare(values, only=())

    compare()


def pooled_by_chance(fields: str, phase: int, images: Any) -> Any:
    text = (
        inputs_text({"data": images.shape})
        + f"""
        layer {{ name: "tested" type: "Pooling" bottom: "data" top: "top"
          pooling_param {{ pool: STOCHASTIC {fields} }} }}"""
    )
    net = Net(parse_net(text, Dialect.BVLC, "p"), phase, Dialect.BVLC, where="p", seed=0)
    net.reseed(0)
    return net({"data": torch.from_numpy(images)}).outputs["top"].numpy()


def test_stochastic_pooling_draws_in_proportion() -> None:
    """By its definition: Caffe has it on GPUs only. A window over the edge has fewer numbers."""
    window = np.float32([[0, 1, 4], [2, 3, 0], [5, 0, 0]])
    images = np.tile(window, (4000, 1, 1, 1))
    found = pooled_by_chance("kernel_size: 2 stride: 2", TRAIN, images)
    for numbers_there, drawn in (
        ([1, 2, 3], found[:, 0, 0, 0]),
        ([4], found[:, 0, 0, 1]),
        ([5], found[:, 0, 1, 0]),
    ):
        assert set(np.unique(drawn)) == set(numbers_there)
        for number in numbers_there:
            assert abs((drawn == number).mean() - number / sum(numbers_there)) < 0.03
    assert not found[:, 0, 1, 1].any()
    tested = pooled_by_chance("kernel_size: 2 stride: 2", TEST, images[:1])
    np.testing.assert_allclose(tested[0, 0], [[14 / 6, 4], [5, 0]], rtol=1e-6)
    whole = pooled_by_chance("global_pooling: true", TEST, images[:1])
    np.testing.assert_allclose(whole.item(), 55 / 15, rtol=1e-6)


def test_a_silenced_blob_is_no_output(pycaffe: Any, tmp_path: Path) -> None:
    text = (
        inputs_text({"data": (2, 3)})
        + """
        layer { name: "copies" type: "Split" bottom: "data" top: "a" top: "b" top: "c" }
        layer { name: "quiet" type: "Silence" bottom: "a" bottom: "b" }"""
    )
    Pair(pycaffe, tmp_path, text).compare(numbers({"data": (2, 3)}, 0), backward=False)


def test_thresholds_are_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """Caffe has no gradient of it."""

    @thorough
    @given(shapes(1, 4), st.integers(-1, 1), st.integers(0, 2**32 - 1))
    def compare(shape: Shape, limit: int, seed: int) -> None:
        text, names = weighted(f'type: "Threshold" threshold_param {{ threshold: {limit} }}', [shape])
        values = numbers(names, seed)
        values["data0"] = values["data0"].round()
        Pair(pycaffe, tmp_path, text).compare(values, backward=False)

    compare()


@pytest.mark.parametrize("behind", ["", "in place", "of its own", "apart"])
def test_batch_norm_is_caffes_over_iterations(behind: str, pycaffe: Any, tmp_path: Path) -> None:
    """Alone and with a Scale layer behind it, in training and then in testing: statistics and gradients."""

    @settings(thorough, max_examples=25)
    @given(shapes(2, 4), st.floats(0.5, 0.999), st.floats(1e-5, 1e-2), st.integers(0, 2**32 - 1))
    def compare(shape: Shape, fraction: float, eps: float, seed: int) -> None:
        shape = (shape[0] + 3, *shape[1:])
        norm = f"moving_average_fraction: {fraction:g} eps: {eps:g}"
        text = "force_backward: true\n" + inputs_text({"data": shape, "weights": shape})
        text += (
            '\nlayer { name: "bn" type: "BatchNorm" bottom: "data" top: "bn" batch_norm_param {'
            + norm
            + "} }\n"
        )
        top = "bn"
        if behind:
            top = "bn" if behind == "in place" else "scaled"
            text += (
                f'layer {{ name: "scale" type: "Scale" bottom: "bn" top: "{top}" '
                'scale_param { bias_term: true filler { type: "gaussian" mean: 1 std: 0.3 } '
                'bias_filler { type: "gaussian" } } }\n'
            )
        if behind == "apart":
            text += 'layer { name: "both" type: "Eltwise" bottom: "bn" bottom: "scaled" top: "both" }\n'
            top = "both"
        text += (
            f'layer {{ name: "loss" type: "Eltwise" bottom: "{top}" bottom: "weights" top: "loss" '
            "loss_weight: 1 eltwise_param { operation: PROD } }"
        )
        pair = Pair(pycaffe, tmp_path, text)
        names = {"data": shape, "weights": shape}
        for step in range(3):
            values = numbers(names, seed + step)
            values["data"] = values["data"] * 3 + 5
            pair.compare(values, least=1)
        tested = Pair(pycaffe, tmp_path, text, TEST)
        for name, blobs in pair.ours.layer_blobs.items():
            for index, blob in enumerate(blobs):
                put(array(blob.tensor), tested.ours.layer_blobs[name][index].tensor)
                tested.theirs.params[name][index].data[...] = pair.theirs.params[name][index].data
        tested.compare(numbers(names, seed), backward=False)

    compare()


def test_dropout_scales_what_it_keeps() -> None:
    text = inputs_text({"data": (1000, 10)}) + (
        '\nlayer { name: "drop" type: "Dropout" bottom: "data" top: "data" '
        "dropout_param { dropout_ratio: 0.25 } }"
    )
    definition = parse_net(text, Dialect.BVLC, "drop")
    ones = torch.ones(1000, 10)
    trained = Net(definition, TRAIN, Dialect.BVLC, where="drop")({"data": ones}).outputs["data"]
    assert trained.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert 0.72 < float((trained != 0).float().mean()) < 0.78
    tested = Net(definition, TEST, Dialect.BVLC, where="drop")({"data": ones}).outputs["data"]
    assert torch.equal(tested, ones)


FORK_NORM = """
layer { name: "bn" type: "BatchNorm" bottom: "data" top: "bn"
        batch_norm_param { scale_bias: true moving_average_fraction: 0.9 eps: 1e-7 } }
"""


def test_the_forks_batch_norm_by_its_definition() -> None:
    """Plain averages, a factor that nothing reads, eps of at least 1e-5, scale and shift in five blobs."""
    text = inputs_text({"data": (4, 3, 5, 5)}) + FORK_NORM
    definition = parse_net(text, Dialect.CAFFE_JACINTO, "bn")
    net = Net(definition, TRAIN, Dialect.CAFFE_JACINTO, where="bn")
    mean, variance, factor, scale, shift = (blob.tensor for blob in net.layer_blobs["bn"])
    put(np.float32([1, 2, 3]), scale)
    put(np.float32([-1, 0, 1]), shift)
    data = torch.from_numpy(numbers({"data": (4, 3, 5, 5)}, 0)["data"]) * 0.01
    found = net({"data": data}).outputs["bn"]
    values = data.numpy()
    means, spreads = values.mean((0, 2, 3)), values.var((0, 2, 3))
    view = (1, 3, 1, 1)
    normal = (values - means.reshape(view)) / np.sqrt(spreads.reshape(view) + 1e-5)
    expected = normal * np.float32([1, 2, 3]).reshape(view) + np.float32([-1, 0, 1]).reshape(view)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(mean.numpy(), 0.1 * means, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(variance.numpy(), 0.1 * spreads * 100 / 99, rtol=1e-4)
    assert factor.tolist() == [1]
    tested = Net(definition, TEST, Dialect.CAFFE_JACINTO, where="bn")
    tested.share_with(net)
    found = tested({"data": data}).outputs["bn"]
    normal = (values - mean.numpy().reshape(view)) / np.sqrt(variance.numpy().reshape(view) + 1e-5)
    expected = normal * np.float32([1, 2, 3]).reshape(view) + np.float32([-1, 0, 1]).reshape(view)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("filler", ["constant", "uniform", "gaussian", "xavier", "msra", "positive_unitball"])
@pytest.mark.parametrize("norm", ["FAN_IN", "FAN_OUT", "AVERAGE"])
def test_fillers_draw_from_caffes_distribution(filler: str, norm: str, pycaffe: Any, tmp_path: Path) -> None:
    """Mean, deviation and reach of 40,000 numbers."""
    fields = {"constant": "value: 0.5", "uniform": "min: -2 max: 1", "gaussian": "mean: 1 std: 2"}.get(
        filler, ""
    )
    if filler in ("xavier", "msra"):
        fields = f"variance_norm: {norm}"
    text = inputs_text({"data": (1, 100, 3, 3)}) + (
        '\nlayer { name: "tested" type: "InnerProduct" bottom: "data" top: "top" inner_product_param { '
        f'num_output: 45 weight_filler {{ type: "{filler}" {fields} }} }} }}'
    )
    pair = Pair(pycaffe, tmp_path, text)
    theirs = pycaffe.Net(str(tmp_path / "layer.prototxt"), TRAIN).params["tested"][0].data
    ours = array(pair.ours.layer_blobs["tested"][0].tensor)
    spread = float(theirs.std())
    assert abs(float(ours.mean() - theirs.mean())) < 0.03 * spread + 1e-7
    assert abs(float(ours.std()) - spread) < 0.03 * spread + 1e-7
    if filler in ("uniform", "xavier"):
        np.testing.assert_allclose([ours.min(), ours.max()], [theirs.min(), theirs.max()], rtol=0.01)


def test_every_layer_of_caffe_is_computed_or_refused_with_a_reason(pycaffe: Any) -> None:
    known = set(pycaffe.layer_type_list())
    assert len(known) == 61
    assert known == known & {*LAYERS, *FED, *REFUSED}
    assert not {*LAYERS, *FED} & set(REFUSED)
    assert {*LAYERS, *FED} <= set(LAYER_TYPES)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ('type: "Wavelet"', "(Wavelet): this type of layer is not supported; known: AbsVal, Accuracy"),
        ('type: "Pooling" pooling_param { pool: STOCHASTIC kernel_size: 2 pad: 1 }', "no padding"),
        ('type: "SPP" spp_param { pyramid_height: 4 }', "5x5 pixels cannot be cut into 4x4 windows"),
        ('type: "Im2col" convolution_param { kernel_size: 6 }', "6x6 windows do not fit the 5x5 pixels"),
        ('type: "Python" python_param { module: "x" }', "not supported: its computation is Python code"),
        ('type: "ReLU" power_param { power: 2 }', "field power_param is not supported"),
        ('type: "Convolution" convolution_param { num_output: 4 kernel_size: 9 }', "than the 5x5 pixels"),
        ('type: "Convolution" convolution_param { num_output: 4 kernel_size: 3 group: 2 }', "of group"),
        ('type: "InnerProduct" inner_product_param { num_output: 4 axis: 7 }', "axis 7 is not one of the 4"),
        ('type: "LRN" lrn_param { local_size: 4 }', "has to be odd"),
        ('type: "Dropout" dropout_param { dropout_ratio: 1 }', "from 0 to below 1"),
        ('type: "Reshape" reshape_param { shape { dim: 7 } }', "does not hold the 150 values"),
        ('type: "Convolution" convolution_param { num_output: 4 kernel_size: 3 '
         'weight_filler { type: "magic" } }', "filler type 'magic' is unknown"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(layer: str, says: str) -> None:
    text = (
        inputs_text({"data": (2, 3, 5, 5)}) + f'\nlayer {{ name: "tested" {layer} bottom: "data" top: "t" }}'
    )
    with pytest.raises(UserError, match=r"net\.prototxt: layer tested") as error:
        Net(parse_net(text, Dialect.BVLC, "net.prototxt"), TRAIN, Dialect.BVLC, where="net.prototxt")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ('type: "Input" top: "a" power_param { power: 2 }', "field power_param is not supported"),
        ('type: "Input" top: "a"', "the shape of its top a is not known"),
        ('type: "Input" top: "a" input_param { shape { dim: 1 } shape { dim: 2 } }', "2 shapes for 1 tops"),
        ('type: "Input" top: "a" bottom: "data" input_param { shape { dim: 1 } }', "takes no bottom"),
        ('type: "Data" top: "a" image_data_param { source: "x" }', "field image_data_param is not supported"),
    ],
)
def test_inputs_that_are_not_supported_are_named(layer: str, says: str) -> None:
    text = inputs_text({"data": (2, 3, 5, 5)}) + f'\nlayer {{ name: "tested" {layer} }}'
    with pytest.raises(UserError, match=r"net\.prototxt: layer tested") as error:
        Net(parse_net(text, Dialect.BVLC, "net.prototxt"), TRAIN, Dialect.BVLC, where="net.prototxt")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("", ["both", "train"]),
        ("stage: 'deep'", ["both", "train", "deep"]),
        ("level: 2", ["both", "train", "high"]),
    ],
)
def test_layers_of_a_phase_are_caffes(state: str, expected: list[str], pycaffe: Any, tmp_path: Path) -> None:
    rules = {
        "both": "",
        "train": "include { phase: TRAIN }",
        "test": "exclude { phase: TRAIN }",
        "deep": "include { phase: TRAIN stage: 'deep' } include { phase: TEST stage: 'deep' }",
        "high": "include { min_level: 1 }",
    }
    text = f"state {{ {state} }}\n" + inputs_text({"data": (2, 3)})
    for name, rule in rules.items():
        text += f"\nlayer {{ name: '{name}' type: 'ReLU' bottom: 'data' top: '{name}' {rule} }}"
    (tmp_path / "phases.prototxt").write_text(text)
    net = Net(parse_net(text, Dialect.BVLC, "p"), TRAIN, Dialect.BVLC, where="p")
    assert [layer.name for layer in net.layers if layer.type == "ReLU"] == expected
    stages = ["deep"] if "deep" in expected else []
    theirs = pycaffe.Net(str(tmp_path / "phases.prototxt"), TRAIN, 2 if "high" in expected else 0, stages)
    assert [name for name in theirs._layer_names if name in rules] == expected
