"""`build_net --from FILE --dialect D`: a prototxt of one dialect in the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from caffe_jacinto.build_net import main as build_net
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.networks.translate import translate
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.recipes.load import load_recipe

STOCK, FORK = Dialect.BVLC, Dialect.CAFFE_JACINTO

NORM = """\
name: "small"
input: "data"
input_shape { dim: 1 dim: 3 dim: 8 dim: 8 }
# a comment
layer { name: "norm" type: "BatchNorm" bottom: "data" top: "n" include { phase: TRAIN }
  batch_norm_param { use_global_stats: false } }
layer { name: "norm" type: "BatchNorm" bottom: "data" top: "n" include { phase: TEST }
  batch_norm_param { use_global_stats: true eps: 1e-9 } }
layer { name: "norm_scale" type: "Scale" bottom: "n" top: "s" param { lr_mult: 2 }
  scale_param { filler { value: 0.5 } } }
layer { name: "relu" type: "ReLU" bottom: "s" top: "s" }
"""


@pytest.mark.parametrize("frozen", [(), ("conv1a", "res2a_branch2a/bn")])
@pytest.mark.parametrize("to", [STOCK, FORK])
def test_a_built_network_becomes_what_is_built_in_the_other_dialect(
    frozen: tuple[str, ...], to: Dialect
) -> None:
    recipe = load_recipe("imagenet_jacintonet11")
    settings = recipe.network.model_copy(update={"frozen": frozen})
    recipe = recipe.model_copy(update={"network": settings})
    files = {
        dialect: stage_files(
            recipe, "initial", dialect, folder="f", gpus=(0,), iter_size=1, solver_mode_gpu=True
        )
        for dialect in Dialect
    }
    source = STOCK if to is FORK else FORK
    for name in ("train.prototxt", "val.prototxt", "deploy.prototxt"):
        found = parse_net(translate(files[source][name], name, to).text, to, name)
        assert found == parse_net(files[to][name], to, name)


def test_norms_of_each_phase_take_their_scale() -> None:
    done = translate(NORM, "net", FORK)
    net = parse_net(done.text, FORK, "net")
    assert [layer.type for layer in net.layer] == ["Input", "BatchNorm", "BatchNorm", "ReLU"]
    assert "# a comment" in done.text
    for norm in net.layer[1:3]:
        assert list(norm.top) == ["s"]
        assert norm.batch_norm_param.scale_bias
        assert norm.batch_norm_param.scale_filler.value == 0.5
        assert [param.lr_mult for param in norm.param] == [0, 0, 0, 2, 0]  # without a bias, it stays zero
    assert net.layer[2].batch_norm_param.eps == pytest.approx(1e-5)  # the fork's least
    assert done.changes["batch norms merged with their scales"] == 2
    assert done.changes["eps raised to 1e-05"] == 1
    alone = 'layer { name: "b" type: "BatchNorm" bottom: "x" top: "b" batch_norm_param { eps: 1e-6 } }'
    assert "eps: 1e-05" in translate(alone, "net", FORK).text


@pytest.mark.parametrize("kind", ["Clip", "Parameter", "Swish"])
def test_types_that_caffe_jacinto_lacks_are_named(kind: str) -> None:
    layer = f'layer {{ name: "l" type: "{kind}" top: "l" }}'
    with pytest.raises(
        UserError, match=f"net:1: layer l: caffe-jacinto has no type {kind}, which is of stock"
    ):
        translate(layer, "net", FORK)
    with pytest.raises(UserError) as caught:
        translate('layer { name: "l" type: "Clip" clip_param { min: 0 max: 6 } }', "net", FORK)
    assert len(caught.value.lines()) == 1


@pytest.mark.parametrize(
    ("to", "reads"), [(FORK, "probabilities, not scores"), (STOCK, "scores, not probabilities")]
)
def test_a_loss_that_means_something_else_is_named(to: Dialect, reads: str) -> None:
    loss = 'layer { name: "l" type: "InfogainLoss" bottom: "s" bottom: "label" bottom: "h" top: "l" }'
    with pytest.raises(UserError, match=f"net:1: layer l: .*'s InfogainLoss reads {reads}; remove it"):
        translate(loss, "net", to)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'layer { name: "d" type: "Data" top: "d"\n  transform_param { crop_h: 8 crop_w: 8 } }',
            "net:2: layer d: transform_param.crop_h: stock Caffe has no such field",
        ),
        (
            'layer { name: "q" type: "ReLU6" }',
            "net:1: layer q: stock Caffe has no type ReLU6",
        ),
        ("global_grad_scale: 2", "net:1: global_grad_scale: stock Caffe has no such field"),
    ],
)
def test_what_stock_caffe_cannot_say_is_named_with_its_line(line: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        translate(line, "net", STOCK)


def test_build_net_writes_the_translation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "net.prototxt"
    source.write_text(NORM)
    assert build_net(["--from", str(source), "--dialect", "caffe_jacinto"]) == 0
    printed = capsys.readouterr()
    assert printed.out == translate(NORM, "net", FORK).text
    assert "batch norms merged with their scales: 2" in printed.err
    folder = tmp_path / "fork"
    assert build_net(["--from", str(source), "--dialect", "caffe_jacinto", "--output", str(folder)]) == 0
    assert (folder / "net.prototxt").read_text() == printed.out
    with pytest.raises(UserError, match="this would replace"):
        build_net(["--from", str(source), "--dialect", "caffe_jacinto", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="--num-classes: --from FILE takes --dialect and --output only"):
        build_net(["--from", str(source), "--num-classes", "5"])
