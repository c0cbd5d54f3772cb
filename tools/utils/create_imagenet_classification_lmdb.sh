#!/usr/bin/env bash
# Put ImageNet's images (or others laid out the same way) into the two LMDBs that training reads.
# Edit the settings, or set them from the environment: DATA=/disk/ilsvrc12 SIZE=320 ./tools/utils/...
set -euo pipefail

#---------------------------------------------------------------------------------------------- settings
DATA="${DATA:-./data/ilsvrc12}"         # holds train/<class>/*.JPEG, and val/ with val.txt or val/<class>/*.JPEG
TRAIN_LMDB="${TRAIN_LMDB:-./data/ilsvrc12_train_lmdb}"
VAL_LMDB="${VAL_LMDB:-./data/ilsvrc12_val_lmdb}"
VAL_LIST="${VAL_LIST:-$DATA/val.txt}"   # lines 'path label', paths from $DATA/val; used where it exists
SIZE="${SIZE:-256}"                     # pixels: every image is resized to SIZE x SIZE, or to WxH
SEED="${SEED:-33}"                      # of the order of the training images
FORCE="${FORCE:-0}"                     # 1 makes LMDBs again that are there already; else they are kept
#--------------------------------------------------------------------------------------------------------

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
. "$repository/tools/utils/common.sh"
python="$(find_python "$repository")"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

existing=--keep
if [ "$FORCE" = 1 ]; then existing=--force; fi

"$python" -m caffe_jacinto.create_lmdb --images "$DATA/train" --output "$TRAIN_LMDB" \
    --size "$SIZE" --shuffle "$SEED" "$existing"

# The training set's class names give class folders the same labels here, and bound a list's.
labels=()
if [ -f "$TRAIN_LMDB/labels.txt" ]; then labels=(--labels "$TRAIN_LMDB/labels.txt"); fi
list=()
if [ -f "$VAL_LIST" ]; then list=(--list "$VAL_LIST"); fi
"$python" -m caffe_jacinto.create_lmdb --images "$DATA/val" "${list[@]}" "${labels[@]}" \
    --output "$VAL_LMDB" --size "$SIZE" --no-shuffle "$existing"
