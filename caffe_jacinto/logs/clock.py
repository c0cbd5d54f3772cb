"""glog's dates and times: ``0815 09:52:55.512455`` (no year) or ``20260815 09:52:55.512455``."""

from __future__ import annotations

from datetime import datetime, timedelta

_LEAP_YEAR = 2016
"""Stands in for a year that is not known: 29 February must be a date."""


def moment(stamp: str, year: int | None = None) -> datetime | None:
    """The stamp as a date and time; ``year`` is taken where the stamp has none. None if it is no date."""
    date, _, time = stamp.partition(" ")
    if len(date) == 4:
        date = f"{year or _LEAP_YEAR:04d}{date}"
    try:
        return datetime.strptime(f"{date} {time}", "%Y%m%d %H:%M:%S.%f")
    except ValueError:
        return moment(f"{_LEAP_YEAR}{stamp}") if date.endswith("0229") and len(stamp) < 25 else None


def elapsed(first: str, last: str, year: int | None = None) -> float:
    """Seconds from one stamp of a process to a later one; ``year`` is that of the first, if known.

    Stamps without a year go over New Year; a clock that was set back a little counts as no time.
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
