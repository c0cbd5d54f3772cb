"""Losses and the accuracy of the engine on PyTorch, forward and backward, against pycaffe's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_pair import (
    Pair,
    Shape,
    drawn_labels,
    inputs_text,
    learned,
    loss_text,
    scores_and_labels,
    shapes,
    thorough,
)

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.indices import LABEL, Indices
from caffe_jacinto.engines.pytorch.net import TEST, TRAIN, Net
from caffe_jacinto.networks.label_smoothing import smoothed
from caffe_jacinto.networks.layers import SoftmaxWithLoss
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.render import render
from caffe_jacinto.prototxt.schema import messages, parse_net

pytestmark = pytest.mark.caffe

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    "mode",
    ["", "normalization: FULL", "normalization: BATCH_SIZE", "normalization: NONE", "normalize: false"],
)
@pytest.mark.parametrize("ignored", [None, 255, 0])
def test_softmax_loss_is_caffes(mode: str, ignored: int | None, pycaffe: Any, tmp_path: Path) -> None:
    @settings(thorough, max_examples=15)
    @given(scores_and_labels(), st.integers(0, 2**32 - 1), st.floats(0.1, 30))
    def compare(case: tuple[dict[str, Shape], int, int], seed: int, spread: float) -> None:
        names, axis, classes = case
        ignore = "" if ignored is None else f"ignore_label: {ignored}"
        layer = f'type: "SoftmaxWithLoss" softmax_param {{ axis: {axis} }} loss_param {{ {ignore} {mode} }}'
        random = np.random.default_rng(seed)
        given_inputs = {
            "data": (spread * random.standard_normal(names["data"])).astype(np.float32),
            "label": drawn_labels(names["label"], classes, ignored, random),
        }
        Pair(pycaffe, tmp_path, loss_text(names, layer)).compare(given_inputs)

    compare()


def test_smoothed_labels_are_pytorchs_in_layers_that_caffe_has(pycaffe: Any, tmp_path: Path) -> None:
    """What a recipe's label_smoothing writes, in real Caffe, and against torch's own."""
    classes, share, random = 7, 0.15, np.random.default_rng(3)
    names = {"data": (5, classes), "label": (5,)}
    losses = smoothed((SoftmaxWithLoss("loss", ("data", "label"), "loss"),), share, classes, Dialect.BVLC)
    text = render("net.j2", name="net", layers=losses, dialect="bvlc", input_shape=())
    scores = (3 * random.standard_normal(names["data"])).astype(np.float32)
    labels = drawn_labels(names["label"], classes, None, random)
    pair = Pair(pycaffe, tmp_path, f"{inputs_text(names)}\n{learned('data')}{text}")
    pair.compare({"data": scores, "label": labels}, only=())
    own = pair.ours({"data": torch.from_numpy(scores), "label": torch.from_numpy(labels)}).loss
    theirs = F.cross_entropy(
        torch.from_numpy(scores), torch.from_numpy(labels).long().reshape(-1), label_smoothing=share
    )
    torch.testing.assert_close(own, theirs)


def test_smoothed_labels_are_pytorchs_in_layers_that_caffe_jacinto_has() -> None:
    """Its InfogainLoss reads probabilities and has no axis."""
    classes, share, random = 7, 0.15, np.random.default_rng(3)
    layers = (SoftmaxWithLoss("loss", ("scores", "label"), "loss"),)
    losses = smoothed(layers, share, classes, Dialect.CAFFE_JACINTO)
    text = render("net.j2", name="net", layers=losses, dialect="caffe_jacinto", input_shape=())
    text = f"""{inputs_text({"data": (5, 4), "label": (5,)})}
        layer {{ name: "fc" type: "InnerProduct" bottom: "data" top: "scores"
          inner_product_param {{ num_output: {classes} weight_filler {{ type: "gaussian" std: 2 }} }} }}
        {text}"""
    net = Net(
        parse_net(text, Dialect.CAFFE_JACINTO, "net.prototxt"),
        TRAIN,
        Dialect.CAFFE_JACINTO,
        where="net.prototxt",
        seed=1,
    )
    images = torch.from_numpy(random.standard_normal((5, 4)).astype(np.float32))
    labels = torch.tensor([0.0, 6, 3, 3, 1])
    ours = net({"data": images, "label": labels}).loss
    weights, bias = (blob.tensor for blob in net.layer_blobs["fc"])
    theirs = F.cross_entropy(images @ weights.T + bias, labels.long(), label_smoothing=share)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    found, (expected,) = weights.grad, torch.autograd.grad(theirs, [weights])
    torch.testing.assert_close(found, expected)


def test_the_largest_loss_is_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """A loss that is stuck shows 87.3365 in either, and learns on by the same gradient."""
    names = {"data": (2, 3), "label": (2,)}
    values = {"data": np.float32([[0, 200, 0], [0, 0, 1]]), "label": np.float32([0, 0])}
    Pair(pycaffe, tmp_path, loss_text(names, 'type: "SoftmaxWithLoss"')).compare(values)
    values["label"] = np.float32([0, 1])
    pair = Pair(pycaffe, tmp_path, loss_text({"data": (2, 3), "label": (2,)}, 'type: "SoftmaxWithLoss"'))
    pair.compare(values)


@pytest.mark.parametrize("ignored", [None, 1])
def test_accuracy_is_caffes(ignored: int | None, pycaffe: Any, tmp_path: Path) -> None:
    """Also where scores are equal: few different numbers make many ties."""

    @thorough
    @given(scores_and_labels(), st.integers(0, 2**32 - 1), st.data())
    def compare(case: tuple[dict[str, Shape], int, int], seed: int, data: st.DataObject) -> None:
        names, axis, classes = case
        top_k = data.draw(st.integers(1, classes))
        ignore = "" if ignored is None else f"ignore_label: {ignored}"
        layer = f'type: "Accuracy" accuracy_param {{ axis: {axis} top_k: {top_k} {ignore} }}'
        random = np.random.default_rng(seed)
        labels = drawn_labels(names["label"], classes, ignored, random)
        if ignored is not None:
            labels.reshape(-1)[0] = 0  # Caffe divides by the labels that count
        scores = random.integers(0, 3, names["data"]).astype(np.float32)
        Pair(pycaffe, tmp_path, loss_text(names, layer), TEST).compare(
            {"data": scores, "label": labels}, backward=False
        )

    compare()


def test_accuracy_of_each_class_is_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """A class without labels has 0."""

    @thorough
    @given(scores_and_labels(), SEEDS, st.data())
    def compare(case: tuple[dict[str, Shape], int, int], seed: int, data: st.DataObject) -> None:
        names, axis, classes = case
        top_k = data.draw(st.integers(1, classes))
        layer = f'type: "Accuracy" top: "classes" accuracy_param {{ axis: {axis} top_k: {top_k} }}'
        random = np.random.default_rng(seed)
        labels = drawn_labels(names["label"], classes, None, random)
        scores = random.integers(0, 3, names["data"]).astype(np.float32)
        text = loss_text(names, layer).replace("top: 'top'", "").replace('top: "classes"', "")
        text = text.replace("name: 'tested'", "name: 'tested' top: 'top' top: 'classes'")
        Pair(pycaffe, tmp_path, text, TEST).compare({"data": scores, "label": labels}, backward=False)

    compare()


@pytest.mark.parametrize("mode", ["", "FULL", "VALID", "BATCH_SIZE", "NONE", "normalize: true"])
@pytest.mark.parametrize("ignored", [None, 255, 0])
def test_sigmoid_cross_entropy_is_caffes(
    mode: str, ignored: int | None, pycaffe: Any, tmp_path: Path
) -> None:
    @settings(thorough, max_examples=15)
    @given(shapes(1, 4), SEEDS, st.floats(0.1, 30))
    def compare(shape: Shape, seed: int, spread: float) -> None:
        fields = "" if ignored is None else f"ignore_label: {ignored}"
        fields += f" {mode}" if ":" in mode or not mode else f" normalization: {mode}"
        layer = f'type: "SigmoidCrossEntropyLoss" loss_weight: 1.5 loss_param {{ {fields} }}'
        random = np.random.default_rng(seed)
        targets = random.random(shape).astype(np.float32)
        if ignored is not None:
            targets[random.random(shape) < 0.3] = ignored
        scores = (spread * random.standard_normal(shape)).astype(np.float32)
        text = loss_text({"data": shape, "label": shape}, layer)
        Pair(pycaffe, tmp_path, text).compare({"data": scores, "label": targets})

    compare()


@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_hinge_loss_is_caffes(norm: str, pycaffe: Any, tmp_path: Path) -> None:
    @settings(thorough, max_examples=30)
    @given(shapes(2, 4), SEEDS)
    def compare(shape: Shape, seed: int) -> None:
        random = np.random.default_rng(seed)
        classes = int(np.prod(shape[1:]))
        values = {
            "data": random.standard_normal(shape).astype(np.float32),
            "label": random.integers(0, classes, shape[0]).astype(np.float32),
        }
        layer = f'type: "HingeLoss" hinge_loss_param {{ norm: {norm} }} loss_weight: 2'
        Pair(pycaffe, tmp_path, loss_text({"data": shape, "label": shape[:1]}, layer)).compare(values)

    compare()


def test_multinomial_logistic_loss_is_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """Also of a probability that is 0."""

    @thorough
    @given(shapes(2, 4), SEEDS)
    def compare(shape: Shape, seed: int) -> None:
        random = np.random.default_rng(seed)
        classes = int(np.prod(shape[1:]))
        values = {
            "data": random.choice(np.float32([0, 1e-5, 0.1, 0.7, 1]), shape),
            "label": random.integers(0, classes, shape[0]).astype(np.float32),
        }
        text = loss_text({"data": shape, "label": shape[:1]}, 'type: "MultinomialLogisticLoss"')
        Pair(pycaffe, tmp_path, text).compare(values)

    compare()


def test_euclidean_loss_is_caffes(pycaffe: Any, tmp_path: Path) -> None:
    """Both bottoms get a gradient."""

    @thorough
    @given(shapes(1, 4), SEEDS)
    def compare(shape: Shape, seed: int) -> None:
        random = np.random.default_rng(seed)
        values = {name: random.standard_normal(shape).astype(np.float32) for name in ("data", "other")}
        layer = 'type: "EuclideanLoss" loss_weight: 0.5'
        text = loss_text({"data": shape, "other": shape}, layer, "other")
        Pair(pycaffe, tmp_path, text).compare(values)

    compare()


@pytest.mark.parametrize("legacy", ["true", "false"])
def test_contrastive_loss_is_caffes(legacy: str, pycaffe: Any, tmp_path: Path) -> None:
    @thorough
    @given(st.integers(1, 6), st.integers(1, 5), st.booleans(), st.floats(0.1, 4), SEEDS)
    def compare(pairs: int, channels: int, images: bool, margin: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        shape = (pairs, channels, 1, 1) if images else (pairs, channels)
        names = {"a": shape, "b": shape, "similar": (pairs,)}
        text = inputs_text(names) + learned("a") + learned("b")
        text += f"""
            layer {{ name: "tested" type: "ContrastiveLoss" bottom: "a" bottom: "b" bottom: "similar"
              top: "loss" contrastive_loss_param {{ margin: {margin:g} legacy_version: {legacy} }} }}"""
        values = {name: random.standard_normal(shape).astype(np.float32) for name in ("a", "b")}
        values["similar"] = random.integers(0, 2, pairs).astype(np.float32)
        Pair(pycaffe, tmp_path, text).compare(values, only=())

    compare()


@pytest.mark.parametrize("mode", ["", "FULL", "BATCH_SIZE", "NONE"])
@pytest.mark.parametrize("stored", [False, True])
def test_infogain_loss_is_caffes(mode: str, stored: bool, pycaffe: Any, tmp_path: Path) -> None:
    """The matrix in a file, or a bottom; with labels that do not count, and the probabilities as a top."""

    @settings(thorough, max_examples=20)
    @given(scores_and_labels(), SEEDS, st.floats(0.1, 30), st.booleans())
    def compare(case: tuple[dict[str, Shape], int, int], seed: int, spread: float, ignores: bool) -> None:
        names, axis, classes = case
        random = np.random.default_rng(seed)
        matrix = random.uniform(-1, 2, (1, 1, classes, classes)).astype(np.float32)
        values = {
            "data": (spread * random.standard_normal(names["data"])).astype(np.float32),
            "label": drawn_labels(names["label"], classes, 255 if ignores else None, random),
        }
        fields, reads = f"axis: {axis}", 'bottom: "data" bottom: "label"'
        if stored:
            path = tmp_path / "matrix.binaryproto"
            blob = messages(Dialect.BVLC).BlobProto(data=matrix.ravel())
            blob.shape.dim.extend(matrix.shape)
            path.write_bytes(blob.SerializeToString())
            fields += f' source: "{path}"'
        else:
            values["matrix"], names = matrix, {**names, "matrix": matrix.shape}
            reads += ' bottom: "matrix"'
        loss = f"{'ignore_label: 255' if ignores else ''} {f'normalization: {mode}' if mode else ''}"
        text = inputs_text(names) + learned("data")
        text += f"""
            layer {{ name: "tested" type: "InfogainLoss" {reads} top: "loss" top: "prob"
              loss_weight: 2 loss_weight: 0 infogain_loss_param {{ {fields} }} loss_param {{ {loss} }} }}"""
        Pair(pycaffe, tmp_path, text).compare(values, only=())

    compare()


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            'type: "InfogainLoss" bottom: "rows" bottom: "label"',
            "needs infogain_loss_param.source or a third",
        ),
        (
            'type: "InfogainLoss" bottom: "rows" bottom: "label" infogain_loss_param { source: "none" }',
            "file of an infogain matrix none cannot be read: No such file or directory",
        ),
        (
            'type: "InfogainLoss" bottom: "rows" bottom: "label" bottom: "label"',
            "has to be 5 x 5, and has (4,)",
        ),
        ('type: "HingeLoss" bottom: "rows" bottom: "rows"', "20 labels for 4 items; give one for each"),
        ('type: "EuclideanLoss" bottom: "rows" bottom: "label"', "different sizes: (4, 5), (4,)"),
        ('type: "SigmoidCrossEntropyLoss" bottom: "rows" bottom: "label"', "(4,) targets for (4, 5) scores"),
        ('type: "ContrastiveLoss" bottom: "rows" bottom: "rows" bottom: "rows"', "one number for each pair"),
    ],
)
def test_bottoms_that_do_not_fit_are_named(layer: str, says: str) -> None:
    text = inputs_text({"rows": (4, 5), "label": (4,)}) + f"layer {{ name: 'tested' {layer} top: 't' }}"
    with pytest.raises(UserError, match=r"net\.prototxt: layer tested|infogain matrix") as error:
        Net(parse_net(text, Dialect.BVLC, "net.prototxt"), TRAIN, Dialect.BVLC, where="net.prototxt")
    assert says in str(error.value)


# --------------------------------------------------------------------------- labels and indices out of range

LABELLED = {
    "Accuracy": "",
    "HingeLoss": "",
    "InfogainLoss": "",
    "MultinomialLogisticLoss": "",
    "SoftmaxWithLoss": "loss_param { ignore_label: 255 }",
}


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("label", [-1, 4, 255])
def test_a_label_out_of_range_is_one_line(kind: str, label: int) -> None:
    """It is computed by a layer before, so that nothing sees it before the pass."""
    matrix = 'bottom: "h"' if kind == "InfogainLoss" else ""
    text = (
        inputs_text({"data": (2, 4), "number": (2,), "h": (1, 1, 4, 4)})
        + 'layer { name: "more" type: "Power" bottom: "number" top: "label" power_param { shift: 1 } }'
        + f'layer {{ name: "last" type: "{kind}" bottom: "data" bottom: "label" {matrix} top: "loss" '
        + f"{LABELLED[kind]} }}"
    )
    net = Net(parse_net(text, Dialect.BVLC, "net"), TRAIN, Dialect.BVLC, where="net.prototxt", seed=1)
    values = {"data": torch.full((2, 4), 0.25), "h": torch.eye(4).reshape(1, 1, 4, 4)}
    net({**values, "number": torch.tensor([2.0, -1.0])})
    given = {**values, "number": torch.tensor([1.0, label - 1.0])}
    if label == 255 and kind == "SoftmaxWithLoss":
        net(given)
        return
    says = (
        f"net.prototxt: layer last ({kind}): the label {label} in its bottom label: it has to be from 0 to 3"
    )
    with pytest.raises(UserError, match=re.escape(says)):
        net(given)


def test_an_index_out_of_range_is_one_line() -> None:
    text = (
        inputs_text({"numbers": (3,), "data": (2, 4)})
        + 'layer { name: "words" type: "Embed" bottom: "numbers" top: "rows"'
        + " embed_param { input_dim: 5 num_output: 2 } }"
        + 'layer { name: "again" type: "BatchReindex" bottom: "data" bottom: "numbers" top: "some" }'
    )
    net = Net(parse_net(text, Dialect.BVLC, "net"), TRAIN, Dialect.BVLC, where="net.prototxt", seed=1)
    data = torch.zeros(2, 4)
    with pytest.raises(UserError, match=r"layer words \(Embed\): the index 5 in its bottom numbers: .* to 4"):
        net({"numbers": torch.tensor([0.0, 4, 5]), "data": data})
    with pytest.raises(UserError, match=r"layer again \(BatchReindex\): the number of an item 2 in its"):
        net({"numbers": torch.tensor([0.0, 1, 2]), "data": data})


def test_what_would_wait_for_a_gpu_is_kept_and_named_later() -> None:
    """The computation of a GPU, here on a CPU."""
    kept = torch.zeros((), dtype=torch.int64)
    indices = Indices("net.prototxt: layer last (SoftmaxWithLoss)", "label", LABEL, 4, 255, kept)
    assert indices(torch.tensor([[0.0, 3.0], [255.0, 1.0]])).tolist() == [[0, 3], [255, 1]]
    indices.check()
    assert indices(torch.tensor([0.0, -7.0, 1.0])).tolist() == [0, 0, 1]
    assert indices(torch.tensor([9.0, 1.0, 1.0])).tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="the label -7 in its bottom label: it has to be from 0 to 3, or 255"):
        indices.check()
