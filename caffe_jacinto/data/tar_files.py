"""The files that extracting a tar archive would leave, by its headers alone.

As with tar, of several members of one name the last counts; a hard link is the file that its target was at
that point in the archive; a symbolic link leads to what is there in the end; the holes of a sparse file are
zeros.
"""

from __future__ import annotations

import io
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.index import NOT_A_FILE, Archive, PackedPaths, UnreadableImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HEADER_BUFFER = 2 * tarfile.BLOCKSIZE
"""Bytes read for one header; a larger buffer would read the images around it, too."""

_MOST_LINKS = 40
"""On the way to one file, as in Linux."""

# GNU tar's types that tarfile does not name: a folder of an incremental backup, the rest of a file that began
# in the volume before, and two that are not files (old long names, and the name of the volume).
_DUMPED_FOLDER, _CONTINUED, _NO_FILES = b"D", b"M", (b"N", b"V")


class TarFile(NamedTuple):
    """A file: its path, where its content lies, as `Archive.read` takes it, and what kind of member it is."""

    path: bytes
    offset: int
    size: int
    kind: str
    """``hard link``, ``symbolic link``, ``sparse file``, or empty."""


_LONGEST_PATH = 4096
"""Linux's PATH_MAX: tar makes no longer ones."""


class TarFiles:
    """The files and folders that extracting the ``size`` bytes from ``start`` of ``archive`` would leave.

    ``what`` names that part of the archive in messages. ``reached`` is called with the place of each member.

    Raises:
        UserError: it is not a tar archive, is compressed or cut off, or a name leads out of it or through a
            link.
    """

    folders: set[bytes]
    """All folders, with those that only the path of a file names."""

    replaced: int
    """How many members have a name that comes again later."""

    broken: int
    """How many hard links lead to no file that the archive holds before them: tar does not make these."""

    def __init__(
        self, archive: Archive, what: str, start: int, size: int, reached: Callable[[int], None]
    ) -> None:
        self._archive, self._what, self._start = archive, what, start
        self.folders = set()
        self._paths = PackedPaths()
        self._offsets, self._sizes = array("q"), array("q")
        self._kinds: dict[int, str] = {}
        self._links: dict[int, tuple[str, str]] = {}
        """By the member's number: its kind, and where it leads."""

        for member, name in _members(archive, what, start, size):
            if not name.endswith(".tar"):  # Their headers are read later.
                reached(start + member.offset)
            self._add(member, os.fsencode(name))
        for folder in list(self.folders):
            while folder := folder.rpartition(b"/")[0]:
                self.folders.add(folder)
        self._finder = _Finder(self._paths)
        self._left_out: set[int] = set()
        self._make_hard_links()
        self.broken = len(self._left_out)
        self._left_out |= self._finder.replaced(self._left_out)
        self.replaced = len(self._left_out) - self.broken
        self._symbolic: dict[bytes, str] = {}
        self._folder_links: dict[int, bytes] = {}
        """By the link's number: the folder that it leads to."""

        if self._links:
            self._follow_symbolic_links()

    def __iter__(self) -> Iterator[TarFile]:
        """The files in the archive's order, then those in folders that are links."""
        for number in range(len(self._paths)):
            if number not in self._left_out and number not in self._folder_links:
                yield self._file(number)
        if self._folder_links:
            yield from self._linked()

    def find(self, path: bytes) -> TarFile | None:
        """The file ``path``, through links."""
        try:
            number = self._last(self._real_path(path))
        except UnreadableImageError:
            return None
        return None if number is None else self._file(number)

    def _last(self, path: bytes) -> int | None:
        """The number of the member that is called ``path`` in the end."""
        return next((number for number in self._finder.numbers(path) if number not in self._left_out), None)

    def _file(self, number: int) -> TarFile:
        kind = self._kinds.get(number, "") if self._kinds else ""
        return TarFile(self._paths[number], self._offsets[number], self._sizes[number], kind)

    def _linked(self) -> Iterator[TarFile]:
        """The files directly in the folders that are links, under the links' names."""
        inside: dict[bytes, list[int]] = {folder: [] for folder in self._folder_links.values()}
        for number in range(len(self._paths)):
            folder = self._paths[number].rpartition(b"/")[0]
            if folder in inside and number not in self._left_out and number not in self._folder_links:
                inside[folder].append(number)
        for link, folder in self._folder_links.items():
            for number in inside[folder]:
                name = self._paths[number].rpartition(b"/")[2]
                file = self._file(number)
                yield file._replace(path=b"%s/%s" % (self._paths[link], name), kind="symbolic link")

    # ---------------------------------------------------------------------------------- members

    def _add(self, member: tarfile.TarInfo, path: bytes) -> None:
        if member.isdir() or member.type == _DUMPED_FOLDER:
            self.folders.add(path)
            return
        self.folders.add(path.rpartition(b"/")[0])
        number, offset, size = len(self._paths), 0, 0
        if member.islnk() or member.issym():
            kind = "hard link" if member.islnk() else "symbolic link"
            self._links[number] = (kind, member.linkname)
        elif member.ischr() or member.isblk() or member.isfifo():
            offset = self._archive.unreadable(NOT_A_FILE)
        elif member.issparse():
            self._kinds[number] = "sparse file"
            offset, size = self._archive.in_parts(_parts(self._what, member, self._start)), member.size
        else:
            offset, size = self._start + member.offset_data, member.size
        self._paths.append(path)
        self._offsets.append(offset)
        self._sizes.append(size)

    def _set(self, number: int, kind: str, target: int) -> None:
        """Let a link have the content of the member ``target``."""
        self._kinds[number] = kind
        self._offsets[number], self._sizes[number] = self._offsets[target], self._sizes[target]

    def _make_hard_links(self) -> None:
        """In the archive's order: what a link leads to is then a file or a symbolic link."""
        for number, (kind, target) in list(self._links.items()):
            if kind != "hard link":
                continue
            path = os.fsencode("/".join(part for part in target.split("/") if part not in ("", ".")))
            earlier = [n for n in self._finder.numbers(path) if n < number and n not in self._left_out]
            if earlier and earlier[-1] in self._links:
                self._links[number] = self._links[earlier[-1]]
                continue
            del self._links[number]
            if earlier:
                self._set(number, kind, earlier[-1])
            else:
                self._left_out.add(number)

    def _follow_symbolic_links(self) -> None:
        links = {
            number: target for number, (_, target) in self._links.items() if number not in self._left_out
        }
        self._symbolic = {self._paths[number]: target for number, target in links.items()}
        through = sorted(self.folders & self._symbolic.keys())
        if through:
            raise UserError(
                f"archive {self._what} holds {os.fsdecode(through[0])!r} as a link and as a folder: extract"
                " it with tar, and give the folder"
            )
        for number, target in links.items():
            try:
                path = self._real_path(self._paths[number])
                found = self._last(path)
                if found is not None:
                    self._set(number, "symbolic link", found)
                elif not path or path in self.folders:
                    self._folder_links[number] = path
                else:
                    raise UnreadableImageError(f"a link to {target!r}, which the archive does not hold")
            except UnreadableImageError as error:
                self._offsets[number] = self._archive.unreadable(str(error))
        self.folders.update(self._paths[number] for number in self._folder_links)

    def _real_path(self, path: bytes) -> bytes:
        """``path`` without symbolic links, '.' and '..'; raises UnreadableImageError where it leads out."""
        done: list[bytes] = []
        left = path.split(b"/")[::-1]
        followed = 0
        while left:
            part = left.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if not done:
                    raise UnreadableImageError("a link that leads out of the archive")
                done.pop()
                continue
            done.append(part)
            target = self._symbolic.get(b"/".join(done)) if self._symbolic else None
            if target is None:
                continue
            followed += 1
            if target.startswith("/"):
                raise UnreadableImageError(f"a link to {target!r}, which leads out of the archive")
            if followed > _MOST_LINKS:
                raise UnreadableImageError(f"more than {_MOST_LINKS} links that lead to one another")
            done.pop()
            left += os.fsencode(target).split(b"/")[::-1]
        return b"/".join(done)


class _Finder:
    """Finds paths by their hashes: a dictionary of a million paths would take hundreds of megabytes."""

    def __init__(self, paths: PackedPaths) -> None:
        import numpy as np

        self._paths = paths
        count = len(paths)
        hashes = np.fromiter((hash(paths[number]) for number in range(count)), np.int64, count)
        self._order: NDArray[np.int64] = np.argsort(hashes, kind="stable")
        self._hashes: NDArray[np.int64] = hashes[self._order]

    def numbers(self, path: bytes) -> Iterator[int]:
        """The numbers of the members called ``path``, in the archive's order."""
        wanted = hash(path)
        at = int(self._hashes.searchsorted(wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            number = int(self._order[at])
            if self._paths[number] == path:
                yield number
            at += 1

    def replaced(self, without: set[int]) -> set[int]:
        """The numbers of the members whose path comes again later; those in ``without`` do not count."""
        again = (self._hashes[1:] == self._hashes[:-1]).nonzero()[0]
        found: set[int] = set()
        last: dict[bytes, int] = {}
        for number in sorted({int(self._order[at + step]) for at in again for step in (0, 1)} - without):
            path = self._paths[number]
            if path in last:
                found.add(last[path])
            last[path] = number
        return found


def _members(archive: Archive, what: str, start: int, size: int) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The members of the tar archive in the ``size`` bytes from ``start``, with their safe names.

    Raises:
        UserError: as `TarFiles`.
    """
    section = _Section(archive, start, size)
    try:
        tar = tarfile.TarFile(fileobj=io.BufferedReader(section, _HEADER_BUFFER))
        before = -1
        while (member := tar.next()) is not None:
            cast(Any, tar).members.clear()  # tarfile would keep all of a million members.
            if member.size < 0 or tar.offset <= before:
                raise tarfile.ReadError("a header that points backwards")
            before = tar.offset
            name = _safe_name(what, member.name)
            if not name or member.type in _NO_FILES:
                continue
            if member.type == _CONTINUED:
                raise UserError(f"archive {what} continues {name} from another volume: extract it with tar")
            stored = (
                sum(length for _, length in cast(Any, member).sparse) if member.issparse() else member.size
            )
            if stored and _has_content(member) and member.offset_data + stored > size:
                raise UserError(
                    f"archive {what} is cut off inside {name}: it has {size:,} bytes, and that ends at"
                    f" {member.offset_data + stored:,}; compare its MD5, and download it again"
                )
            yield member, name
        if section.at(tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"archive {what} is cut off or damaged at byte {tar.offset:,}: its end mark is missing;"
                " compare its MD5, and download it again"
            )
    except OSError as error:
        raise UserError(f"archive {what} cannot be read: {error.strerror}") from None
    # tarfile lets ValueError and OverflowError out for some damaged headers, and calls itself for each header
    # that only extends the next one.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"archive {what} cannot be read: {_why_no_tar(section, str(error))}") from None


def _has_content(member: tarfile.TarInfo) -> bool:
    return not (member.isdir() or member.islnk() or member.issym() or member.isdev())


def _parts(what: str, member: tarfile.TarInfo, start: int) -> list[tuple[int, int, int]]:
    """The parts of a sparse file that are stored: place in the file, place in the archive, length."""
    parts = []
    at = start + member.offset_data
    for place, length in cast(Any, member).sparse:
        if place < 0 or length < 0 or place + length > member.size:
            raise UserError(f"archive {what} is damaged: {member.name} has parts beyond its end")
        parts.append((place, at, length))
        at += length
    return parts


def _safe_name(what: str, name: str) -> str:
    """A member's path without './'; raises UserError for one that leads out of the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise UserError(f"archive {what} holds the name {name!r}, which leads out of it: refused")
    if len(name) > _LONGEST_PATH:
        raise UserError(
            f"archive {what} holds a name of {len(name):,} characters, {name[:40]!r}…:"
            " no file system has such paths"
        )
    return "/".join(part for part in parts if part not in ("", "."))


def _why_no_tar(section: _Section, reason: str) -> str:
    start = section.at(0, 6)
    for magic, kind, command in (
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"\xfd7zXZ\0", "xz", "unxz"),
    ):
        if start.startswith(magic):
            return f"it is compressed ({kind}), and cannot be read from the middle: {command} it"
    if start.startswith(b"PK"):
        return "it is a zip archive: unpack it, and give the folder"
    return f"it is neither a folder nor a tar archive, or it is damaged ({reason})"


class _Section(io.RawIOBase):
    """A part of an archive as a file of its own."""

    def __init__(self, archive: Archive, start: int, size: int) -> None:
        self._archive, self._start, self._size = archive, start, size
        self._position = 0

    def at(self, position: int, size: int) -> bytes:
        """At most ``size`` bytes from ``position``."""
        return self._archive.bytes_at(self._start + position, max(min(size, self._size - position), 0))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        view = cast(memoryview, memoryview(buffer))  # type: ignore[arg-type]
        content = self.at(self._position, len(view))
        view[: len(content)] = content
        self._position += len(content)
        return len(content)
