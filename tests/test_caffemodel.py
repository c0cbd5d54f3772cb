"""Weight files read without Caffe: both dialects, both forms of shapes, files cut off anywhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_stage import SmallStage, write_digits

from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.caffemodel.net_file import NewLayer, open_net, write_net
from caffe_jacinto.caffemodel.storage import read_weights, stored_state
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import read_text
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net

NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 bias_term: false } }
layer { name: "conv/bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "conv/scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc" inner_product_param { num_output: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" top: "loss" }
"""

SHAPES = {
    "conv": [(4, 3, 3, 3)],
    "conv/bn": [(4,), (4,), (1,)],
    "conv/scale": [(4,), (4,)],
    "fc": [(2, 144), (2,)],
}


def net(text: str = NET) -> Any:
    return parse_net(text, Dialect.BVLC, "net")


def write(
    path: Path, layers: dict[str, list[np.ndarray]], dialect: Dialect = Dialect.BVLC, form: str = "shape"
) -> Path:
    """A weight file as Caffe writes it (``shape``), as it once did (``old``), as the fork does (``raw``)."""
    message = messages(dialect).NetParameter(name="net")
    for name, arrays_ in layers.items():
        layer = message.layer.add(name=name, type="Any")
        for values in arrays_:
            blob = layer.blobs.add()
            if form == "old":
                four = (1,) * (4 - values.ndim) + values.shape
                blob.num, blob.channels, blob.height, blob.width = four
            else:
                blob.shape.dim.extend(values.shape)
            if form == "raw":
                blob.raw_data_type = {"float32": 1, "float16": 2, "float64": 0}[values.dtype.name]
                blob.raw_data = values.tobytes()
            elif values.dtype == np.float64:
                blob.double_data.extend(values.ravel())
            else:
                blob.data.extend(values.ravel())
    path.write_bytes(message.SerializeToString())
    return path


def weights_of(shapes: dict[str, list[tuple[int, ...]]]) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(0)
    return {
        name: [random.normal(size=shape).astype(np.float32) for shape in blobs]
        for name, blobs in shapes.items()
    }


NUMBERS = st.lists(st.integers(0, 3), min_size=0, max_size=4).flatmap(
    lambda shape: arrays(np.float32, tuple(shape), elements=st.floats(width=32, allow_nan=False))
)


@given(values=NUMBERS, form=st.sampled_from(["shape", "raw"]))
def test_numbers_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, form: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "w.caffemodel"
    dialect = Dialect.CAFFE_JACINTO if form == "raw" else Dialect.BVLC
    write(path, {"a/b": [values, values]}, dialect, form)
    read = read_weights(path)
    assert list(read) == ["a/b"]
    assert [array.tobytes() for array in read["a/b"]] == [values.tobytes()] * 2
    assert read["a/b"][0].shape == values.shape


def test_half_and_double_precision(tmp_path: Path) -> None:
    half = np.array([0.5, -2], np.float16)
    path = write(tmp_path / "h.caffemodel", {"a": [half]}, Dialect.CAFFE_JACINTO, "raw")
    assert read_weights(path)["a"][0].tolist() == [0.5, -2]
    path = write(tmp_path / "d.caffemodel", {"a": [half.astype(np.float64)]})
    assert read_weights(path)["a"][0].tolist() == [0.5, -2]


def test_old_form_of_shapes_and_of_layers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "old.caffemodel", {"fc": [np.arange(6, dtype=np.float32).reshape(2, 3)]}, form="old"
    )
    assert read_weights(path)["fc"][0].shape == (1, 1, 2, 3)
    message = messages(Dialect.BVLC).NetParameter()
    blob = message.layers.add(name="v1").blobs.add(num=1, channels=1, height=1, width=2)
    blob.data.extend([1, 2])
    path.write_bytes(message.SerializeToString())
    assert read_weights(path)["v1"][0].ravel().tolist() == [1, 2]


def varint(value: int) -> bytes:
    most, rest = divmod(value, 128)
    return bytes([rest | 128]) + varint(most) if most else bytes([rest])


def length_field(number: int, content: bytes, declared: int | None = None) -> bytes:
    return varint(number << 3 | 2) + varint(len(content) if declared is None else declared) + content


@pytest.mark.parametrize(
    "content",
    [
        length_field(100, b"", declared=1 << 62),
        length_field(100, length_field(7, b"", declared=(1 << 64) - 1)),
        length_field(100, length_field(7, length_field(7, length_field(1, varint(1 << 62) * 2)))),
        length_field(100, length_field(7, length_field(7, length_field(1, varint((1 << 64) - 1))))),
        length_field(100, length_field(7, length_field(7, length_field(1, b"\xff" * 10_000_000)))),
        b"\xff" * 1000,
        bytes(1000),
        b"\x89HDF\r\n\x1a\n" + bytes(1000),
        b"PK\x03\x04" + bytes(1000),
        b'name: "net" layer { name: "conv" }',
    ],
    ids=[
        "layer",
        "blob",
        "huge shape",
        "negative shape",
        "endless shape",
        "ones",
        "nil",
        "HDF5",
        "zip",
        "text",
    ],
)
def test_foreign_files_and_sizes_that_are_not_there_are_refused_at_once(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "other.caffemodel"
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"other\.caffemodel: (cut off or not a weight file|no layer with weights|an HDF5|text, such)",
    ):
        read_weights(path)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    model = write(tmp_path / "net.caffemodel", weights_of({"a": [(2, 3)]}))
    state = tmp_path / "net.solverstate"
    state.write_bytes(messages(Dialect.BVLC).SolverState(iter=3, learned_net="net").SerializeToString())
    text = tmp_path / "train.prototxt"
    text.write_text(NET)
    hdf5 = tmp_path / "net.caffemodel.h5"
    hdf5.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000))
    weights, solver_state = r"weight file \(\.caffemodel\)", r"solver state \(\.solverstate\)"
    for path, read, said in (
        (state, read_weights, f"a {solver_state}; give a {weights}"),
        (text, read_weights, f"text, such as a prototxt; give a {weights}"),
        (hdf5, read_weights, r"an HDF5 file that is damaged or cut off \(.*\); use another one"),
        (model, stored_state, f"a {weights}; give a {solver_state}"),
        (text, stored_state, f"text, such as a prototxt; give a {solver_state}"),
        (hdf5, stored_state, r"an HDF5 file that is damaged or cut off \(.*\); use another one"),
        (model, read_text, "a weight file, not text"),
        (hdf5, read_text, "an HDF5 file, not text"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {said}$"):
            read(path)


def test_one_number_without_axes_is_a_factor(tmp_path: Path) -> None:
    scalar = weights_of({**SHAPES, "conv/bn": [(4,), (4,), ()]})
    assert check_fit(write(tmp_path / "w.caffemodel", scalar), net()) == []
    many = weights_of({**SHAPES, "conv/bn": [(4,), (), (1,)]})
    (mismatch,) = check_fit(write(tmp_path / "w.caffemodel", many), net())
    assert mismatch.reason == "blob 1 is one number in the weight file, 4 in the network"


@given(st.data())
def test_cut_off_anywhere_it_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "cut.caffemodel", weights_of({"a": [(2, 3)], "b": [(4,)]}))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        read = read_weights(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        # Just behind the first layer, nothing tells it from a whole file of one layer.
        assert list(read) == ["a"]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.caffemodel"
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"no layer with weights|cut off or no|file is empty|: text, such|: a solver state|an HDF5 file",
    ):
        read_weights(path)


def test_a_forks_parameters_under_a_number_of_caffes_are_left_out(tmp_path: Path) -> None:
    """Here a text under the number of input_param, in which Caffe has a shape first."""
    stored = messages(Dialect.BVLC).NetParameter(name="n")
    layer = stored.layer.add(name="fc", type="InnerProduct", top=["fc"])
    layer.inner_product_param.num_output = 2
    blob = layer.blobs.add(data=[1, 2])
    blob.shape.dim.extend([2, 1])
    foreign = bytes([143 << 3 & 0x7F | 2 | 0x80, 143 >> 4, 7, 10, 5]) + b"/path"
    content = bytes(layer.SerializeToString()) + foreign
    with pytest.raises(DecodeError):
        type(layer)().ParseFromString(content)
    file = tmp_path / "f.caffemodel"
    file.write_bytes(bytes([0xA2, 6, len(content)]) + content)
    with open_net(file, Dialect.BVLC) as (_, (found,)):
        assert (found.name, found.type, list(found.header.top)) == ("fc", "InnerProduct", ["fc"])
        assert found.header.inner_product_param.num_output == 2
        assert not found.header.HasField("input_param")
        np.testing.assert_array_equal(found.values(0), [[1], [2]])


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "none.caffemodel")
    with pytest.raises(UserError, match="Is a directory"):
        read_weights(tmp_path)


def test_shapes_that_the_text_tells() -> None:
    assert blob_shapes(net(), "TRAIN") == SHAPES


def test_five_blobs_of_the_fork() -> None:
    text = NET.replace('type: "BatchNorm"', 'type: "BatchNorm" batch_norm_param { scale_bias: true }')
    fork = parse_net(text, Dialect.CAFFE_JACINTO, "net")
    assert blob_shapes(fork, "TRAIN")["conv/bn"] == [(4,), (4,), (1,), (4,), (4,)]


def test_layers_of_the_other_phase_have_no_blobs() -> None:
    text = NET.replace('name: "fc"', 'name: "fc" include { phase: TEST }')
    assert "fc" not in blob_shapes(net(text), "TRAIN")
    assert "fc" in blob_shapes(net(text), "TEST")


def test_what_fits(tmp_path: Path) -> None:
    for form in ("shape", "old"):
        assert check_fit(write(tmp_path / "w.caffemodel", weights_of(SHAPES), form=form), net()) == []
    more = {**SHAPES, "not in the network": [(1,)]}
    assert check_fit(write(tmp_path / "w.caffemodel", weights_of(more)), net()) == []


def test_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    other = {**SHAPES, "conv": [(4, 1, 3, 3)], "fc": [(2, 144)]}
    del other["conv/scale"]
    found = {mismatch.layer: mismatch for mismatch in check_fit(write(path, weights_of(other)), net())}
    assert str(found["conv"]) == (
        "conv: blob 0 is 4 x 1 x 3 x 3 in the weight file, 4 x 3 x 3 x 3 in the network"
    )
    assert found["fc"].reason == "1 blobs in the weight file, 2 in the network"
    assert found["conv/scale"].reason == "not in the weight file"
    assert [found[name].fatal for name in ("conv", "fc", "conv/scale")] == [True, True, False]


def test_weights_of_the_other_kind_of_caffe_are_recognised(tmp_path: Path) -> None:
    fork = {**SHAPES, "conv/bn": [(4,), (4,), (1,), (4,), (4,)]}
    (mismatch,) = check_fit(write(tmp_path / "w.caffemodel", weights_of(fork)), net())
    assert "caffe-jacinto's, of five blobs" in mismatch.reason
    assert "convert" in mismatch.reason


def test_old_batch_norm_blobs_of_four_axes_fit(tmp_path: Path) -> None:
    old = weights_of({**SHAPES, "conv/scale": [(1, 4, 1, 1), (1, 4, 1, 1)]})
    assert check_fit(write(tmp_path / "w.caffemodel", old), net()) == []


def test_weights_of_another_network_are_fatal(tmp_path: Path) -> None:
    found = check_fit(write(tmp_path / "w.caffemodel", weights_of({"other": [(1,)]})), net())
    assert len(found) == len(SHAPES)
    assert all(mismatch.fatal for mismatch in found)


def test_channels_that_only_the_lmdb_knows_fit_any(tmp_path: Path) -> None:
    text = NET.replace('type: "Input"', 'type: "Data"').replace(
        "input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } }", "transform_param { crop_size: 8 }"
    )
    assert blob_shapes(net(text), "TRAIN")["conv"] == [(4, None, 3, 3)]
    assert check_fit(write(tmp_path / "w.caffemodel", weights_of(SHAPES)), net(text)) == []


def test_published_networks_have_their_known_numbers_of_weights(published: Path) -> None:
    """The published logs count 2.35478e+06 weights in the convolutions and 2.86678e+06 with fc1000's."""
    path = published / "prototxt" / "jacintonet11_imagenet_caffe_jacinto/deploy.prototxt"
    blobs = blob_shapes(parse_net(path.read_text(), Dialect.CAFFE_JACINTO, path.name), "TEST")
    convolutions = [shapes[0] for shapes in blobs.values() if len(shapes[0]) == 4]
    assert f"{sum(np.prod(shape) for shape in convolutions):g}" == "2.35478e+06"
    assert blobs["fc1000"][0] == (1000, 512)
    path = published / "prototxt" / "bvlc_alexnet/deploy.prototxt"
    alexnet = blob_shapes(parse_net(path.read_text(), Dialect.BVLC, path.name), "TEST")
    assert alexnet["conv2"][0] == (256, 48, 5, 5)
    assert alexnet["fc6"][0] == (4096, 9216)


@pytest.mark.caffe
def test_what_caffe_writes_is_read_and_fits(caffe_engine: Engine, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path / "stage", write_digits(tmp_path / "lmdb", images=64))
    stage.solver(max_iter=1, snapshot=1, test_interval=100)
    stage.run(caffe_engine.train_commands(stage.job(1, reestimate_batches=0)))
    path = stage.folder / "small_iter_1.caffemodel"
    train = parse_net((stage.folder / "train.prototxt").read_text(), Dialect.BVLC, "train.prototxt")
    assert check_fit(path, train) == []
    message = messages(Dialect.BVLC).NetParameter.FromString(path.read_bytes())
    read = read_weights(path)
    assert list(read) == [layer.name for layer in message.layer if layer.blobs]
    for layer in message.layer:
        for blob, values in zip(layer.blobs, read.get(layer.name, []), strict=True):
            assert values.ravel().tolist() == list(blob.data)
            assert list(values.shape) == list(blob.shape.dim)


LARGE = """
layer { name: "data" type: "DummyData" top: "data"
  dummy_data_param { shape { dim: 1 } data_filler { type: "constant" value: 133119 } } }
layer { name: "table" type: "Embed" bottom: "data" top: "row"
  embed_param { input_dim: 133120 num_output: 1024 bias_term: false } }
layer { name: "sum" type: "Reduction" bottom: "row" top: "sum" }
"""
"""The sum of the last row of a table of 520 MiB."""


@pytest.mark.caffe
def test_real_caffe_reads_weights_of_520_mib(caffe_engine: Engine, tmp_path: Path) -> None:
    """VGG-16 and VGG-19 are of that size."""
    net, weights = tmp_path / "large.prototxt", tmp_path / "large.caffemodel"
    net.write_text(LARGE)
    table = np.zeros((133120, 1024), np.float32)
    table[-1] = 0.5
    header = messages(Dialect.BVLC).NetParameter().layer.add(name="table", type="Embed")
    write_net(weights, "large", [NewLayer(header, [table])], Dialect.BVLC)
    del table
    assert weights.stat().st_size > 520 * 1024**2
    command = [str(caffe_engine.info.executable), "test", "-model", net, "-weights", weights]
    done = subprocess.run([*command, "-iterations", "1"], capture_output=True, text=True, check=False)
    weights.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Batch 0, sum = 512\n" in done.stderr
