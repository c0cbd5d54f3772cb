"""The form of the lines that Caffe prints through glog:

I0815 09:52:55.512455  8764 solver.cpp:363] message        (glog before 0.6: no year)
I20260815 09:52:55.512455  8764 solver.cpp:363] message    (glog 0.6 and later)
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_LEAP_YEAR = 2016
"""Used where the year is unknown: 29 February must be a valid date."""


def moment(stamp: str, year: int | None = None) -> datetime | None:
    """The stamp as a date and time, with ``year`` where the stamp has none. None if it is not a date."""
    date, _, time = stamp.partition(" ")
    if len(date) == 4:
        date = f"{year or _LEAP_YEAR:04d}{date}"
    try:
        return datetime.strptime(f"{date} {time}", "%Y%m%d %H:%M:%S.%f")
    except ValueError:
        return moment(f"{_LEAP_YEAR}{stamp}") if date.endswith("0229") and len(stamp) < 25 else None


def elapsed(first: str, last: str, year: int | None = None) -> float:
    """Seconds from one stamp of a process to a later one; ``year`` is that of the first, if known.

    Stamps without a year may cross New Year. A clock that was set back a little counts as no time.
    """
    start = moment(first, year)
    if start is None:
        return 0.0
    end = moment(last, start.year)
    if end is None:
        return 0.0
    if end < start - timedelta(days=1):
        end = moment(last, start.year + 1) or end
    return max(0.0, (end - start).total_seconds())


PREFIX = re.compile(rb"[IWEF](?:\d{4}|\d{8}) \d\d:\d\d:\d\d\.\d{6} +(\d+) ([\w.+-]+):\d+\] ")
"""What glog puts before a message; the groups are the thread's number and the source file."""

MESSAGE_LIMIT = 29_990
"""glog cuts a message at 30,000 characters, prefix included."""


def stamp(line: bytes) -> str:
    """Date and time of a line, e.g. ``0815 09:52:55.512455`` or ``20260815 09:52:55.512455``."""
    return (line[1:21] if line[5:6] == b" " else line[1:25]).decode("ascii", "replace")
