"""A few thousand damaged files; tools/utils/fuzz.sh reads many more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZING = Path(__file__).with_name("fuzzing.py")


@pytest.mark.caffe  # for its time
def test_damaged_files_are_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    """In a process of its own: the limit on its memory must not hold for other tests."""
    seed = os.environ.get("FUZZ_SEED", "0")
    command = [sys.executable, str(FUZZING), "--files", "2000", "--seconds", "30", "--seed", seed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0].replace(",", "")) > 200


def test_the_damage_is_damage() -> None:
    """Most damaged files are no longer what they were, and the sound ones are sound."""
    sys.path.insert(0, str(FUZZING.parent))
    import random

    from fuzzing import damaged, seeds

    binary, texts = seeds()
    dice = random.Random(1)
    changed = [
        damaged(content, family, dice) != content for family in (binary, texts) for content in family * 5
    ]
    assert sum(changed) > 0.9 * len(changed)
