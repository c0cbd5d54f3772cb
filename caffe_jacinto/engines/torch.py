"""The old name of `engines.pytorch`, which the run.sh of older run folders starts."""

from caffe_jacinto.engines.pytorch.__main__ import main, script

__all__ = ["main", "script"]

if __name__ == "__main__":
    raise SystemExit(script())
