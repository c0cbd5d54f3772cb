#!/usr/bin/env bash
# Tests and times the engine on PyTorch on this machine's GPU, in less than nine minutes. It needs no network where
# PyTorch and the package's other dependencies are installed.
#
#   tools/utils/gpu.sh [RESULTS.json]     default: gpu.json in the working folder
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"

case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ $# -le 1 ] || fail "one argument at most, the file for the results; see --help"
results=$(realpath -m -- "${1:-gpu.json}")
[ -d "$(dirname -- "$results")" ] || fail "$results: its folder does not exist"

python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || fail "there is no python3; install it"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null ||
  fail "$python has no PyTorch that can use a GPU here; tools/utils/setup.sh installs one"

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
say "Testing (one to three minutes)"
tested=passed
"$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" -m gpu tests/test_torch_gpu.py || tested=failed
say "Timing (about five minutes)"
"$python" bench/torch_gpu.py --json "$results"
say "The results are in $results"
[ "$tested" = passed ] || fail "tests failed; see above"
