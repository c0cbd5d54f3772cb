"""The numbers that a net computes with; weights, statistics and losses are float32 in any case."""

from __future__ import annotations

import torch

from caffe_jacinto.engines.contract import Precision

__all__ = ["Precision", "autocast"]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions and inner products compute in bfloat16, if ``precision`` is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
