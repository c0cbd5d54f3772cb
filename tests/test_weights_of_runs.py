"""`weights` on run folders: what it takes from them, default names, and what an ONNX file says of itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from digits_run import PREFIX, write_lmdbs
from numpy.typing import NDArray

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.classify import main as classify
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.weights import main

OLD_RUN = Path(__file__).parent / "data" / "run_of_0_1_torch"
NEWEST = f"sparse/{PREFIX}_iter_73"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that stopped in its second stage, and its LMDBs where it was started."""
    write_lmdbs(tmp_path)
    folder = tmp_path / "training" / "my run"
    shutil.copytree(OLD_RUN, folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".prototxt"):
            path.write_text(path.read_text().replace("@START@", str(tmp_path)))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default names are beside the weights, not in the working folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_a_run_stands_for_its_newest_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run)]) == 0
    said = capsys.readouterr()
    assert f"{NEWEST}.caffemodel" in said.out
    assert said.err == f"stage sparse is not finished; its newest weights: {PREFIX}_iter_73.caffemodel\n"
    assert main(["show", str(run / "initial")]) == 0
    assert f"{PREFIX}_iter_20.caffemodel" in capsys.readouterr().out
    assert main(["diff", str(run / "initial"), str(run)]) == 1
    assert main(["diff", str(run), str(run / f"{NEWEST}.caffemodel")]) == 0


def test_a_folder_without_weights_says_what_to_give(run: Path) -> None:
    (run / "test").mkdir(exist_ok=True)
    with pytest.raises(
        UserError, match=r"is the test of the run, which has no weights of its own; give .*my run"
    ):
        main(["show", str(run / "test")])
    for path in (run / "sparse").glob("*.caffemodel"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"train it first: python -m caffe_jacinto\.train --resume '.*my run'"
    ):
        main(["show", str(run / "sparse")])


def test_outputs_have_names_of_their_own_beside_the_weights(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (
        ["convert", str(run)],
        ["convert", str(run / "initial"), "--to", "caffe_jacinto"],
        ["sparsify", str(run), "--target", "0.5"],
        ["merge-bn", str(run)],
        ["export", str(run)],
        [
            "export",
            str(run / "initial" / f"{PREFIX}_iter_20.caffemodel"),
            str(run / "initial" / "deploy.prototxt"),
        ],
    ):
        assert main(arguments) == 0
    made = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path not in before}
    assert made == {
        f"{NEWEST}_caffe_jacinto.caffemodel",
        f"initial/{PREFIX}_iter_20_caffe_jacinto.caffemodel",
        f"{NEWEST}_sparsified.caffemodel",
        "sparse/merged/deploy_merged.prototxt",
        f"sparse/merged/{PREFIX}_iter_73_merged.caffemodel",
        f"{NEWEST}.onnx",
        f"initial/{PREFIX}_iter_20.onnx",
    }
    assert {path: path.read_bytes() for path in before} == before
    assert list(Path.cwd().iterdir()) == []
    # They are no weights of the run: it still stands for the same file.
    capsys.readouterr()
    assert main(["show", str(run)]) == 0
    assert f"{NEWEST}.caffemodel" in capsys.readouterr().out
    assert (
        read_weights(run / f"{NEWEST}_sparsified.caffemodel").keys()
        == read_weights(run / f"{NEWEST}.caffemodel").keys()
    )


def test_mistakes(run: Path) -> None:
    for arguments, said in (
        (["show", str(run.parent)], "holds no run (no run.json); give one of those in it, like "),
        (["export", str(run.parent)], "holds no run"),
        (["export", str(run), "deploy.prototxt"], "leave out deploy.prototxt"),
        (["export", str(run / f"{NEWEST}.caffemodel")], "give its deploy.prototxt after it"),
        (["export", str(run), "--labels", "none.txt"], "cannot read labels file none.txt"),
        (["export", str(run), "--val", "none.prototxt"], "none.prototxt"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            main(arguments)
    assert not list(run.rglob("*.onnx"))


def prepared(image: Path, about: dict[str, str]) -> NDArray[np.float32]:
    """The input for an image file, by nothing but the file's metadata, as docs/weights.md explains it."""
    pixels = cv2.imread(str(image))  # blue, green, red
    assert about["channel_order"] == "BGR"
    width, height = map(int, about["resize"].split("x"))
    pixels = cv2.resize(pixels, (width, height))
    width, height = map(int, about["crop"].split("x"))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    pixels = pixels[top : top + height, left : left + width]
    values = (pixels.astype(np.float32) - json.loads(about["mean"])) * float(about["scale"])
    return values.transpose(2, 0, 1)[np.newaxis].astype(np.float32)


def test_an_onnx_file_says_all_that_is_needed_to_classify_with_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((run.parents[1] / "digits" / "val").glob("*.JPEG"))[:20]
    assert main(["export", str(run), "--onnx", "net.onnx"]) == 0
    capsys.readouterr()
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert about == {prop.key: prop.value for prop in onnx.load("net.onnx").metadata_props}
    names = json.loads(about["class_names"])
    assert names == [f"digit_{number}" for number in range(10)]
    assert (about["crop"], about["resize"]) == ("32x32", "32x32")
    backend = ["--backend", "onnxruntime", "--format", "json"]
    assert classify([str(run), *backend, "--", *map(str, images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for image, line in zip(images, lines, strict=True):
        (scores,) = session.run(None, {session.get_inputs()[0].name: prepared(image, about)})[0]
        best = json.loads(line)["best"][0]
        assert names[int(scores.argmax())] == best["name"]
        assert float(scores.max()) == pytest.approx(best["probability"], abs=0.05)  # no JPEG in between


def test_the_guides_example_classifies(run: Path) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    Path("example.py").write_text(example)
    image = str(sorted((run.parents[1] / "digits" / "val").glob("*.JPEG"))[0])
    assert main(["export", str(run), "--onnx", "net.onnx"]) == 0
    command = [sys.executable, "example.py", "net.onnx", image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.fullmatch(r"digit_\d [01]\.\d+\n", done.stdout), done.stderr


def test_mean_values_and_mean_images_are_given_by_channel(run: Path) -> None:
    val = run / "sparse" / "val.prototxt"
    text = val.read_text()
    mean = np.arange(3 * 40 * 40, dtype=np.float32).reshape(3, 40, 40)
    write_mean(Mean(mean, 1), Path("mean.binaryproto").absolute())
    for settings, wanted in (
        ("mean_value: 104 mean_value: 117 mean_value: 123 scale: 0.5", [104, 117, 123]),
        ("mean_value: 7 scale: 0.5", [7, 7, 7]),
        (
            f'mean_file: "{Path("mean.binaryproto").absolute()}" scale: 0.5',
            mean[:, 4:36, 4:36].mean(axis=(1, 2)),
        ),
    ):
        changed = re.sub(
            r"transform_param \{[^}]*\}", f"transform_param {{ crop_size: 32 {settings} }}", text
        )
        val.write_text(changed)
        assert main(["export", str(run), "--onnx", "net.onnx"]) == 0
        about = {prop.key: prop.value for prop in onnx.load("net.onnx").metadata_props}
        assert json.loads(about["mean"]) == pytest.approx(list(wanted))
        assert float(about["scale"]) == 0.5


def test_without_a_validation_network_the_file_is_written_and_a_line_says_what_it_lacks(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / f"{NEWEST}.caffemodel", "w.caffemodel")
    shutil.copy(run / "sparse" / "deploy.prototxt", "deploy.prototxt")
    assert main(["export", "w.caffemodel", "deploy.prototxt"]) == 0
    assert capsys.readouterr().err.startswith(
        "the ONNX file does not say how to prepare images: .: no val.prototxt"
    )
    assert list(onnx.load("w.onnx").metadata_props) == []
    labels = run.parents[1] / "val_lmdb" / "labels.txt"
    val = str(run / "sparse" / "val.prototxt")
    assert main(["export", "w.caffemodel", "deploy.prototxt", "--val", val, "--labels", str(labels)]) == 0
    about = {prop.key: prop.value for prop in onnx.load("w.onnx").metadata_props}
    assert len(json.loads(about["class_names"])) == 10
