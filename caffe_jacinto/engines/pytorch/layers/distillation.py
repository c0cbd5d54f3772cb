"""Learning from a trained network, the teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2).

With class scores v of the teacher, z of the network that learns, and a temperature T, the loss of an image is

    T^2 sum over classes k of p[k] (log p[k] - log q[k]),    p = softmax(v / T), q = softmax(z / T):

their cross-entropy times T^2, less what does not depend on z, so that it is 0 where both agree. The factor
keeps the gradient's size independent of T.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.common.files import read_text
from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.prototxt.solver import TEST, parse_net_in


def distillation_loss(layer: LayerSetup) -> Forward:
    """The mean over the batch. Bottoms: class scores, batch x classes, and the teacher's images."""
    layer.takes(2)
    fields = layer.parameters("distillation_param", "net", "weights", "temperature")
    temperature = fields.temperature
    if not temperature > 0:
        layer.refuse(f"distillation_param.temperature is {temperature:g}; it has to be above 0")
    for name in ("net", "weights"):
        if not getattr(fields, name):
            layer.refuse(f"distillation_param.{name} is missing; name the teacher's file")
    if len(layer.bottoms[0]) != 2:
        layer.refuse(f"its first bottom has to be class scores, batch x classes, and is {layer.bottoms[0]}")
    files = Path(fields.net), Path(fields.weights)
    # Before a run, those of an earlier stage do not exist yet.
    ready = layer.filled or all(file.is_file() for file in files)
    teacher = _teacher(layer, *files) if ready else None

    def forward(blobs: Blobs, scores: Tensor, images: Tensor) -> Tensor:
        assert teacher is not None, "a net for checks only"
        with torch.no_grad():
            wanted = torch.log_softmax(teacher(images).float() / temperature, 1)
        logs = torch.log_softmax(scores.float() / temperature, 1)
        return temperature**2 * F.kl_div(logs, wanted, reduction="batchmean", log_target=True)

    return forward


def _teacher(layer: LayerSetup, file: Path, weights: Path) -> Callable[[Tensor], Tensor]:
    """The trained network from images to class scores; it is not part of the net that learns."""
    from caffe_jacinto.engines.pytorch.net import Net
    from caffe_jacinto.engines.pytorch.snapshot import load_weights

    definition: Any = parse_net_in(read_text(file), layer.dialect, str(file), TEST)
    inputs = [top for one in definition.layer if one.type == "Input" for top in one.top]
    if len(inputs) != 1:
        layer.refuse(f"{file} has {len(inputs)} inputs; name a deploy.prototxt, with one")
    if definition.layer[-1].type == "Softmax":
        del definition.layer[-1]
    net = Net(
        definition,
        TEST,
        layer.dialect,
        where=str(file),
        seed=0,
        device=layer.device,
        data_shapes={inputs[0]: layer.bottoms[1]},
        filled=layer.filled,
    )
    found = {name: net.shapes[name] for name in net.output_names}
    if list(found.values()) != [layer.bottoms[0]]:
        layer.refuse(
            f"{file} gives {', '.join(f'{name} {shape}' for name, shape in found.items())}, and the scores "
            f"are {layer.bottoms[0]}; name a network of the same classes"
        )
    missing, _ = load_weights(net, weights)
    if missing:
        layer.refuse(f"{weights} lacks layer {missing[0]} of {file}; name the weights of that network")
    (output,) = found
    return lambda images: net({inputs[0]: images}).outputs[output]


LAYERS: dict[str, Builder] = {"DistillationLoss": distillation_loss}
