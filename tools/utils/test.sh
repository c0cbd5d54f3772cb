#!/usr/bin/env bash
# Sets the project up (tools/utils/setup.sh) and runs every check: formatting, lint, types, and all tests, including those
# with real Caffe, and a few minutes of tools/utils/faults.sh. Every check runs even if another fails; the exit code is
# nonzero if any fails.
#
#   tools/utils/test.sh [--fast]     --fast: skip faults.sh and the tests marked `caffe`
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$root/tools/utils/steps.sh"

tests=() needed=(--tests) estimate="about an hour on two cores"
case ${1:-} in
  '') ;;
  --fast) tests=(-m 'not caffe') needed=() estimate="about 1 min" ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) fail "unknown argument '$1'; see --help" ;;
esac
"$root/tools/utils/setup.sh" --torch "${needed[@]}"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

say "Running every check ($estimate)"
failed=()
check() { # check NAME COMMAND...
  local name=$1 started=$EPOCHSECONDS
  shift
  say "== $name: $*"
  if "$@"; then say "   passed in $(duration $((EPOCHSECONDS - started)))"; else failed+=("$name"); fi
}
check formatting ruff format --check .
check lint ruff check .
check types mypy
check tests python -m pytest --durations=5 "${tests[@]}"
[ "${1:-}" = --fast ] || check faults env PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}" \
  python -m faults --seed 1 --minutes 2 # what has begun by then is brought to its end

[ ${#failed[@]} = 0 ] || fail "failed: ${failed[*]}"
say "All checks passed"
