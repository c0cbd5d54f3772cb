"""A piece of a log -> the same without most lines of training and tests that a summary does not need.

Works on bytes, before they are split into lines: nearly all of a long log goes this way.
"""

from __future__ import annotations

import re

_NUMBER = rb"-?\d{1,20}(?:\.\d{0,20})?(?:e[-+]?\d{1,3})?"
_HEADER = rb"I.{30,60}\] "
_TRAINING = re.compile(
    rb"^(%(header)bIteration \d{1,18}, Testing net \(#0\)\n"
    rb"(?:%(header)b    Test net output #\d{1,9}: .{1,200} = %(number)b"
    rb"(?: \(\* %(number)b = %(number)b loss\))?\n)+)?"
    rb"((?:%(header)b(?:Iteration .{0,200}\d|    Train.{0,300})\n){4,})"
    % {b"header": _HEADER, b"number": _NUMBER},
    re.MULTILINE,
)
"""A test of the first test network, if one comes before them (group 1), and lines of training (group 2).

Of a bounded length: no line takes more time than others of its length.
"""
_ITERATION = b"] Iteration "
_LOSS = b"loss = "
_RATE_FROM, _RATE_TO = 13, 52
"""Where the learning rate would be, after the place of `_ITERATION`."""


def thinned(content: bytes) -> bytes:
    """Whole lines of a log, and perhaps the beginning of another, without most of what a summary leaves out.

    Of the lines of training between two tests, the first and the last loss are kept; of tests with nothing but
    training between them, the first and the last two. An empty line stands for the others.
    """
    kept: list[bytes] = []
    end = 0
    tests: list[int] = []
    """Where in ``kept`` tests are that have only lines of training, with a loss, between them and after."""
    for match in _TRAINING.finditer(content):
        begin = match.start()
        if begin > end:
            kept.append(content[end:begin])
            tests.clear()
        end = match.end()
        parts = _parts(match)
        if parts is None:
            kept.append(content[begin:end])
            tests.clear()
            continue
        test, *losses = parts
        if test:
            if tests:
                kept[-1] = b""  # the last line before the test, which was kept for its stamp
            tests.append(len(kept))
            kept.append(test)
            if len(tests) > 3:
                kept[tests.pop(1)] = b"\n"  # which keeps the losses before and after it apart
        kept += losses
    if not kept:
        return content
    kept.append(content[end:])
    return b"".join(kept)


def _parts(match: re.Match[bytes]) -> tuple[bytes, bytes, bytes, bytes] | None:
    """The test; the lines of training up to the first loss; the line of the last loss; the last line.

    None if there are not two losses, or if some of the lines hold a second message.
    """
    lines = match.group()
    # Two bytes are counted faster than one.
    if lines.count(b"] ") != lines.count(b"\nI") + 1:
        return None
    training = match.start(2) - match.start()
    first = lines.find(_ITERATION, training)
    while first >= 0 and _is_rate(lines, first):
        first = lines.find(_ITERATION, first + 1)
    last = lines.rfind(_ITERATION, training)
    while last > first >= 0 and _is_rate(lines, last):
        last = lines.rfind(_ITERATION, training, last)
    if not last > first >= 0:
        return None
    first_end, last_end = lines.find(b"\n", first) + 1, lines.find(b"\n", last) + 1
    if lines.find(_LOSS, first, first_end) < 0 or lines.find(_LOSS, last, last_end) < 0:
        return None
    last_begin = lines.rfind(b"\n", 0, last) + 1
    last_line = max(lines.rfind(b"\n", 0, -1) + 1, last_end)
    return lines[:training], lines[training:first_end], lines[last_begin:last_end], lines[last_line:]


def _is_rate(lines: bytes, at: int) -> bool:
    """Whether the line with `_ITERATION` at this place shows a learning rate, not a loss."""
    rate = lines.find(b"lr = ", at + _RATE_FROM, at + _RATE_TO)
    return rate >= 0 and lines.find(b"\n", at, rate) < 0
