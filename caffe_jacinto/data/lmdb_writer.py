"""Writing an LMDB, which appears under its name only when it is complete and on the disk.

Until then it is in the folder ``.<name>.partial`` beside its final place, together with a journal. Each
transaction is on the disk before the next one; after any interruption, a later process continues from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from caffe_jacinto.common.disk import free_bytes, place_of, says_full, size
from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.files import check_parent, parse_json, sync_folder, write_whole
from caffe_jacinto.data.journal import Commit, Journal, Skipped, Stored
from caffe_jacinto.data.listing import LABELS
from caffe_jacinto.data.lmdb_reader import is_lmdb_folder

FIRST_MAP_BYTES = 1 << 30
"""Size of the address range that LMDB may use at first; doubled when needed."""

BATCH_BYTES = 16 << 20
"""Records are written in transactions of this many bytes; up to three batches are in memory."""

SKIPPED = "skipped.txt"
"""The list of the images that were left out."""

MADE_FROM = "made_from.json"
"""The file beside data.mdb that records what the LMDB is made from."""

OWN_FILES = frozenset({"data.mdb", "lock.mdb", LABELS, SKIPPED, MADE_FROM})
"""The files in an LMDB folder of create_lmdb or convert_imageset: what --force may delete."""


class LmdbWriter:
    """Takes records in ascending key order; made by `new_lmdb`.

    Another thread writes the transactions, so the caller does not wait for the disk.

    Attributes:
        position: images processed, stored or left out; starts above 0 when an interrupted run is continued.
        images: records stored.
        record_bytes: of their values.
        skipped: the images left out.
        resumed: ``position`` at the start.
        committed: records that are on the disk.
    """

    def __init__(self, partial: Path, journal: Journal, name: str) -> None:
        import lmdb

        self._lmdb = lmdb
        self.partial = partial
        self._folder = partial / "lmdb"
        self._folder.mkdir(exist_ok=True)
        for item in self._folder.iterdir():
            if item.name != "data.mdb":
                item.unlink()  # It will be written again; a killed process may have left half of it.
        self._journal = journal
        # No lock file: nobody else opens an incomplete LMDB, and Caffe makes its own.
        self._environment: Any = lmdb.open(
            os.fspath(self._folder), map_size=FIRST_MAP_BYTES, lock=False, mode=0o666
        )
        sync_folder(self._folder)
        sync_folder(partial)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        try:
            stored = journal.check(name, self._environment) if journal.continued else Stored()
        except BaseException:
            self.close()
            raise
        self.position = self.resumed = stored.end
        self.images = self.committed = stored.records
        self.record_bytes = stored.record_bytes
        self.skipped = stored.skipped
        self._skipped_written = len(stored.skipped)
        self._batch: list[tuple[bytes, bytes]] = []
        self._batch_bytes = 0
        self._position_written = self.position

    def put(self, key: bytes, record: bytes) -> None:
        """Store one record; ``key`` must be greater than the one before."""
        self._batch.append((key, record))
        self._batch_bytes += len(key) + len(record)
        self.position += 1
        self.images += 1
        self.record_bytes += len(record)
        if self._batch_bytes >= BATCH_BYTES:
            self._write_batch()

    def skip(self, path: str, reason: str) -> None:
        """Leave out the image that would be next."""
        self.skipped.append(Skipped(self.position, path, reason))
        self.position += 1

    def add_file(self, name: str, text: str) -> None:
        """Put a text file beside data.mdb (Caffe looks at no other file of the folder)."""
        write_whole(self._folder / name, text.encode("utf-8", "surrogateescape"))

    def add_made_from(self, made_from: Mapping[str, str]) -> None:
        """Note beside data.mdb what the LMDB is made from."""
        self.add_file(MADE_FROM, json.dumps(made_from, indent=1) + "\n")

    def finish(self) -> None:
        """Write the rest and wait until everything is on the disk."""
        if self.position != self._position_written:
            self._write_batch()
        self._wait()
        if self.skipped:
            self.add_file(SKIPPED, self.skipped_text())
        self.close()
        sync_folder(self._folder)

    def skipped_text(self) -> str:
        """The lines of skipped.txt."""
        return "".join(f"{image.path}\t{image.reason}\n" for image in self.skipped)

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._thread.shutdown()
        self._environment.close()
        self._journal.close()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_batch(self) -> None:
        self._wait()
        skipped = self.skipped[self._skipped_written :]
        self._writing = self._thread.submit(self._commit, self._batch, skipped, self.position, self.images)
        self._batch = []
        self._batch_bytes = 0
        self._skipped_written = len(self.skipped)
        self._position_written = self.position

    def _commit(
        self, batch: list[tuple[bytes, bytes]], skipped: list[Skipped], end: int, records: int
    ) -> None:
        crc = 0
        for key, record in batch:
            crc = zlib.crc32(record, zlib.crc32(key, crc))
        self._journal.add(skipped, Commit(end, records, crc))
        while True:
            try:
                with self._environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                    _, added = cursor.putmulti(batch, append=True)
                    assert added == len(batch), "keys must ascend"
                self.committed = records
                return
            except self._lmdb.MapFullError:
                # The whole transaction was rolled back: double the map, as Caffe does, and repeat it.
                self._environment.set_mapsize(self._environment.info()["map_size"] * 2)


@contextlib.contextmanager
def new_lmdb(
    output: Path,
    made_from: Mapping[str, str] | None = None,
    *,
    replace: bool = False,
    restart: bool = False,
) -> Iterator[LmdbWriter]:
    """Write an LMDB beside ``output``, and rename it to ``output`` when the block ends without an error.

    What an interrupted writer stored is checked and continued: the block begins at ``writer.position``.
    After an error, what has been stored stays for the next attempt.

    Args:
        output: the LMDB's folder. Its parent must exist.
        made_from: what determines the records: sources, order, form. An unfinished LMDB is continued only
            if it is the same.
        replace: whether an existing LMDB may be replaced, once the new one is complete.
        restart: whether an unfinished LMDB is discarded.

    Raises:
        UserError: the name is taken, the parent is missing or not writable, another process is writing the
            same LMDB, or the unfinished one is damaged or was made differently.
        RunFailed: the disk is full or refuses to write.
    """
    import lmdb

    output = output.resolve()  # A link to another disk stays; its target is made or replaced.
    check_free(output, replace)
    partial = output.with_name(f".{output.name}.partial")
    lock = _claim(partial, output)
    writer: LmdbWriter | None = None
    try:
        if restart or not (partial / "lmdb").is_dir():
            _empty(partial)  # If the LMDB is no longer in it, it was moved, and only this was left to do.
        try:
            journal = Journal(partial / "journal", made_from or {})
            if not journal.continued:
                shutil.rmtree(partial / "lmdb", ignore_errors=True)
                (partial / SKIPPED).unlink(missing_ok=True)
            writer = LmdbWriter(partial, journal, output.name)
            yield writer
            writer.finish()
        finally:
            if writer is not None:
                writer.close()
        _publish(partial, output, replace)
    except (lmdb.Error, OSError) as error:
        raise RunFailed(_why_not_written(output, error)) from error
    finally:
        # Remove it unless there is something to continue, or a list of bad images that a message named.
        if writer is not None and not writer.committed and not (partial / SKIPPED).exists():
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _publish(partial: Path, output: Path, replace: bool) -> None:
    replaced = output.with_name(f".{output.name}.replaced")
    check_free(output, replace)
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    (partial / "lmdb").rename(output)
    sync_folder(output.parent)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def noted_form(folder: Path) -> str | None:
    """The form of the images (`ImageForm.text`) that an LMDB's own record notes; None where there is none."""
    try:
        form = parse_json((folder / MADE_FROM).read_text()).get("form")
    except (OSError, ValueError, AttributeError):
        return None
    return form if isinstance(form, str) else None


def check_free(output: Path, replace: bool) -> None:
    """Raise UserError unless an LMDB may be put at ``output``; `new_lmdb` checks this, too."""
    check_parent(output, "LMDB ")
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
    """Make the folder ``partial`` if it is missing, and lock it for this process; returns the open lock.

    The kernel releases the lock (flock) when the process that holds it ends, for whatever reason.
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
            raise UserError(f"another process is writing LMDB {output}") from None
        try:
            if os.path.samestat(os.fstat(lock), partial.stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # Its owner finished and removed it after it was opened here, before it was locked.


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()


def _why_not_written(output: Path, error: Exception) -> str:
    # On a full disk LMDB may report an input/output error, so look at the free space.
    free = free_bytes(output.parent)
    if says_full(str(error)) or free < BATCH_BYTES:
        return (
            f"{place_of(output.parent)} is full ({size(free)} left): LMDB {output} is not complete;"
            " free some space and start the same command again to continue"
        )
    return f"LMDB {output} could not be written: {error}"
