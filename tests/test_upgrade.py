"""Old forms of networks and solvers: drawn files are read as real Caffe reads them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffe_jacinto.build_net import main as build_net_main
from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.caffemodel.show import blob_facts
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import SCHEMA_FOLDER, messages, parse_net, parse_solver

BVLC = Dialect.BVLC
SCHEMA = messages(BVLC)

# A network is read in a child process each, since Caffe ends the process where a layer cannot be set up. What
# it says before that holds the network in today's form, as it takes part in the test phase.
SERVER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import caffe
for line in sys.stdin:
    path = line.strip()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(path + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        caffe.Net(path, caffe.TEST)
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


LOG_LINE = re.compile(r"^[IWEF]\d+ ", re.MULTILINE)
MOST_PRINTED = 29_000


@dataclass
class CaffeReader:
    """Real Caffe, which reads one network after the other."""

    process: subprocess.Popen[str]
    path: Path

    def read(self, text: str) -> Any:
        """The NetParameter that Caffe makes of ``text``; None where it stops at it."""
        self.path.write_text(text)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.path}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"
        log = self.path.with_name(f"{self.path.name}.log").read_text()
        _, found, printed = log.partition("Initializing net from parameters: \n")
        if not found:
            return None
        end = LOG_LINE.search(printed)
        text = printed[: end.start()] if end is not None else printed
        if len(text) > MOST_PRINTED:
            text = text[: text.rindex("\nlayer {")]  # Caffe's log cuts it off
        return text_format.Parse(text, SCHEMA.NetParameter())


@pytest.fixture(scope="module")
def caffe(caffe_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaffeReader]:
    assert caffe_engine.info.pycaffe is not None
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(caffe_engine.info.pycaffe)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield CaffeReader(process, tmp_path_factory.mktemp("old") / "net.prototxt")
        assert process.stdin is not None
        process.stdin.close()


def in_test_phase(text: str) -> Any:
    """What this project reads, as Caffe prints it: without the layers of other phases."""
    net = parse_net(text, BVLC, "net.prototxt")
    net.state.phase, net.state.level = 1, net.state.level
    kept = [type(layer).FromString(layer.SerializeToString()) for layer in messages_in(net)]
    net.ClearField("layer")
    net.layer.extend(kept)
    return net


def agrees(caffe: CaffeReader, text: str) -> None:
    theirs = caffe.read(text)
    if theirs is None:
        with pytest.raises(UserError):
            parse_net(text, BVLC, "net.prototxt")
    else:
        assert str(in_test_phase(text)) == str(theirs)


# Networks are drawn from the schema itself: any layer may have any setting.

NEVER = {"blobs", "state", "layer", "layers"}
DEPTH = 3
STOCK_FILE = descriptor_pb2.FileDescriptorSet.FromString((SCHEMA_FOLDER / "bvlc.binpb").read_bytes()).file[0]
STOCK_FIELDS = {message.name: {field.name for field in message.field} for message in STOCK_FILE.message_type}
"""Without those of forks, which real Caffe does not know."""


def caffes_numbers(field: Any) -> list[int]:
    """The numbers of an enumeration's values, without those of forks."""
    return [value.number for value in field.enum_type.values if value.number < 20_000]


@st.composite
def filled(draw: st.DrawFn, message: Any, skip: frozenset[str] = frozenset(), depth: int = 0) -> Any:
    """``message`` with some of its fields set."""
    fields = [
        field
        for field in message.DESCRIPTOR.fields
        if field.name in STOCK_FIELDS[message.DESCRIPTOR.name] - NEVER - skip
    ]
    chosen = draw(st.lists(st.sampled_from(fields), max_size=5, unique_by=lambda field: field.name))
    for field in chosen:
        if field.message_type is not None:
            if depth < DEPTH:
                target = getattr(message, field.name)
                if hasattr(target, "add"):
                    draw(filled(target.add(), depth=depth + 1))
                else:
                    target.SetInParent()
                    draw(filled(target, depth=depth + 1))
            continue
        if field.enum_type is not None:
            values = st.sampled_from(caffes_numbers(field))
        else:
            values = {
                field.CPPTYPE_BOOL: st.booleans(),
                field.CPPTYPE_STRING: st.sampled_from(["a", "b", "é"]),
                field.CPPTYPE_FLOAT: st.sampled_from([0.0, 0.5, 1.0, 0.1, -3.0]),
            }.get(field.cpp_type, st.integers(0, 5))
        if hasattr(getattr(message, field.name), "append"):
            getattr(message, field.name).extend(draw(st.lists(values, min_size=1, max_size=3)))
        else:
            setattr(message, field.name, draw(values))
    return message


@st.composite
def with_inputs(draw: st.DrawFn, net: Any) -> Any:
    names = draw(st.lists(st.sampled_from(["a", "b", "data"]), max_size=2, unique=True))
    net.input.extend(names)
    count = len(names) + draw(st.integers(0, 1)) if names else 0
    form = draw(st.sampled_from(["none", "dim", "shape", "both"]))
    if form in ("dim", "both"):
        net.input_dim.extend(range(1, 4 * count + 1))
    if form in ("shape", "both"):
        for index in range(count):
            net.input_shape.add(dim=[2] * (index + 2))
    return net


@st.composite
def v1_nets(draw: st.DrawFn) -> str:
    net = draw(
        with_inputs(draw(filled(SCHEMA.NetParameter(), frozenset({"input", "input_dim", "input_shape"}))))
    )
    for _ in range(draw(st.integers(1, 4))):
        layer = draw(filled(net.layers.add(), frozenset({"exclude"})))
        layer.type = draw(st.sampled_from(caffes_numbers(layer.DESCRIPTOR.fields_by_name["type"])))
        for name in ("data_param", "image_data_param", "window_data_param"):
            if draw(st.integers(0, 3)) == 0:
                getattr(layer, name).SetInParent()
                draw(filled(getattr(layer, name)))
    return text_format.MessageToString(net, as_utf8=True)


V0_TYPES = [
    *("accuracy", "bnll", "concat", "conv", "data", "dropout", "euclidean_loss", "flatten", "hdf5_data"),
    *("hdf5_output", "im2col", "images", "infogain_loss", "innerproduct", "lrn", "pool", "relu"),
    *("multinomial_logistic_loss", "sigmoid", "softmax", "softmax_loss", "split", "tanh", "window_data"),
    *("padding", "padding", "conv", "pool", "unheard"),
]


@st.composite
def v0_nets(draw: st.DrawFn) -> str:
    net = draw(with_inputs(SCHEMA.NetParameter()))
    blobs = list(net.input)
    for index in range(draw(st.integers(1, 5))):
        connection = net.layers.add()
        draw(filled(connection.layer))
        connection.layer.type = draw(st.sampled_from(V0_TYPES))
        if blobs and draw(st.integers(0, 5)):
            connection.bottom.extend(draw(st.lists(st.sampled_from(blobs), min_size=1, max_size=2)))
        if draw(st.integers(0, 9)):
            connection.top.append(f"top{index}")
            blobs.append(f"top{index}")
    return text_format.MessageToString(net, as_utf8=True)


@st.composite
def batch_norms(draw: st.DrawFn) -> str:
    net = draw(with_inputs(SCHEMA.NetParameter()))
    for _ in range(draw(st.integers(1, 3))):
        layer = net.layer.add(type=draw(st.sampled_from(["BatchNorm", "Scale"])))
        for _ in range(draw(st.integers(0, 5))):
            draw(filled(layer.param.add()))
    return text_format.MessageToString(net, as_utf8=True)


@pytest.mark.caffe
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(v1_nets(), v0_nets(), batch_norms()))
def test_a_drawn_network_is_read_as_caffe_reads_it(caffe: CaffeReader, text: str) -> None:
    agrees(caffe, text)


@pytest.mark.caffe
def test_published_networks_are_read_as_caffe_reads_them(caffe: CaffeReader, published: Path) -> None:
    for path in sorted((published / "networks").glob("*.prototxt")):
        if "solver" not in path.name:
            theirs = caffe.read(path.read_text())
            assert theirs is not None, path
            ours = in_test_phase(path.read_text())
            assert len(theirs.layer) == len(ours.layer) or len(str(ours)) > MOST_PRINTED, path
            del ours.layer[len(theirs.layer) :]
            assert str(ours) == str(theirs), path


def test_both_forms_in_one_network_are_refused() -> None:
    text = 'layer { name: "new" } layers { name: "old" type: RELU }'
    with pytest.raises(UserError, match=r"^net\.prototxt:1: has both layer and layers.* 'old'"):
        parse_net(text, BVLC, "net.prototxt")
    text = 'layers { layer { name: "a" type: "relu" } } layers { name: "b" type: RELU }'
    with pytest.raises(UserError, match=r"layers 'b' has settings of its own.*in one form"):
        parse_net(text, BVLC, "net.prototxt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'layers { layer { name: "a" type: "cnov" } }',
            "layer 'a': no V0 layer has the type 'cnov'; known: acc",
        ),
        (
            'layers { layer { name: "a" type: "relu" } bottom: "x" }',
            "layer 'a' reads 'x', which nothing makes",
        ),
        (
            'input: "x" input: "y" input_dim: [1, 3, 8, 8]',
            "2 of input with 0 of input_shape and 4 of input_dim",
        ),
        ('input: "x" input_dim: [1, 3, 8]', "1 of input with 0 of input_shape and 3 of input_dim"),
    ],
)
def test_what_caffe_would_stop_at_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_net(text, BVLC, "net.prototxt")
    assert message in str(caught.value)


def test_what_caffe_would_stop_at_has_its_line() -> None:
    layers = """
layers { layer { name: "conv" type: "conv" num_output: 4
  kernelsize: 3 } bottom: "data" top: "conv" }
layers { layer {
    name: "fc"
    type: "inner" }
  bottom: "conv" top: "fc" }"""
    with pytest.raises(UserError, match=r"^net\.prototxt: layer '' reads 'x'"):  # which one is not known
        parse_net('layers { layer { type: "relu" } bottom: "x" }', BVLC, "net.prototxt")
    for text, line in (
        (f'input: "data" input_dim: [1, 3, 8, 8] {layers}', 6),
        (f'input: "dat" input_dim: [1, 3, 8, 8] {layers}', 2),
        ('layer { name: "a" }\nlayers {\n  name: "b" }', 3),
        ('name: "n"\ninput: "x" input_dim: [1, 3]', 2),
    ):
        with pytest.raises(UserError, match=f"^net[.]prototxt:{line}: "):
            parse_net(text, BVLC, "net.prototxt")
        with pytest.raises(UserError, match=f"^solver[.]prototxt:{line + 1}: "):
            parse_solver(f"net_param {{\n{text} }}", BVLC, "solver.prototxt")
    with pytest.raises(UserError, match=r"^solver\.prototxt:3: has both type"):
        parse_solver('type: "Adam"\n\nsolver_type: ADAGRAD', BVLC, "solver.prototxt")


def test_layers_of_forks_in_the_form_before_todays() -> None:
    text = """layers { name: "bn" type: BN bottom: "a" top: "a" blobs_lr: 1 bn_param { bn_mode: INFERENCE } }
layers { name: "up" type: UPSAMPLE bottom: "a" bottom: "mask" top: "b" upsample_param { scale: 2 } }
layers { name: "in" type: INTERP bottom: "b" top: "c" interp_param { zoom_factor: 3 } }
layers { name: "p" type: POOLING bottom: "c" top: "d" pooling_param { kernel_size: 2 ceil_mode: false } }"""
    for dialect in Dialect:
        bn, up, interp, pool = parse_net(text, dialect, "net.prototxt").layer
        assert [layer.type for layer in (bn, up, interp, pool)] == ["BN", "Upsample", "Interp", "Pooling"]
        assert (bn.bn_param.bn_mode, bn.param[0].lr_mult, up.upsample_param.scale) == (1, 1, 2)
        assert interp.interp_param.zoom_factor == 3 and not pool.pooling_param.ceil_mode
    text = 'name: "n"\nlayers { name: "roi" type: ROI_POOLING }'
    with pytest.raises(UserError, match=r"net\.prototxt:2: .*ROI_POOLING.*; that type is of Fast R-CNN, and"):
        parse_net(text, BVLC, "net.prototxt")


@pytest.mark.parametrize("dialect", list(Dialect))
def test_an_old_solver_type_is_the_new_one(dialect: Dialect) -> None:
    names = {"SGD": 0, "Nesterov": 1, "AdaGrad": 2, "RMSProp": 3, "AdaDelta": 4, "Adam": 5}
    for name, number in names.items():
        for value in (str(number), name.upper()):
            solver = parse_solver(f"solver_type: {value} base_lr: 0.5", dialect, "solver.prototxt")
            assert solver.type == name
            assert not solver.HasField("solver_type")
    with pytest.raises(UserError, match=r"both type and solver_type.*remove solver_type: ADAGRAD"):
        parse_solver('type: "Adam" solver_type: ADAGRAD', dialect, "solver.prototxt")


def test_networks_inside_a_solver_are_brought_up_to_date() -> None:
    text = 'net_param { input: "x" input_dim: [1, 3, 8, 8] layers { name: "r" type: RELU } }'
    solver = parse_solver(f"{text} test_net_param {{ layers {{ type: TANH }} }}", BVLC, "solver.prototxt")
    assert [layer.type for layer in solver.net_param.layer] == ["Input", "ReLU"]
    assert solver.test_net_param[0].layer[0].type == "TanH"


# Weight files, and files written in today's form

V1_NET = """
name: "old" input: "data" input_dim: [1, 3, 9, 9]
layers { name: "c" type: CONVOLUTION bottom: "data" top: "c"
  convolution_param { num_output: 4 pad: 2 kernel_size: 3 } }
layers { name: "relu" type: RELU bottom: "c" top: "c" }
layers { name: "fc" type: INNER_PRODUCT bottom: "c" top: "fc" inner_product_param { num_output: 5 } }
"""
V0_NET = """
name: "old" input: "data" input_dim: [1, 3, 9, 9]
layers { layer { name: "p" type: "padding" pad: 2 } bottom: "data" top: "p" }
layers { layer { name: "c" type: "conv" num_output: 4 kernelsize: 3 } bottom: "p" top: "c" }
layers { layer { name: "relu" type: "relu" } bottom: "c" top: "c" }
layers { layer { name: "fc" type: "innerproduct" num_output: 5 } bottom: "c" top: "fc" }
"""
BLOBS = {"c": [(4, 3, 3, 3), (1, 1, 1, 4)], "fc": [(1, 1, 5, 4 * 11 * 11), (1, 1, 1, 5)]}


def write_old_weights(path: Path, text: str) -> dict[str, list[Any]]:
    """A weight file of the network ``text`` in its own form, with drawn numbers, which are returned."""
    net, numbers = text_format.Parse(text, SCHEMA.NetParameter()), np.random.default_rng(0)
    drawn: dict[str, list[Any]] = {}
    for old in net.layers:
        holder = old.layer if old.HasField("layer") else old
        for shape in BLOBS.get(holder.name, []):
            values = numbers.standard_normal(shape, np.float32)
            blob = holder.blobs.add(data=values.flat)
            blob.num, blob.channels, blob.height, blob.width = shape
            drawn.setdefault(holder.name, []).append(values)
    path.write_bytes(net.SerializeToString())
    return drawn


@pytest.mark.caffe
@pytest.mark.parametrize("text", [V0_NET, V1_NET], ids=["V0", "V1"])
def test_old_weights_are_read_as_caffe_reads_them(
    pycaffe: Any, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.caffemodel", tmp_path / "new.caffemodel"
    drawn = write_old_weights(old, text)
    (tmp_path / "old.prototxt").write_text(text)
    for name in ("old.prototxt", "old.caffemodel"):
        output = tmp_path / name.replace("old", "new")
        assert build_net_main(["--upgrade", str(tmp_path / name), "--output", str(output)]) == 0
    capsys.readouterr()
    for prototxt, weights in (("old.prototxt", old), ("new.prototxt", old), ("new.prototxt", new)):
        net = pycaffe.Net(str(tmp_path / prototxt), pycaffe.TEST, weights=str(weights))
        for name, blobs in drawn.items():
            for index, values in enumerate(blobs):
                assert np.array_equal(net.params[name][index].data.flat, values.flat)
    for weights in (old, new):
        for name, read in read_weights(weights).items():
            assert all(np.array_equal(a, b) for a, b in zip(read, drawn[name], strict=True))
        facts = blob_facts(weights, BVLC)
        assert [(fact.layer, fact.type) for fact in facts[::2]] == [
            ("c", "Convolution"),
            ("fc", "InnerProduct"),
        ]
        assert check_fit(weights, parse_net(text, BVLC, "net")) == []
    stored = SCHEMA.NetParameter.FromString(new.read_bytes())
    assert not stored.layers
    assert [layer.type for layer in stored.layer] == ["Input", "Convolution", "ReLU", "InnerProduct"]
    assert stored.layer[1].convolution_param.pad == [2]


def test_upgrade_writes_a_file_of_todays_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver = tmp_path / "solver.prototxt"
    solver.write_text('net: "net.prototxt"  # mine\nsolver_type: ADAGRAD\n')
    assert build_net_main(["--upgrade", str(solver)]) == 0
    written = tmp_path / "solver_upgraded.prototxt"
    assert written.read_text() == 'net: "net.prototxt"\ntype: "AdaGrad"\n'
    assert "its comments are not kept" in capsys.readouterr().out
    assert build_net_main(["--upgrade", str(written)]) == 0
    assert "is in today's form already; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "solver_upgraded_upgraded.prototxt").exists()
    relu = tmp_path / "relu.prototxt"
    relu.write_text('layers { layer { name: "r" type: "relu" num_output: 3 } }')
    assert build_net_main(["--upgrade", str(relu)]) == 0
    assert "layer 'r': num_output has no meaning for 'relu'; left out" in capsys.readouterr().out
    for arguments, message in (
        (["--upgrade", str(solver), "--output", str(solver)], "is the file itself"),
        (["--upgrade", str(tmp_path / "none")], "No such file"),
        (["--upgrade", str(solver), "--summary"], "--upgrade only writes a file"),
    ):
        with pytest.raises(UserError, match=message):
            build_net_main(arguments)
