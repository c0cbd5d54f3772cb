"""Ranks on several machines of a Slurm job: started by srun, and known to each other by Slurm's variables."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from caffe_jacinto.common.errors import LOST, UserError, WorkLost
from caffe_jacinto.common.processes import WARNINGS
from caffe_jacinto.engines.pytorch.engine import PROGRAM

_FIRST_PORT, _PORTS = 15_000, 15_000
"""Where the ranks of a job meet: below the ports that Linux gives to outgoing connections (from 32,768)."""


_ENDED = re.compile(rb"srun: error: (\S+: tasks? [\d,-]+: (?:Exited with exit code (\d+)|.+?))\s*")
"""srun's line on tasks that have failed: ``srun: error: n2: task 1: Killed``."""


def become_rank() -> None:
    """Where srun started this process as one of several tasks, set what torchrun sets for a rank."""
    slurm = os.environ
    size = int(slurm.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in slurm or size == 1 or "SLURM_PROCID" not in slurm:
        return
    os.environ.update(
        RANK=slurm["SLURM_PROCID"],
        LOCAL_RANK=slurm["SLURM_LOCALID"],
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size // int(slurm["SLURM_STEP_NUM_NODES"])),
    )
    if "MASTER_ADDR" not in slurm:
        os.environ["MASTER_ADDR"] = _address(_first_node(slurm["SLURM_STEP_NODELIST"]))
    if "MASTER_PORT" not in slurm:
        # Each stage is a step of its own, so that it does not wait for the port of the one before.
        number = 7 * int(slurm["SLURM_JOB_ID"]) + int(slurm["SLURM_STEP_ID"])
        os.environ["MASTER_PORT"] = str(_FIRST_PORT + number % _PORTS)


def launch_ranks(argv: Sequence[str], nodes: int, ranks: int, *, on_cpu: bool) -> int:
    """Run this program with ``argv`` as ``ranks`` tasks on each of ``nodes`` machines of this Slurm job.

    Returns the exit code. Requests to stop are passed on to the tasks, which decide together. When one fails,
    Slurm ends all.

    Raises:
        UserError: this is not a job of so many machines.
        WorkLost: a task or its machine was lost.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("srun") is None:
        raise UserError(
            f"-nodes {nodes}: several machines train as a Slurm job, and this is none: submit it with "
            "train ... --slurm, or start torchrun on each machine (docs/torch.md)"
        )
    there = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if there < nodes:
        raise UserError(f"-nodes {nodes}: Slurm job {job} has {there}; ask for more with --nodes")
    cores = _cores_of_rank(ranks)
    if on_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    process = subprocess.Popen(
        [
            *("srun", "--mpi=none", "--input=none", "--kill-on-bad-exit=1", "--distribution=block"),
            *(f"--nodes={nodes}", f"--ntasks={nodes * ranks}", f"--ntasks-per-node={ranks}"),
            *(f"--cpus-per-task={cores}", sys.executable, "-m", PROGRAM, *argv),
        ],
        stderr=subprocess.PIPE,
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        # At SIGTERM, srun would kill the tasks; this one it passes on, and they take it as a request to stop.
        process.send_signal(signal.SIGUSR2)

    for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert process.stderr is not None
    failures = []
    for line in process.stderr:
        os.write(2, line)
        failures += _ENDED.findall(line)
    code = process.wait()
    if not code:
        return 0
    # srun's own exit code may be that of a rank that Slurm has ended because another had failed.
    reported = [int(exit_code) for _, exit_code in failures if exit_code and int(exit_code) != LOST]
    if reported:
        return reported[0]
    first = failures[0][0].decode(errors="replace") if failures else f"srun ended with exit code {code}"
    raise WorkLost(f"a rank or its machine was lost: {first}")


def _first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes: ``n[08-11,14],m2`` -> ``n08``."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _address(node: str) -> str:
    """Where the machines reach ``node``: by its name, or by the address that Slurm itself uses."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "node", node], capture_output=True, text=True, check=False
    )
    found = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return found[1] if found else node


def _cores_of_rank(ranks: int) -> int:
    """What sbatch's ``--cpus-per-task`` says, or else a rank's share on the node with the fewest."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit():
        return int(given)
    per_node = os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")  # as 16(x2),8
    return max(min(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", per_node))) // ranks, 1)
