#!/bin/sh
# Turns text, rows, a chat, pictures and made documents into token streams and inspects them.
# Runs in seconds; writes runs/tokenize/, with what the last stream holds in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
rm -rf runs/tokenize
mkdir -p runs/tokenize

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

# A red disc on white, 96 x 48 pixels.
base64 -d > runs/tokenize/disc.png << 'PNG'
iVBORw0KGgoAAAANSUhEUgAAAGAAAAAwAQMAAADU2O2MAAAABlBMVEX////cHh7/Hx2WAAAAhUlEQVR42q3R
sQ2DQBBE0ceBZDJTAu4Ed+QSrxSXQEiAwIGPRciWCOzJvmZ29lbH/3WdQAKPy25U65rDSfQBDV1ASxvQ0QT0
+ywDFdSQUeVtaVFSIoMvzgG2+pPYf2GB52ls3Q48OLVy2X1zcommUrsEjMwBE1PAzBiwvF9Tqg23jz/9WS/u
XBfvi33kxwAAAABJRU5ErkJggg==
PNG
cat > runs/tokenize/rows.jsonl << 'ROWS'
{"text": "Plain text, with labels.", "lang": "en", "source": "example"}
{"text": "A picture goes where its marker stands: <|image|>", "images": ["disc.png"]}
{"messages": [{"role": "user", "content": "<|image|>What colour?"}, {"role": "assistant", "content": "Red."}], "images": ["disc.png"]}
{"txt": "This row has no `text`: --skip-bad leaves it out and says so."}
ROWS

# A folder: code and text, one document a file; files named .jsonl hold one a row.
show tokenize l4cli README.md -o runs/tokenize/code.tokens
# Rows and pictures, in the tiles of a preset.
show tokenize runs/tokenize/rows.jsonl --preset nano --skip-bad -o runs/tokenize/rows.tokens
# A pipe is one document; a named picture is one too.
echo "\$ cat LICENSE | l4 tokenize --preset nano - runs/tokenize/disc.png > runs/tokenize/more.tokens"
cat LICENSE | "$l4" tokenize --preset nano - runs/tokenize/disc.png > runs/tokenize/more.tokens
echo
# Streams of one tokenizer and geometry can be joined.
cat runs/tokenize/rows.tokens runs/tokenize/more.tokens > runs/tokenize/all.tokens
show info runs/tokenize/all.tokens --samples 2
# Documents made on the spot, for teaching a model to find things in long text.
show tokenize --synthetic retrieval --count 100k --length 512 --hard 0.5 --haystack LICENSE \
    --needle '#{key}={value};' --question '#{key}=' --keys letters:2 --values digits:3 \
    -o runs/tokenize/needles.tokens
"$l4" info runs/tokenize/all.tokens --json > runs/tokenize/summary.json
