"""Classifying with a network trained by real Caffe: what its validation network sees, on all backends."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime  # noqa: F401 - what is tested with it must not be skipped
import pytest
from deploy_nets import built, by_onnx, write_random
from digits_run import recipe_of, tiny, write_lmdbs
from image_records import MEAN, SETTINGS, datum_of, encoded, noise, turned_by_exif, write_lmdb
from machine_files import TWO_H200, stand_in_machine

from caffe_jacinto.classify import main
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.data.datum import Transform
from caffe_jacinto.data.encode import ImageForm, form_of
from caffe_jacinto.data.mean import Mean, write_mean
from caffe_jacinto.export.onnx import export_onnx
from caffe_jacinto.inference.backends import open_backend
from caffe_jacinto.inference.network import (
    Preprocessing,
    class_names,
    file_samples,
    image_files,
    lmdb_file_form,
    lmdb_samples,
    network_files,
    trained_network,
    validation_preprocessing,
)
from caffe_jacinto.inference.scores import BestClasses, Tally, draw_confusion, write_tally
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.train import main as train

# --------------------------------------------------------------------------- what the validation network sees


def val_net(folder: Path, data: str, transform: str, kind: str = "Data") -> Path:
    """A validation network of one data layer."""
    path = folder / "val.prototxt"
    path.write_text(
        f'layer {{ name: "data" type: "{kind}" top: "data" top: "label" include {{ phase: TEST }} '
        f"transform_param {{ {transform} }} {data} }}\n"
    )
    return path


def seen_by_caffe(caffe_root: Path, val: Path) -> np.ndarray[Any, Any]:
    """The first batch that the validation network's data layer gives."""
    sys.path.insert(0, str(caffe_root / "python"))
    import caffe

    net = caffe.Net(str(val), caffe.TEST)
    net.forward()
    return np.array(net.blobs["data"].data)


@pytest.mark.caffe
@pytest.mark.parametrize(("stored", "crop", "settings", "channels"), SETTINGS)
def test_records_are_what_caffes_data_layer_gives(
    stored: str,
    crop: int,
    settings: str,
    channels: int,
    caffe_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, in every setting of the transform."""
    monkeypatch.chdir(tmp_path)
    height, width = 27, 32
    pictures = [noise(height, width, 1 if stored == "grey" else 3, seed) for seed in range(3)]
    forms = {
        "raw": lambda image: image,
        "turned": lambda image: turned_by_exif(encoded(image, ".jpg")),
        "grey": lambda image: encoded(image, ".png"),
    }
    form = forms.get(stored, lambda image: encoded(image, stored))
    write_lmdb(tmp_path / "lmdb", [datum_of(form(image)) for image in pictures])
    write_mean(Mean(noise(height, width).transpose(2, 0, 1).astype(np.float32), 3), tmp_path / MEAN)
    size = f"crop_size: {crop}" if crop else ""
    data = 'data_param { source: "lmdb" batch_size: 3 backend: LMDB }'
    val = val_net(tmp_path, data, f"{size} {settings}")
    want = seen_by_caffe(caffe_root, val)
    done = validation_preprocessing(val, (channels, *want.shape[2:]), tmp_path)
    total, samples = lmdb_samples(tmp_path / "lmdb", done)
    got = [sample.image for sample in samples]
    assert total == 3 and want.shape[1] == channels
    np.testing.assert_array_equal(np.stack([image for image in got if image is not None]), want)


@pytest.mark.caffe
@pytest.mark.parametrize("resized", ["", "new_height: 40 new_width: 36"])
def test_files_are_what_an_image_data_layer_gives(resized: str, caffe_root: Path, tmp_path: Path) -> None:
    """As in the published validation network of ResNet10, which reads a list of files."""
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        path.write_bytes(encoded(noise(50, 40, seed=seed), ".png"))
    (tmp_path / "list.txt").write_text("".join(f"{path} 0\n" for path in paths))
    data = f'image_data_param {{ source: "{tmp_path}/list.txt" batch_size: 2 {resized} }}'
    val = val_net(tmp_path, data, "crop_size: 32 mean_value: 100", "ImageData")
    done = validation_preprocessing(val, (3, 32, 32), tmp_path)
    assert done.file_form == ImageForm(*((36, 40) if resized else (0, 0)), raw=True)
    got = [sample.image for sample in file_samples(paths, done, done.file_form)]
    want = seen_by_caffe(caffe_root, val)
    np.testing.assert_array_equal(np.stack([image for image in got if image is not None]), want)


FORMS = [
    ("--size 36x30", ImageForm(36, 30)),
    ("--shorter-side 32 --quality 80", ImageForm(0, 0, shorter=32, quality=80)),
    ("--size 30 --gray --raw", ImageForm(30, 30, colour=False, raw=True)),
    ("--size 28 --fast", ImageForm(28, 28, fast=True)),
]


@pytest.mark.parametrize(("options", "made"), FORMS)
@pytest.mark.parametrize("noted", [True, False])
def test_a_file_is_what_create_lmdb_makes_of_it(
    options: str, made: ImageForm, noted: bool, tmp_path: Path
) -> None:
    """In every form that it notes; of LMDBs without a note, the form is told from the first image."""
    (tmp_path / "images/a").mkdir(parents=True)
    path = tmp_path / "images/a/1.png"
    path.write_bytes(encoded(noise(50, 40), ".png"))
    arguments = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "lmdb")]
    assert create_lmdb([*arguments, *options.split()]) == 0
    if not noted:
        (tmp_path / "lmdb/made_from.json").unlink()
        if made.shorter or made.fast:
            return  # the first image does not tell
    form = lmdb_file_form(tmp_path / "lmdb")
    assert form == made and form_of(made.text) == made
    done = Preprocessing(Transform(crop=28), (3 if made.colour else 1, 28, 28))
    (stored,) = lmdb_samples(tmp_path / "lmdb", done)[1]
    (made,) = file_samples([path], done, form)
    assert made.image is not None and stored.image is not None
    np.testing.assert_array_equal(made.image, stored.image)


def test_where_the_lmdb_has_pixels_no_jpeg_is_made(tmp_path: Path) -> None:
    image = noise(20, 24)
    form = lmdb_file_form(write_lmdb(tmp_path / "lmdb", [datum_of(image)]))
    assert form == ImageForm(24, 20, raw=True)
    (tmp_path / "a.png").write_bytes(encoded(image, ".png"))
    (made,) = file_samples([tmp_path / "a.png"], Preprocessing(Transform(), (3, 20, 24)), form)
    assert made.image is not None
    np.testing.assert_array_equal(made.image, image.transpose(2, 0, 1))


def test_an_image_that_does_not_fit_is_told(tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path / "lmdb", [datum_of(noise(20, 24)), datum_of(b"no image")])
    mean = np.zeros((3, 18, 18), np.float32)
    for transform, shape, reason in (
        (Transform(), (3, 18, 18), "and the validation network does not crop"),
        (Transform(crop=22), (3, 22, 22), "it is 3x20x24, the network takes 3x22x22"),
        (Transform(crop=18), (1, 18, 18), "the network takes 1x18x18"),
        (
            Transform(crop=18, mean_image=mean),
            (3, 18, 18),
            "the mean image is 3x18x18, and the image 3x20x24",
        ),
    ):
        first, second = lmdb_samples(folder, Preprocessing(transform, shape))[1]
        assert first.image is None and reason in first.reason
        assert "an image that cannot be decoded" in second.reason


def test_the_preprocessing_is_that_of_the_test_phase(tmp_path: Path) -> None:
    layer = (
        'layer {{ name: "d" type: "Data" top: "data" include {{ phase: {phase} }} '
        'transform_param {{ scale: {scale} }} data_param {{ source: "x" batch_size: 1 backend: LMDB }} }}\n'
    )
    val = tmp_path / "train_val.prototxt"
    val.write_text(layer.format(phase="TRAIN", scale=0.5) + layer.format(phase="TEST", scale=2))
    done = validation_preprocessing(val, (3, 8, 8), tmp_path)
    assert done.transform.scale == 2 and not done.transform.crop and done.lmdb == tmp_path / "x"
    for settings, said in (
        ("mean_value: 1 mean_file: 'm'", "has mean_file and mean_value"),
        ("crop_size: 7", "crop_size is 7, but the deploy network takes 8x8"),
        ("mean_value: 1 mean_value: 2", "2 mean values for 3 channels"),
        ("mean_file: 'm'", "m cannot be read"),
        ("force_color: true force_gray: true", "has force_color and force_gray"),
    ):
        val.write_text(layer.format(phase="TEST", scale=f"2 {settings}"))
        with pytest.raises(UserError, match=said):
            validation_preprocessing(val, (3, 8, 8), tmp_path)
    val.write_text(layer.format(phase="TRAIN", scale=1))
    with pytest.raises(UserError, match="no Data or ImageData layer of the test phase"):
        validation_preprocessing(val, (3, 8, 8), tmp_path)


# ---------------------------------------------------------------------------------------------- a trained run


@pytest.mark.caffe
def test_accuracy_is_that_of_caffe_test_on_every_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caffe_root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    assert train([*tiny(recipe_of(tmp_path, "initial"), ("initial",)), "--output", "run"]) == 0
    log = (tmp_path / "run/test/run.log").read_text()
    expected = [float(re.findall(rf"accuracy/top{k} = ([\d.]+)", log)[-1]) for k in (1, 5)]
    image = next((tmp_path / "digits/val").glob("*.JPEG"))
    found = {}
    for backend in ("caffe", "opencv", "onnxruntime"):
        capsys.readouterr()
        assert main(["run", "--backend", backend, "--format", "json", "--", "val_lmdb"]) == 0
        output = capsys.readouterr()
        assert {"caffe": "stock Caffe 1.0", "opencv": "OpenCV 4"}.get(backend, backend) in output.err
        scores = json.loads(output.out)
        assert [scores["top1"], scores["top5"]] == pytest.approx(expected, abs=1e-6)
        assert sum(map(sum, scores["confusion"])) == scores["images"] == 50
        assert main(["run", "--backend", backend, "--format", "json", str(image), "none.png"]) == 1
        output = capsys.readouterr()
        assert "none.png: No such file" in output.err
        best = json.loads(output.out)["best"]
        assert [item["name"] for item in best] == [f"digit_{item['class']}" for item in best]
        found[backend] = {item["class"]: item["probability"] for item in best}
    for backend in ("opencv", "onnxruntime"):
        assert found[backend] == pytest.approx(found["caffe"], rel=1e-4)

    # A stage's folder, and its files by name, are the same network.
    for network in (["run/initial"], ["run/initial/deploy.prototxt", *newest("run/initial")]):
        assert (
            main([*network, "--picture", "matrix.svg", "--labels", "run/labels.txt", "--", "val_lmdb"]) == 0
        )
        said = capsys.readouterr().out
        assert f"top-1 {100 * expected[0]:.2f} %, top-5 {100 * expected[1]:.2f} % of 50 images" in said
        assert "Confusion matrix" in said and "digit_7" in (tmp_path / "matrix.svg").read_text()

    # A last snapshot that is cut off is passed over for the one before.
    weights = Path(*newest("run/initial"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["run", "--backend", "opencv", "--format", "json", str(image)]) == 0
    said = capsys.readouterr().err
    assert f"passed over: {weights}: cut off" in said and "iter_4.caffemodel on OpenCV" in said


def newest(stage: str) -> list[str]:
    weights = sorted(Path(stage).glob("*.caffemodel"), key=lambda path: int(path.stem.split("_")[-1]))
    return [str(weights[-1])]


# -------------------------------------------------------------------------------------- networks and backends


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network with random weights: deploy.prototxt, val.prototxt and w.caffemodel."""
    folder = tmp_path_factory.mktemp("network")
    text = built("jacintonet11", Dialect.BVLC, folder)
    write_random(folder / "w.caffemodel", text, Dialect.BVLC)
    (folder / "a.png").write_bytes(encoded(noise(64, 64), ".png"))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [str(folder / "deploy.prototxt"), str(folder / "w.caffemodel"), *more, "--", str(folder / "a.png")]


def test_without_caffe_opencv_computes_and_the_line_says_so(
    network: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAFFE_ROOT", "/no/caffe")
    assert main(arguments(network)) == 0
    output = capsys.readouterr()
    assert "caffe cannot be used: $CAFFE_ROOT: /no/caffe does not exist" in output.err
    assert "on OpenCV 4" in output.err
    assert "the size of images before the crop is unknown" in output.err
    assert len(output.out.splitlines()) == 6  # the image, and five classes by their numbers
    # OpenCV 5 has no reader of Caffe's files.
    monkeypatch.delattr(cv2.dnn, "readNetFromCaffe")
    assert main(arguments(network)) == 0
    assert "on onnxruntime 1" in capsys.readouterr().err


def test_an_option_among_the_images_is_named(tmp_path: Path) -> None:
    for option in (["--picture", "x.png"], ["--batch=3"]):
        said = f"{option[0]} comes after --, where only images are: put options before --"
        with pytest.raises(UserError, match=said):
            main([str(tmp_path), "--", "lmdb", *option])


def test_a_gpu_that_is_not_there_or_that_no_backend_can_use(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAFFE_ROOT", "/no/caffe")
    machine = stand_in_machine(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="GPU 0 requested, but this machine has no GPU"):
        main(arguments(network, "--gpus", "0"))
    assert main(arguments(network, "--gpus", "auto")) == 0
    with_gpus = tmp_path / "with GPUs"
    with_gpus.mkdir()
    machine = stand_in_machine(monkeypatch, with_gpus)
    machine.nvidia_smi(TWO_H200)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"onnxruntime \S+ cannot compute on GPU 0 here .*onnxruntime-gpu"):
        main(arguments(network, "--gpus", "all"))
    assert "opencv cannot be used: OpenCV's own packages compute on the CPU only" in capsys.readouterr().err


@pytest.mark.caffe  # for its time
@pytest.mark.parametrize("source", ["a.png", "lmdb"])
def test_on_a_terminal_no_bar_is_drawn_over_the_classes(source: str, network: Path, tmp_path: Path) -> None:
    """As a terminal shows it, both streams together."""
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(64, 64))])
    shutil.copy(network / "a.png", tmp_path)
    command = [sys.executable, "-m", "caffe_jacinto.classify", "--backend", "opencv"]
    command += [str(network / "deploy.prototxt"), str(network / "w.caffemodel"), "--", source]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 1 << 16):
                said += part
    os.close(ours)
    assert process.returncode == 0
    assert (b"1/1" in said) == (source == "lmdb")
    assert (b"top-1" in said) == (source == "lmdb")
    assert (b"a.png\r\n" in said) == (source == "a.png")


@pytest.mark.caffe
def test_what_caffe_would_die_of_is_a_line(network: Path, caffe_root: Path, tmp_path: Path) -> None:
    (tmp_path / "deploy.prototxt").write_text(
        (network / "deploy.prototxt").read_text().replace('"ReLU"', '"Foo"')
    )
    foreign = trained_network(tmp_path / "deploy.prototxt", network / "w.caffemodel")
    with pytest.raises(UserError, match=r"Caffe cannot read it: .* Unknown layer type: Foo$"):
        open_backend("caffe", foreign, None)


@pytest.mark.caffe
def test_a_network_of_the_fork_is_computed_by_stock_caffe(
    network: Path, caffe_root: Path, tmp_path: Path
) -> None:
    text = built("jacintonet11", Dialect.CAFFE_JACINTO, tmp_path)
    weights = write_random(tmp_path / "w.caffemodel", text, Dialect.CAFFE_JACINTO)
    trained = trained_network(tmp_path / "deploy.prototxt", weights)
    data = np.random.default_rng(0).uniform(0, 255, (2, *trained.shape)).astype(np.float32)
    (want,) = by_onnx(export_onnx(text, "deploy.prototxt", None, weights), data).values()
    backend = open_backend("caffe", trained, None)
    assert backend.classes == 7
    np.testing.assert_allclose(backend.scores(data), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_weights_that_are_no_numbers_or_do_not_fit_are_told(network: Path, tmp_path: Path) -> None:
    stored = messages(Dialect.BVLC).NetParameter.FromString((network / "w.caffemodel").read_bytes())
    layer = next(layer for layer in stored.layer if layer.name == "fc7")
    layer.blobs[0].data[5] = float("nan")
    broken = tmp_path / "nan.caffemodel"
    broken.write_bytes(stored.SerializeToString())
    with pytest.raises(UserError, match="layer fc7 has weights that are not finite numbers"):
        open_backend(None, trained_network(network / "deploy.prototxt", broken), None)
    layer.name = "fc8"
    broken.write_bytes(stored.SerializeToString())
    with pytest.raises(UserError, match="fc7: not in the weight file"):
        open_backend(None, trained_network(network / "deploy.prototxt", broken), None)


def test_a_network_that_gives_no_scores_is_refused(network: Path, tmp_path: Path) -> None:
    whole = (network / "deploy.prototxt").read_text()
    deploy = tmp_path / "deploy.prototxt"
    for text, said in (
        (whole + 'layer { name: "x" type: "ReLU" bottom: "conv1a" top: "x" }', r"has 2 \(prob, x\)"),
        (whole[: whole.index('layer {\n  name: "pool5"')], "its output is 512x2x2 for an image"),
    ):
        deploy.write_text(text)
        with pytest.raises(UserError, match=said):
            open_backend("opencv", trained_network(deploy, network / "w.caffemodel"), None)


# ----------------------------------------------------------------------------------- files and their mistakes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no network: give a run folder"),
        (["nowhere", "a.png"], "nowhere: there is no such file"),
        (["empty", "--", "a.png"], "holds no run"),
        (["empty"], "no images: give files"),
        (["empty", "w.caffemodel", "--", "a.png"], "weights are found automatically"),
        (["deploy.prototxt", "--", "a.png"], "deploy.prototxt: not the folder of a run"),
        (["deploy.prototxt", "w.caffemodel"], "no images: give files"),
        (["deploy.prototxt", "none.caffemodel", "a.png"], "there is no such weight file"),
        (["w.caffemodel", "deploy.prototxt", "a.png"], "the deploy.prototxt comes first"),
        (["deploy.prototxt", "a.png", "a.png"], "cut off or not a weight file"),
        (["deploy.prototxt", "w.caffemodel", "empty"], "no images in this folder"),
        (["deploy.prototxt", "w.caffemodel", "lmdb", "a.png"], "give one LMDB alone"),
        (["deploy.prototxt", "w.caffemodel", "lmdb", "--resize", "70"], "--resize is for image files"),
        (["deploy.prototxt", "w.caffemodel", "a.png", "--resize", "60"], "smaller than the network's input"),
        (["deploy.prototxt", "w.caffemodel", "a.png", "--labels", "labels.txt"], "has 2 names"),
        (["deploy.prototxt", "w.caffemodel", "a.png", "--val", "none"], "none: No such file"),
        (["moved/deploy.prototxt", "w.caffemodel", "a.png"], "name the validation network with --val"),
        (["empty", "--batch", "0", "--", "a.png"], "--batch: '0' is not a whole number"),
        (["empty", "--picture", "a.jpg", "--", "lmdb"], "must end in .png or .svg"),
        (["empty", "--picture", "nowhere/a.png", "--", "lmdb"], "nowhere does not exist"),
        (["empty", "--picture", "a.png", "--", "b.png"], "of an LMDB"),
        (["empty", "--backend", "abacus", "--", "a.png"], "invalid choice"),
        (["empty", "--resize", "0", "--", "a.png"], "is not a size in pixels"),
    ],
)
def test_a_mistake_is_told_before_anything_is_computed(
    given: list[str],
    said: str,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(network, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAFFE_ROOT", "/no/caffe")  # OpenCV starts faster
    (tmp_path / "empty").mkdir()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/deploy.prototxt").write_text((tmp_path / "deploy.prototxt").read_text())
    (tmp_path / "labels.txt").write_text("even\nodd\n")
    write_lmdb(tmp_path / "lmdb", [datum_of(noise(64, 64))])
    with pytest.raises(UserError) as caught:
        main(given)
    assert said in str(caught.value)
    assert capsys.readouterr().out == ""


def test_publishers_names_of_validation_networks_are_found(network: Path, tmp_path: Path) -> None:
    deploy, weights = tmp_path / "deploy.prototxt", network / "w.caffemodel"
    for name in ("train_val.prototxt", "test.prototxt", "val.prototxt"):
        (tmp_path / name).touch()
        assert network_files(deploy, weights, None).val == tmp_path / name
    assert network_files(deploy, weights, Path("mine")).val == Path("mine")


def test_names_that_are_too_few_are_left_out_unless_they_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert class_names(None, (tmp_path / "none", tmp_path), 2) == ("cat", "dog")
    assert class_names(None, (tmp_path,), 3) == ()
    assert "labels.txt has 2 names, and the network 3 classes" in capsys.readouterr().err
    with pytest.raises(UserError, match="has 2 names"):
        class_names(tmp_path / "labels.txt", (), 3)


def test_images_of_folders_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPEG", "1.png", "notes.txt"):
        (tmp_path / name).touch()
    found = image_files([tmp_path, Path("given.dat")])
    assert found == [tmp_path / "1.png", tmp_path / "b/2.JPEG", Path("given.dat")]


# ------------------------------------------------------------------------------------------ scores and tables


def test_equal_scores_count_as_better_ones() -> None:
    tally = Tally(6)
    tally.add(np.zeros((1, 6), np.float32), [0])
    tally.add(np.eye(6, dtype=np.float32)[:1], [0])
    assert (tally.top1, tally.top5, tally.images) == (1, 1, 2)
    with pytest.raises(UserError, match="the LMDB has the label 6, the network 6 classes"):
        tally.add(np.zeros((1, 6), np.float32), [6])


def tally_of(classes: int, *mistakes: tuple[int, int]) -> Tally:
    """An image of each class, found as it is, and ``mistakes`` (true class, class found)."""
    tally = Tally(classes)
    true = [*range(classes), *(pair[0] for pair in mistakes)]
    scores = np.eye(classes, dtype=np.float32)[[*range(classes), *(pair[1] for pair in mistakes)]]
    tally.add(scores, true)
    return tally


def text_of(tally: Tally, form: str, names: tuple[str, ...] = ()) -> str:
    out = io.StringIO()
    write_tally(form, tally, names, out)
    return out.getvalue()


def test_few_classes_are_shown_with_their_confusion_matrix() -> None:
    tally = tally_of(3, (0, 2), (0, 2), (1, 0))
    said = text_of(tally, "text", ("cat", "dog", "owl"))
    rows = {line.split()[1]: line.split()[2:] for line in said.splitlines() if re.match(r" +\d ", line)}
    assert rows == {"cat": ["1", "-", "2"], "dog": ["1", "1", "-"], "owl": ["-", "-", "1"]}
    assert re.search(r"cat +owl +2", said)
    assert "top-1 50.00 % of 6 images" in said  # of three classes there is no top 5
    assert json.loads(text_of(tally, "json"))["top5"] is None
    table = list(csv.DictReader(io.StringIO(text_of(tally, "csv"))))
    assert [row["found_0"] for row in table] == ["1", "1", "0"]


def test_of_many_classes_the_text_shows_the_worst() -> None:
    said = text_of(tally_of(200, (7, 8)), "text")
    assert "the worst 50 of 200" in said and "Confusion matrix" not in said
    assert next(line.split() for line in said.splitlines() if "50.00 %" in line)[0] == "7"
    assert "top-1 99.50 %" in said


def test_classes_without_images_are_told() -> None:
    tally = Tally(6)
    tally.add(np.eye(6, dtype=np.float32)[:2], [0, 1])
    said = text_of(tally, "text")
    assert "2 of 6 have images" in said and "Most confused" not in said


@pytest.mark.parametrize(
    "classes", [2, *(pytest.param(count, marks=pytest.mark.caffe) for count in (30, 300))]
)
@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_picture_is_twice_the_same(classes: int, ending: str, tmp_path: Path) -> None:
    names = tuple(f"$class_{i}^" for i in range(classes))  # no formula
    files = [tmp_path / f"{number}{ending}" for number in range(2)]
    for file in files:
        draw_confusion(tally_of(classes, (0, 1)), names, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    if ending == ".svg":
        assert ("$class_1^" in files[0].read_text()) == (classes <= 30)
    else:
        image = cv2.imread(str(files[0]))
        assert image is not None and min(image.shape[:2]) > 500


def test_the_best_classes_in_three_forms() -> None:
    written = {}
    for form in ("text", "json", "csv"):
        out = io.StringIO()
        BestClasses(form, ("cat", "dog", "owl"), out).write("a.png", np.array([0.2, 0.6, 0.2]))
        written[form] = out.getvalue()
    assert written["text"] == "a.png\n   60.00 %  dog\n   20.00 %  cat\n   20.00 %  owl\n"
    best = json.loads(written["json"])["best"]
    assert [(item["class"], item["name"], item["probability"]) for item in best] == [
        (1, "dog", 0.6),
        (0, "cat", 0.2),
        (2, "owl", 0.2),
    ]
    rows = list(csv.DictReader(io.StringIO(written["csv"])))
    assert [(row["place"], row["name"]) for row in rows] == [("1", "dog"), ("2", "cat"), ("3", "owl")]
