"""`train` with caffe-jacinto, which needs CUDA: `caffe-torch` in the fork's dialect stands in its place.

It trains for real by the fork's solver fields, on the CPU. What it shows of the fork is what that is given,
and how its runs are followed and resumed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from digits_run import (
    ITERATIONS,
    PREFIX,
    STAGES,
    Trainer,
    end,
    quantizing,
    recipe_of,
    tiny,
    wait_for,
    write_lmdbs,
)

from caffe_jacinto.caffemodel.storage import read_weights

FORK = '''#!{python}
"""Says it is caffe-jacinto: sparsity_target, snapshot_prefix. Trains what it is given, on the CPU."""
import sys

arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("caffe version 0.17.0")
    sys.exit(0)
from caffe_jacinto.engines.pytorch.__main__ import script

gpus = arguments.index("-gpu")
sys.argv[1:] = [*arguments[:gpus], "-dialect", "caffe_jacinto"]
sys.exit(script())
'''


pytestmark = pytest.mark.caffe


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


def test_the_schedule_goes_on_where_it_was(fork: Path, tmp_path: Path) -> None:
    trainer = Trainer(fork, tmp_path)
    recipe = recipe_of(tmp_path, "initial", "l1reg", "sparse")
    arguments = tiny(recipe, ("initial", "l1reg", "sparse"), sparse=60)
    arguments += ["--set", "stages.sparse.sparse.step_iter=10"]
    solver = tmp_path / "run/sparse/solver.prototxt"
    with trainer.running(*arguments, "-gpu", "0,1", "--output", "run") as process:
        wait_for(lambda: "applying sparsity: 0.4" in trainer.log("run", "sparse"), "second threshold")
        process.kill()
    assert re.search(r"sparsity_start_factor: 0\b", solver.read_text())
    assert "sparse_mode: SPARSE_UPDATE" in solver.read_text()
    end(trainer.pid("run", "sparse"))
    code, said = trainer.run("--resume", "run")
    assert code == 0, said
    assert "engine: caffe-jacinto 0.17.0" in said
    assert "from the beginning again" not in said
    found = re.search(r"stage 3/3 sparse: 60 iterations, resumes at iteration (\d+);", said)
    assert found
    # Thresholds of 0.2 more came at iterations 10, 20 and so on; one after the snapshot is lost.
    reached = 0.2 * ((int(found[1]) - 1) // 10)
    assert re.search(rf"sparsity_start_factor: {reached:g}\b", solver.read_text())
    command = f"{fork} train -solver run/sparse/solver.prototxt -snapshot run/sparse/{PREFIX}_iter_{found[1]}"
    assert f"{command}.solverstate -gpu 0,1" in (tmp_path / "run/sparse/run.sh").read_text()
    log = trainer.log("run", "sparse")
    assert "applying sparsity: 0.8" in log
    weights = read_weights(tmp_path / f"run/sparse/{PREFIX}_iter_60.caffemodel")
    wide = weights["res5a_branch2a"][0]
    assert (wide == 0).mean() > 0.5


def test_every_stage_by_the_forks_own_fields(fork: Path, tmp_path: Path) -> None:
    trainer = Trainer(fork, tmp_path)
    code, said = trainer.run(*tiny(), "-gpu", "0,1", "--output", "run")
    assert code == 0, said
    assert trainer.states("run") == dict.fromkeys((*STAGES, "test"), "finished")
    sparse, fine = (
        read_weights(tmp_path / f"run/{stage}/{PREFIX}_iter_{ITERATIONS}.caffemodel")
        for stage in ("sparse", "finetune")
    )
    assert (sparse["res5a_branch2a"][0] == 0).any()
    for name, blobs in sparse.items():
        if blobs[0].ndim == 4:
            assert not fine[name][0][blobs[0] == 0].any(), f"zeros of {name} moved in finetune"
    assert len(sparse["conv1a/bn"]) == 5  # the fork's one layer: statistics, factor, scale, bias


def test_a_stage_that_quantizes_is_the_forks_own_test(fork: Path, tmp_path: Path) -> None:
    trainer = Trainer(fork, tmp_path)
    recipe = quantizing(tmp_path, 'keep_float = ["conv1a"]\nactivation_bits = 10')
    code, said = trainer.run(*tiny(recipe, ("initial",)), "-gpu", "0", "--output", "run")
    assert code == 0, said
    assert "note: stage eight: caffe-jacinto tests in its own arithmetic, the scheme caffe_jacinto" in said
    val = (tmp_path / "run/eight/val.prototxt").read_text()
    assert val.startswith("quantize: true\nnet_quantization_param {") and 'type: "Data"' in val
    assert "bitwidth_weights: 12\n  bitwidth_activations: 10\n" in val
    ignored = re.findall('ignored_layer_names: "(.*)"', val)
    assert ignored == ["conv1a", "conv1a/bn", "conv1a/relu"], "the fork ignores a layer alone"
    weights = f"run/initial/{PREFIX}_iter_{ITERATIONS}.caffemodel"
    command = f"{fork} test -model run/eight/val.prototxt -weights {weights} -iterations 1 -gpu 0"
    assert command in (tmp_path / "run/eight/run.sh").read_text()
    found = re.search(r"stage 2/2 eight: top-1 ([\d.]+)", said)
    assert found and re.search(r"run, eight \(12-bit weights, 10-bit activations\) +\d", said)
    refused = quantizing(tmp_path, "bits_of = { conv1a = 16 }")
    code, said = trainer.run(*tiny(refused, ("initial",)), "-gpu", "0", "--output", "refused")
    assert (code, "stages.eight.quantize.bits_of: caffe-jacinto's own quantized test has no" in said) == (
        2,
        True,
    )


def test_gpus_that_are_not_there(fork: Path, tmp_path: Path) -> None:
    code, said = Trainer(fork, tmp_path).run(*tiny(), "-gpu", "1,2", "--output", "refused")
    assert (code, "2 does not exist" in said) == (2, True)
    code, said = Trainer(fork, tmp_path).run(*tiny(), "--output", "refused")
    assert (code, "trains on GPUs only" in said) == (2, True)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.sparse.sparse.by=layer", 'sparse.by = "layer": caffe-jacinto\'s solver has no field for it'),
        ("stages.sparse.sparse.targets={conv1b=0.5}", 'sparse.targets = { "conv1b" = 0.5 }: caffe-jacinto'),
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
