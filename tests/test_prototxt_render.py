"""Templates: whatever they are given comes back unchanged when the text is parsed."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import jinja2
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import read_text
from caffe_jacinto.networks.stage_files import stage_files
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.render import number, quote, render
from caffe_jacinto.prototxt.schema import messages, parse_net, parse_solver
from caffe_jacinto.recipes.load import load_recipe

UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
TRAPS = [
    '"',
    "\\",
    "\\n",
    "\n",
    "\r\n",
    "\x00",
    "\x00" + "1",
    "'",
    '" }',
    "#",
    "{{ x }}",
    "&lt;",
    "ü",
    "名前",
    "\u2028",
    "\U0001f40d",
]


@given(st.one_of(UNICODE, st.lists(st.sampled_from(TRAPS)).map("".join)))
def test_any_text_comes_back(text: str) -> None:
    parsed = text_format.Parse(f"name: {quote(text)}", messages(Dialect.BVLC).NetParameter())
    assert parsed.name == text
    assert "\n" not in quote(text)


@pytest.mark.caffe  # takes seconds
@settings(max_examples=25)
@given(st.one_of(UNICODE, st.lists(st.sampled_from(TRAPS)).map("".join)).filter(bool))
def test_any_path_comes_back_from_the_four_files(path: str) -> None:
    recipe = load_recipe("demo_digits")
    data = recipe.data.model_copy(update={"train_lmdb": path, "val_lmdb": f"{path}2"})
    folder = f"run {path.replace('/', '_')}"
    for dialect in Dialect:
        files = stage_files(
            recipe.model_copy(update={"data": data}),
            "finetune",
            dialect,
            folder=folder,
            gpus=(),
            iter_size=1,
            solver_mode_gpu=False,
        )
        assert parse_net(files["train.prototxt"], dialect, "t").layer[0].data_param.source == path
        assert parse_net(files["val.prototxt"], dialect, "v").layer[0].data_param.source == f"{path}2"
        solver = parse_solver(files["solver.prototxt"], dialect, "s")
        assert solver.train_net == f"{folder}/train.prototxt"
        assert solver.snapshot_prefix == f"{folder}/digits_jacintonet11"


def test_comments_may_be_in_any_encoding_and_nothing_else(tmp_path: Path) -> None:
    """As Caffe reads them: files with comments in GBK or Latin-1 are common."""
    path = tmp_path / "net.prototxt"
    path.write_bytes(b'# \xca\xd6 "\r\nname: "a#\xc3\xa9" # caf\xe9\r\nlayer { name: \'b"#\' }\n')
    text = read_text(path)
    assert text == '# \ufffd\ufffd "\nname: "a#\u00e9" # caf\ufffd\nlayer { name: \'b"#\' }\n'
    net = parse_net(text, Dialect.BVLC, "net")
    assert (net.name, net.layer[0].name) == ("a#\u00e9", 'b"#')
    path.write_bytes(b'name: "caf\xe9"\n')
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_text(path)


def test_a_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        quote("caf\udce9")


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float_is_printed_short_and_equal(value: float) -> None:
    text = number(value)
    assert struct.pack("<f", float(text)) == struct.pack("<f", value)
    parsed = text_format.Parse(f"base_lr: {text}", messages(Dialect.BVLC).SolverParameter())
    assert parsed.base_lr == value
    assert len(text) <= len(repr(value)) or len(text.split("e")[0].strip("-0.")) <= 10


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-3e38, max_value=3e38))
def test_a_double_is_printed_as_its_float32(value: float) -> None:
    assert struct.pack("<f", float(number(value))) == struct.pack("<f", value)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1, "0.1"), (1e-5, "1e-05"), (1.0, "1"), (0.2 + 0.1, "0.3"), (-128.0, "-128"), (0.0, "0")],
)
def test_floats_look_as_one_writes_them(value: float, text: str) -> None:
    assert number(value) == text


def test_a_float_beyond_float32_is_refused() -> None:
    with pytest.raises(UserError, match="32-bit"):
        number(1e39)
    assert float(number(3.4028234663852886e38)) < math.inf


def test_a_template_that_lacks_a_value_fails() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("net.j2", layers=(), dialect="bvlc", input_shape=())
