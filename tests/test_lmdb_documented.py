"""The commands of docs/lmdb.md and of create_lmdb's own help, as written there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from ilsvrc import SYNSETS, train_images, val_images, write_devkit, write_folders, write_train, write_val
from lmdb_records import labels_of, records

from caffe_jacinto import create_lmdb

PROGRAM = "python -m caffe_jacinto.create_lmdb "
VAL_LABELS = (3, 0, 2, 1, 1, 0)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the archives, and in data/ the same images unpacked."""
    monkeypatch.chdir(tmp_path)
    train, val = train_images(10), val_images(len(VAL_LABELS))
    write_train(tmp_path, train)
    write_val(tmp_path, val)
    write_devkit(tmp_path, VAL_LABELS)
    write_folders(tmp_path / "data" / "train", train)
    (tmp_path / "data" / "val").mkdir()
    for name, content in val.items():
        (tmp_path / "data" / "val" / name).write_bytes(content)
    lines = [f"{name} {label}\n" for name, label in zip(val, VAL_LABELS, strict=True)]
    (tmp_path / "data" / "val.txt").write_text("".join(lines))
    return tmp_path


def run(text: str) -> int:
    """Run the commands in ``text``, one after the other; returns how many."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    commands = [line.removeprefix(PROGRAM) for line in lines if line.startswith(PROGRAM)]
    chosen = [command for command in commands if "SOURCE" not in command]
    for command in chosen:
        assert create_lmdb.main(shlex.split(command)) == 0, command
    return len(chosen)


def test_the_commands_of_its_help(downloads: Path) -> None:
    help_text = create_lmdb.__doc__ or ""
    assert run(help_text) == 6
    assert set(labels_of(downloads / "data/ilsvrc12_train_lmdb").values()) == {0, 1, 2, 3}
    assert list(labels_of(downloads / "data/ilsvrc12_val_lmdb").values()) == list(VAL_LABELS)
    assert records(downloads / "data/val_lmdb") == records(downloads / "data/ilsvrc12_val_lmdb")
    assert (downloads / "data/mean.binaryproto").stat().st_size > 256 * 256 * 3


def test_the_commands_of_the_page(downloads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["--images", "ILSVRC2012_img_train.tar", "--output", "data/ilsvrc12_train_lmdb"]
    assert create_lmdb.main(train) == 0
    page = Path(__file__).parents[1] / "docs" / "lmdb.md"
    assert run(page.read_text()) == 5
    assert records(downloads / "data/train_lmdb") == records(downloads / "data/ilsvrc12_train_lmdb")
    assert (downloads / "samples.html").read_text().count("<img") == 10 * len(SYNSETS)
    assert "shuffled" in capsys.readouterr().out
