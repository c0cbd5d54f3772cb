"""What pip makes of the project: a wheel with templates, recipes and schemas, that works in any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from log_text import whole_stage

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


def run(command: list[str], installed: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Start ``command`` in ``folder``. The checkout's editable install comes after what PYTHONPATH names."""
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.caffe
def test_the_wheel_carries_every_file_that_is_read_at_run_time(installed: Path) -> None:
    package = installed / "caffe_jacinto"
    kinds = (".j2", ".js", ".css", "")  # "": the licence of a script
    assert files_below(package / "templates", *kinds) == files_below(ROOT / "templates", *kinds)
    data = (".toml", ".proto", ".binpb", ".typed", ".py")
    assert files_below(package, *data) == files_below(ROOT / "caffe_jacinto", *data)


@pytest.mark.caffe
def test_build_net_works_from_the_wheel_in_another_folder(installed: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from caffe_jacinto import build_net; from caffe_jacinto.common import files;"
        "print(files.template_folder()); sys.exit(build_net.main(['--output', 'net']))"
    )
    done = run([sys.executable, "-c", script], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "jacintonet11" in (tmp_path / "net" / "train.prototxt").read_text().lower()


@pytest.mark.caffe
def test_a_page_is_written_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "x_train.log").write_text(whole_stage().text)
    command = [str(installed / "bin" / "caffe-jacinto"), "report", "x_train.log", "--html", "page.html"]
    done = run(command, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    assert "var uPlot=function" in text and "Permission is hereby granted" in text


@pytest.mark.caffe
def test_the_console_scripts_start_what_the_wheel_holds(installed: Path, tmp_path: Path) -> None:
    listed = run([str(installed / "bin" / "caffe-jacinto")], installed, tmp_path)
    assert listed.returncode == 0 and "build_net" in listed.stdout
    command = [str(installed / "bin" / "caffe-jacinto"), "build_net", "--output", "net"]
    done = run(command, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "net" / "solver.prototxt").exists()
    assert (installed / "bin" / "caffe-torch").exists()
    (metadata,) = installed.glob("caffe_jacinto-*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Requires-Dist: jinja2>=3.1" in text and "Provides-Extra: pycaffe" in text
    assert "License-File: templates/html/uplot/LICENSE" in text
