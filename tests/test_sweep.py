"""`train --sweep` and `--max-loss`: dense stages once, sparse ones for each target, stopped and resumed."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from digits_run import PREFIX, Trainer, piped, recipe_of, tiny, wait_for, write_lmdbs
from hypothesis import given
from hypothesis import strategies as st
from test_summary import weights_of_tiny
from test_torch_runs import NARROW

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.logs.scatter import Choice, draw
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.runs import sweep
from caffe_jacinto.runs.folder import EngineRecord, RunRecord, StageState, load, now, save
from caffe_jacinto.runs.lock import RunLock, is_held
from caffe_jacinto.runs.plan import RunPlan
from caffe_jacinto.runs.preflight import NothingPruned
from caffe_jacinto.runs.start import Options
from caffe_jacinto.runs.sweep import (
    Sweep,
    SweepRecord,
    dense_recipe,
    dense_stages,
    idle_stages,
    next_target,
    possible_targets,
    resume_sweep,
    sparse_recipe,
    target_runs,
    with_target,
)
from caffe_jacinto.train import main

STAGES = ("initial", "sparse")
SPARSE = "stages.sparse.sparse"
STOPPED = 128 + 15


@given(limit=st.integers(0, 99), first=st.integers(1, 95), max_loss=st.floats(0, 5))
def test_the_search_finds_the_sparsest_network_that_is_good_enough(
    limit: int, first: int, max_loss: float
) -> None:
    """Networks up to a sparsity of ``limit`` hundredths lose no more than allowed, sparser ones do."""
    losses: dict[float, float] = {}
    target: float | None = first / 100
    while target is not None:
        assert target not in losses and 0 < target < 0.96
        losses[target] = max_loss if round(100 * target) <= limit else max_loss + 0.1
        target = next_target(losses, max_loss)
    good = [round(100 * target) for target, loss in losses.items() if loss <= max_loss]
    assert max(good, default=0) == min(limit, 95)
    assert len(losses) <= 8


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({0.79: 0.0, 0.805: 2.0}, 0.8),
        ({0.805: 0.0, 0.82: 2.0}, 0.81),
        ({0.8: 0.0, 0.805: 2.0}, None),
        ({0.805: 0.0, 0.81: 2.0}, None),
        ({0.803: 2.0, 0.805: 0.0, 0.82: 2.0}, 0.81),
        ({0.29: 0.0, 0.3: 2.0}, None),
        ({0.06: 0.0, 0.07: 2.0}, None),
        ({0.95: 0.0, 0.98: 2.0}, None),
    ],
)
def test_the_search_goes_on_from_targets_between_two_hundredths(
    losses: dict[float, float], expected: float | None
) -> None:
    assert next_target(losses, 1.0) == expected


@pytest.mark.parametrize(
    ("settings", "first", "possible"),
    [
        ([], 0.8, range(1, 96)),
        ([f'{SPARSE}.pattern="2:4"', f"{SPARSE}.target=0.4"], 0.4, range(9, 51)),
        ([f"{SPARSE}.start_factor=0.7"], 0.8, range(55, 96)),
        (
            [f"{SPARSE}.start_factor=0.7", "stages.sparse.weights=x.caffemodel", "stages.sparse.start="],
            0.8,
            range(1, 96),
        ),
        ([f'{SPARSE}.schedule="cubic"', f"{SPARSE}.start_factor=0.3"], 0.8, range(31, 96)),
    ],
)
def test_the_search_tries_what_the_recipe_allows(settings: list[str], first: float, possible: range) -> None:
    recipe = load_recipe("demo_digits", settings)
    assert possible_targets(recipe) == possible
    for loss in (0.0, 2.0):
        losses, target = {}, first
        while target is not None:
            losses[target] = loss
            assert sparse_recipe(recipe, target, Path("dense")).stages["sparse"].sparse is not None
            target = next_target(losses, 1.0, possible)
        assert round(100 * (min(losses) if loss else max(losses))) == (possible[0] if loss else possible[-1])


@pytest.mark.parametrize("zeros", [0, 1, 27])
def test_targets_are_held_against_the_zeros_in_the_file_that_the_dense_stage_starts_from(
    tmp_path: Path, zeros: int
) -> None:
    weights = weights_of_tiny(tmp_path / "w.caffemodel", zeros)  # of the 108 of its convolution
    start = ["stages.initial=", "stages.l1reg.start=", f"stages.l1reg.weights={weights}"]
    recipe = load_recipe("demo_digits", [*start, f"{SPARSE}.start_factor=0.7"])
    said = f"target 0.3: stage sparse: no weight would become zero: {SPARSE}.start_factor 0.7 is above 0.45"
    assert idle_stages(with_target(recipe, 0.3))[0].startswith(said)
    assert bool(idle_stages(with_target(recipe, 0.25))) == (zeros < 27)
    assert not idle_stages(with_target(recipe, 0.8))
    assert possible_targets(recipe).start == (1 if zeros == 27 else 55)
    pattern = load_recipe("demo_digits", [*start, f'{SPARSE}.pattern="2:4"', f"{SPARSE}.target=0.05"])
    assert bool(idle_stages(pattern)) == (not zeros)


def test_the_search_goes_on_above_targets_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Networks up to 0.45 lose little; targets up to 0.4 are refused when their turn comes, by a stand-in."""
    losses: dict[float, float] = {}
    refused: list[float] = []

    def run(_: Sweep, folder: Path, *__: object) -> int:
        if folder.name == "dense":
            return 0
        target = float(folder.name.removeprefix("target_"))
        assert target > max(refused, default=0)
        if target <= 0.4:
            refused.append(target)
            raise NothingPruned(["stage sparse: no weight would become zero"])
        losses[target] = 0.0 if target <= 0.45 else 2.0
        return 0

    monkeypatch.setattr(Sweep, "_run", run)
    monkeypatch.setattr(Sweep, "_losses", lambda _: losses)
    record = SweepRecord(
        caffe_jacinto="0",
        start_folder=str(tmp_path),
        folder=str(tmp_path),
        recipe=load_recipe("demo_digits"),
        targets=(0.2, 0.8),
        max_loss=1.0,
    )
    assert Sweep(tmp_path, record, Options()).drive() == 1
    assert max(target for target, loss in losses.items() if not loss) == 0.45 and 0.46 in losses
    assert refused == [0.2, 0.35]
    said = capsys.readouterr().out
    assert "target 0.2 is left out: stage sparse: no weight would become zero\n" in said
    assert "left out, as said above: target 0.2, 0.35\n" in said
    assert (tmp_path / "sweep.csv").is_file()


def test_the_mistakes_of_all_targets_are_found_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lmdbs(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = [*tiny(recipe_of(tmp_path, *STAGES), STAGES), "--set", "stages.sparse.start=initial"]
    arguments += ["--engine", "torch", "--dry-run", "--set", f"{SPARSE}.start_factor=0.7"]
    said = (
        r"target 0\.{}: stage sparse: no weight would become zero: stages\.sparse\.sparse\.start_factor "
        r"0\.7 is above 0\.{}, where the schedule for this target ends; lower start_factor, or "
        "leave this target out"
    )
    with pytest.raises(UserErrors) as raised:
        main([*arguments, "--sweep", "target=0.5,0.9,0.4"])
    first, second = raised.value.lines()
    assert re.fullmatch(said.format(5, 65), first) and re.fullmatch(said.format(4, 55), second)
    with pytest.raises(UserErrors) as raised:
        main([*arguments, "--sweep", "target=0.5,0.9", "--set", "data.val_lmdb=none"])
    *others, last = raised.value.lines()
    assert any("none" in line for line in others) and re.fullmatch(said.format(5, 65), last)
    assert main([*arguments, "--sweep", "target=0.6,0.9"]) == 0
    assert not (tmp_path / "training").exists()


@pytest.mark.parametrize("options", [[], ["--sweep", "target=0.5,0.8"]])
def test_a_recipe_may_come_from_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    write_lmdbs(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = tiny(piped(tmp_path / recipe_of(tmp_path, "sparse")), ("sparse",))
    arguments += ["--set", "stages.sparse.start=", "--gpus", "", "--engine", "torch", "--dry-run"]
    assert main([*arguments, "--output", "new", *options]) == 0


def without_dense_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments that sweep two targets of a stage that starts from random weights, in ``folder``."""
    write_lmdbs(folder)
    monkeypatch.chdir(folder)
    arguments = [*tiny(recipe_of(folder, "sparse"), ("sparse",)), "--set", "stages.sparse.start="]
    return [*arguments, "--engine", "torch", "--sweep", "target=0.5,0.8", "--output", "sweep"]


def stands_in(monkeypatch: pytest.MonkeyPatch, *codes: int) -> None:
    """Runs end with these exit codes, one after the other, as if trained: a stand-in for the driver."""
    left = iter(codes)

    def end(run: RunPlan, record: RunRecord, lock: RunLock, *_: object) -> int:
        for state in record.stages.values():
            state.state = "finished"
        save(run.folder, record)
        lock.release()
        return next(left)

    monkeypatch.setattr("caffe_jacinto.runs.start._drive", end)


def test_the_search_does_not_go_above_what_the_schedule_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule of a stand-in ends at 0.576: higher targets give the same network, which is seen once."""
    losses: dict[float, float] = {}

    def run(_: Sweep, folder: Path, *__: object) -> int:
        if folder.name != "dense":
            losses[float(folder.name.removeprefix("target_"))] = 0.1
        return 0

    monkeypatch.setattr(Sweep, "_run", run)
    monkeypatch.setattr(Sweep, "_losses", lambda _: losses)
    monkeypatch.setattr(Sweep, "_runs", lambda _: {target: tmp_path / str(target) for target in losses})
    monkeypatch.setattr(sweep, "_result", lambda path: sweep.Result(min(float(path.name), 0.576)))
    monkeypatch.setattr(Sweep, "_show", lambda _: None)
    record = SweepRecord(
        caffe_jacinto="0",
        start_folder=str(tmp_path),
        folder=str(tmp_path),
        recipe=load_recipe("demo_digits"),
        targets=(0.8,),
        max_loss=1.0,
    )
    assert Sweep(tmp_path, record, Options()).drive() == 0
    assert list(losses) == [0.8, 0.88]


def test_the_status_of_a_sweep_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = without_dense_stages(tmp_path, monkeypatch)
    stands_in(monkeypatch, STOPPED)
    assert main(arguments) == STOPPED
    capsys.readouterr()
    assert main(["--status", "sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "not started: target_0.8",
        "to resume the sweep: python -m caffe_jacinto.train --resume sweep",
    ]


def test_the_snapshots_to_keep_may_be_changed_for_later_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = without_dense_stages(tmp_path, monkeypatch)
    stands_in(monkeypatch, STOPPED, 0)
    assert main([*arguments, "--keep", "5"]) == STOPPED
    assert main(["--resume", "sweep", "--keep", "7"]) == 0
    runs = target_runs(Path("sweep"))
    assert [load(runs[target]).recipe.training.keep for target in (0.5, 0.8)] == [5, 7]


def test_a_run_that_had_finished_is_not_locked_while_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = without_dense_stages(tmp_path, monkeypatch)
    stands_in(monkeypatch, STOPPED, STOPPED)
    assert main(arguments) == STOPPED
    assert main(["--resume", "sweep"]) == STOPPED
    assert list(target_runs(Path("sweep"))) == [0.5, 0.8]
    assert not any(is_held(folder) for folder in target_runs(Path("sweep")).values())


def test_data_that_were_replaced_are_refused_also_by_a_target_that_has_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = without_dense_stages(tmp_path, monkeypatch)
    stands_in(monkeypatch, STOPPED, 0)
    assert main(arguments) == STOPPED
    Path("train_lmdb").rename("before")
    shutil.copytree("val_lmdb", "train_lmdb")
    says = (
        r"^LMDB train_lmdb \(data\.train_lmdb\) is not the one that the sweep was started with: it had 320 "
        r"images \(.*\), and has 50 images \(.*\) now; put that one back, or start a new sweep; to go on "
        r"with the sweep: python -m caffe_jacinto\.train --resume sweep$"
    )
    with pytest.raises(UserError, match=says):
        main(["--resume", "sweep"])
    assert list(target_runs(Path("sweep"))) == [0.5] and not Path("sweep", "sweep.csv").exists()
    shutil.rmtree("train_lmdb")
    Path("before").rename("train_lmdb")
    assert main(["--resume", "sweep"]) == 0
    assert list(target_runs(Path("sweep"))) == [0.5, 0.8]


class NoReader(io.StringIO):
    """What stdout is to a pipe whose reader has gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stdout", [None, NoReader()], ids=["closed", "no reader"])
def test_the_results_are_written_where_nobody_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: TextIO | None
) -> None:
    arguments = without_dense_stages(tmp_path, monkeypatch)
    stands_in(monkeypatch, 0, 0)
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(arguments) == 0
    rows = csv.DictReader(Path("sweep", "sweep.csv").read_text().splitlines())
    assert [row["network"] for row in rows] == ["target 0.5", "target 0.8"]


def test_targets_that_differ_late_have_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lmdbs(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = tiny(recipe_of(tmp_path, *STAGES), STAGES)
    stage = ["--set", "stages.sparse.start=initial", "--output", "sweep", "--engine", "torch", "--dry-run"]
    targets = ["--sweep", "target=0.1234567,0.1234568", "--sweep", "target=0.1234568,0.5"]
    assert main([*arguments, *stage, *targets, "--max-loss", "1"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"target_(\S+): ", said) == ["0.1234567", "0.1234568", "0.5"]
    assert "then the search for the sparsest network that loses at most 1 point\n" in said


def test_copies_beside_the_runs_of_a_sweep_are_not_its_own(tmp_path: Path) -> None:
    own = ["target_1e-05", "target_0.1234567", "target_0.8"]
    for name in [*own, "target_0.8_old", "target_0.8_1", "target_0.80", "target_nan", "target_", "dense"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    (tmp_path / "target_0.9").mkdir()
    (tmp_path / "target_0.7").write_text("")
    assert [(target, path.name) for target, path in target_runs(tmp_path).items()] == [
        *((1e-05, own[0]), (0.1234567, own[1]), (0.8, own[2]))
    ]


def test_the_stages_are_shared_out() -> None:
    recipe = load_recipe("demo_digits", ["training.batch_size=64"])
    assert dense_stages(recipe) == ["initial", "l1reg"]
    dense = dense_recipe(recipe)
    assert list(dense.stages) == ["initial", "l1reg"]
    assert dense == recipe.model_copy(update={"stages": dense.stages})
    sparse = sparse_recipe(recipe, 0.6, Path("runs/dense"))
    assert list(sparse.stages) == [name for name in recipe.stages if name not in dense.stages]
    stage, before = sparse.stages["sparse"], recipe.stages["sparse"]
    last = recipe.stages["l1reg"].max_iter
    assert stage.weights == f"runs/dense/l1reg/{PREFIX}_iter_{last}.caffemodel"
    assert before.sparse is not None
    changed = {
        "start": None,
        "weights": stage.weights,
        "sparse": before.sparse.model_copy(update={"target": 0.6}),
    }
    assert stage == before.model_copy(update=changed)
    assert sparse.stages["finetune"] == recipe.stages["finetune"]


def test_a_teacher_that_is_trained_once_is_found_in_its_run() -> None:
    recipe = load_recipe(
        "demo_digits", ['stages.sparse.teacher="initial"', 'stages.finetune.teacher="sparse"']
    )
    stages = sparse_recipe(recipe, 0.6, Path("runs/dense")).stages
    last = recipe.stages["initial"].max_iter
    assert stages["sparse"].teacher == f"runs/dense/initial/{PREFIX}_iter_{last}.caffemodel"
    assert stages["sparse"].teacher_prototxt == "runs/dense/initial/deploy.prototxt"
    assert (stages["finetune"].teacher, stages["finetune"].teacher_prototxt) == ("sparse", None)
    recipe = load_recipe("demo_digits", ["stages.sparse.distill=true", "stages.finetune.distill=true"])
    last = recipe.stages["l1reg"].max_iter
    for stage in sparse_recipe(recipe, 0.6, Path("runs/dense")).stages.values():
        if stage.distill:
            assert stage.teacher == f"runs/dense/l1reg/{PREFIX}_iter_{last}.caffemodel"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sweep", "target=0.5,1.5"], r"'1\.5' is not a fraction between 0 and 1"),
        (["--sweep", "target=0.5,0.5"], "has a target twice; give each once"),
        (["--sweep", "0.5,0.6"], r"is not target=F,F,\.\.\., like target=0\.5,0\.8"),
        (["--max-loss", "many"], "is not a number of points from 0 to 100"),
        (["--sweep", "target=0.5", "--slurm"], "go with RECIPE, and not with --slurm"),
    ],
)
def test_options_that_are_wrong(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(["demo_digits", *arguments])


def test_recipes_that_cannot_be_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no stage prunes, so there is no target"):
        main([recipe_of(tmp_path, "initial"), "--sweep", "target=0.5"])
    path = tmp_path / recipe_of(tmp_path, "sparse")
    path.write_text(path.read_text().replace('start = "l1reg"', 'weights = "trained.caffemodel"'))
    with pytest.raises(UserError, match="no stage comes before sparse; add one, or give targets"):
        main([str(path), "--max-loss", "1"])
    with pytest.raises(UserError, match=r"0\.3 is more than the 0\.25 that the pattern 3:4 makes zero"):
        pattern = ["--set", "stages.sparse.sparse.pattern=3:4", "--set", "stages.sparse.sparse.target=0.2"]
        main(["demo_digits", "--sweep", "target=0.2,0.3", *pattern])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["initial.toml", "sparse.toml"]


def test_a_sweep_keeps_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its later runs do not depend on the user's files."""
    write_lmdbs(tmp_path)
    monkeypatch.chdir(tmp_path)
    lmdbs = ["data.train_lmdb=train_lmdb", "data.val_lmdb=val_lmdb", "training.batch_size=8"]
    settings = {"folder": "x", "gpus": (), "iter_size": 1, "solver_mode_gpu": False}
    made = stage_files(load_recipe("demo_digits", lmdbs), "initial", Dialect.BVLC, **settings)
    for name in ("train.prototxt", "val.prototxt"):
        (tmp_path / name).write_text(made[name])
    recipe = tmp_path / recipe_of(tmp_path, *STAGES)
    network = '[network]\nprototxt = "train.prototxt"\ntest_prototxt = ["val.prototxt"]\n'
    _, stages = recipe.read_text().split("[stages.", 1)
    head = '[data]\ndataset = "digits"\nnum_classes = 10\n' + network
    recipe.write_text((head + "[stages." + stages).replace('start = "l1reg"', 'start = "initial"'))
    monkeypatch.setattr(Sweep, "drive", lambda sweep: 0)  # what it would train is seen below
    assert main([str(recipe), "--engine", "torch", "--sweep", "target=0.5", "--output", "sweep"]) == 0
    val = Path("val.prototxt").read_text()
    Path("val.prototxt").write_text(val.replace('"Accuracy"', '"Silence"'))
    with pytest.raises(UserError, match=r"val\.prototxt: --max-loss chooses by the top-1 accuracy, and no"):
        main([str(recipe), "--engine", "torch", "--max-loss", "1", "--output", "other"])
    record = SweepRecord.model_validate_json(Path("sweep/sweep.json").read_text())
    for name in ("train.prototxt", "val.prototxt"):
        Path(name).unlink()
    for part in (dense_recipe(record.recipe), sparse_recipe(record.recipe, 0.5, Path("sweep/dense"))):
        again = stage_files(part, next(iter(part.stages)), Dialect.BVLC, **settings)
        net = parse_net(again["train.prototxt"], Dialect.BVLC, "again")
        assert "conv1a" in [layer.name for layer in net.layer]


@pytest.mark.parametrize("run", ["dense", "target_0.5"])
def test_a_sweep_keeps_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    write_lmdbs(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / recipe_of(tmp_path, *STAGES)
    recipe.write_text(recipe.read_text().replace('start = "l1reg"', 'start = "initial"'))
    driven: list[Options] = []
    monkeypatch.setattr(Sweep, "drive", lambda sweep: driven.append(sweep._options) or 0)
    arguments = [*tiny(str(recipe), STAGES), "--sweep", "target=0.5", "--output", "sweep"]
    assert main([*arguments, "--engine", "torch", "--dialect", "caffe_jacinto"]) == 0
    path = Path("sweep", run, "run.json")
    path.parent.mkdir()
    engine = EngineRecord(kind="torch", executable="python", version="2", dialect=Dialect.CAFFE_JACINTO)
    record = RunRecord(
        caffe_jacinto="0",
        created=now(),
        start_folder=str(tmp_path),
        folder=str(path.parent),
        recipe=load_recipe(str(recipe)),
        engine=engine,
        gpus=(),
        stages={name: StageState() for name in (*STAGES, "test")},
    )
    path.write_text(record.model_dump_json())
    driven.clear()
    for kind in ("bvlc", "caffe-jacinto"):
        with pytest.raises(UserError, match=f"with torch, dialect caffe_jacinto, and .* of {kind}: leave"):
            main(["--resume", "sweep", "--engine", kind])
    with pytest.raises(UserError, match="cannot be compared with those of dialect bvlc: leave"):
        resume_sweep(Path("sweep"), Options(dialect=Dialect.BVLC))
    assert not driven
    assert main(["--resume", "sweep", "--engine", "torch"]) == 0 and main(["--resume", "sweep"]) == 0
    assert [(options.engine, options.dialect) for options in driven] == [("torch", Dialect.CAFFE_JACINTO)] * 2
    engine.kind, engine.executable = "bvlc", str(tmp_path / "gone")
    path.write_text(record.model_copy(update={"engine": engine}).model_dump_json())
    with pytest.raises(UserError, match=r"trained with bvlc, .* of torch: leave"):
        main(["--resume", "sweep", "--engine", "torch"])


def test_costs_within_ten_times_have_several_numbers_on_their_axis() -> None:
    left = (0.0012, 0.002, 0.0043, 0.0087)
    points = [Choice(f"target {number}", [(number, 0.9)], [(number, 0.9)]) for number in left]
    numbers = re.findall(r"<!-- (0\.\d+) -->", draw(points, "svg").decode())
    assert {"0.002", "0.005"} <= set(numbers)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("sweeps")
    write_lmdbs(folder)
    return Trainer(None, folder)


def end_of(trainer: Trainer, *arguments: str) -> str:
    process = trainer.start(*arguments, program=("-c", NARROW))
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return str(said)


@pytest.mark.caffe
def test_a_sweep_that_is_stopped_goes_on_without_redoing_what_is_done(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in its search, which goes on from what the sweep knows.

    The weights of a target are those of a plain run with that target, to the bit.
    """
    iterations = {"initial": 3, "sparse": 20}
    recipe = recipe_of(trainer.folder, *STAGES)
    path = trainer.folder / recipe
    path.write_text(path.read_text().replace('start = "l1reg"', 'start = "initial"'))
    taught = ["--set", "stages.sparse.distill=true"]
    request = [*taught, "--sweep", "target=0.94", "--max-loss", "100", "--output", "sweep"]
    folder = trainer.folder / "sweep"
    process = trainer.start(*tiny(recipe, STAGES, **iterations), *request, program=("-c", NARROW))
    log = folder / "target_0.95" / "sparse" / "run.log"
    wait_for(lambda: log.exists() and "Iteration 4 " in log.read_text(), "iteration 4", seconds=400)
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert "to go on with the sweep: python -m caffe_jacinto.train --resume sweep" in said
    assert not (folder / "sweep.csv").exists()
    files = [folder / "dense" / "initial" / "run.log", folder / "target_0.94" / "sparse" / "run.log"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    said = end_of(trainer, "--resume", "sweep")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert "resumes at iteration" in said
    assert sorted(path.name for path in folder.iterdir()) == [
        *("dense", "sweep.csv", "sweep.json", "sweep.png", "target_0.94", "target_0.95")
    ]
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["network"] for row in rows] == ["dense", "target 0.94", "target 0.95"]
    sparsities = [float(row["sparsity"]) for row in rows[1:]]
    assert sparsities[0] >= 0.3 and sparsities == sorted(sparsities)  # the caps keep them below the targets
    for row in rows[1:]:
        assert float(row["gigamacs_left"]) < float(row["gigamacs"])
        lost = 100 * (float(rows[0]["top1"]) - float(row["top1"]))
        assert float(row["points_lost"]) == pytest.approx(lost, abs=1e-4)
    best = max(rows[1:], key=lambda row: float(row["sparsity"]))
    assert f"the sparsest network that loses at most 100 points: {best['folder']}" in said
    again = end_of(trainer, "--resume", "sweep")
    assert again.count("this run has finished") == 2 and again.splitlines()[-2:] == said.splitlines()[-2:]
    assert main(["--status", str(folder)]) == 0
    states = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(folder))]
    assert states == [f"{folder / row['network'].replace(' ', '_')}: finished" for row in rows]
    target = [*taught, "--set", "stages.sparse.sparse.target=0.94"]
    end_of(trainer, *tiny(recipe, STAGES, **iterations), *target, "--output", "plain")
    last = f"sparse/{PREFIX}_iter_20.caffemodel"
    ours, theirs = (read_weights(trainer.folder / run / last) for run in ("sweep/target_0.94", "plain"))
    assert ours.keys() == theirs.keys()
    for name, blobs in theirs.items():
        for found, expected in zip(ours[name], blobs, strict=True):
            np.testing.assert_array_equal(found, expected)


def with_zeros(weights: Path, name: str) -> None:
    """Write ``name`` beside a weight file: nine of ten weights of each convolution of that are zero."""
    net = messages(Dialect.BVLC).NetParameter.FromString(weights.read_bytes())
    for layer in net.layer:
        if layer.type == "Convolution":
            values = np.array(layer.blobs[0].data)
            values[np.arange(values.size) % 10 > 0] = 0
            layer.blobs[0].data[:] = values
    weights.with_name(name).write_bytes(net.SerializeToString())


@pytest.mark.caffe
def test_a_target_that_is_refused_when_its_turn_comes_is_left_out(trainer: Trainer) -> None:
    """The dense stage starts with zeros, which could be those of the low target, and trains them away."""
    end_of(trainer, *tiny(recipe_of(trainer.folder, "initial"), ("initial",), initial=1), "--output", "first")
    with_zeros(trainer.folder / f"first/initial/{PREFIX}_iter_1.caffemodel", "zeros.caffemodel")
    stages = ("l1reg", "sparse")
    settings = ["stages.l1reg.start=", "stages.l1reg.weights=first/initial/zeros.caffemodel"]
    settings.append(f"{SPARSE}.start_factor=0.5")
    arguments = tiny(recipe_of(trainer.folder, *stages), stages, l1reg=3, sparse=3)
    arguments += [word for setting in settings for word in ("--set", setting)]
    arguments += ["--sweep", "target=0.3,0.8", "--output", "low"]
    logs = [trainer.folder / f"low/{run}/run.log" for run in ("dense/l1reg", "target_0.8/sparse")]
    trained: list[bytes] = []
    for again in (arguments, ["--resume", "low"]):
        process = trainer.start(*again, program=("-c", NARROW))
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 1, said
        why = "no weight would become zero: stages.sparse.sparse.start_factor 0.5 is above 0.45"
        assert f"\ntarget 0.3 is left out: stage sparse: {why}" in said
        assert "\nleft out, as said above: target 0.3\n" in said and "Traceback" not in said
        rows = list(csv.DictReader((trainer.folder / "low/sweep.csv").read_text().splitlines()))
        assert [row["network"] for row in rows] == ["dense", "target 0.8"]
        assert not (trainer.folder / "low/target_0.3").exists()
        trained = trained or [path.read_bytes() for path in logs]
        assert trained == [path.read_bytes() for path in logs]


@pytest.mark.caffe
def test_a_sweep_on_stock_caffe(caffe_root: Path, tmp_path: Path) -> None:
    write_lmdbs(tmp_path)
    recipe = recipe_of(tmp_path, *STAGES)
    path = tmp_path / recipe
    path.write_text(path.read_text().replace('start = "l1reg"', 'start = "initial"'))
    caps = [f"stages.sparse.sparse.{name}=100.0" for name in ("threshold_maxratio", "threshold_value_max")]
    arguments = [
        *tiny(recipe, STAGES, initial=1, sparse=3),
        *(part for cap in caps for part in ("--set", cap)),
    ]
    trainer = Trainer(caffe_root / "bin" / "caffe", tmp_path)
    said = end_of(trainer, *arguments, "--sweep", "target=0.3", "--output", "sweep")
    assert "engine: bvlc 1.0.0" in said
    dense, sparse = csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines())
    assert (dense["network"], sparse["network"]) == ("dense", "target 0.3")
    assert 0.3 <= float(sparse["sparsity"]) < 0.6
    assert float(sparse["gigamacs_left"]) < float(sparse["gigamacs"])
