"""The page of a report: what it is made of, and what a browser shows of it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_text import Log

from caffe_jacinto.logs.history import Buckets, thinned
from caffe_jacinto.logs.stage import StageLog


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), most=st.integers(2, 20))
def test_a_thinned_curve_keeps_its_extremes_and_its_mean(values: list[float], most: int) -> None:
    curve = Buckets(most)
    for iteration, value in enumerate(values):
        curve.add(iteration, value)
    for found in (curve.all(), thinned(curve.all(), 3)):
        assert len(found) <= most
        assert sum(bucket.points for bucket in found) == len(values)
        assert min(bucket.low for bucket in found) == min(values)
        assert max(bucket.high for bucket in found) == max(values)
        assert sum(bucket.total for bucket in found) == pytest.approx(sum(values), abs=1e-3)
        assert (found[0].first, found[-1].last) == (0, len(values) - 1)
        for before, after in itertools.pairwise(found):
            assert before.last + 1 == after.first
        for bucket in found:
            inside = values[int(bucket.first) : int(bucket.last) + 1]
            assert (bucket.low, bucket.high) == (min(inside), max(inside))


def test_a_curve_of_few_points_has_each_of_them() -> None:
    curve = Buckets(10)
    for iteration in range(0, 100, 10):
        curve.add(iteration, iteration / 7)
    assert [(bucket.first, bucket.mean, bucket.points) for bucket in curve.all()] == [
        (iteration, iteration / 7, 1) for iteration in range(0, 100, 10)
    ]


def test_a_resumed_stage_replaces_what_lay_beyond_and_the_pause_takes_no_time() -> None:
    log = Log().start(max_iter=60)
    log.test(0, 0.1, 0.5, 2.3).iterate(0, 40).test(40, 0.3, 0.6, 2.0)
    log.second += 3600
    log.start(max_iter=60).line("caffe.cpp", "Resuming from a/b_iter_20.solverstate")
    log.iterate(20, 50).test(60, 0.7, 0.9, 1.0).end()
    stage = StageLog(history=True)
    stage.feed(log.text.encode())
    stage.close()
    history = stage.history
    assert history is not None
    assert [bucket.first for bucket in history.loss.all()] == [0, 10, 20, 30, 40, 50]
    top1 = [(bucket.first, bucket.mean) for bucket in history.outputs["right"].all()]
    assert top1 == [(0, 0.1), (40, 0.3), (60, 0.7)]
    assert history.losses == {"loss"}
    seconds = list(history.seconds(None))
    assert [iteration for iteration, _ in seconds] == [0, 10, 20, 30, 40, 50]
    assert seconds[-1][1] == pytest.approx(5 + 15, abs=1)


def test_sparsity_by_layer_stands_at_the_iteration_that_follows_it_in_the_log() -> None:
    log = Log().start(max_iter=40).iterate(0, 10).sparsity(0.25, 0.1).iterate(20, 30).sparsity(0.5, 0.1)
    log.line("solver.cpp", "Snapshotting to binary proto file a/b_iter_40.caffemodel").end()
    stage = StageLog(history=True)
    stage.feed(log.text.encode())
    stage.close()
    history = stage.history
    assert history is not None
    found = [(listing.iteration, listing.layers["conv"]) for listing in history.listings]
    assert found == [(20, 0.25), (40, 0.5)]
    assert [(bucket.first, bucket.mean) for bucket in history.sparsity.all()] == found
