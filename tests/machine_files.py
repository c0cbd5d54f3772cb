"""Machines with GPUs as their drivers describe them: the kernel's files in a folder, and nvidia-smi's output.

No machine that the tests run on has a GPU. nvidia-smi is a script that prints what the real one does; the
files of ``/proc``, ``/sys`` and ``/dev`` have the form of real ones.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from caffe_jacinto.engines import gpus

TWO_H200 = """\
GPU 0: NVIDIA H200 (UUID: GPU-3b4e0c9a-91d2-4c55-8f4b-0c9d1a2b3c4d)
GPU 1: NVIDIA H200 (UUID: GPU-3b7f11d0-2a6e-4f0b-9a57-77aa21e0c5d1)
"""
GTX_1080 = "GPU 0: NVIDIA GeForce GTX 1080 (UUID: GPU-61aa6d0c-1f4e-4b22-8d0e-2f1f0d5a9b10)\n"
MIG = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9434a402-0d94-4ef8-93d0-0528ee662e9c)
  MIG 3g.40gb     Device  0: (UUID: MIG-e138a708-679d-5075-ab88-ba8e298ec5d3)
  MIG 1g.10gb     Device  1: (UUID: MIG-ae9a37c7-4e38-5a4c-8229-7f07dc126721)
"""
HEADER = "| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}     |"
NEW_HEADER = "| NVIDIA-SMI {driver}              KMD Version: {driver}     CUDA UMD Version: {cuda}     |"

INFORMATION = """\
Model: \t\t {name}
IRQ:   \t\t 185
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.99.00.01
Bus Type: \t PCIe
DMA Size: \t 52 bits
DMA Mask: \t 0xfffffffffffff
Bus Location: \t {bus}
Device Minor: \t 0
GPU Firmware: \t 580.95.05
GPU Excluded:\t {excluded}
"""
KFD_CPU = """\
cpu_cores_count 96
simd_count 0
mem_banks_count 1
gfx_target_version 0
vendor_id 0
device_id 0
location_id 0
drm_render_minor 0
"""
KFD_GPU = """\
cpu_cores_count 0
simd_count 1216
mem_banks_count 1
caches_count 626
wave_front_size 64
gfx_target_version {gfx}
vendor_id 4098
device_id 29857
location_id 18176
domain 0
drm_render_minor {minor}
local_mem_size 0
unique_id {unique}
num_xcc 8
"""


class Machine:
    """A machine whose files are under ``root`` and whose programs are in ``bin``; without a GPU at first."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "machine", folder / "machine_bin"
        self.root.mkdir()
        self.bin.mkdir()

    def write(self, path: str, text: str = "") -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)

    def nvidia_smi(
        self,
        listing: str,
        cuda: str = "13.0",
        capabilities: str = "",
        driver: str = "580.95.05",
        header: str = HEADER,
        path: Path | None = None,
    ) -> None:
        """nvidia-smi on the search path, or at ``path``."""
        answers = {
            "-L": listing.rstrip("\n"),
            "--query-gpu=compute_cap": capabilities,
            "": header.format(driver=driver, cuda=cuda),
        }
        cases = "".join(f"{shlex.quote(key)}) echo {shlex.quote(said)} ;;\n" for key, said in answers.items())
        self.program(path or self.bin / "nvidia-smi", f'case "$1" in\n{cases}*) exit 2 ;;\nesac\n')

    def broken_nvidia_smi(self, says: str, code: int) -> None:
        self.program(self.bin / "nvidia-smi", f"echo {shlex.quote(says)}\nexit {code}\n")

    def driver_gpu(self, bus: str, name: str, uuid: str, excluded: str = "No") -> None:
        """A GPU in the driver's own files."""
        text = INFORMATION.format(name=name, uuid=uuid, bus=bus, excluded=excluded)
        self.write(f"proc/driver/nvidia/gpus/{bus}/information", text)

    def amd(self, *gfx: int, cpus: int = 1) -> None:
        """AMD GPUs of these versions behind ``cpus`` nodes that are processors."""
        self.write("dev/kfd")
        for number in range(cpus):
            self.write(f"sys/class/kfd/kfd/topology/nodes/{number}/properties", KFD_CPU)
        for index, version in enumerate(gfx):
            text = KFD_GPU.format(gfx=version, minor=128 + index, unique=4376936076086227261 + index)
            self.write(f"sys/class/kfd/kfd/topology/nodes/{cpus + index}/properties", text)
            self.write(f"dev/dri/renderD{128 + index}")

    def on_the_bus(self, vendor: str, device_class: str = "0x030200") -> None:
        self.write("sys/bus/pci/devices/0000:01:00.0/vendor", f"{vendor}\n")
        self.write("sys/bus/pci/devices/0000:01:00.0/class", f"{device_class}\n")


def stand_in_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Machine:
    """Takes the place of the machine that the test runs on."""
    made = Machine(folder)
    monkeypatch.setattr(gpus, "ROOT", made.root)
    monkeypatch.setenv("PATH", str(made.bin))
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return made
