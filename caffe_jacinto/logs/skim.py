"""A piece of a log -> the same without most lines of training and tests that a summary does not need.

Works on bytes, before they are split into lines: nearly all of a long log goes this way.
"""

from __future__ import annotations

import re

_NUMBER = rb"-?\d{1,20}(?:\.\d{0,20})?(?:e[-+]?\d{1,3})?"
_NOTICE = (
    rb"(?:Data layer prefetch queue empty|Waiting for data|Restarting data prefetching from start\."
    rb"|Starting prefetch of epoch \d{1,9})\n"
)
_HEADER = rb"I[^\]\n]{30,60}\] "
_TRAINING = re.compile(
    rb"^(%(header)bIteration \d{1,18}, Testing net \(#0\)\n"
    rb"(?:%(header)b%(notice)b)*"
    rb"(?:%(header)b    Test net output #\d{1,9}: [^\]\n]{1,200} = %(number)b"
    rb"(?: \(\* %(number)b = %(number)b loss\))?\n)+"
    rb"(?:%(header)b\[MultiGPU\] Tests completed in [\d.]{1,30}s\n)?)?"
    rb"((?:I.{30,60}\] (?:Iteration .{0,200}\d|    Train.{0,300})\n){4,})"
    % {b"header": _HEADER, b"number": _NUMBER, b"notice": _NOTICE},
    re.MULTILINE,
)
"""A test of the first test network, if one comes before them (group 1), and lines of training (group 2).

Of a bounded length: no line takes more time than others of its length.
"""
_BETWEEN = re.compile(rb"(?:%b(?:Snapshotting .{1,300}\n|%b))+" % (_HEADER, _NOTICE))
"""Lines that may come between such lines of training, and do not belong to another process."""
_ITERATION = b"] Iteration "
_LOSS = b"loss = "
_RATE_FROM, _RATE_TO = 13, 52
"""Where the learning rate would be, after the place of `_ITERATION`."""


def thinned(content: bytes) -> bytes:
    """Whole lines of a log, and perhaps the beginning of another, without most of what a summary leaves out.

    Of the lines of training between two tests, the first and the last loss are kept; of the tests of a
    process that goes on, the first and the last. An empty line stands for the others.
    """
    kept: list[bytes] = []
    end = 0
    tests: list[int] = []
    """Where in ``kept`` tests of the present process are. Each is followed by a loss, so it is complete."""
    for match in _TRAINING.finditer(content):
        begin = match.start()
        if begin > end:
            between = content[end:begin]
            kept.append(between)
            if not _BETWEEN.fullmatch(between):
                tests.clear()
        elif tests:
            kept[-1] = b""  # the last line before a test, which was kept for its stamp
        end = match.end()
        test, training = match.groups()
        losses = _losses(training)
        if losses is None:
            kept.append(content[begin:end])
            tests.clear()
            continue
        if test:
            if len(tests) > 1:
                kept[tests.pop()] = b"\n"  # which keeps the losses before and after it apart
            tests.append(len(kept))
            kept.append(test)
        kept += losses
    if not kept:
        return content
    kept.append(content[end:])
    return b"".join(kept)


def _losses(lines: bytes) -> tuple[bytes, bytes] | None:
    """Of lines of training: those up to the first loss and the one of the last loss; and the last line.

    None if there are not two losses, or if some of the lines hold a second message.
    """
    # Two bytes are counted faster than one.
    if lines.count(b"] ") != lines.count(b"\nI") + 1:
        return None
    first = lines.find(_ITERATION)
    while first >= 0 and _is_rate(lines, first):
        first = lines.find(_ITERATION, first + 1)
    last = lines.rfind(_ITERATION)
    while last > first >= 0 and _is_rate(lines, last):
        last = lines.rfind(_ITERATION, 0, last)
    if not last > first >= 0:
        return None
    first_end, last_end = lines.find(b"\n", first) + 1, lines.find(b"\n", last) + 1
    if lines.find(_LOSS, first, first_end) < 0 or lines.find(_LOSS, last, last_end) < 0:
        return None
    last_begin = lines.rfind(b"\n", 0, last) + 1
    last_line = max(lines.rfind(b"\n", 0, -1) + 1, last_end)
    return lines[:first_end] + lines[last_begin:last_end], lines[last_line:]


def _is_rate(lines: bytes, at: int) -> bool:
    """Whether the line with `_ITERATION` at this place shows a learning rate, not a loss."""
    rate = lines.find(b"lr = ", at + _RATE_FROM, at + _RATE_TO)
    return rate >= 0 and lines.find(b"\n", at, rate) < 0
