"""Quantize a trained network to few bits: test what that costs, and write it for a processor.

    python -m caffe_jacinto.quantize training/RUN --calibrate data/train_lmdb
    python -m caffe_jacinto.quantize training/RUN --calibrate data/train_lmdb --scheme power2 --sensitivity \\
        --plot worst.png
    python -m caffe_jacinto.quantize deploy.prototxt weights.caffemodel --calibrate images/ \\
        --val data/val_lmdb

RUN is a run folder of train, or a stage's folder in one. Ranges are calibrated on some training images (an
LMDB, image files or folders of them); then the network is tested before and after on the validation LMDB.
PyTorch computes both, or stock Caffe. docs/quantization.md explains the schemes and the table.
"""

from __future__ import annotations

import argparse
import io
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.arguments import Parser, gpu_request, image_size, layer_bits, whole_number
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.files import check_parent, read_text, write_whole
from caffe_jacinto.common.text import image_progress
from caffe_jacinto.export.input_shift import INPUT_SHIFTS
from caffe_jacinto.quantization.schemes import (
    MOST_BIAS_BITS,
    MOST_BITS,
    RANGE_METHODS,
    SCHEMES,
    TRAINED,
    Scheme,
    chosen_scheme,
    scheme_mistakes,
)

if TYPE_CHECKING:
    from caffe_jacinto.inference.network import NetworkFiles, Preprocessing, TrainedNetwork
    from caffe_jacinto.inference.quantize import Images
    from caffe_jacinto.inference.quantize_log import QuantizeLog
    from caffe_jacinto.quantization.network import Network
    from caffe_jacinto.quantization.ranges import Range

DEPLOY, CSV = "deploy.prototxt", "table.csv"

PREPROCESSING = "--preprocessing"
"""The option that names the validation network: --val names an LMDB here."""


def main(argv: Sequence[str]) -> int:
    """Calibrate, test, print the table and write the folder; returns 0."""
    options = _parser().parse_intermixed_args(list(argv))
    options.output = options.output or _default_output(options.network)
    options.weights = _only_weights(options)
    _check(options)
    scheme = _scheme(options)
    if not options.log:
        _quantize(options, scheme, None)
        return 0
    from caffe_jacinto.engines.gpus import requested_gpus
    from caffe_jacinto.inference.quantize_log import QuantizeLog

    log = QuantizeLog(f"{options.backend}, scheme {scheme.name}", requested_gpus(options.gpus, None))
    try:
        _quantize(options, scheme, log)
    except UserError as error:
        log.fatal(error)
        raise
    return 0


def _quantize(options: Namespace, scheme: Scheme, log: QuantizeLog | None) -> None:
    """Everything after the checks of the arguments."""
    from caffe_jacinto.engines.gpus import requested_gpus
    from caffe_jacinto.inference.network import network_files, trained_network, validation_preprocessing
    from caffe_jacinto.inference.quantize import Quantizer, described, loaded, on_caffe, on_each_gpu

    files = network_files(options.network, options.weights, options.preprocessing, PREPROCESSING)
    trained = trained_network(files.deploy, files.weights)
    done = validation_preprocessing(files.val, trained.shape, files.base, PREPROCESSING)
    calibration = _calibration(options, done)
    val = _validation(options, done, trained)
    where = str(files.deploy)
    net = loaded(trained, scheme, options.input_shift or "power")
    network = described(net, scheme, where, dict(options.bits_of), options.keep_float)
    network, ranges = _trained_ranges(options, files.weights, network)
    if options.backend == "caffe":
        nets: list[Any] = [on_caffe(net, network, options.caffe, where)]
    else:
        nets = on_each_gpu(net, network, requested_gpus(options.gpus, None), where)
    sampled, progress = options.plot is not None, image_progress if log is None else log.progress
    quantizer = Quantizer(nets[0], network, where, others=nets[1:], sampled=sampled, progress=progress)
    if log is not None:
        log.network(files.val, network, trained.shape, options.batch)
        log.sparsity(files.weights, files.deploy)
    result = quantizer.quantize(calibration, trained=ranges)
    quantizer.measure_noise(result, calibration)
    if val is not None:
        if log is not None:
            log.test_begins(val.total, options.batch)
        on_batch = None if log is None else log.batch
        quantizer.test(result, val, sensitivity=options.sensitivity, on_batch=on_batch)
    _write(options, files, net, result)
    if log is not None:
        log.results(result)


def _parser() -> Parser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = Parser("python -m caffe_jacinto.quantize", description, rest.strip("\n"))
    parser.usage = "%(prog)s RUN|DEPLOY [WEIGHTS] --calibrate LMDB|IMAGES [OPTION...]"
    add = parser.add_argument
    add("network", type=Path, metavar="RUN|DEPLOY", help="a run folder, or a deploy.prototxt")
    add("weights", type=Path, nargs="*", metavar="WEIGHTS", help="with DEPLOY: the .caffemodel")
    images = "training images: an LMDB, or an image file or a folder (may be repeated)"
    add("--calibrate", type=Path, action="append", required=True, metavar="LMDB|IMAGES", help=images)
    default = "the folder to write; made if missing (default: quantized, in RUN or beside DEPLOY)"
    add("--output", type=Path, metavar="DIR", help=default)
    val = "the LMDB to test on (default: that of val.prototxt, if it is there)"
    add("--val", type=Path, metavar="LMDB", help=val)
    add("--scheme", choices=list(SCHEMES), default=next(iter(SCHEMES)), help="(default: %(default)s)")
    bits = whole_number(0)
    add("--bits", type=bits, metavar="N", help="of weights and activations (default: the scheme's)")
    add("--weight-bits", type=bits, metavar="N", help="of weights alone")
    add("--activation-bits", type=bits, metavar="N", help="of activations alone")
    add("--bias-bits", type=bits, metavar="N", help=f"of biases, up to {MOST_BIAS_BITS}")
    one = f"bits of one layer's weights and output, up to {MOST_BITS} (may be repeated)"
    add("--bits-of", type=layer_bits, action="append", default=[], metavar="LAYER=N", help=one)
    kept = "do not quantize this layer (may be repeated)"
    add("--keep-float", action="append", default=[], metavar="LAYER", help=kept)
    add(
        "--ranges", choices=RANGE_METHODS, help="how ranges of activations are chosen (default: the scheme's)"
    )
    add("--weight-ranges", choices=RANGE_METHODS, help="the same for weights")
    add("--percentile", type=_percentile, metavar="P", help="of the values in a range (default: 99.99)")
    correction = "take the mean error of each output channel off its bias"
    add("--bias-correction", action="store_true", help=correction)
    add("--sensitivity", action="store_true", help="also test with each layer quantized alone")
    drawn = "draw the outputs and ranges of the worst layers, as .png or .svg"
    add("--plot", type=Path, metavar="FILE", help=drawn)
    add(
        "--batches",
        type=whole_number(1),
        default=50,
        metavar="N",
        help="for calibration (default: %(default)s)",
    )
    add("--batch", type=whole_number(1), default=50, metavar="N", help="batch size (default: %(default)s)")
    prepared = "the val.prototxt that defines the preprocessing (default: the one beside DEPLOY)"
    add(PREPROCESSING, type=Path, metavar="FILE", help=prepared)
    resize = "size of image files before the crop (default: that of the val LMDB)"
    add("--resize", type=image_size, metavar="WIDTHxHEIGHT", help=resize)
    shift = "form of what the network adds to images; TI's importer lists bias and scale (default: power)"
    add("--input-shift", choices=[form for form in INPUT_SHIFTS if form != "conv"], help=shift)
    backend = "what computes: PyTorch, or stock Caffe through pycaffe, layer by layer (default: torch)"
    add("--backend", choices=("torch", "caffe"), default="torch", help=backend)
    add("--caffe", metavar="PATH", help="with --backend caffe: the caffe executable or its tree")
    log = "write a log in Caffe's form to stderr, which the report reads, instead of progress and table"
    add("--log", action="store_true", help=log)
    gpus = "compute on these GPUs, on PyTorch (default: on the CPU)"
    add("--gpus", "--gpu", "-gpu", type=gpu_request, default=(), metavar="0,1|all", help=gpus)
    return parser


def _only_weights(options: Namespace) -> Path | None:
    """The one path behind the network, if it is there; more come from ``--calibrate *.jpg``."""
    first, *more = options.weights or (None,)
    if more:
        raise UserError(
            f"{more[-1]}: one path too many; give each image its own --calibrate, or name their folder"
        )
    if options.network.is_dir() and first is not None:
        raise UserError(
            f"{options.network} is a folder, whose weights are found automatically; leave {first} out, or "
            "give each of several images its own --calibrate"
        )
    return first


def _percentile(text: str) -> float:
    """An argument type: above 50, up to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 50 < value <= 100:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a percentage above 50 and up to 100, like 99.9"
        )
    return value


def _default_output(network: Path) -> Path:
    return (network if network.is_dir() else network.parent) / "quantized"


def _check(options: Namespace) -> None:
    """What can be told from the arguments alone."""
    from caffe_jacinto.export.quantized import STOCK_DEPLOY
    from caffe_jacinto.quantization.tables import PICTURES

    if not options.network.exists():
        raise UserError(
            f"{options.network}: there is no such file or folder; "
            "give a run folder, or a deploy.prototxt and its .caffemodel"
        )
    layers = [layer for layer, _ in options.bits_of]
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise UserError(f"--bits-of {twice}: is there twice; give each layer once")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output} is a file; name a folder")
    check_parent(options.output.absolute(), "--output ")
    for name in (DEPLOY, STOCK_DEPLOY):
        place = options.output / name
        if place.exists() and options.network.is_file() and place.samefile(options.network):
            raise UserError(
                f"--output {options.output}: {name} in it is the network itself; name another folder"
            )
    if (options.output / "run.json").exists() or (options.output / "solver.prototxt").exists():
        raise UserError(f"--output {options.output} is a run or one of its stages; name another folder")
    if options.log and options.val is None:
        raise UserError("--log writes the log of a test: give its LMDB with --val")
    if options.backend == "caffe" and options.gpus:
        raise UserError("--backend caffe computes on the CPU: leave --gpus out")
    if options.backend != "caffe" and options.caffe:
        raise UserError("--caffe goes with --backend caffe")
    if options.plot is not None:
        if options.plot.suffix.lower() not in PICTURES:
            raise UserError(f"--plot {options.plot}: the name must end in {' or '.join(PICTURES)}")
        if options.plot.absolute().parent != options.output.absolute():
            check_parent(options.plot.absolute(), "--plot ")


def _scheme(options: Namespace) -> Scheme:
    """The scheme with what the options change of it."""
    settings = vars(options)
    for key, what in scheme_mistakes(settings):
        raise UserError(f"--{key.replace('_', '-')}: {what}")
    return chosen_scheme(settings)


def _trained_ranges(
    options: Namespace, weights: Path, network: Network
) -> tuple[Network, Mapping[str, Range] | None]:
    """The ranges that quantization-aware training has left beside ``weights``, if these are to be used.

    Returns:
        ``network`` by their scheme, and they; or ``network`` as it is and None.
    """
    from caffe_jacinto.quantization.settling import read_ranges

    found = None if options.ranges is not None else read_ranges(weights)
    if found is None:
        return network, None
    scheme = network.scheme if options.weight_ranges is not None else found.for_weights(network.scheme)
    asked = replace(network, scheme=replace(scheme, activation_ranges=TRAINED))
    misfit = found.misfit(asked)
    if misfit is not None:
        print(f"{found.path}: not used, and the ranges are calibrated: {misfit}", file=sys.stderr)
        return network, None
    print(f"{found.path}: these ranges are used; --ranges calibrates others", file=sys.stderr)
    return asked, found.ranges


def _calibration(options: Namespace, done: Preprocessing) -> Images:
    """The images to calibrate on: of an LMDB, evenly spaced ones."""
    from caffe_jacinto.data.lmdb_reader import is_lmdb_folder
    from caffe_jacinto.inference.network import file_form, file_samples, image_files, lmdb_samples
    from caffe_jacinto.inference.quantize import batched

    sources, most = options.calibrate, options.batches * options.batch
    missing = next((source for source in sources if not source.exists()), None)
    if missing is not None:
        raise UserError(f"--calibrate {missing}: there is no such file or folder; give an LMDB or images")
    lmdb = next((source for source in sources if is_lmdb_folder(source)), None)
    if lmdb is not None:
        if len(sources) > 1:
            raise UserError(f"--calibrate {lmdb} is an LMDB; give one LMDB alone, or images")
        if options.resize:
            raise UserError("--resize is for image files, and those in an LMDB are not resized: leave it out")
        total = min(_size(lmdb), most)
        return batched(str(lmdb), total, options.batch, lambda: lmdb_samples(lmdb, done, most)[1])
    paths = image_files(sources)
    chosen = [paths[number * len(paths) // most] for number in range(most)] if len(paths) > most else paths
    form = file_form(done, options.resize)
    return batched(str(sources[0]), len(chosen), options.batch, lambda: file_samples(chosen, done, form))


def _validation(options: Namespace, done: Preprocessing, trained: TrainedNetwork) -> Images | None:
    """The images to test on; None, and a line, where there are none or ``trained`` gives no scores."""
    from caffe_jacinto.data.lmdb_reader import is_lmdb_folder
    from caffe_jacinto.inference.network import lmdb_samples, why_no_scores
    from caffe_jacinto.inference.quantize import batched

    why = why_no_scores(trained)
    if why is not None:
        option = "--val" if options.val is not None else "--sensitivity" if options.sensitivity else None
        if option is not None:
            raise UserError(f"{trained.where}: {why}, which a test needs: leave {option} out")
        print(f"{trained.where}: {why}: the accuracy is not tested", file=sys.stderr)
        return None
    lmdb = options.val or done.lmdb
    if options.val is None and (lmdb is None or not is_lmdb_folder(lmdb)):
        if options.sensitivity:
            raise UserError("--sensitivity tests on a validation LMDB: give one with --val")
        print("no validation LMDB: the accuracy is not tested; give one with --val", file=sys.stderr)
        return None
    assert lmdb is not None
    return batched(str(lmdb), _size(lmdb), options.batch, lambda: lmdb_samples(lmdb, done)[1])


def _size(lmdb: Path) -> int:
    """The number of records."""
    from caffe_jacinto.data.lmdb_reader import LmdbReader

    with LmdbReader(lmdb) as reader:
        return len(reader)


def _write(options: Namespace, files: NetworkFiles, net: Any, result: Any) -> None:
    """Print the table, and write the folder and the picture."""
    from caffe_jacinto.caffemodel.hdf5 import without_suffix
    from caffe_jacinto.export.quantized import STOCK_DEPLOY, quantized_files
    from caffe_jacinto.prototxt.schema import parse_any_net
    from caffe_jacinto.quantization.record import RECORD, record_of, record_text
    from caffe_jacinto.quantization.tables import TABLE, csv_text, picture, write_text

    original = parse_any_net(read_text(files.deploy), str(files.deploy))
    last = original.layer[-1] if original.layer[-1].type == "Softmax" else None
    written = quantized_files(net, result, last, str(files.deploy))
    text = io.StringIO()
    write_text(result, text)
    weights = f"{without_suffix(files.weights).stem}_quantized.caffemodel"
    names = {"network": None if written.fork_text is None else DEPLOY, "weights": weights}
    folder: Path = options.output
    folder.mkdir(exist_ok=True)
    write_whole(folder / weights, written.weights())
    if written.fork_text is None:
        print(f"{folder / DEPLOY}: not written: {written.fork_lacks}", file=sys.stderr)
        (folder / DEPLOY).unlink(missing_ok=True)
    else:
        write_whole(folder / DEPLOY, written.fork_text)
    write_whole(folder / STOCK_DEPLOY, written.stock_text)
    write_whole(folder / TABLE, text.getvalue())
    write_whole(folder / CSV, csv_text(result))
    write_whole(folder / RECORD, record_text(record_of(result, names, _preprocessing(files))))
    if options.plot is not None:
        write_whole(options.plot, picture(result, options.plot.suffix.lower().lstrip(".")))
    if options.log:
        return
    write_text(result, sys.stdout)
    made = (RECORD, names["network"], STOCK_DEPLOY, weights, TABLE, CSV)
    print(f"{folder}: {', '.join(name for name in made if name is not None)}")


def _preprocessing(files: NetworkFiles) -> dict[str, str]:
    """Class names and preprocessing; a line on stderr where they are not known."""
    from caffe_jacinto.inference.metadata import network_metadata

    try:
        return network_metadata(files, None)
    except UserError as error:
        print(f"quantization.json does not say how to prepare images: {error}", file=sys.stderr)
        return {}


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.quantize", main))
