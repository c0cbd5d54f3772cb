"""The series of a report: plots of any curve, one table for pandas, TensorBoard's event files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas
import pytest
from log_text import Log, whole_stage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs.discover import find_runs
from caffe_jacinto.logs.plot import short
from caffe_jacinto.report import main


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def second_net(log: Log, iteration: int, top1: float) -> Log:
    """A test of a second test network."""
    log.line("solver.cpp", f"Iteration {iteration}, Testing net (#1)")
    return log.line("solver.cpp", f"    Test net output #0: right = {top1:g}")


def initial() -> Log:
    """40 iterations, 5 seconds for 10 of them, with images of a list; two test networks."""
    log = Log().start(iter_size=2)
    shape = "output data size: 32,3,8,8\n"
    at = log.text.index(shape) + len(shape)
    line = "I0815 10:00:00.900000  8764 image_data_layer.cpp:1] A total of 640 images.\n"
    log.text = log.text[:at] + line + log.text[at:]
    log.test(0, 0.1, 0.5, 2.3)
    second_net(log, 0, 0.2).iterate(0, 10).test(20, 0.6, 0.9, 0.8)
    second_net(log, 20, 0.65).iterate(20, 30).sparsity(0.5, 0.25).done(40).test(40, 0.75, 0.95, 0.625)
    second_net(log, 40, 0.7).end()
    log.text = log.text.replace("lr = 0.01", "lr = 0.1", 2).replace("lr = 0.1", "lr = 1", 1)
    second = Log().net("TEST", 50).text
    at = log.text.rindex("I0815", 0, log.text.index("Solver scaffolding done."))
    log.text = log.text[:at] + second + log.text[at:]
    return log


def a_run(folder: Path) -> Path:
    write(folder / "initial/run.log", initial().text)
    write(folder / "sparse/run.log", whole_stage().sparsity(0.805, 0.5).text)
    test = Log().line("caffe.cpp", "Use CPU.").net("TEST", 50).line("caffe.cpp", "Running for 2 iterations.")
    for line in ("Loss: 0.5", "loss = 0.5 (* 1 = 0.5 loss)", "nearly right = 0.9", "right = 0.8"):
        test.line("caffe.cpp", line)
    write(folder / "test/run.log", test.text)
    return folder


def report(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def read(path: Path) -> pandas.DataFrame:
    """As pandas reads it without being told anything."""
    readers = {".csv": pandas.read_csv, ".json": pandas.read_json, ".parquet": pandas.read_parquet}
    return readers[path.suffix](path)


# The table


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_every_point_is_in_a_table_that_pandas_reads(kind: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "digits")
    assert report(run, "--series", tmp_path / f"points.{kind}") == 0
    table = read(tmp_path / f"points.{kind}")
    assert list(table.columns) == [
        "run", "stage", "iteration", "seconds", "epoch", "train_loss", "learning_rate", "sparsity",
        "images_per_second", "test_loss", "test_nearly right", "test_right", "test_right (#1)",
    ]  # fmt: skip
    assert set(table["run"]) == {"digits"}
    first = table[table["stage"] == "initial"].set_index("iteration")
    assert first["train_loss"].dropna().to_dict() == pytest.approx(
        {0: 2, 10: 2 / 11, 20: 2 / 21, 30: 2 / 31, 40: 0.5}, rel=1e-5
    )
    # By default, pandas reads the last digit of a JSON number roughly.
    assert first["test_right"].dropna().to_dict() == pytest.approx({0: 0.1, 20: 0.6, 40: 0.75})
    assert first["test_right (#1)"].dropna().to_dict() == pytest.approx({0: 0.2, 20: 0.65, 40: 0.7})
    assert first["learning_rate"].dropna().to_dict() == pytest.approx({0: 1, 10: 0.1, 20: 0.01, 30: 0.01})
    assert first["sparsity"].dropna().to_dict() == {40: 0.5}
    # 64 images in an update, 640 in the list.
    assert first["epoch"].to_dict() == {0: 0, 10: 1, 20: 2, 30: 3, 40: 4}
    assert first["seconds"][10] - first["seconds"][0] == pytest.approx(5, abs=0.01)
    assert first["images_per_second"][30] == pytest.approx(128, rel=0.01)
    assert first["seconds"].is_monotonic_increasing
    (test,) = table[table["stage"] == "test"].to_dict("records")
    assert test["test_right"] == 0.8
    assert pandas.isna(test["iteration"])


def test_a_resume_repeats_no_point_and_its_gap_is_no_time(tmp_path: Path) -> None:
    log = Log().start().test(0, 0.1, 0.5, 2.3).iterate(0, 20)
    second = Log()
    second.second = log.second + 3600
    second.start().line("caffe.cpp", "Resuming from a/b_iter_10.solverstate").iterate(10, 30).done(40).end()
    write(tmp_path / "a.log", log.text + second.text)
    assert report(tmp_path / "a.log", "--series", tmp_path / "points.csv") == 0
    table = read(tmp_path / "points.csv")
    assert table["iteration"].tolist() == [0, 10, 20, 30, 40]
    assert table["seconds"].max() < 30


def test_a_long_log_keeps_every_point(tmp_path: Path) -> None:
    log = Log().start(max_iter=80_000).iterate(0, 80_000)
    write(tmp_path / "a.log", log.text)
    assert report(tmp_path / "a.log", "--series", tmp_path / "points.csv", "--format", "json") == 0
    assert len(read(tmp_path / "points.csv")) == 8001


def test_every_output_of_a_test_has_a_column(tmp_path: Path) -> None:
    """However many there are, and whatever their names."""
    log = Log().start().line("solver.cpp", "Iteration 20, Testing net (#0)")
    names = [*(f"class {n}" for n in range(200)), "sparsity", "train_loss"]
    for number, name in enumerate(names):
        log.line("solver.cpp", f"    Test net output #{number}: {name} = {number}", seconds=0)
    log.sparsity(0.5, 0.5).iterate(20, 30).end()
    path = write(tmp_path / "a.log", log.text)
    assert report(path, "--series", tmp_path / "a.csv") == 0
    row = read(tmp_path / "a.csv").iloc[0]
    assert [row[f"test_{name}"] for name in names] == list(range(202))
    assert (row["sparsity"], row["train_loss"]) == (0.5, pytest.approx(2 / 21, rel=1e-3))


def test_epochs_of_a_run_are_those_of_its_record(tmp_path: Path) -> None:
    run = a_run(tmp_path / "digits")
    text = (run / "initial/run.log").read_text()
    write(run / "initial/run.log", re.sub(r".*A total of 640 images.\n", "", text))
    record = {"stages": {"initial": {}, "sparse": {}, "test": {}}, "data": {"train_lmdb": {"images": 320}}}
    write(run / "run.json", json.dumps(record))
    assert report(run, "--series", tmp_path / "points.csv") == 0
    table = read(tmp_path / "points.csv")
    assert table[table["stage"] == "sparse"]["epoch"].max() == 40 * 64 / 320


def test_epochs_that_nvcaffe_prints(tmp_path: Path) -> None:
    log = Log().start()
    for number in (0, 10, 20):
        loss = f"Iteration {number} (2 iter/s, 5s/10 iter), {number / 100}/300ep, loss = 1"
        log.line("solver.cpp", loss, seconds=5)
    write(tmp_path / "a.log", log.text)
    assert report(tmp_path / "a.log", "--series", tmp_path / "points.csv") == 0
    assert read(tmp_path / "points.csv")["epoch"].tolist() == pytest.approx([0, 0.1, 0.2])


def test_series_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"must end in \.csv, \.json or \.parquet"):
        report(run, "--series", tmp_path / "points.xlsx")
    with pytest.raises(UserError, match="cannot be written"):
        report(run, "--series", tmp_path / "missing" / "points.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        report(run, "--series", tmp_path / "points.parquet")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        report(run, "--tensorboard", tmp_path / "events")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_names_from_logs_are_text_in_a_spreadsheet(tmp_path: Path) -> None:
    log = whole_stage()
    log.text = log.text.replace(": right =", ": =cmd() =")
    write(tmp_path / "=1+2_initial.log", log.text)
    assert report(tmp_path, "--series", tmp_path / "points.csv") == 0
    cells = (tmp_path / "points.csv").read_text().replace("\n", ",").split(",")
    assert "'=1+2" in cells
    assert not any(cell.startswith("=") for cell in cells)


# TensorBoard


def test_tensorboard_shows_the_stages_end_to_end(tmp_path: Path) -> None:
    run = a_run(tmp_path / "runs/digits")
    write(tmp_path / "runs/other.log", whole_stage().text)
    for _ in range(2):  # a second time replaces the first
        assert report(run, tmp_path / "runs/other.log", "--tensorboard", tmp_path / "events") == 0
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == ["digits", "other"]
    assert len(list((tmp_path / "events/digits").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "events/digits"), size_guidance={"scalars": 0})
    events.Reload()
    assert {"train/loss", "train/learning_rate", "train/sparsity", "test/right", "test/right (#1)"} <= set(
        events.Tags()["scalars"]
    )
    found = [(event.step, event.value) for event in events.Scalars("test/right")]
    assert found == [
        (step, pytest.approx(value))
        for step, value in [(0, 0.1), (20, 0.6), (40, 0.75), (40, 0.1), (60, 0.6), (80, 0.75)]
    ]
    assert [(event.step, event.value) for event in events.Scalars("caffe_test/right")] == [
        (80, pytest.approx(0.8))
    ]
    times = [event.wall_time for event in events.Scalars("train/loss")]
    assert times == sorted(times)


# Plots


def texts(image: Path) -> list[str]:
    """What is written in a picture of matplotlib's: it draws letters as paths, with the text in a comment."""
    return re.findall(r"<!-- (.*?) -->", image.read_text())


def test_the_second_test_networks_curves_are_drawn(tmp_path: Path) -> None:
    assert report(a_run(tmp_path / "run"), "--plot", tmp_path / "a.svg") == 0
    assert {"top-1", "top-5", "top-1 (#1)", "top-1, caffe test"} <= set(texts(tmp_path / "a.svg"))


def test_any_curve_in_a_panel_of_its_own(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    names = ["nearly right", "images_per_second", "right (#1)"]
    wanted = [part for name in names for part in ("--y", name)]
    assert report(run, "--plot", tmp_path / "a.svg", *wanted) == 0
    found = texts(tmp_path / "a.svg")
    assert [text for text in found if text in ("nearly right", "images/s", "right (#1)")] == [
        "nearly right", "images/s", "right (#1)",
    ]  # fmt: skip
    assert "training loss" not in found
    wrong = r"--y wrong: no log has this curve; there are: train_loss, .*right.*, top1, top5"
    with pytest.raises(UserError, match=wrong):
        report(run, "--plot", tmp_path / "a.svg", "--y", "wrong")
    with pytest.raises(UserError, match="give --plot FILE, too"):
        report(run, "--y", "right")


def test_an_accuracy_by_the_name_of_its_figure(tmp_path: Path) -> None:
    """As ``top1``, whatever the network's output is called; of every test network."""
    run = a_run(tmp_path / "run")
    assert report(run, "--plot", tmp_path / "a.svg", "--y", "top1") == 0
    found = texts(tmp_path / "a.svg")
    assert {"top-1, %", "top-1", "top-1 (#1)", "top-1, caffe test"} <= set(found)
    assert not {"top-5", "right", "training loss"} & set(found)


@pytest.mark.parametrize(
    ("axis", "title"), [("iteration", "iteration"), ("epoch", "epoch"), ("time", "time in seconds")]
)
def test_the_axis_is_in_iterations_epochs_or_time(axis: str, title: str, tmp_path: Path) -> None:
    log = write(tmp_path / "a.log", initial().text)
    assert report(log, "--plot", tmp_path / "a.svg", "--x", axis) == 0
    assert title in texts(tmp_path / "a.svg")


def test_an_axis_in_epochs_needs_their_length(tmp_path: Path) -> None:
    log = write(tmp_path / "a.log", whole_stage().text)
    with pytest.raises(UserError, match=r"--x epoch: .*a\.log does not say how many training images"):
        report(log, "--plot", tmp_path / "a.svg", "--x", "epoch")


def test_learning_rates_far_apart_have_a_logarithmic_axis(tmp_path: Path) -> None:
    write(tmp_path / "a.log", initial().text)
    write(tmp_path / "b.log", whole_stage().text)
    for name, logarithmic in (("a", True), ("b", False)):
        assert report(tmp_path / f"{name}.log", "--plot", tmp_path / "p.svg", "--y", "learning_rate") == 0
        assert ({"1", "0.1", "0.01"} <= set(texts(tmp_path / "p.svg"))) == logarithmic


def test_the_names_of_five_runs_stand_above_their_curves(tmp_path: Path) -> None:
    """No label lies on a panel: the lowest name ends above the highest axis."""
    for number in range(5):
        a_run(tmp_path / "runs" / f"a_run_with_a_rather_long_name_{number}")
    assert report(tmp_path / "runs", "--plot", tmp_path / "a.svg") == 0
    image = (tmp_path / "a.svg").read_text()
    tops = [
        float(y)
        for y in re.findall(
            r'<g id="patch_\d+">\s*<path d="M [\d.]+ [\d.]+ \nL [\d.]+ [\d.]+ \nL [\d.]+ ([\d.]+)', image
        )
    ]
    name = r"<!-- a_run_with_a_rather_long_name_\d: initial, sparse -->.*?translate\([\d.]+ ([\d.]+)\)"
    names = re.findall(name, image, re.DOTALL)
    assert len(names) == 5
    panels = sorted(top for top in tops if top > 0)
    assert max(map(float, names)) < panels[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (9000, "9000"),
        (320_000, "320k"),
        (8e7, "80M"),
        (1.5e6, "1.5M"),
        (2e10, "20G"),
        (0.001, "0.001"),
    ],
)
def test_large_numbers_on_an_axis_are_readable(value: float, words: str) -> None:
    assert short(value) == words


def test_curves_of_a_long_stage_are_bounded(tmp_path: Path) -> None:
    write(tmp_path / "a.log", Log().start(max_iter=80_000).iterate(0, 80_000).text)
    (run,), _ = find_runs([tmp_path / "a.log"], history=True)
    assert run.stages[0].history is not None
    assert len(run.stages[0].history.loss.points()) <= 3000
