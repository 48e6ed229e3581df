#!/bin/sh
# Install into a fresh virtual environment in the checkout and pass the tests.
# usage: sh tests/run.sh [PYTEST OPTIONS]      (slower checks: sh tests/run.sh -m slow)
set -eu
cd "$(dirname "$0")/.."
venv=.venv-tests
log=$venv/install.log

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: \`$python\` is older than Python 3.11" >&2
    echo "why: l4 needs 3.11 or later" >&2
    echo "fix: PYTHON=/path/to/python3.11 sh tests/run.sh" >&2
    exit 1
}
rm -rf "$venv"
"$python" -m venv "$venv"
echo "installing into $venv (log: $log)"
"$venv/bin/python" -m pip install -q -e '.[dev,fast,gguf]' >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    exit 1
}
# transformers' picture processor, an oracle of these tests, wants torchvision, whose wheels
# would replace a CPU build of torch if their dependencies were followed.
"$venv/bin/python" -m pip install -q --no-deps 'torchvision==0.28.0' >>"$log" 2>&1 ||
    echo "no torchvision here: the picture processor's tests are skipped"

# Two threads for the libraries at most: the tests start processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest "$@"
