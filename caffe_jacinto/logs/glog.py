"""The form of glog's lines, which Caffe prints:

I0815 09:52:55.512455  8764 solver.cpp:363] message        (glog before 0.6: no year)
I20260815 09:52:55.512455  8764 solver.cpp:363] message    (glog 0.6 and later)
"""

from __future__ import annotations

import re

PREFIX = re.compile(rb"[IWEF](?:\d{4}|\d{8}) \d\d:\d\d:\d\d\.\d{6} +(\d+) ([\w.+-]+):\d+\] ")
"""What stands before a message; its groups are the thread's number and the source file."""

MESSAGE_LIMIT = 29_990
"""glog cuts a message at 30,000 characters, its prefix counted."""


def stamp(line: bytes) -> str:
    """Date and time of a line, e.g. ``0815 09:52:55.512455`` or ``20260815 09:52:55.512455``."""
    return (line[1:21] if line[5:6] == b" " else line[1:25]).decode("ascii", "replace")
