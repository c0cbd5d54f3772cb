"""Read a recipe: a TOML file and overrides of its values. A mistake is one line with file, line and field."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.recipes.rules import Keys, Mistake, Place, Rule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

if TYPE_CHECKING:
    from caffe_jacinto.recipes.model import Recipe

BUILT_IN_FOLDER = Path(__file__).parent

_MOST_PARTS = 20
"""Of a key: more than any in a recipe has."""

_MOST_LINES = 200
"""Of a value. The lines of keys after a longer one are not found, and messages then name line 1."""


@dataclass(frozen=True)
class Override:
    """An override on the command line, like ``stages.initial.solver.max_iter=1000``."""

    text: str
    keys: Keys
    value: Any

    @property
    def removes_stage(self) -> bool:
        """Whether it is ``stages.NAME=``."""
        return self.keys[0] == "stages" and len(self.keys) == 2 and self.value == ""


def built_in_recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in BUILT_IN_FOLDER.glob("*.toml"))


Completion = Callable[[dict[str, Any]], Sequence[Mistake]]
"""Adds to a recipe's document what other files say; returns the mistakes that it finds."""


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    rules: Sequence[Rule] = (),
    completion: Completion | None = None,
) -> Recipe:
    """A built-in recipe by its name, or a recipe file by its path (it has a slash or ends in .toml).

    ``overrides`` have the form ``KEY.KEY=VALUE``, with a TOML value; a bare word is a string. They are
    applied in order, before the recipe is checked. ``rules`` are checked besides the recipe's own.
    ``completion`` adds what the recipe leaves to other files.

    Raises:
        UserError: no such recipe, or not TOML.
        UserErrors: values are wrong. Each mistake is one line: file and line (or override), field and what
            to do.
    """
    path = _find(name_or_path)
    text = _read(path)
    document = _parse(text, path)
    parsed = [_parse_override(override) for override in overrides]
    for override in parsed:
        _apply(document, override)
    document.setdefault("name", path.stem)
    places = _Places(path, text, parsed)
    if completion is not None:
        wrong = completion(document)
        if wrong:
            raise UserErrors([f"{places(keys).name}: {'.'.join(keys)}: {what}" for keys, what in wrong])

    from pydantic import ValidationError

    from caffe_jacinto.recipes.explain import explain
    from caffe_jacinto.recipes.model import Recipe

    recipe, errors = None, []
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    if recipe is not None and not rules:
        return recipe
    found = explain(errors, document, rules, places)
    if recipe is None or found:
        raise UserErrors(found)
    return recipe


def recipe_of(document: Mapping[str, Any]) -> Recipe:
    """The recipe that a ``document`` holds which is no file: the content of another recipe, changed.

    Raises:
        UserErrors: values are wrong, a line for each.
    """
    from pydantic import ValidationError

    from caffe_jacinto.recipes.model import Recipe

    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise UserErrors([f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found]) from None


def toml_value(value: object) -> str:
    """A number, string, truth value or list of these in TOML.

    JSON's strings are TOML's but for one control character.
    """
    import json

    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _find(name_or_path: str) -> Path:
    known = built_in_recipes()
    path = Path(name_or_path)
    if "/" in name_or_path or path.suffix == ".toml":
        return path
    if name_or_path not in known:
        raise UserError(
            f"{name_or_path}: no such recipe; {did_you_mean(name_or_path, known)} "
            f"(a file of your own is given by its path: ./{name_or_path}.toml)"
        )
    return BUILT_IN_FOLDER / f"{name_or_path}.toml"


def _read(path: Path) -> str:
    try:
        # TOML knows "\n" and "\r\n"; only "\n" is counted as the end of a line.
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        hint = f"; the built-in recipe is called {path.stem}" if path.stem in built_in_recipes() else ""
        raise UserError(f"{path}: no such recipe file{hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a TOML file") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, line = _toml_error(str(error), text)
        raise UserError(f"{path}:{line}: not TOML: {what}; correct this line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: a value that a recipe cannot have: {error}") from None
    return document


def _toml_error(message: str, text: str) -> tuple[str, int]:
    """The parser's message without its place, and the line."""
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if place is None:
        return message, 1
    line = int(place[1]) if place[1] else text.rstrip("\n").count("\n") + 1
    return message[: place.start()], line


def _parse_override(text: str) -> Override:
    key_text, equals, value_text = text.partition("=")
    wrong = UserError(
        f"override {text}: not of the form KEY.KEY=VALUE; write it like stages.initial.solver.max_iter=1000"
    )
    if not equals or "\n" in key_text or key_text.count(".") > _MOST_PARTS:
        raise wrong
    try:
        keys = _only_path(tomllib.loads(f"{key_text} = 0"))
    except tomllib.TOMLDecodeError:
        raise wrong from None
    if keys is None:
        raise wrong
    return Override(text, keys, _override_value(value_text))


def _override_value(text: str) -> Any:
    """The TOML value that ``text`` is, or else the text itself."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _only_path(document: Mapping[str, Any]) -> Keys | None:
    return next((keys for keys, value in _paths(document) if not isinstance(value, dict)), None)


def _apply(document: dict[str, Any], override: Override) -> None:
    _check_stage(document, override)
    if override.removes_stage and isinstance(document.get("stages"), dict):
        del document["stages"][override.keys[1]]
        return
    table = document
    for depth, key in enumerate(override.keys[:-1]):
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            above = ".".join(override.keys[: depth + 1])
            raise UserError(
                f"override {override.text}: {above} is a value, so nothing is below it; set {above} itself"
            )
        table = inner
    table[override.keys[-1]] = override.value


def _check_stage(document: Mapping[str, Any], override: Override) -> None:
    """Refuse a value for a stage that does not exist: a misspelt name would add a new, empty stage."""
    stages = document.get("stages", {})
    of_a_stage = override.keys[0] == "stages" and len(override.keys) > 2
    if (of_a_stage or override.removes_stage) and isinstance(stages, dict):
        name = override.keys[1]
        if name not in stages:
            raise UserError(f"override {override.text}: no such stage {name}; {did_you_mean(name, stages)}")


class _Places:
    """Where the keys of a recipe stand: in which override, or else on which line of the file."""

    def __init__(self, path: Path, text: str, overrides: Sequence[Override]) -> None:
        self._path = path
        self._overrides = overrides
        self._lines = _lines_of_keys(text)

    def __call__(self, keys: Keys) -> Place:
        for number, override in reversed(list(enumerate(self._overrides))):
            if keys[: len(override.keys)] == override.keys:  # it set this value, or a table that holds it
                return Place(f"override {override.text}", (0, number))
        line = _line(keys, self._lines)
        return Place(f"{self._path}:{line}", (1, line))


def _line(keys: Keys, lines: Mapping[Keys, int]) -> int:
    """The line of the key, or of the nearest table above it that the file has."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in lines:
            return lines[keys[:length]]
    return 1


def _lines_of_keys(text: str) -> dict[Keys, int]:
    """The line, from 1, on which each key and table of a well-formed TOML text stands."""
    lines: dict[Keys, int] = {}
    table: Keys = ()
    for number, statement in _statements(text):
        is_header = statement.lstrip().startswith("[")
        for keys, _ in _paths(tomllib.loads(statement)):
            lines.setdefault(keys if is_header else table + keys, number)
        if is_header:
            table = max((keys for keys, _ in _paths(tomllib.loads(statement))), key=len)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header or assignment of a well-formed TOML text, with the number of its first line."""
    collected, first = "", 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not collected:
            first = number
        collected += line + "\n"
        try:
            tomllib.loads(collected)
        except tomllib.TOMLDecodeError:
            if number - first > _MOST_LINES:
                return
            continue  # a text or an array that continues on the next line
        yield first, collected
        collected = ""


def _paths(table: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in table.items():
        yield (*above, key), value
        if len(above) >= _MOST_PARTS:
            continue
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from _paths(value[0], (*above, key))
