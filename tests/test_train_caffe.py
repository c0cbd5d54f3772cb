"""`train` with real Caffe: the whole way, and every way in which it is cut short."""

from __future__ import annotations

import html
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from digits_run import (
    ITERATIONS,
    PREFIX,
    STAGES,
    Trainer,
    end,
    is_alive,
    quantizing,
    recipe_of,
    tiny,
    wait_for,
    write_lmdbs,
)
from machine_files import TWO_H200, Machine
from small_stage import SmallStage, write_digits

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.snapshots import spoiled_snapshots
from caffe_jacinto.logs.discover import find_runs
from caffe_jacinto.logs.page_content import figure_rows
from caffe_jacinto.logs.processes import read_log
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.runs.lock import is_held
from caffe_jacinto.runs.watch import StageView

pytestmark = pytest.mark.caffe


@pytest.fixture(scope="module")
def trainer(caffe_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("start folder")
    write_lmdbs(folder)
    return Trainer(caffe_engine.info.executable, folder)


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> tuple[int, str]:
    """A run of all stages in ``run's folder``, and what it said."""
    return trainer.run(*tiny(), "--output", "run's folder", "--open")


RUN = "run's folder"


def test_all_stages_and_the_test_end_in_the_result_table(trainer: Trainer, whole: tuple[int, str]) -> None:
    code, said = whole
    assert code == 0, said
    assert trainer.states(RUN) == dict.fromkeys((*STAGES, "test"), "finished")
    folder = trainer.folder / RUN
    for stage in STAGES:
        names = {path.name for path in (folder / stage).iterdir()}
        assert {"train.prototxt", "val.prototxt", "deploy.prototxt", "solver.prototxt", "run.sh"} <= names
        assert {f"{PREFIX}_iter_{ITERATIONS}.caffemodel", f"{PREFIX}_iter_{ITERATIONS}.solverstate"} <= names
    assert (folder / "labels.txt").read_text().splitlines() == [f"digit_{n}" for n in range(10)]
    assert "engine: bvlc 1.0" in said
    assert re.search(r"stage 3/4 sparse: finished, 6 iterations in .*, top-1 .*, sparsity 0\.\d", said)
    assert "published" not in said  # ImageNet's results do not compare with ten digits


def test_the_page_of_the_run_has_the_figures_of_the_report(trainer: Trainer, whole: tuple[int, str]) -> None:
    page = trainer.folder / RUN / "report.html"
    assert f"page: {page.as_uri()}\n" in whole[1]
    text = html.unescape(page.read_text())
    assert '<span class="chip" id="state">finished</span>' in text
    assert '"reload":' not in text  # it does not load itself again
    (run,) = find_runs([trainer.folder / RUN])[0]
    assert [stage.name for stage in run.stages] == [*STAGES, "test"]
    for figure, cells in figure_rows(run):
        if figure == "log":
            continue  # a relative path in the run's page
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        assert f'<tr><th scope="row">{figure}</th>{row}</tr>' in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    (found,) = data["runs"]
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    assert [curve["name"] for curve in found["stages"][0]["curves"]] == [
        *("training loss", "top-1", "top-5", "loss", "learning rate")
    ]
    (pruning,) = (pruned for pruned in found["pruning"] if pruned["stage"] == "sparse")
    assert pruning["sparsity"][3][-1] > 0


def test_no_frozen_zero_moves_in_finetune(trainer: Trainer, whole: tuple[int, str]) -> None:
    sparse, fine = (
        read_weights(trainer.folder / RUN / stage / f"{PREFIX}_iter_{ITERATIONS}.caffemodel")
        for stage in ("sparse", "finetune")
    )
    convolutions = [name for name in sparse if sparse[name][0].ndim == 4]
    zeros = {name: sparse[name][0] == 0 for name in convolutions}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 100_000
    assert all(not fine[name][0][mask].any() for name, mask in zeros.items())
    assert any(not np.array_equal(fine[name][0], sparse[name][0]) for name in convolutions)


def test_older_snapshots_are_removed(trainer: Trainer, whole: tuple[int, str]) -> None:
    for stage in STAGES:
        found = {path.name for path in (trainer.folder / RUN / stage).glob("*_iter_2.*")}
        assert not found, found


def test_run_sh_does_the_same_by_hand_from_anywhere(trainer: Trainer, whole: tuple[int, str]) -> None:
    script = trainer.folder / RUN / "test" / "run.sh"
    before = trainer.log(RUN, "test")
    subprocess.run(["sh", str(script)], cwd="/", check=True)
    results = [re.findall(r"\] (accuracy/top1 = .*)", text) for text in (before, trainer.log(RUN, "test"))]
    assert results[1] == results[0] * 2


def test_a_finished_run_is_not_run_again(trainer: Trainer, whole: tuple[int, str]) -> None:
    logs = [trainer.log(RUN, stage) for stage in STAGES]
    code, said = trainer.run("--resume", RUN)
    assert (code, "this run has finished" in said) == (0, True)
    assert [trainer.log(RUN, stage) for stage in STAGES] == logs
    code, said = trainer.run(*tiny(), "--output", RUN)
    assert code == 2
    assert f"python -m caffe_jacinto.train --resume {shlex.quote(RUN)}" in said


def test_status_from_elsewhere(trainer: Trainer, whole: tuple[int, str]) -> None:
    elsewhere = Trainer(Path(), Path("/"))
    code, said = elsewhere.run("--status", str(trainer.folder / RUN))
    assert code == 0
    assert said.splitlines()[0].endswith(": finished")
    assert "initial: finished, test: top-1" in said
    assert re.search(r"sparse: finished, test: .*, sparsity 0\.\d+", said)
    assert said.splitlines()[-1].startswith("tables: python -m caffe_jacinto.report ")


@pytest.mark.parametrize(
    ("stages", "moment"),
    [
        (("initial",), "Initializing net"),
        (("initial", "l1reg"), "_iter_4.solverstate"),
        (("sparse",), "_iter_2.caffemodel"),
        (("finetune",), "Iteration 5"),
        (("initial",), "Recalibrating"),
    ],
)
def test_both_killed_and_resumed(
    trainer: Trainer, whole: tuple[int, str], stages: tuple[str, ...], moment: str
) -> None:
    stage, run = stages[-1], f"killed in {stages[-1]} at {moment}"
    last = 8
    arguments = tiny(recipe_of(trainer.folder, *stages), stages, **{stage: last})
    if stage in ("sparse", "finetune"):
        before = STAGES[STAGES.index(stage) - 1]
        weights = f"{RUN}/{before}/{PREFIX}_iter_{ITERATIONS}.caffemodel"
        arguments += ["--set", f"stages.{stage}.start=", "--set", f'stages.{stage}.weights="{weights}"']
    with trainer.running(*arguments, "--output", run) as process:
        wait_for(lambda: moment in trainer.log(run, stage), moment)
        caffe = trainer.pid(run, stage)
        os.kill(caffe, signal.SIGSTOP)  # it stays at this moment while we look at it
        process.kill()
    assert is_alive(caffe)
    code, said = trainer.run("--resume", run)
    assert code == 2
    assert f"process {caffe} (" in said
    assert "kill -INT" in said
    end(caffe)
    logs = {name: trainer.log(run, name) for name in stages}
    assert "to resume:" in trainer.run("--status", run)[1]
    code, said = trainer.run("--resume", run)
    assert code == 0, said
    assert set(trainer.states(run).values()) == {"finished"}
    assert all(trainer.log(run, name) == logs[name] for name in stages[:-1])
    part = trainer.log(run, stage)[len(logs[stage]) :]
    iterations = [int(number) for number in re.findall(r"Iteration (\d+) \(", part)]
    resumed = re.search(r"resumes at iteration (\d+)", said)
    assert iterations == list(range(int(resumed[1]) if resumed else 0, last))


def test_second_train_is_refused_and_sigterm_stops_with_a_snapshot(trainer: Trainer) -> None:
    with trainer.running(*tiny(initial=2000), "--output", "stopped") as process:
        wait_for(lambda: "Iteration 3 (" in trainer.log("stopped", "initial"), "iteration 3")
        code, said = trainer.run("--resume", "stopped")
        assert (code, f"train is already running there (process {process.pid})" in said) == (2, True)
        assert ": running" in trainer.run("--status", "stopped")[1].splitlines()[0]
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "to resume: python -m caffe_jacinto.train --resume stopped" in said
    assert trainer.states("stopped")["initial"] == "stopped"
    newest = max(
        int(path.stem.rsplit("_", 1)[1])
        for path in (trainer.folder / "stopped/initial").glob("*.solverstate")
    )
    last = max(int(n) for n in re.findall(r"Iteration (\d+) \(", trainer.log("stopped", "initial")))
    assert newest in (last, last + 1)


def test_truncated_snapshots_are_passed_over(trainer: Trainer) -> None:
    folder = trainer.folder / "stopped/initial"
    numbers = sorted(int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("*.solverstate"))
    newest = folder / f"{PREFIX}_iter_{numbers[-1]}.caffemodel"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with trainer.running("--resume", "stopped") as process:
        before = len(trainer.log("stopped", "initial"))
        wait_for(lambda: "] Iteration" in trainer.log("stopped", "initial")[before:], "resuming")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"snapshot of iteration {numbers[-1]} is passed over" in said
    assert f"resumes at iteration {numbers[-2]}" in said
    assert "reads its training LMDB from the beginning again" in said


def test_a_killed_caffe_fails_the_stage(trainer: Trainer) -> None:
    with trainer.running(*tiny(initial=2000), "--output", "killed caffe") as process:
        wait_for(lambda: "Iteration 3 (" in trainer.log("killed caffe", "initial"), "iteration 3")
        os.kill(trainer.pid("killed caffe", "initial"), signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stage initial failed: killed by SIGKILL" in said
    assert trainer.states("killed caffe")["l1reg"] == "waiting"


def test_a_stage_that_quantizes_is_stopped_and_begins_again(trainer: Trainer) -> None:
    recipe = quantizing(trainer.folder, 'scheme = "power2"\nsensitivity = true')
    with trainer.running(*tiny(recipe, ("initial",)), "--output", "eight") as process:
        wait_for(lambda: "Quantizing: calibrate" in trainer.log("eight", "eight"), "calibration")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping: ending eight" in said and "stopped in eight; to resume: " in said
    folder = trainer.folder / "eight/eight"
    assert trainer.states("eight")["eight"] == "stopped" and not (folder / "quantization.json").exists()
    code, said = trainer.run("--resume", "eight")
    assert code == 0, said
    assert "test: already finished" in said and "by power2" in said
    record = json.loads((folder / "quantization.json").read_text())
    assert record["calibration_images"] == 320
    assert any(unit.get("top1_change_alone") is not None for unit in record["layers"])
    top1 = re.search(r"stage 2/2 eight: top-1 ([\d.]+), top-5 [\d.]+, loss", said)
    assert top1 and float(top1[1]) == pytest.approx(record["accuracy"]["quantized"]["top1"], rel=1e-3)
    assert "--backend caffe --caffe" in (folder / "run.sh").read_text()
    with_ranges_that_move = quantizing(trainer.folder, 'scheme = "caffe_jacinto"')
    code, said = trainer.run(*tiny(with_ranges_that_move, ("initial",)), "--output", "refused")
    assert (code, 'scheme: "caffe_jacinto" is for PyTorch and caffe-jacinto only' in said) == (2, True)


def test_an_interrupted_caffe_is_not_taken_for_finished(trainer: Trainer) -> None:
    with trainer.running(*tiny(initial=2000), "--output", "interrupted caffe") as process:
        wait_for(lambda: "Iteration 3 (" in trainer.log("interrupted caffe", "initial"), "iteration 3")
        os.kill(trainer.pid("interrupted caffe", "initial"), signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert "Optimization Done." in trainer.log("interrupted caffe", "initial")
    assert process.returncode == 1
    assert "training ended early" in said


@pytest.mark.parametrize("damage", ["cut off", "deleted"])
def test_a_finished_stage_whose_weights_are_damaged_goes_on_from_its_snapshot(
    trainer: Trainer, damage: str
) -> None:
    run = f"{damage} weights"
    only = ("initial", "l1reg")
    with trainer.running(
        *tiny(recipe_of(trainer.folder, *only), only, l1reg=2000), "--output", run
    ) as process:
        wait_for(lambda: "Iteration 3 (" in trainer.log(run, "l1reg"), "iteration 3 of l1reg")
        child = trainer.pid(run, "l1reg")
        process.kill()
        end(child)
    shutil.rmtree(trainer.folder / run / "l1reg")
    weights = trainer.folder / run / "initial" / f"{PREFIX}_iter_{ITERATIONS}.caffemodel"
    content = weights.read_bytes()
    if damage == "deleted":
        weights.unlink()
    else:
        weights.write_bytes(content[: len(content) // 2])
    with trainer.running("--resume", run) as process:
        wait_for(lambda: "Iteration 3 (" in trainer.log(run, "l1reg"), "iteration 3 of l1reg")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert "stage initial had finished, but its weights" in said
    assert "initial: 6 iterations, resumes at iteration 4" in said
    assert trainer.states(run)["initial"] == "finished"
    assert read_weights(weights).keys()


def test_an_interrupted_hand_over_is_told_as_such(trainer: Trainer) -> None:
    with trainer.running(
        *tiny(recipe_of(trainer.folder, "initial"), ("initial",)), "--output", "late stop"
    ) as process:
        wait_for(lambda: "Recalibrating" in trainer.log("late stop", "initial"), "recalibration")
        os.kill(trainer.pid("late stop", "initial"), signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "before the stage was marked complete" in said
    assert "to resume: python -m caffe_jacinto.train --resume 'late stop'" in said
    assert trainer.run("--resume", "late stop")[0] == 0


def test_a_record_that_cannot_be_written_ends_the_run_and_its_caffe(trainer: Trainer) -> None:
    with trainer.running(*tiny(), "--output", "no record") as process:
        wait_for(lambda: "Iteration 3 (" in trainer.log("no record", "initial"), "iteration 3")
        record = trainer.folder / "no record/run.json"
        kept = record.rename(trainer.folder / "no record/kept")
        record.mkdir()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"run\.json.*: Is a directory; fix that, then resume: python -m .*--resume", said), said
    assert not is_held(trainer.folder / "no record")
    record.rmdir()
    kept.rename(record)
    assert trainer.run("--resume", "no record")[0] == 0


def test_a_loss_that_is_not_a_number_stops_the_stage(trainer: Trainer) -> None:
    wild = ("--set", "stages.initial.solver.base_lr=1e30", "--set", 'stages.initial.solver.lr_policy="fixed"')
    code, said = trainer.run(*tiny(initial=2000), *wild, "--output", "wild")
    assert code == 1
    assert re.search(r"stage initial failed: the loss is (not a number|stuck at 87.3365)", said), said
    assert "good" in said
    assert "stages.initial.solver.base_lr=1e+29" in said


def test_snapshots_of_weights_that_are_not_numbers_are_not_kept(trainer: Trainer) -> None:
    wild = ("--set", "stages.initial.solver.base_lr=1e30", "--set", 'stages.initial.solver.lr_policy="fixed"')
    rare = (
        "--set",
        "stages.initial.solver.display=5000",
        "--set",
        "stages.initial.solver.test_interval=5000",
    )
    code, said = trainer.run(*tiny(initial=5000), *wild, *rare, "--output", "spoiled")
    assert code == 1
    assert (
        "stage initial failed: in the snapshot of iteration 2, now removed, weights are not numbers" in said
    )
    assert "no snapshot before it is good" in said
    assert "to resume: python -m caffe_jacinto.train --resume spoiled" in said
    folder = trainer.folder / "spoiled/initial"
    assert spoiled_snapshots(folder / PREFIX, Dialect.BVLC) == []


def test_the_stepper_writes_no_weights_that_are_not_numbers(trainer: Trainer, whole: tuple[int, str]) -> None:
    only = ("sparse",)
    weights = f"{RUN}/l1reg/{PREFIX}_iter_{ITERATIONS}.caffemodel"
    changes = {"start": "", "weights": f'"{weights}"', "solver.base_lr": "3e38", "solver.snapshot": "1"}
    settings = [word for key, value in changes.items() for word in ("--set", f"stages.sparse.{key}={value}")]
    code, said = trainer.run(*tiny(recipe_of(trainer.folder, *only), only), *settings, "--output", "stepped")
    assert code == 1
    message = rf"stage sparse failed: {PREFIX}_iter_1.caffemodel is not written: weights of layer \S+ are not"
    assert re.search(message, said), said
    assert "to resume: python -m caffe_jacinto.train --resume stepped" in said
    assert not list((trainer.folder / "stepped/sparse").glob("*.caffemodel"))


def test_a_loss_that_hovers_below_its_largest_value_is_named(caffe_engine: Engine, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, write_digits(tmp_path / "lmdb", images=320))
    stage.solver(base_lr=100, lr_policy='"fixed"', display=1, max_iter=30, test_interval=100, snapshot=100)
    network = tmp_path / "train.prototxt"
    network.write_text(network.read_text().replace('top: "loss" }', 'top: "loss" loss_weight: 20 }'))
    view = StageView()
    view.feed(
        stage.run([[str(caffe_engine.info.executable), "train", "-solver", "solver.prototxt"]]).encode()
    )
    assert "the loss has been between 1520 and 1746.73 since iteration" in view.doubts()["high"]
    assert (
        read_log(tmp_path / "run.log")[0].log.figures().notes[0].startswith("the loss has been between 1520")
    )


def test_caffes_fatal_line_is_the_message(trainer: Trainer) -> None:
    # In the place of a snapshot stands a folder: Caffe itself finds out.
    code, said = trainer.run(*tiny(), "--output", "fatal", "--dry-run")
    assert code == 0, said
    (trainer.folder / f"fatal/initial/{PREFIX}_iter_2.caffemodel").mkdir()
    code, said = trainer.run("--resume", "fatal")
    assert code == 1
    assert "stage initial failed: Check failed" in said
    assert "log: fatal/initial/run.log" in said
    assert trainer.states("fatal")["l1reg"] == "waiting"
    assert "Check failed" in trainer.run("--status", "fatal")[1]


def test_silence_is_reported_without_a_terminal(trainer: Trainer) -> None:
    sooner = (
        "import sys; from caffe_jacinto.common.errors import run_command\n"
        "import caffe_jacinto.runs.driver as d, caffe_jacinto.runs.progress as p\n"
        "from caffe_jacinto.train import main\n"
        "d.SILENCE_SECONDS = p.SILENT_SECONDS = 1.0; p.PLAIN_SECONDS = 0.1; sys.exit(run_command('t', main))"
    )
    process = trainer.start(*tiny(initial=200), "--output", "silent", program=("-c", sooner))
    try:
        wait_for(lambda: "Iteration 3 (" in trainer.log("silent", "initial"), "iteration 3")
        stopped = trainer.pid("silent", "initial")
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(12)
        os.kill(stopped, signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    silences = [float(found) for found in re.findall(r"last line ([\d.]+) s ago", said)]
    assert 1 <= len(silences) <= 4, said
    assert all(later >= 1.9 * earlier for earlier, later in pairwise(silences)), silences


def test_a_lost_terminal_does_not_end_the_run(trainer: Trainer) -> None:
    master, slave = pty.openpty()
    process = trainer.start(
        *tiny(), "--output", "lost", stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""
    while b"stage 1/4" not in shown:
        shown += os.read(master, 4096)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert set(trainer.states("lost").values()) == {"finished"}


def test_dry_run_writes_every_file_and_runs_nothing(trainer: Trainer) -> None:
    code, said = trainer.run(*tiny(), "--output", "dry", "--dry-run")
    assert code == 0, said
    for stage in STAGES:
        folder = trainer.folder / "dry" / stage
        assert {path.suffix for path in folder.iterdir()} == {".prototxt", ".sh"}
        assert f"dry/{stage}/solver.prototxt" in said
    assert (trainer.folder / "dry/test/run.sh").exists()
    assert "caffe_jacinto.engines.pycaffe.stepper" in said


def test_dry_run_shows_what_it_can_and_all_that_is_wrong(trainer: Trainer) -> None:
    missing = ("--set", "data.train_lmdb=nowhere")
    code, said = trainer.run(*tiny(), *missing, "--output", "dry without data", "--dry-run")
    assert code == 2
    assert "LMDB nowhere does not exist" in said
    assert (trainer.folder / "dry without data/finetune/solver.prototxt").exists()
    wrong = (*missing, "--set", "training.iter_size=3")
    code, said = trainer.run(*tiny(), *wrong, "--output", "refused", "--dry-run")
    assert code == 2
    assert "LMDB nowhere does not exist" in said
    assert "does not divide" in said
    assert not (trainer.folder / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "data.train_lmdb=nowhere"), "LMDB nowhere does not exist"),
        (("--set", "data.val_lmdb=digits"), "digits is not an LMDB"),
        (("-gpu", "0,1"), "GPUs 0,1 requested, but "),
        (("--set", "training.batch_size=1024"), "holds 320 images, and one batch alone needs 1,024"),
        (("--set", "data.num_classes=5"), "5 classes"),
        (("--set", "network.crop_size=64"), "smaller than the crop of 64x64"),
        (("--set", "training.iter_size=3"), "does not divide"),
        (
            ("--set", "stages.initial.weights=none.caffemodel"),
            "the start weights none.caffemodel do not exist",
        ),
        (("--set", "data.labels=none.txt"), "class names none.txt"),
        (("--set", "stages.l1reg.start=nothing"), 'no earlier stage produces the weights of "nothing"'),
        (("--engine", "caffe-jacinto"), "--engine caffe-jacinto"),
        (("--set", "stages.sparse.sparse.step_iter=1000"), "stage sparse: no weight would become zero"),
    ],
)
def test_checked_before_anything_is_written(
    trainer: Trainer, arguments: tuple[str, ...], message: str
) -> None:
    code, said = trainer.run(*tiny(), *arguments, "--output", "refused")
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (trainer.folder / "refused").exists()


def test_gpus_that_nothing_installed_can_use_are_refused_with_the_cure(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(tmp_path)
    machine.nvidia_smi(TWO_H200, "12.4", "9.0\n9.0")
    monkeypatch.setenv("PATH", f"{machine.bin}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, said = trainer.run(*tiny(), "--gpus", "auto", "--output", "refused")
    assert code == 2
    (error,) = [line for line in said.splitlines() if "error" in line]
    assert re.search(
        r"GPUs 0,1 requested, but \S+/caffe is built for the CPU only: leave the GPUs out", error
    )
    assert "torch==2.13.0+cu126" in error or "train with --engine torch" in error
    assert not (trainer.folder / "refused").exists()
    code, said = trainer.run(*tiny(), "--dry-run", "--output", "on_the_cpu")
    assert "note: of 2 NVIDIA GPUs (NVIDIA H200) none is used; --gpus all takes them all" in said


def test_disk_space_is_checked(trainer: Trainer) -> None:
    many = ("--set", "stages.initial.solver.max_iter=100000", "--set", "stages.initial.solver.snapshot=1")
    code, said = trainer.run(*tiny(), *many, "--keep", "1000000", "--output", "refused")
    assert code == 2
    assert "not enough space on the disk" in said


def test_all_problems_come_at_once(trainer: Trainer) -> None:
    code, said = trainer.run(*tiny(), "--set", "data.train_lmdb=nowhere", "-gpu", "0", "--output", "refused")
    assert code == 2
    assert "LMDB nowhere does not exist" in said
    assert "GPU 0 requested, but " in said


def test_start_weights_must_fit(trainer: Trainer, whole: tuple[int, str]) -> None:
    weights = f"{RUN}/initial/{PREFIX}_iter_{ITERATIONS}.caffemodel"
    start = ("--set", f'stages.initial.weights="{weights}"')
    code, said = trainer.run(*tiny(), *start, "--set", "data.num_classes=12", "--output", "head", "--dry-run")
    assert code == 0, said
    assert "stage initial: layer fc12: starts at random values: not in the weight file" in said
    assert "stage initial: layer fc10: in the start weights, but not in the network; not used" in said
    net = messages(Dialect.BVLC).NetParameter.FromString((trainer.folder / weights).read_bytes())
    convolution = next(layer for layer in net.layer if layer.name.startswith("conv1a") and layer.blobs)
    convolution.blobs[0].shape.dim[0] += 1
    convolution.blobs[0].data.extend([0.0] * (len(convolution.blobs[0].data) // 32))
    (trainer.folder / "other.caffemodel").write_bytes(net.SerializeToString())
    code, said = trainer.run(
        *tiny(), "--set", "stages.initial.weights=other.caffemodel", "--output", "refused"
    )
    assert code == 2
    assert "do not fit the network: conv1a" in said


def test_start_weights_of_images_with_other_channels(trainer: Trainer, whole: tuple[int, str]) -> None:
    weights = trainer.folder / RUN / f"initial/{PREFIX}_iter_{ITERATIONS}.caffemodel"
    net = messages(Dialect.BVLC).NetParameter.FromString(weights.read_bytes())
    blob = next(layer for layer in net.layer if layer.name == "conv1a").blobs[0]
    blob.shape.dim[1] = 1
    del blob.data[len(blob.data) // 3 :]
    (trainer.folder / "grey.caffemodel").write_bytes(net.SerializeToString())
    code, said = trainer.run(
        *tiny(), "--set", "stages.initial.weights=grey.caffemodel", "--output", "refused"
    )
    assert code == 2
    assert "conv1a: blob 0 is 32 x 1 x 5 x 5 in the weight file, 32 x 3 x 5 x 5 in the network" in said


def test_a_data_set_that_does_not_match_the_network_is_noted(trainer: Trainer) -> None:
    digits = trainer.folder / "digits"
    lines = [line for line in (digits / "train.txt").read_text().splitlines() if int(line.split()[1]) < 3]
    (trainer.folder / "three.txt").write_text("\n".join(lines[::6]) + "\n")
    (trainer.folder / "three_labels.txt").write_text("zero\none\ntwo\n")
    create_lmdb(
        [
            *(
                "--images",
                str(digits / "train"),
                "--list",
                str(trainer.folder / "three.txt"),
                "--shuffle",
                "1",
            ),
            *("--labels", str(trainer.folder / "three_labels.txt"), "--size", "256"),
            *("--output", str(trainer.folder / "three_lmdb")),
        ]
    )
    code, said = trainer.run(*tiny(), "--set", "data.train_lmdb=three_lmdb", "--output", "three", "--dry-run")
    assert code == 0, said
    notes = re.findall(r"note: (.*)", said)
    assert {note for note in notes if "three_lmdb" in note} == {
        "LMDB three_lmdb holds images of 3 classes (labels 0, 1, 2), and the network has 10: if there are no "
        "other classes, set data.num_classes to 3",
        "the network sees 32x32 pixels (network.crop_size) of the 256x256 of an image in three_lmdb, 1.6% of "
        "it: make the LMDB with smaller images (create_lmdb --size 37), or enlarge the crop",
        "three_lmdb/labels.txt names 3 classes, and data.num_classes is 10",
    }


def test_a_target_out_of_reach_is_warned_of_and_trained_for(trainer: Trainer) -> None:
    code, said = trainer.run(
        *tiny(), "--set", "stages.sparse.sparse.step_factor=0.05", "--output", "out of reach", "--dry-run"
    )
    assert code == 0, said
    assert "warning: stage sparse: the sparsity cannot reach the target of 0.8: 5 thresholds before" in said
    assert "stages.sparse.solver.max_iter=18 or stages.sparse.sparse.step_factor=0.161 would do" in said


def test_the_mean_file_must_be_there_and_of_the_images_size(trainer: Trainer) -> None:
    def refused() -> str:
        code, said = trainer.run(
            *("imagenet_bvlc_alexnet", "--set", "data.mean_file=mean.binaryproto"),
            *("--set", "network.crop_size=32"),
            *("--train-lmdb", "train_lmdb", "--val-lmdb", "val_lmdb", "--output", "refused"),
        )
        assert code == 2
        return said

    made_by = "python -m caffe_jacinto.create_lmdb --mean train_lmdb mean.binaryproto"
    assert f"mean.binaryproto (data.mean_file) does not exist; make it: {made_by}" in refused()
    path = trainer.folder / "mean.binaryproto"
    path.write_bytes(b"\xff")
    assert "mean.binaryproto is not a mean file" in refused()
    blob = messages(Dialect.BVLC).BlobProto(num=1, channels=3, height=30, width=32, data=[0.5] * 2880)
    path.write_bytes(blob.SerializeToString())
    said = refused()
    assert "is 3 x 30 x 32, the images in train_lmdb are 3 x 32 x 32 (channels x height x width)" in said
    assert f"make it again: {made_by} --force" in said
    path.unlink()
    create_lmdb(["--mean", str(trainer.folder / "train_lmdb"), str(path)])
    assert "mean.binaryproto" not in refused()
