"""What is classified with: a deploy network, its weights, and the preprocessing of its validation network."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.encode import ImageForm
from caffe_jacinto.data.images import Forced, Transform
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import PACKAGES, parse_any_net


@dataclass(frozen=True)
class TrainedNetwork:
    """A deploy network without its closing softmax: its outputs are scores."""

    text: str
    where: Path
    dialect: Dialect
    weights: Path
    shape: tuple[int, int, int]
    """Of one input: channels, height, width."""


@dataclass(frozen=True)
class Preprocessing:
    """What the validation network does to images, and what it reads them from."""

    transform: Transform
    lmdb: Path | None
    """Of a Data layer."""

    file_form: ImageForm | None
    """Of an ImageData layer, which reads image files itself."""


def trained_network(deploy: Path, weights: Path) -> TrainedNetwork:
    """Read a deploy prototxt; a softmax at its end is left out, since accuracy compares scores.

    Raises:
        UserError: a file is missing, or the network has not one image input and one output.
    """
    from google.protobuf import text_format

    if not weights.is_file():
        raise UserError(f"{weights}: there is no such weight file; name a .caffemodel")
    net = parse_any_net(_text(deploy), str(deploy))
    if net.layer and net.layer[-1].type == "Softmax":
        del net.layer[-1]
    _check_one_output(net, deploy)
    dialect = next(d for d in Dialect if net.DESCRIPTOR.full_name.startswith(f"{PACKAGES[d]}."))
    return TrainedNetwork(text_format.MessageToString(net), deploy, dialect, weights, _shape(net, deploy))


def _check_one_output(net: Any, deploy: Path) -> None:
    outputs: dict[str, None] = {}
    for layer in messages_in(net, TEST):
        for blob in layer.bottom:
            outputs.pop(blob, None)
        outputs.update(dict.fromkeys(layer.top))
    if len(outputs) != 1:
        raise UserError(
            f"{deploy}: one output is needed, the scores of the classes; "
            f"the network has {len(outputs)} ({', '.join(outputs) or 'none'})"
        )


def _shape(net: Any, deploy: Path) -> tuple[int, int, int]:
    shapes = [list(shape.dim) for shape in net.input_shape]
    dims = list(net.input_dim)
    shapes += [dims[at : at + 4] for at in range(0, len(dims), 4)]
    shapes += [list(shape.dim) for layer in net.layer for shape in layer.input_param.shape]
    if len(shapes) != 1 or len(shapes[0]) != 4 or min(shapes[0]) < 1:
        raise UserError(f"{deploy}: a deploy network with one image input is needed, of four dimensions")
    return shapes[0][1], shapes[0][2], shapes[0][3]


def validation_preprocessing(val: Path, shape: tuple[int, int, int], base: Path) -> Preprocessing:
    """What the data layer of a val.prototxt does in the test phase.

    ``shape`` is that of the deploy network's input; relative paths in the file begin at ``base``.

    Raises:
        UserError: no such data layer, a crop that is not the deploy network's, or a bad mean.
    """
    net = parse_any_net(_text(val), str(val))
    kinds = ("Data", "ImageData")
    layer = next((layer for layer in messages_in(net, TEST) if layer.type in kinds), None)
    if layer is None:
        raise UserError(
            f"{val}: no Data or ImageData layer of the test phase to take the preprocessing from; "
            "name another file with --val"
        )
    images = layer.type == "ImageData"
    transform = _transform(layer.transform_param, shape, val, base, images=images)
    if images:
        size = _image_data_size(layer.image_data_param, val)
        form = ImageForm(*size, colour=layer.image_data_param.is_color, raw=True)
        return Preprocessing(transform, None, form)
    source = layer.data_param.source
    return Preprocessing(transform, base / source if source else None, None)


def _transform(
    settings: Any, shape: tuple[int, int, int], val: Path, base: Path, *, images: bool
) -> Transform:
    from caffe_jacinto.data.mean import read_mean

    if settings.crop_size and (settings.crop_size, settings.crop_size) != shape[1:]:
        raise UserError(
            f"{val}: crop_size is {settings.crop_size}, but the deploy network takes {shape[1]}x{shape[2]}; "
            "give the two files of one network"
        )
    if settings.force_color and settings.force_gray:
        raise UserError(f"{val}: has force_color and force_gray; Caffe takes one of them: remove the other")
    means = tuple(settings.mean_value)
    if means and settings.mean_file:
        raise UserError(f"{val}: has mean_file and mean_value; Caffe takes one of them: remove the other")
    if len(means) not in (0, 1, shape[0]):
        raise UserError(f"{val}: {len(means)} mean values for {shape[0]} channels; give one, or one for each")
    forced: Forced | None = "colour" if settings.force_color else "grey" if settings.force_gray else None
    return Transform(
        *shape,
        crop=bool(settings.crop_size),
        scale=settings.scale,
        mean_values=means,
        mean_image=read_mean(base / settings.mean_file) if settings.mean_file else None,
        forced=None if images else forced,
    )


def _image_data_size(settings: Any, val: Path) -> tuple[int, int]:
    """Width and height that an ImageData layer resizes to; zeros where it does not."""
    size = (settings.new_width, settings.new_height)
    if bool(size[0]) != bool(size[1]):
        raise UserError(f"{val}: new_height and new_width go together in Caffe; give both or none")
    return size


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name a prototxt") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: no prototxt; the deploy network comes first, then the weights") from None


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
    from caffe_jacinto.caffemodel.storage import mapped, stored_layers

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
