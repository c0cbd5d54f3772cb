#!/usr/bin/env bash
# Make the training and the validation LMDB of ImageNet, or of other images in the same layout, from the archives as
# downloaded or from unpacked images. Edit the settings below, or set them in the environment:
# DATA=/disk/ilsvrc12 SIZE=320 ./tools/...
# Everything that it needs is looked for before it begins. After an interruption, run it again: it resumes. Complete LMDBs
# are kept.
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

problems=0
problem() { printf '%s: error: %s\n' "${0##*/}" "$1" >&2; problems=$((problems + 1)); }

# is_kept LMDB: whether it is there and stays as it is
is_kept() { [ "$FORCE" != 1 ] && [ -d "$1" ]; }

# check_images WHAT SETTING GIVEN FOUND ARCHIVE FOLDER: the images in FOUND, which is GIVEN in SETTING or one of the others
check_images() {
    if [ -n "$3" ]; then
        [ -e "$3" ] || problem "$1 images: there is no $3, which $2 names"
    elif [ ! -e "$4" ]; then
        problem "$1 images: looked for the archive $5 and for the folder $6, and there is neither: put one there, or set DATA or $2"
    fi
    if [ -d "$4" ] && [ -z "$(find -L "$4" -mindepth 1 -maxdepth 1 ! -name '.*' -print -quit)" ]; then
        problem "$1 images: the folder $4 is empty"
    fi
}

# has_classes IMAGES: whether the folder or archive holds its images in folders, whose names are the classes
has_classes() {
    if [ -d "$1" ]; then
        [ -n "$(find -L "$1" -mindepth 1 -maxdepth 1 -type d -print -quit)" ]
    else
        # the first names in the archive, without a leading "./"; tar ends early, when they have been read
        { tar -tf "$1" 2>/dev/null || true; } | head -n 20 | sed 's|^\./||' | grep -qE '/.|\.tar$'
    fi
}

train_archive=$DATA/ILSVRC2012_img_train.tar val_archive=$DATA/ILSVRC2012_img_val.tar
train_images="${TRAIN_IMAGES:-$(images "$train_archive" "$DATA/train")}"
val_images="${VAL_IMAGES:-$(images "$val_archive" "$DATA/val")}"

is_kept "$TRAIN_LMDB" ||
    check_images training TRAIN_IMAGES "$TRAIN_IMAGES" "$train_images" "$train_archive" "$DATA/train"
source=() from="their class folders" # where the labels of the validation images are from
if ! is_kept "$VAL_LMDB"; then
    check_images validation VAL_IMAGES "$VAL_IMAGES" "$val_images" "$val_archive" "$DATA/val"
    if [ -f "$VAL_LIST" ]; then
        source=(--list "$VAL_LIST") from=$VAL_LIST
    elif [ -e "$val_images" ] && ! has_classes "$val_images"; then
        if [ -f "$DEVKIT" ]; then
            source=(--devkit "$DEVKIT") from=$DEVKIT
        else
            problem "labels of the validation images in $val_images: looked for the development kit $DEVKIT and for the list $VAL_LIST, and there is neither: put one there, or set DEVKIT or VAL_LIST"
        fi
    fi
fi
for lmdb in "$TRAIN_LMDB" "$VAL_LMDB"; do
    [ -d "$(dirname -- "$lmdb")" ] || problem "$lmdb: the folder that it is made in does not exist; make that first"
done
[ "$problems" = 0 ] || exit 2

is_kept "$TRAIN_LMDB" || printf 'training images: %s\n' "$train_images"
is_kept "$VAL_LMDB" || printf 'validation images: %s, labels from %s\n' "$val_images" "$from"

existing=--keep
if [ "$FORCE" = 1 ]; then existing=--force; fi

"$python" -m caffe_jacinto.create_lmdb --images "$train_images" --output "$TRAIN_LMDB" \
    --size "$SIZE" --shuffle "$SEED" "$existing" "$@"

# The training set's class names determine the labels of class folders, limit those of a list, and must match the devkit.
labels=()
if [ -f "$TRAIN_LMDB/labels.txt" ]; then labels=(--labels "$TRAIN_LMDB/labels.txt"); fi
"$python" -m caffe_jacinto.create_lmdb --images "$val_images" "${source[@]}" "${labels[@]}" \
    --output "$VAL_LMDB" --size "$SIZE" --no-shuffle "$existing" "$@"
