"""A trained network (of a run, or a deploy prototxt with weights), its preprocessing, and its images."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json, read_text
from caffe_jacinto.data.datum import Transform, datum_pixels, parse_datum
from caffe_jacinto.data.encode import JPEG_START, ImageForm, form_of, image_record, read_content
from caffe_jacinto.data.index import UnreadableImageError
from caffe_jacinto.data.lmdb_reader import LmdbReader
from caffe_jacinto.netspec.graph import TEST, messages_in, nodes_of, output_blobs
from caffe_jacinto.netspec.shapes import layer_shapes
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import PACKAGES, parse_any_net, parse_any_solver
from caffe_jacinto.prototxt.solver import TEST as TEST_PHASE
from caffe_jacinto.recipes.rules import RESERVED_STAGE_NAMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VAL_NAMES = ("val.prototxt", "test.prototxt", "train_val.prototxt")
"""What validation networks are called, here and by publishers; the first one found is taken."""

VAL_OPTION = "--val"
"""What names another one, in most commands."""


# ------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class TrainedNetwork:
    """A deploy network without its final softmax: its outputs are scores."""

    text: str
    where: Path
    dialect: Dialect
    weights: Path
    shape: tuple[int, int, int]
    """Of one input: channels, height, width."""


def trained_network(deploy: Path, weights: Path) -> TrainedNetwork:
    """Read a deploy prototxt; a softmax at its end is left out, since accuracy compares scores.

    Raises:
        UserError: a file is missing, or the network does not have one image input and one output.
    """
    from google.protobuf import text_format

    if not weights.is_file():
        raise UserError(f"{weights}: there is no such weight file; give a .caffemodel")
    net = parse_any_net(read_text(deploy, "the deploy.prototxt comes first, then the weights"), str(deploy))
    if net.layer and net.layer[-1].type == "Softmax":
        del net.layer[-1]
    _check_one_output(net, deploy)
    dialect = next(d for d in Dialect if net.DESCRIPTOR.full_name.startswith(f"{PACKAGES[d]}."))
    return TrainedNetwork(text_format.MessageToString(net), deploy, dialect, weights, _shape(net, deploy))


def _check_one_output(net: Any, deploy: Path) -> None:
    outputs = output_blobs(nodes_of(messages_in(net, TEST)))
    if len(outputs) != 1:
        raise UserError(
            f"{deploy}: a network with one output is needed, the scores of the classes; this one has"
            f" {len(outputs)} ({', '.join(outputs) or 'none'})"
        )


def why_no_scores(network: TrainedNetwork) -> str | None:
    """Why the network's output is not the scores of classes, as far as its prototxt says; None if it is."""
    shaped = layer_shapes(tree.parse(network.text, str(network.where)), phase=TEST)
    (output,) = output_blobs(nodes_of(found.layer for found in shaped))
    last = next(found for found in reversed(shaped) if output in found.layer.strings("top"))
    if last.kind == "ArgMax":
        return (
            f"its output is the classes that {last.layer.string('name')} (ArgMax) chooses, not their scores"
        )
    shape = last.tops[last.layer.strings("top").index(output)]
    if shape is not None and prod(shape[2:]) != 1:
        return f"its output is {'x'.join(map(str, shape[1:]))} for an image, not the scores of classes"
    return None


def _shape(net: Any, deploy: Path) -> tuple[int, int, int]:
    shapes = [list(shape.dim) for layer in net.layer for shape in layer.input_param.shape]
    if len(shapes) != 1 or len(shapes[0]) != 4 or min(shapes[0]) < 1:
        raise UserError(f"{deploy}: a deploy network needs one image input with four dimensions")
    return shapes[0][1], shapes[0][2], shapes[0][3]


@dataclass(frozen=True)
class NetworkFiles:
    """The files of a trained network."""

    deploy: Path
    weights: Path
    val: Path
    base: Path
    """The folder that relative paths in ``val`` are relative to."""

    folders: tuple[Path, ...]
    """Where a ``labels.txt`` may be, the nearest first."""


def network_files(
    place: Path, weights: Path | None, val: Path | None, option: str = VAL_OPTION
) -> NetworkFiles:
    """The files of ``place``: a run folder, a stage's folder in one, or, with ``weights``, a deploy prototxt.

    Of a run they are the newest complete weights of the last stage that has any; a line on stderr says so
    where that stage is not finished. ``option`` is the one that names ``val``, for messages.

    Raises:
        UserError: a missing folder or file, a run without weights, or no validation network.
    """
    if place.is_dir():
        return _run_files(place, val)
    if weights is None:
        raise UserError(f"{place}: not a run folder; give a deploy.prototxt together with its .caffemodel")
    return NetworkFiles(place, weights, val or _val_beside(place, option), Path(), (place.parent,))


def _run_files(place: Path, val: Path | None) -> NetworkFiles:
    from caffe_jacinto.logs.discover import RUN_RECORD

    run, only = place, None
    if not (place / RUN_RECORD).exists() and (place.absolute().parent / RUN_RECORD).exists():
        run, only = place.absolute().parent, place.absolute().name
    record = _read_run(run / RUN_RECORD)
    for stage, state in reversed(record.states.items()):
        if only not in (None, stage):
            continue
        here = place if only else run / stage
        weights = _newest_weights(here, record.prefix)
        if weights is not None:
            if state != "finished":
                print(f"stage {stage} is not finished; its newest weights: {weights.name}", file=sys.stderr)
            return NetworkFiles(
                here / "deploy.prototxt", weights, val or here / VAL_NAMES[0], record.base, (run,)
            )
    what = f"stage {only} has no weights" if only else "no stage has weights yet"
    if only in RESERVED_STAGE_NAMES:
        raise UserError(f"{place}: is the test of the run, which has no weights of its own; give {run}")
    command = shlex.join(["python", "-m", "caffe_jacinto.train", "--resume", str(run)])
    raise UserError(f"{place}: {what}; train it first: {command}")


class _Run(NamedTuple):
    """What is needed of a run.json."""

    prefix: str
    """Of the names of weight files, before ``_iter_N``."""

    base: Path
    """Where training was started; relative paths in the run's files are relative to it."""

    states: dict[str, str]
    """The state of each training stage, in their order."""


def _read_run(path: Path) -> _Run:
    try:
        record = parse_json(path.read_bytes())
        recipe = record["recipe"]
        return _Run(
            f"{recipe['data']['dataset']}_{recipe['network']['name']}",
            Path(record["start_folder"]),
            {stage: str(record["stages"].get(stage, {}).get("state")) for stage in recipe["stages"]},
        )
    except FileNotFoundError:
        inside = sorted(found.parent for found in path.parent.glob(f"*/{path.name}"))
        give = f"one of those in it, like {inside[-1]}" if inside else "the folder that train printed"
        raise UserError(f"{path.parent}: holds no run (no {path.name}); give {give}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged, or of another version of caffe_jacinto") from None


def _newest_weights(stage: Path, prefix: str) -> Path | None:
    """The complete weight file of the highest iteration."""
    from caffe_jacinto.caffemodel.hdf5 import SUFFIX, without_suffix
    from caffe_jacinto.caffemodel.storage import mapped, stored_layers

    found = []
    for path in (*stage.glob("*.caffemodel"), *stage.glob(f"*.caffemodel{SUFFIX}")):
        iteration = without_suffix(path).stem.removeprefix(f"{prefix}_iter_")
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


def _val_beside(deploy: Path, option: str) -> Path:
    """The validation network in the folder of ``deploy``."""
    for name in VAL_NAMES:
        if (deploy.parent / name).is_file():
            return deploy.parent / name
    raise UserError(
        f"{deploy.parent}: no {', '.join(VAL_NAMES)} to take the preprocessing from;"
        f" name the validation network with {option}"
    )


def class_names(given: Path | None, folders: tuple[Path, ...], classes: int) -> tuple[str, ...]:
    """The class names in the file ``given``, or in the first labels.txt in ``folders``; else none.

    Raises:
        UserError: the labels file is damaged, or ``given`` does not name as many classes as there are.
    """
    from caffe_jacinto.data.listing import LABELS, read_labels

    beside = (folder / LABELS for folder in folders)
    path = given or next((path for path in beside if path.is_file()), None)
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


# ------------------------------------------------------------------------------------- its preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """What the validation network does to images, and where it reads them from."""

    transform: Transform
    shape: tuple[int, int, int]
    """Of the network's input: channels, height, width."""

    lmdb: Path | None = None
    """Of a Data layer."""

    file_form: ImageForm | None = None
    """Of an ImageData layer, which reads image files itself."""

    def input_of(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """The network's input for an image's ``pixels``: cropped in the middle, not mirrored.

        Raises:
            UnreadableImageError: the image does not fit the network's input or the mean image.
        """
        (channels, height, width), crop = pixels.shape, self.transform.crop
        large_enough = height >= self.shape[1] and width >= self.shape[2]
        if channels != self.shape[0] or not (large_enough if crop else (height, width) == self.shape[1:]):
            why = ", and the validation network does not crop" if large_enough and not crop else ""
            sizes = ["x".join(map(str, shape)) for shape in (pixels.shape, self.shape)]
            raise UnreadableImageError(
                f"it is {sizes[0]}, the network takes {sizes[1]} (channels x height x width){why}"
            )
        return self.transform.apply(pixels, self.transform.window(height, width))


def validation_preprocessing(
    val: Path, shape: tuple[int, int, int], base: Path, option: str = VAL_OPTION
) -> Preprocessing:
    """What the data layer of a val.prototxt does in the test phase.

    ``shape`` is that of the deploy network's input; relative paths in the file are relative to ``base``;
    ``option`` is the one that names ``val``, for messages.

    Raises:
        UserError: no such data layer, a crop that is not the deploy network's, or an unusable mean.
    """
    from caffe_jacinto.data.batches import read_transform

    net = parse_any_net(read_text(val, f"name the validation network with {option}"), str(val))
    layer = _tested_data(net, val)
    if layer is None:
        raise UserError(
            f"{val}: no Data or ImageData layer of the test phase to take the preprocessing from;"
            f" name another file with {option}"
        )
    transform = read_transform(layer.transform_param, str(val), base=base)
    if transform.crop and (transform.crop, transform.crop) != shape[1:]:
        raise UserError(
            f"{val}: crop_size is {transform.crop}, but the deploy network takes {shape[1]}x{shape[2]};"
            " give the two files of one network"
        )
    if transform.mean_image is None:
        try:
            transform.mean_for(shape)
        except UnreadableImageError as error:
            raise UserError(f"{val}: {error}") from None
    if layer.type == "ImageData":
        form = _image_data_form(layer.image_data_param, val)
        return Preprocessing(replace(transform, colour=None), shape, file_form=form)
    source = layer.data_param.source
    return Preprocessing(transform, shape, base / source if source else None)


def as_tested(net: Any, val: Path) -> Any:
    """The NetParameter message of ``val``, in the state of its test, or of the first of several.

    That is the first ``test_state`` of the solver beside it, which gives a level and stages.
    """
    solver, states = val.parent / "solver.prototxt", []
    if solver.is_file():
        with suppress(UserError):  # it may be another network's, and of any form
            states = list(parse_any_solver(read_text(solver), str(solver)).test_state)
    found = type(net)()
    found.CopyFrom(net)
    for state in states[:1]:
        found.state.level = state.level
        found.state.stage.extend(state.stage)
    return found


def _tested_data(net: Any, val: Path) -> Any | None:
    """The layer that reads the images of a test; where no solver says which, the first for any test."""
    for_tests = [layer for layer in net.layer if any(rule.phase == TEST_PHASE for rule in layer.include)]
    found = [*messages_in(as_tested(net, val), TEST), *for_tests]
    return next((layer for layer in found if layer.type in ("Data", "ImageData")), None)


def _image_data_form(settings: Any, val: Path) -> ImageForm:
    """The form to which an ImageData layer brings its files; its size is 0 where it does not resize."""
    size = (settings.new_width, settings.new_height)
    if bool(size[0]) != bool(size[1]):
        raise UserError(f"{val}: new_height and new_width go together in Caffe; give both or neither")
    return ImageForm(*size, colour=settings.is_color, raw=True)


# -------------------------------------------------------------------------------------------- the images


class Sample(NamedTuple):
    """An image ready for the network, or why it is not."""

    name: str
    label: int | None
    image: NDArray[np.float32] | None
    """Channels (blue, green, red) x height x width."""

    reason: str = ""


def image_files(sources: list[Path]) -> list[Path]:
    """The files among ``sources``, and the images in the folders among them, sorted.

    Raises:
        UserError: a folder has no images.
    """
    from caffe_jacinto.data.listing import IMAGE_SUFFIXES, is_image_name

    paths = []
    for source in sources:
        if not source.is_dir():
            paths.append(source)
            continue
        inside = [path for path in sorted(source.rglob("*")) if is_image_name(path.name)]
        if not inside:
            raise UserError(f"{source}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
        paths += inside
    return paths


def file_samples(paths: list[Path], done: Preprocessing, form: ImageForm) -> Iterator[Sample]:
    """Image files as they would be in an LMDB of ``form``, one at a time."""
    for path in paths:
        try:
            record = image_record(os.fsencode(path), read_content(path), 0, form)
            yield _sample(str(path), record, done)._replace(label=None)
        except UnreadableImageError as error:
            yield Sample(str(path), None, None, str(error))


def lmdb_samples(folder: Path, done: Preprocessing, most: int | None = None) -> tuple[int, Iterator[Sample]]:
    """The number of records of the LMDB at ``folder``, and the records in key order, one at a time.

    ``most``: about this many of them, evenly spaced where that is possible without reading all keys.

    Raises:
        UserError: the LMDB cannot be read.
    """
    reader = LmdbReader(folder)

    def samples() -> Iterator[Sample]:
        with reader:
            for key, record in reader.records() if most is None else reader.spread(most):
                yield _sample(key.decode(errors="replace"), record, done)

    return len(reader) if most is None else min(len(reader), most), samples()


def _sample(name: str, record: bytes, done: Preprocessing) -> Sample:
    label = None
    try:
        datum = parse_datum(record)
        label = datum.label
        return Sample(name, label, done.input_of(datum_pixels(datum, done.transform.colour)))
    except UnreadableImageError as error:
        return Sample(name, label, None, str(error))


def file_form(done: Preprocessing, resize: tuple[int, int] | None) -> ImageForm:
    """The form to which image files are brought: that of the validation LMDB, or the size ``resize``.

    Raises:
        UserError: ``resize`` is smaller than the network's input.
    """
    channels, height, width = done.shape
    form = done.file_form or (lmdb_file_form(done.lmdb) if done.lmdb else None)
    if resize:
        if resize[0] < width or resize[1] < height:
            raise UserError(
                f"--resize {resize[0]}x{resize[1]} is smaller than the network's input of {width}x{height}"
            )
        return replace(
            form or ImageForm(0, 0, colour=channels == 3), width=resize[0], height=resize[1], shorter=0
        )
    if form is not None:
        return form
    mean = done.transform.mean_image
    size = (width, height) if mean is None else (mean.shape[2], mean.shape[1])
    print(
        f"the size of images before the crop is unknown ({done.lmdb or 'the val LMDB'} is not there): they"
        f" are resized to {size[0]}x{size[1]}; set another size with --resize WIDTHxHEIGHT",
        file=sys.stderr,
    )
    return ImageForm(size[0], size[1], colour=channels == 3)


def lmdb_file_form(folder: Path) -> ImageForm | None:
    """The form of an LMDB's images, as create_lmdb noted it or else by the first one; None if unknown."""
    from caffe_jacinto.data.lmdb_writer import noted_form

    noted = form_of(noted_form(folder) or "")
    if noted is not None:
        return noted
    try:
        with LmdbReader(folder) as reader:
            datum = parse_datum(next(reader.records())[1])
            channels, height, width = datum_pixels(datum).shape
    except (UserError, OSError, UnreadableImageError):
        return None
    jpeg = datum.encoded and datum.data.startswith(JPEG_START)
    return ImageForm(width, height, colour=channels == 3, raw=not jpeg)
