"""The files of a run whose network is the user's own: copies in the run folder, and how its stages differ."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from difflib import unified_diff
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.prototxt_file import NetFile
from caffe_jacinto.networks.stage_files import TRAIN, VAL, user_network
from caffe_jacinto.recipes.model import Recipe
from caffe_jacinto.runs.folder import NETWORK_COPY
from caffe_jacinto.runs.plan import RunPlan

MOST_LINES = 40
"""Of a difference that is shown."""


def copied(recipe: Recipe, folder: Path) -> tuple[Recipe, dict[Path, str]]:
    """The recipe with copies of its network's prototxts in the run ``folder``, and these copies' texts.

    So a run can be resumed although its files were changed or deleted.

    Raises:
        UserError: a copy would take the place of a file of the user's.
    """
    if recipe.network.prototxt is None:
        return recipe, {}
    network = user_network(recipe)
    texts = {net.path: net.text for net in (network.train, *network.tests)}
    copies = {
        path: folder / f"{NETWORK_COPY}{f'_{number}' if number > 1 else ''}.prototxt"
        for number, path in enumerate(texts, start=1)
    }
    for source, copy in copies.items():
        _refuse_to_replace(copy, texts[source], source, [Path(path).resolve() for path in texts])
    names = recipe.network
    settings = names.model_copy(
        update={
            "prototxt": str(copies[network.train.path]),
            "test_prototxt": tuple(str(copies[net.path]) for net in network.tests)
            if names.test_prototxt
            else (),
        }
    )
    return recipe.model_copy(update={"network": settings}), {copies[path]: texts[path] for path in texts}


def _refuse_to_replace(copy: Path, text: str, source: str, sources: Collection[Path]) -> None:
    """A copy that a killed train has left is replaced by the same text; nothing else is."""
    if copy.resolve() in sources:
        raise UserError(
            f"{copy} is the network itself, and the run would write its copy there: give another --output"
        )
    if copy.exists() and copy.read_bytes() != text.encode():
        raise UserError(f"{copy} exists, and is not a copy of {source}: give another --output, or remove it")


def differences(run: RunPlan, before: Recipe) -> Iterator[str]:
    """How the stages' networks differ from the user's files, which ``before`` names: lines to show."""
    if before.network.prototxt is None:
        return
    network, first = user_network(before), run.stages[0]
    texts = run.files(first)
    for net, name in ((network.train, TRAIN), (network.tests[0], VAL)):
        yield from _difference(net, texts[name], first.folder / name)


def _difference(net: NetFile, text: str, path: Path) -> Iterator[str]:
    found = list(
        unified_diff(net.text.splitlines(), text.splitlines(), net.path, str(path), n=0, lineterm="")
    )
    if not found:
        yield f"{path}: {net.path} as it is"
        return
    yield f"{path}: {net.path} with these changes:"
    yield from (f"  {line}" for line in found[2:MOST_LINES])
    if found[MOST_LINES:]:
        yield f"  ... the rest: {shlex.join(['diff', net.path, str(path)])}"
