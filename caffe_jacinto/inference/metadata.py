"""What a program that runs an exported network has to know: class names, and how images become its input."""

from __future__ import annotations

import json
from pathlib import Path

from caffe_jacinto.data.encode import ImageForm
from caffe_jacinto.inference.network import (
    NetworkFiles,
    Preprocessing,
    class_names,
    lmdb_file_form,
    trained_network,
    validation_preprocessing,
)
from caffe_jacinto.netspec.shapes import layer_shapes
from caffe_jacinto.prototxt import tree

CHANNEL_ORDERS = {3: "BGR", 1: "gray"}


def network_metadata(files: NetworkFiles, labels: Path | None) -> dict[str, str]:
    """The metadata of a network, by key; docs/weights.md describes them.

    Class names come from ``labels``, or else from a labels.txt in the folders of ``files`` or in the
    validation LMDB.

    Raises:
        UserError: the validation network or the labels cannot be used, or the network has not one image input
            and one output.
    """
    network = trained_network(files.deploy, files.weights)
    done = validation_preprocessing(files.val, network.shape, files.base)
    folders = tuple(folder for folder in (*files.folders, done.lmdb) if folder)
    scores = layer_shapes(tree.parse(network.text, str(files.deploy)))[-1].tops[0]
    names = class_names(labels, folders, scores[1]) if scores and len(scores) > 1 else ()
    found = {"class_names": json.dumps(names, ensure_ascii=False)} if names else {}
    form = done.file_form or (lmdb_file_form(done.lmdb) if done.lmdb else None)
    resized = _resized(form) if form else ""
    if resized:
        found["resize"] = resized
    channels, height, width = network.shape
    return found | {
        "crop": f"{width}x{height}",
        "channel_order": CHANNEL_ORDERS.get(channels, str(channels)),
        "mean": json.dumps(_channel_means(done)),
        "scale": repr(done.transform.scale),
    }


def _resized(form: ImageForm) -> str:
    """The size of an image before the crop: width x height, or of its shorter side alone; "" if its own."""
    if form.shorter:
        return str(form.shorter)
    return f"{form.width}x{form.height}" if form.width else ""


def _channel_means(done: Preprocessing) -> list[float]:
    """What is subtracted from each channel; of a mean image, the averages of its crop."""
    transform, channels = done.transform, done.shape[0]
    if transform.mean_image is not None:
        window = transform.window(*transform.mean_image.shape[1:])
        return [
            round(float(mean), 4) for mean in transform.cut(transform.mean_image, window).mean(axis=(1, 2))
        ]
    means = transform.mean_values or (0.0,)
    return [float(mean) for mean in (means if len(means) == channels else means * channels)]
