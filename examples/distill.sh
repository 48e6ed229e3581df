#!/bin/sh
# The proof of distillation on two cores: a small MoE teacher learns the standard library's sources
# and documentation of this machine's Python, then two students, a smaller MoE and a dense one, learn
# from it in several ways at equal tokens, the main three with three seeds. Half an hour; --quick:
# one seed and a tenth of the steps, to see that it runs. --strange: also, five minutes more, half of
# the text in letters 13 places on, which the teacher has not seen. Writes runs/distill/: table.md,
# moe.png, dense.png, weights.png, summary.json.
# usage: sh examples/distill.sh [--quick] [--strange]
set -eu
cd "$(dirname "$0")/.."
work=runs/distill
seeds="0 1 2" teacher_steps=1000 steps=400 strange=
while [ $# -gt 0 ]; do
    case $1 in
    --quick) seeds=0 teacher_steps=100 steps=40 ;;
    --strange) strange=yes ;;
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
say() { printf '\n# [%s s] %s\n' "$(($(date +%s) - started))" "$*"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}

say "real text: this machine's Python library and its help topics, some files held out"
run "$python" examples/quickstart/corpus.py "$work/text"
run l4 train-tokenizer "$work/text/train" --vocab-size 2048 -q -o "$work/tokenizer"
pack() { # TEXT SHARDS
    echo "\$ l4 tokenize $1 --tokenizer $work/tokenizer | l4 pack --seq-len 256 -o $2"
    l4 tokenize "$1" --tokenizer "$work/tokenizer" -q | l4 pack --seq-len 256 -q -o "$2"
}
for part in train held-out; do
    pack "$work/text/$part" "$work/$part"
done

say "the teacher: four layers, eight experts"
shape="vision_config=null,attention_chunk_size=128"
run l4 pretrain "$work/train" --preset nano --set vision_config=null --set attention_chunk_size=128 \
    --set hidden_size=192 --set intermediate_size=384 --set intermediate_size_mlp=768 \
    --set num_attention_heads=6 --set num_local_experts=8 --steps "$teacher_steps" --batch-size 16 \
    --lr 4e-3 --decay-frac 0.4 --decay-shape linear --dtype bf16 --eval-data "$work/held-out" \
    --eval-every 0 --log-every 100 -o "$work/teacher"

# A third of the teacher's width: a smaller MoE, and one without experts.
small="preset:nano,$shape,hidden_size=64,intermediate_size=128,intermediate_size_mlp=256"
small="$small,num_attention_heads=2,num_key_value_heads=1"
way() { # STUDENT WAY
    case $2 in
    hard) loss=loss=hard ;;
    hard-teacher) loss=loss=hard,hard_targets=teacher ;;
    soft) loss=alpha=0.95 ;; # the best of 0.5, 0.7, 0.9, 0.95 and 1 for the MoE, seed 0
    schedule) loss=alpha=0.1..0.9 ;;
    dynamic) loss=alpha=token ;;
    esac
    own=
    [ "$1" = moe ] || own=moe_layers=[],
    echo "--student $small,${own}name=$1-$2,$loss"
}
data=$work/train
distill() { # SEED OUT STUDENTS...
    seed=$1 out=$2
    shift 2
    l4 distill $data --teacher "$work/teacher/latest" "$@" --batch-size 8 --lr 4e-3 \
        --decay-frac 0.4 --decay-shape linear --dtype bf16 --seed "$seed" -o "$out"
}

say "what two students cost: each alone with the teacher, then both in one run"
for students in moe dense "moe dense"; do
    name=$students words=
    [ "$students" != "moe dense" ] || name=both
    for student in $students; do
        words="$words $(way "$student" soft | sed "s/name=$student-soft/name=$student/")"
    done
    distill 0 "$work/cost/$name" $words --steps 60 --log-every 10 --save-every 0 -q
done

train() { # SEED WAYS...
    seed=$1 words=
    shift
    for student in moe dense; do
        for each in "$@"; do
            words="$words $(way $student "$each")"
        done
    done
    distill "$seed" "$work/seed-$seed" $words --steps "$steps" --eval-data "$work/held-out" \
        --eval-every $((steps / 5)) --log-every $((steps / 20)) --save-every 0 -q \
        >"$work/logs/seed-$seed.log" 2>&1 || { tail -n 5 "$work/logs/seed-$seed.log" >&2 && return 1; }
    say "seed $seed: both students trained on $*; the teacher ran once for all of them"
}

say "every way, a core for the first seed and one for the others"
export OMP_NUM_THREADS=1
(
    for seed in $seeds; do
        [ "$seed" = 0 ] || train "$seed" hard soft dynamic
    done
) &
others=$!
trap 'kill $others 2>/dev/null' EXIT
train 0 hard hard-teacher soft schedule dynamic
wait $others
trap - EXIT

say "the table"
"$python" examples/distill/report.py "$work"
say "figures in $work/summary.json, curves in $work/moe.png, $work/dense.png and $work/weights.png"

[ -n "$strange" ] || exit 0
say "half of the text in letters 13 places on: there the teacher knows less than the student soon does"
unset OMP_NUM_THREADS
for part in train held-out; do
    "$python" examples/distill/strange.py "$work/text/$part" "$work/strange-text/$part"
    pack "$work/strange-text/$part" "$work/strange-$part"
done
data="$work/train:0.5 $work/strange-train:0.5"
words=
for each in hard soft dynamic; do
    words="$words $(way moe "$each")"
done
half=$(way moe soft | sed 's/moe-soft/moe-half/; s/alpha=0.95/alpha=0.5/')
distill 0 "$work/strange" $words $half --steps "$steps" --log-every $((steps / 20)) --save-every 0 -q
"$python" examples/distill/evaluate.py --on "$work/held-out" --on "$work/strange-held-out" \
    "$work/strange/moe-hard" "$work/strange/moe-half" "$work/strange/moe-soft" \
    "$work/strange/moe-dynamic" "$work/teacher" | tee "$work/strange.md"
