"""Speed of `weights show` and `weights convert` on files of 250 MB, compared with pycaffe.

    python bench/weights.py [--caffe PATH] [--runs 3]

For pycaffe only `Net.copy_from` and `Net.save` are timed, on a network that is already built; for
`weights` the whole process, including start and output. The fastest run of each counts. Prints Markdown
tables; the exit code is 1 if a limit is broken: at most twice pycaffe's time, memory at most 2.5 times the
file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from caffe_jacinto.common.errors import RunFailed, UserError, run_command
from caffe_jacinto.engines.discovery import find_engine

TIME_LIMIT, MEMORY_LIMIT = 2.0, 2.5
CONVOLUTIONS = 6
CHANNELS = 1064
"""Six convolutions of 1064 x 1064 x 3 x 3 weights are 245 MB."""

PEER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
os.environ["GLOG_minloglevel"] = "3"
import caffe
net = caffe.Net(sys.argv[2], caffe.TEST)
if sys.argv[3] == "make":
    net.save(sys.argv[4])
    sys.exit()
for run in range(int(sys.argv[5])):
    start = time.perf_counter()
    net.copy_from(sys.argv[4])
    read = time.perf_counter() - start
    net.save(sys.argv[4] + ".saved")
    print(read, time.perf_counter() - start)
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caffe")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    info = find_engine(arguments.caffe, "bvlc").info
    if info.pycaffe is None:
        raise UserError("; ".join(info.notes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.prototxt").write_text(_network())
        weights = folder / "net.caffemodel"
        peer = [sys.executable, "-c", PEER, str(info.pycaffe), str(folder / "net.prototxt")]
        _run([*peer, "make", str(weights)])
        times = _run([*peer, "time", str(weights), str(arguments.runs)]).split("\n")[: arguments.runs]
        read, both = (min(float(line.split()[at]) for line in times) for at in (0, 1))
        ours = [sys.executable, "-m", "caffe_jacinto.weights"]
        convert = [*ours, "convert", str(weights), "--from", "bvlc", "--to", "caffe_jacinto", "--output"]
        jobs = (
            ("show", [*ours, "show", str(weights)], "reading", read),
            ("convert", [*convert, str(folder / "fork.caffemodel")], "reading and writing", both),
        )
        size = weights.stat().st_size
        print(f"A weight file of {size / 1e6:.0f} MB: convolutions with batch norm.\n")
        print("| command | whole process | its memory | of the file | pycaffe | its time | times its time |")
        print("|---|---:|---:|---:|---|---:|---:|")
        within = True
        for label, command, what, peer_time in jobs:
            seconds, memory = min(_measured(command) for _ in range(arguments.runs))
            within = within and seconds <= TIME_LIMIT * peer_time and memory <= MEMORY_LIMIT * size
            print(
                f"| `weights {label}` | {seconds:.2f} s | {memory / 2**20:.0f} MiB | {memory / size:.2f} "
                f"| {what} | {peer_time:.2f} s | {seconds / peer_time:.2f} |"
            )
    print(f"\nlimits: {TIME_LIMIT:g} times the time, {MEMORY_LIMIT:g} times the file: ", end="")
    print("kept" if within else "BROKEN")
    return 0 if within else 1


def _network() -> str:
    """Convolutions with batch norm and scale, on small images."""
    layers = [
        f'layer {{ name: "data" type: "Input" top: "b0" '
        f"input_param {{ shape {{ dim: 1 dim: {CHANNELS} dim: 4 dim: 4 }} }} }}"
    ]
    for number in range(1, CONVOLUTIONS + 1):
        top = f"b{number}"
        layers += [
            f'layer {{ name: "conv{number}" type: "Convolution" bottom: "b{number - 1}" top: "{top}" '
            f"convolution_param {{ num_output: {CHANNELS} kernel_size: 3 pad: 1 "
            f'weight_filler {{ type: "msra" }} }} }}',
            f'layer {{ name: "conv{number}/bn" type: "BatchNorm" bottom: "{top}" top: "{top}" }}',
            f'layer {{ name: "conv{number}/scale" type: "Scale" bottom: "{top}" top: "{top}" '
            f"scale_param {{ bias_term: true }} }}",
        ]
    return "\n".join(layers)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _measured(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and the largest memory (resident, in bytes) of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RunFailed(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_command("bench/weights.py", main))
