# Sourced by the scripts beside it: what they share.

# find_python REPOSITORY: print the Python to use, $PYTHON if set, else the repository's own virtual
# environment, else python3; fail with a message where that one lacks this project.
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
