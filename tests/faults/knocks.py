"""What is done to processes: they are killed, or get storms of signals."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from faults.cases import Broken

WHO = ("driver", "engine", "both")
"""``train`` itself, the processes that it has started, or all of them."""

GONE_SECONDS = 20

STORM = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGSTOP,
    signal.SIGCONT,
)


class Blow(NamedTuple):
    """One signal of a storm."""

    number: signal.Signals
    to_driver: bool
    pause: float
    """Seconds before the next."""


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` has started, and those that these have."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def kill(driver: int, who: str) -> bool:
    """SIGKILL; False if there was nobody to kill. What is left of a killed engine must end by itself.

    Raises:
        Broken: a process that the engine has started lives on.
    """
    engines = descendants(driver)
    killed = {"driver": [driver], "engine": engines[:1], "both": [driver, *engines[:1]]}[who]
    for pid in killed:
        _send(pid, signal.SIGKILL)
    if who != "driver":
        give_up = time.monotonic() + GONE_SECONDS
        while left := [pid for pid in engines if is_alive(pid)]:
            if time.monotonic() > give_up:
                raise Broken(f"processes {left} live on {GONE_SECONDS} s after the engine was killed")
            time.sleep(0.02)
    return bool(killed)


def kill_all(pid: int) -> None:
    """Kill a process and all that it has started, of a case that is broken."""
    for each in [pid, *descendants(pid)]:
        _send(each, signal.SIGKILL)


def draw_storm(dice: random.Random) -> list[Blow]:
    """From a few signals to dozens, within two seconds."""
    count, seconds = dice.choice((2, 5, 10, 40)), dice.choice((0.0, 0.3, 2.0))
    return [
        Blow(dice.choice(STORM), dice.random() < 0.7, dice.uniform(0, 2 * seconds / count))
        for _ in range(count)
    ]


def storm(driver: int, blows: list[Blow]) -> bool:
    """Send the signals; in the end nobody is left stopped."""
    for blow in blows:
        for pid in [driver] if blow.to_driver else descendants(driver)[:1]:
            _send(pid, blow.number)
        time.sleep(blow.pause)
    for pid in [driver, *descendants(driver)]:
        _send(pid, signal.SIGCONT)
    return True


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
