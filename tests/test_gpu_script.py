"""tools/utils/gpu.sh and what it starts, where there is no GPU: what is missing, what fails, what hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_torch_gpu", ROOT / "bench/torch_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_torch_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load()
PLAN = bench.plan([256, 512, 1024, 128], ["cpu", "gpu", "both"])
CARD = {"card": "a card", "cores": 16, "torch": "2.11", "jpeg bytes": 35000, "TB/s": 4.0}
CARD |= {"bf16 TFLOP/s": 800.0, "tf32 TFLOP/s": 400.0, "fp32 TFLOP/s": 50.0}

# ------------------------------------------------------------------------------------------------- the plan


def test_every_part_is_planned_in_each_batch_and_precision_the_important_ones_first() -> None:
    names = [row.name for row in PLAN]
    assert len(set(names)) == len(names)
    for precision in ("bf16", "tf32", "fp32"):
        for batch in (128, 256, 512, 1024):
            assert f"compute {precision} {batch}" in names
            assert any(
                name.startswith("end to end") and name.endswith(f"{precision} {batch}") for name in names
            )
    assert names[:10] == [
        "compute bf16 256",
        *("feed cpu 256", "feed gpu 256", "feed both 256"),
        *("end to end both bf16 256", "end to end gpu bf16 256", "end to end cpu bf16 256"),
        *("by hand eager bf16 256", "by hand graph bf16 256", "by hand compiled bf16 256"),
    ]
    precisions = [row.precision for row in PLAN if row.part == "compute"]
    assert precisions.index("tf32") == 4
    assert sum(row.seconds for row in PLAN[:22]) < 360


class Machine:
    """Answers as the process that measures would, with figures of its own."""

    def __init__(self, **failing: Exception) -> None:
        self.asked: list[str] = []
        self.failing = failing

    def __call__(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        name = "{part} {way} {precision} {batch}".format(**request)
        self.asked.append(name)
        for start, error in self.failing.items():
            if name.startswith(start.replace("_", " ")):
                raise error
        return {"images/s": 20000.0 if request["way"] == "gpu" else 10000.0, "GiB": 3.4, "notes": []}


def results_in(folder: Path) -> tuple[Any, Path]:
    file = folder / "gpu.json"
    results = bench.Results(file, {"summary": "3 passed"})
    results.card = dict(CARD)
    return results, file


def test_rows_that_fail_are_named_and_the_others_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, file = results_in(tmp_path)
    assert json.loads(file.read_text())["rows"] == []
    failing = {
        "compute_graph_bf16_1024": bench.RowFailed("OutOfMemoryError: too much"),
        "by_hand_compiled": bench.RowStopped("stopped after 120 s"),
    }
    bench.measure(PLAN, bench.Clock(1e6), Machine(**failing), results)
    bench.show(results)
    said = capsys.readouterr().out
    assert "\nFailed: compute bf16 1024: OutOfMemoryError: too much\n" in said
    assert "\nFailed: by hand compiled bf16 256: stopped after 120 s\n" in said
    assert "Tests: 3 passed." in said
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(PLAN) - 2
    # 6 x 0.4063 GigaMACs x 10,000 of 800 TFLOP/s; 14 x 1,555,456 x 2 bytes x 10,000 of 4 TB/s
    assert "| compute | bf16 | 256 | 10,000 | 3.0% | 11% | 3.4 GiB |" in lines
    content = json.loads(file.read_text())
    assert [row["row"] for row in content["failed"]] == ["by hand compiled bf16 256", "compute bf16 1024"]
    assert len(content["rows"]) == len(PLAN) - 2
    assert content["left out"] == []


def test_the_fastest_decoder_of_the_main_batch_feeds_the_others(tmp_path: Path) -> None:
    results, _ = results_in(tmp_path)
    machine = Machine()
    bench.measure(PLAN, bench.Clock(1e6), machine, results)
    assert "end to end gpu bf16 1024" in machine.asked
    assert not [name for name in machine.asked if bench.FASTEST in name]
    assert bench.fastest_decoder([]) == "cpu"


def test_what_does_not_fit_is_left_out_by_name(tmp_path: Path) -> None:
    results, file = results_in(tmp_path)
    clock = bench.Clock(12)
    bench.measure(PLAN, clock, Machine(), results)
    done = {f"{row['part']} {row['batch']}" for row in results.rows}
    assert {"compute 256", "feed 256"} <= done
    left = json.loads(file.read_text())["left out"]
    assert "end to end both bf16 256" in left and "compute fp32 256" in left
    assert len(left) + len(results.rows) == len(PLAN)


def test_a_row_that_the_end_of_the_time_stops_has_not_failed(tmp_path: Path) -> None:
    results, _ = results_in(tmp_path)
    row = bench.Row("compute", "bf16", 256, "graph", 10)
    bench.measure([row], bench.Clock(11), Machine(compute=bench.RowStopped("stopped after 11 s")), results)
    assert results.left_out == ["compute bf16 256 (begun)"]
    assert results.failed == []


def test_a_table_without_the_cards_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, _ = results_in(tmp_path)
    results.card = {"jpeg bytes": 35000}
    results.add(bench.Row("end to end", "bf16", 256, "cpu", 10), {"images/s": 9.0, "GiB of the card": 5.0})
    bench.show(results)
    assert "| end to end, decoded by cpu | bf16 | 256 | 9 |  |  | 5.0 GiB in all |" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- the worker

WORKER = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)["way"]
    if asked == "hangs":
        time.sleep(600)
    if asked == "dies":
        print("out of luck", file=sys.stderr, flush=True)
        os.abort()
    print(json.dumps({"error": "no"} if asked == "fails" else {"pid": os.getpid()}), flush=True)
"""


def test_a_worker_that_fails_dies_or_hangs_is_replaced(tmp_path: Path) -> None:
    worker = bench.Worker([sys.executable, "-c", WORKER], tmp_path)
    try:
        first = worker.ask({"way": ""}, 30)["pid"]
        assert worker.ask({"way": ""}, 30)["pid"] == first
        for way, says in (
            ("fails", "^no$"),
            ("dies", "^the process that measures ended, killed by SIGABRT: out of luck$"),
            ("hangs", "^stopped after 1 s$"),
        ):
            before = worker.ask({"way": ""}, 30)["pid"]
            with pytest.raises(bench.RowFailed, match=says):
                worker.ask({"way": way}, 1 if way == "hangs" else 30)
            assert not Path(f"/proc/{before}").exists()
        assert worker.start() == bench.START
        assert worker.ask({"way": ""}, 30)["pid"] != first
    finally:
        worker.close()


# ------------------------------------------------------------------------------------------------ the tests

MADE_UP = """
import os, signal, time
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("number", range(12))
def test_good(number): pass
def test_bad(): assert 1 == 2, "no"
def test_left_out(): pytest.skip("not here")
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
def test_cuda(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


SKIPPED = "import pytest\n@pytest.mark.gpu\ndef test_it(): pytest.skip()\n"


def session(folder: Path, text: str, limit: float) -> tuple[int, str, dict[str, Any]]:
    (folder / "test_made_up.py").write_text(text)
    outcomes = folder / "outcomes.json"
    command = [sys.executable, str(ROOT / "tests/gpu_session.py"), "--limit", str(limit), "--processes", "2"]
    ran = subprocess.run(
        [*command, "--outcomes", str(outcomes), str(folder / "test_made_up.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return ran.returncode, ran.stdout, json.loads(outcomes.read_text())


@pytest.mark.caffe  # for its time
def test_a_test_that_kills_its_process_takes_no_other_with_it(tmp_path: Path) -> None:
    code, said, found = session(tmp_path, MADE_UP, 50)
    assert code == 1
    assert [found[way] for way in ("passed", "failed", "skipped", "not run")] == [12, 3, 1, 0]
    why = {each["test"].rpartition("::")[2]: each["why"] for each in found["failures"]}
    assert why.keys() == {"test_bad", "test_dies", "test_cuda"}
    assert why["test_bad"].startswith("AssertionError: no")
    assert why["test_dies"] == "it did not end: its process died, hung, or was stopped"
    assert "killed by SIGKILL" in found["summary"]
    assert "Tests: 12 passed, 3 failed, 1 skipped in " in said


@pytest.mark.caffe  # for its time
@pytest.mark.parametrize(
    ("text", "numbers", "says"),
    [
        (f"{MADE_UP}\ndef test_hangs(): time.sleep(600)\n", None, "not all was done within 15 s"),
        ("import nothing_of_this_name\n", [0, 0, 0, 0], "no test was found"),
        (SKIPPED, [0, 0, 1, 0], "all tests were skipped"),
        (SKIPPED.replace("pytest.skip()", "pass"), [1, 0, 0, 0], "1 passed in"),
    ],
    ids=["hangs", "is not imported", "are skipped", "are good"],
)
def test_tests_that(text: str, numbers: list[int] | None, says: str, tmp_path: Path) -> None:
    started = time.monotonic()
    code, _, found = session(tmp_path, text, 15 if "within 15 s" in says else 100)
    assert time.monotonic() - started < 90
    assert code == (0 if says == "1 passed in" else 1)
    assert says in found["summary"]
    if numbers is not None:
        assert [found[way] for way in ("passed", "failed", "skipped", "not run")] == numbers
    else:
        assert any(each["test"].endswith("test_hangs") for each in found["failures"])


# ----------------------------------------------------------------------------------------------- the script


def run_script(script: Path, *arguments: str, path: str = "/usr/bin:/bin") -> tuple[int, str, str]:
    ran = subprocess.run(
        [str(script), *arguments],
        cwd=script.parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PATH": path, "HOME": str(script.parents[2])},
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script alone, and an empty bin."""
    (tmp_path / "tools/utils").mkdir(parents=True)
    for name in ("gpu.sh", "steps.sh"):
        shutil.copy(ROOT / "tools/utils" / name, tmp_path / "tools/utils")
    return tmp_path


def stand_in(file: Path, check: str, rest: str = "exit 9") -> None:
    """A Python that answers the script's question about it by ``check``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/bash\nif [ "$1" = - ]; then\n{check}\nexit\nfi\n{rest}\n')
    file.chmod(0o755)


def test_what_is_missing_is_one_line(checkout: Path) -> None:
    """A real Python that sees no packages at all."""
    real = sys.executable
    python = checkout / ".venv/bin/python"
    stand_in(python, f'"{real}" -I -S -')
    stand_in(checkout / "bin/python3", "echo; echo a PyTorch that can use a GPU here, it has 2.11.0+cpu")
    code, out, err = run_script(checkout / "tools/utils/gpu.sh", path=f"{checkout}/bin:/usr/bin:/bin")
    packages = "torch numpy lmdb pydantic opencv-python-headless jinja2 protobuf pytest hypothesis"
    assert code == 1 and out == ""
    assert err == (
        f"gpu.sh: {python} lacks {packages.replace(' ', ', ')}: {python} -m pip install {packages}; or"
        f" {checkout}/bin/python3 lacks a PyTorch that can use a GPU here, it has 2.11.0+cpu:"
        " tools/utils/setup.sh --torch installs one\n"
    )
    assert not (checkout / "gpu.json").exists()


PASSED = """echo '{"summary": "1 passed"}' >"${@: -1}" """


@pytest.mark.parametrize(
    ("rest", "failed", "tests"),
    [
        ("exit 1", "tests measurements", "they did not come to an end"),
        (f"case $1 in tests/*) {PASSED} ;; *) exit 1 ;; esac", "measurements", "1 passed"),
        ('case $1 in tests/*) kill -9 $$ ;; *) echo "{}" >"${@: -1}" ;; esac', "tests", None),
        ('echo "{}" >"${@: -1}"', "", None),
    ],
    ids=["all", "measurements", "tests", "nothing"],
)  # fmt: skip
def test_there_is_a_json_file_whatever_fails(
    rest: str, failed: str, tests: str | None, checkout: Path
) -> None:
    """Stand-ins for the programs; the Python that can use the GPU is the machine's, not that of .venv."""
    stand_in(checkout / ".venv/bin/python", "echo; echo a PyTorch that can use a GPU here, it has 2.11.0+cpu")
    stand_in(checkout / "bin/python3", "echo", rest)
    results = checkout / "results.json"
    results.write_text("of an earlier run")
    script = checkout / "tools/utils/gpu.sh"
    code, out, err = run_script(script, "results.json", path=f"{checkout}/bin:/usr/bin:/bin")
    assert (code != 0) == bool(failed), err
    assert f"failed: {failed}; see above" in err or not failed
    assert f"Using {checkout}/bin/python3: {checkout}/.venv/bin/python lacks a PyTorch that can use" in out
    content = json.loads(results.read_text())
    assert tests is None or content["tests"]["summary"] == tests


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a", "b"), "one argument at most"),
        (("no/gpu.json",), "its folder does not exist"),
        ((".",), "is a folder"),
    ],
)
def test_arguments_that_are_wrong(arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run_script(ROOT / "tools/utils/gpu.sh", *arguments)
    assert code == 1 and out == "" and says in err
