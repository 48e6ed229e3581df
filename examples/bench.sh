#!/bin/sh
# How fast the nano preset reads, answers and trains here, with what else is installed beside it,
# and how fast Llama 4 can answer at best on named GPUs. Half a minute; name a checkpoint with
# L4_MODEL to measure that one. Puts llama.cpp beside it when `llama-bench` is on the PATH and
# `gguf` is installed. Writes runs/bench/, with the figures in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
python=$(dirname "$(readlink -f "$l4")")/python
rm -rf runs/bench
mkdir -p runs/bench

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

model=${L4_MODEL:-preset:nano}
show bench "$model" --prompt 128,512 --depth 0,1k --batch 1,8 --repeats 3
"$l4" bench "$model" --what decode --peers none --repeats 3 --json > runs/bench/events.jsonl
show bench --roofline --gpus h100,h200,b200,mi300x
show bench preset:scout --roofline --gpus h100 --depth 0,128k --batch 1,64

"$python" - << 'EOF'
import json, pathlib
folder = pathlib.Path("runs/bench")
events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
names = ("what", "tok_per_sec", "share", "read_bytes_per_sec", "load_average")
facts = {name: event[name] for event in events for name in names if name in event}
(folder / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
EOF
cat runs/bench/summary.json
