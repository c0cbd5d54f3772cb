"""A prototxt and one of the states in which its network is used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from google.protobuf import text_format

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.data_fit import READ, settings_of, source_of
from caffe_jacinto.netspec.graph import NetState, alone
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.prototxt.schema import parse_any_net
from caffe_jacinto.prototxt.tree import Message, parse
from caffe_jacinto.prototxt.upgrade import keep_lines

DECLARED = ("Input", "DummyData", "MemoryData", "Parameter")
"""Layers without bottoms that read no data set."""


@dataclass(frozen=True)
class NetFile:
    """A prototxt and the state in which it is used."""

    path: str
    text: str
    """As the file has it; of a file of an older form (`layers`), the same in today's."""

    state: NetState

    tree: Message
    """The text; the lines are those of the file."""

    @cached_property
    def layers(self) -> list[Message]:
        """The layers that the network has in this state."""
        return self.alone.messages("layer")

    @cached_property
    def alone(self) -> Message:
        """The network with the layers of this state only."""
        return alone(self.tree, self.state)

    @cached_property
    def sources(self) -> list[Message]:
        """The layers that read a data set."""
        return [
            layer
            for layer in self.layers
            if role_of(layer.string("type")) == "data" and layer.string("type") not in DECLARED
        ]

    @property
    def data(self) -> Message:
        """The layer that gives the images: the first that reads a data set.

        Raises:
            UserError: there is none, or it is none that can be read.
        """
        if not self.sources:
            raise UserError(
                f"{self.path}: the network has no layer that reads images in the phase {self.state.phase}; "
                "add a Data layer"
            )
        first = self.sources[0]
        if first.string("type") not in READ:
            raise UserError(
                f"{self.where(first)}: type {first.string('type')}: train reads images by one of "
                f"{', '.join(READ)}; make an LMDB (python -m caffe_jacinto.create_lmdb) and a Data layer"
            )
        return first

    @property
    def source(self) -> str:
        """The LMDB or list of the images."""
        return source_of(self.data)

    @property
    def batch(self) -> int:
        return settings_of(self.data).integer("batch_size")

    @property
    def crop(self) -> int | None:
        """Height and width in pixels; None where whole images are taken."""
        return self.data.message("transform_param").integer("crop_size") or None

    @property
    def mean_file(self) -> str | None:
        return self.data.message("transform_param").string("mean_file") or None

    def message_of(self, layer: Message) -> Any:
        """A layer as a LayerParameter message."""
        assert layer.place is not None
        text = self.text[layer.place.start : layer.place.end]
        return parse_any_net(text, self.path).layer[0]

    def where(self, layer: Message, line: int | None = None) -> str:
        """``FILE:LINE: layer NAME``."""
        return f"{self.path}:{line or layer.line}: layer {layer.string('name')}"


def net_file(path: str, text: str, state: NetState) -> NetFile:
    """A prototxt of either dialect and any age.

    Raises:
        UserError: it is not a network.
    """
    message, written = parse_any_net(text, path), parse(text, path)
    if not written.has("layers"):
        return NetFile(path, text, state, written)
    text = text_format.MessageToString(message, as_utf8=True)
    today = parse(text, path)
    keep_lines(today, written)
    return NetFile(path, text, state, today)
