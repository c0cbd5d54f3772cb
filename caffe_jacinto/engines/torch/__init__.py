"""Caffe's files on PyTorch: the same prototxts, LMDBs, logs, snapshots and command line (see docs/torch.md).

    python -m caffe_jacinto.engines.torch train -solver solver.prototxt

Nothing outside this folder imports PyTorch.
"""
