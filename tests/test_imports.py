"""Imports follow the order of CONTRIBUTING.md's map; only the engine on PyTorch imports PyTorch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "caffe_jacinto"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
PYTORCH = (f"{PACKAGE}/engines/pytorch/",)


@cache
def order() -> dict[str, int]:
    """The places in the map, ``caffe_jacinto/logs/`` or ``caffe_jacinto/train.py``, each with its row."""
    rows = re.findall(rf"^\| `({PACKAGE}/[^`]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    places = [(place, row) for row, cell in enumerate(rows) for place in spelled_out(cell)]
    assert len(places) == len(dict(places)), "the map names a place twice"
    return dict(places)


def spelled_out(cell: str) -> list[str]:
    """``a/{b,c}.py`` -> ``a/b.py``, ``a/c.py``."""
    before, brace, rest = cell.partition("{")
    if not brace:
        return [cell]
    names, _, after = rest.partition("}")
    return [before + name + after for name in names.split(",")]


def place_of(path: str) -> str | None:
    """The map's place for a file of the package; None for ``__init__.py``, which imports nothing."""
    return next((place for place in order() if path == place or path.startswith(place)), None)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def file_of(name: str) -> str:
    """The file that ``caffe_jacinto.logs.messages.PREFIX`` is in, relative to the checkout."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end])
        if (ROOT / path.with_suffix(".py")).is_file():
            return f"{path}.py"
    return f"{PACKAGE}/__init__.py" if name == f"{PACKAGE}.__version__" else f"{'/'.join(parts)}/"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_follow_the_map(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    here = place_of(name)
    assert here is not None or path.name == "__init__.py", f"{name} is in no row of CONTRIBUTING.md's map"
    wrong = []
    for line, module in imported(path):
        where = f"{name}:{line} imports {module}"
        if module.split(".")[0] == "torch" and not name.startswith(PYTORCH):
            wrong.append(f"{where}, which only {PYTORCH[0]} may")
        there = place_of(file_of(module)) if module.split(".")[0] == PACKAGE else None
        if there is None:
            continue
        if here is None and module.startswith(f"{PACKAGE}.common."):
            continue  # The package itself explains what is missing.
        if here is None or order()[there] > order()[here]:
            wrong.append(f"{where}, which is further down in the map")
        elif order()[there] == order()[here] and there != here and there.endswith("/"):
            wrong.append(f"{where}, another folder of the same row")
    assert not wrong, "\n".join(wrong)


def test_every_place_in_the_map_is_there() -> None:
    assert len(order()) > 20
    assert [place for place in order() if not (ROOT / place).exists()] == []
