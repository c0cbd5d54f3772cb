"""`train` with caffe-jacinto, which needs CUDA: a script that speaks like it stands in its place.

It shows what the fork is given and how its runs are followed and resumed, not that the fork trains.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from digits_run import Trainer, end, recipe_of, tiny, wait_for, write_lmdbs

from caffe_jacinto.caffemodel.weights import read_weights

FORK = '''#!{python}
"""Says it is caffe-jacinto: sparsity_target, snapshot_prefix. Writes what it would; trains nothing."""
import math, re, sys, time
from datetime import datetime
from pathlib import Path

from caffe_jacinto.caffemodel.net_blobs import expected_blobs
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, parse_net


def say(text, source="solver.cpp"):
    stamp = datetime.now().strftime("I%m%d %H:%M:%S.%f")
    print(stamp, f"7 {{source}}:1] {{text}}", file=sys.stderr, flush=True)


def write(path, message):
    Path(path).write_bytes(message.SerializeToString())


def snapshot(solver, iteration):
    prefix = re.search('snapshot_prefix: "(.*)"', solver)[1] + f"_iter_{{iteration}}"
    train = Path(re.search('train_net: "(.*)"', solver)[1]).read_text()
    kinds = messages(Dialect.CAFFE_JACINTO)
    net = kinds.NetParameter()
    for name, shapes in expected_blobs(parse_net(train, Dialect.CAFFE_JACINTO, "train")).items():
        layer = net.layer.add(name=name)
        for shape in shapes:
            dims = [dim or 3 for dim in shape]  # the text does not tell the images' channels
            blob = layer.blobs.add(data=[0.5] * math.prod(dims))
            blob.shape.dim.extend(dims)
    say(f"Snapshotting to binary proto file {{prefix}}.caffemodel")
    write(prefix + ".caffemodel", net)
    say(f"Snapshotting solver state to binary proto file {{prefix}}.solverstate")
    state = kinds.SolverState(iter=iteration, learned_net=prefix + ".caffemodel")
    state.history.add(data=[0.5]).shape.dim.append(1)
    write(prefix + ".solverstate", state)


arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("caffe version 0.17.0")
    sys.exit(0)
say("This is NVCaffe 0.17.0 started at Mon Nov 23 10:00:00 2026", "caffe.cpp")
say("Using GPUs " + arguments[arguments.index("-gpu") + 1])
if arguments[0] == "test":
    for text in ("Loss: 0.5", "accuracy/top1 = 0.5", "accuracy/top5 = 0.5", "loss = 0.5"):
        say(text, "caffe.cpp")
    sys.exit(0)
solver = Path(arguments[arguments.index("-solver") + 1]).read_text()
say("Initializing solver from parameters:")
print(solver, file=sys.stderr, flush=True)
say("Starting Optimization")
first = int(re.search(r"_iter_(\\d+)", arguments[-3])[1]) if "-snapshot" in arguments else 0
factor = float((re.search(r"sparsity_start_factor: (.*)", solver) or [0, 0])[1])
for i in range(first, 6):
    say(f"Iteration {{i}} (5 iter/s, 1s/1 iters), loss = 0.5")
    if "sparsity_target" in solver and i >= 1:
        factor += 0.2
        say(f"Finding and applying sparsity: {{factor:g}}")
        if first == 0 and i == 4:
            time.sleep(600)
    if (i + 1) % 2 == 0:
        snapshot(solver, i + 1)
say("Optimization Done in 6s")
'''


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, on a machine that seems to have two GPUs, with data beside it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (
        ("caffe", FORK.format(python=sys.executable)),
        ("nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: two'\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_lmdbs(tmp_path)
    return tools / "caffe"


def test_the_ramp_goes_on_where_it_was(fork: Path, tmp_path: Path) -> None:
    trainer = Trainer(fork, tmp_path)
    recipe = recipe_of(tmp_path, "initial", "l1reg", "sparse")
    arguments = tiny(recipe, ("initial", "l1reg", "sparse"))
    solver = tmp_path / "run/sparse/solver.prototxt"
    with trainer.running(*arguments, "-gpu", "0,1", "--output", "run") as process:
        wait_for(lambda: "sparsity: 0.8" in trainer.log("run", "sparse"), "fourth threshold")
        process.kill()
    assert re.search(r"sparsity_start_factor: 0\b", solver.read_text())
    end(trainer.pid("run", "sparse"))
    code, said = trainer.run("--resume", "run")
    assert code == 0, said
    assert "engine: caffe-jacinto 0.17.0" in said
    assert "stage 3/3 sparse: 6 iterations, goes on at iteration 4" in said
    # Three thresholds came before the snapshot of iteration 4; the one after it is lost.
    assert re.search(r"sparsity_start_factor: 0\.6\b", solver.read_text())
    assert "from the beginning again" not in said
    command = (
        f"{fork} train -solver run/sparse/solver.prototxt -snapshot run/sparse/digits_jacintonet11_iter_4"
    )
    assert f"{command}.solverstate -gpu 0,1" in (tmp_path / "run/sparse/run.sh").read_text()


def test_gpus_that_are_not_there(fork: Path, tmp_path: Path) -> None:
    code, said = Trainer(fork, tmp_path).run(*tiny(), "-gpu", "1,2", "--output", "refused")
    assert (code, "2 is not there" in said) == (2, True)
    code, said = Trainer(fork, tmp_path).run(*tiny(), "--output", "refused")
    assert (code, "trains on GPUs only" in said) == (2, True)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.sparse.sparse.by=layer", "no field for thresholds by layer"),
        ("network.frozen=['conv1a']", "no field that keeps its thresholds out of frozen layers"),
    ],
)
def test_what_the_fork_has_no_field_for_is_one_line_before_anything_runs(
    fork: Path, tmp_path: Path, setting: str, says: str
) -> None:
    recipe = recipe_of(tmp_path, "initial", "l1reg", "sparse")
    arguments = tiny(recipe, ("initial", "l1reg", "sparse"))
    weights = ("--set", "stages.initial.weights=any.caffemodel")
    code, said = Trainer(fork, tmp_path).run(
        *arguments, *weights, "--set", setting, "-gpu", "0", "--output", "refused"
    )
    assert code == 2
    assert len([line for line in said.splitlines() if says in line]) == 1
    assert not (tmp_path / "refused").exists()


def test_fine_tuning_from_weights_without_the_head(fork: Path, tmp_path: Path) -> None:
    trainer = Trainer(fork, tmp_path)
    code, said = trainer.run(
        *tiny(recipe_of(tmp_path, "initial"), ("initial",)), "-gpu", "0", "--output", "first"
    )
    assert code == 0, said
    weights = "first/initial/digits_jacintonet11_iter_6.caffemodel"
    tiny_data = ("--train-lmdb", "train_lmdb", "--val-lmdb", "val_lmdb", "--batch-size", "8")
    settings = {
        "network.crop_size": "32",
        "stages.finetune.weights": weights,
        "stages.finetune.reinit": '["fc10"]',
        "stages.finetune.freeze_zeros": "false",
        "stages.finetune.solver.max_iter": "6",
    }
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    code, said = trainer.run("finetune_classifier", *tiny_data, *given, "-gpu", "0", "--output", "second")
    assert code == 0, said
    assert "layer fc10: starts at random values: reinit names it" in said
    command = (
        f"{fork} train -solver second/finetune/solver.prototxt -weights second/finetune/start.caffemodel"
    )
    assert f"{command} -gpu 0" in (tmp_path / "second/finetune/run.sh").read_text()
    start = read_weights(tmp_path / "second/finetune/start.caffemodel")
    assert read_weights(tmp_path / weights).keys() - start.keys() == {"fc10"}
    train = (tmp_path / "second/finetune/train.prototxt").read_text()
    assert train.count("use_global_stats: true") == 2
