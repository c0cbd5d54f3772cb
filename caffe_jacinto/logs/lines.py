"""The bytes of a log, in pieces of any size -> whole lines, as Caffe printed them.

Undoes what other programs do to a log: the encoding that PowerShell writes (UTF-16, also in a part of the
file only), a byte-order mark, the JSON of Docker's files, line ends with a carriage return, colours, and
what is put before each line: time stamps, ``> ``, the name of a container, the rank of an MPI process, or
the same text but for its numbers, such as an indent. Lines of several containers or ranks keep apart.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping

PREFIX = re.compile(rb"[IWEF](?:\d{4}|\d{8}) \d\d:\d\d:\d\d\.\d{6} +(\d{1,18}) ([\w.+-]+):\d+\] ")
"""What glog puts before a message; the groups are the thread's number and the source file."""

LOG_HEADER = "# caffe_jacinto.train:"
"""Begins the line that `train` writes before the output of each command in a stage's log."""

_LINE_LIMIT = 1_000_000
"""Longer lines are not log lines. They are dropped, so that memory does not grow with them."""
_LONGEST_PREFIX = 300
_MOST_LABELS = 256
"""Lines of further containers or ranks are dropped."""

_ANSI = re.compile(rb"\x1b(?:\[[0-?]{0,99}[ -/]{0,9}[@-~]|\][^\x07\x1b\n]{0,999}(?:\x07|\x1b\\))")
"""Colours and other commands to a terminal (ECMA-48), and window titles."""

_CLOCK = rb"\d\d:\d\d:\d\d(?:[.,]\d{1,9})?"
_DATE = rb"\d{4}-\d\d-\d\d[T ]%b(?:Z|[+-]\d\d:?\d\d)?" % _CLOCK
_FOREIGN = {
    "quote": rb"> ?",
    "date": rb"(?:%b|\[%b\])[ \t]{1,4}" % (_DATE, _DATE),
    "day": rb"(?:[A-Z][a-z]{2} [A-Z][a-z]{2} {1,2}\d{1,2} %b \d{4}|[A-Z][a-z]{2} {1,2}\d{1,2} %b)[ \t]{1,4}"
    % (_CLOCK, _CLOCK),
    "clock": rb"(?:%b|\[%b\])[ \t]{1,4}" % (_CLOCK, _CLOCK),
    "stream": rb"std(?:out|err) [FP] ",
    "unit": rb"[\w.-]{1,99} [\w./-]{1,99}\[\d{1,9}\]: ",
    "container": rb"([\w.-]{1,99}) {0,99}\| ",
    "job": rb"\[\d{1,9},(\d{1,9})\]<std(?:out|err)>: ?",
    "rank": rb"\[(\d{1,9})\] ",
    "task": rb" {0,9}(\d{1,9}): ",
}
"""What other programs put before a line; a group holds the container's name or the rank.

quote: mail, Markdown. date: docker logs -t, CI services, ts. day: syslog, ts. unit: journalctl's host and
process. stream: Kubernetes. container: docker-compose. job: mpirun --tag-output. rank: Intel MPI.
task: srun --label.
"""
_RANKED = ("job", "rank", "task")
_WORD = re.compile(rb"(?=.)([^ \t]*)([ \t]*)", re.DOTALL)
"""Of a text of no known kind that stands before lines, and the gap after it: an indent, a comment's ``# ``,
``INFO:root:``, a number that differs from line to line."""


_DOCKER = b'{"log":"'
"""How each line of a file of Docker's driver json-file begins."""


class LineSplitter:
    """Takes a log in pieces of any size and returns the lines that they complete."""

    def __init__(
        self, processes: Mapping[int, str] | None = None, thin: Callable[[bytes], bytes] | None = None
    ) -> None:
        """``processes``: to which process each thread belongs, in a log of several at the same time.

        ``thin`` takes lines that nobody needs out of the log; not where lines of threads are told apart.
        """
        self._tail = b""
        self._encoding = _Encoding()
        self._docker: _DockerFile | None = None
        self._started = False
        self._head = b""
        self._foreign: re.Pattern[bytes] | None = None
        self._kind = ""
        """The part of the foreign prefix that holds the label."""
        self._decided = False
        self._labels: set[str] = set()
        self._processes = processes
        self._thin = thin if processes is None else None
        self._process = ""

    def feed(self, data: bytes) -> dict[str, list[bytes]]:
        """The lines that ``data``, the next piece, completes.

        They are by container, rank or process; ``""`` where there are none.
        """
        if not self._started:
            data = self._start(data)
        data = self._encoding.decode(data)
        return self._lines(data if self._docker is None else self._docker.printed(data))

    def close(self) -> dict[str, list[bytes]]:
        """The log has ended: its last line, if that has no end."""
        found: dict[str, list[bytes]] = {}
        if not self._started:
            self._started = True
            found = self._lines(self._head)
        elif self._docker is not None:
            found = self._lines(self._docker.printed(b"\n"))
        else:
            found = self._lines(self._encoding.close())
        tail, self._tail = self._tail, b""
        for label, lines in self._apart([_plain(tail)] if tail else []).items():
            found.setdefault(label, []).extend(lines)
        return found

    def _start(self, data: bytes) -> bytes:
        """The log's first bytes say how it is encoded."""
        head = self._head + data
        if len(head) < len(_DOCKER):
            self._head = head
            return b""
        self._started, self._head = True, b""
        for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
            # Without its mark, UTF-16 of ASCII has a zero in every second byte.
            text, zeros = (head[:4:2], head[1:4:2]) if encoding == "utf-16-le" else (head[1:4:2], head[:4:2])
            if head.startswith(mark) or (all(text) and not any(zeros)):
                self._encoding = _Encoding(encoding)
                return head.removeprefix(mark)
        if head.startswith(_DOCKER):
            self._docker = _DockerFile()
        return head.removeprefix(codecs.BOM_UTF8)

    def _lines(self, data: bytes) -> dict[str, list[bytes]]:
        content = self._tail + data
        if b"\r" in data:
            # A piece may end between the two of \r\n; the empty line that this makes changes nothing.
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._thin is not None:
            content = self._thin(content)
        lines = content.split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > _LINE_LIMIT:
            self._tail = self._tail[-1000:]
        return self._apart([_plain(line) for line in lines] if b"\x1b" in content else lines)

    def _apart(self, lines: list[bytes]) -> dict[str, list[bytes]]:
        """The lines without what other programs put before them, apart by what that says."""
        if not self._decided:
            self._decide(lines)
        if self._processes is not None:
            return self._by_process(lines, self._processes)
        if self._foreign is None:
            return {"": lines} if lines else {}
        found: dict[str, list[bytes]] = {}
        for line in lines:
            match = self._foreign.match(line)
            label = _label(self._kind, match)
            if label not in self._labels and len(self._labels) < _MOST_LABELS:
                self._labels.add(label)
            if label in self._labels:
                found.setdefault(label, []).append(line[match.end() :] if match else line)
        return found

    def _decide(self, lines: list[bytes]) -> None:
        """The first line of glog's shows whether something stands before each line."""
        for at, line in enumerate(lines):
            match = PREFIX.search(line)
            if match is not None:
                self._decided = True
                self._foreign, self._kind = _foreign(line[: match.start()], lines[at:])
                return

    def _by_process(self, lines: list[bytes], processes: Mapping[int, str]) -> dict[str, list[bytes]]:
        """Text without glog's prefix belongs to the line before it."""
        found: dict[str, list[bytes]] = {}
        for line in lines:
            match = PREFIX.match(line)
            if match is not None:
                self._process = processes.get(int(match.group(1)), "")
            if self._process:
                found.setdefault(self._process, []).append(line)
        return found


_WIDE = re.compile(rb"\0?(?:\xff\xfe)?((?:[\x01-\x7f]\0){4})")
"""Where UTF-16 begins among bytes; a NUL before it ends a character whose first half came with the bytes."""
_WIDE_BEGINS = re.compile(
    rb"(?:\0(?:\xff\xfe)?(?:[\x01-\x7f]\0){0,3}[\x01-\x7f]?|(?:\xff\xfe)?(?:[\x01-\x7f]\0){1,3}[\x01-\x7f]?"
    rb"|\0?\xff\xfe[\x01-\x7f]?|\0?\xff)\Z"
)
_BYTES = re.compile(rb"[\t\r\n\x20-\x7e]{16}")
"""Where UTF-16 ends: eight such characters in a row are not in a log."""
_BYTES_BEGIN = re.compile(rb"[\t\r\n\x20-\x7e]{1,15}\Z")


class _Encoding:
    """Turns the parts of a log that are UTF-16 into UTF-8.

    ``>>`` of PowerShell writes UTF-16 after what another program wrote in ASCII, and the other way round.
    """

    def __init__(self, encoding: str = "") -> None:
        """``encoding``: ``utf-16-le`` or ``utf-16-be`` if the log begins in it."""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._tail = b""
        """What the next piece decides on."""
        self._in_half = False
        """Whether UTF-16 has given the first half of a character."""
        self._rest = b""
        """What follows in the other encoding."""
        if encoding:
            self._begin(encoding)

    def decode(self, data: bytes) -> bytes:
        """The next piece in UTF-8, but for last bytes that only the piece after it can explain."""
        is_plain = self._decoder is None and not self._tail and b"\0" not in data
        if is_plain and b"\xff" not in data[-3:]:
            return data
        data, self._tail = self._tail + data, b""
        found: list[bytes] = []
        while data:
            found.append(self._bytes(data) if self._decoder is None else self._wide(data))
            data, self._rest = self._rest, b""
        return b"".join(found)

    def close(self) -> bytes:
        """The log has ended: the last bytes."""
        tail, self._tail = self._tail, b""
        return tail.replace(b"\0", b"")

    def _begin(self, encoding: str) -> None:
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._in_half = False

    def _bytes(self, data: bytes) -> bytes:
        start = _WIDE.search(data)
        if start is not None:
            self._begin("utf-16-le")
            self._rest = data[start.start(1) :]
            return data[: start.start()]
        end = _WIDE_BEGINS.search(data, max(0, len(data) - 10))
        if end is None:
            return data
        self._tail = data[end.start() :]
        return data[: end.start()]

    def _wide(self, data: bytes) -> bytes:
        assert self._decoder is not None
        found = _BYTES.search(data)
        end = found or _BYTES_BEGIN.search(data, max(0, len(data) - 15))
        at = len(data) if end is None else end.start()
        at += (at + self._in_half) % 2 if end is not None else 0  # the second half of a character
        text = self._decoder.decode(data[:at]).replace("\ufeff", "").encode()
        self._in_half = bool((at + self._in_half) % 2)
        if found is not None:
            self._decoder, self._rest = None, data[at:]
        else:
            self._tail = data[at:]
        return text


class _DockerFile:
    """A file of Docker's driver json-file: an object on each line, which has what the container printed."""

    def __init__(self) -> None:
        self._tail = b""

    def printed(self, data: bytes) -> bytes:
        """What the lines that ``data``, the next piece, completes say the container printed.

        Docker cuts up what is longer than 16 KiB; only the last piece of a line has the line's end.
        """
        *lines, self._tail = (self._tail + data).split(b"\n")
        if len(self._tail) > _LINE_LIMIT:
            self._tail = self._tail[-1000:]
        return b"".join(map(_printed, lines))


def _printed(line: bytes) -> bytes:
    try:
        return str(json.loads(line)["log"]).encode(errors="replace")
    except (ValueError, LookupError, TypeError, RecursionError):
        return line + b"\n"  # of another form, or cut off


def _plain(content: bytes) -> bytes:
    return _ANSI.sub(b"", content) if b"\x1b" in content else content


def _foreign(text: bytes, lines: list[bytes]) -> tuple[re.Pattern[bytes] | None, str]:
    """A pattern for what stands before each line, and the kind that says whose the line is.

    None if nothing does: ``text``, of no known kind, stands before the first of ``lines`` only.
    """
    if len(text) > _LONGEST_PREFIX:
        return None, ""
    parts: list[bytes] = []
    label, at, of_known_kinds = "", 0, True
    while at < len(text):
        kind, pattern, match = _part(text, at)
        at = match.end()
        if match.groups():
            if label:
                return None, ""
            label = kind
        of_known_kinds = of_known_kinds and bool(kind)
        parts.append(pattern)
    if not parts:
        return None, ""
    found = re.compile(b"".join(parts))
    if not of_known_kinds:
        places = [(line, glog.start()) for line in lines if (glog := PREFIX.search(line)) is not None]
        if 2 * sum(found.fullmatch(line, 0, start) is not None for line, start in places) < len(places):
            return None, ""
    return found, label


def _part(text: bytes, at: int) -> tuple[str, bytes, re.Match[bytes]]:
    """What begins at ``at`` in ``text``: its kind, a pattern, and the match. The kind of a word is empty."""
    for kind, pattern in _FOREIGN.items():
        found = re.compile(pattern).match(text, at)
        if found is not None:
            return kind, pattern, found
    word = _WORD.match(text, at)
    assert word is not None
    shown, gap = word.groups()
    # The last gap is literal: what follows may be indented.
    space = re.escape(gap) if word.end() == len(text) else rb"[ \t]{0,40}"
    return "", re.sub(rb"\d+", rb"\\d{1,20}", re.escape(shown)) + space, word


def _label(kind: str, match: re.Match[bytes] | None) -> str:
    if match is None or not match.groups():
        return ""
    name = match.group(1).decode("utf-8", "replace")
    return f"rank {name}" if kind in _RANKED else name
