"""Where the files that travel with the code are found.

The templates stand at the top level of the repository (`templates/`), and inside the package
(`caffe_jacinto/templates/`) once it is installed from a wheel.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def template_folder() -> Path:
    """The folder of the Jinja templates: in an installed wheel, or else in the checkout (editable or not).

    Raises FileNotFoundError when there is neither, which only a damaged installation brings about.
    """
    installed, checkout = PACKAGE / "templates", PACKAGE.parent / "templates"
    for folder in (installed, checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no templates at {installed} nor {checkout}: install caffe-jacinto again")
