"""`train --engine torch`: all stages in both dialects, stops and resumes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from digits_run import (
    ITERATIONS,
    PREFIX,
    STAGES,
    Trainer,
    end,
    quantizing,
    recipe_of,
    tiny,
    wait_for,
    write_lmdbs,
)

from caffe_jacinto.caffemodel.storage import read_weights

pytestmark = pytest.mark.caffe


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("start folder")
    write_lmdbs(folder)
    return Trainer(None, folder)


def weights(trainer: Trainer, run: str, stage: str, at: int = ITERATIONS) -> dict[str, list[np.ndarray]]:
    return read_weights(trainer.folder / run / stage / f"{PREFIX}_iter_{at}.caffemodel")


@pytest.mark.parametrize("dialect", ["bvlc", "caffe_jacinto"])
def test_all_stages_in_both_dialects(trainer: Trainer, dialect: str) -> None:
    run = f"run in {dialect}"
    code, said = trainer.run(*tiny(), "--dialect", dialect, "--output", run)
    assert code == 0, said
    assert trainer.states(run) == dict.fromkeys((*STAGES, "test"), "finished")
    assert re.search(rf"engine: torch 2\.\S+ at \S+, dialect {dialect}, on the CPU", said)
    assert re.search(r"stage 3/4 sparse: finished, 6 iterations in .*, top-1 .*, sparsity 0\.[1-9]", said)
    assert "published" not in said  # ImageNet's results do not compare with ten digits
    sparse, fine = weights(trainer, run, "sparse"), weights(trainer, run, "finetune")
    zeros = {name: sparse[name][0] == 0 for name in sparse if sparse[name][0].ndim == 4}
    assert any(mask.sum() > 100 for mask in zeros.values())
    for name, mask in zeros.items():
        assert not fine[name][0][mask].any(), f"zeros of {name} moved in finetune"


NARROW = """
import runpy
from caffe_jacinto.networks import jacintonet11
assert jacintonet11.PAIR_OUTPUTS == (64, 128, 256, 512)
jacintonet11.PAIR_OUTPUTS = (32, 32, 32, 32)
runpy.run_module("caffe_jacinto.train", run_name="__main__", alter_sys=True)
"""
"""`python -m caffe_jacinto.train` with a JacintoNet11 of few channels, which trains in seconds."""


def test_a_new_recipe_trains_as_it_is(trainer: Trainer) -> None:
    """`train --new` on 128 digits of 12x12 pixels: the result has learned them and is sparse."""
    lines = (trainer.folder / "digits" / "train.txt").read_text().splitlines()
    (trainer.folder / "few.txt").write_text("\n".join(lines[:: len(lines) // 128][:128]) + "\n")
    making = ["--images", "digits/train", "--list", "few.txt", "--size", "12", "--output", "few_train_lmdb"]
    lmdbs = ["--train-lmdb", "few_train_lmdb", "--val-lmdb", "few_train_lmdb"]
    for command in (
        ["-m", "caffe_jacinto.create_lmdb", *making, "--labels", "digits/labels.txt", "--shuffle", "1"],
        ["-m", "caffe_jacinto.train", "--new", "few.toml", *lmdbs],
        ["-c", NARROW, "few.toml", "--engine", "torch", "--output", "new"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=trainer.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert trainer.states("new") == dict.fromkeys((*STAGES, "test", "quantize"), "finished")
    sparsity = re.search(r"stage 3/5 sparse: finished, .*, sparsity (0\.\d+)", done.stdout)
    top1 = re.search(r"stage 4/5 finetune: finished, .*, top-1 ([\d.]+)", done.stdout)
    assert sparsity is not None
    assert float(sparsity[1]) >= 0.8
    assert top1 is not None
    assert float(top1[1]) > 0.8


@pytest.mark.parametrize("dialect", ["bvlc", "caffe_jacinto"])
def test_killed_in_the_schedule_and_resumed_it_ends_at_the_same_weights(
    trainer: Trainer, dialect: str
) -> None:
    recipe = recipe_of(trainer.folder, "initial", "l1reg", "sparse")
    taught = ["--set", "stages.sparse.distill=true"]
    arguments = [*tiny(recipe, ("initial", "l1reg", "sparse"), sparse=40), *taught, "--dialect", dialect]
    assert trainer.run(*arguments, "--output", f"{dialect} whole")[0] == 0
    run = f"{dialect} killed"
    with trainer.running(*arguments, "--output", run) as process:
        wait_for(lambda: "iter_4.solverstate" in trainer.log(run, "sparse"), "snapshot in the schedule")
        process.kill()
    end(trainer.pid(run, "sparse"))
    code, said = trainer.run("--resume", run)
    assert code == 0, said
    assert re.search(r"stage 3/3 sparse: 40 iterations, resumes at iteration [1-3]?[0-9]\b", said)
    assert "from the beginning again" not in said
    whole, resumed = (weights(trainer, name, "sparse", 40) for name in (f"{dialect} whole", run))
    for name in whole:
        for one, other in zip(whole[name], resumed[name], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_a_stage_quantizes_after_the_test(trainer: Trainer) -> None:
    table = 'batches = 4\nbits_of = { fc10 = 16 }\nkeep_float = ["conv1a"]'
    recipe = quantizing(trainer.folder, table)
    code, said = trainer.run(*tiny(recipe, ("initial",)), "--output", "eight")
    assert code == 0, said
    assert list(trainer.states("eight").items()) == [
        (name, "finished") for name in ("initial", "test", "eight")
    ]
    folder = trainer.folder / "eight" / "eight"
    record = json.loads((folder / "quantization.json").read_text())
    bits = {
        unit["name"]: unit["weights"] and unit["weights"]["bits"]
        for unit in record["layers"]
        if "weights" in unit
    }
    assert (bits["conv1a"], bits["conv1b"], bits["fc10"]) == (None, 8, 16)
    assert record["accuracy"]["images"] == 50 and record["calibration_images"] == 200
    assert (folder / "table.txt").read_text() in said
    assert "stage 2/2 eight: " in said and "RUN" not in said
    quantized, before = (100 * record["accuracy"][which]["top1"] for which in ("quantized", "float"))
    assert re.search(rf"eight, eight \(.*8 bits\) +{quantized:.2f} %", said)
    change = f"{quantized - before:+.2f}"
    assert re.search(rf"(?m)^eight .* {re.escape(change)} ", said)
    # By hand it is the same command, and a new train does not begin it again.
    script = (folder / "run.sh").read_text()
    assert "caffe_jacinto.quantize eight/initial --calibrate train_lmdb --val val_lmdb" in script
    assert "--bits-of=fc10=16 --batches 4" in script.replace("--keep-float=conv1a ", "")
    status = subprocess.run(
        [sys.executable, "-m", "caffe_jacinto.train", "--status", "eight"],
        cwd=trainer.folder, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"eight: finished, top-1 {record['accuracy']['quantized']['top1']:.4g}" in status

    (folder / "quantization.json").unlink()
    changed = trainer.record("eight")
    changed["stages"]["eight"]["state"] = "running"
    (trainer.folder / "eight" / "run.json").write_text(json.dumps(changed))
    code, said = trainer.run("--resume", "eight")
    assert code == 0, said
    assert "stage 1/2 initial: already finished" in said
    again = json.loads((folder / "quantization.json").read_text())
    assert again == record


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('keep_float = ["conv1"]', "keep_float: conv1: the network has no such layer; "),
        ("bits_of = { 'conv1a/bn' = 4 }", "bits_of: conv1a/bn: the network has no such layer"),
    ],
)
def test_what_cannot_be_quantized_is_said_before_the_training(
    trainer: Trainer, table: str, says: str
) -> None:
    code, said = trainer.run(*tiny(quantizing(trainer.folder, table), ("initial",)), "--output", "refused")
    assert code == 2
    assert f"error: stages.eight.quantize.{says}" in said
    assert not (trainer.folder / "refused").exists()


def test_bf16_is_used_by_every_command_and_kept_on_resume(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial")
    options = [*tiny(recipe, ("initial",)), "--output", "bf16", "--precision", "bf16"]
    code, said = trainer.run(*options, "--dry-run")
    assert code == 0, said
    assert "dialect bvlc, bf16, on the CPU" in said
    (trainer.folder / "bf16" / "report.html").mkdir()  # a page that cannot be written stops no training
    code, said = trainer.run("--resume", "bf16")
    assert code == 0, said
    assert said.count("report.html cannot be written (Is a directory); training goes on") == 1
    assert "dialect bvlc, bf16, on the CPU" in said
    for part in ("initial", "test"):
        assert "bf16" in trainer.log("bf16", part), part
    code, said = trainer.run("--resume", "bf16", "--precision", "fp32")
    assert code == 2
    assert "--resume continues with the run's own recipe" in said


def test_masks_that_are_missing_or_of_another_iteration_are_passed_over(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial", "sparse")
    arguments = tiny(recipe, ("initial", "sparse"), initial=2, sparse=5_000)
    arguments += ["--set", 'stages.sparse.start="initial"', "--keep", "3", "--output", "masks"]
    stage = trainer.folder / "masks/sparse"
    with trainer.running(*arguments) as process:
        wait_for(lambda: "iter_4.solverstate" in trainer.log("masks", "sparse"), "snapshot")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130

    def resumed() -> tuple[int, str]:
        """The iteration that a resume begins at, and what it says."""
        with trainer.running("--resume", "masks") as process:
            size = len(trainer.log("masks", "sparse"))
            wait_for(lambda: "] Iteration" in trainer.log("masks", "sparse")[size:], "iteration")
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0]
        found = re.search(r"sparse: 5,000 iterations, resumes at iteration (\d+)", said)
        return int(found[1]) if found else 0, said

    def with_masks() -> list[int]:
        return sorted(int(path.name.split("_")[-1].split(".")[0]) for path in stage.glob("*.masks.npz"))

    oldest, *_, newest = with_masks()
    masks = {at: stage / f"{PREFIX}_iter_{at}.masks.npz" for at in (oldest, newest)}
    masks[newest].write_bytes(masks[oldest].read_bytes())
    at, said = resumed()
    assert oldest <= at < newest
    assert f"snapshot of iteration {newest} is passed over: " in said
    assert f"iter_{newest}.masks.npz is of {PREFIX}_iter_{oldest}, and does not belong to" in said
    shutil.rmtree(trainer.folder / "masks/initial")
    at, said = resumed()
    assert at > 0, said  # the weights of a finished stage are not needed any more
    assert "initial: already finished" in said
    for path in stage.glob("*.masks.npz"):
        path.unlink()
    at, said = resumed()
    assert at == 0, said
    assert "initial had finished, but its weights" in said
    assert "masks.npz is missing, which says which zeros are frozen" in said


def test_snapshots_without_their_average_are_passed_over(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial")
    arguments = tiny(recipe, ("initial",), initial=5_000)
    arguments += ["--set", "stages.initial.solver.ema_decay=0.8", "--keep", "3", "--output", "averages"]
    stage = trainer.folder / "averages/initial"
    with trainer.running(*arguments) as process:
        wait_for(lambda: "iter_4.solverstate" in trainer.log("averages", "initial"), "snapshot")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130

    def resumed_without(lost: list[Path]) -> str:
        """What a resume says without these averages, the newest of which is the last."""
        for path in lost:
            path.unlink()
        with trainer.running("--resume", "averages") as process:
            size = len(trainer.log("averages", "initial"))
            wait_for(lambda: "] Iteration" in trainer.log("averages", "initial")[size:], "iteration")
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0]
        assert f"{lost[-1].name} is missing" in said
        return said

    def averages() -> list[Path]:
        return sorted(stage.glob("*.ema.caffemodel"), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))

    assert len(averages()) > 1
    assert "resumes at iteration" in resumed_without(averages()[-1:])
    assert "resumes at iteration" not in resumed_without(averages())


def test_an_lmdb_that_was_replaced_is_noticed(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial", "l1reg")
    own = trainer.folder / "own_lmdb"
    shutil.copytree(trainer.folder / "train_lmdb", own)
    arguments = tiny(recipe, ("initial", "l1reg"), initial=4, l1reg=2)
    arguments += ["--set", "data.train_lmdb=own_lmdb", "--output", "replaced"]
    with trainer.running(*arguments) as process:
        wait_for(lambda: "] Iteration 0" in trainer.log("replaced", "initial"), "iteration")
        own.rename(trainer.folder / "former")
        shutil.copytree(trainer.folder / "val_lmdb", own)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    words = "LMDB own_lmdb (data.train_lmdb) is not the one that the run was started with: it had 320 images"
    assert words in said
    assert trainer.states("replaced") == {"initial": "finished", "l1reg": "failed", "test": "waiting"}
    code, said = trainer.run("--resume", "replaced")
    assert code == 2
    assert words in said
    assert "and has 50 images" in said
    assert "--resume replaced --accept-data" in said
    code, said = trainer.run("--resume", "replaced", "--accept-data")
    assert code == 0, said
    assert trainer.record("replaced")["data"]["train_lmdb"]["images"] == 50


def test_ctrl_c_writes_a_snapshot_that_it_goes_on_from(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial")
    arguments = tiny(recipe, ("initial",), initial=100_000)
    with trainer.running(*arguments, "--output", "stopped") as process:
        wait_for(lambda: "Iteration 3," in trainer.log("stopped", "initial"), "fourth iteration")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "--resume stopped" in said
    assert trainer.states("stopped")["initial"] == "stopped"
    assert list((trainer.folder / "stopped/initial").glob("*.solverstate"))
    assert "dialect bvlc" in said
    code, said = trainer.run("--resume", "stopped", "--caffe", "caffe")
    assert code == 2
    assert "was started on PyTorch and cannot continue with --caffe" in said


def test_weights_that_are_not_numbers_are_not_written(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial")
    values = {"base_lr": "1e20", "weight_decay": "1e30", "snapshot": "1"}
    settings = [
        word for key, value in values.items() for word in ("--set", f"stages.initial.solver.{key}={value}")
    ]
    code, said = trainer.run(*tiny(recipe, ("initial",)), *settings, "--output", "spoiled")
    assert code == 1
    message = rf"{PREFIX}_iter_1.caffemodel is not written: weights of layer \S+ are not numbers"
    assert re.search(message, said), said
    assert "to resume: python -m caffe_jacinto.train --resume spoiled" in said
    assert not list((trainer.folder / "spoiled/initial").glob("*.caffemodel"))


def test_a_dry_run_is_not_written_over(trainer: Trainer) -> None:
    arguments = (*tiny(), "--output", "dry")
    assert trainer.run(*arguments, "--dry-run")[0] == 0
    code, said = trainer.run(*arguments)
    assert code == 2
    assert "dry already exists, from a --dry-run: start that run (" in said


def test_what_a_later_stage_would_be_refused_for_is_reported_before_anything_runs(trainer: Trainer) -> None:
    settings = {
        "stages.finetune.solver.type": '"RMSProp"',
        "stages.finetune.solver.momentum": "0.9",
    }
    wrong = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    for option in ([], ["--dry-run"]):
        code, said = trainer.run(*tiny(), *wrong, "--output", "refused", *option)
        assert code == 2, said
        assert "takes no momentum" in said
        assert "finetune" in said
        assert not list((trainer.folder / "refused").glob("*/run.log"))


def test_run_sh_does_the_stage_again(trainer: Trainer) -> None:
    recipe = recipe_of(trainer.folder, "initial")
    code, said = trainer.run(*tiny(recipe, ("initial",)), "--output", "by hand", "--dry-run")
    assert code == 0, said
    assert "-m caffe_jacinto.engines.pytorch train -dialect bvlc" in said
    script = trainer.folder / "by hand/initial/run.sh"
    subprocess.run(["sh", str(script)], check=True, cwd="/", capture_output=True)
    code, said = trainer.run("--resume", "by hand")
    assert code == 0, said
    assert "initial: already finished" in said


def test_gpus_that_are_not_there_are_told_before_anything_is_written(trainer: Trainer) -> None:
    code, said = trainer.run(*tiny(), "--output", "gpu", "-gpu", "0,99")
    assert code == 2
    assert re.search(r"GPUs 0,99 requested, but (this machine has no GPU|99 does not exist)", said), said
    assert not Path(trainer.folder / "gpu").exists()
