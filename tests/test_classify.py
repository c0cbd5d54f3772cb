"""Classifying with a network trained by real Caffe: accuracy as `caffe test` has it, on all backends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from digits_run import recipe_of, tiny, write_lmdbs

from caffe_jacinto.classify import main
from caffe_jacinto.errors import UserError
from caffe_jacinto.inference.preprocess import Transform
from caffe_jacinto.inference.scoring import Tally
from caffe_jacinto.train import main as train


def test_no_images_and_no_run_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="caffemodel"):
        main(["deploy.prototxt", "--", "a.png"])


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
