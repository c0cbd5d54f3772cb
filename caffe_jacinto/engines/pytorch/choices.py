"""Choices by measuring that are made once on a machine, and then kept for every process."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from caffe_jacinto.common.files import write_whole
from caffe_jacinto.engines.pytorch.machine import cache_folder, identity


class Choices:
    """A file of choices by name. Two measurements can differ; whoever comes second takes what is kept."""

    def __init__(self, path: Path | None) -> None:
        """``path`` need not exist. None: nothing can be kept, so nothing is measured."""
        self._path = path
        self._known: dict[str, str] = {}

    @staticmethod
    @cache
    def of_this_machine() -> Choices:
        """Those for this processor, version of PyTorch and number of threads."""
        folder = cache_folder()
        name = f"choices-{identity()}-{torch.get_num_threads()}.json"
        return Choices(None if folder is None else folder / name)

    def choose(self, name: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        """What is kept under ``name``, if it is one of ``among``; else what ``measure`` finds, and keeps.

        The first of ``among`` where nothing can be kept: another process would choose otherwise.
        """
        if self._known.get(name) in among:
            return self._known[name]
        try:
            return self._measured(name, among, measure)
        except OSError:
            return among[0]

    def _measured(self, name: str, among: Sequence[str], measure: Callable[[], str]) -> str:
        if self._path is None:
            return among[0]
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two that measure at a time would slow each other down
            known = self._read(self._path)
            if known.get(name) not in among:
                known[name] = measure()
                write_whole(self._path, json.dumps(known, indent=1) + "\n")
            self._known = known
        return known[name]

    @staticmethod
    def _read(path: Path) -> dict[str, str]:
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
