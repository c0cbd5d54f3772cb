"""A log's bytes, as they arrive -> lines -> events.

Reads what stock Caffe 1.0, NVCaffe 0.16/0.17 and caffe-jacinto print through glog (see `messages`). Lines of
several threads are interleaved. A process that was killed leaves a cut line, and the next process starts in
the middle of it. A line counts once its end has arrived, so that a log cut anywhere gives the first events of
the whole log. Lines end in a newline, a carriage return or both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from caffe_jacinto.logs.events import Event
from caffe_jacinto.logs.messages import ITERATION, PREFIX, TEST_OUTPUT, MessageReader, stamp

_CAFFE_SOURCES = re.compile(
    rb"(?:_?caffe|solver|sgd_solver|net|parallel|common|upgrade_proto|io|layer_factory|math_functions|syncedmem|"
    rb"signal_handler|db_lmdb|\w+_layer|\w+_solver)\.(?:cpp|hpp|cu)$"
)
_CLOSED = re.compile(rb"(?:\)|Done\.)$")

_BRACKET = ord(")")
"""Of an iteration's lines, only the one that announces a test ends with it."""

_LINE_LIMIT = 1_000_000
"""Longer lines are not log lines. They are dropped, so that memory does not grow with them."""


class LogReader:
    """Takes a log in pieces of any size and returns the events that they complete.

    ``skim`` is several times as fast. It leaves out what a summary does not need: learning rates, and lines
    of training that have further ones on both sides.
    """

    def __init__(self, *, skim: bool = False) -> None:
        self._skim = skim
        self.is_caffe = False
        """Whether a line of Caffe's has been seen."""
        self.first_stamp: str | None = None
        self.last_stamp: str | None = None
        """glog's date and time of the first and last complete line."""
        self._tail = b""
        self._last_line = b""
        self._messages = MessageReader()

    @property
    def header_year(self) -> int | None:
        """The year in the header of a log file that glog wrote itself."""
        return self._messages.header_year

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data``, the next piece of the log, completes."""
        content = self._tail + data
        if b"\r" in data:
            # A piece may end between the two of \r\n; the empty line that this makes changes nothing.
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = content.split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > _LINE_LIMIT:
            self._tail = self._tail[-1000:]
        if self._skim:
            self._read(self._ends(lines))
        else:
            self._note_first(lines)
            self._read(lines)
        return self._take()

    def close(self) -> list[Event]:
        """The log has ended: the event of a last line without its newline, if it is certainly complete."""
        if _CLOSED.search(self._tail.rstrip()):
            self._note_first([self._tail])
            self._read([self._tail])
        self._tail = b""
        return self._take()

    def _take(self) -> list[Event]:
        if self._last_line:
            self.last_stamp = stamp(self._last_line)
        events, self._messages.events = self._messages.events, []
        if events:
            self.is_caffe = True
        return events

    def _ends(self, lines: list[bytes]) -> Iterator[bytes]:
        """The lines, without those that ``skim`` leaves out."""
        self._note_first(lines)
        first, waiting, last = True, b"", b""
        for line in lines:
            parts = line.split(b"] ")
            # A third part belongs to another line, which began where this one was cut.
            if len(parts) == 2:
                message = parts[1]
                key = message[:9]
                if key == b"Iteration" and message[-1] != _BRACKET:
                    last = line
                    if message.find(b"lr = ", 11, 30) < 0:
                        if first:
                            first = False
                            yield line
                        else:
                            waiting = line
                    continue
                if key == b"    Train":
                    last = line
                    continue
            if waiting:
                yield waiting
            self._note_last(last)
            first, waiting, last = True, b"", b""
            yield line
        if waiting:
            yield waiting
        self._note_last(last)

    def _note_last(self, line: bytes) -> None:
        if PREFIX.match(line):
            self._last_line = line

    def _note_first(self, lines: list[bytes]) -> None:
        if self.first_stamp is None:
            found = next((match for match in map(PREFIX.search, lines) if match is not None), None)
            self.first_stamp = stamp(found.group()) if found is not None else None

    def _read(self, lines: Iterable[bytes]) -> None:
        """The fast path for lines of training, which nearly all of a long log consists of."""
        messages = self._messages
        texts, results = messages.texts, messages.results
        iteration_line, output_line = ITERATION.match, TEST_OUTPUT.match
        for line in lines:
            start = line.find(b"] ") + 2
            if start < 2 or line[0] not in b"IWEF":
                self._odd_line(line)
                continue
            key = line[start : start + 4]
            if key == b"Iter" and not texts and not results:
                match = iteration_line(line, start)
                if match is not None:
                    self._last_line = line
                    messages.add_iteration(match, line)
                    continue
            elif key == b"    " and not texts and line.find(b"] ", start) < 0:
                if line.startswith(b"Train", start + 4):
                    self._last_line = line
                    continue
                match = output_line(line, start)
                if match is not None:
                    self._last_line = line
                    messages.add_output(match)
                    continue
            self._glog_line(line)

    def _odd_line(self, line: bytes) -> None:
        """A line that does not begin with glog's prefix: printed text, or the rest of a cut line."""
        match = PREFIX.search(line)
        if match is None:
            self._messages.text_line(line)
            return
        self._messages.text_line(line[: match.start()])
        self._glog_line(line[match.start() :])

    def _glog_line(self, line: bytes) -> None:
        """A line with glog's prefix at its start and, after each cut line, further in."""
        prefix = PREFIX.match(line)
        if prefix is None:
            self._odd_line(line)
            return
        if line.find(b"] ", prefix.end()) < 0:
            self._message(line, prefix)
            return
        starts = [match.start() for match in PREFIX.finditer(line)]
        for start, end in zip(starts, [*starts[1:], len(line)], strict=True):
            piece = line[start:end]
            prefix = PREFIX.match(piece)
            if prefix is not None and (end == len(line) or _CLOSED.search(piece)):
                self._message(piece, prefix)

    def _message(self, line: bytes, prefix: re.Match[bytes]) -> None:
        if not self.is_caffe and _CAFFE_SOURCES.match(prefix.group(2)):
            self.is_caffe = True
        self._messages.take(line, prefix.end(), int(prefix.group(1)), self._last_line)
        self._last_line = line
