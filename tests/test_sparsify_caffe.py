"""Sparsification with real stock Caffe, on a small network and real digits."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_stage import LAYERS, RIGL, SmallStage, sparse_settings, write_digits

from caffe_jacinto.caffemodel.show import blob_facts, sparsity
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.engines.contract import Engine, TrainJob
from caffe_jacinto.engines.snapshots import complete_snapshots, survey
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.pruner import load_masks

pytestmark = pytest.mark.caffe

ENOUGH = 60
"""Seconds to wait for something that takes one."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 320 images are 10 batches: at a snapshot every 10 iterations, Caffe's data starts over, resumed or not.
    return write_digits(tmp_path_factory.mktemp("digits") / "lmdb", images=320)


@pytest.fixture(scope="session")
def initial(caffe_engine: Engine, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallStage:
    """A trained first stage: 40 iterations."""
    stage = SmallStage(tmp_path_factory.mktemp("initial"), digits)
    stage.solver(max_iter=40, test_interval=40, snapshot=40)
    stage.run(caffe_engine.train_commands(stage.job(40)))
    return stage


@pytest.fixture(scope="session")
def sparse(caffe_engine: Engine, initial: SmallStage, tmp_path_factory: pytest.TempPathFactory) -> SmallStage:
    """A sparse stage from ``initial``: 20 iterations, thresholds at 4, 6 and 8, a snapshot each 5."""
    stage = SmallStage(tmp_path_factory.mktemp("sparse"), initial.lmdb)
    stage.solver(snapshot=5)
    stage.run(caffe_engine.train_commands(sparse_job(stage, initial)))
    return stage


def sparse_job(stage: SmallStage, initial: SmallStage, **changes: object) -> TrainJob:
    start = initial.folder / "small_iter_40.caffemodel"
    return stage.job(weights=start, sparse=sparse_settings(), **changes)


def conv_weights(path: Path) -> dict[str, np.ndarray]:
    stored = read_weights(path)
    return {name: stored[name][0] for name in LAYERS}


def zeros(weights: dict[str, np.ndarray]) -> int:
    return sum(int(np.count_nonzero(values == 0)) for values in weights.values())


def here(stage: SmallStage, job: TrainJob) -> TrainJob:
    """``job`` with its final weights as seen from the tests' folder."""
    return replace(job, final_weights=stage.folder / job.final_weights)


def test_sparse_stage_reaches_its_target_and_says_so(
    caffe_engine: Engine, initial: SmallStage, sparse: SmallStage
) -> None:
    log = (sparse.folder / "run.log").read_text()
    assert re.findall(r"Finding and applying sparsity: (\S+)", log) == ["0.2", "0.4", "0.6"]
    assert caffe_engine.finished(here(sparse, sparse_job(sparse, initial)))
    facts = blob_facts(sparse.folder / "small_iter_20.caffemodel", Dialect.BVLC)
    # conv1 has one input, so that it is pruned by half: 2 of its 9 weights a channel, at 0.3.
    assert facts[0].sparsity == pytest.approx(2 / 9)
    total = sparsity(facts)
    assert total.fraction >= 0.5
    said = re.findall(r"Total Sparsity \(zero_weights/count\) =  \((\S+)/(\S+)\) (\S+)", log)[-1]
    assert said == (f"{total.zeros:g}", f"{total.weights:g}", f"{total.fraction:.3g}")


def test_frozen_zeros_never_move_with_momentum_from_before_the_threshold(sparse: SmallStage) -> None:
    """The snapshot of 5 has one threshold behind it, that of 10 all three, and momentum is 0.9."""
    snapshots = [conv_weights(sparse.folder / f"small_iter_{n}.caffemodel") for n in (5, 10, 15, 20)]
    assert 0 < zeros(snapshots[0]) < zeros(snapshots[1])
    for before, after in pairwise(snapshots):
        for name in LAYERS:
            assert (after[name][before[name] == 0] == 0).all()
            assert (after[name][before[name] != 0] != before[name][before[name] != 0]).any()


def test_without_the_masks_the_same_zeros_do_move(
    caffe_engine: Engine, sparse: SmallStage, tmp_path: Path
) -> None:
    """Stock ``caffe train`` continues from there: something does push the zeros of the test above."""
    stage = SmallStage(tmp_path, sparse.lmdb)
    for kind in ("caffemodel", "solverstate"):
        (tmp_path / f"small_iter_10.{kind}").write_bytes(
            (sparse.folder / f"small_iter_10.{kind}").read_bytes()
        )
    stage.solver(max_iter=11, snapshot=11)
    job = stage.job(11, snapshot=Path("small_iter_10.solverstate"), reestimate_batches=0)
    stage.run(caffe_engine.train_commands(job))
    before = conv_weights(tmp_path / "small_iter_10.caffemodel")
    after = conv_weights(tmp_path / "small_iter_11.caffemodel")
    assert all((after[name][before[name] == 0] != 0).any() for name in LAYERS)


def test_finetune_moves_no_zero(caffe_engine: Engine, sparse: SmallStage, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, sparse.lmdb)
    stage.solver(clip_gradients=1)
    start = sparse.folder / "small_iter_20.caffemodel"
    stage.run(caffe_engine.train_commands(stage.job(weights=start, freeze_zeros=True)))
    before, after = conv_weights(start), conv_weights(tmp_path / "small_iter_20.caffemodel")
    for name in LAYERS:
        assert ((after[name] == 0) == (before[name] == 0)).all()
        assert (after[name] != before[name]).any()


@pytest.mark.parametrize("solver_type", ["Nesterov", "Adam"])
def test_zeros_hold_whatever_the_solver(
    caffe_engine: Engine, sparse: SmallStage, tmp_path: Path, solver_type: str
) -> None:
    stage = SmallStage(tmp_path, sparse.lmdb)
    stage.solver(type=f'"{solver_type}"', base_lr=0.001, max_iter=5, snapshot=5)
    start = sparse.folder / "small_iter_20.caffemodel"
    job = stage.job(5, weights=start, freeze_zeros=True)
    stage.run(caffe_engine.train_commands(job))
    assert caffe_engine.finished(here(stage, job))
    before, after = conv_weights(start), conv_weights(tmp_path / "small_iter_5.caffemodel")
    assert all((after[name][before[name] == 0] == 0).all() for name in LAYERS)


def test_resumed_in_the_middle_of_the_schedule_it_ends_as_if_never_stopped(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """Weights, masks and the schedule's place: thresholds at 8, 10 and 12, stopped at 10."""
    settings = sparse_settings(start_iter=8)
    folders = {}
    for kind in ("straight", "resumed"):
        stage = SmallStage(tmp_path / kind, initial.lmdb)
        stage.solver()
        job = sparse_job(stage, initial)
        job = replace(job, sparse=settings)
        if kind == "resumed":
            for extension in ("caffemodel", "solverstate", "masks.npz"):
                name = f"small_iter_10.{extension}"
                (stage.folder / name).write_bytes((folders["straight"] / name).read_bytes())
            job = replace(job, weights=None, snapshot=Path("small_iter_10.solverstate"))
        log = stage.run(caffe_engine.train_commands(job))
        folders[kind] = stage.folder
    assert re.findall(r"Finding and applying sparsity: (\S+)", log) == ["0.4", "0.6"]
    ends = {kind: conv_weights(folder / "small_iter_20.caffemodel") for kind, folder in folders.items()}
    for name in LAYERS:
        assert ((ends["straight"][name] == 0) == (ends["resumed"][name] == 0)).all()
        np.testing.assert_allclose(ends["straight"][name], ends["resumed"][name], atol=1e-5)
    factors = [load_masks(folders[kind] / "small_iter_20.solverstate", ends[kind])[1] for kind in ends]
    assert factors == [0.6, 0.6]


def test_weights_change_places_and_it_resumes_after_that(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """RigL on stock Caffe: thresholds at 4, 6 and 8, then weights change places at 10, 12 and 14.

    The snapshot of 11 comes right after the first change: what has grown is still zero, and free.
    """
    folders, logs = {}, {}
    for kind in ("straight", "resumed"):
        stage = SmallStage(tmp_path / kind, initial.lmdb)
        stage.solver(snapshot=11)
        job = replace(sparse_job(stage, initial), sparse=sparse_settings(**RIGL))
        if kind == "resumed":
            for extension in ("caffemodel", "solverstate", "masks.npz"):
                name = f"small_iter_11.{extension}"
                (stage.folder / name).write_bytes((folders["straight"] / name).read_bytes())
            job = replace(job, weights=None, snapshot=Path("small_iter_11.solverstate"))
        logs[kind] = stage.run(caffe_engine.train_commands(job))
        folders[kind] = stage.folder
    shares = {kind: re.findall(r"Regrowth by (\S+):", log) for kind, log in logs.items()}
    expected = [f"{0.15 * (1 + math.cos(math.pi * (at - 4) / (15 - 4))):.3g}" for at in (10, 12, 14)]
    assert shares == {"straight": expected, "resumed": expected[1:]}
    at_11, ends = (conv_weights(folders["straight"] / f"small_iter_{n}.caffemodel") for n in (11, 20))
    masks = [
        load_masks(folders["straight"] / f"small_iter_{n}.solverstate", weights)[0]
        for n, weights in ((11, at_11), (20, ends))
    ]
    for name in LAYERS:
        assert np.count_nonzero(masks[0][name]) == np.count_nonzero(masks[1][name])
    assert any((at_11[name][masks[0][name] != 0] == 0).any() for name in LAYERS)
    assert (masks[0]["conv2"] != masks[1]["conv2"]).any()
    assert all((ends[name][masks[1][name] == 0] == 0).all() for name in LAYERS)


def test_inner_products_too_with_one_threshold_resumed_and_finetuned(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """The rule of another kind by the same program: stopped at 10 of 20, resumed, then fine-tuned."""
    rule = {"by": "network", "inner_products": True, "targets": {"conv1": 0.25}, "schedule": "cubic"}
    job_of = {"sparse": sparse_settings(start_iter=8, **rule)}
    layers = (*LAYERS, "fc")
    ends, logs = {}, {}
    for kind in ("straight", "resumed", "finetune"):
        stage = SmallStage(tmp_path / kind, initial.lmdb)
        stage.solver()
        job = sparse_job(stage, initial)
        if kind == "finetune":
            start = tmp_path / "resumed" / "small_iter_20.caffemodel"
            job = replace(job, weights=start, sparse=None, freeze_zeros=True, inner_products=True)
        else:
            job = replace(job, **job_of)
        if kind == "resumed":
            for extension in ("caffemodel", "solverstate", "masks.npz"):
                name = f"small_iter_10.{extension}"
                (stage.folder / name).write_bytes((tmp_path / "straight" / name).read_bytes())
            job = replace(job, weights=None, snapshot=Path("small_iter_10.solverstate"))
        logs[kind] = stage.run(caffe_engine.train_commands(job))
        stored = read_weights(stage.folder / "small_iter_20.caffemodel")
        ends[kind] = {name: stored[name][0] for name in layers}
    applied = [re.findall(r"Finding and applying sparsity: (\S+)", logs[kind]) for kind in logs]
    cubic = ["0.351852", "0.481481", "0.5"]  # 0.5 - 0.5 (1 - k/3)^3
    assert applied[0] == [*cubic, "0.51", "0.52", "0.53"][: len(applied[0])]
    assert applied[1:] == [applied[0][1:], []]
    zeros = {name: weights == 0 for name, weights in ends["straight"].items()}
    every = np.concatenate([mask.ravel() for mask in zeros.values()])
    assert 0.5 <= every.mean() <= 0.7
    assert zeros["conv1"].mean() == pytest.approx(0.25, abs=1 / 288)
    assert zeros["fc"].any()
    for log in logs.values():
        assert re.findall(r"Total Sparsity .* (\S+)$", log, re.MULTILINE)[-1] == f"{every.mean():.3g}"
    for name, mask in zeros.items():
        np.testing.assert_allclose(ends["straight"][name], ends["resumed"][name], atol=1e-5)
        assert ((ends["finetune"][name] == 0) == mask).all()
        assert (ends["finetune"][name] != ends["resumed"][name]).any()


def test_zeros_of_the_start_weights_hold_before_the_schedule(
    caffe_engine: Engine, sparse: SmallStage, tmp_path: Path
) -> None:
    """A sparse stage from weights that are sparse already."""
    stage = SmallStage(tmp_path, sparse.lmdb)
    stage.solver(max_iter=5, snapshot=5)
    start = sparse.folder / "small_iter_20.caffemodel"
    job = stage.job(5, weights=start, sparse=sparse_settings(start_iter=100, target=0.9))
    stage.run(caffe_engine.train_commands(job))
    before, after = conv_weights(start), conv_weights(tmp_path / "small_iter_5.caffemodel")
    for name in LAYERS:
        assert ((after[name] == 0) == (before[name] == 0)).all()
        assert (after[name] != before[name]).any()


def test_thresholds_by_layer_leave_channels_of_their_own_sparsity(
    caffe_engine: Engine, initial: SmallStage, sparse: SmallStage, tmp_path: Path
) -> None:
    """The same schedule by layer: each layer has as many zeros, but not each channel."""
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver()
    job = replace(sparse_job(stage, initial), sparse=sparse_settings(by="layer"))
    log = stage.run(caffe_engine.train_commands(job))
    assert re.findall(r"Finding and applying sparsity: (\S+)", log) == ["0.2", "0.4", "0.6"]
    by_layer = (conv_weights(tmp_path / "small_iter_20.caffemodel")["conv2"] == 0).reshape(32, -1)
    by_channel = (conv_weights(sparse.folder / "small_iter_20.caffemodel")["conv2"] == 0).reshape(32, -1)
    assert len(set(by_channel.sum(axis=1))) == 1
    assert len(set(by_layer.sum(axis=1))) > 5
    assert int(0.6 * by_layer.size) - 32 <= by_layer.sum() <= 0.6 * by_layer.size


@pytest.mark.parametrize("frozen", [("conv1",), LAYERS])
def test_frozen_layers_do_not_move_in_a_sparse_stage(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path, frozen: tuple[str, ...]
) -> None:
    """Neither by the solver nor by thresholds nor by the recalibration of the statistics."""
    stage = SmallStage(tmp_path, initial.lmdb, frozen)
    stage.solver(regularization_type='"L1"', weight_decay=0.01, clip_gradients=1)
    log = stage.run(caffe_engine.train_commands(sparse_job(stage, initial)))
    assert "Finding and applying sparsity: 0.6" in log
    before = read_weights(initial.folder / "small_iter_40.caffemodel")
    after = read_weights(tmp_path / "small_iter_20.caffemodel")
    for layer, blobs in before.items():
        if layer.split("/")[0] in frozen:
            for old, new in zip(blobs, after[layer], strict=True):
                np.testing.assert_array_equal(old, new)
        else:
            assert any((old != new).any() for old, new in zip(blobs, after[layer], strict=True)), layer
    for name in LAYERS:
        assert (after[name][0] == 0).any() == (name not in frozen)


def test_frozen_layers_do_not_move_in_caffe_train(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb, ("conv1",))
    stage.solver(max_iter=5, snapshot=5)
    start = initial.folder / "small_iter_40.caffemodel"
    log = stage.run(caffe_engine.train_commands(stage.job(5, weights=start)))
    assert "statistics of 1 batch-norm layers" in log
    before, after = (read_weights(path) for path in (start, tmp_path / "small_iter_5.caffemodel"))
    for layer, blobs in before.items():
        moved = [bool((old != new).any()) for old, new in zip(blobs, after[layer], strict=True)]
        assert any(moved) == (not layer.startswith("conv1")), layer


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + ENOUGH
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it did not come about"
        assert process.poll() is None, "the process ended"
        time.sleep(0.01)


def start(stage: SmallStage, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=stage.folder, stdout=file, stderr=file)


def iterations_said(log: Path) -> int:
    return log.read_text().count(" iter/s, ")


@pytest.mark.parametrize("moment", [0.0, 0.013, 0.037])
def test_killed_at_any_moment_it_goes_on(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path, moment: float
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb)
    # A snapshot after each iteration, so that most moments are in the middle of writing one.
    stage.solver(max_iter=100000, snapshot=1, display=1, test_interval=1000)
    log = tmp_path / "killed.log"
    process = start(stage, caffe_engine.train_commands(sparse_job(stage, initial))[0], log)
    wait_for(lambda: iterations_said(log) > 12, process)
    time.sleep(moment)
    process.kill()
    process.wait()
    newest = complete_snapshots(tmp_path / "small", Dialect.BVLC)[0]
    assert newest.iteration >= 10
    frozen = conv_weights(newest.caffemodel)
    end = newest.iteration + 3
    stage.solver(max_iter=end, snapshot=1, test_interval=1000)
    job = stage.job(end, snapshot=Path(newest.solverstate.name), sparse=sparse_settings())
    log_of_rest = stage.run(caffe_engine.train_commands(job))
    assert "The sparsity schedule continues from 0.6" in log_of_rest
    assert "Finding and applying" not in log_of_rest
    after = conv_weights(tmp_path / job.final_weights)
    assert all((after[name][frozen[name] == 0] == 0).all() for name in LAYERS)
    assert caffe_engine.finished(here(stage, job))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_taken_as_caffe_takes_them(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path, ending: signal.Signals
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(max_iter=100000, snapshot=100000, display=1)
    log = tmp_path / "stopped.log"
    job = sparse_job(stage, initial)
    process = start(stage, caffe_engine.train_commands(job)[0], log)
    wait_for(lambda: iterations_said(log) > 5, process)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: complete_snapshots(tmp_path / "small", Dialect.BVLC), process)
    said = iterations_said(log)
    wait_for(lambda: iterations_said(log) > said + 2, process)
    process.send_signal(ending)
    assert process.wait(ENOUGH) == 0
    text = log.read_text()
    assert "Optimization stopped early." in text
    found = survey(tmp_path / "small", Dialect.BVLC)
    assert len(found.complete) == 2
    assert found.complete[0].iteration == iterations_said(log)
    assert not caffe_engine.finished(here(stage, job))


def test_stopped_at_a_threshold_its_place_in_the_schedule_is_kept(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """Every iteration takes a threshold, so that whichever is stopped at does."""
    settings = sparse_settings(target=0.9, start_iter=0, step_iter=1, step_factor=0.001)
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(max_iter=100000, snapshot=100000, display=1)
    log = tmp_path / "stopped.log"
    job = replace(sparse_job(stage, initial), sparse=settings)
    process = start(stage, caffe_engine.train_commands(job)[0], log)
    wait_for(lambda: iterations_said(log) > 5, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(ENOUGH) == 0
    (newest,) = complete_snapshots(tmp_path / "small", Dialect.BVLC)
    factors = re.findall(r"Finding and applying sparsity: (\S+)", log.read_text())
    assert len(factors) == newest.iteration
    end = newest.iteration + 2
    stage.solver(max_iter=end, snapshot=end, test_interval=1000)
    job = stage.job(end, snapshot=Path(newest.solverstate.name), sparse=settings)
    log_of_rest = stage.run(caffe_engine.train_commands(job))
    factors += re.findall(r"Finding and applying sparsity: (\S+)", log_of_rest)
    assert factors == [f"{step * 0.001:g}" for step in range(1, end + 1)]


def test_started_under_nohup_it_survives_its_terminal(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(max_iter=100000, snapshot=100000, display=1)
    log = tmp_path / "nohup.log"
    process = start(stage, ["nohup", *caffe_engine.train_commands(sparse_job(stage, initial))[0]], log)
    wait_for(lambda: iterations_said(log) > 2, process)
    process.send_signal(signal.SIGHUP)
    said = iterations_said(log)
    wait_for(lambda: iterations_said(log) > said + 2, process)
    assert not complete_snapshots(tmp_path / "small", Dialect.BVLC)
    process.kill()
    process.wait()


def test_a_loss_that_is_no_number_ends_the_stage(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(base_lr=1e30)
    command = caffe_engine.train_commands(sparse_job(stage, initial))[0]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert re.search(r"^F.*: the loss is not a number", ran.stderr, re.MULTILINE)
    assert not complete_snapshots(tmp_path / "small", Dialect.BVLC)


def test_recalibrated_tests_leave_no_trace_in_training(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """Dropout, mirroring and crops draw the same numbers; the tests themselves are others, and say so."""
    logs, ends = [], []
    for recalibrate in (False, True):
        stage = SmallStage(tmp_path / str(recalibrate), initial.lmdb)
        stage.solver(test_interval=5, test_initialization="true")
        for phase, more in (("train", "mirror: true"), ("val", "")):
            path = stage.folder / f"{phase}.prototxt"
            text = path.read_text().replace("scale: 0.0039", f"scale: 0.0039 crop_size: 24 {more}")
            drop = 'layer { name: "drop" type: "Dropout" bottom: "pool" top: "pool" }\nlayer { name: "fc"'
            path.write_text(text.replace('layer { name: "fc"', drop))
        job = sparse_job(stage, initial, recalibrate_tests=recalibrate)
        logs.append(stage.run(caffe_engine.train_commands(job)))
        ends.append([(stage.folder / f"small_iter_{n}.caffemodel").read_bytes() for n in (10, 20)])
    assert ends[0] == ends[1]
    lines = [
        re.findall(r"\] ((?:Iteration \d+, Testing net|    Test (?:stat|net output #0)).*)", log)
        for log in logs
    ]
    assert [line for line in lines[1] if "statistics" in line] == [
        "    Test statistics: recalibrated over 5 batches"
    ] * 5
    assert lines[1][:2] == [
        "Iteration 0, Testing net (#0)",
        "    Test statistics: recalibrated over 5 batches",
    ]
    assert len([line for line in lines[0] if "statistics" in line]) == 1, "that of the last test alone"
    accuracies = [[line for line in found if "accuracy" in line] for found in lines]
    assert accuracies[0] != accuracies[1]
    assert accuracies[0][-1] == accuracies[1][-1], "the final test is the same"


def test_recalibrated_statistics_are_those_of_the_final_weights(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """Under a strong L1 the running statistics lag, and the test is wrong until they are renewed."""
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(
        base_lr=0.05,
        weight_decay=0.01,
        regularization_type='"L1"',
        max_iter=30,
        snapshot=30,
        test_interval=30,
    )
    job = stage.job(30, weights=initial.folder / "small_iter_40.caffemodel", reestimate_batches=10)
    log = stage.run(caffe_engine.train_commands(job))
    losses = [float(value) for value in re.findall(r"Test net output #1: loss = (\S+)", log)]
    accuracies = [float(value) for value in re.findall(r"Test net output #0: accuracy = (\S+)", log)]
    assert len(losses) == 2, "Caffe's own final test, and that of the recalibration"
    assert losses[1] < losses[0]
    assert accuracies[1] >= accuracies[0]
    statistics = read_weights(tmp_path / "small_iter_30.caffemodel")["conv1/bn"]
    # Ten batches, each counting 0.99 of the one after it.
    assert statistics[2][0] == pytest.approx(sum(0.99**n for n in range(10)), rel=1e-4)


def test_recalibration_is_done_again_after_a_kill_and_not_twice(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(max_iter=10)
    job = stage.job(10)
    training, completing = caffe_engine.train_commands(job)
    stage.run([training])
    assert not caffe_engine.finished(here(stage, job)), "the statistics are not yet recalibrated"
    resumed = replace(job, snapshot=Path("small_iter_10.solverstate"))
    assert caffe_engine.train_commands(resumed) == [completing]
    stage.run([completing])
    assert caffe_engine.finished(here(stage, job))
    once = (tmp_path / "small_iter_10.caffemodel").read_bytes()
    stage.run([completing])
    assert (tmp_path / "small_iter_10.caffemodel").read_bytes() == once
    (tmp_path / "small_iter_10.caffemodel").write_bytes(once[:-10] + bytes(10))
    assert not caffe_engine.finished(here(stage, job)), "these are other weights than those recorded"


def test_recalibration_of_a_stage_that_was_stopped_says_so(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver()
    command = caffe_engine.train_commands(stage.job())[1]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "training stopped before its last iteration" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_learning_rates_are_those_of_caffe(caffe_engine: Engine, initial: SmallStage, tmp_path: Path) -> None:
    """The rates that the log says for stock Caffe's stage, and for the stepper's with the same solver."""
    stage = SmallStage(tmp_path, initial.lmdb)
    solvers = [
        {"lr_policy": '"poly"', "power": 2},
        {"lr_policy": '"multistep"', "gamma": 0.3, "stepvalue": 2, "max_iter": 5},
        {"lr_policy": '"inv"', "gamma": 0.1, "power": 0.7},
    ]
    weights = initial.folder / "small_iter_40.caffemodel"
    for changes in solvers:
        stage.solver(**{"max_iter": 5, "display": 1, "snapshot": 0, "test_interval": 100, **changes})
        rates = []
        for freeze in (False, True):
            job = stage.job(5, weights=weights, freeze_zeros=freeze, reestimate_batches=0)
            log = stage.run(caffe_engine.train_commands(job))
            rates.append([float(rate) for rate in re.findall(r"Iteration \d+, lr = ([^\s,]+)", log)])
        assert len(rates[0]) == 5
        assert rates[0] == pytest.approx(rates[1], rel=1e-5)


def test_without_masks_a_step_is_caffes_own(
    caffe_engine: Engine, initial: SmallStage, tmp_path: Path
) -> None:
    """A sparse stage before its schedule begins trains exactly as ``caffe train`` does."""
    weights = initial.folder / "small_iter_40.caffemodel"
    ends = []
    for kind in ("train", "stepper"):
        stage = SmallStage(tmp_path / kind, initial.lmdb)
        stage.solver(max_iter=8, snapshot=8, iter_size=2)
        sparse = sparse_settings(start_iter=100) if kind == "stepper" else None
        job = stage.job(8, weights=weights, sparse=sparse, reestimate_batches=0)
        stage.run(caffe_engine.train_commands(job))
        ends.append(conv_weights(stage.folder / "small_iter_8.caffemodel"))
    for name in LAYERS:
        np.testing.assert_allclose(ends[0][name], ends[1][name], atol=1e-6)


def test_a_stage_with_snapshots_in_hdf5_resumes_from_them(
    caffe_engine: Engine, initial: SmallStage, sparse: SmallStage, tmp_path: Path
) -> None:
    """As with binary ones, to the bit; the Caffe of install_caffe.sh reads no weights from HDF5."""
    stage = SmallStage(tmp_path, initial.lmdb)
    stage.solver(snapshot=10, snapshot_format="HDF5")
    final = Path("small_iter_20.caffemodel.h5")
    job = replace(sparse_job(stage, initial), final_weights=final)
    stage.run(caffe_engine.train_commands(job))
    expected = conv_weights(sparse.folder / "small_iter_20.caffemodel")
    for name, weights in conv_weights(tmp_path / final).items():
        np.testing.assert_array_equal(weights, expected[name])
    assert caffe_engine.finished(replace(job, final_weights=tmp_path / final))
    for path in tmp_path.glob("small_iter_20.*"):
        path.unlink()
    resumed = replace(job, snapshot=Path("small_iter_10.solverstate.h5"))
    stage.run(caffe_engine.train_commands(resumed))
    for name, weights in conv_weights(tmp_path / final).items():
        np.testing.assert_array_equal(weights, expected[name])
