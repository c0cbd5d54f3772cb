"""The scripts that install: what they say where they may not, and what an interrupted one leaves."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from zipfile import ZipFile

import pytest

from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.discovery import prefix as default_prefix

ROOT = Path(__file__).resolve().parent.parent
UTILS = ROOT / "tools" / "utils"
SCRIPTS = sorted([*UTILS.glob("*.sh"), ROOT / ".ci" / "run"])
INSTALLERS = (
    "setup.sh",
    "install_caffe.sh",
    "test.sh",
    "demo.sh",
    "bench.sh",
    "faults.sh",
    "sparsity_table.sh",
)
BASE_SYSTEM = """
awk bash cat date df dirname env flock find grep id ls mkdir mktemp mv nproc rm rmdir sed sha256sum tail tr
uname xargs
"""


def run(
    *command: str | Path, env: dict[str, str] | None = None, user: int | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=env,
        user=user,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        start_new_session=True,  # no terminal to ask for a password on
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck and not os.environ.get("CI"):
        pytest.skip("shellcheck is not installed")
    assert shellcheck
    done = run(shellcheck, "-x", "--shell=bash", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", INSTALLERS)
def test_help_tells_the_usage_and_installs_nothing(name: str) -> None:
    done = run(UTILS / name, "--help")
    assert done.returncode == 0
    assert f"tools/utils/{name}" in done.stdout


@pytest.mark.parametrize("name", ["setup.sh", "install_caffe.sh", "test.sh"])
def test_an_unknown_argument_is_named(name: str) -> None:
    done = run(UTILS / name, "--jbos")
    assert done.returncode == 1
    assert "--help" in done.stderr


@pytest.fixture
def bare_machine() -> Iterator[Path]:
    """A copy of the scripts, and in `bin` the tools of a base system, without sudo and a package manager."""
    folder = Path(tempfile.mkdtemp(prefix="caffe_jacinto-"))
    folder.chmod(0o755)
    shutil.copytree(UTILS, folder / "tools" / "utils")
    (folder / "bin").mkdir()
    for name in BASE_SYSTEM.split():
        found = shutil.which(name)
        if found:
            (folder / "bin" / name).symlink_to(found)
    (folder / "home").mkdir(mode=0o777)
    yield folder
    shutil.rmtree(folder)


def environment(machine: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": str(machine / "bin"),
        "HOME": str(machine / "home"),
        "CAFFE_JACINTO_HOME": str(machine / "home"),
        **more,
    }


def add_program(machine: Path, name: str, text: str) -> None:
    program = machine / "bin" / name
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)


def not_root() -> int | None:
    """A user id without rights, or None for the own one, where that is not root's."""
    return 65534 if os.geteuid() == 0 else None


def test_where_it_may_not_install_all_that_is_missing_is_told_at_once(bare_machine: Path) -> None:
    # Stands for a new Debian: dpkg knows of no package, and there is no sudo.
    add_program(bare_machine, "dpkg-query", "exit 1")
    add_program(bare_machine, "apt-get", "echo apt-get was started >&2; exit 1")
    done = run(bare_machine / "tools/utils/setup.sh", env=environment(bare_machine), user=not_root())
    assert done.returncode == 1
    assert "apt-get install -y --no-install-recommends" in done.stderr
    for package in ("python3-venv", "cmake", "libboost-python-dev", "libopencv-dev"):
        assert package in done.stderr
    assert "was started" not in done.stderr
    assert not (bare_machine / ".venv").exists()


def test_a_system_without_apt_is_told_what_to_install(bare_machine: Path) -> None:
    done = run(bare_machine / "tools/utils/setup.sh", env=environment(bare_machine), user=not_root())
    assert done.returncode == 1
    assert "no apt-get" in done.stderr
    for package in ("cmake", "ninja-build", "protobuf-compiler"):
        assert package in done.stderr


def test_a_user_with_a_caffe_needs_no_packages_to_build_one(bare_machine: Path) -> None:
    # Stands for the user's own Caffe, of which only the answer to --version is asked.
    add_program(bare_machine, "caffe", "echo caffe version 1.0.0")
    add_program(bare_machine, "dpkg-query", "exit 1")
    add_program(bare_machine, "apt-get", "exit 1")
    done = run(bare_machine / "tools/utils/setup.sh", env=environment(bare_machine), user=not_root())
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert "cmake" not in done.stderr


def test_a_caffe_root_without_a_caffe_is_an_error(bare_machine: Path) -> None:
    done = run(bare_machine / "tools/utils/setup.sh", env=environment(bare_machine, CAFFE_ROOT="/nowhere"))
    assert done.returncode == 1
    assert "CAFFE_ROOT is /nowhere" in done.stderr


def test_a_virtual_environment_that_is_the_users_own_is_not_touched(bare_machine: Path) -> None:
    add_program(bare_machine, "caffe", "echo caffe version 1.0.0")
    add_program(bare_machine, "dpkg-query", 'for package in "$@"; do echo "$package installed"; done')
    (bare_machine / ".venv").mkdir()
    (bare_machine / ".venv" / "pyvenv.cfg").write_text("mine\n")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, bare_machine / name)
    done = run(bare_machine / "tools/utils/setup.sh", env=environment(bare_machine))
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (bare_machine / ".venv" / "pyvenv.cfg").read_text() == "mine\n"


def test_a_folder_that_is_not_an_install_is_not_trusted_nor_removed(tmp_path: Path) -> None:
    prefix = tmp_path / "caffe"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "caffe").write_text("#!/bin/bash\necho caffe version 1.0.0\n")
    (prefix / "bin" / "caffe").chmod(0o755)
    done = run(UTILS / "install_caffe.sh", "--prefix", prefix, "--python", sys.executable)
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (prefix / "bin" / "caffe").exists()


class Install:
    """install_caffe.sh at work, in a process group of its own."""

    def __init__(self, prefix: Path) -> None:
        self.output = prefix.parent / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [
                    str(UTILS / "install_caffe.sh"),
                    "--prefix",
                    str(prefix),
                    "--python",
                    sys.executable,
                    "--jobs",
                    "1",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_until_it_says(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < end, f"no '{text}' in:\n{self.output.read_text()}"
            time.sleep(0.05)

    def stop(self, sent: signal.Signals) -> None:
        """Signal the script alone, as `kill` does; its children are its own affair."""
        self.process.send_signal(sent)
        self.process.wait(timeout=20)


def left_over(base: Path) -> list[Path]:
    return sorted(base.glob(".caffe-install.tmp-*"))


@pytest.mark.caffe
def test_an_interrupted_install_leaves_nothing_that_is_trusted(caffe_engine: Engine, tmp_path: Path) -> None:
    prefix = tmp_path / "caffe"
    for moment in ("fetching", "configuring", "compiling"):
        install = Install(prefix)
        install.wait_until_it_says(moment)
        install.stop(signal.SIGKILL)
        assert not prefix.exists(), f"killed while {moment}"
    abandoned = left_over(tmp_path)
    assert abandoned

    install = Install(prefix)
    install.wait_until_it_says("compiling")
    assert not set(abandoned) & set(left_over(tmp_path)), (
        "what killed installs left is removed by the next one"
    )
    install.stop(signal.SIGTERM)
    assert install.process.returncode == 128 + signal.SIGTERM
    assert not prefix.exists()
    assert not set(left_over(tmp_path)), "a terminated install cleans up"


@pytest.fixture(scope="module")
def installed(caffe_engine: Engine) -> Path:
    prefix = default_prefix()
    if not (prefix / "installed.txt").exists():
        pytest.skip(f"Caffe is not in {prefix}: the user's own is used")
    return prefix


@pytest.mark.caffe
def test_a_second_installer_waits_for_the_first_and_finds_its_caffe(installed: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "caffe"
    with (tmp_path / ".caffe-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = Install(prefix)
        second.wait_until_it_says("waiting for it")
        shutil.copytree(installed, tmp_path / "new", symlinks=True)
        (tmp_path / "new").rename(prefix)
    assert second.process.wait(timeout=10) == 0
    assert f"Caffe is already installed: {prefix}/bin/caffe" in second.output.read_text()


@pytest.mark.caffe
def test_a_second_run_finds_caffe_and_does_nothing_else(installed: Path) -> None:
    before = changed_at(installed.parent, "caffe*")
    done = run(UTILS / "install_caffe.sh", "--python", sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"Caffe is already installed: {installed}/bin/caffe\n",
        "",
    )
    assert changed_at(installed.parent, "caffe*") == before


@pytest.mark.caffe
def test_a_caffe_of_an_earlier_build_is_built_again(installed: Path, tmp_path: Path) -> None:
    """Until the new one is complete, the earlier one stays."""
    prefix = tmp_path / "caffe"
    shutil.copytree(installed, prefix, symlinks=True)
    note = prefix / "installed.txt"
    note.write_text(re.sub(r"build \d+\n", "", note.read_text()))  # The first build did not write its number.
    install = Install(prefix)
    install.wait_until_it_says("compiling")
    install.stop(signal.SIGTERM)
    said = install.output.read_text()
    assert f"The Caffe in {prefix} cannot read weight files of 512 MiB and more. It is built again" in said
    assert "fetching the source package from the Caffe that is replaced" in said
    assert "caffe version" in run(prefix / "bin/caffe", "--version").stdout


def test_folders_exchange_their_names(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    call = f'. "{UTILS}/steps.sh"; exchange "$1" "{tmp_path}/new" "{tmp_path}/old"'
    # By renameat2, and, without a Python, by renaming one after the other.
    for python, found in ((sys.executable, "new"), ("/bin/false", "old")):
        assert run("bash", "-euc", call, "bash", python).returncode == 0
        assert (tmp_path / "old" / "is").read_text() == found
        assert sorted(item.name for item in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.caffe
@pytest.mark.parametrize("arguments", [(), ("--torch",)], ids=["plain", "torch"])
def test_a_second_set_up_installs_nothing(caffe_engine: Engine, arguments: tuple[str, ...]) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("these tests run in a Python that setup.sh did not make")
    if arguments and not find_spec("torch"):
        pytest.skip("setup.sh was not told to install PyTorch here")
    assert run(UTILS / "setup.sh", *arguments).returncode == 0
    before = changed_at(ROOT / ".venv", "*")
    done = run(UTILS / "setup.sh", *arguments)
    assert done.returncode == 0, done.stderr
    only_line = rf"Setup is complete \(.+\)\. Caffe: {re.escape(str(caffe_engine.info.executable))}\n"
    assert re.fullmatch(only_line, done.stdout)
    assert changed_at(ROOT / ".venv", "*") == before


def changed_at(folder: Path, names: str) -> dict[Path, int]:
    """When the files and folders of these names in ``folder`` were last changed."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(names)}


# --- a machine with GPUs

STAND_IN_TORCH = '''"""Stands for a build of PyTorch, which is several GB: says what it is for and sees."""

class version:
    cuda, hip = {cuda!r}, {hip!r}

class cuda:
    is_available = staticmethod(lambda: {sees} > 0)
    device_count = staticmethod(lambda: {sees})
    get_device_name = staticmethod(lambda number: "NVIDIA H200")
'''


def write_torch(folder: Path, version: str, *, cuda: str | None = None, sees: int = 0) -> None:
    """A package torch in ``folder``, as an installer leaves it or a wheel holds it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(STAND_IN_TORCH.format(cuda=cuda, hip=None, sees=sees))
    facts = folder / f"torch-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (facts / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (facts / "RECORD").write_text("")


@pytest.fixture
def checkout(bare_machine: Path) -> Path:
    """A machine with this project, a Caffe, two GPUs, and a .venv that lacks only PyTorch."""
    shutil.copytree(ROOT / "caffe_jacinto", bare_machine / "caffe_jacinto")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, bare_machine / name)
    (bare_machine / "bin/sync").symlink_to(shutil.which("sync") or "/bin/sync")
    add_program(bare_machine, "caffe", "echo caffe version 1.0.0")
    add_program(bare_machine, "dpkg-query", 'for package in "${@:3}"; do echo "$package installed"; done')
    two = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)"
    answers = f"-L) echo '{two}' ;; --query*) echo 9.0 && echo 9.0 ;; *) echo 'CUDA Version: 12.4' ;;"
    add_program(bare_machine, "nvidia-smi", f'case "$1" in {answers} esac')
    return bare_machine


def make_venv(checkout: Path, *options: str) -> None:
    """The .venv as setup.sh leaves it, without the packages."""
    done = run("/usr/bin/python3", "-m", "venv", *options, checkout / ".venv")
    assert done.returncode == 0, done.stderr
    (checkout / ".venv/.made-by-setup").touch()
    version = run("/usr/bin/python3", "--version").stdout.strip()
    sums = subprocess.run(
        ["sha256sum", "setup.py", "pyproject.toml"], cwd=checkout, capture_output=True, text=True, check=True
    )
    (checkout / ".venv/installed.txt").write_text(f"{checkout} pycaffe,demo,dev {version}\n{sums.stdout}")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Not in the tests' output."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A server with an index of PyTorch's builds, each of which holds a stand-in."""
    for tag, cuda in (("cpu", None), ("cu126", "12.6"), ("cu130", "13.0")):
        version = f"2.13.0+{tag}"
        write_torch(tmp_path / tag, version, cuda=cuda, sees=2 if cuda else 0)
        wheels = tmp_path / "whl" / tag / "torch"
        wheels.mkdir(parents=True)
        with ZipFile(wheels / f"torch-{version}-py3-none-any.whl", "w") as wheel:
            for file in sorted((tmp_path / tag).rglob("*")):
                if file.is_file():
                    wheel.write(file, file.relative_to(tmp_path / tag))
    (tmp_path / "empty").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def set_up(checkout: Path, index: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """setup.sh with the index's PyTorch alone: pip is real, and sees no other index."""
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{index}/empty", "PIP_FIND_LINKS": ""}
    wheels = {"PYTORCH_INDEX": f"{index}/whl"}
    return run(
        checkout / "tools/utils/setup.sh", *arguments, env=environment(checkout, **pip, **wheels, **more)
    )


@pytest.mark.caffe
def test_for_pytorch_alone_no_caffe_is_built_nor_are_its_packages_installed(
    checkout: Path, index: str
) -> None:
    make_venv(checkout)
    (checkout / "bin/caffe").unlink()
    only_python = 'case "$package" in *python3 | *python3-venv | ca-*) echo "$package installed" ;; esac'
    add_program(checkout, "dpkg-query", f'for package in "${{@:3}}"; do {only_python}; done')
    done = set_up(checkout, index, "--torch", "--no-caffe")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "System packages" not in done.stdout
    assert list(checkout.glob(".venv/lib/python3*/site-packages/torch-2.13.0+*.dist-info"))
    assert done.stdout.splitlines()[-1].endswith("Caffe: none (--no-caffe)")


@pytest.mark.caffe
def test_on_a_machine_with_gpus_the_pytorch_for_them_is_installed(checkout: Path, index: str) -> None:
    make_venv(checkout)
    done = set_up(checkout, index)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPU 1: NVIDIA H200\n" in done.stdout
    assert "2 NVIDIA GPUs (NVIDIA H200), driver for CUDA 12.4: PyTorch 2.13.0 for CUDA 12.6" in done.stdout
    assert "PyTorch 2.13.0+cu126 sees 2 GPUs (NVIDIA H200)" in done.stdout
    assert list(checkout.glob(".venv/lib/python3*/site-packages/torch-2.13.0+cu126.dist-info"))
    again = set_up(checkout, "http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert "is kept: PyTorch 2.13.0+cu126 sees 2 GPUs (NVIDIA H200)" in again.stdout


@pytest.mark.caffe
def test_a_pytorch_for_the_cpu_is_kept_on_a_machine_with_gpus_with_a_word(checkout: Path, index: str) -> None:
    make_venv(checkout, "--without-pip")
    (site,) = checkout.glob(".venv/lib/python3*/site-packages")
    write_torch(site, "2.12.0+cpu")
    (site / "torch-2.12.0+cpu.dist-info/RECORD").write_text("\n")
    done = set_up(checkout, index)
    assert done.returncode == 0, done.stderr
    assert "PyTorch 2.12.0+cpu is built for the CPU only, and this machine has 2 NVIDIA GPUs" in done.stdout
    assert "to replace it: " in done.stdout
    assert f"torch==2.13.0+cu126 --extra-index-url {index}/whl/cu126" in done.stdout


@pytest.mark.caffe
def test_what_only_pytorchs_index_has_is_said_before_pip_is_started(checkout: Path) -> None:
    make_venv(checkout, "--without-pip")
    done = set_up(checkout, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "http://127.0.0.1:9/whl/cu126 cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(checkout.glob(".venv/lib/python3*/site-packages/torch*"))
    assert set_up(checkout, "http://127.0.0.1:9", "--no-torch").returncode == 0


@pytest.mark.caffe
def test_a_containers_pytorch_is_kept_without_a_network(checkout: Path, tmp_path: Path) -> None:
    # Stands for an image whose own `python3`, not the distribution's, has PyTorch, and for what a virtual
    # environment of that Python sees of it.
    write_torch(tmp_path / "image", "2.11.0+cu130", cuda="13.0", sees=2)
    add_program(checkout, "python3", f'PYTHONPATH="{tmp_path}/image" exec /usr/bin/python3 "$@"')
    make_venv(checkout, "--without-pip", "--system-site-packages")
    (site,) = checkout.glob(".venv/lib/python3*/site-packages")
    (site / "image.pth").write_text(f"{tmp_path}/image\n")
    done = set_up(checkout, "http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"PyTorch of {checkout}/bin/python3 is kept: PyTorch 2.11.0+cu130 sees 2 GPUs" in done.stdout
    assert not list(site.glob("torch*"))
    assert "Caffe: " in done.stdout


@pytest.mark.caffe
def test_the_pytorch_of_another_virtual_environment_is_not_taken(checkout: Path, tmp_path: Path) -> None:
    done = run("/usr/bin/python3", "-m", "venv", "--without-pip", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    (site,) = (tmp_path / "other").glob("lib/python3*/site-packages")
    write_torch(site, "2.13.0+cu130", cuda="13.0", sees=2)
    make_venv(checkout, "--without-pip")
    done = set_up(checkout, "http://127.0.0.1:9", PATH=f"{tmp_path}/other/bin:{checkout}/bin")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "is kept" not in done.stdout
