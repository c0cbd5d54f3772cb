"""All mistakes of a recipe, each as one line in its own terms: place, field, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.quantization.schemes import scheme_mistakes, training_mistakes
from caffe_jacinto.recipes import model as models
from caffe_jacinto.recipes.rules import Keys, Mistake, Place, Rule, Values, mistakes

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

STAGE_TABLES: dict[str, type[BaseModel]] = {
    "solver": models.SolverSettings,
    "sparse": models.SparseSettings,
    "quantize": models.QuantizeSettings,
}
TABLES: dict[str, type[BaseModel]] = {
    "data": models.DataSettings,
    "network": models.NetworkSettings,
    "training": models.TrainingSettings,
}
ANY_STAGE = "NAME"
"""Stands for the name of a stage in messages."""


def explain(
    errors: Sequence[ErrorDetails],
    document: Mapping[str, Any],
    rules: Sequence[Rule],
    place_of: Callable[[Keys], Place],
) -> list[str]:
    """Every mistake of the recipe ``document`` in one line each, in the order of the places.

    ``errors`` are pydantic's; ``rules`` are applied besides the recipe's own.
    """
    found = sorted(_mistakes(errors, document, rules), key=lambda mistake: place_of(mistake.keys).order)
    return [f"{place_of(keys).name}: {_field(keys)}: {what}" for keys, what in found]


def _mistakes(
    errors: Sequence[ErrorDetails], document: Mapping[str, Any], rules: Sequence[Rule]
) -> Iterator[Mistake]:
    unknown, missing = [], _without_solver(document)
    wrong = set(missing)
    for error in errors:
        keys = _keys(error)
        if error["type"] in (models.MISTAKE, "default_factory_not_called"):
            continue  # the rules are applied below, to all values that are right
        if error["type"] == "extra_forbidden":
            unknown.append(keys)
            continue
        wrong.add(keys)
        if error["type"] == "missing":
            missing.append(keys)
        else:
            yield Mistake(keys, _explain(error, keys))
    strays = _Strays(unknown)
    yield from strays.mistakes()
    yield from _missing(missing, strays.meant)
    values = Values(_with_defaults(document), wrong | strays.meant)
    yield from mistakes(values, rules)


def _without_solver(document: Mapping[str, Any]) -> list[Keys]:
    """The solvers that stages lack: only a stage that quantizes needs none."""
    stages = document.get("stages")
    if not isinstance(stages, Mapping):
        return []
    return [
        ("stages", str(name), "solver")
        for name, stage in stages.items()
        if isinstance(stage, Mapping) and not {"solver", "quantize"} & {*stage}
    ]


def _keys(error: ErrorDetails) -> Keys:
    # pydantic marks the key of a mapping with a last "[key]".
    return tuple(str(part) for part in error["loc"] if part != "[key]")


class _Strays:
    """Keys that their tables do not have: those of another table, and misspelt ones."""

    def __init__(self, unknown: Sequence[Keys]) -> None:
        self.meant: set[Keys] = set()
        """What they probably are: keys that are then not missing, nor known to have a value."""

        self._misplaced: dict[tuple[Keys, Keys], list[str]] = {}
        self._unknown: list[Keys] = []
        for *above, key in unknown:
            table = tuple(above)
            home = _home(table, key)
            nearest = get_close_matches(key, _allowed(table), n=1)
            if home is not None:
                self._misplaced.setdefault((table, home), []).append(key)
                self.meant.add((*home, key))
            else:
                self._unknown.append((*table, key))
                self.meant.update((*table, name) for name in nearest)

    def mistakes(self) -> Iterator[Mistake]:
        for (table, home), names in self._misplaced.items():
            move = f"move it there, and {', '.join(names[1:])}" if names[1:] else "move it there"
            yield Mistake((*table, names[0]), f"belongs in {_header(home)}; {move}")
        for keys in self._unknown:
            yield Mistake(keys, f"no such key; {did_you_mean(keys[-1], _allowed(keys[:-1]))}")


def _home(table: Keys, key: str) -> Keys | None:
    """The nearest other table that has the key: of the same stage, else of the recipe."""
    stage = table[:2] if table[:1] == ("stages",) else ("stages", ANY_STAGE)
    in_stage = [(*stage, name) for name in STAGE_TABLES] + [stage]
    others: list[Keys] = [(name,) for name in TABLES]
    for home in in_stage + others if table[:1] == ("stages",) else others + in_stage:
        if home != table and key in _allowed(home):
            return home
    return None


def _missing(missing: Sequence[Keys], meant: Collection[Keys]) -> Iterator[Mistake]:
    """A line for each table that lacks keys or is missing itself."""
    lacking: dict[Keys, list[str]] = {}
    for keys in missing:
        if keys in meant:
            continue
        if _model_or_none(keys) is None and keys != ("stages",):
            lacking.setdefault(keys[:-1], []).append(keys[-1])
            continue
        what = _whole_table(keys, meant)
        if what:
            yield Mistake(keys, f"missing; {what}")
    for table, (first, *others) in lacking.items():
        also = f", and {', '.join(others)}" if others else ""
        yield Mistake((*table, first), f"missing; add it{also}")


def _whole_table(keys: Keys, meant: Collection[Keys]) -> str:
    """What to add where a table is missing; nothing where all that it needs stands elsewhere."""
    if keys == ("stages",):
        solver = ("stages", ANY_STAGE, "solver")
        return f"add a stage: {_header(solver)} with {', '.join(_required(solver))}"
    needed = [name for name in _required(keys) if (*keys, name) not in meant]
    return f"add {_header(keys)} with {', '.join(needed)}" if needed else ""


def _with_defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the defaults of what it does not say, for the rules."""
    whole = {name: _table(model, document[name]) for name, model in TABLES.items() if name in document}
    stages = document.get("stages")
    if isinstance(stages, Mapping):
        whole["stages"] = {name: _stage(stage) for name, stage in stages.items()}
    return whole


def _stage(given: Any) -> Any:
    stage = _table(models.Stage, given)
    if isinstance(stage, dict):
        for name, model in STAGE_TABLES.items():
            if isinstance(stage.get(name), Mapping):
                stage[name] = _table(model, stage[name])
    return stage


def _table(model: type[BaseModel], given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    fields = model.model_fields.items()
    defaults = {name: field.default for name, field in fields if field.default is not PydanticUndefined}
    return defaults | {key: None if value == "" else value for key, value in given.items()}


def _field(keys: Keys) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if key.isdigit() else f".{key}" if text else key
    return text or "recipe"


def _header(keys: Keys) -> str:
    return f"[{'.'.join(keys)}]"


def _explain(error: ErrorDetails, keys: Keys) -> str:
    """What is wrong and what to do, in the terms of a recipe."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "literal_error":
        allowed = _choices(_annotation(keys))
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


def solver_mistakes(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the settings of a stage's solver, by their keys in a recipe: key, and what to do."""
    table = ("stages", ANY_STAGE, "solver")
    errors: list[ErrorDetails] = []
    try:
        models.SolverSettings(**values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    for problem in errors:
        problem["loc"] = (*table, *problem["loc"])
    found = _mistakes(errors, {"stages": {ANY_STAGE: {"solver": values}}}, ())
    return [(".".join(keys[3:]), what) for keys, what in found if keys[:3] == table]


def quantize_settings(values: Mapping[str, Any], prefix: str) -> models.QuantizeSettings:
    """The settings of quantization-aware training, by their keys in a recipe.

    Raises:
        UserError: a value is out of its range, or does not go with training; the message has ``prefix``
            before the key.
    """
    try:
        settings = models.QuantizeSettings(**values)
    except ValidationError as error:
        found = [(tuple(map(str, problem["loc"])), problem) for problem in error.errors()]
        raise UserError(
            "; ".join(
                f"{prefix}{'.'.join(keys)}: {_explain(problem, ('stages', ANY_STAGE, 'quantize', *keys))}"
                for keys, problem in found
            )
        ) from None
    for key, what in (*scheme_mistakes(settings.model_dump()), *training_mistakes(settings.model_dump())):
        raise UserError(f"{prefix}{key}: {what}")
    return settings


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, which may be one side of an optional type."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        quoted = value.encode("unicode_escape").decode().replace('"', '\\"')
        return f'the text "{quoted[:60]}"'
    if isinstance(value, dict):
        return "a table" if value else "an empty table"
    return str(value)[:60]


# ------------------------------------------------------------------------------ the tables and their keys


def _allowed(table: Keys) -> list[str]:
    """The keys that a table may hold."""
    model = _model_or_none(table)
    return list(model.model_fields) if model else []


def _required(table: Keys) -> list[str]:
    """The keys that a table must hold."""
    model = _model_or_none(table)
    return [name for name, field in model.model_fields.items() if field.is_required()] if model else []


def _model_or_none(table: Keys) -> type[BaseModel] | None:
    """The model that describes a table; None where there is no such table."""
    if not table:
        return models.Recipe
    if table[0] != "stages":
        return TABLES.get(table[0]) if len(table) == 1 else None
    if len(table) == 2:
        return models.Stage
    return STAGE_TABLES.get(table[2]) if len(table) == 3 else None


def _annotation(keys: Keys) -> Any:
    model = _model_or_none(keys[:-1])
    return model.model_fields[keys[-1]].annotation if model else None
