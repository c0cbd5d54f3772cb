"""Changes to a prototxt as text: what is not changed stays as it was written, comments included."""

from __future__ import annotations

from caffe_jacinto.prototxt.tree import Message, Place

INDENT = "  "


class Edits:
    """Changes to a text, whose messages `tree.parse` has found; `text` applies them all."""

    def __init__(self, text: str) -> None:
        self._original = text
        self._changes: list[tuple[int, int, str]] = []

    def set(self, message: Message, name: str, value: str) -> None:
        """Give the field ``name`` of ``message`` the ``value``, protobuf text, instead of any that it has."""
        places = message.places_of(name)
        if not places:
            self.add(message, f"{name}: {value}")
            return
        for place in places[:-1]:
            self.remove(place)
        self._replace(places[-1].value, places[-1].end, value)

    def add(self, message: Message, field: str) -> None:
        """Add ``field``, protobuf text of one or more lines, at the end of ``message``."""
        if message.place is None:
            self._replace(len(self._original), len(self._original), field + "\n")
            return
        closing = message.place.end - 1
        line = self._original.rfind("\n", 0, closing) + 1
        before = self._original[line:closing]
        if before.strip():  # the message ends on a line of its last field
            self._replace(closing, closing, f" {' '.join(field.split())} ")
            return
        margin = before + INDENT
        lines = "".join(f"{margin}{part}\n" for part in field.splitlines())
        self._replace(line, line, lines)

    def add_after(self, message: Message, field: str) -> None:
        """Add ``field``, protobuf text of one or more lines, after ``message``."""
        assert message.place is not None
        self._replace(message.place.end, message.place.end, f"\n{field}")

    def remove(self, place: Place) -> None:
        """Remove a field, and its line where nothing else is on it."""
        start, end = place.start, place.end
        line = self._original.rfind("\n", 0, start) + 1
        rest = self._original.find("\n", end)
        rest = len(self._original) if rest < 0 else rest
        if not self._original[line:start].strip() and not self._original[end:rest].strip(" \t\r;,"):
            start, end = line, min(rest + 1, len(self._original))
        self._replace(start, end, "")

    def text(self) -> str:
        """The text with all changes."""
        result, last = [], 0
        for start, end, new in sorted(self._changes, key=lambda change: (change[0], -change[1])):
            if start < last:
                continue  # inside of what is removed
            result += [self._original[last:start], new]
            last = end
        return "".join([*result, self._original[last:]])

    def _replace(self, start: int, end: int, new: str) -> None:
        self._changes.append((start, end, new))
