"""Recurrent layers: LSTM, RNN, and the unit that an LSTM layer is made of.

A layer's first bottom is time x streams x anything, its second (time x streams) is 0 where a sequence begins
and 1 where one goes on. What it remembers at the end of a pass is where the next pass begins; no gradient
passes from there.
Definitions: caffe/layers/recurrent_layer.hpp, lstm_layer.hpp and rnn_layer.hpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup

Hidden = tuple[Tensor, ...]
"""What a layer remembers: each streams x outputs."""

Step = Callable[[Blobs, Tensor, Tensor, Hidden], tuple[Tensor, Hidden]]
"""From the weights behind those of the bottoms, what the bottoms give (streams x anything), whether the
sequences go on (streams x 1) and what was remembered, to the output and what is remembered."""


def lstm(layer: LayerSetup) -> Forward:
    """Gates i, f, o and g from W x + U (h, or 0 at a beginning) + b; c = f c + i g, h = o tanh(c)."""

    def step(weights: Blobs, given: Tensor, goes_on: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        h, c = hidden
        c, h = _unit(c, given + F.linear(h * goes_on, weights[0]), goes_on)
        return h, (h, c)

    return _recurrent(layer, step, remembered=2, gates=4)


def rnn(layer: LayerSetup) -> Forward:
    """h = tanh(W x + U (h, or 0 at a beginning) + b); the output is tanh(V h + c)."""

    def step(weights: Blobs, given: Tensor, goes_on: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        h = torch.tanh(given + F.linear(hidden[0] * goes_on, weights[0]))
        return torch.tanh(F.linear(h, weights[1], weights[2])), (h,)

    return _recurrent(layer, step, remembered=1, gates=1)


def _recurrent(layer: LayerSetup, step: Step, *, remembered: int, gates: int) -> Forward:
    """Bottoms: x, whether sequences go on, what does not change over time (or not), and with
    ``expose_hidden`` what is remembered at the beginning; its end is then in further tops. As in Caffe, no
    gradient passes through either.
    """
    fields = layer.parameters(
        "recurrent_param", "num_output", "weight_filler", "bias_filler", "expose_hidden", "debug_info"
    )
    exposed = remembered if fields.expose_hidden else 0
    layer.takes(2 + exposed, 3 + exposed, tops=1 + exposed)
    outputs, constant = fields.num_output, len(layer.bottoms) > 2 + exposed
    first, going = layer.bottoms[:2]
    if outputs < 1 or len(first) < 3 or going != first[:2] or len(layer.message.top) != 1 + exposed:
        layer.refuse(
            "needs a num_output of at least 1, a first bottom of time x streams x numbers, a second of "
            f"time x streams, and {1 + exposed} top(s)"
        )
    begins = (1, first[1], outputs)
    if any(shape != begins for shape in layer.bottoms[len(layer.bottoms) - exposed :]):
        layer.refuse(f"what is remembered at the beginning has to have the shape {begins}")
    for filler in _fillers(fields, constant, gates):
        layer.blob(filler)
    kept = [torch.zeros(begins[1:], device=layer.device) for _ in range(0 if exposed else remembered)]

    def forward(blobs: Blobs, values: Tensor, goes_on: Tensor, *others: Tensor) -> Any:
        given = F.linear(values.flatten(2), blobs[0], blobs[1])
        if constant:
            given = given + F.linear(others[0].flatten(1), blobs[2])
        weights = blobs[3 if constant else 2 :]
        # Copies: the memory changes after this pass, and its gradient needs what was in it.
        hidden = (
            tuple(state[0].detach() for state in others[len(others) - exposed :])
            if exposed
            else tuple(state.clone() for state in kept)
        )
        found = []
        for now, on in zip(given, goes_on.detach().unsqueeze(2), strict=True):
            output, hidden = step(weights, now, on, hidden)
            found.append(output)
        if not exposed:
            for state, new in zip(kept, hidden, strict=True):
                state.copy_(new.detach())
            return torch.stack(found)
        return (torch.stack(found), *(state.detach().unsqueeze(0) for state in hidden))

    return forward


def _fillers(fields: Any, constant: bool, gates: int) -> list[Any]:
    """Of the blobs: W and b of x, those of what does not change, U; of an RNN also V and its bias."""
    weights, bias = fields.weight_filler, fields.bias_filler
    static = [weights] if constant else []
    return [weights, bias, *static, weights, *([] if gates > 1 else [weights, bias])]


def lstm_unit(layer: LayerSetup) -> Forward:
    """One step of an LSTM: from c, the four gates' sums and whether the sequences go on to c and h."""
    layer.takes(3, tops=2)
    layer.only()
    cells, gates, going = layer.bottoms
    if len(cells) != 3 or cells[0] != 1 or gates != (*cells[:2], 4 * cells[2]) or going != cells[:2]:
        layer.refuse(
            f"takes 1 x streams x numbers, four times as many, and 1 x streams; it has {layer.bottoms}"
        )
    if len(layer.message.top) != 2:
        layer.refuse("gives 2 tops, c and h")
    return lambda blobs, c, sums, goes_on: _unit(c, sums, goes_on.detach().unsqueeze(-1))


def _unit(c: Tensor, sums: Tensor, goes_on: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o, g = sums.chunk(4, -1)
    c = goes_on * torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return c, torch.sigmoid(o) * torch.tanh(c)


LAYERS: dict[str, Builder] = {
    "LSTM": lstm,
    "LSTMUnit": lstm_unit,
    "RNN": rnn,
}
