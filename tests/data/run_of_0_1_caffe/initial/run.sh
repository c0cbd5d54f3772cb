#!/bin/sh
# The commands of this stage, as caffe_jacinto.train runs them. By hand: sh run.sh
set -eu
cd -- @START@
lock=training/old/lock
log=training/old/initial/run.log
export GLOG_logtostderr=1
export GLOG_minloglevel=0
export PYTHONUNBUFFERED=1
PYTHONPATH=@PROGRAM@${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

# One trainer per run: the lock is held by what is started below for as long as it lives.
exec 9>>"$lock"
if command -v flock >/dev/null && ! flock -n 9; then
    echo "run.sh: something is training in this run already (lock: $lock)" >&2
    exit 1
fi
echo "output goes to $log" >&2
exec >>"$log" 2>&1

@CAFFE@ train -solver training/old/initial/solver.prototxt
@PYTHON@ -m caffe_jacinto.engines.reestimate -pycaffe @PYCAFFE@ -solver training/old/initial/solver.prototxt -weights training/old/initial/digits_jacintonet11_iter_20.caffemodel -batches 2
