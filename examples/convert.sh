#!/bin/sh
# One checkpoint in other formats: plain Hugging Face in bf16, and GGUF files for llama.cpp in
# three precisions; then a shape that llama.cpp would get wrong. Trains a model on the README for
# a few seconds first. GGUF needs `pip install gguf` and is left out without it; with
# L4_LLAMA_CPP=/path/to/llama.cpp/bin that model also speaks there. Writes runs/convert/, the
# sizes in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
python=$(dirname "$(readlink -f "$l4")")/python
rm -rf runs/convert
mkdir -p runs/convert

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

# A shape that llama.cpp computes alike: chunks of 8,192, every fourth layer without RoPE.
"$l4" train-tokenizer README.md LICENSE --vocab-size 768 -o runs/convert/tok --quiet
"$l4" tokenize README.md LICENSE --tokenizer runs/convert/tok --quiet |
    "$l4" pack --seq-len 256 -o runs/convert/shards --quiet
cat > runs/convert/shape.json << 'EOF'
{"model_type": "llama4_text", "vocab_size": 768, "hidden_size": 64, "intermediate_size": 128,
 "intermediate_size_mlp": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
 "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "interleave_moe_layer_step": 2,
 "max_position_embeddings": 8192, "rope_theta": 10000.0}
EOF
show pretrain runs/convert/shards --config runs/convert/shape.json --steps 150 --batch-size 8 -o runs/convert/model

show convert runs/convert/model -o runs/convert/hf --to hf --dtype bf16
show info runs/convert/hf
if "$python" -c 'import gguf' 2> /dev/null; then
    for dtype in bf16 q8_0 q4_0; do
        show convert runs/convert/model -o runs/convert/$dtype.gguf --to gguf --dtype $dtype --json |
            tee -a runs/convert/events.txt
    done
    # nano's chunks are 256 tokens: refused, with the length up to which it would be right.
    "$l4" pretrain runs/convert/shards --preset nano --steps 1 --batch-size 1 -o runs/convert/nano --quiet
    echo '$ l4 convert runs/convert/nano -o runs/convert/nano.gguf --to gguf'
    "$l4" convert runs/convert/nano -o runs/convert/nano.gguf --to gguf && exit 1 || echo "exit code $?"
    if [ -n "${L4_LLAMA_CPP:-}" ]; then
        "$L4_LLAMA_CPP/llama-simple" -m runs/convert/bf16.gguf -n 32 "The model is" 2> /dev/null
    fi
else
    echo 'no GGUF files: `pip install gguf` first'
fi

"$python" - << 'EOF'
import json, pathlib
folder = pathlib.Path("runs/convert")
sizes = {"hf": sum(f.stat().st_size for f in (folder / "hf").rglob("*") if f.is_file())}
sizes |= {f.name: f.stat().st_size for f in sorted(folder.glob("*.gguf"))}
(folder / "summary.json").write_text(json.dumps({"bytes": sizes}, indent=1) + "\n")
EOF
cat runs/convert/summary.json
