"""Finding a Caffe, the commands that it is given, and what is refused before a run.

The fork's executable needs CUDA and cannot run here. Tests that need one use a script that holds the bytes by
which it is identified; nothing but its version is read from running it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from machine_files import GTX_1080, TWO_H200, Machine, stand_in_machine

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines import discovery as find
from caffe_jacinto.engines.contract import Engine, EngineInfo, QuantizeJob, TestJob, TrainJob
from caffe_jacinto.engines.discovery import check_gpus, describe, find_engine
from caffe_jacinto.engines.fork.engine import CaffeJacintoEngine
from caffe_jacinto.engines.pycaffe.engine import BvlcEngine
from caffe_jacinto.engines.pycaffe.stepper import main as stepper_main
from caffe_jacinto.engines.pytorch.engine import TorchEngine, built_for, describe_torch
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import QuantizeSettings, SolverSettings, SparseSettings, Stage

STOCK = b"snapshot_prefix"
FORK = b"snapshot_prefix sparsity_target default_forward_type"
CPU_STOCK = b"snapshot_prefix Cannot use GPU in CPU-only Caffe"
NO_NCCL = b"snapshot_prefix rebuild with USE_NCCL"
NVCAFFE = b"snapshot_prefix default_forward_type"


def stand_in(path: Path, marks: bytes, version: str = "caffe version 0.17.0") -> Path:
    """A script that says a version and holds the bytes of a kind of Caffe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"#!/bin/sh\n# " + marks + b"\n" + f"echo '{version}'\n".encode())
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    """Only what a test puts there is found; real Caffe, where a test asks for it, was found before."""
    if "caffe_engine" in request.fixturenames:
        request.getfixturevalue("caffe_engine")
    monkeypatch.delenv("CAFFE_ROOT", raising=False)
    made = stand_in_machine(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    monkeypatch.setenv("CAFFE_JACINTO_HOME", str(tmp_path / "no home"))
    return made


def engine(kind: str, **changes: object) -> Engine:
    facts: dict[str, object] = {
        "kind": kind,
        "executable": Path("/opt/caffe"),
        "version": "1.0.0",
        "dialect": Dialect.BVLC if kind == "bvlc" else Dialect.CAFFE_JACINTO,
        "gpu": True,
        "multi_gpu": True,
        "begins_data_again": kind == "bvlc",
        "own_rule": kind != "caffe-jacinto",
        "pycaffe": Path("/opt/python"),
        "notes": (),
        **changes,
    }
    info = EngineInfo(**facts)  # type: ignore[arg-type]
    kinds: dict[str, Callable[[EngineInfo], Engine]] = {
        "bvlc": BvlcEngine,
        "caffe-jacinto": CaffeJacintoEngine,
        "torch": TorchEngine,
    }
    return kinds[kind](info)


def train_job(**changes: object) -> TrainJob:
    values: dict[str, object] = {
        "solver": Path("run/sparse/solver.prototxt"),
        "weights": Path("run/l1reg/d_n_iter_10.caffemodel"),
        "snapshot": None,
        "gpus": (0, 1),
        "final_weights": Path("run/sparse/d_n_iter_20.caffemodel"),
        "sparse": None,
        "freeze_zeros": False,
        "reestimate_batches": 30,
        **changes,
    }
    return TrainJob(**values)  # type: ignore[arg-type]


def stage(**changes: object) -> Stage:
    solver = SolverSettings(
        max_iter=20, base_lr=0.1, weight_decay=0.0, regularization="L2", test_interval=10, snapshot=10
    )
    return Stage(solver=solver, start="l1reg", **changes)  # type: ignore[arg-type]


# --- finding


def test_none_found_names_the_command_that_installs_one() -> None:
    with pytest.raises(UserError, match=r"no Caffe found .*install_caffe\.sh"):
        find_engine(force="bvlc")


def test_without_a_caffe_it_is_pytorch_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "has_torch", lambda: False)
    with pytest.raises(UserError, match=r"no Caffe found .*caffe-jacinto\[torch\]"):
        find_engine()
    monkeypatch.setattr(find, "has_torch", lambda: True)
    monkeypatch.setattr(
        find,
        "describe_torch",
        lambda dialect, precision: engine("torch", dialect=dialect, precision=precision).info,
    )
    found = find_engine()
    assert found.info.kind == "torch"
    assert "no Caffe was found" in found.info.reason
    forced = find_engine(force="torch", dialect=Dialect.CAFFE_JACINTO)
    assert (forced.info.dialect, forced.info.reason) == (Dialect.CAFFE_JACINTO, "named by --engine")
    with pytest.raises(UserError, match="needs no Caffe"):
        find_engine("/opt/caffe", force="torch")


def test_a_caffe_reads_its_own_dialect_only(tmp_path: Path) -> None:
    stock = stand_in(tmp_path / "caffe", STOCK)
    with pytest.raises(UserError, match=r"--dialect caffe_jacinto: .* use --engine torch"):
        find_engine(str(stock), dialect=Dialect.CAFFE_JACINTO)
    with pytest.raises(UserError, match=r"--precision bf16: .* computes in fp32"):
        find_engine(str(stock), precision="bf16")


def test_pytorch_that_is_not_there_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"has no PyTorch; install it: .* -m pip install"):
        describe_torch(Dialect.BVLC)


def test_pytorch_trains_each_stage_by_one_command_on_all_gpus() -> None:
    torch = engine("torch", executable=Path("/opt/python"), dialect=Dialect.BVLC)
    sparse = SparseSettings(target=0.5, start_iter=1, step_iter=1)
    command = torch.train_commands(train_job(sparse=sparse))[0]
    program = ["/opt/python", "-m", "caffe_jacinto.engines.pytorch", "train", "-dialect", "bvlc"]
    assert command[:8] == [*program, "-solver", "run/sparse/solver.prototxt"]
    assert command[command.index("-sparsity_target") + 1] == "0.5"
    assert command[-2:] == ["-gpu", "0,1"]
    fork = engine("torch", executable=Path("/opt/python"), dialect=Dialect.CAFFE_JACINTO)
    assert "-sparsity_target" not in fork.train_commands(train_job(sparse=sparse))[0]
    plan = torch.plan(stage(sparse=sparse), (0, 1), 2)
    assert (plan.gpus, plan.iter_size, plan.note) == ((0, 1), 2, None)


def test_gpus_that_a_pytorch_for_the_cpu_cannot_use(machine: Machine) -> None:
    machine.nvidia_smi(TWO_H200)
    says = r"PyTorch 1\.0\.0 is built for the CPU only.*install PyTorch for them: .* torch==\S+\+cu130 "
    with pytest.raises(UserError, match=says):
        check_gpus(engine("torch", gpu=False).info, (0,))


def test_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("CAFFE_JACINTO_HOME", str(home))
    prefix = home / f"caffe-1.0-cpu-py{sys.version_info.major}.{sys.version_info.minor}"
    in_prefix = stand_in(prefix / "bin/caffe", STOCK)
    assert find_engine().info.executable == in_prefix
    on_path = stand_in(tmp_path / "path/caffe", STOCK)
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert find_engine().info.executable == on_path
    in_root = stand_in(tmp_path / "root/build/tools/caffe.bin", STOCK)
    monkeypatch.setenv("CAFFE_ROOT", str(tmp_path / "root"))
    assert find_engine().info.executable == in_root
    given = stand_in(tmp_path / "given/my caffe", STOCK)
    assert find_engine(str(given)).info.executable == given


@pytest.mark.parametrize("inside", ["build/tools/caffe", "build/tools/caffe.bin", "bin/caffe"])
def test_a_tree_holds_its_executable(tmp_path: Path, inside: str) -> None:
    executable = stand_in(tmp_path / inside, STOCK)
    assert find_engine(str(tmp_path)).info.executable == executable


def test_another_program_called_caffe_on_the_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = stand_in(tmp_path / "caffe", b"keeps the screen awake")
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    with pytest.raises(UserError, match="no Caffe found"):
        find_engine(force="bvlc")
    with pytest.raises(UserError, match="is not a Caffe"):
        find_engine(str(other))


def test_what_is_named_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--caffe: .* does not exist"):
        find_engine(str(tmp_path / "none"))
    (tmp_path / "text").write_text("snapshot_prefix")
    with pytest.raises(UserError, match="is not executable"):
        find_engine(str(tmp_path / "text"))
    monkeypatch.setenv("CAFFE_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"\$CAFFE_ROOT: no Caffe in .*build/tools/caffe"):
        find_engine()


def test_a_caffe_that_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    path = tmp_path / "caffe"
    path.write_text("#!/bin/sh\n# snapshot_prefix\necho 'libcudart.so.8.0: cannot open' >&2\nexit 127\n")
    path.chmod(0o755)
    with pytest.raises(UserError, match=r"does not start: libcudart\.so\.8\.0: cannot open"):
        describe(path)


def test_kinds_are_told_by_their_bytes(tmp_path: Path) -> None:
    stock = describe(stand_in(tmp_path / "stock", STOCK, "caffe version 1.0.0"))
    assert (stock.kind, stock.dialect, stock.version) == ("bvlc", Dialect.BVLC, "1.0.0")
    fork = describe(stand_in(tmp_path / "fork", FORK))
    assert (fork.kind, fork.dialect, fork.gpu) == ("caffe-jacinto", Dialect.CAFFE_JACINTO, True)
    with pytest.raises(UserError, match="is NVCaffe"):
        describe(stand_in(tmp_path / "nv", NVCAFFE))


def test_a_script_is_told_by_the_library_beside_it(tmp_path: Path) -> None:
    script = stand_in(tmp_path / "bin/caffe", b"starts the real one")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcaffe.so.1.0.0").write_bytes(FORK)
    assert describe(script).kind == "caffe-jacinto"


def test_a_forced_kind_has_to_match(tmp_path: Path) -> None:
    fork = stand_in(tmp_path / "fork", FORK)
    assert find_engine(str(fork), "caffe-jacinto").info.kind == "caffe-jacinto"
    with pytest.raises(UserError, match=r"--engine bvlc: the Caffe from --caffe, .* is caffe-jacinto"):
        find_engine(str(fork), "bvlc")


def test_pycaffe_of_another_python_is_said_so(tmp_path: Path) -> None:
    package = tmp_path / "python/caffe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from ._caffe import Net\n")
    (package / "_caffe.so").write_bytes(b"built for Python 2.7")
    info = describe(stand_in(tmp_path / "build/tools/caffe", STOCK))
    assert info.pycaffe is None
    assert "cannot be imported" in info.notes[0]
    assert "_caffe.so" in info.notes[0]


@pytest.mark.caffe
def test_real_stock_caffe(caffe_engine: Engine, caffe_root: Path, machine: Machine) -> None:
    machine.nvidia_smi(TWO_H200)
    info = caffe_engine.info
    assert (info.kind, info.version, info.dialect) == ("bvlc", "1.0.0", Dialect.BVLC)
    assert (info.gpu, info.multi_gpu) == (False, False)
    assert info.pycaffe == caffe_root / "python"
    assert info.notes == ()
    with pytest.raises(UserError, match=r"--engine caffe-jacinto: .* is stock Caffe"):
        find_engine(str(info.executable), "caffe-jacinto")
    with pytest.raises(UserError, match="built for the CPU only"):
        check_gpus(info, (0, 1))


# --- GPUs


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    machine.nvidia_smi(TWO_H200)
    info = engine("bvlc").info
    check_gpus(info, (0, 1))
    with pytest.raises(UserError, match=r"GPUs 1,2 requested, but 2 does not exist: .* GPUs 0 to 1"):
        check_gpus(info, (1, 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match="GPU 0 only"):
        check_gpus(info, (1,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES= hides this machine's 2 GPUs"):
        check_gpus(info, (0,))


def test_gpus_on_a_machine_without(machine: Machine) -> None:
    for kind in ("bvlc", "torch"):
        with pytest.raises(
            UserError, match="GPU 0 requested, but this machine has no GPU: leave the GPUs out"
        ):
            check_gpus(engine(kind).info, (0,))


def test_gpus_that_this_caffe_cannot_use(machine: Machine) -> None:
    machine.nvidia_smi(TWO_H200)
    check_gpus(engine("bvlc", gpu=False).info, ())
    with pytest.raises(UserError, match=r"built for the CPU only: .*install PyTorch|--engine torch"):
        check_gpus(engine("bvlc", gpu=False).info, (0,))
    with pytest.raises(UserError, match="without NCCL"):
        check_gpus(engine("bvlc", multi_gpu=False).info, (0, 1))
    with pytest.raises(UserError, match="trains on GPUs only"):
        check_gpus(engine("caffe-jacinto").info, ())


def test_gpus_of_another_maker(machine: Machine) -> None:
    machine.amd(90402, 90402)
    with pytest.raises(UserError, match="built for NVIDIA GPUs, and this machine has no NVIDIA GPU"):
        check_gpus(engine("bvlc").info, (0,))
    with pytest.raises(UserError, match=r"built for NVIDIA GPUs.*torch==\S+\+rocm7\.2 "):
        check_gpus(engine("torch").info, (0,))
    with pytest.raises(UserError, match="2 does not exist"):
        check_gpus(engine("torch", maker="AMD").info, (2,))


def test_a_driver_too_old_for_this_pytorch(machine: Machine) -> None:
    machine.nvidia_smi(GTX_1080, "12.2", "6.1")
    says = r"built for CUDA 13\.0, and NVIDIA's driver here is for 12\.2: .* torch==\S+\+cu126 "
    with pytest.raises(UserError, match=says):
        check_gpus(engine("torch", cuda=(13, 0)).info, (0,))
    with pytest.raises(UserError, match="cannot use them"):  # what the real one here answers
        check_gpus(engine("torch", cuda=(12, 6)).info, (0,))


VERSION_FILES = {
    "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n": ((13, 0), False),
    "cuda = '11.8'\nhip = None\n": ((11, 8), False),
    "cuda: Optional[str] = None\nhip: Optional[str] = '7.2.26015-fc0010cf6a'\n": (None, True),
    "cuda: Optional[str] = None\nhip: Optional[str] = None\n": (None, False),
}


@pytest.mark.parametrize("text", VERSION_FILES)
def test_what_pytorch_is_built_for_is_in_its_own_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "version.py").write_text(text)
    assert built_for(tmp_path / "version.py") == VERSION_FILES[text]


class Installed:
    """What is installed on a machine: Caffes that stand in, and a PyTorch of these facts."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self.machine, self._home, self._monkeypatch = machine, home, monkeypatch
        monkeypatch.setenv("CAFFE_JACINTO_HOME", str(home))
        monkeypatch.setattr(find, "has_torch", lambda: False)

    def on_path(self, marks: bytes) -> None:
        stand_in(self.machine.bin / "caffe", marks)

    def in_prefix(self, marks: bytes) -> None:
        name = f"caffe-1.0-cpu-py{sys.version_info.major}.{sys.version_info.minor}"
        stand_in(self._home / name / "bin/caffe", marks)

    def pytorch(self, **facts: object) -> None:
        self._monkeypatch.setattr(find, "has_torch", lambda: True)
        self._monkeypatch.setattr(
            find, "describe_torch", lambda dialect, precision="fp32": engine("torch", **facts).info
        )


@pytest.fixture
def installed(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installed:
    return Installed(machine, monkeypatch, tmp_path / "home")


def test_the_set_ups_own_caffe_leaves_the_gpus_to_pytorch(installed: Installed) -> None:
    installed.machine.nvidia_smi(TWO_H200)
    installed.in_prefix(CPU_STOCK)
    installed.pytorch()
    for gpus in ("all", "auto", (0, 1)):
        chosen = find_engine(gpus=gpus).info  # type: ignore[arg-type]
        assert chosen.kind == "torch"
        assert chosen.reason.endswith("caffe is built for the CPU only, and PyTorch can use the GPUs")
    assert find_engine(gpus=()).info.kind == "bvlc"


def test_caffe_jacinto_comes_first_wherever_it_is(installed: Installed) -> None:
    installed.machine.nvidia_smi(TWO_H200)
    installed.on_path(STOCK)
    installed.in_prefix(FORK)
    installed.pytorch()
    assert find_engine(gpus="all").info.kind == "caffe-jacinto"
    assert find_engine(gpus="all", force="bvlc").info.kind == "bvlc"


def test_a_stock_caffe_for_gpus_comes_before_pytorch(installed: Installed) -> None:
    installed.machine.nvidia_smi(TWO_H200)
    installed.on_path(STOCK)
    installed.pytorch()
    chosen = find_engine(gpus=(0, 1)).info
    assert (chosen.kind, chosen.reason) == ("bvlc", "from PATH, and it can use the GPUs")


def test_a_stock_caffe_for_one_gpu_leaves_two_to_pytorch(installed: Installed) -> None:
    installed.machine.nvidia_smi(TWO_H200)
    installed.on_path(NO_NCCL)
    installed.pytorch()
    assert find_engine(gpus=(1,)).info.kind == "bvlc"
    assert find_engine(gpus="all").info.kind == "torch"


def test_amds_gpus_are_pytorchs(installed: Installed) -> None:
    installed.machine.amd(90402, 90402)
    installed.on_path(STOCK)
    installed.pytorch(maker="AMD")
    chosen = find_engine(gpus="all").info
    assert chosen.kind == "torch"
    assert "is built for NVIDIA GPUs, and this machine has no NVIDIA GPU" in chosen.reason


def test_a_caffe_that_does_not_start_is_passed_over_for_gpus(installed: Installed) -> None:
    installed.machine.nvidia_smi(TWO_H200)
    installed.machine.program(
        installed.machine.bin / "caffe", "# snapshot_prefix\necho libcudart.so.8.0: none >&2\nexit 127\n"
    )
    installed.pytorch()
    assert "does not start: libcudart.so.8.0: none, and PyTorch" in find_engine(gpus="all").info.reason


def test_gpus_that_nothing_here_can_use_are_refused_with_what_to_do(installed: Installed) -> None:
    installed.machine.nvidia_smi(TWO_H200, "12.2", "9.0\n9.0")
    installed.in_prefix(CPU_STOCK)
    installed.pytorch(gpu=False)
    with pytest.raises(UserError, match=r"built for the CPU only: .* torch==\S+\+cu126 .* or name a Caffe"):
        check_gpus(find_engine(gpus="all").info, (0, 1))


def test_what_is_named_comes_before_the_order(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed.machine.nvidia_smi(TWO_H200)
    installed.on_path(FORK)
    installed.pytorch()
    named = stand_in(tmp_path / "named/caffe", CPU_STOCK)
    assert find_engine(str(named), gpus="all").info.reason == "named by --caffe"
    assert find_engine(force="torch", gpus="all").info.reason == "named by --engine"
    with pytest.raises(UserError, match=r"built for the CPU only: .* train with --engine torch"):
        check_gpus(find_engine(str(named), gpus="all").info, (0, 1))
    monkeypatch.setenv("CAFFE_ROOT", str(named))
    assert find_engine(gpus="all").info.reason == "named by $CAFFE_ROOT"


# --- what is done where


def test_stock_caffe_sparsifies_on_one_device_and_keeps_the_batch() -> None:
    bvlc = engine("bvlc")
    plan = bvlc.plan(stage(sparse=SparseSettings(start_iter=5)), (2, 0, 1), 2)
    assert (plan.gpus, plan.iter_size) == ((2,), 6)
    assert "6 passes instead of 2" in str(plan.note)
    assert bvlc.plan(stage(freeze_zeros=True), (0, 1), 1).iter_size == 2
    for plan in (bvlc.plan(stage(), (0, 1), 2), bvlc.plan(stage(freeze_zeros=True), (1,), 2)):
        assert plan.iter_size == 2
        assert plan.note is None


def test_the_fork_does_every_stage_on_all_gpus() -> None:
    plan = engine("caffe-jacinto").plan(stage(sparse=SparseSettings(start_iter=5)), (0, 1), 2)
    assert (plan.gpus, plan.iter_size, plan.note) == ((0, 1), 2, None)


def test_commands_of_the_fork() -> None:
    fork = engine("caffe-jacinto")
    assert fork.train_commands(train_job(sparse=SparseSettings(start_iter=5))) == [
        [
            "/opt/caffe",
            "train",
            "-solver",
            "run/sparse/solver.prototxt",
            "-weights",
            "run/l1reg/d_n_iter_10.caffemodel",
            "-gpu",
            "0,1",
        ]
    ]
    resumed = train_job(snapshot=Path("run/sparse/d_n_iter_10.solverstate"))
    assert fork.train_commands(resumed) == [
        [
            "/opt/caffe",
            "train",
            "-solver",
            "run/sparse/solver.prototxt",
            "-snapshot",
            "run/sparse/d_n_iter_10.solverstate",
            "-gpu",
            "0,1",
        ]
    ]
    log = "x] Finding and applying sparsity: 0.3\nx] Snapshotting to binary proto file a_iter_10.caffemodel\n"
    assert fork.resume_start_factor(SparseSettings(start_iter=5), 10, log) == 0.3
    assert engine("bvlc").resume_start_factor(SparseSettings(start_iter=5), 10, log) is None


def test_commands_of_stock_caffe() -> None:
    bvlc = engine("bvlc")
    training, completing = bvlc.train_commands(train_job(weights=None))
    assert training == ["/opt/caffe", "train", "-solver", "run/sparse/solver.prototxt", "-gpu", "0,1"]
    assert completing[1:3] == ["-m", "caffe_jacinto.engines.pycaffe.recalibrate"]
    assert completing[-6:] == [
        *("-weights", "run/sparse/d_n_iter_20.caffemodel"),
        *("-batches", "30", "-gpu", "0"),
    ]
    assert len(bvlc.train_commands(train_job(reestimate_batches=0))) == 1


def test_commands_of_stock_caffe_that_hold_zeros() -> None:
    bvlc = engine("bvlc")
    (sparse,) = bvlc.train_commands(train_job(gpus=(1,), sparse=SparseSettings(start_iter=5)))
    assert sparse[:3] == [sys.executable, "-m", "caffe_jacinto.engines.pycaffe.stepper"]
    pairs = dict(zip(sparse[3::2], sparse[4::2], strict=True))
    assert pairs["-pycaffe"] == "/opt/python"
    assert pairs["-sparsity_target"] == "0.8"
    assert pairs["-sparsity_start_iter"] == "5"
    assert pairs["-gpu"] == "1"
    (finetune,) = bvlc.train_commands(train_job(gpus=(), freeze_zeros=True))
    assert "-freeze_zeros" in finetune
    assert "-gpu" not in finetune


@pytest.mark.parametrize("kind", [{"sparse": SparseSettings(start_iter=5)}, {"freeze_zeros": True}, {}])
def test_after_the_last_iteration_only_the_recalibration_is_left(kind: dict[str, object]) -> None:
    at_the_end = train_job(snapshot=Path("run/sparse/d_n_iter_20.solverstate"), **kind)
    (command,) = engine("bvlc").train_commands(at_the_end)
    assert "caffe_jacinto.engines.pycaffe.recalibrate" in command


def test_stages_that_need_pycaffe_say_so() -> None:
    without = engine("bvlc", pycaffe=None, notes=("no pycaffe beside it",))
    with pytest.raises(UserError, match=r"need pycaffe, .*no pycaffe beside it"):
        without.train_commands(train_job(freeze_zeros=True))
    assert without.train_commands(train_job(reestimate_batches=0))


def test_weights_with_a_comma_in_their_path_are_refused() -> None:
    with pytest.raises(UserError, match="commas"):
        engine("caffe-jacinto").train_commands(train_job(weights=Path("a,b.caffemodel")))


def test_scoring_runs_on_one_device() -> None:
    job = TestJob(Path("val.prototxt"), Path("w.caffemodel"), 1000, (3, 1))
    assert engine("bvlc").test_command(job) == [
        *("/opt/caffe", "test", "-model", "val.prototxt", "-weights", "w.caffemodel"),
        *("-iterations", "1000", "-gpu", "3"),
    ]


def quantize_job(**settings: object) -> QuantizeJob:
    test = TestJob(Path("run/finetune/val.prototxt"), Path("run/finetune/w.caffemodel"), 20, (3,))
    chosen = QuantizeSettings(**settings)  # type: ignore[arg-type]
    return QuantizeJob(Path("run/finetune"), chosen, "train", "val", Path("run/quantize"), test)


def test_commands_that_quantize() -> None:
    job = quantize_job(bits_of={"a=b": 16}, keep_float=("-x",), percentile=99.0, bias_correction=True)
    options = [
        *("-m", "caffe_jacinto.quantize", "run/finetune", "--calibrate", "train", "--val", "val"),
        *("--output", "run/quantize", "--bits-of=a=b=16", "--keep-float=-x", "--percentile", "99.0"),
        *("--bias-correction", "--log"),
    ]
    assert engine("torch").quantize_command(job) == ["/opt/caffe", *options, "--gpus", "3"]
    caffe = ["--backend", "caffe", "--caffe", "/opt/caffe"]
    assert engine("bvlc").quantize_command(job) == [sys.executable, *options, *caffe]
    with pytest.raises(
        UserError, match=r"quantizing needs pycaffe, and /opt/caffe has none .* remove the stage"
    ):
        engine("bvlc", pycaffe=None).quantize_command(job)
    fork = engine("caffe-jacinto")
    assert fork.quantize_command(job) == [
        *("/opt/caffe", "test", "-model", "run/quantize/val.prototxt"),
        *("-weights", "run/finetune/w.caffemodel", "-iterations", "20", "-gpu", "3"),
    ]
    with pytest.raises(UserError, match=r"^bits_of: caffe-jacinto's own quantized test has no field"):
        fork.quantization(job.settings)
    scheme = fork.quantization(QuantizeSettings(scheme="power2", weight_bits=8))
    assert (scheme.name, scheme.power_of_two, scheme.bits.weights) == ("caffe_jacinto", True, 8)


def stages_of(*overrides: str, dialect: Dialect = Dialect.BVLC, **changes: str) -> dict[str, dict[str, str]]:
    """The prototxts of the demo's stages; ``changes`` are texts that replace others in all of them."""
    recipe = load_recipe("demo_digits", overrides)
    found = {}
    for name in recipe.trained:
        files = stage_files(
            recipe, name, dialect, folder=f"run/{name}", gpus=(), iter_size=1, solver_mode_gpu=False
        )
        for old, new in changes.items():
            files = {file: text.replace(old, new) for file, text in files.items()}
        found[name] = files
    return found


RMSPROP = tuple(
    f"stages.finetune.solver.{setting}"
    for setting in ('type="RMSProp"', "momentum=0.0", "rms_decay=0.9", "delta=1e-5")
)
PYTHON_LAYER = {
    'type: "ReLU"': 'type: "Python" python_param { module: "nowhere" layer: "Layer" } propagate_down: true'
}
LMDBS = {"data/digits_train_lmdb": (3, 32, 32), "data/digits_val_lmdb": (3, 32, 32)}


@pytest.mark.caffe
def test_stock_caffe_says_before_a_run_what_it_would_refuse(caffe_engine: Engine) -> None:
    assert caffe_engine.check(stages_of(), LMDBS) == []
    assert caffe_engine.check(stages_of(*RMSPROP, "training.label_smoothing=0.1"), LMDBS) == []
    (problem,) = caffe_engine.check(stages_of(ReLU="Wavelet"), LMDBS)
    place = "run/initial/train.prototxt: layer conv1a/relu (Wavelet)"
    assert problem.startswith(f"{place}: {caffe_engine.info.executable} refuses it: ")
    assert "Unknown layer type: Wavelet" in problem
    (problem,) = caffe_engine.check(stages_of(**PYTHON_LAYER), LMDBS)
    assert problem.endswith("refuses it: ModuleNotFoundError: No module named 'nowhere'")


@pytest.mark.caffe
def test_layers_of_forks_are_named_before_a_caffe_is_asked(caffe_engine: Engine) -> None:
    problems = caffe_engine.check(stages_of(ReLU="ReLU6"), LMDBS)
    says = ": stock Caffe has no type ReLU6, which is of forks for MobileNet v2 (layers conv1a/relu,"
    assert problems and all(says in problem and "--engine torch" in problem for problem in problems)
    files = [problem.partition(":")[0] for problem in problems]
    assert files == [f"run/{stage}/train.prototxt" for stage in stages_of()]
    stages = stages_of(ReLU="ReLU6", dialect=Dialect.CAFFE_JACINTO)
    assert "caffe-jacinto has no type ReLU6" in engine("caffe-jacinto").check(stages, LMDBS)[0]


@pytest.mark.caffe
def test_solver_settings_of_pytorch_alone_are_named_before_a_caffe_is_asked(caffe_engine: Engine) -> None:
    solver = "stages.finetune.solver"
    overrides = (f'{solver}.lr_policy="cosine"', f"{solver}.warmup_iter=5", "stages.sparse.teacher=initial")
    overrides += (f"{solver}.image_sizes=[[0, 16]]",)
    for dialect, asked, who in (
        (Dialect.BVLC, caffe_engine, "stock Caffe"),
        (Dialect.CAFFE_JACINTO, engine("caffe-jacinto"), "caffe-jacinto"),
    ):
        problems = asked.check(stages_of(*overrides, dialect=dialect), LMDBS)
        taught = next(problem for problem in problems if problem.startswith("run/sparse/"))
        assert f"{who} has no type DistillationLoss, which is of this program's engine on PyTorch" in taught
        assert taught.endswith("; train on PyTorch, which can: --engine torch")
        assert [problem for problem in problems if problem.startswith("run/finetune/solver")] == [
            f"run/finetune/solver.prototxt: {who} has no {what}, which is of this program's engine on "
            f"PyTorch; {instead}, or train on PyTorch, which can: --engine torch"
            for what, instead in (
                ("field warmup_iter", "remove it"),
                ("field image_size", "remove it"),
                ("lr_policy cosine", "name another"),
            )
        ]


def test_the_forks_files_are_held_against_its_schema() -> None:
    fork = engine("caffe-jacinto")
    assert fork.check(stages_of(dialect=Dialect.CAFFE_JACINTO), {}) == []
    stages = stages_of(dialect=Dialect.CAFFE_JACINTO)
    stages["sparse"]["solver.prototxt"] = stages["sparse"]["solver.prototxt"].replace(
        "sparsity_target: 0.8", "sparsity_target: 1"
    )
    says = "run/sparse/solver.prototxt: sparsity_target is 1.0; it has to be above 0 and below 1"
    assert fork.check(stages, {}) == [says]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either -sparsity_target"),
        (["-freeze_zeros"], "needs -weights or -snapshot"),
        (["-freeze_zeros", "-sparsity_target", "0.8"], "give either"),
        (["-sparsity_target", "1.5", "-sparsity_start_iter", "0"], "target"),
        (["-sparsity_target", "0.5"], "start_iter"),
    ],
)
def test_the_stepper_refuses_what_makes_no_stage(arguments: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        stepper_main(["-pycaffe", "/none", "-solver", "s.prototxt", *arguments])


def test_a_pycaffe_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "caffe_jacinto.engines.pycaffe.stepper", "-pycaffe", str(tmp_path)]
    command += ["-solver", "s", "-weights", "w", "-freeze_zeros"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "cannot import pycaffe from there: No module named 'caffe'" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_prefix_is_where_the_installer_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAFFE_JACINTO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    name = f"caffe-1.0-cpu-py{sys.version_info.major}.{sys.version_info.minor}"
    assert find.prefix() == Path("/data/caffe_jacinto") / name
    monkeypatch.delenv("XDG_DATA_HOME")
    assert find.prefix() == Path.home() / ".local/share/caffe_jacinto" / name
