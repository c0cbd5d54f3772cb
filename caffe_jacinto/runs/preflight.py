"""Checks before anything is written or run. All checks run first; every problem is reported together."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.caffemodel.storage import mapped, stored_layers, stored_state
from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.common.files import expanded, looked_for, read_text
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.listing import LABELS
from caffe_jacinto.engines.contract import ImageShape, data_shapes, stage_solver
from caffe_jacinto.engines.discovery import check_gpus
from caffe_jacinto.engines.snapshots import own_shapes
from caffe_jacinto.logs.discover import RUN_RECORD
from caffe_jacinto.netspec.data_fit import LISTED, READ, DataSize, image_shapes, settings_of, source_of
from caffe_jacinto.netspec.graph import TEST, TRAIN, messages_in
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.networks.distillation import teacher_files
from caffe_jacinto.networks.stage_files import layers_to_name, names_in_weights, user_network
from caffe_jacinto.networks.user_network import in_their_files, mistakes_of
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.prototxt.solver import histories
from caffe_jacinto.quantization.schemes import Scheme, chosen_scheme
from caffe_jacinto.quantization.trained_part import check_tested, trained_part
from caffe_jacinto.recipes.model import QuantizeSettings
from caffe_jacinto.runs.plan import QuantizePlan, RunPlan, StagePlan, quantize_job, train_job
from caffe_jacinto.runs.space import check_space
from caffe_jacinto.runs.sparsity_check import shortfalls

if TYPE_CHECKING:
    from caffe_jacinto.caffemodel.fit import Mismatch
    from caffe_jacinto.networks.prototxt_file import NetFile
    from caffe_jacinto.prototxt.tree import Message

SHOWN = 3
"""Layers that one message names."""


class NothingPruned(UserErrors):
    """A stage of a run would zero not a single weight, and nothing else is wrong."""


@dataclass
class Findings:
    """What the checks found."""

    problems: list[str] = field(default_factory=list)
    """Each of these would make the run fail."""

    idle: list[str] = field(default_factory=list)
    """Those of the problems that are stages which would zero nothing."""

    warnings: list[str] = field(default_factory=list)
    """The run would not fail, but is unlikely to give what the recipe asks for."""

    notes: list[str] = field(default_factory=list)
    """Not wrong, but worth knowing."""

    files_can_be_made: bool = False
    """Whether the files and commands of all stages could be made: a dry run shows them despite problems."""

    data_sizes: dict[str, DataSize] = field(default_factory=dict)
    """What the LMDBs and lists hold that could be read, by their paths."""

    @property
    def image_shapes(self) -> dict[str, ImageShape]:
        """Channels, height and width of the images in each."""
        return image_shapes(self.data_sizes)

    def refuse(self) -> None:
        """Raise every problem that was found, each to be shown on a line of its own.

        Raises:
            NothingPruned, UserErrors: there are problems.
        """
        if self.problems:
            raise (NothingPruned if self.problems == self.idle else UserErrors)(self.problems)

    def attempt(self, check: Callable[[], None]) -> None:
        """Run a check and record its UserError, if any, as a problem."""
        try:
            check()
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def preflight(
    run: RunPlan,
    stages: tuple[StagePlan, ...],
    quantized: tuple[QuantizePlan, ...],
    keep: int,
    *,
    resuming: bool = False,
    here: bool = True,
    must_reach: bool = False,
) -> Findings:
    """Check everything that ``stages`` need: the stages of ``run`` that are still to be trained; and that the
    stages ``quantized`` can be carried out.

    ``resuming``: the run has begun, and its recipe cannot be changed any more. ``here``: this process is to
    train them, on this machine. ``must_reach``: refuse stages that cannot reach their target sparsity.
    """
    findings = Findings()
    findings.attempt(lambda: check_gpus(run.engine.info, run.gpus, here=here))
    findings.attempt(lambda: _check_ranks(run, here))
    findings.attempt(lambda: _check_names(run))
    findings.attempt(lambda: _check_training_data(run, findings))
    findings.attempt(lambda: _check_validation_data(run, findings))
    findings.attempt(lambda: _check_mean_file(run, findings))
    findings.attempt(lambda: _check_labels(run, findings))
    if run.recipe.network.prototxt is not None:
        findings.attempt(lambda: _check_user_network(run, findings))
    run = replace(run, data_sizes=findings.data_sizes)
    texts: dict[str, dict[str, str]] = {}
    data = run.recipe.data
    for plan in stages:
        if run.recipe.network.prototxt is not None and not {data.train_lmdb, data.val_lmdb} <= {
            *run.data_sizes
        }:
            break  # the sizes of the images, which are not known, are part of the stages' files
        findings.attempt(partial(_check_stage, run, plan, findings, texts))
        findings.attempt(partial(_check_solver_type, run, plan))
        if plan.name in texts:
            findings.attempt(partial(_check_teacher, run, plan, stages, texts[plan.name]))
        if plan.name in texts and _starts_from_a_file(run, plan, stages):
            findings.attempt(partial(_check_start, run, plan, texts[plan.name], findings))
    for quantize in quantized if len(texts) == len(stages) else ():
        findings.attempt(partial(_check_quantization, run, quantize, findings))
    findings.attempt(lambda: _check_sparsity(run, stages, texts, findings, must_reach, resuming))
    refused = run.engine.check(texts, findings.image_shapes)
    if run.recipe.network.prototxt is not None:
        refused = in_their_files(refused, user_network(run.recipe), findings.problems)
    findings.problems += refused
    if texts:
        findings.attempt(lambda: check_space(run, stages, keep, resuming=resuming))
    findings.files_can_be_made = len(texts) == len(stages)
    for plan in stages:
        if plan.devices.note:
            findings.notes.append(f"stage {plan.name}: {plan.devices.note}")
    return findings


def _check_solver_type(run: RunPlan, plan: StagePlan) -> None:
    """Refuse to continue snapshots with another type of solver than the one that wrote their history.

    Stock Caffe's solver state does not hold its type. The stage's solver.prototxt does, which is written when
    the stage starts; and the number of blobs of history tells some types apart.
    """
    snapshot, now = run.start_point(plan).snapshot, plan.solver.type
    if snapshot is None:
        return
    path = plan.folder / "solver.prototxt"
    remedy = (
        f"; set the type back in {run.folder / RUN_RECORD}, or move the snapshots in {plan.folder} away to "
        "begin the stage again"
    )
    before = _type_in(path, run.engine.info.dialect)
    if before not in (None, now):
        raise UserError(
            f"stage {plan.name}: {path}, with which its snapshots were written, has solver type {before}, "
            f"and the run's recipe has {now}{remedy}"
        )
    if run.engine.info.dialect is not Dialect.BVLC:
        return  # the layout of the fork's history is not known
    with mapped(snapshot.caffemodel) as view:
        blobs = len(own_shapes(snapshot.caffemodel, stored_layers(view, snapshot.caffemodel)))
    kept = len(stored_state(snapshot.solverstate).history) // blobs
    if kept != histories(now):
        raise UserError(
            f"stage {plan.name}: {snapshot.solverstate} has {count_of(kept, 'blob')} of history for each of "
            f"its weights, and a solver of type {now} needs {histories(now)}{remedy}"
        )


def _check_teacher(
    run: RunPlan, plan: StagePlan, stages: tuple[StagePlan, ...], texts: Mapping[str, str]
) -> None:
    """Check the files of the stage's teacher, but for those that ``stages`` are still to write.

    Raises:
        UserError: a file is missing; or weights for the network of the recipe itself do not fill it.
    """
    teacher = run.recipe.teacher_of(plan.name)
    files = teacher_files(run.recipe, plan.name, str(plan.folder))
    if teacher is None or files is None or any(other.name == teacher.stage for other in stages):
        return
    own = teacher.stage is None and teacher.prototxt is None
    prototxt, weights = files
    for key, path in (("teacher_prototxt", prototxt), ("teacher", weights)):
        if not Path(path).is_file() and not (own and path == prototxt):
            what = key if teacher.stage is None else f"of its teacher, stage {teacher.stage}"
            remedy = "name another" if teacher.stage is None else "put it back"
            if Path(path).is_dir():
                raise UserError(f"stage {plan.name}: {path} ({what}) is a folder; name a file in it")
            raise UserError(
                f"stage {plan.name}: {path} ({what}) does not exist{looked_for(Path(path))}; {remedy}"
            )
    if own:
        from caffe_jacinto.caffemodel.fit import require_fit

        net = parse_net(texts["deploy.prototxt"], run.engine.info.dialect, prototxt)
        try:
            require_fit(Path(weights), net, "the network")
        except UserError as error:
            raise UserError(f"stages.{plan.name}.distill: {error}, or name a teacher") from None


def _type_in(solver: Path, dialect: Dialect) -> str | None:
    """The type in a solver.prototxt; None if there is no such file, or it has been damaged."""
    try:
        return str(parse_solver(read_text(solver), dialect, str(solver)).type)
    except UserError:
        return None


def _starts_from_a_file(run: RunPlan, plan: StagePlan, stages: tuple[StagePlan, ...]) -> bool:
    """Whether the weights that the stage starts from must already exist."""
    if plan.start_weights is None or any(plan.start_weights == other.final_weights for other in stages):
        return False
    return run.start_point(plan).snapshot is None


def _check_ranks(run: RunPlan, here: bool) -> None:
    training = run.recipe.training
    for name, value in (("nodes", training.nodes), ("cpu_ranks", training.cpu_ranks)):
        if value > 1 and run.engine.info.kind != "torch":
            raise UserError(
                f"training.{name} is {value}, and only PyTorch trains so: add --engine torch, or set it to 1"
            )
    if here and training.nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"training.nodes is {training.nodes}: several nodes train as a Slurm job: add --slurm "
            "(docs/slurm.md), or set it to 1"
        )


def _check_names(run: RunPlan) -> None:
    """Caffe's files and run.json hold paths as UTF-8 text."""
    for path in (str(run.folder), str(Path.cwd()), run.recipe.data.train_lmdb, run.recipe.data.val_lmdb):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path!r}: the path is not UTF-8; rename it") from None


def _check_training_data(run: RunPlan, findings: Findings) -> None:
    path, batch = run.recipe.data.train_lmdb, run.recipe.training.batch_size
    net = user_network(run.recipe).train if run.recipe.network.prototxt is not None else None
    _take_data(run, net, path, batch, findings, training=True)


def _check_validation_data(run: RunPlan, findings: Findings) -> None:
    path, batch = run.recipe.data.val_lmdb, run.recipe.training.val_batch_size
    net = user_network(run.recipe).tests[0] if run.recipe.network.prototxt is not None else None
    size = _take_data(run, net, path, batch, findings, training=False)
    rest = size.images % batch
    if rest:
        findings.notes.append(
            f"the {size.images:,} validation images do not divide into batches of {batch}: the last batch "
            f"of a test wraps round and counts the first {batch - rest} twice (training.val_batch_size)"
        )


def _take_data(
    run: RunPlan, net: NetFile | None, path: str, batch: int, findings: Findings, *, training: bool
) -> DataSize:
    """Check what the run trains on or tests with; ``net`` is the user's own network that reads it."""
    from caffe_jacinto.data.lmdb_reader import check_lmdb

    if net is not None:
        size, notes = _size_of(net, net.data, path, batch, training=training)
    else:
        classes, crop = run.recipe.data.num_classes, run.recipe.network.crop_size
        facts = check_lmdb(path, num_classes=classes, min_images=batch, min_size=crop or 1, training=training)
        size, notes = facts.size, facts.notes
    findings.data_sizes[path] = size
    _note_crop(run, path, size, findings)
    findings.notes.extend(notes)
    return size


def _size_of(
    net: NetFile, layer: Message, path: str, batch: int, *, training: bool
) -> tuple[DataSize, tuple[str, ...]]:
    """What a layer of a user's own network reads, to be held against the network; and notes."""
    if layer.string("type") in LISTED:
        from caffe_jacinto.data.list_check import check_list

        return check_list(net.message_of(layer), net.path, path, min_images=batch), ()
    from caffe_jacinto.data.lmdb_reader import check_lmdb

    facts = check_lmdb(path, num_classes=None, min_images=batch, min_size=1, channels=None, training=training)
    return facts.size, facts.notes


def _check_user_network(run: RunPlan, findings: Findings) -> None:
    """Check the network's prototxts, and the data that the recipe does not name."""
    network = user_network(run.recipe)
    replaced = (network.train.source, network.tests[0].source)
    for net in (network.train, *network.tests):
        for layer in net.sources:
            source, batch = source_of(layer), settings_of(layer).integer("batch_size")
            if layer.string("type") not in READ or source in replaced or source in findings.data_sizes:
                continue
            findings.data_sizes[source], _ = _size_of(net, layer, source, batch, training=False)
    findings.problems += mistakes_of(network, run.recipe, findings.data_sizes)


def _check_mean_file(run: RunPlan, findings: Findings) -> None:
    from caffe_jacinto.data.mean import read_mean

    path = run.recipe.data.mean_file
    if path is None:
        return
    making = f"python -m caffe_jacinto.create_lmdb --mean {shlex.join([run.recipe.data.train_lmdb, path])}"
    if not Path(path).is_file():
        raise UserError(f"mean file {path} (data.mean_file) does not exist; make it: {making}")
    mean = read_mean(Path(path)).shape
    for lmdb, images in findings.image_shapes.items():
        if images != mean:
            raise UserError(
                f"mean file {path} (data.mean_file) is {' x '.join(map(str, mean))}, the images in {lmdb} "
                f"are {' x '.join(map(str, images))} (channels x height x width); make it again: "
                f"{making} --force"
            )


def _check_labels(run: RunPlan, findings: Findings) -> None:
    """Note class names, of the recipe or beside the training LMDB, that are not one for each class."""
    given = run.recipe.data.labels
    path = expanded(given) if given else Path(run.recipe.data.train_lmdb) / LABELS
    if given is None and not path.is_file():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"class names {path} {'(data.labels) ' if given else ''}cannot be read: {error}"
        if given:
            raise UserError(problem) from None
        findings.notes.append(problem)
        return
    if len(lines) != run.recipe.data.num_classes:
        findings.notes.append(
            f"{path} names {len(lines)} classes, and data.num_classes is {run.recipe.data.num_classes}"
        )


def _note_crop(run: RunPlan, path: str, size: DataSize, findings: Findings) -> None:
    """Note a crop that shows only a small part of the images."""
    crop = run.recipe.network.crop_size
    if crop is None or len(size.shape) != 3:
        return
    height, width = size.shape[1:]
    if min(height, width) > 2 * crop:
        findings.notes.append(
            f"the network sees {crop}x{crop} pixels (network.crop_size) of the {width}x{height} "
            f"of an image in {path}, {crop * crop / (height * width):.1%} of it: make the LMDB with "
            f"smaller images (create_lmdb --size {round(crop * 256 / 224)}), or enlarge the crop"
        )


def _check_stage(run: RunPlan, plan: StagePlan, findings: Findings, texts: dict[str, dict[str, str]]) -> None:
    """Check that the engine can do the job and that the stage's files can be made."""
    if plan.stage.quantize is not None:
        _check_engine_quantizes(run, plan)
    run.engine.train_commands(train_job(run, plan))
    texts[plan.name] = run.files(plan)
    if plan.stage.quantize is not None:
        scheme = chosen_scheme(plan.stage.quantize.model_dump())
        key = f"stages.{plan.name}.quantize"
        _check_quantizable(run, plan, key, plan.stage.quantize, scheme, tested=False)
        _check_trained_part(run, plan, texts[plan.name])


def _check_trained_part(run: RunPlan, plan: StagePlan, files: Mapping[str, str]) -> None:
    """Check that a stage's networks have the layers that quantization-aware training rounds."""
    solver = stage_solver(files, run.engine.info.dialect)
    try:
        part = trained_part(messages_in(solver.train_net, TRAIN), str(solver.train_file))
        names = {layer.name for layer in part if role_of(layer.type) != "data"}
        for test in solver.tests:
            there = {layer.name for layer in messages_in(test.definition, TEST)}
            check_tested(names, there, str(solver.train_file), str(test.file))
    except UserError as error:
        raise UserError(f"stages.{plan.name}.quantize: {error}") from None


def _check_engine_quantizes(run: RunPlan, plan: StagePlan) -> None:
    info = run.engine.info
    if info.kind != "torch":
        raise UserError(
            f"stages.{plan.name}.quantize: only PyTorch trains in quantized values: add --engine torch, or "
            "remove the table, and quantize the trained network: python -m caffe_jacinto.quantize"
        )
    if info.dialect is not Dialect.BVLC:
        raise UserError(
            f"stages.{plan.name}.quantize: quantized values are trained in the dialect {Dialect.BVLC.value} "
            f"only: add --dialect {Dialect.BVLC.value}"
        )


def _check_quantization(run: RunPlan, plan: QuantizePlan, findings: Findings) -> None:
    """Check that the engine can quantize the network by the stage's settings.

    Raises:
        UserError: it cannot, a layer cannot be quantized, or one that the settings name is not there.
    """
    key, settings = f"stages.{plan.name}.quantize", plan.settings
    try:
        scheme = run.engine.quantization(settings)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    try:
        run.engine.quantize_command(quantize_job(run, plan))
    except UserError as error:
        raise UserError(f"{key}: {error}: --set stages.{plan.name}=") from None
    if scheme.name != settings.scheme:
        findings.notes.append(
            f"stage {plan.name}: caffe-jacinto tests in its own arithmetic, the scheme {scheme.name}, not by "
            f"{settings.scheme}; for that, quantize the finished run by python -m caffe_jacinto.quantize"
        )
    _check_quantizable(run, plan.source, key, settings, scheme, tested=True)


def _check_quantizable(
    run: RunPlan, plan: StagePlan, key: str, settings: QuantizeSettings, scheme: Scheme, *, tested: bool
) -> None:
    """Check that the scheme knows the layers of a stage's network, and that those in ``settings`` are there.

    ``tested``: and that its accuracy can be tested.

    ``key`` is where the recipe has these.
    """
    from caffe_jacinto.inference.quantize import check_quantizable

    try:
        check_quantizable(run.files(plan), plan.folder, settings, scheme, tested=tested)
    except UserError as error:
        said = str(error)
        for option in ("bits_of", "keep_float"):
            said = said.replace(f"--{option.replace('_', '-')} ", f"{key}.{option}: ")
        raise UserError(said if key in said else f"{key}: {said}") from None


def _check_start(run: RunPlan, plan: StagePlan, texts: dict[str, str], findings: Findings) -> None:
    """Check that the start weights fit the stage's network; note each layer that does not take them.

    Raises:
        UserError: the file is missing or broken, a layer has another shape there and is not in the stage's
            `reinit`, a frozen layer is not there, or the file has nothing for the network.
    """
    from caffe_jacinto.caffemodel.fit import check_fit, unused_layers

    assert plan.start_weights is not None
    if plan.start_weights.is_dir():
        raise UserError(
            f"stage {plan.name}: the start weights {plan.start_weights} are a folder; name a file in it"
        )
    if not plan.start_weights.is_file():
        raise UserError(
            f"stage {plan.name}: the start weights {plan.start_weights} do not exist; train them first "
            "or name others"
        )
    net = parse_net(texts["train.prototxt"], run.engine.info.dialect, "train.prototxt")
    shapes = data_shapes(net, findings.image_shapes, TRAIN)
    mismatches = {mismatch.layer: mismatch for mismatch in check_fit(plan.start_weights, net, shapes)}
    left_out = run.left_out(plan)
    wrong = [found for found in mismatches.values() if found.fatal and found.layer not in left_out]
    if wrong:
        raise UserError(
            f"stage {plan.name}: the start weights {plan.start_weights} do not fit the network: "
            f"{_what_differs(run, plan, wrong)}"
        )
    frozen = names_in_weights(run.recipe, run.recipe.network.frozen, "network.frozen")
    lost = [name for name in mismatches if name in frozen]
    if lost:
        raise UserError(
            f"stage {plan.name}: network.frozen keeps layers as they are in {plan.start_weights}, which "
            f"lacks {_listed(lost)}; take them out of network.frozen, or name other weights"
        )
    notes = [
        f"{layer.name}: starts at random values: {_why(layer.name, mismatches, left_out)}"
        for layer in net.layer
        if layer.name in mismatches or layer.name in left_out
    ]
    notes += [
        f"{name}: in the start weights, but not in the network; not used"
        for name in unused_layers(plan.start_weights, net)
    ]
    findings.notes += [f"stage {plan.name}: layer {note}" for note in notes]


def _check_sparsity(
    run: RunPlan,
    stages: tuple[StagePlan, ...],
    texts: dict[str, dict[str, str]],
    findings: Findings,
    must_reach: bool,
    resuming: bool,
) -> None:
    """Refuse a sparse stage that would zero nothing; warn of one that ends below its target, or refuse it."""
    for shortfall in shortfalls(run, stages, texts, findings.image_shapes):
        refused = (shortfall.useless or must_reach) and not resuming
        (findings.problems if refused else findings.warnings).append(shortfall.message)
        if refused and shortfall.useless:
            findings.idle.append(shortfall.message)


def _why(layer: str, mismatches: dict[str, Mismatch], left_out: Collection[str]) -> str:
    if layer not in mismatches:
        return "reinit names it"
    return mismatches[layer].reason + (" (reinit)" if layer in left_out else "")


def _what_differs(run: RunPlan, plan: StagePlan, wrong: Sequence[Mismatch]) -> str:
    """The layers that do not fit, and what to do about it."""
    converted = next((found for found in wrong if found.cause == "other Caffe"), None)
    if converted is not None:
        return str(converted)  # this applies to every batch norm, so leaving layers out would not help
    names = layers_to_name(run.recipe, [found.layer for found in wrong if found.cause == "shape"])
    if not names:
        return _listed(wrong)
    shown = ", ".join(f'"{name}"' for name in (*plan.stage.reinit, *names))
    network = run.recipe.network.prototxt
    intended = f"{network} and its data are" if network else "num_classes, crop_size and strides are"
    return (
        f"{_listed(wrong)}; if {intended} what you intend, train these layers from scratch with "
        f"stages.{plan.name}.reinit=[{shown}]"
    )


def _listed(items: Sequence[object]) -> str:
    more = f"; and {len(items) - SHOWN} more" if items[SHOWN:] else ""
    return "; ".join(map(str, items[:SHOWN])) + more
