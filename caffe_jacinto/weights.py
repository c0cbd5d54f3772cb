"""Show, compare, convert, sparsify, shrink and export weight files; Caffe is not needed.

    python -m caffe_jacinto.weights show training/RUN
    python -m caffe_jacinto.weights diff before.caffemodel after.caffemodel
    python -m caffe_jacinto.weights convert training/RUN --to caffe_jacinto
    python -m caffe_jacinto.weights sparsify dense.caffemodel --target 0.8 --output sparse.caffemodel
    python -m caffe_jacinto.weights sensitivity training/RUN --target 0.8
    python -m caffe_jacinto.weights shrink training/RUN
    python -m caffe_jacinto.weights merge-bn trained.caffemodel deploy.prototxt --output merged
    python -m caffe_jacinto.weights export training/RUN --onnx trained.onnx

RUN is a run folder of train, or a stage's folder in one: its newest weights, and the network beside them.
Files of stock Caffe and of caffe-jacinto are read, with blobs in the old form or the new. A file is never
changed in place: the output is another file, beside the weights if no name is given, which appears whole or
not at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.common.arguments import Parser, fraction, whole_number
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.files import check_output, read_text, write_whole
from caffe_jacinto.common.text import Column, Line, count_of, show_table
from caffe_jacinto.export.input_shift import INPUT_SHIFTS
from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    from caffe_jacinto.inference.network import NetworkFiles
    from caffe_jacinto.quantization.record import Recorded
    from caffe_jacinto.recipes.model import SparseSettings

MOST_SHOWN = 100
"""Characters of a value that `export` prints."""

_OTHER_FORMS = ("train.prototxt", "val.prototxt")
"""The same network with its data and its loss, beside a deploy prototxt."""

DIALECTS = [dialect.value for dialect in Dialect]


def main(argv: Sequence[str]) -> int:
    """Read the arguments and run the command; `diff` returns 1 where the files differ."""
    options = _parser().parse_args(argv)
    return _COMMANDS[options.name].run(options)


class _Command(NamedTuple):
    help: str
    add_arguments: Callable[[Any], None]
    """To its parser."""

    run: Callable[[argparse.Namespace], int]
    """Returns the exit code."""


def _parser() -> Parser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.weights", description, rest.strip("\n"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="name")
    for name, command in _COMMANDS.items():
        text = command.help
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_arguments(sub)
    return parser


def _add_weights(parser: Any, name: str = "file", metavar: str = "FILE") -> None:
    parser.add_argument(name, type=_weights, metavar=metavar, help="a weight file, or a RUN with its newest")


def _weights(text: str) -> Path:
    """An argument type: a weight file, or the newest one of a run folder."""
    path = Path(text)
    if not path.is_dir():
        return path
    from caffe_jacinto.inference.network import network_files

    return network_files(path, None, None).weights


def _add_network(parser: Any, *, optional: bool = False) -> None:
    count = "?" if optional else None
    parser.add_argument(
        "file", type=Path, nargs=count, metavar="FILE|RUN", help="the weights, or a run folder"
    )
    help_text = "with FILE: the network, its deploy.prototxt"
    parser.add_argument("deploy", type=Path, nargs="?", metavar="DEPLOY", help=help_text)
    parser.add_argument("--dialect", choices=DIALECTS, help="of DEPLOY (default: recognized from its text)")


def _take_network(options: argparse.Namespace) -> NetworkFiles | None:
    """Where a run folder is given: its files, of which two take the places of FILE and DEPLOY."""
    if options.file.is_dir():
        from caffe_jacinto.inference.network import network_files

        if options.deploy is not None:
            raise UserError(
                f"{options.file} is a folder, whose network is found by itself; leave out {options.deploy}"
            )
        files = network_files(options.file, None, None)
        options.file, options.deploy = files.weights, files.deploy
        return files
    if options.deploy is None:
        raise UserError(
            f"{options.file}: give its deploy.prototxt after it, or the folder of a run instead of both"
        )
    return None


def _add_output(parser: Any, default: str) -> None:
    help_text = f"the weight file to write (default: {default}, beside the input)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=help_text)


def _add_dialect(parser: Any) -> None:
    parser.add_argument("--dialect", choices=DIALECTS, help="of the file (default: recognized from it)")


def _add_pruned_layers(parser: Any) -> None:
    parser.add_argument(
        "--min-kernel",
        type=whole_number(1),
        default=3,
        metavar="N",
        help="smallest kernel that is pruned; 1 takes 1x1 convolutions in (default: 3)",
    )
    parser.add_argument("--inner-products", action="store_true", help="prune and count inner products, too")


def _add_hdf5_network(parser: Any) -> None:
    help_text = "of an HDF5 file (.caffemodel.h5), which does not say the types of its layers: its prototxt"
    parser.add_argument("--network", type=Path, metavar="FILE", help=help_text)


def _beside(weights: Path, ending: str) -> Path:
    """The file beside ``weights`` of their name with another ending, or one more."""
    from caffe_jacinto.caffemodel.hdf5 import without_suffix

    return weights.with_name(f"{without_suffix(weights).stem}{ending}")


def _hdf5_network(options: argparse.Namespace, dialect: Dialect) -> Any | None:
    """The network that `--network` names, if it does, in the dialect of the weights."""
    from caffe_jacinto.prototxt.schema import parse_net

    if options.network is None:
        return None
    return parse_net(read_text(options.network, "give the network's prototxt"), dialect, str(options.network))


def _named_dialect(options: argparse.Namespace) -> Dialect | None:
    return Dialect(options.dialect) if options.dialect else None


def _add_show_arguments(parser: Any) -> None:
    _add_weights(parser)
    _add_hdf5_network(parser)
    parser.add_argument("--format", choices=["text", "csv", "json"], default="text", help="default: text")
    _add_dialect(parser)


def _show(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel import show
    from caffe_jacinto.caffemodel.net_file import find_dialect

    dialect = _named_dialect(options) or find_dialect(options.file)
    facts = show.blob_facts(options.file, dialect, _hdf5_network(options, dialect))
    if options.format == "json":
        print(show.as_json(facts, str(options.file)))
    elif options.format == "csv":
        print(show.as_csv(facts), end="")
    else:
        show.show(facts, str(options.file), sys.stdout)
    return 0


def _add_diff_arguments(parser: Any) -> None:
    _add_weights(parser, "a", "A")
    _add_weights(parser, "b", "B")
    _add_hdf5_network(parser)


def _diff(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel import diff
    from caffe_jacinto.caffemodel.net_file import find_dialect

    dialects = find_dialect(options.a), find_dialect(options.b)
    network = _hdf5_network(options, dialects[0])
    found, same = diff.differences(options.a, options.b, *dialects, network)
    diff.show(found, same, sys.stdout)
    return 1 if found else 0


def _add_convert_arguments(parser: Any) -> None:
    _add_weights(parser)
    _add_hdf5_network(parser)
    parser.add_argument("--from", dest="origin", choices=DIALECTS, help="(default: recognized from the file)")
    parser.add_argument("--to", choices=DIALECTS, help="(default: the other one)")
    _add_output(parser, "NAME_<dialect>.caffemodel")


def _convert(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel.convert import convert
    from caffe_jacinto.caffemodel.net_file import find_dialect

    origin, to = options.origin, options.to
    if origin is None and to is None:
        origin = find_dialect(options.file).value
    to = to or next(dialect for dialect in DIALECTS if dialect != origin)
    if origin == to:
        raise UserError(f"--from and --to are both {to}; there is nothing to convert")
    output = options.output or _beside(options.file, f"_{to}.caffemodel")
    check_output(output, options.file)
    source = next(dialect for dialect in Dialect if dialect.value != to)
    done = "; ".join(convert(options.file, output, Dialect(to), _hdf5_network(options, source)))
    print(f"{output}: {options.file} in the form of {to}; {done or 'nothing to change'}")
    return 0


def _add_sparsify_arguments(parser: Any) -> None:
    _add_weights(parser)
    _add_hdf5_network(parser)
    parser.add_argument(
        "--target", type=fraction, required=True, metavar="0.8", help="fraction of the weights to zero"
    )
    parser.add_argument(
        "--by",
        choices=["channel", "layer", "network"],
        default="channel",
        help="one threshold for each output channel, for each layer, or for all (default: channel)",
    )
    several = {"action": "append", "default": [], "metavar": "NAME"}
    parser.add_argument("--layers", help="prune only these, by name or pattern; repeatable", **several)
    parser.add_argument("--skip", help="do not prune these; repeatable", **several)
    _add_pruned_layers(parser)
    parser.add_argument(
        "--pattern",
        metavar="N:M",
        help="of each M consecutive input channels N keep their weights, like 2:4, whatever the caps",
    )
    parser.add_argument(
        "--caps",
        choices=["on", "off"],
        default="on",
        help="on: as published, no threshold above 0.2 or 0.2 of the largest weight (default: on)",
    )
    _add_output(parser, "NAME_sparsified.caffemodel")
    _add_dialect(parser)


def _sparsify(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel import show
    from caffe_jacinto.caffemodel.net_file import find_dialect
    from caffe_jacinto.pruning.sparsify import sparsify

    output = options.output or _beside(options.file, "_sparsified.caffemodel")
    check_output(output, options.file)
    dialect = _named_dialect(options) or find_dialect(options.file)
    network = _hdf5_network(options, dialect)
    pruned = sparsify(options.file, output, dialect, _rule(options), options.target, network)
    facts = show.blob_facts(output, dialect)
    counted = [fact for fact in facts if fact.counts or (options.inner_products and fact.weights)]
    show.show(counted, str(output), sys.stdout)
    print(f"pruned: {', '.join(pruned) or 'no layer; the rule leaves all of them out'}")
    reached = show.sparsity(counted, inner_products=options.inner_products).fraction
    if pruned and options.caps == "on" and not options.pattern and reached < options.target - 0.01:
        print(
            f"below {options.target:.0%}: the published caps keep larger weights (--caps off lifts them), "
            "and layers with fewer than 32 inputs or outputs lose half as many"
        )
    return 0


def _rule(options: argparse.Namespace) -> SparseSettings:
    """The pruning rule of `sparsify`; its schedule and its target play no part."""
    from caffe_jacinto.recipes.model import FLOAT32_MAX, sparse_fields, sparse_settings

    rule: dict[str, Any] = {"start_iter": 0, "target": options.target, "by": options.by}
    rule |= {"layers": options.layers, "skip": options.skip, "min_kernel": options.min_kernel}
    rule |= {"inner_products": options.inner_products, "pattern": options.pattern}
    if options.caps == "off":
        rule |= {"threshold_maxratio": 1.0, "threshold_value_max": FLOAT32_MAX}
    fields = sparse_fields()
    try:
        return sparse_settings({fields[key].name: value for key, value in rule.items()}, "--")
    except UserError as error:
        raise UserError(str(error).replace("--sparsity_", "--")) from None


def _add_sensitivity_arguments(parser: Any) -> None:
    _add_network(parser)
    parser.add_argument(
        "--target", type=fraction, required=True, metavar="0.8", help="sparsity of the layers together"
    )
    images = "validation images that each test takes, spread over the LMDB (default: 500)"
    parser.add_argument("--images", type=whole_number(1), default=500, metavar="N", help=images)
    lmdb = "the validation LMDB (default: that of the val.prototxt)"
    parser.add_argument("--lmdb", type=Path, metavar="DIR", help=lmdb)
    val = "the val.prototxt that defines the preprocessing (default: the one beside DEPLOY)"
    parser.add_argument("--val", type=Path, metavar="FILE", help=val)
    _add_pruned_layers(parser)


def _sensitivity(options: argparse.Namespace) -> int:
    from caffe_jacinto.inference.network import (
        lmdb_samples,
        network_files,
        trained_network,
        validation_preprocessing,
    )
    from caffe_jacinto.inference.sensitivity import LEVELS, as_toml, check_target, measure, targets_for
    from caffe_jacinto.recipes.load import toml_value
    from caffe_jacinto.recipes.model import SparseSettings

    check_target(options.target)
    files = _take_network(options) or network_files(options.deploy, options.file, options.val)
    network = trained_network(files.deploy, files.weights)
    done = validation_preprocessing(options.val or files.val, network.shape, files.base)
    lmdb = options.lmdb or done.lmdb
    if lmdb is None:
        raise UserError(f"{files.val}: names no LMDB; give one with --lmdb")
    rule = SparseSettings(start_iter=0, min_kernel=options.min_kernel, inner_products=options.inner_products)
    total, samples = lmdb_samples(lmdb, done, options.images)
    found = measure(
        network, samples, rule, lambda label: print(f"{label}, {count_of(total, 'image')} of {lmdb}")
    )
    targets = targets_for(found, options.target)
    titles = [*(f"at {level:g}" for level in LEVELS), "target"]
    lines = [
        Line(
            [
                one.layer.name,
                f"{one.layer.weights:,}",
                *(f"{rise:+.3g}" for rise in one.rises),
                f"{targets.get(one.layer.name, 0):g}",
            ]
        )
        for one in found
    ]
    columns = [Column("Layer", words=True), Column("Weights"), *(Column(title) for title in titles)]
    show_table(sys.stdout, "Rise of the loss, each layer pruned alone", columns, lines)
    print(f"for a recipe's [stages.NAME.sparse], with target = {options.target:g}:\n{as_toml(targets)}")
    left_out = [one.layer.name for one in found if one.layer.name not in targets]
    if left_out:
        print(f"skip = {toml_value(left_out)}")
    return 0


def _add_shrink_arguments(parser: Any) -> None:
    _add_network(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for deploy.prototxt and NAME_shrunk.caffemodel, and for train.prototxt and val.prototxt"
        " if they are beside DEPLOY; made if missing (default: shrunk, beside the weights)",
    )
    check = "compute random images with both networks and print the largest difference"
    parser.add_argument("--check", action="store_true", help=check)


def _shrink(options: argparse.Namespace) -> int:
    from caffe_jacinto.export.shrink import show, shrink
    from caffe_jacinto.quantization.settling import carry_ranges

    _take_network(options)
    folder = options.output or options.file.parent / "shrunk"
    shrunk = shrink(_deploy_text(options), str(options.deploy), _named_dialect(options), options.file)
    deploy, weights = folder / options.deploy.name, folder / _beside(options.file, "_shrunk.caffemodel").name
    others = {}
    for source in (options.deploy.parent / name for name in _OTHER_FORMS):
        if source.is_file() and source.name != options.deploy.name:
            others[source] = shrunk.other_form(read_text(source), str(source))
    _make_folder(folder)
    for output, source in ((deploy, options.deploy), (weights, options.file)):
        check_output(output, source)
    shrunk.write(deploy, weights)
    for source, text in others.items():
        if text is None:
            print(f"{source}: not written, it is of another network")
        else:
            check_output(folder / source.name, source)
            write_whole(folder / source.name, text)
    show(shrunk, sys.stdout)
    removed = sum(shrunk.removed.values())
    if not removed:
        print("no channel can be removed: each has an effect, or the constant that it is must stay")
    print(f"{weights}: {count_of(removed, 'channel')} removed; its network is {deploy}")
    ranges = carry_ranges(options.file, weights)
    if ranges is not None:
        print(f"{ranges}: the ranges that it was trained with, for quantize")
    if options.check:
        from caffe_jacinto.inference.agreement import largest_difference

        label, difference = largest_difference((options.deploy, options.file), (deploy, weights))
        print(f"{label}: the scores of both networks differ by at most {difference:.2g} of the largest score")
    return 0


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)


def _add_merge_bn_arguments(parser: Any) -> None:
    _add_network(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for deploy_merged.prototxt and NAME_merged.caffemodel; made if missing "
        "(default: merged, beside the weights)",
    )
    parser.add_argument(
        "--input-shift",
        choices=INPUT_SHIFTS,
        default=INPUT_SHIFTS[0],
        help="form of what is added to images, where it cannot be folded exactly: power, for stock Caffe and "
        "OpenCV; bias or scale, for TI's importer; conv: into the first convolution, whose padding goes into "
        "the images (default: %(default)s)",
    )


def _merge_bn(options: argparse.Namespace) -> int:
    from caffe_jacinto.export.merge_bn import merge_bn

    _take_network(options)
    folder = options.output or options.file.parent / "merged"
    text, where = _deploy_text(options), str(options.deploy)
    merged = merge_bn(text, where, _named_dialect(options), options.file, options.input_shift)
    deploy = folder / "deploy_merged.prototxt"
    weights = folder / _beside(options.file, "_merged.caffemodel").name
    _make_folder(folder)
    for output, source in ((deploy, options.deploy), (weights, options.file)):
        check_output(output, source)
    merged.write(deploy, weights)
    for name, layers in merged.merged.items():
        print(f"merged into {name}: {', '.join(layers)}")
    for line in merged.remarks:
        print(line)
    if options.input_shift == "power" and any(layer.type == "Power" for layer in merged.net.layers):
        print("TI's importer lists no Power layer: --input-shift bias, scale or conv writes another form")
    count = sum(map(len, merged.merged.values()))
    print(f"{weights}: {count} layers merged; its network is {deploy}")
    return 0


def _add_export_arguments(parser: Any) -> None:
    _add_network(parser, optional=True)
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="OUT",
        help="the ONNX file to write (default: NAME.onnx, beside the weights)",
    )
    val = "the val.prototxt that defines the preprocessing (default: the one beside DEPLOY)"
    labels = "class names, one a line (default: labels.txt of RUN, beside DEPLOY or in the val LMDB)"
    parser.add_argument("--val", type=Path, metavar="FILE", help=val)
    parser.add_argument("--labels", type=Path, metavar="FILE", help=labels)
    folder = "instead of FILE: the folder that quantize has written, for a model of 8-bit numbers (QDQ form)"
    parser.add_argument("--quantized", type=Path, metavar="DIR", help=folder)
    opset = "version of ONNX's operators (default: 13, the oldest that suffices)"
    parser.add_argument("--opset", type=whole_number(1), metavar="N", help=opset)
    batch = "images that the model takes at a time (default: any number)"
    parser.add_argument("--batch", type=whole_number(1), metavar="N", help=batch)


def _export(options: argparse.Namespace) -> int:
    from caffe_jacinto.export.onnx import export_onnx

    quantized = _take_quantized(options) if options.quantized else None
    if options.file is None:
        raise UserError("no network: give its weights and deploy.prototxt, a run folder, or --quantized DIR")
    files = None if quantized else _take_network(options)
    output = options.onnx or _beside(options.file, ".onnx")
    for source in (options.file, options.deploy, *(quantized.files if quantized else ())):
        check_output(output, source, "--onnx")
    text = _deploy_text(options)
    given = options.val or options.labels
    metadata = dict(quantized.preprocessing) if quantized and not given else _metadata(options, files)
    content = export_onnx(
        text,
        str(options.deploy),
        _named_dialect(options),
        options.file,
        metadata,
        opset=options.opset,
        batch=options.batch,
        quantized=quantized,
    )
    write_whole(output, content)
    print(f"{output}: {options.deploy} with the weights of {options.file}, {len(content):,} bytes")
    for key, value in metadata.items():
        print(f"  {key}: {value if len(value) <= MOST_SHOWN else value[:MOST_SHOWN] + ' ...'}")
    return 0


def _take_quantized(options: argparse.Namespace) -> Recorded:
    """What a folder of quantize has; its files take the places of FILE and DEPLOY."""
    from caffe_jacinto.export.quantized import STOCK_DEPLOY
    from caffe_jacinto.quantization.record import read_recorded

    if options.file is not None:
        raise UserError(f"--quantized {options.quantized} has its own network; leave {options.file} out")
    recorded = read_recorded(options.quantized, STOCK_DEPLOY)
    options.file, options.deploy = recorded.weights, recorded.network
    return recorded


def _metadata(options: argparse.Namespace, run: NetworkFiles | None) -> dict[str, str]:
    """What the ONNX file says about classes and preprocessing; a line on stderr where it is not known."""
    from caffe_jacinto.inference.metadata import network_metadata
    from caffe_jacinto.inference.network import network_files

    try:
        files = run or network_files(options.deploy, options.file, options.val)
        return network_metadata(replace(files, val=options.val or files.val), options.labels)
    except UserError as error:
        if options.val or options.labels:
            raise
        print(f"the ONNX file does not say how to prepare images: {error}", file=sys.stderr)
        return {}


def _deploy_text(options: argparse.Namespace) -> str:
    return read_text(options.deploy, "give the deploy.prototxt after the weight file")


_COMMANDS = {
    "show": _Command(
        "list layers: shapes, zeros, ranges, numbers that are not finite",
        _add_show_arguments,
        _show,
    ),
    "diff": _Command(
        "compare two files layer by layer; exit code 1 where they differ",
        _add_diff_arguments,
        _diff,
    ),
    "convert": _Command(
        "convert a file between the two Caffes' forms of batch normalization",
        _add_convert_arguments,
        _convert,
    ),
    "sparsify": _Command(
        "zero small weights once, by the rule of training, to try it",
        _add_sparsify_arguments,
        _sparsify,
    ),
    "sensitivity": _Command(
        "prune each layer alone, test the network, and give targets by layer",
        _add_sensitivity_arguments,
        _sensitivity,
    ),
    "shrink": _Command(
        "remove the channels that have no effect, such as those without weights",
        _add_shrink_arguments,
        _shrink,
    ),
    "merge-bn": _Command(
        "fold batch norms into the convolutions, for stock Caffe and OpenCV",
        _add_merge_bn_arguments,
        _merge_bn,
    ),
    "export": _Command(
        "write a trained network as an ONNX file",
        _add_export_arguments,
        _export,
    ),
}


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.weights", main))
