"""Speed of `create_lmdb` compared with Caffe's convert_imageset and with OpenCV alone.

    python bench/create_lmdb.py [--caffe PATH] [--rounds 3] [--photographs FOLDER] [--memory]

Both are whole processes that write an LMDB of 256x256 JPEG files from the same list. OpenCV alone only
decodes, resizes and encodes files in memory, in one thread per core. Rounds of the three are interleaved,
and ratios are medians over the rounds, so that other work on the machine affects all of them. The 500x375
images are crops of the photographs in scikit-image and scikit-learn, with sensor noise (see
`_photograph`). The large images are photographs of 10 to 16 megapixels from the Debian package
`PHOTOGRAPHS` (fetched with apt-get; or JPEG files of that size in FOLDER), stored as a camera does, and
crops with noise again, which have more bytes per pixel. `--memory` also measures the peak anonymous
memory, summed over the processes. Prints Markdown tables; the exit code is 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import cv2
import lmdb
import numpy as np
import skimage
import sklearn
from numpy.typing import NDArray

from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.engines.discovery import find_engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

SIDE = 256
EXACT_LIMIT, SHARE_LIMIT, FAST_LIMIT, FAST_LARGE_LIMIT = 2.2, 0.9, 3.3, 6.0
MEMORY_LIMIT = 300e6
WORKERS = 2

PHOTOGRAPHS = "lomiri-wallpapers-16.04"
MEGAPIXELS = 10, 16
QUALITY_IMAGES = 12

Pixels = NDArray[np.uint8]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caffe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", type=Path, metavar="FOLDER")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args(argv)
    peer = find_engine(arguments.caffe, "bvlc").info.executable.parent / "convert_imageset"
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        within = _usual(folder, peer, arguments.rounds, cores)
        photographs = arguments.photographs or _fetched_photographs(folder)
        listed = _write_camera_files(folder / "photographs", photographs, listed=960)
        fast = _large(folder / "photographs", listed, peer, arguments.rounds)
        print(f"limit: --fast {FAST_LARGE_LIMIT} times convert_imageset (this run: {fast:.2f})\n")
        within = fast >= FAST_LARGE_LIMIT and within
        listed = _write_images(folder / "noisy", count=12, width=4000, height=3000, listed=240)
        _large(folder / "noisy", listed, peer, arguments.rounds)
        if arguments.memory:
            within = _memory(folder) and within
    print("limits", "kept" if within else "BROKEN")
    return 0 if within else 1


def _usual(folder: Path, peer: Path, rounds: int, cores: int) -> bool:
    listed = _write_images(folder / "usual", count=1000, width=500, height=375, listed=16_000)
    times = {"peer": list[float](), "exact": list[float](), "fast": list[float](), "limit": list[float]()}
    for _ in range(rounds):
        times["peer"].append(listed / _convert_imageset(peer, folder / "usual"))
        times["exact"].append(listed / _create(folder / "usual"))
        times["limit"].append(_limit(folder / "usual", cores))
        times["fast"].append(listed / _create(folder / "usual", "--fast"))
    exact, fast = _ratio(times["exact"], times["peer"]), _ratio(times["fast"], times["peer"])
    share = _ratio(times["exact"], times["limit"])
    size = sum(file.stat().st_size for file in (folder / "usual").glob("*.jpg")) / 1000 / 1e3
    print(f"{listed:,} JPEG files of 500x375, {size:.0f} kB each, on {cores} cores, writing included.\n")
    _table(times, {"exact": f"{share:.0%}"})
    print(
        f"\nlimits: exact {EXACT_LIMIT} times convert_imageset (this run: {exact:.2f}) and {SHARE_LIMIT:.0%}"
    )
    print(f"of OpenCV alone ({share:.0%}); --fast {FAST_LIMIT} times ({fast:.2f})\n")
    _quality(folder / "usual")
    return exact >= EXACT_LIMIT and share >= SHARE_LIMIT and fast >= FAST_LIMIT


def _large(place: Path, listed: int, peer: Path, rounds: int) -> float:
    """Speed of ``--fast``, as a multiple of convert_imageset's."""
    times = {"peer": list[float](), "exact": list[float](), "fast": list[float]()}
    for _ in range(rounds):
        times["peer"].append(listed / _convert_imageset(peer, place))
        times["exact"].append(listed / _create(place))
        times["fast"].append(listed / _create(place, "--fast"))
    files = list(place.glob("*.jpg"))
    pixels = sum(cv2.imread(str(file)).size / 3 for file in files)
    size = sum(file.stat().st_size for file in files)
    print(
        f"{listed:,} JPEG files ({place.name}), {pixels / len(files) / 1e6:.1f} megapixels and"
        f" {size / len(files) / 1e6:.1f} MB each, {size / pixels:.2f} bytes a pixel.\n"
    )
    _table(times, {})
    print()
    _quality(place)
    return _ratio(times["fast"], times["peer"])


def _quality(place: Path) -> None:
    """How --fast changes pixels: compared with the exact LMDB, and both with averaging over areas."""
    _create(place)
    exact = _decoded(place / "lmdb")
    _create(place, "--fast")
    fast = _decoded(place / "lmdb")
    names = (place / "list.txt").read_text().splitlines()[:QUALITY_IMAGES]
    areas = [
        cv2.resize(cv2.imread(str(place / name.split()[0])), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        for name in names
    ]
    print("| PSNR, mean over images | dB |")
    print("|---|---:|")
    for what, first, second in (
        ("--fast against exact", fast, exact),
        ("--fast against averaging over areas (INTER_AREA)", fast, areas),
        ("exact against averaging over areas", exact, areas),
    ):
        values = [cv2.PSNR(a, b) for a, b in zip(first, second, strict=True)]
        print(f"| {what} | {statistics.mean(values):.1f} |")
    print()


def _memory(folder: Path) -> bool:
    """Peak anonymous memory for 10,000 usual and 1,000,000 tiny images."""
    tiny = folder / "tiny"
    _write_images(tiny, count=100, width=16, height=12, listed=1_000_000)
    lines = (folder / "usual" / "list.txt").read_text().splitlines(keepends=True)
    (folder / "usual" / "list.txt").write_text("".join((lines * 10)[:10_000]))
    print(f"| images | peak anonymous memory, {WORKERS} workers | images/s |")
    print("|---|---:|---:|")
    within = True
    for place, images, size in ((folder / "usual", 10_000, SIDE), (tiny, 1_000_000, 16)):
        start = time.perf_counter()
        peak = _peak_memory(_command(place, "--size", str(size), "--workers", str(WORKERS)))
        seconds = time.perf_counter() - start
        within = within and peak <= MEMORY_LIMIT
        print(f"| {images:,} | {peak / 1e6:.0f} MB | {images / seconds:,.0f} |")
    print(f"\nlimit: {MEMORY_LIMIT / 1e6:.0f} MB\n")
    return within


def _table(speeds: dict[str, list[float]], shares: dict[str, str]) -> None:
    names = {
        "peer": "convert_imageset",
        "exact": "create_lmdb",
        "fast": "create_lmdb --fast",
        "limit": "decoding, resizing, encoding alone",
    }
    print("| program | images/s | times convert_imageset | of OpenCV alone |")
    print("|---|---:|---:|---:|")
    for key, values in speeds.items():
        ratio = _ratio(values, speeds["peer"])
        print(f"| {names[key]} | {statistics.median(values):,.0f} | {ratio:.2f} | {shares.get(key, '')} |")


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------------- images


def _write_images(place: Path, *, count: int, width: int, height: int, listed: int) -> int:
    """Write ``count`` images and a list that repeats them up to ``listed`` lines; returns ``listed``."""
    place.mkdir()
    sources = _sources()
    chooser = np.random.default_rng(33)
    for number in range(count):
        image = _photograph(sources[number % len(sources)], width, height, chooser)
        content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (place / f"{number}.jpg").write_bytes(content.tobytes())
    (place / "list.txt").write_text("".join(f"{n % count}.jpg {n % 10}\n" for n in range(listed)))
    return listed


def _fetched_photographs(folder: Path) -> Path:
    """The unpacked Debian package; nothing is installed."""
    try:
        subprocess.run(
            ["apt-get", "-q", "download", PHOTOGRAPHS], cwd=folder, check=True, capture_output=True
        )
        (package,) = folder.glob(f"{PHOTOGRAPHS}_*.deb")
        subprocess.run(["dpkg", "-x", package, folder / "package"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, ValueError):
        raise RunFailed(
            f"cannot fetch the Debian package {PHOTOGRAPHS} with apt-get: give --photographs a folder of JPEG"
            " files of 10 to 16 megapixels"
        ) from None
    return folder / "package"


def _write_camera_files(place: Path, photographs: Path, *, listed: int) -> int:
    """Store photographs as a camera does: baseline JPEG of quality 95. The package's are progressive."""
    place.mkdir()
    count = 0
    for file in sorted(photographs.rglob("*.jp*g")):
        image = cv2.imread(str(file))
        if image is None or not MEGAPIXELS[0] <= image.size / 3 / 1e6 <= MEGAPIXELS[1]:
            continue
        if not cv2.imwrite(str(place / f"{count}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise RunFailed(f"cannot write {place / f'{count}.jpg'}")
        count += 1
    if not count:
        raise RunFailed(f"{photographs} has no JPEG file of 10 to 16 megapixels")
    (place / "list.txt").write_text("".join(f"{n % count}.jpg {n % 10}\n" for n in range(listed)))
    return listed


def _sources() -> list[Pixels]:
    photographs = Path(skimage.__file__).parent / "data"
    others = Path(sklearn.__file__).parent / "datasets" / "images"
    files = [photographs / name for name in ("rocket.jpg", "retina.jpg", "astronaut.png", "coffee.png")]
    files += [others / name for name in ("flower.jpg", "china.jpg")]
    return [cv2.imread(str(file)).astype(np.uint8) for file in files]


def _photograph(source: Pixels, width: int, height: int, chooser: np.random.Generator) -> Pixels:
    """A crop of a photograph, resized, with noise of 3 of 255 like that of a camera's small pixels.

    Enlarged photographs alone would be too smooth: the noise gives the files a realistic size.
    """
    rows, columns = source.shape[:2]
    share = chooser.uniform(0.7, 1.0)
    down = int(min(rows, columns * height / width) * share)
    across = min(int(down * width / height), columns)
    top, left = chooser.integers(0, rows - down + 1), chooser.integers(0, columns - across + 1)
    image = cv2.resize(source[top : top + down, left : left + across], (width, height))
    noise = chooser.normal(0, 3, image.shape).astype(np.float32)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- programs


def _command(place: Path, *options: str) -> list[str]:
    shutil.rmtree(place / "lmdb", ignore_errors=True)
    ours = [sys.executable, "-m", "caffe_jacinto.create_lmdb", "--images", str(place)]
    return [*ours, "--list", str(place / "list.txt"), "--output", str(place / "lmdb"), *options]


def _create(place: Path, *options: str) -> float:
    return _seconds(_command(place, *options))


def _convert_imageset(peer: Path, place: Path) -> float:
    shutil.rmtree(place / "lmdb", ignore_errors=True)
    sizes = [f"--resize_height={SIDE}", f"--resize_width={SIDE}", "--encoded", "--encode_type=jpg"]
    return _seconds([str(peer), *sizes, f"{place}/", str(place / "list.txt"), str(place / "lmdb")])


def _seconds(command: Sequence[str]) -> float:
    """Run time of a whole process."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - start


def _limit(place: Path, cores: int) -> float:
    """Images/s of OpenCV alone."""
    files = [np.fromfile(file, np.uint8) for file in place.glob("*.jpg")]
    cv2.setNumThreads(1)

    def work(part: Sequence[Pixels]) -> None:
        for file in part:
            cv2.imencode(".jpg", cv2.resize(cv2.imdecode(file, cv2.IMREAD_COLOR), (SIDE, SIDE)))

    threads = [threading.Thread(target=work, args=(files[core::cores] * 2,)) for core in range(cores)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 2 * len(files) / (time.perf_counter() - start)


def _decoded(folder: Path) -> list[Pixels]:
    datum = messages(Dialect.BVLC).Datum
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as records:
        return [
            cv2.imdecode(np.frombuffer(datum.FromString(value).data, np.uint8), cv2.IMREAD_COLOR).astype(
                np.uint8
            )
            for _, value in islice(records.cursor(), QUALITY_IMAGES)
        ]


def _peak_memory(command: Sequence[str]) -> int:
    """Peak anonymous memory in bytes, summed over the process and its children."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.02)
    if process.returncode != 0:
        assert process.stderr is not None
        raise RunFailed(f"{command[0]} failed: {process.stderr.read().strip()[-500:]}")
    return peak


def _anonymous(pid: int) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError):  # the process may end at any time
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_anonymous(int(child)) for child in (task / "children").read_text().split())
    return total


if __name__ == "__main__":
    sys.exit(run_command("bench/create_lmdb.py", main))
