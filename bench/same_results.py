"""Compare the results of this checkout with those of another revision.

    python bench/same_results.py REVISION [--only CHECK...] [--logs PATH...] [--weights WEIGHTS DEPLOY]...

Both run the same commands, each in its own folders (REVISION in a temporary git worktree). The files they
write and the output they print are compared. The checks take about 15 minutes in all:

    prototxts   all files of all stages of the built-in recipes, on stock Caffe, the fork and PyTorch, with
                several GPUs and passes; build_net with its options
    summaries   build_net --summary and --draw, of the networks that can be built and of published ones
    reports     the report on logs, in every format
    weights     weights show, diff, convert, sparsify, merge-bn and export
    training    LMDBs of digits; a tiny recipe's stages on stock Caffe and PyTorch, every snapshot to the bit

Published logs, networks and weights come from $CAFFE_JACINTO_PUBLISHED (folders logs, networks, prototxt).
Bytes, figures and the fields of JSON and CSV must be the same; texts for people may differ in words. Commands
that both refuse and that write no file are counted separately. Prints a Markdown table and each difference;
the exit code is 1 if one is not in `EXPECTED`, where a change that intends to alter results lists them.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

EXPECTED = {
    r"^summaries/\S*(train|test)_prototxt/": "the three channels behind a data layer were taken for one",
    r"^weights/\S*mtcnn1_det1/.*text": "a convolution straight before the softmax is not counted",
    r"^weights/\S*v1_\S*caffemodel: other": "all of the old form's types have their names, and not a number",
    r"^training/.*/run\.log: tests": "tests within a stage now come after recalibration",
}
"""Regular expressions for ``check/folder/file: difference``, and the reason why each is expected."""

SHOWN = 12
"""Lines shown of the differences in one file."""

DRIVER = """
import contextlib, importlib, io, json, os, pathlib, sys, traceback
import caffe_jacinto
assert pathlib.Path(caffe_jacinto.__file__).is_relative_to(os.environ["PYTHONPATH"]), caffe_jacinto.__file__
for folder, name, command, arguments in json.load(sys.stdin):
    where = pathlib.Path(sys.argv[1], folder)
    where.mkdir(parents=True, exist_ok=True)
    os.chdir(where)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = importlib.import_module("caffe_jacinto." + command).main(arguments)
        except SystemExit as error:
            code = error.code
        except Exception as error:
            code = type(error).__name__
            print(where, name, file=sys.stderr)
            traceback.print_exc()
    (where / f"{name}.said").write_text(json.dumps([code, out.getvalue()]))
"""
"""Runs commands of the package on PYTHONPATH, all in one process, each in its folder."""


class Step(NamedTuple):
    """A command of the package; ``name`` ends in the kind of its output: .json, .csv, .text, or none."""

    folder: str
    name: str
    command: str
    arguments: Sequence[str]


Steps = Iterator[Step]


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    columns = ("same", "refused by both", "other words", "expected", "DIFFERS")
    rows, found, passed = [f"| check | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)], [], True
    with tempfile.TemporaryDirectory() as name, _worktree(arguments.revision) as other:
        arguments.scratch = Path(name)
        for check in arguments.only:
            print(f"{check} ...", file=sys.stderr, flush=True)
            steps = list(CHECKS[check](arguments))
            folders = [Path(name, side, check) for side in ("before", "now")]
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, (other, ROOT), folders, (steps, steps)))
            verdicts: Counter[str] = Counter()
            for verdict, lines in _compare(check, *folders):
                verdicts[verdict] += 1
                found += [f"{verdict}: {line}" for line in lines]
            rows.append(f"| {check} | {' | '.join(str(verdicts[column]) for column in columns)} |")
            passed &= verdicts["same"] > 0 and not verdicts["DIFFERS"]
    print(*rows, "", *found, sep="\n")
    return 0 if passed else 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s REVISION ...", formatter_class=raw)
    parser.add_argument("revision", metavar="REVISION")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--logs", type=Path, nargs="+", default=[])
    pair = ("WEIGHTS", "DEPLOY")
    parser.add_argument("--weights", type=Path, nargs=2, action="append", default=[], metavar=pair)
    arguments = parser.parse_args(argv)
    arguments.published = Path(os.environ.get("CAFFE_JACINTO_PUBLISHED", os.devnull)).absolute()
    return arguments


@contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def _run(checkout: Path, folder: Path, steps: Sequence[Step]) -> None:
    """Run the steps in ``folder`` with the package in ``checkout``."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(checkout), "COLUMNS": "200", "NO_COLOR": "1"}
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", DRIVER, str(folder)]
    with (folder / "stderr").open("w") as said:
        text = json.dumps(steps)
        subprocess.run(command, cwd=folder, env=environment, input=text, text=True, stderr=said, check=True)


# ------------------------------------------------------------------------------------------------- the checks

DIALECTS = ("bvlc", "caffe_jacinto")
ENGINES = {
    "bvlc": ("--engine", "bvlc"),
    **{f"torch_{dialect}": ("--engine", "torch", "--dialect", dialect) for dialect in DIALECTS},
}
NETWORKS = ("jacintonet11", "resnet10", "bvlc_alexnet")
DEVICES = (
    (),
    ("--iter-size", "4"),
    ("--gpus", "0"),
    ("--gpus", "0,1"),
    ("--gpus", "0,1", "--iter-size", "2"),
)
BUILD_OPTIONS = (
    *DEVICES,
    ("--num-classes", "10", "--crop-size", "64"),
    ("--train-lmdb", "a/b c", "--val-lmdb", 'd"e', "--val-images", "777", "--mean-file", "mean"),
    ("--batch-size", "64", "--iter-size", "2"),
    ("--strides", "1,2,2,2,2", "--crop-size", "32", "--cpu"),
    *(("--stage", stage) for stage in ("sparse", "l1reg", "finetune")),
)


def _prototxts(arguments: argparse.Namespace) -> Steps:
    fork = arguments.scratch / "fork"  # it is only asked which Caffe it is
    fork.write_text("#!/bin/sh\n# snapshot_prefix sparsity_target\necho 'caffe version 0.17.0'\n")
    fork.chmod(0o755)
    for recipe in sorted(path.stem for path in (ROOT / "caffe_jacinto/recipes").glob("*.toml")):
        for engine, options in {**ENGINES, "fork": ("--caffe", str(fork))}.items():
            for number, devices in enumerate(DEVICES):
                words = (recipe, "--dry-run", "--output", "run", *options, *devices)
                yield Step(f"{recipe}_{engine}_{number}", "train", "train", words)
    for network in NETWORKS:
        for dialect in DIALECTS:
            for number, options in enumerate(BUILD_OPTIONS):
                words = ("--output", "out", "--network", network, "--dialect", dialect, *options)
                yield Step(f"{network}_{dialect}_{number}", "build_net", "build_net", words)


def _summaries(arguments: argparse.Namespace) -> Steps:
    for network in NETWORKS:
        words = ("--network", network, "--draw", "drawn.svg", "--format", "json", "--summary")
        yield Step(network, "summary.json", "build_net", words)
    for file in sorted(arguments.published.glob("**/*.prototxt")):
        folder = _folder(file) + "_prototxt"
        for form in () if "solver" in file.name else ("json", "csv", "text"):
            words = ("--summary", str(file), "--format", form, "--draw", "drawn.svg")
            yield Step(folder, f"summary.{form}", "build_net", words)
    for weights, deploy in _pairs(arguments):
        words = ("--summary", str(deploy), "--weights", str(weights), "--format", "json")
        yield Step(_folder(weights), "summary.json", "build_net", words)


def _reports(arguments: argparse.Namespace) -> Steps:
    paths = [path.absolute() for path in arguments.logs] + [arguments.published / "logs"]
    for path in paths:
        for log in (path, *sorted(path.glob("**/*.log"))):
            for form, ending in {"json": "json", "csv": "csv", "markdown": "text", "table": "text"}.items():
                words = (str(log), "--format", form)
                yield Step(_folder(log), f"{form}.{ending}", "report", words)


def _weights(arguments: argparse.Namespace) -> Steps:
    for weights, deploy in _pairs(arguments):
        folder, file = _folder(weights), str(weights)
        for form in ("json", "csv", "text"):
            yield Step(folder, f"show.{form}", "weights", ("show", file, "--format", form))
        for origin, to in (DIALECTS, DIALECTS[::-1]):
            words = ("convert", file, "--from", origin, "--to", to, "--output", f"{to}.caffemodel")
            yield Step(folder, f"convert_{to}", "weights", words)
        for target, by, caps in (
            ("0.8", "channel", "on"),
            ("0.5", "channel", "off"),
            ("0.7", "layer", "off"),
        ):
            output = f"{by}_{caps}.caffemodel"
            words = ("sparsify", file, "--target", target, "--by", by, "--caps", caps, "--output", output)
            yield Step(folder, f"sparsify_{by}_{caps}.text", "weights", words)
        yield Step(folder, "diff.text", "weights", ("diff", file, "channel_on.caffemodel"))
        yield Step(folder, "merge-bn", "weights", ("merge-bn", file, str(deploy), "--output", "merged"))
        yield Step(folder, "export", "weights", ("export", file, str(deploy), "--onnx", "net.onnx"))


def _pairs(arguments: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Weights and their networks: those given, and the published ones in the same folder."""
    published = sorted(arguments.published.glob("networks/*.caffemodel"))
    pairs = [(file, file.with_name(f"{file.stem.partition('_iter_')[0]}.prototxt")) for file in published]
    return [(weights.absolute(), deploy.absolute()) for weights, deploy in (*arguments.weights, *pairs)]


def _folder(path: Path) -> str:
    return "_".join(path.with_suffix("").parts[-3:])


ITERATIONS = {"initial": 6, "l1reg": 6, "sparse": 12, "finetune": 6}
SETTINGS = [
    *(
        "training.batch_size=8",
        "training.reestimate_batches=2",
        "training.keep=99",
        "network.strides=[2,2,2,2,1]",
    ),
    *("data.train_lmdb=../train_lmdb", "data.val_lmdb=../val_lmdb"),
    *("stages.sparse.sparse.start_iter=1", "stages.sparse.sparse.step_iter=2"),
    *("stages.sparse.sparse.step_factor=0.2", "stages.sparse.sparse.display=2"),
    *(f"stages.{stage}.solver.max_iter={count}" for stage, count in ITERATIONS.items()),
    *(f"stages.{stage}.solver.{key}=3" for stage in ITERATIONS for key in ("snapshot", "test_interval")),
    *(f"stages.{stage}.solver.display=1" for stage in ITERATIONS),
]


def _training(arguments: argparse.Namespace) -> Steps:
    yield Step(".", "digits", "data.digits", ("--output", "digits"))
    for name in ("train", "val"):
        source = (
            "--images",
            f"digits/{name}",
            "--list",
            f"digits/{name}.txt",
            "--labels",
            "digits/labels.txt",
        )
        words = (*source, "--output", f"{name}_lmdb", "--size", "32", "--shuffle", "1")
        yield Step(".", f"create_{name}", "create_lmdb", words)
    yield Step(".", "mean", "create_lmdb", ("--mean", "train_lmdb", "mean.binaryproto"))
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    for folder, engine in ENGINES.items():
        yield Step(folder, "train", "train", ("demo_digits", *settings, "--output", "run", *engine))
        yield Step(folder, "report.json", "report", ("run", "--format", "json"))
        yield Step(folder, "status.text", "train", ("--status", "run"))
        yield Step(folder, "classify.json", "classify", ("run", "--format", "json", "--", "../val_lmdb"))


CHECKS = {check.__name__[1:]: check for check in (_prototxts, _summaries, _reports, _weights, _training)}


# ------------------------------------------------------------------------------------------------- comparing

BYTES = (".prototxt", ".svg", ".caffemodel", ".solverstate", ".onnx", ".binaryproto")
COMPARED = (*BYTES, ".said", "run.log", "data.mdb")
OTHER_WORDS = "other words"


def _compare(check: str, *folders: Path) -> Iterator[tuple[str, list[str]]]:
    """The verdict on each file that either side made, and the lines to show."""
    made = {path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*.*")}
    for name in sorted(name for name in made if name.endswith(COMPARED)):
        before, now = (_read(folder / name) for folder in folders)
        differences = list(_differences(name, before, now))
        item = f"{check}/{name}"
        if differences in ([], [OTHER_WORDS]):
            wrote = any(other.startswith(f"{Path(name).parent}/") and ".said" not in other for other in made)
            refused = name.endswith(".said") and before[0] in (2, "UserError") and not wrote
            yield ("refused by both", [item]) if refused else (differences[0] if differences else "same", [])
            continue
        reasons = [_reason(f"{item}: {one}") for one in differences]
        lines = [
            f"{item}: {one}" + (f" ({reason})" if reason else "")
            for one, reason in zip(differences, reasons, strict=True)
        ]
        yield "DIFFERS" if None in reasons else "expected", lines[:SHOWN]


def _reason(difference: str) -> str | None:
    return next((reason for pattern, reason in EXPECTED.items() if re.search(pattern, difference)), None)


def _read(path: Path) -> Any:
    """A file's bytes, or the relevant part of a log, a command's output or an LMDB; None: there is none."""
    if not path.exists():
        return None
    if path.suffix == ".mdb":
        import lmdb

        with (
            lmdb.open(str(path.parent), readonly=True, lock=False) as database,
            database.begin() as transaction,
        ):
            return dict(transaction.cursor())
    if path.suffix == ".log":
        text = path.read_text(errors="replace")
        training = re.findall(r"\] (Iteration \d+\b).*(, l\w+ = \S+)", text)
        return {"training": training, "tests": re.findall(r"Test net output #\d+: (\S+ = \S+)", text)}
    return json.loads(path.read_text()) if path.suffix == ".said" else path.read_bytes()


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if before is None or now is None:
        yield f"made {'now' if before is None else 'before'} only"
    elif isinstance(before, list):
        yield from _said_differently(name, *before, *now)
    elif isinstance(before, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                yield f"{key}: {before.get(key)} -> {now.get(key)}"[:1000]
    elif before != now:
        yield from _lines(before.decode(), now.decode()) if name.endswith(".prototxt") else ["other bytes"]


def _said_differently(name: str, code: Any, text: str, code_now: Any, text_now: str) -> Iterator[str]:
    if code != code_now:
        yield f"exit code {code} -> {code_now}"
    elif name.endswith((".json.said", ".csv.said")) and text:
        before, now = (dict(_fields(name, one)) for one in (text, text_now))
        timed = "second" if name.startswith(tuple(ENGINES)) else None
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not (timed and timed in key):
                yield f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
    elif name.endswith(".text.said") and text != text_now:
        figures = [re.findall(r"(?<![\d.,])0*(\d+(?:[.,]\d+)*)", one) for one in (text, text_now)]
        yield from [OTHER_WORDS] if figures[0] == figures[1] else _lines(text, text_now)


def _fields(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """The fields of a JSON or CSV text by their path."""
    todo = [("", json.loads(text) if name.endswith(".json.said") else list(csv.reader(io.StringIO(text))))]
    for path, value in todo:
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{path}.{key}", one) for key, one in items]
        else:
            yield path, value


def _lines(before: str, now: str) -> Iterator[str]:
    lines = difflib.unified_diff(before.splitlines(), now.splitlines(), lineterm="", n=0)
    return (line for line in lines if not line.startswith(("---", "+++", "@@")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
