"""Read a recipe: a TOML file and overrides of its values. An error is one line with file, line and field."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    from caffe_jacinto.recipes.model import Recipe

BUILT_IN_FOLDER = Path(__file__).parent

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Override:
    """An override on the command line, like ``stages.initial.solver.max_iter=1000``."""

    text: str
    keys: Keys
    value: Any


def built_in_recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in BUILT_IN_FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A built-in recipe by its name, or a recipe file by its path (it has a slash or ends in .toml).

    ``overrides`` have the form ``KEY.KEY=VALUE``, with a TOML value; a bare word is a string. They are
    applied in order, before the recipe is checked.

    Raises:
        UserError: no such recipe, not TOML, or a value is wrong: file, line (or override), field and what to
            do.
    """
    path = _find(name_or_path)
    text = _read(path)
    document = _parse(text, path)
    parsed = [_parse_override(override) for override in overrides]
    for override in parsed:
        _apply(document, override)
    document.setdefault("name", path.stem)

    from pydantic import ValidationError

    from caffe_jacinto.recipes.model import Recipe

    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(_first_mistake(error.errors(include_url=False), path, text, parsed)) from None


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
    if not equals or "\n" in key_text:
        raise wrong
    try:
        keys = _only_path(tomllib.loads(f"{key_text} = 0"))
    except tomllib.TOMLDecodeError:
        raise wrong from None
    return Override(text, keys, _override_value(value_text))


def _override_value(text: str) -> Any:
    """The TOML value that ``text`` is, or else the text itself."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _only_path(document: Mapping[str, Any]) -> Keys:
    return next(keys for keys, value in _paths(document) if not isinstance(value, dict))


def _apply(document: dict[str, Any], override: Override) -> None:
    _check_stage(document, override)
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
    stages = document.get("stages")
    if override.keys[0] == "stages" and len(override.keys) > 2 and isinstance(stages, dict):
        name = override.keys[1]
        if name not in stages:
            raise UserError(f"override {override.text}: no such stage {name}; {did_you_mean(name, stages)}")


def _first_mistake(
    errors: Sequence[ErrorDetails], path: Path, text: str, overrides: Sequence[Override]
) -> str:
    """The first mistake in the file, as one line; a mistake in an override comes before all others."""
    lines = _lines_of_keys(text)
    messages = []
    missing: dict[Keys, list[str]] = {}
    for error in errors:
        # pydantic marks the key of a mapping with a last "[key]".
        keys = tuple(str(part) for part in error["loc"] if part != "[key]")
        keys += tuple(error.get("ctx", {}).get("path", ()))
        override = next((o for o in reversed(overrides) if _made_by(keys, o.keys)), None)
        line = _line(keys, lines)
        place = f"override {override.text}" if override else f"{path}:{line}"
        # A missing key is often a misspelt one: report the misspelt key.
        rank = (override is None, error["type"] == "missing", line)
        if error["type"] == "missing":
            missing.setdefault(keys[:-1], []).append(keys[-1])
        messages.append((rank, f"{place}: {_field(keys)}: {_explain(error, keys)}", keys))
    _, message, keys = min(messages)
    together = missing.get(keys[:-1], [])
    others = [key for key in together if (*keys[:-1], key) != keys]
    is_missing = len(others) < len(together)
    return f"{message}, and {', '.join(others)}" if is_missing and others else message


def _made_by(keys: Keys, override: Keys) -> bool:
    """Whether the override set the value at ``keys``, or a table that holds it."""
    return keys[: len(override)] == override


def _field(keys: Keys) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if key.isdigit() else f".{key}" if text else key
    return text or "recipe"


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
            continue  # a text or an array that continues on the next line
        yield first, collected
        collected = ""


def _paths(table: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in table.items():
        yield (*above, key), value
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from _paths(value[0], (*above, key))


def _explain(error: ErrorDetails, keys: Keys) -> str:
    """What is wrong and what to do, in the terms of a recipe."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "mistake":
        return str(context["what"])
    if kind == "extra_forbidden":
        return f"no such key; {did_you_mean(keys[-1], _allowed(keys[:-1]))}"
    if kind == "missing":
        return "missing; add it"
    if kind == "literal_error":
        allowed = [str(choice) for choice in get_args(_annotation(keys))]
        return f"{_shown(value)} is not allowed; {did_you_mean(str(value), allowed)}"
    if kind == "string_pattern_mismatch":
        if keys[:-1] == ("stages",):
            return f"{_shown(value)} cannot name a folder; use letters, digits, - and _, a letter first"
        if keys[-1] == "dataset":
            return f"{_shown(value)} cannot name a file; use letters, digits, ., - and _"
        return f"{_shown(value)} holds a character that file names cannot have"
    expected = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": 'a text in quotes, like "name"',
        "bool_type": "true or false",
        "tuple_type": "a list, like [1, 2]",
        "dict_type": "a table",
        "model_type": "a table",
        "finite_number": "a finite number",
        "greater_than_equal": f"{context.get('ge')} or more",
        "greater_than": f"more than {context.get('gt')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"{context.get('le')} or less",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "string_too_short": "a text that is not empty",
        "too_short": "at least one stage, like [stages.initial]",
    }.get(kind)
    if expected is None:
        return f"{_shown(value)}: {error['msg']}"
    return f"is {_shown(value)}; give {expected}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        quoted = value.encode("unicode_escape").decode().replace('"', '\\"')
        return f'the text "{quoted[:60]}"'
    if isinstance(value, dict):
        return "a table" if value else "an empty table"
    return str(value)[:60]


def _allowed(keys: Keys) -> list[str]:
    """The keys that the table at ``keys`` may hold."""
    model = _model(keys)
    return list(model.model_fields)


def _model(keys: Keys) -> type[BaseModel]:
    """The model that describes the table at ``keys``."""
    from caffe_jacinto.recipes import model as models

    tables: dict[str, type[BaseModel]] = {
        "data": models.DataSettings,
        "network": models.NetworkSettings,
        "training": models.TrainingSettings,
        "solver": models.SolverSettings,
        "sparse": models.SparseSettings,
    }
    if not keys:
        return models.Recipe
    if keys[0] == "stages":
        return models.Stage if len(keys) == 2 else tables[keys[2]]
    return tables[keys[0]]


def _annotation(keys: Keys) -> Any:
    return _model(keys[:-1]).model_fields[keys[-1]].annotation
