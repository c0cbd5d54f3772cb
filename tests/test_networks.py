"""What the networks are made of, without any text."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto import build_net, networks
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.netspec import shapes as complexity
from caffe_jacinto.networks import registry
from caffe_jacinto.networks.layers import BatchNorm, Convolution, MaxPooling, Network, Other, ReLU
from caffe_jacinto.networks.registry import build_network
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.render import Name, render
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.recipes.load import load_recipe

STRIDES = (2, 2, 2, 2, 2)


def convolutions(network: Network) -> dict[str, Convolution]:
    return {layer.name: layer for layer in network.layers if isinstance(layer, Convolution)}


def test_jacintonet11_has_ten_convolutions_of_the_published_sizes() -> None:
    network = build_network("jacintonet11", 1000, 224, STRIDES)
    shapes = {
        name: (c.outputs, c.kernel, c.stride, c.pad, c.group) for name, c in convolutions(network).items()
    }
    assert shapes == {
        "conv1a": (32, 5, 2, 2, 1),
        "conv1b": (32, 3, 1, 1, 4),
        **{
            f"res{n}a_branch2{half}": (outputs, 3, 1, 1, group)
            for n, outputs in ((2, 64), (3, 128), (4, 256), (5, 512))
            for half, group in (("a", 1), ("b", 4))
        },
    }
    assert network.scores == "fc1000"


@pytest.mark.parametrize("name", registry.NETWORKS)
def test_every_blob_is_made_before_it_is_read_and_names_are_unique(name: str) -> None:
    network = build_network(name, 10, 227)
    made = {"data"}
    for layer in network.layers:
        assert set(layer.bottoms) <= made
        made.add(layer.top)
    for layer in network.outputs:
        assert set(layer.bottoms) == {network.scores, "label"}
    names = [layer.name for layer in (*network.layers, *network.outputs)]
    names += [layer.scale_name for layer in network.layers if isinstance(layer, BatchNorm)]
    assert len(set(names)) == len(names)


def test_a_layer_of_any_type_is_written_with_its_fields() -> None:
    layers = (
        Other("swish", ("data",), "data", "Swish", {"swish_param": {"beta": 1.5}}),
        Other("mean", ("data",), "mean", "Reduction", {"reduction_param": {"operation": Name("MEAN")}}),
    )
    text = render("net.j2", name="any", layers=layers, dialect="bvlc", input_shape=())
    swish, mean = parse_net(text, Dialect.BVLC, "net").layer
    assert (swish.type, swish.swish_param.beta, list(swish.top)) == ("Swish", 1.5, ["data"])
    assert (mean.type, mean.reduction_param.operation) == ("Reduction", 4)
    with pytest.raises(UserError, match="is not the name of a field"):
        render(
            "net.j2", name="x", layers=(Other("x", (), "x", "X", {"a b": 1}),), dialect="bvlc", input_shape=()
        )


def test_every_convolution_of_jacintonet11_is_normalised() -> None:
    network = build_network("jacintonet11", 10, 32, (1, 1, 2, 1, 2))
    for name in convolutions(network):
        assert (
            BatchNorm(f"{name}/bn", (name,), name, moving_average_fraction=0.99, eps=1e-4) in network.layers
        )
        assert ReLU(f"{name}/relu", (name,), name) in network.layers


@settings(max_examples=50)
@given(st.sampled_from(registry.NETWORKS), st.sampled_from(Dialect), st.integers(2, 50), st.integers(1, 300))
def test_any_crop_is_refused_or_gives_a_network_whose_shapes_are_known(
    name: str, dialect: Dialect, classes: int, crop: int
) -> None:
    settings = [f"network.name={name}", f"data.num_classes={classes}", f"network.crop_size={crop}"]
    settings += ["network.strides="] * (name != "jacintonet11")
    settings += ['data.mean_file="mean.binaryproto"'] * (name == "bvlc_alexnet")
    recipe = load_recipe("imagenet_jacintonet11", settings)
    try:
        files = stage_files(
            recipe, "initial", dialect, folder="out", gpus=(), iter_size=1, solver_mode_gpu=False
        )
    except UserError as error:
        smallest = re.search(r"a crop of at least (\d+)", str(error))
        assert smallest
        assert crop < int(smallest[1]) < 224
        return
    costs = complexity.layer_costs(tree.parse(files["deploy.prototxt"]))
    assert all(cost.macs for cost in costs)
    assert costs[-1].outputs == classes


@given(st.tuples(*[st.integers(1, 4)] * 5))
def test_strides_are_those_of_conv1a_and_the_poolings(strides: tuple[int, ...]) -> None:
    network = build_network("jacintonet11", 10, 4**5, strides)
    poolings = [layer for layer in network.layers if isinstance(layer, MaxPooling)]
    assert (convolutions(network)["conv1a"].stride, *(p.stride for p in poolings)) == strides
    assert all(p.kernel == p.stride for p in poolings)


@pytest.mark.parametrize(
    ("name", "crop", "strides", "says"),
    [
        ("jacintonet12", 224, STRIDES, "did you mean jacintonet11?"),
        ("vgg", 224, STRIDES, "did you mean vgg16? known: bvlc_alexnet, googlenet, jacintonet11, "),
        ("jacintonet11", 224, (2, 2, 2, 2), "five whole numbers"),
        ("jacintonet11", 224, (2, 2, 2, 2, 2, 2), "five whole numbers"),
        ("jacintonet11", 224, (2, 2, 2, 2, 0), "five whole numbers"),
        ("jacintonet11", 31, STRIDES, "a crop of at least 32"),
        ("jacintonet11", 0, STRIDES, "at least 2 classes and 1 pixel"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, crop: int, strides: tuple[int, ...], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        build_network(name, 1000, crop, strides)


def test_the_smallest_crop_that_the_strides_leave_a_pixel_of() -> None:
    assert build_network("jacintonet11", 1000, 32, STRIDES).crop_size == 32


def test_a_mean_image_is_asked_for_and_replaces_mean_values() -> None:
    def train(name: str, mean_file: str) -> str:
        recipe = load_recipe(f"imagenet_{name}", [f"data.mean_file={mean_file}"])
        files = stage_files(
            recipe, "initial", Dialect.BVLC, folder="out", gpus=(), iter_size=2, solver_mode_gpu=False
        )
        return files["train.prototxt"]

    with pytest.raises(UserError, match="LMDB OUT, and name it as data"):
        train("bvlc_alexnet", "")
    assert 'mean_file: "m"' in train("bvlc_alexnet", "m")
    assert "mean_value: 0" in train("jacintonet11", "")
    with_mean = train("jacintonet11", "m")
    assert 'mean_file: "m"' in with_mean
    assert "mean_value" not in with_mean  # Caffe takes one or the other.


def test_which_networks_have_no_statistics_to_estimate() -> None:
    without = [name for name in registry.NETWORKS if not build_network(name, 10, 227).has_batch_norm]
    assert without == ["bvlc_alexnet", "googlenet", "squeezenet_v1_1", "vgg16"]


def test_auxiliary_classifiers_are_trained_and_frozen_by_name_but_not_deployed() -> None:
    network = build_network("googlenet", 10, 224)
    names = [layer.name for layer in network.trained_layers]
    assert "loss1/classifier" in names
    assert names.index("loss2/ave_pool") == names.index("inception_4d/output") + 1
    assert not any(layer.name.startswith(("loss1", "loss2")) for layer in network.layers)
    found = registry.layers_to_name(network, ["loss1/classifier", "loss2/classifier", "loss3/classifier"])
    assert found == ["loss1/classifier", "loss2/classifier", "loss3/classifier"]
    frozen = registry.for_finetuning(network, ["loss1/conv", "conv1/7x7_s2"], 10)
    rates = {layer.name: layer.lr_mult for layer in frozen.trained_layers if hasattr(layer, "lr_mult")}
    assert (rates["loss1/conv"], rates["conv1/7x7_s2"], rates["loss3/classifier"]) == (0, 0, 10)
    assert rates["loss1/classifier"] == 1


# ------------------------------------------------------------------------------ a network of the user's own

GUIDE = Path(__file__).parents[1] / "docs" / "networks.md"


@pytest.fixture
def tinynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's worked example, done: its file beside the networks' and its line in the registry."""
    (file,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (line,) = re.findall(r'^    ("tinynet",)$', GUIDE.read_text(), re.MULTILINE)
    (tmp_path / "tinynet.py").write_text(file)
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "caffe_jacinto.networks.tinynet", raising=False)
    for module in (registry, build_net):
        monkeypatch.setattr(module, "NETWORKS", (*registry.NETWORKS, ast.literal_eval(line)[0]))


def example_commands() -> list[list[str]]:
    """The guide's build_net commands for its example."""
    commands = re.findall(r"^    python -m caffe_jacinto.build_net (.*tinynet.*)$", GUIDE.read_text(), re.M)
    return [shlex.split(command) for command in commands]


def test_the_guides_own_network_is_built_in_both_dialects(
    tinynet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = example_commands()
    assert len(commands) == 2
    for command in commands:
        assert build_net.main(command) == 0
    stock = (tmp_path / "nets/tinynet/train.prototxt").read_text()
    fork = (tmp_path / "nets/tinynet_fork/train.prototxt").read_text()
    assert 'type: "Scale"' in stock
    assert 'type: "Scale"' not in fork
    net = tree.parse((tmp_path / "nets/tinynet/deploy.prototxt").read_text())
    convolutions = 32 * 32 * 27 * 32 + 16 * 16 * (9 * 32 * 64 + 32 * 64) + 8 * 8 * 9 * 64 * 64
    assert complexity.gigamacs(net) == pytest.approx((convolutions + 640) / 1e9)
    with pytest.raises(UserError, match="those of tinynet are fixed"):
        build_net.main([*commands[0], "--strides", "1,2"])


@pytest.mark.caffe
def test_caffe_loads_the_guides_own_network(
    tinynet: None, caffe_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_net.main(example_commands()[0]) == 0
    load = "import sys; sys.path.insert(0, sys.argv[1]); import caffe; caffe.Net(sys.argv[2], caffe.TEST)"
    command = [sys.executable, "-c", load, str(caffe_engine.info.pycaffe), "nets/tinynet/deploy.prototxt"]
    subprocess.run(command, check=True, capture_output=True)
