"""The arguments of sparsification, which stock Caffe's solver file has no fields for, on a command line.

They are named as the fork's solver fields; `commands.sparse_arguments` writes them.
"""

from __future__ import annotations

import argparse

from pydantic import ValidationError

from caffe_jacinto.errors import UserError
from caffe_jacinto.recipes.model import SparseSettings

_FIELDS: dict[str, type] = {
    "sparsity_start_iter": int,
    "sparsity_step_iter": int,
    "sparsity_step_factor": float,
    "sparsity_start_factor": float,
    "sparsity_by": str,
    "sparsity_threshold_maxratio": float,
    "sparsity_threshold_value_max": float,
    "display_sparsity": int,
}


def add_sparse_options(parser: argparse.ArgumentParser) -> None:
    """``-freeze_zeros``, ``-sparsity_target`` and its settings."""
    parser.add_argument("-freeze_zeros", action="store_true", help="hold the zeros of the weights at zero")
    parser.add_argument("-sparsity_target", type=float)
    for name, kind in _FIELDS.items():
        parser.add_argument(f"-{name}", type=kind)


def sparse_settings(arguments: argparse.Namespace) -> SparseSettings | None:
    """What the arguments say of thresholds; None where they ask for none.

    Raises:
        UserError: a value that the settings do not take.
    """
    if arguments.sparsity_target is None:
        return None
    given = {"target": arguments.sparsity_target}
    for name in _FIELDS:
        value = getattr(arguments, name)
        if value is not None:
            given["display" if name == "display_sparsity" else name.removeprefix("sparsity_")] = value
    try:
        return SparseSettings(**given)
    except ValidationError as error:
        wrong = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"sparsity settings: {wrong}") from error
