"""Find a Caffe and identify it: the only place that looks for one.

The kind of an executable, and whether it can use a GPU, are read from the bytes of the program and its
library. Only its version, and whether this Python imports its pycaffe, are found by running them.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine, EngineInfo, EngineKind, Precision
from caffe_jacinto.engines.fork.engine import CaffeJacintoEngine
from caffe_jacinto.engines.pycaffe.engine import BvlcEngine
from caffe_jacinto.engines.pytorch.engine import TorchEngine, describe_torch, has_torch
from caffe_jacinto.prototxt.dialects import Dialect


def check_gpus(info: EngineInfo, gpus: tuple[int, ...]) -> None:
    """Refuse GPUs that do not exist or that this Caffe cannot use; no GPU means the CPU.

    Raises:
        UserError: the message names the problem and what to do.
    """
    if not gpus:
        if info.kind == "caffe-jacinto":
            raise UserError(
                f"{info.executable} is caffe-jacinto, which trains on GPUs only: name them, e.g. --gpus 0"
            )
        return
    asked = ",".join(map(str, gpus))
    if not info.gpu:
        what, other = (
            (f"PyTorch {info.version}", "install a PyTorch for them")
            if info.kind == "torch"
            else (str(info.executable), "name a Caffe built with CUDA by --caffe")
        )
        raise UserError(
            f"GPUs {asked} were requested, but {what} is built for the CPU only: "
            f"leave the GPUs out, or {other}"
        )
    if len(gpus) > 1 and not info.multi_gpu:
        raise UserError(
            f"GPUs {asked} were requested, but {info.executable} is built without NCCL, for one GPU only: "
            "name one, or rebuild it with USE_NCCL"
        )
    there = visible_gpus()
    missing = [gpu for gpu in gpus if gpu not in range(there)]
    if missing:
        has = f"GPUs 0 to {there - 1}" if there > 1 else "GPU 0 only" if there else "no NVIDIA GPU"
        raise UserError(
            f"GPUs {asked} were requested, but {', '.join(map(str, missing))} does not exist: "
            f"this machine has {has}"
        )


def visible_gpus() -> int:
    """How many NVIDIA GPUs a CUDA program started here would see; it numbers them from 0."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA takes the list up to the first entry that is not a device.
        named = [entry.strip() for entry in chosen.split(",")]
        bad = next((i for i, entry in enumerate(named) if entry in ("", "-1")), len(named))
        return min(bad, _gpus_of_machine())
    return _gpus_of_machine()


def _gpus_of_machine() -> int:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.SubprocessError):
        pass
    driver = Path("/proc/driver/nvidia/gpus")
    if driver.is_dir():
        return len(list(driver.iterdir()))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


IN_A_ROOT = ("build/tools/caffe", "build/tools/caffe.bin", "bin/caffe")
"""Where a Caffe tree has its executable: CMake's and make's build folder, an installation."""

INSTALL = "tools/utils/install_caffe.sh"
ASK_TIMEOUT = 60
"""Seconds to wait for an executable or a Python to report what it is."""

# Bytes that identify a build. The serialized schema in every Caffe has the names of its fields.
ANY_CAFFE = b"snapshot_prefix"
ONLY_CAFFE_JACINTO = b"sparsity_target"
ONLY_NVCAFFE = b"default_forward_type"
CPU_ONLY = b"Cannot use GPU in CPU-only Caffe"
NO_NCCL = b"rebuild with USE_NCCL"


def find_engine(
    caffe: str | None = None,
    force: str | None = None,
    dialect: Dialect | None = None,
    precision: Precision | None = None,
) -> Engine:
    """The Caffe to use: ``caffe`` (an executable or a tree), else $CAFFE_ROOT, else PATH, else the prefix.

    If none is named and none is found, PyTorch is used, if this Python has it. ``force`` is the kind that it
    has to be: ``bvlc``, ``caffe-jacinto`` or ``torch``. ``dialect`` and ``precision`` (default: fp32) are for
    PyTorch.

    Raises:
        UserError: there is none, it does not start, or it is not of the kind forced.
    """
    if force == "torch":
        if caffe is not None:
            raise UserError("--engine torch needs no Caffe: leave --caffe out")
        return TorchEngine(describe_torch(dialect or Dialect.BVLC, precision or "fp32"))
    try:
        executable, where = _executable(caffe)
    except NoCaffeError:
        if force is not None or not has_torch():
            raise
        chosen = "no Caffe was found, so PyTorch trains (docs/torch.md); --caffe PATH names a Caffe"
        return TorchEngine(
            replace(describe_torch(dialect or Dialect.BVLC, precision or "fp32"), notes=(chosen,))
        )
    info = describe(executable)
    if force is not None and force != info.kind:
        raise UserError(
            f"--engine {force}: the Caffe from {where}, {executable}, is {_KIND_NAMES[info.kind]}; "
            f"give the path of another with --caffe, or leave --engine out"
        )
    if dialect is not None and dialect is not info.dialect:
        raise UserError(
            f"--dialect {dialect.value}: {executable} is {_KIND_NAMES[info.kind]}, which reads "
            f"{info.dialect.value} files; leave it out, or use --engine torch, which reads both"
        )
    if precision == "bf16":
        raise UserError(
            f"--precision bf16: {executable} is {_KIND_NAMES[info.kind]}, which computes in fp32; "
            "leave it out, or use --engine torch"
        )
    return BvlcEngine(info) if info.kind == "bvlc" else CaffeJacintoEngine(info)


class NoCaffeError(UserError):
    """None is named, and none is found in the usual places."""


_KIND_NAMES: dict[EngineKind, str] = {
    "bvlc": "stock Caffe (bvlc)",
    "caffe-jacinto": "caffe-jacinto",
    "torch": "PyTorch",
}


def prefix() -> Path:
    """Where `install_caffe.sh` puts Caffe for this Python, outside the checkout, shared by all checkouts."""
    home = os.environ.get("CAFFE_JACINTO_HOME")
    if not home:
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
        home = str(Path(data) / "caffe_jacinto")
    return Path(home) / f"caffe-1.0-cpu-py{sys.version_info.major}.{sys.version_info.minor}"


def _executable(caffe: str | None) -> tuple[Path, str]:
    """The executable to use, and where it was named."""
    for named, where in ((caffe, "--caffe"), (os.environ.get("CAFFE_ROOT"), "$CAFFE_ROOT")):
        if named:
            return _in(Path(named).expanduser(), where), where
    on_path = shutil.which("caffe")
    if on_path and _is_caffe(Path(on_path)):
        return Path(on_path), "PATH"
    installed = prefix() / "bin/caffe"
    if _runs(installed):
        return installed, "its prefix"
    raise NoCaffeError(
        f"no Caffe found (--caffe, $CAFFE_ROOT, PATH, {installed}): install stock Caffe with {INSTALL}, "
        "name one with --caffe PATH, or train without one: pip install 'caffe-jacinto[torch]'"
    )


def _in(path: Path, where: str) -> Path:
    """The executable that ``path``, an executable or a tree, means."""
    if path.is_file():
        if not _runs(path):
            raise UserError(f"{where}: {path} is not executable; name the caffe executable or its tree")
        return path
    if not path.exists():
        raise UserError(
            f"{where}: {path} does not exist; name the caffe executable or the tree it was built in"
        )
    for inside in IN_A_ROOT:
        if _runs(path / inside):
            return path / inside
    raise UserError(f"{where}: no Caffe in {path} (looked for {', '.join(IN_A_ROOT)}); build it there first")


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def describe(executable: Path) -> EngineInfo:
    """What the Caffe at ``executable`` is.

    Raises:
        UserError: it is not a Caffe, or not one that an engine here drives, or it does not start.
    """
    executable = executable.absolute()
    files = (executable, *_libraries(executable))

    def has(mark: bytes) -> bool:
        return any(_file_has(file, mark) for file in files)

    if not has(ANY_CAFFE):
        raise UserError(
            f"{executable} is not a Caffe: neither it nor its library knows a solver's snapshot_prefix; "
            "name a caffe executable or its tree"
        )
    if not has(ONLY_CAFFE_JACINTO) and has(ONLY_NVCAFFE):
        raise UserError(
            f"{executable} is NVCaffe, which counts a batch as caffe-jacinto does but cannot sparsify; "
            "name a stock Caffe or a caffe-jacinto with --caffe"
        )
    kind: EngineKind = "caffe-jacinto" if has(ONLY_CAFFE_JACINTO) else "bvlc"
    gpu = not has(CPU_ONLY)
    notes = []
    pycaffe, trouble = _pycaffe(executable) if kind == "bvlc" else (None, None)
    if trouble:
        notes.append(trouble)
    return EngineInfo(
        kind=kind,
        executable=executable,
        version=_version(executable),
        dialect=Dialect.BVLC if kind == "bvlc" else Dialect.CAFFE_JACINTO,
        gpu=gpu,
        multi_gpu=gpu and not has(NO_NCCL),
        begins_data_again=kind == "bvlc",
        own_rule=kind == "bvlc",
        pycaffe=pycaffe,
        notes=tuple(notes),
    )


def _is_caffe(executable: Path) -> bool:
    return any(_file_has(file, ANY_CAFFE) for file in (executable, *_libraries(executable)))


def _file_has(path: Path, mark: bytes) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(mark) >= 0
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False


def _libraries(executable: Path) -> Iterator[Path]:
    """The libcaffe that the loader would take, or else (for a script) those in the lib folder beside it."""
    try:
        listed = _ask("ldd", executable).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    linked = re.findall(r"^\s*libcaffe\S*\s+=>\s+(/.+?)\s+\(0x", listed, re.MULTILINE)
    if linked:
        yield from map(Path, linked)
        return
    for folder in dict.fromkeys((executable.parent, executable.resolve().parent)):
        yield from folder.glob("../lib*/libcaffe*.so*")


def _ask(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that has ended, with its output.

    Raises:
        OSError, subprocess.SubprocessError: it does not start, or does not end in time.
    """
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=ASK_TIMEOUT,
        check=False,
    )


def _version(executable: Path) -> str | None:
    """What ``caffe --version`` says.

    Raises:
        UserError: it does not start; the message is its own.
    """
    try:
        said = _ask(executable, "--version")
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{executable} does not start: {error}") from error
    text = said.stdout + said.stderr
    found = re.search(r"version\s+(\d[\w.+-]*)", text)
    if found is None and said.returncode != 0:
        lines = text.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {said.returncode}"
        raise UserError(f"{executable} does not start: {reason}")
    return found[1] if found else None


def _pycaffe(executable: Path) -> tuple[Path | None, str | None]:
    """The folder that ``import caffe`` works from, or None and why."""
    trouble = None
    for folder in _pycaffe_folders(executable):
        reason = _import_trouble(folder)
        if reason is None:
            return folder, None
        trouble = f"pycaffe in {folder} cannot be imported by {sys.executable}: {reason}"
    return None, trouble or f"no pycaffe beside {executable}: it trains and tests, but cannot sparsify"


def _pycaffe_folders(executable: Path) -> Iterator[Path]:
    """Folders with pycaffe above the executable, as named and behind links: ``python/``, or as installed."""
    seen = set()
    for start in (executable, executable.resolve()):
        for root in list(start.parents)[1:4]:
            for inside in ("python", "lib/python3/dist-packages"):
                folder = root / inside
                if folder not in seen and list(folder.glob("caffe/_caffe*.so")):
                    seen.add(folder)
                    yield folder


def _import_trouble(folder: Path) -> str | None:
    """Why this Python does not import pycaffe from ``folder``, in one line; None if it does."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import caffe; caffe.SGDSolver"
    try:
        tried = _ask(sys.executable, "-c", code, folder)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {tried.returncode}"
