#!/usr/bin/env bash
# Make the training and the validation LMDB of ImageNet, or of other images in the same layout, from the archives as
# downloaded or from unpacked images. Edit the settings below, or set them in the environment:
# DATA=/disk/ilsvrc12 SIZE=320 ./tools/...
# After an interruption, run it again: it resumes. Complete LMDBs are kept.
#
#   tools/utils/create_imagenet_classification_lmdb.sh [OPTION...]   options are passed to create_lmdb for both: --fast
set -euo pipefail

#---------------------------------------------------------------------------------------------- settings
DATA="${DATA:-./data/ilsvrc12}"         # holds the archives, or train/<class>/*.JPEG and val/ (with val.txt or classes)
TRAIN_IMAGES="${TRAIN_IMAGES:-}"        # default: $DATA/ILSVRC2012_img_train.tar if it exists, else $DATA/train
VAL_IMAGES="${VAL_IMAGES:-}"            # default: $DATA/ILSVRC2012_img_val.tar if it exists, else $DATA/val
VAL_LIST="${VAL_LIST:-$DATA/val.txt}"   # lines 'path label', paths relative to VAL_IMAGES; used if it exists
DEVKIT="${DEVKIT:-$DATA/ILSVRC2012_devkit_t12.tar.gz}" # the validation labels; used if it exists and VAL_LIST does not
TRAIN_LMDB="${TRAIN_LMDB:-./data/ilsvrc12_train_lmdb}"
VAL_LMDB="${VAL_LMDB:-./data/ilsvrc12_val_lmdb}"
SIZE="${SIZE:-256}"                     # pixels: every image is resized to SIZE x SIZE, or to WxH
SEED="${SEED:-33}"                      # seed of the random order of the training images
FORCE="${FORCE:-0}"                     # 1 remakes existing LMDBs; otherwise they are kept
#--------------------------------------------------------------------------------------------------------

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
. "$repository/tools/utils/common.sh"
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
python="$(find_python "$repository")"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

# images ARCHIVE FOLDER: prints the archive if it exists, else the folder
images() { if [ -f "$1" ]; then printf '%s\n' "$1"; else printf '%s\n' "$2"; fi; }

existing=--keep
if [ "$FORCE" = 1 ]; then existing=--force; fi

"$python" -m caffe_jacinto.create_lmdb \
    --images "${TRAIN_IMAGES:-$(images "$DATA/ILSVRC2012_img_train.tar" "$DATA/train")}" --output "$TRAIN_LMDB" \
    --size "$SIZE" --shuffle "$SEED" "$existing" "$@"

# The training set's class names determine the labels of class folders, limit those of a list, and must match the devkit.
labels=()
if [ -f "$TRAIN_LMDB/labels.txt" ]; then labels=(--labels "$TRAIN_LMDB/labels.txt"); fi
val_images="${VAL_IMAGES:-$(images "$DATA/ILSVRC2012_img_val.tar" "$DATA/val")}"
source=() # empty: the validation images are in class folders
if [ -f "$VAL_LIST" ]; then
    source=(--list "$VAL_LIST")
elif [ -f "$DEVKIT" ] && [ -z "$(find -L "$val_images" -mindepth 1 -maxdepth 1 -type d -print -quit)" ]; then
    source=(--devkit "$DEVKIT")
fi
"$python" -m caffe_jacinto.create_lmdb --images "$val_images" "${source[@]}" "${labels[@]}" \
    --output "$VAL_LMDB" --size "$SIZE" --no-shuffle "$existing" "$@"
