"""What tests share: the real Caffe, and the published files."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.engines.discovery import find_engine

settings.register_profile("untimed", deadline=None)  # A busy machine is no reason to fail.
settings.load_profile("untimed")

collect_ignore_glob = [] if find_spec("torch") or os.environ.get("CI") else ["test_torch_*.py"]
"""Tests of the engine on PyTorch are left out where it is not installed; where CI is set, they fail."""


def pytest_report_header() -> list[str]:
    return [
        f"left out: {pattern}, which need PyTorch (pip install -e .[torch])"
        for pattern in collect_ignore_glob
    ]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> None:
    """What a test starts takes Ctrl-C and hang-ups: under nohup, behind an &, after a test that ran train."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def caffe_engine() -> Engine:
    """The real stock Caffe with pycaffe, found as a user's is; where CI is set, its lack is a failure."""
    try:
        engine = find_engine(None, "bvlc")
    except UserError as error:
        return _missing(str(error))
    if engine.info.pycaffe is None:
        return _missing("; ".join(engine.info.notes))
    return engine


@pytest.fixture(scope="session")
def pycaffe(caffe_engine: Engine) -> Any:
    """The module ``caffe`` in this process, which logs errors only."""
    from caffe_jacinto.inference.backends import quiet_pycaffe

    assert caffe_engine.info.pycaffe is not None
    return quiet_pycaffe(caffe_engine.info.pycaffe)


@pytest.fixture(scope="session")
def caffe_root(caffe_engine: Engine) -> Path:
    """The folder whose ``python/`` holds pycaffe and that has the executable below it."""
    assert caffe_engine.info.pycaffe is not None
    return caffe_engine.info.pycaffe.parent


@pytest.fixture(scope="session")
def published() -> Path:
    """The published prototxts, logs and schemas that tests compare with.

    They are other people's and no part of the project: in $CAFFE_JACINTO_PUBLISHED, or in shared/reference
    beside the checkout.
    """
    given = os.environ.get("CAFFE_JACINTO_PUBLISHED")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"the published files are not at {folder} (CAFFE_JACINTO_PUBLISHED)")
    return folder


def _missing(reason: str) -> Engine:
    if os.environ.get("CI"):
        pytest.fail(f"these tests need real Caffe: {reason}")
    pytest.skip(f"needs real Caffe: {reason}")
