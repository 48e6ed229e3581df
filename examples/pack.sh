#!/bin/sh
# Packs the suite's own sources in three ways and shows how full the rows are.
# Runs in seconds; writes runs/pack/, with what best-fit packing gave in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
rm -rf runs/pack
mkdir -p runs/pack

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

# Through a pipe, as in daily use.
echo "\$ l4 tokenize l4cli tests | l4 pack -o runs/pack/piped"
"$l4" tokenize l4cli tests --quiet | "$l4" pack -o runs/pack/piped
echo

# Or once to a file, which can be packed again for another length.
show tokenize l4cli tests -o runs/pack/code.tokens
"$l4" pack runs/pack/code.tokens --seq-len 4k -o runs/pack/best-fit --json > runs/pack/summary.json
cat runs/pack/summary.json
show pack runs/pack/code.tokens --seq-len 4k --concat --no-shuffle -o runs/pack/concat
show info runs/pack/best-fit --verify
