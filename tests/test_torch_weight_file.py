"""Weight files of the engine on PyTorch: stock Caffe reads what it writes, and it reads what others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import TEST, Net
from caffe_jacinto.engines.pytorch.snapshot import array, load_weights, put, read_place, save_weights
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.weights import main as weights_command

CROPS = {"jacintonet11": 64, "resnet10": 65, "bvlc_alexnet": 67}


def deploy_file(folder: Path, network: str, dialect: Dialect) -> Path:
    """The deploy prototxt of ``network`` for small images of 7 classes."""
    output = folder / dialect.value
    arguments = ["--network", network, "--dialect", dialect.value, "--num-classes", "7"]
    arguments += ["--crop-size", str(CROPS[network]), "--output", str(output)]
    assert build_net(arguments) == 0
    return output / "deploy.prototxt"


def net_of(path: Path, dialect: Dialect, seed: int = 1) -> Net:
    definition = parse_net(path.read_text(), dialect, str(path))
    return Net(definition, TEST, dialect, where=str(path), seed=seed)


def give_statistics(net: Net) -> None:
    """Batch norms that do something: statistics as after some training."""
    random = np.random.default_rng(5)
    for name in (layer.name for layer in net.layers if layer.type == "BatchNorm"):
        mean, variance, factor, *_ = (blob.tensor for blob in net.layer_blobs[name])
        put(random.normal(size=mean.shape).astype(np.float32), mean)
        put(random.uniform(0.5, 3, variance.shape).astype(np.float32), variance)
        put(np.float32([1 if net.dialect is Dialect.CAFFE_JACINTO else 2.5]), factor)


def images_for(net: Net) -> np.ndarray:
    (name,) = net.inputs
    return np.random.default_rng(3).uniform(0, 255, net.shapes[name]).astype(np.float32)


def scores(net: Net, images: np.ndarray) -> np.ndarray:
    (name,) = net.inputs
    data = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (output,) = net({name: data}).outputs.values()
    return output.numpy()


def caffes_scores(pycaffe: Any, model: Path, weights: Path, images: np.ndarray) -> np.ndarray:
    net = pycaffe.Net(str(model), str(weights), TEST)
    net.blobs[net.inputs[0]].data[...] = images
    (output,) = net.forward().values()
    return np.array(output)


def assert_same_blobs(net: Net, other: Net) -> None:
    assert list(net.layer_blobs) == list(other.layer_blobs)
    for name, blobs in net.layer_blobs.items():
        for index, (blob, same) in enumerate(zip(blobs, other.layer_blobs[name], strict=True)):
            np.testing.assert_array_equal(array(same.tensor), array(blob.tensor), err_msg=f"{name}[{index}]")


@pytest.mark.caffe
@pytest.mark.parametrize("network", CROPS)
def test_stock_caffe_scores_as_the_engine_does(network: str, pycaffe: Any, tmp_path: Path) -> None:
    """Every bit of every blob arrives, and Caffe's own file comes back the same."""
    model = deploy_file(tmp_path, network, Dialect.BVLC)
    net = net_of(model, Dialect.BVLC)
    give_statistics(net)
    written = tmp_path / "ours.caffemodel"
    save_weights(net, written)
    images = images_for(net)
    expected = caffes_scores(pycaffe, model, written, images)
    np.testing.assert_allclose(scores(net, images), expected, rtol=1e-5, atol=1e-5)
    theirs = pycaffe.Net(str(model), str(written), TEST)
    for name, blobs in net.layer_blobs.items():
        for index, blob in enumerate(blobs):
            np.testing.assert_array_equal(theirs.params[name][index].data, array(blob.tensor), err_msg=name)
            assert theirs.params[name][index].data.shape == tuple(blob.tensor.shape)
    theirs.save(str(tmp_path / "theirs.caffemodel"))
    again = net_of(model, Dialect.BVLC, seed=2)
    assert load_weights(again, tmp_path / "theirs.caffemodel") == ([], [])
    assert_same_blobs(net, again)


@pytest.mark.caffe
@pytest.mark.parametrize("network", ["jacintonet11", "resnet10"])
def test_the_forks_network_scores_as_its_conversion_in_caffe(
    network: str, pycaffe: Any, tmp_path: Path
) -> None:
    fork = deploy_file(tmp_path, network, Dialect.CAFFE_JACINTO)
    net = net_of(fork, Dialect.CAFFE_JACINTO)
    give_statistics(net)
    written, converted = tmp_path / "fork.caffemodel", tmp_path / "bvlc.caffemodel"
    save_weights(net, written)
    convert = ["convert", "--from", "caffe_jacinto", "--to", "bvlc", "--output", str(converted)]
    assert weights_command([*convert, str(written)]) == 0
    images = images_for(net)
    expected = caffes_scores(pycaffe, deploy_file(tmp_path, network, Dialect.BVLC), converted, images)
    np.testing.assert_allclose(scores(net, images), expected, rtol=1e-5, atol=1e-5)
    again = net_of(fork, Dialect.CAFFE_JACINTO, seed=2)
    assert load_weights(again, written) == ([], [])
    assert_same_blobs(net, again)


SMALL = """name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 5 dim: 5 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc" inner_product_param { num_output: 6 } }
"""
FORK_NORM = """name: "norm"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 5 dim: 5 } } }
layer { name: "bn" type: "BatchNorm" bottom: "data" top: "bn" batch_norm_param { scale_bias: true } }
"""


def small_net(text: str = SMALL, dialect: Dialect = Dialect.BVLC) -> Net:
    return Net(parse_net(text, dialect, "small"), TEST, dialect, where="small", seed=1)


def numbers(count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32).tolist()


def four_axes(blob: Any, shape: tuple[int, ...], values: list[float]) -> None:
    padded = (1,) * (4 - len(shape)) + shape
    blob.num, blob.channels, blob.height, blob.width = padded
    blob.data.extend(values)


def test_the_oldest_form_of_weight_files(tmp_path: Path) -> None:
    """``layers`` where it is ``layer`` today, and blobs of four axes whatever they hold."""
    shapes: dict[str, list[tuple[int, ...]]] = {"conv": [(4, 3, 3, 3), (4,)], "fc": [(6, 36), (6,)]}
    old = messages(Dialect.BVLC).NetParameter()
    for name, blobs in shapes.items():
        layer = old.layers.add(name=name)
        for index, shape in enumerate(blobs):
            four_axes(layer.blobs.add(), shape, numbers(int(np.prod(shape)), index))
    path = tmp_path / "old.caffemodel"
    path.write_bytes(old.SerializeToString())
    net = small_net()
    assert load_weights(net, path) == ([], [])
    for name, blobs in shapes.items():
        for index, shape in enumerate(blobs):
            found = array(net.layer_blobs[name][index].tensor)
            np.testing.assert_array_equal(found.ravel(), np.float32(numbers(int(np.prod(shape)), index)))


def test_the_forks_older_batch_norms(tmp_path: Path) -> None:
    """One number a channel as 1 x C x 1 x 1."""
    old = messages(Dialect.CAFFE_JACINTO).NetParameter()
    layer = old.layer.add(name="bn", type="BatchNorm")
    for index, count in enumerate((3, 3, 1, 3, 3)):
        blob = layer.blobs.add()
        blob.shape.dim.extend((1, count, 1, 1) if count == 3 else (1,))
        blob.data.extend(numbers(count, index))
    path = tmp_path / "old.caffemodel"
    path.write_bytes(old.SerializeToString())
    net = small_net(FORK_NORM, Dialect.CAFFE_JACINTO)
    assert load_weights(net, path) == ([], [])
    for index, blob in enumerate(net.layer_blobs["bn"]):
        np.testing.assert_array_equal(array(blob.tensor), np.float32(numbers(blob.tensor.numel(), index)))


def test_layers_that_one_side_lacks_are_told(tmp_path: Path) -> None:
    path = tmp_path / "small.caffemodel"
    save_weights(small_net(), path)
    text = SMALL.replace('"fc"', '"fc7"')
    assert load_weights(small_net(text), path) == (["fc7"], ["fc"])


@pytest.mark.parametrize(
    ("text", "dialect", "says"),
    [
        (SMALL.replace("num_output: 6", "num_output: 7"), Dialect.BVLC, "fc: blob 0 is 6 x 36"),
        (SMALL.replace("kernel_size: 3", "kernel_size: 3 bias_term: false"), Dialect.BVLC, "conv: 2 blobs"),
        (FORK_NORM, Dialect.CAFFE_JACINTO, "bn: not in the weight file"),
    ],
)
def test_weights_of_another_network_are_one_line(
    text: str, dialect: Dialect, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.caffemodel"
    save_weights(small_net(), path)
    net = small_net(text, dialect)
    before = {name: [array(blob.tensor).copy() for blob in blobs] for name, blobs in net.layer_blobs.items()}
    with pytest.raises(UserError) as error:
        load_weights(net, path)
    assert says in str(error.value) and "\n" not in str(error.value)
    for name, blobs in before.items():  # nothing was loaded by halves
        for blob, same in zip(net.layer_blobs[name], blobs, strict=True):
            np.testing.assert_array_equal(array(blob.tensor), same)


def test_weights_of_the_other_caffe_say_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "fork.caffemodel"
    save_weights(small_net(FORK_NORM, Dialect.CAFFE_JACINTO), path)
    stock = FORK_NORM.replace("batch_norm_param { scale_bias: true }", "")
    with pytest.raises(UserError, match=r"bn: .* five blobs, .*weights convert"):
        load_weights(small_net(stock), path)


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_file_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut off anywhere or with a byte changed, it is refused or read, and never a traceback."""
    path = tmp_path_factory.mktemp("damaged") / "small.caffemodel"
    save_weights(small_net(), path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        load_weights(small_net(), path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_a_snapshot_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.solverstate.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000))
    with pytest.raises(UserError, match="h5: an HDF5 file that is damaged or cut off"):
        read_place(path)
    path.write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"h5: cut off or not a solver state \(\.solverstate\)"):
        read_place(path)
