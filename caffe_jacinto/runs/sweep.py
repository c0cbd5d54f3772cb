"""A recipe trained to several sparsities: its dense stages once, its sparse ones for each target.

training/<dataset>_<network>_sweep_<time>/
    sweep.json  the recipe in full, the targets, how it is trained; copies of a network of the user's own
    dense/      a run of the stages before the first one that prunes
    target_0.8/ a run of the others for this target, from the weights in dense/; one for each
    sweep.csv   the results; sweep.png: accuracy against sparsity and complexity

Each of them is a run as any other. The sweep goes on with the first that has not finished: what there is to
do, the search for the sparsest network included, follows from the results that are there.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from caffe_jacinto import __version__
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import FAILED, RunFailed, UserError, UserErrors
from caffe_jacinto.common.files import expanded, write_whole
from caffe_jacinto.common.text import Column, Line, count_of, show_table
from caffe_jacinto.engines.contract import Precision
from caffe_jacinto.engines.discovery import find_engine
from caffe_jacinto.logs.discover import RUN_RECORD, find_runs
from caffe_jacinto.logs.scatter import Choice, draw
from caffe_jacinto.logs.tables import complexity, percent
from caffe_jacinto.networks.completion import complete
from caffe_jacinto.networks.registry import RECIPE_RULES
from caffe_jacinto.networks.stage_files import user_network
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.reach import MOST_THRESHOLDS
from caffe_jacinto.pruning.rule import most_zeros
from caffe_jacinto.pruning.schedule import factor_cap, factors, step_iterations
from caffe_jacinto.recipes.load import load_recipe, recipe_of
from caffe_jacinto.recipes.model import Recipe, SparseSettings
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.data_check import check_data_of_sweep
from caffe_jacinto.runs.folder import resume_command
from caffe_jacinto.runs.preflight import NothingPruned
from caffe_jacinto.runs.process import StopSignals
from caffe_jacinto.runs.progress import Screen, shown
from caffe_jacinto.runs.start import Options, check_recipe, full_disks_named, resume, start_recipe
from caffe_jacinto.runs.status import status_lines
from caffe_jacinto.runs.user_files import copied

SWEEP_RECORD = "sweep.json"
TABLE, PICTURE = "sweep.csv", "sweep.png"
DENSE = "dense"

FINEST = 100
"""The search for the sparsest network tries multiples of 1/100."""

HIGHEST = 96
"""Targets from this many hundredths on are not tried: the published schedule ends at 0.95."""

MISSED = 0.005
"""A network that is so much less sparse than its target has not reached it."""


class SweepRecord(BaseModel):
    """The contents of sweep.json."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    caffe_jacinto: str
    start_folder: str
    """Where the sweep was started; relative paths resolve against it."""

    folder: str
    recipe: Recipe
    targets: tuple[float, ...]
    """Those to train, in this order."""

    max_loss: float | None = None
    """Then search the sparsest network that loses at most so many points of top-1."""

    caffe: str | None = None
    engine: str | None = None
    dialect: Dialect | None = None
    precision: Precision | None = None
    gpus: tuple[int, ...] | str | None = None


@dataclass(frozen=True)
class Request:
    """What to sweep."""

    targets: tuple[float, ...] = ()
    max_loss: float | None = None


def start_sweep(recipe_name: str, overrides: Sequence[str], options: Options, request: Request) -> int:
    """Start a sweep and drive it to its end; returns the exit code.

    Raises:
        UserError: something is wrong: nothing was run or written, or a run is refused when its turn comes.
        RunFailed: a stage failed.
    """
    recipe = load_recipe(recipe_name, overrides, rules=RECIPE_RULES, completion=complete)
    pruning = [name for name, stage in recipe.stages.items() if stage.sparse is not None]
    if not pruning:
        raise UserError(f"{recipe_name}: no stage prunes, so there is no target; add stages.NAME.sparse")
    if request.max_loss is not None and not dense_stages(recipe):
        raise UserError(
            f"{recipe_name}: --max-loss compares with the network before pruning, and no stage comes before "
            f"{pruning[0]}; add one, or give targets with --sweep"
        )
    if request.max_loss is not None:
        _check_has_top1(recipe)
    last = recipe.stages[pruning[-1]].sparse
    assert last is not None
    targets = request.targets or (last.target,)
    recipes = {target: with_target(recipe, target) for target in targets}
    hardest = recipes[max(targets)]
    wrong = [line for target in targets if target != max(targets) for line in idle_stages(recipes[target])]
    folder = options.output or _default_folder(recipe)
    if not run_folder.is_free(folder):
        again = (folder / SWEEP_RECORD).is_file()
        what = f": go on with that sweep ({resume_command(folder)})," if again else ""
        raise UserError(f"{folder} already exists{what}{'' if again else ':'} give another --output")
    try:
        check_recipe(hardest, folder / DENSE, options)
    except UserError as error:
        raise UserErrors([*error.lines(), *wrong]) from None
    if wrong:
        raise UserErrors(wrong)
    recipe, copies = copied(recipe, folder)
    record = SweepRecord(
        caffe_jacinto=__version__,
        start_folder=str(Path.cwd()),
        folder=str(folder),
        recipe=recipe,
        targets=targets,
        max_loss=request.max_loss,
        caffe=options.caffe,
        engine=options.engine,
        dialect=options.dialect,
        precision=options.precision,
        gpus=options.gpus,
    )
    sweep = Sweep(folder, record, options)
    if options.dry_run:
        sweep.say_plan()
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        write_whole(path, text)
    write_whole(folder / SWEEP_RECORD, record.model_dump_json(indent=2) + "\n")
    with full_disks_named(folder):
        return sweep.drive()


def _check_has_top1(recipe: Recipe) -> None:
    """Refuse a network of the user's own whose test has no top-1 accuracy, by which --max-loss chooses.

    Raises:
        UserError: it has none.
    """
    if recipe.network.prototxt is None:
        return
    tests = user_network(recipe).tests[0]
    if any(
        layer.string("type") == "Accuracy" and layer.message("accuracy_param").integer("top_k", 1) == 1
        for layer in tests.layers
    ):
        return
    raise UserError(
        f"{tests.path}: --max-loss chooses by the top-1 accuracy, and no layer of the network that tests "
        "measures it; add an Accuracy, or give targets with --sweep"
    )


def is_sweep(folder: Path) -> bool:
    """Whether a folder that a user names holds a sweep."""
    return (folder / SWEEP_RECORD).is_file()


def resume_sweep(folder: Path, options: Options) -> int:
    """Go on with a sweep; returns the exit code.

    Raises:
        UserError: its record is damaged, it has been moved, or its runs have another engine; as `resume`.
        RunFailed: a stage failed.
    """
    path = (folder / SWEEP_RECORD).absolute()
    record = _read(path)
    run_folder.go_to_start_folder(path.parent, record.start_folder, record.folder)
    before = {key: getattr(record, key) for key in ("caffe", "engine", "dialect", "precision", "gpus")}
    given = {key: getattr(options, key) for key in before if getattr(options, key) is not None}
    options = _same_engine(Path(record.folder), options, replace(options, **before | given))
    return Sweep(Path(record.folder), record, options).drive()


def _read(path: Path) -> SweepRecord:
    """The record in a sweep.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        return SweepRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: damaged, or of another version ({first}): start a new sweep") from None


def _same_engine(folder: Path, given: Options, options: Options) -> Options:
    """``options`` with the engine of the sweep's runs until now, if there are any.

    Raises:
        UserError: the options ``given`` name another kind of engine or another dialect.
    """
    runs = _begun(folder)
    if not runs:
        return options
    before = run_folder.load(runs[0]).engine
    kind, dialect = given.engine, given.dialect
    if given.caffe is not None:
        kind = find_engine(given.caffe, given.engine).info.kind
    other = kind if kind not in (None, before.kind) else None
    if other is None and dialect not in (None, before.dialect):
        other = f"dialect {dialect.value}"
    if other is not None:
        raise UserError(
            f"the runs of this sweep were trained with {before.kind}, dialect {before.dialect.value}, and "
            f"cannot be compared with those of {other}: leave that option out, or start a new sweep"
        )
    if before.kind == "torch":
        precision = given.precision or before.precision
        return replace(options, engine="torch", caffe=None, dialect=before.dialect, precision=precision)
    exists = options.caffe is None and Path(before.executable).exists()
    return replace(options, engine=before.kind, caffe=before.executable if exists else options.caffe)


def sweep_status(folder: Path) -> list[str]:
    """The state of each run of a sweep, from its files alone, and how to go on with the sweep."""
    begun = _begun(folder)
    lines = [line for run in begun for line in status_lines(run)]
    targets = [f"target_{target}" for target in _read(folder / SWEEP_RECORD).targets]
    waiting = [name for name in targets if folder / name not in begun]
    if waiting:
        lines.append(f"not started: {', '.join(waiting)}")
    if (folder / TABLE).is_file():
        lines.append(f"table of the sweep: {folder / TABLE}")
    else:
        lines.append(f"to resume the sweep: {resume_command(folder)}")
    return lines


def _begun(folder: Path) -> list[Path]:
    """The runs of a sweep that have begun, the one of the dense stages first, if there are any."""
    runs = (folder / DENSE, *target_runs(folder).values())
    return [run for run in runs if (run / RUN_RECORD).is_file()]


def target_runs(folder: Path) -> dict[float, Path]:
    """The runs in a sweep's folder by their targets, from the least; other folders are not its own."""
    found: dict[float, Path] = {}
    for path in folder.glob("target_*"):
        match = re.fullmatch(r"target_(\d(?:\.\d+)?(?:e-\d+)?)", path.name, re.ASCII)
        if match and repr(float(match[1])) == match[1] and (path / RUN_RECORD).is_file():
            found[float(match[1])] = path
    return {target: found[target] for target in sorted(found)}


def dense_stages(recipe: Recipe) -> list[str]:
    """The stages that train before the first one that prunes."""
    found: list[str] = []
    for name, stage in recipe.stages.items():
        if stage.sparse is not None:
            break
        if stage.solver is not None:
            found.append(name)
    return found


def dense_recipe(recipe: Recipe) -> Recipe:
    """The dense stages, and those that quantize what they have trained."""
    dense = dense_stages(recipe)
    content = recipe.model_dump(mode="json")
    stages = {
        name: stage
        for name, stage in content["stages"].items()
        if name in dense or (stage["solver"] is None and stage["start"] in dense)
    }
    return Recipe.model_validate(content | {"stages": stages})


def sparse_recipe(recipe: Recipe, target: float, dense: Path) -> Recipe:
    """The other stages, pruned to ``target``; they start and learn from the run ``dense``."""
    before = dense_recipe(recipe).stages if dense_stages(recipe) else {}

    def trained(stage: str) -> str:
        return str(dense / stage / recipe.weights_name(stage))

    content = with_target(recipe, target).model_dump(mode="json")
    stages: dict[str, Any] = {}
    for name, stage in content["stages"].items():
        if name in before:
            continue
        if stage["start"] in before:
            stage |= {"start": None, "weights": trained(stage["start"])}
        teacher = recipe.teacher_of(name)
        if teacher is not None and teacher.stage in before:
            network = str(dense / teacher.stage / "deploy.prototxt")
            stage |= {"teacher": trained(teacher.stage), "teacher_prototxt": network}
        stages[name] = stage
    return Recipe.model_validate(content | {"stages": stages})


def with_target(recipe: Recipe, target: float) -> Recipe:
    """The recipe with this target in each stage that prunes.

    Raises:
        UserErrors: a stage cannot be pruned to it.
    """
    content = recipe.model_dump(mode="json")
    for stage in content["stages"].values():
        if stage["sparse"] is not None:
            stage["sparse"]["target"] = target
    try:
        return recipe_of(content)
    except UserError as error:
        raise UserErrors([f"target {target}: {line}" for line in error.lines()]) from None


def idle_stages(recipe: Recipe) -> list[str]:
    """The pruning stages whose schedule zeroes no weight at their target, a line for each.

    A run of them would be refused. This takes no engine and no data: it is for the targets beside the
    largest, for which `check_recipe` checks all. A stage that the zeros at its start may help is left to the
    check of its run.
    """
    found: list[str] = []
    for name, stage in recipe.stages.items():
        sparse = stage.sparse
        why = None if sparse is None else _why_idle(recipe, name, sparse)
        if sparse is not None and why is not None:
            what = f"target {sparse.target:g}: stage {name}: no weight would become zero"
            found.append(f"{what}: {why}leave this target out")
    return found


def _why_idle(recipe: Recipe, name: str, sparse: SparseSettings) -> str | None:
    """Why a stage's schedule zeroes nothing at its target, but would at another; the start of a sentence."""
    steps = len(step_iterations(sparse, recipe.stages[name].max_iter))
    applied = list(islice(factors(sparse), min(steps, MOST_THRESHOLDS)))
    if not steps:
        return None  # at every target
    if not applied and _most_zeros_before(recipe, name) < sparse.target:
        return (
            f"stages.{name}.sparse.start_factor {sparse.start_factor:g} is above "
            f"{factor_cap(sparse.target):g}, where the schedule for this target ends; lower start_factor, or "
        )
    if not applied or sparse.n_of_m is None or sparse.targets:
        return None
    together = sparse.n_of_m[1]
    if most_zeros(together, applied[-1]) or _most_zeros_before(recipe, name):
        return None
    return (
        f"the schedule for this target ends at a factor of {applied[-1]:g}, less than one weight of the "
        f"{together} of the pattern {sparse.pattern}; "
    )


def _most_zeros_before(recipe: Recipe, name: str) -> float:
    """The fraction of zeros that a layer has at most where a stage starts; 1 where that is not known yet.

    As in `sparsity_check`, dense stages leave no more zeros than they start with.
    """
    stage = recipe.stages[name]
    while stage.weights is None:
        if stage.start is None:
            return 0.0
        stage = recipe.stages[stage.start]
        if stage.sparse is not None:
            return 1.0
    return _most_zeros_in(expanded(stage.weights).absolute())


@cache
def _most_zeros_in(weights: Path) -> float:
    """The largest fraction of zeros among the weights of a layer in a file; 1 if it cannot be read."""
    try:
        layers = read_weights(weights).values()
    except UserError:
        return 1.0
    matrices = (blobs[0] for blobs in layers if blobs and blobs[0].ndim > 1 and blobs[0].size)
    return max((float((values == 0).mean()) for values in matrices), default=0.0)


class Sweep:
    """A sweep in its folder."""

    def __init__(self, folder: Path, record: SweepRecord, options: Options) -> None:
        self.folder, self.record = folder, record
        self._options = options
        self._screen = Screen()
        self._left_out: list[float] = []

    def say_plan(self) -> None:
        """Say which runs there would be."""
        recipe, screen = self.record.recipe, self._screen
        if dense_stages(recipe):
            screen.say(f"{self.folder / DENSE}: {', '.join(dense_recipe(recipe).stages)}")
        for target in self.record.targets:
            stages = sparse_recipe(recipe, target, self.folder / DENSE).stages
            screen.say(f"{self._run_of(target)}: {', '.join(stages)}, target {target}")
        if self.record.max_loss is not None:
            limit = count_of_points(self.record.max_loss)
            screen.say(f"then the search for the sparsest network that loses at most {limit}")
        screen.say("nothing was run or written")

    def drive(self) -> int:
        """Train what is not trained yet, and show the results; returns the exit code.

        A target at which a stage would zero nothing is left out. What is known of that only when the stages
        before have been trained is found again each time the sweep goes on.

        Raises:
            UserError: a run is refused. It and what comes after it were not started.
            RunFailed: a stage failed. What comes after it was not started.
        """
        recipe = self.record.recipe
        signals = StopSignals()
        if dense_stages(recipe):
            code = self._run(self.folder / DENSE, dense_recipe(recipe), signals, "the dense stages")
            if code:
                return code
        for target in self._targets():
            title = f"target {target}"
            one = sparse_recipe(recipe, target, self.folder / DENSE)
            try:
                code = self._run(self._run_of(target), one, signals, title)
            except NothingPruned as error:
                self._left_out.append(target)
                self._screen.say(f"{title} is left out: {error}", style="yellow")
                continue
            if code:
                return code
        self._show()
        return FAILED if self._left_out else 0

    def _targets(self) -> Iterator[float]:
        """The targets in order, the next one of a search after the result of the one before."""
        yield from self.record.targets
        if self.record.max_loss is None:
            return
        possible = possible_targets(self.record.recipe)
        limit = self.record.max_loss
        while (target := next_target(self._losses(), limit, self._in_reach(possible))) is not None:
            yield target

    def _in_reach(self, possible: range) -> range:
        """The targets, in hundredths, that lead to networks of their own.

        They are above those at which nothing becomes zero, and below one that led to no sparser network than
        a lower target did which was missed: there the schedule ends before it gets to either.
        """
        highest = max(self._left_out, default=0.0)
        start = max(possible.start, math.floor(FINEST * highest + 1e-9) + 1)
        reached = [(target, _result(folder).sparsity or 0.0) for target, folder in self._runs().items()]
        same = (
            target
            for (lower, before), (target, found) in pairwise(reached)
            if 0 < found <= before < lower - MISSED
        )
        stop = min((math.ceil(FINEST * target - 1e-9) for target in same), default=possible.stop)
        return range(start, min(stop, possible.stop))

    def _losses(self) -> dict[float, float]:
        """By target: the points of top-1 that a network has lost.

        Raises:
            RunFailed: a run has no top-1.
        """
        dense = self._top1(self.folder / DENSE)
        return {target: 100 * (dense - self._top1(folder)) for target, folder in self._runs().items()}

    def _top1(self, folder: Path) -> float:
        top1 = _result(folder).top1
        if top1 is None:
            raise RunFailed(f"{folder}: its test has no top-1 accuracy, by which --max-loss chooses")
        return top1

    def _run_of(self, target: float) -> Path:
        return self.folder / f"target_{target}"

    def _runs(self) -> dict[float, Path]:
        """The runs that have finished, by their targets, from the least."""
        runs = target_runs(self.folder)
        return {target: path for target, path in runs.items() if run_folder.load(path).has_finished}

    def _run(self, folder: Path, recipe: Recipe, signals: StopSignals, title: str) -> int:
        """Start the run in ``folder``, or go on with it; returns its exit code."""
        if signals.requested:
            return signals.exit_code
        self._screen.say(f"{title}: {folder}", style="bold")
        # A finished run says so; one that was stopped keeps its engine.
        options = replace(self._options, output=folder, open_page=False)
        try:
            if (folder / RUN_RECORD).is_file():
                code = resume(folder, replace(options, output=None, engine=None, dialect=None), signals)
            else:
                self._check_data()
                code = start_recipe(recipe, options, signals)
        except NothingPruned:
            raise
        except RunFailed as error:
            raise type(error)(f"{error}; {self._to_go_on()}") from None
        except UserError as error:
            *others, last = error.lines()
            raise UserErrors([*others, f"{last}; {self._to_go_on()}"]) from None
        if code:
            self._screen.say(self._to_go_on(), style="yellow")
        return code

    def _to_go_on(self) -> str:
        return f"to go on with the sweep: {resume_command(self.folder)}"

    def _check_data(self) -> None:
        """Refuse a further run on data that the first one did not have: the two could not be compared.

        Raises:
            UserError: the data have been replaced, or cannot be read.
        """
        for first in _begun(self.folder)[:1]:
            check_data_of_sweep(self.record.recipe.data, run_folder.load(first).data)

    def _show(self) -> None:
        """Write the table and the picture, and show them."""
        rows = self._rows()
        best = None
        if self.record.max_loss is not None:
            best = sparsest(rows, self.record.max_loss)
        write_whole(self.folder / TABLE, _as_csv(rows))
        points = [choice for row in rows if (choice := row.choice()) is not None]
        if points:
            write_whole(self._picture, draw(points, "png", cost="GigaMACs left when zeros cost nothing"))
        shown(lambda out: _show_rows(rows, best, out))
        say = self._screen.say
        if self._left_out:
            say(f"left out, as said above: target {', '.join(map(str, self._left_out))}", style="yellow")
        if self.record.max_loss is not None:
            limit = count_of_points(self.record.max_loss)
            if best is None:
                say(f"no network loses at most {limit} of top-1", style="yellow")
            else:
                say(f"the sparsest network that loses at most {limit}: {best.folder}", style="green")
        say(f"table:   {self.folder / TABLE}")
        say(f"picture: {self._picture}")

    @property
    def _picture(self) -> Path:
        return self.folder / PICTURE

    def _rows(self) -> list[SweepRow]:
        folders: dict[str, Path] = {}
        if (self.folder / DENSE / RUN_RECORD).is_file():
            folders[DENSE] = self.folder / DENSE
        folders |= {f"target {target}": folder for target, folder in self._runs().items()}
        dense = _result(folders[DENSE]).top1 if DENSE in folders else None
        return [SweepRow(name, folder, _result(folder), dense) for name, folder in folders.items()]


class Result(NamedTuple):
    """The figures of a run, each of the last of its stages that has it; None: none has."""

    sparsity: float | None = None
    top1: float | None = None
    top5: float | None = None
    gigamacs: float | None = None
    gigamacs_left: float | None = None


FIGURES = Result._fields


@dataclass(frozen=True)
class SweepRow:
    """The result of one run."""

    name: str
    folder: Path
    figures: Result
    dense_top1: float | None

    @property
    def loss(self) -> float | None:
        """Points of top-1 below the dense network."""
        if self.dense_top1 is None or self.figures.top1 is None or self.name == DENSE:
            return None
        return 100 * (self.dense_top1 - self.figures.top1)

    def choice(self) -> Choice | None:
        """The network in the picture; None without an accuracy."""
        figures, top1 = self.figures, self.figures.top1
        if top1 is None:
            return None
        left = figures.gigamacs if figures.gigamacs_left is None else figures.gigamacs_left
        return Choice(
            self.name, [(figures.sparsity or 0.0, top1)], [(left, top1)] if left is not None else []
        )


def possible_targets(recipe: Recipe) -> range:
    """The targets, in hundredths, that the search may try: a pattern or a start factor may forbid others."""

    def is_allowed(hundredths: int) -> bool:
        try:
            return not idle_stages(with_target(recipe, hundredths / FINEST))
        except UserErrors:
            return False

    allowed = list(filter(is_allowed, range(1, HIGHEST)))
    return range(allowed[0], allowed[-1] + 1) if allowed else range(0)


def next_target(
    losses: Mapping[float, float], max_loss: float, possible: range = range(1, HIGHEST)
) -> float | None:
    """The target to try next, by bisection; None where the sparsest that loses at most that is known.

    ``losses`` are those of the targets tried, ``possible`` the targets in hundredths. It assumes that a
    sparser network loses more: of two that disagree with that, the sparser one that is good enough counts.
    """
    best = max((target for target, loss in losses.items() if loss <= max_loss + 1e-9), default=0.0)
    above = min((target for target in losses if target > best), default=1.0)
    # A target between two hundredths leaves both to be tried; 0.29 * 100 is a little less than 29.
    low = max(math.floor(FINEST * best + 1e-9), possible.start - 1)
    high = min(math.ceil(FINEST * above - 1e-9), possible.stop)
    return None if high - low <= 1 else (low + high) // 2 / FINEST


def sparsest(rows: Sequence[SweepRow], max_loss: float) -> SweepRow | None:
    """The sparsest network that loses at most so many points."""
    good = [row for row in rows if row.loss is not None and row.loss <= max_loss + 1e-9]
    return max(good, key=lambda row: row.figures.sparsity or 0.0, default=None)


def count_of_points(number: float) -> str:
    """``1 point``, ``0.5 points``."""
    return count_of(1, "point") if number == 1 else f"{number:g} points"


def _result(folder: Path) -> Result:
    """The result of the run in ``folder``: its test, and what the last stage that counts zeros has left."""
    runs, _ = find_runs([folder])
    stages = [stage.figures for stage in runs[0].stages if not stage.figures.quantized] if runs else []
    found: dict[str, float | None] = {}
    for figures in stages:
        found |= {name: value for name in FIGURES if (value := getattr(figures, name)) is not None}
    return Result(**{name: found.get(name) for name in FIGURES})


def _show_rows(rows: Sequence[SweepRow], best: SweepRow | None, out: TextIO) -> None:
    titles = ("Sparsity", "Top-1", "lost", "Top-5", "GigaMACs", "left without zeros")
    lines = []
    for row in rows:
        figures = row.figures
        cells = [
            *(row.name, percent(figures.sparsity, 1), percent(figures.top1, 2)),
            "-" if row.loss is None else f"{row.loss:+.2f}",
            *(percent(figures.top5, 2), complexity(figures.gigamacs), complexity(figures.gigamacs_left)),
        ]
        lines.append(Line(cells, "green" if row is best else ""))
    columns = [Column("Network", words=True), *(Column(title) for title in titles)]
    show_table(out, "Sweep", columns, lines)


def _as_csv(rows: Sequence[SweepRow]) -> str:
    """The table with plain numbers, fractions and points; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "folder", *FIGURES, "points_lost"])
    for row in rows:
        values = [getattr(row.figures, name) for name in FIGURES]
        lost = None if row.loss is None else round(row.loss, 6)
        writer.writerow([row.name, row.folder, *values, lost])
    return out.getvalue()


def _default_folder(recipe: Recipe) -> Path:
    return run_folder.default_folder(f"{recipe.weights_prefix}_sweep")
