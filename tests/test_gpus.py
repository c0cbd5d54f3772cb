"""Counting GPUs, and the build of PyTorch for them; the files of `machine_files` stand for the drivers'."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from machine_files import GTX_1080, MIG, NEW_HEADER, TWO_H200, Machine, stand_in_machine

from caffe_jacinto.common.arguments import gpu_request
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.gpus import (
    any_visible,
    driver_cuda,
    lack,
    requested_gpus,
    this_machine,
    visible_gpus,
)
from caffe_jacinto.engines.pytorch import builds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return stand_in_machine(monkeypatch, tmp_path)


def names() -> list[str]:
    return [gpu.name for gpu in this_machine().gpus]


# --- NVIDIA


def test_nvidia_smi_lists_them(machine: Machine) -> None:
    machine.nvidia_smi(TWO_H200)
    assert names() == ["NVIDIA H200", "NVIDIA H200"]
    assert str(this_machine()) == "2 NVIDIA GPUs (NVIDIA H200)"
    assert this_machine().gpus[1].uuid == "GPU-3b7f11d0-2a6e-4f0b-9a57-77aa21e0c5d1"


def test_nvidia_smi_is_also_found_off_the_search_path(machine: Machine) -> None:
    machine.nvidia_smi(GTX_1080, path=machine.root / "usr/lib/wsl/lib/nvidia-smi")
    assert names() == ["NVIDIA GeForce GTX 1080"]


def test_without_nvidia_smi_the_drivers_files_count(machine: Machine) -> None:
    machine.write("dev/nvidia0")
    machine.write("dev/nvidiactl")
    assert names() == ["NVIDIA GPU"]


def test_an_excluded_gpu_does_not_count(machine: Machine) -> None:
    machine.driver_gpu("0000:62:00.0", "NVIDIA H100 80GB HBM3", "GPU-9221d5d1")
    machine.driver_gpu("0000:63:00.0", "NVIDIA H100 80GB HBM3", "GPU-aa21d5d1", excluded="Yes")
    machine.write("dev/nvidia0")
    assert [(gpu.name, gpu.uuid) for gpu in this_machine().gpus] == [
        ("NVIDIA H100 80GB HBM3", "GPU-9221d5d1")
    ]


def test_of_a_partitioned_gpu_a_program_sees_one_part(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.nvidia_smi(MIG)
    assert names() == ["NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"]
    assert len(visible_gpus("NVIDIA")) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-ae9a37c7-4e38-5a4c-8229-7f07dc126721")
    assert [gpu.name for gpu in visible_gpus("NVIDIA")] == ["NVIDIA A100-SXM4-80GB MIG 1g.10gb"]


@pytest.mark.parametrize(
    ("hidden", "seen"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("0,1,2", [0, 1]),
        ("0,0", []),
        ("GPU-3b7f", [1]),
        ("GPU-3b", []),  # the beginning of both
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, hidden: str, seen: list[int]
) -> None:
    machine.nvidia_smi(TWO_H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    both = this_machine().gpus
    assert visible_gpus("NVIDIA") == tuple(both[index] for index in seen)
    if not seen:
        assert lack() == f"CUDA_VISIBLE_DEVICES={hidden} hides this machine's 2 GPUs"


def test_a_driver_that_does_not_work_is_said_with_its_own_words(machine: Machine) -> None:
    machine.broken_nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", 18)
    assert lack() == (
        "this machine has no GPU that can be used; NVIDIA's driver does not answer (nvidia-smi: Failed to "
        "initialize NVML: Driver/library version mismatch)"
    )


def test_what_is_no_gpu_on_the_bus_is_none(machine: Machine) -> None:
    machine.on_the_bus("0x10de", device_class="0x0c0330")  # the USB controller on a graphics card
    assert lack() == "this machine has no GPU"


def test_a_card_on_the_bus_without_a_driver_is_named(machine: Machine) -> None:
    machine.on_the_bus("0x10de")
    assert "an NVIDIA GPU is on the PCI bus, but its driver is not loaded" in lack("NVIDIA")
    assert lack("AMD") == "this machine has no AMD GPU"


@pytest.mark.parametrize(
    ("driver", "cuda", "header"), [("535.104.05", "12.2", None), ("610.43.02", "13.3", NEW_HEADER)]
)
def test_the_drivers_cuda_version(machine: Machine, driver: str, cuda: str, header: str | None) -> None:
    machine.nvidia_smi(TWO_H200, cuda, driver=driver, **({"header": header} if header else {}))
    assert driver_cuda() == tuple(map(int, cuda.split(".")))


@pytest.mark.parametrize(
    ("version", "cuda"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.51.03  Fri May 30 10:13:51 UTC 2025", (12, 9)),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-b@U22)",
            (13, 0),
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  595.84  Release Build", (13, 1)),
        ("", None),
    ],
)
def test_the_drivers_cuda_version_without_nvidia_smi(
    machine: Machine, version: str, cuda: tuple[int, int] | None
) -> None:
    machine.write(
        "proc/driver/nvidia/version", f"{version}\nGCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6)\n"
    )
    assert driver_cuda() == cuda


# --- AMD


def test_amds_are_the_nodes_of_the_compute_driver(machine: Machine) -> None:
    machine.amd(90402, 90010, cpus=2)
    assert names() == ["AMD gfx942", "AMD gfx90a"]
    assert str(this_machine()) == "2 AMD GPUs (AMD gfx942, AMD gfx90a)"
    assert this_machine().gpus[0].uuid == "GPU-3cbe002bd3b6313d"


def test_ten_nodes_count_in_their_order(machine: Machine) -> None:
    machine.amd(*[90402] * 10, 110501)
    assert names()[-1] == "AMD gfx1151"


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({"HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "1,2"}, [1, 2]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"ROCR_VISIBLE_DEVICES": "GPU-3cbe002bd3b6313f"}, [2]),
    ],
)
def test_amds_visible_devices(machine: Machine, environment: dict[str, str], seen: list[int]) -> None:
    machine.amd(90402, 90402, 90402)
    three = this_machine().gpus
    assert visible_gpus("AMD", environment) == tuple(three[index] for index in seen)


def test_gpus_that_a_container_was_not_given(machine: Machine) -> None:
    machine.amd(90402, 90402, 90402)
    (machine.root / "dev/dri/renderD129").unlink()
    (machine.root / "sys/class/kfd/kfd/topology/nodes/3/properties").unlink()
    assert len(this_machine().of("AMD")) == 1


def test_an_amd_gpu_without_its_compute_driver(machine: Machine) -> None:
    machine.on_the_bus("0x1002", "0x038000")
    assert "/dev/kfd is not there" in lack("AMD")


def test_a_device_that_this_user_may_not_open_names_the_group() -> None:
    folder = Path(tempfile.mkdtemp(prefix="caffe_jacinto-"))
    try:
        folder.chmod(0o755)
        machine = Machine(folder)
        machine.amd(90402)
        (machine.root / "dev/kfd").chmod(0o600)
        if os.geteuid() != 0:
            (machine.root / "dev/kfd").chmod(0)
        code = (
            "import sys; from pathlib import Path; from caffe_jacinto.engines import gpus;"
            "gpus.ROOT = Path(sys.argv[1]); print(gpus.lack())"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, machine.root],
            user=65534 if os.geteuid() == 0 else None,
            env={"PATH": str(machine.bin), "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        if "Permission denied" in ran.stderr and os.geteuid() == 0:
            pytest.skip("another user may not read this checkout")
        assert "may not open /dev/kfd: add the user to the groups render and video" in ran.stdout, ran.stderr
    finally:
        shutil.rmtree(folder)


# --- what is requested


def test_all_and_auto(machine: Machine) -> None:
    assert (gpu_request("all"), gpu_request("auto"), gpu_request("1,0"), gpu_request("")) == (
        *("all", "auto", (1, 0)),
        (),
    )
    with pytest.raises(UserError, match="all GPUs were requested, but this machine has no GPU"):
        requested_gpus("all", None)
    assert requested_gpus("auto", None) == ()
    assert not any_visible()


@pytest.mark.parametrize("maker", [None, "NVIDIA"])
def test_all_of_two(machine: Machine, maker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.nvidia_smi(TWO_H200)
    machine.amd(100306)  # the one inside the processor
    assert requested_gpus("all", maker) == (0, 1)
    assert requested_gpus("auto", maker) == (0, 1)
    assert requested_gpus("all", "AMD") == (0,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert requested_gpus("all", maker) == (0,)


# --- the build of PyTorch


@pytest.mark.parametrize(
    ("cuda", "capabilities", "tag", "says"),
    [
        ("13.0", "9.0\n9.0", "cu130", "2 NVIDIA GPUs (NVIDIA H200), driver for CUDA 13.0"),
        ("13.3", "12.0\n9.0", "cu130", "driver for CUDA 13.3"),
        ("12.2", "9.0\n9.0", "cu126", "driver for CUDA 12.2"),
        ("13.0", "6.1\n9.0", "cu126", ""),  # a Pascal beside a Hopper
        ("12.8", "10.0\n10.0", "cpu", "needs a driver for CUDA 13.0"),
        ("11.4", "8.0\n8.0", "cpu", "needs a driver for CUDA 12.0"),
        ("13.0", "3.5\n3.5", "cpu", "is not made for compute capability 3.5"),
        ("12.2", "", "cu126", ""),  # an nvidia-smi that does not know the question
    ],
)
def test_the_build_follows_driver_and_card(
    machine: Machine, cuda: str, capabilities: str, tag: str, says: str
) -> None:
    machine.nvidia_smi(TWO_H200, cuda, capabilities)
    choice = builds.choose()
    assert choice.build.tag == tag, choice.reason
    assert says in choice.reason


def test_the_build_for_no_gpu(machine: Machine) -> None:
    assert builds.choose() == builds.Choice(builds.CPU, "no GPU was found")


def test_the_build_for_amd(machine: Machine) -> None:
    machine.amd(90402, 110501)
    assert builds.choose().build.tag == "rocm7.2"


def test_an_amd_gpu_that_no_build_is_for(machine: Machine) -> None:
    machine.amd(100306)
    choice = builds.choose()
    assert choice.build is builds.CPU
    assert "is not made for gfx1036" in choice.reason


def test_pip_is_told_the_index_or_that_it_is_not_reached(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_INDEX", "http://127.0.0.1:9/whl")
    cu130, cu126, rocm = builds.BUILDS
    assert builds.pip_arguments(builds.CPU) == [f"torch=={builds.VERSION}"]
    assert builds.pip_arguments(cu130) == [f"torch=={builds.VERSION}"]
    for build in (cu126, rocm):
        with pytest.raises(UserError, match=r"127\.0\.0\.1:9/whl/\S+ cannot be reached .*PYTORCH_INDEX"):
            builds.pip_arguments(build)
