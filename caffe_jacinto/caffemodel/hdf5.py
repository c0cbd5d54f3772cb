"""Caffe's HDF5 files, ``.caffemodel.h5`` and ``.solverstate.h5``: read as the binary form, and written.

Weights are the datasets ``data/<layer>/<index>``, without the types of the layers, and without a blob that
the network takes from an earlier layer (Net::ToHDF5 of Caffe's net.cpp). A solver state has the datasets
``iter``, ``current_step``, ``learned_net`` and ``history/<index>`` (SGDSolver::SnapshotSolverStateToHDF5).
Layers come in the order of their places in the file: nearly always that in which they were written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.wire import (
    LAYER_BLOBS,
    NET_LAYER,
    STATE_HISTORY,
    STATE_PLACE,
    STATE_RANGES,
    Part,
    array_parts,
    field_parts,
)
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import replacing
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

START = b"\x89HDF\r\n\x1a\n"
"""The first bytes of an HDF5 file."""

SUFFIX = ".h5"

_OWN = {STATE_PLACE: "caffe_jacinto_place", STATE_RANGES: "caffe_jacinto_ranges"}
"""Datasets of our own in solver states, which Caffe passes over, for those fields of the binary form."""

_MOST_AXES = 32
"""Of Caffe's blobs (kMaxBlobAxes)."""

_MOST_COMPRESSION = 1032
"""No file of deflated numbers holds more times its own size (zlib's technical details)."""

_MOST_DEPTH = 20


def is_hdf5(path: Path) -> bool:
    """Whether ``path`` is a file that begins as HDF5 files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(START)) == START
    except OSError:
        return False


def without_suffix(path: Path) -> Path:
    """``path`` without the ``.h5`` that follows ``.caffemodel`` or ``.solverstate``."""
    return path.with_suffix("") if path.suffix == SUFFIX else path


def binary_form(path: Path) -> bytes:
    """The weight file or solver state at ``path`` in Caffe's binary form.

    A blob that the file leaves out before another one of its layer is one without shape and numbers. Batch
    norms, which are known by their blobs, have their type; other layers have none.

    Raises:
        UserError: it cannot be read, is damaged, or is another kind of HDF5 file.
    """
    try:
        with _opened(path) as file:
            if "data" in file:
                return b"".join(_weights(file, path))
            if "history" in file:
                return b"".join(_state(file, path))
            found = ", ".join(sorted(file)[:5]) or "nothing"
    except MemoryError:
        raise UserError(f"{path}: its numbers do not fit into memory") from None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, str(UserError(error))) from None
    raise UserError(
        f"{path}: an HDF5 file, but not one of Caffe's, which have a group data (weights) or history (solver "
        f"states); it has {found}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import h5py

    # Caffe locks nothing either; another process may read the file at the same time.
    with h5py.File(path, "r", locking=False) as file:
        yield file


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: an HDF5 file that is damaged or cut off ({why}); use another one")


def _weights(file: Any, path: Path) -> Iterator[Part]:
    for name, blobs in _layers(file["data"], path):
        layer = messages(Dialect.BVLC).NetParameter().layer.add(name=name)
        if _is_batch_norm([blob.shape for blob in blobs.values()]):
            layer.type = "BatchNorm"
        content: list[Part] = [layer.SerializeToString()]
        for index in range(max(blobs, default=-1) + 1):
            values = _values(blobs[index], path) if index in blobs else None
            content += field_parts(LAYER_BLOBS, [] if values is None else array_parts(values))
        yield from field_parts(NET_LAYER, content)


def _state(file: Any, path: Path) -> Iterator[Part]:
    state = messages(Dialect.BVLC).SolverState(
        iter=_whole_number(file, "iter", path), current_step=_whole_number(file, "current_step", path)
    )
    if "learned_net" in file:
        state.learned_net = _text(file["learned_net"]).decode(errors="replace")
    yield state.SerializeToString()
    history = dict(_numbered(file["history"], path))
    if sorted(history) != list(range(len(history))):
        raise _damaged(path, "its history is not complete")
    for index in range(len(history)):
        yield from field_parts(STATE_HISTORY, array_parts(_values(history[index], path)))
    for number, name in _OWN.items():
        if name in file:
            yield from field_parts(number, [_text(file[name])])


def _layers(data: Any, path: Path) -> list[tuple[str, dict[int, Any]]]:
    """Each layer's name and datasets, in the order of the file; a ``/`` in a name made a group in a group."""
    import h5py

    found: list[tuple[int, str, dict[int, Any]]] = []

    def add(group: Any, name: str, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise _damaged(path, "groups in groups without end")
        for key in group:
            # A link to another place or another file could lead anywhere.
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise _damaged(path, f"{name}/{key} is not a group of its own")
            if isinstance(group[key], h5py.Group):
                layer = f"{name}/{key}" if name else key
                blobs = dict(_numbered(group[key], path))
                found.append((h5py.h5o.get_info(group[key].id).addr, layer, blobs))
                add(group[key], layer, depth + 1)

    add(data, "", 0)
    return [(name, blobs) for _, name, blobs in sorted(found, key=lambda item: item[0])]


def _numbered(group: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """The datasets of ``group`` by their numbers."""
    import h5py

    for key in group:
        link = group.get(key, getlink=True)
        if not (key.isascii() and key.isdecimal()):
            continue
        if not isinstance(link, h5py.HardLink) or not isinstance(group[key], h5py.Dataset):
            raise _damaged(path, f"{group.name}/{key} is not a dataset")
        if int(key) > 1000 and len(group) <= int(key):
            raise _damaged(path, f"{group.name} has a dataset {key}, and not those before it")
        yield int(key), group[key]


def _values(dataset: Any, path: Path) -> Values:
    """The numbers of a dataset, which Caffe converts to float."""
    import numpy as np

    shape = dataset.shape
    if shape is None or len(shape) > _MOST_AXES or dataset.dtype.kind not in "iuf" or dataset.external:
        raise _damaged(path, f"{dataset.name} is not a blob of numbers")
    size = prod(shape) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    if size > stored * (1 if dataset.chunks is None else _MOST_COMPRESSION) or stored > path.stat().st_size:
        raise _damaged(path, f"{dataset.name} has not all of its numbers")
    return np.asarray(dataset[()], np.float32)


def _whole_number(file: Any, name: str, path: Path) -> int:
    dataset = file[name]
    if dataset.size != 1 or dataset.dtype.kind not in "iu":
        raise _damaged(path, f"{name} is not a number")
    value = int(dataset[()].item() if dataset.shape == () else dataset[0])
    if not 0 <= value < 1 << 31:
        raise _damaged(path, f"{name} is {value}")
    return value


def _text(dataset: Any) -> bytes:
    return bytes(dataset[()]).partition(b"\0")[0]


def _is_batch_norm(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether these are the shapes of mean, variance and factor; in the fork also scale and bias."""
    if len(shapes) not in (3, 5):
        return False
    sizes = [prod(shape) for shape in shapes]
    channels = shapes[0]
    per_channel = len(channels) == 1 or (channels[:1] == (1,) and channels[2:] in ((), (1, 1)))
    return per_channel and sizes == [sizes[0], sizes[0], 1, *[sizes[0]] * (len(sizes) - 3)]


def unwritable_layer(names: Sequence[str]) -> str | None:
    """What keeps Caffe from reading the weights of layers with these names from HDF5; None if it can.

    Caffe makes a group of each name, and a name with a ``/`` becomes one in the group of another layer, where
    Caffe takes it for a blob too many.
    """
    for name in names:
        if not name or "/" in name or name == ".":
            return f"layer {name!r}, of whose name HDF5 makes groups that Caffe cannot read; rename it"
    twice = next((name for name in names if names.count(name) > 1), None)
    return None if twice is None else f"two layers {twice!r}; rename one"


def write_weights(
    path: Path,
    layers: Mapping[str, Mapping[int, Values]],
    diffs: Mapping[str, Sequence[Values]] | None = None,
) -> None:
    """Write the blobs of each layer by their indices, whole or not at all.

    ``diffs``: the last update of every blob of each layer, shared ones included, which Caffe writes into a
    group of their own (snapshot_diff).
    """
    with _new(path) as file:
        _write_blobs(file.create_group("data"), layers)
        if diffs is not None:
            _write_blobs(
                file.create_group("diff"), {name: dict(enumerate(blobs)) for name, blobs in diffs.items()}
            )


def _write_blobs(group: Any, layers: Mapping[str, Mapping[int, Values]]) -> None:
    for name, blobs in layers.items():
        layer = group.create_group(name)
        for index, values in blobs.items():
            layer.create_dataset(str(index), data=values, dtype="<f4")


def write_state(
    path: Path,
    *,
    iteration: int,
    current_step: int,
    learned_net: str,
    history: Sequence[Values],
    own: Mapping[int, bytes],
) -> None:
    """Write a solver state, whole or not at all; ``own``: the contents of our fields by their numbers."""
    import numpy as np

    with _new(path) as file:
        for name, number in (("iter", iteration), ("current_step", current_step)):
            file.create_dataset(name, data=np.array([number], "<i4"))
        texts = {"learned_net": learned_net.encode(), **{_OWN[number]: text for number, text in own.items()}}
        for name, content in texts.items():
            # Caffe reads to the byte 0 that ends a string.
            file.create_dataset(name, data=np.array(content, f"S{len(content) + 1}"))
        group = file.create_group("history")
        for index, values in enumerate(history):
            group.create_dataset(str(index), data=values, dtype="<f4")


@contextmanager
def _new(path: Path) -> Iterator[Any]:
    """A new HDF5 file of the oldest form, which every Caffe's library reads."""
    import h5py

    with replacing(path) as (_, beside), h5py.File(beside, "w", libver="earliest", locking=False) as file:
        yield file
