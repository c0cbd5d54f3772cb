"""Trainings that are killed, get signals, or find their files damaged; each is compared at its end."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from caffe_jacinto.runs.lock import is_held
from faults import knocks, moments
from faults.cases import Broken
from faults.compare import compare
from faults.damage import KINDS, Damage
from faults.disturbed import FAILED, FINISHED, KILLED, PARTS, REFUSED, STOPPED, DisturbedRun
from faults.small_disk import FILLER, LEFT, check_words, fill

MOST_KNOCKS = 4

KILLS = "{} killed: {{}}"
"""Who, and when."""


def undisturbed(folder: Path, caffe: Path | None) -> DisturbedRun:
    """The run that the others are compared with."""
    run = DisturbedRun(folder, caffe)
    run.start().finish(FINISHED)
    run.check_commands()
    return run


def train_through(
    run: DisturbedRun, reference: Path, dice: random.Random, disturb: Callable[[DisturbedRun, str], None]
) -> None:
    """Have ``disturb`` start the run, or go on with it, and break in, in some of its parts; then compare.

    Raises:
        Broken: a promise was not kept.
    """
    chosen = sorted(dice.sample(range(len(PARTS)), dice.randint(2, MOST_KNOCKS)))
    for part in chosen:
        disturb(run, PARTS[part])
        run.wait_for_engine()
    run.resumed_ok()
    run.check_commands()
    run.check_frozen()
    compare(run.folder, reference, to_the_bit=run.on_pytorch)
    run.done["runs at their end, as the undisturbed one"] += 1


def kills(dice: random.Random) -> Callable[[DisturbedRun, str], None]:
    """Kill the driver, the engine or both, at any moment of a part."""

    def disturb(run: DisturbedRun, part: str) -> None:
        if dice.random() < 0.15:
            second = partial(_start_a_second, run, lose_lock=dice.random() < 0.5)
            break_in(run, part, dice, second, "second train started: {}", ())
            return
        who = dice.choice(knocks.WHO)
        break_in(run, part, dice, partial(knocks.kill, who=who), KILLS.format(who))

    return disturb


def _start_a_second(run: DisturbedRun, driver: int, *, lose_lock: bool) -> bool:
    """``--resume`` while another trains, which it must not disturb; False if nothing can be resumed yet.

    ``lose_lock``: the lock's file is deleted before.
    """
    if not run.is_under_way() or not is_held(run.folder):
        return False
    if lose_lock:
        (run.folder / "lock").unlink(missing_ok=True)
        run.done["lock deleted while training"] += 1
    command = run.go_on()
    code, said = command.finish(FINISHED, REFUSED)  # 0: the first one has come to its end meanwhile
    if code == REFUSED and f"already running there (process {driver})" not in said:
        raise Broken(f"a second train is not told of the first, see {command.said.name}")
    return True


def signals(dice: random.Random) -> Callable[[DisturbedRun, str], None]:
    """A storm of signals at any moment of a part."""

    def disturb(run: DisturbedRun, part: str) -> None:
        blows, codes = knocks.draw_storm(dice), (FAILED, REFUSED, *STOPPED)
        break_in(run, part, dice, partial(knocks.storm, blows=blows), "storm of signals: {}", codes)

    return disturb


def damage(dice: random.Random) -> Callable[[DisturbedRun, str], None]:
    """Kill both, then damage a file or two, and go on."""

    def disturb(run: DisturbedRun, part: str) -> None:
        break_in(run, part, dice, partial(knocks.kill, who="both"), KILLS.format("both"))
        for kind in dice.sample(KINDS, dice.choice((1, 1, 2, 3))):
            if run.is_under_way():
                _damage(run, kind, dice)

    return disturb


def _damage(run: DisturbedRun, kind: Damage, dice: random.Random) -> None:
    """Damage files; where training is refused for it, put them right again."""
    sound = run.trainer.folder / "sound"
    shutil.rmtree(sound, ignore_errors=True)
    if kind.may_be_refused:
        shutil.copytree(run.trainer.folder / "train_lmdb", sound / "train_lmdb")
        shutil.copytree(run.folder, sound / "run")
    changed = kind.apply(run.folder, dice)
    if not changed:
        return
    run.done[kind.name] += 1
    if kind.may_be_refused:
        masks = run.before()
        code, said = run.go_on().finish(FINISHED, FAILED, REFUSED)
        run.remember_frozen(masks, said)
        if code != FINISHED:
            run.done["refused in a line, mended, resumed"] += 1
            for path in changed:
                _put_back(path, run, sound)


def _put_back(path: Path, run: DisturbedRun, sound: Path) -> None:
    copy = sound / path.resolve().relative_to(run.trainer.folder.resolve())
    if copy.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(copy, path)
    else:
        shutil.copyfile(copy, path)


def break_in(
    run: DisturbedRun,
    part: str,
    dice: random.Random,
    knock: Callable[[int], bool],
    name: str,
    codes: Sequence[int] = (FAILED, REFUSED, *KILLED),
) -> tuple[int, str]:
    """Start or resume, and at a moment of ``part`` call ``knock`` with the driver's process number.

    ``knock`` returns whether it has hit anything; then the exit code may be one of ``codes``, and ``name`` is
    counted, with the moment in its braces. (A recipe whose check is killed is refused.) Returns the exit code
    and what the command said.
    """
    moment = moments.choose(dice, part)
    watch, masks = moments.Watch(moment, run.folder, PARTS[PARTS.index(part) + 1 :]), run.before()
    command = run.start()
    try:
        came = watch.wait(command.process)
        hit = came is not None and knock(command.process.pid)
    except BaseException:
        knocks.kill_all(command.process.pid)
        raise
    code, said = command.finish(FINISHED, *(codes if hit else ()))
    run.remember_frozen(masks, said)
    run.done[name.format(came) if hit else "nothing was hit: it had ended"] += 1
    return code, said


def full_disk(dice: random.Random) -> Callable[[DisturbedRun, str], None]:
    """The disk of the run folder fills at any moment of a part, and is cleared when the command has ended."""

    def disturb(run: DisturbedRun, part: str) -> None:
        filler, left = run.folder.parent / FILLER, dice.choice(LEFT)
        code, said = break_in(
            run, part, dice, lambda driver: fill(filler, left), "disk filled: {}", (FAILED, REFUSED)
        )
        if code != FINISHED:
            check_words(said)
            if dice.random() < 0.3:
                _try_again(run)
        filler.unlink(missing_ok=True)

    return disturb


def _try_again(run: DisturbedRun) -> None:
    """Go on while the disk is still full."""
    masks = run.before()
    code, said = run.go_on().finish(FINISHED, FAILED, REFUSED)
    run.remember_frozen(masks, said)
    if code != FINISHED:
        run.done["resume tried while the disk was full"] += 1


DISTURBANCES: dict[str, Callable[[random.Random], Callable[[DisturbedRun, str], None]]] = {
    "kills": kills,
    "signals": signals,
    "damage": damage,
    "disk": full_disk,
}


def disturbed_training(kind: str, run: DisturbedRun, reference: Path, dice: random.Random) -> Counter[str]:
    """A case: ``run``, which is not begun, disturbed in one way, to its end; what was done.

    Raises:
        Broken: a promise was not kept.
    """
    try:
        train_through(run, reference, dice, DISTURBANCES[kind](dice))
    except Broken as broken:
        raise Broken(f"after {', '.join(run.done) or 'nothing'}: {broken}") from None
    return run.done
