#!/bin/sh
# A checkpoint in a quarter of its size: formats, methods and parts, what each costs, what is refused.
# Quantizes $L4_MODEL, or a small model that was just trained for seconds.
# Writes runs/quantize/: int4/, int4-rounded/, fp8/, int4-gptq/, five-bits/, and the bits per weight of each in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
out=runs/quantize
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

# What it would give, before anything is written.
show quantize "$L4_MODEL" --format int4 --dry-run

# Groups of 32 weights share a scale; searched scales lose less than those the range gives.
show quantize "$L4_MODEL" --format int4 -o $out/int4
show quantize "$L4_MODEL" --format int4 --method round -o $out/int4-rounded
show quantize "$L4_MODEL" --format fp8 --experts int4 --lm-head int8 -o $out/fp8

# Calibrated: against the inputs that real text gives each map, every expert with tokens enough;
# then bits per byte, KL divergence and agreement with the original on text it was not shown.
"$l4" tokenize README.md --tokenizer "$L4_MODEL" --quiet -o $out/text.tokens
"$l4" tokenize LICENSE --tokenizer "$L4_MODEL" --quiet -o $out/held-out.tokens
text="--calibration $out/text.tokens --calibration-tokens 8k --eval-data $out/held-out.tokens"
show quantize "$L4_MODEL" --method gptq $text -o $out/int4-gptq

# Five bits a weight, spent where the outputs lose most.
show quantize "$L4_MODEL" --method gptq $text --budget 5 -o $out/five-bits

# A folder like any other: other programs open it, and so does everything here.
show info $out/int4
echo "Once upon a time" | show chat $out/int4 --raw --max-new-tokens 8 || true

for name in int4 int4-rounded fp8 int4-gptq five-bits; do
    bits=$(sed -n 's/^ "bits_per_weight": \(.*\),$/\1/p' $out/$name/quantize.json)
    printf '"%s": %s\n' $name "$bits"
done | paste -sd, - | sed 's/.*/{"bits_per_weight": {&}}/' > $out/summary.json
cat $out/summary.json

# Refused, with what to do instead.
for wrong in "$out/int4 -o $out/twice" "$L4_MODEL -o $out/int4" "$L4_MODEL --group-size 48 -o $out/x" \
    "$L4_MODEL --format fp8 --zero-points -o $out/x"; do
    echo "\$ l4 quantize $wrong"
    "$l4" quantize $wrong && exit 1 || echo "exit code $?"
    echo
done
