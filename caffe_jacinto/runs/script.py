"""run.sh: the commands of a stage, for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from caffe_jacinto.resources import PACKAGE, template_folder
from caffe_jacinto.runs.process import ENVIRONMENT


def shell_script(start_folder: Path, lock: Path, log: Path, commands: Sequence[Sequence[str]]) -> str:
    """The text of run.sh: the same commands in the same folder, their output in the same log, under the lock.

    Every word is quoted, so that a path may hold anything.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("shell/run.sh.j2").render(
        start_folder=start_folder,
        lock=lock,
        log=log,
        environment=ENVIRONMENT,
        python_path=PACKAGE.parent,
        commands=[shlex.join(command) for command in commands],
    )
