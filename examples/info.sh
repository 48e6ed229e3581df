#!/bin/sh
# What `l4 info` says of a preset, a token stream, packed shards and the operations in use.
# Runs in seconds; writes runs/info/, with the facts of preset:scout in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
rm -rf runs/info
mkdir -p runs/info

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

show info preset:scout
"$l4" info preset:scout --json > runs/info/summary.json
show tokenize LICENSE README.md -o runs/info/text.tokens
show info runs/info/text.tokens
show pack runs/info/text.tokens --seq-len 256 -o runs/info/shards
show info runs/info/shards --verify --samples 1
show info --ops
