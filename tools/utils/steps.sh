# shellcheck shell=bash
# Shared by the scripts that install, which source it: messages, the system packages that the project needs, and where its
# Caffe is installed.

HOME=${HOME:-~} # from the user database if the environment lacks it

say() { printf '%s\n' "$*"; }
fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# duration SECONDS: "45 s" or "3 min 20 s"
duration() { if [ "$1" -lt 60 ]; then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi; }

# progress LABEL DONE TOTAL STARTED: one line that is rewritten on a terminal; without one, a line for each tenth.
# STARTED is the value of EPOCHSECONDS when the step began; the time left assumes constant speed.
progress_shown=
progress() {
  local label=$1 done=$2 total=$3 elapsed=$((EPOCHSECONDS - $4)) left=
  [ "$total" -gt 0 ] || return 0
  local percent=$((100 * done / total))
  if [ "$percent" -ge 5 ] && [ "$done" -lt "$total" ] && [ "$elapsed" -ge 2 ]; then
    left=", about $(duration $((elapsed * (total - done) / done))) left"
  fi
  if [ -t 1 ]; then
    printf '\r\033[K  %s: %d %%%s' "$label" "$percent" "$left"
  elif [ "$progress_shown" != "$label $((percent / 10))" ]; then
    progress_shown="$label $((percent / 10))"
    say "  $label: $percent %$left"
  fi
}
end_progress() { progress_shown=; if [ -t 1 ]; then printf '\r\033[K'; fi; }

# The names are the same on Debian 12, Ubuntu 22.04 and Ubuntu 24.04.
# shellcheck disable=SC2034  # used by the scripts that source this file
python_packages=(ca-certificates python3 python3-venv)
# shellcheck disable=SC2034
caffe_packages=(
  cmake ninja-build g++ python3-dev protobuf-compiler libboost-system-dev libboost-thread-dev libboost-filesystem-dev
  libboost-python-dev libprotobuf-dev libgoogle-glog-dev libgflags-dev libhdf5-dev liblmdb-dev libopenblas-dev libopencv-dev
)
# shellcheck disable=SC2034
test_packages=(munge slurm-client slurmctld slurmd chromium)

# missing_packages NAME...: prints the packages that are not installed, one per line. Without dpkg it looks for a command
# or header of each package, so that users of other distributions get an exact list too.
missing_packages() {
  local name
  if command -v dpkg-query >/dev/null; then
    local installed
    installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null | awk '$2 == "installed" {print $1}') || true
    for name in "$@"; do
      [[ $'\n'$installed$'\n' == *$'\n'"$name"$'\n'* ]] || { [ "$name" = chromium ] && have_browser; } || echo "$name"
    done
  else
    for name in "$@"; do package_by_sight "$name" || echo "$name"; done
  fi
}

# package_by_sight DEBIAN_NAME: whether the contents of that package are present, whatever the distribution calls it.
package_by_sight() {
  case $1 in
    ca-certificates) [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -d /etc/pki/tls/certs ] || [ -e /etc/ssl/cert.pem ] ;;
    python3) [ -x /usr/bin/python3 ] ;;
    python3-venv) /usr/bin/python3 -c 'import venv, ensurepip' 2>/dev/null ;;
    python3-dev) have_header 'python3*/Python.h' ;;
    cmake) command -v cmake >/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    g++) command -v g++ >/dev/null ;;
    protobuf-compiler) command -v protoc >/dev/null ;;
    libboost-system-dev) have_header boost/system/error_code.hpp ;;
    libboost-thread-dev) have_header boost/thread.hpp ;;
    libboost-filesystem-dev) have_header boost/filesystem.hpp ;;
    libboost-python-dev) have_header boost/python.hpp ;;
    libprotobuf-dev) have_header google/protobuf/message.h ;;
    libgoogle-glog-dev) have_header glog/logging.h ;;
    libgflags-dev) have_header gflags/gflags.h ;;
    libhdf5-dev) have_header hdf5.h || have_header 'hdf5/*/hdf5.h' ;;
    liblmdb-dev) have_header lmdb.h ;;
    libopenblas-dev) have_header 'openblas*/cblas.h' || have_header cblas.h ;;
    libopencv-dev) have_header opencv4/opencv2/core.hpp || have_header opencv2/core.hpp ;;
    munge) have_daemon munged ;;
    slurm-client) command -v sbatch >/dev/null ;;
    slurmctld | slurmd) have_daemon "$1" ;;
    chromium) have_browser ;;
    dataset-fashion-mnist) [ -e /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ] ;;
    *) false ;;
  esac
}
have_browser() { command -v chromium || command -v chromium-headless-shell || command -v google-chrome; } >/dev/null
have_daemon() { command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ]; }
have_header() {
  compgen -G "/usr/include/$1" >/dev/null || compgen -G "/usr/include/*-linux-gnu/$1" >/dev/null ||
    compgen -G "/usr/local/include/$1" >/dev/null
}

# default_prefix PYTHON_VERSION: where the project's own Caffe is installed, the same for all checkouts of a user.
default_prefix() {
  echo "${CAFFE_JACINTO_HOME:-${XDG_DATA_HOME:-$HOME/.local/share}/caffe_jacinto}/caffe-1.0-cpu-py$1"
}

# python_version PYTHON: prints its version, e.g. "3.11"
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# The number of our build of Caffe. Raise it when install_caffe.sh builds a better Caffe: the set-up then builds again what
# an earlier one built. 1 (not written down): the source package as it is; 2: reads weight files of 512 MiB and more.
caffe_build=2

# build_in PREFIX: prints the number of the build of Caffe there; fails if there is no installation of ours
build_in() {
  [ -f "$1/installed.txt" ] || return 1
  local number
  number=$(sed -n 's/^build \([0-9]\{1,9\}\)$/\1/p' "$1/installed.txt")
  echo "${number:-1}"
}

# caffe_is_installed PREFIX: whether a Caffe of this build or a later one is there, and runs
caffe_is_installed() {
  local build
  build=$(build_in "$1") && [ "$build" -ge "$caffe_build" ] && caffe_runs "$1/bin/caffe"
}

# caffe_runs EXECUTABLE: whether it is a Caffe that runs on this machine
caffe_runs() { [[ $("$1" --version 2>&1) == *"caffe version"* ]]; }

# exchange PYTHON FOLDER OTHER: gives each of two folders the name of the other, in one step (renameat2 of Linux). Where
# the file system cannot do that, OTHER is missing for a moment.
exchange() {
  "$1" - "$2" "$3" 2>/dev/null <<'PYTHON' || { mv -T "$3" "$2.old" && mv -T "$2" "$3" && mv -T "$2.old" "$2"; }
import ctypes, os, sys
folder, other = map(os.fsencode, sys.argv[1:])
AT_FDCWD, RENAME_EXCHANGE = -100, 2
sys.exit(ctypes.CDLL(None).renameat2(AT_FDCWD, folder, AT_FDCWD, other, RENAME_EXCHANGE) != 0)
PYTHON
}
