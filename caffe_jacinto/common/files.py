"""Files that appear whole or not at all, text files that users name, and the package's own files."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of the package ``caffe_jacinto``."""


def write_whole(
    path: Path, content: str | bytes | Iterable[bytes | memoryview], *, executable: bool = False
) -> None:
    """Write ``content`` (text as UTF-8, or parts in order) beside ``path``, sync it, and rename it.

    A reader sees the old file or all of the new one.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; ``path`` is untouched. The error
            names ``path``.
    """
    try:
        _write_whole(path, content, executable=executable)
    except OSError as error:
        error.filename = str(path)  # an error in writing names no file
        raise


def _write_whole(
    path: Path, content: str | bytes | Iterable[bytes | memoryview], *, executable: bool
) -> None:
    parts = [content.encode()] if isinstance(content, str) else content
    if isinstance(parts, bytes):
        parts = [parts]
    with replacing(path, executable=executable) as (to, _), os.fdopen(to, "wb", closefd=False) as file:
        file.writelines(parts)


@contextmanager
def replacing(path: Path, *, executable: bool = False) -> Iterator[tuple[int, Path]]:
    """A new file beside ``path`` for the block to write: its descriptor and its path.

    When the block ends without an error, the file is synced and renamed to ``path``; else it is removed. It
    is locked (flock) while it is written. What a killed process has left is not locked, and is removed when
    ``path`` is written again, or by `remove_unfinished`.

    Raises:
        OSError: as `write_whole`.
    """
    remove_unfinished(path.parent, path.name)
    descriptor, beside = _locked_file(path)
    try:
        try:
            yield descriptor, beside
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(descriptor, (0o777 if executable else 0o666) & ~umask)
            os.fsync(descriptor)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left of files that they were writing in ``folder``.

    ``name``: only of this file. What a living process is writing stays, on each machine that shares locks.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if is_unfinished(entry.name)]
    except OSError:
        return
    for unfinished in found:
        if name is None or unfinished.startswith(f".{name[:_NAME_SHOWN]}."):
            with suppress(OSError):
                _remove_unlocked(folder / unfinished)


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is one that `replacing` has made."""
    return _UNFINISHED.fullmatch(name) is not None


_NAME_SHOWN = 100
"""Characters of a file's name that the name of the one beside it has."""

_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}\.unfinished", re.DOTALL)


def _locked_file(path: Path) -> tuple[int, Path]:
    """A new file beside ``path``, open and locked."""
    import tempfile

    while True:
        name = f".{path.name[:_NAME_SHOWN]}."
        descriptor, beside = tempfile.mkstemp(prefix=name, suffix=".unfinished", dir=path.parent)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(beside)
        os.close(descriptor)  # `remove_unfinished` came between the two


def _remove_unlocked(path: Path) -> None:
    """Remove the file unless a process has it locked.

    Raises:
        OSError: it is locked, or cannot be removed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def write_new(path: Path, content: str) -> None:
    """Write a file that must not exist yet; it appears whole.

    Raises:
        FileExistsError: it exists, and is left as it is.
        OSError: as `write_whole`.
    """
    beside = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    write_whole(beside, content)
    try:
        path.hardlink_to(beside)
    finally:
        beside.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut (fsync on the directory)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_BINARY_KINDS = {".caffemodel": "a weight file", ".solverstate": "a solver state", ".h5": "an HDF5 file"}
"""By the endings of Caffe's files that are not text."""


def expanded(path: str) -> Path:
    """``path`` with a home folder in the place of ``~``; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_text(path: Path, hint: str = "") -> str:
    """The text of a prototxt that the user names; ``hint`` says what to do when it cannot be read.

    Comments may be in any encoding, as for Caffe: what of them is not UTF-8 becomes U+FFFD.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 outside of its comments.
    """
    advice = f"; {hint}" if hint else ""
    try:
        return _decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}{advice}") from None
    except UnicodeDecodeError as error:
        what = _BINARY_KINDS.get(path.suffix)
        why = f"{what}, not text" if what else f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise UserError(f"{path}: {why}{advice}") from None


_STRING_OR_COMMENT = re.compile(rb""" "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' | \#[^\n]* """, re.VERBOSE)


def _decoded(content: bytes) -> str:
    """Raises UnicodeDecodeError where bytes outside of comments are not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        if b"\0" in content:  # no text at all, and perhaps a large file
            raise
        return _STRING_OR_COMMENT.sub(_readable, content).decode()


def _readable(found: re.Match[bytes]) -> bytes:
    """A comment as UTF-8; a string as it is."""
    return found[0].decode(errors="replace").encode() if found[0].startswith(b"#") else found[0]


def parse_json(text: str | bytes) -> Any:
    """The value that ``text`` holds as JSON.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python reads it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    import hashlib

    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_parent(path: Path, what: str = "") -> None:
    """Raise UserError unless the folder that ``path`` is made in exists; ``what`` names what is made."""
    if not path.parent.is_dir():
        raise UserError(
            f"{what}{path} cannot be made: its folder {path.parent} does not exist; make that first"
        )


def check_output(output: Path, source: Path, argument: str = "--output") -> None:
    """Raise UserError where ``output``, made of ``source``, cannot be made; ``argument`` named it."""
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError(f"{argument} {output} is the file itself; name another")
    if output.is_dir():
        raise UserError(f"{argument} {output} is a folder; name a file in it")
    check_parent(output, f"{argument} ")


def looked_for(path: Path) -> str:
    """What a message adds to a missing ``path``: the folder that a relative one is relative to."""
    return "" if path.is_absolute() else f" (looked for in {Path.cwd()})"


def template_folder() -> Path:
    """The folder of the Jinja templates: inside an installed package, else at the top of the checkout.

    Raises:
        FileNotFoundError: there is neither, so the installation is damaged.
    """
    installed, checkout = PACKAGE / "templates", PACKAGE.parent / "templates"
    for folder in (installed, checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no templates at {installed} nor {checkout}: install caffe-jacinto again")
