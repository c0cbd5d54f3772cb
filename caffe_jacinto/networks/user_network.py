"""A network in a user's own prototxt files: what is in it, and the same text with what a stage has to set.

The text stays as it was written, comments included; `prototxt.edit` changes single fields of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.common.files import expanded, read_text
from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.netspec.data_fit import READ, DataSize, Reading, mistakes_with_data, settings_of, source_of
from caffe_jacinto.netspec.graph import TEST, TRAIN, NetState, nodes_of, readers, scale_after
from caffe_jacinto.netspec.layer_types import blob_shapes_of
from caffe_jacinto.netspec.layer_types.forks import keeps_averages
from caffe_jacinto.netspec.mistakes import mistakes
from caffe_jacinto.netspec.predictions import head_of, parameters_of, predictions
from caffe_jacinto.networks.prototxt_file import NetFile, net_file
from caffe_jacinto.prototxt.edit import Edits
from caffe_jacinto.prototxt.places import field_named_in, line_of_field
from caffe_jacinto.prototxt.render import number, quote
from caffe_jacinto.prototxt.tree import Message

if TYPE_CHECKING:
    from caffe_jacinto.recipes.model import NetworkSettings, Recipe

KEY = "network.prototxt"


@dataclass(frozen=True)
class UserNetwork:
    """A network to train, and those that test it."""

    train: NetFile
    tests: tuple[NetFile, ...]
    """At least one."""

    @property
    def name(self) -> str:
        """For the names of folders and snapshots."""
        title = self.train.tree.string("name") or Path(self.train.path).stem
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in title)
        return safe.lstrip("._-")[:64] or "network"

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of its prototxts, each once."""
        return tuple(dict.fromkeys(net.path for net in (self.train, *self.tests)))

    @cached_property
    def head(self) -> Message:
        """The last layer with weights before the prediction.

        Raises:
            UserError: there is none.
        """
        found = predictions(self.train.layers)
        head = head_of(self.train.layers, found[0]) if found else None
        if head is None:
            raise UserError(
                f"{self.train.path}: no convolution or inner product leads to a loss in the training "
                "network; train needs one"
            )
        return head

    @property
    def classes(self) -> int:
        """The outputs of the head."""
        return parameters_of(self.head).integer("num_output")

    @property
    def has_batch_norm(self) -> bool:
        return any(
            layer.string("type") == "BatchNorm" or (layer.string("type") == "BN" and keeps_averages(layer))
            for layer in self.train.layers
        )

    # Layers by name

    def with_batch_norms(self, names: Iterable[str], key: str) -> frozenset[str]:
        """The layers ``names``, each with the batch norm and the scale that follow it.

        ``key`` is the recipe's key that the names come from.

        Raises:
            UserError: there is no such layer, or it has no weights.
        """
        layers, nodes = self.train.layers, nodes_of(self.train.layers)
        known = {node.name: at for at, node in enumerate(nodes) if _blobs(layers[at])}
        chosen = set()
        for name in names:
            if name not in known:
                raise UserError(
                    f"{key}: {name} is not a layer with weights of {self.train.path}; "
                    f"{did_you_mean(name, known)}"
                )
            chosen.add(name)
            after = readers(nodes, known[name]) if nodes[known[name]].type != "BatchNorm" else [known[name]]
            if len(after) >= 1 and nodes[after[0]].type == "BatchNorm":
                chosen.add(nodes[after[0]].name)
                scale = scale_after(nodes, after[0])
                chosen |= set() if scale is None else {nodes[scale].name}
        return frozenset(chosen)

    def layers_to_name(self, stored: Iterable[str]) -> list[str]:
        """The fewest layers that, with their batch norms, cover the stored layers ``stored``."""
        missing, named = set(stored), []
        for layer in self.train.layers:
            if layer.string("name") in missing:
                named.append(layer.string("name"))
                missing -= self.with_batch_norms(named[-1:], "")
        return named


def read_user_network(settings: NetworkSettings) -> UserNetwork:
    """The network of a recipe's `[network]` table with `prototxt`.

    Raises:
        UserError: a file cannot be read, or is not a network of either dialect, or has layers that Caffe
            refuses.
    """
    assert settings.prototxt is not None
    train = _net_file(settings.prototxt, TRAIN, settings.train_level, settings.train_stages)
    tests = settings.test_prototxt or (settings.prototxt,) * settings.tests
    levels = settings.test_levels or (0,) * settings.tests
    stages = settings.test_stages or ((),) * settings.tests
    states = zip(tests, levels, stages, strict=True)
    return UserNetwork(train, tuple(_net_file(path, TEST, level, names) for path, level, names in states))


def _net_file(path: str, phase: str, level: int, stages: Sequence[str]) -> NetFile:
    file = expanded(path)
    text = read_text(file, f"name the network's prototxt as {KEY}")
    return _checked(str(file), text, NetState(phase, level, frozenset(stages)))


@lru_cache(maxsize=16)
def _checked(path: str, text: str, state: NetState) -> NetFile:
    net = net_file(path, text, state)
    wrong = list(mistakes(net.alone, path))
    if wrong:
        raise UserErrors(wrong)
    return net


def mistakes_of(network: UserNetwork, recipe: Recipe, data: Mapping[str, DataSize]) -> list[str]:
    """What is wrong in the network's files, each with its file, line and field.

    ``data`` are the LMDBs and lists that are known, by their paths.
    """
    crop = recipe.network.crop_size if recipe.network.crop_size != network.train.crop else None

    def reading(net: NetFile, replaced: str, lmdb: str) -> Reading:
        used = {source: lmdb if source == replaced else source for source in map(source_of, net.sources)}
        known = {source: (path, data[path]) for source, path in used.items() if path in data}
        return Reading(net.alone, net.path, known, crop)

    first = network.tests[0].source
    return mistakes_with_data(
        [
            reading(network.train, network.train.source, recipe.data.train_lmdb),
            *(reading(net, first, recipe.data.val_lmdb) for net in network.tests),
        ]
    )


_OF_STAGE = re.compile(r"((?:.*?/)?(train|val|val_\d+)\.prototxt): (.*)", re.DOTALL)
"""A problem in a stage's file: the file, which network it is, what is wrong."""


def in_their_files(problems: Iterable[str], network: UserNetwork, known: Sequence[str]) -> list[str]:
    """``problems`` of stages' files, as ``run/initial/train.prototxt: layer NAME ...``, in the user's files.

    The files of all stages are made from the user's: of the problems at one of those layers the first is
    kept, and none if there is one in ``known`` (`mistakes_of`). What is not about these files, or is about a
    layer that a recipe has added, stays as it is.
    """
    found: dict[str, str] = {}
    for problem in problems:
        at = _in_their_file(problem, network)
        if at is None:
            found.setdefault(problem, problem)
        elif not any(re.match(rf"{re.escape(at.path)}:\d+: {re.escape(at.layer)}: ", it) for it in known):
            found.setdefault(at.place, at.problem)
    return list(found.values())


class _AtTheirs(NamedTuple):
    """A problem in the user's file."""

    path: str
    layer: str
    """``layer NAME``, or nothing."""

    place: str
    problem: str


def _in_their_file(problem: str, network: UserNetwork) -> _AtTheirs | None:
    """A problem of a stage's file in the user's; None where it is not made from that."""
    parts = _OF_STAGE.fullmatch(problem)
    if parts is None:
        return None
    file, kind, what = parts.groups()
    what = what.replace(f"in {Path(file).parent}/train.prototxt", "in the training network")
    nets = (network.train,) if kind == "train" else network.tests
    named = [
        (net, layer)
        for net in nets
        for layer in net.layers
        if re.match(rf"layer {re.escape(layer.string('name'))}[ :]", what)
    ]
    if named:
        net, layer = max(named, key=lambda item: len(item[1].string("name")))
        line = line_of_field(layer, field_named_in(what))
        name = f"layer {layer.string('name')}"
        return _AtTheirs(net.path, name, net.where(layer), f"{net.path}:{line}: {what}")
    if what.startswith("layer "):
        return None
    return _AtTheirs(nets[0].path, "", what, f"{nets[0].path}: {what}")


# ----------------------------------------------------------------------------- the texts of a stage


def train_text(network: UserNetwork, recipe: Recipe, batch: int) -> str:
    """The training network with batches of ``batch`` images, the recipe's LMDB, and its layers frozen."""
    net, settings = network.train, recipe.network
    edits = Edits(net.text)
    _set_images(net, edits, recipe, network, recipe.data.train_lmdb, batch)
    if recipe.data.mirror != net.data.message("transform_param").flag("mirror"):
        _transform(edits, net.data, {"mirror": "true" if recipe.data.mirror else "false"})
    augmentation = {name: number(value) for name, value in recipe.data.augmentation().items()}
    if augmentation:
        _transform(edits, net.data, augmentation)
    frozen = network.with_batch_norms(settings.frozen, "network.frozen")
    for layer in net.layers:
        if layer.string("name") in frozen:
            _freeze(edits, layer)
    if settings.head_lr_mult != 1:
        _faster(edits, network.head, settings.head_lr_mult)
    check_something_learns(network, frozen)
    return edits.text()


def test_texts(network: UserNetwork, recipe: Recipe) -> list[str]:
    """The test networks, with the recipe's LMDB and batch."""
    texts = []
    for net in network.tests:
        edits = Edits(net.text)
        first = network.tests[0]
        same = net.source == first.source
        source = recipe.data.val_lmdb if same else net.source
        batch = recipe.training.val_batch_size if net.batch == first.batch else net.batch
        _set_images(net, edits, recipe, network, source, batch)
        texts.append(edits.text())
    return texts


def check_something_learns(network: UserNetwork, frozen: frozenset[str]) -> None:
    """Raise UserError where a recipe freezes everything, or the head that `head_lr_mult` is for."""
    if frozen and frozen.issuperset(layer.string("name") for layer in network.train.layers if _blobs(layer)):
        raise UserError("network.frozen names all layers, so nothing would be trained; leave some out")


def test_batches(network: UserNetwork, recipe: Recipe, data: Mapping[str, DataSize]) -> list[int | None]:
    """The batches of one test of each test network: the recipe's, else those that cover its data once.

    None where these are not known.
    """
    if recipe.network.test_iter:
        return list(recipe.network.test_iter)
    found: list[int | None] = []
    for net in network.tests:
        first = network.tests[0]
        source = recipe.data.val_lmdb if net.source == first.source else net.source
        batch = recipe.training.val_batch_size if net.batch == first.batch else net.batch
        found.append(ceil(data[source].images / batch) if source in data else None)
    return found


def _set_images(
    net: NetFile, edits: Edits, recipe: Recipe, network: UserNetwork, source: str, batch: int
) -> None:
    """Set what the recipe has otherwise than the file: LMDB or list, batch, crop and mean image."""
    before = settings_of(net.data)
    for layer in net.sources:
        data, transform = settings_of(layer), layer.message("transform_param")
        if layer.string("type") not in READ:
            continue
        if data.string("source") == net.source and source != net.source:
            edits.set(data, "source", quote(source))
        if data.integer("batch_size") == before.integer("batch_size") != batch:
            edits.set(data, "batch_size", str(batch))
        crop = recipe.network.crop_size
        if crop != network.train.crop and transform.has("crop_size"):
            edits.set(transform, "crop_size", str(crop))
        mean = recipe.data.mean_file
        if mean is not None and mean != network.train.mean_file and transform.has("mean_file"):
            edits.set(transform, "mean_file", quote(mean))


def _transform(edits: Edits, layer: Message, fields: Mapping[str, str]) -> None:
    transform = layer.messages("transform_param")
    if transform:
        for name, value in fields.items():
            edits.set(transform[-1], name, value)
    else:
        lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
        edits.add(layer, f"transform_param {{\n{lines}\n}}")


def _freeze(edits: Edits, layer: Message) -> None:
    """Stop the learning of a layer, its weight decay and its statistics."""
    params = layer.messages("param")
    for param in params:
        edits.set(param, "lr_mult", "0")
        edits.set(param, "decay_mult", "0")
    for _ in range(_blobs(layer) - len(params)):
        edits.add(layer, "param {\n  lr_mult: 0\n  decay_mult: 0\n}")
    if layer.string("type") == "BatchNorm":
        norm = layer.messages("batch_norm_param")
        if norm:
            edits.set(norm[-1], "use_global_stats", "true")
        else:
            edits.add(layer, "batch_norm_param {\n  use_global_stats: true\n}")


def _faster(edits: Edits, layer: Message, factor: float) -> None:
    """Multiply the learning rates of a layer."""
    params = layer.messages("param")
    for param in params:
        edits.set(param, "lr_mult", number(param.number("lr_mult", 1.0) * factor))
    for _ in range(_blobs(layer) - len(params)):
        edits.add(layer, f"param {{\n  lr_mult: {number(factor)}\n}}")


def _blobs(layer: Message) -> int:
    """How many blobs a layer has."""
    bottoms = [None] * len(layer.strings("bottom"))
    return len(blob_shapes_of(layer, bottoms))
