"""The built-in recipes of published trainings, against the publishers' own solver files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import Recipe

MACHINE = {"net", "train_net", "test_net", "snapshot_prefix", "solver_mode", "device_id"}
"""Fields of paths and devices: the machine's, not the training's."""

JACINTONET11 = "jacintonet11_imagenet_caffe_jacinto"
FORK, BVLC = Dialect.CAFFE_JACINTO, Dialect.BVLC


def values(solver: Any) -> dict[str, Any]:
    """Every field of a solver message, defaults included, but for the machine's."""
    found = {}
    for field in solver.DESCRIPTOR.fields:
        if field.name not in MACHINE and field.message_type is None:
            value = getattr(solver, field.name)
            scalar = isinstance(value, (str, int, float, bool))
            found[field.name] = value if scalar else list(value)
    return found


def texts(recipe: Recipe, stage: str, dialect: Dialect) -> dict[str, str]:
    return stage_files(
        recipe,
        stage,
        dialect,
        folder="out",
        gpus=(),
        iter_size=recipe.training.iter_size,
        solver_mode_gpu=True,
    )


@pytest.mark.parametrize(
    ("name", "stage", "dialect", "file"),
    [
        ("imagenet_jacintonet11", "initial", FORK, f"{JACINTONET11}/solver.prototxt"),
        ("imagenet_jacintonet11", "sparse", FORK, f"{JACINTONET11}/solver_sparse.prototxt"),
        ("imagenet_jacintonet11_channelwise", "initial", FORK, f"{JACINTONET11}/solver.prototxt"),
        ("imagenet_jacintonet11_channelwise", "sparse", FORK, f"{JACINTONET11}/solver_sparse.prototxt"),
        ("imagenet_jacintonet11_8bit", "initial", FORK, f"{JACINTONET11}/solver.prototxt"),
        ("imagenet_jacintonet11_8bit", "sparse", FORK, f"{JACINTONET11}/solver_sparse.prototxt"),
        ("imagenet_jacintonet11_best", "initial", FORK, f"{JACINTONET11}/solver.prototxt"),
        ("imagenet_jacintonet11_l1_round", "initial", FORK, f"{JACINTONET11}/solver.prototxt"),
        ("imagenet_jacintonet11_l1_round", "sparse", FORK, f"{JACINTONET11}/solver_sparse.prototxt"),
        ("imagenet_jacintonet11_layerwise", "initial", FORK, f"{JACINTONET11}/solver.prototxt"),
        ("imagenet_resnet10", "initial", BVLC, "resnet10_cvgj/train.solver"),
        ("imagenet_bvlc_alexnet", "initial", BVLC, "bvlc_alexnet/solver.prototxt"),
    ],
)
def test_a_published_training_renders_to_its_published_solver(
    published: Path, name: str, stage: str, dialect: Dialect, file: str
) -> None:
    path = published / "prototxt" / file
    theirs = values(parse_solver(path.read_text(), dialect, str(path)))
    ours = values(parse_solver(texts(load_recipe(name), stage, dialect)["solver.prototxt"], dialect, "ours"))
    assert len(ours) > 30
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "file", "effective"),
    [
        ("imagenet_jacintonet11", f"{JACINTONET11}/train.prototxt", 256),
        ("imagenet_resnet10", "resnet10_cvgj/train.prototxt", 256),
        ("imagenet_bvlc_alexnet", "bvlc_alexnet/train_val.prototxt", 256),
    ],
)
def test_batch_crop_and_classes_are_the_published_ones(
    published: Path, name: str, file: str, effective: int
) -> None:
    recipe = load_recipe(name)
    dialect = FORK if "jacinto" in file else BVLC
    path = published / "prototxt" / file
    net = parse_net(path.read_text(), dialect, str(path))
    data = net.layer[0]
    images = max(data.data_param.batch_size, data.image_data_param.batch_size)
    assert (recipe.training.batch_size, images * recipe.training.iter_size) == (effective, effective)
    assert recipe.network.crop_size == data.transform_param.crop_size
    assert recipe.data.mirror == data.transform_param.mirror
    assert bool(recipe.data.mean_file) == data.transform_param.HasField("mean_file")
    head = [layer for layer in net.layer if layer.type == "InnerProduct"][-1]
    assert recipe.data.num_classes == head.inner_product_param.num_output


def test_the_sparse_recipes_differ_only_in_what_was_published_of_them() -> None:
    channelwise, layerwise, l1_round = (
        load_recipe(f"imagenet_jacintonet11_{name}") for name in ("channelwise", "layerwise", "l1_round")
    )
    assert [list(recipe.stages) for recipe in (channelwise, layerwise, l1_round)] == [
        ["initial", "sparse", "quantize"],
        ["initial", "sparse", "quantize"],
        ["initial", "l1reg", "sparse", "quantize"],
    ]
    channel, layer, round_ = (recipe.stages["sparse"] for recipe in (channelwise, layerwise, l1_round))
    assert channel.sparse is not None
    assert layer.sparse is not None
    assert (channel.sparse.target, channel.sparse.by, layer.sparse.by) == (0.8, "channel", "layer")
    assert layer == channel.model_copy(update={"sparse": channel.sparse.model_copy(update={"by": "layer"})})
    assert round_ == channel.model_copy(update={"start": "l1reg"})
    assert l1_round.stages["l1reg"].solver == channel.solver
    assert l1_round.stages["initial"] == channelwise.stages["initial"] == layerwise.stages["initial"]


def test_the_table_has_the_best_recipe_and_what_differs_from_it_in_a_setting() -> None:
    table, best = load_recipe("fashion_sparsity_table"), load_recipe("fashion_jacintonet11_best")
    sparse = best.stages["sparse"]
    assert sparse.sparse is not None
    assert sparse.solver is not None
    for name, differs in (
        ("cubic", {}),
        ("cubic_network", {"by": "network"}),
        ("cubic_network_90", {"by": "network", "target": 0.9}),
    ):
        rule = sparse.sparse.model_copy(update=differs)
        solver = sparse.solver.model_copy(update={"test_interval": 2600})
        assert table.stages[name] == sparse.model_copy(update={"sparse": rule, "solver": solver})
    own, others = (recipe.stages["dense"].solver for recipe in (best, table))
    assert own is not None
    assert own.model_copy(update={"test_interval": 10400}) == others
    assert (table.data, table.network, table.training) == (best.data, best.network, best.training)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("by=network", 'by = "network": .* has no field for it; .* set it to "channel"$'),
        ("schedule=cubic", 'schedule = "cubic": .* set it to "steps"$'),
        ("method=rigl", 'method = "rigl": .* set it to "magnitude"$'),
        ("min_kernel=1", "min_kernel = 1: .* set it to 3$"),
        ("inner_products=true", "inner_products = true: .* or remove it$"),
        ("skip=['conv1a']", r'skip = \["conv1a"\]: .* or remove it$'),
    ],
)
def test_other_rules_cannot_be_said_to_the_fork(setting: str, says: str) -> None:
    recipe = load_recipe("imagenet_jacintonet11", [f"stages.sparse.sparse.{setting}"])
    with pytest.raises(UserError, match=rf"^stages\.sparse\.sparse\.{says}"):
        texts(recipe, "sparse", FORK)
    assert texts(recipe, "sparse", BVLC)
    if setting == "inner_products=true":
        with pytest.raises(UserError, match=r"^stages\.finetune: .* not hold the zeros of inner products"):
            texts(recipe, "finetune", FORK)


def test_thresholds_by_layer_cannot_be_said_to_the_fork() -> None:
    recipe = load_recipe("imagenet_jacintonet11_layerwise")
    with pytest.raises(UserError, match=r'^stages\.sparse\.sparse\.by = "layer": .* no field .* "channel"$'):
        texts(recipe, "sparse", FORK)
    assert 'type: "SGD"' in texts(recipe, "sparse", BVLC)["solver.prototxt"]
