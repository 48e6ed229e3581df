#!/bin/sh
# Trains the nano preset for a few steps on the suite's own sources, stops it, continues it, and
# measures bits per byte on sources it did not see. Two minutes; writes runs/pretrain/, with the
# last evaluation in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
rm -rf runs/pretrain
mkdir -p runs/pretrain

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

"$l4" tokenize l4cli --quiet | "$l4" pack --seq-len 256 -o runs/pretrain/shards --quiet
"$l4" tokenize src_kernels tests/text --quiet | "$l4" pack --seq-len 256 -o runs/pretrain/held-out --quiet

# What it would take, and what Scout would take.
show pretrain runs/pretrain/shards --preset nano --steps 40 --batch-size 8 --dry-run
echo '$ l4 pretrain runs/pretrain/shards --preset scout'
"$l4" pretrain runs/pretrain/shards --preset scout || true
echo

# SIGTERM (or Ctrl-C) finishes the step and saves; the same command continues bit for bit.
set -- pretrain runs/pretrain/shards --preset nano --steps 40 --batch-size 8 --log-every 5 \
    --eval-data runs/pretrain/held-out --eval-every 20 --save-every 10 -o runs/pretrain/nano
echo "\$ l4 $* & sleep 15; kill \$!"
"$l4" "$@" &
sleep 15
kill $! && wait $! || echo "exit code $?"
echo
show "$@"
grep '"eval"' runs/pretrain/nano/metrics.jsonl | tail -n 1 > runs/pretrain/summary.json
cat runs/pretrain/summary.json
