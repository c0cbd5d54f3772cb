"""`train --slurm` on a real Slurm of two nodes: submission, lost nodes and ranks, limits, preemption."""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from digits_run import PREFIX, Trainer, recipe_of, tiny, wait_for, write_lmdbs
from slurm_cluster import Cluster, cluster, missing_programs

from caffe_jacinto.runs.slurm import sbatch_option, slurm_minutes

ITERATIONS = 20


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs Slurm ({', '.join(missing)}): tools/utils/setup.sh --tests installs it")
    assert not missing, f"these tests need Slurm: {', '.join(missing)}"
    with cluster() as started:
        yield started


@pytest.fixture(scope="module")
def trainer(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("shared folder")
    write_lmdbs(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield Trainer(None, folder)


@pytest.fixture(scope="module")
def arguments(trainer: Trainer) -> list[str]:
    """A recipe of one sparse stage from random weights, which takes a snapshot at every second iteration."""
    path = trainer.folder / recipe_of(trainer.folder, "sparse")
    path.write_text(re.sub(r'(?m)^start = "l1reg"\n', "", path.read_text()))
    return tiny(f"./{path.name}", ("sparse",), sparse=ITERATIONS)


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, arguments: list[str]) -> bytes:
    """The final weights of two ranks on one machine, without Slurm."""
    code, said = trainer.run(*arguments, "--set", "training.cpu_ranks=2", "--output", "one machine")
    assert code == 0, said
    assert "2 ranks train together" in trainer.log("one machine", "sparse")
    return weights(trainer, "one machine")


def weights(trainer: Trainer, run: str) -> bytes:
    return (trainer.folder / run / "sparse" / f"{PREFIX}_iter_{ITERATIONS}.caffemodel").read_bytes()


def submit(trainer: Trainer, *arguments: str) -> tuple[int, str]:
    """The number of the job, and what train says."""
    code, said = trainer.run(*arguments, "--slurm")
    assert code == 0, said
    found = re.search(r"^Slurm job (\d+): 2 nodes, 1 rank each$", said, re.MULTILINE)
    assert found, said
    return int(found[1]), said


def rank(trainer: Trainer, run: str, number: int, start: int = 1) -> int:
    """The process of a rank, as soon as start number ``start`` of the stage has done some iterations."""

    def iterations() -> int:
        _, *parts = trainer.log(run, "sparse").split("# caffe_jacinto.train:")
        return parts[start - 1].count(", lr = ") if len(parts) >= start else 0

    wait_for(lambda: iterations() > 3, "iteration in the sparse stage", 150)
    (found,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and is_rank(entry, trainer.folder, number)
    ]
    return found


def is_rank(process: Path, folder: Path, number: int) -> bool:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        variables = (process / "environ").read_bytes().split(b"\0")
        # The processes that decode images are its children.
        parent = Path("/proc", (process / "stat").read_text().rpartition(")")[2].split()[1], "cmdline")
        return (
            b"caffe_jacinto.engines.pytorch" in words
            and f"SLURM_PROCID={number}".encode() in variables
            and b"SLURM_STEP_NUM_TASKS=2" in variables
            and (process / "cwd").samefile(folder)
            and b"caffe_jacinto.engines.pytorch" not in parent.read_bytes().split(b"\0")
        )
    except OSError:
        return False


@pytest.mark.caffe
def test_two_nodes_train_as_two_ranks_of_one_machine(
    slurm: Cluster, trainer: Trainer, arguments: list[str], undisturbed: bytes
) -> None:
    job, said = submit(trainer, *arguments, "--nodes", "2", "--output", "two nodes", "--open")
    assert f"scancel {job}" in said
    page = trainer.folder / "two nodes" / "report.html"
    assert f"page: {page.as_uri()}" in said
    assert page.exists()
    assert re.search(r"how far it is: python -m caffe_jacinto.train --status \S*'?.*two nodes", said)
    frozen = rank(trainer, "two nodes", 1)
    os.kill(frozen, signal.SIGSTOP)  # so that what follows meets it in the stage
    code, status = trainer.run("--status", "two nodes")
    assert code == 0
    assert f"Slurm job {job}: RUNNING on n[1-2] for 00:" in status
    assert f"to cancel it: scancel {job}" in status
    assert "sparse: running, iteration" in status
    code, refused = trainer.run("--resume", "two nodes")
    assert code == 2
    assert f"Slurm job {job}: RUNNING" in refused
    os.kill(frozen, signal.SIGCONT)
    slurm.wait(job, "COMPLETED")
    assert trainer.states("two nodes") == {"sparse": "finished", "test": "finished"}
    assert weights(trainer, "two nodes") == undisturbed
    status = trainer.run("--status", "two nodes")[1]
    assert "two nodes: finished" in status
    assert f"Slurm job {job}: COMPLETED" in status


@pytest.mark.caffe
def test_a_killed_slurmd_costs_no_iteration(
    slurm: Cluster, trainer: Trainer, arguments: list[str], undisturbed: bytes
) -> None:
    job, _ = submit(trainer, *arguments, "--nodes", "2", "--output", "lost node")
    frozen = rank(trainer, "lost node", 1)
    os.kill(frozen, signal.SIGSTOP)  # so that the stage does not end before Slurm notices
    slurm.kill_node("n2")
    try:
        wait_for(lambda: "down" in slurm.run("sinfo", "-h", "-N", "-n", "n2", "-o", "%T"), "lost node")
        os.kill(frozen, signal.SIGCONT)
        slurm.wait(job, "PENDING")
        wait_for(lambda: trainer.states("lost node")["sparse"] == "stopped", "stop")
        assert "requeued 1 time" in trainer.run("--status", "lost node")[1]
    finally:
        slurm.start_node("n2")
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert "resumes at iteration" in (trainer.folder / "lost node/slurm" / f"{job}_0_log.out").read_text()
    assert weights(trainer, "lost node") == undisturbed


@pytest.mark.caffe
def test_past_its_time_limit_the_run_goes_on(
    slurm: Cluster, trainer: Trainer, arguments: list[str], undisturbed: bytes
) -> None:
    # Slurm looks at the limits every 30 s, and warns a minute before this one.
    limit = ("--time", "2", "--set-slurm", "signal=B:USR2@60")
    job, _ = submit(trainer, *arguments, "--nodes", "2", *limit, "--output", "long")
    frozen = rank(trainer, "long", 1)
    os.kill(frozen, signal.SIGSTOP)
    output = trainer.folder / "long/slurm" / f"{job}_0_log.out"
    wait_for(lambda: "stopping: training finishes its iteration" in output.read_text(), "warning", 120)
    os.kill(frozen, signal.SIGCONT)
    wait_for(lambda: "requeued: the time limit is near" in output.read_text(), "requeue")
    assert int(slurm.wait(job, "COMPLETED")["Restarts"]) >= 1  # a slow machine meets the limit again
    assert weights(trainer, "long") == undisturbed


@pytest.mark.caffe
def test_preempted_and_then_bereft_of_a_rank_the_run_goes_on(
    slurm: Cluster, trainer: Trainer, arguments: list[str], undisturbed: bytes
) -> None:
    job, _ = submit(trainer, *arguments, "--nodes", "2", "--output", "preempted")
    os.kill(rank(trainer, "preempted", 1), signal.SIGSTOP)  # Slurm sends SIGCONT before SIGTERM
    options = ("--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null")
    urgent = int(slurm.run("sbatch", *options, "--wrap=true").strip())
    slurm.wait(urgent, "COMPLETED")
    output = trainer.folder / "preempted/slurm" / f"{job}_0_log.out"
    os.kill(rank(trainer, "preempted", 1, start=2), signal.SIGKILL)
    wait_for(lambda: "requeued: stage sparse failed" in output.read_text(), "requeue")
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "2"
    assert weights(trainer, "preempted") == undisturbed


@pytest.mark.caffe
def test_out_of_space_and_then_cancelled_a_run_is_submitted_again(
    slurm: Cluster, trainer: Trainer, arguments: list[str], undisturbed: bytes
) -> None:
    with file_size_limit(1 << 20):  # which Slurm passes on to the job
        job, _ = submit(trainer, *arguments, "--nodes", "2", "--output", "again")
    slurm.wait(job, "FAILED")
    output = (trainer.folder / "again/slurm" / f"{job}_0_log.out").read_text()
    errors = [line for line in output.splitlines() if "error" in line]
    assert len(errors) == 1, output
    assert re.search(r"train: error: stage sparse failed: on n1: .*File too large", errors[0])
    assert "Traceback" not in output + trainer.log("again", "sparse")
    code, said = trainer.run("--resume", "again")
    assert code == 2
    assert "training.nodes is 2: several nodes train as a Slurm job: add --slurm" in said
    job, _ = submit(trainer, "--resume", "again")
    os.kill(rank(trainer, "again", 1, start=2), signal.SIGSTOP)
    slurm.run("scancel", str(job))
    slurm.wait(job, "CANCELLED")
    wait_for(lambda: trainer.states("again")["sparse"] == "stopped", "stop")
    status = trainer.run("--status", "again")[1]
    assert f"Slurm job {job}: CANCELLED" in status
    assert "to resume: python -m caffe_jacinto.train --resume again --slurm" in status
    job, _ = submit(trainer, "--resume", "again")
    slurm.wait(job, "COMPLETED")
    assert weights(trainer, "again") == undisturbed


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What this process starts cannot write more than ``size`` bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--partition", "none"], "Slurm refuses the job: invalid partition specified: none"),
        (["--set-slurm", "acount=me"], "Slurm refuses the job: unrecognized option '--acount=me'"),
        (["--set-slurm", "ntasks=2"], "ntasks: give --nodes and training.cpu_ranks"),
        (["--set-slurm", "comment=a\nb"], "comment: its value has characters that cannot be printed"),
        (["--gpus", "0"], "give --gpus-per-node"),
        (["--gpus-per-node", "1"], "built for the CPU only"),
        (["--time", "soon"], "'soon' is not a time limit like 90 (minutes)"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    trainer: Trainer, arguments: list[str], options: list[str], why: str
) -> None:
    code, said = trainer.run(*arguments, "--slurm", "--nodes", "2", "--output", "refused", *options)
    assert code == 2
    errors = [line for line in said.splitlines() if "error" in line]
    assert len(errors) == 1, said
    assert why in errors[0]
    assert not (trainer.folder / "refused").exists()


@pytest.mark.caffe
def test_without_slurm_it_says_so(trainer: Trainer, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        code, said = trainer.run(*arguments, "--slurm")
        assert code == 2
        assert "this machine has no Slurm (no sbatch or srun on the PATH)" in said
    code, said = trainer.run(*arguments, "--nodes", "2")
    assert code == 2
    assert "are for a Slurm job: add --slurm" in said


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("0:30", 1), ("12:00:00", 720), ("2-12", 3600), ("1-0:30", 1470), ("1-00:00:01", 1441)],
)
def test_time_limits_as_slurm_writes_them(text: str, minutes: int) -> None:
    assert slurm_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "-1", "1:2:3:4", "1-", "1h", "1.5", "٣", "99999999999"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a time limit"):
        slurm_minutes(text)


def test_options_of_sbatch() -> None:
    assert sbatch_option("cpus_per_task=8") == ("cpus-per-task", "8")
    assert sbatch_option("exclusive") == ("exclusive", None)
    assert sbatch_option("comment=a=b $(c)") == ("comment", "a=b $(c)")
    assert sbatch_option("signal=B:USR1@600") == ("signal", "B:USR1@600")
    for wrong in ("=8", "mem=", "Mem=1", "a b=1", "signal=TERM@60", "output=x", "comment=\x1b[0m"):
        with pytest.raises(argparse.ArgumentTypeError):
            sbatch_option(wrong)
