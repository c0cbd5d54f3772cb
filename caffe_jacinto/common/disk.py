"""Space on disks: how much is free, and what to say when there is not enough."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a disk, or of a user's share of it, without space left."""

NEARLY_FULL = 1 << 20
"""With fewer bytes free than this, a disk is the reason of any failure to write."""


def existing(path: Path) -> Path:
    """``path`` as an absolute path, or the nearest folder above it that exists."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """What this user may still write at ``path``, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def place_of(path: Path) -> str:
    """The disk that ``path`` is on, by the folder at which it is mounted, and the folder on it."""
    folder = existing(path)
    folder = folder if folder.is_dir() else folder.parent
    mount = folder
    while not os.path.ismount(mount):
        mount = mount.parent
    return f"the disk mounted at {mount} (folder {folder})" if folder != mount else f"the disk {mount}"


def is_full(error: OSError) -> bool:
    """Whether a disk without space left is the reason."""
    return error.errno in FULL


def says_full(text: str) -> bool:
    """Whether a program's last words are that there is no space left."""
    return any(os.strerror(number) in text for number in FULL)


def why_not_written(error: OSError, path: Path) -> str:
    """What an error in writing ``path`` says, in one line; of a full disk also which one and what is free."""
    what = f"{error.filename or path} could not be written: {error.strerror or error}"
    return f"{what}: {size(free_bytes(path))} are free on {place_of(path)}" if is_full(error) else what


def size(count: int) -> str:
    """A number of bytes: ``512 kB``, ``24 MB``, ``1.3 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
