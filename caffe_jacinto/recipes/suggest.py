"""A recipe for a data set: crop and strides from the size of its images, lengths from their number.

For a data set like ImageNet the values are those published for it (recipes/imagenet_jacintonet11.toml). For
smaller ones learning rates are those of the demo, and L1 is stronger where a stage is shorter.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.files import template_folder
from caffe_jacinto.common.text import count_of, printable
from caffe_jacinto.recipes.load import toml_value
from caffe_jacinto.recipes.model import MOST_TESTS_APART

if TYPE_CHECKING:
    import jinja2

NETWORK = "jacintonet11"

LARGE = 100_000
"""Training images from which on the published lengths and rates are taken."""

SMALL_BATCH = 64
LEAST = (300, 200, 400, 60)
"""The fewest iterations of the four stages, in batches of 64: the demo's and some more. L1 takes that long to
shrink the weights, however few images there are."""

MIN_INTERVAL = 100
"""Iterations between tests: before each, batch-norm statistics are recalibrated, in the time of ten."""

SMALLEST_MAP = 3
"""Pixels: the least height and width that the strides leave to the last convolutions."""

IMAGES_PER_PASS = 128
"""As published for crops of 224 pixels; larger crops get fewer, for about the same memory."""

PUBLISHED_CROP = 224
CROP = 7 / 8
"""Of the images' height and width: 224 of 256, as published."""

SMALL_IMAGES = 24
"""Pixels: images up to this size are not cropped."""

L1_SHRINKAGE = 0.08
"""How far L1 alone moves a weight in one stage of the published training: learning rate (on average half the
first) x decay x iterations, and ten times that by a momentum of 0.9."""

MOST_L1 = 2e-3
"""Twice the demo's L1 decay. With less, stages of the fewest iterations end below the target."""

CLASSES_SHOWN = 8


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set."""

    name: str
    train_lmdb: str
    val_lmdb: str
    classes: int
    class_names: tuple[str, ...]
    """Empty where they are not known."""

    train_images: int
    val_images: int
    smallest: tuple[int, int]
    """Height and width of the smallest images, in pixels."""

    largest: tuple[int, int]


@dataclass(frozen=True)
class Suggestion:
    """A recipe file, and what to say about it."""

    text: str
    network: str
    """Its name and crop."""

    iterations: int
    """Of all stages together."""

    passes: float
    """Over the training images, in all stages together."""


def suggest(data: DataSet, path: Path) -> Suggestion:
    """A recipe file for ``data``, with comments; ``path`` is how it will be called."""
    crop = crop_for(min(data.smallest))
    strides = strides_for(crop)
    batch = _batch_for(data.train_images)
    passes = _passes_for(batch, crop)
    val_batch = val_batch_for(data.val_images)
    stages = _stages(data.train_images, batch)
    text = recipe_template("new.toml.j2").render(
        path=shlex.quote(str(path)),
        data={
            "dataset": data.name,
            "train_lmdb": data.train_lmdb,
            "val_lmdb": data.val_lmdb,
            "num_classes": data.classes,
        },
        network={"name": NETWORK, "crop_size": crop, "strides": list(strides)},
        training={"batch_size": batch, "iter_size": passes, "val_batch_size": val_batch},
        stages=stages,
        facts=_facts(data, crop, strides, batch // passes, val_batch, stages),
    )
    iterations = sum(stage["solver"]["max_iter"] for stage in stages)
    network = f"{NETWORK} with crops of {crop}x{crop}"
    return Suggestion(text, network, iterations, iterations * batch / data.train_images)


def recipe_template(name: str) -> jinja2.Template:
    """A template of recipes, which prints TOML values by the filter ``toml``."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder() / "recipe"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_in_a_comment,
    )
    environment.globals["about"] = _ABOUT
    environment.filters["toml"] = lambda value: _Toml(toml_value(value))
    return environment.get_template(name)


_ABOUT = {
    "max_iter": "updates of the weights",
    "base_lr": "learning rate at the start; it falls to 0 in a straight line (lr_policy, power)",
    "weight_decay": "L1 and L2 keep weights small; regularization says which of them",
    "test_interval": "iterations between tests, and between snapshots, from which an interrupted run goes on",
    "display": "iterations between lines of the log",
}
"""What the comments of the first stage say about the keys of its solver."""


class _Toml(str):
    """Text that is TOML already."""


def _in_a_comment(value: Any) -> str:
    """What a template prints: TOML as it is, and everything else so that it cannot leave its line."""
    return value if isinstance(value, _Toml) else printable(str(value))


def crop_for(side: int) -> int:
    """The crop for images whose shorter side has ``side`` pixels: 7/8 of it, in steps of 4."""
    return side if side <= SMALL_IMAGES else int(side * CROP) // 4 * 4


def strides_for(crop: int) -> tuple[int, ...]:
    """Strides of conv1a and pool1 to pool4: they halve as often as `SMALLEST_MAP` allows, conv1a last."""
    strides, side = [1, 1, 1, 1, 1], crop
    for part in (1, 2, 3, 4, 0):
        if -(-side // 2) < SMALLEST_MAP:
            break
        strides[part] = 2
        side = -(-side // 2)
    return tuple(strides)


def last_map(crop: int, strides: tuple[int, ...]) -> int:
    """Height and width in pixels of what the last convolutions compute."""
    for stride in strides:
        crop = -(-crop // stride)
    return crop


def val_batch_for(images: int) -> int:
    """A batch that divides the validation images, so that a test counts each once; else 50."""
    if images <= 100:
        return images
    return next((batch for batch in (50, *range(100, 9, -1)) if images % batch == 0), 50)


def _batch_for(images: int) -> int:
    if images >= LARGE:
        return 256
    return max(2, min(SMALL_BATCH, 1 << int(math.log2(max(images, 4) / 2))))


def _passes_for(batch: int, crop: int) -> int:
    """The fewest passes, a power of two, in which an update needs no more memory than the published one."""
    most = max(1, int(IMAGES_PER_PASS * min(1.0, (PUBLISHED_CROP / crop) ** 2)))
    passes = 1
    while batch // passes > most and batch % (passes * 2) == 0:
        passes *= 2
    return passes


def _stages(images: int, batch: int) -> list[dict[str, Any]]:
    """The four stages as the template writes them."""
    large = images >= LARGE
    scale = 1.0 if large else batch / SMALL_BATCH  # of the rates; shorter steps need more of them

    def stage(
        name: str, about: str, epochs: float, least: int, rate: float, start: str = ""
    ) -> dict[str, Any]:
        length = rounded(max(epochs * images / batch, least / scale), 2)
        solver = {"max_iter": int(length), "base_lr": rounded(rate * scale, 2)}
        return {
            "name": name, "about": about, "start": start, "freeze_zeros": False, "sparse": {},
            "iterations": f"{int(length):,}", "epochs": f"{length * batch / images:.3g}", "solver": solver,
        }  # fmt: skip

    long, half, short = (64, 32, 6.4) if large else (30, 15, 3)
    rates = (0.1, 0.01, 0.01, 0.001) if large else (0.05, 0.02, 0.02, 0.005)
    initial = stage("initial", "Dense weights.", long, LEAST[0], rates[0])
    l1reg = stage(
        "l1reg",
        "L1 regularization shrinks most weights, so that they can be pruned.",
        half,
        LEAST[1],
        rates[1],
        "initial",
    )
    sparse = stage("sparse", "Prunes the smallest weights, step by step.", half, LEAST[2], rates[2], "l1reg")
    finetune = stage(
        "finetune", "The remaining weights recover; zeros stay zero.", short, LEAST[3], rates[3], "sparse"
    )
    finetune["freeze_zeros"] = True
    for found in (initial, l1reg, sparse, finetune):
        solver, is_l1 = found["solver"], found in (l1reg, sparse)
        solver["weight_decay"] = _l1_decay(solver) if is_l1 else 1e-4
        solver["regularization"] = "L1" if is_l1 else "L2"
        solver["test_interval"] = solver["snapshot"] = _test_interval(solver["max_iter"])
        solver["display"] = int(min(rounded(max(solver["max_iter"] / 50, 1), 1), 100))
    sparse["sparse"] = schedule(sparse["solver"]["max_iter"], 0.8)
    return [initial, l1reg, sparse, finetune]


def _test_interval(length: int) -> int:
    """An interval that divides the stage evenly, into up to ten parts of at least `MIN_INTERVAL`."""
    parts = next((n for n in (10, 5, 4, 2) if length % n == 0 and length // n >= MIN_INTERVAL), 1)
    return min(length // parts, MOST_TESTS_APART)


def _l1_decay(solver: dict[str, Any]) -> float:
    shrinkage = 10 * solver["base_lr"] / 2 * solver["max_iter"]
    return min(rounded(L1_SHRINKAGE / shrinkage, 1), MOST_L1)


def schedule(length: int, target: float) -> dict[str, Any]:
    """The published schedule for ``length`` iterations: none in the first 1/8, ``target`` after 5/8.

    In fewer than 100 iterations the steps are larger.
    """
    factor = 0.01 if length >= 1600 else 0.02 if length >= 100 else 0.05
    step = max(1, round(length * factor / (2 * target)))
    return {
        "target": target,
        "start_iter": int(rounded(length / 8, 2)),
        "step_iter": step,
        "step_factor": factor,
        "display": step * 10,
    }


def _facts(
    data: DataSet,
    crop: int,
    strides: tuple[int, ...],
    images_per_pass: int,
    val_batch: int,
    stages: list[dict[str, Any]],
) -> dict[str, str]:
    """What the comments say."""
    side = last_map(crop, strides)
    shown = ", ".join(data.class_names[:CLASSES_SHOWN]) + (
        ", ..." if data.class_names[CLASSES_SHOWN:] else ""
    )
    sizes = _size(data.smallest)
    if data.largest != data.smallest:
        sizes += f" to {_size(data.largest)}"
    whole = -(-data.val_images // val_batch)
    wraps = "" if data.val_images % val_batch == 0 else "; the last one wraps round"
    schedule = stages[2]["sparse"]
    steps = round(schedule["target"] / schedule["step_factor"])
    return {
        "train_images": f"{data.train_images:,}",
        "val_images": f"{data.val_images:,}",
        "sizes": f"{sizes} pixels",
        "classes": count_of(data.classes, "class") + (f" ({shown})" if shown else ""),
        "crop": "the whole image"
        if (crop, crop) == data.smallest
        else "pixels of height and width, cut at random in training",
        "last_map": f"{side}x{side}",
        "images_per_pass": str(images_per_pass),
        "val_batches": f"images per pass of a test: {count_of(whole, 'batch')}{wraps}",
        "target_reached": f"{schedule['start_iter'] + (steps - 1) * schedule['step_iter']:,}",
    }


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def rounded(value: float, digits: int) -> float:
    """``value`` with so many significant digits."""
    return float(f"{value:.{digits}g}")
