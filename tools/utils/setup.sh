#!/usr/bin/env bash
# Installs what the project needs: system packages, the virtual environment .venv of the distribution's Python with this
# checkout in it, and Caffe. Whatever is already installed is skipped, so a second run takes a second.
#
#   tools/utils/setup.sh [--torch|--no-torch] [--no-caffe] [--tests] [--fashion]
#
# --torch: also PyTorch, for the engine that needs no Caffe and for the tests. On a machine with an NVIDIA or AMD GPU,
# PyTorch is installed without being asked for, in the build for that GPU, unless --no-torch forbids it. A PyTorch that
# this Python, or the `python3` on the PATH, already has is kept: a distribution's, a container's.
# --tests: also Slurm, whose daemons the tests start and end by themselves, and Chromium (113 MB to download, 411 MB
# installed), which shows them the pages of `report --html`. Ubuntu has no such package: install Google Chrome there.
# --fashion: also the images of Fashion-MNIST (31 MB to download), for tools/utils/demo.sh fashion; --tests installs them, too.
# --no-caffe: builds no Caffe and installs none of the packages that its build needs. With --torch, PyTorch trains.
# Run it as root or as a user with sudo (Debian 12, Ubuntu 22.04 and 24.04). If it may not install system packages, it
# lists the missing ones with the command to install them, and exits with a nonzero code.
# An existing Caffe is used instead of building one: $CAFFE_ROOT, or `caffe` on the PATH.
# You may interrupt it at any time and run it again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=tools/utils/steps.sh
. "$here/steps.sh"
own_python=/usr/bin/python3 # the distribution's
python=$own_python
venv=$root/.venv
stamp=$venv/installed.txt # what .venv was installed from; written last, so without it .venv is incomplete
extras=pycaffe,demo,dev

# own_caffe: prints the user's own Caffe; fails if there is none
own_caffe() {
  local candidate
  if [ -n "${CAFFE_ROOT:-}" ]; then
    for candidate in "$CAFFE_ROOT"/build/tools/caffe "$CAFFE_ROOT"/build/tools/caffe.bin "$CAFFE_ROOT"/bin/caffe; do
      if [ -x "$candidate" ] && caffe_runs "$candidate"; then echo "$candidate"; return; fi
    done
    fail "CAFFE_ROOT is $CAFFE_ROOT, but no caffe in its build/tools/ or bin/ runs: correct it, or unset it to have Caffe built"
  fi
  candidate=$(command -v caffe) && caffe_runs "$candidate" && echo "$candidate"
}

# Prints the Caffe in the prefix for the distribution's Python; fails if Python or a complete Caffe of today's build is
# missing.
built_caffe() {
  local prefix
  [ -x "$python" ] || return 1
  prefix=$(default_prefix "$(python_version "$python")")
  caffe_is_installed "$prefix" && echo "$prefix/bin/caffe"
}

# as_root COMMAND...: runs it as root
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
    fail "this system has no apt-get, so this script cannot install packages. Missing, by their Debian names:
    ${names[*]}
Install your distribution's equivalents, and run this again. (Tested on Debian 12 only.)"
  fi
  if ! may_be_root; then
    fail "system packages are missing, and this account may not install them (it is not root, and sudo is missing or needs a password, which cannot be typed here). Ask an administrator to run:
    apt-get update && apt-get install -y --no-install-recommends ${names[*]}
and run this again: the rest (Python packages, Caffe) needs no privileges."
  fi
  local log line phase='' started
  log=$(mktemp)
  say "System packages: installing ${#names[@]} missing ones (about 2 min if Caffe is to be built): ${names[*]}"
  as_root dpkg --configure -a >"$log" 2>&1 || true # completes an interrupted installation
  as_root apt-get -q -o DPkg::Lock::Timeout=600 update >>"$log" 2>&1 || package_failure "apt-get update" "$log"
  # its status lines: dlstatus while downloading, pmstatus while unpacking; both end at 100
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
# Whether a compiler is worth installing: PyTorch is to train on the CPU, where engines/pytorch/cpu_kernels.cpp makes it
# faster. It trains without one, so that nothing fails where none can be installed.
wants_compiler() {
  [ "$with_torch" = yes ] && [ "$gpus" = no ] && [ "$python" = "$own_python" ] || return 1
  ! command -v c++ g++ clang++ >/dev/null && command -v apt-get >/dev/null && may_be_root
}
package_failure() {
  tail -n 15 "$2" >&2
  fail "$1 failed; its full output is in $2"
}

# What .venv must be installed from: these files, this Python, this folder.
venv_state() {
  echo "$root $extras $("$python" --version)"
  cd "$root" && sha256sum setup.py pyproject.toml
}

install_venv() {
  local state started=$EPOCHSECONDS
  state=$(venv_state)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -x "$venv/bin/python" ] && venv_shares_enough; then return; fi
  mkdir -p "$venv"
  if [ -n "$(ls -A "$venv")" ] && [ ! -f "$venv/.made-by-setup" ]; then
    fail "$venv exists and was not made by this script: move it away, and run this again"
  fi
  say "Python packages: into $venv (about 1 min)"
  local log=$venv/install.log
  if [ ! -f "$stamp" ] || [ "$("$venv/bin/python" --version 2>/dev/null)" != "$("$python" --version)" ] ||
    ! venv_shares_enough; then
    : >"$venv/.made-by-setup"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .made-by-setup -exec rm -rf {} + # incomplete, or of another Python
    local sharing=()
    [ "$keep_torch" = no ] || sharing=(--system-site-packages)
    "$python" -m venv "${sharing[@]}" "$venv" >"$log" 2>&1 || venv_failure "making $venv" "$log"
  fi
  rm -f "$stamp"
  pip_install "$log" -e "${root}[$extras]"
  sync -f "$venv"
  printf '%s\n' "$state" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  say "  done in $(duration $((EPOCHSECONDS - started)))"
}

# Looks for GPUs, and for a PyTorch to keep. Sets gpus, with_torch, keep_torch, kept and python.
look_around() {
  local seen candidate
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is $("$python" --version), and this project needs Python 3.10: use a newer distribution"
  if seen=$(ask "$python" engines.gpus); then gpus=yes; fi
  if [ "$gpus" = yes ] || [[ $seen == *note:* ]]; then say "$seen"; fi
  if [ "$with_torch" = auto ]; then with_torch=$gpus; fi
  if [ "$with_torch" = no ] || venv_torch; then return; fi
  for candidate in "$python" "$(command -v python3 || true)"; do
    if has_torch "$candidate" && ! is_venv "$candidate" && seen=$(ask "$candidate" engines.pytorch.builds installed); then
      python=$candidate keep_torch=yes kept=$seen
      return
    fi
  done
}
# ask PYTHON MODULE [ARGUMENT...]: what a module of this project that needs no other package answers
ask() { (cd "$root" && "$1" -m "caffe_jacinto.$2" "${@:3}"); }
is_venv() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; } # its packages are not passed on
has_torch() { [ -x "$1" ] && "$1" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)'; }
# pip writes a package's RECORD last, and installs PyTorch after its dependencies.
venv_torch() { compgen -G "$venv/lib/python3*/site-packages/torch-*.dist-info/RECORD" >/dev/null; }
# Whether .venv sees the packages of the Python that it is made of, if PyTorch is one of them.
venv_shares_enough() {
  [ "$keep_torch" = no ] || grep -q '^include-system-site-packages = true' "$venv/pyvenv.cfg"
}

install_torch() {
  local started=$EPOCHSECONDS choice arguments
  if [ "$keep_torch" = yes ] && has_torch "$venv/bin/python"; then
    say "PyTorch of $python is kept: $kept"
    return
  fi
  if venv_torch; then
    [ "$gpus" = no ] || say "PyTorch in $venv is kept: $(ask "$venv/bin/python" engines.pytorch.builds installed 2>&1)"
    return
  fi
  choice=$(ask "$venv/bin/python" engines.pytorch.builds) || exit 1
  say "${choice%%$'\n'*}, into $venv"
  say "  (a build for the CPU is 200 MB and takes about 1 min; one for GPUs is several GB, and takes as long as the download)"
  arguments=$(ask "$venv/bin/python" engines.pytorch.builds pip) || exit 1
  mapfile -t arguments <<<"$arguments"
  pip_install "$venv/install-torch.log" "${arguments[@]}"
  sync -f "$venv"
  say "  $(ask "$venv/bin/python" engines.pytorch.builds installed 2>&1)"
  say "  done in $(duration $((EPOCHSECONDS - started)))"
}

# pip_install LOG ARGUMENT...: pip install with these arguments, showing progress
pip_install() {
  local log=$1 count=0 line
  shift
  : >"$log"
  set +e
  "$venv/bin/python" -m pip install --progress-bar off "$@" 2>&1 </dev/null |
    while IFS= read -r line; do
      printf '%s\n' "$line" >>"$log"
      case $line in
        Collecting*) count=$((count + 1)); show_package "$count" "$line" ;;
        *Downloading*\ [MG]B\)) end_progress; say "  downloading ${line##*Downloading }" ;;
        Installing\ collected*) end_progress; say "  unpacking $count packages" ;;
      esac
    done
  local status=${PIPESTATUS[0]}
  set -e
  end_progress
  [ "$status" = 0 ] || venv_failure "pip install" "$log"
}
show_package() {
  local name=${2#Collecting }
  if [ -t 1 ]; then
    printf '\r\033[K  %d: %s' "$1" "${name%% *}"
  elif [ $(($1 % 10)) = 0 ]; then
    say "  $1 packages found"
  fi
}
venv_failure() {
  tail -n 15 "$2" >&2
  fail "$1 failed; its full output is in $2"
}

with_torch=auto with_tests=no with_fashion=no build_caffe=yes gpus=no keep_torch=no kept=
for argument in "$@"; do
  case $argument in
    --torch) with_torch=yes ;;
    --no-torch) with_torch=no ;;
    --no-caffe) build_caffe=no ;;
    --tests) with_tests=yes with_fashion=yes ;;
    --fashion) with_fashion=yes ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument '$argument'; see --help" ;;
  esac
done
began=$EPOCHSECONDS
caffe=$(own_caffe) || { [ -z "${CAFFE_ROOT:-}" ] || exit 1; caffe=$(built_caffe) || caffe=''; }
looked=no
if [ -x "$python" ]; then look_around; looked=yes; fi
wanted=()
if [ "$python" = "$own_python" ]; then # another Python has what it needs, and Caffe is not built for it
  wanted=("${python_packages[@]}")
  [ -n "$caffe" ] || [ "$build_caffe" = no ] || wanted+=("${caffe_packages[@]}")
fi
if wants_compiler; then wanted+=(g++); fi
if [ "$with_tests" = yes ]; then wanted+=("${test_packages[@]}"); fi
if [ "$with_fashion" = yes ]; then wanted+=(dataset-fashion-mnist); fi
if grep -q '^ID=ubuntu' /etc/os-release 2>/dev/null; then # there it is a snap
  mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | grep -vx chromium)
  [ "$with_tests" = no ] || have_browser || say "Without Google Chrome, the tests that look at pages in a browser do not run"
fi
mapfile -t missing < <(missing_packages "${wanted[@]}")
[ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"

exec 9<"$root" # one at a time in this checkout
if ! flock -n 9; then
  say "Another setup is running in $root: waiting for it"
  flock 9
fi
[ "$looked" = yes ] || look_around
install_venv
[ "$with_torch" = no ] || install_torch
if [ -z "$caffe" ] && [ "$python" != "$own_python" ]; then
  caffe="none, since it is built for the distribution's Python only; PyTorch trains"
elif [ -z "$caffe" ] && [ "$build_caffe" = no ]; then
  caffe="none (--no-caffe)"
elif [ -z "$caffe" ]; then
  "$here/install_caffe.sh" --python "$venv/bin/python" 9<&-
  caffe=$(built_caffe)
fi
say "Setup is complete ($(duration $((EPOCHSECONDS - began)))). Caffe: $caffe"
