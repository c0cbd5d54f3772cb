#!/usr/bin/env bash
# Tests and times the engine on PyTorch on this machine's GPU, in nine minutes at most. It needs no network where
# PyTorch and the package's other dependencies are installed. It ends with a table and a JSON file, which also has the
# outcome of the tests; the exit code is 0 only if no test and no measurement failed. What did not fit into the time is
# named.
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
[ ! -d "$results" ] || fail "$results is a folder; name a file in it"
SECONDS=0
whole=525 tests=170 # seconds since the start, at which all has ended, and that the tests may take

cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset REHEARSE_GPU_TESTS

# complaint PYTHON: prints what PYTHON lacks of what is needed here, and how to install it, on one line; nothing where it
# lacks nothing
complaint() {
  local lacking
  lacking=$(timeout -k 5 120 "$1" - 2>/dev/null <<'PYTHON'
import importlib

needed = {
    "torch": "torch", "numpy": "numpy", "lmdb": "lmdb", "pydantic": "pydantic", "cv2": "opencv-python-headless",
    "jinja2": "jinja2", "google.protobuf": "protobuf", "pytest": "pytest", "hypothesis": "hypothesis",
}
missing = []
for module, package in needed.items():
    try:
        importlib.import_module(module)
    except Exception:
        missing.append(package)
print(*missing)
if "torch" not in missing:
    import re

    import torch

    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        print("PyTorch 2.11 or newer, it has", torch.__version__)
    elif not torch.cuda.is_available():
        print("a PyTorch that can use a GPU here, it has", torch.__version__)
PYTHON
  ) || { echo "$1 does not start, or does not import PyTorch within two minutes"; return; }
  local packages=${lacking%%$'\n'*} torch=
  [ "$packages" = "$lacking" ] || torch=${lacking#*$'\n'}
  [ -z "$packages" ] || printf '%s lacks %s: %s -m pip install %s' "$1" "${packages// /, }" "$1" "$packages"
  [ -z "$packages" ] || [ -z "$torch" ] || printf '; '
  [ -z "$torch" ] || printf '%s lacks %s: tools/utils/setup.sh --torch installs one' "$1" "$torch"
}

candidates=()
[ ! -x "$root/.venv/bin/python" ] || candidates+=("$root/.venv/bin/python")
[ -z "$(command -v python3)" ] || candidates+=("$(command -v python3)")
[ ${#candidates[@]} -gt 0 ] || fail "there is no python3; install it"
python='' complaints=
for candidate in "${candidates[@]}"; do
  found=$(complaint "$candidate")
  [ -n "$found" ] || { python=$candidate; break; }
  complaints="${complaints:+$complaints; or }$found"
done
[ -n "$python" ] || fail "$complaints"
[ -z "$complaints" ] || say "Using $python: $complaints"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f -- "$results"
failed=()
say "Testing (three minutes at most)"
timeout --foreground -k 10 $((tests + 15)) "$python" tests/gpu_session.py --limit "$tests" --outcomes "$work/tests.json" ||
  failed+=(tests)
[ -s "$work/tests.json" ] ||
  echo '{"good": false, "summary": "they did not come to an end", "failures": []}' >"$work/tests.json"
left=$((whole - SECONDS))
say "Timing ($((left / 60)) minutes at most)"
timeout --foreground -k 10 "$left" "$python" bench/torch_gpu.py --limit $((left - 15)) --tests "$work/tests.json" \
  --json "$results" || failed+=(measurements)
[ -s "$results" ] || printf '{"complete": false, "rows": [], "tests": %s}\n' "$(cat "$work/tests.json")" >"$results"
say "The results are in $results ($(duration "$SECONDS"))"
[ ${#failed[@]} = 0 ] || fail "failed: ${failed[*]}; see above"
