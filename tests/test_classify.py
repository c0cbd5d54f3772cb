"""Classifying with a network trained by real Caffe: accuracy as `caffe test` has it, on all backends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from digits_run import recipe_of, tiny, write_lmdbs

from caffe_jacinto.classify import main, print_tally
from caffe_jacinto.errors import UserError
from caffe_jacinto.inference.network import validation_transform
from caffe_jacinto.inference.preprocess import Transform
from caffe_jacinto.inference.scoring import Tally
from caffe_jacinto.train import main as train


def test_no_images_and_no_run_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="caffemodel"):
        main(["deploy.prototxt", "--", "a.png"])
    with pytest.raises(UserError, match="holds no run"):
        main([str(tmp_path), "--", "a.png"])


def test_crop_is_central_and_the_mean_image_is_cropped_with_it() -> None:
    pixels = np.arange(75, dtype=np.uint8).reshape(3, 5, 5)
    made = Transform(3, 2, 2, 0.5, (), np.ones((3, 5, 5), np.float32)).apply(pixels)
    assert np.array_equal(made, (pixels[:, 1:3, 1:3].astype(np.float32) - 1) / 2)


def test_equal_scores_count_as_better_ones() -> None:
    tally = Tally(6)
    tally.add(np.zeros((1, 6), np.float32), [0])
    tally.add(np.eye(6, dtype=np.float32)[:1], [0])
    assert (tally.top1, tally.top5, tally.images) == (1, 1, 2)


@pytest.mark.caffe
def test_accuracy_is_that_of_caffe_test_on_every_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caffe_root: Path
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    assert train([*tiny(recipe_of(tmp_path, "initial"), ("initial",)), "--output", "run"]) == 0
    log = (tmp_path / "run/test/run.log").read_text()
    expected = float(re.findall(r"accuracy/top1 = ([\d.]+)", log)[-1])
    image = next((tmp_path / "digits/val").glob("*.JPEG"))
    found = {}
    for backend in ("caffe", "opencv", "onnxruntime"):
        capsys.readouterr()
        assert main(["run", "--backend", backend, "--format", "json", "--", "val_lmdb"]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(expected, abs=1e-6)
        assert main(["run", "--backend", backend, "--format", "json", "--", str(image), "none.png"]) == 1
        output = capsys.readouterr()
        assert "none.png: No such file" in output.err
        best = json.loads(output.out)["best"]
        found[backend] = {item["class"]: item["probability"] for item in best}
    for backend in ("opencv", "onnxruntime"):
        assert found[backend] == pytest.approx(found["caffe"], rel=1e-4)
    # A last snapshot that is cut off is passed over for the one before.
    newest = max(
        (tmp_path / "run/initial").glob("*.caffemodel"), key=lambda path: int(path.stem.split("_")[-1])
    )
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(["run", "--backend", "opencv", "--format", "json", "--", str(image)]) == 0
    assert newest.name not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--batch", "0", "--", "a.png"], "--batch 0"),
        (["run", "--picture", "a.jpg", "--", "lmdb"], "must end in .png or .svg"),
        (["run", "--backend", "abacus", "--", "a.png"], "invalid choice"),
        (["run", "--resize", "0", "--", "a.png"], "is no size in pixels"),
        (["run", "--picture", "a.png", "--", "b.png"], "of an LMDB"),
        (["run", "--picture", "nowhere/a.png", "--", "lmdb"], "its folder is not there"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert said in str(caught.value)


def test_with_many_classes_the_text_shows_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(200)
    labels = list(range(200))
    scores = np.eye(200, dtype=np.float32)
    scores[7] = scores[8]  # class 7 is taken for 8
    tally.add(scores, labels)
    print_tally("text", tally, ())
    said = capsys.readouterr().out
    assert "50 of 200 classes" in said
    assert next(line.split() for line in said.splitlines() if "0.00 %" in line)[0] == "7"
    assert "top-1 99.50 %" in said


def test_the_preprocessing_is_that_of_the_test_phase(tmp_path: Path) -> None:
    layer = (
        'layer {{ name: "d" type: "Data" top: "data" include {{ phase: {phase} }} '
        'transform_param {{ scale: {scale} }} data_param {{ source: "x" batch_size: 1 backend: LMDB }} }}\n'
    )
    val = tmp_path / "train_val.prototxt"
    val.write_text(layer.format(phase="TRAIN", scale=0.5) + layer.format(phase="TEST", scale=2))
    assert validation_transform(val, (3, 8, 8), tmp_path)[0].scale == 2
    val.write_text(layer.format(phase="TEST", scale=2).replace("scale: 2", "mean_value: 1 mean_file: 'm'"))
    with pytest.raises(UserError, match="has mean_file and mean_value"):
        validation_transform(val, (3, 8, 8), tmp_path)
