"""Training on small images first and on larger ones later: progressive resizing.

The training images of an iteration are cut and mirrored as ever, and then resized to the size that the solver
gives for it. Small images cost less: half the side is a quarter of the operations. (Howard and others trained
ImageNet so for DAWNBench: "Now anyone can train Imagenet in 18 minutes", fast.ai, 10 August 2018. What
training and testing at different sizes do to each other: Touvron, Vedaldi, Douze and Jegou 2019, "Fixing the
train-test resolution discrepancy", arXiv:1906.06423.)

Tests and the recalibration of batch norm see images in full size.
"""

from __future__ import annotations

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.layer_setup import Shape
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.solver import TRAIN, SolverFile

_OF_IMAGES = ("Data", "ImageData")
"""The types of the layers whose first top is images."""


def sized_nets(solver: SolverFile, net: Net, *, filled: bool = True) -> dict[int, Net]:
    """By each size of the solver's: the net that trains on images of this size, with the blobs of ``net``.

    ``net`` is that of the full size. Not ``filled`` is for checks only.

    Raises:
        UserError: images that cannot be resized so, or a layer that does not take them.
    """
    nets: dict[int, Net] = {}
    for size in sorted({step.size for step in solver.parameters.image_size}):
        try:
            nets[size] = _sized(solver, net, size, filled=filled)
        except UserError as error:
            raise UserError(f"{solver.path}: image_size {size}: {error}") from None
    return nets


def _sized(solver: SolverFile, net: Net, size: int, *, filled: bool) -> Net:
    shapes = {name: net.shapes[name] for name in net.inputs}
    images = _images_of(net)
    if shapes[images][-1] == size:
        return net
    found = Net(
        solver.train_net,
        TRAIN,
        solver.dialect,
        where=net.where,
        seed=0,
        device=net.device,
        data_shapes={**shapes, images: _resized(shapes[images], size)},
        filled=filled,
    )
    found.share_with(net)
    return found


def _images_of(net: Net) -> str:
    """The one top of ``net`` that is images."""
    tops = [layer.top[0] for layer in net.layers if layer.type in _OF_IMAGES]
    if len(tops) != 1:
        raise UserError(f"{net.where}: {len(tops)} of its layers read images, and only one can be resized")
    return str(tops[0])


def _resized(shape: Shape, size: int) -> Shape:
    """The shape of a batch of images that are resized."""
    height, width = shape[2:]
    if height != width:
        raise UserError(f"the images are {width}x{height} pixels; cut squares out of them with crop_size")
    if size > height:
        raise UserError(
            f"the network's images are {width}x{height} pixels; give a size of at most {height}, or a larger "
            "crop_size"
        )
    return (*shape[:2], size, size)
