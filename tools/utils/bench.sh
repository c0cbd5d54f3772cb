#!/usr/bin/env bash
# Sets the project up (tools/utils/setup.sh) and runs the benchmarks in bench/, whose tables are in docs/benchmarks.md.
# Each benchmark prints its results and exits with a nonzero code if a limit is broken; so does this script.
# These are run separately: bench/same_results.py, which compares two revisions; bench/scale.py, which needs figures;
# bench/torch_gpu.py; and bench/learned_threshold.py, which needs trained weights.
#
#   tools/utils/bench.sh [NAME...]     NAME: run only bench/NAME.py
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

benches=()
for name in "$@"; do
  [ -f "$root/bench/$name.py" ] || fail "there is no bench/$name.py"
  benches+=("$root/bench/$name.py")
done
[ ${#benches[@]} -gt 0 ] || for bench in "$root"/bench/*.py; do
  case ${bench##*/} in same_results.py | scale.py | torch_gpu.py | learned_threshold.py) ;; *) benches+=("$bench") ;; esac
done

"$root/tools/utils/setup.sh" --torch
cd "$root"
failed=()
for bench in "${benches[@]}"; do
  say "== ${bench#"$root"/}"
  "$root/.venv/bin/python" "$bench" || failed+=("${bench#"$root"/}")
done
[ ${#failed[@]} = 0 ] || fail "failed, or broke a limit: ${failed[*]}"
