"""Fine-tuning for another task: what is frozen, what learns faster, what is initialized again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from digits_run import PREFIX, Trainer, write_lmdbs

from caffe_jacinto.caffemodel.hdf5 import write_weights
from caffe_jacinto.caffemodel.net_file import without_layers
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.networks.jacintonet11 import jacintonet11
from caffe_jacinto.networks.layers import Convolution, InnerProduct
from caffe_jacinto.networks.registry import (
    WITH_WEIGHTS,
    build_network,
    for_finetuning,
    layers_to_name,
    stored_names,
    with_batch_norms,
)
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net
from caffe_jacinto.recipes.load import load_recipe

NETWORK = jacintonet11(10, 32, (1, 2, 2, 2, 2))

# ------------------------------------------------------------------------------------------------ the network


def test_frozen_layers_and_the_head_have_their_own_learning_rates() -> None:
    network = for_finetuning(NETWORK, ["conv1a", "conv1b/bn"], 10)
    rates = {layer.name: layer.lr_mult for layer in network.layers if isinstance(layer, WITH_WEIGHTS)}
    assert (rates["conv1a"], rates["conv1a/bn"], rates["conv1b"], rates["conv1b/bn"]) == (0, 0, 1, 0)
    assert rates["fc10"] == 10
    assert set(rates.values()) == {0, 1, 10}
    assert for_finetuning(NETWORK, [], 1) == NETWORK


@pytest.mark.parametrize(
    ("frozen", "says"),
    [
        (["convla"], "network.frozen: convla is not a layer with weights .* did you mean conv1a"),
        (["pool1"], "pool1 is not a layer with weights"),
        (["fc10"], "fc10 is the head"),
    ],
)
def test_what_cannot_be_frozen(frozen: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        for_finetuning(NETWORK, frozen, 10)


def test_a_network_of_which_nothing_learns_is_refused() -> None:
    names = [layer.name for layer in NETWORK.layers if isinstance(layer, (Convolution, InnerProduct))]
    with pytest.raises(UserError, match="nothing would be trained"):
        for_finetuning(NETWORK, names, 1)
    for_finetuning(NETWORK, names[:-1], 1)


def test_names_in_a_weight_file_and_back() -> None:
    chosen = with_batch_norms(NETWORK, ["conv1a", "fc10"], "key")
    stored = stored_names(NETWORK, chosen)
    assert stored == {"conv1a", "conv1a/bn", "conv1a/scale", "fc10"}
    assert layers_to_name(NETWORK, stored) == ["conv1a", "fc10"]
    assert layers_to_name(NETWORK, ["conv1a/scale"]) == ["conv1a/bn"]


@pytest.mark.parametrize(
    ("name", "frozen", "still", "head"),
    [
        (
            "resnet10",
            ["data_bn", "conv1"],
            {"data_bn", "data_scale", "conv1", "conv1_bn", "conv1_scale"},
            "score",
        ),
        # It has no batch norm of its own: the next one reads its sum with the shortcut.
        ("resnet10", ["layer_64_1_conv2"], {"layer_64_1_conv2"}, "score"),
        (
            "resnet10",
            ["layer_64_1_conv1"],
            {"layer_64_1_conv1", "layer_64_1_bn2", "layer_64_1_scale2"},
            "score",
        ),
        ("bvlc_alexnet", ["conv1", "fc6"], {"conv1", "fc6"}, "fc8"),
    ],
)
def test_batch_norms_and_heads_of_other_networks(
    name: str, frozen: list[str], still: set[str], head: str
) -> None:
    network = for_finetuning(build_network(name, 5, 99), frozen, 10)
    rates = {layer.name: layer.lr_mult for layer in network.layers if isinstance(layer, WITH_WEIGHTS)}
    assert stored_names(network, [layer for layer in rates if rates[layer] == 0]) == still
    assert [layer for layer in rates if rates[layer] == 10] == [head]


@pytest.mark.parametrize("dialect", Dialect)
def test_the_prototxts_say_what_learns(dialect: Dialect) -> None:
    recipe = load_recipe("finetune_classifier")
    texts = stage_files(
        recipe, "finetune", dialect, folder="out", gpus=(), iter_size=1, solver_mode_gpu=True, val_images=100
    )
    layers = {
        layer.name: layer for layer in parse_net(texts["train.prototxt"], dialect, "train.prototxt").layer
    }
    for name in ("conv1a", "conv1b"):
        assert [(rate.lr_mult, rate.decay_mult) for rate in layers[name].param] == [(0, 0), (0, 0)]
        assert layers[f"{name}/bn"].batch_norm_param.use_global_stats
        scale_and_shift = layers[f"{name}/scale" if dialect is Dialect.BVLC else f"{name}/bn"].param[-2:]
        assert [(rate.lr_mult, rate.decay_mult) for rate in scale_and_shift] == [(0, 0), (0, 0)]
    assert [rate.lr_mult for rate in layers["fc10"].param] == [10, 20]
    assert [rate.lr_mult for rate in layers["res2a_branch2a"].param] == [1, 2]
    assert not layers["res2a_branch2a/bn"].batch_norm_param.use_global_stats


# ----------------------------------------------------------------------------------------------- weight files


@pytest.mark.parametrize("form", ["layer", "layers"])
def test_a_weight_file_without_a_layer_is_the_rest_byte_for_byte(tmp_path: Path, form: str) -> None:
    whole = messages(Dialect.BVLC).NetParameter(name="net")
    for name in ("conv", "fc8", "last"):
        layer = getattr(whole, form).add(name=name)
        layer.blobs.add(data=[1, 2, 3]).shape.dim.extend([3])
    path = tmp_path / "w.caffemodel"
    path.write_bytes(whole.SerializeToString())
    assert without_layers(path, []) == path.read_bytes()
    del getattr(whole, form)[1]
    assert without_layers(path, ["fc8", "not there"]) == whole.SerializeToString()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="cut off"):
        without_layers(path, ["fc8"])


# --------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["stages.finetune.weights=", "stages.finetune.freeze_zeros=false"],
            "network.frozen keeps conv1a, conv1b",
        ),
        (
            [
                "stages.finetune.weights=",
                "stages.finetune.freeze_zeros=false",
                "stages.finetune.reinit=['fc10']",
            ],
            "has none",
        ),
        (['stages.finetune.reinit=["conv1a"]'], "conv1a is also in network.frozen"),
        (['network.frozen=["conv1a", "conv1a"]'], "twice"),
        (["network.head_lr_mult=0"], "more than 0"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("finetune_classifier", overrides)


# ------------------------------------------------------------------------------------------------ real Caffe

RUN = "trained"
SETTINGS = {
    "data.train_lmdb": "train_lmdb",
    "data.val_lmdb": "val_lmdb",
    "data.dataset": "digits",
    "network.crop_size": "32",
    "network.strides": "[2,2,2,2,1]",
    "training.batch_size": "8",
    "training.reestimate_batches": "2",
    "stages.finetune.weights": f"{RUN}/sparse/{PREFIX}_iter_4.caffemodel",
    "stages.quantize": "",  # away with it: it has tests of its own
    "stages.finetune.solver.max_iter": "4",
    "stages.finetune.solver.test_interval": "2",
    "stages.finetune.solver.snapshot": "2",
    "stages.finetune.solver.display": "1",
}


def arguments(**settings: str) -> list[str]:
    """The recipe of fine-tuning, made tiny; ``settings`` with ``__`` for the dots in their keys."""
    given = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    chosen = [f"{key}={value}" for key, value in given.items()]
    return ["finetune_classifier", *(word for setting in chosen for word in ("--set", setting))]


@pytest.fixture(scope="module")
def trainer(caffe_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A folder with digits and a sparse network trained on them for ten classes."""
    folder = tmp_path_factory.mktemp("finetuning")
    write_lmdbs(folder)
    trainer = Trainer(caffe_engine.info.executable, folder)
    from digits_run import recipe_of, tiny

    recipe = recipe_of(folder, "sparse")
    only = ("sparse",)
    code, said = trainer.run(*tiny(recipe, only, sparse=4), "--set", "stages.sparse.start=", "--output", RUN)
    assert code == 0, said
    return trainer


def weights(
    trainer: Trainer, run: str, stage: str = "finetune", iteration: int = 4
) -> dict[str, list[np.ndarray]]:
    return read_weights(trainer.folder / run / stage / f"{PREFIX}_iter_{iteration}.caffemodel")


def moved(before: dict[str, list[np.ndarray]], after: dict[str, list[np.ndarray]]) -> set[str]:
    """The layers of both of which any number differs."""
    return {
        layer
        for layer in before.keys() & after.keys()
        if any((old != new).any() for old, new in zip(before[layer], after[layer], strict=True))
    }


@pytest.mark.caffe
@pytest.mark.parametrize("freeze_zeros", ["true", "false"])
def test_another_task_is_learnt_with_frozen_layers_and_a_new_head(
    trainer: Trainer, freeze_zeros: str
) -> None:
    """Other classes, crop and strides, by the stepper (freeze_zeros) and by `caffe train`."""
    run = f"another task {freeze_zeros}"
    code, said = trainer.run(
        *arguments(
            data__num_classes="12",
            network__crop_size="28",
            network__strides="[1,2,2,2,2]",
            stages__finetune__freeze_zeros=freeze_zeros,
        ),
        "--output",
        run,
    )
    assert code == 0, said
    assert "stage finetune: layer fc12: starts at random values: not in the weight file" in said
    assert "stage finetune: layer fc10: in the start weights, but not in the network; not used" in said
    before, after = weights(trainer, RUN, "sparse"), weights(trainer, run)
    assert after["fc12"][0].shape == (12, 512)
    still = {layer for layer in before if layer.startswith(("conv1a", "conv1b"))}
    assert {"conv1a", "conv1a/bn", "conv1a/scale", "conv1b", "conv1b/bn", "conv1b/scale"} == still
    assert moved(before, after) == before.keys() - still - {"fc10"}
    zeros = {name: blobs[0] == 0 for name, blobs in before.items() if blobs[0].ndim == 4}
    assert any(zero.any() for zero in zeros.values())
    kept = all(not after[name][0][zero].any() for name, zero in zeros.items())
    assert kept == (freeze_zeros == "true")


@pytest.mark.caffe
def test_a_layer_of_another_shape_is_an_error_until_the_recipe_names_it(trainer: Trainer) -> None:
    """A convolution of the start weights with 33 outputs, and its batch norm and scale with it."""
    path = trainer.folder / RUN / "sparse" / f"{PREFIX}_iter_4.caffemodel"
    net = messages(Dialect.BVLC).NetParameter.FromString(path.read_bytes())
    for layer in net.layer:
        if layer.name.startswith("conv1b"):
            for blob in layer.blobs:
                if blob.shape.dim[0] == 32:
                    blob.data.extend([0.5] * (len(blob.data) // 32))
                    blob.shape.dim[0] = 33
    (trainer.folder / "wide.caffemodel").write_bytes(net.SerializeToString())
    given = {"stages__finetune__weights": "wide.caffemodel", "network__frozen": '["conv1a"]'}
    code, said = trainer.run(*arguments(**given), "--output", "refused")
    assert code == 2
    assert "conv1b: blob 0 is 33 x 8 x 3 x 3 in the weight file, 32 x 8 x 3 x 3 in the network" in said
    assert 'stages.finetune.reinit=["conv1b"]' in said
    assert not (trainer.folder / "refused").exists()
    given["stages__finetune__reinit"] = '["conv1b", "fc10"]'
    code, said = trainer.run(*arguments(**given), "--output", "narrow", "--dry-run")
    assert code == 0, said
    lines = [line for line in said.splitlines() if "starts at random values" in line]
    assert len(lines) == 4, said
    assert "layer conv1b: starts at random values: blob 0 is 33 x 8 x 3 x 3 in the weight file" in lines[0]
    assert "layer fc10: starts at random values: reinit names it" in lines[3]
    start = trainer.folder / "narrow/finetune/start.caffemodel"
    assert set(read_weights(start)) == set(read_weights(path)) - {
        *("conv1b", "conv1b/bn", "conv1b/scale", "fc10")
    }
    start.unlink()  # a run that stopped before its first snapshot writes it again
    code, said = trainer.run("--resume", "narrow")
    assert code == 0, said
    assert "without conv1b, fc10" in said
    assert start.is_file()
    assert "conv1a" not in moved(read_weights(start), weights(trainer, "narrow"))


@pytest.mark.caffe
def test_start_weights_in_hdf5_become_binary_ones(trainer: Trainer) -> None:
    """Stock Caffe may take an HDF5 file for an empty one."""
    source = read_weights(trainer.folder / RUN / "sparse" / f"{PREFIX}_iter_4.caffemodel")
    write_weights(
        trainer.folder / "all.caffemodel.h5",
        {name: dict(enumerate(blobs)) for name, blobs in source.items()},
    )
    given = {"stages__finetune__weights": "all.caffemodel.h5", "stages__finetune__reinit": '["fc10"]'}
    for run, left_out in (("of hdf5", {"fc10"}), ("all of hdf5", set())):
        code, said = trainer.run(*arguments(**given), "--output", run, "--dry-run")
        assert code == 0, said
        assert f"-weights '{run}/finetune/start.caffemodel'" in said
        start = read_weights(trainer.folder / run / "finetune/start.caffemodel")
        assert start.keys() == source.keys() - left_out
        assert not moved(source, start)
        given.pop("stages__finetune__reinit", None)


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"network__frozen": '["fc12"]'}, "network.frozen: fc12 is not a layer"),
        (
            {"stages__finetune__reinit": '["conv1z"]'},
            "stages.finetune.reinit: conv1z is not a layer",
        ),
        (
            {"stages__finetune__weights": "nowhere.caffemodel"},
            "the start weights nowhere.caffemodel do not exist",
        ),
        ({"stages__finetune__weights": "."}, "the start weights . are a folder; name a file in it"),
        (
            {"stages__finetune__weights": "headless.caffemodel", "network__frozen": '["res5a_branch2b"]'},
            "which lacks res5a_branch2b",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    trainer: Trainer, settings: dict[str, str], says: str
) -> None:
    source = trainer.folder / RUN / "sparse" / f"{PREFIX}_iter_4.caffemodel"
    (trainer.folder / "headless.caffemodel").write_bytes(without_layers(source, ["res5a_branch2b"]))
    code, said = trainer.run(*arguments(**settings), "--output", "refused")
    assert code == 2
    assert says in said
    assert not (trainer.folder / "refused").exists()


@pytest.mark.caffe
def test_weights_of_the_other_kind_of_caffe_are_to_be_converted_not_left_out(trainer: Trainer) -> None:
    path = trainer.folder / RUN / "sparse" / f"{PREFIX}_iter_4.caffemodel"
    net = messages(Dialect.BVLC).NetParameter.FromString(path.read_bytes())
    for norm, scale in zip(net.layer, net.layer[1:], strict=False):
        if norm.type == "BatchNorm":
            norm.blobs.extend(scale.blobs)
    (trainer.folder / "fork.caffemodel").write_bytes(net.SerializeToString())
    given = {"stages__finetune__weights": "fork.caffemodel"}
    code, said = trainer.run(*arguments(**given), "--output", "refused")
    assert code == 2
    assert "conv1a/bn: its batch normalization is caffe-jacinto's, of five blobs" in said
    assert "python -m caffe_jacinto.weights convert" in said
    assert "reinit" not in said


@pytest.mark.caffe
def test_a_dry_run_shows_the_rest_where_the_start_weights_are_missing(trainer: Trainer) -> None:
    given = {"stages__finetune__weights": "nowhere.caffemodel", "stages__finetune__reinit": '["fc10"]'}
    code, said = trainer.run(*arguments(**given), "--output", "no weights", "--dry-run")
    assert code == 2
    assert said.splitlines()[-1].endswith(
        "the start weights nowhere.caffemodel do not exist; train them first or name others"
    )
    assert {path.name for path in (trainer.folder / "no weights/finetune").iterdir()} == {
        *("train.prototxt", "val.prototxt", "deploy.prototxt", "solver.prototxt", "run.sh")
    }
