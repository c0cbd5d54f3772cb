"""The findings of a verified LMDB as a table, as JSON, and as a page of its images."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import check_parent, template_folder, write_whole
from caffe_jacinto.common.text import Column, Line, count_of, printable, show_table
from caffe_jacinto.data.datum import parse_datum, stored_pixels
from caffe_jacinto.data.encode import JPEG_START, PNG_START
from caffe_jacinto.data.verify import Findings, Occurrences, Problem, Sample, verify_lmdb

PAGE_START = b"<!doctype html>"
"""How a page begins, in lower case."""

MOST_CLASSES = 30
"""A histogram of more classes shows the smallest and the largest only."""

ENDS = 5
"""How many of each."""

MOST_FORMS = 5
BAR = 30
"""Characters of the longest bar of the histogram."""


def verify_and_report(
    folder: Path, workers: int, labels: Path | None, page: Path | None, samples: int, json_form: bool
) -> bool:
    """Verify the LMDB ``folder`` and print its findings as a table, or as JSON.

    Args:
        workers, labels: as in `verify_lmdb`.
        page: where to write a page of ``samples`` images; None for no page.

    Returns whether the LMDB is fit for training.

    Raises:
        UserError: the LMDB cannot be read, or the page not be written.
    """
    if page is not None:
        check_page(page)  # Before minutes are spent on the records.
    found = verify_lmdb(folder, workers=workers, labels=labels, sample=samples if page else 0)
    if json_form:
        print(as_json(found), flush=True)
    else:
        show(found, sys.stdout)
    if page is not None:
        write_page(found, page)
        if not json_form:
            print(f"{page}: {count_of(len(found.samples), 'image')} with their labels")
    return not found.errors


def show(found: Findings, out: TextIO) -> None:
    """Write what was found, for people."""
    out.write(f"{found.folder}: {count_of(found.records, 'record')}, {found.record_bytes / 1e6:,.1f} MB\n")
    facts = [("images", text) for text in _forms(found)]
    facts += [("labels", _labels(found)), ("order", _order(found))]
    facts.append(("duplicates", f"{found.duplicates:,}" if found.duplicates else "none"))
    for name, text in facts:
        out.write(printable(f"  {name:<10}  {text}") + "\n")
    out.write("\n")
    show_table(
        out,
        _histogram_title(found),
        [
            Column("Label"),
            Column("Class", words=True),
            Column("Images"),
            Column("Share"),
            Column("", words=True),
        ],
        _histogram(found),
    )
    for kind, problems in (("error", found.errors), ("warning", found.warnings)):
        for problem, cases in problems.items():
            times = f" ({cases.count:,})" if cases.count > 1 else ""
            out.write(f"\n{kind}: {found.wording(problem)}{times}\n")
            out.writelines(f"  {printable(example)}\n" for example in cases.examples if example)
            if cases.count > len(cases.examples):
                out.write(f"  and {cases.count - len(cases.examples):,} more\n")
    out.write(f"\n{verdict(found)}\n")


def verdict(found: Findings) -> str:
    """One line: whether Caffe can train with it."""
    if found.errors:
        return f"{found.folder} is not fit for training: {count_of(len(found.errors), 'kind')} of error"
    warned = f", with {count_of(len(found.warnings), 'warning')}" if found.warnings else ""
    return f"{found.folder} is whole{warned}"


def as_json(found: Findings) -> str:
    """Everything that was found, for scripts."""
    content = {
        "lmdb": str(found.folder),
        "fit": not found.errors,
        "records": found.records,
        "record_bytes": found.record_bytes,
        "labels": {str(label): found.labels[label] for label in sorted(found.labels)},
        "class_names": found.names,
        "images": [
            {**form._asdict(), "images": count}
            for form, count in sorted(found.forms.items(), key=lambda item: -item[1])
        ],
        "order": found.order,
        "label_changes": found.changes,
        "label_changes_expected": round(found.expected_changes, 1),
        "duplicates": found.duplicates,
        "errors": _as_list(found, found.errors),
        "warnings": _as_list(found, found.warnings),
    }
    return json.dumps(content, indent=1, ensure_ascii=True)


def check_page(output: Path) -> None:
    """Raise UserError unless a page may be written to ``output``: only another page is replaced."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name the page, like page.html")
    check_parent(output)
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"{output} cannot be made: its folder {output.parent} cannot be written to")
    if not output.exists():
        return
    try:
        with output.open("rb") as file:
            start = file.read(len(PAGE_START))
    except OSError as error:
        raise UserError(f"{output} exists and cannot be read: {error.strerror}") from None
    if start.lower() != PAGE_START:
        raise UserError(f"{output} exists and is not a page of images: choose another name")


def write_page(found: Findings, output: Path) -> None:
    """Write an HTML page of the samples with their labels; it needs no other files.

    Raises:
        OSError: it cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("html/samples.html.j2").render(
        title=os.fspath(found.folder),
        summary=[*_forms(found), _labels(found), _order(found), verdict(found)],
        samples=[_shown(found, sample) for sample in found.samples],
        records=found.records,
    )
    write_whole(output, page.encode("utf-8", "backslashreplace"))


def _shown(found: Findings, sample: Sample) -> dict[str, Any]:
    """A sample as the page's template takes it."""
    name = "" if sample.label is None else found.name(sample.label)
    return {
        "key": sample.key,
        "label": "no label" if sample.label is None else f"{sample.label} {name}".strip(),
        "form": sample.form.text if sample.form else "",
        "error": sample.error,
        "source": _data_uri(sample),
    }


def _data_uri(sample: Sample) -> str:
    """The image as a data: URI; empty where none can be shown."""
    if sample.form is None:
        return ""
    datum = parse_datum(sample.content)
    for kind, start in (("image/jpeg", JPEG_START), ("image/png", PNG_START)):
        if datum.encoded and datum.data.startswith(start):
            return _uri(kind, datum.data)
    import cv2
    import numpy as np

    pixels = stored_pixels(datum).transpose(1, 2, 0)
    if pixels.dtype != np.uint16:
        pixels = np.clip(np.nan_to_num(pixels), 0, 255).astype(np.uint8)
    if pixels.shape[2] not in (1, 3, 4):
        pixels = pixels[:, :, :1]
    encoded = cv2.imencode(".png", np.ascontiguousarray(pixels))[1]
    return _uri("image/png", encoded.tobytes())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _forms(found: Findings) -> list[str]:
    common = found.forms.most_common()
    shown = [f"{count:,} {form.text}" for form, count in common[:MOST_FORMS]]
    rest = common[MOST_FORMS:]
    if rest:
        images = count_of(sum(count for _, count in rest), "image")
        shown.append(f"{images} of {len(rest):,} other sizes and kinds")
    return shown or ["none that can be decoded"]


def _labels(found: Findings) -> str:
    if not found.labels:
        return "none"
    counts = sorted(found.labels.values())
    classes = "1 class" if len(counts) == 1 else f"{len(counts):,} classes"
    names = "" if found.names is None else f", {len(found.names):,} names in labels.txt"
    each = f"{counts[0]:,} to {counts[-1]:,} images each (median {counts[len(counts) // 2]:,})"
    if counts[0] == counts[-1]:
        each = f"{count_of(counts[0], 'image')} each"
    return f"{classes}, {min(found.labels)} to {max(found.labels)}{names}; {each}"


def _order(found: Findings) -> str:
    words = {
        "shuffled": "shuffled",
        "by class": "sorted by class",
        "grouped": "in groups of one class",
        "one class": "one class only",
        "too few": "too few records to tell",
    }[found.order]
    if found.order in ("one class", "too few"):
        return words
    return (
        f"{words}: the label changes {found.changes:,} times, "
        f"in a random order about {found.expected_changes:,.0f} times"
    )


def _histogram_title(found: Findings) -> str:
    if len(found.labels) <= MOST_CLASSES:
        return "Images of each class"
    return f"Images of the {ENDS} smallest and {ENDS} largest of {len(found.labels):,} classes"


def _histogram(found: Findings) -> Sequence[Line]:
    labels = sorted(found.labels)
    if len(labels) > MOST_CLASSES:
        by_size = sorted(labels, key=lambda label: (found.labels[label], label))
        labels = [*by_size[:ENDS], *by_size[-ENDS:]]
    most, total = max(found.labels.values(), default=1), max(sum(found.labels.values()), 1)
    lines = []
    for label in labels:
        count = found.labels[label]
        bar = "█" * max(round(BAR * count / most), 1)
        lines.append(Line((str(label), found.name(label), f"{count:,}", f"{count / total:.2%}", bar)))
    return lines


def _as_list(found: Findings, problems: Mapping[Problem, Occurrences]) -> list[dict[str, Any]]:
    return [
        {"what": found.wording(problem), "count": cases.count, "examples": [e for e in cases.examples if e]}
        for problem, cases in problems.items()
    ]
