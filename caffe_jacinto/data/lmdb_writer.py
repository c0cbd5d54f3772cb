"""An LMDB that appears under its name only when it is complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caffe_jacinto.errors import RunFailed, UserError
from caffe_jacinto.files import sync_folder, write_whole

FIRST_MAP_BYTES = 1 << 30
"""Size of the address range that LMDB may use at first; doubled as often as needed."""

BATCH_BYTES = 32 << 20
"""Records are handed to LMDB in transactions of this many bytes."""

OWN_FILES = frozenset({"data.mdb", "lock.mdb", "labels.txt", "skipped.txt"})
"""All that an LMDB folder of ours or of convert_imageset holds: what --force may delete."""


class LmdbWriter:
    """Takes records in ascending key order; made by `new_lmdb`."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self._lmdb = lmdb
        self._folder = folder
        # Not synced while it grows: nobody sees this folder before finish() has synced it.
        # No lock file: it is private until then, and Caffe makes its own.
        self._environment: Any = lmdb.open(
            os.fspath(folder), map_size=FIRST_MAP_BYTES, lock=False, sync=False, mode=0o666
        )
        self._batch: list[tuple[bytes, bytes]] = []
        self._batch_bytes = 0
        self.images = 0

    def put(self, key: bytes, record: bytes) -> None:
        """Store one record; ``key`` must be greater than the one before."""
        self._batch.append((key, record))
        self._batch_bytes += len(key) + len(record)
        self.images += 1
        if self._batch_bytes >= BATCH_BYTES:
            self._write_batch()

    def add_file(self, name: str, text: str) -> None:
        """Put a text file beside data.mdb (Caffe looks at no other file of the folder)."""
        write_whole(self._folder / name, text.encode("utf-8", "surrogateescape"))

    def finish(self) -> None:
        """Write what is left and wait until all of it is on the disk."""
        self._write_batch()
        self._environment.sync(True)
        self.close()
        sync_folder(self._folder)

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        self._environment.close()

    def _write_batch(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, record in self._batch:
                        transaction.put(key, record, append=True)
                break
            except self._lmdb.MapFullError:
                # The transaction was rolled back whole: double the map, as Caffe does, and again.
                self._environment.set_mapsize(self._environment.info()["map_size"] * 2)
        self._batch.clear()
        self._batch_bytes = 0


@contextlib.contextmanager
def new_lmdb(output: Path, *, replace: bool = False) -> Iterator[LmdbWriter]:
    """Write an LMDB beside ``output``, and rename it to ``output`` when the block ends without an error.

    What an earlier, killed writer left beside it is removed. On an error nothing is left.

    Args:
        output: the LMDB's folder. Its parent must exist.
        replace: whether an LMDB that is there already may be replaced, once the new one is complete.

    Raises:
        UserError: something stands under that name, the parent is missing or not writable, or another
            process is writing the same LMDB.
        RunFailed: the disk is full or refuses to write.
    """
    import lmdb

    output = output.resolve()  # A link to another disk stays, and what it leads to is made or replaced.
    check_free(output, replace)
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    lock = _claim(partial, output)
    try:
        shutil.rmtree(replaced, ignore_errors=True)
        writer = LmdbWriter(partial)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()
        check_free(output, replace)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        sync_folder(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (lmdb.Error, OSError) as error:
        reason = _why_not_written(output, error)
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(reason) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def is_lmdb_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with an LMDB's data file in it (and nothing is said of its content)."""
    return (path / "data.mdb").is_file()


def check_free(output: Path, replace: bool) -> None:
    """Raise UserError unless an LMDB may be put at ``output`` (see `new_lmdb`, which asks this itself)."""
    if not output.parent.is_dir():
        raise UserError(
            f"LMDB {output} cannot be made, its folder {output.parent} does not exist: make that first"
        )
    if not output.exists():
        return
    if not is_lmdb_folder(output):
        raise UserError(f"{output} exists and is not an LMDB: choose another name, or remove it")
    if not replace:
        raise UserError(f"LMDB {output} exists already: --force replaces it")
    foreign = sorted(item.name for item in output.iterdir() if item.name not in OWN_FILES)
    if foreign:
        raise UserError(
            f"{output} holds {foreign[0]!r} beside the LMDB: --force replaces only a folder that holds"
            " nothing but an LMDB"
        )


def _claim(partial: Path, output: Path) -> int:
    """Make ``partial`` an empty folder that only this process writes to; returns the open lock.

    The lock is the kernel's (flock): it ends with the process that holds it, however that dies.
    """
    while True:
        try:
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"cannot write to folder {partial.parent}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another process is writing LMDB {output} at this moment") from None
        try:
            if os.path.samestat(os.fstat(lock), partial.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(lock)  # Its owner finished and renamed it between our open and our lock.
    for leftover in partial.iterdir():
        leftover.unlink()
    return lock


def _why_not_written(output: Path, error: Exception) -> str:
    """The message for a write that failed; to be asked before the part is removed."""
    # LMDB reports a write that was cut short by a full disk as an input/output error: look at the disk.
    free = shutil.disk_usage(output.parent).free
    no_room = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    if no_room or free < BATCH_BYTES:
        return (
            f"the disk of {output.parent} is full ({free / 1e6:,.0f} MB left): LMDB {output} was not made and"
            " its part is removed; make room and start again"
        )
    return f"LMDB {output} could not be written: {error}"
