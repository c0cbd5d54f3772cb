"""Weights and solver states in HDF5: real Caffe's are read, and it reads those that are written here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.caffemodel.fit import check_fit, in_binary_form, unused_layers, weights_for
from caffe_jacinto.caffemodel.hdf5 import write_state, write_weights
from caffe_jacinto.caffemodel.storage import mapped, read_weights, stored_layers, stored_state
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pycaffe.net import load_weights
from caffe_jacinto.inference.backends import BACKENDS
from caffe_jacinto.inference.network import trained_network
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.weights import main as weights_command

SHARED = 'param { name: "w" } param { name: "b" }'
BODY = f"""
layer {{ name: "first" type: "Convolution" bottom: "x" top: "a" {SHARED}
  convolution_param {{ num_output: 3 kernel_size: 3 pad: 1 weight_filler {{ type: "gaussian" std: 0.3 }} }} }}
layer {{ name: "bn" type: "BatchNorm" bottom: "a" top: "a" }}
layer {{ name: "scale" type: "Scale" bottom: "a" top: "a" scale_param {{ bias_term: true }} }}
layer {{ name: "second" type: "Convolution" bottom: "a" top: "b" param {{ name: "w" }}
  convolution_param {{ num_output: 3 kernel_size: 3 pad: 1 weight_filler {{ type: "gaussian" std: 0.3 }} }} }}
layer {{ name: "again" type: "Convolution" bottom: "b" top: "c" {SHARED}
  convolution_param {{ num_output: 3 kernel_size: 3 pad: 1 weight_filler {{ type: "gaussian" std: 0.3 }} }} }}
layer {{ name: "fc" type: "InnerProduct" bottom: "c" top: "fc" inner_product_param {{
  num_output: 4 weight_filler {{ type: "gaussian" std: 0.1 }} }} }}
"""
NETWORK = f"""name: "shared"
layer {{ name: "images" type: "DummyData" top: "x" dummy_data_param {{
  shape {{ dim: 4 dim: 3 dim: 5 dim: 5 }} data_filler {{ type: "constant" value: 0.5 }} }} }}
layer {{ name: "labels" type: "DummyData" top: "y" dummy_data_param {{
  shape {{ dim: 4 }} data_filler {{ type: "constant" value: 2 }} }} }}
{BODY}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "y" top: "loss" }}
"""
DEPLOY = f"""name: "shared"
layer {{ name: "x" type: "Input" top: "x" input_param {{ shape {{ dim: 1 dim: 3 dim: 5 dim: 5 }} }} }}
{BODY}"""

SOLVER = """net: "net.prototxt" base_lr: 0.1 lr_policy: "step" gamma: 0.5 stepsize: 2 momentum: 0.9
max_iter: 4 snapshot: 2 random_seed: 7 solver_mode: CPU display: 1
"""
TORCH = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]

Blobs = dict[str, list[np.ndarray]]


def run(folder: Path, *command: object, code: int = 0) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def net_of(text: str = NETWORK) -> Any:
    return parse_net(text, Dialect.BVLC, "net")


def assert_same(found: Blobs, expected: Blobs, error: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, blobs in expected.items():
        for blob, other in zip(found[name], blobs, strict=True):
            assert blob.shape == other.shape
            np.testing.assert_allclose(blob, other, rtol=error, atol=error, err_msg=name)


def diffs_in(path: Path) -> Blobs:
    with h5py.File(path, "r") as file:
        return {
            name: [layer[str(index)][()] for index in range(len(layer))]
            for name, layer in file["diff"].items()
            if len(layer)
        }


@pytest.fixture(scope="module")
def theirs(caffe_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by real Caffe with snapshots in both forms."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "net.prototxt").write_text(NETWORK)
    (folder / "deploy.prototxt").write_text(DEPLOY)
    for name, more in (("binary", ""), ("hdf5", "snapshot_format: HDF5 snapshot_diff: true")):
        (folder / f"{name}.prototxt").write_text(f'{SOLVER} snapshot_prefix: "{name}" {more}\n')
        run(folder, caffe_engine.info.executable, "train", "-solver", f"{name}.prototxt")
    return folder


@pytest.mark.caffe
def test_caffes_files_hold_what_its_binary_ones_do(theirs: Path) -> None:
    weights = theirs / "hdf5_iter_4.caffemodel.h5"
    expected = read_weights(theirs / "binary_iter_4.caffemodel")
    assert list(weights_for(weights, net_of())) == list(expected)
    assert_same(weights_for(weights, net_of()), expected)
    assert check_fit(weights, net_of()) == [] == unused_layers(weights, net_of())
    with mapped(weights) as view:  # Caffe writes no blob that another layer owns
        stored = {layer.name: [blob.shape for blob in layer.blobs] for layer in stored_layers(view, weights)}
    assert list(stored) == ["first", "bn", "scale", "second", "fc"]
    assert stored["second"] == [(0, 0, 0, 0), (3,)]
    found = stored_state(theirs / "hdf5_iter_2.solverstate.h5")
    binary = stored_state(theirs / "binary_iter_2.solverstate")
    assert (found.iteration, found.learned_net) == (2, "hdf5_iter_2.caffemodel.h5")
    assert [blob.shape for blob in found.history] == [blob.shape for blob in binary.history]


@pytest.mark.caffe
def test_the_commands_take_them(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hdf5_iter_4.caffemodel.h5", "binary_iter_4.caffemodel", "net.prototxt", "deploy.prototxt"):
        shutil.copy(theirs / name, tmp_path)
    hdf5, binary, network = "hdf5_iter_4.caffemodel.h5", "binary_iter_4.caffemodel", "--network=net.prototxt"

    def said(*arguments: str) -> str:
        assert weights_command(arguments) == 0
        return capsys.readouterr().out

    assert "does not say" not in said("show", hdf5, network)
    assert said("show", hdf5, network).splitlines()[1:] == said("show", binary).splitlines()[1:]
    assert "the file does not say which layers are convolutions" in said("show", hdf5)
    assert said("diff", hdf5, binary, network) == "the same: all 12 blobs agree\n"
    for command in (["convert"], ["sparsify", "--target=0.5", "--caps=off", "--inner-products"]):
        with pytest.raises(UserError, match=f"^{hdf5}: an HDF5 file does not say the types of its layers; "):
            weights_command([*command, hdf5])
        written = [
            said(*command, *file).splitlines()[-1].split(":")[0] for file in ([hdf5, network], [binary])
        ]
        assert len(written) == 2
    for ending in ("caffe_jacinto", "sparsified"):
        assert_same(
            *(read_weights(Path(f"{name}_iter_4_{ending}.caffemodel")) for name in ("hdf5", "binary"))
        )
    said("merge-bn", hdf5, "deploy.prototxt", "--output=merged")
    said("merge-bn", binary, "deploy.prototxt", "--output=merged")
    assert_same(
        *(read_weights(Path(f"merged/{name}_iter_4_merged.caffemodel")) for name in ("hdf5", "binary"))
    )
    said("shrink", hdf5, "deploy.prototxt", "--output=shrunk")
    said("shrink", binary, "deploy.prototxt", "--output=shrunk")
    assert_same(
        *(read_weights(Path(f"shrunk/{name}_iter_4_shrunk.caffemodel")) for name in ("hdf5", "binary"))
    )
    said("export", hdf5, "deploy.prototxt")
    said("export", binary, "deploy.prototxt")
    models = [Path(f"{name}_iter_4.onnx").read_bytes() for name in ("hdf5", "binary")]
    assert models[0] == models[1]
    assert build_net(["--summary", "deploy.prototxt", "--weights", hdf5]) == 0
    summary = capsys.readouterr().out
    assert build_net(["--summary", "deploy.prototxt", "--weights", binary]) == 0
    assert capsys.readouterr().out == summary
    with pytest.raises(UserError, match="layer second shares a blob with another layer"):
        build_net(["--upgrade", hdf5])


@pytest.mark.caffe
def test_stock_caffe_gets_them_in_binary_form(theirs: Path, pycaffe: Any, tmp_path: Path) -> None:
    """The Caffe of install_caffe.sh reads an HDF5 file as an empty one, and says nothing."""
    weights = theirs / "hdf5_iter_4.caffemodel.h5"
    net = pycaffe.Net(str(theirs / "net.prototxt"), pycaffe.TRAIN)
    load_weights(net, weights, net_of())
    expected = read_weights(theirs / "binary_iter_4.caffemodel")
    assert_same({name: [blob.data for blob in blobs] for name, blobs in net.params.items()}, expected)
    (tmp_path / "start.caffemodel").write_bytes(in_binary_form(weights, net_of(), ["fc"]))
    assert list(read_weights(tmp_path / "start.caffemodel")) == [name for name in expected if name != "fc"]


@pytest.mark.caffe
def test_pytorch_resumes_from_caffes_and_caffe_reads_its_own(
    theirs: Path, pycaffe: Any, tmp_path: Path
) -> None:
    for file in theirs.iterdir():
        shutil.copy(file, tmp_path)
    own = tmp_path / "own.prototxt"
    own.write_text(f'{SOLVER} snapshot_prefix: "own" snapshot_format: HDF5 snapshot_diff: true\n')
    expected = read_weights(theirs / "binary_iter_4.caffemodel")
    run(tmp_path, *TORCH, "train", "-solver", own, "-snapshot", "hdf5_iter_2.solverstate.h5")
    assert_same(weights_for(tmp_path / "own_iter_4.caffemodel.h5", net_of()), expected, 1e-4)
    assert_same(
        diffs_in(tmp_path / "own_iter_4.caffemodel.h5"), diffs_in(theirs / "hdf5_iter_4.caffemodel.h5"), 1e-5
    )
    log = run(tmp_path, *TORCH, "train", "-solver", own, "-weights", "hdf5_iter_4.caffemodel.h5")
    assert "Snapshotting to HDF5 file own_iter_2.caffemodel.h5" in log
    assert "Snapshotting solver state to HDF5 file own_iter_2.solverstate.h5" in log
    whole = (tmp_path / "own_iter_4.caffemodel.h5").read_bytes()
    run(tmp_path, *TORCH, "train", "-solver", own, "-snapshot", "own_iter_2.solverstate.h5")
    assert (tmp_path / "own_iter_4.caffemodel.h5").read_bytes() == whole
    # Real Caffe continues from its iteration 2: history, iteration and step of the rate are read from HDF5.
    (tmp_path / "absolute.prototxt").write_text(
        own.read_text()
        .replace("net.prototxt", str(tmp_path / "net.prototxt"))
        .replace('"own"', f'"{tmp_path}/x"')
    )
    solver = pycaffe.get_solver(str(tmp_path / "absolute.prototxt"))
    with h5py.File(tmp_path / "own_iter_2.solverstate.h5", "r+") as state:
        del state["learned_net"]  # which is found from the folder that Caffe is started in
    solver.restore(str(tmp_path / "own_iter_2.solverstate.h5"))
    assert solver.iter == 2
    solver.net.load_hdf5(str(tmp_path / "own_iter_2.caffemodel.h5"))
    solver.step(2)
    found = {name: [blob.data for blob in blobs] for name, blobs in solver.net.params.items()}
    assert_same(found, weights_for(tmp_path / "own_iter_4.caffemodel.h5", net_of()), 1e-4)


@pytest.mark.caffe
def test_names_that_caffe_cannot_read_back_are_refused_before_the_training(theirs: Path) -> None:
    (theirs / "named.prototxt").write_text(NETWORK.replace('name: "fc"', 'name: "head/fc"'))
    solver = f"{SOLVER} snapshot_format: HDF5".replace("net.prototxt", "named.prototxt")
    (theirs / "named_solver.prototxt").write_text(solver)
    said = run(theirs, *TORCH, "train", "-solver", "named_solver.prototxt", code=2)
    (line,) = said.splitlines()
    assert line.endswith(
        "named_solver.prototxt: snapshot_format: HDF5 cannot hold layer 'head/fc', of whose name HDF5 makes "
        "groups that Caffe cannot read; rename it, or remove snapshot_format"
    )


def small_files(folder: Path) -> tuple[Path, Path]:
    weights, state = folder / "w.caffemodel.h5", folder / "w.solverstate.h5"
    numbers = np.arange(6, dtype=np.float32)
    write_weights(weights, {"b": {0: numbers.reshape(2, 3)}, "a": {0: numbers, 1: numbers[:1].reshape(())}})
    write_state(
        state,
        iteration=5,
        current_step=1,
        learned_net="w.caffemodel.h5",
        history=[numbers] * 11,
        own={20_000: b"{}"},
    )
    return weights, state


def test_what_is_written_is_read(tmp_path: Path) -> None:
    weights, state = small_files(tmp_path)
    found = read_weights(weights)
    assert {name: [blob.shape for blob in blobs] for name, blobs in found.items()} == {
        "b": [(2, 3)],
        "a": [(6,), ()],
    }
    assert list(found) == ["b", "a"]  # as written, not by the alphabet
    assert found["b"][0].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    read = stored_state(state)
    assert (read.iteration, read.learned_net, len(read.history)) == (5, "w.caffemodel.h5", 11)


def test_other_numbers_and_compressed_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        layer = file.create_group("data/outer/inner")
        layer.create_dataset("0", data=np.full((40, 50), 0.25, ">f8"), compression="gzip")
        layer.create_dataset("1", data=np.arange(3))
    assert [blob.ravel()[:2].tolist() for blob in read_weights(path)["outer/inner"]] == [[0.25, 0.25], [0, 1]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: None, "not one of Caffe's, .* it has nothing"),
        (lambda file: file.create_dataset("images", data=[1]), "not one of Caffe's, .* it has images"),
        (lambda file: file.create_dataset("data", data=[1.0]), "damaged or cut off"),
        (lambda file: file.create_group("data"), "no layer with weights"),
        (lambda file: file.create_dataset("data/a/0", data=[b"text"]), "a/0 is not a blob of numbers"),
        (lambda file: file.create_dataset("data/a/0", (9, 9), "f4"), "a/0 has not all of its numbers"),
        (lambda file: file.create_group("data/a/0"), "a/0 is not a dataset"),
        (lambda file: file.create_dataset("data/a/4000000", data=[1.0]), "has a dataset 4000000, and not"),
        (
            lambda file: file.create_group("data").__setitem__("a", h5py.ExternalLink("x.h5", "/")),
            "not a group",
        ),
        (lambda file: file.create_group("data").__setitem__("a", file["data"]), "groups without end"),
        (lambda file: file.create_group("history"), "damaged or cut off .*iter"),
    ],
)
def test_foreign_files_are_one_line(tmp_path: Path, make: Any, says: str) -> None:
    path = tmp_path / "other.caffemodel.h5"
    with h5py.File(path, "w") as file:
        make(file)
    with pytest.raises(UserError, match=f"^{path}: .*{says}") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = data.draw(st.sampled_from(small_files(folder)))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[max(at, 8) :]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    for read in (read_weights, stored_state):
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.caffe
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_each_backend_of_classify_computes_with_them(theirs: Path, backend: str) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 5, 5)).astype(np.float32)
    scores = []
    for name in ("hdf5_iter_4.caffemodel.h5", "binary_iter_4.caffemodel"):
        network = trained_network(theirs / "deploy.prototxt", theirs / name)
        _, compute = BACKENDS[backend](network, None, None)
        scores.append(compute(images))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.ptp(scores[0]) > 0
