"""The session of disturbances (tools/utils/faults.sh): what it would find, and that a seed repeats it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bad_images import encoded, photograph
from faults import hostile, knocks, moments, small_disk, table
from faults.cases import ROTATION, Broken, Case, Result
from faults.compare import compare
from faults.damage import KINDS
from faults.disturbed import FAILED, FINISHED, REFUSED, STAGES, Command, final_weights, tracebacks
from faults.hostile_archives import hostile_archive
from faults.hostile_logs import hostile_log

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

SHAPES = {"conv": ((8, 4, 3, 3), (8,)), "fc": ((2, 8),)}


def write_run(run: Path, seed: int = 0, **changes: float) -> Path:
    """The final snapshots of all stages; half of the convolution is zero from the sparse stage on.

    ``changes``: the first weight of a stage's convolution, which is zero otherwise.
    """
    for stage in STAGES:
        path = final_weights(run, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        net = messages(Dialect.BVLC).NetParameter(name="net")
        state = messages(Dialect.BVLC).SolverState(iter=STAGES[stage], learned_net=path.name)
        for name, shapes in SHAPES.items():
            layer = net.layer.add(name=name)
            for shape in shapes:
                values = generator.normal(size=shape).astype(np.float32)
                if name == "conv" and len(shape) == 4 and stage in ("sparse", "finetune"):
                    values[:4] = 0
                    values[0, 0, 0, 0] = changes.get(stage, 0)
                for blob in (layer.blobs.add(data=values.ravel()), state.history.add(data=values.ravel())):
                    blob.shape.dim.extend(shape)
        path.write_bytes(net.SerializeToString())
        path.with_suffix(".solverstate").write_bytes(state.SerializeToString())
    return run


def test_runs_that_are_alike_pass(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    compare(one, other, to_the_bit=True)
    compare(write_run(tmp_path / "another", seed=1), other, to_the_bit=False)


def test_a_bit_that_differs_is_found(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    path = final_weights(one, "l1reg")
    weight = read_weights(path)["fc"][0][-1, -1]
    nearly = np.nextafter(weight, np.float32(9))
    path.write_bytes(path.read_bytes().replace(weight.tobytes(), nearly.tobytes()))
    with pytest.raises(Broken, match="1 weights of l1reg, layer fc, blob 0 differ"):
        compare(one, other, to_the_bit=True)
    compare(one, other, to_the_bit=False)


def test_a_zero_that_moved_is_found(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", finetune=0.5), write_run(tmp_path / "other")
    with pytest.raises(Broken, match="1 zeros of conv moved in finetune"):
        compare(one, other, to_the_bit=False)


def test_a_final_snapshot_that_is_cut_off_or_less_sparse_is_found(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    weights = final_weights(one, "sparse")
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-20])
    with pytest.raises(Broken, match="the final weights of sparse are not complete"):
        compare(one, other, to_the_bit=False)
    weights.write_bytes(sound)
    final_weights(one, "sparse").write_bytes(final_weights(one, "initial").read_bytes())
    with pytest.raises(Broken, match="the sparsity of sparse is"):
        compare(one, other, to_the_bit=False)


@pytest.mark.parametrize(
    ("words", "code", "broken"),
    [
        ("all is well", FINISHED, None),
        ("train: error: disk full; to resume: train --resume run", FAILED, None),
        ("train: error: no such recipe", REFUSED, None),
        ("Traceback (most recent call last):", FINISHED, "a traceback"),
        ("train: error: disk full", FAILED, "without how to go on"),
        ("no such recipe", REFUSED, "without an error line"),
        ("all is well", 7, "exit code 7"),
    ],
)
def test_what_a_command_may_say(tmp_path: Path, words: str, code: int, broken: str | None) -> None:
    said = tmp_path / "said"
    with said.open("w") as stream:
        script = f"print({words!r}); raise SystemExit({code})"
        process = subprocess.Popen([sys.executable, "-c", script], stdout=stream, text=True)
    command = Command(process, said)
    if broken is None:
        assert command.finish(FINISHED, FAILED, REFUSED) == (code, words + "\n")
    else:
        with pytest.raises(Broken, match=broken):
            command.finish(FINISHED, FAILED, REFUSED)


def test_a_traceback_counts_unless_python_itself_was_starting() -> None:
    frames = 'Traceback (most recent call last):\n  File "{}", line 1, in <module>\n    code\n{}\n'
    ours, pythons = "/usr/lib/caffe_jacinto/train.py", "<frozen site>"
    assert tracebacks("said\n" + frames.format(pythons, "KeyboardInterrupt")) == []
    for path, error in ((ours, "KeyboardInterrupt"), (pythons, "ValueError: 1"), (ours, "KeyError: 2")):
        text = frames.format(pythons, "KeyboardInterrupt") + "more\n" + frames.format(path, error) + "end\n"
        assert len(tracebacks(text)) == 1, text
    assert len(tracebacks("Traceback (most recent call last):")) == 1


def test_a_seed_repeats_its_cases() -> None:
    def drawn(case: Case) -> tuple[object, ...]:
        dice = case.dice()
        return (
            moments.choose(dice, "sparse"),
            knocks.draw_storm(dice),
            hostile_log([b"Iteration 1\n"], dice),
        )

    assert drawn(Case(3, 7)) == drawn(Case(3, 7))
    assert len({str(drawn(Case(seed, number))) for seed in (3, 4) for number in range(20)}) == 40
    assert {Case(0, number).kind for number in range(len(ROTATION))} == {kind for kind, _ in ROTATION}


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready", flush=True)
time.sleep(60)
"""


def test_both_are_killed_and_an_engine_that_leaves_something_behind_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    with start(PARENT) as driver:
        children = knocks.descendants(driver.pid)
        assert len(children) == 1
        assert knocks.kill(driver.pid, "both")
        assert not any(map(knocks.is_alive, [driver.pid, *children]))
    monkeypatch.setattr(knocks, "GONE_SECONDS", 0.2)
    starts_parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PARENT!r}])"
    with start(starts_parent) as driver:
        left = knocks.descendants(driver.pid)[1:]
        with pytest.raises(Broken, match="live on"):
            knocks.kill(driver.pid, "both")
        for pid in left:
            knocks.kill(pid, "driver")


def test_moments_come_by_lines_by_files_and_too_late(tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    (tmp_path / "test").mkdir()
    log, later = tmp_path / "sparse/run.log", tmp_path / "test/run.log"
    log.write_text("Testing net\nTesting net\n")
    with subprocess.Popen(["sleep", "60"], text=True) as process:
        by_line = moments.Watch(moments.Moment("a test", "sparse", "Testing net", 2), tmp_path, ["test"])
        by_file = moments.Watch(moments.Moment("a snapshot", "sparse", nth=1, of_files=True), tmp_path, [])
        too_late = moments.Watch(moments.Moment("a test", "sparse", "Testing net", 9), tmp_path, ["test"])
        with log.open("a") as stream:
            stream.write("Testing net\nIteration 1\nTesting net\n")
        assert by_line.wait(process) == "a test"
        (tmp_path / "sparse/.net_iter_2.caffemodel.x").touch()
        assert by_file.wait(process) == "a snapshot"
        later.touch()
        later.write_text("begun\n")
        assert too_late.wait(process) == moments.RANDOM
        process.kill()
        process.wait()
        never = moments.Watch(moments.Moment("a test", "sparse", "Testing net"), tmp_path, [])
        assert never.wait(process) is None


def test_a_command_of_this_process_is_held_to_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(action: object) -> tuple[int, str]:
        def main(arguments: Sequence[str]) -> int:
            if isinstance(action, BaseException):
                raise action
            if isinstance(action, float):
                time.sleep(action)
            return int(action)  # type: ignore[call-overload,no-any-return]

        return hostile.call("program", main, "input")

    assert command(0)[0] == 0
    assert command(UserError("not a log")) == (2, "program: error: not a log\n")
    for action, broken in (
        (RecursionError(), "a traceback: RecursionError"),
        (3, "exit code 3"),
        (2, "error line"),
    ):
        with pytest.raises(Broken, match=broken):
            command(action)
    monkeypatch.setattr(hostile, "MOST_SECONDS", 0.1)
    with pytest.raises(Broken, match="takes more than"):
        command(5.0)


def test_each_damage_changes_what_it_says(tmp_path: Path) -> None:
    dice = Case(0, 0).dice()
    for kind in KINDS:
        run = tmp_path / kind.name / "run"
        write_run(run)
        (run / "l1reg/run.log").write_text("old\nlog\n")
        for number, name in enumerate(("train_lmdb", "val_lmdb")):
            (run.parent / name).mkdir()
            (run.parent / name / "data.mdb").write_bytes(bytes([number]) * 100)
        for name in ("lock", "run.json", "sparse/run.log", "sparse/solver.prototxt", "sparse/train.prototxt"):
            (run / name).write_text("one: 1\ntwo: 2\n")
        final = final_weights(run, "sparse")
        for suffix in (".caffemodel", ".solverstate", ".masks.npz"):
            for iteration in (2, STAGES["sparse"]):
                path = final.with_name(
                    final.name.replace(f"_{STAGES['sparse']}.caffemodel", f"_{iteration}{suffix}")
                )
                path.write_bytes(b"%d" % iteration * 999)
        before = {path.resolve(): path.read_bytes() for path in run.parent.rglob("*.*") if path.is_file()}
        changed = kind.apply(run, dice)
        assert changed, kind.name
        for path in changed:
            assert not path.is_file() or path.read_bytes() != before[path.resolve()], kind.name


def test_hostile_archives_are_of_many_kinds(tmp_path: Path) -> None:
    contents = set()
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, _ = hostile_archive(folder, Case(0, number).dice())
        contents.add(path.read_bytes())
    assert len(contents) > 20
    assert encoded(photograph()) in b"".join(contents)


def test_the_table_counts_and_is_ready_to_paste(tmp_path: Path) -> None:
    result = Result(Counter({"both killed: a test": 2, "LMDBs at their end": 0}))
    result.write(tmp_path / "result")
    assert Result.read(tmp_path / "result") == result
    rows = table.rows([(Case(0, 0), result), (Case(0, 1), Result(broken="a traceback"))])
    assert rows == [["both killed: a test", "2", "", ""], ["promises broken", "0", "1", "0"]]
    assert "| both killed: a test | 2 |  |  |" in table.markdown("seed 0", rows).splitlines()
    assert Case(5, 9).command() == "tools/utils/faults.sh --seed 5 --only 9"


@pytest.mark.skipif(small_disk.why_not() is not None, reason=f"no small disk here: {small_disk.why_not()}")
def test_the_small_disk_is_small_and_fills(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from faults.small_disk import fill; import shutil\n"
    script += "disk = Path(sys.argv[1]); assert disk.is_mount(); fill(disk / 'filler', 100_000)\n"
    script += "print(shutil.disk_usage(disk).free)"
    command = small_disk.on_small_disk([sys.executable, "-c", script, str(tmp_path)], tmp_path)
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert 90_000 < int(done.stdout) <= 100_000
    assert not (tmp_path / "filler").exists()
