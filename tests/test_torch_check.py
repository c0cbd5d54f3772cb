"""What PyTorch refuses is said before a run, for all stages at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_engines import LMDBS, RMSPROP, stages_of

from caffe_jacinto.common.errors import RunFailed
from caffe_jacinto.engines.discovery import find_engine
from caffe_jacinto.engines.pytorch.engine import TorchEngine, describe_torch
from caffe_jacinto.prototxt.dialects import Dialect

pytestmark = pytest.mark.caffe


@pytest.mark.parametrize("dialect", list(Dialect))
def test_pytorch_says_before_a_run_what_it_would_refuse(dialect: Dialect) -> None:
    torch = find_engine(None, "torch", dialect)
    stages = stages_of(*RMSPROP, dialect=dialect)
    assert torch.check(stages, LMDBS) == []
    solver = stages["finetune"]["solver.prototxt"]
    assert "\nrms_decay: 0.9\ndelta: 1e-05\n" in solver
    stages["finetune"]["solver.prototxt"] = solver.replace("rms_decay: 0.9", "rms_decay: 9")
    (problem,) = torch.check({"finetune": stages["finetune"]}, {})
    assert problem == (
        "run/finetune/solver.prototxt: rms_decay is 9; it has to be at least 0 and less than 1"
    )
    problems = torch.check(stages_of(dialect=dialect, ReLU="Wavelet"), LMDBS)
    assert [problem.split(": ")[0] for problem in problems] == [
        f"run/{stage}/{phase}.prototxt"
        for stage in ("initial", "l1reg", "sparse", "finetune")
        for phase in ("train", "val")
    ]
    assert "(Wavelet): this type of layer is not supported" in problems[0]


def test_pytorch_checks_the_forks_sparsity_fields() -> None:
    files = stages_of(dialect=Dialect.CAFFE_JACINTO)["sparse"]
    files["solver.prototxt"] = files["solver.prototxt"].replace("sparsity_target: 0.8", "sparsity_target: 1")
    (problem,) = find_engine(None, "torch", Dialect.CAFFE_JACINTO).check({"sparse": files}, {})
    assert problem == "run/sparse/solver.prototxt: sparsity_target is 1.0; it has to be above 0 and below 1"


def test_a_check_that_was_killed_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    engine = TorchEngine(replace(describe_torch(Dialect.BVLC), executable=killed))
    with pytest.raises(RunFailed, match=r"killed by SIGKILL .*; nothing was trained; start the same command"):
        engine.check(stages_of(), LMDBS)
