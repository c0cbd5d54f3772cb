"""The time of a recipe on 1, 8, 64 and 512 GPUs, by the formulas of docs/scale.md, from measured figures.

    python bench/scale.py --compute 128=12000 --compute 512=20000 --decode 27000 --image-bytes 40000
    python bench/scale.py ... --inside 300 --between 50 --read 6 --gpus 1 8 64

The counts (multiply-accumulates, gradient bytes, iterations, batch, learning rate) are the project's own.
Every speed is an argument, and none has a default: what is not given is left out, and a list under the table
says what it would have to be. Prints Markdown: for each number of GPUs the recipe as it is, if its batch
divides, and with the largest batch allowed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from caffe_jacinto.caffemodel.show import summary_with_zeros
from caffe_jacinto.common.arguments import Parser, whole_number
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.text import duration
from caffe_jacinto.networks.stage_files import IMAGENET_VAL_IMAGES, stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.load import built_in_recipes, load_recipe
from caffe_jacinto.recipes.model import Recipe

LARGEST_BATCH = 8192
"""Up to it a learning rate in proportion to the batch cost no accuracy on ResNet-50 (arXiv:1706.02677)."""

OF_COMPUTE = 0.05
"""Share of the computing within which the exchange of gradients shall stay."""

STATISTICS = "BatchNorm"
"""The type of layer whose blobs are not learned, in stock Caffe's dialect."""


@dataclass(frozen=True)
class Counts:
    """What the project's own files say of one stage of a recipe."""

    macs: int
    """Multiply-accumulates of the forward pass of one image."""

    learned: int
    """Parameters with a gradient."""

    iterations: int
    tests: int
    batch: int
    rate: float

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.learned


@dataclass(frozen=True)
class Speeds:
    """What was measured; None where nothing was."""

    fixed: float
    """Seconds of a pass of no image, forward and backward with the update: t0."""

    per_image: float
    """Seconds that each image of a pass adds on one GPU: t1."""

    decode: float | None
    """Images that the processors of a machine decode in a second."""

    read: float | None
    """Bytes that a machine reads from its LMDB in a second."""

    image_bytes: float
    inside: float | None
    """Bytes that a GPU sends in a second to another of its machine."""

    between: float | None
    """Bytes that a machine sends in a second to another."""

    latency: float
    """Seconds that a message between two machines takes, however short."""

    per_machine: int


@dataclass(frozen=True)
class Plan:
    """A way to train: so many GPUs, and images for each in a pass."""

    gpus: int
    on_each: int
    passes: int

    @property
    def batch(self) -> int:
        return self.gpus * self.on_each * self.passes

    def machines(self, per_machine: int) -> int:
        return math.ceil(self.gpus / per_machine)


def counts(recipe: Recipe, stage: str) -> Counts:
    """The counts of ``stage``, from its prototxts and the recipe."""
    files = stage_files(recipe, stage, Dialect.BVLC, folder="f", gpus=(), iter_size=1, solver_mode_gpu=False)
    deploy = summary_with_zeros(files["deploy.prototxt"], "deploy.prototxt", Dialect.BVLC, None)
    solver = recipe.stages[stage].solver
    assert solver is not None, "stage_files takes no stage without one"
    return Counts(
        macs=sum(row.macs for row in deploy.rows),
        learned=sum(row.parameters for row in deploy.rows if row.type != STATISTICS),
        iterations=solver.max_iter,
        tests=solver.max_iter // solver.test_interval,
        batch=recipe.training.batch_size,
        rate=solver.base_lr,
    )


def fit(measured: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """t0 and t1 of ``seconds = t0 + t1 x images``, by least squares over (images of a pass, images/s).

    Raises:
        UserError: the figures do not rise as a larger batch's do.
    """
    if len(measured) == 1:
        return 0.0, 1 / measured[0][1]
    times = [(images, images / speed) for images, speed in measured]
    mean_images = sum(images for images, _ in times) / len(times)
    mean_seconds = sum(seconds for _, seconds in times) / len(times)
    spread = sum((images - mean_images) ** 2 for images, _ in times)
    if not spread:
        raise UserError("--compute: all figures are of one batch; give each batch once")
    slope = sum((images - mean_images) * (seconds - mean_seconds) for images, seconds in times) / spread
    if slope <= 0:
        raise UserError(
            "--compute: a pass of more images takes no longer by these figures; measure them again"
        )
    return max(0.0, mean_seconds - slope * mean_images), slope


def exchange_seconds(count: Counts, speeds: Speeds, gpus: int) -> float | None:
    """The all-reduce of one update: within each machine, among the machines, and back; None: not known."""
    inside = min(gpus, speeds.per_machine)
    machines = math.ceil(gpus / speeds.per_machine)
    if (inside > 1 and speeds.inside is None) or (machines > 1 and speeds.between is None):
        return None
    size = count.gradient_bytes
    seconds = 2 * (inside - 1) / inside * size / (speeds.inside or 1)
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * size / (speeds.between or 1)
        seconds += 2 * math.ceil(math.log2(machines)) * speeds.latency
    return seconds


def parts(plan: Plan, count: Counts, speeds: Speeds) -> dict[str, float]:
    """Seconds of each cost of one update, as far as the speeds are known."""
    of_machine = plan.on_each * min(plan.gpus, speeds.per_machine)
    found = {"compute": plan.passes * (speeds.fixed + plan.on_each * speeds.per_image)}
    if speeds.decode:
        found["decoding"] = plan.passes * of_machine / speeds.decode
    if speeds.read:
        found["reading"] = plan.passes * of_machine * speeds.image_bytes / speeds.read
    exchange = exchange_seconds(count, speeds, plan.gpus)
    if exchange:
        found["all-reduce"] = exchange
    return found


def update_seconds(costs: dict[str, float]) -> float:
    """One update: computing, decoding and reading overlap; the exchange of gradients is taken not to."""
    return max(costs.get(name, 0.0) for name in ("compute", "decoding", "reading")) + costs.get(
        "all-reduce", 0
    )


def test_seconds(plan: Plan, speeds: Speeds, images: int) -> float:
    """One test: a forward pass takes a third of forward and backward; decoding may hold it up."""
    machine = speeds.decode / min(plan.gpus, speeds.per_machine) if speeds.decode else math.inf
    return images / (plan.gpus * min(3 / speeds.per_image, machine))


def plans(gpus: int, count: Counts, passes: int, largest: int, most_on_each: int) -> list[Plan]:
    """The recipe as it is, if its batch can be divided, and the largest batch that is allowed."""
    found = []
    for split in range(1, passes + 1):
        if count.batch % (gpus * split) == 0 and count.batch // (gpus * split) <= most_on_each:
            found.append(Plan(gpus, count.batch // (gpus * split), split))
            break
    on_each = min(most_on_each, largest // gpus)
    if on_each and gpus * on_each > count.batch:
        found.append(Plan(gpus, on_each, 1))
    return found


def row(plan: Plan, count: Counts, speeds: Speeds) -> list[str]:
    """The cells of one line of the table."""
    costs = parts(plan, count, speeds)
    update = update_seconds(costs)
    iterations = math.ceil(count.iterations * count.batch / plan.batch)
    total = iterations * update + count.tests * test_seconds(plan, speeds, IMAGENET_VAL_IMAGES)
    images = plan.batch / update
    binding = max(costs, key=lambda name: costs[name])
    if binding == "compute" and speeds.fixed > plan.on_each * speeds.per_image:
        binding = "compute, its fixed part"
    exchange = costs.get("all-reduce")
    return [
        f"{plan.gpus}",
        f"{plan.on_each} x {plan.passes}" if plan.passes > 1 else f"{plan.on_each}",
        f"{plan.batch:,}",
        f"{count.rate * plan.batch / count.batch:g}",
        f"{iterations:,}",
        f"{1000 * costs['compute']:.2f}",
        f"{1000 * exchange:.2f}" if exchange else ("-" if plan.gpus == 1 else "?"),
        f"{images:,.0f}",
        f"{100 * images * speeds.per_image / plan.gpus:.0f} %",
        binding,
        duration(total),
    ]


HEADINGS = (
    *("GPUs", "images on each", "batch", "learning rate", "iterations", "compute, ms", "all-reduce, ms"),
    *("images/s", "of the GPUs' limit", "binds", "time"),
)


def needs(plan: Plan, count: Counts, speeds: Speeds) -> str:
    """What keeps the GPUs of ``plan`` busy, in one line: of each machine, and of the network between them."""
    compute = plan.passes * (speeds.fixed + plan.on_each * speeds.per_image)
    images = plan.passes * plan.on_each * min(plan.gpus, speeds.per_machine) / compute
    gpus = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"
    text = (
        f"- {gpus}, batch {plan.batch:,}: each machine has to decode {images:,.0f} images/s "
        f"and to read {images * speeds.image_bytes / 1e9:.2f} GB/s"
    )
    machines = plan.machines(speeds.per_machine)
    if machines > 1:
        share = 2 * (machines - 1) / machines * count.gradient_bytes / (OF_COMPUTE * compute)
        text += (
            f"; to send {share / 1e9:.1f} GB/s for an exchange among machines within {OF_COMPUTE:.0%} of that"
        )
    elif plan.gpus > 1:
        inside = plan.gpus
        share = 2 * (inside - 1) / inside * count.gradient_bytes / (OF_COMPUTE * compute)
        text += f"; each GPU to send {share / 1e9:.1f} GB/s for an exchange within {OF_COMPUTE:.0%} of that"
    return text


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    recipe = load_recipe(options.recipe, ())
    stage = options.stage or next(iter(recipe.stages))
    if stage not in recipe.stages:
        raise UserError(f"--stage {stage}: {options.recipe} has {', '.join(recipe.stages)}")
    count = counts(recipe, stage)
    fixed, per_image = fit(options.compute)
    speeds = Speeds(
        fixed=fixed,
        per_image=per_image,
        decode=options.decode,
        read=options.read and options.read * 1e9,
        image_bytes=options.image_bytes,
        inside=options.inside and options.inside * 1e9,
        between=options.between and options.between * 1e9,
        latency=options.latency * 1e-6,
        per_machine=options.per_machine,
    )
    print(
        f"{options.recipe}, stage {stage}: {count.macs / 1e9:.4f} GigaMACs forward and "
        f"{6 * count.macs / 1e9:.2f} GFLOP forward and backward for each image; {count.learned:,} learned "
        f"parameters, so gradients of {count.gradient_bytes / 1e6:.2f} MB; {count.iterations:,} iterations "
        f"of {count.batch}.\n"
        f"A pass on one GPU: {1000 * fixed:.3f} ms + {1e6 * per_image:.2f} us for each image "
        f"({1 / per_image:,.0f} images/s at most).\n"
    )
    print("| " + " | ".join(HEADINGS) + " |")
    print("|" + "---:|" * (len(HEADINGS) - 2) + "---|---:|")
    most = max(images for images, _ in options.compute)
    chosen = [
        plan
        for gpus in options.gpus
        for plan in plans(gpus, count, recipe.training.iter_size, options.largest_batch, most)
    ]
    for plan in chosen:
        print("| " + " | ".join(row(plan, count, speeds)) + " |")
    if any(exchange_seconds(count, speeds, plan.gpus) is None for plan in chosen):
        print("\n?: no speed of that network was given (--inside, --between), and its time is left out.")
    print("\nSo that nothing but the GPUs binds:\n")
    print("\n".join(needs(plan, count, speeds) for plan in chosen))
    return 0


def _parser() -> Parser:
    description, _, usage = (__doc__ or "").partition("\n")
    parser = Parser("python bench/scale.py", description, usage.strip("\n"))
    add = parser.add_argument
    count = whole_number(1)
    compute = "images/s of forward, backward and update on one GPU at a batch, without data; repeatable"
    add("--compute", type=_figure, action="append", required=True, metavar="BATCH=IMAGES/S", help=compute)
    add("--image-bytes", type=_positive, required=True, metavar="N", help="bytes of a record in the LMDB")
    add("--decode", type=_positive, metavar="IMAGES/S", help="that one machine's processors decode and crop")
    add("--read", type=_positive, metavar="GB/S", help="that one machine reads from the LMDB's disk")
    add("--inside", type=_positive, metavar="GB/S", help="that a GPU sends to another of its machine")
    add("--between", type=_positive, metavar="GB/S", help="that a machine sends to another")
    latency = "microseconds of a short message between machines (default: 0)"
    add("--latency", type=float, default=0.0, metavar="US", help=latency)
    add("--per-machine", type=count, default=8, metavar="N", help="GPUs of a machine (default: 8)")
    add("--gpus", type=count, nargs="+", default=[1, 8, 64, 512], metavar="N", help="(default: 1 8 64 512)")
    largest = f"the largest batch that the training bears (default: {LARGEST_BATCH})"
    add("--largest-batch", type=count, default=LARGEST_BATCH, metavar="N", help=largest)
    recipes = f"(default: imagenet_jacintonet11; built in: {', '.join(built_in_recipes())})"
    add("--recipe", default="imagenet_jacintonet11", metavar="RECIPE", help=recipes)
    add("--stage", metavar="NAME", help="(default: the first)")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return value


def _figure(text: str) -> tuple[int, float]:
    batch, equals, speed = text.partition("=")
    if not (equals and batch.isascii() and batch.isdigit() and int(batch)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not BATCH=IMAGES/S, like 128=12000")
    return int(batch), _positive(speed)


if __name__ == "__main__":
    sys.exit(run_command("bench/scale.py", main))
