#!/bin/sh
# The proof of long context on two cores: models trained on 512 tokens and less are asked for needles
# at up to 65,536, among text and among confusable needles, before and after `l4 extend-context`.
# Three quarters of an hour; --quick: one seed, ten minutes. Writes runs/long_context/: results of
# every test with its heat map, tables.md, easy.png, hard.png, summary.json.
# usage: sh examples/long_context.sh [--quick] [--far 1m|10m]
#   --far 1m also reads one million tokens, --far 10m ten million (minutes, 3 GB)
set -eu
cd "$(dirname "$0")/.."
work=runs/long_context
here=examples/long_context
quick= far=
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=yes ;;
    --far) far=${2:?--far needs 1m or 10m} && shift ;;
    *) echo "error: unknown option \`$1\`" >&2 && exit 2 ;;
    esac
    shift
done

PATH="$PATH:$PWD/.quickstart/bin"
command -v l4 >/dev/null || {
    echo "error: no \`l4\` on the PATH" >&2
    echo "why: neither it nor the quickstart's environment is installed" >&2
    echo "fix: pip install ." >&2
    exit 1
}
python=$(dirname "$(command -v l4)")/python
rm -rf "$work"
mkdir -p "$work/logs"
started=$(date +%s)
# Two jobs at a time, each on a core of its own.
export OMP_NUM_THREADS=1

say() { echo "[$(($(date +%s) - started)) s] $*"; }

# Runs a command with its output in a log; its last lines are shown if it fails.
job() {
    log=$work/logs/$1.log && shift
    printf '$ %s\n' "$*" >"$log"
    "$@" >>"$log" 2>&1 || {
        code=$?
        echo "error: \`$*\` failed" >&2
        tail -n 5 "$log" >&2
        exit $code
    }
}

# Text needles of 9 bytes, `#abc=123;`, asked for with `#abc=`.
synthetic() {
    l4 "$@" --haystack "$work/text/train" --needle '#{key}={value};' --question '#{key}=' \
        --keys letters:3 --values digits:3
}

# A model that has learned to answer at 512 tokens: nine tenths made documents, one tenth prose. Local
# layers begin with chunks of 32 in rows of 128: where a chunk held the whole row, the last layer
# would have nothing to learn.
learn() { # NAME CONFIG SEED SHARE_OF_THE_TOKENS
    name=$1 seed=$3
    first=$((1800 * $4 / 100)) middle=$((500 * $4 / 100)) last=$((2000 * $4 / 100))
    synthetic tokenize --synthetic retrieval --hard 0 --count "${first}k" --length 128 --seed "$seed" \
        --quiet -o "$work/data/$name.tokens" &&
        l4 pack "$work/data/$name.tokens" --seq-len 128 --quiet -o "$work/data/$name" &&
        l4 pretrain "$work/data/$name:0.9" "$work/data/prose:0.1" --tokens "${first}k" \
            --config "$here/$2.json" --set attention_chunk_size=32 --batch-size 32 --lr 3e-3 \
            --weight-decay 0.01 --schedule constant --dtype bf16 --seed "$seed" --log-every 50 \
            --quiet -o "$work/$name/128" &&
        synthetic extend-context "$work/$name/128/latest" "$work/data/prose.tokens" \
            --synthetic retrieval --synthetic-fraction 0.9 --long-fraction 0 --hard 0 \
            --stages "256:${middle}k,512:${last}k" --attention-chunk-size 64,128 \
            --batch-tokens 4096 --lr 3e-3 --weight-decay 0.01 --dtype bf16 --seed "$seed" \
            --log-every 50 --quiet -o "$work/$name/512"
}

# The model again after rows of 2k and 4k tokens, most of them full of needles that are not asked for.
extend() { # NAME SEED SHARE_OF_THE_TOKENS [OPTIONS]
    name=$1 seed=$2 first=$((400 * $3 / 100)) last=$((1600 * $3 / 100))
    shift 3
    synthetic extend-context "$work/$name/512/latest" "$work/data/prose.tokens" \
        --synthetic retrieval --synthetic-fraction 0.9 --long-fraction 0 --hard 0.7 \
        --stages "2k:${first}k,4k:${last}k" --batch-tokens 8192 --lr 2e-3 \
        --weight-decay 0.01 --dtype bf16 --seed "$seed" --log-every 50 --quiet -o "$work/$name/4k" "$@"
}

lengths=512,1k,...,64k
haystack=$work/text/held-out
# Easy needles (`single`: in text) and hard ones (`multi-key-full`: among needles), one table each.
ask() { # NAME LENGTH_TRAINED RESULT [OPTIONS]
    name=$1 trained=$2 result=$3
    shift 3
    l4 needle-test "$work/$name/$trained/latest" --tasks single,multi-key-full --lengths "$lengths" \
        --depths 11 --samples "$samples" --haystack "$haystack" --needle '#{key}={value};' \
        --question '#{key}=' --keys letters:3 --values digits:3 --quiet -o "$work/tests/$result" "$@"
}
temperature() { # STRENGTH
    echo "--set attn_temperature_tuning=true --set floor_scale=512 --set attn_scale=$1"
}

irope() { # SEED
    job "learn-irope-$1" learn "irope-$1" irope "$1" 100
    job "ask-irope-$1" ask "irope-$1" 512 "irope-$1"
    job "ask-irope-$1-0.3" ask "irope-$1" 512 "irope-$1-temperature-0.3" --no-controls $(temperature 0.3)
    say "irope, seed $1: trained on 512 tokens and asked"
    job "extend-irope-$1" extend "irope-$1" "$1" 100
    job "ask-irope-$1-4k" ask "irope-$1" 4k "irope-$1-extended"
    for strength in ${2:-0.3}; do
        job "ask-irope-$1-4k-$strength" ask "irope-$1" 4k "irope-$1-extended-temperature-$strength" \
            --no-controls $(temperature "$strength")
    done
    say "irope, seed $1: extended and asked"
}

# RoPE in every layer: as it is, and with its full layer stretched 128 times in three ways.
control() {
    job learn-control learn control control 0 100
    job ask-control ask control 512 control
    base='"use_qk_norm": false, "rope_theta"'
    original='"original_max_position_embeddings": 512'
    job ask-control-pi ask control 512 control-pi --no-controls --set \
        "full_rope={$base: 10000.0, \"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 128.0}}"
    # NTK: the base times 128^(64 / 62).
    job ask-control-ntk ask control 512 control-ntk --no-controls --set "full_rope={$base: 1496871.4}"
    job ask-control-yarn ask control 512 control-yarn --no-controls --set \
        "full_rope={$base: 10000.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 128.0, $original}}"
    say "control with RoPE in every layer: trained on 512 tokens and asked"
    job extend-control extend control 0 100 --rope-scaling yarn:128 --rope-scope full
    job ask-control-4k ask control 4k control-yarn-extended --no-controls
    say "control with YaRN: extended and asked"
}

two_nope() {
    samples=4 # the first of the two reads in quadratic time
    job learn-two-nope learn two-nope two_nope 0 110
    job ask-two-nope ask two-nope 512 two-nope
    say "the real pattern with two NoPE layers: trained on 512 tokens and asked"
    job extend-two-nope extend two-nope 0 70
    job ask-two-nope-4k ask two-nope 4k two-nope-extended --no-controls
    say "two NoPE layers: extended and asked"
}

scalable_softmax() {
    job learn-ssmax learn ssmax ssmax 0 100
    job ask-ssmax ask ssmax 512 ssmax
    job extend-ssmax extend ssmax 0 100
    job ask-ssmax-4k ask ssmax 4k ssmax-extended --no-controls
    say "Scalable-Softmax: trained, extended and asked"
}

mkdir -p "$work/data" "$work/tests"
job prose "$python" "$here/prose.py" "$work/text"
job tokenize l4 tokenize "$work/text/train" -o "$work/data/prose.tokens"
job pack l4 pack "$work/data/prose.tokens" --seq-len 128 -o "$work/data/prose"
samples=6
[ -z "$quick" ] || samples=3
# Two lanes of about the same length, a core each.
one() {
    irope 0 "${1:-0.3}"
    [ -z "$quick" ] || return 0
    irope 1
    irope 2
    scalable_softmax
}
one "$([ -n "$quick" ] || echo 0.1 0.3 1.0)" &
lane=$!
trap 'kill $lane 2>/dev/null' EXIT
control
[ -n "$quick" ] || two_nope
wait $lane
trap - EXIT
if [ -n "$far" ]; then
    lengths=$far samples=1
    unset OMP_NUM_THREADS
    # The held-out text over and over: it is a seventh of a million bytes long.
    copies=8 haystack=$work/text/far
    [ "$far" = 1m ] || copies=80
    mkdir "$haystack"
    for copy in $(seq "$copies"); do
        cp -R "$work/text/held-out" "$haystack/$copy"
    done
    job "ask-$far" ask irope-0 4k far --no-controls
    job "ask-$far-0.3" ask irope-0 4k far-temperature-0.3 --no-controls $(temperature 0.3)
    say "extended irope, seed 0: read $far tokens twice"
fi
"$python" "$here/report.py" "$work"
say "done; figures in $work/summary.json, tables in $work/tables.md, curves in $work/easy.png and hard.png"
