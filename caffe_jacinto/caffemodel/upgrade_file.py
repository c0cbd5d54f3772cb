"""A file of any age written in today's form: a network's or solver's prototxt, or a weight file."""

from __future__ import annotations

from pathlib import Path

from caffe_jacinto.caffemodel.hdf5 import is_hdf5, without_suffix
from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer, find_dialect, is_old, open_net, write_net
from caffe_jacinto.caffemodel.storage import is_text_file
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import check_output, read_text, write_whole
from caffe_jacinto.prototxt.schema import brought_up_to_date


def upgrade_file(source: Path, output: Path | None) -> list[str]:
    """Write ``source`` in today's form to ``output``, or beside it as ``NAME_upgraded``; lines to show.

    A file that is in today's form already is not written; weights in HDF5 become binary.

    Raises:
        UserError: the file is missing, damaged or none of the kinds, or ``output`` cannot be written.
    """
    plain = without_suffix(source)
    output = output or plain.with_name(f"{plain.stem}_upgraded{plain.suffix}")
    check_output(output, source)
    nothing = [f"{source} is in today's form already; nothing was written"]
    if is_text_file(source):
        text = read_text(source)
        upgraded, remarks = brought_up_to_date(text, str(source))
        if not upgraded:
            return nothing
        if "#" in text:
            remarks.append("its comments are not kept")
        write_whole(output, upgraded)
        return [f"{output}: {source} in today's form", *remarks]
    if not is_old(source) and not is_hdf5(source):
        return nothing
    dialect = find_dialect(source)
    with open_net(source, dialect) as (name, layers):
        _require_all_blobs(source, layers)
        new = [NewLayer(layer.header, [(layer.view, blob) for blob in layer.blobs]) for layer in layers]
        write_net(output, name, new, dialect)
    form = "binary form" if is_hdf5(source) else "today's form"
    return [f"{output}: {source} in {form}, {len(new)} layers"]


def _require_all_blobs(source: Path, layers: list[NetLayer]) -> None:
    """Refuse an HDF5 file that leaves out a blob that layers share."""
    for layer in layers:
        if is_hdf5(source) and not all(blob.ranges for blob in layer.blobs):
            raise UserError(
                f"{source}: layer {layer.name} shares a blob with another layer, and an HDF5 file does not "
                "say with which; let Caffe write the binary form: snapshot_format: BINARYPROTO in the solver"
            )
