"""Where in a prototxt, of any age, a layer or one of its fields stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import read_text
from caffe_jacinto.prototxt.tree import Message, parse

_INSIDE_SOLVERS = ("net_param", "train_net_param", "test_net_param")


def place_in(where: str, layer: str, field: str = "", text: str | None = None) -> str:
    """``FILE:LINE`` of the ``field`` of a ``layer``, or of what holds it; ``where`` where it is not found.

    ``field`` is a path, like ``convolution_param.stride_w``. ``where`` names the file, ``text`` is what it
    holds if that is at hand. Of several layers of this name it is the first one with the field.
    Without a ``layer`` the field is the file's own.
    """
    try:
        tree = parse(read_text(Path(where)) if text is None else text, where)
    except (UserError, ValueError):
        return where
    names = field.split(".") if field else []
    if layer:
        found = [_line(message, names) for message in _layers_called(tree, layer)]
    else:
        found = [_line(message, names) for message in _nets(tree) if names and message.has(names[0])]
    if not found:
        return where
    _, line = max(found, key=lambda item: item[0])
    return f"{where}:{line}"


def field_named_in(message: str) -> str:
    """The path of the layer's field that a message is about, like ``reshape_param.shape``; empty: none."""
    found = re.search(r"\b\w+_param\.\w+", message)
    return found[0] if found else ""


def line_of_field(layer: Message, field: str) -> int:
    """The line of the ``field`` of a ``layer``, a path, or of what of it there is, or of the layer's name."""
    line = layer.line_of("name")
    for name in filter(None, field.split(".")):
        if not layer.has(name):
            break
        line, layer = layer.line_of(name), layer.message(name)
    return line


def _nets(tree: Message) -> list[Message]:
    """The network itself, and those inside a solver."""
    return [tree, *(net for field in _INSIDE_SOLVERS for net in tree.messages(field))]


def _layers_called(tree: Message, name: str) -> list[Message]:
    layers = [layer for net in _nets(tree) for kind in ("layer", "layers") for layer in net.messages(kind)]
    # A layer of the V0 form is in the field ``layer`` of one of ``layers``.
    return [
        message
        for layer in layers
        for message in (layer, *layer.messages("layer"))
        if message.string("name") == name
    ]


def _line(message: Message, names: Sequence[str]) -> tuple[int, int]:
    """How much of the path ``names`` there is in ``message``, and the line of the last part."""
    line = message.line_of("name")
    for depth, name in enumerate(names):
        if not message.has(name):
            return depth, message.line if depth else line
        line = message.line_of(name)
        message = message.message(name)
    return len(names), line
