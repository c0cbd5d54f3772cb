"""`train --from`: a recipe from a user's solver and network."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from digits_run import Trainer, write_lmdbs

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.data.digits import main as write_digits
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.networks.completion import complete
from caffe_jacinto.networks.registry import RECIPE_RULES
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import Recipe
from caffe_jacinto.runs.from_solver import Request, find_network, write_recipe
from caffe_jacinto.train import main as train


def cut(published: Path, name: str, **values: object) -> str:
    """A published solver with other values: shorter."""
    text = (published / f"networks/{name}_solver.prototxt").read_text()
    for field, value in values.items():
        text = re.sub(rf"(?m)^{field}: .*$", f"{field}: {value}", text)
    return text


def derive(text: str, weights: str | None = None, target: float = 0.8) -> Recipe:
    Path("solver.prototxt").write_text(text)
    path, _, _ = write_recipe(Request(Path("solver.prototxt"), weights, target), Path("out"))
    return load_recipe(str(path), rules=RECIPE_RULES, completion=complete)


@pytest.fixture
def lenet(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with LeNet's network, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    text = (published / "networks/lenet_train_test.prototxt").read_text()
    (tmp_path / "lenet_train_test.prototxt").write_text(text)
    return tmp_path


def test_the_stages_follow_from_the_solver_by_the_documented_rule(lenet: Path, published: Path) -> None:
    recipe = derive(cut(published, "lenet"))
    theirs, *ours = recipe.stages.values()
    assert list(recipe.stages) == ["initial", "l1reg", "sparse", "finetune"]
    solver = theirs.solver
    assert (solver.max_iter, solver.base_lr, solver.lr_policy, solver.gamma) == (10000, 0.01, "inv", 1e-4)
    assert (solver.power, solver.momentum, solver.weight_decay) == (0.75, 0.9, 5e-4)
    middle = 0.01 * (1 + 1e-4 * 5000) ** -0.75
    assert [stage.solver.max_iter for stage in ours] == [5000, 5000, 2500]
    for stage, share in zip(ours, (1, 1, 0.5), strict=True):
        assert stage.solver.base_lr == pytest.approx(share * middle, rel=0.01)
        assert stage.solver.lr_policy == "poly"
    assert [stage.solver.regularization for stage in ours] == ["L1", "L1", "L2"]
    assert [stage.start for stage in ours] == ["initial", "l1reg", "sparse"]
    assert ours[1].sparse is not None
    assert ours[1].sparse.target == 0.8
    assert recipe.training.batch_size == 64
    assert recipe.network.test_iter == (100,)


def test_with_weights_the_first_stage_starts_from_them(lenet: Path, published: Path) -> None:
    with pytest.raises(UserError, match=r"--weights trained\.caffemodel does not exist"):
        derive(cut(published, "lenet"), weights="trained.caffemodel", target=0.5)
    assert not Path("out.toml").exists()
    Path("trained.caffemodel").touch()
    recipe = derive(cut(published, "lenet"), weights="trained.caffemodel", target=0.5)
    assert list(recipe.stages) == ["l1reg", "sparse", "finetune"]
    assert recipe.stages["l1reg"].weights == "trained.caffemodel"
    assert recipe.stages["sparse"].sparse is not None
    assert recipe.stages["sparse"].sparse.target == 0.5


def test_a_recipe_that_was_edited_is_not_overwritten(lenet: Path, published: Path) -> None:
    derive(cut(published, "lenet"))
    derive(cut(published, "lenet"))  # the same again
    with Path("out.toml").open("a") as file:
        file.write("# mine\n")
    with pytest.raises(UserError, match=r"out.toml exists and is not what --from writes: train it"):
        derive(cut(published, "lenet"))
    assert Path("out.toml").read_text().endswith("# mine\n")


@pytest.mark.parametrize("how", ["net", "train_net", "net_param"])
def test_networks_are_named_in_each_of_caffes_ways(lenet: Path, published: Path, how: str) -> None:
    net = (lenet / "lenet_train_test.prototxt").read_text()
    named = {
        "net": 'net: "lenet_train_test.prototxt"',
        "train_net": 'train_net: "lenet_train_test.prototxt"\ntest_net: "lenet_train_test.prototxt"',
        "net_param": f"net_param {{\n{net}}}",
    }[how]
    solver = re.sub(r'(?m)^net: ".*"$', lambda _: named, cut(published, "lenet"))
    recipe = derive(solver)
    assert (recipe.network.name, recipe.network.tests, recipe.training.batch_size) == ("LeNet", 1, 64)
    assert recipe.data.num_classes == 10


def test_a_network_inside_another_solver_does_not_take_its_place(lenet: Path, published: Path) -> None:
    net = (lenet / "lenet_train_test.prototxt").read_text()

    def with_net(text: str) -> str:
        return re.sub(r'(?m)^net: ".*"$', lambda _: f"net_param {{\n{text}}}", cut(published, "lenet"))

    derive(with_net(net))
    derive(with_net(net))
    before = Path("out_network_net_param.prototxt").read_text()
    with pytest.raises(UserError, match=r"out_network_net_param\.prototxt exists, and is not the network in"):
        derive(with_net(net.replace("num_output: 20", "num_output: 24")))
    assert Path("out_network_net_param.prototxt").read_text() == before


@pytest.mark.parametrize("output", ["", ".", "/"])
def test_the_run_folder_needs_a_name(output: str, lenet: Path, published: Path) -> None:
    Path("solver.prototxt").write_text(cut(published, "lenet"))
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match="name a new folder"):
        write_recipe(Request(Path("solver.prototxt"), None, 0.8), Path(output))
    assert sorted(Path().iterdir()) == before


def test_a_sigmoid_that_falls_is_taken(lenet: Path, published: Path) -> None:
    text = cut(published, "lenet", lr_policy='"sigmoid"', gamma=-0.001) + "stepsize: 5000\n"
    theirs, first, *_ = derive(text).stages.values()
    assert theirs.solver is not None
    assert (theirs.solver.lr_policy, theirs.solver.gamma) == ("sigmoid", -0.001)
    assert first.solver is not None
    assert first.solver.base_lr == pytest.approx(0.005)  # half of it, in the middle
    step = text.replace('"sigmoid"', '"step"')
    with pytest.raises(UserError, match=r"gamma.*-0\.001 is not above 0"):
        derive(step)


def test_test_states_become_networks_that_test(lenet: Path, published: Path) -> None:
    tests = 'test_state { stage: "a" }\ntest_state { stage: "b" level: 2 }\n'
    more = f'test_iter: 7\n{tests}train_state {{ stage: "t" }}\n'
    network = derive(cut(published, "lenet") + more).network
    assert (network.test_iter, network.test_stages, network.test_levels) == (
        (100, 7),
        (("a",), ("b",)),
        (0, 2),
    )
    assert network.train_stages == ("t",)


def test_a_network_is_looked_for_from_the_solvers_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "caffe/examples/mnist"
    folder.mkdir(parents=True)
    net = folder / "net.prototxt"
    net.write_text("")
    for name in ("examples/mnist/net.prototxt", "net.prototxt", "/elsewhere/net.prototxt"):
        assert find_network(name, folder / "solver.prototxt").resolve() == net
    with pytest.raises(UserError, match="is not a file"):
        find_network("other.prototxt", folder / "solver.prototxt")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("max_iter", "solver.prototxt: max_iter is missing or 0; add it"),
        ("net", "solver.prototxt: names no network; give net, or train_net with test_net"),
        ("test_iter", "solver.prototxt: no network tests what is trained"),
    ],
)
def test_what_a_solver_lacks_is_named(lenet: Path, published: Path, field: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        derive(re.sub(rf"(?m)^{field}: .*$", "", cut(published, "lenet")))


@pytest.mark.parametrize(
    ("field", "line", "message"),
    [
        ("base_lr", "base_lr: -0.1", ":10: base_lr: is -0.1; give more than 0.0"),
        ("max_iter", "max_iter: -3", ":20: max_iter: is -3; give 1 or more"),
        ("test_iter", "test_iter: 0", ":6: test_iter: is 0; give 1 or more"),
        ("lr_policy", 'lr_policy: "step"', ':14: lr_policy: "step" needs stepsize; add to the solver, for'),
        ("lr_policy", 'lr_policy: "Inv"', ':14: lr_policy: the text "Inv" is not allowed; did you mean inv?'),
        ("display", "solver_type: ADAGRAD", ':18: solver_type: Caffe\'s "AdaGrad" takes no momentum; set mo'),
        (
            "display",
            "regularization_type: 'l1'",
            ':18: regularization_type: the text "l1" is not allowed; di',
        ),
        (
            "lr_policy",
            'lr_policy: "multistep" stepvalue: 40 stepvalue: 20',
            ":14: stepvalue: [40, 20] does not grow: Caffe would step at [40, 41]; name the iterations that",
        ),
        ("display", "iter_size: 0", ":18: iter_size: is 0; give 1 or more"),
    ],
)
def test_a_mistake_in_the_solver_is_one_line_there(
    lenet: Path, published: Path, field: str, line: str, message: str
) -> None:
    solver = re.sub(rf"(?m)^{field}: .*$", line, cut(published, "lenet"))
    with pytest.raises(UserError) as caught:
        derive(solver)
    (said,) = caught.value.lines()
    assert said.startswith(f"solver.prototxt{message}")
    assert not Path("out.toml").exists()


def test_settings_of_other_types_of_solver_are_passed_over_as_by_caffe(lenet: Path, published: Path) -> None:
    solver = (
        derive(cut(published, "lenet") + "delta: 1e-8 momentum2: 0.9 rms_decay: 0.5\n").stages["l1reg"].solver
    )
    assert (solver.delta, solver.momentum2, solver.rms_decay) == (None, None, None)
    adam = cut(published, "lenet") + 'delta: 1e-7 momentum2: 0.9 type: "Adam"\n'
    solver = derive(adam).stages["l1reg"].solver
    assert (solver.delta, solver.momentum2) == (1e-7, 0.9)


def test_a_recipe_that_nobody_has_edited_makes_way_for_the_next(lenet: Path, published: Path) -> None:
    derive(cut(published, "lenet"), target=0.8)
    sparse = derive(cut(published, "lenet"), target=0.5).stages["sparse"].sparse
    assert sparse is not None
    assert sparse.target == 0.5
    Path("out").mkdir()
    Path("out/run.json").write_text("{}")  # a run of that recipe
    with pytest.raises(UserError, match=r"out\.toml is the recipe of the run in out, .* --resume out"):
        derive(cut(published, "lenet"), target=0.4)


def test_options_of_from_need_it() -> None:
    with pytest.raises(UserError, match="--weights and --target go with --from SOLVER"):
        train(["demo_digits", "--target", "0.5"])


def test_lenet_is_told_before_the_training_that_the_rule_cannot_thin_it(lenet: Path, published: Path) -> None:
    """Its convolutions have few inputs or outputs, and most of its weights are in inner products."""
    write_lmdbs(lenet)
    net = lenet / "lenet_train_test.prototxt"
    net.write_text(net.read_text().replace("batch_size: 100", "batch_size: 10"))
    Path("solver.prototxt").write_text(cut(published, "lenet", max_iter=400, test_iter=5))
    lmdbs = ["--train-lmdb", "train_lmdb", "--val-lmdb", "val_lmdb"]
    with pytest.raises(UserError, match=r"cannot reach the target of 0.8") as caught:
        train(["--from", "solver.prototxt", *lmdbs, "--engine", "torch", "--output", "run"])
    assert "stages.sparse.sparse.inner_products=true would do" in str(caught.value)
    assert Path("run.toml").is_file()
    assert not Path("run").exists()


@pytest.fixture(scope="module")
def cifar10(published: Path, caffe_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cifar10_full`, its solver cut short, and the weights that real Caffe trains by them."""
    folder = tmp_path_factory.mktemp("cifar10")
    write_digits(["--output", str(folder / "digits")])
    for name in ("train", "val"):
        images, lines = folder / "digits" / name, str(folder / f"digits/{name}.txt")
        output = str(folder / f"{name}_lmdb")
        create_lmdb(
            ["--images", str(images), "--list", lines, "--output", output, "--size", "32", "--shuffle", "1"]
        )
    create_lmdb(["--mean", str(folder / "train_lmdb"), str(folder / "mean.binaryproto")])
    text = (published / "networks/cifar10_full_train_test.prototxt").read_text()
    for before, after in (
        ("examples/cifar10/mean", "mean"),
        ("examples/cifar10/cifar10_train_lmdb", "train_lmdb"),
        ("examples/cifar10/cifar10_test_lmdb", "val_lmdb"),
    ):
        text = text.replace(before, after)
    text = text.replace("batch_size: 100", "batch_size: 25", 1)
    (folder / "cifar10_full_train_test.prototxt").write_text(text)
    solver = cut(
        published,
        "cifar10_full",
        net='"cifar10_full_train_test.prototxt"',
        **{"max_iter": 120, "snapshot": 120, "test_interval": 120, "test_iter": 5},
        **{"snapshot_format": "BINARYPROTO", "snapshot_prefix": '"theirs"', "solver_mode": "CPU"},
    )
    (folder / "solver.prototxt").write_text(f"{solver}random_seed: 7\ntest_initialization: false\n")
    command = [str(caffe_engine.info.executable), "train", "-solver", "solver.prototxt"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    accuracies = re.findall(r"Test net output #0: accuracy = (\S+)", ran.stderr)
    (folder / "accuracy").write_text(accuracies[-1])
    return folder


@pytest.mark.caffe
@pytest.mark.parametrize("engine", ["bvlc", "torch"])
def test_one_command_makes_somebodys_model_sparse(cifar10: Path, caffe_engine: Engine, engine: str) -> None:
    trainer = Trainer(None if engine == "torch" else caffe_engine.info.executable, cifar10)
    code, said = trainer.run(
        *("--from", "solver.prototxt", "--weights", "theirs_iter_120.caffemodel", "--output", engine)
    )
    assert code == 0, said
    result = re.search(r"finetune: finished, .* top-1 (\S+), sparsity (\S+)", said)
    assert result is not None, said
    assert float(result[2]) >= 0.8
    assert float(result[1]) >= float((cifar10 / "accuracy").read_text()) - 0.005
    assert f"{engine}/l1reg/train.prototxt: cifar10_full_train_test.prototxt as it is" in said
    weights = read_weights(next((cifar10 / engine / "finetune").glob("*_CIFAR10_full_iter_*.caffemodel")))
    zeros = {name: float((weights[name][0] == 0).mean()) for name in ("conv1", "conv2", "conv3", "ip1")}
    assert zeros["conv2"] > 0.8
    assert zeros["conv3"] > 0.8
    assert zeros["ip1"] == 0


@pytest.mark.caffe
def test_lenet_becomes_sparse_over_all_its_weights(
    lenet: Path, published: Path, caffe_engine: Engine
) -> None:
    write_lmdbs(lenet)
    images = ["--images", "digits/val", "--list", "digits/val.txt", "--size", "32"]
    create_lmdb([*images, "--output", "all_val_lmdb", "--labels", "digits/labels.txt"])
    net = lenet / "lenet_train_test.prototxt"
    net.write_text(net.read_text().replace("batch_size: 100", "batch_size: 50").replace(": 64", ": 16"))
    solver = cut(published, "lenet", max_iter=160, test_iter=20, test_interval=160)
    Path("solver.prototxt").write_text(f"{solver}random_seed: 7\ntest_initialization: false\n")
    code, said = Trainer(caffe_engine.info.executable, lenet).run(
        *("--from", "solver.prototxt", "--train-lmdb", "train_lmdb", "--val-lmdb", "all_val_lmdb"),
        *("--output", "run", "--set", "stages.sparse.sparse.inner_products=true"),
        *("--set", "stages.sparse.sparse.by=network"),
    )
    assert code == 0, said
    accuracy = re.findall(r"(?:initial|finetune): finished, .* top-1 ([\d.]+)", said)
    assert float(accuracy[1]) >= float(accuracy[0]) - 0.005
    weights = read_weights(next(Path("run/finetune").glob("*_LeNet_iter_40.caffemodel")))
    blobs = [weights[name][0] for name in ("conv1", "conv2", "ip1", "ip2")]
    zeros, size = sum(int((blob == 0).sum()) for blob in blobs), sum(blob.size for blob in blobs)
    assert zeros / size >= 0.8
