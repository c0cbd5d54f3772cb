#!/usr/bin/env bash
# Sets the project up (tools/utils/setup.sh), then disturbs real trainings and commands and checks that nothing is lost:
# kills at every moment, storms of signals, a small disk that fills, damaged and exchanged files, hostile logs, archives
# and images. Every training is resumed to its end and compared with one that was left alone (docs/reliability.md).
#
#   tools/utils/faults.sh [--minutes N] [--seed S] [--only CASE] [--jobs N] [--folder DIR]
#
# Without --minutes, 10 minutes. A case that fails keeps its folder, and the command that repeats it is printed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

"$root/tools/utils/setup.sh" --torch
cd "$root"
export PYTHONPATH="$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -m faults "$@"
