"""Watch a stage through its log: what the log says, whether the loss goes wrong, and why a stage failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from caffe_jacinto.common.processes import describe_exit
from caffe_jacinto.engines.snapshots import Skipped, final_is_complete
from caffe_jacinto.logs import events
from caffe_jacinto.logs.discover import STAGE_LOG
from caffe_jacinto.logs.lines import LOG_HEADER
from caffe_jacinto.logs.loss import USELESS, Kind
from caffe_jacinto.logs.stage import CHUNK, StageLog
from caffe_jacinto.runs.folder import resume_command
from caffe_jacinto.runs.plan import RunPlan, StagePlan

NO_NUMBERS = "weights are not numbers"

WORDS = 300
"""Characters shown of a log's last line."""


class Tail:
    """What is appended to a file from byte ``start`` on. The file need not exist yet."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._position = start

    def read(self) -> bytes:
        """The next bytes, up to 1 MiB; empty when there are none."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self._position += len(data)
        return data


def read_log(folder: Path, *, history: bool = False) -> StageLog:
    """The log of a stage or of the test, as it is now; an empty one if there is none yet."""
    log = StageLog(live=True, history=history, test_net=read_test_net(folder))
    tail = Tail(folder / STAGE_LOG)
    while data := tail.read():
        log.feed(data)
    log.close()
    return log


def read_test_net(folder: Path) -> str | None:
    """The text of the test network in a stage's folder."""
    try:
        return (folder / "val.prototxt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


class StageView:
    """A running stage: its log as it grows, and what is wrong with it."""

    def __init__(self, log: StageLog | None = None) -> None:
        """``log`` holds what earlier processes of the stage have printed."""
        self.log = log or StageLog(live=True)
        self.trouble: str | None = None
        """Why training on is useless: what is wrong with the loss or the weights."""
        self.sound = 0
        """The last iteration displayed with nothing wrong with its loss."""

    def begin_part(self, iteration: int) -> None:
        """A new process resumes at ``iteration``: what earlier ones did beyond it does not count."""
        self.log.resume_at(iteration)
        self.trouble, self.sound = None, iteration

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the log."""
        for event in self.log.feed(data):
            if isinstance(event, events.TestOutput) and event.loss is not None and math.isnan(event.value):
                self.trouble = f"the loss is not a number in the test at iteration {event.iteration}"
        losses = self.log.losses
        self.sound = self.sound if losses.sound is None else losses.sound
        self.trouble = next((losses.found[kind] for kind in USELESS if kind in losses.found), self.trouble)

    def see_weights(self, spoiled: int | None) -> None:
        """``spoiled``: the iteration of a snapshot whose weights were not numbers, if there was one."""
        if spoiled is not None and self.trouble is None:
            self.trouble = f"in the snapshot of iteration {spoiled}, now removed, {NO_NUMBERS}"

    def doubts(self) -> dict[Kind, str]:
        """What else is wrong with the loss, in words: training goes on."""
        return {kind: words for kind, words in self.log.losses.found.items() if kind not in USELESS}


def skipped_line(skipped: Skipped) -> str:
    """Which snapshot a stage does not resume from, and why, in one line."""
    return f"snapshot of iteration {skipped.iteration} is passed over: {skipped.reason}"


def why_failed(
    run: RunPlan, plan: StagePlan, view: StageView, code: int, full: Callable[[str, bool], str | None]
) -> str:
    """Why a stage failed and what to do about it, in one line. ``code`` is its last command's exit code.

    ``full`` gives what to say where a full disk is behind a reason; it is told whether a file was cut off.
    """
    if view.trouble is not None:
        return _trouble(run, plan, view.trouble, view.sound)
    reason = _reason(run, plan, view.log, code)
    cut_off = view.log.fatal is not None and _wrote_a_part(run, plan, view.log)
    return full(reason, cut_off) or f"{reason}; {to_resume(run)}"


def _wrote_a_part(run: RunPlan, plan: StagePlan, log: StageLog) -> bool:
    """Whether Caffe gave up in the middle of a snapshot's file, where it does not say what was wrong."""
    if "SerializeToOstream" not in (log.fatal or "") or not log.snapshots:
        return False
    weights = plan.weights(max(log.snapshots))
    return weights.is_file() and not final_is_complete(weights, run.engine.info.dialect)


def _reason(run: RunPlan, plan: StagePlan, log: StageLog, code: int) -> str:
    if log.fatal is not None:
        return f"{log.fatal}{_if_out_of_memory(plan, log.fatal)}"
    if code != 0:
        return f"{describe_exit(code)}{last_words(plan.log)}"
    if (log.iteration or 0) < plan.max_iter:
        where = f"at iteration {log.iteration or 0:,}"
        return f"training ended early, {where}, as it does when it is interrupted"
    skipped = run.start_point(plan).skipped
    if skipped:
        return f"its last snapshot cannot be used: {skipped_line(skipped[0])}"
    return "it ended before the stage was marked complete, as it does when it is interrupted"


def to_resume(run: RunPlan) -> str:
    """How to go on with a run, for the end of a message."""
    return f"to resume: {resume_command(run.folder)}"


def _trouble(run: RunPlan, plan: StagePlan, trouble: str, sound: int) -> str:
    good = run.start_point(plan, sound).snapshot
    rate = plan.solver.base_lr
    named = f"the last good snapshot is {good.caffemodel}" if good else "no snapshot before it is good"
    return (
        f"{trouble}, so it was stopped; {named}; a new run with a lower learning rate may train, such as "
        f"--set stages.{plan.name}.solver.base_lr={rate / 10:g} (now {rate:g}); {to_resume(run)}"
    )


def _if_out_of_memory(plan: StagePlan, fatal: str) -> str:
    """What to do when the batch does not fit on the GPU."""
    if "out of memory" not in fatal.lower():
        return ""
    passes = plan.devices.iter_size
    return (
        f"; a new run with more passes, such as --iter-size {2 * passes} (now {passes}), or a smaller "
        "training.val_batch_size needs less memory"
    )


def last_words(log: Path) -> str:
    """The last line of a command that died without a fatal line of Caffe's, before glog's stack trace."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        lines = file.read().decode(errors="replace").splitlines()
    for line in map(str.strip, reversed(lines)):
        if line.startswith(LOG_HEADER):
            return ""
        if line and not line.startswith(("@ ", "*** ")):
            return f", its last line: {line[:WORDS]}"
    return ""
