"""Errors reach the user as one line and an exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from caffe_jacinto.common.dependencies import PACKAGES
from caffe_jacinto.common.errors import FAILED, INTERRUPTED, USER_ERROR, RunFailed, UserError, run_command

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def python_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A Python with the packages of this one but some: those whose folders or files begin with a name."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("python")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        packages = next(folder.glob("lib/python*/site-packages"))
        for item in Path(sysconfig.get_path("purelib")).iterdir():
            if not item.name.lower().startswith((name, "__editable__", "caffe_jacinto")):
                (packages / item.name).symlink_to(item)
        return folder / "bin" / "python"

    return make


COMMANDS = (
    "train",
    "build_net",
    "create_lmdb",
    "engines.pytorch",
    "engines.torch",
    "engines.pycaffe.stepper",
)


def test_a_python_without_a_package_is_told_how_to_get_it(python_without: Callable[[str], Path]) -> None:
    def said(python: Path, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [python, *arguments], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode in (FAILED, USER_ERROR)
        return done.stderr

    no_protobuf = python_without("google")
    for command in COMMANDS:
        line = said(no_protobuf, "-m", f"caffe_jacinto.{command}", "nothing")
        start = f"caffe_jacinto.{command}: error: {no_protobuf} has no package protobuf; "
        assert line.startswith(start) and line.count("\n") == 1
        assert "tools/utils/setup.sh" in line
    # Where a module is imported only when it is needed, and under the common name.
    assert "has no package protobuf; " in said(no_protobuf, "-m", "caffe_jacinto", "weights", "show", "w")
    no_pydantic = python_without("pydantic")
    assert "has no package pydantic; " in said(
        no_pydantic, "-m", "caffe_jacinto.train", "imagenet_jacintonet11"
    )
    # caffe-torch is the console script's module.
    no_torch = python_without("torch")
    line = said(no_torch, "-m", "caffe_jacinto.engines.pytorch", "test", "-model", "m", "-weights", "w")
    assert line.startswith(f"caffe-torch: error: {no_torch} has no PyTorch; install it: ")
    assert " -m pip install " in line and line.count("\n") == 1


def test_the_packages_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    needed = text[text.index("dependencies = [") : text.index("dynamic =")]
    assert set(re.findall(r'^    "([a-z0-9-]+)', needed, re.MULTILINE)) <= set(PACKAGES.values())


def test_other_import_errors_keep_their_traceback() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_command("x", lambda _: bool(import_module("caffe_jacinto.no_such_module")))


@pytest.mark.parametrize("words", [("-m", "caffe_jacinto.train"), ("-m", "caffe_jacinto", "train")])
def test_ctrl_c_at_any_moment_of_the_start_gives_no_traceback(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, *words, "--resume", str(tmp_path / "none")]
    begun = time.monotonic()
    subprocess.run(command, capture_output=True, check=False)
    seconds = time.monotonic() - begun
    for tenth in range(1, 10):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds * tenth / 10)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        # Before the package begins, Python itself starts, and reports a Ctrl-C as it likes.
        assert "Traceback" not in said or "/caffe_jacinto/" not in said, said
        codes = (-signal.SIGINT, INTERRUPTED, USER_ERROR)
        assert process.returncode in codes or "init_import_site" in said, said


IGNORED = """import os, signal, sys, time
from caffe_jacinto.common.errors import run_command

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def main(arguments):
    Held()
    time.sleep(30)
    return 0

signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(run_command("x", main))
"""


def test_ctrl_c_where_python_ignores_errors_is_not_lost() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", IGNORED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "x: interrupted\n")
    assert time.monotonic() - begun < 20


def test_ctrl_c_is_an_exception_while_a_command_works_and_stays_one_in_programs_that_import_it() -> None:
    script = "import signal, caffe_jacinto\n"
    script += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", script], check=True)
    seen = []

    def main(_arguments: object) -> int:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        seen.append("raised")
        return 0

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert run_command("x", main) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == ["raised"]


@pytest.mark.parametrize("error", [ValueError, ImportError])
def test_a_ctrl_c_that_a_library_turns_into_its_own_error_gives_no_traceback(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_arguments: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error("a model cannot be built") from None
        return 0

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert run_command("x", main) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == "x: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["caffe_jacinto.train", "demo_digits", "--ouput", "x"],
            "unrecognized arguments: --ouput x; did you mean --output?",
        ),
        (["caffe_jacinto.weights", "show", "x", "--formt=csv"], "--formt=csv; did you mean --format?"),
        (["caffe_jacinto.report", "logs", "--qqqqqq"], "unrecognized arguments: --qqqqqq; --help lists"),
    ],
)
def test_a_misspelt_option_is_named_with_the_nearest_one(arguments: list[str], says: str) -> None:
    module, *rest = arguments
    ran = subprocess.run([sys.executable, "-m", module, *rest], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert says in ran.stderr
