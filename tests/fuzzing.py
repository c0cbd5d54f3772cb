"""Damaged weight files and prototxts, thousands of them: whatever reads them may say that they are damaged,
and nothing else.

    python tests/fuzzing.py [--files 100000] [--seconds 0] [--seed 0]

No crash (only `UserError`), no warning, no file that takes more than a second, no memory beyond four times
the file and 100 MB. Exit code 1, and the damaged file's bytes in fuzz_failure.bin, where one is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from google.protobuf import text_format

from caffe_jacinto.caffemodel.convert import convert
from caffe_jacinto.caffemodel.diff import differences
from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.caffemodel.net_file import find_dialect
from caffe_jacinto.caffemodel.show import blob_facts
from caffe_jacinto.caffemodel.storage import read_weights, stored_state
from caffe_jacinto.caffemodel.wire import array_parts, field_parts
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.mean import read_mean
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.onnx import export_onnx
from caffe_jacinto.export.shrink import shrink
from caffe_jacinto.inference.network import trained_network, validation_preprocessing
from caffe_jacinto.netspec.drawing import boxes_of
from caffe_jacinto.netspec.shapes import batch_size, gigamacs
from caffe_jacinto.netspec.summary import summarize
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_any_net, parse_net, parse_solver
from caffe_jacinto.pruning.sparsify import sparsify
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import SparseSettings

SECONDS_A_FILE = 1.0
"""Of the processor's time: a machine that is busy with something else makes nothing slow here."""

PATIENCE = 30.0
"""Seconds by the clock after which a file has hung."""

FREE_BYTES = 100 << 20
"""Memory that a reader may take beside four times its file's size."""

MOST_FILE_BYTES = 1 << 20


class TooSlowError(Exception):
    """A file took more than `SECONDS_A_FILE`, or `PATIENCE`."""


DEPLOY, WEIGHTS = "{}_deploy.prototxt", "{}.caffemodel"
"""A sound network of each dialect, to read damaged files with."""


RULES = (
    SparseSettings(start_iter=0),
    SparseSettings(start_iter=0, by="network", inner_products=True, min_kernel=1),
    SparseSettings(start_iter=0, target=0.5, pattern="2:4", inner_products=True, min_kernel=1),
)
"""Pruning rules: the published one, one threshold for all weights, and a pattern."""


def small_net(dialect: Dialect) -> Any:
    """A network with its weights: an input shift, a convolution, its batch norm, and an inner product."""
    import numpy as np

    net = messages(dialect).NetParameter(name="net", input=["data"])
    net.input_shape.add(dim=[1, 8, 9, 9])
    shift = net.layer.add(name="data/bias", type="Power", bottom=["data"], top=["a"])
    shift.power_param.shift = -128
    conv = net.layer.add(name="conv", type="Convolution", bottom=["a"], top=["b"])
    conv.convolution_param.num_output, conv.convolution_param.group = 32, 2
    conv.convolution_param.kernel_size.append(3)
    norm = net.layer.add(name="conv/bn", type="BatchNorm", bottom=["b"], top=["b"])
    shapes = {conv.name: [(32, 4, 3, 3), (32,)], norm.name: [(32,), (32,), (1,)]}
    if dialect is Dialect.CAFFE_JACINTO:
        norm.batch_norm_param.scale_bias = True
        shapes[norm.name] += [(32,), (32,)]
    else:
        scale = net.layer.add(name="conv/scale", type="Scale", bottom=["b"], top=["b"])
        scale.scale_param.bias_term = True
        shapes[scale.name] = [(32,), (32,)]
    pool = net.layer.add(name="pool", type="Pooling", bottom=["b"], top=["c"])
    pool.pooling_param.kernel_size, pool.pooling_param.stride = 3, 2
    score = net.layer.add(name="score", type="InnerProduct", bottom=["c"], top=["d"])
    score.inner_product_param.num_output = 3
    shapes[score.name] = [(3, 32 * 3 * 3), (3,)]
    for layer in net.layer:
        for shape in shapes.get(layer.name, []):
            layer.blobs.add(data=[1.0] * int(np.prod(shape))).shape.dim.extend(shape)
    return net


def write_sound_networks(folder: Path) -> None:
    for dialect in Dialect:
        net = small_net(dialect)
        (folder / WEIGHTS.format(dialect.value)).write_bytes(net.SerializeToString())
        (folder / DEPLOY.format(dialect.value)).write_text(_deploy(net))


def _deploy(net: Any) -> str:
    bare = type(net)()
    bare.CopyFrom(net)
    for layer in bare.layer:
        layer.ClearField("blobs")
    return str(text_format.MessageToString(bare))


def seeds() -> tuple[list[bytes], list[bytes]]:
    """Sound files to damage: binary ones, and texts."""
    import numpy as np

    binary, texts = [], []
    for dialect in Dialect:
        for stage in ("initial", "sparse"):
            files = stage_files(
                load_recipe("demo_digits"),
                stage,
                dialect,
                folder="f",
                gpus=(0,) if dialect is Dialect.CAFFE_JACINTO else (),
                iter_size=1,
                solver_mode_gpu=dialect is Dialect.CAFFE_JACINTO,
            )
            texts += [text.encode() for text in files.values()]
        net = small_net(dialect)
        texts.append(_deploy(net).encode())
        binary.append(net.SerializeToString())
    state = messages(Dialect.BVLC).SolverState(iter=7, learned_net="x_iter_7.caffemodel")
    history = b"".join(field_parts(3, array_parts(np.ones((4, 3), np.float32))))
    binary.append(state.SerializeToString() + history)
    mean = messages(Dialect.BVLC).BlobProto(num=1, channels=3, height=4, width=5, data=[1.0] * 60)
    binary.append(mean.SerializeToString())
    return binary, texts


def damaged(content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """``content`` after a few of the things that go wrong with files."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        at = dice.randrange(len(data) + 1)
        some = dice.choice((1, 2, 8, 100))
        match dice.randrange(8):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + some]
            case 2:
                data[at : at + some] = dice.randbytes(some)
            case 3 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 4:
                data[at:at] = data[at : at + some] * dice.choice((1, 3, 50))
            case 5:
                other = dice.choice(others)
                start = dice.randrange(len(other) + 1)
                data[at:at] = other[start : start + some]
            case 6:
                data[at:at] = b"\xff" * dice.choice((4, 9, 10)) + b"\x7f"
            case _:
                data = _numbers_changed(data, dice)
    return bytes(data[:MOST_FILE_BYTES])


def _numbers_changed(data: bytearray, dice: random.Random) -> bytearray:
    """A number of a text made another one, or its braces deepened."""
    if dice.random() < 0.1:
        return data + b"layer { " * dice.choice((3, 500, 20_000))
    numbers = list(re.finditer(rb"(?<![\w.])\d+", data))
    if not numbers:
        return data
    chosen = dice.choice(numbers)
    strange = (
        b"0",
        b"-1",
        b"4294967295",
        b"1e400",
        b"nan",
        b"99999999999999999999",
        b"1000000",
        b"0x",
        b"1:",
    )
    data[chosen.start() : chosen.end()] = dice.choice(strange)
    return data


def read_binary(path: Path, folder: Path) -> None:
    """Everything that reads weight files and solver states."""
    readers: list[Callable[[], object]] = [
        lambda: read_weights(path),
        lambda: stored_state(path),
        lambda: read_mean(path),
        lambda: find_dialect(path),
        lambda: differences(path, path, Dialect.BVLC, Dialect.BVLC),
        lambda: differences(path, path, Dialect.BVLC, Dialect.CAFFE_JACINTO),
    ]
    for dialect in Dialect:
        deploy = (folder / DEPLOY.format(dialect.value)).read_text()
        readers += [
            lambda dialect=dialect, deploy=deploy: check_fit(path, parse_net(deploy, dialect, "x")),
            lambda dialect=dialect, deploy=deploy: merge_bn(deploy, "x", dialect, path).weight_bytes(),
            lambda dialect=dialect, deploy=deploy: shrink(deploy, "x", dialect, path).weight_bytes(),
            lambda dialect=dialect, deploy=deploy: export_onnx(deploy, "x", dialect, path),
            lambda dialect=dialect: blob_facts(path, dialect),
            lambda dialect=dialect: convert(path, folder / "out", dialect),
        ]
        readers += [
            lambda dialect=dialect, rule=rule: sparsify(path, folder / "out", dialect, rule, 0.8)
            for rule in RULES
        ]
    for reader in readers:
        with contextlib.suppress(UserError):
            reader()


def read_text(path: Path, folder: Path) -> None:
    """Everything that reads prototxts."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for dialect in Dialect:
        with contextlib.suppress(UserError):
            parse_net(text, dialect, "x")
        with contextlib.suppress(UserError):
            parse_solver(text, dialect, "x")
    with contextlib.suppress(UserError):
        net = tree.parse(text)
        gigamacs(net)
        batch_size(net)
    with contextlib.suppress(UserError):
        boxes_of(summarize(tree.tree_of(parse_any_net(text, "x")), "x"))
    for dialect in Dialect:
        weights = folder / WEIGHTS.format(dialect.value)
        for use in (merge_bn, export_onnx, shrink):
            with contextlib.suppress(UserError):
                use(text, "x", None, weights)
        with contextlib.suppress(UserError):
            trained_network(path, weights)
    with contextlib.suppress(UserError):
        validation_preprocessing(path, (3, 32, 32), folder)


def fuzz(files: int, seconds: float, seed: int) -> tuple[int, str | None, bytes]:
    """Damage and read until there were ``files`` of them, or ``seconds`` have gone (0: no limit).

    Returns how many were read, what was broken if anything, and the file that broke it.
    """
    dice = random.Random(seed)
    binary, texts = seeds()
    for timer in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(timer, _too_slow)
    begun = time.monotonic()
    done, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sound_networks(folder)
        for content in binary + texts:  # what is imported on the way counts for nobody
            (folder / "file").write_bytes(content)
            (read_binary if content in binary else read_text)(folder / "file", folder)
        warnings.simplefilter("error")
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # protobuf's, of strings with escapes that are none
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        while done < files and not (seconds and time.monotonic() - begun > seconds):
            family, read = (binary, read_binary) if dice.random() < 0.5 else (texts, read_text)
            content = damaged(dice.choice(family), family, dice)
            (folder / "file").write_bytes(content)
            _limit_memory(used + FREE_BYTES + 4 * len(content))
            _set_timers(PATIENCE, SECONDS_A_FILE)
            start = time.process_time()
            try:
                read(folder / "file", folder)
            except BaseException as error:
                _set_timers(0, 0)
                return done, f"{type(error).__name__}: {str(error)[:500]}", content
            _set_timers(0, 0)
            slowest = max(slowest, time.process_time() - start)
            done += 1
    print(f"{done:,} files, the slowest {slowest:.2f} s, all in {time.monotonic() - begun:.0f} s", flush=True)
    return done, None, b""


def _set_timers(clock: float, processor: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, clock)
    signal.setitimer(signal.ITIMER_PROF, processor)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"more than {SECONDS_A_FILE} s of the processor's time, or {PATIENCE} s")


def _limit_memory(most: int) -> None:
    """Let the process have no more than ``most`` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    done, trouble, content = fuzz(arguments.files, arguments.seconds, arguments.seed)
    if trouble is None:
        return 0
    Path("fuzz_failure.bin").write_bytes(content)
    print(
        f"file {done} of seed {arguments.seed}: {trouble}; its bytes are in fuzz_failure.bin", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
