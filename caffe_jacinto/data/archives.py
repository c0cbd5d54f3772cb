"""Images inside tar archives, which are not unpacked: the place and the label of each.

Archives are laid out like ILSVRC 2012's:

    ILSVRC2012_img_train.tar    a tar of tars, n01440764.tar and so on, each with the images of one class
    ILSVRC2012_img_val.tar      all images side by side; their labels come from elsewhere
    any.tar                     class folders with images, <class>/*.JPEG, also below one folder

Only the headers are read, once. Compressed archives are refused, since they cannot be read from the middle.
"""

from __future__ import annotations

import io
import itertools
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of, image_progress
from caffe_jacinto.data.index import Archive, ImageIndex, IndexBuilder
from caffe_jacinto.data.listing import and_others, class_labels, is_image_name, list_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MEGABYTE = 10**6
_HEADER_BUFFER = 2 * tarfile.BLOCKSIZE
"""Bytes read for one header; a larger buffer would read the images around it, too."""


class _Member(NamedTuple):
    """A file in an archive: its path, and where its content lies in the outermost archive."""

    path: str
    offset: int
    size: int


def list_class_archive(path: Path, names: tuple[str, ...] | None = None) -> ImageIndex:
    """The images of an archive with classes, as `list_class_folders` lists the same images unpacked.

    Raises:
        UserError: the file is not a tar archive, is compressed or cut off, has names that lead out of it, or
            has no classes; or as `class_labels`.
    """
    index, folders = _read(path)
    if not any(folders):
        raise UserError(
            f"archive {path} holds {count_of(len(index), 'image')} directly and no classes: give the"
            " development kit (--devkit) or a list file (--list) with their labels"
        )
    start, classes = _class_names(path, folders)
    found = sorted(name for name in classes if name)
    labels = class_labels(found, names, f"archive {path}, class ")
    ranks = {name: rank for rank, name in enumerate(found)}
    numbers = _by_class(index, [ranks.get(name, -1) for name in classes])
    used = {index.label(int(number)) for number in numbers}
    empty = [name for number, name in enumerate(classes) if name and number not in used]
    if empty and names is None:
        raise UserError(f"archive {path}, class {empty[0]} holds no images{and_others(empty)}: is it whole?")
    return index.relabelled(
        numbers,
        (labels[classes[index.label(number)]] for number in numbers),
        names or tuple(found),
        f"an archive of {len(found):,} class{'es' * (len(found) != 1)}",
        cut=len(start),
        ignored=index.ignored + len(index) - len(numbers),
    )


def list_flat_archive(path: Path) -> ImageIndex:
    """The images of an archive, sorted by path, without labels; raises UserError as `list_class_archive`."""
    index, _ = _read(path)
    numbers = sorted(range(len(index)), key=index.path)
    return index.relabelled(numbers, [0] * len(numbers), None, "an archive")


def list_from_archive(path: Path, list_file: Path, names: tuple[str, ...] | None = None) -> ImageIndex:
    """The images of an archive that ``list_file`` names, in its order, with its labels.

    Raises:
        UserError: as `list_from_file` and `list_class_archive`; or an image is not there.
    """
    import numpy as np

    index, _ = _read(path)
    # Hashes take eight bytes an image; a dictionary of a million names would take hundreds of megabytes.
    hashes = np.fromiter((hash(index.path(number)) for number in range(len(index))), np.int64, len(index))
    order = np.argsort(hashes)
    hashes = hashes[order]
    build = IndexBuilder(index.place)
    for line, (name, label) in list_lines(list_file, names):
        wanted = name.removeprefix(b"./")
        at = int(np.searchsorted(hashes, hash(wanted)))
        while at < len(order) and hashes[at] == hash(wanted) and index.path(int(order[at])) != wanted:
            at += 1
        if at == len(order) or index.path(int(order[at])) != wanted:
            raise UserError(f"{list_file}:{line}: archive {path} holds no image {os.fsdecode(name)!r}")
        # The name as the list has it, "./" and all: it becomes the key, as with files.
        build.add(name, label, *index.span(int(order[at])))
    return build.index(names, f"list {list_file}")


def _read(path: Path) -> tuple[ImageIndex, list[str]]:
    """The images in the archive's own order, each labelled with its folder's number, and the folders."""
    archive = Archive(path)
    build = IndexBuilder(archive)
    folders: dict[str, int] = {}
    ignored = 0
    with image_progress(f"reading {path.name}", archive.size // MEGABYTE, unit="MB") as advance:
        done = 0
        for member in _members(archive, folders):
            advance(member.offset // MEGABYTE - done)
            done = member.offset // MEGABYTE
            if not is_image_name(member.path):
                ignored += 1
                continue
            label = folders.setdefault(posixpath.dirname(member.path), len(folders))
            build.add(os.fsencode(member.path), label, member.offset, member.size)
    if not len(build):
        raise UserError(f"archive {path} holds no images; one like ILSVRC2012_img_train.tar is expected")
    return build.index(None, "", ignored), list(folders)


def _class_names(path: Path, folders: list[str]) -> tuple[str, list[str]]:
    """What all paths begin with before the class names, and the class of each folder ('' for none)."""
    inside = [folder for folder in folders if folder]
    common = posixpath.dirname(inside[0]) if len(inside) == 1 else posixpath.commonpath(inside)
    start = f"{common}/" if common else ""
    classes = [folder[len(start) :] for folder in folders]
    deep = [folder for folder, name in zip(folders, classes, strict=True) if "/" in name]
    if deep or common in inside:
        raise UserError(
            f"archive {path} has no clear classes: images are expected as <class>/*.JPEG, and some are in"
            f" {deep[0] if deep else common!r}{and_others(deep)}"
        )
    return start, classes


def _by_class(index: ImageIndex, rank_of: list[int]) -> NDArray[np.int64]:
    """The numbers of the images sorted by their class's rank, then by path; those of rank -1 left out."""
    import numpy as np

    ranks = np.fromiter((rank_of[index.label(number)] for number in range(len(index))), np.int32, len(index))
    numbers: NDArray[np.int64] = np.argsort(ranks, kind="stable")[np.count_nonzero(ranks < 0) :]
    starts = np.searchsorted(ranks[numbers], np.arange(max(rank_of) + 2))
    for begin, end in itertools.pairwise(starts):
        numbers[begin:end] = sorted(numbers[begin:end].tolist(), key=lambda n: os.fsdecode(index.path(n)))
    return numbers


# ---------------------------------------------------------------------------------- headers


def _members(archive: Archive, folders: dict[str, int]) -> Iterator[_Member]:
    """The files of an archive, those of archives inside it as ``<class>/<name>``.

    The classes of archives inside it are put into ``folders``, also where they hold no images.
    """
    for member in _tar_members(archive, f"{archive.path}", 0, archive.size):
        if not member.path.endswith(".tar"):
            yield member
            continue
        folder = posixpath.basename(member.path).removesuffix(".tar")
        folders.setdefault(folder, len(folders))
        for inner in _tar_members(archive, f"{archive.path}, {member.path}", member.offset, member.size):
            yield inner._replace(path=f"{folder}/{inner.path.removeprefix(f'{folder}/')}")


def _tar_members(archive: Archive, what: str, start: int, size: int) -> Iterator[_Member]:
    """The regular files of the tar archive in the ``size`` bytes from ``start``.

    Raises:
        UserError: it is not a tar archive, is cut off, or a name leads out of it.
    """
    section = _Section(archive, start, size)
    try:
        tar = tarfile.TarFile(fileobj=io.BufferedReader(section, _HEADER_BUFFER))
        before = -1
        while (member := tar.next()) is not None:
            cast(Any, tar).members.clear()  # tarfile would keep all of a million members.
            end = member.offset_data + member.size
            if member.size < 0 or tar.offset <= before:
                raise tarfile.ReadError("a header that points backwards")
            before = tar.offset
            name = _safe_name(what, member.name)
            if member.isreg() and not member.issparse() and name:
                if end > size:
                    raise UserError(
                        f"archive {what} is cut off inside {name}: it has {size:,} bytes, and that ends at"
                        f" {end:,}; compare its MD5, and download it again"
                    )
                yield _Member(name, start + member.offset_data, member.size)
        if section.at(tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"archive {what} is cut off or damaged at byte {tar.offset:,}: its end mark is missing;"
                " compare its MD5, and download it again"
            )
    except (tarfile.TarError, RecursionError) as error:  # tarfile recurses through headers of headers
        raise UserError(f"archive {what} cannot be read: {_why_no_tar(section, str(error))}") from None
    except OSError as error:
        raise UserError(f"archive {what} cannot be read: {error.strerror}") from None


def _safe_name(what: str, name: str) -> str:
    """A member's path without './'; raises UserError for one that leads out of the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise UserError(f"archive {what} holds the name {name!r}, which leads out of it: refused")
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
