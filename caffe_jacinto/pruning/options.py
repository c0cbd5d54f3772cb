"""The arguments of sparsification, which stock Caffe's solver file has no fields for, on a command line.

They are named as the fork's solver fields; `commands.sparse_arguments` writes them.
"""

from __future__ import annotations

import argparse

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.recipes.model import SparseSettings

_FIELDS: dict[str, tuple[type, str]] = {
    "sparsity_start_iter": (int, "iteration of the first threshold"),
    "sparsity_step_iter": (int, "iterations between two thresholds"),
    "sparsity_step_factor": (float, "fraction more that each threshold takes"),
    "sparsity_start_factor": (float, "fraction that the first takes beside that"),
    "sparsity_by": (str, "what has one threshold: channel or layer"),
    "sparsity_threshold_maxratio": (float, "no threshold above this fraction of the largest weight"),
    "sparsity_threshold_value_max": (float, "no threshold above this value"),
    "display_sparsity": (int, "iterations between two lines of sparsity in the log"),
}


def add_sparse_options(parser: argparse.ArgumentParser) -> None:
    """``-freeze_zeros``, ``-sparsity_target`` and its settings."""
    parser.add_argument("-freeze_zeros", action="store_true", help="hold the zeros of the weights at zero")
    parser.add_argument("-sparsity_target", type=float, help="zero the smallest weights up to this share")
    for name, (kind, help_text) in _FIELDS.items():
        parser.add_argument(f"-{name}", type=kind, help=help_text)


def sparse_settings(arguments: argparse.Namespace) -> SparseSettings | None:
    """What the arguments say of thresholds; None where they ask for none.

    Raises:
        UserError: a value that the settings do not take, or settings without a target.
    """
    given = {name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None}
    if arguments.sparsity_target is None:
        alone = [name for name in given if name != "display_sparsity"]
        if alone:
            raise UserError(f"-{alone[0]} says how to sparsify, and -sparsity_target is missing: add it")
        return None
    given["sparsity_target"] = arguments.sparsity_target
    try:
        return SparseSettings(**{_setting(name): value for name, value in given.items()})
    except ValidationError as error:
        raise UserError("; ".join(_mistake(problem) for problem in error.errors())) from None


def _setting(flag: str) -> str:
    return "display" if flag == "display_sparsity" else flag.removeprefix("sparsity_")


def _mistake(problem: ErrorDetails) -> str:
    flags = {_setting(name): name for name in ("sparsity_target", *_FIELDS)}
    if not problem["loc"]:  # values that contradict each other
        return problem["msg"]
    flag = flags[str(problem["loc"][0])]
    return (
        f"-{flag} is missing: add it"
        if problem["type"] == "missing"
        else f"-{flag} {problem['input']}: {problem['msg']}"
    )
