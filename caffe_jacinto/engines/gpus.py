"""The GPUs of this machine, and which of them a program started here would see.

    python -m caffe_jacinto.engines.gpus     lists them; exit code 1 if there is none

NVIDIA's are those that ``nvidia-smi`` lists, or else the driver's own files in ``/proc`` and ``/dev``; AMD's
are the nodes of the kernel's compute driver in ``/sys/class/kfd``. No GPU library is loaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from caffe_jacinto.common.arguments import GpuRequest
from caffe_jacinto.common.errors import UserError, run_command

Maker = Literal["NVIDIA", "AMD"]

ROOT = Path("/")
"""Where ``/proc``, ``/sys`` and ``/dev`` are; tests put a folder in its place."""

SECONDS = 30
"""Longest time to wait for nvidia-smi, which may have to start the driver first."""

BESIDE_THE_PATH = ("usr/bin", "usr/lib/wsl/lib", "usr/local/nvidia/bin", "opt/bin")
"""Where nvidia-smi also is: under Windows' Linux, in the containers of some clouds."""

VISIBLE: dict[Maker, tuple[tuple[str, ...], ...]] = {
    "NVIDIA": (("CUDA_VISIBLE_DEVICES",),),
    "AMD": (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")),
}
"""The environment variables that choose among the GPUs: each group from what the one before left, and of a
group the first that is set (the CUDA programming guide's and ROCm's pages on them)."""

_CUDA_OF_DRIVER = {
    450: (11, 0),
    455: (11, 1),
    460: (11, 2),
    465: (11, 3),
    470: (11, 4),
    495: (11, 5),
    510: (11, 6),
    515: (11, 7),
    520: (11, 8),
    525: (12, 0),
    530: (12, 1),
    535: (12, 2),
    545: (12, 3),
    550: (12, 4),
    555: (12, 5),
    560: (12, 6),
    565: (12, 7),
    570: (12, 8),
    575: (12, 9),
    580: (13, 0),
    590: (13, 1),
}
"""The first driver branch of each CUDA version (CUDA's release notes, table "CUDA Toolkit and Corresponding
Driver Versions")."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one part of a partitioned one (NVIDIA's MIG)."""

    maker: Maker
    name: str
    uuid: str
    """As the environment variables take it, ``GPU-...``; empty if it is not known."""

    architecture: str = ""
    """AMD's name of its instruction set, e.g. ``gfx942``; empty for NVIDIA."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a machine, in the order in which a program counts them."""

    gpus: tuple[Gpu, ...]
    troubles: tuple[str, ...]
    """GPUs that are there and cannot be used, and why: a line for each reason."""

    def of(self, maker: Maker) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.maker == maker)

    @property
    def makers(self) -> tuple[Maker, ...]:
        """Whose GPUs are there, NVIDIA first."""
        return tuple(maker for maker in VISIBLE if self.of(maker))

    def __str__(self) -> str:
        """``2 NVIDIA GPUs (NVIDIA H200)``."""
        parts = []
        for maker in self.makers:
            own = self.of(maker)
            names = ", ".join(dict.fromkeys(gpu.name for gpu in own))
            parts.append(f"{len(own)} {maker} GPU{'s' if len(own) > 1 else ''} ({names})")
        return " and ".join(parts) or "no GPU"


def this_machine() -> Machine:
    """The GPUs of this machine, whatever the environment hides."""
    return _machine(ROOT, os.environ.get("PATH", ""))


def visible_gpus(maker: Maker, environment: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """The GPUs of ``maker`` that a program started with ``environment`` (default: this one's) sees.

    In its order: it numbers them from 0.
    """
    environment = os.environ if environment is None else environment
    gpus = this_machine().of(maker)
    for names in VISIBLE[maker]:
        given = next((environment[name] for name in names if name in environment), None)
        if given is not None:
            gpus = _chosen(gpus, given)
    # A CUDA program sees one part of partitioned GPUs, however many there are (NVIDIA's MIG user guide).
    return gpus[:1] if any(gpu.uuid.startswith("MIG-") for gpu in gpus) else gpus


def requested_gpus(request: GpuRequest, maker: Maker | None) -> tuple[int, ...]:
    """The numbers that ``request`` means for a program that uses the GPUs of ``maker``; None: of any.

    Raises:
        UserError: all GPUs are requested, and there is none.
    """
    if isinstance(request, tuple):
        return request
    seen = {each: len(visible_gpus(each)) for each in this_machine().makers if maker in (None, each)}
    count = next((count for count in seen.values() if count), 0)
    if request == "all" and not count:
        raise UserError(f"all GPUs were requested, but {lack(maker)}: leave the GPUs out for the CPU")
    return tuple(range(count))


def any_visible() -> bool:
    """Whether a program started here would see a GPU."""
    return any(visible_gpus(maker) for maker in this_machine().makers)


def lack(maker: Maker | None = None) -> str:
    """Why there is no GPU (of ``maker``) here, in words: ``this machine has no NVIDIA GPU``."""
    machine = this_machine()
    present = machine.of(maker) if maker else machine.gpus
    what = f"{maker} GPU" if maker else "GPU"
    if present:
        names = [name for group in VISIBLE[present[0].maker] for name in group if name in os.environ]
        hidden = " and ".join(f"{name}={os.environ[name]}" for name in names)
        return f"{hidden} hides this machine's {len(present)} {what}{'s' if len(present) > 1 else ''}"
    troubles = [trouble for trouble in machine.troubles if maker is None or maker in trouble]
    return "; ".join([f"this machine has no {what}{' that can be used' if troubles else ''}", *troubles])


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that NVIDIA's driver here runs; None if that cannot be found out.

    Programs built for an older minor version of the same CUDA run, too, and so do those for any older CUDA.
    """
    return _driver_cuda(ROOT, os.environ.get("PATH", ""))


def compute_capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capability of each NVIDIA GPU of the machine; empty if nvidia-smi does not say."""
    said = _nvidia_smi(ROOT, os.environ.get("PATH", ""), "--query-gpu=compute_cap", "--format=csv,noheader")
    found = (
        re.findall(r"^(\d+)\.(\d+)\s*$", said.stdout, re.MULTILINE) if said and not said.returncode else []
    )
    return tuple((int(major), int(minor)) for major, minor in found)


def _chosen(gpus: Sequence[Gpu], given: str) -> tuple[Gpu, ...]:
    """Those that a list of numbers and (beginnings of) UUIDs names, up to the first entry that names none.

    Of a list that repeats itself, none, as in CUDA and PyTorch.
    """
    entries: list[str] = []
    for entry in (part.strip() for part in given.split(",")):
        if not re.fullmatch(r"\d+|(?:GPU|MIG)-.*", entry):
            break
        if entry in entries:
            return ()
        entries.append(entry)
    found: list[Gpu] = []
    for entry in entries:
        if entry.isdigit():
            named = [gpus[int(entry)]] if int(entry) < len(gpus) else []
        else:
            named = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
        if len(named) != 1:
            break
        if named[0] in found:
            return ()
        found += named
    return tuple(found)


@cache
def _machine(root: Path, path: str) -> Machine:
    """The machine whose files are under ``root``; nvidia-smi is looked for in ``path``. It is asked once."""
    troubles: list[str] = []
    gpus = (*_nvidia(root, path, troubles), *_amd(root, troubles))
    return Machine(gpus, tuple(troubles))


def _nvidia(root: Path, path: str, troubles: list[str]) -> tuple[Gpu, ...]:
    said = _nvidia_smi(root, path, "-L")
    if said is not None and said.returncode == 0:
        found = _listed(said.stdout)
        if found:
            return found
    driver = root / "proc/driver/nvidia/gpus"
    folders = sorted(driver.iterdir()) if driver.is_dir() else []
    found = tuple(gpu for gpu in map(_of_driver, folders) if gpu)
    if not found and not folders:
        nodes = (node for node in (root / "dev").glob("nvidia*") if node.name[6:].isdigit())
        found = tuple(Gpu("NVIDIA", "NVIDIA GPU", "") for _ in nodes)
    if said is not None and said.returncode != 0:
        words = (said.stdout + said.stderr).strip().splitlines()
        reason = words[0].strip() if words else f"exit code {said.returncode}"
        troubles.append(f"NVIDIA's driver does not answer (nvidia-smi: {reason})")
    elif not found and _on_the_bus(root, "0x10de"):
        troubles.append(
            "an NVIDIA GPU is on the PCI bus, but its driver is not loaded: install NVIDIA's driver"
        )
    return found


def _listed(text: str) -> tuple[Gpu, ...]:
    """The GPUs in the output of ``nvidia-smi -L``; of a partitioned one, its parts in its place."""
    found: list[Gpu] = []
    for line in text.splitlines():
        whole = re.match(r"GPU (\d+): (.*?)(?:\s*\(UUID: ([^)]*)\))?\s*$", line)
        part = re.match(r"\s+MIG (\S+)\s+Device\s+\d+:.*?(MIG-[^)\s]+)", line)
        if whole:
            found.append(Gpu("NVIDIA", whole[2], whole[3] or ""))
        elif part and found:
            if not found[-1].uuid.startswith("MIG-"):
                card = found.pop().name
            found.append(Gpu("NVIDIA", f"{card} MIG {part[1]}", part[2]))
    return tuple(found)


def _of_driver(folder: Path) -> Gpu | None:
    """The GPU of a folder of ``/proc/driver/nvidia/gpus``; None if its administrator has excluded it."""
    facts = {}
    for line in _text(folder / "information").splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    if facts.get("GPU Excluded") == "Yes":
        return None
    return Gpu("NVIDIA", facts.get("Model") or "NVIDIA GPU", facts.get("GPU UUID", ""))


def _amd(root: Path, troubles: list[str]) -> tuple[Gpu, ...]:
    """The GPUs among the nodes of the kernel's compute driver whose device files this user may open."""
    device = root / "dev/kfd"
    if not device.exists():
        if _on_the_bus(root, "0x1002"):
            troubles.append(
                "an AMD GPU is on the PCI bus, but /dev/kfd is not there: load the kernel module amdgpu, or "
                "give the container the devices /dev/kfd and /dev/dri"
            )
        return ()
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    numbers = (
        sorted(int(node.name) for node in nodes.iterdir() if node.name.isdigit()) if nodes.is_dir() else []
    )
    found = []
    for number in numbers:
        facts = dict(re.findall(r"^(\w+) (\d+)\s*$", _text(nodes / str(number) / "properties"), re.MULTILINE))
        version = int(facts.get("gfx_target_version", 0))
        if not int(facts.get("simd_count", 0)) or not version:
            continue  # a processor, or a node that a container may not read
        render = root / f"dev/dri/renderD{facts.get('drm_render_minor', '')}"
        if not render.exists():
            continue  # hidden from this container
        closed = [path for path in (device, render) if not os.access(path, os.R_OK | os.W_OK)]
        if closed:
            troubles.append(
                f"an AMD GPU is there, but this user may not open /{closed[0].relative_to(root)}: add the "
                "user to the groups render and video"
            )
            continue
        architecture = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        found.append(
            Gpu("AMD", f"AMD {architecture}", f"GPU-{int(facts.get('unique_id', 0)):016x}", architecture)
        )
    return tuple(found)


def _on_the_bus(root: Path, vendor: str) -> bool:
    """Whether a display or compute device of this PCI vendor is in the machine."""
    return any(
        _text(folder / "vendor").strip() == vendor and _text(folder / "class").startswith("0x03")
        for folder in (root / "sys/bus/pci/devices").glob("*")
    )


@cache
def _driver_cuda(root: Path, path: str) -> tuple[int, int] | None:
    said = _nvidia_smi(root, path)
    # Newer drivers call it "CUDA UMD Version", the user-mode driver's.
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", said.stdout) if said else None
    if found:
        return int(found[1]), int(found[2])
    version = _text(root / "proc/driver/nvidia/version")
    branch = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+)\.\d", version)
    return max(
        (cuda for first, cuda in _CUDA_OF_DRIVER.items() if branch and first <= int(branch[1])), default=None
    )


def _nvidia_smi(root: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """What nvidia-smi, found in ``path`` or beside it, answers; None if there is none or it does not end."""
    beside = (str(root / folder) for folder in BESIDE_THE_PATH)
    program = shutil.which("nvidia-smi", path=os.pathsep.join((path, *beside)))
    if program is None:
        return None
    try:
        return subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _text(path: Path) -> str:
    """What is in a file of the kernel's; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def main(arguments: Sequence[str]) -> int:
    """Print the GPUs that programs started here see; 0 if there is one."""
    machine = this_machine()
    seen = 0
    for maker in machine.makers:
        for number, gpu in enumerate(visible_gpus(maker)):
            print(f"GPU {number}: {gpu.name}")
            seen += 1
    for trouble in machine.troubles:
        print(f"note: {trouble}")
    if not seen:
        print(lack())
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.gpus", main))
