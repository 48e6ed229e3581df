#!/bin/sh
# Learns two small tokenizers, from code and from a pipe, and shows what they make of a text.
# Runs in seconds; writes runs/train_tokenizer/, with what the first one learned in summary.json.
set -eu
cd "$(dirname "$0")/.."
l4=$(command -v l4 || echo .quickstart/bin/l4)
out=runs/train_tokenizer
rm -rf $out
mkdir -p $out

show() {
    echo "\$ l4 $*"
    "$l4" "$@"
    echo
}

# A folder: every text file in it is a document.
"$l4" train-tokenizer l4cli tests --vocab-size 2048 -o $out/code --json > $out/summary.json
cat $out/summary.json
show info $out/code

# A pipe is one document. The text is short: it gives fewer tokens than asked for, and says so.
echo "\$ cat README.md LICENSE | l4 train-tokenizer --vocab-size 4096 -o $out/prose"
cat README.md LICENSE | "$l4" train-tokenizer --vocab-size 4096 -o $out/prose
echo

# The same text in both, and in the built-in bytes.
for tokenizer in bytes $out/code $out/prose; do
    show tokenize LICENSE --tokenizer $tokenizer -o $out/license.tokens --force
done
