#!/bin/sh
# How far a model can read: a grid of lengths and depths with its controls, and what is refused.
# Tests $L4_MODEL, or a small model that was just trained for seconds and finds nothing: the point
# is the report, not the score (`sh examples/long_context.sh` trains one that does find needles).
# Writes runs/needle-test-example/: results.jsonl, heatmap.png, and the figures in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
out=runs/needle-test-example
rm -rf $out
mkdir -p $out

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

if [ -z "${L4_MODEL:-}" ]; then
    "$l4" tokenize README.md LICENSE --quiet | "$l4" pack --seq-len 256 -o $out/shards --quiet
    show pretrain $out/shards --preset nano --steps 20 --batch-size 8 -o $out/model --quiet
    L4_MODEL=$out/model/latest
fi

# What it takes, before anything is loaded; a published shape needs no weights at all.
show needle-test "$L4_MODEL" --lengths 1k,2k,4k --dry-run
show needle-test --dry-run --preset scout --gpus 8xh100 --lengths 128k,256k,...,1m

needles="--needle #{key}={value}; --question #{key}= --keys letters:3 --values digits:3"
show needle-test "$L4_MODEL" --lengths 1k,2k,4k --depths 5 --samples 2 $needles -o $out/grid
cp $out/grid/summary.json $out/summary.json

# One frame of a film is the needle; films stream, so hours of them need no more memory to decode.
show needle-test --dry-run --preset scout --gpus 8xh100 --hours 0.1,1,20 --fps 1
films="--tasks video,pictures --frames 4,16 --depths 3 --samples 1"
show needle-test "$L4_MODEL" $films -o $out/films || echo "exit code $?: a model without vision"

# The same command again has nothing left to read.
show needle-test "$L4_MODEL" --lengths 1k,2k,4k --depths 5 --samples 2 $needles -o $out/grid --json

# Refused, with what to do instead; the last one is an answer: no.
for wrong in "--lengths 4k,1k" "--lengths 1k,3k,...,64k" "--lengths 64" "--depths 0,150" \
    "--lengths 1k --depths 5 -o $out/grid" "--lengths 1k --depths 3 --require 0.95 -o $out/strict"; do
    echo "\$ l4 needle-test MODEL $wrong"
    "$l4" needle-test "$L4_MODEL" $wrong && exit 1 || echo "exit code $?"
    echo
done
