"""What CUDA_VISIBLE_DEVICES means, against PyTorch's own reading of it; GPUs that PyTorch refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.cuda
from hypothesis import given
from hypothesis import strategies as st
from small_stage import SmallStage

from caffe_jacinto.common.errors import USER_ERROR, UserError
from caffe_jacinto.engines import gpus
from caffe_jacinto.engines.gpus import Gpu
from caffe_jacinto.engines.pytorch.distributed import device_of_rank
from caffe_jacinto.engines.pytorch.engine import Options, refused_gpus

UUIDS = ["GPU-3b4e0c9a-91d2", "GPU-3b7f11d0-2a6e", "GPU-61aa6d0c-1f4e"]
CARDS = tuple(Gpu("NVIDIA", "NVIDIA H200", uuid) for uuid in UUIDS)

NUMBERS = st.lists(st.integers(-1, 4).map(str), max_size=5)
NAMES = st.lists(
    st.builds(lambda uuid, length: uuid[:length], st.sampled_from([*UUIDS, "GPU-9"]), st.integers(4, 17)),
    min_size=1,
    max_size=4,
)


def pytorchs_count(visible: str) -> int:
    """As PyTorch counts devices without starting CUDA."""
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible}):
        named = torch.cuda._parse_visible_devices()
    if named and isinstance(named[0], str):
        return len(torch.cuda._transform_uuid_to_ordinals(named, UUIDS))
    return next((index for index, number in enumerate(named) if number >= len(UUIDS)), len(named))


@given(visible=st.one_of(NUMBERS, NAMES).map(",".join))
def test_visible_devices_are_counted_as_pytorch_counts_them(visible: str) -> None:
    assert len(gpus._chosen(CARDS, visible)) == pytorchs_count(visible)


@pytest.mark.caffe  # for its time
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is refused is here")
def test_a_gpu_that_pytorch_cannot_use_is_refused_in_its_words() -> None:
    assert refused_gpus((0,)) == "-gpu 0: this machine has no GPU that PyTorch can use"


@pytest.mark.parametrize("ranks", [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}])
def test_more_ranks_than_gpus_are_refused(ranks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first rank, too, which has a GPU: it is the one that reports."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^3 ranks of this machine have no GPU each: -gpu names 2$"):
        device_of_rank((0, 1), Options())


@pytest.mark.caffe  # for its time
def test_too_many_ranks_are_one_line_of_the_program(tmp_path: Path) -> None:
    """As torchrun starts the first of two ranks that are given one GPU."""
    SmallStage(tmp_path, tmp_path / "lmdb").solver()
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    program = [sys.executable, "-m", "caffe_jacinto.engines.pytorch", "train", "-solver", "solver.prototxt"]
    ran = subprocess.run(
        [*program, "-gpu", "0"],
        cwd=tmp_path,
        env={**os.environ, **ranks},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == USER_ERROR
    assert ran.stderr == "caffe-torch: error: 2 ranks of this machine have no GPU each: -gpu names 1\n"
