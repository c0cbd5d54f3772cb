"""check_lmdb says in one line what is wrong with an LMDB, before a long run starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.encode import datum_record
from caffe_jacinto.data.identity import lmdb_identity
from caffe_jacinto.data.lmdb_reader import LmdbFacts, check_lmdb
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages


def jpeg(height: int = 32, width: int = 36, *, channels: int = 3) -> bytes:
    shape = (height, width, 3) if channels == 3 else (height, width)
    return bytes(cv2.imencode(".jpg", np.full(shape, 100, dtype=np.uint8))[1].tobytes())


def write(folder: Path, values: dict[bytes, bytes]) -> Path:
    environment = lmdb.open(os.fspath(folder), map_size=1 << 30, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def numbered(labels: list[int], image: bytes | None = None) -> dict[bytes, bytes]:
    image = image or jpeg()
    return {b"%08d_x.JPEG" % n: datum_record(image, label) for n, label in enumerate(labels)}


def check(
    folder: Path,
    *,
    num_classes: int | None = 10,
    min_images: int = 1,
    min_size: int = 32,
    training: bool = False,
) -> LmdbFacts:
    return check_lmdb(
        os.fspath(folder),
        num_classes=num_classes,
        min_images=min_images,
        min_size=min_size,
        training=training,
    )


def mistake(folder: Path, **limits: int) -> str:
    with pytest.raises(UserError) as caught:
        check(folder, **limits)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_facts_of_a_good_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", numbered([n * 7 % 10 for n in range(200)]))
    facts = check(folder, min_images=200, training=True)
    assert facts == LmdbFacts(
        images=200,
        channels=3,
        height=32,
        width=36,
        largest=(32, 36),
        highest_label=9,
        sampled=64,
        notes=(),
    )
    assert [item.name for item in folder.iterdir()] == ["data.mdb"], "a check leaves no lock behind"


def test_the_sample_reaches_from_the_first_to_the_last(tmp_path: Path) -> None:
    values = numbered([0] * 5000)
    del values[b"%08d_x.JPEG" % 4998]
    small = datum_record(jpeg(8, 8), 0)
    for key in (b"00000000_x.JPEG", b"00004999_x.JPEG"):
        folder = write(tmp_path / key[:8].decode(), values | {key: small})
        assert f"record '{key.decode()}': the image is 8x8 pixels, smaller than the crop of 32x32" in mistake(
            folder
        )


def test_other_keys_are_sampled_at_both_ends(tmp_path: Path) -> None:
    values = {b"k%05d" % n: datum_record(jpeg(), 0) for n in range(1000)}
    assert check(write(tmp_path / "o", values)).sampled == 64
    for key in (b"k00000", b"k00999"):
        folder = write(tmp_path / key.decode(), values | {key: datum_record(b"nothing", 0)})
        assert f"record '{key.decode()}': an image that cannot be decoded" in mistake(folder)
    assert check(write(tmp_path / "one", {b"k": datum_record(jpeg(), 3)})).sampled == 1


def test_images_stored_as_plain_values(tmp_path: Path) -> None:
    datum = messages(Dialect.BVLC).Datum
    whole = datum(channels=3, height=40, width=50, data=bytes(6000), label=1).SerializeToString()
    assert check(write(tmp_path / "o", {b"0": whole})).height == 40
    short = datum(channels=3, height=40, width=50, data=bytes(5999), label=1).SerializeToString()
    assert (
        "values that do not fill the image's size: 5999 for 3 x 40 x 50 (channels x height x width)"
        in mistake(write(tmp_path / "p", {b"0": short}))
    )


def test_what_is_no_lmdb(tmp_path: Path) -> None:
    assert f"LMDB {tmp_path}/none does not exist: make it with" in mistake(tmp_path / "none")
    assert f"{tmp_path} is not an LMDB: there is no data.mdb in it" in mistake(tmp_path)
    (tmp_path / "my images" / "cat").mkdir(parents=True)
    message = mistake(tmp_path / "my images")
    command = f"create_lmdb --images '{tmp_path}/my images' --output '{tmp_path}/my images_lmdb'"
    assert message.endswith(f"for each class: python -m caffe_jacinto.{command}")
    (tmp_path / "level").mkdir()
    (tmp_path / "level" / "CURRENT").touch()
    assert "level is a LevelDB, and an LMDB is needed" in mistake(tmp_path / "level")
    folder = write(tmp_path / "o", numbered([0]))
    assert f"data.mdb is a file, and an LMDB is a folder: give its folder, {folder}" in mistake(
        folder / "data.mdb"
    )
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("hello" * 10_000)
    assert "text cannot be read as an LMDB" in mistake(tmp_path / "text")
    (tmp_path / "text" / "data.mdb").write_text("")
    assert "text" in mistake(tmp_path / "text")


def test_one_that_was_copied_in_part(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", numbered([0] * 100, jpeg(256, 256) + bytes(9000)))
    whole = (folder / "data.mdb").read_bytes()
    for size in (100, 5000, 8192, len(whole) // 2, len(whole) - 1):
        (folder / "data.mdb").write_bytes(whole[:size])
        message = mistake(folder)
        assert "is cut off" in message or "cannot be read as an LMDB" in message


def test_too_few(tmp_path: Path) -> None:
    assert "is empty" in mistake(write(tmp_path / "o", {}))
    folder = write(tmp_path / "p", numbered([0] * 40))
    assert "p holds 40 images, and one batch alone needs 64" in mistake(folder, min_images=64)


def test_records_that_no_network_can_take(tmp_path: Path) -> None:
    def of(name: str, value: bytes, **limits: int) -> str:
        return mistake(write(tmp_path / name, {b"00000000_x": value}), **limits)

    assert "record '00000000_x': not a Datum message" in of("a", b"\xff\xff\xff\xff")
    assert "the image has 1 channel, and the network takes 3: make the LMDB again in colour" in of(
        "b", datum_record(jpeg(channels=1), 0)
    )
    assert "label 10, but the network has 10 classes (labels 0 to 9)" in of("c", datum_record(jpeg(), 10))
    assert "label -1 is below 0" in of("d", datum_record(jpeg(), -1))
    assert "the image is 36x32 pixels, smaller than the crop of 33x33" in of(
        "e", datum_record(jpeg(), 0), min_size=33
    )


def test_images_class_by_class_are_worth_a_note(tmp_path: Path) -> None:
    by_class = write(tmp_path / "o", numbered(sorted([n % 10 for n in range(2000)])))
    assert "class by class" in check(by_class, training=True).notes[0]
    assert check(by_class).notes == ()
    one_class = write(tmp_path / "p", numbered([0] * 1000))
    (note,) = check(one_class, training=True).notes
    assert "class by class" not in note


@pytest.mark.parametrize(
    ("labels", "num_classes", "says"),
    [
        (
            [n % 3 for n in range(90)],
            10,
            "of 3 classes (labels 0, 1, 2), and the network has 10: if there are no",
        ),
        (
            [0, 2] * 20,
            3,
            "of 2 classes (labels 0, 2), and the network has 3: if there are no other",
        ),
        (
            [(1456, 1516, 1580)[n % 3] for n in range(90)],
            1581,
            "(labels 1456, 1516, 1580), and the network has",
        ),
        (
            [(1456, 1516, 1580)[n % 7 % 3] for n in range(2000)],
            1581,
            "of 3 classes among the 64 records looked",
        ),
        ([1456, 1516] * 20, None, "again with labels from 0 to 1 without"),
        (
            [0] * 40,
            10,
            "of 1 class (label 0), and the network has 10: make it again with images of every class",
        ),
        (list(range(40)), 1000, "labels 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"),
    ],
)
def test_classes_without_images_are_worth_a_note(
    tmp_path: Path, labels: list[int], num_classes: int | None, says: str
) -> None:
    folder = write(tmp_path / "o", numbered(labels))
    notes = check(folder, num_classes=num_classes, training=True).notes
    assert says in " ".join(notes)
    assert check(folder, num_classes=num_classes).notes == ()


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("in_order", [True, False])
def test_a_sample_of_many_classes_is_worth_none(tmp_path: Path, classes: int, in_order: bool) -> None:
    labels = np.random.default_rng(classes).integers(0, classes, 3000).tolist()
    folder = write(tmp_path / "o", numbered(sorted(labels) if in_order else labels))
    notes = check(folder, num_classes=classes, training=True).notes
    assert not [note for note in notes if "holds images of" in note]


def test_a_lock_file_that_caffe_cannot_write_is_worth_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "o", numbered([0]))
    # Permissions mean nothing to root, who may be running this.
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert f"Caffe writes {folder}/lock.mdb" in check(folder).notes[0]


def test_only_the_first_records_and_a_sample_are_read(tmp_path: Path) -> None:
    """So that a million images take no longer: what is not in the sample may be anything."""
    records = numbered([n % 10 for n in range(20_000)])
    read = {*range(500), *(19_999 * step // 63 for step in range(64))}
    unread = {key: b"not a Datum" for n, key in enumerate(records) if n not in read}
    facts = check(write(tmp_path / "o", records | unread))
    assert (facts.images, facts.sampled) == (20_000, 64)
    for n in sorted(read)[-1], 499:
        key = list(records)[n]
        assert key.decode() in mistake(write(tmp_path / str(n), records | {key: b"not a Datum"}))


def test_what_an_lmdb_holds_is_recognized(tmp_path: Path) -> None:
    labels = [number % 7 for number in range(1_000)]
    first = lmdb_identity(write(tmp_path / "a", numbered(labels)))
    again = lmdb_identity(write(tmp_path / "b", numbered(labels)))
    assert first == again
    assert first.difference(again) is None
    assert (first.images, first.first_key[:8], first.last_key[:8]) == (1_000, "00000000", "00000999")
    fewer = lmdb_identity(write(tmp_path / "c", numbered(labels[:-1])))
    said = first.difference(fewer) or ""
    assert said.startswith("it had 1,000 images (")
    assert "and has 999 images (" in said
    for at in (0, 499, 999):  # of the records that are looked at
        changed = [*labels]
        changed[at] += 1
        other = lmdb_identity(write(tmp_path / f"at{at}", numbered(changed)))
        assert first.difference(other) == "its 1,000 images have other names or labels than before"


def test_an_lmdb_that_another_process_writes_to_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", numbered([n % 10 for n in range(100)]))
    code = "import lmdb, sys; e = lmdb.open(sys.argv[1]); t = e.begin(write=True); t.put(b'x', b'x'); "
    code += "print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        assert check(folder).images == 100
        writer.communicate("")
