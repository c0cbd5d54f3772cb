"""A network of the user's own: `network.prototxt` in a recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from digits_run import Trainer, write_lmdbs
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.caffemodel.fit import weights_for
from caffe_jacinto.classify import main as classify
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.pytorch.__main__ import main as caffe_torch
from caffe_jacinto.netspec.data_fit import DataSize
from caffe_jacinto.netspec.graph import TEST, layers_in, nodes_of
from caffe_jacinto.netspec.summary import summarize
from caffe_jacinto.networks.completion import complete
from caffe_jacinto.networks.registry import RECIPE_RULES
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.networks.user_network import read_user_network
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.edit import Edits
from caffe_jacinto.prototxt.render import quote
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import NetworkSettings, Recipe
from caffe_jacinto.runs import start
from caffe_jacinto.train import main as train

DIGITS = DataSize(images=50, shape=(3, 32, 32), largest=(32, 32), highest_label=9)

SMALL = """\
name: "Small"
layer {
  name: "images"  # ours
  type: "Data"
  top: "data"
  top: "label"
  include { phase: TRAIN }
  data_param { source: "train_lmdb" batch_size: 8 backend: LMDB }
}
layer {
  name: "images"
  type: "Data"
  top: "data"
  top: "label"
  include { phase: TEST }
  transform_param { crop_size: 28 }
  data_param { source: "val_lmdb" batch_size: 10 backend: LMDB }
}
layer {
  name: "conv"
  type: "Convolution"
  bottom: "data"
  top: "conv"
  param { lr_mult: 1 }
  convolution_param { num_output: 4 kernel_size: 5 weight_filler { type: "xavier" } }
}
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer {
  name: "ip"
  type: "InnerProduct"
  bottom: "conv"
  top: "ip"
  param { lr_mult: 1 }
  param { lr_mult: 2 decay_mult: 0 }
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } }
}
layer {
  name: "accuracy"
  type: "Accuracy"
  bottom: "ip"
  bottom: "label"
  top: "accuracy"
  include { phase: TEST }
}
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""

CROPPED = SMALL.replace(
    "include { phase: TRAIN }", "include { phase: TRAIN }\n  transform_param { crop_size: 28 }"
)

SMALL_SOLVER = """net: "net.prototxt" test_iter: 2 test_interval: 2 base_lr: 0.01 lr_policy: "fixed"
max_iter: 4 snapshot_prefix: "small" solver_mode: CPU
"""

SOLVER = """
[stages.initial.solver]
max_iter = 4
base_lr = 0.01
weight_decay = 5e-4
test_interval = 2
snapshot = 2
display = 1
"""


def recipe_file(folder: Path, prototxt: str | Path, more: str = "", data: str = "") -> Path:
    path = folder / "recipe.toml"
    network = f"[network]\nprototxt = '{prototxt}'\n{more}"
    path.write_text(f'[data]\ndataset = "digits"\n{data}\n{network}\n{SOLVER}')
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Loads a recipe for a network's text, with lines for its tables."""
    monkeypatch.chdir(tmp_path)

    def load(text: str = SMALL, *settings: str, network: str = "") -> Recipe:
        Path("net.prototxt").write_text(text)
        path = recipe_file(tmp_path, "net.prototxt", network)
        return load_recipe(str(path), settings, rules=RECIPE_RULES, completion=complete)

    return load


def files_of(recipe: Recipe, dialect: Dialect = Dialect.BVLC, gpus: tuple[int, ...] = ()) -> dict[str, str]:
    lmdbs = {recipe.data.train_lmdb: DIGITS, recipe.data.val_lmdb: DIGITS}
    return stage_files(
        recipe,
        "initial",
        dialect,
        folder="run",
        gpus=gpus,
        iter_size=recipe.training.iter_size,
        solver_mode_gpu=bool(gpus),
        data_sizes=lmdbs,
    )


def changed(before: str, after: str) -> list[str]:
    """The lines of a difference, removed and added."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith(("---", "+++", "@@"))]


def test_what_a_recipe_leaves_out_comes_from_the_file(own: Callable[..., Recipe]) -> None:
    recipe = own(SMALL, "training.iter_size=2")
    assert (recipe.network.name, recipe.network.crop_size) == ("Small", None)
    assert (recipe.data.train_lmdb, recipe.data.val_lmdb) == ("train_lmdb", "val_lmdb")
    assert (recipe.data.num_classes, recipe.data.mirror, recipe.data.mean_file) == (10, False, None)
    assert (recipe.training.batch_size, recipe.training.val_batch_size) == (16, 10)
    assert own(CROPPED).network.crop_size == 28


def test_a_file_that_says_it_all_is_used_as_it_is(own: Callable[..., Recipe]) -> None:
    files = files_of(own())
    assert files["train.prototxt"] == files["val.prototxt"] == SMALL
    solver = parse_solver(files["solver.prototxt"], Dialect.BVLC, "solver")
    assert (list(solver.test_iter), list(solver.test_net)) == ([5], ["run/val.prototxt"])
    assert not solver.test_state
    assert not solver.HasField("train_state")


@pytest.mark.parametrize(
    ("settings", "train_lines", "val_lines"),
    [
        (["data.train_lmdb=mine"], {"source": ('"train_lmdb"', '"mine"')}, {}),
        (["data.val_lmdb=mine"], {}, {"source": ('"val_lmdb"', '"mine"')}),
        (["training.batch_size=6"], {"batch_size": ("8", "6")}, {}),
        (["training.val_batch_size=25"], {}, {"batch_size": ("10", "25")}),
        (["network.crop_size=24"], {"crop_size": ("28", "24")}, {"crop_size": ("28", "24")}),
    ],
)
def test_what_a_recipe_states_is_set_in_the_text(
    own: Callable[..., Recipe],
    settings: list[str],
    train_lines: dict[str, tuple[str, str]],
    val_lines: dict[str, tuple[str, str]],
) -> None:
    files = files_of(own(CROPPED, *settings))
    for name, expected in (("train.prototxt", train_lines), ("val.prototxt", val_lines)):
        lines = changed(CROPPED, files[name])
        assert len(lines) == 2 * len(expected)
        for field, (before, after) in expected.items():
            assert lines[1] == lines[0].replace("-", "+", 1).replace(
                f"{field}: {before}", f"{field}: {after}"
            )
            assert f"{field}: {after}" in lines[1]


def test_frozen_layers_a_faster_head_and_mirroring(own: Callable[..., Recipe]) -> None:
    recipe = own(
        SMALL,
        "data.mirror=true",
        "network.head_lr_mult=10.0",
        "stages.initial.weights=some.caffemodel",
        'network.frozen=["conv"]',
    )
    net = parse_net(files_of(recipe)["train.prototxt"], Dialect.BVLC, "train")
    layers = {layer.name: layer for layer in net.layer if not layer.include or layer.include[0].phase == 0}
    rates = {name: [p.lr_mult for p in layers[name].param] for name in ("conv", "bn", "scale", "ip")}
    assert rates == {"conv": [0, 0], "bn": [0, 0, 0], "scale": [0, 0], "ip": [10, 20]}
    assert layers["bn"].batch_norm_param.use_global_stats
    assert layers["images"].transform_param.mirror
    assert layers["ip"].param[1].decay_mult == 0


def test_gpus_share_the_files_batch(own: Callable[..., Recipe]) -> None:
    text = files_of(own(), gpus=(0, 1))["train.prototxt"]
    assert changed(SMALL, text)[1].startswith('+ data_param { source: "train_lmdb" batch_size: 4')


def test_several_networks_that_test_keep_their_states_and_iterations(own: Callable[..., Recipe]) -> None:
    text = SMALL.replace(
        'layer {\n  name: "accuracy"',
        'layer { name: "top3" type: "Accuracy" bottom: "ip" bottom: "label" top: "top3"\n'
        '  include { phase: TEST stage: "more" } accuracy_param { top_k: 3 } }\nlayer {\n  name: "accuracy"',
    )
    recipe = own(text, network='test_stages = [[], ["more"]]\ntest_iter = [5, 2]')
    files = files_of(recipe)
    solver = parse_solver(files["solver.prototxt"], Dialect.BVLC, "solver")
    assert [list(state.stage) for state in solver.test_state] == [[], ["more"]]
    assert list(solver.test_net) == ["run/val.prototxt"] * 2
    assert list(solver.test_iter) == [5, 2]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ('name = "jacintonet11"', "network.name: is a network of this program"),
        ("strides = [1, 2, 2, 2, 2]", "network.strides: the strides are those of network.prototxt"),
        ("crop_size = 24", "net.prototxt:2: layer images has no crop_size"),
        ("test_iter = [1, 2]\ntest_levels = [0]", "give one for each network that tests"),
    ],
)
def test_what_does_not_go_with_a_prototxt_is_refused(
    own: Callable[..., Recipe], network: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        own(SMALL, network=network)
    assert "recipe.toml:" in str(caught.value)


def test_each_network_that_tests_needs_a_batch(own: Callable[..., Recipe], tmp_path: Path) -> None:
    Path("other.prototxt").write_text(SMALL.replace("batch_size: 10 ", ""))
    message = "other.prototxt:10: layer images has no batch_size; add it there"
    with pytest.raises(UserError, match=re.escape(message)):
        own(network='test_prototxt = ["net.prototxt", "other.prototxt"]')


def test_a_home_of_nobody_is_a_missing_file(own: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"~nobody-here/net\.prototxt"):
        read_user_network(NetworkSettings(name="net", prototxt="~nobody-here/net.prototxt"))


def test_the_number_of_classes_is_that_of_the_outputs(own: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"data.num_classes: 5, and net.prototxt:29: layer ip has 10 outputs"):
        own(SMALL, "data.num_classes=5")


def test_keys_of_a_prototxt_need_one() -> None:
    with pytest.raises(UserError, match=r"network.test_iter: goes with network.prototxt only"):
        load_recipe("demo_digits", ["network.test_iter=[3]"])


def test_a_file_of_an_older_form_is_brought_up_to_date(own: Callable[..., Recipe], published: Path) -> None:
    today = files_of(own(text_of(published, "lenet_train_test"), "data.train_lmdb=mine"))
    older = files_of(own(text_of(published, "v1_lenet_train_test"), "data.train_lmdb=mine"))
    for name in ("train.prototxt", "deploy.prototxt"):
        nets = [tree.parse(files[name]) for files in (today, older)]
        assert same_network(nets[0]) == same_network(nets[1])
    assert 'source: "mine"' in older["train.prototxt"]


# ------------------------------------------------------------------------------------------- deploy networks


def text_of(folder: Path, name: str) -> str:
    return (folder / f"networks/{name}.prototxt").read_text()


def same_network(net: tree.Message) -> list[Any]:
    """What a network computes: its layers but for the input and the softmax, and their parameters."""
    found = []
    for node, layer in zip(nodes_of(layers_in(net)), layers_in(net), strict=True):
        if node.type not in ("Input", "Softmax", "Dropout"):
            kernel = layer.message("convolution_param").integer("kernel_size")
            found.append((*node, kernel, layer.message("convolution_param").integer("num_output")))
    return found


@pytest.mark.parametrize("name", ["bvlc_googlenet", "squeezenet_1.1"])
def test_a_derived_deploy_network_is_the_published_one(
    own: Callable[..., Recipe], published: Path, name: str
) -> None:
    recipe = own(text_of(published, f"{name}_train_val"))
    derived = tree.parse(files_of(recipe)["deploy.prototxt"])
    theirs = tree.parse(text_of(published, f"{name}_deploy"))
    assert same_network(derived) == same_network(theirs)
    ours, other = summarize(derived, "ours"), summarize(theirs, "theirs")
    assert (ours.parameters, ours.macs) == (other.parameters, other.macs)
    last = layers_in(derived)[-1]
    assert (last.string("type"), last.strings("bottom")) == (
        "Softmax",
        layers_in(theirs)[-1].strings("bottom"),
    )


def test_two_tasks_stay_in_the_deploy_network(own: Callable[..., Recipe]) -> None:
    second = """
layer { name: "age" type: "InnerProduct" bottom: "conv" top: "age" inner_product_param { num_output: 1 } }
layer { name: "years" type: "Data" top: "years" data_param { source: "years_lmdb" batch_size: 10 } }
layer { name: "age_loss" type: "EuclideanLoss" bottom: "age" bottom: "years" top: "e" loss_weight: 0.1 }
"""
    deploy = tree.parse(files_of(own(SMALL + second))["deploy.prototxt"])
    names = [layer.string("name") for layer in layers_in(deploy, TEST)]
    assert names == ["data", "conv", "bn", "scale", "ip", "age", "ip/prob"]


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "bias_term: true",
            "bias_trem: true",
            r"net.prototxt:28: not a NetParameter .* did you mean bias_term",
        ),
        (
            'bottom: "conv"\n  top: "ip"',
            'bottom: "cnv"\n  top: "ip"',
            r":32: layer ip: bottom: no layer makes cnv",
        ),
        ('name: "scale"', 'name: "bn"', r":28: layer bn: name: line 27 has a layer of this name already"),
        (
            "crop_size: 28",
            "crop_size: 40",
            r":16: layer images: transform_param.crop_size: 40 pixels, and the",
        ),
        (
            "num_output: 10",
            "num_output: 9",
            r":36: layer ip: num_output: 9 outputs are for labels 0 to 8, and",
        ),
        (
            "include { phase: TEST }\n}",
            "include { phase: TEST }\n  accuracy_param { top_k: 11 }\n}",
            r":45: layer accuracy: accuracy_param.top_k: the 11 largest of 10 scores",
        ),
        ('top: "ip"\n  param', 'top: "data"\n  param', r":33: layer ip: top: data is made by an earlier"),
    ],
)
@pytest.mark.parametrize("way", ["recipe", "--from", "caffe-torch"])
def test_a_mistake_in_the_file_is_one_line_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
    message: str,
    way: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    assert before in SMALL
    Path("net.prototxt").write_text(SMALL.replace(before, after, 1))
    if way == "recipe":
        recipe_file(tmp_path, "net.prototxt")
    else:
        Path("solver.prototxt").write_text(SMALL_SOLVER)
    with pytest.raises(UserError) as caught:
        if way == "caffe-torch":
            caffe_torch(["train", "-solver", "solver.prototxt"])
        else:
            source = ["recipe.toml"] if way == "recipe" else ["--from", "solver.prototxt"]
            train([*source, "--engine", "torch", "--output", "run"])
    assert len([line for line in caught.value.lines() if re.search(message, line)]) == 1
    assert not Path("run").exists()


MISSPELT = ('"BatchNorm"', '"BatchNorn"')
TWO_WEIGHTS = ('top: "loss" }', 'top: "loss" loss_weight: [1, 2] }')
OTHER_CROP = ("crop_size: 28", "crop_size: 20")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("torch", MISSPELT, r"28: layer bn \(BatchNorn\): this type .* did you mean BatchNorm\?"),
        ("torch", OTHER_CROP, r"31: layer ip has blobs of other shapes than in the training network; make "),
        ("bvlc", MISSPELT, r"28: layer bn \(BatchNorn\): .* refuses it: .* Unknown layer type: BatchNorn"),
        ("bvlc", OTHER_CROP, r"31: layer ip \(InnerProduct\): .* refuses it: .* Cannot share param 0"),
    ],
)
@pytest.mark.caffe
def test_what_an_engine_refuses_is_one_line_in_the_users_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caffe_engine: Engine,
    kind: str,
    change: tuple[str, str],
    message: str,
) -> None:
    """And not one for each file of each stage, which are not written yet."""
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    assert change[0] in CROPPED
    Path("net.prototxt").write_text(CROPPED.replace(*change, 1))
    Path("solver.prototxt").write_text(SMALL_SOLVER)
    engine = {"torch": ["--engine", "torch"], "bvlc": ["--caffe", str(caffe_engine.info.executable)]}
    with pytest.raises(UserError) as caught:
        train(["--from", "solver.prototxt", *engine[kind], "--output", "run"])
    (found,) = (line for line in caught.value.lines() if not line.startswith("stage sparse: "))
    assert re.match(rf"net\.prototxt:{message}", found)


def test_losses_may_have_one_name_as_in_caffe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in its examples/mnist/mnist_autoencoder.prototxt."""
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    loss = CROPPED[CROPPED.index('layer { name: "loss"') :]
    Path("net.prototxt").write_text(CROPPED + loss.replace('top: "loss"', 'top: "second" loss_weight: 0.5'))
    Path("solver.prototxt").write_text(SMALL_SOLVER.replace("max_iter: 4", "max_iter: 0"))
    assert caffe_torch(["train", "-solver", "solver.prototxt"]) == 0
    tested = re.findall(r"Test net output #\d: (loss|second) = (\S+)", capfd.readouterr().err)
    assert [name for name, _ in tested[-2:]] == ["loss", "second"]
    assert tested[-2][1] == tested[-1][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (MISSPELT, "27: layer bn (BatchNorn): this type of layer is not supported; did you mean BatchNorm?"),
        (TWO_WEIGHTS, "46: layer loss (SoftmaxWithLoss): 2 of loss_weight for 1 top; give one for each"),
        (OTHER_CROP, "30: layer ip has blobs of other shapes than in the training network; make the layers"),
    ],
)
def test_what_caffe_torch_refuses_has_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    change: tuple[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    Path("net.prototxt").write_text(SMALL.replace(*change, 1))
    Path("solver.prototxt").write_text(SMALL_SOLVER)
    with pytest.raises(SystemExit):
        caffe_torch(["train", "-solver", "solver.prototxt"])
    assert f"] net.prototxt:{message}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("num_output: 10\n", "num_output: 9\n", r":124: layer ip2: num_output: 9 outputs are for labels 0"),
        ('bottom: "ip1"\n  top: "ip2"', 'bottom: "ip3"\n  top: "ip2"', r":119: layer ip2: bottom: no layer"),
        ('source: "', 'batch: 3 source: "', r":8: not a NetParameter"),
    ],
)
def test_a_mistake_in_an_older_file_has_its_line_there(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    text = re.sub(r'source: "[^"]*"', 'source: "train_lmdb"', text_of(published, "v1_lenet_train_test"))
    assert before in text
    Path("net.prototxt").write_text(text.replace(before, after, 1))
    Path("solver.prototxt").write_text(SMALL_SOLVER)
    for run in (
        lambda: caffe_torch(["train", "-solver", "solver.prototxt"]),
        lambda: train(["--from", "solver.prototxt", "--engine", "torch", "--output", "run"]),
    ):
        with pytest.raises(UserError, match=message):
            run()


def test_a_mistake_in_an_older_form_has_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "old.prototxt"
    path.write_text(
        """layers { name: "d" type: DATA top: "data" top: "label" data_param { source: "x" batch_size: 2 } }
# a comment, which the form of today has no place for
layers {
  name: "conv"
  type: CONVOLUTION
  bottom: "data" top: "conv" blobs_lr: 1
  convolution_param {
    num_output: 4
    kernel_h: 3
  }
}

layers { name: "ip" type: INNER_PRODUCT
  bottom: "cnv" top: "ip" inner_product_param { num_output: 3 } }
layers { name: "loss" type: SOFTMAX_LOSS bottom: "ip" bottom: "label" top: "loss" }
"""
    )
    with pytest.raises(UserError) as caught:
        read_user_network(NetworkSettings(name="old", prototxt=str(path)))
    assert [line.partition(";")[0] for line in caught.value.lines()] == [
        f"{path}:14: layer ip: bottom: no layer makes cnv",
        f"{path}:7: layer conv: convolution_param.kernel_w: is missing, and kernel_h is given",
    ]


# ---------------------------------------------------------------------------------------------------- edits


values = st.recursive(
    st.one_of(st.integers(-9, 9).map(str), st.text(max_size=5).map(quote)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(
        lambda fields: (
            "{\n" + "".join(f"  {name}: {value}  # {name}\n" for name, value in fields.items()) + "}"
        )
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.sampled_from("abcd"), values), max_size=6), st.sampled_from("abcd"))
def test_an_edit_changes_one_field_and_nothing_else(fields: list[tuple[str, str]], name: str) -> None:
    text = "".join(f"{key}: {value} # comment\n" for key, value in fields)
    message = tree.parse(text)
    edits = Edits(text)
    edits.set(message, name, "7")
    after = tree.parse(edits.text())
    assert after.all(name) == [7]
    others = [
        (key, str(value))
        for key, value in message.fields
        if key != name and not isinstance(value, tree.Message)
    ]
    kept = [
        (key, str(value))
        for key, value in after.fields
        if key != name and not isinstance(value, tree.Message)
    ]
    assert kept == others
    assert edits.text().count("# comment") >= len([key for key, _ in fields if key != name])


# --------------------------------------------------------------------------------------------- real training


LISTS = {
    "ImageData": 'image_data_param { source: "%s.txt" batch_size: 10 root_folder: "digits/%s/" new_height: 28'
    " new_width: 28 }",
    "HDF5Data": 'hdf5_data_param { source: "%s_files.txt" batch_size: 10 }',
}


def write_lists(folder: Path) -> None:
    """Lists of 320 and 50 digits for ImageData, ``train.txt`` and ``val.txt``, and the same in HDF5 files."""
    write_lmdbs(folder)
    for name, count in (("train", 320), ("val", 50)):
        lines = (folder / f"digits/{name}.txt").read_text().splitlines()
        chosen = lines[:: len(lines) // count][:count]
        (folder / f"{name}.txt").write_text("\n".join(chosen) + "\n")
        pixels, labels = [], []
        for line in chosen:
            path, label = line.rsplit(" ", 1)
            image = cv2.imread(str(folder / "digits" / name / path))
            pixels.append(cv2.resize(image, (28, 28)).transpose(2, 0, 1))
            labels.append(int(label))
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["data"], file["label"] = np.float32(pixels), np.float32(labels)
        (folder / f"{name}_files.txt").write_text(f"{name}.h5\n")


def with_list(kind: str) -> str:
    """The network with its data from lists."""
    text = SMALL.replace("  transform_param { crop_size: 28 }\n", "").replace('"Data"', f'"{kind}"')
    for name, batch in (("train", 8), ("val", 10)):
        data = f'data_param {{ source: "{name}_lmdb" batch_size: {batch} backend: LMDB }}'
        assert data in text
        text = text.replace(data, LISTS[kind].replace("%s", name))
    return text


@pytest.mark.caffe
@pytest.mark.parametrize("engine", ["bvlc", "torch"])
@pytest.mark.parametrize("kind", LISTS)
def test_data_from_lists_are_trained_and_checked(
    caffe_engine: Engine, tmp_path: Path, kind: str, engine: str
) -> None:
    write_lists(tmp_path)
    (tmp_path / "net.prototxt").write_text(with_list(kind))
    recipe = recipe_file(tmp_path, "net.prototxt")
    pruning = 'target = 0.3\nstart_iter = 1\nstep_iter = 1\nby = "network"\ninner_products = true\n'
    recipe.write_text(f"{recipe.read_text()}[stages.initial.sparse]\n{pruning}")
    trainer = Trainer(None if engine == "torch" else caffe_engine.info.executable, tmp_path)
    code, said = trainer.run("recipe.toml", "--output", "run")
    assert code == 0, said
    assert "data: 320 training images, 50 validation images" in said
    assert "initial: finished, 4 iterations" in said
    assert "dim: 1 dim: 3 dim: 28 dim: 28" in (tmp_path / "run/initial/deploy.prototxt").read_text()


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("ImageData", ("train.txt", "0 a/nowhere.png 3\n"), r"train.txt:321: .*nowhere.png does not exist"),
        ("ImageData", ("train.txt", "0.png three\n"), r"train.txt:321: "),
        (
            "ImageData",
            ("net.prototxt", ("num_output: 10", "num_output: 9")),
            r":35: layer ip: num_output: 9 out",
        ),
        (
            "ImageData",
            ("net.prototxt", ("new_height: 28", "new_height: 27")),
            r"crop_size: 28 pixels, and the",
        ),
        ("HDF5Data", ("train_files.txt", "none.h5\n"), r"train_files.txt:2: none.h5 does not exist"),
        (
            "HDF5Data",
            ("net.prototxt", ("num_output: 10", "num_output: 9")),
            r":35: layer ip: num_output: 9 out",
        ),
    ],
)
def test_a_mistake_in_a_list_is_one_line_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, spoil: tuple[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lists(tmp_path)
    text = with_list(kind)
    if "crop_size" in message:
        text = text.replace(
            "include { phase: TRAIN }", "include { phase: TRAIN } transform_param { crop_size: 28 }"
        )
    Path("net.prototxt").write_text(text)
    name, change = spoil
    before = Path(name).read_text()
    Path(name).write_text(before + change if isinstance(change, str) else before.replace(*change))
    recipe_file(tmp_path, "net.prototxt")
    with pytest.raises(UserError) as caught:
        train(["recipe.toml", "--engine", "torch", "--output", "run"])
    assert len([line for line in caught.value.lines() if re.search(message, line)]) == 1, caught.value.lines()
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "mine/network.prototxt",
            None,
            "mine/network.prototxt is the network itself, and the run would write",
        ),
        (
            "mine/network.prototxt",
            "name: 'other'\n",
            "mine/network.prototxt exists, and is not a copy of net",
        ),
        ("mine/network_train.prototxt", CROPPED, "mine already exists"),
    ],
)
def test_no_file_of_the_users_is_replaced(
    file: str, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    Path("mine").mkdir()
    Path(file).write_text(text or CROPPED)
    Path("net.prototxt").write_text(CROPPED)
    recipe_file(tmp_path, "net.prototxt" if text else file, "head_lr_mult = 2.0")
    with pytest.raises(UserError, match=message):
        train(["recipe.toml", "--output", "mine", "--dry-run"])
    assert [path.name for path in Path("mine").iterdir()] == [Path(file).name]
    assert Path(file).read_text() == (text or CROPPED)


@pytest.mark.parametrize(
    "there", [None, (), ("network.prototxt",), ("network.prototxt", "network_2.prototxt")]
)
def test_where_slurm_refuses_only_what_was_written_is_removed(
    there: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> list[str]:
        assert {"run.json", "report.html", "network.prototxt"} <= {path.name for path in mine.iterdir()}
        (mine / "slurm").mkdir()
        (mine / "slurm/script.sh").touch()
        raise UserError("Slurm refuses the job")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "check_slurm", lambda: None)
    monkeypatch.setattr(start, "submit", refuse)
    write_lmdbs(tmp_path)
    mine = Path("mine")
    Path("net.prototxt").write_text(CROPPED)
    if there is not None:
        mine.mkdir()
        for name in there:
            (mine / name).write_text(CROPPED)
    recipe_file(tmp_path, "net.prototxt", "head_lr_mult = 2.0")
    with pytest.raises(UserError, match="Slurm refuses"):
        train(["recipe.toml", "--engine", "torch", "--output", "mine", "--slurm"])
    assert mine.exists() is (there is not None)
    if there is not None:
        assert {path.name: path.read_text() for path in mine.iterdir()} == dict.fromkeys(there, CROPPED)


@pytest.mark.caffe
@pytest.mark.parametrize("engine", ["bvlc", "torch"])
def test_a_run_trains_the_users_network_and_resumes_without_its_file(
    caffe_engine: Engine, tmp_path: Path, engine: str
) -> None:
    write_lmdbs(tmp_path)
    own = tmp_path / "net.prototxt"
    own.write_text(CROPPED)
    recipe_file(tmp_path, own.name, "head_lr_mult = 2.0")
    trainer = Trainer(None if engine == "torch" else caffe_engine.info.executable, tmp_path)
    code, said = trainer.run("recipe.toml", "--output", "run", "--dry-run")
    assert code == 0, said
    assert "run/initial/val.prototxt: net.prototxt as it is" in said
    assert re.search(r"train.prototxt: net.prototxt with these changes:\n.*\n  -  param { lr_mult: 1 }", said)
    own.unlink()
    code, said = trainer.run("--resume", "run")
    assert code == 0, said
    assert "initial: finished, 4 iterations" in said
    assert (tmp_path / "run/network.prototxt").read_text() == CROPPED
    assert (tmp_path / "run/initial/digits_Small_iter_4.caffemodel").is_file()
    assert trainer.states("run") == {"initial": "finished", "test": "finished"}


@pytest.mark.caffe
def test_the_stages_of_a_state_hold_in_every_command(
    caffe_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In pycaffe, which recalibrates batch norms, and in what takes its preprocessing from val.prototxt."""
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    images, phases = (
        CROPPED[CROPPED.index("layer {") : CROPPED.index('layer {\n  name: "conv"')],
        ("TRAIN", "TEST"),
    )
    others = re.sub(r'source: "\w+"', 'source: "nowhere"', images)
    text = CROPPED.replace(images, "OTHERS OURS")
    for name, part in (("OTHERS", others), ("OURS", images)):
        for phase in phases:
            part = part.replace(f"phase: {phase} ", f'phase: {phase} stage: "{name.lower()}" ')
        text = text.replace(name, part)
    Path("net.prototxt").write_text(text)
    state = 'train_stages = ["ours"]\ntest_stages = [["ours"]]\n'
    recipe_file(tmp_path, "net.prototxt", state)
    trainer = Trainer(caffe_engine.info.executable, tmp_path)
    code, said = trainer.run("recipe.toml", "--output", "run")
    assert code == 0, said
    top1 = re.findall(r"initial: finished, .* top-1 ([\d.]+) with recalibrated", said)
    capsys.readouterr()
    assert classify(["run", "--", "val_lmdb"]) == 0
    assert f"top-1 {100 * float(top1[0]):.2f} %" in capsys.readouterr().out


SHARING = (
    CROPPED.replace('bottom: "data"\n  top: "conv"', 'bottom: "data"\n  top: "first"')
    .replace("num_output: 4 ", "num_output: 32 ")
    .replace(
        'layer { name: "bn"',
        """layer { name: "twice" type: "Convolution" bottom: "first" top: "twice" param { name: "w" }
  convolution_param { num_output: 32 kernel_size: 3 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "again" type: "Convolution" bottom: "twice" top: "conv" param { name: "w" }
  convolution_param { num_output: 32 kernel_size: 3 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "bn\"""",
    )
)

IN_HDF5 = """
[stages.sparse]
start = "initial"
[stages.sparse.solver]
max_iter = 4
base_lr = 1e-4
weight_decay = 0
snapshot = 2
snapshot_format = "HDF5"
[stages.sparse.sparse]
start_iter = 1
step_iter = 1
step_factor = 0.3
target = 0.5
threshold_maxratio = 10.0
threshold_value_max = 10.0
"""


@pytest.mark.caffe
@pytest.mark.parametrize("engine", ["bvlc", "torch"])
def test_snapshots_in_hdf5_are_resumed_pruned_tested_and_classified(
    caffe_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Stock Caffe takes an HDF5 file for an empty one: it gets copies in binary form. Layers share a blob."""
    monkeypatch.chdir(tmp_path)
    write_lmdbs(tmp_path)
    Path("net.prototxt").write_text(SHARING)
    recipe = recipe_file(tmp_path, "net.prototxt")
    slow = recipe.read_text().replace("base_lr = 0.01", 'base_lr = 1e-4\nsnapshot_format = "HDF5"')
    recipe.write_text(slow + IN_HDF5)
    trainer = Trainer(None if engine == "torch" else caffe_engine.info.executable, tmp_path)
    code, said = trainer.run("recipe.toml", "--output", "run", "--dry-run")
    assert code == 0, said
    prefix = "run/initial/digits_Small"
    Path("short.prototxt").write_text(
        Path("run/initial/solver.prototxt").read_text().replace("random_seed: ", "random_seed: 7")
    )
    assert caffe_torch(["train", "-solver", "short.prototxt"]) == 0
    for name in ("caffemodel", "solverstate"):
        Path(f"{prefix}_iter_4.{name}.h5").unlink()
    net = parse_net(SHARING, Dialect.BVLC, "net")
    before = weights_for(Path(f"{prefix}_iter_2.caffemodel.h5"), net)
    code, said = trainer.run("--resume", "run")
    assert code == 0, said
    assert "resumes at iteration 2" in said
    found = [
        weights_for(Path(f"run/{stage}/digits_Small_iter_4.caffemodel.h5"), net)
        for stage in ("initial", "sparse")
    ]
    # At so low a rate the weights stay near those of the snapshot: not those that another seed draws.
    for weights, share in zip(found, (0.05, 1), strict=True):
        far = np.linalg.norm(weights["twice"][0] - before["twice"][0]) / np.linalg.norm(before["twice"][0])
        assert far < share
    assert (found[1]["twice"][0] == 0).mean() > 0.5
    assert not list(Path("run").glob("*/digits_*.caffemodel"))
    losses = re.findall(r"loss = (\S+) \(\*", trainer.log("run", "sparse"))
    assert f"loss = {losses[-1]} (*" in trainer.log("run", "test")
    assert classify(["run", "--", "digits/val"]) == 0
