"""Images inside tar archives, which are not unpacked: the place and the label of each.

Archives are laid out like ILSVRC 2012's:

    ILSVRC2012_img_train.tar    a tar of tars, n01440764.tar and so on, each with the images of one class
    ILSVRC2012_img_val.tar      all images side by side; their labels come from elsewhere
    any.tar                     class folders with images, <class>/*.JPEG, also below one folder

The images are those of the unpacked archive. Only the headers are read, once. Compressed archives are
refused, since they cannot be read from the middle.
"""

from __future__ import annotations

import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of, image_progress
from caffe_jacinto.data.index import Archive, ImageIndex, IndexBuilder, why_not_found
from caffe_jacinto.data.listing import and_others, class_labels, is_hidden, is_image_name, list_lines
from caffe_jacinto.data.tar_files import TarFile, TarFiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MEGABYTE = 10**6


def list_class_archive(path: Path, names: tuple[str, ...] | None = None) -> ImageIndex:
    """The images of an archive with classes, as `list_class_folders` lists the same images unpacked.

    Raises:
        UserError: the file is not a tar archive, is compressed or cut off, has names that lead out of it, or
            has no classes; or as `class_labels`.
    """
    contents = _Contents(path)
    index, folders = contents.images()
    if not any(folders):
        raise UserError(
            f"archive {path} holds {count_of(len(index), 'image')} directly and no classes: give the"
            " development kit (--devkit) or a list file (--list) with their labels"
        )
    start, classes = _class_names(path, folders)
    empty = contents.folders_in(start) - set(classes)
    found = sorted({name for name in classes if name} | empty)
    labels = class_labels(found, names, f"archive {path}, class ")
    if empty and names is None:
        first = min(empty)
        raise UserError(
            f"archive {path}, class {first} holds no images{and_others(sorted(empty))}: is it whole?"
        )
    ranks = {name: rank for rank, name in enumerate(found)}
    numbers = _by_class(index, [ranks.get(name, -1) for name in classes])
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
    index, _ = _Contents(path).images()
    numbers = sorted(range(len(index)), key=index.path)
    return index.relabelled(numbers, [0] * len(numbers), None, "an archive")


def list_from_archive(path: Path, list_file: Path, names: tuple[str, ...] | None = None) -> ImageIndex:
    """The files of an archive that ``list_file`` names, in its order, with its labels.

    Raises:
        UserError: as `list_from_file` and `list_class_archive`; or an image is not there.
    """
    contents = _Contents(path)
    build = IndexBuilder(contents.archive)
    kinds: Counter[str] = Counter()
    for line, (name, label) in list_lines(list_file, names):
        file = contents.find(name)
        if file is None:
            raise UserError(
                f"{list_file}:{line}: archive {path} holds no image {os.fsdecode(name)!r}"
                f"{why_not_found(name)}"
            )
        kinds[file.kind] += 1
        # The name as the list has it, "./" and all: it becomes the key, as with files.
        build.add(name, label, file.offset, file.size)
    return build.index(names, f"list {list_file}", 0, _remarks(kinds))


class _Contents:
    """The files of an archive, and of each archive in it, which is extracted to a folder of its name.

    Raises:
        UserError: as `TarFiles`.
    """

    def __init__(self, path: Path) -> None:
        self.archive = Archive(path)
        size = self.archive.size
        with image_progress(f"reading {path.name}", size // MEGABYTE, unit="MB") as advance:
            done = 0

            def reached(place: int) -> None:
                nonlocal done
                advance(max(place // MEGABYTE - done, 0))
                done = max(place // MEGABYTE, done)

            self._outer = TarFiles(self.archive, f"{path}", 0, size, reached)
            self._inner: dict[str, list[TarFiles]] = {}
            for file in self._outer:
                name = os.fsdecode(file.path)
                if name.endswith(".tar") and not _is_hidden(file.path):
                    what = f"{path}, {name}"
                    if file.offset < 0:
                        reason = "it is a sparse file" if file.size else "it is a broken link, or not a file"
                        raise UserError(f"archive {what} cannot be read: {reason}; extract it with tar")
                    inner = TarFiles(self.archive, what, file.offset, file.size, reached)
                    folder = posixpath.basename(name).removesuffix(".tar")
                    self._inner.setdefault(folder, []).append(inner)

    def images(self) -> tuple[ImageIndex, list[str]]:
        """The images in the archive's order, each labelled with its folder's number, and these folders."""
        build = IndexBuilder(self.archive)
        folders: dict[str, int] = {}
        kinds: Counter[str] = Counter()
        ignored = hidden = 0
        for file in self._files():
            if _is_hidden(file.path):
                hidden += 1
                continue
            name = os.fsdecode(file.path)
            if not is_image_name(name):
                ignored += 1
                continue
            label = folders.setdefault(posixpath.dirname(name), len(folders))
            kinds[file.kind] += 1
            build.add(file.path, label, file.offset, file.size)
        if not len(build):
            raise UserError(
                f"archive {self.archive.path} holds no images; one like ILSVRC2012_img_train.tar is expected"
            )
        parts = [self._outer, *itertools.chain.from_iterable(self._inner.values())]
        replaced, broken = sum(part.replaced for part in parts), sum(part.broken for part in parts)
        remarks = _remarks(kinds, hidden, replaced, broken)
        return build.index(None, "", ignored, remarks), list(folders)

    def folders_in(self, start: str) -> set[str]:
        """The names of the folders directly in ``start`` (``''``, or with a slash at its end)."""
        folders = {os.fsdecode(folder) for folder in self._outer.folders if not _is_hidden(folder)}
        names = {folder[len(start) :] for folder in folders | set(self._inner) if folder.startswith(start)}
        return {name for name in names if name and "/" not in name}

    def find(self, path: bytes) -> TarFile | None:
        """The file ``path``, through links."""
        found = self._outer.find(path)
        if found is None:
            folder, _, name = path.removeprefix(b"./").partition(b"/")
            for inner in self._inner.get(os.fsdecode(folder), []):
                found = inner.find(name) or inner.find(path) or found
        return found

    def _files(self) -> Iterator[TarFile]:
        """All files but the archives; those in an archive as ``<its name>/<name>``."""
        for file in self._outer:
            if not file.path.endswith(b".tar") or _is_hidden(file.path):
                yield file
        for folder, inners in self._inner.items():
            start = os.fsencode(f"{folder}/")
            for file in itertools.chain.from_iterable(inners):
                yield file._replace(path=start + file.path.removeprefix(start))


def _is_hidden(path: bytes) -> bool:
    if not (
        path.startswith(b".") or b"/." in path or b"__MACOSX" in path
    ):  # Quickly, for nearly all of them.
        return False
    return any(is_hidden(os.fsdecode(part)) for part in path.split(b"/"))


def _remarks(kinds: Counter[str], hidden: int = 0, replaced: int = 0, broken: int = 0) -> tuple[str, ...]:
    """What the user should know of unusual members; ``kinds`` counts the images by `TarFile.kind`."""
    usual = ("hard link", "symbolic link", "sparse file")
    taken = [count_of(kinds[kind], kind) for kind in usual if kinds[kind]]
    left_out = [
        text
        for count, text in (
            (hidden, count_of(hidden, "hidden file")),
            (replaced, f"{count_of(replaced, 'file')} with a name that comes again later"),
            (broken, f"{count_of(broken, 'hard link')} to files that it does not hold"),
        )
        if count
    ]
    lines = (("among the images", taken), ("left out", left_out))
    return tuple(f"{what}: {', '.join(items)}" for what, items in lines if items)


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
