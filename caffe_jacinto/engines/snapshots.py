"""A stage's snapshots: which of them training can resume from, and whether the stage is complete.

Caffe writes a snapshot's two files one after the other, under their final names. After a kill either may be
cut off, or be left from an earlier attempt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.caffemodel.hdf5 import SUFFIX, is_hdf5, without_suffix
from caffe_jacinto.caffemodel.storage import (
    StoredLayer,
    StoredState,
    blob_values,
    mapped,
    read_weights,
    stored_layers,
    stored_state,
)
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json, read_text, sha256_of, write_whole
from caffe_jacinto.netspec.graph import shared_blobs
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_any_net, parse_net
from caffe_jacinto.pruning.pruner import MASKS_SUFFIX, load_masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


AVERAGE_SUFFIX = ".ema.caffemodel"
"""Of the averaged weights beside a snapshot's."""


def completion_record(final_weights: Path) -> Path:
    """The file that marks a stage complete, ``<prefix>_iter_N.handover.json``."""
    return without_suffix(final_weights).with_suffix(".handover.json")


def mark_complete(final_weights: Path, recalibrated_batches: int) -> None:
    """Record that the stage ended with exactly these weights, and the batches of their recalibration."""
    content = {"sha256": sha256_of(final_weights), "reestimated_batches": recalibrated_batches}
    write_whole(completion_record(final_weights), json.dumps(content, indent=1) + "\n")


def is_marked_complete(final_weights: Path) -> bool:
    """Whether there is a record of exactly these weights."""
    try:
        content = parse_json(completion_record(final_weights).read_text())
        return bool(content["sha256"] == sha256_of(final_weights))
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Snapshot:
    """A complete snapshot."""

    iteration: int
    caffemodel: Path
    solverstate: Path


class Skipped(NamedTuple):
    """A snapshot that training cannot resume from."""

    iteration: int
    reason: str


@dataclass(frozen=True)
class Survey:
    """The snapshots under a prefix, newest first."""

    complete: tuple[Snapshot, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class StartPoint:
    """The snapshot that a stage resumes from (None: it starts from the beginning), and newer ones skipped."""

    snapshot: Snapshot | None
    skipped: tuple[Skipped, ...]

    @property
    def iteration(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.iteration


def start_point(
    prefix: Path, dialect: Dialect, last: int, *, masks: bool = False, averaged_before: int = 0
) -> StartPoint:
    """The newest complete snapshot ``<prefix>_iter_N``, N up to ``last``, whose weights are all finite.

    ``masks``, ``averaged_before``: as for `survey`.
    """
    found = survey(prefix, dialect, masks=masks, averaged_before=averaged_before)
    skipped = list(found.skipped)
    for snapshot in found.complete:
        if snapshot.iteration > last:
            reason = f"it is beyond iteration {last}"
        elif not weights_are_finite(snapshot.caffemodel):
            reason = f"{snapshot.caffemodel} holds weights that are not numbers"
        else:
            return StartPoint(snapshot, tuple(s for s in skipped if s.iteration > snapshot.iteration))
        skipped.append(Skipped(snapshot.iteration, reason))
    return StartPoint(None, tuple(skipped))


def weights_are_finite(caffemodel: Path) -> bool:
    """Whether the file can be read and every weight in it is finite."""
    try:
        return layer_of_no_numbers(read_weights(caffemodel)) is None
    except UserError:
        return False


def layer_of_no_numbers(weights: Mapping[str, Iterable[NDArray[np.float32]]]) -> str | None:
    """The first layer with a weight that is not finite, if there is one."""
    import numpy as np

    wrong = (name for name, blobs in weights.items() if any(not np.isfinite(blob).all() for blob in blobs))
    return next(wrong, None)


def no_numbers(layer: str) -> str:
    """That weights of ``layer`` are not numbers, and what may help."""
    return f"weights of layer {layer} are not numbers; try a lower base_lr, or clip_gradients"


def spoiled_snapshots(prefix: Path, dialect: Dialect) -> list[int]:
    """The iterations of complete snapshots with weights that are not finite, oldest first."""
    return sorted(
        snapshot.iteration
        for snapshot in complete_snapshots(prefix, dialect)
        if not weights_are_finite(snapshot.caffemodel)
    )


def complete_snapshots(
    prefix: Path, dialect: Dialect, *, masks: bool = False, averaged_before: int = 0
) -> list[Snapshot]:
    """The snapshots ``<prefix>_iter_N`` whose files are complete and belong together, newest first."""
    return list(survey(prefix, dialect, masks=masks, averaged_before=averaged_before).complete)


def survey(prefix: Path, dialect: Dialect, *, masks: bool = False, averaged_before: int = 0) -> Survey:
    """All snapshots ``<prefix>_iter_N``: those that training can resume from, and those that it cannot.

    ``masks``: the stage holds zeros, and a snapshot is usable only with its pruning masks. If any of the
    snapshots has masks, all need theirs.

    ``averaged_before``: a snapshot before this iteration is usable only with its averaged weights. After the
    last iteration of a stage that averages, the weights are the average already.
    """
    name = re.compile(re.escape(prefix.name) + r"_iter_(\d+)\.(?:caffemodel|solverstate)(?:\.h5)?")
    folder = prefix.parent
    found = [name.fullmatch(file.name) for file in folder.iterdir()] if folder.is_dir() else []
    # A stage that holds zeros writes the masks of each snapshot before its other files.
    masks = masks or any(folder.glob(f"{_glob_literal(prefix.name)}_iter_*{MASKS_SUFFIX}"))
    complete, skipped = [], []
    for iteration in sorted({int(match[1]) for match in found if match}, reverse=True):
        binary = folder / f"{prefix.name}_iter_{iteration}.caffemodel"
        in_hdf5 = binary.with_name(f"{binary.name}{SUFFIX}")
        try:
            caffemodel = binary if binary.is_file() or not in_hdf5.is_file() else in_hdf5
            snapshot = _checked(iteration, caffemodel, dialect)
            if masks:
                _check_masks(caffemodel)
            if iteration < averaged_before:
                _check_average(caffemodel)
            complete.append(snapshot)
        except UserError as error:
            skipped.append(Skipped(iteration, str(error)))
    return Survey(tuple(complete), tuple(skipped))


def final_is_complete(final_weights: Path, dialect: Dialect) -> bool:
    """Whether ``<prefix>_iter_N.caffemodel`` and its solver state exist and are complete."""
    try:
        _checked(iteration_of(final_weights), final_weights, dialect)
    except UserError:
        return False
    return True


def iteration_of(snapshot: Path) -> int:
    """N of ``<prefix>_iter_N.caffemodel``.

    Raises:
        UserError: the file name does not have this form.
    """
    match = re.fullmatch(r".*_iter_(\d+)", without_suffix(snapshot).stem)
    if match is None:
        raise UserError(f"{snapshot}: not named as a snapshot, <prefix>_iter_N{snapshot.suffix}")
    return int(match[1])


def _checked(iteration: int, caffemodel: Path, dialect: Dialect) -> Snapshot:
    solverstate = without_suffix(caffemodel).with_suffix(".solverstate")
    if is_hdf5(caffemodel):
        solverstate = solverstate.with_name(f"{solverstate.name}{SUFFIX}")
    for file in (caffemodel, solverstate):
        if not file.is_file():
            raise UserError(f"{file} is missing")
    state = stored_state(solverstate)
    if state.iteration != iteration:
        raise UserError(f"{solverstate} records iteration {state.iteration}, not {iteration}")
    if Path(state.learned_net).name != caffemodel.name:
        raise UserError(f"{solverstate} belongs to {state.learned_net}")
    with mapped(caffemodel) as view:
        layers = stored_layers(view, caffemodel)
    if dialect is Dialect.BVLC:
        weights = [blob.shape for layer in layers for blob in layer.blobs]
        ordered = not is_hdf5(caffemodel)  # nothing says in which order the layers of an HDF5 file are
        if not _same_shapes(weights, state, ordered=ordered) and not _same_shapes(
            own_shapes(caffemodel, layers), state, ordered=ordered
        ):
            raise UserError(f"{solverstate} belongs to a different network than {caffemodel}")
    else:
        _check_against_network(caffemodel, dialect)
    return Snapshot(iteration, caffemodel, solverstate)


def _check_masks(caffemodel: Path) -> None:
    """Refuse a snapshot whose masks are missing, damaged or of other weights."""
    with mapped(caffemodel) as view:
        first = {layer.name: layer.blobs[0] for layer in stored_layers(view, caffemodel)}
        # The weights of what counts have at least two axes: outputs, inputs.
        weights = {name: blob_values(view, blob) for name, blob in first.items() if len(blob.shape) > 1}
        load_masks(caffemodel, weights)


def _check_average(caffemodel: Path) -> None:
    """Refuse a snapshot whose averaged weights are missing, damaged or of another network."""
    path = without_suffix(caffemodel).with_suffix(AVERAGE_SUFFIX)
    if not path.is_file():
        raise UserError(f"{path} is missing")
    shapes = []
    for file in (path, caffemodel):
        with mapped(file) as view:
            layers = stored_layers(view, file)
            shapes.append({layer.name: [blob.shape for blob in layer.blobs] for layer in layers})
    average, weights = shapes
    for name, blobs in weights.items():
        if name not in average:
            raise UserError(f"{path}: lacks layer {name}")
        if average[name][: len(blobs)] != blobs:  # a file in HDF5 has blobs that layers share once
            raise UserError(f"{path}: layer {name} has other shapes than in {caffemodel}")


def _check_against_network(caffemodel: Path, dialect: Dialect) -> None:
    """Refuse weights that do not fill the train.prototxt beside them, where there is one.

    The layout of the fork's history is not known well enough to compare the weights with it, and a file cut
    off right after a layer can still be parsed.
    """
    net = caffemodel.parent / "train.prototxt"
    if net.is_file():
        mismatches = check_fit(caffemodel, parse_net(read_text(net), dialect, str(net)))
        if mismatches:
            raise UserError(f"{caffemodel} does not fill {net}: {mismatches[0]}")


def own_shapes(caffemodel: Path, layers: Sequence[StoredLayer]) -> list[tuple[int, ...]]:
    """The shapes of a snapshot's blobs, in order, each one that layers share (``param.name``) once.

    The solver keeps one history of it. Which ones are shared is in the train.prototxt beside the snapshot.
    """
    path = caffemodel.parent / "train.prototxt"
    shared = shared_blobs(parse_any_net(read_text(path), str(path))) if path.is_file() else {}
    return [
        blob.shape
        for layer in layers
        for index, blob in enumerate(layer.blobs)
        if index not in shared.get(layer.name, {})
    ]


def _same_shapes(weights: list[tuple[int, ...]], state: StoredState, *, ordered: bool) -> bool:
    """Whether the history has these shapes once (SGD) or several times (Adam: two moments)."""
    history = [blob.shape for blob in state.history]
    times, rest = divmod(len(history), len(weights))
    expected = weights * times
    return rest == 0 and (history == expected if ordered else sorted(history) == sorted(expected))


def _glob_literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
