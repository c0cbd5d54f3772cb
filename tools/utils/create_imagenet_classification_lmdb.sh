#!/usr/bin/env bash
# Put ImageNet's images (or others laid out the same way) into the two LMDBs that training reads: from the archives as
# downloaded, or unpacked. Edit the settings, or set them from the environment: DATA=/disk/ilsvrc12 SIZE=320 ./tools/...
# After any interruption, start it again: it goes on. What is complete is kept.
#
#   tools/utils/create_imagenet_classification_lmdb.sh [OPTION...]   options go to create_lmdb, for both LMDBs: --fast
set -euo pipefail

#---------------------------------------------------------------------------------------------- settings
DATA="${DATA:-./data/ilsvrc12}"         # holds the archives, or train/<class>/*.JPEG and val/ (with val.txt or classes)
TRAIN_IMAGES="${TRAIN_IMAGES:-}"        # where not said: $DATA/ILSVRC2012_img_train.tar if it is there, else $DATA/train
VAL_IMAGES="${VAL_IMAGES:-}"            # where not said: $DATA/ILSVRC2012_img_val.tar if it is there, else $DATA/val
VAL_LIST="${VAL_LIST:-$DATA/val.txt}"   # lines 'path label', paths from VAL_IMAGES; used where it exists
DEVKIT="${DEVKIT:-$DATA/ILSVRC2012_devkit_t12.tar.gz}" # the validation labels; used where it exists and VAL_LIST does not
TRAIN_LMDB="${TRAIN_LMDB:-./data/ilsvrc12_train_lmdb}"
VAL_LMDB="${VAL_LMDB:-./data/ilsvrc12_val_lmdb}"
SIZE="${SIZE:-256}"                     # pixels: every image is resized to SIZE x SIZE, or to WxH
SEED="${SEED:-33}"                      # of the order of the training images
FORCE="${FORCE:-0}"                     # 1 makes LMDBs again that are there already; else they are kept
#--------------------------------------------------------------------------------------------------------

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
. "$repository/tools/utils/common.sh"
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
python="$(find_python "$repository")"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

# images ARCHIVE FOLDER: prints the archive where it is there, else the folder
images() { if [ -f "$1" ]; then printf '%s\n' "$1"; else printf '%s\n' "$2"; fi; }

existing=--keep
if [ "$FORCE" = 1 ]; then existing=--force; fi

"$python" -m caffe_jacinto.create_lmdb \
    --images "${TRAIN_IMAGES:-$(images "$DATA/ILSVRC2012_img_train.tar" "$DATA/train")}" --output "$TRAIN_LMDB" \
    --size "$SIZE" --shuffle "$SEED" "$existing" "$@"

# The training set's class names give classes the same labels here, bound a list's, and must be the development kit's.
labels=()
if [ -f "$TRAIN_LMDB/labels.txt" ]; then labels=(--labels "$TRAIN_LMDB/labels.txt"); fi
val_images="${VAL_IMAGES:-$(images "$DATA/ILSVRC2012_img_val.tar" "$DATA/val")}"
source=() # none: the validation images lie in class folders
if [ -f "$VAL_LIST" ]; then
    source=(--list "$VAL_LIST")
elif [ -f "$DEVKIT" ] && [ -z "$(find -L "$val_images" -mindepth 1 -maxdepth 1 -type d -print -quit)" ]; then
    source=(--devkit "$DEVKIT")
fi
"$python" -m caffe_jacinto.create_lmdb --images "$val_images" "${source[@]}" "${labels[@]}" \
    --output "$VAL_LMDB" --size "$SIZE" --no-shuffle "$existing" "$@"
