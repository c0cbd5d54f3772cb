"""Training on PyTorch as users start it: resumed to the bit, stopped by signals, on two ranks, sparse."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stage import LAYERS, RIGL, SmallStage, sparse_settings, write_digits

from caffe_jacinto.caffemodel.convert import convert
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import FAILED
from caffe_jacinto.engines.contract import settings_as_flags
from caffe_jacinto.engines.discovery import find_engine
from caffe_jacinto.engines.pytorch import memory
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.snapshot import read_place
from caffe_jacinto.engines.pytorch.stage_check import check_stages
from caffe_jacinto.engines.snapshots import complete_snapshots, final_is_complete
from caffe_jacinto.logs.discover import find_runs
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.pruner import load_masks
from caffe_jacinto.report import main as report

pytestmark = pytest.mark.caffe

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-solver", "solver.prototxt"]
ENOUGH = 60
SPARSE = settings_as_flags(sparse_settings())
AVERAGED = {"lr_policy": '"cosine"', "warmup_iter": 4, "ema_decay": 0.8}
AUGMENTED = "crop_size: 24 crop_min_area: 0.5 random_contrast: 0.2 mixup_alpha: 0.4"
EVERY_WEIGHT = sparse_settings(
    by="network", inner_products=True, min_kernel=1, targets={"conv[1]": 0.25}, schedule="cubic"
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "lmdb")


@pytest.fixture(scope="module")
def initial(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallStage:
    """A stage that was trained to its end without a stop."""
    stage = SmallStage(tmp_path_factory.mktemp("initial"), digits)
    stage.solver()
    stage.run([PROGRAM])
    return stage


def weights_of(stage: SmallStage, iteration: int) -> dict[str, list[np.ndarray]]:
    return read_weights(stage.folder / f"small_iter_{iteration}.caffemodel")


def assert_same_bits(found: SmallStage, expected: SmallStage, iteration: int) -> None:
    ours, theirs = weights_of(found, iteration), weights_of(expected, iteration)
    assert list(ours) == list(theirs)
    for name, blobs in theirs.items():
        for index, (blob, other) in enumerate(zip(ours[name], blobs, strict=True)):
            np.testing.assert_array_equal(blob, other, err_msg=f"{name}[{index}]")
    states = [
        (stage.folder / f"small_iter_{iteration}.solverstate").read_bytes() for stage in (found, expected)
    ]
    assert states[0] == states[1]


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"Iteration \d+ \(.*\), loss = (\S+)", log)]


def test_it_learns_and_its_log_is_read_as_caffes(initial: SmallStage) -> None:
    (found,) = find_runs([initial.folder / "run.log"])[0][0].stages
    stage = found.figures
    assert stage.finished
    assert stage.iterations == 20
    assert stage.top1 is not None and stage.loss is not None
    assert stage.gigamacs is not None and stage.gigamacs > 0
    assert stage.caffe_version is not None and stage.caffe_version.startswith("caffe-torch ")
    assert stage.images_per_second is not None
    said = losses((initial.folder / "run.log").read_text())
    assert said[-1] < said[0]
    assert final_is_complete(initial.folder / "small_iter_20.caffemodel", Dialect.BVLC)


def test_twice_the_same(initial: SmallStage, digits: Path, tmp_path: Path) -> None:
    again = SmallStage(tmp_path, digits)
    again.solver()
    again.run([PROGRAM])
    assert_same_bits(again, initial, 20)


def start(stage: SmallStage, *arguments: str) -> subprocess.Popen[bytes]:
    with (stage.folder / "killed.log").open("wb") as file:
        return subprocess.Popen([*PROGRAM, *arguments], cwd=stage.folder, stdout=file, stderr=file)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until ``condition`` holds, while ``process`` lives."""
    until = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        assert process is None or process.poll() is None, "the process ended"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({}, []),
        ({"iter_size": 2, "type": '"Adam"', "base_lr": 0.002}, ["-shuffle"]),
        ({"regularization_type": '"L1"'}, SPARSE),
        ({"regularization_type": '"L1"'}, settings_as_flags(EVERY_WEIGHT)),
        (AVERAGED, [*SPARSE, "-reestimate_batches", "3", "-recalibrate_tests"]),
        ({"iter_size": 2}, settings_as_flags(sparse_settings(**RIGL))),
    ],
    ids=[
        "plain",
        "Adam, shuffled",
        "sparse",
        "sparse, inner products too",
        "averaged, augmented",
        "rigl",
    ],
)
def test_killed_and_resumed_to_the_bit(
    changes: dict[str, object], arguments: list[str], digits: Path, tmp_path: Path
) -> None:
    """Killed at any moment: whichever the newest complete snapshot is, the end is the same to the bit."""
    whole, killed = SmallStage(tmp_path / "whole", digits), SmallStage(tmp_path / "killed", digits)
    for stage in (whole, killed):
        stage.solver(**{"snapshot": 1, "display": 1, "test_interval": 7, **changes})
        if changes is AVERAGED:
            train = stage.folder / "train.prototxt"
            train.write_text(
                train.read_text().replace("transform_param {", f"transform_param {{ {AUGMENTED}")
            )
    whole.run([[*PROGRAM, *arguments]])
    done = 0
    for kill_at in (3, 9, 16):
        resume = newest(killed)
        process = start(killed, *arguments, *resume)
        wait_for(lambda at=kill_at: iterations_there(killed) >= at, process)
        process.kill()
        process.wait()
        done = iterations_there(killed)
    assert done >= 16
    killed.run([[*PROGRAM, *arguments, *newest(killed)]])
    assert_same_bits(killed, whole, 20)


def test_regrowth_in_a_training(digits: Path, tmp_path: Path) -> None:
    """Thresholds at 4, 6 and 8; weights change places at 10, 12 and 14, and at no other iteration."""
    stage = SmallStage(tmp_path, digits)
    stage.solver(snapshot=1, momentum=0.9)
    sparse = sparse_settings(**{**RIGL, "display": 1})
    log = stage.run([[*PROGRAM, *settings_as_flags(sparse)]])
    assert re.findall(r"Finding and applying sparsity: (\S+)", log) == ["0.45", "0.5", "0.55"]
    said = re.findall(r"Regrowth by (\S+): (\d+) of (\d+) weights have changed places", log)
    shares = [0.15 * (1 + math.cos(math.pi * (at - 4) / (15 - 4))) for at in (10, 12, 14)]
    assert [share for share, _, _ in said] == [f"{share:.3g}" for share in shares]
    masks = {update: masks_of(stage, update) for update in range(1, 21)}
    changed = [
        at - 1 for at in range(10, 21) if any((masks[at][n] != masks[at - 1][n]).any() for n in LAYERS)
    ]
    assert changed == [10, 12, 14]
    for at, (_, moved, left) in zip(changed, said, strict=True):
        before, after = masks[at], masks[at + 1]
        assert sum(mask.sum() for mask in after.values()) == int(left)
        grown = {name: ~before[name] & after[name] for name in LAYERS}
        assert sum(new.sum() for new in grown.values()) == int(moved) > 0
        first, second = weights_of(stage, at + 1), weights_of(stage, at + 2)
        for name in LAYERS:
            assert not first[name][0][grown[name] | ~after[name]].any()
            assert not second[name][0][~masks[at + 2][name]].any()
        assert any(second[name][0][grown[name]].any() for name in LAYERS)
    count = sum(mask.size for mask in after.values())
    total = f"{1 - int(left) / count:.3g}"
    sparsities = re.findall(r"Total Sparsity .* (\S+)$", log, re.MULTILINE)
    assert sparsities[-12:] == [total] * 12  # also right after weights have changed places


def masks_of(stage: SmallStage, update: int) -> dict[str, np.ndarray]:
    """Where weights are free after so many updates."""
    snapshot = stage.folder / f"small_iter_{update}.solverstate"
    weights = {name: weights_of(stage, update)[name][0] for name in LAYERS}
    found = load_masks(snapshot, weights)[0]
    return {
        name: found[name] != 0 if name in found else np.ones(weights[name].shape, bool) for name in LAYERS
    }


def test_the_average_of_the_weights_is_tested_and_ends_the_stage(digits: Path, tmp_path: Path) -> None:
    """Against a loop in NumPy over the snapshots of all iterations; what it prunes is zero there, too."""
    stage = SmallStage(tmp_path, digits)
    stage.solver(**AVERAGED, snapshot=1, test_interval=10, test_initialization="true")
    log = stage.run([[*PROGRAM, *SPARSE]])
    plain = SmallStage(tmp_path / "plain", digits)
    plain.solver(**AVERAGED | {"ema_decay": 0}, snapshot=1, test_interval=10)
    plain.run([[*PROGRAM, *SPARSE]])
    expected: dict[str, list[np.ndarray]] = {}
    for update in range(1, 21):
        weights, last = weights_of(plain, update), update == 20
        if not last:
            found = weights_of(stage, update)
            assert all(
                (a == b).all() for name in weights for a, b in zip(found[name], weights[name], strict=True)
            )
        share = (1 - 0.8) / (1 - 0.8**update)
        for name, blobs in weights.items():
            before = expected.get(name, [np.zeros(1)] * len(blobs))
            expected[name] = [old + share * (new - old) for old, new in zip(before, blobs, strict=True)]
        for name in LAYERS:
            expected[name][0][weights[name][0] == 0] = 0
        path = tmp_path / f"small_iter_{update}{'' if last else '.ema'}.caffemodel"
        for name, blobs in read_weights(path).items():
            for blob, average in zip(blobs, expected[name], strict=True):
                np.testing.assert_allclose(blob, average, rtol=1e-4, atol=1e-6)
    assert sum((weights_of(stage, 20)[name][0] == 0).sum() for name in LAYERS) > 4000
    nets = re.findall(r"Iteration (\d+), Testing net \(#(\d)\)\n(.*Test weights)?", log)
    assert [(at, net, bool(averaged)) for at, net, averaged in nets] == [
        *(("0", "0", False), ("10", "0", False), ("10", "1", True), ("20", "0", False))
    ]
    tested = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "test", "-model", "val.prototxt"]
    tested += ["-iterations", "2", "-weights", "small_iter_10.ema.caffemodel"]
    said = re.findall(r"\] loss = (\S+)", stage.run([tested]))
    logged = re.findall(r": loss = (\S+)", log.partition("Iteration 10, Testing net (#1)")[2])
    assert float(logged[0]) == pytest.approx(float(said[0]), rel=1e-5)
    assert final_is_complete(tmp_path / "small_iter_20.caffemodel", Dialect.BVLC)


def test_small_images_first_and_resumed_to_the_bit(digits: Path, tmp_path: Path) -> None:
    """Tests and recalibration see the full size: without an update they are those of any training."""
    steps = "{ size: 12 } image_size { from_iter: 6 size: 20 } image_size { from_iter: 14 size: 28 }"
    stages = [SmallStage(tmp_path / name, digits) for name in ("whole", "resumed", "plain")]
    recalibrated = [*PROGRAM, "-reestimate_batches", "3", "-recalibrate_tests"]
    for stage in stages:
        sized = {} if stage is stages[2] else {"image_size": steps}
        stage.solver(**sized, snapshot=10, test_initialization="true", display=1)
    whole, resumed, plain = stages
    log = whole.run([recalibrated])
    for ending in ("caffemodel", "solverstate"):
        name = f"small_iter_10.{ending}"
        (resumed.folder / name).write_bytes((whole.folder / name).read_bytes())
    again = resumed.run([[*recalibrated, "-snapshot", "small_iter_10.solverstate"]])
    for iteration in (20,):
        ends = [stage.folder / f"small_iter_{iteration}.caffemodel" for stage in (whole, resumed)]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    sizes = r"Training images are resized to (\d+)x\d+ from here on"
    assert re.findall(sizes, log) == ["12", "20", "28"]
    assert re.findall(sizes, again) == ["20", "28"]
    first = r"Iteration 0, Testing net \(#0\)\n.*\n.*accuracy = (\S+)\n.* loss = (\S+)"
    other = plain.run([[*recalibrated]])
    assert re.findall(first, log) == re.findall(first, other) != []


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (29, "the network's images are 28x28 pixels; give a size of at most 28, or a larger crop_size"),
        (4, ": layer pool (Pooling): a window of 2x2 lies outside of the 1x1 pixels"),
    ],
)
def test_sizes_that_a_network_cannot_take_are_named_before_it_trains(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = SmallStage(tmp_path, digits)
    stage.solver(image_size=f"{{ size: {size} }}")
    train = tmp_path / "train.prototxt"
    pooled = "kernel_size: 2 } }\nlayer { name: 'all' type: 'Pooling' bottom: 'pool' top: 'all'\n"
    pooled += "  pooling_param { pool: AVE global_pooling: true"
    train.write_text(
        train.read_text()
        .replace("global_pooling: true", pooled)
        .replace('bottom: "pool" top: "fc"', "bottom: 'all' top: 'fc'")
    )
    files = {path.name: path.read_text() for path in tmp_path.glob("*.prototxt")}
    (problem,) = check_stages({"small": files}, {str(digits): (1, 28, 28)}, Dialect.BVLC)
    assert problem.startswith(f"solver.prototxt: image_size {size}: ") and says in problem


def test_an_average_that_is_missing_is_one_line(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(ema_decay=0.9)
    stage.run([PROGRAM])
    (tmp_path / "small_iter_10.ema.caffemodel").unlink()
    command = [*PROGRAM, "-snapshot", "small_iter_10.solverstate"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "small_iter_10.ema.caffemodel is missing, with which ema_decay continues; put it" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_one_threshold_for_all_weights_and_zeros_of_inner_products_that_hold(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse, finetune = SmallStage(tmp_path / "sparse", digits), SmallStage(tmp_path / "finetune", digits)
    sparse.solver()
    log = sparse.run([[*PROGRAM, *settings_as_flags(EVERY_WEIGHT)]])
    assert "All zero weights of convolution and inner product layers are frozen" in log
    before = weights_of(sparse, 20)
    zeros = {name: before[name][0] == 0 for name in (*LAYERS, "fc")}
    assert zeros["conv1"].mean() == pytest.approx(0.25, abs=1 / 288)
    every = np.concatenate([zeros[name].ravel() for name in zeros])
    assert every.mean() >= 0.5
    assert f"{every.mean():.3g}" == re.findall(r"Total Sparsity .* (\S+)$", log, re.MULTILINE)[-1]
    assert report([str(sparse.folder / "run.log"), "--format", "json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["stages"][-1]["sparsity"] == pytest.approx(every.mean(), abs=1e-3)
    finetune.solver()
    held = ["-freeze_zeros", "-sparsity_inner_products"]
    finetune.run([[*PROGRAM, "-weights", str(sparse.folder / "small_iter_20.caffemodel"), *held]])
    after = weights_of(finetune, 20)
    for name, mask in zeros.items():
        assert ((after[name][0] == 0) == mask).all()
        assert (after[name][0] != before[name][0]).any()
    # What is not to be recalibrated, as a network without batch norm, is finished with its final snapshot.
    engine, final = find_engine(None, "torch"), finetune.folder / "small_iter_20.caffemodel"
    for batches in (0, 5):
        job = finetune.job(final_weights=final, reestimate_batches=batches)
        assert engine.finished(job) == (batches == 0)


def test_killed_while_statistics_are_recalibrated(digits: Path, tmp_path: Path) -> None:
    """The snapshot from before is whole, and the recalibration is done again to the bit."""
    whole, killed = SmallStage(tmp_path / "whole", digits), SmallStage(tmp_path / "killed", digits)
    for stage in (whole, killed):
        stage.solver()
    whole.run([[*PROGRAM, "-reestimate_batches", "5"]])
    process = start(killed, "-reestimate_batches", "1000000")
    wait_for(lambda: "Recalibrating" in (killed.folder / "killed.log").read_text(), process)
    process.kill()
    process.wait()
    assert not (killed.folder / "small_iter_20.handover.json").exists()
    killed.run([[*PROGRAM, "-reestimate_batches", "5", *newest(killed)]])
    assert_same_bits(killed, whole, 20)


def newest(stage: SmallStage) -> list[str]:
    found = complete_snapshots(stage.folder / "small", Dialect.BVLC)
    return ["-snapshot", found[0].solverstate.name] if found else []


def iterations_there(stage: SmallStage) -> int:
    found = complete_snapshots(stage.folder / "small", Dialect.BVLC)
    return found[0].iteration if found else 0


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_taken_as_caffe_takes_them(ending: signal.Signals, digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100000, snapshot=100000, display=1, test_interval=100000)
    process = start(stage)
    log = tmp_path / "killed.log"
    wait_for(lambda: len(losses(log.read_text())) > 3, process)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: iterations_there(stage), process)
    process.send_signal(ending)
    assert process.wait(ENOUGH) == 0
    text = log.read_text()
    assert "Optimization stopped early." in text
    assert len(complete_snapshots(tmp_path / "small", Dialect.BVLC)) == 2
    wait_for(lambda: not orphans(stage))


def orphans(stage: SmallStage) -> list[str]:
    """Processes of the stage that still live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").resolve() == stage.folder.resolve():
                    found.append((entry / "cmdline").read_text())
            except OSError:
                continue
    return found


def test_a_killed_trainer_leaves_no_processes(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100000, snapshot=100000, display=1)
    process = start(stage)
    wait_for(lambda: len(losses((tmp_path / "killed.log").read_text())) > 2, process)
    process.kill()
    process.wait()
    wait_for(lambda: not orphans(stage))


def test_a_worker_whose_trainer_was_killed_before_it_began_ends(tmp_path: Path) -> None:
    """Linux tells nobody of a parent that is gone already."""
    script = """
import multiprocessing, os, signal, sys, time
from caffe_jacinto.engines.pytorch.loading import _begin_worker
def work():
    parent = multiprocessing.parent_process().pid
    while os.getppid() == parent:
        time.sleep(0.01)
    print("orphaned", flush=True)
    _begin_worker(0)
    print("works on", flush=True)
multiprocessing.get_context("fork").Process(target=work).start()
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script]
    # The output ends when the worker has.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=ENOUGH, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "orphaned\n"


def test_frozen_zeros_never_move(initial: SmallStage, digits: Path, tmp_path: Path) -> None:
    """Thresholds while momentum is large, then more training: what was zeroed stays zero."""
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=30, snapshot=1, test_interval=30)
    start_weights = str(initial.folder / "small_iter_20.caffemodel")
    log = stage.run([[*PROGRAM, "-weights", start_weights, *SPARSE, "-reestimate_batches", "5"]])
    assert re.findall(r"Finding and applying sparsity: (\S+)", log) == ["0.2", "0.4", "0.6"]
    assert "Recalibrating the statistics of 2 batch-norm layers over 5 batches" in log
    zeros = {name: weights_of(stage, 9)[name][0] == 0 for name in LAYERS}
    assert all(mask.any() for mask in zeros.values())
    for iteration in (10, 20, 30):
        for name, mask in zeros.items():
            assert (weights_of(stage, iteration)[name][0][mask] == 0).all()
    assert (tmp_path / "small_iter_30.handover.json").exists()

    finetune = SmallStage(tmp_path / "finetune", digits)
    finetune.solver(max_iter=10)
    final = str(tmp_path / "small_iter_30.caffemodel")
    finetune.run([[*PROGRAM, "-weights", final, "-freeze_zeros", "-reestimate_batches", "5"]])
    for name in LAYERS:
        before, after = weights_of(stage, 30)[name][0], weights_of(finetune, 10)[name][0]
        assert (after[before == 0] == 0).all()
        assert (after[before != 0] != before[before != 0]).any()


def torchrun(stage: SmallStage, *arguments: str, machines: int = 1) -> str:
    """Two ranks on the CPU by PyTorch's own launcher, started on each of one or two "machines"."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Addresses are numbers: not every machine can look up its own name.
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    ranks = ["--nnodes", str(machines), "--nproc-per-node", str(2 // machines), "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, *ranks, *PROGRAM[1:], *arguments]
    launchers = [
        subprocess.Popen(
            command,
            cwd=stage.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(machines)
    ]
    try:
        said = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0] * machines, "".join(said)[-3000:]
    return "".join(said)


@pytest.mark.parametrize(
    ("machines", "arguments"), [(1, []), (1, SPARSE), (2, SPARSE)], ids=["plain", "sparse", "two_machines"]
)
def test_two_ranks_are_one_with_twice_the_passes(
    machines: int, arguments: list[str], digits: Path, tmp_path: Path
) -> None:
    """The same half batches: the same losses and weights within float tolerance, and the same zeros."""
    two, one = SmallStage(tmp_path / "two", digits), SmallStage(tmp_path / "one", digits)
    two.solver(display=1, max_iter=10, snapshot=10, test_interval=10, base_lr=0.01)
    one.solver(display=1, max_iter=10, snapshot=10, test_interval=10, base_lr=0.01, iter_size=2)
    together, alone = torchrun(two, *arguments, machines=machines), one.run([[*PROGRAM, *arguments]])
    assert len(losses(together)) == len(losses(alone)) == 10
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-3)
    ours, theirs = weights_of(two, 10), weights_of(one, 10)
    for name in (*LAYERS, "fc"):
        scale = np.abs(theirs[name][0]).max()
        np.testing.assert_allclose(ours[name][0], theirs[name][0], atol=1e-3 * scale)
    if arguments:
        for name in LAYERS:
            different = (ours[name][0] == 0) != (theirs[name][0] == 0)
            assert different.mean() < 0.01  # at the threshold, a rounding may choose another weight
        assert 0.5 < (ours["conv2"][0] == 0).mean() < 0.61


FAULTY = """import os, sys
from caffe_jacinto.engines.pytorch import distributed, pruner
from caffe_jacinto.engines.pytorch.__main__ import script

distributed.PROGRAM = "faulty"
right = pruner.TorchPruner.after_update

def after_update(self, iteration):
    if iteration == 8 and os.environ.get("RANK") == "1":
        weights = self.read("conv2").copy()
        weights.flat[abs(weights).argmax()] = 0
        self.write("conv2", weights)
    return right(self, iteration)

pruner.TorchPruner.after_update = after_update
sys.exit(script())
"""
"""`caffe-torch` with a second rank in whose memory a weight turns to zero."""


@pytest.mark.parametrize("method", ["magnitude", "soft"])
def test_ranks_whose_zeros_differ_end_with_one_line(method: str, digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(snapshot=5)
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = [sys.executable, "-m", "faulty", *PROGRAM[3:], "-cpu_ranks", "2"]
    ran = subprocess.run(
        [*command, *settings_as_flags(sparse_settings(method=method))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == FAILED
    *log, last = ran.stderr.splitlines()
    says = "Iteration 8: the ranks have different zeros in layer conv2; resume from the last snapshot"
    assert re.fullmatch(rf"F\d{{8}} .*\] {says}", last)
    assert not [line for line in log if re.match(r"[FEW]\d{8} |Traceback", line) or "Warning" in line]
    assert complete_snapshots(tmp_path / "small", Dialect.BVLC)


def test_the_fastest_precision_is_taken_and_remembered(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=4, snapshot=2, test_interval=10)
    log = stage.run([[*PROGRAM, "-precision", "auto"]])
    found = re.search(
        r"Computing in (fp32|bf16): a pass forward and backward takes fp32 ([\d.]+) ms, bf16 ([\d.]+) ms", log
    )
    assert found
    assert (found[1] == "bf16") == (float(found[3]) < float(found[2]))
    resumed = stage.run([[*PROGRAM, "-precision", "auto", "-snapshot", "small_iter_2.solverstate"]])
    assert "Computing in" not in resumed
    one, other = (read_place(stage.folder / f"small_iter_{at}.solverstate") for at in (2, 4))
    assert one is not None and other is not None
    assert one.precision == other.precision == found[1]


@pytest.mark.parametrize("chosen", ["fp32", "bf16", None])
def test_the_batch_that_fits_is_that_of_the_chosen_precision(
    chosen: str | None,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A GPU's memory runs out in the first iteration, or while the precision is chosen; a stand-in for it."""
    SmallStage(tmp_path, digits).solver()
    monkeypatch.chdir(tmp_path)
    asked = []

    def fastest(*arguments: object) -> tuple[str, str]:
        if chosen is None:
            raise torch.OutOfMemoryError("a pass fits into the memory in no precision")
        return chosen, f"Computing in {chosen}"

    def too_small(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def largest_batch(solver: object, shapes: object, device: object, precision: str) -> int:
        asked.append(precision)
        return 24

    monkeypatch.setattr("caffe_jacinto.engines.pytorch.stage.fastest", fastest)
    monkeypatch.setattr(Iteration, "__call__", too_small)
    monkeypatch.setattr(memory, "largest_batch", largest_batch)
    with pytest.raises(SystemExit) as ended:
        caffe_torch(["train", "-solver", "solver.prototxt", "-precision", "auto"])
    assert ended.value.code == FAILED
    assert "memory is too small: a batch_size of 24 should fit" in capfd.readouterr().err
    assert asked == [chosen or "bf16"]


def test_two_ranks_exchange_gradients_once_for_several_passes(digits: Path, tmp_path: Path) -> None:
    two, one = SmallStage(tmp_path / "two", digits), SmallStage(tmp_path / "one", digits)
    for stage, passes in ((two, 2), (one, 4)):
        stage.solver(display=1, max_iter=4, snapshot=4, test_interval=10, base_lr=0.01, iter_size=passes)
    together, alone = torchrun(two), one.run([PROGRAM])
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-3)
    ours, theirs = weights_of(two, 4), weights_of(one, 4)
    for name in (*LAYERS, "fc"):
        np.testing.assert_allclose(ours[name][0], theirs[name][0], atol=1e-3 * np.abs(theirs[name][0]).max())


@pytest.mark.parametrize("saved", ["mean", "first"])
def test_whose_batch_norm_statistics_are_saved(saved: str, digits: Path, tmp_path: Path) -> None:
    """After one iteration, a mean is that of a batch: of both ranks' batches at once, or of the first's."""
    two, one = SmallStage(tmp_path / "two", digits), SmallStage(tmp_path / "one", digits)
    for stage in (two, one):
        stage.solver(max_iter=1, snapshot=1, test_interval=10)
    torchrun(two, "-bn_stats", saved)
    if saved == "mean":
        text = (one.folder / "train.prototxt").read_text()
        (one.folder / "train.prototxt").write_text(text.replace("batch_size: 32", "batch_size: 64"))
    one.run([PROGRAM])
    found, expected = weights_of(two, 1)["conv1/bn"], weights_of(one, 1)["conv1/bn"]
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert found[2] == expected[2] == 1


def in_the_forks_dialect(stage: SmallStage) -> SmallStage:
    """Scale and bias as part of the batch norms."""
    for path in stage.folder.glob("*.prototxt"):
        text = re.sub(r'layer \{ name: "conv\d/scale".*\n.*\n', "", path.read_text())
        path.write_text(text.replace("fraction: 0.99", "fraction: 0.99 scale_bias: true"))
    return stage


def test_recalibrated_tests_leave_no_trace_in_training(
    initial: SmallStage, digits: Path, tmp_path: Path
) -> None:
    logs, stages = [], []
    weights = ["-weights", str(initial.folder / "small_iter_20.caffemodel"), *SPARSE]
    for name in ([], ["-recalibrate_tests"]):
        stage = SmallStage(tmp_path / str(len(name)), digits)
        stage.solver(test_interval=5)
        command = [*PROGRAM, *weights, "-shuffle", "-reestimate_batches", "5", *name]
        logs.append(stage.run([command]))
        stages.append(stage)
    for iteration in (10, 20):
        assert_same_bits(stages[1], stages[0], iteration)
    assert losses(logs[0]) == losses(logs[1])
    counts = [log.count("    Test statistics: recalibrated over 5 batches\n") for log in logs]
    assert counts == [1, 4]
    accuracies = [re.findall(r"Test net output #0: accuracy = (\S+)", log) for log in logs]
    assert accuracies[0] != accuracies[1] and accuracies[0][-1] == accuracies[1][-1]


def test_statistics_are_the_same_in_both_dialects(initial: SmallStage, digits: Path, tmp_path: Path) -> None:
    """Recalibrated from the same weights, over the same batches; nothing is learned between."""
    stock = SmallStage(tmp_path / "stock", digits)
    fork = in_the_forks_dialect(SmallStage(tmp_path / "fork", digits))
    start_weights = initial.folder / "small_iter_20.caffemodel"
    convert(start_weights, tmp_path / "fork.caffemodel", Dialect.CAFFE_JACINTO)
    batches = ["-reestimate_batches", "7"]
    for stage, arguments in (
        (stock, ["-weights", str(start_weights)]),
        (fork, ["-weights", "../fork.caffemodel", "-dialect", "caffe_jacinto"]),
    ):
        stage.solver(base_lr=0, max_iter=1, snapshot=1, test_interval=1)
        stage.run([[*PROGRAM, *arguments, *batches]])
    ours, theirs = weights_of(fork, 1), weights_of(stock, 1)
    for name in LAYERS:
        np.testing.assert_array_equal(ours[name][0], theirs[name][0])
        mean, variance, factor = theirs[f"{name}/bn"]
        assert factor != weights_of(initial, 20)[f"{name}/bn"][2]
        np.testing.assert_allclose(np.ravel(ours[f"{name}/bn"][0]), mean / factor, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.ravel(ours[f"{name}/bn"][1]), variance / factor, rtol=1e-4)


def test_adadelta_trains_the_same_in_both_dialects(initial: SmallStage, digits: Path, tmp_path: Path) -> None:
    """With the least delta that the fork computes with, which a smaller one becomes there."""
    stock = SmallStage(tmp_path / "stock", digits)
    fork = in_the_forks_dialect(SmallStage(tmp_path / "fork", digits))
    start_weights = initial.folder / "small_iter_20.caffemodel"
    convert(start_weights, tmp_path / "fork.caffemodel", Dialect.CAFFE_JACINTO)
    logs = []
    for stage, delta, arguments in (
        (stock, 1e-3, ["-weights", str(start_weights)]),
        (fork, 1e-6, ["-weights", "../fork.caffemodel", "-dialect", "caffe_jacinto"]),
    ):
        fields = {"type": '"AdaDelta"', "base_lr": 1, "delta": delta, "display": 1, "snapshot": 5}
        stage.solver(**fields, max_iter=10, test_interval=1000)
        logs.append(losses(stage.run([[*PROGRAM, *arguments]])))
    assert len(logs[0]) == 10
    np.testing.assert_allclose(logs[1], logs[0], rtol=0, atol=1e-3)
    again = fork.run([[*PROGRAM, "-snapshot", "small_iter_5.solverstate", "-dialect", "caffe_jacinto"]])
    assert losses(again) == logs[1][5:]


def test_the_forks_files_on_two_ranks(digits: Path, tmp_path: Path) -> None:
    """The batch is divided, rounded up; the solver's own fields sparsify; a resume gives the same bits."""
    stage = in_the_forks_dialect(SmallStage(tmp_path, digits))
    train = tmp_path / "train.prototxt"
    train.write_text(train.read_text().replace("batch_size: 32", "batch_size: 33"))
    fields = {"start_iter": 4, "step_iter": 2, "step_factor": 0.2, "target": 0.5}
    fields |= {"threshold_maxratio": 10, "threshold_value_max": 10}
    sparse = {f"sparsity_{name}": value for name, value in fields.items()}
    stage.solver(sparse_mode="SPARSE_UPDATE", display_sparsity=5, snapshot=5, **sparse)
    log = torchrun(stage, "-dialect", "caffe_jacinto")
    assert "a batch of 33 does not divide among 2 GPUs; it is 34 now" in log
    assert "output data size: 17,1,28,28" in log
    assert re.findall(r"Finding and applying sparsity: (\S+)", log) == ["0.2", "0.4", "0.6"]
    found = complete_snapshots(tmp_path / "small", Dialect.CAFFE_JACINTO)
    assert [snapshot.iteration for snapshot in found] == [20, 15, 10, 5]
    finals = weights_of(stage, 20)
    zeros = {name: weights_of(stage, 10)[name][0] == 0 for name in LAYERS}
    assert sum(mask.sum() for mask in zeros.values()) > 0.5 * sum(mask.size for mask in zeros.values())
    for name, mask in zeros.items():
        assert (finals[name][0][mask] == 0).all()

    log = torchrun(stage, "-dialect", "caffe_jacinto", "-snapshot", "small_iter_5.solverstate")
    assert "The sparsity schedule continues from 0.2" in log
    again = weights_of(stage, 20)
    for name in LAYERS:
        np.testing.assert_array_equal(again[name][0], finals[name][0])


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda text: text.replace('"poly"', '"magic"'), "lr_policy 'magic' is unknown"),
        (lambda text: text + 'type: "RMSProp"\n', "solver.prototxt"),
        (lambda text: text.replace('"SGD"', '"Magic"'), "solver type 'Magic' is not supported"),
        (lambda text: text.replace('"train.prototxt"', '"missing.prototxt"'), "missing.prototxt: No such"),
        (lambda text: text.replace('"small"', '"nowhere/small"'), "its folder is missing (looked for in /"),
    ],
)  # fmt: skip
def test_bad_solvers_are_one_line(
    break_it: Callable[[str], str], says: str, digits: Path, tmp_path: Path
) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver()
    solver = tmp_path / "solver.prototxt"
    solver.write_text(break_it(solver.read_text()))
    ran = subprocess.run(PROGRAM, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_loss_that_is_no_number_is_one_line_of_two_ranks(digits: Path, tmp_path: Path) -> None:
    SmallStage(tmp_path, digits).solver(base_lr=1e30, display=1)
    ran = subprocess.run([*PROGRAM, "-cpu_ranks", "2"], cwd=tmp_path, capture_output=True, check=False)
    assert ran.returncode == FAILED
    assert ran.stderr.count(b"the loss is not a number") == 1


def test_a_loss_that_is_no_number_ends_the_training(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(base_lr=1e30, display=1, snapshot=100000)
    ran = subprocess.run(PROGRAM, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert re.search(r"Iteration \d+: the loss is not a number", ran.stderr)
    assert "Traceback" not in ran.stderr
    assert not complete_snapshots(tmp_path / "small", Dialect.BVLC)
