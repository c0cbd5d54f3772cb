"""A network of one phase, run on PyTorch, from its NetParameter message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.batch_norm import fused_batch_norm
from caffe_jacinto.engines.pytorch.layer_setup import PHASE_NAMES, Blob, Forward, LayerSetup, Shape
from caffe_jacinto.engines.pytorch.layers import LAYERS
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.netspec.layer_types import is_known, output_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import TEST, TRAIN

FED = ("Data", "Input")
"""The types of the layers whose tops come from outside."""

_KNOWN_FIELDS = frozenset(
    {"name", "force_backward", "input", "input_shape", "input_dim", "state", "layer", "debug_info"}
)
_FORK_NO_EFFECT = frozenset(
    {
        *("default_conv_algos_override", "default_cudnn_math_override", "reduce_buckets"),
        *("global_grad_scale", "global_grad_scale_adaptive"),
    }
)


@dataclass
class Learnable:
    """A blob that the solver keeps a history of: weights, and statistics (with an lr_mult of 0)."""

    name: str
    """``<layer>[<index>]``."""

    layer: str
    tensor: Tensor
    lr_mult: float
    decay_mult: float


@dataclass(frozen=True)
class NetResult:
    """The outputs of one pass."""

    loss: Tensor
    """The weighted sum of the losses, a scalar that can be differentiated."""

    outputs: dict[str, Tensor]
    """The net's outputs by name, detached."""


@dataclass
class _Step:
    """A layer in the order of computation."""

    name: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    forward: Forward
    detached: tuple[bool, ...]
    """Which bottoms get no gradient (``propagate_down: false``)."""

    loss_weights: tuple[float, ...] = ()
    last_uses: tuple[str, ...] = ()
    """Blobs that no later step reads."""


class Net:
    """A network of the train or the test phase."""

    def __init__(
        self,
        definition: Any,
        phase: int,
        dialect: Dialect,
        *,
        where: str,
        seed: int | None = None,
        device: torch.device | None = None,
        data_shapes: Mapping[str, Shape] | None = None,
        filled: bool = True,
    ) -> None:
        """Build the layers of ``phase`` and fill their blobs.

        ``definition`` is a NetParameter of ``dialect``, ``where`` its file's name, for messages. ``seed``
        fixes what the fillers draw. ``data_shapes`` are those of the Data layers' tops. Not ``filled`` is
        for checks only.

        Raises:
            UserError: a layer or field that is not supported, or layers that do not fit each other.
        """
        self.definition, self.name = definition, str(definition.name)
        self.phase, self.dialect, self.where = phase, dialect, where
        self.device = device or torch.device("cpu")
        self.layers: list[Any] = []
        """The LayerParameter messages of this phase, in order."""

        self.layer_blobs: dict[str, list[Blob]] = {}
        """Each layer's blobs by its name, for layers that have any."""

        self.inputs: list[str] = []
        self.loss_weights: dict[str, float] = {}
        self.shapes: dict[str, Shape] = {}
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._filled = filled
        self._shared: dict[str, Blob] = {}
        self.steps: list[_Step] = []
        _check_fields(definition, where)
        self._declare_inputs(definition)
        self.layers = messages_in(definition, PHASE_NAMES[phase])
        self._build(data_shapes or {})
        self.output_names = self._outputs()
        self._find_last_uses()

    @property
    def blobs(self) -> list[tuple[str, int, Blob]]:
        """Every blob with its layer and index, in Caffe's order, each shared one once."""
        seen: set[int] = set()
        found = []
        for layer, blobs in self.layer_blobs.items():
            for index, blob in enumerate(blobs):
                if id(blob.tensor) not in seen:
                    seen.add(id(blob.tensor))
                    found.append((layer, index, blob))
        return found

    @property
    def learnables(self) -> list[Learnable]:
        """What the solver keeps a history of, in Caffe's order."""
        return [
            Learnable(f"{layer}[{index}]", layer, blob.tensor, blob.lr_mult, blob.decay_mult)
            for layer, index, blob in self.blobs
        ]

    def write_to(self, log: CaffeLog) -> None:
        """Log the network of this phase, as Caffe does when it has built one."""
        shown = type(self.definition)()
        shown.CopyFrom(self.definition)
        del shown.layer[:]
        shown.layer.extend(self.layers)
        images = [self.shapes[layer.top[0]] for layer in self.layers if layer.type == "Data"]
        log.net(shown, images, self.output_names)

    def reseed(self, seed: int) -> None:
        """What the next pass draws (dropout, random data) follows from ``seed``."""
        torch.manual_seed(seed)
        self._generator.manual_seed(seed)

    def share_with(self, other: Net) -> None:
        """Take the blobs of ``other``, by the layers' names, for this net's own: a test net in training.

        Raises:
            UserError: a layer of the same name has blobs of other shapes.
        """
        for name, blobs in self.layer_blobs.items():
            theirs = other.layer_blobs.get(name)
            if theirs is None:
                continue
            if [blob.tensor.shape for blob in blobs] != [blob.tensor.shape for blob in theirs]:
                raise UserError(f"{self.where}: layer {name} has blobs of other shapes than in {other.where}")
            for mine, their in zip(blobs, theirs, strict=True):
                mine.tensor.data = their.tensor.data

    def __call__(self, inputs: Mapping[str, Tensor]) -> NetResult:
        """One pass over ``inputs``, the blobs of `inputs` by name. Nothing here waits for the device."""
        values = dict(inputs)
        loss: Tensor | None = None
        outputs = {}
        for step in self.steps:
            given = [
                values[name].detach() if cut else values[name]
                for name, cut in zip(step.bottoms, step.detached, strict=True)
            ]
            made = step.forward(*given)
            tops = made if isinstance(made, tuple) else (made,)
            for name, top, weight in zip(step.tops, tops, step.loss_weights, strict=True):
                values[name] = top
                if weight:
                    part = top.sum() * weight if weight != 1 or top.dim() else top
                    loss = part if loss is None else loss + part
                if name in self._kept:
                    outputs[name] = top.detach()
            for name in step.last_uses:
                del values[name]
        if loss is None:
            loss = torch.zeros((), device=self.device)
        return NetResult(loss, outputs)

    # How it is built

    def _declare_inputs(self, definition: Any) -> None:
        """The net's own ``input`` fields, the older form of an Input layer."""
        shapes = [tuple(shape.dim) for shape in definition.input_shape]
        numbers = list(definition.input_dim)
        shapes = shapes or [tuple(numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
        if len(shapes) != len(definition.input):
            raise UserError(
                f"{self.where}: {len(definition.input)} of input and {len(shapes)} shapes for them"
            )
        for name, shape in zip(definition.input, shapes, strict=True):
            self.inputs.append(name)
            self.shapes[name] = shape

    def _build(self, data_shapes: Mapping[str, Shape]) -> None:
        skip = False
        for index, layer in enumerate(self.layers):
            where = f"{self.where}: layer {layer.name} ({layer.type})"
            if layer.name in (other.name for other in self.layers[:index]):
                raise UserError(f"{where}: another layer has this name; rename one")
            if skip:  # built with the batch norm before it
                skip = False
                continue
            if layer.type in FED:
                self._feed(layer, data_shapes, where)
                continue
            if layer.type not in LAYERS:
                known = ", ".join(sorted([*LAYERS, *FED]))
                raise UserError(f"{where}: this type of layer is not supported; supported: {known}")
            setup = self._setup(layer, where)
            following = self.layers[index + 1] if index + 1 < len(self.layers) else None
            if layer.type == "BatchNorm" and following is not None and self._goes_in_one(layer, following):
                self._add_batch_norm_and_scale(setup, following)
                skip = True
            else:
                self._add(setup, LAYERS[layer.type](setup), layer)

    def _feed(self, layer: Any, data_shapes: Mapping[str, Shape], where: str) -> None:
        setup = self._setup(layer, where)
        if layer.bottom:
            setup.refuse(f"takes no bottom, and has {layer.bottom[0]}")
        if layer.type == "Input":
            setup.parameters("input_param", "shape")
        else:
            setup.only("data_param", "transform_param")
        given = len(layer.input_param.shape)
        if given not in (0, 1, len(layer.top)):
            setup.refuse(f"input_param has {given} shapes for {len(layer.top)} tops")
        for name, declared in zip(layer.top, output_shapes(setup.tree, [], len(layer.top)), strict=True):
            shape = data_shapes.get(name, declared)
            if shape is None or not is_known(shape):
                raise UserError(f"{where}: the shape of its top {name} is not known")
            self.inputs.append(name)
            self.shapes[name] = tuple(dim for dim in shape if dim is not None)

    def _setup(self, layer: Any, where: str) -> LayerSetup:
        missing = [name for name in layer.bottom if name not in self.shapes]
        if missing:
            raise UserError(f"{where}: its bottom {missing[0]} is not a top of a layer before it")
        return LayerSetup(
            layer,
            where,
            self.phase,
            self.dialect,
            self.device,
            self._generator,
            [self.shapes[name] for name in layer.bottom],
            self._filled,
        )

    def _add(self, setup: LayerSetup, forward: Forward, last: Any) -> None:
        """Take in a layer that is built; ``last`` is the message whose tops it gives."""
        layer = setup.message
        self.shapes.update(zip(last.top, setup.tops, strict=False))
        self._keep_blobs(setup)
        weights = _loss_weights(last)
        self.loss_weights.update({name: w for name, w in zip(last.top, weights, strict=True) if w})
        cuts = [not down for down in layer.propagate_down] or [False] * len(layer.bottom)
        if len(cuts) != len(layer.bottom):
            setup.refuse(f"{len(cuts)} of propagate_down for {len(layer.bottom)} bottoms; give one for each")
        self.steps.append(
            _Step(layer.name, tuple(layer.bottom), tuple(last.top), forward, tuple(cuts), weights)
        )

    def _keep_blobs(self, setup: LayerSetup) -> None:
        if not setup.blobs:
            return
        for blob in setup.blobs:
            if blob.shared_as:
                self._share(setup, blob)
        self.layer_blobs[setup.message.name] = setup.blobs

    def _share(self, setup: LayerSetup, blob: Blob) -> None:
        owner = self._shared.setdefault(blob.shared_as, blob)
        if owner is not blob:
            setup.refuse(
                f"param {blob.shared_as!r} shares the blob of another layer, which is not supported; "
                "give each param a name of its own, or none"
            )

    def _goes_in_one(self, norm: Any, following: Any) -> bool:
        """Whether the layer ``following`` scales what the batch norm gives, and nothing else reads that."""
        if following.type != "Scale" or list(following.bottom) != list(norm.top):
            return False
        fields = following.scale_param
        if fields.axis not in (1, 1 - len(self.shapes[norm.bottom[0]])) or fields.num_axes != 1:
            return False
        in_place = list(following.top) == list(following.bottom)
        readers = sum(list(layer.bottom).count(norm.top[0]) for layer in self.layers)
        return (in_place or readers == 1) and not following.propagate_down and not norm.loss_weight

    def _add_batch_norm_and_scale(self, setup: LayerSetup, scale: Any) -> None:
        """Both as one step, in one pass over the images."""
        normalize = fused_batch_norm(setup)
        if normalize.own is not None:
            self._add(setup, lambda images: normalize(images, None), setup.message)
            behind = self._setup(scale, f"{self.where}: layer {scale.name} ({scale.type})")
            self._add(behind, LAYERS["Scale"](behind), scale)
            return
        self.shapes[setup.message.top[0]] = tuple(setup.bottoms[0])
        behind = self._setup(scale, f"{self.where}: layer {scale.name} ({scale.type})")
        LAYERS["Scale"](behind)
        blobs = [blob.tensor for blob in behind.blobs]
        factors, added = blobs[0], blobs[1] if len(blobs) > 1 else None
        self._add(setup, lambda images: normalize(images, (factors, added)), scale)
        self._keep_blobs(behind)

    def _outputs(self) -> list[str]:
        """The blobs that nothing reads, in Caffe's order: by name."""
        available: set[str] = set(self.inputs)
        for step in self.steps:
            available.difference_update(step.bottoms)
            available.update(step.tops)
        self._kept = frozenset(available)
        return sorted(available)

    def _find_last_uses(self) -> None:
        """Say after which step a blob can be let go."""
        seen = set(self._kept)
        for step in reversed(self.steps):
            touched = {*step.bottoms, *step.tops}
            step.last_uses = tuple(touched - seen)
            seen |= touched


def _loss_weights(layer: Any) -> tuple[float, ...]:
    given = tuple(layer.loss_weight)
    if given:
        return given + (0.0,) * (len(layer.top) - len(given))
    first = 1.0 if layer.type.endswith("Loss") else 0.0
    return (first,) + (0.0,) * (len(layer.top) - 1)


def _check_fields(definition: Any, where: str) -> None:
    if not definition.layer:
        old = "; it is in the old form, with `layers`: upgrade it with Caffe's upgrade_net_proto_text"
        raise UserError(f"{where}: has no layers{old if definition.layers else ''}")
    for descriptor, value in definition.ListFields():
        if descriptor.name in _KNOWN_FIELDS | _FORK_NO_EFFECT:
            continue
        if descriptor.name.startswith("default_") and value == 0:  # FLOAT
            continue
        raise UserError(f"{where}: field {descriptor.name} is not supported; remove it")


__all__ = ["TEST", "TRAIN", "Learnable", "Net", "NetResult"]
