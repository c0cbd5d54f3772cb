"""What a run will do: each stage's files, start weights, devices and commands."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from caffe_jacinto.caffemodel.hdf5 import SUFFIX, binary_form, is_hdf5, without_suffix
from caffe_jacinto.common.files import PACKAGE, expanded, template_folder, write_whole
from caffe_jacinto.engines.contract import DevicePlan, Engine, QuantizeJob, TestJob, TrainJob
from caffe_jacinto.engines.snapshots import Snapshot, StartPoint, start_point
from caffe_jacinto.logs.discover import STAGE_LOG
from caffe_jacinto.netspec.data_fit import DataSize
from caffe_jacinto.networks.stage_files import (
    has_batch_norm,
    names_in_weights,
    stage_files,
    write_stage_files,
)
from caffe_jacinto.prototxt.schema import messages, parse_net, parse_solver
from caffe_jacinto.recipes.model import QuantizeSettings, Recipe, SolverSettings, Stage
from caffe_jacinto.runs.folder import TEST
from caffe_jacinto.runs.lock import LOCK_NAME
from caffe_jacinto.runs.process import ENVIRONMENT

BINARY_WEIGHTS = "binary.caffemodel"
"""Beside a test: its weights, where the stage's own are in HDF5 and a ``caffe`` has to read them."""


@dataclass(frozen=True)
class StagePlan:
    """A stage of a run: its folder, its start weights, its devices."""

    name: str
    stage: Stage
    folder: Path
    prefix: Path
    """Its snapshots are ``<prefix>_iter_N.caffemodel``, in HDF5 with ``.h5`` behind it."""

    start_weights: Path | None
    devices: DevicePlan
    needs_masks: bool = False
    """Its snapshots are usable only with their pruning masks, since the engine holds zeros by them."""

    @property
    def loaded_weights(self) -> Path | None:
        """The file that Caffe loads: the start weights, or a copy of them, binary and without `reinit`."""
        return self.folder / "start.caffemodel" if self.copies_weights else self.start_weights

    @property
    def copies_weights(self) -> bool:
        """Whether the start weights are not loaded as they are: they are HDF5, or have layers of `reinit`."""
        start = self.start_weights
        in_hdf5 = start is not None and (start.suffix == SUFFIX or is_hdf5(start))
        return bool(self.stage.reinit) or in_hdf5

    @property
    def start_weights_exist(self) -> bool:
        return self.start_weights is not None and self.start_weights.is_file()

    @property
    def solver(self) -> SolverSettings:
        assert self.stage.solver is not None
        return self.stage.solver

    @property
    def max_iter(self) -> int:
        return self.solver.max_iter

    @property
    def averaged_before(self) -> int:
        """Its snapshots before this iteration are usable only with their averaged weights; 0: all without."""
        return 0 if self.solver.ema_decay is None else self.max_iter

    @property
    def final_weights(self) -> Path:
        return self.weights(self.max_iter)

    def weights(self, iteration: int) -> Path:
        """The weight file of a snapshot."""
        return self.prefix.with_name(self.solver.weights_name(self.prefix.name, iteration))

    @property
    def in_hdf5(self) -> bool:
        """Whether its snapshots are HDF5 files."""
        return self.solver.snapshot_format == "HDF5"

    @property
    def log(self) -> Path:
        return self.folder / STAGE_LOG


@dataclass(frozen=True)
class QuantizePlan:
    """A stage of a run that quantizes the network of another one, and trains nothing."""

    name: str
    settings: QuantizeSettings
    folder: Path
    source: StagePlan
    """Whose final weights are quantized."""


@dataclass(frozen=True)
class RunPlan:
    """A recipe, the engine that carries it out, and the run folder."""

    recipe: Recipe
    folder: Path
    """As the run's files name it: relative to the start folder, or absolute."""

    engine: Engine
    gpus: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    """Those that train."""

    quantized: tuple[QuantizePlan, ...] = ()
    """Those that quantize, which come after the test."""

    data_sizes: Mapping[str, DataSize] = field(default_factory=dict)
    """What is known of the LMDBs and lists, by their paths."""

    @property
    def val_images(self) -> int | None:
        """The number of validation images; None if unknown."""
        known = self.data_sizes.get(self.recipe.data.val_lmdb)
        return None if known is None else known.images

    @property
    def test_folder(self) -> Path:
        return self.folder / TEST

    @property
    def final_weights(self) -> Path:
        return self.stages[-1].final_weights

    def files(self, plan: StagePlan, *, start_factor: float | None = None) -> dict[str, str]:
        """The stage's prototxt files by name, in the engine's dialect.

        ``start_factor`` is where the fork's sparsity schedule continues after a resume.

        Raises:
            UserError: the recipe's values do not make a valid network or solver.
        """
        return stage_files(
            self.recipe,
            plan.name,
            self.engine.info.dialect,
            folder=str(plan.folder),
            gpus=plan.devices.gpus,
            iter_size=plan.devices.iter_size,
            solver_mode_gpu=bool(plan.devices.gpus),
            val_images=self.val_images,
            data_sizes=self.data_sizes,
            start_factor=start_factor,
            ranks=plan.devices.ranks,
        )

    def start_point(self, plan: StagePlan, last: int | None = None) -> StartPoint:
        """The snapshot that the stage resumes from, of those up to iteration ``last`` (None: all)."""
        most = plan.max_iter if last is None else last
        return start_point(
            plan.prefix,
            self.engine.info.dialect,
            most,
            masks=plan.needs_masks,
            averaged_before=plan.averaged_before,
        )

    def left_out(self, plan: StagePlan) -> frozenset[str]:
        """The layers of the start weights that the stage's `reinit` leaves out."""
        return names_in_weights(self.recipe, plan.stage.reinit, f"stages.{plan.name}.reinit")


def plan_run(recipe: Recipe, folder: Path, engine: Engine, gpus: tuple[int, ...]) -> RunPlan:
    """The plan of a recipe in a run folder.

    Raises:
        UserError: a stage that cannot be carried out.
    """
    stages: dict[str, StagePlan] = {}
    quantized = []
    for name, stage in recipe.stages.items():
        if stage.quantize is not None and stage.solver is None and stage.start is not None:
            quantized.append(QuantizePlan(name, stage.quantize, folder / name, stages[stage.start]))
            continue
        if stage.start is not None:
            start: Path | None = stages[stage.start].final_weights
        else:
            start = None if stage.weights is None else expanded(stage.weights)
        stages[name] = StagePlan(
            name=name,
            stage=stage,
            folder=folder / name,
            prefix=folder / name / recipe.weights_prefix,
            start_weights=start,
            devices=replace(
                engine.plan(stage, gpus, recipe.training.iter_size),
                nodes=recipe.training.nodes,
                cpu_ranks=recipe.training.cpu_ranks,
            ),
            needs_masks=engine.info.own_rule and bool(stage.sparse or stage.freeze_zeros),
        )
    return RunPlan(recipe, folder, engine, gpus, tuple(stages.values()), tuple(quantized))


def train_job(run: RunPlan, plan: StagePlan, snapshot: Path | None = None) -> TrainJob:
    """The engine's job for a stage, from its start or from a ``.solverstate``."""
    # In quantized values, the running statistics are folded into the weights as they are.
    recalibrates = has_batch_norm(run.recipe) and plan.stage.quantize is None
    batches = run.recipe.training.reestimate_batches if recalibrates else 0
    return TrainJob(
        solver=plan.folder / "solver.prototxt",
        weights=plan.loaded_weights,
        snapshot=snapshot,
        gpus=plan.devices.gpus,
        final_weights=plan.final_weights,
        sparse=plan.stage.sparse,
        freeze_zeros=plan.stage.freeze_zeros,
        inner_products=run.recipe.counts_inner_products(plan.name),
        reestimate_batches=batches,
        recalibrate_tests=run.recipe.training.recalibrate_tests,
        nodes=plan.devices.nodes,
        cpu_ranks=plan.devices.cpu_ranks,
        quantize=plan.stage.quantize,
    )


def test_job(run: RunPlan) -> TestJob:
    """The engine's job for the test of the final weights, with the first network that tests the stages."""
    return _test_of(run, run.stages[-1], run.test_folder)


def quantize_job(run: RunPlan, plan: QuantizePlan) -> QuantizeJob:
    """The engine's job for a stage that quantizes."""
    return QuantizeJob(
        trained=plan.source.folder,
        settings=plan.settings,
        train_lmdb=run.recipe.data.train_lmdb,
        val_lmdb=run.recipe.data.val_lmdb,
        folder=plan.folder,
        test=_test_of(run, plan.source, plan.source.folder),
    )


def _test_of(run: RunPlan, plan: StagePlan, folder: Path) -> TestJob:
    """A test of a stage's final weights, with the test network in ``folder``."""
    solver = parse_solver(run.files(plan)["solver.prototxt"], run.engine.info.dialect, "solver")
    state = solver.test_state[0] if solver.test_state else None
    return TestJob(
        model=folder / "val.prototxt",
        weights=folder / BINARY_WEIGHTS if _needs_binary(run, plan) else plan.final_weights,
        iterations=solver.test_iter[0],
        gpus=run.gpus[:1],
        level=state.level if state else 0,
        stages=tuple(state.stage) if state else (),
    )


def write_stage(run: RunPlan, plan: StagePlan, texts: dict[str, str], commands: Sequence[list[str]]) -> None:
    """Write the stage's prototxt files and its run.sh."""
    write_stage_files(texts, plan.folder)
    write_script(run, plan.folder, commands)


def _needs_binary(run: RunPlan, plan: StagePlan) -> bool:
    """Whether the stage's snapshots have to be copied for a ``caffe`` that shall read them.

    The one that install_caffe.sh builds takes an HDF5 file for an empty one, and says nothing.
    """
    return plan.in_hdf5 and run.engine.info.kind != "torch"


def write_binary_snapshot(run: RunPlan, plan: StagePlan, snapshot: Snapshot) -> Path:
    """The solver state that the stage resumes from: a copy in binary form for a ``caffe`` that shall read it.

    Raises:
        UserError: the snapshot is damaged.
        OSError: the copy cannot be written.
    """
    # The stepper reads HDF5 itself, and after the last iteration no Caffe is started.
    if not _needs_binary(run, plan) or plan.needs_masks or snapshot.iteration >= plan.max_iter:
        return snapshot.solverstate
    folder = plan.folder / "binary"
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.caffemodel"), *folder.glob("*.solverstate")):
        old.unlink()
    weights, copy = (
        folder / without_suffix(file).name for file in (snapshot.caffemodel, snapshot.solverstate)
    )
    state = messages(run.engine.info.dialect).SolverState.FromString(binary_form(snapshot.solverstate))
    state.learned_net = str(weights)
    write_whole(weights, _binary(run, plan, snapshot.caffemodel))
    write_whole(copy, state.SerializeToString())
    return copy


def write_tested_weights(run: RunPlan, plan: StagePlan, folder: Path) -> None:
    """Write the copy of the stage's final weights that a test in ``folder`` needs."""
    if _needs_binary(run, plan):
        write_whole(folder / BINARY_WEIGHTS, _binary(run, plan, plan.final_weights))


def _binary(run: RunPlan, plan: StagePlan, weights: Path, left_out: Collection[str] = ()) -> bytes:
    """The HDF5 file ``weights``, of the stage's network, in binary form, without the layers ``left_out``."""
    from caffe_jacinto.caffemodel.fit import in_binary_form

    net = parse_net(run.files(plan)["train.prototxt"], run.engine.info.dialect, "train.prototxt")
    return in_binary_form(weights, net, left_out)


def write_start_weights(run: RunPlan, plan: StagePlan) -> None:
    """Write the copy of the start weights that the stage needs: binary, without the layers of `reinit`.

    Raises:
        UserError: the start weights are missing or broken.
        OSError: the file cannot be written.
    """
    if not plan.copies_weights or (plan.stage.start and not plan.start_weights_exist):
        return  # those of a stage that a dry run does not train
    from caffe_jacinto.caffemodel.net_file import without_layers

    assert plan.start_weights is not None
    assert plan.loaded_weights is not None
    left_out = run.left_out(plan)
    in_hdf5 = is_hdf5(plan.start_weights)
    content = (
        _binary(run, plan, plan.start_weights, left_out)
        if in_hdf5
        else without_layers(plan.start_weights, left_out)
    )
    write_whole(plan.loaded_weights, content)


def write_test(run: RunPlan, texts: dict[str, str], command: list[str]) -> None:
    """Write the files of the test: the last stage's networks, and run.sh."""
    write_stage_files({name: texts[name] for name in ("val.prototxt", "deploy.prototxt")}, run.test_folder)
    write_script(run, run.test_folder, [command])


def write_quantize(run: RunPlan, plan: QuantizePlan, command: list[str]) -> None:
    """Write the files of a stage that quantizes, and its run.sh."""
    write_stage_files(run.engine.quantize_files(plan.settings, run.files(plan.source)), plan.folder)
    write_script(run, plan.folder, [command])


def write_script(run: RunPlan, folder: Path, commands: Sequence[list[str]]) -> None:
    script = shell_script(Path.cwd(), run.folder / LOCK_NAME, folder / STAGE_LOG, commands)
    write_whole(folder / "run.sh", script, executable=True)


def shell_script(start_folder: Path, lock: Path, log: Path, commands: Sequence[Sequence[str]]) -> str:
    """The text of run.sh: the same commands in the same folder, with the same log, under the lock.

    Every word is quoted, so that a path may contain any character.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("shell/run.sh.j2").render(
        start_folder=start_folder,
        lock=lock,
        log=log,
        environment=ENVIRONMENT,
        python_path=PACKAGE.parent,
        commands=[shlex.join(command) for command in commands],
    )
