"""What CUDA_VISIBLE_DEVICES means, against PyTorch's own reading of it; GPUs that PyTorch refuses."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch.cuda
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.engines import gpus
from caffe_jacinto.engines.gpus import Gpu
from caffe_jacinto.engines.pytorch.engine import refused_gpus

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
