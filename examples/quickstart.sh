#!/bin/sh
# From raw text and pictures to a model that answers about pictures it never saw: one bare machine,
# two cores, about a quarter of an hour after installation. Prints every command before it runs.
# usage: sh examples/quickstart.sh
set -eu
cd "$(dirname "$0")/.."
work=runs/quickstart
venv=.quickstart

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
[ -t 1 ] && [ -z "${NO_COLOR:-}" ] || say() { printf '\n# %s\n' "$*"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}

if [ ! -x "$venv/bin/l4" ]; then
    say "install into $venv (no extras, no compiler)"
    run "${PYTHON:-python3}" -m venv "$venv"
    run "$venv/bin/python" -m pip install -q .
fi
PATH="$PWD/$venv/bin:$PATH"
started=$(date +%s)
rm -rf "$work"
mkdir -p "$work"

say "real text: this machine's Python library and its help topics, some files held out"
run python examples/quickstart/corpus.py "$work/text"

say "pictures, drawn here: five colour-shape pairs are kept for the exam"
run python examples/quickstart/draw.py "$work/pictures" --count 24000 --pairs seen --seed 1
run python examples/quickstart/draw.py "$work/new" --count 300 --pairs all --seed 2

say "a tokenizer"
run l4 train-tokenizer "$work/text/train" "$work/pictures/chats.jsonl" --vocab-size 4096 -o "$work/tokenizer"

say "text and pictures to tokens, tokens to packed shards"
for part in train held-out; do
    echo "\$ l4 tokenize $work/text/$part --tokenizer $work/tokenizer --preset nano |"
    echo "      l4 pack --seq-len 512 -o $work/shards/$part"
    l4 tokenize "$work/text/$part" --tokenizer "$work/tokenizer" --preset nano |
        l4 pack --seq-len 512 -o "$work/shards/$part"
done
run l4 tokenize "$work/pictures/chats.jsonl" --tokenizer "$work/tokenizer" --preset nano -o "$work/chats.tokens"
run l4 pack "$work/chats.tokens" --seq-len 512 -o "$work/shards/pictures"

say "train on both at once"
run l4 pretrain "$work/shards/train:0.12" "$work/shards/pictures:0.88" --preset nano \
    --steps "${STEPS:-1500}" --batch-size 8 --lr 0.004 --decay-frac 0.5 --decay-shape linear --dtype bf16 \
    --eval-data "$work/shards/held-out" --eval-every 0 --log-every 50 --save-every 500 -o "$work/nano"

say "the exam: 300 pictures it never saw, five questions each"
run python examples/quickstart/ask.py "$work/nano" "$work/new" "$work/text/held-out" -o "$work/summary.json"

say "ask it yourself"
for i in 00000 00001 00002; do
    picture=$work/new/images/$i.png
    for question in "What colour is it?" "What shape is it?" "Where is it?"; do
        run l4 chat "$work/nano/latest" "$question" --image "$picture" --temperature 0 --quiet
    done
done
run l4 chat "$work/nano/latest" "Describe the picture." --image "$picture" --temperature 0 --quiet
run l4 chat "$work/nano/latest" "Give its box." --image "$picture" --boxes "$work/box.png" --temperature 0 --quiet

say "done in $(($(date +%s) - started)) s; figures in $work/summary.json, the last box in $work/box.png"
