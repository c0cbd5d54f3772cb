"""The two schemas: equal to their readable text, and to the published tables."""

from __future__ import annotations

import csv
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.forks import FIELDS
from caffe_jacinto.prototxt.loadable import not_loadable
from caffe_jacinto.prototxt.schema import (
    PACKAGES,
    SCHEMA_FOLDER,
    messages,
    own_field_names,
    parse_net,
    parse_solver,
)
from caffe_jacinto.prototxt.tree import tree_of

F = descriptor_pb2.FieldDescriptorProto
LABELS = {F.LABEL_OPTIONAL: "optional", F.LABEL_REQUIRED: "required", F.LABEL_REPEATED: "repeated"}
Row = tuple[str, ...]


def descriptor_file(data: bytes) -> descriptor_pb2.FileDescriptorProto:
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(data).file
    return file


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.value)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    chosen: Dialect = request.param
    return chosen


def stored(dialect: Dialect) -> bytes:
    return (SCHEMA_FOLDER / f"{dialect.value}.binpb").read_bytes()


@pytest.mark.skipif(shutil.which("protoc") is None, reason="protoc is not installed")
@pytest.mark.parametrize("name", [*(dialect.value for dialect in Dialect), "forks"])
def test_the_descriptor_set_is_what_protoc_makes_of_the_text(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made.binpb"
    subprocess.run(["protoc", f"--descriptor_set_out={made}", f"{name}.proto"], cwd=SCHEMA_FOLDER, check=True)
    content = (SCHEMA_FOLDER / f"{name}.binpb").read_bytes()
    assert descriptor_file(made.read_bytes()) == descriptor_file(content)


def test_numbers_of_forks_fields_are_above_all_others(dialect: Dialect) -> None:
    """So that no field of a dialect's own binary files is taken for one of them, nor the other way round."""
    forks = descriptor_file((SCHEMA_FOLDER / "forks.binpb").read_bytes())
    own = {message.name: message for message in descriptor_file(stored(dialect)).message_type}
    for message in forks.message_type:
        highest = max([field.number for field in own[message.name].field]) if message.name in own else 0
        assert all(field.number > max(highest, 20_000) for field in message.field)
    assert not own_field_names(Dialect.BVLC) & FIELDS.keys(), "stock Caffe has these itself"


def test_both_dialects_read_fields_of_forks(dialect: Dialect) -> None:
    net = parse_net(
        'layer { name: "p" type: "Pooling" pooling_param { ceil_mode: false } }\n'
        'layer { name: "q" type: "Permute" permute_param { order: 0 order: 2 } }\n'
        'layer { name: "n" type: "Normalize" norm_param { scale_filler { value: 20 } eps: 0.5 } }\n'
        'layer { name: "b" type: "BN" bn_param { bn_mode: INFERENCE scale_filler { value: 2 } } }\n',
        dialect,
        "net",
    )
    assert not net.layer[0].pooling_param.ceil_mode
    assert list(net.layer[1].permute_param.order) == [0, 2]
    assert net.layer[2].norm_param.scale_filler.value == 20
    assert type(net.layer[3].bn_param).BNMode.Name(net.layer[3].bn_param.bn_mode) == "INFERENCE"
    assert type(net).FromString(net.SerializeToString()) == net
    names = [line.partition(", ")[0] for line in not_loadable(tree_of(net), dialect)]
    stock = ["stock Caffe has no field pooling_param.ceil_mode", "stock Caffe has no type Permute"]
    fork = ["caffe-jacinto has no field pooling_param.ceil_mode", "caffe-jacinto has no type BN"]
    both = [*stock, "stock Caffe has no type Normalize", "stock Caffe has no type BN"]
    assert names == (both if dialect is Dialect.BVLC else fork)


def test_the_schema_is_the_published_table_row_for_row(published: Path, dialect: Dialect) -> None:
    with (published / "schema" / f"{dialect.value}.tsv").open(newline="") as file:
        theirs = [
            (
                r["message"],
                r["kind"],
                r["name"],
                r["number"],
                r["label"],
                r["type"],
                canonical(r),
                r["option"],
            )
            for r in csv.DictReader(file, delimiter="\t")
        ]
    ours = rows(descriptor_file(stored(dialect)))
    missing, extra = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    assert (missing, extra) == ([], [])
    assert len(theirs) == len(ours) > 500


def canonical(row: dict[str, str]) -> str:
    return default(row["type"], row["default"])


def default(kind: str, text: str) -> str:
    """A default's value, however it is spelt."""
    if not text or kind not in ("float", "double"):
        return text
    return struct.pack("<f" if kind == "float" else "<d", float(text)).hex()


def rows(file: descriptor_pb2.FileDescriptorProto) -> list[Row]:
    found = [row for enum in file.enum_type for row in enum_rows(enum, "")]
    for message in file.message_type:
        found += message_rows(message, "", f".{file.package}.")
    return found


def message_rows(message: descriptor_pb2.DescriptorProto, above: str, package: str) -> list[Row]:
    name = above + message.name
    found: list[Row] = []
    for field in message.field:
        kind = field.type_name.removeprefix(package) or F.Type.Name(field.type).removeprefix("TYPE_").lower()
        packed = "packed" if field.options.packed else ""
        shown = default(kind, field.default_value)
        label = LABELS[field.label]
        found.append((name, "field", field.name, str(field.number), label, kind, shown, packed))
    for enum in message.enum_type:
        found += enum_rows(enum, f"{name}.")
    for inner in message.nested_type:
        found += message_rows(inner, f"{name}.", package)
    return found


def enum_rows(enum: descriptor_pb2.EnumDescriptorProto, above: str) -> list[Row]:
    return [
        (above + enum.name, "enum", value.name, str(value.number), "", "", "", "") for value in enum.value
    ]


def test_numbers_that_collide_are_read_by_their_own_dialect() -> None:
    fork = messages(Dialect.CAFFE_JACINTO).SolverParameter(rampup_interval=7)
    stock = messages(Dialect.BVLC).SolverParameter.FromString(fork.SerializeToString())
    assert "rampup" not in str(stock)
    assert PACKAGES[Dialect.BVLC] != PACKAGES[Dialect.CAFFE_JACINTO] != "caffe"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('name: "a"\nlayr { }\n', 2, "did you mean layer?"),
        (
            'layer {\n  type: "Data"\n  data_param { threads: 1 }\n}\n',
            3,
            "valid in the dialect caffe_jacinto",
        ),
        ("name: unquoted\n", 1, "correct this line"),
        ('layer {\n  type: "PriorBox"\n  roi_pooling_param { }\n}\n', 3, "that field is of Fast R-CNN"),
        ("max_iter: 5\nsparse_target: 1\n", 1, "remove or rename it"),
        ("base_lr: 1\nsparse_mode: SPARSE_UPDATE\n", 1, "it is a solver's prototxt: give a network's"),
        ('name: "a"\n\nlayer { data_param { backend: ROCKS } }\n', 3, "ROCKS"),
    ],
)
def test_a_net_that_is_not_in_the_schema_names_file_and_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_net(text, Dialect.BVLC, "some/net.prototxt")
    message = str(caught.value)
    assert message.startswith(f"some/net.prototxt:{line}: ")
    assert says in message
    assert "\n" not in message
    assert "caffe_jacinto.bvlc" not in message


def test_sparse_fields_are_the_forks_alone() -> None:
    text = "max_iter: 5\nsparse_mode: SPARSE_UPDATE\n"
    assert parse_solver(text, Dialect.CAFFE_JACINTO, "solver.prototxt").sparse_mode == 1
    with pytest.raises(UserError, match=r"solver\.prototxt:2: .*sparse_mode"):
        parse_solver(text, Dialect.BVLC, "solver.prototxt")
