#!/usr/bin/env bash
# The whole workflow on a small real data set: sets the project up (tools/utils/setup.sh), writes 5,000 handwritten digits
# as JPEG files in ImageNet's layout, makes LMDBs of them, trains a sparse JacintoNet11 through all stages, and reports.
#
#   tools/utils/demo.sh [OPTION...]     options are passed to the training,
#                                       e.g. --set stages.initial.solver.max_iter=300
#   tools/utils/demo.sh --engine torch  trains on PyTorch; the setup then installs that, and builds no Caffe
#
# The run folder is training/digits_jacintonet11_<time>. Times on two cores are in README.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

engine=()
case " $* " in *' --engine torch '* | *' --engine=torch '*) engine=(--torch --no-caffe) ;; esac
"$root/tools/utils/setup.sh" "${engine[@]}"
cd "$root"
mkdir -p data training
python=$root/.venv/bin/python
started=$EPOCHSECONDS

say "1/4 Images: data/digits"
"$python" -m caffe_jacinto.data.digits --output data/digits

say "2/4 LMDBs: data/digits_train_lmdb, data/digits_val_lmdb"
PYTHON=$python DATA=data/digits TRAIN_LMDB=data/digits_train_lmdb VAL_LMDB=data/digits_val_lmdb SIZE=32 FORCE=0 \
  tools/utils/create_imagenet_classification_lmdb.sh

run=training/digits_jacintonet11_$(date +%Y-%m-%d_%H-%M-%S)
say "3/4 Training: $run"
"$python" -m caffe_jacinto.train demo_digits --output "$run" "$@"

say "4/4 Curves: $run/curves.png"
"$python" -m caffe_jacinto.report "$run" --plot "$run/curves.png" >/dev/null # train has printed the tables
say "The demo took $(duration $((EPOCHSECONDS - started)))"
