"""The stages of a sparse network from a user's solver: lengths, learning rates, decay. docs/your-network.md.

Of a solver with `max_iter` N and the learning rate R at iteration N / 2:

| stage | iterations | learning rate | decay |
|---|---|---|---|
| initial, without weights | N | theirs | theirs |
| l1reg | N / 2 | R, falling to 0 in a straight line | L1 |
| sparse | N / 2 | R, likewise | L1 |
| finetune | N / 4 | R / 2, likewise | theirs |

So each goes through the second half, or the last quarter, of a schedule that falls in a straight line. L1's
decay is such that it pulls a weight of the usual size, the root of 2 / fan-in (He et al. 2015), as strongly
as their L2 decay does.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from caffe_jacinto.recipes.suggest import recipe_template, rounded, schedule

HALF, QUARTER = 0.5, 0.25
PRUNING_RATE, FINETUNING_RATE = 1.0, 0.5
"""Of the rate that their schedule has at its half."""

LEAST_DECAY = 1e-5
"""L1 where their solver has no decay: as published."""

CAPS = {"threshold_maxratio": 0.5, "threshold_value_max": 10.0}
"""Published: 0.2 and 0.2, after L1 of 160,000 iterations. Without that, they end the pruning of normally
distributed weights at about half: four fifths of these are below 0.4 of the largest of some hundred."""


@dataclass(frozen=True)
class TheirSolver:
    """What a stage can take of a user's solver."""

    settings: Mapping[str, Any]
    """By the keys of `[stages.NAME.solver]`; with max_iter and base_lr."""

    middle_rate: float
    """The learning rate at half of max_iter."""


def derived_stages(
    solver: TheirSolver, fan_in: int, target: float, weights: str | None
) -> list[dict[str, Any]]:
    """The stages as templates/recipe/from.toml.j2 writes them.

    ``fan_in`` is the number of weights of an output of a usual convolution of the network.
    """
    theirs = dict(solver.settings)
    length = int(theirs["max_iter"])
    decay = float(theirs.get("weight_decay", 0.0))
    l1 = {
        "weight_decay": rounded(decay * sqrt(2 / fan_in), 2) if decay else LEAST_DECAY,
        "regularization": "L1",
    }
    if theirs.get("regularization") == "L1" and decay:
        l1["weight_decay"] = decay
    own = {"weight_decay": decay, "regularization": theirs.get("regularization", "L2")}

    def stage(
        name: str, about: str, share: float, rate: float, regularization: Mapping[str, Any]
    ) -> dict[str, Any]:
        iterations = max(int(rounded(length * share, 3)), 1)
        settings = {
            "max_iter": iterations,
            "base_lr": rounded(solver.middle_rate * rate, 3),
            **regularization,
        }
        settings |= _intervals(theirs, iterations)
        kept = (
            *("type", "momentum", "momentum2", "rms_decay", "delta", "clip_gradients", "average_loss"),
            "snapshot_format",
        )
        settings |= {key: theirs[key] for key in kept if key in theirs}
        return {"name": name, "about": about, "table": {}, "solver": settings, "sparse": {}}

    l1reg = stage(
        "l1reg", "L1 regularization shrinks most weights, so that they can be pruned.", HALF, PRUNING_RATE, l1
    )
    sparse = stage("sparse", "Prunes the smallest weights, step by step.", HALF, PRUNING_RATE, l1)
    finetune = stage(
        "finetune", "The remaining weights recover; zeros stay zero.", QUARTER, FINETUNING_RATE, own
    )
    sparse["table"] = {"start": "l1reg"}
    sparse["sparse"] = {**schedule(sparse["solver"]["max_iter"], target), **CAPS}
    finetune["table"] = {"start": "sparse", "freeze_zeros": True}
    if weights is not None:
        l1reg["table"] = {"weights": weights}
        return [l1reg, sparse, finetune]
    l1reg["table"] = {"start": "initial"}
    about = "Their solver's own training."
    initial = {
        "name": "initial",
        "about": about,
        "table": {},
        "solver": {**theirs, **_intervals(theirs, length)},
        "sparse": {},
    }
    return [initial, l1reg, sparse, finetune]


def derived_recipe(
    path: Path,
    solver: Path,
    data: Mapping[str, Any],
    network: Mapping[str, Any],
    training: Mapping[str, Any],
    stages: list[dict[str, Any]],
) -> str:
    """The recipe file; ``path`` is how it will be called."""
    return recipe_template("from.toml.j2").render(
        path=shlex.quote(str(path)),
        data=data,
        network=network,
        training=training,
        stages=stages,
        facts={
            "solver": str(solver),
            "prototxt": network["table"]["prototxt"],
            "stages": ", ".join(stage["name"] for stage in stages),
        },
    )


def _intervals(theirs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Their intervals of tests, snapshots and displays, in a stage of ``length`` iterations."""
    found: dict[str, Any] = {}
    if theirs.get("test_interval"):
        found["test_interval"] = min(int(theirs["test_interval"]), length)
    if theirs.get("snapshot"):
        interval = found.get("test_interval", 1)
        found["snapshot"] = max(min(int(theirs["snapshot"]), length) // interval, 1) * interval
    if theirs.get("display"):
        found["display"] = min(int(theirs["display"]), length)
    return found
