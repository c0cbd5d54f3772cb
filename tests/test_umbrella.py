"""One name for all commands: ``caffe-jacinto`` and ``python -m caffe_jacinto``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from caffe_jacinto import __main__ as umbrella
from caffe_jacinto import __version__

PACKAGE = Path(umbrella.__file__).parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "caffe_jacinto", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_it_lists_every_command_with_a_line(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for path in PACKAGE.glob("*.py"):
        is_command = "run_command(" in path.read_text() and path.name != "__main__.py"
        assert is_command == (path.stem in umbrella.COMMANDS)
        assert is_command == any(line.startswith(f"  {path.stem} ") for line in done.stdout.splitlines())


def test_the_version() -> None:
    assert run("--version").stdout == f"caffe-jacinto {__version__}\n"


@pytest.mark.parametrize("name", umbrella.COMMANDS)
def test_a_command_calls_itself_as_it_was_started(name: str) -> None:
    help_text = run(name, "--help").stdout
    assert help_text.startswith(f"usage: caffe-jacinto {name} ")
    alone = subprocess.run(
        [sys.executable, "-m", f"caffe_jacinto.{name}", "--help"], capture_output=True, text=True, check=True
    )
    assert alone.stdout.startswith(f"usage: python -m caffe_jacinto.{name} ")


def test_a_command_gets_its_arguments_and_gives_its_exit_code(tmp_path: Path) -> None:
    missing = run("weights", "show", str(tmp_path / "none"))
    assert missing.returncode == 2
    assert missing.stderr == f"caffe-jacinto weights: error: {tmp_path}/none: No such file or directory\n"
    missing = run("report", str(tmp_path / "none"))
    assert missing.stderr.startswith(f"caffe-jacinto report: error: {tmp_path}/none: ")
    assert run("weights", "show", "--help").stdout.startswith("usage: caffe-jacinto weights show ")
    assert run("build-net", "--summary", "--format", "csv").stdout.startswith("name,type,")


def test_an_unknown_command_is_one_line_with_the_nearest() -> None:
    done = run("repotr", "logs/")
    assert done.returncode == 2
    assert done.stderr.startswith("caffe-jacinto: error: repotr: not a command; did you mean report?")
    assert done.stderr.count("\n") == 1


def test_nothing_is_imported_before_a_command_is_named() -> None:
    """Beyond the standard library: it answers in a fraction of a second."""
    code = (
        "import runpy, sys; sys.argv = ['caffe-jacinto']\n"
        "try: runpy.run_module('caffe_jacinto', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    heavy = {"numpy", "cv2", "pydantic", "rich", "google", "matplotlib", "jinja2", "torch"}
    assert "caffe_jacinto" in found and not found & heavy
