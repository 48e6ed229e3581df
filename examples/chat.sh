#!/bin/sh
# Asks a model about pictures and a video: one question, two pictures, frames, a pipe, JSON, guesses
# ahead, boxes, what is refused.
# Uses $L4_MODEL or the newest run here (`sh examples/quickstart.sh` makes a good one); with
# neither it first trains one on a few drawings for a minute: it knows little else. Writes
# runs/chat/, with one answer as JSON in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
python=$(dirname "$(readlink -f "$l4")")/python
mkdir -p runs/chat

show() {
    echo "\$ l4 $*"
    "$l4" "$@" < /dev/null
    echo
}

# Squares and circles in four places, each with what can be asked about it.
"$python" - runs/chat << 'EOF'
import itertools, json, sys
import av
from PIL import Image, ImageDraw
folder, rows = sys.argv[1], []
looks = itertools.product(("red", "green", "blue"), ("square", "circle"), ("left", "right"), ("top", "bottom"))
for colour, shape, side, edge in looks:
    x, y = {"left": 6, "right": 34}[side], {"top": 6, "bottom": 34}[edge]
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)((x, y, x + 23, y + 23), fill=colour)
    name = f"{colour}-{shape}-{edge}-{side}.png"
    image.save(f"{folder}/{name}")
    box = [round(100 * v / 64) for v in (x, y, x + 24, y + 24)]
    turns = [("What colour is the shape?", f"It is {colour}."), ("Where is it?", f"At the {edge} {side}."),
             ("Give its box.", "[{} {} {} {}]".format(*box)), ("Describe the picture.", f"A {colour} {shape} at the {edge} {side}.")]
    for question, answer in turns:
        rows.append({"images": [name], "messages": [{"role": "user", "content": "<|image|>" + question},
                                                     {"role": "assistant", "content": answer}]})
with open(f"{folder}/chats.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)

# A circle that crosses the screen in four seconds.
with av.open(f"{folder}/film.mp4", "w") as film:
    stream = film.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
    for i in range(40):
        frame = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(frame).ellipse((i, 6, i + 23, 29), fill="blue")
        film.mux(stream.encode(av.VideoFrame.from_image(frame)))
    film.mux(stream.encode(None))
EOF

if [ -z "${L4_MODEL:-}" ] && ! ls -d runs/*/latest > /dev/null 2>&1; then
    rm -rf runs/chat/model runs/chat/shards
    "$l4" tokenize runs/chat/chats.jsonl --preset nano --quiet |
        "$l4" pack --seq-len 256 -o runs/chat/shards --quiet
    show pretrain runs/chat/shards --preset nano --steps 100 --batch-size 8 -o runs/chat/model
    export L4_MODEL=runs/chat/model
fi

one=runs/chat/blue-circle-top-right.png
two=runs/chat/red-square-bottom-left.png
show chat --image $one
show chat -p "Where is it?" --image $two
show chat -p "Compare these." --image $one --image $two --temperature 0.7 --seed 3

show chat -p "What colour is the shape?" --video runs/chat/film.mp4 --fps 1

echo '$ echo "What colour is the shape?" | l4 chat --json --image' $one
echo "What colour is the shape?" | "$l4" chat --json --image $one > runs/chat/summary.json
cat runs/chat/summary.json
echo

# The same answer, checked several words at a time where they were said before.
show chat -p "What colour is the shape?" --image $one --lookup

show chat -p "Give its box." --image $one --boxes runs/chat/boxes.png

# Refused, with what to do instead.
for wrong in "chat -p hello --image README.md" "chat nowhere -p hello" "chat -p hello --top-p 2"; do
    echo "\$ l4 $wrong"
    "$l4" $wrong < /dev/null && exit 1 || echo "exit code $?"
    echo
done
