"""Recurrent layers of the engine on PyTorch, forward and backward, against pycaffe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_pair import Pair, Shape, inputs_text, learned, numbers, thorough

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.net import TRAIN, Net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net

pytestmark = pytest.mark.caffe


def weighed(tops: dict[str, Shape]) -> str:
    """A loss of each top: the sum of its numbers, each times one from outside."""
    return "".join(
        f'layer {{ name: "loss of {name}" type: "Eltwise" bottom: "{name}" bottom: "weights of {name}" '
        f'top: "loss of {name}" loss_weight: 1 eltwise_param {{ operation: PROD }} }}\n'
        for name in tops
    )


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_recurrent_layers_are_caffes(
    kind: str, exposed: bool, constant: bool, pycaffe: Any, tmp_path: Path
) -> None:
    """Over three passes: each begins with what the last one remembers, unless that is a bottom and a top."""

    @settings(thorough, max_examples=6)
    @given(*[st.integers(1, 4)] * 4, st.integers(0, 2**32 - 1))
    def compare(time: int, streams: int, inputs: int, outputs: int, seed: int) -> None:
        bottoms: dict[str, Shape] = {"x": (time, streams, inputs, 2), "goes_on": (time, streams)}
        tops: dict[str, Shape] = {"top": (time, streams, outputs)}
        if constant:
            bottoms["static"] = (streams, 3)
        if exposed:
            for name in ("h", "c") if kind == "LSTM" else ("h",):
                bottoms[name] = tops[f"last {name}"] = (1, streams, outputs)
        names = {**bottoms, **{f"weights of {name}": shape for name, shape in tops.items()}}
        text = inputs_text(names) + "".join(learned(name) for name in bottoms if name != "goes_on")
        reads = " ".join(f'bottom: "{name}"' for name in bottoms)
        writes = " ".join(f'top: "{name}"' for name in tops)
        text += f"""
            layer {{ name: "tested" type: "{kind}" {reads} {writes} recurrent_param {{
              num_output: {outputs} expose_hidden: {str(exposed).lower()}
              weight_filler {{ type: "gaussian" std: 0.5 }} bias_filler {{ type: "gaussian" }} }} }}\n"""
        pair = Pair(pycaffe, tmp_path, text + weighed(tops))
        for number in range(3):
            values = numbers(names, seed + number)
            random = np.random.default_rng(seed + number)
            values["goes_on"] = random.integers(0, 3, (time, streams)).clip(max=1).astype(np.float32)
            pair.compare(values, only=())

    compare()


def test_the_unit_of_an_lstm_is_caffes(pycaffe: Any, tmp_path: Path) -> None:
    @settings(thorough, max_examples=20)
    @given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
    def compare(streams: int, outputs: int, seed: int) -> None:
        cells = (1, streams, outputs)
        names = {"c": cells, "sums": (1, streams, 4 * outputs), "goes_on": (1, streams)}
        tops = {"new c": cells, "h": cells}
        text = inputs_text({**names, **{f"weights of {name}": cells for name in tops}})
        text += learned("c") + learned("sums")
        text += """
            layer { name: "tested" type: "LSTMUnit" bottom: "c" bottom: "sums" bottom: "goes_on"
              top: "new c" top: "h" }\n"""
        values = numbers({**names, **{f"weights of {name}": cells for name in tops}}, seed)
        values["goes_on"] = np.random.default_rng(seed).integers(0, 2, (1, streams)).astype(np.float32)
        Pair(pycaffe, tmp_path, text + weighed(tops)).compare(values, only=())

    compare()


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            'type: "LSTM" bottom: "x" bottom: "x" recurrent_param { num_output: 2 }',
            "a second of time x streams",
        ),
        ('type: "RNN" bottom: "x" bottom: "on"', "needs a num_output of at least 1"),
        (
            'type: "RNN" bottom: "x" bottom: "on" bottom: "x" top: "u" recurrent_param { num_output: 2 '
            "expose_hidden: true }",
            "remembered at the beginning has to have the shape (1, 4, 2)",
        ),
        ('type: "LSTMUnit" bottom: "x" bottom: "x" bottom: "on"', "takes 1 x streams x numbers"),
    ],
)
def test_bottoms_that_do_not_fit_are_named(layer: str, says: str) -> None:
    text = inputs_text({"x": (3, 4, 5), "on": (3, 4)}) + f"layer {{ name: 'tested' top: 't' {layer} }}"
    with pytest.raises(UserError, match=r"net\.prototxt: layer tested") as error:
        Net(parse_net(text, Dialect.BVLC, "net.prototxt"), TRAIN, Dialect.BVLC, where="net.prototxt")
    assert says in str(error.value)
