"""Read a log file as it grows."""

from __future__ import annotations

from pathlib import Path

CHUNK = 1 << 20


class Tail:
    """What is appended to a file from byte ``start`` on; the file need not be there yet."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._position = start

    def read(self) -> bytes:
        """What is new, up to 1 MiB; empty when nothing is."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self._position += len(data)
        return data
