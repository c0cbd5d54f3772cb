"""Choices by measuring that are made once on a machine, and then kept for every process."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from caffe_jacinto.common.files import write_whole
from caffe_jacinto.engines.pytorch.machine import cache_folder, identity


class Choices:
    """A file of choices by name. Two measurements can differ; whoever comes second takes what is kept."""

    def __init__(self, path: Path) -> None:
        """``path`` need not exist."""
        self._path = path
        self._known: dict[str, str] = {}

    @staticmethod
    @cache
    def of_this_machine() -> Choices:
        """Those for this processor, version of PyTorch and number of threads."""
        return Choices(cache_folder() / f"choices-{identity()}-{torch.get_num_threads()}.json")

    def choose(self, name: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        """What is kept under ``name``, if it is one of ``among``; else what ``measure`` finds, and keeps."""
        if self._known.get(name) in among:
            return self._known[name]
        with self._locked():
            self._known = self._read()
            if self._known.get(name) not in among:
                self._known[name] = measure()
                with suppress(OSError):  # without it, the next process measures again
                    write_whole(self._path, json.dumps(self._known, indent=1) + "\n")
        return self._known[name]

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process measures at a time: two would slow each other down."""
        try:
            lock = self._path.with_suffix(".lock").open("w")
        except OSError:
            yield
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
