"""Learning from a teacher: the loss by its formula, in a training that resumes exactly, and in recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stage import SmallStage, write_digits

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.engines.pytorch.snapshot import save_weights
from caffe_jacinto.engines.pytorch.stage_check import check_stages
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net
from caffe_jacinto.prototxt.solver import TEST
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import Teacher

pytestmark = pytest.mark.caffe  # Needs no Caffe, but seconds.

TEACHER = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 6 } } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param {
  num_output: 5 weight_filler { type: "gaussian" std: 1 } } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""


def learner(settings: str, scores: int = 5) -> str:
    return (
        'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 6 } } }\n'
        'layer { name: "own" type: "InnerProduct" bottom: "data" top: "own" inner_product_param {\n'
        f'  num_output: {scores} weight_filler {{ type: "gaussian" std: 1 }} }} }}\n'
        'layer { name: "distillation" type: "DistillationLoss" bottom: "own" bottom: "data" top: "loss"\n'
        f"  loss_weight: 0.25 distillation_param {{ {settings} }} }}\n"
    )


def built(text: str, phase: int = TRAIN) -> Net:
    return Net(parse_net(text, Dialect.BVLC, "net"), phase, Dialect.BVLC, where="net", seed=3)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Net:
    monkeypatch.chdir(tmp_path)
    Path("deploy.prototxt").write_text(TEACHER)
    net = Net(parse_net(TEACHER, Dialect.BVLC, "net"), TEST, Dialect.BVLC, where="net", seed=8)
    save_weights(net, Path("big.caffemodel"))
    return net


FILES = 'net: "deploy.prototxt" weights: "big.caffemodel"'


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_and_its_gradient_are_hintons(teacher: Net, temperature: float) -> None:
    """Against NumPy. The gradient of the scores is T (q - p) over the batch: the paper's equation 2, T^2."""
    net = built(learner(f"{FILES} temperature: {temperature}"))
    images = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    result = net({"data": torch.from_numpy(images)})
    result.loss.backward()

    def scores(blobs: list[np.ndarray]) -> np.ndarray:
        return images.astype(float) @ blobs[0].T + blobs[1]

    def soft(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values / temperature)
        return powers / powers.sum(1, keepdims=True)

    wanted = soft(scores(read_weights(Path("big.caffemodel"))["fc"]))
    found = soft(scores([blob.tensor.detach().numpy() for blob in net.layer_blobs["own"]]))
    expected = temperature**2 * (wanted * (np.log(wanted) - np.log(found))).sum(1).mean()
    assert float(result.outputs["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(result.loss.detach()) == pytest.approx(0.25 * expected, rel=1e-4)
    slope = 0.25 * temperature * (found - wanted) / len(images)
    gradient = net.layer_blobs["own"][0].tensor.grad
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), slope.T @ images, rtol=1e-3, atol=1e-5)
    assert [learnable.layer for learnable in net.learnables] == ["own", "own"], "the teacher learns nothing"


@pytest.mark.parametrize(
    ("settings", "scores", "says"),
    [
        ('weights: "big.caffemodel"', 5, "distillation_param.net is missing; name the teacher's file"),
        (f"{FILES} temperature: 0", 5, "temperature is 0; it has to be above 0"),
        (FILES, 4, r"deploy.prototxt gives fc \(4, 5\), and the scores are \(4, 4\); name a network of"),
        ('net: "none.prototxt" weights: "big.caffemodel"', 5, "none.prototxt"),
        ('net: "deploy.prototxt" weights: "none.caffemodel"', 5, "none.caffemodel"),
    ],
)
def test_teachers_that_cannot_be_are_one_line(teacher: Net, settings: str, scores: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        built(learner(settings, scores))
    assert "\n" not in str(refused.value)


def test_a_training_with_a_teacher_resumes_to_the_bit(tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "lmdb")
    program = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-solver", "solver.prototxt"]
    stages = [SmallStage(tmp_path / name, digits) for name in ("big", "whole", "resumed")]
    big = stages[0]
    big.solver(max_iter=5, snapshot=5, test_interval=1000)
    big.run([program])
    body = (big.folder / "val.prototxt").read_text()
    body = body[body.index('layer { name: "conv1"') : body.index('layer { name: "accuracy"')]
    shape = "shape { dim: 1 dim: 1 dim: 28 dim: 28 }"
    entry = f'layer {{ name: "data" type: "Input" top: "data" input_param {{ {shape} }} }}\n'
    (tmp_path / "deploy.prototxt").write_text(entry + body)
    loss = (
        'layer { name: "distillation" type: "DistillationLoss" bottom: "fc" bottom: "data"\n'
        '  top: "distillation" distillation_param { net: "../deploy.prototxt"\n'
        '  weights: "../big/small_iter_5.caffemodel" } }\n'
    )
    for stage in stages[1:]:
        train = stage.folder / "train.prototxt"
        train.write_text(train.read_text() + loss)
        stage.solver(max_iter=8, snapshot=4, test_interval=1000, display=1)
    _, whole, resumed = stages
    assert "Train net output #0: distillation = " in whole.run([program])
    for ending in ("caffemodel", "solverstate"):
        name = f"small_iter_4.{ending}"
        (resumed.folder / name).write_bytes((whole.folder / name).read_bytes())
    resumed.run([[*program, "-snapshot", "small_iter_4.solverstate"]])
    ends = [stage.folder / "small_iter_8.caffemodel" for stage in (whole, resumed)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_stage_of_the_run_teaches_a_later_one() -> None:
    """The files need not be there when the stages are checked; the weights of the losses sum to one."""
    recipe = load_recipe(
        "demo_digits",
        ("stages.sparse.teacher=initial", "training.label_smoothing=0.1", "stages.sparse.teacher_weight=0.7"),
    )
    files = {
        name: stage_files(
            recipe, name, Dialect.BVLC, folder=f"run/{name}", gpus=(), iter_size=1, solver_mode_gpu=False
        )
        for name in ("initial", "sparse")
    }
    lmdbs = {"data/digits_train_lmdb": (3, 32, 32), "data/digits_val_lmdb": (3, 32, 32)}
    assert check_stages(files, lmdbs, Dialect.BVLC) == []
    assert "DistillationLoss" not in files["initial"]["train.prototxt"]
    assert "DistillationLoss" not in files["sparse"]["val.prototxt"]
    net = parse_net(files["sparse"]["train.prototxt"], Dialect.BVLC, "train.prototxt")
    weights = {layer.name: layer.loss_weight[0] for layer in net.layer if layer.loss_weight}
    expected = {"loss": 0.27, "loss/smoothing": 0.03, "distillation": 0.7}
    assert weights == pytest.approx(expected)
    (taught,) = (layer for layer in net.layer if layer.type == "DistillationLoss")
    assert list(taught.bottom) == ["fc10", "data"]
    assert taught.distillation_param.net == "run/initial/deploy.prototxt"
    assert taught.distillation_param.weights == "run/initial/digits_jacintonet11_iter_200.caffemodel"
    assert taught.distillation_param.temperature == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {"initial": None, "l1reg": None, "sparse": None, "finetune": None}),
        (("sparse.distill=true",), {"sparse": Teacher("l1reg"), "finetune": None}),
        (("finetune.distill=true", "l1reg.distill=true"), {"l1reg": Teacher("initial"), "sparse": None}),
        (("finetune.distill=true",), {"finetune": Teacher("l1reg")}),
        (("finetune.distill=true", "finetune.teacher=sparse"), {"finetune": Teacher("sparse")}),
        (
            ("sparse.start=", "sparse.weights=big.caffemodel", "finetune.distill=true"),
            {"finetune": Teacher(None, "big.caffemodel")},
        ),
    ],
)
def test_the_dense_network_teaches_the_sparse_one(
    overrides: tuple[str, ...], expected: dict[str, Teacher | None]
) -> None:
    recipe = load_recipe("demo_digits", [f"stages.{override}" for override in overrides])
    assert {name: recipe.teacher_of(name) for name in expected} == expected


def test_weights_with_another_head_do_not_teach() -> None:
    overrides = ("sparse.start=", "sparse.weights=big.caffemodel", "sparse.reinit=['fc10']")
    with pytest.raises(UserError, match=r"big\.caffemodel, of which fc10 is not used \(reinit\)"):
        load_recipe("demo_digits", [f"stages.{one}" for one in (*overrides, "sparse.distill=true")])


def test_teachers_that_are_not_there_or_do_not_fit_are_named_before_the_run(teacher: Net) -> None:
    overrides = ("sparse.teacher=none.caffemodel", "sparse.teacher_prototxt=deploy.prototxt")
    overrides += ("finetune.start=", "finetune.weights=big.caffemodel", "finetune.distill=true")
    command = [sys.executable, "-m", "caffe_jacinto.train", "demo_digits", "--engine", "torch", "--dry-run"]
    command += [part for override in overrides for part in ("--set", f"stages.{override}")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ran.stderr + ran.stdout
    assert ran.returncode != 0 and "Traceback" not in said
    assert "stage sparse: none.caffemodel (teacher) does not exist" in said
    Path("none.caffemodel").mkdir()
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "stage sparse: none.caffemodel (teacher) is a folder; name a file in it" in said
    assert "stages.finetune.distill: big.caffemodel does not fit the network: " in said


def test_a_teacher_of_other_classes_is_named_before_the_run(teacher: Net) -> None:
    images = {"data/digits_train_lmdb": (3, 32, 32), "data/digits_val_lmdb": (3, 32, 32)}
    Path("deploy.prototxt").write_text(TEACHER.replace("dim: 1 dim: 6", "dim: 1 dim: 3 dim: 32 dim: 32"))
    overrides = ("sparse.teacher=big.caffemodel", "sparse.teacher_prototxt=deploy.prototxt")
    recipe = load_recipe("demo_digits", [f"stages.{override}" for override in overrides])
    settings = {"gpus": (), "iter_size": 1, "solver_mode_gpu": False}
    files = stage_files(recipe, "sparse", Dialect.BVLC, folder="run/sparse", **settings)
    (problem,) = check_stages({"sparse": files}, images, Dialect.BVLC)
    assert "deploy.prototxt gives fc (64, 5), and the scores are (64, 10); name a network of the" in problem
