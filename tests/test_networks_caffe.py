"""What build_net writes of each network for stock Caffe: real Caffe loads it, trains it and tests it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from caffe_jacinto.build_net import main
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

pytestmark = pytest.mark.caffe

CLASSES, BATCH, ITERATIONS = 7, 4, 3
CROPS = {"jacintonet11": 32, "resnet10": 33, "bvlc_alexnet": 67}
OUTPUTS = {
    "jacintonet11": ["accuracy/top1", "accuracy/top5", "loss"],
    "resnet10": ["accuracy", "loss", "top5"],
    "bvlc_alexnet": ["accuracy", "loss"],
}

IN_PYCAFFE = """
import json, sys
pycaffe, deploy, weights = sys.argv[1:]
sys.path.insert(0, pycaffe)
import caffe, numpy
net = caffe.Net(deploy, caffe.TEST, weights=weights)
data = net.blobs["data"].data
data[...] = numpy.random.default_rng(0).normal(0, 50, data.shape)
prob = net.forward()["prob"]
print(json.dumps({"shape": prob.shape, "sums": prob.sum(axis=1).tolist(), "spread": float(prob.std())}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LMDB of sixty bright or dark images of noise, and its mean image."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    size = max(CROPS.values()) + 2
    with (
        lmdb.open(str(folder / "lmdb"), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for index in range(60):
            pixels = rng.integers(0, 30 * (1 + index % CLASSES), (3, size, size), dtype=np.uint8)
            datum = messages(Dialect.BVLC).Datum(
                channels=3, height=size, width=size, data=pixels.tobytes(), label=index % CLASSES
            )
            transaction.put(b"%08d" % index, datum.SerializeToString())
    assert create_lmdb(["--mean", str(folder / "lmdb"), str(folder / "mean.binaryproto")]) == 0
    return folder


@pytest.mark.parametrize("network", CROPS)
def test_caffe_trains_and_tests_it_and_reads_its_weights(
    network: str, data: Path, caffe_engine: Engine, tmp_path: Path
) -> None:
    arguments = ["--network", network, "--dialect", "bvlc", "--cpu", "--output", str(tmp_path)]
    arguments += ["--num-classes", str(CLASSES), "--crop-size", str(CROPS[network])]
    arguments += ["--batch-size", str(BATCH), "--iter-size", "1", "--val-images", "10"]
    arguments += ["--train-lmdb", str(data / "lmdb"), "--val-lmdb", str(data / "lmdb")]
    if network == "bvlc_alexnet":
        arguments += ["--mean-file", str(data / "mean.binaryproto")]
    assert main(arguments) == 0
    solver = tmp_path / "solver.prototxt"
    shorter: dict[str, object] = {
        "max_iter": ITERATIONS,
        "test_interval": ITERATIONS,
        "display": 1,
        "base_lr": 0.001,
    }
    shorter["test_initialization"] = "true"
    text = solver.read_text()
    for name, value in shorter.items():
        text = re.sub(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    solver.write_text(text)

    done = subprocess.run(
        [caffe_engine.info.executable, "train", "-solver", solver],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"Iteration \d+ .*loss = (\S+)", done.stderr)]
    assert len(losses) >= ITERATIONS
    assert np.isfinite(losses).all()
    tested = re.findall(r"Test net output #\d+: (\S+) =", done.stderr)
    assert sorted(tested) == sorted(OUTPUTS[network] * 2)  # Before the first iteration and after the last.

    weights = tmp_path / f"imagenet_{network}_iter_{ITERATIONS}.caffemodel"
    assert caffe_engine.info.pycaffe is not None
    read = subprocess.run(
        [
            sys.executable,
            "-c",
            IN_PYCAFFE,
            caffe_engine.info.pycaffe,
            tmp_path / "deploy.prototxt",
            weights,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode == 0, read.stderr[-3000:]
    found = json.loads(read.stdout)
    assert found["shape"] == [10 if network == "bvlc_alexnet" else 1, CLASSES]
    assert found["sums"] == pytest.approx([1] * found["shape"][0], rel=1e-5)
    assert found["spread"] > 0


LOAD = "import sys; sys.path.insert(0, sys.argv[1]); import caffe; caffe.Net(sys.argv[2], caffe.TEST)"


@pytest.mark.parametrize(("network", "smallest"), [("resnet10", 3), ("bvlc_alexnet", 39)])
def test_the_smallest_crop_is_caffes(
    network: str, smallest: int, caffe_engine: Engine, tmp_path: Path
) -> None:
    arguments = ["--network", network, "--output", str(tmp_path), "--num-classes", "2"]
    with pytest.raises(UserError, match=f"a crop of at least {smallest}"):
        main([*arguments, "--crop-size", str(smallest - 1)])
    assert main([*arguments, "--crop-size", str(smallest)]) == 0
    deploy = tmp_path / "deploy.prototxt"
    command = [sys.executable, "-c", LOAD, str(caffe_engine.info.pycaffe), str(deploy)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    deploy.write_text(deploy.read_text().replace(f"dim: {smallest}\n", f"dim: {smallest - 1}\n"))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "Check failed" in refused.stderr


OTHERS = {
    "googlenet": 224,
    "mobilenet_v1": 64,
    "mobilenet_v2": 64,
    "resnet18": 224,
    "resnet50": 224,
    "squeezenet_v1_1": 67,
    "vgg16": 32,
}
"""Networks of other publishers, with the smallest crop, or nearly, that each can take."""

IN_ONE_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import caffe, numpy
found = {}
for network in sys.argv[2:]:
    solver = caffe.SGDSolver(f"{network}/solver.prototxt")
    solver.step(1)
    weighted = [name for name, weight in solver.net.blob_loss_weights.items() if weight]
    losses = [float(solver.net.blobs[name].data) for name in weighted]
    solver.test_nets[0].share_with(solver.net)
    solver.test_nets[0].forward()
    solver.net.save(f"{network}/one.caffemodel")
    deploy = caffe.Net(f"{network}/deploy.prototxt", caffe.TEST, weights=f"{network}/one.caffemodel")
    deploy.forward()
    macs = {}
    for name, layer in zip(deploy._layer_names, deploy.layers):
        if layer.type in ("Convolution", "InnerProduct"):
            weights, top = layer.blobs[0].shape, deploy.blobs[deploy.top_names[name][0]].data.shape
            macs[name] = int(numpy.prod(weights)) * int(numpy.prod(top[2:]))
    found[network] = {
        "losses": losses,
        "parameters": sum(int(blob.count) for blobs in deploy.params.values() for blob in blobs),
        "macs": sum(macs.values()),
        "prob": list(deploy.blobs["prob"].data.shape),
    }
print(json.dumps(found))
"""


def test_caffe_trains_the_networks_of_others_and_counts_as_the_summary_does(
    caffe_engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One update each, all in one process."""
    size, lmdb_folder = max(OTHERS.values()) + 1, tmp_path / "lmdb"
    with (
        lmdb.open(str(lmdb_folder), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 255, (3, size, size), dtype=np.uint8)
            datum = messages(Dialect.BVLC).Datum(
                channels=3, height=size, width=size, data=pixels.tobytes(), label=index
            )
            transaction.put(b"%08d" % index, datum.SerializeToString())
    summaries = {}
    for network, crop in OTHERS.items():
        folder = tmp_path / network
        arguments = ["--network", network, "--dialect", "bvlc", "--cpu", "--output", str(folder)]
        arguments += ["--num-classes", str(CLASSES), "--crop-size", str(crop), "--val-images", "1"]
        arguments += ["--batch-size", "2", "--iter-size", "1"]
        assert main([*arguments, "--train-lmdb", str(lmdb_folder), "--val-lmdb", str(lmdb_folder)]) == 0
        for file, old, new in (
            ("solver.prototxt", r"^test_initialization: .*$", "test_initialization: false"),
            ("val.prototxt", r"batch_size: \d+", "batch_size: 1"),
            ("deploy.prototxt", "dim: 10$", "dim: 1"),
        ):
            text = (folder / file).read_text()
            (folder / file).write_text(re.sub(old, new, text, flags=re.MULTILINE))
        capsys.readouterr()
        assert main(["--summary", str(folder / "deploy.prototxt"), "--format", "json"]) == 0
        summaries[network] = json.loads(capsys.readouterr().out)
    assert caffe_engine.info.pycaffe is not None
    command = [sys.executable, "-c", IN_ONE_PROCESS, str(caffe_engine.info.pycaffe), *OTHERS]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    for network, summary in summaries.items():
        counted = found[network]
        assert counted["parameters"] == summary["parameters"], network
        assert counted["macs"] == summary["macs"], network
        assert counted["prob"][:2] == [1, CLASSES]
        assert len(counted["losses"]) == (3 if network == "googlenet" else 1)
        assert np.isfinite(counted["losses"]).all(), network
