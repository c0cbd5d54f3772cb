"""What is classified with: a deploy network, its weights, and the transform of its validation network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.errors import UserError
from caffe_jacinto.inference.preprocess import Transform
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


def trained_network(deploy: Path, weights: Path) -> TrainedNetwork:
    """Read a deploy prototxt; a softmax at its end is left out, since accuracy compares scores.

    Raises:
        UserError: a file is missing, or the network has no single image input.
    """
    from google.protobuf import text_format

    if not weights.is_file():
        raise UserError(f"{weights}: there is no such weight file; name a .caffemodel")
    net = parse_any_net(_text(deploy), str(deploy))
    if net.layer and net.layer[-1].type == "Softmax":
        del net.layer[-1]
    dialect = next(d for d in Dialect if net.DESCRIPTOR.full_name.startswith(f"{PACKAGES[d]}."))
    return TrainedNetwork(text_format.MessageToString(net), deploy, dialect, weights, _shape(net, deploy))


def _shape(net: Any, deploy: Path) -> tuple[int, int, int]:
    shapes = [list(shape.dim) for shape in net.input_shape]
    dims = list(net.input_dim)
    shapes += [dims[at : at + 4] for at in range(0, len(dims), 4)]
    shapes += [list(shape.dim) for layer in net.layer for shape in layer.input_param.shape]
    if len(shapes) != 1 or len(shapes[0]) != 4 or min(shapes[0]) < 1:
        raise UserError(f"{deploy}: a deploy network with one image input is needed, of four dimensions")
    return shapes[0][1], shapes[0][2], shapes[0][3]


def validation_transform(val: Path, shape: tuple[int, int, int], base: Path) -> tuple[Transform, str]:
    """The transform of a val.prototxt's data layer, and its LMDB; ``base``: where relative paths begin.

    Raises:
        UserError: no data layer with an LMDB, a crop that is not the deploy network's, or a bad mean.
    """
    from caffe_jacinto.data.mean import read_mean

    net = parse_any_net(_text(val), str(val))
    data = next((layer for layer in net.layer if layer.type == "Data" and _tests(layer)), None)
    if data is None:
        raise UserError(f"{val}: no Data layer to take the preprocessing from; name another with --val")
    settings = data.transform_param
    if settings.crop_size and (settings.crop_size, settings.crop_size) != shape[1:]:
        raise UserError(
            f"{val}: crop_size is {settings.crop_size}, but the deploy network takes {shape[1]}x{shape[2]}"
        )
    if settings.force_color or settings.force_gray:
        raise UserError(
            f"{val}: force_color and force_gray are not supported; take them out of the Data layer"
        )
    means = tuple(settings.mean_value)
    if means and settings.mean_file:
        raise UserError(f"{val}: has mean_file and mean_value; Caffe takes one of them: remove the other")
    if len(means) not in (0, 1, shape[0]):
        raise UserError(f"{val}: {len(means)} mean values for {shape[0]} channels; give one, or one for each")
    mean = read_mean(base / settings.mean_file) if settings.mean_file else None
    return Transform(*shape, settings.scale, means, mean), data.data_param.source


def _tests(layer: Any) -> bool:
    """Whether a layer takes part in the TEST phase (1)."""
    wanted = [rule.phase for rule in layer.include if rule.HasField("phase")]
    if wanted:
        return 1 in wanted
    return not any(rule.HasField("phase") and rule.phase == 1 for rule in layer.exclude)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name a prototxt") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: no prototxt; the deploy network comes first, then the weights") from None
