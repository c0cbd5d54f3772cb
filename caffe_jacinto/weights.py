"""Show, compare, convert, sparsify and export weight files; Caffe is not needed.

    python -m caffe_jacinto.weights show trained.caffemodel
    python -m caffe_jacinto.weights diff before.caffemodel after.caffemodel
    python -m caffe_jacinto.weights convert a.caffemodel --from bvlc --to caffe_jacinto --output b.caffemodel
    python -m caffe_jacinto.weights sparsify dense.caffemodel --target 0.8 --output sparse.caffemodel
    python -m caffe_jacinto.weights merge-bn trained.caffemodel deploy.prototxt --output merged
    python -m caffe_jacinto.weights export trained.caffemodel deploy.prototxt --onnx trained.onnx

Files of stock Caffe and of caffe-jacinto are read, with blobs in the old form or the new. A file is never
changed in place: --output names a new one, which appears whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from caffe_jacinto.common.arguments import Parser, fraction
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.files import check_parent, read_text, write_whole
from caffe_jacinto.prototxt.dialects import Dialect

DIALECTS = [dialect.value for dialect in Dialect]


def main(argv: Sequence[str]) -> int:
    """Read the arguments and run the command; `diff` returns 1 where the files differ."""
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> Parser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.weights", description, rest.strip("\n"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="name")

    def add(name: str, help_text: str, command: Callable[[argparse.Namespace], int]) -> Any:
        sub = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        sub.set_defaults(command=command)
        return sub

    show = add("show", "list layers: shapes, zeros, ranges, numbers that are not finite", _show)
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--format", choices=["text", "csv", "json"], default="text", help="default: text")
    _add_dialect(show)

    diff = add("diff", "compare two files layer by layer; exit code 1 where they differ", _diff)
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")

    convert = add("convert", "convert a file between the two Caffes' forms of batch normalization", _convert)
    convert.add_argument("file", type=Path, metavar="FILE")
    convert.add_argument("--from", dest="origin", choices=DIALECTS, required=True)
    convert.add_argument("--to", choices=DIALECTS, required=True)
    _add_output(convert)

    sparsify = add("sparsify", "zero small weights once, by the rule of training, to try it", _sparsify)
    sparsify.add_argument("file", type=Path, metavar="FILE")
    sparsify.add_argument(
        "--target", type=fraction, required=True, metavar="0.8", help="fraction of the weights to zero"
    )
    sparsify.add_argument(
        "--by",
        choices=["channel", "layer"],
        default="channel",
        help="one threshold for each output channel, or for each layer (default: channel)",
    )
    sparsify.add_argument(
        "--caps",
        choices=["on", "off"],
        default="on",
        help="on: as published, no threshold above 0.2 or 0.2 of the largest weight (default: on)",
    )
    _add_output(sparsify)
    _add_dialect(sparsify)

    merge = add("merge-bn", "fold batch norms into the convolutions, for stock Caffe and OpenCV", _merge_bn)
    _add_network(merge)
    merge.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for deploy_merged.prototxt and NAME_merged.caffemodel; made if missing",
    )

    export = add("export", "write a trained network as an ONNX file", _export)
    _add_network(export)
    export.add_argument("--onnx", type=Path, required=True, metavar="OUT", help="the ONNX file to write")
    return parser


def _add_network(parser: Any) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the weights")
    parser.add_argument("deploy", type=Path, metavar="DEPLOY", help="the network, its deploy.prototxt")
    parser.add_argument("--dialect", choices=DIALECTS, help="of DEPLOY (default: recognized from its text)")


def _add_output(parser: Any) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the weight file to write")


def _add_dialect(parser: Any) -> None:
    parser.add_argument("--dialect", choices=DIALECTS, help="of the file (default: recognized from it)")


def _named_dialect(options: argparse.Namespace) -> Dialect | None:
    return Dialect(options.dialect) if options.dialect else None


def _show(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel import show
    from caffe_jacinto.caffemodel.net_file import find_dialect

    facts = show.blob_facts(options.file, _named_dialect(options) or find_dialect(options.file))
    if options.format == "json":
        print(show.as_json(facts, str(options.file)))
    elif options.format == "csv":
        print(show.as_csv(facts), end="")
    else:
        show.show(facts, str(options.file), sys.stdout)
    return 0


def _diff(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel import diff
    from caffe_jacinto.caffemodel.net_file import find_dialect

    dialects = find_dialect(options.a), find_dialect(options.b)
    found, same = diff.differences(options.a, options.b, *dialects)
    diff.show(found, same, sys.stdout)
    return 1 if found else 0


def _convert(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel.convert import convert

    if options.origin == options.to:
        raise UserError(f"--from and --to are both {options.to}; there is nothing to convert")
    _check_output(options.output, options.file)
    done = "; ".join(convert(options.file, options.output, Dialect(options.to)))
    print(f"{options.output}: {options.file} in the form of {options.to}; {done or 'nothing to change'}")
    return 0


def _sparsify(options: argparse.Namespace) -> int:
    from caffe_jacinto.caffemodel import show
    from caffe_jacinto.caffemodel.net_file import find_dialect
    from caffe_jacinto.pruning.rule import sparsify
    from caffe_jacinto.recipes.model import SparseSettings

    _check_output(options.output, options.file)
    dialect = _named_dialect(options) or find_dialect(options.file)
    published = SparseSettings.model_fields
    maxratio, value_max = 1.0, float("inf")
    if options.caps == "on":
        maxratio = published["threshold_maxratio"].default
        value_max = published["threshold_value_max"].default
    pruned = sparsify(
        options.file,
        options.output,
        dialect,
        factor=options.target,
        by=options.by,
        maxratio=maxratio,
        value_max=value_max,
    )
    facts = [fact for fact in show.blob_facts(options.output, dialect) if fact.counts]
    show.show(facts, str(options.output), sys.stdout)
    print(f"pruned: {', '.join(pruned) or 'no layer; the rule leaves all of them out'}")
    if pruned and options.caps == "on" and show.sparsity(facts).fraction < options.target - 0.01:
        print(
            f"below {options.target:.0%}: the published caps keep larger weights (--caps off lifts them), "
            "and layers with fewer than 32 inputs or outputs lose half as many"
        )
    return 0


def _merge_bn(options: argparse.Namespace) -> int:
    from caffe_jacinto.export.merge_bn import merge_bn

    merged = merge_bn(_deploy_text(options), str(options.deploy), _named_dialect(options), options.file)
    deploy = options.output / "deploy_merged.prototxt"
    weights = options.output / f"{options.file.stem}_merged.caffemodel"
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output} is a file; name a folder")
    options.output.mkdir(parents=True, exist_ok=True)
    for output, source in ((deploy, options.deploy), (weights, options.file)):
        _check_output(output, source)
    merged.write(deploy, weights)
    for name, layers in merged.merged.items():
        print(f"merged into {name}: {', '.join(layers)}")
    for line in merged.remarks:
        print(line)
    count = sum(map(len, merged.merged.values()))
    print(f"{weights}: {count} layers merged; its network is {deploy}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from caffe_jacinto.export.onnx import export_onnx

    for source in (options.file, options.deploy):
        _check_output(options.onnx, source, "--onnx")
    text = _deploy_text(options)
    content = export_onnx(text, str(options.deploy), _named_dialect(options), options.file)
    write_whole(options.onnx, content)
    print(f"{options.onnx}: {options.deploy} with the weights of {options.file}, {len(content):,} bytes")
    return 0


def _deploy_text(options: argparse.Namespace) -> str:
    return read_text(options.deploy, "give the deploy.prototxt after the weight file")


def _check_output(output: Path, source: Path, argument: str = "--output") -> None:
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError(f"{argument} {output} is the file itself; name another")
    if output.is_dir():
        raise UserError(f"{argument} {output} is a folder; name a file in it")
    check_parent(output, f"{argument} ")


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.weights", main))
