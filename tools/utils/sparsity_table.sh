#!/usr/bin/env bash
# The published comparison of ways to sparsity, on Fashion-MNIST: trains the recipe fashion_sparsity_table on PyTorch with
# each seed, and prints mean and spread of dense, by layer, by channel, by channel after one more round of L1, and two ways
# of ours, each in float and in 8 bits. Sets the project up first. Stopped and started again, it goes on where it was.
#
#   tools/utils/sparsity_table.sh [--held-out] [--seeds 1,2,3] [OPTION...]
#
# Accuracies are those of the 10,000 test images; with --held-out, of the training images that are held out: compare
# settings by these. OPTIONs go to each training that begins, e.g. --precision bf16 or --set KEY=VALUE. The run folders are
# training/sparsity_table/ (with --held-out, training/sparsity_table_held_out/): table.md there is the table.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"

seeds=1,2,3 images=test folder=training/sparsity_table options=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --held-out) images=val folder=training/sparsity_table_held_out ;;
    --seeds) seeds=${2:-} && shift ;;
    --seeds=*) seeds=${1#*=} ;;
    *) options+=("$1") ;;
  esac
  [ $# -eq 0 ] || shift
done
[[ $seeds =~ ^[0-9]{1,9}(,[0-9]{1,9})*$ ]] || fail "--seeds '$seeds': give numbers with commas between them, like 1,2,3"

"$root/tools/utils/setup.sh" --torch --no-caffe --fashion
cd "$root"
python=$root/.venv/bin/python
tools/utils/fashion_lmdbs.sh "$python"
mkdir -p "$folder"

for seed in ${seeds//,/ }; do
  run=$folder/fashion-seed$seed
  say "Seed $seed: $run"
  if [ -e "$run/run.json" ]; then
    "$python" -m caffe_jacinto.train --resume "$run"
  else
    "$python" -m caffe_jacinto.train fashion_sparsity_table --engine torch --output "$run" "${options[@]}" \
      --set "training.random_seed=$seed" --set "data.val_lmdb=data/fashion_${images}_lmdb"
  fi
done

"$python" -m caffe_jacinto.report "$folder" --seeds --format markdown >"$folder/table.md.new"
mv "$folder/table.md.new" "$folder/table.md"
"$python" -m caffe_jacinto.report "$folder" --seeds
say "The table: $folder/table.md"
