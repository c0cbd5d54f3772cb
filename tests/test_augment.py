"""Resized crops and random colours: in range, as other libraries compute them, the same from any place on."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from hypothesis import given, settings
from hypothesis import strategies as st
from image_records import datum_of, noise, write_lmdb
from PIL import Image, ImageEnhance

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.augment import CHANCES, Augmentation, mixing, read_augmentation
from caffe_jacinto.data.batches import Images, data_layer
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.prototxt.solver import TEST, TRAIN
from caffe_jacinto.recipes.model import AUGMENTATIONS

ALL = "crop_min_area: 0.3 random_brightness: 0.4 random_contrast: 0.4 random_saturation: 0.4"


def test_recipes_and_prototxts_name_the_same_fields() -> None:
    assert tuple(Augmentation.__dataclass_fields__) == AUGMENTATIONS


@given(
    st.integers(8, 300), st.integers(8, 300), st.floats(0.05, 1), st.floats(1, 3), st.integers(0, 2**32 - 1)
)
def test_a_window_has_a_share_and_a_ratio_that_are_allowed(
    height: int, width: int, share: float, aspect: float, seed: int
) -> None:
    chances = np.random.default_rng(seed).random(CHANCES).tolist()
    how = Augmentation(crop_min_area=share, crop_max_aspect=aspect)
    top, left, tall, wide = how.box(height, width, chances)
    assert top >= 0 and top + tall <= height and left >= 0 and left + wide <= width and min(tall, wide) > 0
    assert (tall - 0.5) / (wide + 0.5) <= aspect and (wide - 0.5) / (tall + 0.5) <= aspect
    largest = min(width, height * aspect) * min(height, width * aspect)
    assert (tall + 0.5) * (wide + 0.5) >= min(share * height * width, largest) * (1 - 1e-9)


def test_shares_and_ratios_are_spread_evenly() -> None:
    """Where every try fits: shares uniform, ratios uniform in their logarithm, places uniform."""
    random = np.random.default_rng(7)
    how = Augmentation(crop_min_area=0.1, crop_max_aspect=1.2)
    boxes = np.asarray([how.box(5000, 5000, random.random(CHANCES).tolist()) for _ in range(4000)])
    top, _, tall, wide = boxes.T.astype(float)
    fits = tall * wide < 0.8 * 5000**2  # larger ones fit with small ratios only
    shares, ratios = tall * wide / 5000**2, np.log(wide / tall) / log(1.2)
    low = np.histogram(shares[fits], 7, (0.1, 0.8))[0]
    assert low.max() / low.min() < 1.35
    even = np.histogram(ratios[fits], 5, (-1, 1))[0]
    assert even.max() / even.min() < 1.25
    places = np.histogram(top[fits] / (5000 - tall[fits]), 5, (0, 1))[0]
    assert places.max() / places.min() < 1.25


def test_a_resized_crop_is_pytorchs_interpolation() -> None:
    """Within a grey level: OpenCV rounds the weights of 8-bit images."""
    image, how = noise(90, 120, 3, 1), Augmentation(crop_min_area=0.2)
    image = cv2.GaussianBlur(image, (5, 5), 2)
    for seed in range(5):
        chances = np.random.default_rng(seed).random(CHANCES).tolist()
        top, left, tall, wide = how.box(90, 120, chances)
        part = torch.from_numpy(image[top : top + tall, left : left + wide].transpose(2, 0, 1).copy())
        expected = F.interpolate(part[None].float(), (64, 64), mode="bilinear", align_corners=False)[0]
        found = torch.from_numpy(how.resized(image, chances, 64).transpose(2, 0, 1).copy()).float()
        assert (found - expected).abs().max() <= 1.01


@settings(max_examples=25)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_colours_are_pillows(brightness: float, contrast: float, saturation: float, seed: int) -> None:
    """In a range without clipping, within what Pillow rounds after each of the three."""
    random = np.random.default_rng(seed)
    chances = random.random(CHANCES).tolist()
    image = random.integers(90, 130, (6, 7, 3), np.uint8)
    strengths = (0.4 * brightness, 0.4 * contrast, 0.4 * saturation)
    found = Augmentation(0, 1, *strengths).jittered(image, chances)
    expected = Image.fromarray(image[:, :, ::-1].copy())
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, most, chance in zip(enhancers, strengths, chances[-3:], strict=True):
        expected = enhancer(expected).enhance(1 + most * (2 * chance - 1))
    assert np.abs(found.astype(int) - np.asarray(expected)[:, :, ::-1]).max() <= 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(24, 30, 3, seed), seed) for seed in range(10)])
    return tmp_path


def net(transform: str, more: str = "") -> Any:
    text = (
        f'layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ {transform} }}\n'
        '  data_param { source: "lmdb" batch_size: 4 backend: LMDB } }\n'
        f"{more}"
    )
    return parse_net(text, Dialect.BVLC, "net")


def batches(transform: str, first: int, count: int, phase: int = TRAIN, stride: int = 1) -> list[np.ndarray]:
    options: dict[str, Any] = {"device": torch.device("cpu"), "seed": 5, "workers": 1}
    with Inputs(net(transform), phase, "net", **options) as inputs:
        inputs.start_at(first, stride)
        return [inputs.batch()["data"].numpy() for _ in range(count)]


def test_any_place_and_any_rank_give_the_same_images(folder: Path) -> None:
    """So a training resumes exactly, and two ranks take in turn what one would."""
    plain = f"crop_size: 16 mirror: true {ALL}"
    whole = batches(plain, 0, 6)
    assert all((a == b).all() for a, b in zip(batches(plain, 3, 3), whole[3:], strict=True))
    assert all((a == b).all() for a, b in zip(batches(plain, 1, 3, stride=2), whole[1::2], strict=True))
    assert len({batch.tobytes() for batch in whole}) == 6
    assert whole[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("size", [7, 16])
def test_smaller_images_are_pillows(folder: Path, size: int) -> None:
    """The same crops and mirrors, resized as Pillow does it."""
    options: dict[str, Any] = {"device": torch.device("cpu"), "seed": 5, "workers": 1}
    transform = "crop_size: 20 mirror: true mean_value: 100 scale: 0.1"
    with Inputs(net(transform), TRAIN, "net", **options) as inputs:
        inputs.start_at(1)
        raw = inputs.raw()
        whole, small = (inputs.transformed(raw, size=side)["data"].numpy() for side in (None, size))
    assert small.shape == (4, 3, size, size)
    for image, found in zip(whole.reshape(-1, 20, 20), small.reshape(-1, size, size), strict=True):
        expected = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found, np.asarray(expected), atol=1e-4)


def test_colours_leave_crops_and_mirrors_as_they_are(folder: Path) -> None:
    plain = "crop_size: 16 mirror: true"
    pairs = zip(batches(plain, 0, 4), batches(f"{plain} random_brightness: 0.05", 0, 4), strict=True)
    for before, after in pairs:
        assert 0 < np.abs(before - after).max() <= 0.05 * 255 + 1


def test_tests_show_images_as_they_are(folder: Path) -> None:
    one, other = (batches(f"crop_size: 16 {more}", 0, 2, TEST) for more in (ALL, ""))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        ("crop_min_area: 0.5", "transform_param.crop_min_area needs crop_size"),
        (
            "crop_size: 8 crop_min_area: 1.5",
            r"transform_param.crop_min_area is 1.5; it has to be from 0 to 1",
        ),
        ("crop_max_aspect: 0.5", r"crop_max_aspect is 0.5; it has to be from 1 to 100"),
        ("random_contrast: -1", r"random_contrast is -1; it has to be from 0 to 1"),
        ('crop_size: 8 crop_min_area: 0.5 mean_file: "mean"', "crop_min_area resizes crops, which the image"),
    ],
)
def test_what_cannot_be_is_one_line(transform: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_augmentation(net(transform).layer[0].transform_param, "net")


def test_colours_of_images_that_are_not_8_bit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    floats = messages(Dialect.BVLC).Datum(channels=1, height=4, width=5, float_data=[0.5] * 20)
    write_lmdb(tmp_path / "lmdb", [floats] * 4)
    layer = data_layer(net("random_contrast: 0.1").layer[0], "net", training=True)
    with pytest.raises(UserError, match="change in 8-bit images only, and those of lmdb are float32"):
        Images(layer, 4, 1)


def test_mixed_images_and_their_loss(folder: Path) -> None:
    """Against NumPy's mixture of the plain batch, and the cross-entropy of soft targets in torch."""
    reads = "bottom: 'label' top:"
    layers = (
        "layer { name: 'fc' type: 'InnerProduct' bottom: 'data' top: 'fc' "
        "inner_product_param { num_output: 10 weight_filler { type: 'gaussian' std: 0.001 } } }\n"
        f"layer {{ name: 'loss' type: 'SoftmaxWithLoss' bottom: 'fc' {reads} 'loss' }}\n"
        f"layer {{ name: 'accuracy' type: 'Accuracy' bottom: 'fc' {reads} 'accuracy' }}\n"
    )
    options: dict[str, Any] = {"device": torch.device("cpu"), "seed": 5, "workers": 1}
    plain = batches("crop_size: 16", 0, 3)
    definition = net("crop_size: 16 mixup_alpha: 0.7", layers)
    shares = []
    with Inputs(definition, TRAIN, "net", **options) as inputs:
        built = Net(definition, TRAIN, Dialect.BVLC, where="net", seed=1, data_shapes=inputs.shapes)
        inputs.fit(built)
        inputs.start_at(0)
        for batch in plain:
            raw = inputs.raw()
            others = raw[0].mixing[:, 0].long().numpy()
            (share,) = set(raw[0].mixing[:, 1].tolist())
            labels = raw[0].labels.clone()
            given = inputs.transformed(raw)
            expected = share * batch + (1 - share) * batch[others]
            np.testing.assert_allclose(given["data"].numpy(), expected, rtol=1e-5, atol=1e-3)
            result = built(dict(given))
            scores = built.layer_blobs["fc"]
            rows = given["data"].reshape(4, -1) @ scores[0].tensor.T + scores[1].tensor
            targets = share * F.one_hot(labels, 10) + (1 - share) * F.one_hot(labels[others], 10)
            torch.testing.assert_close(result.loss, F.cross_entropy(rows, targets.float()))
            right = (rows.argmax(1) == labels).float().mean()
            torch.testing.assert_close(result.outputs["accuracy"], right)
            shares.append(share)
    assert len(set(shares)) == 3 and all(0 <= share <= 1 for share in shares)


def test_recalibration_sees_images_that_are_not_mixed(folder: Path) -> None:
    mixed, plain = batches("crop_size: 16 mixup_alpha: 0.7", 0, 2), batches("crop_size: 16", 0, 2)
    assert all((a == b).all() for a, b in zip(mixed, plain, strict=True))


def test_shares_follow_the_beta_distribution() -> None:
    shares = [mixing(0.4, 3, np.random.default_rng(seed))[0] for seed in range(3000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)
    assert sorted(mixing(0.4, 7, np.random.default_rng(1))[1].tolist()) == list(range(7))


def test_what_cannot_read_mixed_labels_is_named() -> None:
    layer = "layer { name: 'hinge' type: 'HingeLoss' bottom: 'data' bottom: 'label' top: 'hinge' }"
    shapes = {"data": (4, 3, 1, 1), "label": (4,)}
    definition = net("mixup_alpha: 0.1", layer)
    with pytest.raises(UserError, match=r"hinge \(HingeLoss\): reads the labels of images that are mixed"):
        Net(definition, TRAIN, Dialect.BVLC, where="net", seed=1, data_shapes=shapes)
    Net(definition, TEST, Dialect.BVLC, where="net", seed=1, data_shapes=shapes)
