"""Runs -> one HTML page that needs no other file and no network: tables, curves, pruning, cost, settings.

The curves are drawn by uPlot (MIT licence, 51 KB), whose script stands in the page. Scripts and styles run by
their hashes only (Content-Security-Policy), so that no text of a log can become one, and nothing is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.files import template_folder, write_whole
from caffe_jacinto.common.text import printable
from caffe_jacinto.logs import page_content, tables
from caffe_jacinto.logs.discover import Run
from caffe_jacinto.logs.quantized import quantized_of
from caffe_jacinto.logs.solver_settings import solver_settings

if TYPE_CHECKING:
    import jinja2

PAGE_NAME = "report.html"
"""The page in a run's folder."""


@dataclass(frozen=True)
class State:
    """How far the run of a page is, as the program that trains it knows."""

    text: str
    reload: int | None
    """Seconds after which the page loads itself again; None: it shows the end."""
    problem: str = ""
    """Why it ended early."""


def write_page(
    runs: Sequence[Run], path: Path, *, published: bool = False, state: State | None = None
) -> None:
    """Write the page of ``runs`` (read with their history) to ``path``, whole or not at all.

    For ``published`` see `tables.published_rows`.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, page_of(runs, published=published, state=state))


def page_of(
    runs: Sequence[Run],
    *,
    published: bool = False,
    state: State | None = None,
    written: datetime | None = None,
) -> bytes:
    """The page of ``runs`` as UTF-8. ``written``: the time that it states, now unless given."""
    from markupsafe import Markup

    written = written or datetime.now().astimezone()
    data: dict[str, Any] = {"runs": page_content.curves(runs), "written": round(written.timestamp())}
    if state is not None and state.reload is not None:
        data["reload"] = state.reload
    quantized = [quantized_of(run) for run in runs]
    problems = [problem for _, found in quantized for problem in found]
    if state is not None and state.problem:
        problems.append(state.problem)
    title = printable(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs"
    text = (
        _environment()
        .get_template("html/report.html.j2")
        .render(
            title=title,
            runs=runs,
            state=state,
            written=written,
            notes=page_content.notes(runs, problems),
            cards=page_content.cards(runs[0]) if len(runs) == 1 else [],
            results=tables.result_table(runs, tables.published_rows(runs, published)),
            stages=[(tables.stage_table(run), page_content.figure_rows(run), run) for run in runs],
            data=Markup(_script_json(data)),
            has_curves=any(run["stages"] for run in data["runs"]),
            has_pruning=any(run["pruning"] for run in data["runs"]),
            costs=page_content.costs(runs),
            complexity=tables.complexity,
            quantized=[one for found, _ in quantized for one in found],
            settings=solver_settings(runs),
            percent=tables.percent,
            printable=printable,
            **_assets(),
        )
    )
    return text.encode("utf-8", "backslashreplace")


def _script_json(data: Any) -> str:
    """JSON that may stand in a script element: without the characters that could end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@lru_cache(maxsize=1)
def _assets() -> dict[str, Any]:
    """Scripts and styles of the page, and the policy that admits them and nothing else."""
    from markupsafe import Markup

    folder = template_folder() / "html"
    scripts = [_text(folder / "uplot" / "uPlot.iife.min.js"), _text(folder / "report.js")]
    styles = [_text(folder / "uplot" / "uPlot.min.css"), _text(folder / "report.css")]
    hashes = {
        "script-src": " ".join(_hash(script) for script in scripts),
        "style-src": " ".join(_hash(style) for style in styles),
    }
    policy = "; ".join(["default-src 'none'", *(f"{what} {those}" for what, those in hashes.items())])
    return {
        "scripts": [Markup(script) for script in scripts],
        "styles": [Markup(style) for style in styles],
        "licence": Markup(_text(folder / "uplot" / "LICENSE")),
        "policy": f"{policy}; base-uri 'none'; form-action 'none'",
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
