"""Train low-complexity sparse image classifiers as Caffe files."""

import os
import sys

__version__ = "0.1.0"

# A command starts ("-m" until Python has found the module). It may fail when it imports its own modules.
if os.path.basename(sys.argv[0] if sys.argv else "") in ("-m", "caffe-jacinto", "caffe-torch"):  # noqa: PTH119
    from caffe_jacinto.common.dependencies import explain_at_exit

    explain_at_exit()
