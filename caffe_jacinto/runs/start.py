"""Start a new run, or resume one that was stopped."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from caffe_jacinto import __version__
from caffe_jacinto.common.arguments import GpuRequest
from caffe_jacinto.common.disk import is_full, why_not_written
from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.files import expanded, write_whole
from caffe_jacinto.data.listing import LABELS
from caffe_jacinto.engines.contract import Engine, Precision
from caffe_jacinto.engines.discovery import find_engine
from caffe_jacinto.engines.gpus import any_visible, requested_gpus, this_machine
from caffe_jacinto.engines.snapshots import weights_are_finite
from caffe_jacinto.logs.discover import RUN_RECORD
from caffe_jacinto.logs.page import PAGE_NAME
from caffe_jacinto.networks.completion import complete
from caffe_jacinto.networks.registry import RECIPE_RULES
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.record import RECORD
from caffe_jacinto.recipes.load import load_recipe, recipe_of
from caffe_jacinto.recipes.model import Recipe
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.data_check import check_data, data_of
from caffe_jacinto.runs.driver import Driver
from caffe_jacinto.runs.folder import (
    TEST,
    EngineRecord,
    RunRecord,
    StageState,
    report_command,
    resume_command,
)
from caffe_jacinto.runs.lock import RELEASE_SECONDS, RunLock
from caffe_jacinto.runs.page import RunPage, page_line
from caffe_jacinto.runs.plan import (
    RunPlan,
    plan_run,
    quantize_job,
    test_job,
    train_job,
    write_quantize,
    write_stage,
    write_start_weights,
    write_test,
)
from caffe_jacinto.runs.preflight import Findings, preflight
from caffe_jacinto.runs.process import StopSignals
from caffe_jacinto.runs.progress import Screen, shown
from caffe_jacinto.runs.slurm import SlurmRequest, check_no_other_job, check_slurm, submit
from caffe_jacinto.runs.user_files import copied, differences


@dataclass(frozen=True)
class Options:
    """What the command line asks for. None leaves it to the recipe, or to the run that is resumed."""

    gpus: GpuRequest | None = None
    """Empty: the CPU."""
    caffe: str | None = None
    engine: str | None = None
    dialect: Dialect | None = None
    precision: Precision | None = None
    output: Path | None = None
    keep: int | None = None
    dry_run: bool = False
    must_reach: bool = False
    """Refuse a run whose sparse stages cannot reach their targets, instead of a note."""

    accept_data: bool = False
    """Resume even if an LMDB has been replaced."""

    slurm: SlurmRequest | None = None
    """Submit the run to Slurm instead of training here."""

    open_page: bool = False
    """Print the address of the run's page."""


def start(recipe_name: str, overrides: Sequence[str], options: Options) -> int:
    """Start a new run and drive it to its end, or submit it; returns the exit code.

    Raises:
        UserError: something is wrong. Nothing was run, and only a dry run wrote anything.
        RunFailed: a stage failed.
    """
    if options.slurm:
        check_slurm()
    recipe = load_recipe(recipe_name, overrides, rules=RECIPE_RULES, completion=complete)
    if options.slurm and options.gpus is None:
        # Slurm gives each job its GPUs, and programs number them from 0.
        options = replace(options, gpus=tuple(range(len(recipe.training.gpus))))
    return start_recipe(recipe, options)


def start_recipe(recipe: Recipe, options: Options, signals: StopSignals | None = None) -> int:
    """As `start`, of a recipe that is loaded.

    ``signals``: those of a caller that waits for signals already.

    Raises:
        UserError, RunFailed: as `start`; NothingPruned where that is all that is wrong.
    """
    folder = options.output or run_folder.default_folder(recipe.weights_prefix)
    if not run_folder.is_free(folder):
        raise UserError(f"{folder} already exists{_what_to_do(folder)}")
    screen = Screen()
    run, findings = _checked(recipe, folder, options, screen)
    recipe, engine = run.recipe, run.engine
    if not (options.dry_run and findings.files_can_be_made):
        findings.refuse()
    theirs = recipe
    recipe, copies = copied(recipe, folder)
    record = RunRecord(
        caffe_jacinto=__version__,
        created=run_folder.now(),
        start_folder=str(Path.cwd()),
        folder=str(folder),
        recipe=recipe,
        engine=_engine_record(engine),
        gpus=run.gpus,
        slurm=None if options.slurm is None else options.slurm.record(),
        stages={name: StageState() for name in run_folder.steps_of(recipe)},
    )
    if not findings.problems:
        record.data = data_of(run.recipe.data)
    before = [path.name for path in folder.iterdir()] if folder.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    lock.acquire()
    if (folder / RUN_RECORD).exists():
        raise UserError(f"{folder} already exists{_what_to_do(folder)}")
    run_folder.tidy(folder)
    for path, text in copies.items():
        write_whole(path, text)
    run = replace(run, recipe=recipe)
    run_folder.save(folder, record)
    _copy_labels(run)
    screen.say(f"run folder: {folder}")
    for line in differences(run, theirs):
        screen.say(line)
    if options.dry_run:
        _write_all(run, findings, screen)
        findings.refuse()
        screen.say(f"nothing was run; to run it: {resume_command(folder, record)}")
        return 0
    if options.open_page:
        screen.say(page_line(folder))
    if options.slurm:
        try:
            return _submit(folder, record, lock, screen)
        except UserError:
            _remove_what_was_written(folder, before)  # nothing was trained in it
            raise
    return _drive(run, record, lock, screen, signals or StopSignals())


def _remove_what_was_written(folder: Path, before: Collection[str] | None) -> None:
    """Remove what is in a run folder, but for the names that it had ``before``; None: and the folder."""
    for path in folder.iterdir():
        if before is not None and path.name in before:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if before is None:
        folder.rmdir()


def check_recipe(recipe: Recipe, folder: Path, options: Options) -> None:
    """Check what a run of ``recipe`` in ``folder`` would be checked for, and write nothing.

    Raises:
        UserError: something is wrong.
    """
    _, findings = _checked(recipe, folder, options, Screen())
    findings.refuse()


def _checked(recipe: Recipe, folder: Path, options: Options, screen: Screen) -> tuple[RunPlan, Findings]:
    """The plan of a new run, and what the checks before it have found and shown."""
    engine, gpus = _engine(options, recipe.training.gpus, screen)
    recipe = changed(recipe, options, gpus)
    if options.gpus is None and not gpus and any_visible() and options.slurm is None:
        screen.say(f"  note: of {this_machine()} none is used; --gpus all takes them all", style="yellow")
    run = plan_run(recipe, folder, engine, gpus)
    findings = preflight(
        run,
        run.stages,
        run.quantized,
        recipe.training.keep,
        here=options.slurm is None,
        must_reach=options.must_reach,
    )
    run = replace(run, data_sizes=findings.data_sizes)
    _show_findings(run, findings, screen)
    return run, findings


@contextmanager
def full_disks_named(folder: Path) -> Iterator[None]:
    """A full disk while the run or sweep ``folder`` goes on becomes a RunFailed that says how to go on."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        why = why_not_written(error, Path(str(error.filename or folder)))
        raise RunFailed(f"{why}; free some space; to resume: {resume_command(folder)}") from None


def resume(
    folder: Path,
    options: Options,
    signals: StopSignals | None = None,
    lock_seconds: float = RELEASE_SECONDS,
) -> int:
    """Resume a run where it stopped, or submit it; returns the exit code.

    ``signals``: those of a caller that waits for signals already. ``lock_seconds``: how long to wait for
    another process to leave the run.

    Raises:
        UserError: the folder has no run, another process is training in it, or it cannot be resumed.
        RunFailed: a stage failed.
    """
    if options.slurm:
        check_slurm()
    folder = run_folder.run_folder_of(folder).absolute()
    record = run_folder.load(folder)
    run_folder.go_to_start_folder(folder, record.start_folder, record.folder)
    folder = Path(record.folder)
    check_no_other_job(folder)
    lock = RunLock(folder)
    lock.acquire(lock_seconds)
    try:
        return _resume_locked(folder, lock, options, signals)
    finally:
        lock.release()


def _resume_locked(folder: Path, lock: RunLock, options: Options, signals: StopSignals | None) -> int:
    """As `resume`, of the run in ``folder`` whose ``lock`` is held."""
    record = run_folder.load(folder)  # another train may have changed it before the lock was taken
    run_folder.tidy(folder)
    screen = Screen()
    if record.has_finished:
        screen.say(f"{folder}: this run has finished; its tables: {report_command(folder)}")
        return 0
    engine, gpus = _same_engine(record, options, screen)
    recipe = changed(record.recipe, options, gpus)
    run = plan_run(recipe, folder, engine, gpus)
    _reopen_damaged(run, record, screen)
    waiting = tuple(plan for plan in run.stages if record.stages[plan.name].state != "finished")
    quantized = tuple(plan for plan in run.quantized if record.stages[plan.name].state != "finished")
    here = options.slurm is None
    findings = preflight(run, waiting, quantized, recipe.training.keep, resuming=True, here=here)
    run = replace(run, data_sizes=findings.data_sizes)
    _show_findings(run, findings, screen)
    findings.refuse()
    if not options.accept_data:
        check_data(run, record.data)
    record.recipe, record.gpus, record.engine = recipe, run.gpus, _engine_record(engine)
    record.data = data_of(run.recipe.data)
    if options.slurm:
        record.slurm = options.slurm.record(record.slurm)
    run_folder.save(folder, record)
    screen.say(f"run folder: {folder}")
    if options.open_page:
        screen.say(page_line(folder))
    if options.slurm:
        return _submit(folder, record, lock, screen)
    return _drive(run, record, lock, screen, signals or StopSignals())


def _submit(folder: Path, record: RunRecord, lock: RunLock, screen: Screen) -> int:
    """Submit the run to Slurm, and leave it to the job; returns the exit code.

    Raises:
        UserError: Slurm refuses.
    """
    assert record.slurm is not None
    if not (folder / PAGE_NAME).exists():
        RunPage(folder, record, lambda line: screen.say(line, style="yellow")).write()
    lock.release()
    for line in submit(folder, record.recipe.training, record.slurm):
        screen.say(line)
    return 0


def _drive(run: RunPlan, record: RunRecord, lock: RunLock, screen: Screen, signals: StopSignals) -> int:
    keep = run.recipe.training.keep
    driver = Driver(run, record, lock, screen, signals, keep)
    driver.page.write()
    try:
        code = driver.drive()
    finally:
        screen.clear()
        lock.release()
    if code == 0:
        _show_result(run, screen)
    return code


def _what_to_do(folder: Path) -> str:
    if run_folder.never_ran(folder):
        return (
            f", from a --dry-run: start that run ({resume_command(folder)}), remove it, "
            "or give another --output"
        )
    if (folder / RUN_RECORD).is_file():
        return f": resume that run ({resume_command(folder)}), or give another --output"
    return " and is not an empty folder: give another --output"


def _engine(
    options: Options, gpus: tuple[int, ...], screen: Screen, reason: str | None = None
) -> tuple[Engine, tuple[int, ...]]:
    """Choose the engine and its GPUs (``gpus``, unless the options request others); show them and why."""
    request = gpus if options.gpus is None else options.gpus
    engine = find_engine(options.caffe, options.engine, options.dialect, options.precision, request)
    info = engine.info
    gpus = requested_gpus(request, info.maker if info.gpu else None)
    devices = f"GPUs {','.join(map(str, gpus))}" if gpus else "the CPU"
    version = f" {info.version}" if info.version else ""
    written = info.dialect.value if info.precision == "fp32" else f"{info.dialect.value}, {info.precision}"
    screen.say(
        f"engine: {info.kind}{version} at {info.executable}, dialect {written}, on {devices} "
        f"({reason or info.reason})"
    )
    for note in info.notes:
        screen.say(f"  note: {note}", style="yellow")
    return engine, gpus


def _same_engine(record: RunRecord, options: Options, screen: Screen) -> tuple[Engine, tuple[int, ...]]:
    """The run's engine and GPUs until now, unless the options name others or the engine no longer exists."""
    before, caffe, kind, reason = record.engine, options.caffe, options.engine, None
    if before.kind == "torch" and kind in (None, "torch") and caffe is None:
        options = replace(options, engine="torch", dialect=before.dialect, precision=before.precision)
        reason = "as before"
    elif before.kind == "torch":
        raise UserError(
            f"this run was started on PyTorch and cannot continue with "
            f"{'--caffe' if caffe else f'--engine {kind}'}, whose files differ: "
            "leave that option out, or start a new run"
        )
    elif caffe is None and kind != "torch" and Path(before.executable).exists():
        options = replace(options, caffe=before.executable)
        reason = "as before"
    engine, gpus = _engine(options, record.recipe.training.gpus, screen, reason)
    if engine.info.kind != before.kind:
        raise UserError(
            f"this run was started with {before.kind} ({before.executable}), but {engine.info.executable} is "
            f"{engine.info.kind}, whose files differ: name the first with --caffe, or start a new run"
        )
    if str(engine.info.executable) != before.executable or engine.info.version != before.version:
        screen.say(
            f"  note: until now the run used {before.executable} {before.version or ''}".rstrip(),
            style="yellow",
        )
    return engine, gpus


def _engine_record(engine: Engine) -> EngineRecord:
    info = engine.info
    return EngineRecord(
        kind=info.kind,
        executable=str(info.executable),
        version=info.version,
        dialect=info.dialect,
        precision=info.precision,
    )


def _reopen_damaged(run: RunPlan, record: RunRecord, screen: Screen) -> None:
    """Mark a finished stage as stopped if its final weights are still needed but missing or damaged."""
    wanted = {run.final_weights} if record.stages[TEST].state != "finished" else set()
    for quantized in run.quantized:
        if record.stages[quantized.name].state != "finished":
            wanted.add(quantized.source.final_weights)
    for plan in reversed(run.stages):
        state = record.stages[plan.name]
        finished = state.state == "finished"
        if finished and plan.final_weights in wanted and not weights_are_finite(plan.final_weights):
            screen.say(
                f"stage {plan.name} had finished, but its weights {plan.final_weights} are missing or "
                "damaged: it resumes from its newest good snapshot",
                style="yellow",
            )
            state.state = "stopped"
        # A stage that resumes from a snapshot does not load its start weights again.
        if state.state != "finished" and plan.start_weights and run.start_point(plan).snapshot is None:
            wanted.add(plan.start_weights)


def changed(recipe: Recipe, options: Options, gpus: tuple[int, ...]) -> Recipe:
    """The recipe with these GPUs and the options' snapshots and nodes, validated again as a whole.

    Raises:
        UserErrors: it cannot be trained so.
    """
    content = recipe.model_dump(mode="json")
    content["training"]["gpus"] = list(gpus)
    if options.slurm is not None and options.slurm.nodes is not None:
        content["training"]["nodes"] = options.slurm.nodes
    if options.keep is not None:
        content["training"]["keep"] = options.keep
    return recipe_of(content)


def _show_findings(run: RunPlan, findings: Findings, screen: Screen) -> None:
    train, val = (
        findings.data_sizes.get(lmdb) for lmdb in (run.recipe.data.train_lmdb, run.recipe.data.val_lmdb)
    )
    if train is not None and val is not None:
        screen.say(f"data: {train.images:,} training images, {val.images:,} validation images")
    for warning in findings.warnings:
        screen.say(f"  warning: {warning}", style="bold yellow")
    for note in findings.notes:
        screen.say(f"  note: {note}", style="yellow")


def _copy_labels(run: RunPlan) -> None:
    """Copy the class names into the run folder, if the data set has them.

    Those beside an LMDB that cannot be read were named by the checks, as a note.
    """
    given = run.recipe.data.labels
    source = expanded(given) if given else Path(run.recipe.data.train_lmdb) / LABELS
    try:
        names = source.read_bytes() if source.is_file() else None
    except OSError:
        if given:
            raise
        names = None
    if names is not None:
        write_whole(run.folder / LABELS, names)


def _write_all(run: RunPlan, findings: Findings, screen: Screen) -> None:
    """Write the files of all stages and of the test, and show the commands."""
    for plan in run.stages:
        commands = run.engine.train_commands(train_job(run, plan))
        texts = run.files(plan)
        write_stage(run, plan, texts, commands)
        if not findings.problems:
            write_start_weights(run, plan)
        _show_commands(plan.name, commands, screen)
    command = run.engine.test_command(test_job(run))
    write_test(run, texts, command)
    _show_commands(TEST, [command], screen)
    for quantized in run.quantized:
        command = run.engine.quantize_command(quantize_job(run, quantized))
        write_quantize(run, quantized, command)
        _show_commands(quantized.name, [command], screen)


def _show_commands(name: str, commands: Sequence[list[str]], screen: Screen) -> None:
    screen.say(f"{name}:", style="bold")
    for command in commands:
        screen.say(f"  {shlex.join(command)}")


def _show_result(run: RunPlan, screen: Screen) -> None:
    """Show the report's tables, the result's files, and what to do next."""
    from caffe_jacinto.logs import tables
    from caffe_jacinto.logs.discover import find_runs

    screen.say("")
    shown(lambda out: tables.show(tables.tables(find_runs([run.folder])[0]), out))
    screen.say("")
    screen.say(f"network: {run.stages[-1].folder / 'deploy.prototxt'}", style="bold")
    screen.say(f"weights: {run.final_weights}", style="bold")
    for quantized in run.quantized:
        if (quantized.folder / RECORD).is_file():
            screen.say(f"{quantized.name}: {quantized.folder / RECORD} and the files beside it", style="bold")
    screen.say(f"tables:  {report_command(run.folder)}")
    screen.say(page_line(run.folder).replace(" ", "    ", 1))
    screen.say(f"curves:  {report_command(run.folder)} --plot {shlex.quote(str(run.folder / 'curves.png'))}")
