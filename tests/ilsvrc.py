"""Small data sets in the layout in which ILSVRC 2012 is downloaded: two archives and a development kit."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat

SYNSETS = ("n01440764", "n02084071", "n03937543", "n15075141")
"""In sorted order, so that the label of each is its place."""

KIT_NUMBERS = (3, 1, 4, 2)
"""The kit's own number of each synset."""


def jpeg(seed: int, *, height: int = 40, width: int = 50) -> bytes:
    """A small image of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    content: bytes = cv2.imencode(".jpg", cv2.resize(noise, (width, height)))[1].tobytes()
    return content


def tar_of(files: Mapping[str, bytes], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive of regular files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def train_images(per_class: int) -> dict[str, dict[str, bytes]]:
    """Synset -> file name -> content; names not in sorted order, as in the archives."""
    return {
        synset: {
            f"{synset}_{number}.JPEG": jpeg(1000 * label + number)
            for number in sorted(range(per_class), key=lambda n: (n * 7) % 10)
        }
        for label, synset in enumerate(SYNSETS)
    }


def write_train(folder: Path, images: Mapping[str, Mapping[str, bytes]]) -> Path:
    """ILSVRC2012_img_train.tar, a tar of a tar for each class; the classes not in sorted order."""
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of({f"{synset}.tar": tar_of(images[synset]) for synset in reversed(images)}))
    return path


def write_folders(folder: Path, images: Mapping[str, Mapping[str, bytes]]) -> Path:
    """The same images unpacked."""
    for synset, files in images.items():
        (folder / synset).mkdir(parents=True)
        for name, content in files.items():
            (folder / synset / name).write_bytes(content)
    return folder


def val_images(count: int) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(9000 + number) for number in range(1, count + 1)}


def write_val(folder: Path, images: Mapping[str, bytes]) -> Path:
    """ILSVRC2012_img_val.tar, all images beside each other."""
    path = folder / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_of(dict(reversed(images.items()))))
    return path


def write_devkit(folder: Path, labels: Sequence[int]) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz with meta.mat as MATLAB 5 file, for validation images with ``labels``."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = [
        (float(number), synset, f"{synset}, a thing", "what it is", 0.0, np.zeros((1, 0)), 0.0)
        for number, synset in sorted(zip(KIT_NUMBERS, SYNSETS, strict=True))
    ]
    rows.append((5.0, "n00001740", "entity", "the root", 2.0, np.array([[1.0, 2.0]]), 1.0))
    synsets = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{KIT_NUMBERS[label]}\n" for label in labels)
    top = "ILSVRC2012_devkit_t12"
    content = tar_of(
        {
            f"{top}/readme.txt": b"ILSVRC 2012",
            f"{top}/data/meta.mat": meta.getvalue(),
            f"{top}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        }
    )
    path = folder / f"{top}.tar.gz"
    with tarfile.open(path, "w:gz") as tar, tarfile.open(fileobj=io.BytesIO(content)) as plain:
        for member in plain:
            tar.addfile(member, plain.extractfile(member))
    return path
