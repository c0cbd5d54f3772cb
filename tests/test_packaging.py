"""What pip makes of the project: a wheel with templates, recipes and schemas, that works in any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caffe_jacinto.common.files import template_folder

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "caffe_jacinto", "templates")


def test_a_checkout_finds_its_own_templates() -> None:
    assert template_folder() == ROOT / "templates"
    assert list(template_folder().rglob("*.j2"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, by `pip install --target`; the wheel is built from a copy."""
    copy = tmp_path_factory.mktemp("copy")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def files_below(folder: Path, *suffixes: str) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in suffixes
    }


@pytest.mark.caffe
def test_the_wheel_carries_every_file_that_is_read_at_run_time(installed: Path) -> None:
    package = installed / "caffe_jacinto"
    assert files_below(package / "templates", ".j2") == files_below(ROOT / "templates", ".j2")
    data = (".toml", ".proto", ".binpb", ".typed", ".py")
    assert files_below(package, *data) == files_below(ROOT / "caffe_jacinto", *data)


@pytest.mark.caffe
def test_build_net_works_from_the_wheel_in_another_folder(installed: Path, tmp_path: Path) -> None:
    # The editable install of the checkout stays out of the way: what stands on PYTHONPATH comes first.
    script = (
        "import sys; from caffe_jacinto import build_net, resources;"
        "print(resources.template_folder()); sys.exit(build_net.main(['--output', 'net']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "jacintonet11" in (tmp_path / "net" / "train.prototxt").read_text().lower()
