"""The layers that tests/test_torch_gpu.py compares with the CPU's: all of them, and each text is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_layer import ONE_LAYER, drawn, net_on, one_pass, text_of, write_teacher

from caffe_jacinto.engines.pytorch.layers import LAYERS

WITHOUT_GRADIENT = {"Accuracy", "ArgMax", "DummyData", "Silence", "Threshold"}
"""Layers that pass no gradient to an input, and have nothing to learn."""


def test_every_layer_is_tested() -> None:
    assert ONE_LAYER.keys() == LAYERS.keys()


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_each_layer_runs_forward_and_backward(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path)
    net = net_on(torch.device("cpu"), text_of(kind))
    found = one_pass(net, drawn(net))
    assert all(value.isfinite().all() for value in found.values())
    assert any(name.startswith("output ") for name in found) or kind == "Silence"
    learned = [
        f"gradient of {layer}[{index}]" for layer, index, blob in net.blobs if blob.tensor.requires_grad
    ]
    assert all(name in found for name in learned)
    gradients = [name for name in found if name.startswith("gradient of ") and found[name].any()]
    assert (gradients == []) == (kind in WITHOUT_GRADIENT), list(found)
