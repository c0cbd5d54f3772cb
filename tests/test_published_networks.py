"""The three networks against the files that their authors published, message for message."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from normalised_net import first_difference, normalised_net

from caffe_jacinto.build_net import main
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec import shapes as complexity
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.load import load_recipe

FORK, STOCK = Dialect.CAFFE_JACINTO, Dialect.BVLC
DIALECTS = {"jacintonet11": FORK, "resnet10": STOCK, "bvlc_alexnet": STOCK}

PUBLISHED = [
    # network, our file, phase, the published file
    ("jacintonet11", "train", "TRAIN", "jacintonet11_imagenet_caffe_jacinto/train.prototxt"),
    ("jacintonet11", "val", "TEST", "jacintonet11_imagenet_caffe_jacinto/test.prototxt"),
    ("jacintonet11", "deploy", "TEST", "jacintonet11_imagenet_caffe_jacinto/deploy.prototxt"),
    ("resnet10", "train", "TRAIN", "resnet10_cvgj/train.prototxt"),
    ("resnet10", "val", "TEST", "resnet10_cvgj/test.prototxt"),
    ("resnet10", "deploy", "TEST", "resnet10_cvgj/deploy.prototxt"),
    ("bvlc_alexnet", "train", "TRAIN", "bvlc_alexnet/train_val.prototxt"),
    ("bvlc_alexnet", "val", "TEST", "bvlc_alexnet/train_val.prototxt"),
    ("bvlc_alexnet", "deploy", "TEST", "bvlc_alexnet/deploy.prototxt"),
]
SOLVERS = [
    ("jacintonet11", "jacintonet11_imagenet_caffe_jacinto/solver.prototxt"),
    ("resnet10", "resnet10_cvgj/train.solver"),
    ("bvlc_alexnet", "bvlc_alexnet/solver.prototxt"),
]
PATHS = ("net", "train_net", "test_net", "snapshot_prefix")
FILES = ("train.prototxt", "val.prototxt", "deploy.prototxt", "solver.prototxt")
GIGAMACS = {"jacintonet11": 0.4063, "resnet10": 0.8892, "bvlc_alexnet": 0.7244}
"""Counted from the published files."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<network>/<dialect>/*.prototxt, each with no more arguments than that."""
    folder = tmp_path_factory.mktemp("built")
    for name, dialect in itertools.product(DIALECTS, Dialect):
        arguments = [] if dialect is DIALECTS[name] else ["--dialect", dialect.value]
        assert main(["--network", name, "--output", str(folder / name / dialect.value), *arguments]) == 0
    return folder


@pytest.mark.parametrize(("network", "file", "phase", "published_file"), PUBLISHED)
def test_the_network_is_the_published_one(
    built: Path, published: Path, network: str, file: str, phase: str, published_file: str
) -> None:
    dialect = DIALECTS[network]
    theirs = (published / "prototxt" / published_file).read_text()
    ours = (built / network / dialect.value / f"{file}.prototxt").read_text()
    assert (
        first_difference(
            normalised_net(ours, dialect, phase, file), normalised_net(theirs, dialect, phase, published_file)
        )
        is None
    )


@pytest.mark.parametrize(("network", "published_file"), SOLVERS)
def test_the_solver_is_the_published_one_apart_from_paths(
    built: Path, published: Path, network: str, published_file: str
) -> None:
    dialect = DIALECTS[network]
    theirs = parse_solver((published / "prototxt" / published_file).read_text(), dialect, published_file)
    ours = parse_solver((built / network / dialect.value / "solver.prototxt").read_text(), dialect, "ours")
    for solver in (ours, theirs):
        for path in PATHS:
            solver.ClearField(path)
        assert solver.test_iter
    assert first_difference(ours, theirs) is None


# Of other publishers: our network and file, the phase, the published file in networks/.
OTHERS = [
    ("mobilenet_v1", "deploy", "TEST", "mobilenet_v1_deploy"),
    ("mobilenet_v2", "deploy", "TEST", "mobilenet_v2_deploy"),
    ("squeezenet_v1_1", "train", "TRAIN", "squeezenet_1.1_train_val"),
    ("squeezenet_v1_1", "val", "TEST", "squeezenet_1.1_train_val"),
    ("squeezenet_v1_1", "deploy", "TEST", "squeezenet_1.1_deploy"),
    ("resnet18", "train", "TRAIN", "resnet18_holmes_train"),
    ("resnet18", "val", "TEST", "resnet18_holmes_train"),
    ("resnet18", "deploy", "TEST", "resnet18_holmes_deploy"),
    ("resnet50", "deploy", "TEST", "resnet50_kaiming_deploy"),
    ("vgg16", "deploy", "TEST", "vgg16_crowson_deploy"),
    ("googlenet", "train", "TRAIN", "bvlc_googlenet_train_val"),
    ("googlenet", "val", "TEST", "bvlc_googlenet_train_val"),
    ("googlenet", "deploy", "TEST", "bvlc_googlenet_deploy"),
]
SETTINGS = {
    "squeezenet_v1_1": [
        *("network.crop_size=227", "training.batch_size=512", "training.iter_size=16"),
        *("data.mirror=false", "training.val_batch_size=25"),
    ],
    "resnet18": ["training.batch_size=128", "training.iter_size=1"],
    "googlenet": ["training.batch_size=32", "training.iter_size=1"],
}


@cache
def other_files(network: str, dialect: Dialect, *settings: str) -> dict[str, str]:
    """What `build_net` writes, with JacintoNet11's training but for what the publishers set otherwise."""
    given = [f"network.name={network}", "network.strides=", *SETTINGS.get(network, ()), *settings]
    recipe = load_recipe("imagenet_jacintonet11", given)
    return stage_files(
        recipe,
        "initial",
        dialect,
        folder="out",
        gpus=(),
        iter_size=recipe.training.iter_size,
        solver_mode_gpu=False,
        val_images=1000,
    )


@pytest.mark.parametrize(("network", "file", "phase", "published_file"), OTHERS)
def test_networks_of_others_are_the_published_ones(
    published: Path, network: str, file: str, phase: str, published_file: str
) -> None:
    theirs = (published / "networks" / f"{published_file}.prototxt").read_text()
    ours = other_files(network, STOCK)[f"{file}.prototxt"]
    nets = [normalised_net(text, STOCK, phase) for text in (ours, theirs)]
    for net in nets if file == "deploy" else ():
        net.layer[0].input_param.shape[0].dim[0] = 1
        for layer in net.layer:  # initial values have no effect there
            for name in ("convolution_param", "inner_product_param"):
                if layer.HasField(name):
                    getattr(layer, name).ClearField("weight_filler")
                    getattr(layer, name).ClearField("bias_filler")
    if network == "vgg16":  # published without its inner products
        last = next(at for at, layer in enumerate(nets[0].layer) if layer.name == "pool5")
        del nets[0].layer[last + 1 :]
    assert first_difference(*nets) is None


@pytest.mark.parametrize("network", dict.fromkeys(network for network, *_ in OTHERS))
def test_networks_of_others_say_the_same_in_both_dialects(network: str) -> None:
    for file, phase in (("train", "TRAIN"), ("val", "TEST"), ("deploy", "TEST")):
        found = [
            _without_what_differs(
                normalised_net(other_files(network, dialect)[f"{file}.prototxt"], dialect, phase, file)
            )
            for dialect in (FORK, STOCK)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("width", "parameters", "megamacs"), [(1.0, 4.2, 569), (0.75, 2.6, 325), (0.5, 1.3, 149), (0.25, 0.5, 41)]
)
def test_the_widths_of_mobilenet_are_the_papers(width: float, parameters: float, megamacs: int) -> None:
    """arXiv:1704.04861, table 6: million parameters and mult-adds."""
    net = tree.parse(other_files("mobilenet_v1", STOCK, f"network.width={width}")["deploy.prototxt"])
    costs = complexity.layer_costs(net)
    weights = sum(cost.weights + cost.outputs for cost in costs if cost.weights)
    assert weights / 1e6 == pytest.approx(parameters, abs=0.06)
    assert complexity.gigamacs(net) == pytest.approx(megamacs / 1000, abs=1e-3)
    with pytest.raises(UserError, match=r"width 0\.5: that of resnet18 is fixed; give none"):
        other_files("resnet18", STOCK, "network.width=0.5")


@pytest.mark.parametrize("network", DIALECTS)
@pytest.mark.parametrize("dialect", Dialect)
def test_every_stage_parses_in_both_dialects(network: str, dialect: Dialect) -> None:
    recipe = load_recipe(f"imagenet_{network}")
    for stage in recipe.trained:
        files = stage_files(
            recipe, stage, dialect, folder="out", gpus=(0,), iter_size=1, solver_mode_gpu=True, val_images=1
        )
        assert tuple(files) == FILES
        for file, text in files.items():
            parse = parse_solver if file == "solver.prototxt" else parse_net
            assert parse(text, dialect, file).ByteSize() > 100


def test_a_field_of_the_other_dialect_or_in_another_place_does_not_parse(built: Path) -> None:
    train = (built / "resnet10" / "bvlc" / "train.prototxt").read_text()
    parse_net(train, STOCK, "train")
    for old, new in (
        ("batch_norm_param {", "batch_norm_param { scale_bias: true"),
        ("pooling_param {", "pooling_param { num_output: 3"),
        ("layer {", "sparse_mode: SPARSE_UPDATE layer {"),
    ):
        assert old in train
        with pytest.raises(UserError, match="no field named"):
            parse_net(train.replace(old, new, 1), STOCK, "train")


@pytest.mark.parametrize("network", DIALECTS)
def test_both_dialects_say_the_same_network(built: Path, network: str) -> None:
    """Apart from batch norm, the input's shift and the data layer's threads, field for field."""
    for file, phase in (("train", "TRAIN"), ("val", "TEST"), ("deploy", "TEST")):
        found = [
            _without_what_differs(
                normalised_net(
                    (built / network / dialect.value / f"{file}.prototxt").read_text(), dialect, phase, file
                )
            )
            for dialect in (FORK, STOCK)
        ]
        assert found[0] == found[1]
        assert len(found[0]) > 20


def _without_what_differs(net: Any) -> list[str]:
    kept = []
    for layer in net.layer:
        if layer.type == "Scale":
            continue
        if layer.type in ("BatchNorm", "Bias", "Power"):
            layer.ClearField("param")
            for name in ("batch_norm_param", "bias_param", "power_param"):
                layer.ClearField(name)
            layer.type = "BatchNorm" if layer.type == "BatchNorm" else "Shift"
        kept.append(str(layer))
    return kept


@pytest.mark.parametrize("network", ["jacintonet11", "resnet10"])
def test_each_batch_norm_has_its_scale_split_or_fused(built: Path, network: str) -> None:
    def layers(dialect: Dialect) -> Any:
        text = (built / network / dialect.value / "train.prototxt").read_text()
        return parse_net(text, dialect, "train").layer

    norms = [layer for layer in layers(FORK) if layer.type == "BatchNorm"]
    assert all(norm.batch_norm_param.scale_bias for norm in norms)
    assert not any(layer.type == "Scale" for layer in layers(FORK))
    stock = layers(STOCK)
    places = [place for place, layer in enumerate(stock) if layer.type == "BatchNorm"]
    assert [stock[place].name for place in places] == [norm.name for norm in norms]
    for place, norm in zip(places, norms, strict=True):
        scale = stock[place + 1]
        assert (scale.type, scale.name) == ("Scale", "scale".join(norm.name.rsplit("bn", 1)))
        assert list(scale.bottom) == list(scale.top) == list(norm.top)
        assert [param.lr_mult for param in stock[place].param] == [0, 0, 0]


@pytest.mark.parametrize("network", DIALECTS)
@pytest.mark.parametrize("dialect", Dialect)
def test_multiply_accumulates_are_those_counted(built: Path, network: str, dialect: Dialect) -> None:
    net = tree.parse((built / network / dialect.value / "deploy.prototxt").read_text())
    assert complexity.gigamacs(net) == pytest.approx(GIGAMACS[network], abs=5e-5)


# -------------------------------------------------------------------------------------- the comparison itself

SMALL = """name: "a" input: "data" input_shape { dim: 1 dim: 3 dim: 8 dim: 8 }
layer { name: "c" type: "Convolution" bottom: "data" top: "c"
        convolution_param { num_output: 4 kernel_size: 3 pad: 0 stride: 1 bias_term: true
                            bias_filler { type: "constant" value: 0 } } }
layer { name: "s" type: "Eltwise" bottom: "c" bottom: "c" top: "s" eltwise_param { operation: SUM } }
layer { name: "p" type: "Pooling" bottom: "s" top: "p" pooling_param { pool: MAX kernel_size: 2 } }
layer { name: "t" type: "ReLU" bottom: "p" top: "p" include { phase: TRAIN } }"""
SAME = """name: "a" layer { name: "data" type: "Input" top: "data"
        input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "c" type: "Convolution" bottom: "data" top: "c"
        convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "s" type: "Eltwise" bottom: "c" bottom: "c" top: "s" }
layer { name: "p" type: "Pooling" bottom: "s" top: "p" pooling_param { kernel_size: 2 stride: 1 } }"""


def test_what_is_the_same_to_caffe_compares_equal() -> None:
    old = SMALL.replace("input_shape { dim: 1 dim: 3 dim: 8 dim: 8 }", "input_dim: [1, 3, 8, 8]")
    for text in (SMALL, old):
        assert first_difference(*(normalised_net(one, STOCK, "TEST") for one in (text, SAME))) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kernel_size: 3", "kernel_size: 5", ".layer[1] (c).convolution_param.kernel_size[0] = 3"),
        ("num_output: 4", "num_output: 4 pad: 1", "convolution_param.pad[0] = 0"),
        ('name: "s"', 'name: "sum"', ".layer[2] = s"),
        ('bottom: "s"', 'bottom: "c"', ".layer[3] (p).bottom[0] = 's'"),
        ("stride: 1 ", "stride: 2 ", "pooling_param.stride"),
        ("dim: 8 } } }", "dim: 9 } } }", "input_param.shape[0].dim[3] = 8"),
        ('type: "Eltwise"', 'type: "Concat"', ".layer[2] (s).type = 'Eltwise'"),
        ("kernel_size: 3", "kernel_size: 3 bias_filler { value: 1 }", "bias_filler.value = 1.0"),
        ('top: "c"\n', 'top: "c" param { } param { lr_mult: 2 }\n', ".param[0]"),
    ],
)
def test_the_first_difference_is_told(old: str, new: str, says: str) -> None:
    assert old in SAME
    changed = SAME.replace(old, new)
    told = first_difference(*(normalised_net(one, STOCK, "TEST") for one in (SAME, changed)))
    assert told is not None
    assert says in told
