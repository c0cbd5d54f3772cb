"""Train low-complexity sparse image classifiers as Caffe files."""

__version__ = "0.1.0"
