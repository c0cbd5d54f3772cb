"""The old name of `engines.pycaffe.recalibrate`, which the run.sh of older run folders starts."""

import sys

from caffe_jacinto.common.errors import run_command
from caffe_jacinto.engines.pycaffe.recalibrate import main

if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pycaffe.recalibrate", main))
