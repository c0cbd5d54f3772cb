"""The contract of the engines: what a stage needs of each kind of Caffe, and of PyTorch.

An engine turns a job into commands (argument lists, never shell text). The driver runs them one after the
other and then asks `Engine.finished`: Caffe exits with 0 when it is interrupted, too, so that an exit code
alone does not show that a stage is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_origin

from caffe_jacinto.caffemodel.hdf5 import unwritable_layer
from caffe_jacinto.common.arguments import fraction, layer_bits, whole_number
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.gpus import Maker
from caffe_jacinto.netspec import shapes
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.netspec.shapes import ImageShape as ImageShape
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.loadable import not_carried_out, not_loadable
from caffe_jacinto.prototxt.schema import parse_solver
from caffe_jacinto.prototxt.solver import SolverFile, read_solver
from caffe_jacinto.prototxt.tree import tree_of
from caffe_jacinto.quantization.schemes import Scheme
from caffe_jacinto.recipes.explain import quantize_settings
from caffe_jacinto.recipes.model import (
    QuantizeSettings,
    SparseSettings,
    Stage,
    sparse_fields,
    sparse_settings,
)

EngineKind = Literal["bvlc", "caffe-jacinto", "torch"]

Precision = Literal["fp32", "tf32", "bf16", "auto"]
"""What convolutions and inner products compute in; weights, statistics and losses are fp32 in all."""

StageFiles = Mapping[str, str]
"""The texts of a stage's prototxts by file name, as `networks.stage_files` makes them."""


@dataclass(frozen=True)
class EngineInfo:
    """What is known about an engine."""

    kind: EngineKind
    executable: Path
    """The ``caffe`` program; for PyTorch, the Python that runs it."""

    version: str | None
    """What the executable reports, e.g. ``1.0.0``; None if it reports none."""

    dialect: Dialect
    gpu: bool
    """False: built for the CPU only."""

    multi_gpu: bool
    """Can train on several GPUs at once (stock Caffe: built with NCCL)."""

    begins_data_again: bool
    """Reads its training LMDB from the beginning after a resume."""

    own_rule: bool
    """Pruning, counting and recalibration are this project's code, not the fork's."""

    pycaffe: Path | None
    """The folder to put on ``sys.path`` for ``import caffe``; None if this Python cannot import one."""

    notes: tuple[str, ...]
    """What the user should know about it, one line each."""

    precision: Precision = "fp32"
    """bf16: only on PyTorch."""

    maker: Maker = "NVIDIA"
    """Whose GPUs it can use, if any."""

    cuda: tuple[int, int] | None = None
    """The CUDA version that PyTorch brings with it."""

    reason: str = ""
    """Why this engine was chosen."""


@dataclass(frozen=True)
class DevicePlan:
    """The devices that a stage will use, and the passes per update on them."""

    gpus: tuple[int, ...]
    """Empty: the CPU."""

    iter_size: int
    note: str | None
    """Why this is not what was requested; None if it is."""

    nodes: int = 1
    """Machines that train together, each on its own ``gpus`` or with ``cpu_ranks``."""

    cpu_ranks: int = 1
    """Processes that train on the CPU of each machine."""

    @property
    def ranks(self) -> int:
        """Processes that train together, on all machines."""
        return self.nodes * (len(self.gpus) or self.cpu_ranks)


@dataclass(frozen=True)
class TrainJob:
    """One stage to train. Paths may be relative to the folder that the commands run in."""

    solver: Path
    weights: Path | None
    """Start from these weights; random ones if this and ``snapshot`` are None."""

    snapshot: Path | None
    """Resume from this ``.solverstate``; ``weights`` are then ignored."""

    gpus: tuple[int, ...]
    final_weights: Path
    """The ``<prefix>_iter_<max_iter>.caffemodel`` that the stage ends with."""

    sparse: SparseSettings | None
    freeze_zeros: bool
    """Keep at zero the convolution weights that are zero in ``weights``."""

    reestimate_batches: int
    """Training batches to recalibrate batch-norm statistics over; 0: do not (the fork never does)."""

    recalibrate_tests: bool = False
    """Recalibrate a copy of the statistics before each scheduled test, too."""

    nodes: int = 1
    cpu_ranks: int = 1
    """As in `DevicePlan`; above 1 on PyTorch only."""

    inner_products: bool = False
    """With ``freeze_zeros``: hold the zeros of inner products and count them, too."""

    quantize: QuantizeSettings | None = None
    """Train in quantized values, on PyTorch."""


@dataclass(frozen=True)
class TestJob:
    """Weights to evaluate with a network's own accuracy layers."""

    __test__ = False  # not a test, whatever pytest makes of its name

    model: Path
    weights: Path
    iterations: int
    gpus: tuple[int, ...]
    level: int = 0
    stages: tuple[str, ...] = ()
    """The state in which the network is tested, beside its phase."""


@dataclass(frozen=True)
class QuantizeJob:
    """A trained network to quantize and to test in quantized values."""

    trained: Path
    """The folder of the stage that trained it."""

    settings: QuantizeSettings
    train_lmdb: str
    """For the calibration."""

    val_lmdb: str
    folder: Path
    """Of the result."""

    test: TestJob
    """Its test in float."""


class Engine(Protocol):
    """Trains and tests the stages of a run."""

    @property
    def info(self) -> EngineInfo: ...

    def plan(self, stage: Stage, gpus: tuple[int, ...], iter_size: int) -> DevicePlan:
        """Where ``stage`` runs if the recipe requests ``gpus`` and ``iter_size`` passes for each update."""
        ...

    def check(self, stages: Mapping[str, StageFiles], image_shapes: Mapping[str, ImageShape]) -> list[str]:
        """What this engine would refuse in ``stages`` when they begin: one line for each problem, in order.

        ``stages`` has the prototxts of each stage by its name; none of them need exist as files.
        ``image_shapes`` has the channels, height and width of the images in each LMDB that could be read, by
        the path that the prototxts give.
        """
        ...

    def train_commands(self, job: TrainJob) -> list[list[str]]:
        """The commands that train the stage, in order; the next runs only after the one before exits with 0.

        Raises:
            UserError: this engine cannot do the job (for one, a sparse stage without pycaffe).
        """
        ...

    def finished(self, job: TrainJob) -> bool:
        """Whether the final weights exist, are complete and, if the job asks for it, recalibrated."""
        ...

    def test_command(self, job: TestJob) -> list[str]: ...

    def quantization(self, settings: QuantizeSettings) -> Scheme:
        """The scheme by which `quantize_command` computes; another one than requested where it has but one.

        Raises:
            UserError: settings that it cannot carry out; the message begins with the key.
        """
        ...

    def quantize_files(self, settings: QuantizeSettings, files: StageFiles) -> dict[str, str]:
        """What `quantize_command` reads in the folder of the result, by name; ``files``: of the stage."""
        ...

    def quantize_command(self, job: QuantizeJob) -> list[str]:
        """The command that quantizes and tests; it prints a log of Caffe's.

        Raises:
            UserError: this engine cannot do the job.
        """
        ...

    def resume_start_factor(self, sparse: SparseSettings, iteration: int, log: str) -> float | None:
        """``sparsity_start_factor`` for a solver file that resumes from the snapshot of ``iteration``.

        ``log`` is what the stage has printed so far. None: the snapshot itself holds the schedule's factor.
        """
        ...


def stage_solver(files: StageFiles, dialect: Dialect) -> SolverFile:
    """The solver of a stage and its networks, from texts that need not be written yet.

    Raises:
        UserError: they do not parse.
    """
    fields = parse_solver(files["solver.prototxt"], dialect, "solver.prototxt")
    folder = Path(fields.train_net or fields.net).parent
    texts = {str(folder / name): text for name, text in files.items()}
    return read_solver(folder / "solver.prototxt", dialect, texts)


def unwritable(solver: SolverFile, *, splits: bool = True) -> list[str]:
    """What keeps Caffe from writing and reading the snapshots of ``solver`` in HDF5, if these are asked for.

    One line, or none. Caffe makes a group of the name of each layer; with ``splits``, of those of the Split
    layers that it inserts, too, which are named after a blob.
    """
    if not solver.in_hdf5:
        return []
    layers = messages_in(solver.train_net)
    why = unwritable_layer([layer.name for layer in layers])
    if why is None and splits:
        blob = next((name for layer in layers for name in layer.top if "/" in name), None)
        why = blob and f"what Caffe makes of the blob {blob!r}; rename it"
    return (
        [f"{solver.path}: snapshot_format: HDF5 cannot hold {why}, or remove snapshot_format"] if why else []
    )


def not_of_this_caffe(solver: SolverFile) -> list[str]:
    """What a Caffe of the solver's dialect does not know of it and its networks, a line for each kind."""
    nets = [(solver.train_file, solver.train_net)]
    nets += [(test.file, test.definition) for test in solver.tests]
    found: dict[str, Path] = {}
    for file, net in nets:
        for line in not_loadable(tree_of(net), solver.dialect):
            found.setdefault(line, file)
    found |= dict.fromkeys(not_carried_out(solver.parameters, solver.dialect), solver.path)
    return [
        f"{file}: {line}{', or' if '; ' in line else ';'} train on PyTorch, which can: --engine torch"
        for line, file in found.items()
    ]


def image_shape(layer: Any, image_shapes: Mapping[str, ImageShape]) -> ImageShape | None:
    """The shape of the images that a Data layer gives; None without a crop or a known LMDB."""
    return shapes.image_shape(tree_of(layer), image_shapes)


def data_shapes(
    net: Any, image_shapes: Mapping[str, ImageShape], phase: str | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes that layers of ``net`` which read data give, by their names, where they are known.

    They are those of ``phase``, or of the network's own state; of Data layers for a batch of 1.
    """
    layers = messages_in(net, phase)
    known = {layer.name: image_shape(layer, image_shapes) for layer in layers if layer.type == "Data"}
    found: dict[str, tuple[int, ...]] = {name: (1, *shape) for name, shape in known.items() if shape}
    if any(layer.type in ("HDF5Data", "ImageData") for layer in layers):
        from caffe_jacinto.data.sources import listed_shapes

        found |= listed_shapes(net, phase, net.name)
    return found


def caffe_train(executable: Path, job: TrainJob) -> list[str]:
    """``caffe train`` for ``job``.

    Raises:
        UserError: the path of the weights has a comma, which separates paths for Caffe.
    """
    command = [str(executable), "train", "-solver", str(job.solver)]
    if job.snapshot is not None:
        command += ["-snapshot", str(job.snapshot)]
    elif job.weights is not None:
        if "," in str(job.weights):
            raise UserError(
                f"{job.weights}: Caffe splits the paths of weights at commas; rename the file or its folder"
            )
        command += ["-weights", str(job.weights)]
    return command + gpu_arguments(job.gpus)


def caffe_test(executable: Path, job: TestJob) -> list[str]:
    """``caffe test`` for ``job``; it runs on one device, the first."""
    command = [str(executable), "test", "-model", str(job.model), "-weights", str(job.weights)]
    return [*command, *test_arguments(job)]


def test_arguments(job: TestJob) -> list[str]:
    """The flags of ``caffe test`` beside the model and the weights."""
    level = ["-level", str(job.level)] if job.level else []
    stages = ["-stage", ",".join(job.stages)] if job.stages else []
    return ["-iterations", str(job.iterations), *level, *stages, *gpu_arguments(job.gpus[:1])]


def gpu_arguments(gpus: tuple[int, ...]) -> list[str]:
    """``-gpu 0,1``, or nothing for the CPU."""
    return ["-gpu", ",".join(map(str, gpus))] if gpus else []


def pruning_arguments(job: TrainJob) -> list[str]:
    """The flags for what stock Caffe's solver file has no fields for; `pruning_settings` reads them."""
    if job.sparse is None:
        held = ["-freeze_zeros", *(["-sparsity_inner_products"] if job.inner_products else [])]
        return held if job.freeze_zeros else []
    return settings_as_flags(job.sparse)


def settings_as_flags(sparse: SparseSettings) -> list[str]:
    """A pruning rule as the flags of our own programs."""
    flags = []
    for name, value in sparse.by_name().items():
        if value is True:
            flags.append(f"-{name}")
        elif isinstance(value, dict):
            flags += [f"-{name}={layer}={target}" for layer, target in value.items()]
        elif isinstance(value, tuple):
            flags += [f"-{name}={layer}" for layer in value]
        else:
            flags += [f"-{name}", str(value)]
    return flags


def recalibration_arguments(job: TrainJob) -> list[str]:
    """The flags for batch-norm statistics."""
    arguments = ["-reestimate_batches", str(job.reestimate_batches)]
    return (
        [*arguments, "-recalibrate_tests"] if job.recalibrate_tests and job.reestimate_batches else arguments
    )


def quantize_arguments(job: QuantizeJob) -> list[str]:
    """The arguments of `caffe_jacinto.quantize`, for Python."""
    arguments = ["-m", "caffe_jacinto.quantize", str(job.trained)]
    arguments += ["--calibrate", job.train_lmdb, "--val", job.val_lmdb, "--output", str(job.folder)]
    fields = type(job.settings).model_fields
    for key, value in job.settings:
        option = f"--{key.replace('_', '-')}"
        if value == fields[key].default:
            continue
        if value is True:
            arguments.append(option)
        elif isinstance(value, dict):
            arguments += [f"{option}={layer}={bits}" for layer, bits in value.items()]
        elif isinstance(value, tuple):
            arguments += [f"{option}={layer}" for layer in value]
        else:
            arguments += [option, str(value)]
    return [*arguments, "--log"]


def add_stage_arguments(parser: argparse.ArgumentParser, *, batches: int) -> None:
    """The flags that our own programs have beyond Caffe's; ``batches`` is the default of one."""
    parser.add_argument(
        *("-reestimate_batches", "--reestimate_batches"),
        type=whole_number(0),
        default=batches,
        metavar="N",
        help="training batches to recalibrate batch-norm statistics over at the end (default: %(default)s)",
    )
    parser.add_argument(
        *("-recalibrate_tests", "--recalibrate_tests"),
        action="store_true",
        default=False,
        help="also before each scheduled test; training continues with its own statistics",
    )
    parser.add_argument(
        *("-freeze_zeros", "--freeze_zeros"),
        action="store_true",
        default=False,
        help="hold at zero the convolution weights that start as zeros",
    )
    for key, field in sparse_fields().items():
        annotation = SparseSettings.model_fields[key].annotation
        names = (f"-{field.name}", f"--{field.name}")
        if annotation is bool:
            parser.add_argument(*names, action="store_true", default=False, help=field.help)
        elif get_origin(annotation) is dict:
            parser.add_argument(
                *names, action="append", type=_layer_target, metavar="NAME=0.5", help=field.help
            )
        elif get_origin(annotation) is tuple:
            parser.add_argument(
                *names, action="append", metavar="NAME", help=f"{field.help}; may be given again"
            )
        else:
            kind: type = int if annotation is int else float if annotation is float else str
            parser.add_argument(*names, type=kind, metavar="NAME" if kind is str else "N", help=field.help)


def _layer_target(text: str) -> tuple[str, float]:
    """An argument type: a layer's name and its target, ``NAME=0.5``."""
    name, equals, value = text.rpartition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not NAME=FRACTION, like conv1=0.5")
    return name, fraction(value)


def pruning_settings(arguments: argparse.Namespace) -> SparseSettings | None:
    """The pruning settings that these flags give; None if they do not ask for pruning.

    Raises:
        UserError: a value out of its range, or settings without a target.
    """
    names = [field.name for field in sparse_fields().values()]
    values = {name: getattr(arguments, name, None) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if "sparsity_targets" in given:
        given["sparsity_targets"] = dict(given["sparsity_targets"])
    if "sparsity_target" not in given:
        fits = {"display_sparsity"} | (
            {"sparsity_inner_products"} if getattr(arguments, "freeze_zeros", False) else set()
        )
        alone = [name for name in given if name not in fits]
        if alone:
            raise UserError(f"-{alone[0]} is a pruning setting and needs -sparsity_target: add it")
        return None
    return sparse_settings(given, "-")


_QUANTIZATION: dict[str, tuple[Any, str]] = {
    "scheme": (str, "the scheme (default: processor)"),
    "bits": (int, "bits of weights and activations (default: the scheme's)"),
    "weight_bits": (int, "bits of weights alone"),
    "activation_bits": (int, "bits of activations alone"),
    "bias_bits": (int, "bits of biases"),
    "bits_of": (None, "bits of one layer's weights and output; may be given again"),
    "keep_float": (None, "do not quantize this layer; may be given again"),
    "ranges": (str, "how ranges of activations are chosen (default: the scheme's way)"),
    "weight_ranges": (str, "the same for weights, which are covered anew in each pass (default: minmax)"),
    "percentile": (float, "of the values in a range"),
    "batches": (int, "training batches for the first ranges (default: 50)"),
    "settle_iter": (int, "the iteration from which on ranges stay (default: a quarter of all)"),
    "freeze_bn_iter": (int, "the iteration from which on batch-norm statistics stay (default: half of all)"),
}
"""The settings of quantization-aware training by their keys in a recipe: type and help of their flags."""


def quantization_arguments(job: TrainJob) -> list[str]:
    """The flags of quantization-aware training; `quantization_settings` reads them."""
    if job.quantize is None:
        return []
    flags = ["-quantize"]
    for key in _QUANTIZATION:
        value, default = getattr(job.quantize, key), QuantizeSettings.model_fields[key].default
        if value == default:
            continue
        if isinstance(value, Mapping):
            flags += [f"-quantize_{key}={layer}={bits}" for layer, bits in value.items()]
        elif isinstance(value, tuple):
            flags += [f"-quantize_{key}={layer}" for layer in value]
        else:
            flags += [f"-quantize_{key}", str(value)]
    return flags


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of quantization-aware training."""
    parser.add_argument(
        *("-quantize", "--quantize"),
        dest="train_quantized",
        action="store_true",
        default=False,
        help="train in quantized values, from trained weights (docs/quantization.md)",
    )
    for key, (kind, text) in _QUANTIZATION.items():
        names = (f"-quantize_{key}", f"--quantize_{key}")
        if kind is None:
            of_layer = layer_bits if key == "bits_of" else str
            shown = "NAME=16" if key == "bits_of" else "NAME"
            parser.add_argument(*names, action="append", type=of_layer, metavar=shown, help=text)
        else:
            parser.add_argument(*names, type=kind, metavar="NAME" if kind is str else "N", help=text)


def quantization_settings(arguments: argparse.Namespace) -> QuantizeSettings | None:
    """The settings that these flags give; None if they do not ask for quantization-aware training.

    Raises:
        UserError: a value out of its range, or one without ``-quantize``.
    """
    values = {key: getattr(arguments, f"quantize_{key}", None) for key in _QUANTIZATION}
    given = {key: value for key, value in values.items() if value is not None}
    if not getattr(arguments, "train_quantized", False):
        if given:
            raise UserError(f"-quantize_{next(iter(given))} needs -quantize: add it")
        return None
    if "bits_of" in given:
        given["bits_of"] = dict(given["bits_of"])
    if "keep_float" in given:
        given["keep_float"] = tuple(given["keep_float"])
    return quantize_settings(given, "-quantize_")
