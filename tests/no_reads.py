"""A stand-in for a device that must not be waited for: on the CPU, whatever reads a tensor's value fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
"""They wait where an index says of each value whether it is meant."""

_READS: set[Any] = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu),
    # New tensors with the host's values: they are copied to the device at once.
    *(torch.tensor, torch.as_tensor),
}
"""What reads, or copies, without an operation that could be seen."""


class Waited(Exception):  # noqa: N818 - what it would do on a device
    """Something was read that a device may still be computing."""


class _Operations(TorchDispatchMode):
    """Fails at operations whose results, or their shapes, depend on values and are needed at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
            waits = not tags.isdisjoint(func.tags)
        if waits:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_is_read() -> Iterator[None]:
    """A context in which `Waited` is raised where on a GPU the process would wait for the device."""
    with _Operations(), _Functions(), mock.patch.object(torch, "from_numpy", _copies):
        yield


def _copies(values: object) -> Tensor:
    raise Waited("torch.from_numpy")
