"""Where the files that travel with the code are found.

The templates stand at the top level of the repository (`templates/`), and inside the package
(`caffe_jacinto/templates/`) once it is installed from a wheel.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from caffe_jacinto.common.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut (fsync on the directory)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(
    path: Path, content: str | bytes | Iterable[bytes | memoryview], *, executable: bool = False
) -> None:
    """Write ``content`` (text as UTF-8, or parts one after the other) to ``path``.

    A reader sees the old file or all of the new.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; ``path`` is untouched.
    """
    parts = [content.encode()] if isinstance(content, str) else content
    if isinstance(parts, bytes):
        parts = [parts]
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), (0o777 if executable else 0o666) & ~umask)
            os.fsync(file.fileno())
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_parent(path: Path, what: str = "") -> None:
    """Raises UserError unless the folder is there that ``path`` (``what`` says what it is) is made in."""
    if not path.parent.is_dir():
        raise UserError(
            f"{what}{path} cannot be made, its folder {path.parent} does not exist: make that first"
        )


def looked_for(path: Path) -> str:
    """What a message adds to a missing ``path``: the folder that a relative one is relative to."""
    return "" if path.is_absolute() else f" (looked for in {Path.cwd()})"


PACKAGE = Path(__file__).resolve().parent.parent


def template_folder() -> Path:
    """The folder of the Jinja templates: in an installed wheel, or else in the checkout (editable or not).

    Raises FileNotFoundError when there is neither, which only a damaged installation brings about.
    """
    installed, checkout = PACKAGE / "templates", PACKAGE.parent / "templates"
    for folder in (installed, checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no templates at {installed} nor {checkout}: install caffe-jacinto again")
