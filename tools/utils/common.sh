# Functions shared by the scripts in this folder, which source it.

# find_python REPOSITORY: print the Python to use: $PYTHON if set, else the repository's virtual environment, else
# python3. Fail with a message if it lacks this project's packages.
find_python() {
    local python="${PYTHON:-}"
    if [ -z "$python" ]; then
        python="$1/.venv/bin/python"
        [ -x "$python" ] || python=python3
    fi
    if ! "$python" -c "import lmdb, jinja2, google.protobuf" 2>/dev/null; then
        printf '%s: error: %s lacks the Python packages of this project: run tools/utils/setup.sh, or set PYTHON\n' \
            "${0##*/}" "$python" >&2
        return 2
    fi
    printf '%s\n' "$python"
}
