"""Both dialects' schemas as protobuf message classes, and prototxt text parsed against them.

``bvlc.proto`` and ``caffe_jacinto.proto`` are the schemas as readable text; the descriptor sets beside them
are what is loaded. Each has its own pool and package, so that one process can hold both, and pycaffe's too.
Both get the messages and fields of ``forks.proto`` that they lack.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.forks import FIELDS, V1_FORKS
from caffe_jacinto.prototxt.upgrade import upgrade_net, upgrade_solver

SCHEMA_FOLDER = Path(__file__).parent
PACKAGES = {Dialect.BVLC: "caffe_jacinto.bvlc", Dialect.CAFFE_JACINTO: "caffe_jacinto.fork"}


@dataclass(frozen=True)
class Messages:
    """The message classes of one dialect that this project uses."""

    NetParameter: Any
    SolverParameter: Any
    SolverState: Any
    BlobProto: Any
    Datum: Any


FORKS_PACKAGE = "caffe_jacinto.forks"


@cache
def pool(dialect: Dialect) -> descriptor_pool.DescriptorPool:
    """All of the dialect's descriptors, and those of forks.proto."""
    file = _stored(dialect.value)
    _add_forks(file)
    result = descriptor_pool.DescriptorPool()
    result.AddSerializedFile(file.SerializeToString())
    return result


def own_field_names(dialect: Dialect) -> frozenset[str]:
    """The names of all fields of the dialect's own messages."""
    return frozenset(field.name for message in _stored(dialect.value).message_type for field in message.field)


def _stored(name: str) -> Any:
    """The FileDescriptorProto in a descriptor set of this folder."""
    content = (SCHEMA_FOLDER / f"{name}.binpb").read_bytes()
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(content).file
    return file


def _add_forks(file: Any) -> None:
    """Add what forks.proto has to a dialect's FileDescriptorProto, unless that has the name already."""
    own = {message.name: message for message in file.message_type}
    for message in _stored("forks").message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(f".{FORKS_PACKAGE}.", f".{file.package}.")
        if message.name not in own:
            file.message_type.append(message)
            continue
        _add_enumerators(own[message.name], message)
        known = {field.name for field in own[message.name].field}
        own[message.name].field.extend(field for field in message.field if field.name not in known)


def _add_enumerators(own: Any, message: Any) -> None:
    """Add the values that enumerations of ``message`` have to those of the same name in ``own``."""
    enumerations = {enumeration.name: enumeration for enumeration in own.enum_type}
    for enumeration in message.enum_type:
        if enumeration.name in enumerations:
            enumerations[enumeration.name].value.extend(enumeration.value)


@cache
def messages(dialect: Dialect) -> Messages:
    """The message classes of the dialect; read a binary file with those of its own dialect only."""

    def message_class(name: str) -> Any:
        descriptor = pool(dialect).FindMessageTypeByName(f"{PACKAGES[dialect]}.{name}")
        return message_factory.GetMessageClass(descriptor)

    return Messages(
        NetParameter=message_class("NetParameter"),
        SolverParameter=message_class("SolverParameter"),
        SolverState=message_class("SolverState"),
        BlobProto=message_class("BlobProto"),
        Datum=message_class("Datum"),
    )


def parse_net(text: str, dialect: Dialect, where: str) -> Any:
    """A network's prototxt of any age as the dialect's NetParameter, in today's form (`upgrade.py`).

    ``where`` is the file's name, for messages.

    Raises:
        UserError: it does not follow the dialect's schema: file, line and what is wrong.
    """
    net = _parse(text, "NetParameter", dialect, where)
    upgrade_net(net, where, text)
    return net


def parse_any_net(text: str, where: str, dialect: Dialect | None = None) -> Any:
    """As `parse_net`; without ``dialect``, by stock Caffe's schema, else by the fork's."""
    if dialect is not None:
        return parse_net(text, dialect, where)
    try:
        return parse_net(text, Dialect.BVLC, where)
    except UserError as error:
        try:
            return parse_net(text, Dialect.CAFFE_JACINTO, where)
        except UserError:
            raise error from None


def parse_solver(text: str, dialect: Dialect, where: str) -> Any:
    """A solver's prototxt as the dialect's SolverParameter; as `parse_net`."""
    solver = _parse(text, "SolverParameter", dialect, where)
    upgrade_solver(solver, where, text)
    return solver


def brought_up_to_date(text: str, where: str) -> tuple[str, list[str]]:
    """A network's or solver's prototxt of any age, rewritten in today's form without its comments.

    Returns the text, empty where it is in today's form already, and what could not be kept, a line for each
    setting.

    Raises:
        UserError: it is neither, or Caffe would stop at it; as `parse_net`.
    """
    forms = [(kind, dialect) for kind in _OWNERS for dialect in Dialect]
    kind, dialect = next((form for form in forms if _parses(text, *form)), forms[0])
    message = _parse(text, kind, dialect, where)
    before = message.SerializeToString()
    remarks = (upgrade_net if kind == "NetParameter" else upgrade_solver)(message, where, text)
    if message.SerializeToString() == before:
        return "", remarks
    return text_format.MessageToString(message, as_utf8=True), remarks


def parse_any_solver(text: str, where: str) -> Any:
    """As `parse_solver`, by stock Caffe's schema, else by the fork's."""
    try:
        return parse_solver(text, Dialect.BVLC, where)
    except UserError as error:
        try:
            return parse_solver(text, Dialect.CAFFE_JACINTO, where)
        except UserError:
            raise error from None


def dialect_of(message: Any) -> Dialect:
    """The dialect whose schema ``message`` is of."""
    name = str(message.DESCRIPTOR.full_name)
    return next(dialect for dialect in Dialect if name.startswith(f"{PACKAGES[dialect]}."))


def translated(layer: Any, to: Dialect) -> tuple[Any, list[str]]:
    """A LayerParameter message in the schema of ``to``, and the fields that this schema lacks, as paths.

    Fields are matched by name: their numbers collide between the dialects.

    Raises:
        UserError: a field of this name takes other values in ``to``, so the message is damaged.
    """
    target = messages(to).NetParameter().layer.add()
    text = text_format.MessageToString(layer, as_utf8=True, print_unknown_fields=False)
    try:
        text_format.Parse(text, target, allow_unknown_field=True)
    except text_format.ParseError:
        raise UserError(f"layer {layer.name!r}: its settings are damaged; take another file") from None
    return target, list(_unknown_fields(layer, target.DESCRIPTOR))


def _unknown_fields(message: Any, known: Any, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        path = prefix + field.name
        if field.name not in known.fields_by_name:
            yield path
        elif field.message_type is not None:
            inner = known.fields_by_name[field.name].message_type
            for part in value if hasattr(value, "append") else [value]:
                yield from _unknown_fields(part, inner, f"{path}.")


def _parse(text: str, kind: str, dialect: Dialect, where: str) -> Any:
    try:
        return text_format.Parse(text, getattr(messages(dialect), kind)())
    except text_format.ParseError as error:
        line = error.GetLine() or 1
        what = re.sub(r"^\d+:\d+ : ", "", str(error)).replace(f"{PACKAGES[dialect]}.", "")
        what = " ".join(what.split()).rstrip(".")
        hint = _hint(text, kind, dialect, what)
    raise UserError(f"{where}:{line}: not a {kind} of the dialect {dialect.value}: {what}; {hint}")


def _hint(text: str, kind: str, dialect: Dialect, what: str) -> str:
    """What to do about a parse error."""
    other = next(d for d in Dialect if d is not dialect)
    if _parses(text, kind, other):
        return f"the file is valid in the dialect {other.value}: was it written for that Caffe?"
    swapped = next(name for name in _OWNERS if name != kind)
    if any(_parses(text, swapped, each) for each in Dialect):
        return f"it is {_OWNERS[swapped]} prototxt: give {_OWNERS[kind]}"
    unknown = re.search(r'Message type "([\w.]+)" has no field named "(\w+)"', what)
    if unknown is None:
        old_type = re.search(r'V1LayerParameter.LayerType" has no value named "?(\w+)', what)
        fork = V1_FORKS.get(old_type[1].replace("_", "")) if old_type else None
        if fork is not None:
            return f"that type is of {fork}, and nothing here knows it in this form: remove the layer"
        return "correct this line"
    if unknown[2] in FIELDS:
        return (
            f"that field is of {FIELDS[unknown[2]]}, and nothing here knows it: remove it, or what it is in"
        )
    descriptor = pool(dialect).FindMessageTypeByName(f"{PACKAGES[dialect]}.{unknown[1]}")
    nearest = difflib.get_close_matches(unknown[2], [f.name for f in descriptor.fields], n=1)
    return f"did you mean {nearest[0]}?" if nearest else "remove or rename it"


_OWNERS = {"NetParameter": "a network's", "SolverParameter": "a solver's"}


def _parses(text: str, kind: str, dialect: Dialect) -> bool:
    try:
        text_format.Parse(text, getattr(messages(dialect), kind)())
    except text_format.ParseError:
        return False
    return True
