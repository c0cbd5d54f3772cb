"""Batch-norm statistics estimated anew: running averages lag behind weights that change fast."""

from __future__ import annotations

from collections.abc import Callable

import torch

from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.dialects import Dialect


def reestimate(
    net: Net, batches: int, one_pass: Callable[[], object], ranks: Ranks, stop: Callable[[], bool]
) -> bool:
    """Set the statistics of ``net`` to averages over ``batches`` passes, which the ranks share out.

    ``one_pass`` is a pass of this rank in the train phase. Layers that use fixed statistics keep them. False:
    ``stop`` asked for an end.
    """
    layers = [
        layer
        for layer in net.layers
        if layer.type == "BatchNorm" and not layer.batch_norm_param.use_global_stats
    ]
    if not layers:
        caffe_log.info("No batch-norm statistics to re-estimate")
        return True
    caffe_log.info(f"Re-estimating the statistics of {len(layers)} batch-norm layers over {batches} batches")
    fork = net.dialect is Dialect.CAFFE_JACINTO
    sums = [
        (blob.tensor, layer.batch_norm_param.moving_average_fraction)
        for layer in layers
        # The fork's third blob is a factor that stays.
        for blob in net.layer_blobs[layer.name][: 2 if fork else 3]
    ]
    passes = -(-batches // ranks.size)
    with torch.no_grad():
        # From zero, nothing of the old statistics goes into the new.
        for tensor, _ in sums:
            tensor.zero_()
        for _ in range(passes):
            if any(ranks.any(stop())):
                return False
            one_pass()
        if fork:
            # Averages that began at zero; stock Caffe's are sums, with their weight in the third blob.
            for tensor, fraction in sums:
                tensor /= 1 - fraction**passes
        ranks.average([tensor for tensor, _ in sums])
    return True
