"""A network of one phase, run on PyTorch, from its NetParameter message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of, did_you_mean
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.fusion import FusedForward, Fusion, chain_from
from caffe_jacinto.engines.pytorch.indices import Indices
from caffe_jacinto.engines.pytorch.layer_setup import PHASE_NAMES, Blob, Forward, LayerSetup, Shape
from caffe_jacinto.engines.pytorch.layers import LAYERS, REFUSED
from caffe_jacinto.engines.pytorch.layers.mixup import of_mixed_labels
from caffe_jacinto.netspec.data_fit import READ
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.netspec.layer_types import DATA_PARAMETERS, is_known, output_shapes
from caffe_jacinto.netspec.mistakes import named_twice
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.forks import TYPES
from caffe_jacinto.prototxt.places import field_named_in, place_in
from caffe_jacinto.prototxt.solver import TEST, TRAIN
from caffe_jacinto.quantization.fork_settings import FIELDS

FED = (*READ, "Input")
"""The types of the layers whose tops come from outside."""

_KNOWN_FIELDS = frozenset({"name", "force_backward", "state", "layer", "debug_info"})
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
class SharedBlob:
    """A blob that ``param.name`` shares among layers."""

    layer: str
    """The first layer with it."""

    blob: Blob
    given: set[str]
    """Which of lr_mult and decay_mult a layer has set."""


class Observer(Protocol):
    """Computes layers in their own place, to see what they read and make."""

    def run(
        self, name: str, function: Forward, blobs: Sequence[Tensor], bottoms: Sequence[Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        """The top or tops of the layer ``name``, which are those of ``function``."""


class LayerModule(nn.Module):
    """A layer of a net: its blobs as parameters and buffers, named by their index, and what it computes."""

    def __init__(self, setup: LayerSetup, function: Forward) -> None:
        super().__init__()
        self.function, self.name = function, str(setup.message.name)
        self._blobs = setup.blobs
        self.observer: Observer | None = None
        """What computes this layer while somebody watches."""

        for index, blob in enumerate(setup.blobs):
            if isinstance(blob.tensor, nn.Parameter):
                self.register_parameter(str(index), blob.tensor)
            else:
                self.register_buffer(str(index), blob.tensor)

    @property
    def tensors(self) -> list[Tensor]:
        """The blobs, in Caffe's order."""
        return [getattr(self, str(index)) for index in range(len(self._blobs))]

    @property
    def blobs(self) -> list[Blob]:
        """The blobs with how fast they learn."""
        return [replace(blob, tensor=own) for blob, own in zip(self._blobs, self.tensors, strict=True)]

    @property
    def is_hooked(self) -> bool:
        """Whether somebody wants to see what it computes: then it runs alone."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks
        return bool(hooks or self.observer)

    def share(self, other: LayerModule) -> None:
        """Take the blobs of ``other``, which have the same shapes, for its own."""
        for index, tensor in enumerate(other.tensors):
            own: dict[str, Any] = self._parameters if str(index) in self._parameters else self._buffers
            own[str(index)] = tensor

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The layer's top or tops."""
        if self.observer is not None:
            return self.observer.run(self.name, self.function, self.tensors, bottoms)
        return self.function(self.tensors, *bottoms)


@dataclass
class Step:
    """A layer, or several that run as one, in the order of computation."""

    name: str
    """The layer's; those of several have a + between them."""

    modules: tuple[LayerModule, ...]
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    fused: FusedForward | None
    """What several layers compute together, unless one of them has a hook of PyTorch's."""

    detached: tuple[bool, ...]
    """Which bottoms get no gradient (``propagate_down: false``)."""

    loss_weights: tuple[float, ...] = ()
    last_uses: tuple[str, ...] = ()
    """Blobs that no later step reads."""

    def __call__(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        """The tops."""
        if self.fused is not None and not any(module.is_hooked for module in self.modules):
            return (self.fused([module.tensors for module in self.modules], *bottoms),)
        made = bottoms
        for module in self.modules:
            result = module(*made)
            made = result if isinstance(result, tuple) else (result,)
        return made


class Net(nn.Module):
    """A network of the train or the test phase.

    Its modules are its layers, by name (with ``_`` for a dot); their parameters and buffers are the blobs, by
    index: ``conv1a.0`` are the weights of the layer conv1a.
    """

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
        fused: bool = True,
    ) -> None:
        """Build the layers of ``phase`` and fill their blobs.

        ``definition`` is a NetParameter of ``dialect``, ``where`` its file's name, for messages. ``seed``
        fixes what the fillers draw. ``data_shapes`` are those of the data layers' tops. Not ``filled`` is
        for checks only. Not ``fused``: each layer is a step of its own.

        Raises:
            UserError: a layer or field that is not supported, or layers that do not fit each other.
        """
        super().__init__()
        self.definition, self.name = definition, str(definition.name)
        self.phase, self.dialect, self.where = phase, dialect, where
        self.device = device or torch.device("cpu")
        self.layers: list[Any] = []
        """The LayerParameter messages of this phase, in order."""

        self._by_name: dict[str, LayerModule] = {}
        self.inputs: list[str] = []
        self.loss_weights: dict[str, float] = {}
        self.shapes: dict[str, Shape] = {}
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._filled, self._fused = filled, fused
        self._shared: dict[str, SharedBlob] = {}
        self.steps: list[Step] = []
        self.draws = False
        """Whether a pass draws random numbers."""

        self.recordable = True
        """Whether a pass can be recorded as a CUDA graph."""

        self._mixed_labels: set[str] = set()
        """Blobs of labels of mixed images."""

        self.indices: list[Indices] = []
        """Labels, and other numbers that have to be in a range."""

        _check_fields(definition, where)
        self.layers = messages_in(definition, PHASE_NAMES[phase])
        try:
            self._build(data_shapes or {})
        except UserError as error:
            raise _with_line(error, where, self.layers) from None
        self.output_names = self._outputs()
        self._find_last_uses()

    @property
    def functions(self) -> dict[str, Forward]:
        """What each layer computes alone, from its blobs and bottoms, by its name."""
        return {name: module.function for name, module in self._by_name.items()}

    def tensors_of(self, layer: str) -> list[Tensor]:
        """A layer's blobs, in Caffe's order."""
        return self._by_name[layer].tensors if layer in self._by_name else []

    @property
    def layer_blobs(self) -> dict[str, list[Blob]]:
        """Each layer's blobs by its name, for layers that have any."""
        return {name: module.blobs for name, module in self._by_name.items() if module.tensors}

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

    def write_to(self, log: CaffeLog, more: str = "") -> None:
        """Log the network of this phase, as Caffe does when it has built one; ``more``: fields come first."""
        shown = type(self.definition)()
        shown.CopyFrom(self.definition)
        del shown.layer[:]
        shown.layer.extend(self.layers)
        images = [self.shapes[layer.top[0]] for layer in self.layers if layer.type in ("Data", "ImageData")]
        log.net(shown, images, self.output_names, more)

    def check_indices(self) -> None:
        """Wait for the device, and raise UserError if a label, or another index, was out of its range."""
        for indices in self.indices:
            indices.check()

    def reseed(self, seed: int) -> None:
        """What the next pass draws (dropout, random data) follows from ``seed``."""
        torch.manual_seed(seed)
        self._generator.manual_seed(seed)

    def has_unused_weights(self) -> bool:
        """Whether some weights learn, but no loss depends on them."""
        needed: set[str] = {name for name, weight in self.loss_weights.items() if weight}
        for step in reversed(self.steps):
            if needed.isdisjoint(step.tops):
                if any(tensor.requires_grad for module in step.modules for tensor in module.tensors):
                    return True
                continue
            needed |= {name for name, cut in zip(step.bottoms, step.detached, strict=True) if not cut}
        return False

    def share_with(self, other: Net) -> None:
        """Take the blobs of ``other``, by the layers' names, for this net's own: a test net in training.

        Raises:
            UserError: a layer of the same name has blobs of other shapes.
        """
        for name, module in self._by_name.items():
            theirs = other._by_name.get(name)
            if theirs is None or not module.tensors:
                continue
            if [tensor.shape for tensor in module.tensors] != [tensor.shape for tensor in theirs.tensors]:
                there = "the training network" if other.where == self.where else other.where
                raise UserError(
                    f"{place_in(self.where, name)}: layer {name} has blobs of other shapes than in {there}; "
                    "make the layers and the crops of the two the same"
                )
            module.share(theirs)

    def forward(self, inputs: Mapping[str, Tensor]) -> NetResult:
        """One pass over ``inputs``, the blobs of `inputs` by name. Nothing here waits for the device."""
        return self.compute(dict(inputs), self.steps)

    def compute(self, values: dict[str, Tensor], steps: Sequence[Step]) -> NetResult:
        """Those of the ``steps`` alone; ``values`` has the blobs that they read, by name, and is used up."""
        loss: Tensor | None = None
        outputs = {}
        for step in steps:
            given = [
                values[name].detach() if cut else values[name]
                for name, cut in zip(step.bottoms, step.detached, strict=True)
            ]
            for name, top, weight in zip(step.tops, step(*given), step.loss_weights, strict=True):
                values[name] = top
                if weight:
                    part = top.sum() * weight if weight != 1 or top.dim() else top
                    loss = part if loss is None else loss + part
                if name in self._kept:
                    outputs[name] = top.detach()
            for name in step.last_uses:
                values.pop(name, None)
        if loss is None:
            loss = torch.zeros((), device=self.device)
        return NetResult(loss, outputs)

    # How it is built

    def _build(self, data_shapes: Mapping[str, Shape]) -> None:
        for _, at in named_twice([(layer.name, layer.type) for layer in self.layers]):
            raise UserError(f"{self._where(self.layers[at])}: another layer has this name; rename one")
        for layer in self.layers:
            where = self._where(layer)
            if layer.type in REFUSED:
                raise UserError(f"{where}: this type of layer is not supported: {REFUSED[layer.type]}")
            if layer.type not in FED and layer.type not in LAYERS:
                if layer.type in TYPES:
                    of_fork = f"it is of {TYPES[layer.type].fork}"
                    raise UserError(f"{where}: this type of layer is not supported: {of_fork}; remove it")
                known = did_you_mean(layer.type, sorted([*LAYERS, *FED]))
                raise UserError(f"{where}: this type of layer is not supported; {known}")
        at = 0
        while at < len(self.layers):
            layer = self.layers[at]
            chain = chain_from(self.layers, at, self.device, self.dialect) if self._fused else ()
            if layer.type in FED:
                self._feed(layer, data_shapes, self._where(layer))
            elif chain:
                self._add_chain(chain)
            else:
                setup = self._setup(layer, self._where(layer))
                self._add(setup, LAYERS[layer.type](setup))
            at += max(len(chain), 1)

    def _where(self, layer: Any) -> str:
        return f"{self.where}: layer {layer.name} ({layer.type})"

    def _feed(self, layer: Any, data_shapes: Mapping[str, Shape], where: str) -> None:
        setup = self._setup(layer, where)
        if layer.bottom:
            setup.refuse(f"takes no bottom, and has {layer.bottom[0]}")
        if layer.type == "Input":
            setup.parameters("input_param", "shape")
        else:
            setup.only(DATA_PARAMETERS[layer.type], "transform_param")
        given = len(layer.input_param.shape)
        if given not in (0, 1, len(layer.top)):
            setup.refuse(f"input_param has {given} shapes for {len(layer.top)} tops")
        for name, declared in zip(layer.top, output_shapes(setup.tree, [], len(layer.top)), strict=True):
            shape = data_shapes.get(name, declared)
            if shape is None or not is_known(shape):
                raise UserError(f"{where}: the shape of its top {name} is not known")
            self.inputs.append(name)
            self.shapes[name] = tuple(dim for dim in shape if dim is not None)
        if self.phase == TRAIN and layer.transform_param.mixup_alpha:
            self._mixed_labels.update(layer.top[1:])

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

    def _add(self, setup: LayerSetup, function: Forward) -> None:
        """Take in a layer that runs alone."""
        layer = setup.message
        if not self._mixed_labels.isdisjoint(layer.bottom):
            function = of_mixed_labels(setup, function, self._mixed_labels)
        module = self._take(setup, function)
        weights = loss_weights(layer)
        if len(weights) != len(layer.top):
            counted = count_of(len(layer.top), "top")
            setup.refuse(f"{len(weights)} of loss_weight for {counted}; give one for each")
        self.loss_weights.update({name: w for name, w in zip(layer.top, weights, strict=True) if w})
        cuts = [not down for down in layer.propagate_down] or [False] * len(layer.bottom)
        if len(cuts) != len(layer.bottom):
            setup.refuse(f"{len(cuts)} of propagate_down for {len(layer.bottom)} bottoms; give one for each")
        bottoms, tops = tuple(layer.bottom), tuple(layer.top)
        self.steps.append(Step(layer.name, (module,), bottoms, tops, None, tuple(cuts), weights))

    def _add_chain(self, chain: Sequence[Any]) -> None:
        """Take in layers that run as one; each still has a module, for its blobs."""
        fusion = Fusion(self.device)
        modules = []
        for layer in chain:
            setup = self._setup(layer, self._where(layer))
            modules.append(self._take(setup, fusion.add(setup)))
        first, last = chain[0], chain[-1]
        bottoms, tops = tuple(first.bottom), tuple(last.top)
        self.steps.append(
            Step(
                "+".join(layer.name for layer in chain),
                tuple(modules),
                bottoms,
                tops,
                fusion.function(),
                (False,),
                (0.0,),
            )
        )

    def _take(self, setup: LayerSetup, function: Forward) -> LayerModule:
        """The module of a layer that is built; its tops are known from here on."""
        name = setup.message.name
        self.shapes.update(zip(setup.message.top, setup.tops, strict=False))
        for index, blob in enumerate(setup.blobs):
            if blob.shared_as:
                self._share(setup, index, blob)
        module = LayerModule(setup, function)
        self.draws |= setup.draws
        self.recordable &= setup.recordable
        self.indices += setup.indices
        self._by_name[name] = module
        key = name.replace(".", "_")
        while key in self._modules:
            key += "_"
        self._modules[key] = module  # not add_module: a layer may have the name of an attribute
        return module

    def _share(self, setup: LayerSetup, index: int, blob: Blob) -> None:
        """Make blobs of one ``param.name`` one: that of the first layer with it, its owner.

        How fast it learns is what any of them says; two must not say different things (Net::AppendParam).
        """
        spec = setup.message.param[index]
        owner = self._shared.setdefault(blob.shared_as, SharedBlob(setup.message.name, blob, set()))
        if blob.tensor.shape != owner.blob.tensor.shape or type(blob.tensor) is not type(owner.blob.tensor):
            setup.refuse(
                f"param {spec.name!r} has the shape {tuple(blob.tensor.shape)}, and in layer {owner.layer}, "
                f"with which it is shared, {tuple(owner.blob.tensor.shape)}"
            )
        for field in ("lr_mult", "decay_mult"):
            value = getattr(spec, field)
            if not spec.HasField(field):
                continue
            if field in owner.given and value != getattr(owner.blob, field):
                setup.refuse(
                    f"param {spec.name!r}: {field} {value:g}, and in layer {owner.layer}, with which it is "
                    f"shared, {getattr(owner.blob, field):g}; give one value"
                )
            setattr(owner.blob, field, value)
            owner.given.add(field)
        blob.tensor = owner.blob.tensor
        if isinstance(blob.tensor, nn.Parameter):
            blob.tensor.requires_grad_(self.phase == TRAIN and owner.blob.lr_mult != 0)

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


def loss_weights(layer: Any) -> tuple[float, ...]:
    """How much each top of a LayerParameter counts in the loss."""
    given = tuple(layer.loss_weight)
    if given:
        return given + (0.0,) * (len(layer.top) - len(given))
    first = 1.0 if layer.type.endswith("Loss") else 0.0
    return ((first,) + (0.0,) * (len(layer.top) - 1))[: len(layer.top)]


def _with_line(error: UserError, where: str, layers: Sequence[Any]) -> UserError:
    """The error at a layer with the line that the layer, or its field, has in the file ``where``."""
    for layer in layers:
        begin = f"{where}: layer {layer.name} ("
        if str(error).startswith(begin):
            what = str(error).removeprefix(f"{where}: ")
            return UserError(f"{place_in(where, layer.name, field_named_in(what))}: {what}")
    return error


def _check_fields(definition: Any, where: str) -> None:
    if not definition.layer:
        old = "; it is in the old form, with `layers`: upgrade it with Caffe's upgrade_net_proto_text"
        raise UserError(f"{where}: has no layers{old if definition.layers else ''}")
    for descriptor, value in definition.ListFields():
        if descriptor.name in _KNOWN_FIELDS | _FORK_NO_EFFECT:
            continue
        if descriptor.name.startswith("default_") and value == 0:  # FLOAT
            continue
        if descriptor.name in FIELDS:
            raise UserError(
                f"{where}: field {descriptor.name}: a network is tested in quantized values, not trained; "
                "give it in the file of test_net alone"
            )
        raise UserError(f"{where}: field {descriptor.name} is not supported; remove it")


__all__ = ["TEST", "TRAIN", "Learnable", "Net", "NetResult"]
