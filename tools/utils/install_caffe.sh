#!/usr/bin/env bash
# Builds stock Caffe 1.0 for the CPU, with pycaffe, and installs it where every checkout of this project finds it.
#
#   tools/utils/install_caffe.sh [--prefix DIR] [--python PYTHON] [--jobs N]
#
#   --prefix DIR     install here (default: ${CAFFE_JACINTO_HOME:-~/.local/share/caffe_jacinto}/caffe-1.0-cpu-py<version>)
#   --python PYTHON  the distribution's Python, or a virtual environment of it (default: /usr/bin/python3);
#                    pycaffe needs Boost.Python, which exists for that version only
#   --jobs N         parallel compilers (default: one per core, if there is 1 GB of memory for each)
#
# The prefix gets bin/{caffe,convert_imageset,compute_image_mean}, lib/libcaffe.so*, python/caffe, and in src/ the source
# package, Caffe's license, caffe.proto and tools/extra. Caffe is built and tested in a temporary folder beside the prefix,
# which is then renamed. A prefix that exists is therefore complete: an interrupted installation leaves only a temporary
# folder, which the next one removes. A Caffe that an earlier version of this script built with a fault is built again, and
# replaced in one step. The build takes about 7 minutes of CPU time and 1 GB of disk.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/utils/steps.sh
. "$here/steps.sh"

# Official Caffe 1.0 (commit 9b89154) with one protobuf call updated and without reading weights from HDF5. The updated call
# has a fault, which is put right below.
package=brocolli-caffe version=3.0.0
sha256=ad7ba487552f4343df25044a9fa14812a96add48ea2ff993b53bf2dafe8248e2
source_files=116 # steps of the build, for the first estimate
seconds_per_step=4

prefix='' python=/usr/bin/python3 jobs=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --prefix | --python | --jobs)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      printf -v "${1#--}" '%s' "$2"; shift 2 ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
done
[[ $jobs =~ ^([1-9][0-9]*)?$ ]] || fail "--jobs must be a number of 1 or more, not '$jobs'"
command -v "$python" >/dev/null || fail "no Python at $python; tools/utils/setup.sh installs one"
python=$(command -v "$python")
python_version=$(python_version "$python")
prefix=${prefix:-$(default_prefix "$python_version")}
case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
prefix=${prefix%/}
base=$(dirname "$prefix")

already() { say "Caffe is already installed: $prefix/bin/caffe"; exit 0; }

if caffe_is_installed "$prefix"; then already; fi
[ -f "$prefix/installed.txt" ] || [ ! -e "$prefix" ] || rmdir "$prefix" 2>/dev/null ||
  fail "$prefix exists and was not made by this script: remove it or choose another --prefix"
missing=$(missing_packages "${caffe_packages[@]}" | xargs)
[ -z "$missing" ] || fail "building Caffe needs system packages that are missing. Install them:
    sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing
(tools/utils/setup.sh does that, and installs everything else that the project needs)"
mkdir -p "$base" 2>/dev/null && [ -w "$base" ] || fail "cannot write to $base: choose another --prefix"

# One installer at a time. Child processes do not inherit the lock (9>&- below), so it is released when the script ends.
exec 9>"$base/.caffe-install.lock"
if ! flock -n 9; then
  say "Another installer is building Caffe: waiting for it"
  flock 9
  if caffe_is_installed "$prefix"; then already; fi
fi
rm -rf "$base"/.caffe-install.tmp-* 2>/dev/null || true # leftovers of interrupted installations

free_mb=$(df -Pm "$base" | awk 'NR == 2 {print $4}')
[ "$free_mb" -ge 1000 ] || fail "building Caffe needs 1 GB of disk in $base, but only $free_mb MB are free"
cores=$(nproc)
memory_gb=$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
jobs=${jobs:-$((memory_gb < 1 ? 1 : memory_gb < cores ? memory_gb : cores))}

work='' child=''
clean_up() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  if [ -n "$child" ] && kill "$child" 2>/dev/null; then wait "$child" 2>/dev/null || true; fi
  if [ -n "$work" ]; then rm -rf "$work" 2>/dev/null || rm -rf "$work" || true; fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
work=$(mktemp -d "$base/.caffe-install.tmp-XXXXXX")
log=$work/log

# quietly COMMAND...: run it with its output in the log; a signal to this script ends it at once
quietly() {
  "$@" >>"$log" 2>&1 9>&- &
  child=$!
  wait "$child" || give_up "$1"
  child=''
}
give_up() {
  child=''
  cp "$log" "$base/caffe-install.log"
  end_progress
  tail -n 15 "$log" >&2
  fail "$1 failed; its full output is in $base/caffe-install.log"
}

earlier=$(build_in "$prefix") || earlier=$caffe_build
if [ "$earlier" -lt "$caffe_build" ]; then
  say "The Caffe in $prefix cannot read weight files of 512 MiB and more. It is built again, and stays in use until then."
fi
say "Building Caffe 1.0 for Python $python_version with $jobs jobs, about $(duration $((source_files * seconds_per_step / jobs))), into $prefix"

# pycaffe must be built with the headers of NumPy 2: it then works with NumPy 1 as well, but not the other way round.
if ! "$python" -c 'import pip, numpy, google.protobuf, six, skimage; assert numpy.__version__ >= "2"' 2>/dev/null; then
  say "  creating a virtual environment for the build (about 30 s)"
  quietly "$python" -m venv "$work/venv"
  python=$work/venv/bin/python
  quietly "$python" -m pip install -q 'numpy>=2' protobuf six scikit-image
fi

archive=$package-$version.tar.gz
if cp "$prefix/src/$archive" "$work" 2>/dev/null && sha256sum --status -c <<<"$sha256  $work/$archive"; then
  say "  fetching the source package from the Caffe that is replaced"
else
  say "  fetching the source package $package $version (5 MB)"
  echo "$package==$version --hash=sha256:$sha256" >"$work/requirements.txt"
  quietly "$python" -m pip download -q --no-deps --no-binary "$package" --require-hashes -r "$work/requirements.txt" -d "$work"
fi
mkdir "$work/source" "$work/build"
quietly tar -xf "$work/$archive" -C "$work/source" --strip-components=1 --no-same-owner
# The package's updated protobuf call limits a file to 512 MiB; official Caffe's constant beside it is 2 GB.
quietly sed -i 's/SetTotalBytesLimit(536870912)/SetTotalBytesLimit(kProtoReadBytesLimit)/' "$work/source/src/caffe/util/io.cpp"
quietly grep 'SetTotalBytesLimit(kProtoReadBytesLimit)' "$work/source/src/caffe/util/io.cpp"
mkdir -p "$work/source/examples" # missing in the package, but required by CMake
: >"$work/source/examples/CMakeLists.txt"

say "  configuring"
options=(
  -DCMAKE_BUILD_TYPE=Release -DCPU_ONLY=ON -DBLAS=open -DUSE_LEVELDB=OFF -DBUILD_docs=OFF -Dpython_version=3
  "-DPYTHON_EXECUTABLE=$python"
  # two constants that OpenCV 4 dropped; <cstdint>, which GCC 13's headers no longer include
  "-DCMAKE_CXX_FLAGS=-DCV_LOAD_IMAGE_COLOR=1 -DCV_LOAD_IMAGE_GRAYSCALE=0 -include cstdint"
  # libraries are found relative to the file itself, so that the folder can be tested and then renamed
  -DCMAKE_SKIP_RPATH=ON
  "-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath,'\$ORIGIN/../lib'"
  "-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,'\$ORIGIN/../../lib'"
)
quietly cmake -G Ninja -S "$work/source" -B "$work/build" "${options[@]}"

started=$EPOCHSECONDS finished=no
exec 8< <(NINJA_STATUS='[%f/%t] ' exec ninja -C "$work/build" -j "$jobs" caffe.bin convert_imageset compute_image_mean pycaffe 2>&1 9>&-)
child=$!
while IFS= read -r line <&8; do
  printf '%s\n' "$line" >>"$log"
  if [[ $line =~ ^\[([0-9]+)/([0-9]+)\] ]]; then
    progress "compiling" "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" "$started"
    [ "${BASH_REMATCH[1]}" != "${BASH_REMATCH[2]}" ] || finished=yes
  fi
done
exec 8<&-
wait "$child" || give_up "the build"
child=''
[ "$finished" = yes ] || give_up "the build"
end_progress

say "  testing it"
new=$work/prefix
mkdir -p "$new"/{bin,lib,python,src/src/caffe/proto,src/tools}
cp "$work"/build/tools/{caffe,convert_imageset,compute_image_mean} "$new/bin/"
cp -P "$work"/build/lib/libcaffe.so* "$new/lib/"
cp -r "$work/source/python/caffe" "$new/python/"
rm -rf "$new/python/caffe/"{_caffe.so,_caffe.cpp,test,__pycache__,proto/caffe_pb2.py}
cp "$work/build/lib/_caffe.so" "$new/python/caffe/"
strip --strip-unneeded "$new"/bin/* "$new"/lib/libcaffe.so.* "$new/python/caffe/_caffe.so"
cp -r "$work/source/tools/extra" "$new/src/tools/"
cp "$work/source/src/caffe/proto/caffe.proto" "$new/src/src/caffe/proto/"
cp "$work/source/LICENSE" "$work/$archive" "$new/src/"

# Ubuntu 22.04's protoc writes Python that today's protobuf package rejects. This is what newer versions write.
quietly protoc -I "$work/source/src/caffe/proto" --descriptor_set_out="$work/caffe.binpb" caffe.proto
cat >"$work/write_pb2.py" <<'PYTHON'
import sys
from google.protobuf import descriptor_pb2
files = descriptor_pb2.FileDescriptorSet.FromString(open(sys.argv[1], "rb").read())
with open(sys.argv[2], "w") as module:
    module.write(f'''# The messages of Caffe's caffe.proto, written when Caffe was installed.
from google.protobuf import descriptor_pool
from google.protobuf.internal import builder

DESCRIPTOR = descriptor_pool.Default().AddSerializedFile({files.file[0].SerializeToString()!r})
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, "caffe_pb2", globals())
''')
PYTHON
quietly "$python" "$work/write_pb2.py" "$work/caffe.binpb" "$new/python/caffe/proto/caffe_pb2.py"
cat >"$work/try_out.py" <<'PYTHON'
import sys
import caffe
from caffe.proto import caffe_pb2
import numpy
needed = {"Accuracy", "BatchNorm", "Bias", "Convolution", "Data", "InnerProduct", "Pooling", "Python", "ReLU", "Scale"}
missing = needed - set(caffe.layer_type_list())
assert not missing, f"this Caffe lacks the layers {missing}"
assert caffe_pb2.NetParameter(name="n").name == "n"
net = caffe.Net(sys.argv[1], caffe.TEST)
weights = net.params["c"][0].data
weights[...] = numpy.arange(weights.size).reshape(weights.shape)
out = net.forward()["c"]
assert (out == 2 * weights.sum()).all(), "a convolution gives wrong results"
PYTHON
cat >"$work/try_out.prototxt" <<'PROTOTXT'
layer { name: "d" type: "DummyData" top: "d" dummy_data_param { shape { dim: 1 dim: 1 dim: 3 dim: 3 } data_filler { type: "constant" value: 2 } } }
layer { name: "c" type: "Convolution" bottom: "d" top: "c" convolution_param { num_output: 1 kernel_size: 3 } }
PROTOTXT
caffe_runs "$new/bin/caffe" || { "$new/bin/caffe" --version >>"$log" 2>&1 || true; give_up "the new caffe"; }
quietly env PYTHONPATH="$new/python" "$python" "$work/try_out.py" "$work/try_out.prototxt"

cat >"$new/installed.txt" <<TEXT
Caffe 1.0, CPU only, with pycaffe for Python $python_version
source $package $version sha256 $sha256
build $caffe_build
made by install_caffe.sh on $(date -u +%Y-%m-%dT%H:%M:%SZ)
TEXT
chmod -R a+rX "$new"
sync -f "$new" # on disk before it gets its name, in case of a power failure
if [ -e "$prefix" ]; then exchange "$python" "$new" "$prefix"; else mv -T "$new" "$prefix"; fi
say "Caffe is installed: $prefix/bin/caffe"
