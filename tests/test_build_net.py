"""The command build_net: the published files, both dialects, and what a user reads."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine_files import TWO_H200, stand_in_machine
from normalised_net import first_difference

from caffe_jacinto.build_net import main
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect, file_batch
from caffe_jacinto.prototxt.schema import parse_net, parse_solver
from caffe_jacinto.recipes.load import load_recipe

PUBLISHED = "prototxt/jacintonet11_imagenet_caffe_jacinto"
FILES = ("train.prototxt", "val.prototxt", "deploy.prototxt", "solver.prototxt")
FORK, STOCK = Dialect.CAFFE_JACINTO, Dialect.BVLC


def build(folder: Path, *arguments: str) -> dict[str, str]:
    """The texts that build_net writes."""
    assert main(["--output", str(folder), *arguments]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_text() for name in FILES}


@pytest.mark.parametrize(
    ("name", "published_name"),
    [
        ("train.prototxt", "train.prototxt"),
        ("val.prototxt", "test.prototxt"),
        ("deploy.prototxt", "deploy.prototxt"),
    ],
)
def test_the_network_is_the_published_one_message_for_message(
    tmp_path: Path, published: Path, name: str, published_name: str
) -> None:
    theirs = parse_net((published / PUBLISHED / published_name).read_text(), FORK, published_name)
    for arguments in ((), ("--dialect", "caffe_jacinto"), ("--dialect", "caffe_jacinto", "--gpus", "0,1")):
        ours = parse_net(build(tmp_path, *arguments)[name], FORK, name)
        assert first_difference(ours, theirs) is None
        assert ours == theirs


def test_without_arguments_it_writes_the_published_network_and_says_how_to_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "into training/jacintonet11:" in said
    assert "  caffe train -solver training/jacintonet11/solver.prototxt\n" in said
    assert said.endswith("  python -m caffe_jacinto.train imagenet_jacintonet11\n")
    first = {name: Path("training/jacintonet11", name).read_text() for name in FILES}
    assert build(Path("training/jacintonet11"), "--network", "jacintonet11") == first
    assert main(["--network", "resnet10"]) == 0
    assert sorted(path.name for path in Path("training").iterdir()) == ["jacintonet11", "resnet10"]


def test_to_look_at_a_network_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--summary"]) == 0
    assert not list(tmp_path.iterdir())


def test_an_empty_list_of_gpus_selects_the_cpu(tmp_path: Path) -> None:
    for network in ("resnet10", "jacintonet11"):
        arguments = ("--network", network, "--dialect", "bvlc")
        files = build(tmp_path, *arguments, "--gpus", "")
        assert "solver_mode: CPU" in files["solver.prototxt"]
        assert files == build(tmp_path, *arguments, "--cpu")


@pytest.mark.parametrize(
    ("stage", "file"), [("initial", "solver.prototxt"), ("sparse", "solver_sparse.prototxt")]
)
def test_the_solver_is_the_published_one_apart_from_paths(
    tmp_path: Path, published: Path, stage: str, file: str
) -> None:
    theirs = parse_solver((published / PUBLISHED / file).read_text(), FORK, file)
    ours = parse_solver(build(tmp_path, "--stage", stage)["solver.prototxt"], FORK, "solver.prototxt")
    for solver in (ours, theirs):
        for path in ("train_net", "test_net", "snapshot_prefix"):
            assert solver.HasField(path) if path != "test_net" else len(solver.test_net) == 1
            solver.ClearField(path)
    assert first_difference(ours, theirs) is None


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    for dialect in Dialect:
        arguments = ("--dialect", dialect.value, "--stage", "l1reg")
        assert build(tmp_path, *arguments) == build(tmp_path, *arguments)


def test_stock_caffe_gets_scale_layers_and_no_field_of_the_fork(tmp_path: Path) -> None:
    files = build(tmp_path, "--dialect", "bvlc", "--stage", "l1reg")
    net = parse_net(files["train.prototxt"], STOCK, "train.prototxt")
    convolutions = [layer.name for layer in net.layer if layer.type == "Convolution"]
    for name in convolutions:
        index = next(i for i, layer in enumerate(net.layer) if layer.name == name)
        norm, scale, relu = net.layer[index + 1 : index + 4]
        assert (norm.name, norm.type) == (f"{name}/bn", "BatchNorm")
        assert norm.batch_norm_param.moving_average_fraction == pytest.approx(0.99)
        assert norm.batch_norm_param.eps == pytest.approx(1e-4)
        assert (scale.name, scale.type, scale.scale_param.bias_term) == (f"{name}/scale", "Scale", True)
        assert [(p.lr_mult, p.decay_mult) for p in scale.param] == [(1, 1), (1, 1)]
        assert (relu.name, relu.type) == (f"{name}/relu", "ReLU")
        for layer in (norm, scale, relu):
            assert list(layer.bottom) == list(layer.top) == [name]
    assert len(convolutions) == 10
    assert "threads" not in files["train.prototxt"]
    solver = parse_solver(files["solver.prototxt"], STOCK, "solver.prototxt")
    assert solver.solver_mode == solver.CPU


@pytest.mark.parametrize("stage", ["sparse", "finetune"])
def test_sparsity_cannot_be_said_to_stock_caffe(tmp_path: Path, stage: str) -> None:
    with pytest.raises(
        UserError, match=r"no field for sparsity .* caffe_jacinto.train imagenet_jacintonet11"
    ):
        main(["--output", str(tmp_path / "out"), "--dialect", "bvlc", "--stage", stage])
    assert not (tmp_path / "out").exists()
    recipe = load_recipe("imagenet_jacintonet11")  # What train steps through pycaffe says so, too.
    files = stage_files(
        recipe, stage, STOCK, folder="f", gpus=(), iter_size=2, solver_mode_gpu=False, val_images=50
    )
    assert re.search(r"^# .*no fields for sparsity", files["solver.prototxt"], re.MULTILINE)
    parse_solver(files["solver.prototxt"], STOCK, "solver.prototxt")


def test_gpus_share_the_batch_and_set_the_mode(tmp_path: Path) -> None:
    def batch_and_mode(*arguments: str) -> tuple[int, str, int]:
        files = build(tmp_path, "--gpus", "2,1", "--batch-size", "512", *arguments)
        dialect = Dialect(arguments[1])
        solver = parse_solver(files["solver.prototxt"], dialect, "s")
        net = parse_net(files["train.prototxt"], dialect, "t")
        mode = solver.SolverMode.Name(solver.solver_mode)
        return net.layer[0].data_param.batch_size, mode, solver.device_id

    assert batch_and_mode("--dialect", "bvlc") == (128, "GPU", 2)
    assert batch_and_mode("--dialect", "caffe_jacinto") == (256, "GPU", 2)


@given(st.sampled_from(Dialect), st.integers(1, 5000), st.integers(1, 9), st.integers(0, 9))
def test_a_file_batch_gives_the_effective_batch_or_names_the_nearest(
    dialect: Dialect, batch: int, iter_size: int, gpus: int
) -> None:
    devices = max(gpus, 1)
    try:
        in_file = file_batch(dialect, batch, iter_size, gpus)
    except UserError as error:
        named = [int(text) for text in re.findall(r"\d+", str(error).rsplit("use ", 1)[1])]
        assert batch % (iter_size * devices)
        for other in named:
            assert file_batch(dialect, other, iter_size, gpus) > 0
            assert abs(other - batch) < iter_size * devices
        assert named
    else:
        per_device = in_file if dialect is STOCK else in_file / devices
        assert per_device * devices * iter_size == batch
        assert per_device == int(per_device)


def test_frozen_zeros_on_the_fork_take_no_threshold(tmp_path: Path) -> None:
    solver = parse_solver(build(tmp_path, "--stage", "finetune")["solver.prototxt"], FORK, "s")
    assert solver.sparse_mode == 1  # SPARSE_UPDATE: zeros are frozen as the solver starts
    assert solver.sparsity_target == 0
    assert solver.sparsity_start_iter == solver.max_iter


def test_a_test_covers_all_validation_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = build(tmp_path, "--val-images", "1001")
    assert "test_iter: 21\n" in files["solver.prototxt"]
    assert "49 images count twice" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [2, 4, 5, 1000])
def test_top5_is_left_out_of_fewer_classes(tmp_path: Path, classes: int) -> None:
    files = build(tmp_path, "--num-classes", str(classes))
    assert ("accuracy/top5" in files["val.prototxt"]) == (classes >= 5)
    assert f'"fc{classes}"' in files["deploy.prototxt"]


def test_a_resumed_ramp_starts_where_it_was() -> None:
    files = stage_files(
        load_recipe("imagenet_jacintonet11"),
        "sparse",
        FORK,
        folder="f",
        gpus=(0,),
        iter_size=2,
        solver_mode_gpu=True,
        start_factor=0.35,
    )
    assert "sparsity_start_factor: 0.35\n" in files["solver.prototxt"]


def test_the_summary_names_a_command_that_a_shell_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "with space", "--dialect", "bvlc", "--gpus", "0,1")
    command = capsys.readouterr().out.rstrip().split("\n")[-1]
    assert command.strip() == f"caffe train -solver '{tmp_path}/with space/solver.prototxt' -gpu 0,1"


def test_all_gpus_are_those_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = stand_in_machine(monkeypatch, tmp_path)
    machine.nvidia_smi(TWO_H200)
    assert build(tmp_path / "all", "--gpus", "all") == {
        name: text.replace("/named/", "/all/")
        for name, text in build(tmp_path / "named", "--gpus", "0,1").items()
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="all GPUs were requested, but CUDA_VISIBLE_DEVICES= hides"):
        build(tmp_path / "none", "--gpus", "all")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--network", "jacintonet"], "did you mean jacintonet11?"),
        (["--dialect", "nv"], "'bvlc', 'caffe_jacinto'"),
        (["--stage", "spars"], "did you mean sparse?"),
        (["--num-classes", "1"], "--num-classes"),
        (["--crop-size", "x"], "--crop-size"),
        (["--crop-size", "31"], "a crop of at least 32"),
        (["--strides", "2,2,2,2"], "five whole numbers"),
        (["--strides", "2,2,2,2,-2"], "--strides"),
        (["--batch-size", "255"], "use 254 or 256"),
        (["--batch-size", "256", "--gpus", "0,1,2"], "use 252 or 258"),
        (["--gpus", "0,0"], "twice"),
        (["--gpus", "both"], "not a list of GPU numbers like 0,1, nor all or auto"),
        (["--gpus", "0", "--cpu"], "not allowed with"),
        (["--cpu"], "needs a GPU"),
        (["--network", "resnet10", "--strides", "2,2,2,2,2"], "those of resnet10 are fixed"),
        (["--network", "resnet10", "--stage", "sparse"], "known: initial"),
        (["--network", "bvlc_alexnet", "--crop-size", "20"], "a crop of at least 39"),
        (["--network", "bvlc_alexnet", "--mean-file", ""], "--mean-file"),
        (["--network"], "--network"),
        (["--train-lmdb", ""], "--train-lmdb"),
        (["--train-lmdb", "\udcff"], "not UTF-8"),
        (["--batchsize", "3"], "--batchsize"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["--output", str(tmp_path / "out"), *arguments])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder"):
        main(["--output", str(tmp_path / "file")])

    def fail(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("caffe_jacinto.networks.stage_files.write_whole", fail)
    with pytest.raises(UserError, match=r"prototxt could not be written: No space left on device: .* free"):
        main(["--output", str(tmp_path / "full")])


def test_it_runs_without_caffe_numpy_or_opencv(tmp_path: Path) -> None:
    code = (
        "import sys; from caffe_jacinto.build_net import main; main(sys.argv[1:]);"
        "heavy = {'numpy', 'cv2', 'caffe', 'matplotlib', 'rich'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "--output", str(tmp_path)], check=True, stdout=subprocess.DEVNULL
    )
