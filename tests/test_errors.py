"""Errors reach the user as one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from caffe_jacinto.common.errors import FAILED, INTERRUPTED, USER_ERROR, RunFailed, UserError, run_command

BUILD_NET = [sys.executable, "-m", "caffe_jacinto.build_net", "--output"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a\nb\x1b \udcff ü: mend it"), USER_ERROR, "x: error: a\\nb\\x1b \\udcff ü: mend it\n"),
        (RunFailed("no"), FAILED, "x: error: no\n"),
        (KeyboardInterrupt(), INTERRUPTED, "x: interrupted\n"),
    ],
)
def test_an_error_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_arguments: object) -> int:
        raise error

    assert run_command("x", main) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path, unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*BUILD_NET, tmp_path], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        FAILED,
        "caffe_jacinto.build_net: error: [Errno 28] No space left on device\n",
    )


def test_a_terminal_that_cannot_show_a_path_does_not_end_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    folder = tmp_path / "bücher"
    done = subprocess.run([*BUILD_NET, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "b\\xfccher" in done.stdout


def test_a_closed_stdout_is_no_error(tmp_path: Path) -> None:
    arguments = [*BUILD_NET, str(tmp_path)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *arguments], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["build_net", "train", "report", "classify", "weights", "create_lmdb"])
def test_every_command_says_how_it_is_used(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A stray % in a help text is an error only when it is shown."""
    with pytest.raises(SystemExit) as ended:
        import_module(f"caffe_jacinto.{command}").main(["--help"])
    assert ended.value.code == 0
    assert f"python -m caffe_jacinto.{command}" in capsys.readouterr().out
