"""Drive a run: train its stages in order, watch each to its end, then test the final weights."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from caffe_jacinto.common.errors import LOST, RunFailed, UserError, WorkLost
from caffe_jacinto.common.processes import describe_exit
from caffe_jacinto.common.text import count_of
from caffe_jacinto.engines.snapshots import (
    StartPoint,
    final_is_complete,
    spoiled_snapshots,
    weights_are_finite,
)
from caffe_jacinto.logs.discover import STAGE_LOG
from caffe_jacinto.logs.loss import Kind
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.quantization.tables import TABLE
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.data_check import check_data
from caffe_jacinto.runs.folder import TEST, RunRecord, StageState, State, resume_command
from caffe_jacinto.runs.lock import RunLock
from caffe_jacinto.runs.page import RunPage
from caffe_jacinto.runs.plan import (
    QuantizePlan,
    RunPlan,
    StagePlan,
    quantize_job,
    test_job,
    train_job,
    write_binary_snapshot,
    write_quantize,
    write_stage,
    write_start_weights,
    write_test,
    write_tested_weights,
)
from caffe_jacinto.runs.process import Child, StopSignals
from caffe_jacinto.runs.progress import (
    Place,
    Progress,
    Screen,
    last_heard,
    outputs_line,
    progress,
    stage_summary,
    test_progress,
)
from caffe_jacinto.runs.retention import Keeper, remove_snapshots
from caffe_jacinto.runs.space import full_disk
from caffe_jacinto.runs.watch import (
    NO_NUMBERS,
    StageView,
    Tail,
    last_words,
    read_log,
    read_test_net,
    skipped_line,
    to_resume,
    why_failed,
)

POLL_SECONDS = 0.1

SILENCE_SECONDS = 60.0
"""So long a silence of the log is news where there is no live line to show it."""

UNUSUAL = 1.5
"""So much longer than the longest one before a silence has to be."""

NEXT_REQUEST = ("again to end it at once", "once more to kill it", "")
"""What the next request to stop does, after the first, the second, the third."""


@dataclass
class Watched:
    """A running stage or, without a plan, a test; and how much of its log has been shown."""

    view: StageView
    name: str = TEST
    plan: StagePlan | None = None
    place: Place | None = None
    keeper: Keeper | None = None
    shown_test: int = -1
    """The iteration of the last test that was printed."""
    shown_displays: int = 0
    heard: float = field(default_factory=time.monotonic)
    """When the last line of the log arrived."""
    longest: float = 0.0
    """The longest time between two lines."""
    reported: float = 0.0
    """How long the present silence was when it was last news."""

    def hear(self) -> None:
        """A line of the log has arrived."""
        now = time.monotonic()
        self.longest, self.heard, self.reported = max(self.longest, now - self.heard), now, 0.0

    def silence_is_news(self, silent: float) -> bool:
        """Whether a silence of this length is worth a line: an unusual one, and each time it has doubled."""
        if silent < max(SILENCE_SECONDS, UNUSUAL * self.longest, 2 * self.reported):
            return False
        self.reported = silent
        return True

    def has_final_snapshot(self, run: RunPlan) -> bool:
        return self.plan is None or final_is_complete(self.plan.final_weights, run.engine.info.dialect)


@dataclass
class Driver:
    """Carries out the run in a folder whose lock it holds."""

    run: RunPlan
    record: RunRecord
    lock: RunLock
    screen: Screen
    signals: StopSignals
    keep: int
    """How many of the newest snapshots are kept."""

    doubted: set[Kind] = field(default_factory=set)
    """What has been said of the losses of this run."""

    @cached_property
    def page(self) -> RunPage:
        """The page of the run."""
        return RunPage(self.run.folder, self.record, lambda line: self.screen.say(line, style="yellow"))

    def drive(self) -> int:
        """Train the stages that are not trained yet, then test; returns the exit code.

        Raises:
            RunFailed: a stage failed. The next ones were not started.
        """
        try:
            return self._drive()
        except OSError as error:
            reason = f"{error.filename or self.run.folder}: {error.strerror or error}"
            mend = f"{reason}; fix that, then resume: {resume_command(self.run.folder)}"
            raise RunFailed(self._full_disk(reason) or mend) from None
        finally:
            self.page.write(ended=True)

    def _full_disk(self, reason: str, cut_off: bool = False) -> str | None:
        """What to say if a full disk is why ``reason`` was given; see `space.full_disk`."""
        waiting = [plan for plan in self.run.stages if self.record.stages[plan.name].state != "finished"]
        return full_disk(self.run, waiting, self.keep, reason, cut_off=cut_off)

    def _drive(self) -> int:
        for plan in self.run.stages:
            if not self._stage(plan, self.record.stages[plan.name]):
                return self._stopped(plan.name)
        if not self._test(self.record.stages[TEST]):
            return self._stopped(TEST)
        for quantized in self.run.quantized:
            if not self._quantize(quantized, self.record.stages[quantized.name]):
                return self._stopped(quantized.name)
        return 0

    def _stage(self, plan: StagePlan, state: StageState) -> bool:
        """Train a stage unless it is trained already; False when it was stopped on request."""
        place = Place(self.run.recipe, plan.name)
        # A driver may have been killed after the stage's end, before it recorded that.
        if state.state == "finished" or self._is_trained(plan):
            self._note(state, "finished")
            log = read_log(plan.folder, history=True)
            self.page.follow(plan.name, log)
            self.doubted |= StageView(log).doubts().keys()
            self.screen.say(f"{place.title()}: already finished")
            return True
        return not self.signals.requested and self._train(plan, state, place)

    def _is_trained(self, plan: StagePlan) -> bool:
        """Whether the stage is complete and its final weights are all finite."""
        finished = self.run.engine.finished(train_job(self.run, plan))
        return finished and weights_are_finite(plan.final_weights)

    def _train(self, plan: StagePlan, state: StageState, place: Place) -> bool:
        """Train a stage to its end; False when it was stopped on request."""
        self._check_data(state)
        dialect = self.run.engine.info.dialect
        self._remove_spoiled(plan)
        point = self.run.start_point(plan)
        resumed = write_binary_snapshot(self.run, plan, point.snapshot) if point.snapshot else None
        job = train_job(self.run, plan, resumed)
        commands = self.run.engine.train_commands(job)
        factor = self._start_factor(plan, point)
        texts = self.run.files(plan, start_factor=factor)
        write_stage(self.run, plan, texts, commands)
        if point.snapshot is None:
            write_start_weights(self.run, plan)
        self._announce(plan, place, point)
        view = StageView(read_log(plan.folder, history=True))
        log = view.log
        self.page.follow(plan.name, log)
        view.begin_part(point.iteration)
        self.doubted |= view.doubts().keys()  # an earlier train has said it
        keeper = Keeper(
            plan.prefix,
            dialect,
            self.keep,
            plan.max_iter,
            point.iteration,
            masks=plan.needs_masks,
            averaged_before=plan.averaged_before,
        )
        self._note(state, "running")
        begun = time.monotonic()
        watched = Watched(view, plan.name, plan, place, keeper, max(log.tests, default=-1), log.displays)
        code = self._run(plan.folder, state, commands, watched)
        if view.trouble is None:
            keeper.clean(log)
            view.see_weights(keeper.spoiled)
        if view.trouble is not None:
            self._remove_spoiled(plan)  # Caffe may have written more of them before it was stopped
        if view.trouble is None and self._is_trained(plan):
            self._note(state, "finished")
            self.screen.say(stage_summary(log, place, time.monotonic() - begun), style="green")
            self._warn_if_too_dense(plan, log)
            return True
        if self.signals.requested:
            self._note(state, "stopped", f"at iteration {log.iteration or 0:,}")
            return False
        raise self._failure(plan, state, view, code)

    def _check_data(self, state: StageState) -> None:
        """Fail before a part of the run if an LMDB has been replaced since the run was started."""
        try:
            check_data(self.run, self.record.data)
        except UserError as error:
            self._note(state, "failed", str(error))
            raise RunFailed(f"{error}; to resume: {resume_command(self.run.folder)}") from None

    def _remove_spoiled(self, plan: StagePlan) -> None:
        """Delete the snapshots of a stage that is not running whose weights are not numbers."""
        spoiled = spoiled_snapshots(plan.prefix, self.run.engine.info.dialect)
        if spoiled:
            remove_snapshots(plan.prefix, spoiled)
            which = f"{count_of(len(spoiled), 'snapshot')} of iteration {spoiled[0]:,}"
            later = f" to {spoiled[-1]:,}" if len(spoiled) > 1 else ""
            self.screen.say(f"  {which}{later} removed: {NO_NUMBERS}", style="yellow")

    def _warn_if_too_dense(self, plan: StagePlan, log: StageLog) -> None:
        """Warn if a stage ended below its target sparsity. Not with the fork, which may count differently."""
        sparse, reached = plan.stage.sparse, log.sparsity or log.sparsity_logged
        if sparse is None or reached is None or not self.run.engine.info.own_rule:
            return
        if reached < sparse.target:
            self.screen.say(
                f"  sparsity {reached:.3f} is below the target of {sparse.target:g}: the schedule ended too "
                "early, or its caps protect weights that stronger L1 training (weight_decay, max_iter of the "
                "stages before) would shrink; see docs/sparsification.md",
                style="yellow",
            )

    def _start_factor(self, plan: StagePlan, point: StartPoint) -> float | None:
        if plan.stage.sparse is None or point.snapshot is None:
            return None
        log = plan.log.read_text(errors="replace") if plan.log.exists() else ""
        return self.run.engine.resume_start_factor(plan.stage.sparse, point.iteration, log)

    def _announce(self, plan: StagePlan, place: Place, point: StartPoint) -> None:
        for skipped in point.skipped:
            self.screen.say(f"  {skipped_line(skipped)}", style="yellow")
        if point.snapshot is not None:
            start = f"resumes at iteration {point.iteration:,}"
        else:
            start = f"from {plan.start_weights}" if plan.start_weights else "from random weights"
            if plan.stage.reinit:
                start += f" without {', '.join(plan.stage.reinit)}"
        teacher = self.run.recipe.teacher_of(plan.name)
        if teacher is not None:
            start += f", learns from {teacher.stage or teacher.weights}"
        self.screen.say(
            f"{place.title()}: {place.max_iter:,} iterations, {start}; log: {plan.log}", style="bold"
        )
        trains_more = 0 < point.iteration < place.max_iter
        if trains_more and self.run.engine.info.begins_data_again:
            self.screen.say(
                "  stock Caffe reads its training LMDB from the beginning again after a resume: "
                "so it sees the first images once more often than the others"
            )

    def _test(self, state: StageState) -> bool:
        """Test the final weights; False if a stop was requested."""
        folder = self.run.test_folder
        if not self._must_evaluate(TEST, TEST, folder, state):
            return state.state == "finished"
        command = self.run.engine.test_command(test_job(self.run))
        write_test(self.run, self.run.files(self.run.stages[-1]), command)
        write_tested_weights(self.run, self.run.stages[-1], folder)
        self.screen.say(f"test: {self.run.final_weights}; log: {folder / STAGE_LOG}", style="bold")
        return self._evaluate(TEST, TEST, folder, state, command)

    def _quantize(self, plan: QuantizePlan, state: StageState) -> bool:
        """Quantize the weights of a stage, and test them; False if a stop was requested."""
        title = Place(self.run.recipe, plan.name).title()
        if not self._must_evaluate(plan.name, title, plan.folder, state):
            return state.state == "finished"
        command = self.run.engine.quantize_command(quantize_job(self.run, plan))
        write_quantize(self.run, plan, command)
        write_tested_weights(self.run, plan.source, plan.source.folder)
        scheme, weights = self.run.engine.quantization(plan.settings).name, plan.source.final_weights
        self.screen.say(f"{title}: {weights} by {scheme}; log: {plan.folder / STAGE_LOG}", style="bold")
        if not self._evaluate(plan.name, title, plan.folder, state, command):
            return False
        table = plan.folder / TABLE
        if table.is_file():
            self.screen.say(table.read_text(encoding="utf-8").rstrip("\n"))
        return True

    def _must_evaluate(self, name: str, title: str, folder: Path, state: StageState) -> bool:
        """Whether a test is to be run: it has not finished, and no stop was requested."""
        if state.state == "finished":
            self.page.follow(name, read_log(folder, history=True))
            self.screen.say(f"{title}: already finished")
            return False
        if self.signals.requested:
            return False
        self._check_data(state)
        return True

    def _evaluate(self, name: str, title: str, folder: Path, state: StageState, command: list[str]) -> bool:
        """Run the command of a test; False if a stop was requested."""
        log = StageLog(live=True, history=True, test_net=read_test_net(folder))
        self.page.follow(name, log)
        self._note(state, "running")
        code = self._run(folder, state, [command], Watched(StageView(log), name))
        results = log.results()
        if code == 0 and results:
            self._note(state, "finished")
            self.screen.say(f"{title}: {outputs_line(log, results)}", style="green")
            return True
        if self.signals.requested:
            self._note(state, "stopped")
            return False
        path = folder / STAGE_LOG
        reason = log.fatal or f"{describe_exit(code)}{last_words(path)}"
        what = self._full_disk(reason) or f"{reason}; {to_resume(self.run)}"
        self._note_failed(state, what)
        failed = "the test" if name == TEST else f"stage {name}"
        raise RunFailed(f"{failed} failed: {what}; log: {path}")

    def _run(self, folder: Path, state: StageState, commands: Sequence[list[str]], watched: Watched) -> int:
        """Run the commands in order until one fails or a stop is requested; returns the last exit code."""
        code = 0
        for command in commands:
            start = run_folder.start_log(folder / STAGE_LOG, f"{run_folder.now()} {shlex.join(command)!a}")
            try:
                child = Child(command, folder / STAGE_LOG, self.lock.descriptors)
            except OSError as error:
                self._note_failed(state, str(error))
                what = f"{command[0]} cannot be started: {error.strerror}"
                raise RunFailed(f"{what}; {to_resume(self.run)}") from None
            self.signals.pass_on_to(child)
            try:
                state.pid = child.pid
                run_folder.save(self.run.folder, self.record)
                code = self._follow(child, Tail(folder / STAGE_LOG, start), watched)
            except BaseException:
                # The driver must end (the disk is full, say), and nothing may train unwatched.
                child.stop(1)
                child.wait()
                raise
            self.signals.pass_on_to(None)
            if code != 0 or self.signals.requested or watched.view.trouble is not None:
                break
            # Caffe exits with 0 even when it was interrupted, and the next command needs the final snapshot.
            if not watched.has_final_snapshot(self.run):
                break
        watched.view.log.close()
        state.pid = None
        self.screen.clear()
        return code

    def _follow(self, child: Child, tail: Tail, watched: Watched) -> int:
        """Read the log until the command has ended; returns its exit code."""
        shown_stops = 0
        while True:
            ended = child.ended()
            while data := tail.read():
                watched.view.feed(data)
                watched.hear()
            if watched.view.trouble is not None:
                # Kill it, so that it does not write a snapshot of weights that are not numbers.
                child.kill()
            self._show(watched)
            self.page.write_if_due()
            if self.signals.count > shown_stops and not ended:
                shown_stops = self.signals.count
                self._say_stopping(shown_stops, watched)
            if watched.keeper is not None and watched.view.trouble is None:
                watched.keeper.clean_now_and_then(watched.view.log)
                watched.view.see_weights(watched.keeper.spoiled)
            if ended:
                return child.exit_code
            time.sleep(POLL_SECONDS)

    def _show(self, watched: Watched) -> None:
        log, place = watched.view.log, watched.place
        silent = time.monotonic() - watched.heard
        done, unusual = log.iteration or 0, watched.silence_is_news(silent)
        if place is None:
            done, total, words = test_progress(log)
            shown = Progress([watched.name, words], last_heard(silent))
            self.screen.show(shown, done / max(total, 1), news=unusual or 0 < done < total)
            return
        for iteration in [iteration for iteration in log.tests if iteration > watched.shown_test]:
            self.screen.say(
                f"  iteration {iteration:,}, test: {outputs_line(log, log.tests[iteration].outputs)}"
            )
            watched.shown_test = iteration
            self.page.news()
        self._say_doubts(watched.view)
        news = unusual or log.displays > watched.shown_displays
        watched.shown_displays = log.displays
        self.screen.show(progress(log, place, silent=silent), done / place.max_iter, news=news)

    def _say_doubts(self, view: StageView) -> None:
        """Say what a loss that trains on looks like, of each kind once in a run."""
        for kind, words in view.doubts().items():
            if kind not in self.doubted:
                self.doubted.add(kind)
                self.screen.say(f"  {words}", style="yellow")

    def _say_stopping(self, count: int, watched: Watched) -> None:
        following = NEXT_REQUEST[min(count, len(NEXT_REQUEST)) - 1]
        if watched.plan is None:
            what = f"ending the {watched.name}" if watched.name == TEST else f"ending {watched.name}"
        else:
            finishing = "training finishes its iteration and writes a snapshot"
            what = finishing if count == 1 else "ending the training"
        self.screen.say(f"  stopping: {what}{f' ({following})' if following else ''}", style="yellow")

    def _stopped(self, name: str) -> int:
        self.screen.say(
            f"stopped in {name}; to resume: {resume_command(self.run.folder, self.record)}", style="yellow"
        )
        return self.signals.exit_code

    def _failure(self, plan: StagePlan, state: StageState, view: StageView, code: int) -> RunFailed:
        reason = why_failed(self.run, plan, view, code, self._full_disk)
        self._note_failed(state, reason)
        kind = WorkLost if code == LOST and view.trouble is None else RunFailed
        return kind(f"stage {plan.name} failed: {reason}; log: {plan.log}")

    def _note_failed(self, state: StageState, reason: str) -> None:
        """Record that a stage failed, if the disk takes that: the reason must not be lost for it."""
        with suppress(OSError):
            self._note(state, "failed", reason)

    def _note(self, state: StageState, now: State, message: str | None = None) -> None:
        """Record a stage's new state."""
        if state.state == now == "finished":
            return
        state.state = now
        state.message = message
        if now == "running":
            state.started, state.ended = run_folder.now(), None
        else:
            state.ended, state.pid = run_folder.now(), None
        run_folder.save(self.run.folder, self.record)
