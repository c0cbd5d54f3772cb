"""Log lines to events to figures: any cut, any interleaving, any garbage."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_text import GIGAMACS, Log, whole_stage

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs import events
from caffe_jacinto.logs.events import elapsed
from caffe_jacinto.logs.lines import LineSplitter
from caffe_jacinto.logs.processes import read_log
from caffe_jacinto.logs.reader import LogReader
from caffe_jacinto.logs.skim import thinned
from caffe_jacinto.logs.stage import StageFigures, StageLog

WHOLE = whole_stage().sparsity(0.5, 0.25).text.encode()


def read(data: bytes, sizes: list[int] | None = None, *, skim: bool = False) -> list[events.Event]:
    reader, found, position = LogReader(skim=skim), [], 0
    for size in sizes or []:
        found += reader.feed(data[position : position + size])
        position += size
    return found + reader.feed(data[position:])


def plain(found: list[events.Event]) -> list[str]:
    """Events that compare by what they hold; settings are objects of their own."""
    return [repr(event) for event in found if not isinstance(event, events.SolverStarted)]


def figures(data: bytes | str, sizes: list[int] | None = None, *, history: bool = False) -> StageFigures:
    log, position = StageLog(history=history), 0
    data = data.encode() if isinstance(data, str) else data
    for size in sizes or []:
        log.feed(data[position : position + size])
        position += size
    log.feed(data[position:])
    log.close()
    return log.figures()


def test_the_figures_of_a_stock_caffe_stage() -> None:
    found = figures(WHOLE)
    assert found.finished
    assert found.iterations == 40
    assert (found.top1, found.top5, found.loss) == (0.75, 0.95, 0.625)
    assert found.outputs == {"loss": 0.625, "nearly right": 0.95, "right": 0.75}
    assert found.gigamacs == GIGAMACS
    assert found.sparsity == 0.5
    assert found.sparsity_logged == pytest.approx(0.26, abs=0.001)
    assert found.caffe_version is None
    assert found.images_per_second_logged is None


def test_images_per_second_count_the_passes_and_the_gpus() -> None:
    # 10 iterations in 5 seconds, 32 images in a pass, 2 passes in an update.
    assert figures(Log().start(iter_size=2).iterate(0, 40).text).images_per_second == 128
    several = Log().start(devices="Using GPUs 0, 1, 2", iter_size=2).iterate(0, 40)
    assert figures(several.text).images_per_second == 384


def test_the_closing_figure_of_nvcaffe_leaves_out_the_passes() -> None:
    log = Log().start(devices="Using GPUs 0, 1", iter_size=2).iterate(0, 40)
    log.line("parallel.cpp", "Root Solver performance on device 0: 2 * 32 = 64 img/sec (40 itr in 20 sec)")
    log.line("parallel.cpp", "     Solver performance on device 1: 2 * 32 = 64 img/sec (40 itr in 20 sec)")
    log.line("parallel.cpp", "Overall multi-GPU performance: 127.75 img/sec")
    log.line("caffe.cpp", "Optimization Done in 1h 0m 20s")
    found = figures(log.text)
    assert found.images_per_second_logged == 127.75
    assert found.images_per_second == 255.5
    assert found.seconds == 3620
    one = Log().start(devices="Using GPUs 0", iter_size=2).iterate(0, 40)
    one.line("caffe.cpp", "Solver performance on device 0: 2 * 32 = 64.5 img/sec (40 itr in 20 sec)")
    assert figures(one.text).images_per_second == 129


def test_caffe_test() -> None:
    log = Log().line("caffe.cpp", "Use CPU.").net("TEST", 50).line("caffe.cpp", "Running for 2 iterations.")
    for batch in range(2):
        for output in ("loss = 0.5", "nearly right = 0.9", "right = 0.8"):
            log.line("caffe.cpp", f"Batch {batch}, {output}")
    running = figures(log.text)
    assert (running.finished, running.iterations, running.top1, running.tested) == (False, 2, None, True)
    log.line("caffe.cpp", "Loss: 0.5").line("caffe.cpp", "loss = 0.5 (* 1 = 0.5 loss)")
    log.line("caffe.cpp", "nearly right = 0.9")
    assert not figures(log.text).finished
    found = figures(log.line("caffe.cpp", "right = 0.8").text)
    assert found.finished
    assert (found.top1, found.top5, found.loss, found.images_per_second) == (0.8, 0.9, 0.5, None)


def test_a_resumed_stage_ends_with_the_last_figures_and_without_the_gap() -> None:
    log = Log().start().test(0, 0.1, 0.5, 2.3).iterate(0, 20)
    first_seconds = figures(log.text).seconds
    log.text += log.text[:40]  # cut in the middle of a line
    log.second += 3600
    second = Log()
    second.second = log.second
    second.start().line("caffe.cpp", "Resuming from a/b_iter_20.solverstate").iterate(20, 30)
    second.done(40).test(40, 0.75, 0.95, 0.6).end()
    found = figures(log.text + second.text)
    assert (found.finished, found.iterations, found.top1) == (True, 40, 0.75)
    assert first_seconds is not None
    assert found.seconds == pytest.approx(first_seconds + (figures(second.text).seconds or 0), abs=6)
    # 20 iterations in 10 s, then 10 in 5 s: the hour between does not count.
    assert found.images_per_second == pytest.approx(64, rel=0.02)


def test_work_after_the_end_of_training_leaves_the_stage_finished() -> None:
    log = whole_stage()
    log.line("_caffe.cpp", "Use CPU.").net("TRAIN", 32).net("TEST", 50).test(40, 0.8, 0.97, 0.5)
    found = figures(log.text)
    assert (found.finished, found.iterations, found.top1) == (True, 40, 0.8)


def test_an_interrupted_stage_is_not_finished() -> None:
    log = Log().start().iterate(0, 20)
    log.line("solver.cpp", "Snapshotting to binary proto file a/b_iter_23.caffemodel")
    log.line("solver.cpp", "Optimization stopped early.").line("caffe.cpp", "Optimization Done.")
    assert (figures(log.text).finished, figures(log.text).iterations) == (False, 23)


def test_a_fatal_line_is_kept_with_the_complaint_before_it() -> None:
    log = Log().start()
    log.text += '[libprotobuf ERROR text_format.cc:307] Error parsing text-format: no field named "foo".\n'
    log.line("upgrade_proto.cpp", "Check failed: ReadProtoFromTextFile(param_file, param) ", level="F")
    log.text += "*** Check failure stack trace: ***\n    @     0x7f  (unknown)\n"
    fatal = figures(log.text).fatal
    assert fatal is not None
    assert fatal.startswith("Check failed: ReadProtoFromTextFile")
    assert 'no field named "foo"' in fatal


@pytest.mark.parametrize(
    ("line", "version", "year"),
    [
        ("This is NVCaffe 0.16.3 started at Mon Aug 14 19:50:36 2017", "NVCaffe 0.16.3", 2017),
        ("This is Caffe 1.0.0 with pycaffe in /a folder/" + "x" * 100, "Caffe 1.0.0", None),
    ],
)
def test_versions(line: str, version: str, year: int | None) -> None:
    found = read(Log().line("caffe.cpp", line).line("caffe.cpp", "Use CPU.").text.encode())
    assert [type(event) for event in found] == [events.ProcessStarted, events.Version, events.GpusUsed]
    assert found[1] == events.Version(version, year)


@pytest.mark.parametrize("word", ["nan", "-nan", "inf", "-inf"])
def test_losses_that_are_no_numbers(word: str) -> None:
    line = f"Iteration 7 (2 iter/s, 5s/10 iters), loss = {word}"
    (found,) = read(Log().line("solver.cpp", line).text.encode())
    assert isinstance(found, events.TrainProgress)
    assert repr(found.loss) in ("nan", "inf", "-inf")


@pytest.mark.parametrize(
    "message",
    [
        "Iteration 7 (2 iter/s, 5s/10 iters), loss = 0.25",
        "Iteration 7 (2 iter/s, 5s/10 iter), loss = 0.25",
        "Iteration 7 (0.4 s), loss = 0.25",
        "Iteration 7, loss = 0.25",
        "Iteration 7 (-nan(ind) iter/s, 0s/10 iters), loss = 0.25",
        "[23] Iteration 7, loss = 0.25",
        "[0.0] Iteration 7 (2 iter/s, 5s/10 iter), 1.5/300ep, loss = 0.25",
    ],
)
def test_lines_of_training_of_every_caffe(message: str) -> None:
    for date in ("0815", "20260815"):
        (found,) = read(Log(date).line("solver.cpp", message).text.encode())
        assert isinstance(found, events.TrainProgress)
        assert (found.iteration, found.loss) == (7, 0.25)


def test_stock_caffes_first_speed_is_none() -> None:
    line = "Iteration 0 (-5.60014e+31 iter/s, 0.008s/5 iters), loss = 1.5"
    (found,) = read(Log().line("solver.cpp", line).text.encode())
    assert isinstance(found, events.TrainProgress)
    assert found.iters_per_second is None


def test_a_network_that_glog_cut_is_not_counted() -> None:
    log = Log().line("caffe.cpp", "Use CPU.").line("net.cpp", "Initializing net from parameters: ")
    log.text += (
        "".join(f'layer {{\n  name: "c{n}"\n  type: "Convolution"\n}}\n' for n in range(700))[:29950] + "\n"
    )
    found = figures(log.line("net.cpp", "Creating Layer c0").text)
    assert found.gigamacs is None
    assert "cut off" in found.notes[0]


def test_outputs_with_one_name_and_of_a_second_net_stay_apart() -> None:
    log = Log().start().line("solver.cpp", "Iteration 40, Testing net (#0)")
    log.line("solver.cpp", "    Test net output #0: per_class = 0.5")
    log.line("solver.cpp", "    Test net output #1: per_class = 0.25")
    log.line("solver.cpp", "Iteration 40, Testing net (#1)")
    log.line("solver.cpp", "    Test net output #0: per_class = 0.125").end()
    assert figures(log.text).outputs == {"per_class": 0.5, "per_class[1]": 0.25, "per_class (#1)": 0.125}


def test_a_test_cut_off_gives_way_to_the_whole_one_before() -> None:
    log = Log().start().test(0, 0.1, 0.5, 2.3).iterate(0, 10)
    log.line("solver.cpp", "Iteration 20, Testing net (#0)")
    log.line("solver.cpp", "    Test net output #0: loss = 0.8 (* 1 = 0.8 loss)")
    found = figures(log.text)
    assert (found.loss, found.top1, found.iterations) == (2.3, 0.1, 20)


def test_sparsity_of_a_large_inner_product_comes_from_the_convolutions_own_lines() -> None:
    # fc outweighs conv here, and its fraction is rounded: the convolution's own line is the better one.
    found = figures(whole_stage().sparsity(0.805, 0.1234).text)
    assert found.sparsity == 0.805


def test_sparsity_of_another_network_is_not_guessed() -> None:
    log = whole_stage()
    log.line("net.cpp", "Num Params(2), Sparsity (zero_weights/count): ")
    log.line("net.cpp", "conv_param_0(0.5) ").line("net.cpp", "fc_param_0(0.5) ")
    log.line("net.cpp", "Total Sparsity (zero_weights/count) =  (500/1000) 0.5")
    assert (figures(log.text).sparsity, figures(log.text).sparsity_logged) == (None, 0.5)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 400), max_size=60))
def test_pieces_of_any_size_give_the_same_events(sizes: list[int]) -> None:
    assert plain(read(WHOLE, sizes)) == plain(read(WHOLE))
    assert figures(WHOLE, sizes) == figures(WHOLE)


@settings(max_examples=25)
@given(st.integers(0, len(WHOLE)))
def test_the_events_of_a_cut_log_are_the_first_of_the_whole(cut: int) -> None:
    found, whole = plain(read(WHOLE[:cut])), plain(read(WHOLE))
    assert found == whole[: len(found)]
    reader = LogReader()
    closed = plain(reader.feed(WHOLE[:cut]) + reader.close())
    assert closed == whole[: len(closed)]


@settings(max_examples=25)
@given(st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE)))
def test_a_line_cut_by_the_next_start_gives_no_wrong_number(cut: int, other: int) -> None:
    whole = {event for event in plain(read(WHOLE)) if not event.startswith("ProcessStarted")}
    for joined in (WHOLE[:cut] + WHOLE, WHOLE[:cut] + WHOLE[:other] + WHOLE):
        found = {event for event in plain(read(joined)) if not event.startswith("ProcessStarted")}
        # Texts that a cut left open end at the next start and are not taken for whole.
        assert found == whole
        assert replace(figures(joined), seconds=0, images_per_second=0) == replace(
            figures(WHOLE), seconds=0, images_per_second=0
        )


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_lines_of_other_threads_change_nothing(chance: random.Random) -> None:
    others = [
        "I0815 10:00:00.000000  9001 data_reader.cpp:52] Data Reader threads: 1, out queues: 1, depth: 43",
        "I0815 10:00:00.000000  9002 blocking_queue.cpp:40] Data layer prefetch queue empty",
        "I0815 10:00:00.000000  9001 net.cpp:104] Using FLOAT as default forward math type",
        "I0815 10:00:00.000000  9002 solver.cpp:176] Creating test net (#0) specified by net file: t",
        "W0815 10:00:00.000000  9003 parallel.cpp:272] Batch size must be divisible by the number of solvers",
        "I0815 10:00:00.000000  9003 data_layer.cpp:211] (0) output data size: 7, 1, 2, 2",
        "I0815 10:00:00.000000  9003 solver.cpp:227] Starting Optimization on GPU 1",
        "I0815 10:00:00.000000  9003 net.cpp:2192] other_param_0(0.9) ",
        "[warn] a line of another program",
        "Traceback (most recent call last):",
        "",
    ]
    lines = WHOLE.decode().splitlines()
    mixed = [lines[0]]
    for line in lines[1:]:
        mixed += chance.choices(others, k=chance.choice([0, 0, 0, 1, 2]))
        mixed.append(line)
    assert figures("\n".join(mixed) + "\n") == figures(WHOLE)


@settings(max_examples=25)
@given(st.binary(max_size=300), st.integers(0, len(WHOLE)))
def test_garbage_never_crashes(garbage: bytes, at: int) -> None:
    for history in (False, True):
        figures(WHOLE[:at] + garbage + WHOLE[at:], history=history)
        figures(garbage, history=history)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(WHOLE.decode().splitlines(keepends=True)), max_size=40))
def test_lines_in_any_order_never_crash(lines: list[str]) -> None:
    figures("".join(lines))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 300), max_size=30), st.integers(0, len(WHOLE)))
def test_skimming_leaves_the_figures_as_they_are(sizes: list[int], cut: int) -> None:
    text = WHOLE[:cut]
    assert figures(text, sizes) == figures(text, history=True)


TRAINING_LINES = st.sampled_from(
    [
        "Iteration 10 (5 iter/s, 2s/10 iters), loss = 1.5",
        "Iteration 20, loss = nan",
        "Iteration 30 (241.076/s), lr = 0.001",
        "Iteration 30, lr = 1e-05",
        "Iteration 40, Testing net (#0)",
        "Iteration 40, Testing net",
        "    Train net output #0: loss = 1.5 (* 1 = 1.5 loss)",
        "    Test net output #0: right = 0.5",
        "    [0.0] Iteration 50 (5 iter/s, 2.0s/10 iter), 0.5/3ep, loss = 1.25",
        "    [0.0]     Train net output #0: loss = 1.5",
        "Iteration 60, loss = 2I0815 10:00:00.000000  1 solver.cpp:1] Iteration 60, lr = 0.1",
        "Snapshotting to binary proto file a_iter_40.caffemodel",
        "Restarting data prefetching from start.",
        "[MultiGPU] Tests completed in 20.7644s",
        "Use CPU.",
    ]
)


TESTED_TRAINING = """\
Iteration 40, Testing net (#0)
    Test net output #0: right = 0.5
    Test net output #1: loss = 1.5 (* 1 = 1.5 loss)
Iteration 40 (5 iter/s, 2s/10 iters), loss = 1.5
    Train net output #0: loss = 1.5 (* 1 = 1.5 loss)
Iteration 40, lr = 0.001
Iteration 50, loss = 1.25
Iteration 50, lr = 0.001""".splitlines()


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(TRAINING_LINES.map(lambda line: [line]) | st.just(TESTED_TRAINING), st.integers(1, 9)),
        max_size=12,
    ),
    st.data(),
)
def test_figures_are_those_of_lines_that_are_left_out_one_by_one(
    parts: list[tuple[list[str], int]], data: st.DataObject
) -> None:
    prefix = "I0815 10:{:02}:{:02}.000000  1 solver.cpp:239] "
    lines = [line for repeated, times in parts for line in repeated * times]
    # Each test and each loss has a number of its own.
    numbered = [
        line.replace("= 0.5", f"= 0.{at}").replace("= 1.5", f"= 1.{at}") for at, line in enumerate(lines)
    ]
    text = "".join(f"{prefix.format(at // 60, at % 60)}{line}\n" for at, line in enumerate(numbered)).encode()
    cut = data.draw(st.integers(0, len(text)))
    one_by_one, at_once = StageLog(), StageLog()
    one_by_one._reader._lines = LineSplitter()
    for piece in (text[:cut], text[cut:]):
        for log in (one_by_one, at_once):
            log.feed(piece)
        assert repr(at_once.figures()) == repr(one_by_one.figures())  # nan differs from itself
    for log in (one_by_one, at_once):
        log.close()
    assert repr(at_once.figures()) == repr(one_by_one.figures())
    assert at_once.first_stamp == one_by_one.first_stamp
    assert at_once.last_stamp == one_by_one.last_stamp
    assert (at_once.displays, repr(at_once.losses)) == (one_by_one.displays, repr(one_by_one.losses))


def test_a_summary_reads_few_lines_of_a_long_training() -> None:
    lines = "".join(f"I0815 10:00:00.000000  1234 solver.cpp:239] {line}\n" for line in TESTED_TRAINING)
    text = (lines * 100).encode()
    assert thinned(text).count(b"\n") < 400
    assert thinned(text[:-1]).endswith(text[-30:-1])


def test_memory_for_a_line_without_end_is_bounded() -> None:
    reader = LogReader()
    for _ in range(20):
        reader.feed(b"x" * 300_000)
    assert len(reader._lines._tail) < 1_500_000


def test_the_curve_of_accuracy_ends_with_the_last_test_of_the_log() -> None:
    log = StageLog(history=True)
    log.feed(whole_stage().test(40, 0.8, 0.97, 0.5).text.encode())
    log.close()
    assert log.history is not None
    assert log.history.outputs["right"].points() == [(0, 0.1), (20, 0.6), (40, 0.8)]


@pytest.mark.parametrize(
    ("first", "last", "year", "seconds"),
    [
        ("0815 10:00:00.000000", "0815 10:00:01.500000", None, 1.5),
        ("1231 23:59:59.000000", "0101 00:00:01.000000", None, 2),
        ("0228 23:59:59.000000", "0301 00:00:01.000000", 2017, 2),
        ("0228 23:59:59.000000", "0301 00:00:01.000000", 2016, 86402),
        ("20251231 23:59:59.000000", "20260101 00:00:01.000000", None, 2),
        ("20251231 23:59:59.000000", "0101 00:00:01.000000", None, 2),
        ("0815 10:00:01.000000", "0815 10:00:00.000000", None, 0),
        ("0229 10:00:00.000000", "0229 10:00:01.000000", 2017, 1),
        ("9999 10:00:00.000000", "0229 10:00:01.000000", None, 0),
    ],
)
def test_time_between_two_lines(first: str, last: str, year: int | None, seconds: float) -> None:
    assert elapsed(first, last, year) == seconds


def test_files_that_are_no_logs(tmp_path: Path) -> None:
    for content, words in (
        (b"", "is empty"),
        (b"hello\n", "is not a Caffe log"),
        (bytes(range(256)), "is not a Caffe log"),
        (b"# caffe_jacinto.train: at 23:05, pid 7\nTerminated\n", "the stage has logged nothing yet"),
    ):
        path = tmp_path / "some.log"
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_log(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path / "missing.log")


def test_a_listing_of_sparsity_is_of_the_iteration_that_is_named_next() -> None:
    text = (
        Log().start().sparsity(0, 0).test(0, 0.1, 0.5, 2.3).iterate(0, 10).sparsity(0.25, 0).iterate(20, 30)
    )
    log = StageLog(history=True)
    log.feed(text.done(40).sparsity(0.5, 0).text.encode())
    log.close()
    assert log.history is not None
    assert log.history.sparsity.points() == [(0, 0), (20, 0.25), (40, 0.5)]
