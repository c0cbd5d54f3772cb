"""A Python that lacks packages this project needs: one line with the command that mends it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

PACKAGES = {
    **{
        name: name
        for name in ("h5py", "jinja2", "lmdb", "matplotlib", "numpy", "pydantic", "rich", "scipy", "tomli")
    },
    **{name: name for name in ("mlxtend", "onnx", "submitit", "torch")},
    **{"PIL": "pillow", "cv2": "opencv-python-headless", "google": "protobuf"},
}
"""The module that is imported of each package that pyproject.toml names, and the package's name."""


def why_missing(error: ImportError) -> str | None:
    """What to tell a user whose Python cannot import a package; None where it is none of `PACKAGES`."""
    package = PACKAGES.get((error.name or "").partition(".")[0])
    if package is None:
        return None
    if not isinstance(error, ModuleNotFoundError):
        return f"{sys.executable} cannot import the package {package}: {error}; {_mend(package)}"
    return f"{sys.executable} has no package {package}; {_mend(package)}"


def _mend(package: str) -> str:
    root = Path(__file__).parents[2]
    pip = f"{sys.executable} -m pip install"
    if not (root / "pyproject.toml").exists():
        return f"install it: {pip} {package}"
    own = root / ".venv" / "bin" / "python"
    if own.exists() and own.absolute() != Path(sys.executable).absolute():
        return f"use the Python that tools/utils/setup.sh made: {own}"
    return f"install what the project needs: {root}/tools/utils/setup.sh, or {pip} -e {root}"


def explain_at_exit() -> None:
    """Let an `ImportError` that nothing catches end the program with the line of `why_missing`."""
    before = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = why_missing(error) if isinstance(error, ImportError) else None
        if line is None:
            before(kind, error, trace)
        else:
            print(f"{_program()}: error: {line}", file=sys.stderr)

    sys.excepthook = explain


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
