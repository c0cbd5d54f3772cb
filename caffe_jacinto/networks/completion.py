"""What a recipe with `network.prototxt` leaves to that file: its LMDBs, batches, crop, classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from caffe_jacinto.networks.user_network import KEY, UserNetwork, read_user_network
from caffe_jacinto.recipes.rules import Mistake


def complete(document: dict[str, Any]) -> Sequence[Mistake]:
    """Add to a recipe's document the values of its network's prototxt; returns what does not go with it.

    Values of the recipe stay: they are then set in the prototxt's place. A recipe without
    `network.prototxt`, or with values of wrong types, stays as it is.

    Raises:
        UserError: the prototxt cannot be read, or is not a network that can be trained.
    """
    from pydantic import ValidationError

    from caffe_jacinto.recipes.model import NetworkSettings

    given = document.get("network")
    if not isinstance(given, dict) or not isinstance(given.get("prototxt"), str) or not given["prototxt"]:
        return []
    if given.get("name"):
        what = f"is a network of this program, and {KEY} names another: remove one of the two"
        return [Mistake(("network", "name"), what)]
    try:
        settings = NetworkSettings.model_validate({**given, "name": "network"})
        network = read_user_network(settings)
    except (ValidationError, ValueError):
        given["name"] = "network"  # what is wrong is said when the whole recipe is checked
        return []
    tables = {name: document.setdefault(name, {}) for name in ("data", "training")}
    if not all(isinstance(table, dict) for table in tables.values()):
        return []
    data, training = tables["data"], tables["training"]
    wrong = [*_refused(network, given, data), *_lacking(network, data, training)]
    if wrong:
        return wrong
    first = network.tests[0]
    passes = training.get("iter_size", 1)
    _default(given, {"name": network.name, "crop_size": network.train.crop})
    _default(
        data,
        {
            "train_lmdb": network.train.source,
            "val_lmdb": first.source,
            "num_classes": max(network.classes, 2),
            "mirror": network.train.data.message("transform_param").flag("mirror"),
            "mean_file": network.train.mean_file,
        },
    )
    batch = network.train.batch * (passes if isinstance(passes, int) else 1)
    _default(training, {"batch_size": batch, "val_batch_size": first.batch})
    return []


def _refused(network: UserNetwork, given: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Mistake]:
    """What the recipe sets and the prototxt has no place for."""
    reader = network.train.where(network.train.data)
    if given.get("crop_size") and not network.train.crop:
        yield Mistake(("network", "crop_size"), f"{reader} has no crop_size; add one there, or remove this")
    if data.get("mirror") and network.train.data.string("type") == "HDF5Data":
        yield Mistake(("data", "mirror"), f"{reader} (HDF5Data) transforms nothing; remove this")
    if data.get("mean_file") and not network.train.mean_file:
        yield Mistake(("data", "mean_file"), f"{reader} has no mean_file; add one there, or remove this")
    classes = data.get("num_classes")
    if isinstance(classes, int) and classes != network.classes:
        head = network.train.where(network.head)
        yield Mistake(
            ("data", "num_classes"),
            f"{classes}, and {head} has {network.classes} outputs; change num_output there, or remove this",
        )


def _lacking(network: UserNetwork, data: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[Mistake]:
    """What neither the recipe nor the prototxt says."""
    nets = (("train_lmdb", "batch_size", network.train), ("val_lmdb", "val_batch_size", network.tests[0]))
    for lmdb, batch, net in nets:
        reader = net.where(net.data)
        if not data.get(lmdb) and not net.source:
            yield Mistake(("data", lmdb), f"{reader} has no source; add it there")
        if not training.get(batch) and net.batch < 1:
            yield Mistake(("training", batch), f"{reader} has no batch_size; add it there")
    first, *more = network.tests
    for net in more:
        if net.batch < 1 <= first.batch:  # without one in both, val_batch_size is that of both
            reader = net.where(net.data)
            yield Mistake(("network", "prototxt"), f"{reader} has no batch_size; add it there")


def _default(table: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value is not None and table.get(key) in (None, ""):
            table[key] = value
