"""The report command: paths, formats, published figures, errors, plots."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from log_text import GIGAMACS, Log, whole_stage

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.report import main

KEYS = [
    "name", "log", "caffe_version", "finished", "iterations", "top1", "top5", "mean_ap", "loss", "train_loss",
    "outputs", "sparsity", "sparsity_logged", "gigamacs", "images_per_second", "images_per_second_logged",
    "seconds", "classes", "image_size", "gigamacs_left", "weight_bits", "activation_bits", "float_top1",
    "start_top1", "notes",
]  # fmt: skip


def report(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def stages(*paths: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], dict[str, Any]]:
    code, out, _ = report(*paths, "--format", "json", capsys=capsys)
    assert code == 0
    runs = json.loads(out)["runs"]
    return {(run["name"], stage["name"]): stage for run in runs for stage in run["stages"]}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_what_a_run_starts_from_is_said_with_its_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table's first stage has trained already: without this line, what was lost in it would not show."""
    text = whole_stage().text
    begin = Log().line("caffe.cpp", "Finetuning from /their/trained.caffemodel").text
    started = text.replace("Iteration 0, Testing", "\0Iteration 0, Testing", 1)
    at = started.rindex("\n", 0, started.index("\0")) + 1
    started = (started[:at] + begin + started[at:]).replace("\0", "")
    write(tmp_path / "run/l1reg/run.log", started)
    write(tmp_path / "run/sparse/run.log", started.replace("/their/trained", "run/l1reg/b_iter_40"))
    found = stages(tmp_path / "run", capsys=capsys)
    assert [stage["start_top1"] for stage in found.values()] == [0.1, 0.1]
    _, out, _ = report(tmp_path / "run", capsys=capsys)
    assert "\nl1reg: starts from trained.caffemodel, top-1 10.00 %\n" in out
    assert out.count("starts from") == 1
    write(tmp_path / "other/l1reg/run.log", text)
    (other,) = stages(tmp_path / "other", capsys=capsys).values()
    assert other["start_top1"] is None


def test_the_published_figures_to_the_last_digit(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = stages(published / "logs", capsys=capsys)
    jacinto, resnet = "imagenet_jacintonet11", "resnet10_cvgj"
    assert list(found) == [(jacinto, "initial"), (jacinto, "sparse"), (jacinto, "test"), (resnet, "test")]
    expected: dict[tuple[str, str], dict[str, Any]] = {
        (jacinto, "initial"): {
            "caffe_version": "NVCaffe 0.16.3", "finished": True, "iterations": 320000, "top1": 0.608705,
            "top5": 0.833526, "loss": 1.67076, "sparsity": None, "sparsity_logged": None, "gigamacs": 0.4063,
            "images_per_second": 1639.4, "images_per_second_logged": 819.695, "seconds": 50389.0,
            "outputs": {"accuracy/top1": 0.608705, "accuracy/top5": 0.833526, "loss": 1.67076},
        },
        (jacinto, "sparse"): {
            "caffe_version": "NVCaffe 0.16.3", "finished": True, "iterations": 160000, "top1": 0.596824,
            "top5": 0.821644, "loss": 1.74932, "sparsity": 0.805, "sparsity_logged": 0.661,
            "gigamacs": 0.4063,
            "images_per_second_logged": 623.075, "seconds": 33166.0,
        },
        (jacinto, "test"): {
            "caffe_version": "NVCaffe 0.16.4", "finished": True, "iterations": 1000, "top1": 0.59618,
            "top5": 0.822022, "loss": 1.74816, "sparsity": 0.805, "sparsity_logged": 0.805,
            "gigamacs": 0.4063, "classes": 1000, "image_size": [224, 224],
            "images_per_second": None,
        },
        (resnet, "test"): {
            "caffe_version": None, "finished": True, "top1": 0.638721, "top5": 0.85161, "loss": 1.53151,
            "sparsity": None, "gigamacs": 0.8892, "classes": 1000, "image_size": [224, 224],
            "images_per_second": None,
            "outputs": {"accuracy": 0.638721, "loss": 1.53151, "top5": 0.85161},
        },
    }  # fmt: skip
    for key, figures in expected.items():
        assert list(found[key]) == KEYS
        assert {name: found[key][name] for name in figures} == figures
    assert found[jacinto, "sparse"]["images_per_second"] == pytest.approx(1246.15, abs=0.06)


def test_a_published_log_cut_off_is_a_running_stage(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (published / "logs" / "imagenet_jacintonet11_sparse.log").read_bytes()
    (tmp_path / "cut_sparse.log").write_bytes(text[: len(text) * 2 // 3])
    ((key, stage),) = stages(tmp_path, capsys=capsys).items()
    assert key == ("cut", "sparse")
    assert stage["finished"] is False
    assert 0 < stage["iterations"] < 160000
    assert stage["sparsity"] > stage["sparsity_logged"] > 0
    assert stage["images_per_second"] == pytest.approx(1246, rel=0.02)


def run_folder(folder: Path) -> Path:
    """A run in this project's layout: the last stage is a test."""
    write(folder / "initial" / "run.log", whole_stage().text)
    write(folder / "sparse" / "run.log", whole_stage().sparsity(0.805, 0.5).text)
    test = Log().line("caffe.cpp", "Use CPU.").net("TEST", 50).line("caffe.cpp", "Running for 2 iterations.")
    test.line("caffe.cpp", "Loss: 0.5").line("caffe.cpp", "right = 0.8")
    write(folder / "test" / "run.log", test.text)
    write(folder / "initial" / "train.prototxt", "")
    write(folder / "initial" / "other.log", "of no interest")
    write(folder / "driver.txt", "of no interest")
    return folder


def test_the_same_run_by_every_kind_of_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "runs" / "digits")
    whole = stages(run, capsys=capsys)
    assert list(whole) == [("digits", "initial"), ("digits", "sparse"), ("digits", "test")]
    assert stages(tmp_path / "runs", capsys=capsys) == whole
    assert stages(run / "sparse", capsys=capsys) == {("digits", "sparse"): whole["digits", "sparse"]}
    assert stages(run / "sparse" / "run.log", capsys=capsys) == stages(run / "sparse", capsys=capsys)
    assert stages(run / "sparse", run, capsys=capsys) == whole  # named twice, there once


def test_stages_stand_in_the_order_of_the_runs_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b_second", "a_third", "c_first"):
        write(tmp_path / "run" / name / "run.log", whole_stage().text)
    write(
        tmp_path / "run" / "run.json", json.dumps({"stages": {"c_first": {}, "b_second": {}, "a_third": {}}})
    )
    assert [stage for _, stage in stages(tmp_path, capsys=capsys)] == ["c_first", "b_second", "a_third"]


def test_a_lone_log_is_named_by_its_solvers_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "mine.log", whole_stage().text)
    assert list(stages(path, capsys=capsys)) == [("mine", "train")]
    text = whole_stage().text.replace('"a/b"', '"training/x/l1reg/b"')
    assert list(stages(write(path, text), capsys=capsys)) == [("mine", "l1reg")]


def test_bad_paths_are_told_one_by_one_and_the_others_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.log", whole_stage().text)
    (tmp_path / "empty").mkdir()
    no_log = write(tmp_path / "shopping.txt", "milk\neggs\n")
    nothing = write(tmp_path / "nothing.log", "")
    bad = [tmp_path / "missing", tmp_path / "empty", no_log, nothing]
    code, out, errors = report(*bad, good, capsys=capsys)
    assert code == 2
    words = ["no such file or folder", "holds no log", "is not a Caffe log", "is empty"]
    assert len(errors) == len(bad)
    for path, error, word in zip(bad, errors, words, strict=True):
        assert error.startswith(f"caffe_jacinto.report: error: {path}: ")
        assert word in error
    assert "good" in out
    assert "75.00 %" in out
    code, out, _ = report(*bad, "--format", "json", capsys=capsys)
    assert (code, json.loads(out)) == (2, {"runs": []})


def test_a_stage_whose_log_is_still_empty_is_no_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    write(run / "finetune" / "run.log", "")
    code, _, errors = report(run, capsys=capsys)
    assert (code, errors) == (0, [])
    write(tmp_path / "new" / "initial" / "run.log", "")
    code, _, errors = report(tmp_path / "new", capsys=capsys)
    assert code == 2
    assert "still empty" in errors[0]


def test_the_table_for_a_pipe_is_plain_text_on_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = report(run_folder(tmp_path / ("digits" * 20)), capsys=capsys)
    assert code == 0
    assert "\x1b" not in out
    lines = out.splitlines()
    (sparse,) = [line for line in lines if line.startswith("sparse")]
    assert sparse.split()[:2] == ["sparse", "40"]
    assert "80.5 %" in sparse
    assert "+0.00" in sparse


PUBLISHED_ROWS = [
    ["60.91", "%", "83.05", "%", "0.410"],
    ["63.9", "%", "85.2", "%", "0.910"],
    ["57.1", "%", "80.2", "%", "0.687"],
]


def published_rows(text: str) -> list[list[str]]:
    """The cells of the result table's published rows, without that of the complexity left without zeros."""
    return [
        line.split("(published, ImageNet)")[1].removesuffix("-").split()
        for line in text.splitlines()
        if "(published, ImageNet)" in line
    ]


def test_published_results_stand_only_beside_those_that_compare(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of ImageNet: 1000 classes, crops of 224 or 227 pixels; the made-up run has 10 classes."""
    run = run_folder(tmp_path / "digits")
    _, out, _ = report(run, capsys=capsys)
    assert "digits, initial" in out
    assert published_rows(out) == []
    assert published_rows(report(run, "--published", capsys=capsys)[1]) == PUBLISHED_ROWS
    imagenet = published / "logs"
    assert published_rows(report(imagenet, capsys=capsys)[1]) == PUBLISHED_ROWS
    assert published_rows(report(run, imagenet, capsys=capsys)[1]) == PUBLISHED_ROWS
    for form, row in (("csv", "JacintoNet11,0.6091"), ("markdown", "published, ImageNet")):
        assert row not in report(run, "--format", form, capsys=capsys)[1]
        assert row in report(run, "--format", form, "--published", capsys=capsys)[1]


@pytest.mark.parametrize(
    ("classes", "side", "compares"),
    [(1000, 224, True), (1000, 227, True), (1000, 128, False), (999, 224, False)],
)
def test_what_compares_with_the_published_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int, side: int, compares: bool
) -> None:
    text = whole_stage().text.replace("num_output: 10\n", f"num_output: {classes}\n")
    run = write(tmp_path / "a.log", text.replace(",3,8,8", f",3,{side},{side}"))
    (stage,) = stages(run, capsys=capsys).values()
    assert (stage["classes"], stage["image_size"]) == (classes, [side, side])
    assert bool(published_rows(report(run, capsys=capsys)[1])) is compares


def test_an_unfinished_stage_says_so_with_caffes_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log().start().iterate(0, 10).line("db_lmdb.cpp", "Check failed: no such LMDB", level="F")
    _, out, _ = report(write(tmp_path / "a.log", log.text), capsys=capsys)
    assert "train (unfinished)" in out
    assert "train stopped: Check failed: no such LMDB" in out


def test_names_from_logs_cannot_steer_a_terminal_or_break_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "=cmd()|a\x1b[31m<b>_initial.log"
    log = Log().start().line("net.cpp", "Check failed: \x1b]0;title\x07 | x", level="F")
    write(run, whole_stage().text + log.text)
    for form in ("table", "markdown", "csv"):
        _, out, _ = report(run, "--format", form, capsys=capsys)
        assert "\x1b" not in out
        assert "\x07" not in out
        if form == "markdown":
            rows = [line for line in out.splitlines() if line.startswith("|")]
            assert all(row.replace("\\|", "").count("|") in (5, 10) for row in rows)
            assert "<b>" not in out
        if form == "csv":
            assert all(cell[:1] != "=" for row in csv.reader(io.StringIO(out)) for cell in row)


def test_csv_holds_plain_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = report(run_folder(tmp_path / "digits"), "--format", "csv", capsys=capsys)
    assert code == 0
    first, second = out.split("\n\n")
    rows = list(csv.DictReader(io.StringIO(first)))
    assert [row["stage"] for row in rows] == ["initial", "sparse", "test"]
    assert float(rows[1]["top1"]) == 0.75
    assert float(rows[1]["sparsity"]) == 0.805
    assert rows[0]["sparsity"] == ""
    assert float(rows[0]["gigamacs"]) == GIGAMACS
    results = list(csv.DictReader(io.StringIO(second)))
    assert [row["published"] for row in results] == ["false", "false"]


def test_a_loss_that_is_no_number_leaves_the_json_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log().start().test(0, 0.1, 0.5, float("nan")).iterate(0, 10)
    (stage,) = stages(write(tmp_path / "a.log", log.text), capsys=capsys).values()
    assert (stage["loss"], stage["top1"]) == (None, 0.1)


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        ((2.3, 87.3365, 87.3365), ": the loss is stuck at 87.3365 at iteration 4000"),
        ((2.3, 87.3365, 1.5), None),
        ((2.3, float("nan")), ": the loss is not a number (nan) at iteration 2000"),
        (
            (2.31, 2.3, 2.3026),
            ": the loss has stayed at 2.303, that of guessing among 10 classes (ln 10)",
        ),
    ],
)
def test_what_is_wrong_with_the_last_losses_is_below_the_table(
    losses: tuple[float, ...], note: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log().start()
    for number, loss in enumerate(losses):
        log.line("solver.cpp", f"Iteration {2000 * number} (2 iter/s, 5s/10 iters), loss = {loss:g}")
        log.line("sgd_solver.cpp", f"Iteration {2000 * number}, lr = 0.01")
    write(tmp_path / "stage/run.log", log.text)
    _, said, _ = report(tmp_path, capsys=capsys)
    assert (note in said) if note else ("the loss" not in said)


@pytest.mark.parametrize("name", ["curves.png", "curves.SVG"])
def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run_folder(tmp_path / "$x$ 网")
    run_folder(tmp_path / "second")
    code, _, errors = report(tmp_path, "--plot", tmp_path / name, capsys=capsys)
    assert (code, errors) == (0, [])
    image = (tmp_path / name).read_bytes()
    assert image.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert not any(path.name.startswith(".curves") for path in tmp_path.iterdir())


def test_plots_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"must end in \.png or \.svg"):
        main([str(run), "--plot", str(tmp_path / "curves.jpg")])
    with pytest.raises(UserError, match="cannot be written"):
        main([str(run), "--plot", str(tmp_path / "missing" / "curves.png")])
    with pytest.raises(UserError, match="no curve"):
        main([str(run / "test"), "--plot", str(tmp_path / "curves.png")])
    capsys.readouterr()


def test_the_command_as_users_start_it(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    command = [sys.executable, "-m", "caffe_jacinto.report", str(tmp_path)]
    plain = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True
    )
    assert b"initial" in plain.stdout
    missing = subprocess.run([*command, "/no/such"], capture_output=True, check=False)
    assert missing.returncode == 2
    assert b"/no/such: no such file" in missing.stderr
    colour = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    coloured = subprocess.run(command, capture_output=True, env=os.environ | colour, check=True)
    assert b"\x1b[" in coloured.stdout


@pytest.mark.caffe
def test_a_log_that_real_caffe_writes(
    tmp_path: Path, caffe_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    caffe = str(caffe_engine.info.executable)
    write(tmp_path / "net.prototxt", REAL_NET)
    write(tmp_path / "solver.prototxt", REAL_SOLVER)
    run = tmp_path / "run"
    commands = {
        "initial": [caffe, "train", "-solver", "solver.prototxt"],
        "test": [
            caffe,
            "test",
            "-model",
            "net.prototxt",
            "-weights",
            "s_iter_20.caffemodel",
            "-iterations",
            "4",
        ],
    }
    for stage, command in commands.items():
        (run / stage).mkdir(parents=True)
        with (run / stage / "run.log").open("wb") as log:
            subprocess.run(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, check=True)
    found = stages(run, capsys=capsys)
    initial, test = found["run", "initial"], found["run", "test"]
    assert (initial["finished"], initial["iterations"], test["finished"], test["iterations"]) == (
        True,
        20,
        True,
        4,
    )
    assert initial["top1"] == pytest.approx(test["top1"], abs=0.5)
    assert initial["top5"] is not None
    assert initial["gigamacs"] == float(f"{(6 * 3 * 9 * 64 + 6 * 64 * 7) / 1e9:.4g}")
    assert initial["images_per_second"] > 0


REAL_NET = """
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param { shape { dim: 8 dim: 3 dim: 8 dim: 8 } shape { dim: 8 } data_filler { type: "gaussian" }
    data_filler { type: "constant" value: 1 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 6 kernel_size: 3 pad: 1 weight_filler { type: "msra" } } }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc"
  inner_product_param { num_output: 7 weight_filler { type: "msra" } } }
layer { name: "one" type: "Accuracy" bottom: "fc" bottom: "label" top: "one" include { phase: TEST } }
layer { name: "five" type: "Accuracy" bottom: "fc" bottom: "label" top: "five" accuracy_param { top_k: 5 }
  include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
REAL_SOLVER = """
net: "net.prototxt" test_iter: 2 test_interval: 10 base_lr: 0.01 display: 5 max_iter: 20 lr_policy: "fixed"
momentum: 0.9 snapshot_prefix: "s" iter_size: 2 solver_mode: CPU random_seed: 1
"""
