"""The parts of a run that need no Caffe: its log, which snapshots stay, who may train, what is shown."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_text import Log
from test_snapshots import write_pair

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import is_unfinished
from caffe_jacinto.common.processes import describe_exit
from caffe_jacinto.engines.snapshots import spoiled_snapshots
from caffe_jacinto.logs.solver_tests import SolverTest
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.folder import RunRecord, StageState
from caffe_jacinto.runs.lock import Holder, RunLock, is_held
from caffe_jacinto.runs.plan import shell_script
from caffe_jacinto.runs.process import Child
from caffe_jacinto.runs.progress import (
    LastingStream,
    Place,
    Progress,
    Screen,
    live_lines,
    outputs_line,
    progress,
    stage_summary,
    time_left,
)
from caffe_jacinto.runs.retention import Keeper, comparable_top1, kept_iterations, remove_others
from caffe_jacinto.runs.watch import StageView, Tail, last_words, read_log


def line(second: float, text: str, source: str = "solver.cpp:239") -> str:
    return f"I1123 10:00:{second:09.6f}  77 {source}] {text}\n"


def displays(*losses: float) -> bytes:
    texts = (
        line(2 * i, f"Iteration {10 * i} (5 iter/s, 2s/10 iters), loss = {loss}")
        for i, loss in enumerate(losses)
    )
    return "".join(texts).encode()


# ------------------------------------------------------------------------------------------------- watching


def test_progress_is_read_from_the_log() -> None:
    log = StageLog(live=True)
    log.feed(displays(2.3, 1.5) + line(3, "Iteration 10, lr = 0.05", "sgd_solver.cpp:112").encode())
    assert (log.iteration, log.loss, log.learning_rate) == (10, 1.5, 0.05)
    assert log.seconds_per_iteration() == pytest.approx(0.2)
    place = Place(load_recipe("demo_digits", ["stages.initial.solver.max_iter=60"]), "initial")
    shown = progress(log, place)
    assert shown.fields() == [
        *("stage 1/5 initial", "iteration 10/60", "loss 1.5", "lr 0.05"),
        "320 images/s",  # 64 images an iteration of 0.2 s
        *("10 s left", "1 min 42 s for the run"),
    ]
    assert progress(log, place, running=False).fields() == shown.fields()[:4]


def test_a_log_that_says_nothing_for_a_while() -> None:
    log = StageLog(live=True)
    log.feed(displays(2.3, 1.5))
    place = Place(load_recipe("demo_digits", ["stages.initial.solver.max_iter=610"]), "initial")
    assert time_left(log, place) == ["2 min 0 s left", "3 min 32 s for the run"]
    assert progress(log, place, silent=29).figures == ["loss 1.5", "320 images/s"]
    shown = progress(log, place, silent=60)
    assert shown.figures[-1] == "last line 1 min 0 s ago"
    assert shown.left == ["1 min 0 s left", "2 min 32 s for the run"]
    assert progress(log, place, silent=1000).left[0] == "0.0 s left"


def test_tests_are_kept_by_iteration() -> None:
    log = StageLog(live=True)
    log.feed(Log().start().test(50, 0.75, 0.95, 0.9).text.encode())
    assert (log.in_test, log.tests) == (True, {})
    log.feed(displays(1.0))
    assert not log.in_test
    outputs = {"loss": 0.9, "nearly right": 0.95, "right": 0.75}
    assert log.tests == {50: SolverTest(outputs, top1=0.75, recalibrated=False)}
    assert outputs_line(log, outputs) == "top-1 0.75, top-5 0.95, loss 0.9"


def test_of_a_network_that_glog_has_cut_the_stages_own_file_names_the_accuracies(tmp_path: Path) -> None:
    text = Log().start().sparsity(0.805, 0.5).test(50, 0.75, 0.95, 0.9).end().text
    network = text[text.index('name: "tiny"\nstate {\n  phase: TEST') :]
    network = network[: network.index("\nI0815")]
    (tmp_path / "run.log").write_text(text.replace(network, network[: len(network) // 2]))
    log = read_log(tmp_path)
    assert (log.tests[50].top1, list(log.tests[50].outputs)) == (None, ["loss", "nearly right", "right"])
    (tmp_path / "val.prototxt").write_text(network.replace("state {\n  phase: TEST\n}\n", ""))
    log = read_log(tmp_path)
    assert (log.tests[50].top1, log.sparsity) == (0.75, 0.805)


def test_a_test_of_many_outputs_is_shown_in_one_line() -> None:
    outputs = {f"class[{number}]": 0.5 for number in range(1000)}
    assert outputs_line(StageLog(live=True), outputs).endswith(", and 992 more")


@pytest.mark.parametrize(
    ("losses", "trouble", "sound"),
    [
        ((2.3, 1.0), None, 10),
        ((2.3, float("nan")), "not a number", 0),
        ((2.3, float("-inf")), "not a number", 0),
        ((87.3365, 87.3365), None, 0),
        ((87.3365, 2.0, 87.3365, 87.3365), None, 10),
        ((2.3, 87.3365, 87.3365, 87.3365), "stuck at 87.3365 at iteration 30", 0),
        ((2.3, 1746.73, 1746.73, 1746.73), "stuck at 1746.73 (87.3365 times its loss_weight, 20)", 0),
        ((2.3, 1746.73, 1746.9, 1746.73), None, 20),
    ],
)
def test_a_loss_that_goes_wrong(losses: tuple[float, ...], trouble: str | None, sound: int) -> None:
    view = StageView()
    view.feed(displays(*losses))
    assert (view.trouble is None) if trouble is None else (trouble in str(view.trouble))
    assert view.sound == sound


def softmax_log(*losses: float, weight: float = 1, step: int = 100) -> bytes:
    """A training of a network of ten classes whose softmax loss has a ``weight``."""
    log = Log()
    log.start()
    log.text = log.text.replace('top: "loss"\n', f'top: "loss"\n  loss_weight: {weight}\n')
    for number, loss in enumerate(losses):
        log.line("solver.cpp", f"Iteration {number * step} (5 iter/s, 20s/100 iters), loss = {loss:g}")
    return log.text.encode()


@pytest.mark.parametrize("weight", [1, 0.3, 1.6, 20])
@pytest.mark.parametrize("dialect_start", [b"", b"[0.0] "])
def test_the_largest_loss_in_any_multiple(weight: float, dialect_start: bytes) -> None:
    text = softmax_log(2.3, *[87.3365 * weight] * 3, weight=weight)
    view = StageView()
    view.feed(text.replace(b"] Iteration", b"] " + dialect_start + b"Iteration"))
    assert view.trouble is not None
    assert f"stuck at {87.3365 * weight:g}" in view.trouble
    assert ("loss_weight" in view.trouble) == (weight != 1)
    assert view.sound == 0


def test_a_loss_between_76_and_87_is_named_but_trains_on() -> None:
    wrong = [80, 87.3365, 76.5, 87.3365, 87.3365, 81, 84, 79, 83, 87.0]
    view = StageView()
    view.feed(softmax_log(2.3, *wrong[:9]))
    assert (view.trouble, view.doubts(), view.sound) == (None, {}, 0)
    view.feed(softmax_log(2.3, *wrong, weight=2))  # of a network whose loss it is half of
    assert view.doubts() == {}
    view = StageView()
    view.feed(softmax_log(2.3, *wrong, 1.5))
    assert view.trouble is None
    assert view.doubts()["high"].startswith("the loss has been between 76 and 87.3365 since iteration 100")
    assert view.sound == 1100


def test_a_loss_that_stays_at_chance_for_thousands_of_iterations_is_named() -> None:
    chance = [2.30, 2.31, 2.302, 2.3026] * 10
    view = StageView()
    view.feed(softmax_log(*chance[:30]))
    assert view.doubts() == {}
    view = StageView()
    view.feed(softmax_log(2.8, *chance))
    assert "guessing among 10 classes (ln 10), since iteration 100" in view.doubts()["chance"]
    assert view.trouble is None
    learns = StageView()
    learns.feed(softmax_log(*chance[:29], 2.2, *chance[:29]))
    assert learns.doubts() == {}
    weighted = StageView()
    weighted.feed(softmax_log(*(20 * loss for loss in chance), weight=20))
    assert "stayed at 46.04, that of guessing among 10 classes" in weighted.doubts()["chance"]


def test_the_losses_of_a_published_training_raise_no_doubt(published: Path) -> None:
    view = StageView()
    view.feed((published / "logs" / "imagenet_jacintonet11_sparse.log").read_bytes())
    assert (view.trouble, view.doubts()) == (None, {})


def test_what_is_said_of_a_loss_is_said_once_in_a_run(tmp_path: Path) -> None:
    from caffe_jacinto.runs.driver import Driver

    out = io.StringIO()
    driver = Driver(None, None, None, Screen(out), None, 2)  # type: ignore[arg-type]
    for _ in ("one stage", "the next"):
        view = StageView()
        view.feed(softmax_log(*[2.3026] * 40))
        for _ in range(3):
            driver._say_doubts(view)
    assert out.getvalue().count("guessing among 10 classes") == 1


def test_a_new_part_forgets_how_the_one_before_ended() -> None:
    view = StageView()
    view.feed(displays(2.3, float("nan")) + b"F1123 10:00:09.000000  77 solver.cpp:1] Check failed: x\n")
    assert (view.trouble is None, view.log.fatal) == (False, "Check failed: x")
    view.begin_part(4)
    assert (view.trouble, view.log.fatal, view.log.iteration) == (None, None, 4)


def test_of_a_published_log_the_live_line_shows_what_the_report_does(published: Path) -> None:
    view = StageView()
    view.feed((published / "logs" / "imagenet_jacintonet11_sparse.log").read_bytes())
    log = view.log
    assert (log.iteration, log.max_iter, view.trouble) == (160000, 160000, None)
    # The log's own total counts the inner product too.
    assert (log.sparsity, log.sparsity_logged) == (0.805, 0.661)
    assert log.figures().sparsity == log.sparsity
    assert log.tests[160000].top1 == log.figures().top1 == 0.596824
    recipe = load_recipe("imagenet_jacintonet11")
    assert "sparsity 0.805" in progress(log, Place(recipe, "sparse"), running=False).figures
    assert stage_summary(log, Place(recipe, "sparse"), 33166.0).endswith(
        "finished, 160,000 iterations in 9 h 12 min, top-1 0.5968, sparsity 0.805"
    )


@pytest.mark.parametrize(
    ("first", "last", "pace"),
    [
        ("1231 23:59:59.000000", "0101 00:00:01.000000", 0.2),
        ("20261231 23:59:59.000000", "20270101 00:00:01.000000", 0.2),
        ("1025 02:59:59.000000", "1025 02:00:01.000000", None),  # summer time ends: no pace is known
    ],
)
def test_the_pace_over_the_end_of_a_year_and_of_summer_time(
    first: str, last: str, pace: float | None
) -> None:
    log = StageLog(live=True)
    for stamp, iteration in ((first, 0), (last, 10)):
        log.feed(f"I{stamp}  77 solver.cpp:239] Iteration {iteration} (5 iter/s), loss = 1\n".encode())
    assert log.seconds_per_iteration() == (None if pace is None else pytest.approx(pace))


@given(
    st.binary(max_size=400),
    st.lists(st.integers(0, 600), max_size=6),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_a_log_of_anything_is_read_in_any_pieces(data: bytes, cuts: list[int], end_of_line: bytes) -> None:
    text = displays(1.0, 2.0) + data + b"\n" + displays(3.0, 4.0).replace(b"Iteration ", b"Iteration 7")
    text = text.replace(b"\n", end_of_line)
    whole, pieces = StageView(), StageView()
    whole.feed(text)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        pieces.feed(text[start:end])
    assert facts(pieces) == facts(whole)
    assert (whole.log.iteration, whole.log.loss, whole.log.displays >= 4) == (710, 4.0, True)


def facts(view: StageView) -> str:
    """All that a view shows."""
    log = view.log
    shown = (log.iteration, log.loss, log.learning_rate, log.displays, log.in_test, log.batches, log.fatal)
    kept = (log.tests, log.snapshots, log.seconds_per_iteration(), log.figures())
    return repr((view.trouble, view.sound, *shown, *kept))


def test_tail_reads_what_is_new(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log", 2)
    assert tail.read() == b""
    (tmp_path / "log").write_bytes(b"abcdef")
    assert (tail.read(), tail.read()) == (b"cdef", b"")


# ------------------------------------------------------------------------------------------------- snapshots


def test_the_newest_the_best_and_the_last_stay() -> None:
    assert kept_iterations([10, 20, 30, 40, 50], {10: 0.5, 20: 0.9, 30: 0.7}, 2, 100) == {20, 40, 50}
    assert kept_iterations([10, 20, 30], {}, 1, 100) == {30}
    assert kept_iterations([10, 20], {10: 0.5, 20: 0.5}, 1, 100) == {20}
    assert kept_iterations([], {10: 0.5}, 2, 100) == set()


@given(
    st.sets(st.integers(1, 50), max_size=12),
    st.dictionaries(st.integers(1, 50), st.floats(0, 1), max_size=8),
    st.integers(1, 5),
)
def test_what_stays_is_enough_to_go_on(complete: set[int], top1: dict[int, float], keep: int) -> None:
    kept = kept_iterations(complete, top1, keep, 50)
    assert kept <= complete
    assert set(sorted(complete)[-keep:]) <= kept
    assert len(kept) <= keep + 2
    if 50 in complete:
        assert 50 in kept


def test_all_files_of_a_snapshot_go_together_and_newer_ones_stay(tmp_path: Path) -> None:
    prefix = tmp_path / "a_[net]"
    names = ["1.caffemodel", "1.solverstate", "1.masks.npz", "2.caffemodel", "3.caffemodel", "4.caffemodel"]
    for name in names:
        (tmp_path / f"a_[net]_iter_{name}").touch()
    (tmp_path / "b_iter_1.caffemodel").touch()
    assert remove_others(prefix, [1, 2, 3], frozenset({2, 3})) == [1]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"b_iter_1.caffemodel", *(f"a_[net]_iter_{n}.caffemodel" for n in (2, 3, 4))}


def spoil(folder: Path, iteration: int) -> None:
    """Put a weight that is not a number into a snapshot that `write_pair` wrote."""
    model = folder / f"net_iter_{iteration}.caffemodel"
    model.write_bytes(model.read_bytes().replace(struct.pack("<f", 0.5), struct.pack("<f", float("nan"))))


def test_weights_that_are_not_numbers_are_not_kept(tmp_path: Path) -> None:
    prefix = tmp_path / "net"
    view = StageView()
    for iteration in (10, 20, 30, 40, 50):
        write_pair(prefix, iteration)
        if iteration < 50:
            view.feed(line(1, f"Snapshotting to binary proto file net_iter_{iteration}.caffemodel").encode())
    for iteration in (30, 40, 50):  # of an earlier try: the last
        spoil(tmp_path, iteration)
    keeper = Keeper(prefix, Dialect.BVLC, 1, 100, 0)
    keeper.clean(view.log)
    assert keeper.spoiled == 30
    assert {path.stem for path in tmp_path.iterdir()} == {"net_iter_20", "net_iter_50"}
    view.see_weights(keeper.spoiled)
    assert view.trouble == "in the snapshot of iteration 30, now removed, weights are not numbers"
    assert spoiled_snapshots(prefix, Dialect.BVLC) == [50]


RECALIBRATED = "    Test statistics: recalibrated over 30 batches"


def snapshot_and_test(log: Log, iteration: int, top1: float, *, recalibrated: bool = False) -> None:
    """A snapshot and a test of the same iteration; top-1 is the output called ``right``."""
    log.line("solver.cpp", f"Snapshotting to binary proto file net_iter_{iteration}.caffemodel")
    log.line("solver.cpp", f"Iteration {iteration}, Testing net (#0)")
    if recalibrated:
        log.line("solver.py", RECALIBRATED)
    log.outputs(top1, 0.9, 0.5)


def snapshots_left(folder: Path, log: Log, iterations: tuple[int, ...]) -> set[int]:
    """The iterations whose snapshots are left of those that the stage took, with ``training.keep`` 1."""
    for iteration in iterations:
        write_pair(folder / "net", iteration)
    view = StageView()
    view.feed(log.iterate(100, 100).text.encode())
    Keeper(folder / "net", Dialect.BVLC, 1, 1000, 0).clean(view.log)
    return {int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("*.caffemodel")}


def test_the_best_is_found_whatever_the_networks_output_is_called(tmp_path: Path) -> None:
    log = Log().start()
    for iteration, top1 in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 0.6)):
        snapshot_and_test(log, iteration, top1)
    assert snapshots_left(tmp_path, log, (10, 20, 30, 40)) == {20, 40}


def test_the_best_is_of_tests_that_were_taken_alike(tmp_path: Path) -> None:
    log = Log().start()
    # A log of an older version, resumed: its tests had running statistics, and 0.95 was luck.
    for iteration, top1 in ((10, 0.4), (20, 0.95)):
        snapshot_and_test(log, iteration, top1)
    for iteration, top1 in ((30, 0.8), (40, 0.7), (50, 0.6)):
        snapshot_and_test(log, iteration, top1, recalibrated=True)
    assert snapshots_left(tmp_path, log, (10, 20, 30, 40, 50)) == {30, 50}


def test_tests_taken_alike() -> None:
    running, recalibrated = (
        {n: SolverTest({}, top1, recalibrated=how) for n, top1 in {10 + how: 0.5, 20 + how: None}.items()}
        for how in (False, True)
    )
    assert comparable_top1(running) == {10: 0.5}
    assert comparable_top1(recalibrated) == {11: 0.5}
    # The final weights of a stage of stock Caffe's ``train``: their test has no other to be compared with.
    assert comparable_top1(running | recalibrated) == {10: 0.5}
    recalibrated[31] = SolverTest({}, 0.4, recalibrated=True)
    assert comparable_top1(running | recalibrated) == {11: 0.5, 31: 0.4}


@pytest.mark.parametrize("word", ["Re-estimating", "Recalibrating"])
def test_the_test_at_the_end_of_a_stage_is_of_recalibrated_statistics(word: str) -> None:
    log = Log().start().test(20, 0.6, 0.9, 0.8).iterate(30, 30).done(40).test(40, 0.7, 0.9, 0.5).end()
    log.line("_caffe.cpp", "Use CPU.").line(
        "_caffe.cpp", f"{word} the statistics of 13 batch-norm layers over 30 batches"
    )
    stage = StageLog(live=True)
    stage.feed(log.text.encode())
    assert {n: test.recalibrated for n, test in stage.tests.items()} == {20: False, 40: False}
    place = Place(load_recipe("demo_digits", ["stages.initial.solver.max_iter=40"]), "initial")
    assert stage_summary(stage, place, 5).endswith("in 5.0 s, top-1 0.7")
    stage.feed(Log().test(40, 0.978, 0.9, 0.5).text.encode())
    stage.close()
    assert stage.tests[40] == SolverTest(
        {"loss": 0.5, "nearly right": 0.9, "right": 0.978}, top1=0.978, recalibrated=True
    )
    assert stage_summary(stage, place, 5).endswith("top-1 0.978 with recalibrated batch-norm statistics")
    assert stage.figures().top1 == 0.978


# ------------------------------------------------------------------------------------------------- the lock

HOLD = "import sys, time; from pathlib import Path; from caffe_jacinto.runs.lock import RunLock\n"
HOLD += "RunLock(Path(sys.argv[1])).acquire(); lock = 1; print('held', flush=True); time.sleep(60)"


def test_a_second_lock_is_refused_and_names_the_first(tmp_path: Path) -> None:
    code = HOLD.replace(
        "RunLock(Path(sys.argv[1])).acquire(); lock = 1", "l = RunLock(Path(sys.argv[1])); l.acquire()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        with pytest.raises(UserError, match=f"process {holder.pid} "):
            RunLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
    assert not is_held(tmp_path)
    RunLock(tmp_path).acquire()


def test_the_lock_holds_without_its_file(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    child = Child(["sleep", "60"], tmp_path / "log", lock.descriptors)
    lock.path.unlink()
    script = tmp_path / "run.sh"
    script.write_text(shell_script(tmp_path, lock.path, Path("log"), [["echo", "trained"]]))
    try:
        for holds in ("the driver and the child", "the child"):
            assert is_held(tmp_path), holds
            with pytest.raises(UserError, match=f"process {child.pid} \\(sleep 60\\)"):
                RunLock(tmp_path).acquire()
            assert subprocess.run(["sh", str(script)], capture_output=True).returncode == 1
            lock.path.unlink()
            lock.release()
    finally:
        child.kill()
        child.wait()
    assert not is_held(tmp_path)
    assert subprocess.run(["sh", str(script)], capture_output=True).returncode == 0
    RunLock(tmp_path).acquire()


def test_the_lock_lives_as_long_as_the_child(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    child = Child(["sleep", "60"], tmp_path / "log", lock.descriptors)
    lock.release()
    assert is_held(tmp_path)
    with pytest.raises(
        UserError, match=rf"process {child.pid} \(sleep 60\), left over .* kill -INT {child.pid}"
    ):
        RunLock(tmp_path).acquire()
    child.kill()
    assert child.exit_code == -signal.SIGKILL
    assert not is_held(tmp_path)


# ------------------------------------------------------------------------------------------------- processes


def test_each_request_to_stop_escalates(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    code = "trap 'echo INT' INT; trap 'echo TERM' TERM; echo ready; while :; do sleep 0.05; done"
    child = Child(["sh", "-c", code], tmp_path / "log", lock.descriptors)
    child.stop(0)
    for request, said in enumerate(("ready", "INT", "TERM"), start=1):
        give_up = time.monotonic() + 20
        while said not in (tmp_path / "log").read_text():
            assert time.monotonic() < give_up
            time.sleep(0.02)
        child.stop(request)
        child.stop(request)
    assert child.exit_code == -signal.SIGKILL
    child.stop(4)


def test_the_programs_of_this_package_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "relative")
    monkeypatch.chdir(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    child = Child(
        [sys.executable, "-Sc", "import caffe_jacinto; print('found')"], tmp_path / "log", lock.descriptors
    )
    assert (child.exit_code, (tmp_path / "log").read_text()) == (0, "found\n")


def test_exit_codes_in_words() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "killed by SIGKILL (out of memory, or killed by hand)"
    assert describe_exit(-11) == "killed by SIGSEGV"


@settings(max_examples=20)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12), max_size=4
    )
)
def test_run_sh_gives_any_words_to_the_command(words: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / 'it\'s a\n"folder" $HOME'
        folder.mkdir()
        show = [sys.executable, "-Sc", "import sys, json; print(json.dumps(sys.argv[1:]))", *words]
        script = shell_script(folder, Path("-lock it"), Path("a 'log'\n"), [show])
        subprocess.run(["sh"], input=script, text=True, check=True, capture_output=True, cwd="/")
        assert json.loads((folder / "a 'log'\n").read_text()) == words


def test_run_sh_stops_at_the_first_failure_and_respects_the_lock(tmp_path: Path) -> None:
    script = shell_script(tmp_path, Path("lock"), Path("log"), [["false"], ["echo", "after"]])
    assert subprocess.run(["sh", "-c", script], capture_output=True, check=False).returncode == 1
    assert "after" not in (tmp_path / "log").read_text()
    lock = RunLock(tmp_path)
    lock.acquire()
    refused = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (refused.returncode, "something is training in this run already" in refused.stderr) == (1, True)
    lock.release()


# ------------------------------------------------------------------------------------------------- the record


def record(**stages: StageState) -> RunRecord:
    recipe = load_recipe("demo_digits")
    engine = run_folder.EngineRecord(
        kind="bvlc", executable="/x/caffe", version="1.0.0", dialect=Dialect.BVLC
    )
    return RunRecord(
        caffe_jacinto="0",
        created=run_folder.now(),
        start_folder="/",
        folder="r",
        recipe=recipe,
        engine=engine,
        gpus=(),
        stages={name: stages.get(name, StageState()) for name in run_folder.steps_of(recipe)},
    )


def test_run_json_holds_all_of_the_recipe(tmp_path: Path) -> None:
    before = record(initial=StageState(state="finished"))
    run_folder.save(tmp_path, before)
    assert run_folder.load(tmp_path) == before
    assert list(run_folder.load(tmp_path).stages) == [
        *("initial", "l1reg", "sparse", "finetune", "test", "quantize"),
    ]
    assert not stat.S_IMODE((tmp_path / "run.json").stat().st_mode) & 0o111


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no run"), ("{", "Invalid JSON"), ("{}", "Field required"), ('{"format": 2}', "format")],
)
def test_a_folder_without_a_good_record(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        run_folder.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse": None}, "stages: lacks sparse; it must have initial, l1reg, sparse, finetune, test, "),
        ({"sparse": None, "test": None}, "stages: lacks sparse, test; "),
        ({"mine": {}}, "stages: mine is not a stage of the run's recipe; "),
    ],
)
def test_run_json_with_other_stages_than_its_recipe(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    from caffe_jacinto.train import main as train

    run_folder.save(tmp_path, record(initial=StageState(state="running")))
    content = json.loads((tmp_path / "run.json").read_text())
    for name, state in changes.items():
        content["stages"].pop(name, None)
        if state is not None:
            content["stages"][name] = state
    (tmp_path / "run.json").write_text(json.dumps(content))
    for option in ("--status", "--resume"):
        with pytest.raises(UserError) as refused:
            train([option, str(tmp_path)])
        assert str(refused.value).startswith(f"{tmp_path / 'run.json'}: {message}")
        assert str(refused.value).endswith("correct it, or start a new run")


KILLED_WRITE = """
import os, sys
from pathlib import Path
from caffe_jacinto.common.files import write_whole

def parts():
    yield b"half"
    print("writing", flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), 9)
    sys.stdin.readline()
write_whole(Path(sys.argv[1]), parts())
"""


def test_what_a_killed_write_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    stage = tmp_path / "initial"
    stage.mkdir()
    own = stage / ".notes.backup_1"
    own.touch()
    command = [sys.executable, "-c", KILLED_WRITE]
    for folder in (tmp_path, stage):
        subprocess.run([*command, str(folder / "file"), "kill"], capture_output=True)
        (left,) = folder.glob(".file.*")
        assert is_unfinished(left.name)
    assert run_folder.is_free(tmp_path) is False  # there is a folder in it
    with subprocess.Popen(
        [*command, str(stage / "file"), ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as living:
        assert living.stdout is not None
        living.stdout.readline()
        (current,) = stage.glob(".file.*")  # the same file is written: what was left of it is gone
        run_folder.tidy(tmp_path)
        assert sorted(stage.iterdir()) == sorted([own, current])
        assert [path.name for path in tmp_path.iterdir()] == ["initial"]
        living.communicate("\n")
    assert (stage / "file").read_bytes() == b"half"
    assert sorted(stage.iterdir()) == sorted([own, stage / "file"])


def test_a_folder_that_a_killed_train_left_with_its_lock_alone_is_free(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert run_folder.is_free(tmp_path)
    (tmp_path / "mine.txt").touch()
    assert not run_folder.is_free(tmp_path)


@pytest.mark.parametrize(
    ("command", "drives"),
    [
        ("python -m caffe_jacinto.train demo_digits", True),
        ("python -m caffe_jacinto train demo_digits", True),
        ("/v/bin/python3 /v/bin/caffe-jacinto train demo_digits", True),
        ("python -m submitit.core._submit folder", True),
        ("python -m caffe_jacinto report train", False),
        ("/v/bin/caffe train -solver solver.prototxt", False),
        ("/v/bin/python /v/bin/caffe-torch train -solver solver.prototxt", False),
    ],
)
def test_a_train_is_known_by_each_of_its_names(command: str, drives: bool) -> None:
    assert Holder(1, tuple(command.split())).is_driver is drives


@pytest.mark.parametrize(
    ("name", "free"),
    [
        *((f"network{number}.prototxt", True) for number in ("", "_2", "_10")),
        *((f"network{number}.prototxt", False) for number in ("_0", "_1", "_02", "_train", "2")),
        ("network.prototxt/", False),
    ],
)
def test_a_folder_with_copies_of_a_network_alone_is_free(tmp_path: Path, name: str, free: bool) -> None:
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert run_folder.is_free(tmp_path) is free


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "solver.cpp:3] Iteration 5\n*** SIGTERM received by PID 7 ***\n    @     0x560466b3d241 _start\n",
            "Iter",
        ),
        ("an older part\n# caffe_jacinto.train: 2026 'caffe train'\n\n", ""),
        ("", ""),
        ("caffe: error while loading shared libraries: libcaffe.so\n", "libcaffe.so"),
    ],
)
def test_last_words_are_those_of_the_command_that_died(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / "run.log").write_text(log)
    said = last_words(tmp_path / "run.log")
    assert said.startswith(", its last line: ") if words else not said
    assert words in said


def test_a_part_of_the_log_begins_on_its_own_line(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert run_folder.start_log(log, "first") == log.stat().st_size
    log.write_bytes(log.read_bytes() + b"I1123 10:00:00.0000 cut in the mid")
    run_folder.start_log(log, "second")
    assert log.read_text().splitlines() == [
        "# caffe_jacinto.train: first",
        "I1123 10:00:00.0000 cut in the mid",
        "# caffe_jacinto.train: second",
    ]


@pytest.mark.parametrize(
    ("state", "first", "stage"),
    [("running", "stopped", "cut off"), ("failed", "failed", "failed"), ("stopped", "stopped", "stopped")],
)
def test_status_of_a_run_that_nobody_drives(tmp_path: Path, state: str, first: str, stage: str) -> None:
    from caffe_jacinto.runs.status import status_lines

    run_folder.save(tmp_path, record(initial=StageState.model_validate({"state": state, "message": "why"})))
    (tmp_path / "initial").mkdir()
    (tmp_path / "initial/run.log").write_bytes(displays(2.3, 1.5))
    lines = status_lines(tmp_path)
    assert lines[0].endswith(f": {first}")
    assert lines[1].startswith(f"  initial: {stage}, iteration 10/200, loss 1.5")
    assert lines[-1].startswith("to resume: python -m caffe_jacinto.train --resume")
    assert status_lines(tmp_path / "run.json") == lines


# ------------------------------------------------------------------------------------------------- the screen


def test_plain_lines_come_now_and_then() -> None:
    out = io.StringIO()
    screen = Screen(out)
    for _ in range(3):
        screen.show(
            Progress(["stage 1/4 initial", "iteration 10/60"], ["loss 1"], ["9 s left"]), 0.1, news=True
        )
    screen.clear()
    screen.show(Progress(["stage 2/4 l1reg"]), 0.1, news=False)
    assert out.getvalue() == "stage 1/4 initial, iteration 10/60, loss 1, 9 s left\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "live"), [("dumb", False), ("xterm", True)])
def test_a_terminal_that_cannot_go_up_a_line_gets_plain_lines(
    kind: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    out = Terminal()
    screen = Screen(out)
    screen.show(Progress(["stage 1/4 initial"], ["loss 1"]), 0.1, news=True)
    screen.clear()
    assert ("\x1b[" in out.getvalue()) == live
    assert ("stage 1/4 initial, loss 1\n" in out.getvalue()) == (not live)


def test_an_unusual_silence_is_news_each_time_it_has_doubled() -> None:
    from caffe_jacinto.runs.driver import Watched

    watched = Watched(StageView())
    news = [second for second in range(1000) if watched.silence_is_news(second)]
    assert news == [60, 120, 240, 480, 960]
    watched.hear()
    watched.longest = 300  # this training logs a line each five minutes
    assert [second for second in range(1000) if watched.silence_is_news(second)] == [450, 900]


def test_a_closed_reader_does_not_end_the_program() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = LastingStream(os.fdopen(writer, "w"))
    for _ in range(3):
        stream.write("nobody reads this\n")
    assert not stream.isatty()
    LastingStream(None).write("nor this")


FIELDS = st.lists(st.text("abc ", min_size=1, max_size=20), max_size=5)


@given(FIELDS.filter(bool), FIELDS, FIELDS, st.floats(-1, 2), st.integers(30, 200))
def test_the_live_lines_fit(
    place: list[str], figures: list[str], left: list[str], fraction: float, width: int
) -> None:
    lines = live_lines(Progress(place, figures, left), fraction, width)
    assert place[0] in lines[0]
    assert len(lines) <= 2
    assert all(len(line) < width for line in lines)


@pytest.mark.parametrize(("width", "count"), [(80, 2), (100, 2), (160, 1)])
def test_all_of_an_imagenet_runs_progress_is_seen(width: int, count: int) -> None:
    shown = Progress(
        ["stage 3/4 sparse", "iteration 123,450/160,000"],
        ["loss 1.4321", "lr 0.00228", "sparsity 0.661", "1.25e+03 images/s"],
        ["3 h 05 min left"],
    )
    lines = live_lines(shown, 0.77, width)
    assert len(lines) == count
    assert all(field in "".join(lines) for field in shown.fields())
