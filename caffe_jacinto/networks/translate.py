"""A prototxt of one dialect as text of the other; what the other cannot say is named with its line.

The text stays as it was written but for what differs: batch norms and their scales, shifts of the input,
fields of data layers. `weights convert` makes the same changes in weight files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import text_format

from caffe_jacinto.common.errors import UserErrors
from caffe_jacinto.netspec.graph import TEST, TRAIN, NetState, included, nodes_of, scale_after
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import FORK_MIN_EPS, Dialect, scale_name
from caffe_jacinto.prototxt.edit import Edits
from caffe_jacinto.prototxt.forks import INSTEAD, TYPES
from caffe_jacinto.prototxt.render import number, quote
from caffe_jacinto.prototxt.schema import messages, own_field_names, parse_net
from caffe_jacinto.prototxt.tree import Message

_HOW_NOT_WHAT = frozenset(
    {
        *("threads", "parser_threads", "cache", "use_gpu_transform", "reduce_buckets", "display"),
        *("forward_type", "backward_type", "forward_math", "backward_math", "cudnn_math_override", "debug"),
        *("conv_algos_override", "cudnn_convolution_algo_seeker", "default_conv_algos_override"),
        *("default_forward_type", "default_backward_type", "default_forward_math", "default_backward_math"),
        *("default_cudnn_math_override", "engine", "shuffle"),
    }
)
"""Fields of the fork that say how to compute, or in which order to read, and not what: left out for stock
Caffe."""

_STATISTICS = 3
"""Blobs of a batch norm that do not learn."""


@dataclass
class Translation:
    """The text in the other dialect, and what was done."""

    text: str = ""
    changes: dict[str, int] = field(default_factory=dict)
    """How often, by the kind of change."""

    def count(self, what: str) -> None:
        self.changes[what] = self.changes.get(what, 0) + 1


def translate(text: str, where: str, to: Dialect) -> Translation:
    """The network ``text`` of the file ``where``, of the other dialect, in the dialect ``to``.

    A file of an older form is brought up to date.

    Raises:
        UserError: it is not a network of the other dialect.
        UserErrors: fields and layers that the dialect ``to`` lacks, each with its line.
    """
    source = next(dialect for dialect in Dialect if dialect is not to)
    message = parse_net(text, source, where)
    done = Translation()
    if tree.parse(text, where).has("layers"):
        text = text_format.MessageToString(message, as_utf8=True)
        done.changes["layers in today's form"] = len(message.layer)
    net = tree.parse(text, where)
    edits = Edits(text)
    changed = _as_fork(net, edits, done) if to is Dialect.CAFFE_JACINTO else _as_stock(net, edits, done)
    lacking = list(_lacking(net, edits, done, where, to, changed))
    if lacking:
        raise UserErrors(lacking)
    done.text = edits.text()
    parse_net(done.text, to, where)
    return done


# ------------------------------------------------------------------------------------ stock Caffe to the fork


def _as_fork(net: Message, edits: Edits, done: Translation) -> set[str]:
    """Apply the fork's forms; returns the names of fields that the edits take away."""
    pairs: dict[int, tuple[Message, Message]] = {}
    for phase in (TRAIN, TEST):
        layers = [layer for layer in net.messages("layer") if included(layer, NetState(phase))]
        nodes = nodes_of(layers)
        for at, node in enumerate(nodes):
            found = scale_after(nodes, at) if node.type == "BatchNorm" else None
            if found is not None and not layers[at].message("batch_norm_param").flag("scale_bias"):
                pairs[id(layers[at])] = (layers[at], layers[found])
    for scale in {id(scale): scale for _, scale in pairs.values()}.values():
        assert scale.place is not None
        edits.remove(scale.place)
    for norm, scale in pairs.values():
        _merge(norm, scale, edits)
        done.count("batch norms merged with their scales")
    for layer in net.messages("layer"):
        parameter = layer.message("batch_norm_param")
        if layer.string("type") == "BatchNorm" and parameter.number("eps", FORK_MIN_EPS) < FORK_MIN_EPS:
            edits.set(parameter, "eps", number(FORK_MIN_EPS))
            done.count(f"eps raised to {number(FORK_MIN_EPS)}")
        power = layer.message("power_param")
        only_shifts = power.number("power", 1.0) == 1 and power.number("scale", 1.0) == 1
        if layer.string("type") == "Power" and only_shifts and power.number("shift"):
            edits.set(layer, "type", '"Bias"')
            for place in layer.places_of("power_param"):
                edits.remove(place)
            shift = number(power.number("shift"))
            edits.add(layer, "param {\n  lr_mult: 0\n  decay_mult: 0\n}")
            edits.add(layer, f'bias_param {{\n  filler {{ type: "constant" value: {shift} }}\n}}')
            done.count("shifts made biases")
        data = layer.message("data_param")
        if data.place is not None:
            for name in ("threads", "parser_threads"):  # with more of them, batches come in another order
                edits.set(data, name, "1")
            done.count("data layers set to one thread")
    return set()


def _merge(norm: Message, scale: Message, edits: Edits) -> None:
    """Make a batch norm and its scale one layer of five blobs."""
    parameter = norm.message("batch_norm_param")
    fields = ["scale_bias: true"]
    of_scale = scale.message("scale_param")
    for source, target in (("filler", "scale_filler"), ("bias_filler", "bias_filler")):
        filler = of_scale.message(source)
        if filler.has("value"):
            fields.append(f'{target} {{ type: "constant" value: {number(filler.number("value"))} }}')
    if parameter.place is None:
        edits.add(norm, "batch_norm_param {\n" + "".join(f"  {line}\n" for line in fields) + "}")
    else:
        for line in fields:
            edits.add(parameter, line)
    for place in norm.places_of("param"):
        edits.remove(place)
    learning = [_rates(scale, 0), _rates(scale, 1) if of_scale.flag("bias_term") else _Rates(0.0, 0.0)]
    if learning != [_Rates(1.0, 1.0)] * 2:  # the fork's own
        statistics = _Rates(0.0, 1.0 if learning[0].lr_mult else 0.0)
        for rates in [statistics] * _STATISTICS + learning:
            edits.add(norm, rates.text)
    if scale.strings("top") != norm.strings("top"):
        edits.set(norm, "top", quote(scale.strings("top")[0]))


# ------------------------------------------------------------------------------------ the fork to stock Caffe


def _as_stock(net: Message, edits: Edits, done: Translation) -> set[str]:
    for layer in net.messages("layer"):
        parameter = layer.message("batch_norm_param")
        if layer.string("type") == "BatchNorm" and parameter.flag("scale_bias"):
            _split(layer, edits)
            done.count("batch norms split from their scales")
        bias = layer.message("bias_param")
        filler = bias.message("filler")
        params = layer.messages("param")
        still = params and all(param.number("lr_mult", 1.0) == 0 for param in params)
        if layer.string("type") == "Bias" and still and filler.string("type", "constant") == "constant":
            edits.set(layer, "type", '"Power"')
            for name in ("param", "bias_param"):
                for place in layer.places_of(name):
                    edits.remove(place)
            edits.add(layer, f"power_param {{\n  shift: {number(filler.number('value'))}\n}}")
            done.count("biases made shifts")
    return {"scale_bias", "scale_filler", "bias_filler"}


def _split(layer: Message, edits: Edits) -> None:
    """Give a batch norm of five blobs a scale layer of its own."""
    parameter = layer.message("batch_norm_param")
    for name in ("scale_bias", "scale_filler", "bias_filler", "engine"):
        for place in parameter.places_of(name):
            edits.remove(place)
    for place in layer.places_of("param"):
        edits.remove(place)
    for _ in range(_STATISTICS):
        edits.add(layer, "param {\n  lr_mult: 0\n}")
    top = layer.strings("top")[0]
    lines = [f"name: {quote(scale_name(layer.string('name')))}", 'type: "Scale"']
    lines += [f"bottom: {quote(top)}", f"top: {quote(top)}"]
    for name in ("include", "exclude"):
        for rule in layer.messages(name):
            lines.append(f"{name} {{ {_short(rule)} }}")
    lines += [_rates(layer, _STATISTICS).short, _rates(layer, _STATISTICS + 1).short]
    fields = ["bias_term: true"]
    for source, target in (("scale_filler", "filler"), ("bias_filler", "bias_filler")):
        filler = parameter.message(source)
        if filler.has("value"):
            fields.append(f'{target} {{ type: "constant" value: {number(filler.number("value"))} }}')
    lines.append(f"scale_param {{ {' '.join(fields)} }}")
    edits.add_after(layer, "layer {\n" + "".join(f"  {line}\n" for line in lines) + "}")


@dataclass(frozen=True)
class _Rates:
    """Of a blob: learning rate and decay."""

    lr_mult: float
    decay_mult: float

    @property
    def text(self) -> str:
        decay = f"  decay_mult: {number(self.decay_mult)}\n" if self.decay_mult != 1 or self.lr_mult else ""
        return f"param {{\n  lr_mult: {number(self.lr_mult)}\n{decay}}}"

    @property
    def short(self) -> str:
        return f"param {{ lr_mult: {number(self.lr_mult)} decay_mult: {number(self.decay_mult)} }}"


def _rates(layer: Message, index: int) -> _Rates:
    params = layer.messages("param")
    if index >= len(params):
        return _Rates(1.0, 1.0)
    return _Rates(params[index].number("lr_mult", 1.0), params[index].number("decay_mult", 1.0))


def _short(rule: Message) -> str:
    """A rule's fields on one line."""
    return " ".join(
        f"{name}: {quote(str(value)) if name in ('stage', 'not_stage') else value}"
        for name, value in rule.fields
        if not isinstance(value, Message)
    )


# --------------------------------------------------------------------------------------- what cannot be said


def _lacking(
    net: Message, edits: Edits, done: Translation, where: str, to: Dialect, changed: set[str]
) -> Iterator[str]:
    """What the dialect ``to`` lacks; fields without effect on the result are removed from the text."""
    names = own_field_names(to)
    who = "stock Caffe" if to is Dialect.BVLC else "caffe-jacinto"

    def walk(message: Message, known: Any, layer: str, path: str = "") -> Iterator[str]:
        for (name, value), place in zip(message.fields, message.places, strict=True):
            own = known.fields_by_name.get(name) if name in names else None
            if own is None and name in _HOW_NOT_WHAT:
                edits.remove(place)
                done.count(f"{name} left out")
            elif own is None and name not in changed:
                advice = INSTEAD.get((name, value), "") if isinstance(value, bool) else ""
                yield (
                    f"{where}:{place.line}: {layer}{path}{name}: {who} has no such field; "
                    f"{advice or 'remove it, or write it otherwise'}"
                )
            elif own is not None and isinstance(value, Message):
                if name == "layer" and not layer:
                    yield from walk(value, own.message_type, f"layer {value.string('name')}: ")
                else:
                    yield from walk(value, own.message_type, layer, f"{path}{name}.")

    yield from walk(net, messages(to).NetParameter.DESCRIPTOR, "")
    for layer in net.messages("layer"):
        kind = TYPES.get(layer.string("type"))
        if kind is not None and kind.field not in names and not layer.has(kind.field):
            advice = kind.advice(names) or "remove it, or write it otherwise"
            yield (
                f"{where}:{layer.line_of('type')}: layer {layer.string('name')}: {who} has no type "
                f"{layer.string('type')}, which is of {kind.fork}; {advice}"
            )
        if layer.string("type") == "InfogainLoss":
            reads = "scores, not probabilities" if to is Dialect.BVLC else "probabilities, not scores"
            yield (
                f"{where}:{layer.line_of('type')}: layer {layer.string('name')}: {who}'s InfogainLoss reads "
                f"{reads}; remove it, or write it otherwise"
            )
