"""Command-line arguments: the parser of all commands, and the types of values that they share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Literal, NoReturn

from caffe_jacinto.common.errors import UserError, invoked_as

INT32_MAX = 2**31 - 1
"""The largest integer that Caffe's files hold."""

GpuRequest = tuple[int, ...] | Literal["all", "auto"]
"""GPU numbers (none: the CPU), all GPUs of this machine, or all if it has any and else the CPU."""

LARGEST_SIDE = 65_500
"""The longest side of a JPEG image that libjpeg writes, in pixels."""


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; a wrong one is a `UserError`, and options cannot be abbreviated."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=invoked_as(prog) if prog.startswith("python -m ") else prog,  # else a subcommand's
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._nearest(message)}; --help lists all arguments")

    def _nearest(self, message: str) -> str:
        """The option that an unrecognized one may stand for, as an addition to the message."""
        import difflib

        unknown, _, words = message.partition("arguments: ")
        wrong = next((word.partition("=")[0] for word in words.split() if word.startswith("-")), None)
        if unknown != "unrecognized " or wrong is None:
            return ""
        parsers: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        known = {name for parser in parsers for action in parser._actions for name in action.option_strings}
        nearest = difflib.get_close_matches(wrong, sorted(known), n=1)
        return f"; did you mean {nearest[0]}?" if nearest else ""


def whole_number(least: int, most: int = INT32_MAX) -> Callable[[str], int]:
    """An argument type: a whole number from ``least`` to ``most``, in decimal digits."""

    def read(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number from {least}"
            + (f" to {most:,}" if most < INT32_MAX else "")
        )

    return read


def whole_numbers(least: int, example: str) -> Callable[[str], tuple[int, ...]]:
    """An argument type: whole numbers of ``least`` or more with commas between them, like ``example``."""
    read_one = whole_number(least)

    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(read_one(part) for part in text.split(","))
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not a list of whole numbers of {least} or more, like {example}"
            ) from None

    return read


def layer_bits(text: str) -> tuple[str, int]:
    """An argument type: a layer's name and its bits, ``conv1=16`` -> ("conv1", 16)."""
    name, equals, value = text.rpartition("=")
    if not (name and equals and value.isascii() and value.isdigit() and len(value) < 4):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a layer and its bits, like conv1=16")
    return name, int(value)


def gpu_list(text: str) -> tuple[int, ...]:
    """An argument type: GPU numbers, ``0,1`` -> (0, 1); "" selects the CPU: ()."""
    if not text.strip():
        return ()
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 4 for part in parts):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of GPU numbers like 0,1")
    gpus = tuple(map(int, parts))
    if len(set(gpus)) < len(gpus):
        raise argparse.ArgumentTypeError(f"{text!r} names a GPU twice")
    return gpus


def gpu_request(text: str) -> GpuRequest:
    """An argument type: GPU numbers, or the words ``all`` and ``auto``."""
    if text == "all":
        return "all"
    if text == "auto":
        return "auto"
    try:
        return gpu_list(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            str(error).replace("like 0,1", "like 0,1, nor all or auto")
        ) from None


def image_size(text: str) -> tuple[int, int]:
    """An argument type: width and height in pixels, ``320x240``; ``256`` is 256 x 256."""
    sides = [
        int(side) if side.isascii() and side.isdigit() and len(side) < 6 else 0 for side in text.split("x")
    ]
    if not (1 <= len(sides) <= 2 and all(1 <= side <= LARGEST_SIDE for side in sides)):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a size in pixels: give 256, or 320x240 (width x height)"
        )
    return sides[0], sides[-1]


def blob_shape(text: str) -> tuple[int, int, int]:
    """An argument type: channels, height and width of a network's input, ``3x224x224``."""
    sides = [
        int(side) if side.isascii() and side.isdigit() and len(side) < 6 else 0 for side in text.split("x")
    ]
    if len(sides) != 3 or not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not an input's size: give 3x224x224 (channels x height x width)"
        )
    return sides[0], sides[1], sides[2]


def fraction(text: str) -> float:
    """An argument type: a number between 0 and 1, both excluded."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a fraction between 0 and 1, like 0.8")
    return value


def not_empty(text: str) -> str:
    """An argument type: a path that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text
