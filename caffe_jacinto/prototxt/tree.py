"""Protobuf text format without a schema: text -> tree.

Logs of any Caffe print networks and solver settings with fields that neither schema knows; this parser reads
them all. Prototxt files of the two dialects are parsed with their schema (`schema.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from caffe_jacinto.common.errors import UserError

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = "Scalar | Message"

_TOKEN = re.compile(
    r"""(?P<skip>[\s,;]+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<mark>[{}<>\[\]:])
      | (?P<word>[^\s,;:{}<>\[\]\#"']+)""",
    re.VERBOSE,
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_NAMED_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_MAX_DEPTH = 100

_MOST_DIGITS = 20
"""Of a whole number of 64 bits, its sign included."""


class Place(NamedTuple):
    """Where a field is in the text: its line, from 1, and the offsets of its name, its value and its end."""

    line: int
    start: int
    value: int
    end: int


class _Token(NamedTuple):
    kind: str
    text: str
    line: int
    start: int
    end: int


class Message:
    """The fields of one message, in the order of the text; a repeated field comes several times."""

    def __init__(self) -> None:
        self.fields: list[tuple[str, Value]] = []
        self.places: list[Place] = []
        """Of each field; empty in a message that was not parsed from text."""

        self.place: Place | None = None
        """Of the message itself, where it is a field; None for a whole text."""

    @property
    def line(self) -> int:
        """The line of a message that is a field; 1 for a whole text."""
        return self.place.line if self.place else 1

    def places_of(self, name: str) -> list[Place]:
        """Where the values of the field ``name`` are, in order."""
        return [place for (field, _), place in zip(self.fields, self.places, strict=False) if field == name]

    def line_of(self, name: str) -> int:
        """The line of the last value of ``name``; that of the message where there is none."""
        found = self.places_of(name)
        return found[-1].line if found else self.line

    def all(self, name: str) -> list[Value]:
        """Every value of the field ``name``, in order."""
        return [value for field, value in self.fields if field == name]

    def messages(self, name: str) -> list[Message]:
        """Every value of ``name`` that is a message."""
        return [value for value in self.all(name) if isinstance(value, Message)]

    def message(self, name: str) -> Message:
        """The last message called ``name``, or an empty one."""
        found = self.messages(name)
        return found[-1] if found else Message()

    def strings(self, name: str) -> list[str]:
        """Every value of ``name`` that is text (a string or an enumerator's name)."""
        return [value for value in self.all(name) if isinstance(value, str)]

    def string(self, name: str, default: str = "") -> str:
        """The last text value of ``name``."""
        found = self.strings(name)
        return found[-1] if found else default

    def number(self, name: str, default: float = 0.0) -> float:
        """The last number of ``name``."""
        found = [v for v in self.all(name) if isinstance(v, (int, float)) and not isinstance(v, bool)]
        return float(found[-1]) if found else default

    def integers(self, name: str) -> list[int]:
        """Every value of ``name`` that is a whole number."""
        return [value for value in self.all(name) if isinstance(value, int) and not isinstance(value, bool)]

    def integer(self, name: str, default: int = 0) -> int:
        """The last whole number of ``name``."""
        found = self.integers(name)
        return found[-1] if found else default

    def optional_integer(self, name: str) -> int | None:
        """The last whole number of ``name``, or None where there is none."""
        found = self.integers(name)
        return found[-1] if found else None

    def flag(self, name: str, default: bool = False) -> bool:
        """The last truth value of ``name``."""
        found = [value for value in self.all(name) if isinstance(value, bool)]
        return found[-1] if found else default

    def has(self, name: str) -> bool:
        """Whether the field ``name`` is set."""
        return any(field == name for field, _ in self.fields)


def tree_of(message: Any) -> Message:
    """A protobuf message as a tree: fields that are set, enumerators by their names."""
    tree = Message()
    for field, value in message.ListFields():
        for item in value if hasattr(value, "append") else [value]:  # repeated fields are lists
            if field.message_type is not None:
                item = tree_of(item)
            elif field.enum_type is not None:
                known = field.enum_type.values_by_number.get(item)
                item = item if known is None else known.name
            tree.fields.append((field.name, item))
    return tree


def parse(text: str, where: str = "prototxt") -> Message:
    """Read protobuf text.

    Raises:
        UserError: the text is not protobuf text, or ends inside a message; with ``where`` and the line.
    """
    tokens = list(_tokens(text, where))
    root = Message()
    end = _fields(tokens, 0, root, None, where, 0)
    if end != len(tokens):
        raise _error(where, tokens[end].line, f"unexpected {tokens[end].text!r}")
    return root


def _tokens(text: str, where: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error(where, line, f"unexpected {text[position]!r}")
        kind = match.lastgroup or ""
        if kind != "skip":
            yield _Token(kind, match.group(), line, position, match.end())
        line += match.group().count("\n")
        position = match.end()


def _fields(tokens: list[_Token], at: int, into: Message, closing: str | None, where: str, depth: int) -> int:
    """Read fields into ``into`` up to the token ``closing``; returns the index after it."""
    if depth > _MAX_DEPTH:
        raise _error(where, tokens[at - 1].line, f"messages nested deeper than {_MAX_DEPTH}")
    while at < len(tokens):
        kind, name, line, start, _ = tokens[at]
        if kind == "mark" and name == closing:
            return at + 1
        if kind != "word":
            raise _error(where, line, f"expected a field's name, found {name!r}")
        at += 1
        if at < len(tokens) and tokens[at][:2] == ("mark", ":"):
            at += 1
        if at >= len(tokens):
            raise _error(where, line, f"the text ends after {name!r}")
        if tokens[at][:2] == ("mark", "["):
            at = _list(tokens, at + 1, name, into, where, depth)
        else:
            at = _field(tokens, at, Place(line, start, tokens[at].start, 0), name, into, where, depth)
    if closing is not None:
        raise _error(where, tokens[-1].line, f"the text ends before {closing!r}")
    return at


def _field(
    tokens: list[_Token], at: int, begin: Place, name: str, into: Message, where: str, depth: int
) -> int:
    """Read the value of ``name`` into ``into``; ``begin`` is its place but for the end."""
    value, at = _value(tokens, at, where, depth)
    place = begin._replace(end=tokens[at - 1].end)
    if isinstance(value, Message):
        value.place = place
    into.fields.append((name, value))
    into.places.append(place)
    return at


def _list(tokens: list[_Token], at: int, name: str, into: Message, where: str, depth: int) -> int:
    """Read the short form ``name: [a, b]``; returns the index after the bracket."""
    while at < len(tokens):
        if tokens[at][:2] == ("mark", "]"):
            return at + 1
        place = Place(tokens[at].line, tokens[at].start, tokens[at].start, 0)
        at = _field(tokens, at, place, name, into, where, depth)
    raise _error(where, tokens[-1].line, "the text ends before ']'")


def _value(tokens: list[_Token], at: int, where: str, depth: int) -> tuple[Value, int]:
    kind, text, line, *_ = tokens[at]
    if kind == "mark" and text in "{<":
        inner = Message()
        return inner, _fields(tokens, at + 1, inner, "}" if text == "{" else ">", where, depth + 1)
    if kind == "string":
        parts = []
        while at < len(tokens) and tokens[at].kind == "string":
            parts.append(_unquote(tokens[at].text))
            at += 1
        return "".join(parts), at
    if kind == "word":
        return _scalar(text), at + 1
    raise _error(where, line, f"expected a value, found {text!r}")


def _scalar(word: str) -> Scalar:
    if word in ("true", "false"):
        return word == "true"
    if len(word) <= _MOST_DIGITS:
        try:
            return int(word, 0) if word.lower().lstrip("-").startswith("0x") else int(word)
        except ValueError:
            pass
    try:
        return float(word.rstrip("fF")) if word[:1] in "-.0123456789" else word
    except ValueError:
        return word


def _unquote(token: str) -> str:
    if "\\" not in token:
        return token[1:-1]

    def character(match: re.Match[bytes]) -> bytes:
        octal, hexadecimal, other = match.groups()
        if octal is not None:
            return bytes([int(octal, 8) & 0xFF])
        if hexadecimal is not None:
            return bytes([int(hexadecimal, 16)])
        return _NAMED_ESCAPES.get(other, other)

    raw = token[1:-1].encode("utf-8", "surrogateescape")
    return _ESCAPE.sub(character, raw).decode("utf-8", "replace")


def _error(where: str, line: int, what: str) -> UserError:
    return UserError(f"{where}, line {line}: {what}")
