"""bench/scale.py: the formulas of docs/scale.md, against figures worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.recipes.load import load_recipe

BENCH = Path(__file__).parents[1] / "bench/scale.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_scale", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_scale"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


scale = load()
NO_NETWORK = ("--compute", "100=10000", "--compute", "400=20000", "--image-bytes", "40000")


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    assert scale.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_counts_are_the_published_networks() -> None:
    count = scale.counts(load_recipe("imagenet_jacintonet11", ()), "initial")
    assert count.macs == 406_335_488  # docs/complexity.md
    # 2,877,714 in the weight file, less mean, variance and factor of each of the ten batch norms
    channels = 32 + 32 + 64 + 64 + 128 + 128 + 256 + 256 + 512 + 512
    assert count.learned == 2_877_714 - 2 * channels - 10
    assert count.gradient_bytes == 4 * count.learned
    assert (count.iterations, count.batch, count.rate, count.tests) == (320_000, 256, 0.1, 160)


def test_one_gpu_is_compute_alone(capsys: pytest.CaptureFixture[str]) -> None:
    # 100 images in 10 ms and 400 in 20 ms: 6.667 ms + 33.33 us for each image.
    published, largest = table(capsys, *NO_NETWORK, "--gpus", "1")
    assert (published["images on each"], published["batch"], published["binds"]) == ("256", "256", "compute")
    assert published["compute, ms"] == "15.20"  # 6.667 + 256 x 0.03333
    assert published["images/s"] == "16,842"
    # 320,000 x 15.2 ms, and 160 tests of 50,000 images at three times 30,000 images/s: 4,953 s
    assert published["time"] == "1 h 22 min"
    assert (largest["batch"], largest["learning rate"], largest["iterations"]) == (
        "400",
        "0.15625",
        "204,800",
    )


def test_decoding_binds_where_it_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = table(capsys, *NO_NETWORK, "--decode", "8000", "--gpus", "8", "--largest-batch", "256")
    assert (row["images on each"], row["binds"], row["images/s"]) == ("32", "decoding", "8,000")
    (row,) = table(capsys, *NO_NETWORK, "--read", "0.2", "--gpus", "8", "--largest-batch", "256")
    assert (row["binds"], row["images/s"]) == ("reading", "5,000")


def test_small_batches_are_bound_by_the_fixed_part(capsys: pytest.CaptureFixture[str]) -> None:
    row, _ = table(capsys, *NO_NETWORK, "--gpus", "64")
    assert (row["images on each"], row["binds"]) == ("4", "compute, its fixed part")


def test_a_batch_that_does_not_divide_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = table(capsys, *NO_NETWORK, "--gpus", "512")
    assert (row["images on each"], row["batch"], row["learning rate"]) == ("16", "8,192", "3.2")


def test_the_exchange_is_a_ring_in_each_machine_and_among_them() -> None:
    count = scale.Counts(macs=1, learned=25_000_000, iterations=1, tests=0, batch=256, rate=0.1)
    speeds = scale.Speeds(0, 1e-5, None, None, 1, inside=100e9, between=50e9, latency=1e-5, per_machine=8)
    assert scale.exchange_seconds(count, speeds, 1) == 0
    # 100 MB: 2 x 7/8 of it at 100 GB/s
    assert scale.exchange_seconds(count, speeds, 8) == pytest.approx(1.75e-3)
    # and 2 x 3/4 of it at 50 GB/s among four machines, two steps there and two back
    assert scale.exchange_seconds(count, speeds, 32) == pytest.approx(1.75e-3 + 3e-3 + 4e-5)
    unknown = scale.Speeds(0, 1e-5, None, None, 1, inside=100e9, between=None, latency=0, per_machine=8)
    assert scale.exchange_seconds(count, unknown, 8) is not None
    assert scale.exchange_seconds(count, unknown, 16) is None


@given(
    fixed=st.floats(0, 0.1),
    per_image=st.floats(1e-6, 1e-2),
    batches=st.sets(st.integers(1, 4096), min_size=2),
)
def test_the_fit_finds_what_made_the_figures(fixed: float, per_image: float, batches: set[int]) -> None:
    measured = [(batch, batch / (fixed + per_image * batch)) for batch in batches]
    found = scale.fit(measured)
    for batch in batches:
        assert found[0] + found[1] * batch == pytest.approx(fixed + per_image * batch, rel=1e-6)


def test_figures_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="takes no longer by these figures"):
        scale.fit([(100, 1000), (200, 4000)])
    with pytest.raises(UserError, match="all figures are of one batch"):
        scale.fit([(100, 1000), (100, 1100)])
    assert scale.fit([(100, 1000)]) == (0, 0.001)
    for wrong in (("--compute", "128"), ("--compute", "0=5"), ("--image-bytes", "-1"), ("--stage", "none")):
        with pytest.raises(UserError):
            scale.main([*NO_NETWORK, *wrong])
