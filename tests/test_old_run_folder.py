"""Run folders made by version 0.1 (tests/data/README.md): this version shows, reports and resumes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from digits_run import PREFIX, write_lmdbs

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.report import main as report
from caffe_jacinto.train import main as train

STAGES = ("initial", "sparse", "finetune", "test")
BINARY = (".caffemodel", ".solverstate", ".npz")
PROGRAM = Path(train.__code__.co_filename).parents[1]
TRAIN = """
import runpy
from caffe_jacinto.networks import jacintonet11
assert jacintonet11.PAIR_OUTPUTS == (64, 128, 256, 512)
jacintonet11.PAIR_OUTPUTS = (8, 8, 8, 16)
runpy.run_module("caffe_jacinto.train", run_name="__main__", alter_sys=True)
"""
"""`python -m caffe_jacinto.train`, with the small network that the run was made with."""


@dataclass(frozen=True)
class OldRun:
    """A run of version 0.1 below a start folder of its own."""

    engine: str
    start: Path

    @property
    def folder(self) -> Path:
        return self.start / "training/old"

    @property
    def stopped_at(self) -> int:
        return {"torch": 73, "caffe": 72}[self.engine]

    @classmethod
    def laid_out(cls, engine: str, start: Path, caffe: Path) -> OldRun:
        """The run with this machine's paths; ``caffe`` is the executable."""
        run = cls(engine, start)
        places = {
            "@START@": start,
            "@PROGRAM@": PROGRAM,
            "@PYTHON@": Path(sys.executable),
            "@CAFFE@": caffe,
            "@PYCAFFE@": caffe.parents[1] / "python",
        }
        shutil.copytree(Path(__file__).parent / f"data/run_of_0_1_{engine}", run.folder)
        for file in run.folder.rglob("*"):
            if file.is_file() and file.suffix not in BINARY:
                text = file.read_text()
                for name, path in places.items():
                    text = text.replace(name, str(path))
                file.write_text(text)
        return run

    def resume(self) -> str:
        return self.command([sys.executable, "-c", TRAIN, "--resume", str(self.folder)])

    def command(self, words: list[str]) -> str:
        """Run it; returns its output."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NO_COLOR": "1"}
        ran = subprocess.run(
            words, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert ran.returncode == 0, f"{ran.stdout}\n{self.log('sparse')[-3000:]}"
        return ran.stdout

    def log(self, stage: str) -> str:
        path = self.folder / stage / "run.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def states(self) -> dict[str, str]:
        stages = json.loads((self.folder / "run.json").read_text())["stages"]
        return {name: stage["state"] for name, stage in stages.items()}

    def zeros(self, stage: str, iteration: int) -> dict[str, np.ndarray]:
        """Where the convolutions' weights are zero."""
        path = self.folder / stage / f"{PREFIX}_iter_{iteration}.caffemodel"
        return {name: blobs[0] == 0 for name, blobs in read_weights(path).items() if blobs[0].ndim == 4}


@pytest.fixture(params=["torch", "caffe"])
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> OldRun:
    return OldRun.laid_out(request.param, tmp_path, Path("/opt/caffe/bin/caffe"))


@pytest.fixture(scope="module")
def lmdbs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmdbs")
    write_lmdbs(folder)
    return folder


@pytest.fixture(params=["torch", "caffe"])
def trainable(request: pytest.FixtureRequest, tmp_path: Path, lmdbs: Path) -> OldRun:
    """A run with its data, and with an engine that is there."""
    if request.param == "torch":
        if find_spec("torch") is None and not os.environ.get("CI"):
            pytest.skip("needs PyTorch")
        caffe = Path("/opt/caffe/bin/caffe")
    else:
        engine: Engine = request.getfixturevalue("caffe_engine")
        caffe = engine.info.executable
    for name in ("train_lmdb", "val_lmdb"):
        shutil.copytree(lmdbs / name, tmp_path / name)
    return OldRun.laid_out(request.param, tmp_path, caffe)


def test_status(old_run: OldRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--status", str(old_run.folder)]) == 0
    first, initial, sparse, *waiting, last = capsys.readouterr().out.splitlines()
    assert first == f"{old_run.folder}: stopped"
    top1 = {"torch": "0.14", "caffe": "0.16"}[old_run.engine]
    assert initial.startswith(f"  initial: finished, test: top-1 {top1}")
    assert sparse.startswith(f"  sparse: stopped, iteration {old_run.stopped_at}/200, loss 1.")
    assert sparse.endswith("sparsity 0.223")
    assert waiting == ["  finetune: waiting", "  test: waiting"]
    assert f"--resume {old_run.folder}" in last


def test_status_with_thousands_of_headers_on_a_line(
    old_run: OldRun, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "I1126 00:00:00.000000 1 solver.cpp:239] Iteration 70, loss = 1 "
    with (old_run.folder / "sparse/run.log").open("a") as log:
        log.write(header * 5_000 + "\n")
    assert train(["--status", str(old_run.folder)]) == 0
    assert "sparse: stopped, iteration 70/200, loss 1" in capsys.readouterr().out


def test_report(old_run: OldRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(old_run.folder), "--format", "json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    expected = {
        "torch": [
            ("initial", True, 20, 0.14, 0.56, 2.23734, None),
            ("sparse", False, 73, 0.54, 0.9, 1.7835, 0.223),
        ],
        "caffe": [
            ("initial", True, 20, 0.16, 0.74, 2.08797, None),
            ("sparse", False, 72, 0.42, 0.88, 1.6861, 0.223),
        ],
    }[old_run.engine]
    names = ("name", "finished", "iterations", "top1", "top5", "loss", "sparsity")
    assert [tuple(stage[name] for name in names) for stage in run["stages"]] == expected


@pytest.mark.caffe
def test_resume_goes_on_to_the_end(trainable: OldRun, capsys: pytest.CaptureFixture[str]) -> None:
    at_the_stop = trainable.zeros("sparse", trainable.stopped_at)
    said = trainable.resume()
    assert f"stage 2/3 sparse: 200 iterations, resumes at iteration {trainable.stopped_at}" in said
    assert trainable.states() == dict.fromkeys(STAGES, "finished")
    sparse, fine = trainable.zeros("sparse", 200), trainable.zeros("finetune", 10)
    assert sum(zeros.sum() for zeros in at_the_stop.values()) > 1000
    for name, zeros in sparse.items():
        assert zeros[at_the_stop[name]].all(), f"{name}: zeros of the old snapshot moved"
        assert fine[name][zeros].all(), f"{name}: zeros moved in finetune"
    capsys.readouterr()
    assert report([str(trainable.folder), "--format", "json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    figures = {stage["name"]: stage for stage in run["stages"]}
    assert list(figures) == list(STAGES)
    assert all(stage["finished"] for stage in figures.values())
    assert figures["sparse"]["sparsity"] == 0.45


@pytest.mark.caffe
def test_another_type_of_solver_is_refused_before_anything_is_trained(trainable: OldRun) -> None:
    record = trainable.folder / "run.json"
    solver = trainable.folder / "sparse/solver.prototxt"
    original = record.read_text()
    content = json.loads(original)

    def refused(kind: str) -> str:
        content["recipe"]["stages"]["sparse"]["solver"]["type"] = kind
        record.write_text(json.dumps(content))
        ran = subprocess.run(
            [sys.executable, "-c", TRAIN, "--resume", str(trainable.folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
        return ran.stderr

    said = refused("Nesterov")
    assert (
        "stage sparse: training/old/sparse/solver.prototxt, with which its snapshots were written, " in said
    )
    assert "has solver type SGD, and the run's recipe has Nesterov" in said
    solver.unlink()
    said = refused("Adam")
    assert "has 1 blob of history for each of its weights, and a solver of type Adam needs 2" in said


@pytest.mark.caffe
def test_run_sh_starts_the_module_by_its_old_name(trainable: OldRun) -> None:
    scripts = {name: (trainable.folder / name / "run.sh").read_text() for name in ("initial", "sparse")}
    modules = {"torch": ("torch train", "torch train"), "caffe": ("reestimate", "stepper")}[trainable.engine]
    for script, module in zip(scripts.values(), modules, strict=True):
        assert f" -m caffe_jacinto.engines.{module} " in script
    for name in scripts:
        trainable.command(["sh", str(trainable.folder / name / "run.sh")])
    assert len(list((trainable.folder / "sparse").glob("*_iter_200.caffemodel"))) == 1
    said = trainable.resume()
    assert "sparse: already finished" in said
    assert trainable.states() == dict.fromkeys(STAGES, "finished")
