"""`weights sensitivity`: each layer pruned alone, tested on real digits, and targets that follow from it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from digits_run import PREFIX
from hypothesis import given
from hypothesis import strategies as st
from test_weights_of_runs import run  # noqa: F401  (a fixture)

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.inference.sensitivity import LEVELS, Sensitivity, targets_for
from caffe_jacinto.pruning.layers import CountedLayer
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.weights import main

RISES = st.tuples(*[st.floats(-0.5, 5).map(lambda rise: round(rise, 6))] * len(LEVELS))


def layers_of(rises: list[tuple[float, ...]]) -> list[Sensitivity]:
    return [
        Sensitivity(CountedLayer(f"c{at}", (64, 32 * (at + 1), 3, 3)), tuple(found))
        for at, found in enumerate(rises)
    ]


@given(rises=st.lists(RISES, min_size=1, max_size=5), target=st.floats(0.05, 0.94))
def test_the_targets_together_are_the_networks_and_the_loss_rises_alike(
    rises: list[tuple[float, ...]], target: float
) -> None:
    found = layers_of(rises)
    targets = targets_for(found, target)
    weights = sum(one.layer.weights for one in found)
    zeros = 0
    for one in found:
        share = targets.get(one.layer.name, 0)
        assert 0 <= share <= LEVELS[-1]
        zeros += 64 * math.floor(share * (one.layer.weights // 64) + 1e-6)  # whole weights of a channel
    highest = all(targets.get(one.layer.name, 0) == LEVELS[-1] for one in found)
    assert zeros >= target * weights - 0.5 or highest


def test_a_layer_that_suffers_more_is_pruned_less() -> None:
    found = layers_of([(0.3, 0.5, 0.7, 0.8, 0.9, 0.95), (0.03, 0.05, 0.07, 0.08, 0.09, 0.095)])
    # Rises are the sparsity, and a tenth of it: at a rise r, r and 10 r, up to 0.95; two thirds are c1's.
    # 0.2 of a channel's 288 weights, and 0.5 of its 576, is 57.6 and 288: only the first is rounded down.
    assert targets_for(found, 0.7) == {"c0": 0.21, "c1": 0.95}
    assert targets_for(found, 0.35) == {"c0": 0.06, "c1": 0.5}
    with pytest.raises(UserError, match=r"no layer is pruned to more than 0\.95; lower it"):
        targets_for(found, 0.96)
    with pytest.raises(UserError, match=r"no layer is pruned to more than 0\.95; lower it"):
        main(["sensitivity", "none.caffemodel", "none.prototxt", "--target", "0.96"])  # before it measures
    assert targets_for(found, 0.95) == {"c0": 0.95, "c1": 0.95}


@pytest.mark.caffe
def test_the_command_on_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    arguments = ["sensitivity", str(run / "initial"), "--target", "0.5", "--images", "40"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().out
    assert re.match(r"(stock Caffe|OpenCV|onnxruntime) \S+, 40 images of .*val_lmdb\n", said)
    line = said[said.index("targets = ") :].splitlines()[0]
    sparse = load_recipe("demo_digits", [f"stages.sparse.sparse.{line}"]).stages["sparse"].sparse
    assert sparse is not None
    stored = read_weights(run / "initial" / f"{PREFIX}_iter_20.caffemodel")
    weights = {name: stored[name][0].size for name in sparse.targets}
    total = sum(share * weights[name] for name, share in sparse.targets.items())
    assert total / sum(weights.values()) == pytest.approx(0.5, abs=0.02)
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.startswith(("conv", "res"))}
    assert rows.keys() == weights.keys()
    assert all(np.isfinite([float(rise) for rise in row[2:-1]]).all() for row in rows.values())
