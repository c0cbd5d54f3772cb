#!/usr/bin/env bash
# The whole workflow on a small real data set: sets the project up (tools/utils/setup.sh), writes 5,000 handwritten digits
# as JPEG files in ImageNet's layout, makes LMDBs of them, trains a sparse JacintoNet11 through all stages, and reports.
#
#   tools/utils/demo.sh [OPTION...]     options are passed to the training,
#                                       e.g. --set stages.initial.solver.max_iter=300
#   tools/utils/demo.sh --engine torch  trains on PyTorch; the setup then installs that, and builds no Caffe
#   tools/utils/demo.sh fashion [OPTION...]
#                                       on the 70,000 images of Fashion-MNIST, which a package of Debian holds, and for
#                                       longer: on two cores use --engine torch. The test images are looked at once, at
#                                       the end
#
# The run folder is training/<data set>_jacintonet11_<time>. Times on two cores are in README.md and data/README.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

set_name=digits recipe=demo_digits steps=3
case ${1:-} in
  digits) shift ;;
  fashion) set_name=fashion recipe=fashion_jacintonet11 steps=4 && shift ;;
  '' | -*) ;;
  *) fail "unknown data set '$1'; there are digits and fashion; see --help" ;;
esac

engine=()
case " $* " in *' --engine torch '* | *' --engine=torch '*) engine=(--torch --no-caffe) ;; esac
[ "$set_name" = digits ] || engine+=(--fashion)
"$root/tools/utils/setup.sh" "${engine[@]}"
cd "$root"
mkdir -p data training
python=$root/.venv/bin/python
started=$EPOCHSECONDS

data=data/$set_name
say "1/$steps Images and LMDBs: $data"
if [ "$set_name" = fashion ]; then
  tools/utils/fashion_lmdbs.sh "$python"
else
  "$python" -m caffe_jacinto.data.digits --output "$data"
  PYTHON=$python DATA=$data TRAIN_LMDB=${data}_train_lmdb VAL_LMDB=${data}_val_lmdb SIZE=32 FORCE=0 \
    tools/utils/create_imagenet_classification_lmdb.sh
fi

run=training/${set_name}_jacintonet11_$(date +%Y-%m-%d_%H-%M-%S)
say "2/$steps Training: $run"
"$python" -m caffe_jacinto.train "$recipe" --output "$run" "$@"

say "3/$steps Curves: $run/curves.png"
"$python" -m caffe_jacinto.report "$run" --plot "$run/curves.png" >/dev/null # train has printed the tables

if [ "$set_name" = fashion ]; then
  say "4/$steps Test images: ${data}_test_lmdb"
  "$python" -m caffe_jacinto.classify "$run" -- "${data}_test_lmdb"
fi
say "The demo took $(duration $((EPOCHSECONDS - started)))"
