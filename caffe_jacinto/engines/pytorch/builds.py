"""Which build of PyTorch is for this machine, and whether one is there already; tools/utils/setup.sh asks.

python -m caffe_jacinto.engines.pytorch.builds            the build for this machine, and how to install it
python -m caffe_jacinto.engines.pytorch.builds pip        the arguments for pip, one a line, for scripts
python -m caffe_jacinto.engines.pytorch.builds installed  what PyTorch is installed and which GPUs it sees;
                                                          exit code 2 if there is none, or one too old
"""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.engines.gpus import Maker, compute_capabilities, driver_cuda, this_machine

VERSION = "2.13.0"
"""The one that is installed."""

LEAST = (2, 11)
"""The oldest that the engine runs on; an installed one from there on is kept."""

INDEX = "https://download.pytorch.org/whl"
"""PyTorch's own wheels, one index for each build; $PYTORCH_INDEX names a mirror."""

SECONDS = 10
"""Longest time to wait for the answer of that index."""


@dataclass(frozen=True)
class Build:
    """A build of `VERSION` (PyTorch's RELEASE.md, "PyTorch CUDA Support Matrix"; its ROCm build script)."""

    tag: str
    """The end of its version and the name of its index."""

    label: str
    maker: Maker | None = None
    driver: tuple[int, int] = (0, 0)
    """The least CUDA version of NVIDIA's driver: minor versions of one major version are compatible."""

    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    """The least and the largest compute capability."""

    architectures: frozenset[str] = frozenset()
    """AMD's."""


CPU = Build("cpu", "the CPU")
BUILDS = (
    Build("cu130", "CUDA 13.0", "NVIDIA", (13, 0), ((7, 5), (12, 9))),
    Build("cu126", "CUDA 12.6", "NVIDIA", (12, 0), ((5, 0), (9, 0))),
    Build(
        "rocm7.2",
        "ROCm 7.2",
        "AMD",
        architectures=frozenset(
            [
                *(
                    "gfx900",
                    "gfx906",
                    "gfx908",
                    "gfx90a",
                    "gfx942",
                    "gfx950",
                    "gfx1030",
                    "gfx1100",
                    "gfx1101",
                ),
                *("gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201"),
            ]
        ),
    ),
)
"""The builds for GPUs, the newest first."""

ON_PYPI = (CPU.tag, "cu130")
"""Those that the Python package index can stand in for: it has CUDA 13.0's, which runs on CPUs, too."""


@dataclass(frozen=True)
class Choice:
    build: Build
    reason: str
    """The machine and what follows from it, in one line."""


def choose() -> Choice:
    """The build for the GPUs of this machine, or the CPU's if none is for them."""
    machine = this_machine()
    if not machine.gpus:
        return Choice(CPU, "; ".join(["no GPU was found", *machine.troubles]))
    misfits = []
    for maker in machine.makers:
        for build in BUILDS:
            if build.maker == maker:
                misfit = _misfit(build)
                if misfit is None:
                    return Choice(build, f"{machine}{_driver(maker)}")
                misfits.append(misfit)
    return Choice(CPU, f"{machine}{_driver(machine.makers[0])}, and no build is for it: {'; '.join(misfits)}")


def _driver(maker: Maker) -> str:
    cuda = driver_cuda() if maker == "NVIDIA" else None
    return f", driver for CUDA {cuda[0]}.{cuda[1]}" if cuda else ""


def _misfit(build: Build) -> str | None:
    """Why ``build`` is not for the GPUs of its maker here; None if it is for all of them."""
    if build.maker == "AMD":
        strange = {gpu.architecture for gpu in this_machine().of("AMD")} - build.architectures
        return f"the one for {build.label} is not made for {', '.join(sorted(strange))}" if strange else None
    # Where the driver does not say, the build that runs with the most drivers is taken.
    cuda = driver_cuda() or (12, 0)
    if cuda < build.driver:
        return f"the one for {build.label} needs a driver for CUDA {build.driver[0]}.{build.driver[1]}"
    least, most = build.capabilities
    strange_cards = {card for card in compute_capabilities() if not least <= card <= most}
    if strange_cards:
        cards = ", ".join(f"{major}.{minor}" for major, minor in sorted(strange_cards))
        return f"the one for {build.label} is not made for compute capability {cards}"
    return None


def pip_arguments(build: Build) -> list[str]:
    """What to give ``pip install`` for ``build``.

    Raises:
        UserError: PyTorch's index cannot be reached, and the Python package index has no such build.
    """
    index = _index(build)
    trouble = _unreachable(f"{index}/torch/")
    if trouble is None:
        return [f"torch=={VERSION}+{build.tag}", "--extra-index-url", index]
    if build.tag in ON_PYPI:
        return [f"torch=={VERSION}"]
    raise UserError(
        f"{index} cannot be reached ({trouble}), and PyTorch for {build.label} is to be had there only: "
        "install it by hand (docs/torch.md), or name a mirror of that index in PYTORCH_INDEX"
    )


def pip_command() -> str:
    """The command that installs the build for this machine in this Python, for a message."""
    build = choose().build
    return (
        f"{sys.executable} -m pip install --force-reinstall torch=={VERSION}+{build.tag} "
        f"--extra-index-url {_index(build)}"
    )


def _index(build: Build) -> str:
    return f"{os.environ.get('PYTORCH_INDEX', INDEX).rstrip('/')}/{build.tag}"


def _unreachable(url: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (urllib.error.URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def describe_installed() -> str:
    """What this Python's PyTorch is and which GPUs it can use, in one line. Importing it takes seconds.

    Raises:
        UserError: there is none, it is too old, or it cannot be imported.
    """
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise UserError(f"{sys.executable} has no PyTorch") from None
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < LEAST:
        raise UserError(f"PyTorch {version} is too old; the engine needs {LEAST[0]}.{LEAST[1]}")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise UserError(f"PyTorch {version} cannot be imported: {error}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(number) for number in range(count)))
    machine = this_machine()
    if count:
        sees = f"sees {count} GPU{'s' if count > 1 else ''} ({names})"
    elif not machine.gpus:
        sees = "trains on the CPU: no GPU was found"
    elif torch.version.cuda is None and torch.version.hip is None:
        sees = f"is built for the CPU only, and this machine has {machine}; to replace it: {pip_command()}"
    else:
        there = f"{machine}{_driver(machine.makers[0])}"
        sees = f"sees no GPU, and this machine has {there}; to replace it: {pip_command()}"
    return f"PyTorch {version} {sees}"


def main(arguments: Sequence[str]) -> int:
    description, _, usage = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.engines.pytorch.builds", description, usage.strip("\n"))
    parser.add_argument("what", nargs="?", choices=("pip", "installed"))
    what = parser.parse_args(arguments).what
    if what == "installed":
        print(describe_installed())
        return 0
    choice = choose()
    if what == "pip":
        print("\n".join(pip_arguments(choice.build)))
        return 0
    print(f"{choice.reason}: PyTorch {VERSION} for {choice.build.label}")
    print(pip_command())
    return 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pytorch.builds", main))
