"""What tools/utils/gpu.sh runs on a GPU, tried on the CPU: that it is written right, nothing of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.caffe  # for the time


def test_the_tests(tmp_path: Path) -> None:
    """The CPU, by other ways to compute, stands in for the GPU."""
    outcomes = tmp_path / "outcomes.json"
    command = [sys.executable, str(ROOT / "tests/gpu_session.py"), "--limit", "900"]
    ran = subprocess.run(
        [*command, "--outcomes", str(outcomes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "REHEARSE_GPU_TESTS": "1"},
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert json.loads(outcomes.read_text())["passed"] > 70


def test_the_measurements(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "bench/torch_gpu.py"), "--rehearse", "--json", str(results)]
    ran = subprocess.run(
        [*command, "--batch", "4", "--images", "64", "--limit", "600"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    content = json.loads(results.read_text())
    assert content["complete"] and not content["failed"]
    assert [(row["part"], row["precision"]) for row in content["rows"]] == [
        *(("end to end", "fp32"), ("compute", "fp32"), ("by hand", "bf16")),
        *(("end to end", "bf16"), ("feed", ""), ("compute", "bf16")),
    ]
    assert "| compute, -graph false | bf16 | 4 |" in ran.stdout


def test_without_a_gpu_there_is_nothing_to_measure(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ran = subprocess.run(
        [sys.executable, str(ROOT / "bench/torch_gpu.py"), "--images", "64"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 2
    assert ran.stderr == "bench/torch_gpu: error: this machine has no GPU that PyTorch can use\n"
