"""Which files a command line means: of the network, of its names, of the images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from caffe_jacinto.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

VAL_NAMES = ("val.prototxt", "test.prototxt", "train_val.prototxt")
"""What validation networks are called, here and by publishers; the first that is there counts."""


@dataclass(frozen=True)
class NetworkFiles:
    """The files of a trained network."""

    deploy: Path
    weights: Path
    val: Path
    base: Path
    """Where the relative paths in `val` begin."""

    folders: tuple[Path, ...]
    """Where a ``labels.txt`` may be, the nearest first."""


def network_files(place: Path, weights: Path | None, val: Path | None) -> NetworkFiles:
    """The files that ``place`` stands for: a run folder, a stage's folder in one, or, with ``weights``, a
    deploy prototxt.

    Of a run, the newest whole weights of its last stage that has any; a line on stderr where that stage is
    not finished.

    Raises:
        UserError: no such folder or file, a run without weights, or no validation network.
    """
    if place.is_dir():
        return _run_files(place, val)
    if weights is None:
        raise UserError(f"{place}: no run folder; with a deploy.prototxt give its .caffemodel too")
    return NetworkFiles(place, weights, val or _val_beside(place), Path(), (place.parent,))


def _run_files(place: Path, val: Path | None) -> NetworkFiles:
    from caffe_jacinto.runs import folder

    run, only = place, None
    if not (place / folder.RUN_FILE).exists() and (place.absolute().parent / folder.RUN_FILE).exists():
        run, only = place.absolute().parent, place.absolute().name
    record = folder.load(run)
    stages = [stage for stage in record.recipe.stages if only in (None, stage)]
    for stage in reversed(stages):
        here = place if only else run / stage
        weights = _newest_weights(here, f"{record.recipe.data.dataset}_{record.recipe.network.name}")
        if weights is not None:
            if record.stages[stage].state != "finished":
                print(f"stage {stage} is not finished; its newest weights: {weights.name}", file=sys.stderr)
            val = val or here / VAL_NAMES[0]
            return NetworkFiles(here / "deploy.prototxt", weights, val, Path(record.start_folder), (run,))
    what = f"stage {only} has no weights" if only else "no stage has weights yet"
    raise UserError(f"{place}: {what}; train it first (train --resume {run})")


def _newest_weights(stage: Path, name: str) -> Path | None:
    """The weight file of the most iterations that is whole."""
    from caffe_jacinto.caffemodel.blobs import mapped, stored_layers

    found = []
    for path in stage.glob("*.caffemodel"):
        iteration = path.stem.removeprefix(f"{name}_iter_")
        if iteration.isdecimal():
            found.append((int(iteration), path))
    for _, path in sorted(found, reverse=True):
        try:
            with mapped(path) as view:
                stored_layers(view, path)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
        else:
            return path
    return None


def _val_beside(deploy: Path) -> Path:
    """The validation network in the folder of ``deploy``."""
    for name in VAL_NAMES:
        if (deploy.parent / name).is_file():
            return deploy.parent / name
    raise UserError(
        f"{deploy.parent}: no {', '.join(VAL_NAMES)} to take the preprocessing from; "
        "name the validation network with --val"
    )


def class_names(given: Path | None, folders: tuple[Path, ...], classes: int) -> tuple[str, ...]:
    """The names of the classes: of the file ``given``, or of the first of ``folders`` with a labels.txt;
    else none, and their numbers stand for them.

    Raises:
        UserError: the labels file is damaged, or ``given`` does not name as many classes as there are.
    """
    from caffe_jacinto.data.listing import read_labels

    path = given or next(
        (folder / "labels.txt" for folder in folders if (folder / "labels.txt").is_file()), None
    )
    if path is None:
        return ()
    names = read_labels(path)
    if len(names) == classes:
        return names
    wrong = f"{path} has {len(names)} names, and the network {classes} classes"
    if given:
        raise UserError(f"{wrong}; give the labels that it was trained with")
    print(f"{wrong}: classes are shown by their numbers", file=sys.stderr)
    return ()


def image_files(sources: list[Path]) -> list[Path]:
    """The files among ``sources``, and the images in the folders among them, sorted.

    Raises:
        UserError: a folder has no images.
    """
    paths = []
    for source in sources:
        if not source.is_dir():
            paths.append(source)
            continue
        inside = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
        if not inside:
            raise UserError(f"{source}: no images in this folder ({', '.join(IMAGE_ENDINGS)})")
        paths += inside
    return paths
