"""A stage's solver.prototxt, as far as the stepper carries it out itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.snapshots import check_prefix


@dataclass(frozen=True)
class SolverFile:
    """A parsed solver.prototxt."""

    path: Path
    parameters: Any
    """The SolverParameter message of the Caffe that runs."""

    @property
    def train_net(self) -> str:
        return str(self.parameters.train_net or self.parameters.net)

    @property
    def test_nets(self) -> list[tuple[str, int]]:
        """Each test net's file and its batches in one test."""
        batches = list(self.parameters.test_iter)
        files = list(self.parameters.test_net) or [self.parameters.net] * len(batches)
        return list(zip(files, batches, strict=True))

    def frozen_layers(self) -> frozenset[str]:
        """The layers of the train net that training leaves as they are: what learns has learning rates of 0,
        and batch-norm statistics are those that are there.

        Raises:
            UserError: the train net's file cannot be read or parsed.
        """
        from caffe.proto import caffe_pb2

        net = _parsed(Path(self.train_net), caffe_pb2.NetParameter())
        return frozenset(layer.name for layer in net.layer if _is_frozen(layer))

    def snapshot(self, iteration: int, extension: str) -> Path:
        """The file that Caffe gives a snapshot of ``iteration``."""
        return Path(f"{self.parameters.snapshot_prefix}_iter_{iteration}{extension}")


def read_solver(path: Path) -> SolverFile:
    """Parse ``path`` with the schema of the pycaffe that is imported.

    Raises:
        UserError: it cannot be read or parsed, or holds its nets inside itself.
    """
    from caffe.proto import caffe_pb2

    parameters = _parsed(path, caffe_pb2.SolverParameter())
    solver = SolverFile(path, parameters)
    if not solver.train_net or parameters.test_net_param or parameters.HasField("train_net_param"):
        raise UserError(f"{path}: name the nets as files, by train_net and test_net")
    if len(parameters.test_iter) != len(parameters.test_net or parameters.test_iter):
        raise UserError(
            f"{path}: {len(parameters.test_net)} of test_net and {len(parameters.test_iter)} of test_iter; "
            "give each test net its batches"
        )
    check_prefix(path, parameters.snapshot_prefix)
    return solver


def _parsed(path: Path, message: Any) -> Any:
    """``message``, filled from the text file ``path``."""
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), message)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except text_format.ParseError as error:
        raise UserError(f"{path}:{error}") from error


def _is_frozen(layer: Any) -> bool:
    if layer.type == "BatchNorm":
        # Its blobs are statistics, whose learning rates are 0 in any case.
        return bool(layer.batch_norm_param.use_global_stats)
    return bool(layer.param) and all(parameter.lr_mult == 0 for parameter in layer.param)


def stepped_solver(caffe: Any, solver: SolverFile) -> Any:
    """Caffe's solver for ``solver``, without the tests, snapshots and display that the stepper does itself.

    Caffe would do them at the right iterations, but before the zeros are put back.
    """
    from google.protobuf import text_format

    quiet = type(solver.parameters)()
    quiet.CopyFrom(solver.parameters)
    for field in ("test_net", "test_iter", "test_state", "test_interval", "display", "snapshot"):
        quiet.ClearField(field)
    quiet.snapshot_format = quiet.BINARYPROTO
    if quiet.net:
        quiet.train_net = quiet.net
        quiet.ClearField("net")
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt", encoding="utf-8") as file:
        file.write(text_format.MessageToString(quiet, as_utf8=True))
        file.flush()
        return caffe.get_solver(file.name)
