"""The cases of a session: which comes when, how each is drawn from the seed, and what it found."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ENGINES = {"torch": "PyTorch", "bvlc": "stock Caffe"}
"""The engines that are disturbed, as ``--engine`` names them, and as people do."""

NO_ENGINE = ""

ROTATION = (
    ("kills", "torch"),
    ("kills", "bvlc"),
    ("logs", NO_ENGINE),
    ("damage", "torch"),
    ("disk", "bvlc"),
    ("archives", NO_ENGINE),
    ("signals", "torch"),
    ("damage", "bvlc"),
    ("lmdb", NO_ENGINE),
    ("disk", "torch"),
    ("signals", "bvlc"),
    ("images", NO_ENGINE),
    ("kills", "torch"),
    ("kills", "bvlc"),
    ("files", NO_ENGINE),
    ("lmdb disk", NO_ENGINE),
)
"""Kinds of cases and their engines, in turn: a session of a few minutes has something of everything."""


class Broken(Exception):  # noqa: N818 - a promise is
    """A promise that was not kept, in a line."""


@dataclass(frozen=True)
class Case:
    """One case of a session; all that it does follows from the seed and its number."""

    seed: int
    number: int

    @property
    def kind(self) -> str:
        return ROTATION[self.number % len(ROTATION)][0]

    @property
    def engine(self) -> str:
        """The engine to train with; empty where nothing is trained."""
        return ROTATION[self.number % len(ROTATION)][1]

    def dice(self) -> random.Random:
        return random.Random(f"{self.seed} {self.number}")

    def title(self) -> str:
        return f"case {self.number}: {self.kind}" + (f" on {ENGINES[self.engine]}" if self.engine else "")

    def command(self) -> str:
        """What repeats this case."""
        return f"tools/utils/faults.sh --seed {self.seed} --only {self.number}"


@dataclass
class Result:
    """What a case did and found."""

    done: Counter[str] = field(default_factory=Counter)
    """How often each thing was done, by its name in the table."""

    broken: str | None = None
    not_run: str | None = None
    """Why it could not be carried out here."""

    seconds: float = 0.0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self)))

    @classmethod
    def read(cls, path: Path) -> Result:
        content = json.loads(path.read_text())
        return cls(**{**content, "done": Counter(content["done"])})
