"""Runs beside each other: differences, order, settings that differ, the picture to choose a network by."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_text import CONV_WEIGHTS, FC_WEIGHTS, GIGAMACS, Log

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs.tables import complexity
from caffe_jacinto.report import main

# top-1, sparsity, base_lr
RUNS = {"a": (0.75, 0.8, 0.01), "b": (0.5, 0.0, 0.02), "c": (0.625, 0.5, 0.01)}


def stage(top1: float, sparsity: float, rate: float) -> str:
    log = Log().start().test(0, 0.1, 0.5, 2.3).iterate(0, 30).sparsity(sparsity, 0.1).done(40)
    return log.test(40, top1, 0.95, 1 - top1).end().text.replace("base_lr: 0.01", f"base_lr: {rate:g}")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, figures in RUNS.items():
        folder = tmp_path / "runs" / name / "sparse"
        folder.mkdir(parents=True)
        (folder / "run.log").write_text(stage(*figures))
    return tmp_path / "runs"


def report(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def as_json(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report(*arguments, "--compare", "--format", "json", capsys=capsys))
    return found


def test_two_runs_with_their_differences(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(runs / "a", runs / "b", "--compare", capsys=capsys)
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["Top-1"][1:] == ["75.00", "%", "50.00", "%", "-25.00"]
    assert rows["Loss"][1:] == ["0.25", "0.5", "+0.25"]
    assert rows["Sparsity"][1:] == ["80.0", "%", "0.0", "%", "-80.00"]
    assert rows["base_lr"][1:] == ["0.01", "0.02"]
    assert "max_iter" not in text
    found = as_json(runs / "a", runs / "b", capsys=capsys)
    assert [run["top1"] for run in found["runs"]] == [0.75, 0.5]
    assert found["runs"][1]["difference"]["top1"] == -0.25
    assert found["runs"][0]["gigamacs"] == GIGAMACS
    assert [one["settings"] for one in found["settings"]] == [{"base_lr": ["0.01", "0.02"]}]


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("top1", "acb"),
        ("loss", "acb"),
        ("sparsity", "acb"),
        ("name", "abc"),
        ("mean_ap", "abc"),
        ("gigamacs", "abc"),
    ],
)
def test_many_runs_are_sorted_by_any_figure(
    key: str, order: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(runs, "--sort", key, capsys=capsys)
    assert "".join(run["name"] for run in found["runs"]) == order


def test_a_table_of_many_runs_in_every_format(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (runs, "--compare", "--sort", "top1")
    lines = report(*arguments, capsys=capsys).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["a", "c", "b"]
    assert re.search(
        r"\| base_lr\s*\| 0\.01 \| 0\.01 \| 0\.02 \|",
        report(*arguments, "--format", "markdown", capsys=capsys).replace("\\_", "_"),
    )
    first, second = report(*arguments, "--format", "csv", capsys=capsys).split("\n\n")
    rows = list(csv.DictReader(io.StringIO(first)))
    assert [(row["name"], float(row["top1"])) for row in rows] == [("a", 0.75), ("c", 0.625), ("b", 0.5)]
    assert list(csv.reader(io.StringIO(second)))[1] == ["", "base_lr", "0.01", "0.01", "0.02"]


def test_stages_are_compared_with_those_of_the_same_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rates in (("a", (0.1, 0.01)), ("b", (0.1, 0.02))):
        for stage_name, rate in zip(("initial", "sparse"), rates, strict=True):
            (tmp_path / name / stage_name).mkdir(parents=True)
            (tmp_path / name / stage_name / "run.log").write_text(stage(0.5, 0.5, rate))
    found = as_json(tmp_path, capsys=capsys)
    assert found["settings"] == [
        {"stage": "sparse", "runs": ["a", "b"], "settings": {"base_lr": ["0.01", "0.02"]}}
    ]
    assert found["runs"][0]["iterations"] == 80


def test_runs_without_a_difference_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.log").write_text(stage(0.5, 0.5, 0.01))
    assert "the solver settings of stages with the same name are the same" in report(
        tmp_path, "--compare", capsys=capsys
    )
    (tmp_path / "b.log").write_text(Log().iterate(10, 20).text)
    assert "no two logs hold the solver settings" in report(tmp_path, "--compare", capsys=capsys)


def test_sorting_is_of_a_comparison(runs: Path) -> None:
    with pytest.raises(UserError, match="give --compare, too"):
        main([str(runs), "--sort", "top1"])


def test_accuracy_against_sparsity_and_complexity(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(runs, "--scatter", tmp_path / "a.svg", "--published", capsys=capsys)
    found = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert {"1  a", "2  b", "3  c", "+  ResNet10 (published)"} <= set(found)
    assert {
        "sparsity of the convolutions, %",
        "complexity, GigaMACs for one crop",
        "top-1 accuracy, %",
    } <= set(found)
    report(runs, "--scatter", tmp_path / "a.png", capsys=capsys)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_long_numbers_of_an_axis_have_room(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(runs, "--scatter", tmp_path / "a.svg", capsys=capsys)
    found = re.findall(r"<!-- (\S*e-05) -->", (tmp_path / "a.svg").read_text())
    assert 1 < len(found) <= 4


def test_pictures_of_choices_that_cannot_be_drawn(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--scatter .*must end in \.png or \.svg"):
        main([str(runs), "--scatter", str(tmp_path / "a.pdf")])
    with pytest.raises(UserError, match="cannot be written"):
        main([str(runs), "--scatter", str(tmp_path / "missing" / "a.svg")])
    (tmp_path / "a.log").write_text(Log().iterate(10, 20).text)
    with pytest.raises(UserError, match="no run has a top-1 accuracy"):
        main([str(tmp_path / "a.log"), "--scatter", str(tmp_path / "a.svg")])


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Two runs of one configuration, and one of another."""
    for name, top1, seed in (("thin-seed1", 0.75, 1), ("thin-seed2", 0.5, 2), ("wide", 0.625, 1)):
        folder = tmp_path / "seeds" / name / "sparse"
        folder.mkdir(parents=True)
        text = stage(top1, 0.8, 0.01).replace("base_lr: 0.01", f"base_lr: 0.01\nrandom_seed: {seed}")
        (folder / "run.log").write_text(text)
    return tmp_path / "seeds"


def test_runs_that_differ_in_their_seed_have_a_mean_and_a_spread(
    seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = report(seeds, "--seeds", capsys=capsys)
    thin, wide = (line for line in text.splitlines() if ", sparse" in line)
    left = (CONV_WEIGHTS * 64 * (1 - 0.8) + FC_WEIGHTS * (1 - 0.1)) / 1e9
    expected = (
        "thin, sparse 2 62.50 ± 17.68 % 95.00 ± 0.00 % 0.375 ± 0.18 80.0 ± 0.0 % "
        f"{complexity(GIGAMACS)} {complexity(left)}"
    )
    assert " ".join(thin.split()) == expected
    assert "±" not in wide
    assert "more than the seed" not in text
    assert "| thin, sparse | 2 |" in report(seeds, "--seeds", "--format", "markdown", capsys=capsys)


def test_mean_and_deviation_for_programs(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thin, wide = json.loads(report(seeds, "--seeds", "--format", "json", capsys=capsys))["configurations"]
    deviation = float(np.std([0.75, 0.5], ddof=1))
    assert (thin["runs"], thin["top1"]["mean"]) == (2, 0.625)
    assert thin["top1"]["deviation"] == pytest.approx(deviation)
    assert wide["top1"] == {"mean": 0.625, "deviation": None}
    rows = list(csv.DictReader(io.StringIO(report(seeds, "--seeds", "--format", "csv", capsys=capsys))))
    assert [row["configuration"] for row in rows] == ["thin", "wide"]
    assert float(rows[0]["top1_deviation"]) == pytest.approx(deviation)
    assert rows[1]["top1_deviation"] == ""


def test_stages_that_have_not_finished_are_left_out_of_the_mean(
    seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = seeds / "thin-seed3" / "sparse"
    folder.mkdir(parents=True)
    (folder / "run.log").write_text(Log().start().test(0, 0.1, 0.5, 2.3).iterate(0, 30).text)
    text = report(seeds, "--seeds", capsys=capsys)
    assert "thin, sparse 2 62.50 ± 17.68 %" in " ".join(text.split())
    assert "thin-seed3, sparse: left out, it has not finished" in text


def test_what_differs_besides_the_seed_is_named(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = seeds / "thin-seed2" / "sparse" / "run.log"
    log.write_text(log.read_text().replace("base_lr: 0.01", "base_lr: 0.03"))
    assert "thin: its runs differ in more than the seed: base_lr" in report(seeds, "--seeds", capsys=capsys)


def test_runs_of_the_same_name_in_several_folders_are_one_configuration(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(seeds, tmp_path / "again")
    found = json.loads(report(tmp_path, "--seeds", "--format", "json", capsys=capsys))["configurations"]
    assert [(one["configuration"], one["runs"]) for one in found] == [("thin", 4), ("wide", 2)]
    text = report(tmp_path, "--seeds", capsys=capsys)
    assert "thin: runs with the same seed are counted together: " in text
    assert "again/thin-seed1" in text and "wide: runs" not in text


def test_a_loss_that_is_infinite_has_no_mean(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = seeds / "thin-seed2" / "sparse" / "run.log"
    log.write_text(re.sub(r"#0: loss = .*", "#0: loss = inf (* 1 = inf loss)", log.read_text()))
    thin = json.loads(report(seeds, "--seeds", "--format", "json", capsys=capsys))["configurations"][0]
    assert thin["loss"] is None and thin["top1"]["mean"] == 0.625


def test_one_view_at_a_time(seeds: Path) -> None:
    for others in (["--compare"], ["--compare", "--sort", "top1"]):
        with pytest.raises(UserError, match="--seeds and --compare"):
            main([str(seeds), "--seeds", *others])
    with pytest.raises(UserError, match="leave out --sort, or give --compare"):
        main([str(seeds), "--seeds", "--sort", "top1"])
