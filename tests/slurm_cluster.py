"""A real Slurm of two nodes, n1 and n2, on this machine: its daemons run as the user of the tests."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# The timers are short. Slurm looks at time limits every 30 s.
CONFIGURATION = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdTimeout=6
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[1-2] PriorityTier=9 MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    """Debian keeps daemons where the path of ordinary users does not lead."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class Cluster:
    """The running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            [_program(command[0]) or command[0], *command[1:]],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """``kill -9`` of the node's slurmd."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def idle_nodes(self) -> str:
        return self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip()

    def job(self, number: int) -> dict[str, str]:
        """The facts of a job, as scontrol shows them."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: int, *states: str, seconds: float = 200) -> dict[str, str]:
        """The facts of a job as soon as it is in one of ``states``."""
        give_up = time.monotonic() + seconds
        while (facts := self.job(number))["JobState"] not in states:
            assert time.monotonic() < give_up, f"job {number} is not {states}: {facts}{self.logs()}"
            time.sleep(0.2)
        return facts

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "".join(
            f"\n{log}:\n{log.read_text(errors='replace')[-1500:]}"
            for log in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Started, and ended with everything in it."""
    with ExitStack() as stack:
        # The names of sockets are short.
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True))
        )
        folder.chmod(0o755)
        for name in ("munge", "state", "spool", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(mode=0o755)
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=folder, host=host, user=user, ports=_free_ports(3))
        )
        # Other values fail where no control groups are mounted, as in containers; nothing here uses them.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        made = Cluster(folder)
        stack.callback(_end, made)
        munge = {name: folder / "munge" / name for name in ("socket", "pid", "log", "seed")}
        files = [f"--{option}-file={munge[option]}" for option in ("pid", "log", "seed")]
        made.run("munged", f"--key-file={key}", f"--socket={munge['socket']}", *files)
        made.run("slurmctld", "-i")
        _wait(
            lambda: (
                subprocess.run(
                    ["scontrol", "ping"],
                    env={**os.environ, **made.environment},
                    capture_output=True,
                    check=False,
                ).returncode
                == 0
            ),
            made,
        )
        for node in NODES:
            made.start_node(node)
        _wait(lambda: made.idle_nodes() == "2", made)
        yield made


def _wait(condition, made: Cluster) -> None:  # type: ignore[no-untyped-def]
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, f"Slurm does not start{made.logs()}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(made: Cluster) -> None:
    """Cancel all jobs, and end the daemons and what they have left."""
    with suppress(Exception):
        made.run("scancel", "--user", getpass.getuser(), check=False)
        made.run("scancel", "--signal=KILL", "--full", "--user", getpass.getuser(), check=False)
        time.sleep(0.5)
    for file in (*made.folder.glob("*.pid"), made.folder / "munge/pid"):
        with suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGTERM)
    wanted = f"SLURM_CONF={made.folder}/".encode()
    for entry in Path("/proc").iterdir():
        # slurmstepd keeps no file of its own; it and its tasks have this variable.
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
