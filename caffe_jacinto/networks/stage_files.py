"""The four prototxt files of a stage, from its recipe, in a dialect."""

from __future__ import annotations

import shlex
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.text import count_of, did_you_mean
from caffe_jacinto.netspec.data_fit import DataSize
from caffe_jacinto.netspec.shapes import emptied_layer
from caffe_jacinto.networks import registry
from caffe_jacinto.networks.derived_deploy import deploy_text
from caffe_jacinto.networks.distillation import taught
from caffe_jacinto.networks.label_smoothing import smoothed
from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    LABEL_BLOB,
    Convolution,
    Data,
    InnerProduct,
    Layer,
    Network,
    Softmax,
)
from caffe_jacinto.networks.prototxt_file import net_file
from caffe_jacinto.networks.registry import PUBLISHED_WITH_THE_FORK, build_network, for_finetuning
from caffe_jacinto.networks.user_network import (
    UserNetwork,
    read_user_network,
    test_batches,
    test_texts,
    train_text,
)
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect, file_batch
from caffe_jacinto.prototxt.render import Name, render
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.load import built_in_recipes, load_recipe, toml_value

if TYPE_CHECKING:
    from caffe_jacinto.recipes.model import Recipe, Stage

IMAGENET_VAL_IMAGES = 50_000
"""Of ILSVRC 2012: the default where the number of validation images is not known."""

TRAIN, VAL, DEPLOY, SOLVER = "train.prototxt", "val.prototxt", "deploy.prototxt", "solver.prototxt"


def stage_files(
    recipe: Recipe,
    stage_name: str,
    dialect: Dialect,
    *,
    folder: str,
    gpus: tuple[int, ...],
    iter_size: int,
    solver_mode_gpu: bool,
    val_images: int | None = None,
    data_sizes: Mapping[str, DataSize] | None = None,
    start_factor: float | None = None,
    ranks: int | None = None,
) -> dict[str, str]:
    """Texts of train, val, deploy and solver.prototxt by name, each checked against the dialect's schema.

    ``folder`` prefixes the solver's paths, which Caffe resolves against the folder it is started in.
    ``ranks`` (default: one for each of ``gpus``) and ``iter_size`` divide the recipe's effective batch. One
    test covers all ``val_images``. ``data_sizes`` are those of the LMDBs and lists that are known, by
    their paths: a network of the user's own needs them. Where several networks test it, they are
    val.prototxt, val_2.prototxt and so on.
    ``start_factor`` replaces the recipe's where the fork's sparsity schedule continues after a resume.

    Raises:
        UserError: no such stage or network, parameters that do not fit it, or a batch that does not divide.
    """
    stage = _stage(recipe, stage_name)
    if dialect is Dialect.CAFFE_JACINTO:
        _check_fork_supports(recipe, stage_name)
    batch = file_batch(dialect, recipe.training.batch_size, iter_size, ranks or len(gpus))
    images = IMAGENET_VAL_IMAGES if val_images is None else val_images
    nets = (
        _built(recipe, stage_name, dialect, batch, images, folder)
        if recipe.network.prototxt is None
        else _users(recipe, dialect, batch, data_sizes or {})
    )
    files = {
        **nets.texts,
        SOLVER: _solver(
            recipe,
            stage,
            dialect,
            nets,
            folder=folder,
            iter_size=iter_size,
            device=(gpus[0] if gpus else 0) if solver_mode_gpu else None,
            start_factor=start_factor,
        ),
    }
    for name, text in files.items():
        (parse_solver if name == SOLVER else parse_net)(text, dialect, str(Path(folder, name)))
    return files


@dataclass(frozen=True)
class State:
    """Of a network, beside its phase (Caffe's NetState)."""

    level: int
    stages: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.level or self.stages)


@dataclass(frozen=True)
class Test:
    """A network that tests: its file, the batches of one test, its state."""

    __test__ = False  # not a test, whatever pytest makes of its name

    file: str
    batches: int
    state: State = State(0, ())


@dataclass(frozen=True)
class StageNets:
    """The networks of a stage."""

    texts: dict[str, str]
    tests: tuple[Test, ...]
    train_state: State = State(0, ())


def _built(
    recipe: Recipe, stage_name: str, dialect: Dialect, batch: int, val_images: int, folder: str
) -> StageNets:
    """The networks of a stage of a recipe whose network this program builds."""
    if val_images < 1:
        raise UserError(f"{recipe.data.val_lmdb}: {val_images} validation images; a test needs at least one")
    network = network_of(recipe)
    check_crop(network)
    data = partial(_data, network, mean_file=recipe.data.mean_file)
    train = replace(
        data(recipe.data.train_lmdb, batch, mirror=recipe.data.mirror),
        augmentation=recipe.data.augmentation(),
    )
    val = data(recipe.data.val_lmdb, recipe.training.val_batch_size, mirror=False)
    trained = (*network.trained_layers, *network.outputs)
    smooth = smoothed(trained, recipe.training.label_smoothing, network.num_classes, dialect)
    smooth = taught(smooth, recipe, stage_name, network.scores, folder)
    texts = {
        TRAIN: _net(_title(network, "train"), (train, *smooth), dialect),
        VAL: _net(_title(network, "test"), (val, *trained), dialect),
        DEPLOY: _deploy(network, dialect),
    }
    return StageNets(texts, (Test(VAL, iterations_per_test(val_images, recipe.training.val_batch_size)),))


def _users(recipe: Recipe, dialect: Dialect, batch: int, data: Mapping[str, DataSize]) -> StageNets:
    """The networks of a recipe with `network.prototxt`."""
    network = user_network(recipe)
    for net in (network.train, *network.tests):
        parse_net(net.text, dialect, net.path)
    names: dict[str, str] = {}  # of the test networks by their texts
    for text in test_texts(network, recipe):
        names.setdefault(text, f"val_{len(names) + 1}.prototxt" if names else VAL)
    batches = test_batches(network, recipe, data)
    tests = [
        Test(names[text], number or 1, State(net.state.level, tuple(sorted(net.state.stages))))
        for text, number, net in zip(test_texts(network, recipe), batches, network.tests, strict=True)
    ]
    val = net_file(network.tests[0].path, next(iter(names)), network.tests[0].state)
    texts = {
        TRAIN: train_text(network, recipe, batch),
        **{name: text for text, name in names.items()},
        DEPLOY: deploy_text(val, data),
    }
    state = network.train.state
    return StageNets(texts, tuple(tests), State(state.level, tuple(sorted(state.stages))))


def user_network(recipe: Recipe) -> UserNetwork:
    """The network of a recipe with `network.prototxt`."""
    return read_user_network(recipe.network)


def has_batch_norm(recipe: Recipe) -> bool:
    """Whether the recipe's network has running statistics, which can lag behind the weights."""
    return (network_of(recipe) if recipe.network.prototxt is None else user_network(recipe)).has_batch_norm


def names_in_weights(recipe: Recipe, names: Iterable[str], key: str) -> frozenset[str]:
    """The names under which weight files hold the layers ``names`` and their batch norms.

    ``key`` is the recipe's key that the names come from.

    Raises:
        UserError: there is no such layer, or it has no weights.
    """
    if recipe.network.prototxt is not None:
        return user_network(recipe).with_batch_norms(names, key)
    network = network_of(recipe)
    return registry.stored_names(network, registry.with_batch_norms(network, names, key))


def layers_to_name(recipe: Recipe, stored: Iterable[str]) -> list[str]:
    """The fewest layers whose `names_in_weights` cover ``stored``."""
    if recipe.network.prototxt is not None:
        return user_network(recipe).layers_to_name(stored)
    return registry.layers_to_name(network_of(recipe), stored)


def network_of(recipe: Recipe) -> Network:
    """The recipe's network, with the frozen layers and the head's learning rate of its `[network]` table.

    Raises:
        UserError: no such network, or parameters or layers that it does not have.
    """
    settings = recipe.network
    assert settings.crop_size is not None
    network = build_network(
        settings.name, recipe.data.num_classes, settings.crop_size, settings.strides, settings.width
    )
    return for_finetuning(network, settings.frozen, settings.head_lr_mult)


LARGEST_CROP = 4096
"""In pixels: the largest crop that is suggested for a network."""


def check_crop(network: Network) -> None:
    """Raise UserError where the network's crop is so small that a layer would have no output."""
    net = tree.parse(_deploy(network, Dialect.BVLC))
    emptied = emptied_layer(net)
    if emptied is None:
        return
    larger = range(network.crop_size + 1, LARGEST_CROP)
    # What a crop leaves something of, each larger one does, too.
    found = bisect_left(larger, True, key=lambda crop: emptied_layer(net, crop) is None)
    hint = (
        f"use a crop of at least {larger[found]}"
        if found < len(larger)
        else "give it smaller strides or kernels"
    )
    raise UserError(
        f"{network.name} with a crop of {network.crop_size} pixels: nothing would be left of the image after "
        f"{emptied}; {hint}"
    )


def write_stage_files(files: Mapping[str, str], folder: Path) -> None:
    """Write each file whole into ``folder``, which is made if it is missing.

    Raises:
        OSError: the folder cannot be made or written; the error names what cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(folder / name, text)


def published_recipe(network: str) -> Recipe:
    """The published training of ``network``; for one without, JacintoNet11's with that network in it."""
    if f"imagenet_{network}" in built_in_recipes():
        return load_recipe(f"imagenet_{network}")
    recipe = load_recipe("imagenet_jacintonet11")
    settings = recipe.network.model_copy(update={"name": network, "strides": None, "width": None})
    return recipe.model_copy(update={"network": settings})


def published_dialect(network: str) -> Dialect:
    """The dialect that the network was published in; stock Caffe's for one that was not."""
    return Dialect.CAFFE_JACINTO if network in PUBLISHED_WITH_THE_FORK else Dialect.BVLC


def default_on_gpu(network: str, dialect: Dialect) -> bool:
    """Whether the solver names a GPU by default: always for the fork, otherwise as published."""
    published = f"imagenet_{network}" in built_in_recipes()
    return dialect is Dialect.CAFFE_JACINTO or (published and dialect is published_dialect(network))


def check_caffe_train_suffices(recipe: Recipe, stage_name: str) -> None:
    """Refuse stock Caffe's files for a stage that prunes or holds zeros: `caffe train` would do neither."""
    stage = recipe.stages.get(stage_name)
    if stage and (stage.sparse or stage.freeze_zeros):
        raise UserError(
            f"--stage {stage_name}: stock Caffe's solver has no field for sparsity (sparse_mode and others); "
            f"train it with python -m caffe_jacinto.train {recipe.name}, or use --dialect caffe_jacinto"
        )


def what_was_written(
    recipe: Recipe, stage_name: str, dialect: Dialect, folder: str, device: str, val_images: int
) -> str:
    """What the files in ``folder`` are, in a few lines; ``device``: ``GPU 0,1`` or ``the CPU``."""
    network, data, training = recipe.network, recipe.data, recipe.training
    strides = f", strides {','.join(map(str, network.strides))}" if network.strides else ""
    strides += f", width {network.width:g}" if network.width else ""
    tests = iterations_per_test(val_images, training.val_batch_size)
    twice = tests * training.val_batch_size - val_images
    wraps = f"; the last batch wraps round, so {twice} images count twice" if twice else ""
    batch = f"{training.batch_size} images per update, in {count_of(training.iter_size, 'pass')} on {device}"
    return (
        f"Wrote {TRAIN}, {VAL}, {DEPLOY}, {SOLVER} into {folder}:\n"
        f"  network  {network.name}, {count_of(data.num_classes, 'class')}, "
        f"{network.crop_size}x{network.crop_size} crops{strides}\n"
        f"  dialect  {dialect.value} ({_CAFFE[dialect]})\n"
        f"  stage    {stage_name}, {count_of(recipe.stages[stage_name].max_iter, 'iteration')}\n"
        f"  batch    {batch}\n"
        f"  test     {count_of(val_images, 'image')} in {count_of(tests, 'batch')} of "
        f"{training.val_batch_size}{wraps}"
    )


def how_to_train(
    recipe: Recipe, stage_name: str, dialect: Dialect, folder: str, gpus: tuple[int, ...]
) -> str:
    """The command that trains the files in ``folder``, and how to train without the fork."""
    start = recipe.stages[stage_name].start
    command = ["caffe", "train", "-solver", str(Path(folder, SOLVER))]
    if start:
        command += ["-weights", f"{start.upper()}.caffemodel"]
    if gpus:
        command += ["-gpu", ",".join(map(str, gpus))]
    weights = f" ({start.upper()}.caffemodel: the final weights of {start})" if start else ""
    said = f"Train it with {_CAFFE[dialect]}{weights}:\n  {shlex.join(command)}"
    if dialect is Dialect.CAFFE_JACINTO:
        said += (
            "\nWithout a build of that Caffe, train the recipe with stock Caffe or PyTorch:\n"
            f"  python -m caffe_jacinto.train {recipe.name}"
        )
    return said


_CAFFE = {Dialect.BVLC: "stock Caffe 1.0", Dialect.CAFFE_JACINTO: "the fork caffe-jacinto"}


def iterations_per_test(val_images: int, val_batch: int) -> int:
    """Batches that cover all validation images; the last one wraps round where they do not divide."""
    return -(-val_images // val_batch)


def _stage(recipe: Recipe, name: str) -> Stage:
    if name not in recipe.stages:
        raise UserError(
            f"{name}: not a stage of the recipe {recipe.name}; {did_you_mean(name, recipe.stages)}"
        )
    if recipe.stages[name].solver is None:
        raise UserError(f"{name}: the stage trains nothing, so it has no solver; choose another one")
    return recipe.stages[name]


def _data(network: Network, source: str, batch_size: int, *, mirror: bool, mean_file: str | None) -> Data:
    if network.mean_image and mean_file is None:
        raise UserError(
            f"{network.name} subtracts the training set's mean image: make it with python -m "
            "caffe_jacinto.create_lmdb --mean LMDB OUT, and name it as data.mean_file"
        )
    return Data(
        name="data",
        bottoms=(),
        top=DATA_BLOB,
        source=source,
        batch_size=batch_size,
        channels=network.channels,
        crop_size=network.crop_size,
        mirror=mirror,
        label_top=LABEL_BLOB,
        mean_values=() if mean_file else network.mean_values,  # Caffe takes one or the other.
        mean_file=mean_file,
        scale=network.scale,
    )


def _title(network: Network, stage: str) -> str:
    """The ``name`` in a prototxt."""
    title = network.name if network.title is None else network.title
    return f"{title}_{stage}" if network.title_says_stage else title


def _net(name: str, layers: tuple[Layer, ...], dialect: Dialect) -> str:
    return render("net.j2", name=name, layers=layers, dialect=dialect.value, input_shape=())


def _deploy(network: Network, dialect: Dialect) -> str:
    layers = network.layers
    if not network.deploy_fillers:
        layers = tuple(_without_fillers(layer) for layer in layers)
    return render(
        "net.j2",
        name=_title(network, "deploy"),
        layers=(*layers, Softmax("prob", (network.scores,), "prob")),
        dialect=dialect.value,
        input_blob=DATA_BLOB,
        input_shape=(network.deploy_batch, network.channels, network.crop_size, network.crop_size),
    )


def _without_fillers(layer: Layer) -> Layer:
    if isinstance(layer, (Convolution, InnerProduct)):
        return replace(layer, weight_filler=None, bias_filler=None)
    return layer


def _solver(
    recipe: Recipe,
    stage: Stage,
    dialect: Dialect,
    nets: StageNets,
    *,
    folder: str,
    iter_size: int,
    device: int | None,
    start_factor: float | None,
) -> str:
    tests = [replace(test, file=str(Path(folder, test.file))) for test in nets.tests]
    sparse = stage.sparse
    if sparse and start_factor is not None:
        sparse = sparse.model_copy(update={"start_factor": start_factor})
    fields = sparse.by_name(solver=True) if sparse else {}
    return render(
        "solver.j2",
        solver=stage.solver,
        sparse={Name(name): value for name, value in fields.items()},
        freeze_zeros=stage.freeze_zeros,
        dialect=dialect.value,
        train_net=str(Path(folder, TRAIN)),
        train_state=nets.train_state,
        tests=tests,
        test_states=[test.state for test in tests] if any(test.state for test in tests) else [],
        snapshot_prefix=str(Path(folder, recipe.weights_prefix)),
        random_seed=recipe.training.random_seed,
        iter_size=iter_size,
        gpu=device is not None,
        device_id=device,
    )


def _check_fork_supports(recipe: Recipe, stage_name: str) -> None:
    """Refuse a pruning rule that caffe-jacinto has no solver field for; it would silently use another."""
    from caffe_jacinto.recipes.model import SparseSettings

    stage, frozen = recipe.stages[stage_name], recipe.network.frozen
    sparse = stage.sparse
    elsewhere = "train with stock Caffe or PyTorch (--engine bvlc or torch, --dialect bvlc)"
    for key, value in (sparse.beyond_published() if sparse else {}).items():
        default = SparseSettings.model_fields[key].default
        or_else = f"set it to {toml_value(default)}" if default else "remove it"
        raise UserError(
            f"stages.{stage_name}.sparse.{key} = {_in_toml(value)}: caffe-jacinto's solver has no field for "
            f"it; {elsewhere}, or {or_else}"
        )
    if stage.freeze_zeros and recipe.counts_inner_products(stage_name):
        raise UserError(
            f"stages.{stage_name}: caffe-jacinto does not hold the zeros of inner products; {elsewhere}"
        )
    if sparse and frozen:
        raise UserError(
            f"network.frozen and stages.{stage_name}.sparse: caffe-jacinto's solver has no field that keeps "
            "its thresholds out of frozen layers; train with stock Caffe or PyTorch (--engine bvlc or torch, "
            "--dialect bvlc), or freeze none"
        )


def _in_toml(value: object) -> str:
    """A value, or a table of one line, in TOML."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml_value(key)} = {toml_value(item)}' for key, item in value.items())} }}"
    return toml_value(value)
