#!/usr/bin/env bash
# Makes the LMDBs of Fashion-MNIST for the recipes named fashion: data/fashion_train_lmdb, data/fashion_val_lmdb (training
# images that are held out) and data/fashion_test_lmdb. What is there already is kept.
#
#   tools/utils/fashion_lmdbs.sh [PYTHON]     the set-up (setup.sh --fashion) has installed PYTHON (.venv/bin/python) and the images
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
python=${1:-$root/.venv/bin/python}
cd "$root"
mkdir -p data
size=36 # 32x32 crops of training move by 4

say "Images: data/fashion"
"$python" -m caffe_jacinto.data.fashion --output data/fashion
say "LMDBs: data/fashion_train_lmdb, data/fashion_val_lmdb, data/fashion_test_lmdb"
PYTHON=$python DATA=data/fashion TRAIN_LMDB=data/fashion_train_lmdb VAL_LMDB=data/fashion_val_lmdb SIZE=$size FORCE=0 \
  tools/utils/create_imagenet_classification_lmdb.sh --raw
"$python" -m caffe_jacinto.create_lmdb --images data/fashion/test --list data/fashion/test.txt \
  --labels data/fashion_train_lmdb/labels.txt --output data/fashion_test_lmdb --size $size --raw --keep
