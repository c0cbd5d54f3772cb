"""Logs as no program prints them, but as they arrive: from terminals, containers, other systems."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fuzzing import damaged
from log_text import whole_stage

MOST_BYTES = 4 << 20

NUMBERS = (b"nan", b"-inf", b"1e999", b"-1", b"9" * 400, b"0x10", b"1.#QNAN", b"", b"2147483648", b"1,5")
PREFIXES = (b"caffe_1  | ", b"[1] ", b"\x1b[32m", b"> ", b"2024-01-01T00:00:00Z ", b"(0.0)    ", b"\0")
NAMES = (b"Iteration ", b"Initializing net from parameters: ", b"Test net output #0: ", b"layer {", b"\n")


def hostile_log(sound: Sequence[bytes], dice: random.Random) -> bytes:
    """A log made of ``sound`` ones by a few changes, each of which a log may meet."""
    logs = [*sound, whole_stage().text.encode()]
    log = dice.choice(logs)
    for _ in range(dice.choice((1, 1, 2, 3))):
        log = dice.choice(CHANGES)(log, logs, dice)[:MOST_BYTES]
    return log


def _damaged(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    return damaged(log, list(logs), dice)


def _line_ends(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    return log.replace(b"\n", dice.choice((b"\r", b"\r\n", b"", b"\n\n", b"\0", b"\x0b", b"\xe2\x80\xa8")))


def _number(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    """Every number after a name becomes another."""
    name = dice.choice(
        (b"loss = ", b"lr = ", b"Iteration ", b"accuracy = ", b"num_output: ", b"batch_size: ")
    )
    parts = log.split(name)
    for at in range(1, len(parts)):
        digits = parts[at].split(b" ", 1)[0].split(b"\n", 1)[0].split(b",", 1)[0]
        parts[at] = dice.choice(NUMBERS) + parts[at][len(digits) :]
    return name.join(parts)


def _encoding(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    text = log.decode(errors="replace")
    return text.encode(dice.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32")))


def _prefix(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    prefix = dice.choice(PREFIXES)
    return b"\n".join(prefix + line for line in log.split(b"\n"))


def _interleaved(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    """Two programs write to one file."""
    lines, others = log.splitlines(keepends=True), dice.choice(logs).splitlines(keepends=True)
    for line in others:
        lines.insert(dice.randrange(len(lines) + 1), line)
    return b"".join(lines)


def _shuffled(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    lines = log.splitlines(keepends=True)
    dice.shuffle(lines)
    return b"".join(lines)


def _repeated(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    """A line, or the start of one, thousands of times, on one line or on many."""
    lines = log.splitlines(keepends=dice.random() < 0.5)
    at = dice.randrange(len(lines))
    lines[at] = lines[at] * dice.choice((10, 2000))
    return b"\n".join(lines)


def _deep(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    """A printed network far deeper, or a line far longer, than any."""
    at = log.find(b"layer {")
    at = at if at >= 0 else dice.randrange(len(log) + 1)
    return log[:at] + dice.choice(NAMES) * dice.choice((100, 20_000)) + log[at:]


def _noise(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    at = dice.randrange(len(log) + 1)
    return log[:at] + dice.randbytes(dice.choice((10, 100_000))) + log[at:]


def _end(log: bytes, logs: Sequence[bytes], dice: random.Random) -> bytes:
    return log[: dice.randrange(len(log) + 1)] + dice.choice((b"", b"\0" * 5000, b"\xff"))


CHANGES: tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...] = (
    _damaged,
    _line_ends,
    _number,
    _encoding,
    _prefix,
    _interleaved,
    _shuffled,
    _repeated,
    _deep,
    _noise,
    _end,
)
