"""C++ code of this package, compiled for this machine when it is first used."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from caffe_jacinto.engines.pytorch.machine import cache_folder, digest, identity

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, after the one that the environment's CXX names."""

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC")

_SECONDS = 120
"""A compiler that takes longer is stopped."""


class CompileError(Exception):
    """There is no library; the message says why, in one line."""


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """The library that ``source`` makes, with these further ``flags`` of the compiler.

    It is kept in the user's cache folder, under a name that says what it was made from.

    Raises:
        CompileError: there is no compiler, or it failed.
    """
    named = os.environ.get("CXX", "").split()[:1]
    compiler = next(filter(None, map(shutil.which, (*named, *COMPILERS))), None)
    if compiler is None:
        raise CompileError("there is no C++ compiler")
    try:
        openmp = _loaded_openmp()
        key = digest(source.read_text(), *_FLAGS, *flags, compiler, openmp or "", identity())
        kept = cache_folder()
        with tempfile.TemporaryDirectory(prefix="compile-", dir=kept) as name:
            library = (kept or Path(name)) / f"{source.stem}-{key}.so"
            if library.exists():
                try:
                    return ctypes.CDLL(str(library))
                except OSError:
                    pass  # it was cut off, by a full disk or a power cut
            _compile(compiler, source, Path(name), library, flags, openmp)
            return ctypes.CDLL(str(library))  # which stays loaded where the file is removed
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        raise CompileError(f"{compiler} failed: {(lines or ['without a message'])[0].strip()}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler}: {error}") from None


def _compile(
    compiler: str, source: Path, folder: Path, library: Path, flags: tuple[str, ...], openmp: str | None
) -> None:
    """Make ``library``, whole or not at all, by files in ``folder``."""
    unlinked, linked = folder / "unlinked.o", folder / "linked.so"
    _run(compiler, *_FLAGS, *flags, "-c", str(source), "-o", str(unlinked))
    # The threads have to be PyTorch's own: those of another OpenMP library would compete with them.
    _run(compiler, "-shared", str(unlinked), *([openmp] if openmp else ["-fopenmp"]), "-o", str(linked))
    linked.replace(library)


def _run(*command: str) -> None:
    subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL
    )


def _loaded_openmp() -> str | None:
    """The file of the OpenMP library that PyTorch has loaded."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so[^/\s]*$", mapped, re.MULTILINE)
    return found[0] if found else None
