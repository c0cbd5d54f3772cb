"""Choose the engine: find a Caffe and identify it, ask what PyTorch is, and compare both with the GPUs.

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
from dataclasses import dataclass, replace
from pathlib import Path

from caffe_jacinto.common.arguments import GpuRequest
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import expanded
from caffe_jacinto.engines.contract import Engine, EngineInfo, EngineKind, Precision
from caffe_jacinto.engines.fork.engine import CaffeJacintoEngine
from caffe_jacinto.engines.gpus import any_visible, driver_cuda, lack, requested_gpus, visible_gpus
from caffe_jacinto.engines.pycaffe.engine import BvlcEngine
from caffe_jacinto.engines.pytorch.builds import pip_command
from caffe_jacinto.engines.pytorch.engine import TorchEngine, describe_torch, has_torch, refused_gpus
from caffe_jacinto.prototxt.dialects import Dialect


def check_gpus(info: EngineInfo, gpus: tuple[int, ...], *, here: bool = True) -> None:
    """Refuse GPUs that do not exist or that this engine cannot use; no GPU means the CPU.

    ``here``: they are this machine's.

    Raises:
        UserError: the message names the problem and what to do.
    """
    if not gpus:
        if info.kind == "caffe-jacinto":
            raise UserError(
                f"{info.executable} is caffe-jacinto, which trains on GPUs only: name them, e.g. --gpus 0"
            )
        return
    asked = f"GPU{'s' if len(gpus) > 1 else ''} {','.join(map(str, gpus))} requested, but"
    if not here:
        if not info.gpu:
            raise UserError(f"{asked} {_name(info)} is built for the CPU only")
        return
    if not any_visible():
        raise UserError(f"{asked} {lack()}: leave the GPUs out")
    misfit = _misfit(info, len(gpus))
    if misfit:
        raise UserError(f"{asked} {misfit}: leave the GPUs out, or {_instead(info)}")
    there = len(visible_gpus(info.maker))
    missing = [gpu for gpu in gpus if gpu not in range(there)]
    if missing:
        has = f"GPUs 0 to {there - 1}" if there > 1 else "GPU 0 only"
        raise UserError(
            f"{asked} {', '.join(map(str, missing))} does not exist: this machine has {has}; "
            "--gpus all takes all that there are"
        )
    refused = refused_gpus(gpus) if info.kind == "torch" else None
    if refused:
        raise UserError(f"{asked} PyTorch {info.version} cannot use them: {refused}")


def _misfit(info: EngineInfo, count: int) -> str | None:
    """Why this engine cannot use ``count`` GPUs of this machine, whichever they are; None if it can."""
    name = _name(info)
    if not info.gpu:
        return f"{name} is built for the CPU only"
    if not visible_gpus(info.maker):
        return f"{name} is built for {info.maker} GPUs, and {lack(info.maker)}"
    driver = driver_cuda()
    if info.cuda and driver and driver[0] < info.cuda[0]:
        needed, given = (".".join(map(str, version)) for version in (info.cuda, driver))
        return f"{name} is built for CUDA {needed}, and NVIDIA's driver here is for {given}"
    if count > 1 and not info.multi_gpu:
        return f"{name} is built without NCCL, for one GPU only"
    return None


def _name(info: EngineInfo) -> str:
    return f"PyTorch {info.version}" if info.kind == "torch" else str(info.executable)


def _instead(info: EngineInfo) -> str:
    """What to do where an engine cannot use the GPUs that are there."""
    if info.gpu and not info.multi_gpu:
        return "name one, or rebuild it with USE_NCCL"
    pytorch = f"install PyTorch for them: {pip_command()}"
    if info.kind == "torch":
        return pytorch
    usable = has_torch() and _misfit(describe_torch(info.dialect), 1) is None
    return f"{'train with --engine torch' if usable else pytorch}; or name a Caffe built with CUDA by --caffe"


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
    gpus: GpuRequest = (),
) -> Engine:
    """The engine that is named, or else the first of the order in docs/caffe.md; its `reason` says why.

    ``caffe`` (an executable or a tree) and $CAFFE_ROOT name a Caffe, ``force`` a kind (``bvlc``,
    ``caffe-jacinto``, ``torch``). Where ``gpus`` are requested and there, those that can use them come first:
    caffe-jacinto, stock Caffe, PyTorch. Otherwise it is the Caffe on PATH, that of the prefix, or PyTorch.
    ``dialect`` and ``precision`` (default: fp32) are for PyTorch.

    Raises:
        UserError: there is none, it does not start, or it is not what ``force``, ``dialect`` and
            ``precision`` require.
    """
    required = _Required(force, dialect, precision)
    if force == "torch":
        if caffe is not None:
            raise UserError("--engine torch needs no Caffe: leave --caffe out")
        return required.pytorch("named by --engine")
    named = _named(caffe)
    if named is not None:
        executable, where = named
        return required.caffe(describe(executable), where, f"named by {where}")
    chosen = _for_gpus(gpus, required) if gpus and any_visible() else None
    return chosen or _installed_engine(required)


@dataclass(frozen=True)
class _Required:
    """What the command line requires of an engine."""

    force: str | None
    dialect: Dialect | None
    precision: Precision | None

    def pytorch(self, reason: str) -> Engine:
        """The engine on PyTorch, with its `reason`."""
        return TorchEngine(replace(self.describe_pytorch(), reason=reason))

    def describe_pytorch(self) -> EngineInfo:
        return describe_torch(self.dialect or Dialect.BVLC, self.precision or "fp32")

    def caffe(self, info: EngineInfo, where: str, reason: str) -> Engine:
        """The engine of a Caffe that was found at ``where``, with its `reason`.

        Raises:
            UserError: it is not what is required.
        """
        if self.force is not None and self.force != info.kind:
            raise UserError(
                f"--engine {self.force}: the Caffe from {where}, {info.executable}, is "
                f"{_KIND_NAMES[info.kind]}; give the path of another with --caffe, or leave --engine out"
            )
        if self.dialect is not None and self.dialect is not info.dialect:
            raise UserError(
                f"--dialect {self.dialect.value}: {info.executable} is {_KIND_NAMES[info.kind]}, which reads "
                f"{info.dialect.value} files; leave it out, or use --engine torch, which reads both"
            )
        if self.precision not in (None, "fp32"):
            raise UserError(
                f"--precision {self.precision}: {info.executable} is {_KIND_NAMES[info.kind]}, which computes"
                " in fp32; leave it out, or use --engine torch"
            )
        info = replace(info, reason=reason)
        return BvlcEngine(info) if info.kind == "bvlc" else CaffeJacintoEngine(info)


def _for_gpus(request: GpuRequest, required: _Required) -> Engine | None:
    """The first engine that can use the GPUs: caffe-jacinto, stock Caffe, PyTorch; None if none can."""
    count = len(requested_gpus(request, None))
    found, misfits = [], []
    for executable, where in _installed():
        try:
            info = describe(executable)
            engine = required.caffe(info, where, f"from {where}, and it can use the GPUs")
        except UserError as error:
            misfits.append(str(error))
            continue
        misfit = _misfit(info, count)
        if misfit:
            misfits.append(misfit)
        else:
            found.append(engine)
    found.sort(key=lambda engine: engine.info.kind != "caffe-jacinto")
    if found:
        return found[0]
    if required.force is None and has_torch() and _misfit(required.describe_pytorch(), count) is None:
        why = "; ".join(misfits) or "no Caffe was found"
        return required.pytorch(f"{why}, and PyTorch can use the GPUs")
    return None


def _installed_engine(required: _Required) -> Engine:
    """The Caffe that is installed, of the kind required; without any, PyTorch."""
    installed = list(_installed())
    if not installed:
        if required.force is not None or not has_torch():
            raise UserError(
                f"no Caffe found (--caffe, $CAFFE_ROOT, PATH, {prefix() / 'bin/caffe'}): install stock Caffe "
                f"with {INSTALL}, name one with --caffe PATH, or train without one: "
                "pip install 'caffe-jacinto[torch]'"
            )
        return required.pytorch("no Caffe was found; --caffe PATH names one")
    described = [
        (describe(executable), where) for executable, where in installed[: 2 if required.force else 1]
    ]
    info, where = next((pair for pair in described if pair[0].kind == required.force), described[0])
    return required.caffe(info, where, f"from {where}")


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


def _named(caffe: str | None) -> tuple[Path, str] | None:
    """The executable that is named, and where."""
    for name, where in ((caffe, "--caffe"), (os.environ.get("CAFFE_ROOT"), "$CAFFE_ROOT")):
        if name:
            return _in(expanded(name), where), where
    return None


def _installed() -> Iterator[tuple[Path, str]]:
    """The executables in the usual places, and the places."""
    on_path = shutil.which("caffe")
    if on_path and _is_caffe(Path(on_path)):
        yield Path(on_path), "PATH"
    in_prefix = prefix() / "bin/caffe"
    if _runs(in_prefix):
        yield in_prefix, "install_caffe.sh"


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
