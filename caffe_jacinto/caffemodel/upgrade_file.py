"""A file of any age written in today's form: a network's or solver's prototxt, or a weight file."""

from __future__ import annotations

from pathlib import Path

from caffe_jacinto.caffemodel.net_file import NewLayer, find_dialect, is_old, open_net, write_net
from caffe_jacinto.caffemodel.storage import is_text_file
from caffe_jacinto.common.files import check_output, read_text, write_whole
from caffe_jacinto.prototxt.schema import brought_up_to_date


def upgrade_file(source: Path, output: Path | None) -> list[str]:
    """Write ``source`` in today's form to ``output``, or beside it as ``NAME_upgraded``; lines to show.

    A file that is in today's form already is not written.

    Raises:
        UserError: the file is missing, damaged or none of the kinds, or ``output`` cannot be written.
    """
    output = output or source.with_name(f"{source.stem}_upgraded{source.suffix}")
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
    if not is_old(source):
        return nothing
    dialect = find_dialect(source)
    with open_net(source, dialect) as (name, layers):
        new = [NewLayer(layer.header, [(layer.view, blob) for blob in layer.blobs]) for layer in layers]
        write_net(output, name, new, dialect)
    return [f"{output}: {source} in today's form, {len(new)} layers"]
