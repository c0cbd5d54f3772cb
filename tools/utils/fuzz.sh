#!/usr/bin/env bash
# Sets the project up (tools/utils/setup.sh) and reads 100,000 damaged weight files and prototxts. None may crash the
# program, take more than a second, or need more memory than four times the file plus 100 MB. Takes about 30 minutes.
#
#   tools/utils/fuzz.sh [--files N] [--seed N]     a different seed damages the files differently
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

"$root/tools/utils/setup.sh"
exec "$root/.venv/bin/python" "$root/tests/fuzzing.py" "$@"
