"""What a log does not say about its stage, and why; and what is wrong with what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from caffe_jacinto.logs.printed_net import PrintedNet


@dataclass(frozen=True)
class Facts:
    """What a stage's log has shown."""

    began: bool
    """It has begun to train, to test or to measure."""
    trained: bool
    fatal: str | None
    times: Mapping[str, float]
    """Of ``caffe time``: milliseconds, by name."""
    displays: int
    outputs: Mapping[str, float]
    """Of the last complete test; none where that came before the first update."""
    tested_at_start_only: bool
    accuracies: Mapping[int, str]
    """top_k -> the output that holds it."""
    is_detector: bool
    named_mean_ap: str | None
    """The output that is a detector's mean average precision by its name."""
    test_net_is_known: bool
    """The log holds all of the test network."""
    cut: bool
    """glog has cut a network off."""
    printed: bool
    """The log holds a network, or the beginning of one."""
    gigamacs: float | None
    net: PrintedNet | None
    """The network that is counted."""
    solver_is_printed: bool
    images_per_second: float | None
    batch: int | None
    sparsity: float | None
    sparsity_logged: float | None
    counts_inner_products: bool
    """The sparsity is that of inner products, too."""
    silent_tests: Sequence[int]
    """Iterations of the first and the last test that printed nothing."""
    loss: str | None
    """What is wrong with the last training losses."""


def stage_notes(facts: Facts) -> tuple[str, ...]:
    """A line for each figure that could not be found out, with the reason, and for each wrong loss.

    And one where a figure counts something else than usual.
    """
    if facts.times and not facts.trained:
        return (_benchmark(facts.times),)
    if not facts.began:
        return (
            *_cut(facts),
            f"{'gave up' if facts.fatal else 'the log ends'} before training or a test began",
        )
    return (*_losses(facts), *_network(facts), *_accuracy(facts), *_speed(facts), *_sparsity(facts))


def _benchmark(times: Mapping[str, float]) -> str:
    measured = ", ".join(f"{name.lower()} {value:g} ms" for name, value in times.items() if name)
    return f"this is caffe time, which neither trains nor tests: {measured or 'it has not ended'}"


def _losses(facts: Facts) -> Iterator[str]:
    if facts.loss:
        yield facts.loss
    wrong = [name for name, value in facts.outputs.items() if not math.isfinite(value)]
    if wrong:
        several = len(wrong) > 1
        yield f"of the last test, {', '.join(wrong[:5])} {'are' if several else 'is'} not a finite number"
    if facts.silent_tests:
        first, last = facts.silent_tests[0], facts.silent_tests[-1]
        where = f"at iteration {first}" if first == last else f"at iterations {first} to {last}"
        yield f"tests {where} printed no output" if first != last else f"the test {where} printed no output"


def _cut(facts: Facts) -> Iterator[str]:
    if facts.cut:
        yield (
            "the log's printed network is cut off (glog's limit of 30,000 characters): figures that need all "
            "of it are missing, such as complexity"
        )


def _network(facts: Facts) -> Iterator[str]:
    yield from _cut(facts)
    if facts.cut:
        return
    if facts.gigamacs is None and not facts.printed:
        yield "no complexity: the log does not hold the network"
    elif facts.gigamacs is None and (facts.net is None or not facts.net.costs):
        yield "no complexity: no convolution or inner product can be read from the printed network"
    elif facts.gigamacs is None and facts.net is not None:
        missing = next((cost.name for cost in facts.net.costs if cost.macs is None), "")
        yield f"no complexity: the log does not say enough to know the input's shape of layer {missing!r}"


def _accuracy(facts: Facts) -> Iterator[str]:
    named = [f"top-{top_k} is the output {name!r}" for top_k, name in sorted(facts.accuracies.items())]
    if facts.named_mean_ap is not None:
        named.append(f"mAP is the output {facts.named_mean_ap!r}")
    if facts.tested_at_start_only:
        if not facts.silent_tests:  # they have their own note
            yield "no accuracy: the last test came before anything was trained; lower test_interval"
    elif not facts.outputs:
        yield "no accuracy: the log has no complete test"
    elif not facts.test_net_is_known and named:
        yield f"{' and '.join(named)}, by name: the log does not hold all of the test network"
    elif not facts.test_net_is_known and not facts.is_detector:
        yield "no accuracy: the log does not hold all of the test network, and no output has the name of one"
    elif 1 not in facts.accuracies and not facts.is_detector:
        yield "no top-1 accuracy: the test network has no Accuracy layer for it"
    elif 1 in facts.accuracies and facts.accuracies[1] not in facts.outputs:
        yield f"no top-1 accuracy: the last test did not print the output {facts.accuracies[1]!r}"


def _speed(facts: Facts) -> Iterator[str]:
    if not facts.trained or facts.images_per_second is not None:
        return
    if not facts.solver_is_printed:
        yield "no images/s: the log does not hold the solver's settings"
    elif facts.displays < 2:
        yield "no images/s: the log has fewer than two lines of training"
    elif facts.batch is None:
        yield "no images/s: the log does not say the batch size of training"
    else:
        yield "no images/s: no time passes between the lines of training"


def _sparsity(facts: Facts) -> Iterator[str]:
    if facts.counts_inner_products:
        yield "the sparsity is that of convolutions and inner products, which the stage prunes"
    if facts.sparsity_logged is not None and facts.sparsity is None:
        yield (
            f"no sparsity of the convolutions: the log lists sparsity (total {facts.sparsity_logged:g}), but "
            "not that of the network printed in it"
        )
