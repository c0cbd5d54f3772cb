"""What this engine says in Caffe's words beyond `engines.caffe_log`: its start, its solver and its nets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import FAILED, USER_ERROR, RunFailed, UserError
from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.dialects import Dialect

SOURCE = "caffe.cpp:0"
"""The file that Caffe's own command line logs from: readers of logs know it by that."""


@contextmanager
def opened(ranks: Ranks, gpus: tuple[int, ...], dialect: Dialect, precision: str) -> Iterator[None]:
    """Log as Caffe does, the first rank alone, beginning with what this is and where it runs.

    A `UserError` inside becomes a fatal line, as readers of the log expect it, and the exit code.
    """
    _start(ranks, gpus, dialect, precision)
    try:
        yield
    except UserError as error:
        caffe_log.write_line("F", str(error), SOURCE)
        raise SystemExit(FAILED if isinstance(error, RunFailed) else USER_ERROR) from None
    except torch.OutOfMemoryError as error:
        caffe_log.write_line(
            "F", f"the GPU's memory is too small: use a smaller batch_size ({UserError(error)})", SOURCE
        )
        raise SystemExit(FAILED) from None


def _start(ranks: Ranks, gpus: tuple[int, ...], dialect: Dialect, precision: str) -> None:
    if ranks.first:
        caffe_log.log_with(lambda message: caffe_log.write_line("I", message, SOURCE))
    else:
        caffe_log.log_with(lambda message: None)
    caffe_log.info(
        f"This is caffe-torch {__version__} (PyTorch {torch.__version__}, files of dialect {dialect.value}, "
        f"{precision})"
    )
    # Over several machines the ranks count, wherever their GPUs are.
    caffe_log.using_devices(gpus if ranks.size in (1, len(gpus)) or not gpus else range(ranks.size))
    if ranks.size > 1 and not gpus:
        caffe_log.info(f"{ranks.size} ranks train together")


def warn(message: str) -> None:
    """A W line; of the first rank only by its caller."""
    caffe_log.write_line("W", message, SOURCE)


def solver(parameters: Any) -> None:
    """The solver's settings."""
    caffe_log.info(f"Initializing solver from parameters: \n{_text(parameters)}")


def net(definition: Any, built: Net) -> None:
    """The layers of a net's phase, and what its data layers give."""
    shown = type(definition)()
    shown.CopyFrom(definition)
    del shown.layer[:]
    shown.layer.extend(built.layers)
    caffe_log.info(f"Initializing net from parameters: \n{_text(shown)}")
    for layer in built.data_layers:
        shape = ",".join(map(str, built.shapes[layer.top[0]]))
        caffe_log.info(f"output data size: {shape}")
    for name in built.output_names:
        caffe_log.info(f"This network produces output {name}")
    caffe_log.info("Network initialization done.")


def outputs(kind: str, found: dict[str, list[float]], weights: dict[str, float]) -> None:
    """The numbers of a ``Train`` or ``Test`` net, each output's by its name."""
    index = 0
    for name, values in found.items():
        for value in values:
            caffe_log.net_output(kind, index, name, value, weights.get(name, 0.0))
            index += 1


def _text(message: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(message, as_utf8=True)).rstrip()
