"""Making LMDBs as a user does, and reading all of what is in one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import lmdb
import pytest

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

Datum = messages(Dialect.BVLC).Datum


def create(*arguments: object) -> int:
    """Start create_lmdb with these arguments."""
    return main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])


def mistake(arguments: Sequence[object]) -> str:
    """The one line that create_lmdb ends with."""
    with pytest.raises(UserError) as caught:
        create(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def records(path: Path) -> dict[bytes, bytes]:
    """Value by key, in the LMDB's order."""
    with lmdb.open(os.fspath(path), readonly=True, lock=False) as environment, environment.begin() as txn:
        return dict(txn.cursor())


def labels_of(path: Path) -> dict[str, int]:
    """Label by path, from keys of the form %08d_<path>."""
    return {key[9:].decode(): Datum.FromString(value).label for key, value in records(path).items()}


def names_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())
