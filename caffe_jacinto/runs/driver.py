"""Drive a run: its stages in order, each watched to its end, then the test of the final weights."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caffe_jacinto.common.errors import RunFailed
from caffe_jacinto.engines.snapshots import final_is_complete
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.failure import why_failed
from caffe_jacinto.runs.folder import LOG_NAME, TEST, RunRecord, StageState, State, resume_command
from caffe_jacinto.runs.lock import RunLock
from caffe_jacinto.runs.plan import (
    RunPlan,
    StagePlan,
    stage_texts,
    test_job,
    train_job,
    write_stage,
    write_test,
)
from caffe_jacinto.runs.process import Child, StopSignals, describe_exit
from caffe_jacinto.runs.progress import Place, Progress, last_heard, progress, stage_summary, test_line
from caffe_jacinto.runs.retention import Keeper
from caffe_jacinto.runs.screen import Screen
from caffe_jacinto.runs.start_point import StartPoint, start_point, weights_are_finite
from caffe_jacinto.runs.start_weights import write_start_weights
from caffe_jacinto.runs.watch import StageView, Tail

POLL_SECONDS = 0.1

HARDER = ("again to end it at once", "once more to kill it", "")
"""What a further wish to stop does, after the first, the second, the third."""


@dataclass
class Watched:
    """A command's log, and who is told of what comes in it."""

    view: StageView
    place: Place | None = None
    """For the progress line; None: no stage."""

    keeper: Keeper | None = None
    plan: StagePlan | None = None
    told_tests: int = 0
    told_displays: int = 0
    heard: float = field(default_factory=time.monotonic)
    """When the log's last line came."""

    def has_final_snapshot(self, run: RunPlan) -> bool:
        return self.plan is None or final_is_complete(self.plan.final_weights, run.engine.info.dialect)


@dataclass
class Driver:
    """The train of a run folder whose lock it holds."""

    run: RunPlan
    record: RunRecord
    lock: RunLock
    screen: Screen
    signals: StopSignals
    keep: int
    """How many of the newest snapshots stay."""

    val_images: int | None

    def drive(self) -> int:
        """Train what is not trained yet, then test; returns the exit code.

        Raises:
            RunFailed: a stage failed; the next ones were not started.
        """
        try:
            return self._drive()
        except OSError as error:
            raise RunFailed(
                f"{error.filename or self.run.folder}: {error.strerror or error}; once that is mended, "
                f"go on: {resume_command(self.run.folder)}"
            ) from None

    def _drive(self) -> int:
        for plan in self.run.stages:
            if not self._stage(plan, self.record.stages[plan.name]):
                return self._stopped(plan.name)
        if not self._test(self.record.stages[TEST]):
            return self._stopped(TEST)
        return 0

    def _stage(self, plan: StagePlan, state: StageState) -> bool:
        """See to it that a stage is trained; False when it was stopped on request."""
        place = Place(self.run.recipe, plan.name)
        # The files tell where a driver was killed between the stage's end and its own note of it.
        if state.state == "finished" or self._is_trained(plan):
            self._note(state, "finished")
            self.screen.say(f"{place.title()}: finished before")
            return True
        return not self.signals.asked and self._train(plan, state, place)

    def _is_trained(self, plan: StagePlan) -> bool:
        """Whether the stage's final weights are ready to be handed over, and are numbers."""
        finished = self.run.engine.finished(train_job(self.run, plan))
        return finished and weights_are_finite(plan.final_weights)

    def _train(self, plan: StagePlan, state: StageState, place: Place) -> bool:
        """Train a stage to its end; False when it was stopped on request."""
        dialect = self.run.engine.info.dialect
        point = start_point(plan, dialect)
        job = train_job(self.run, plan, point.snapshot.solverstate if point.snapshot else None)
        commands = self.run.engine.train_commands(job)
        factor = self._start_factor(plan, point)
        texts = stage_texts(self.run, plan, val_images=self.val_images, start_factor=factor)
        write_stage(self.run, plan, texts, commands)
        if point.snapshot is None:
            write_start_weights(self.run, plan)
        self._announce(plan, place, point)
        view = StageView()
        view.feed_file(plan.log)
        view.begin_part(point.iteration)
        keeper = Keeper(plan.prefix, dialect, self.keep, plan.stage.solver.max_iter, point.iteration)
        self._note(state, "running")
        begun = time.monotonic()
        code = self._run(
            plan.folder, state, commands, Watched(view, place, keeper, plan, len(view.tests), view.displays)
        )
        if view.trouble is None:
            keeper.clean(view)
        if view.trouble is None and self._is_trained(plan):
            self._note(state, "finished")
            seconds = time.monotonic() - begun
            reestimated = self.run.engine.info.own_rule and job.reestimate_batches > 0
            self.screen.say(stage_summary(view, place, seconds, reestimated=reestimated), style="green")
            self._tell_if_too_dense(plan, view)
            return True
        if self.signals.asked:
            self._note(state, "stopped", f"at iteration {view.iteration:,}")
            return False
        raise self._failure(plan, state, view, code)

    def _tell_if_too_dense(self, plan: StagePlan, view: StageView) -> None:
        """Say so where the ramp ended below its target. Not of the fork, which may count otherwise."""
        sparse = plan.stage.sparse
        if sparse is None or view.sparsity is None or not self.run.engine.info.own_rule:
            return
        if view.sparsity < sparse.target:
            self.screen.say(
                f"  sparsity {view.sparsity:.3f} is below the target of {sparse.target:g}: the ramp "
                "ended first, or its caps hold weights back that more L1 (weight_decay, max_iter of the "
                "stages before) would shrink; see docs/sparsification.md",
                style="yellow",
            )

    def _start_factor(self, plan: StagePlan, point: StartPoint) -> float | None:
        if plan.stage.sparse is None or point.snapshot is None:
            return None
        log = plan.log.read_text(errors="replace") if plan.log.exists() else ""
        return self.run.engine.resume_start_factor(plan.stage.sparse, point.iteration, log)

    def _announce(self, plan: StagePlan, place: Place, point: StartPoint) -> None:
        for line in point.passed_over:
            self.screen.say(f"  {line}", style="yellow")
        if point.snapshot is not None:
            start = f"goes on at iteration {point.iteration:,}"
        else:
            start = f"from {plan.start_weights}" if plan.start_weights else "from random weights"
            if plan.stage.reinit:
                start += f" without {', '.join(plan.stage.reinit)}"
        self.screen.say(
            f"{place.title()}: {place.max_iter:,} iterations, {start}; log: {plan.log}", style="bold"
        )
        trains_on = 0 < point.iteration < place.max_iter
        if trains_on and self.run.engine.info.begins_data_again:
            self.screen.say(
                "  stock Caffe reads its training LMDB from the beginning again after a resume: "
                "the images there are seen once more than the others"
            )

    def _test(self, state: StageState) -> bool:
        """Score the final weights; False when it was stopped on request."""
        if state.state == "finished":
            self.screen.say("test: finished before")
            return True
        if self.signals.asked:
            return False
        command = self.run.engine.test_command(test_job(self.run, self.val_images))
        write_test(self.run, stage_texts(self.run, self.run.stages[-1], val_images=self.val_images), command)
        self.screen.say(
            f"test: {self.run.final_weights}; log: {self.run.test_folder / LOG_NAME}", style="bold"
        )
        view = StageView()
        self._note(state, "running")
        code = self._run(self.run.test_folder, state, [command], Watched(view))
        if code == 0 and view.final_outputs is not None:
            self._note(state, "finished")
            self.screen.say(test_line(view.final_outputs), style="green")
            return True
        if self.signals.asked:
            self._note(state, "stopped")
            return False
        reason = view.fatal or describe_exit(code)
        self._note(state, "failed", reason)
        raise RunFailed(f"the test failed: {reason}; log: {self.run.test_folder / LOG_NAME}")

    def _run(self, folder: Path, state: StageState, commands: Sequence[list[str]], watched: Watched) -> int:
        """Run the commands in order until one fails or a stop is asked for; returns the last exit code."""
        code = 0
        for command in commands:
            start = run_folder.start_log(folder / LOG_NAME, f"{run_folder.now()} {shlex.join(command)!a}")
            try:
                child = Child(command, folder / LOG_NAME, self.lock.descriptor)
            except OSError as error:
                self._note(state, "failed", str(error))
                raise RunFailed(f"{command[0]} cannot be started: {error.strerror}") from None
            self.signals.pass_on_to(child)
            try:
                state.pid = child.pid
                run_folder.save(self.run.folder, self.record)
                code = self._follow(child, Tail(folder / LOG_NAME, start), watched)
            except BaseException:
                # We cannot go on (a full disk, for one): nothing may train unwatched.
                child.stop(1)
                child.wait()
                raise
            self.signals.pass_on_to(None)
            if code != 0 or self.signals.asked or watched.view.trouble is not None:
                break
            # Caffe exits with 0 when it was interrupted, too: what follows needs the final snapshot.
            if not watched.has_final_snapshot(self.run):
                break
        state.pid = None
        self.screen.clear()
        return code

    def _follow(self, child: Child, tail: Tail, watched: Watched) -> int:
        """Read the log until the command has ended; returns its exit code."""
        told_stops = 0
        while True:
            ended = child.ended()
            while data := tail.read():
                watched.view.feed(data)
                watched.heard = time.monotonic()
            if watched.view.trouble is not None:
                # Without a snapshot: it would be the newest, and hold weights that are not numbers.
                child.kill()
            self._show(watched)
            if self.signals.count > told_stops and not ended:
                told_stops = self.signals.count
                self._tell_stopping(told_stops)
            if watched.keeper is not None and watched.view.trouble is None:
                watched.keeper.clean_now_and_then(watched.view)
            if ended:
                return child.exit_code
            time.sleep(POLL_SECONDS)

    def _show(self, watched: Watched) -> None:
        view, place = watched.view, watched.place
        silent = time.monotonic() - watched.heard
        if place is None:
            done, batches = view.batches_done, view.batches
            shown = Progress(["test", f"batch {done:,}/{batches:,}"], last_heard(silent))
            self.screen.show(shown, done / max(batches, 1), news=0 < done < batches)
            return
        for iteration in list(view.tests)[watched.told_tests : self._whole_tests(view)]:
            self.screen.say(f"  iteration {iteration:,}, {test_line(view.tests[iteration])}")
            watched.told_tests += 1
        news = view.displays > watched.told_displays
        watched.told_displays = view.displays
        shown = progress(view, place, silent=silent)
        self.screen.show(shown, view.iteration / place.max_iter, news=news)

    def _tell_stopping(self, count: int) -> None:
        harder = HARDER[min(count, len(HARDER)) - 1]
        what = "Caffe finishes its iteration and writes a snapshot" if count == 1 else "ending Caffe"
        self.screen.say(f"  stopping: {what}{f' ({harder})' if harder else ''}", style="yellow")

    def _stopped(self, name: str) -> int:
        self.screen.say(f"stopped in {name}; to go on: {resume_command(self.run.folder)}", style="yellow")
        return self.signals.exit_code

    def _failure(self, plan: StagePlan, state: StageState, view: StageView, code: int) -> RunFailed:
        reason = why_failed(self.run, plan, view, code)
        self._note(state, "failed", reason)
        return RunFailed(f"stage {plan.name} failed: {reason}; log: {plan.log}")

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

    def _whole_tests(self, view: StageView) -> int:
        """How many tests have all their outputs: the last one only when training has gone on after it."""
        return len(view.tests) - (1 if view.in_test else 0)
