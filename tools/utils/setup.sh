#!/usr/bin/env bash
# Installs what the project needs and is not there yet: system packages, the virtual environment .venv of the
# distribution's Python with this checkout in it, and Caffe. What is there is skipped, so that a second run takes a second.
#
#   tools/utils/setup.sh [--torch]     --torch: PyTorch, too, for the engine that needs no Caffe and for the tests
#
# Runs as root or as a user with sudo (Debian 12, Ubuntu 22.04 and 24.04). Where it may not install system packages it
# lists all that is missing, with the command for it, and ends with an exit code that is not zero.
# A Caffe that is there already is used and none is built: the one of $CAFFE_ROOT, or `caffe` on the PATH.
# It may be interrupted at any moment and run again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$here/steps.sh"
python=/usr/bin/python3
venv=$root/.venv
stamp=$venv/installed.txt # what .venv was installed from; written last, so without it .venv is not whole
extras=pycaffe,demo,dev
torch_version=2.13.0

# own_caffe: prints the Caffe that the user brought along; fails where he brought none
own_caffe() {
  local candidate
  if [ -n "${CAFFE_ROOT:-}" ]; then
    for candidate in "$CAFFE_ROOT"/build/tools/caffe "$CAFFE_ROOT"/build/tools/caffe.bin "$CAFFE_ROOT"/bin/caffe; do
      if [ -x "$candidate" ] && caffe_runs "$candidate"; then echo "$candidate"; return; fi
    done
    fail "CAFFE_ROOT is $CAFFE_ROOT, but there is no caffe that runs in its build/tools/ or bin/: correct it, or unset it to have Caffe built"
  fi
  candidate=$(command -v caffe) && caffe_runs "$candidate" && echo "$candidate"
}

# Whether the Caffe in the prefix is whole, for the distribution's Python (whose version is not known while it is missing).
built_caffe() {
  local prefix
  [ -x "$python" ] || return 1
  prefix=$(default_prefix "$(python_version "$python")")
  [ -f "$prefix/installed.txt" ] && caffe_runs "$prefix/bin/caffe" && echo "$prefix/bin/caffe"
}

# The command that makes a program run as root here; fails where none does.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    env DEBIAN_FRONTEND=noninteractive "$@"
  elif sudo -n true 2>/dev/null; then
    sudo -n env DEBIAN_FRONTEND=noninteractive "$@"
  else
    sudo env DEBIAN_FRONTEND=noninteractive "$@" # asks for the password, on the terminal
  fi
}
may_be_root() {
  [ "$(id -u)" = 0 ] && return
  command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && [ -t 2 ]; }; }
}

install_packages() {
  local names=("$@")
  if ! command -v apt-get >/dev/null; then
    fail "this system has no apt-get, so its packages cannot be installed from here. Missing, by Debian's names:
    ${names[*]}
Install what your distribution calls these, and run this again. (Tried on Debian 12 only.)"
  fi
  if ! may_be_root; then
    fail "system packages are missing, and this account may not install them (it is not root, and sudo would ask for a password that cannot be typed here or is not there). Ask an administrator to run:
    apt-get update && apt-get install -y --no-install-recommends ${names[*]}
and run this again: all the rest (Python packages, Caffe) needs no rights."
  fi
  local log line phase='' started
  log=$(mktemp)
  say "System packages: installing ${#names[@]} that are missing (about 2 min if Caffe is to be built): ${names[*]}"
  as_root dpkg --configure -a >"$log" 2>&1 || true # finishes what an interrupted installation left
  as_root apt-get -q -o DPkg::Lock::Timeout=600 update >>"$log" 2>&1 || package_failure "apt-get update" "$log"
  # on its status lines: dlstatus while downloading, pmstatus while unpacking; both end at 100
  set +e
  as_root apt-get -q -y -o DPkg::Lock::Timeout=600 -o APT::Status-Fd=1 install --no-install-recommends "${names[@]}" 2>&1 </dev/null |
    while IFS= read -r line; do
      case $line in
        dlstatus:* | pmstatus:*) # phase, package, percentage with decimals, text
          [ "$phase" = "${line%%:*}" ] || { phase=${line%%:*} started=$EPOCHSECONDS; }
          [[ $line =~ ^..status:[^:]*:([^:]*:)?([0-9]+)\.[0-9]+: ]] && progress "$(phase_name "$phase")" "${BASH_REMATCH[2]}" 100 "$started" ;;
        *) printf '%s\n' "$line" >>"$log" ;;
      esac
    done
  local status=${PIPESTATUS[0]}
  set -e
  end_progress
  [ "$status" = 0 ] || package_failure "apt-get install" "$log"
  rm -f "$log"
}
phase_name() { if [ "$1" = dlstatus ]; then echo "downloading"; else echo "installing"; fi; }
package_failure() {
  tail -n 15 "$2" >&2
  fail "$1 failed; all that it printed is in $2"
}

# What .venv has to be installed from: these files, that Python, this place.
venv_state() {
  echo "$root $extras $("$python" --version)"
  cd "$root" && sha256sum setup.py pyproject.toml
}

install_venv() {
  local state started=$EPOCHSECONDS
  state=$(venv_state)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -x "$venv/bin/python" ]; then return; fi
  mkdir -p "$venv"
  if [ -n "$(ls -A "$venv")" ] && [ ! -f "$venv/.made-by-setup" ]; then
    fail "$venv exists and was not made by this script: move it away, and run this again"
  fi
  say "Python packages: into $venv (about 1 min)"
  local log=$venv/install.log
  if [ ! -f "$stamp" ] || [ "$("$venv/bin/python" --version 2>/dev/null)" != "$("$python" --version)" ]; then
    : >"$venv/.made-by-setup"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .made-by-setup -exec rm -rf {} + # half made, or of another Python
    "$python" -m venv "$venv" >"$log" 2>&1 || venv_failure "making $venv" "$log"
  fi
  rm -f "$stamp"
  pip_install "$log" -e "${root}[$extras]"
  sync -f "$venv"
  printf '%s\n' "$state" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  say "  done in $(duration $((EPOCHSECONDS - started)))"
}

# Any PyTorch that is there already is used. pip writes a package's RECORD last, and PyTorch after what it needs.
install_torch() {
  local started=$EPOCHSECONDS
  if compgen -G "$venv/lib/python3*/site-packages/torch-*.dist-info/RECORD" >/dev/null; then return; fi
  say "PyTorch $torch_version: into $venv (a build for the CPU is 200 MB and takes about 1 min; where pip finds the one for"
  say "  NVIDIA GPUs, that is several GB, as long as they take to load. To choose, see docs/torch.md.)"
  pip_install "$venv/install-torch.log" "torch==$torch_version"
  sync -f "$venv"
  say "  done in $(duration $((EPOCHSECONDS - started)))"
}

# pip_install LOG ARGUMENT...: pip install with these arguments, telling how far it is
pip_install() {
  local log=$1 count=0 line
  shift
  : >"$log"
  set +e
  "$venv/bin/python" -m pip install --progress-bar off "$@" 2>&1 </dev/null |
    while IFS= read -r line; do
      printf '%s\n' "$line" >>"$log"
      case $line in
        Collecting*) count=$((count + 1)); tell_package "$count" "$line" ;;
        *Downloading*\ [MG]B\)) end_progress; say "  loading ${line##*Downloading }" ;;
        Installing\ collected*) end_progress; say "  unpacking $count packages" ;;
      esac
    done
  local status=${PIPESTATUS[0]}
  set -e
  end_progress
  [ "$status" = 0 ] || venv_failure "pip install" "$log"
}
tell_package() {
  local name=${2#Collecting }
  if [ -t 1 ]; then
    printf '\r\033[K  %d: %s' "$1" "${name%% *}"
  elif [ $(($1 % 10)) = 0 ]; then
    say "  $1 packages found"
  fi
}
venv_failure() {
  tail -n 15 "$2" >&2
  fail "$1 failed; all that it printed is in $2"
}

with_torch=no
case ${1:-} in
  '') ;;
  --torch) with_torch=yes ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) fail "unknown argument '$1'; --help tells more" ;;
esac
began=$EPOCHSECONDS
caffe=$(own_caffe) || { [ -z "${CAFFE_ROOT:-}" ] || exit 1; caffe=$(built_caffe) || caffe=''; }
wanted=("${python_packages[@]}")
[ -n "$caffe" ] || wanted+=("${caffe_packages[@]}")
mapfile -t missing < <(missing_packages "${wanted[@]}")
[ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"

exec 9<"$root" # one at a time in this checkout
if ! flock -n 9; then
  say "Another setup is at work in $root: waiting for it"
  flock 9
fi
install_venv
[ "$with_torch" = no ] || install_torch
if [ -z "$caffe" ]; then
  "$here/install_caffe.sh" --python "$venv/bin/python" 9<&-
  caffe=$(built_caffe)
fi
say "Set-up is complete ($(duration $((EPOCHSECONDS - began)))). Caffe: $caffe"
