"""A log's lines, as they arrive -> events.

Reads what stock Caffe 1.0, NVCaffe 0.16/0.17 and caffe-jacinto print through glog (see `messages`). Lines of
several threads are interleaved. A process that was killed leaves a cut line, and the next process starts in
the middle of it. A line counts once its end has arrived, so that a log cut anywhere gives the first events of
the whole log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from caffe_jacinto.logs.events import Event
from caffe_jacinto.logs.lines import PREFIX, LineSplitter
from caffe_jacinto.logs.messages import ITERATION, TEST_OUTPUT, MessageReader, stamp
from caffe_jacinto.logs.skim import thinned

_CAFFE_SOURCES = re.compile(
    rb"(?:_?caffe|solver|sgd_solver|net|parallel|common|upgrade_proto|io|layer_factory|math_functions|syncedmem|"
    rb"signal_handler|db_lmdb|\w+_layer|\w+_solver)\.(?:cpp|hpp|cu)$"
)
_CLOSED = re.compile(rb"(?:\)|Done\.)$")

_ZERO, _NINE = b"09"
"""Of an iteration's lines, those of a test, and of a loss that is not a number, do not end in a digit."""

_RATE_FROM, _RATE_TO = 11, 50
"""Where in a message the learning rate would be."""


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
        self._lines = LineSplitter(thin=thinned if skim else None)
        self._last_line = b""
        self._messages = MessageReader()

    @property
    def header_year(self) -> int | None:
        """The year in the header of a log file that glog wrote itself."""
        return self._messages.header_year

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data``, the next piece of the log, completes."""
        return [event for lines in self._lines.feed(data).values() for event in self.read(lines)]

    def close(self) -> list[Event]:
        """The log has ended: the event of a last line without its newline, if it is certainly complete."""
        return [event for lines in self._lines.close().values() for event in self.read_last(lines)]

    def read(self, lines: list[bytes]) -> list[Event]:
        """The events that these lines, the next ones, complete."""
        self._note_first(lines)
        self._read(self._ends(lines) if self._skim else lines)
        return self._take()

    def read_last(self, lines: list[bytes]) -> list[Event]:
        """The same for the lines that a log ends with, the last of which may be cut off."""
        if lines and not _CLOSED.search(lines[-1].rstrip()):
            lines = lines[:-1]
        return self.read(lines)

    def _take(self) -> list[Event]:
        if self._last_line:
            self.last_stamp = stamp(self._last_line)
        events, self._messages.events = self._messages.events, []
        if events:
            self.is_caffe = True
        return events

    def _ends(self, lines: list[bytes]) -> Iterator[bytes]:
        """The lines, without those that ``skim`` leaves out."""
        first, waiting, last, of = True, b"", b"", b""
        for line in lines:
            parts = line.split(b"] ")
            # A third part is a message of NVCaffe's, after the device that prints it; or it belongs to
            # another line, which began where this one was cut.
            count = len(parts)
            if count == 2:
                message, device = parts[1], b""
            elif count == 3 and parts[1][:5] == b"    [":
                message, device = parts[2], parts[1]
            else:
                message, device = b"", b""
            key = message[:9]
            if key == b"Iteration" and _ZERO <= message[-1] <= _NINE and (first or of == device):
                last = line
                if message.find(b"lr = ", _RATE_FROM, _RATE_TO) < 0:
                    if first:
                        first, of = False, device
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
            if line:
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
            if start < 2 or line[0] not in b"IWEF" or not _ZERO <= line[1] <= _NINE:
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
