"""RUN/report.html: the page of a run, written again while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from caffe_jacinto.logs.discover import STAGE_LOG, Run, stage_of
from caffe_jacinto.logs.page import PAGE_NAME, State, write_page
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.runs.folder import RunRecord

RELOAD_SECONDS = 15
"""A browser that shows the page loads it again after so long."""

NEWS_SECONDS = 30.0
"""Without a test, the page is written again after so long."""

SHARE = 0.02
"""The most of the time that writing the page may take."""


def page_line(folder: Path) -> str:
    """The address of the run's page, for a browser."""
    return f"page: {(folder / PAGE_NAME).absolute().as_uri()}"


class RunPage:
    """Writes the page of a run from the logs that are read anyway. That it cannot is no reason to stop."""

    def __init__(self, folder: Path, record: RunRecord, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._record = record
        self._warn = warn
        self._logs: dict[str, StageLog] = {}
        self._next = 0.0
        """When it may be written again."""
        self._written = 0.0
        self._wanted = False
        self._broken = False

    def follow(self, name: str, log: StageLog) -> None:
        """``log``, read with its history, is that of the stage or test ``name``, now and as it grows."""
        self._logs[name] = log

    def news(self) -> None:
        """There is something new to show, such as a test."""
        self._wanted = True

    def write_if_due(self) -> None:
        """Write the page if there is news, or it is old, and not too often."""
        now = time.monotonic()
        if now >= self._next and (self._wanted or now - self._written >= NEWS_SECONDS):
            self.write()

    def write(self, *, ended: bool = False) -> None:
        """Write the page; that of a run that has ``ended`` does not load itself again."""
        begun = time.monotonic()
        try:
            stages = [
                stage_of(name, self._folder / name / STAGE_LOG, self._logs[name])
                for name in self._record.stages
                if name in self._logs and self._logs[name].is_caffe
            ]
            write_page([Run(self._folder.name, stages)], self._folder / PAGE_NAME, state=self._state(ended))
            self._broken = False
        except Exception as error:  # whatever it is: a training of days must not end for a page
            if not self._broken:
                why = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
                self._warn(f"  {self._folder / PAGE_NAME} cannot be written ({why}); training goes on")
            self._broken = True
        self._wanted, self._written = False, time.monotonic()
        self._next = self._written + (self._written - begun) / SHARE

    def _state(self, ended: bool) -> State:
        """How far the run is: the first stage that is not finished."""
        name, state = next(
            ((name, state) for name, state in self._record.stages.items() if state.state != "finished"),
            ("", None),
        )
        if state is None:
            return State("finished", None)
        if not ended:
            return State(f"{name} is {state.state}", RELOAD_SECONDS)
        problem = f"{name} {state.state}: {state.message}" if state.message else ""
        return State(f"{name} {state.state}", None, problem)
