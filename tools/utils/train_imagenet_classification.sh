#!/usr/bin/env bash
# Train a sparse JacintoNet11 on ImageNet: initial, l1reg, sparse, finetune, then the test, in 8 bits too, and the table.
# recipe=imagenet_resnet10 and the like train the other published networks (docs/recipes.md).
# Edit the settings below, or set them in the environment: gpus=0 batch_size=128 ./tools/utils/...
# Arguments are passed to train, e.g. --dry-run, --output training/mine, --set stages.initial.solver.max_iter=1000.
set -euo pipefail

#---------------------------------------------------------------------------------------------- settings
gpus="${gpus-auto}"                     # auto: all GPUs of this machine, or the CPU if it has none; 0,1: these; "": the CPU
engine="${engine:-}"                    # bvlc, caffe-jacinto or torch; default: the first that can use the GPUs (docs/caffe.md)
batch_size="${batch_size:-}"            # images per update of the weights, over all GPUs and passes
iter_size="${iter_size:-}"              # passes per update: more passes need less memory
                                        # (both default to the recipe's; 256 and 2 for JacintoNet11, as published)
DATA="${DATA:-./data}"                  # the folder that holds the two LMDBs
TRAIN_LMDB="${TRAIN_LMDB:-$DATA/ilsvrc12_train_lmdb}"
VAL_LMDB="${VAL_LMDB:-$DATA/ilsvrc12_val_lmdb}"
recipe="${recipe:-imagenet_jacintonet11}" # the name of a built-in recipe, or the path of a .toml file
caffe="${caffe:-}"                      # the caffe executable or its tree; default: $CAFFE_ROOT, PATH, the installed one
#--------------------------------------------------------------------------------------------------------

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
. "$repository/tools/utils/common.sh"
python="$(find_python "$repository")"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

given=()
if [ -n "$engine" ]; then given+=(--engine "$engine"); fi
if [ -n "$caffe" ]; then given+=(--caffe "$caffe"); fi
if [ -n "$batch_size" ]; then given+=(--batch-size "$batch_size"); fi
if [ -n "$iter_size" ]; then given+=(--iter-size "$iter_size"); fi
exec "$python" -m caffe_jacinto.train "$recipe" "${given[@]}" --gpus "$gpus" \
    --train-lmdb "$TRAIN_LMDB" --val-lmdb "$VAL_LMDB" "$@"
