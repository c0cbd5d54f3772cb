"""Logs as Caffe prints them, made up for the tests."""

from __future__ import annotations

NET = """\
name: "tiny"
state {{
  phase: {phase}
}}
layer {{
  name: "data"
  type: "Data"
  top: "data"
  top: "label"
  transform_param {{
    crop_size: 8
  }}
  data_param {{
    source: "train_lmdb"
    batch_size: {batch}
    backend: LMDB
  }}
}}
layer {{
  name: "conv"
  type: "Convolution"
  bottom: "data"
  top: "conv"
  convolution_param {{
    num_output: 16
    kernel_size: 3
    pad: 1
  }}
}}
layer {{
  name: "fc"
  type: "InnerProduct"
  bottom: "conv"
  top: "fc"
  inner_product_param {{
    num_output: 10
  }}
}}
{accuracy}layer {{
  name: "loss"
  type: "SoftmaxWithLoss"
  bottom: "fc"
  bottom: "label"
  top: "loss"
}}
"""
CONV_WEIGHTS = 16 * 3 * 3 * 3
FC_WEIGHTS = 16 * 8 * 8 * 10
GIGAMACS = float(f"{(CONV_WEIGHTS * 64 + FC_WEIGHTS) / 1e9:.4g}")
ACCURACIES = """\
layer {
  name: "acc"
  type: "Accuracy"
  bottom: "fc"
  bottom: "label"
  top: "right"
}
layer {
  name: "acc_of_5"
  type: "Accuracy"
  bottom: "fc"
  bottom: "label"
  top: "nearly right"
  accuracy_param {
    top_k: 5
  }
}
"""


class Log:
    """A log that grows line by line; ``second`` is the time of day of the next line."""

    def __init__(self, date: str = "0815", thread: int = 8764) -> None:
        self.date = date
        self.thread = thread
        self.second = 36_000.0
        self.text = ""

    def line(self, source: str, message: str, *, seconds: float = 0.25, level: str = "I") -> Log:
        clock = f"{int(self.second) // 3600:02d}:{int(self.second) // 60 % 60:02d}:{self.second % 60:09.6f}"
        self.text += f"{level}{self.date} {clock} {self.thread:5d} {source}:1] {message}\n"
        self.second += seconds
        return self

    def net(self, phase: str, batch: int) -> Log:
        self.line("net.cpp", "Initializing net from parameters: ")
        self.text += NET.format(phase=phase, batch=batch, accuracy=ACCURACIES if phase == "TEST" else "")
        self.line("layer_factory.hpp", "Creating layer data")
        self.line("data_layer.cpp", f"output data size: {batch},3,8,8")
        return self

    def start(self, *, devices: str = "Use CPU.", iter_size: int = 1, max_iter: int = 40) -> Log:
        self.line("caffe.cpp", devices)
        self.line("solver.cpp", "Initializing solver from parameters: ")
        self.text += f"test_iter: 5\nbase_lr: 0.01\nmax_iter: {max_iter}\niter_size: {iter_size}\n"
        self.text += 'snapshot_prefix: "a/b"\n'
        self.line("solver.cpp", "Creating training net from net file: net.prototxt")
        self.net("TRAIN", 32).net("TEST", 50)
        self.line("solver.cpp", "Solver scaffolding done.")
        return self.line("caffe.cpp", "Starting Optimization")

    def test(self, iteration: int, top1: float, top5: float, loss: float) -> Log:
        self.line("solver.cpp", f"Iteration {iteration}, Testing net (#0)")
        return self.outputs(top1, top5, loss)

    def outputs(self, top1: float, top5: float, loss: float) -> Log:
        self.line("solver.cpp", f"    Test net output #0: loss = {loss:g} (* 1 = {loss:g} loss)")
        self.line("solver.cpp", f"    Test net output #1: nearly right = {top5:g}")
        return self.line("solver.cpp", f"    Test net output #2: right = {top1:g}")

    def iterate(self, first: int, last: int, *, step: int = 10, seconds: float = 5.0) -> Log:
        for number in range(first, last + 1, step):
            loss = 2.0 / (1 + number)
            self.line("solver.cpp", f"Iteration {number} (2 iter/s, 5s/10 iters), loss = {loss:g}", seconds=0)
            self.line(
                "solver.cpp", f"    Train net output #0: loss = {loss:g} (* 1 = {loss:g} loss)", seconds=0
            )
            self.line("sgd_solver.cpp", f"Iteration {number}, lr = 0.01", seconds=seconds)
        return self

    def sparsity(self, conv: float, fc: float) -> Log:
        zeros, weights = conv * CONV_WEIGHTS + fc * FC_WEIGHTS, CONV_WEIGHTS + FC_WEIGHTS
        self.line("net.cpp", "Num Params(2), Sparsity (zero_weights/count): ")
        self.line("net.cpp", f"conv_param_0({conv:.3g}) ")
        self.line("net.cpp", f"fc_param_0({fc:.3g}) ")
        total = f"({zeros:g}/{weights:g}) {zeros / weights:.3g}"
        return self.line("net.cpp", f"Total Sparsity (zero_weights/count) =  {total}")

    def done(self, iteration: int) -> Log:
        self.line("solver.cpp", f"Snapshotting to binary proto file a/b_iter_{iteration}.caffemodel")
        self.line("solver.cpp", f"Iteration {iteration}, loss = 0.5")
        return self

    def end(self) -> Log:
        return self.line("solver.cpp", "Optimization Done.").line("caffe.cpp", "Optimization Done.")


def whole_stage() -> Log:
    """A stock Caffe training of 40 iterations with tests at 0, 20 and 40."""
    log = Log().start(iter_size=2)
    log.test(0, 0.1, 0.5, 2.3).iterate(0, 10).test(20, 0.6, 0.9, 0.8).iterate(20, 30)
    return log.done(40).test(40, 0.75, 0.95, 0.625).end()
