"""A deploy network of either dialect with its weights, in stock Caffe's form.

`merge_bn.py`, `shrink.py` and `onnx/` start from it: there is one form of every layer, and each blob has the
shape that the network gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.batch_norm import averages, lacks_statistics, require_statistics
from caffe_jacinto.caffemodel.fit import require_fit, weights_for
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.fork_layers import in_stock_form
from caffe_jacinto.netspec.graph import TEST, messages_in
from caffe_jacinto.netspec.layer_types import Shape, role_of
from caffe_jacinto.netspec.mistakes import geometry_mistakes
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import FORK_MIN_EPS, Dialect, scale_name
from caffe_jacinto.prototxt.schema import dialect_of, messages, parse_any_net, translated
from caffe_jacinto.prototxt.tree import tree_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

_NO_EFFECT = frozenset(
    {
        *("backward_math", "backward_type", "conv_algos_override", "cudnn_convolution_algo_seeker"),
        *("cudnn_math_override", "debug", "forward_math", "forward_type", "random_seed"),
        *("batch_norm_param.bias_filler", "batch_norm_param.engine", "batch_norm_param.scale_bias"),
        *("batch_norm_param.scale_filler", "dropout_param.engine", "quantization_param"),
    }
)
"""Fields that only the fork has and that do not change a trained layer's output, beyond rounding."""


@dataclass(eq=False)
class StockLayer:
    """A layer in stock Caffe's schema and its blobs."""

    message: Any
    """Its LayerParameter message, without phases and without fields that only training reads."""

    blobs: list[Values]
    """In the network's shapes; of a BatchNorm, plain averages and a factor of 1."""

    @property
    def name(self) -> str:
        return str(self.message.name)

    @property
    def type(self) -> str:
        return str(self.message.type)


@dataclass
class StockNet:
    """A network and its weights."""

    message: Any
    """The NetParameter message without its layers: name and inputs."""

    layers: list[StockLayer]

    def text(self) -> str:
        """The deploy prototxt."""
        from google.protobuf import text_format

        whole = type(self.message)()
        whole.CopyFrom(self.message)
        whole.layer.extend(layer.message for layer in self.layers)
        return str(text_format.MessageToString(whole))


def stock_net(deploy_text: str, where: str, dialect: Dialect | None, weights: Path) -> StockNet:
    """The deploy network ``deploy_text`` with the numbers of the file ``weights``.

    ``where`` names the text in messages. Where ``dialect`` is None, the text may be in either. Of a text with
    several phases this is the test phase.

    Raises:
        UserError: the text is not a deploy network, the weights do not fit or have batch norms without
            statistics, or stock Caffe cannot express it.
    """
    net = parse_any_net(deploy_text, where, dialect)
    _check_deploy(net, where)
    require_fit(weights, net, where)
    stored = weights_for(weights, net)
    shapes = blob_shapes(net, TEST)
    result = StockNet(messages(Dialect.BVLC).NetParameter(name=net.name), [])
    lacking = {}
    for layer in messages_in(net, TEST):
        blobs = _shaped(stored.get(layer.name, []), shapes.get(layer.name, []))
        if layer.type == "BatchNorm" and blobs and lacks_statistics(blobs, plain=_has_plain_averages(layer)):
            lacking[layer.name] = blobs
        result.layers += _stock_layers(layer, blobs, where)
    require_statistics(weights, lacking)
    return result


def _check_deploy(net: Any, where: str) -> None:
    if all(layer.type == "Input" for layer in net.layer):
        raise UserError(f"{where}: has no layers; give a deploy network")
    for wrong in geometry_mistakes(tree_of(net), where):
        raise UserError(wrong)
    for layer in messages_in(net, TEST):
        if role_of(layer.type) == "data" and layer.type != "Input":
            raise UserError(f"{where}: layer {layer.name} ({layer.type}) reads data; give the deploy network")
        outputs, group = layer.convolution_param.num_output, layer.convolution_param.group
        if role_of(layer.type) == "convolution" and (group < 1 or outputs % group):
            raise UserError(
                f"{where}: layer {layer.name} ({layer.type}): its {outputs} outputs do not divide into "
                f"{group} groups; correct num_output or group"
            )


def _shaped(stored: list[Values], shapes: list[Shape]) -> list[Values]:
    """The blobs in the network's shapes, which they fill: `require_fit` has checked that."""
    if not shapes:
        return stored
    result = []
    for values, shape in zip(stored, shapes, strict=True):
        if shape.count(None) <= 1:
            result.append(values.reshape([-1 if dim is None else dim for dim in shape]))
        else:  # the old form's four axes: the first are 1
            result.append(values.reshape(values.shape[-len(shape) :]))
    return result


def _stock_layers(layer: Any, blobs: list[Values], where: str) -> Iterator[StockLayer]:
    """The layer in stock Caffe's schema: one layer, or two where the fork has one."""
    message, unknown = translated(layer, Dialect.BVLC)
    lost = [field for field in unknown if field not in _NO_EFFECT]
    if lost:
        raise UserError(
            f"{where}: layer {layer.name} ({layer.type}): stock Caffe has no field {lost[0]}; "
            "the network cannot be written without it"
        )
    for field in ("param", "include", "exclude", "phase", "propagate_down", "loss_weight"):
        message.ClearField(field)
    if layer.type != "BatchNorm" or not blobs:
        for part, numbers in in_stock_form(message, blobs, where):
            yield StockLayer(part, numbers)
        return
    import numpy as np

    if layer.batch_norm_param.HasField("use_global_stats") and not layer.batch_norm_param.use_global_stats:
        raise UserError(
            f"{where}: layer {layer.name} has use_global_stats: false, so it takes its statistics from each "
            "batch of images; remove that field to use those of the weight file"
        )
    message.batch_norm_param.ClearField("use_global_stats")
    message.batch_norm_param.ClearField("moving_average_fraction")
    one = np.ones(1, np.float32)
    if _has_plain_averages(layer):
        message.batch_norm_param.eps = max(layer.batch_norm_param.eps, FORK_MIN_EPS)
        yield StockLayer(message, [blobs[0], blobs[1], one])
    else:
        yield StockLayer(message, [*averages(blobs[0], blobs[1], blobs[2].reshape(-1)[0]), one])
    if len(blobs) == 5:
        scale = type(message)(name=scale_name(layer.name), type="Scale")
        scale.bottom.extend(message.top)
        scale.top.extend(message.top)
        scale.scale_param.bias_term = True
        yield StockLayer(scale, blobs[3:])


def _has_plain_averages(layer: Any) -> bool:
    """Whether a BatchNorm is the fork's, which passes over the factor."""
    return dialect_of(layer) is Dialect.CAFFE_JACINTO
