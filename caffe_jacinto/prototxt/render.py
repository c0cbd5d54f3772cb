"""Jinja templates to prototxt text: each value that a template prints becomes protobuf text of its type.

A string is always quoted and escaped; a template cannot print a value as it stands, except a `Name`.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import template_folder

FLOAT32 = struct.Struct("<f")
FLOAT32_MAX = 3.4028234663852886e38
BLANK_LINES = re.compile(r"\n(?:[ ]*\n)+")
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def render(template: str, **values: Any) -> str:
    """The text of ``templates/prototxt/<template>`` with ``values``.

    Raises:
        UserError: a string is not Unicode, or a number is not a float32.
        jinja2.UndefinedError: the template asks for what was not given.
    """
    text = _environment().get_template(template).render(values)
    return BLANK_LINES.sub(
        "\n", text
    )  # What a template leaves out leaves its line; no value holds a newline.


def quote(text: str) -> str:
    """``text`` as a double-quoted string of protobuf's text format; printable characters stay readable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{text.encode('utf-8', 'backslashreplace').decode()}: "
            "a name that is not UTF-8 cannot stand in a prototxt; rename the file or folder"
        ) from None
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    if character.isprintable():
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode())


def number(value: float) -> str:
    """The shortest decimal that is ``value`` once it is a float32, as protobuf holds it.

    Raises:
        UserError: the value lies beyond float32.
    """
    try:
        (single,) = FLOAT32.unpack(FLOAT32.pack(value))
    except OverflowError:
        raise UserError(f"{value}: too large for Caffe's 32-bit numbers; give a smaller one") from None
    for digits in range(1, 9):
        text = f"{single:.{digits}g}"
        # Rounded up, the largest float32 lies beyond float32.
        if abs(float(text)) <= FLOAT32_MAX and FLOAT32.pack(float(text)) == FLOAT32.pack(single):
            return text
    return f"{single:.9g}"


class Name(str):
    """The name of a field or enumerator, which is printed without quotes."""


def _printed(value: Any) -> Any:
    if isinstance(value, (Markup, Undefined)):  # a macro's own output; StrictUndefined raises when printed
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Name):
        if not value.isidentifier():
            raise UserError(f"{value!r} is not the name of a field or enumerator")
        return Markup(value)
    if isinstance(value, str):
        return Markup(quote(value))
    raise TypeError(f"a prototxt template prints {value!r}")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(template_folder() / "prototxt"),
        undefined=StrictUndefined,
        # Macros return marked text, which `finalize` leaves as it is.
        autoescape=True,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["field"] = Name
    return environment
