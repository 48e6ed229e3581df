#!/bin/sh
# Trains the nano preset for a few steps at 256 tokens and extends it to 1,024 and 4,096 in two
# stages on the suite's own sources, stopped once on the way. Three minutes; writes
# runs/extend-context/, with the bits per byte of each stage in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
rm -rf runs/extend-context
mkdir -p runs/extend-context

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

"$l4" tokenize l4cli --quiet -o runs/extend-context/code.tokens
"$l4" tokenize src_kernels tests/text --quiet | "$l4" pack --seq-len 4k -o runs/extend-context/held-out --quiet
"$l4" pack runs/extend-context/code.tokens --seq-len 256 -o runs/extend-context/shards --quiet
show pretrain runs/extend-context/shards --preset nano --steps 30 --batch-size 8 --log-every 10 \
    -o runs/extend-context/nano

# Two stages; 70% of the tokens come from files of half a row or more. Temperature acts from
# position 256 on. What it would take, first.
set -- extend-context runs/extend-context/nano runs/extend-context/code.tokens \
    --stages 1k:80k,4k:80k --batch-tokens 8k --floor-scale 256 --log-every 5 \
    --eval-data runs/extend-context/held-out -o runs/extend-context/nano-4k
show "$@" --dry-run

# SIGTERM finishes the step and saves; the same command continues, in whichever stage it was.
echo "\$ l4 $* & sleep 25; kill \$!"
"$l4" "$@" &
sleep 25
kill $! && wait $! || echo "exit code $?"
echo
show "$@"
show info runs/extend-context/nano-4k
grep -h '"eval"' runs/extend-context/nano-4k/stage-*/metrics.jsonl > runs/extend-context/summary.json
cat runs/extend-context/summary.json
