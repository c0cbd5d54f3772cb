"""The record that a stage's final weights are ready to be handed over, beside the weights.

It holds their SHA-256, so that it says nothing of weights written later under the same name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from caffe_jacinto.files import write_whole


def handover_record(final_weights: Path) -> Path:
    """The record's path, ``<prefix>_iter_N.handover.json``."""
    return final_weights.with_suffix(".handover.json")


def record_handover(final_weights: Path, reestimated_batches: int) -> None:
    """Say that ``final_weights`` are final, their statistics re-estimated over so many batches."""
    content = {"sha256": _sha256(final_weights), "reestimated_batches": reestimated_batches}
    write_whole(handover_record(final_weights), json.dumps(content, indent=1) + "\n")


def is_handed_over(final_weights: Path) -> bool:
    """Whether there is a record of just these weights."""
    try:
        content = json.loads(handover_record(final_weights).read_text())
        return bool(content["sha256"] == _sha256(final_weights))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
