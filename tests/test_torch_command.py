"""`caffe-torch` as a command: Caffe's flags, mistakes in a line, ranks that start and stop together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from small_stage import SmallStage, write_digits

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.__main__ import main

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]
RANKS = [*PROGRAM, "train", "-solver", "solver.prototxt", "-cpu_ranks", "2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "lmdb")


def run(
    *arguments: str, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_gpu_lists() -> None:
    for wrong in ("0,", "a", "-1", "0,0", "0 1"):
        with pytest.raises(UserError, match="-gpu"):
            main(["train", "-solver", "s", f"-gpu={wrong}"])


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["train"], "-solver"),
        (["train", "-solver", "none.prototxt"], "none.prototxt: No such file"),
        (["train", "-solver", "s", "-precision", "fp16"], "fp16"),
        (["train", "-solver", "s", "-sparsity_step_iter", "5"], "needs -sparsity_target: add it"),
        (["train", "-solver", "s", "-sparsity_target", "0.5"], "-sparsity_start_iter is missing: add it"),
        (
            ["train", "-solver", "s", "-sparsity_target", "0.5", "-sparsity_start_iter", "-1"],
            "-sparsity_start_iter is -1; it has to be 0 or more",
        ),
        (["train", "-solver", "s", "-weights", "w", "-snapshot", "s"], "not allowed with"),
        (
            ["test", "-model", "none.prototxt", "-weights", "w", "-iterations", "0"],
            "is not a whole number from 1",
        ),
        (["time", "-model", "none.prototxt"], "none.prototxt: No such file"),
        (["device_query", "-gpu", "99"], "-gpu 99: this machine has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert says in last
    assert "Traceback" not in done.stderr


@pytest.mark.caffe
def test_version_and_gflags_ways_of_writing(digits: Path, tmp_path: Path) -> None:
    assert run("--version").stdout.startswith(f"caffe version {__version__}")
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=2, snapshot=2)
    logs = [
        run("train", *flags, folder=tmp_path)
        for flags in (
            ["-solver", "solver.prototxt"],
            ["--solver=solver.prototxt"],
            ["-solver=solver.prototxt"],
        )
    ]
    assert [log.returncode for log in logs] == [0, 0, 0]
    tested = run(
        *("test", "--model=val.prototxt", "-weights=small_iter_2.caffemodel", "-iterations=2"),
        "-display_sparsity=true",
        folder=tmp_path,
    )
    assert tested.returncode == 0
    assert "Batch 1, accuracy = " in tested.stderr
    assert "Total Sparsity" in tested.stderr


@pytest.mark.caffe
def test_a_comma_in_the_name_of_a_weight_file(digits: Path, tmp_path: Path) -> None:
    """Caffe's list of weight files has commas; a file that exists under the whole name is one file."""
    SmallStage(tmp_path, digits).solver(max_iter=2, snapshot=2)
    assert run("train", "-solver", "solver.prototxt", folder=tmp_path).returncode == 0
    (tmp_path / "small_iter_2.caffemodel").rename(tmp_path / "a,b.caffemodel")
    arguments = ("test", "-model", "val.prototxt", "-iterations", "1", "-weights")
    assert run(*arguments, "a,b.caffemodel", folder=tmp_path).returncode == 0
    both = run(*arguments, "a,b.caffemodel,a,b.caffemodel", folder=tmp_path)
    assert both.returncode == 2
    assert " a: No such file" in both.stderr.splitlines()[-1]


@pytest.mark.caffe
def test_time_says_what_caffe_time_says(digits: Path, tmp_path: Path) -> None:
    SmallStage(tmp_path, digits)
    done = run("time", "-model", "train.prototxt", "-iterations", "3", folder=tmp_path)
    assert done.returncode == 0
    times = dict(re.findall(r"\]\s+(\S+)\tforward: (\S+) ms\.", done.stderr))
    assert {"conv1", "conv1/bn", "conv2", "pool", "fc", "loss"} <= {
        layer for layers in times for layer in layers.split("+")
    }
    total = re.search(r"Average Forward-Backward: (\S+) ms\.", done.stderr)
    forward = re.search(r"Average Forward pass: (\S+) ms\.", done.stderr)
    assert total and forward
    assert float(total[1]) > float(forward[1]) > 0.99 * sum(map(float, times.values())) > 0


@pytest.mark.caffe
def test_ranks_train_stop_and_fail_together(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100_000, snapshot=100_000, test_interval=100_000, display=1)
    log = tmp_path / "ranks.log"
    with log.open("w") as output:
        process = subprocess.Popen(RANKS, cwd=tmp_path, stderr=output, start_new_session=True)
    wait_until(lambda: "Iteration 3 " in log.read_text() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, log.read_text()[-2000:]
    said = log.read_text()
    assert said.count("Iteration 3 (") == 1  # one rank speaks
    assert "2 ranks" in said
    assert "Optimization stopped early." in said
    assert len(list(tmp_path.glob("small_iter_*.solverstate"))) == 1
    (tmp_path / "solver.prototxt").write_text("max_itr: 5\n")
    failed = subprocess.run(RANKS, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.count("max_itr") == 1
    assert len(failed.stderr.splitlines()) == 1, failed.stderr


@pytest.mark.caffe
def test_ranks_end_with_a_launcher_that_is_killed(digits: Path, tmp_path: Path) -> None:
    """They would keep training, unseen, beside the run when it is started again."""
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100_000, snapshot=100_000, test_interval=100_000, display=1)
    log = tmp_path / "ranks.log"
    with log.open("w") as output:
        process = subprocess.Popen(RANKS, cwd=tmp_path, stderr=output)
    wait_until(lambda: "Iteration 3 " in log.read_text() or process.poll() is not None)
    assert len(processes_in(tmp_path)) > 2, log.read_text()
    process.kill()
    process.wait()
    wait_until(lambda: not processes_in(tmp_path))


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("rank", "why"),
    [
        ("0", "only 1 of 2 ranks came to 127.0.0.1:"),
        ("1", "where the ranks meet, was not open within 2 s ($CAFFE_JACINTO_RENDEZVOUS_SECONDS): "),
    ],
)
def test_a_meeting_that_nobody_joins_is_one_line(digits: Path, tmp_path: Path, rank: str, why: str) -> None:
    SmallStage(tmp_path, digits).solver(max_iter=2, snapshot=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CAFFE_JACINTO_RENDEZVOUS_SECONDS": "2"}
    alone = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **meeting}
    done = run("train", "-solver", "solver.prototxt", folder=tmp_path, environment=alone)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert why in done.stderr


@pytest.mark.caffe
def test_a_killed_rank_ends_the_others_in_one_line(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100_000, snapshot=100_000, test_interval=100_000, display=1)
    log = tmp_path / "ranks.log"
    with log.open("w") as output:
        process = subprocess.Popen(RANKS, cwd=tmp_path, stderr=output)
    wait_until(lambda: "Iteration 3 " in log.read_text() or process.poll() is not None)
    os.kill(max(rank for rank in processes_in(tmp_path) if is_rank(rank)), signal.SIGKILL)
    assert process.wait(timeout=60) == 75, log.read_text()
    said = log.read_text()
    assert re.search(
        r"(?m)^caffe-torch: error: rank [01] was killed by SIGKILL; is there enough memory\?$", said
    )
    assert "Traceback" not in said
    assert not processes_in(tmp_path)


def is_rank(pid: int) -> bool:
    """Whether it is a rank, and not one of the processes that decode images for it."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    environments = (Path(f"/proc/{process}/environ").read_bytes() for process in (pid, parent))
    return [b"\0RANK=" in variables for variables in environments] == [True, False]


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.05)


def processes_in(folder: Path) -> list[int]:
    """The processes that work in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (entry / "cwd").samefile(folder):
                    found.append(int(entry.name))
    return found
