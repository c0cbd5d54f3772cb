"""`train --from`: a recipe from a user's solver and the network that it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from google.protobuf import text_format

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.common.files import expanded, read_text, write_whole
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.networks.user_network import UserNetwork, read_user_network
from caffe_jacinto.prototxt.render import number
from caffe_jacinto.prototxt.schema import parse_any_net, parse_any_solver
from caffe_jacinto.prototxt.solver import learning_rate
from caffe_jacinto.prototxt.tree import Message, parse
from caffe_jacinto.recipes.derive import TheirSolver, derived_recipe, derived_stages
from caffe_jacinto.recipes.explain import solver_mistakes
from caffe_jacinto.recipes.model import NetworkSettings
from caffe_jacinto.recipes.rules import FIELDS_OF_TYPES, POLICY_SETTINGS
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.new_recipe import data_set_name

_TAKEN = (
    *("max_iter", "base_lr", "lr_policy", "power", "gamma", "stepsize", "momentum", "momentum2", "rms_decay"),
    *("delta", "weight_decay", "test_interval", "test_initialization", "snapshot", "display", "type"),
    *("clip_gradients", "average_loss", "warmup_iter", "ema_decay"),
)
"""Fields of a solver that are keys of a stage's."""

_UNSET_BY_ZERO = (
    *("clip_gradients", "gamma", "stepsize", "momentum2", "rms_decay", "delta", "display", "test_interval"),
    *("snapshot", "ema_decay"),
)
"""Fields in which Caffe takes 0, or less, as nothing; a recipe leaves them out."""

_OF_OTHER_PARTS = (
    *("net", "train_net", "test_net", "net_param", "train_net_param", "test_net_param", "train_state"),
    *("test_state", "test_iter", "iter_size", "random_seed", "stepvalue", "regularization_type"),
    "image_size",
    "snapshot_format",
)
_OF_THE_RUN = ("solver_mode", "device_id", "snapshot_prefix", "snapshot_after_train")
"""What a run decides itself: its devices, and its snapshots and their names."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    solver: Path
    weights: str | None
    target: float
    train_lmdb: str | None = None
    val_lmdb: str | None = None


@dataclass
class _Found:
    """The networks of a solver, as the recipe's `[network]` has them."""

    keys: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    texts: dict[Path, str] = field(default_factory=dict)
    """Networks inside the solver, which become files."""


def write_recipe(request: Request, output: Path | None) -> tuple[Path, Path, list[str]]:
    """Write the recipe; returns its path, the run folder, and lines to show.

    It is called as the run folder, with `.toml` at the end.

    Raises:
        UserError: the solver or its networks cannot be read, or another recipe is there already.
    """
    if output is not None and not output.name:
        raise UserError(f"--output {output}: name a new folder; the recipe is written beside it")
    if request.weights is not None and not expanded(request.weights).exists():
        raise UserError(f"--weights {request.weights} does not exist: correct the path")
    where = str(request.solver)
    solver = parse_any_solver(read_text(request.solver, "give a solver.prototxt"), where)
    their_name = request.solver.stem
    folder = output or Path("training") / their_name
    theirs = _their_solver(solver, request.solver)
    found = _networks(solver, request.solver, folder)
    for path, text in found.texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise UserError(
                f"{path} exists, and is not the network in {where}: remove it, or give another --output"
            )
        _write(path, text)
    network = read_user_network(NetworkSettings.model_validate({**found.keys, "name": their_name}))
    train_lmdb = request.train_lmdb or network.train.source
    data: dict[str, Any] = {"dataset": data_set_name(train_lmdb, request.solver)}
    for key, lmdb in (("train_lmdb", request.train_lmdb), ("val_lmdb", request.val_lmdb)):
        if lmdb is not None:
            data[key] = lmdb
    if request.val_lmdb is None and solver.test_iter:
        found.keys["test_iter"] = list(solver.test_iter)
    folder = output or run_folder.default_folder(f"{data['dataset']}_{network.name}")
    path = folder.with_name(f"{folder.name}.toml")
    training = {
        key: int(getattr(solver, key))
        for key in ("iter_size", "random_seed")
        if solver.HasField(key) and getattr(solver, key) >= 0
    }
    stages = derived_stages(theirs, _fan_in(network), request.target, request.weights)
    text = _with_checksum(
        derived_recipe(
            path, request.solver, data, {"name": network.name, "table": found.keys}, training, stages
        )
    )
    there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else text
    if there != text and _is_as_written(there) and not run_folder.is_free(folder):
        raise UserError(
            f"{path} is the recipe of the run in {folder}, with other settings: resume that run "
            f"({run_folder.resume_command(folder)}), or give another --output"
        )
    if there != text and not _is_as_written(there):
        raise UserError(
            f"{path} exists and is not what --from writes: train it ({_command(path, folder)}), or give "
            "another --output"
        )
    _write(path, text)
    lengths = ", ".join(f"{stage['name']} {stage['solver']['max_iter']:,}" for stage in stages)
    return (
        path,
        folder,
        [
            *dict.fromkeys(found.notes),
            f"recipe: {path}, iterations: {lengths}",
            *_not_taken(solver),
            f"  to change it, edit it and run: {_command(path, None)}",
        ],
    )


_CHECKSUM = "\n# By this checksum of the lines above, train --from sees that they were not edited: "


def _with_checksum(text: str) -> str:
    return f"{text}{_CHECKSUM}{sha256(text.encode()).hexdigest()[:16]}\n"


def _is_as_written(recipe: str) -> bool:
    """Whether it is as `write_recipe` once wrote it; then another one may take its place."""
    return recipe == _with_checksum(recipe.rpartition(_CHECKSUM)[0])


def _command(path: Path, folder: Path | None) -> str:
    more = [] if folder is None else ["--output", str(folder)]
    return shlex.join(["python", "-m", "caffe_jacinto.train", str(path), *more])


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _networks(solver: Any, path: Path, folder: Path) -> _Found:
    """The networks that the solver names, in the order in which Caffe tests (Solver::InitTestNets).

    Raises:
        UserError: it names none, or not in Caffe's way.
    """
    found = _Found({})
    inside = folder.with_name(f"{folder.name}_network")

    def of_message(message: Any, name: str) -> str:
        file = inside.with_name(f"{inside.name}{name}.prototxt")
        found.texts[file] = text_format.MessageToString(message, as_utf8=True)
        found.notes.append(f"network: {file}, from {path}")
        return str(file)

    def of_file(name: str) -> str:
        file = find_network(name, path)
        if str(file) != name:
            found.notes.append(f"network: {file}, which {path} calls {name}")
        return str(file)

    names = ("train_net_param", "train_net", "net_param", "net")
    given = [name for name in names if solver.HasField(name)]
    trained = [name for name in given if name.startswith("train")] or given
    if len(trained) != 1:
        raise UserError(
            f"{path}: names {' and '.join(trained) or 'no network'}; give net, or train_net with test_net"
        )
    named = {
        name: of_message(getattr(solver, name), f"_{name}")
        if name.endswith("param")
        else of_file(getattr(solver, name))
        for name in given
    }
    found.keys["prototxt"] = named[trained[0]]
    tests = [of_message(net, f"_test_{number}") for number, net in enumerate(solver.test_net_param)]
    tests += [of_file(name) for name in solver.test_net]
    generic = next((named[name] for name in given if not name.startswith("train")), None)
    if generic is not None:
        tests += [generic] * (len(solver.test_iter) - len(tests))
    if not tests:
        raise UserError(f"{path}: no network tests what is trained; add test_iter, and test_net without net")
    if len(solver.test_iter) != len(tests):
        raise UserError(f"{path}: {len(tests)} networks that test, and {len(solver.test_iter)} of test_iter")
    if any(test != found.keys["prototxt"] for test in tests):
        found.keys["test_prototxt"] = tests
    _add_states(found, solver, path, len(tests))
    return found


def _add_states(found: _Found, solver: Any, path: Path, tests: int) -> None:
    if solver.train_state.stage:
        found.keys["train_stages"] = list(solver.train_state.stage)
    if solver.train_state.level:
        found.keys["train_level"] = solver.train_state.level
    states = list(solver.test_state)
    if not states:
        if tests > 1 and "test_prototxt" not in found.keys:
            found.keys["test_stages"] = [[] for _ in range(tests)]
        return
    if len(states) != tests:
        raise UserError(f"{path}: {len(states)} of test_state for {tests} networks that test; give each one")
    if any(state.stage for state in states) or tests > 1:
        found.keys["test_stages"] = [list(state.stage) for state in states]
    if any(state.level for state in states):
        found.keys["test_levels"] = [state.level for state in states]


def find_network(name: str, solver: Path) -> Path:
    """The network that a solver calls ``name``: from here, or from the solver's folder or one above it.

    Caffe takes such names from the folder that it is started in, which is often the root of a source tree or
    the solver's own folder. Last comes a file of that name beside the solver.

    Raises:
        UserError: there is none.
    """
    beside = solver.absolute().parent
    if expanded(name).is_file():
        return expanded(name)
    for folder in (beside, *beside.parents):
        if (folder / name).is_file():
            return _shorter(folder / name)
    if (beside / Path(name).name).is_file():
        return _shorter(beside / Path(name).name)
    raise UserError(
        f"{solver}: the network {name} is not a file, neither from this folder nor from {beside} or "
        "one above it; correct the path"
    )


def _shorter(path: Path) -> Path:
    """Relative to this folder where it is inside."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _their_solver(solver: Any, path: Path) -> TheirSolver:
    """The solver's fields as a stage has them.

    Raises:
        UserErrors: some are missing, or have values that no stage can have: each with its line.
    """
    missing = [name for name in ("max_iter", "base_lr", "lr_policy") if not getattr(solver, name)]
    if missing:
        zero = "" if missing[0] == "lr_policy" else " or 0"
        raise UserError(f"{path}: {missing[0]} is missing{zero}; add it")
    settings: dict[str, Any] = {}
    for name in _TAKEN:
        if solver.HasField(name) and solver.type in FIELDS_OF_TYPES.get(name, (solver.type,)):
            value = getattr(solver, name)
            settings[name] = float(number(value)) if isinstance(value, float) else value
    settings["lr_policy"] = str(solver.lr_policy)
    settings.setdefault("momentum", 0.0)
    settings.setdefault("weight_decay", 0.0)
    if solver.stepvalue:
        settings["stepvalue"] = list(solver.stepvalue)
    if solver.image_size:
        settings["image_sizes"] = [[step.from_iter, step.size] for step in solver.image_size]
    settings["regularization"] = str(solver.regularization_type)
    if solver.snapshot_format == solver.HDF5:
        settings["snapshot_format"] = "HDF5"
    if solver.lr_policy in ("poly", "inv"):
        settings.setdefault("power", 0.0)
    used = POLICY_SETTINGS.get(solver.lr_policy, ())
    for name in _UNSET_BY_ZERO:
        value = settings.get(name, 1)
        if value <= 0 and not (name in used and value < 0):
            del settings[name]
    wrong = solver_mistakes(settings)
    for name in ("iter_size", "test_iter"):
        values = [getattr(solver, name)] if name == "iter_size" else solver.test_iter
        wrong += [(name, f"is {value}; give 1 or more") for value in values if value < 1]
    if wrong:
        tree = parse(read_text(path), str(path))
        raise UserErrors([_mistake(tree, path, key, what) for key, what in wrong])
    return TheirSolver(settings, learning_rate(solver, solver.max_iter // 2))


_FIELDS = {
    "regularization": ("regularization_type",),
    "image_sizes": ("image_size",),
    "type": ("type", "solver_type"),
}
"""How a solver calls what a recipe's key is."""


def _mistake(tree: Message, path: Path, key: str, what: str) -> str:
    """A mistake in the solver, with its line and in the form of a prototxt."""
    key = key.partition(".")[0]
    fields = [name for name in _FIELDS.get(key, (key,)) if tree.has(name)]
    place = f"{path}:{tree.line_of(fields[0])}: {fields[0]}" if fields else f"{path}: {key}"
    return f"{place}: {re.sub(r'(?<=[a-z0-9]) = ', ': ', what)}"


def _fan_in(network: UserNetwork) -> int:
    """The weights of an output of the network's middle convolution (or inner product), by their number."""
    net = parse_any_net(network.train.text, network.train.path)
    found: list[int] = []
    for shapes in blob_shapes(net, "TRAIN").values():
        if len(shapes[0]) >= 2 and all(shapes[0][1:]):
            found.append(_product(dim or 1 for dim in shapes[0][1:]))
    return int(median(found)) if found else 1


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def _not_taken(solver: Any) -> Sequence[str]:
    """Lines on the fields that a run does otherwise."""
    known = {*_TAKEN, *_OF_OTHER_PARTS, *_OF_THE_RUN}
    left = [descriptor.name for descriptor, _ in solver.ListFields() if descriptor.name not in known]
    return [f"  note: of the solver, {', '.join(left)} is not taken over"] if left else []
