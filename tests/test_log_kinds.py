"""Logs of every Caffe, in every form that they are kept in: what they say, or why the report does not."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_text import ACCURACIES, CONV_WEIGHTS, FC_WEIGHTS, GIGAMACS, Log, whole_stage

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs import page_content, tables
from caffe_jacinto.logs.discover import find_runs
from caffe_jacinto.logs.lines import LineSplitter
from caffe_jacinto.logs.processes import read_log

WHOLE = {
    "finished": True, "iterations": 40, "top1": 0.75, "top5": 0.95, "loss": 0.625, "train_loss": 0.5,
    "gigamacs": GIGAMACS, "images_per_second": 238.5, "notes": [],
}  # fmt: skip
"""The figures of `whole_stage`: 32 images x 2 passes, 40 iterations in the time between its lines."""


def stages(*paths: Path, history: bool = False) -> list[dict[str, Any]]:
    """The stages of the report's JSON, those of one run after the other."""
    runs, problems = find_runs(paths, history=history)
    assert not problems
    return [
        stage | {"run": run["name"]}
        for run in json.loads(tables.as_json(runs))["runs"]
        for stage in run["stages"]
    ]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def report(folder: Path, text: str | bytes) -> list[dict[str, Any]]:
    found = stages(write(folder / "some.log", text))
    # Skimming, which the figures alone allow, and reading every line give the same.
    assert found == stages(folder / "some.log", history=True)
    return found


def figures(stage: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {name: stage[name] for name in expected}


def training(prefix: str = "a/b", *, thread: int = 8764, hour: int = 10, top1: float = 0.75) -> Log:
    """A whole training of 40 iterations, in 16 seconds."""
    log = Log(thread=thread)
    log.second = 3600.0 * hour
    log.start(iter_size=2).test(0, 0.1, 0.5, 2.3).iterate(0, 30).done(40).test(40, top1, 0.95, 0.625).end()
    log.text = log.text.replace('"a/b"', f'"{prefix}"').replace("file a/b", f"file {prefix}")
    return log


def caffe_test(*, thread: int = 9000, hour: int = 12, quantized: bool = False) -> Log:
    log = Log(thread=thread)
    log.second = 3600.0 * hour
    log.line("caffe.cpp", "Use GPU with device ID 0").net("TEST", 50)
    if quantized:
        log.text = log.text.replace('name: "tiny"\n', 'name: "tiny"\nquantize: true\n')
    log.line("caffe.cpp", "Running for 2 iterations.")
    for batch in range(2):
        log.line("caffe.cpp", f"Batch {batch}, loss = 0.5").line("caffe.cpp", f"Batch {batch}, right = 0.7")
    return (
        log.line("caffe.cpp", "Loss: 0.5")
        .line("caffe.cpp", "loss = 0.5 (* 1 = 0.5 loss)")
        .line("caffe.cpp", "right = 0.7")
    )


def test_every_published_kind_of_log_to_the_last_figure(published: Path) -> None:
    cases = published.parent / "cases" / "logs"
    if not cases.is_dir():
        pytest.skip(f"the logs of each kind are not at {cases}")
    expected = json.loads((cases / "expected.json").read_text())
    del expected["about"]
    assert len(expected) > 10
    for name, wanted in expected.items():
        found = stages(cases / name)
        assert len(found) == len(wanted), name
        for stage, figures_of_it in zip(found, wanted, strict=True):
            for key, value in figures_of_it.items():
                if key == "notes":
                    assert stage["notes"], name
                elif key in ("seconds", "images_per_second"):
                    tolerance = {"abs": 0.15} if key == "seconds" else {"rel": 0.01}
                    assert stage[key] == pytest.approx(value, **tolerance), (name, key)
                else:
                    assert stage[key] == value, (name, key)


# What another program does to a log


@pytest.mark.parametrize(
    "prefix",
    [
        "> ", "> > ", "caffe_1  | ", "train.0   | ", "2026-08-15T10:00:00.123456789Z ", "[1] ", "0: ",
        "2026-08-15 10:00:00,123 ", "[2026-08-15 10:00:00] ", "Aug 15 10:00:00 ", "10:00:00 ", "  3: ",
        "Sat Aug 15 10:00:00 2026 ", "Aug 15 10:00:00 host caffe[8764]: ", "[10:00:00.5] ",
        "[1,0]<stderr>: ", "2026-08-15T10:00:00Z caffe_1 | ", "2026-08-15T10:00:00Z stderr F ",
        # What is the same before each line, as in a page, a comment or the log of another program.
        "    ", "\t", "# ", "//", "INFO:root:", "[caffe] ", "2026-08-15 10:00:00,123 - node-1 - INFO - ",
        "# [1] ",
    ],
)  # fmt: skip
def test_what_stands_before_each_line_changes_nothing(prefix: str, tmp_path: Path) -> None:
    text = "".join(f"{prefix}{line}\n" for line in whole_stage().text.splitlines())
    (stage,) = report(tmp_path, f"Attaching to caffe_1\n{text}")
    (plain,) = report(tmp_path / "plain", whole_stage().text)
    assert figures(stage, WHOLE) == figures(plain, WHOLE)
    assert (stage["name"], stage["top1"], stage["gigamacs"]) == ("train", 0.75, GIGAMACS)


@pytest.mark.parametrize("prefix", ["%d:", "%6d\t", "[%8.3f s] ", "15/08/2026 %d.25 - ", "worker-%d: "])
def test_numbers_before_each_line_change_nothing(prefix: str, tmp_path: Path) -> None:
    """Those of ``grep -n``, ``cat -n``, clocks of any kind."""
    lines = whole_stage().text.splitlines()
    (stage,) = report(tmp_path, "".join(f"{prefix % at}{line}\n" for at, line in enumerate(lines)))
    (plain,) = report(tmp_path / "plain", whole_stage().text)
    assert figures(stage, WHOLE) == figures(plain, WHOLE)


@pytest.mark.parametrize("prefix", ["INFO:root:", "INFO 7:", "100 % "])
def test_what_stands_before_some_lines_is_no_part_of_them(prefix: str, tmp_path: Path) -> None:
    """Of another program that marks messages, not lines, or that has not ended its own line."""
    text = whole_stage().text
    marked = f"{prefix}{text}" if "%" in prefix else re.sub(r"(?m)^(?=I0815)", prefix, text)
    (stage,) = report(tmp_path, marked)
    (plain,) = report(tmp_path / "plain", text)
    assert figures(stage, WHOLE | {"seconds": 0}) == figures(plain, WHOLE | {"seconds": 0})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_of_windows(encoding: str, end: str, tmp_path: Path) -> None:
    (stage,) = report(tmp_path, whole_stage().text.replace("\n", end).encode(encoding))
    assert (stage["finished"], stage["top1"], stage["gigamacs"]) == (True, 0.75, GIGAMACS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("first", ["utf-8", "utf-16-le"])
def test_a_log_that_several_shells_wrote(first: str, mark: str, end: str, tmp_path: Path) -> None:
    """``>>`` of PowerShell appends UTF-16 to a file that another program wrote in ASCII, and so on."""
    lines = whole_stage().text.replace("\n", end).splitlines(True)
    one = next(at for at, line in enumerate(lines) if "Iteration 10" in line)
    cuts = [0, one // 3, one, one + 1, len(lines)]
    parts = ["".join(lines[a:b]) for a, b in pairwise(cuts)]
    parts[1] = parts[1].replace("tiny", "ti\u4e0any \N{GRINNING FACE}")
    other = {"utf-8": "utf-16-le", "utf-16-le": "utf-8"}[first]
    log = b"".join(
        (mark + part if encoding != "utf-8" else part).encode(encoding)
        for part, encoding in zip(parts, [first, other] * 2, strict=True)
    )
    (stage,) = report(tmp_path, log)
    (whole,) = report(tmp_path / "plain", whole_stage().text)
    assert figures(stage, WHOLE) == figures(whole, WHOLE)
    plain = LineSplitter().feed("".join(parts).encode())
    for size in (1, 2, 3, 7, 15, 16, 17, 4096):
        splitter, found = LineSplitter(), list[bytes]()
        for at in range(0, len(log), size):
            found += splitter.feed(log[at : at + size]).get("", [])
        found += splitter.close().get("", [])
        assert [line for line in found if line] == [line for line in plain[""] if line], size


def test_files_of_dockers_logging_driver(tmp_path: Path) -> None:
    """An object for each line, and several for a long one; the last one is cut off."""
    text = whole_stage().text
    parts = [line[at : at + 50] for line in text.splitlines(True) for at in range(0, len(line), 50)]
    lines = [json.dumps({"log": part, "stream": "stderr", "time": "2016-08-15T10:00:00Z"}) for part in parts]
    dense = [line.replace('": "', '":"') for line in lines]
    (stage,) = report(tmp_path, "\n".join(dense) + '\n{"log":"I0815 10')
    (plain,) = report(tmp_path / "plain", text)
    assert figures(stage, WHOLE) == figures(plain, WHOLE)


def test_a_log_that_was_emptied_while_caffe_wrote_begins_with_zeros(tmp_path: Path) -> None:
    (stage,) = report(tmp_path, bytes(4096) + whole_stage().text.encode())
    assert (stage["finished"], stage["top1"]) == (True, 0.75)


def test_colours_change_nothing(tmp_path: Path) -> None:
    lines = whole_stage().text.splitlines()
    text = "".join(f"\x1b[1;32m{line}\x1b[0m\n" for line in lines)
    (stage,) = report(tmp_path, text)
    assert (stage["top1"], stage["gigamacs"]) == (0.75, GIGAMACS)


@pytest.mark.parametrize("prefix", ["[%d] ", "[1,%d]<stderr>: ", "%d: ", "caffe_%d  | "])
def test_ranks_line_by_line_are_told_apart(prefix: str, tmp_path: Path) -> None:
    texts = [training(top1=top1).text.splitlines() for top1 in (0.5, 0.25)]
    lines = [prefix % rank + texts[rank][at] for at in range(len(texts[0])) for rank in (0, 1)]
    found = report(tmp_path, "\n".join(lines) + "\n")
    label = "caffe_%d" if "caffe" in prefix else "rank %d"
    assert [stage["name"] for stage in found] == [f"train ({label % 0})", f"train ({label % 1})"]
    assert [stage["top1"] for stage in found] == [0.5, 0.25]
    assert all(stage["finished"] and stage["gigamacs"] == GIGAMACS for stage in found)


# Several processes in one file


def test_stages_one_after_the_other_are_stages(tmp_path: Path) -> None:
    logs = [
        training("out/initial/net", thread=7, hour=10, top1=0.5),
        training("out/sparse/net", thread=9, hour=11, top1=0.625).sparsity(0.8, 0.5),
        caffe_test(thread=11, hour=12),
        caffe_test(thread=12, hour=13, quantized=True),
    ]
    found = report(tmp_path, "".join(log.text for log in logs))
    assert [(stage["name"], stage["top1"]) for stage in found] == [
        ("initial", 0.5), ("sparse", 0.625), ("test", 0.7), ("test_quantize", 0.7),
    ]  # fmt: skip
    assert [stage["sparsity"] for stage in found] == [None, 0.8, None, None]
    assert [stage["images_per_second"] is None for stage in found] == [False, False, True, True]
    assert all(stage["seconds"] < 30 for stage in found)
    assert all(stage["finished"] for stage in found)


def test_each_stage_of_a_file_has_its_own_curves(tmp_path: Path) -> None:
    text = (
        training("out/one", thread=7, top1=0.5).text + training("out/two", thread=9, hour=11, top1=0.25).text
    )
    first, second = read_log(write(tmp_path / "a.log", text), history=True)
    assert first.log.history is not None
    assert second.log.history is not None
    assert first.log.history.outputs["right"].points() == [(0, 0.1), (40, 0.5)]
    assert second.log.history.outputs["right"].points() == [(0, 0.1), (40, 0.25)]


@pytest.mark.parametrize("same_thread", [False, True])
@pytest.mark.parametrize("failed_start", [False, True])
def test_the_gap_before_a_resume_is_no_training_time(
    same_thread: bool, failed_start: bool, tmp_path: Path
) -> None:
    notice = (
        "Attempting to upgrade input file specified using deprecated 'solver_type' field (enum)': s.prototxt"
    )
    first = (
        Log(thread=7)
        .line("upgrade_proto.cpp", notice, seconds=0.5)
        .start()
        .test(0, 0.1, 0.5, 2.3)
        .iterate(0, 20)
    )
    text, seconds = first.text, first.second - 36_000
    if failed_start:
        failed = Log(thread=8)
        failed.second = first.second + 1800
        failed.line("io.cpp", "Check failed: fd != -1 (-1 vs. -1) File not found: s.prototxt", level="F")
        text += failed.text + "*** Check failure stack trace: ***\n"
    second = Log(thread=7 if same_thread else 9)
    second.second = first.second + 3600
    began = second.second
    second.line("upgrade_proto.cpp", notice, seconds=0.5).start()
    second.line("caffe.cpp", "Resuming from a/b_iter_20.solverstate").iterate(20, 30).done(40)
    second.test(40, 0.75, 0.95, 0.625).end()
    found = report(tmp_path, text + second.text)
    assert [stage["name"] for stage in found] == (["train", "failed start"] if failed_start else ["train"])
    assert found[0]["seconds"] == pytest.approx(seconds + second.second - began, abs=6)
    assert (found[0]["finished"], found[0]["iterations"], found[0]["top1"]) == (True, 40, 0.75)
    if failed_start:
        assert found[1]["notes"][0] == "gave up before training or a test began"
        assert found[1]["finished"] is False


def test_changes_are_against_the_first_stage_with_an_accuracy(tmp_path: Path) -> None:
    failed = Log(thread=5).line("caffe.cpp", "Use CPU.").line("io.cpp", "Check failed: fd != -1", level="F")
    text = (
        failed.text + training("out/a", thread=7).text + training("out/b", thread=9, hour=11, top1=0.5).text
    )
    (run,), _ = find_runs([write(tmp_path / "a.log", text)])
    assert [stage.name for stage in run.stages] == ["failed start", "train", "train 2"]
    assert [tables.difference(run, stage) for stage in run.stages] == [None, None, -0.25]


def test_a_start_that_failed_under_the_same_prefix_is_part_of_its_stage(tmp_path: Path) -> None:
    failed = Log(thread=7).start()
    failed.line("db_lmdb.cpp", "Check failed: mdb_status == 0 (2 vs. 0) No such file or directory", level="F")
    (stage,) = report(tmp_path, failed.text + training(thread=9, hour=11).text)
    assert (stage["finished"], stage["top1"]) == (True, 0.75)
    assert stage["seconds"] < 30


def test_a_training_begun_anew_has_no_accuracy_of_the_one_before(tmp_path: Path) -> None:
    """Under the same prefix, after one that was killed."""
    killed = Log(thread=7).start().iterate(0, 10).test(20, 0.5, 0.9, 0.8).sparsity(0.8, 0.5).iterate(20, 20)
    anew = Log(thread=9)
    anew.second = 40_000.0
    (stage,) = report(tmp_path, killed.text + anew.start().iterate(0, 10).text)
    assert (stage["iterations"], stage["top1"], stage["outputs"], stage["sparsity"]) == (10, None, {}, None)
    assert "no accuracy: the log has no complete test" in stage["notes"]
    (stage,) = report(tmp_path, killed.text + anew.test(20, 0.25, 0.9, 0.8).iterate(20, 20).text)
    assert stage["top1"] == 0.25
    listed = Log(thread=9)
    listed.second = 40_000.0
    (stage,) = report(tmp_path, killed.text + listed.start().sparsity(0.4, 0.5).iterate(0, 10).text)
    assert stage["sparsity"] == 0.4


def test_a_second_training_from_the_start_is_a_stage_of_its_own(tmp_path: Path) -> None:
    found = report(tmp_path, training(thread=7, top1=0.5).text + training(thread=9, hour=11, top1=0.25).text)
    assert [(stage["name"], stage["top1"]) for stage in found] == [("train", 0.5), ("train 2", 0.25)]


def test_two_processes_line_by_line_are_told_apart_by_their_threads(tmp_path: Path) -> None:
    one, two = training("out/initial/a", thread=7, top1=0.5), training("out/sparse/b", thread=9, top1=0.25)
    texts = [re.split(r"(?m)^(?=I)", log.text)[1:] for log in (one, two)]
    mixed = "".join(first + second for first, second in zip(*texts, strict=True))
    found = report(tmp_path, mixed)
    assert [(stage["name"], stage["top1"]) for stage in found] == [
        ("initial (thread 7)", 0.5), ("sparse (thread 9)", 0.25),
    ]  # fmt: skip
    assert all(stage["finished"] and stage["gigamacs"] == GIGAMACS for stage in found)


def test_two_processes_line_by_line_with_one_thread_number_are_refused(tmp_path: Path) -> None:
    one, two = training("out/initial/a", top1=0.5), training("out/sparse/b", top1=0.25)
    texts = [re.split(r"(?m)^(?=I)", log.text)[1:] for log in (one, two)]
    mixed = "".join(first + second for first, second in zip(*texts, strict=True))
    with pytest.raises(UserError, match=r"at the same time, line by line.*a log of its own"):
        read_log(write(tmp_path / "a.log", mixed))


def test_stages_of_one_file_are_in_their_order_across_new_year(tmp_path: Path) -> None:
    one, two = training("out/initial/a", thread=7), training("out/sparse/b", thread=9)
    text = one.text.replace("I0815", "I1231") + two.text.replace("I0815", "I0101")
    assert [stage["name"] for stage in report(tmp_path, text)] == ["initial", "sparse"]


def test_containers_that_start_with_the_same_thread_number_are_not_mixed_up(tmp_path: Path) -> None:
    text = "".join(training(f"out/{n}", thread=7, hour=10 + n, top1=0.1 * n).text for n in range(4))
    assert [stage["top1"] for stage in report(tmp_path, text)] == [0.0, 0.1, 0.2, pytest.approx(0.3)]


@settings(max_examples=25)
@given(st.data())
def test_lines_of_any_processes_in_any_order_never_crash(data: st.DataObject) -> None:
    """Nor do cuts, foreign prefixes that change, or bytes that are no text."""
    logs = [training("out/a", thread=7), training("out/b", thread=9, hour=11), caffe_test(), whole_stage()]
    lines = [line for log in logs for line in log.text.encode().splitlines(keepends=True)]
    chosen = data.draw(st.lists(st.sampled_from(lines), max_size=60))
    before = st.sampled_from(
        [b"", b"", b"> ", b"[1] ", b"[2] ", b"caffe_1 | ", b"\x1b[0m", b"10:00:00 ", b"\x00"]
    )
    mixed = b"".join(data.draw(before) + line for line in chosen)
    cut = data.draw(st.integers(0, len(mixed)))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.log", mixed[:cut] + data.draw(st.binary(max_size=20)) + mixed[cut:])
        for history in (False, True):
            with contextlib.suppress(UserError):
                for part in read_log(path, history=history):
                    part.log.figures()


def test_many_marks_before_one_line_take_no_time(tmp_path: Path) -> None:
    text = "> " * 400_000 + whole_stage().text
    began = time.perf_counter()
    read_log(write(tmp_path / "a.log", text))
    assert time.perf_counter() - began < 5


# Which logs belong together


def test_the_layouts_of_published_runs(tmp_path: Path) -> None:
    for stage in ("initial", "sparse"):
        write(tmp_path / "RUN" / stage / "train.log", training(f"out/{stage}/net").text)
    write(tmp_path / "RUN/test/test.log", caffe_test().text)
    write(tmp_path / "RUN/test_quantize/test.log", caffe_test(quantized=True).text)
    # Its lines stand in the logs of the stages, too.
    write(tmp_path / "RUN/train-log_2018-01-02_10-00-00.txt", training("out/initial/net").text)
    found = stages(tmp_path)
    assert [(stage["run"], stage["name"]) for stage in found] == [
        ("RUN", "initial"), ("RUN", "sparse"), ("RUN", "test"), ("RUN", "test_quantize"),
    ]  # fmt: skip


def test_each_branch_of_a_tree_of_stages_is_a_result(tmp_path: Path) -> None:
    """Where several stages start from the same weights, but not where each goes on from the one before."""

    def add(run: str, name: str, start: str | None, *, sparse: bool = False) -> None:
        log = training(f"out/{name}/net")
        if start is not None:
            begun = "solver.cpp:1] Solver scaffolding done.\n"
            path = f"out/{start}/net_iter_40.caffemodel"
            line = f"I0815 10:00:01.000000  8764 caffe.cpp:1] Finetuning from {path}\n"
            log.text = log.text.replace(begun, begun + line)
        write(tmp_path / f"{run}/{name}/run.log", (log.sparsity(0.8, 0.5) if sparse else log).text)

    add("tree", "initial", None)
    add("tree", "l1reg", "initial", sparse=True)
    add("tree", "sparse", "initial")
    add("tree", "finetune", "sparse", sparse=True)
    write(tmp_path / "tree/test/run.log", caffe_test().text)
    add("line", "initial", None)
    add("line", "l1reg", "initial", sparse=True)
    add("line", "sparse", "l1reg", sparse=True)
    runs, _ = find_runs([tmp_path])
    found = {run.name: [stage.name for _, stage in tables.results([run])] for run in runs}
    assert found == {"tree": ["initial", "l1reg", "finetune"], "line": ["initial", "sparse"]}


def test_a_stage_that_stopped_is_no_branch(tmp_path: Path) -> None:
    """Though it starts from the same weights as the one that was trained after it."""
    begun = "solver.cpp:1] Solver scaffolding done.\n"
    line = "I0815 10:00:01.000000  8764 caffe.cpp:1] Finetuning from out/initial/net_iter_40.caffemodel\n"
    whole = training("out/sparse/net").text.replace(begun, begun + line)
    stopped = "".join(whole.partition("right = 0.1\n")[:2])
    write(tmp_path / "RUN/initial/run.log", training("out/initial/net").text)
    write(tmp_path / "RUN/l1reg/run.log", stopped)
    write(tmp_path / "RUN/sparse/run.log", whole)
    (run,), _ = find_runs([tmp_path])
    assert [stage.figures.top1 for stage in run.stages] == [0.75, 0.1, 0.75]
    assert [stage.name for _, stage in tables.results([run])] == ["initial", "sparse"]


def test_a_test_in_quantized_values_is_a_result_beside_the_float_one(tmp_path: Path) -> None:
    """Its change is that against the float network; the complexity is also shown without the zeros' part."""
    write(tmp_path / "RUN/initial/run.log", training("out/initial/net", top1=0.75).text)
    sparse = training("out/sparse/net", top1=0.71).sparsity(0.8, 0.5)
    write(tmp_path / "RUN/sparse/run.log", sparse.text)
    write(tmp_path / "RUN/test/run.log", caffe_test().text)
    write(tmp_path / "RUN/test_quantize/run.log", caffe_test(quantized=True).text)
    runs, _ = find_runs([tmp_path])
    of_stages, results = tables.tables(runs)
    change = of_stages.headers.index(tables.CHANGE_HEADER)
    assert [row.cells[change] for row in of_stages.rows] == ["-", "-4.00", "-5.00", "+0.00"]
    left = (CONV_WEIGHTS * 64 * 0.2 + FC_WEIGHTS * 0.5) / 1e9
    costs = [tables.complexity(GIGAMACS), tables.complexity(left)]
    assert results.headers[-1] == tables.LEFT_HEADER
    assert [row.cells for row in results.rows] == [
        ["RUN, initial", "75.00 %", "95.00 %", costs[0], "-"],
        ["RUN, sparse (80.0 % sparse)", "71.00 %", "95.00 %", *costs],
        [
            "RUN, test_quantize (80.0 % sparse, 12-bit weights, 8-bit activations)",
            *("70.00 %", "-", costs[0], "-"),
        ],
    ]
    of_stages_csv, results_csv = tables.as_csv(runs).split("\n\n")
    last = list(csv.DictReader(io.StringIO(of_stages_csv)))[-1]
    assert (last["weight_bits"], last["activation_bits"], last["top1_change"]) == ("12", "8", "0.0")
    row = list(csv.DictReader(io.StringIO(results_csv)))[1]
    assert float(row["gigamacs_left"]) == pytest.approx(left, rel=1e-3)
    labels = [card.label for card in page_content.cards(runs[0])]
    assert labels[:2] == ["Top-1", "Top-5"] and labels[2].startswith("Top-1 with 12-bit weights, 8-bit")

    write(tmp_path / "alone/RUN/test_quantize/run.log", caffe_test(quantized=True).text)
    alone = tables.tables(find_runs([tmp_path / "alone"])[0])[1]
    assert [row.cells[0].split(" (")[0] for row in alone.rows] == ["RUN, test_quantize"]


def test_the_log_of_the_forks_script_alone(tmp_path: Path) -> None:
    text = training("out/initial/net", thread=7).text + caffe_test().text
    write(tmp_path / "runs/cifar_net_2018/train-log_2018-01-02_10-00-00.txt", text)
    found = stages(tmp_path)
    assert [(stage["run"], stage["name"]) for stage in found] == [
        ("cifar_net_2018", "initial"),
        ("cifar_net_2018", "test"),
    ]


def test_jobs_of_digits_have_the_names_of_their_folders(tmp_path: Path) -> None:
    for job in ("20160615-101010-a1b2", "20160616-101010-c3d4"):
        write(tmp_path / job / "caffe_output.log", training().text)
    assert [stage["run"] for stage in stages(tmp_path)] == ["20160615-101010-a1b2", "20160616-101010-c3d4"]


def test_a_file_is_a_test_by_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "lr.log", training().text)
    write(tmp_path / "lr_test.log", training().text)
    write(tmp_path / "net.log", training().text)
    write(tmp_path / "net_test.log", caffe_test().text)
    assert [(stage["run"], stage["name"]) for stage in stages(tmp_path)] == [
        ("lr", "train"), ("lr_test", "train"), ("net", "train"), ("net", "test"),
    ]  # fmt: skip
    (stage,) = stages(write(tmp_path / "RUN/finetune/check.log", caffe_test().text))
    assert (stage["run"], stage["name"]) == ("RUN", "test")


def test_runs_of_the_same_name_have_their_folders_before_it(tmp_path: Path) -> None:
    for folder in ("a/1", "b/1", "b/2"):
        write(tmp_path / folder / "caffe.log", training().text)
        write(tmp_path / folder / "net/sparse/run.log", training().text)
    write(tmp_path / "alone.log", training().text)
    assert sorted(stage["run"] for stage in stages(tmp_path)) == [
        "a/1/caffe", "a/1/net", "alone", "b/1/caffe", "b/1/net", "b/2/caffe", "b/2/net",
    ]  # fmt: skip
    # Of those that no folder tells apart, the second has a number.
    write(tmp_path / "alone/sparse/run.log", training().text)
    found = stages(tmp_path / "alone.log", tmp_path / "alone")
    assert [stage["run"] for stage in found] == ["alone", "alone 2"]


def test_logs_of_one_stage_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "RUN/initial/b.log", training(hour=8, top1=0.5).text)
    write(tmp_path / "RUN/initial/a.log", training(hour=9, top1=0.25).text)
    assert [(stage["name"], stage["top1"]) for stage in stages(tmp_path)] == [
        ("initial", 0.5), ("initial 2", 0.25),
    ]  # fmt: skip


def test_folders_of_windows_name_the_stage(tmp_path: Path) -> None:
    (stage,) = report(tmp_path, training(r"D:\\out\\sparse\\net").text)
    assert stage["name"] == "sparse"


# What the Caffes print


def test_nvcaffe_on_several_gpus_prints_for_each_and_the_first_counts(tmp_path: Path) -> None:
    log = Log().start(devices="Using GPUs 0, 1", iter_size=2)
    for number in (0, 10, 20, 30):
        for device in (0, 1):
            loss = 1.0 if device == 0 else 99.0
            speed = f"    [0.{device}] Iteration {number} (2 iter/s, 5s/10 iter), 1.5/300ep, loss = {loss}"
            log.line("solver.cpp", speed, seconds=0)
            log.line(
                "solver.cpp",
                f"    [0.{device}]     Train net output #0: loss = {loss} (* 1 = {loss} loss)",
                seconds=0,
            )
            log.line(
                "sgd_solver.cpp",
                f"    [0.{device}] Iteration {number}, lr = 0.1, m = 0.9, wd = 0.0005, gs = 1",
                seconds=0,
            )
        log.second += 5
    log.line("solver.cpp", "Iteration 40, Testing net (#0)")
    for device in (0, 1):
        log.line(
            "solver.cpp", f"    (0.{device})    Test net output #0: right = {0.5 if device == 0 else 0.9}"
        )
    log.line("caffe.cpp", "Optimization Done in 20s")
    (stage,) = report(tmp_path, log.text)
    assert (stage["top1"], stage["train_loss"], stage["finished"]) == (0.5, 1.0, True)
    assert stage["images_per_second"] == pytest.approx(256, rel=0.01)


def on_two_gpus(prefix: str, gpus: tuple[int, int], *, thread: int, hour: int, top1: float) -> Log:
    """A training of NVCaffe 0.17, which has a thread for each GPU."""
    log = Log(thread=thread)
    log.second = 3600.0 * hour
    log.start(devices=f"Using GPUs {gpus[0]}, {gpus[1]}", iter_size=2)
    log.text = log.text.replace('"a/b"', f'"{prefix}"')
    log.line("solver.cpp", f"    [0.{gpus[0]}] Solving tiny")
    for number in (0, 10, 20, 30):
        for at, gpu in enumerate(gpus):
            log.thread = thread + 1 + at
            told = f"Iteration {number} (2 iter/s, 5s/10 iter), 1.5/300ep, loss = {1.0 + 98 * at}"
            log.line("solver.cpp", f"    [0.{gpu}] {told}", seconds=0)
        log.second += 5
    log.thread = thread + 1
    log.line("solver.cpp", "Iteration 40, Testing net (#0)")
    for at, gpu in enumerate(gpus):
        log.thread = thread + 1 + at
        for number, output in enumerate(("loss = 0.5 (* 1 = 0.5 loss)", "nearly right = 0.9")):
            log.line("solver.cpp", f"    (0.{gpu})    Test net output #{number}: {output}")
        log.line("solver.cpp", f"    (0.{gpu})    Test net output #2: right = {0.01 if at else top1}")
    log.thread = thread
    return log.line("caffe.cpp", "Optimization Done in 20s")


def test_the_threads_of_several_gpus_are_one_process(tmp_path: Path) -> None:
    """In a file of several, one after the other, and line by line."""
    one = on_two_gpus("out/initial/a", (0, 1), thread=100, hour=10, top1=0.5)
    two = on_two_gpus("out/sparse/b", (0, 1), thread=200, hour=11, top1=0.25)
    found = report(tmp_path, one.text + two.text + caffe_test(thread=300).text)
    expected = [("initial", 0.5, 1.0), ("sparse", 0.25, 1.0), ("test", 0.7, None)]
    assert [(stage["name"], stage["top1"], stage["train_loss"]) for stage in found] == expected
    beside = on_two_gpus("out/sparse/b", (2, 3), thread=200, hour=10, top1=0.25)
    texts = [re.split(r"(?m)^(?=I)", log.text)[1:] for log in (one, beside)]
    found = report(tmp_path, "".join(first + second for first, second in zip(*texts, strict=True)))
    expected = [("initial (thread 101)", 0.5, 1.0), ("sparse (thread 201)", 0.25, 1.0)]
    assert [(stage["name"], stage["top1"], stage["train_loss"]) for stage in found] == expected
    assert all(stage["gigamacs"] == GIGAMACS and stage["finished"] for stage in found)


@pytest.mark.parametrize("single", ["class AP %d: %g", "class%d: %g"])
@pytest.mark.parametrize("mean", ["Test net output mAP #0: map = %g", "    Test net output mAP #0: map = %g"])
def test_detection_is_in_every_format(single: str, mean: str, tmp_path: Path) -> None:
    log = Log().start()
    for iteration, value in ((0, 0.1), (40, 0.65)):
        log.line("solver.cpp", f"Iteration {iteration}, Testing net (#0)")
        for number in (1, 2):
            log.line("solver.cpp", single % (number, value / number))
        log.line("solver.cpp", mean % value).iterate(iteration, iteration)
    (stage,) = report(tmp_path, log.end().text)
    assert stage["outputs"] == {"map": 0.65, "class AP 1": 0.65, "class AP 2": 0.325}
    assert (stage["mean_ap"], stage["top1"]) == (0.65, None)
    runs, _ = find_runs([tmp_path / "some.log"])
    assert "mAP" in tables.as_markdown(tables.tables(runs))
    assert "65.00 %" in tables.as_markdown(tables.tables(runs))
    assert "map = 0.65; class AP 1 = 0.65" in tables.as_csv(runs)


@pytest.mark.parametrize("cut", [False, True])
def test_the_mean_average_precision_of_ssd(cut: bool, tmp_path: Path) -> None:
    """Its solver prints it as an output like others, of a layer of its own."""
    log = Log().start()
    for iteration, value in ((0, 0.1), (40, 0.65)):
        log.line("solver.cpp", f"Iteration {iteration}, Testing net (#0)")
        log.line("solver.cpp", f"    Test net output #0: detection_eval = {value}").iterate(
            iteration, iteration
        )
    text = log.end().text.replace('"Accuracy"', '"DetectionEvaluate"', 1)
    text = text.replace('top: "right"', 'top: "detection_eval"')
    for name in ("acc_of_5", "loss"):
        text = re.sub(rf'layer {{\n  name: "{name}"(?:\n .*)*\n}}\n(?!(?s:.*)name: "acc")', "", text)
    text = cut_off(text) if cut else text
    (stage,) = report(tmp_path, text)
    assert (stage["mean_ap"], stage["top1"]) == (0.65, None)
    by_name = "mAP is the output 'detection_eval', by name: the log does not hold all of the test network"
    assert (by_name in stage["notes"]) == cut
    assert not any("top-1" in note for note in stage["notes"])
    runs, _ = find_runs([tmp_path / "some.log"])
    assert runs[0].stages[0].figures.accuracies["mAP"] == "detection_eval"


def cut_off(text: str) -> str:
    """The text with networks that glog has cut off."""
    filler = "".join(
        f'layer {{\n  name: "relu{n}"\n  type: "ReLU"\n  bottom: "fc"\n  top: "fc"\n}}\n' for n in range(700)
    )
    for start in [match.end() for match in re.finditer("from parameters: \n(?=name)", text)][::-1]:
        end = text.index("I0815", start)
        text = text[:start] + (text[start:end] + filler)[:29_950] + "\n" + text[end:]
    return text


def without_data_shapes(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if "output data size" not in line)


@pytest.mark.parametrize(
    "form", ["Top shape: {} 3 8 8 (9600)", "{phase} Top shape for layer 0 'data' {} 3 8 8 (9600)"]
)
def test_shapes_of_top_shape_lines(form: str, tmp_path: Path) -> None:
    log = whole_stage()
    parts = re.split(r"(.* output data size: \d+,3,8,8\n)", log.text)
    for at, phase, batch in ((1, "TRAIN", 32), (3, "TEST", 50)):
        head = parts[at].split("] ")[0].replace("data_layer", "net")
        shape = form.format(batch, phase=phase)
        label = (
            "Top shape: 32 (32)" if "{phase}" not in form else f"{phase} Top shape for layer 0 'data' 32 (32)"
        )
        parts[at] = f"{head}] Setting up data\n{head}] {shape}\n{head}] {label}\n{head}] Setting up conv\n"
        parts[at] += f"{head}] Top shape: 32 16 8 8 (32768)\n"
    (stage,) = report(tmp_path, "".join(parts))
    assert (stage["gigamacs"], stage["image_size"]) == (GIGAMACS, [8, 8])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ImageLabelData", 'image_label_data_param {{ image_list_path: "a" batch_size: {batch} }}'),
        ("AnnotatedData", "data_param {{ batch_size: {batch} }}"),
        ("ImageData", "image_data_param {{ batch_size: {batch} }}"),
        ("HDF5Data", "hdf5_data_param {{ batch_size: {batch} }}"),
        ("Python", 'python_param {{ module: "roi_data_layer.layer" }}'),
    ],
)
def test_other_data_layers(kind: str, settings: str, tmp_path: Path) -> None:
    def changed(match: re.Match[str]) -> str:
        return settings.format(batch=match.group(1))

    text = whole_stage().text.replace('type: "Data"', f'type: "{kind}"')
    text = re.sub(r"transform_param \{[^}]*\}\n", "", text)
    text = re.sub(r"data_param \{[^}]*batch_size: (\d+)[^}]*\}", changed, text)
    (stage,) = report(tmp_path, text)
    assert figures(stage, WHOLE) == figures(*report(tmp_path / "plain", whole_stage().text), WHOLE)


def test_the_training_network_counts_where_the_test_network_lacks_its_shape(tmp_path: Path) -> None:
    text = whole_stage().text
    at = text.rindex("I", 0, text.index("output data size: 50"))
    (stage,) = report(tmp_path, text[:at] + text[text.index("\n", at) + 1 :])
    assert stage["gigamacs"] == GIGAMACS


@pytest.mark.parametrize(
    ("accuracy", "top5"), [("right", "nearly"), ("acc/top1", "acc/top5"), ("accuracy", "accuracy_5")]
)
def test_of_a_network_that_was_cut_off_what_is_whole_counts(accuracy: str, top5: str, tmp_path: Path) -> None:
    log = whole_stage()
    text = log.text.replace("right =", f"{accuracy} =").replace(f"nearly {accuracy} =", f"{top5} =")
    text = cut_off(text)
    (stage,) = report(tmp_path, text)
    assert stage["images_per_second"] == report(tmp_path / "plain", log.text)[0]["images_per_second"]
    assert stage["gigamacs"] is None
    named = accuracy != "right"
    assert (stage["top1"], stage["top5"]) == ((0.75, 0.95) if named else (None, None))
    assert "cut off" in stage["notes"][0]
    assert ("by name" in stage["notes"][1]) == named


def test_caffe_of_2014(tmp_path: Path) -> None:
    log = Log().start()
    for number, (iteration, loss) in enumerate(((0, 2.5), (10, 1.5))):
        log.line("solver.cpp", f"Iteration {iteration}, Testing net")
        for index, value in enumerate((loss, 0.6 + 0.1 * number, 0.2 + 0.1 * number)):
            log.line("solver.cpp", f"Test score #{index}: {value:g}")
        log.line("solver.cpp", f"Iteration {iteration} ({241.076 + number}/s), loss = {loss}")
        log.line("solver.cpp", f"Iteration {iteration} (241.076/s), lr = 0.001", seconds=5)
    log.line("solver.cpp", "Snapshotting to a/b_iter_40").line("solver.cpp", "Optimization Done.")
    text = re.sub(r"(?m)^layer \{", "layers {", log.text)
    for today, old in (
        ("InnerProduct", "INNER_PRODUCT"),
        ("SoftmaxWithLoss", "SOFTMAX_LOSS"),
        ("Data", "DATA"),
    ):
        text = text.replace(f'type: "{today}"', f"type: {old}")
    text = text.replace('type: "Convolution"', "type: CONVOLUTION").replace(
        'type: "Accuracy"', "type: ACCURACY"
    )
    (stage,) = report(tmp_path, text)
    assert stage["outputs"] == {"loss": 1.5, "nearly right": 0.7, "right": pytest.approx(0.3)}
    assert (stage["top1"], stage["top5"], stage["loss"]) == (pytest.approx(0.3), 0.7, 1.5)
    assert (stage["iterations"], stage["gigamacs"], stage["notes"]) == (40, GIGAMACS, [])


def test_caffe_of_2014_that_chooses_its_device_last(tmp_path: Path) -> None:
    """When the solver is ready: it is no second process."""
    device, text = "I0815 10:00:00.000000  8764 caffe.cpp:1] Use CPU.\n", whole_stage().text
    assert text.startswith(device)
    ready = "Solver scaffolding done.\n"
    weights = device.replace("Use CPU.", "Finetuning from some.caffemodel")
    late = (device + weights).replace("10:00:00", "10:00:02")
    (stage,) = report(tmp_path, text[len(device) :].replace(ready, ready + late))
    assert figures(stage, WHOLE) == figures(*report(tmp_path / "plain", text), WHOLE)


@pytest.mark.parametrize("word", ["-1.#IND", "1.#QNAN", "-nan(ind)", "nan", "-nan"])
def test_losses_that_are_not_numbers_are_noted(word: str, tmp_path: Path) -> None:
    log = Log().start().iterate(0, 10).line("solver.cpp", f"Iteration 20, loss = {word}")
    log.line("sgd_solver.cpp", "Iteration 20, lr = 0.1").line("solver.cpp", f"Iteration 40, loss = {word}")
    log.line("solver.cpp", "Iteration 40, Testing net (#0)")
    log.line("solver.cpp", f"    Test net output #0: loss = {word} (* 1 = {word} loss)")
    (stage,) = report(tmp_path, log.line("solver.cpp", "    Test net output #1: right = 0.1").end().text)
    assert (stage["loss"], stage["train_loss"], stage["outputs"]["loss"]) == (None, None, None)
    assert stage["notes"][0].startswith("the loss is not a number (nan) at iteration ")
    assert stage["notes"][1] == "of the last test, loss is not a finite number"
    (run,), _ = find_runs([tmp_path / "some.log"])
    assert math.isnan(run.stages[0].figures.loss or 0.0)
    assert tables.stage_table(run).rows[0].cells[4] == "nan"


def test_a_test_that_printed_nothing_is_noted(tmp_path: Path) -> None:
    log = (
        Log()
        .start()
        .test(0, 0.1, 0.5, 2.3)
        .iterate(0, 10)
        .line("solver.cpp", "Iteration 20, Testing net (#0)")
    )
    (stage,) = report(tmp_path, log.iterate(20, 30).end().text)
    assert "the test at iteration 20 printed no output" in stage["notes"]
    assert stage["top1"] is None  # 0.1 was that of what it started from


def test_a_test_before_the_training_says_nothing_of_its_result(tmp_path: Path) -> None:
    log = Log().start().test(0, 0.1, 0.5, 2.3).iterate(0, 10)
    (running,) = report(tmp_path, log.text)
    assert running["top1"] == 0.1
    (stage,) = report(tmp_path, log.end().text)
    assert (stage["top1"], stage["top5"], stage["loss"], stage["outputs"]) == (None, None, None, {})
    assert stage["finished"]
    assert (
        "no accuracy: the last test came before anything was trained; lower test_interval" in stage["notes"]
    )


def test_py_faster_rcnn(tmp_path: Path) -> None:
    log = Log().start().iterate(0, 30)
    text = log.text.replace(log.text[log.text.index("I0815", log.text.index("Starting")) - 90 :][:0], "")
    text = re.sub(r".* Starting Optimization\n", "Solving...\n", text)
    text += "speed: 0.500s / iter\nWrote snapshot to: a/b_iter_40.caffemodel\ndone solving\n"
    (stage,) = report(tmp_path, text)
    assert (stage["finished"], stage["iterations"]) == (True, 40)
    assert stage["images_per_second"] == 64
    assert stage["notes"] == ["no accuracy: the log has no complete test"]


EVALUATION = """\
im_detect: 1/4952 0.243s 0.001s
im_detect: 4952/4952 0.239s 0.001s
Evaluating detections
VOC07 metric? Yes
AP for aeroplane = 0.6957
AP for dining table = 0.5
Mean AP = 0.5979
~~~~~~~~
Results:
0.696
"""


@pytest.mark.parametrize("trains", [True, False])
def test_the_evaluation_of_py_faster_rcnn(trains: bool, tmp_path: Path) -> None:
    """Of the network that the same log trains, or of a given one."""
    log = Log().start().iterate(0, 30) if trains else Log().net("TEST", 1)
    text = re.sub(r".* Starting Optimization\n", "Solving...\n", log.text.replace(ACCURACIES, ""))
    text += "Wrote snapshot to: a/b_iter_40.caffemodel\ndone solving\n" if trains else ""
    (stage,) = report(tmp_path, text + EVALUATION + ("" if trains else EVALUATION.replace("0.59", "0.60")))
    expected = {"name": "train", "iterations": 40} if trains else {"name": "test", "iterations": 4952}
    assert figures(stage, expected) == expected
    assert (stage["finished"], stage["mean_ap"]) == (True, 0.5979 if trains else 0.6079)
    assert stage["outputs"] == {
        "Mean AP": stage["mean_ap"], "AP for aeroplane": 0.6957, "AP for dining table": 0.5
    }  # fmt: skip
    assert not [note for note in stage["notes"] if "accuracy" in note]


def test_caffe_time_is_said_to_be_that(tmp_path: Path) -> None:
    log = Log().line("caffe.cpp", "Use CPU.").net("TRAIN", 32).line("caffe.cpp", "Performing Forward")
    log.line("caffe.cpp", "*** Benchmark begins ***").line("caffe.cpp", "Testing for 50 iterations.")
    log.line("caffe.cpp", "Average Forward pass: 12.5 ms.").line("caffe.cpp", "Average Backward pass: 20 ms.")
    log.line("caffe.cpp", "Average Forward-Backward: 32.75 ms.").line("caffe.cpp", "Total Time: 1637.5 ms.")
    (stage,) = report(tmp_path, log.line("caffe.cpp", "*** Benchmark ends ***").text)
    assert (stage["name"], stage["gigamacs"], stage["finished"]) == ("time", GIGAMACS, True)
    assert stage["notes"] == [
        "this is caffe time, which neither trains nor tests: average forward pass 12.5 ms, average backward "
        "pass 20 ms, average forward-backward 32.75 ms, total time 1637.5 ms"
    ]


# What a log does not say


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        (Log().line("caffe.cpp", "Use CPU.").text, ["the log ends before training or a test began"]),
        (
            Log()
            .line("solver.cpp", "Iteration 10, loss = 0.5")
            .line("solver.cpp", "Iteration 20, loss = 0.4")
            .text,
            [
                "no complexity: the log does not hold the network",
                "no accuracy: the log has no complete test",
                "no images/s: the log does not hold the solver's settings",
            ],
        ),
        (
            without_data_shapes(whole_stage().text),
            ["no complexity: the log does not say enough to know the input's shape of layer 'conv'"],
        ),
        (
            whole_stage().text.replace('type: "Accuracy"', 'type: "Python"'),
            ["no top-1 accuracy: the test network has no Accuracy layer for it"],
        ),
        (
            re.sub(r".*Test net output #2.*\n", "", whole_stage().text),
            ["no top-1 accuracy: the last test did not print the output 'right'"],
        ),
    ],
)
def test_what_could_not_be_found_out_is_noted_in_every_format(
    text: str, notes: list[str], tmp_path: Path
) -> None:
    (stage,) = report(tmp_path, text)
    assert stage["notes"] == notes
    runs, _ = find_runs([tmp_path / "some.log"])
    assert "; ".join(notes) in tables.as_csv(runs)
    for note in notes:
        assert f"train: {note}" in tables.stage_table(runs[0]).notes
