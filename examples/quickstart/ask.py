"""Ask a trained model about pictures it never saw, and write down how often it was right.

in: a run folder, a folder of new pictures, the held-out text; out: summary.json

Every picture is read once; its questions go on from forks of that one cache.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from draw import QUESTIONS

from l4cli import load_model, load_tokenizer
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import grid_of, open_picture, tiles_of
from l4cli.inference import Engine, Request, SamplingOptions
from l4cli.text import Tokenizer, render_chat

BOX = re.compile(r"\[(\d+) (\d+) (\d+) (\d+)\]")


def overlap(answer: str, truth: str) -> float:
    """Intersection over union of two boxes `[x0 y0 x1 y1]`; 0 for an answer that is none."""
    found, wanted = BOX.search(answer), BOX.search(truth)
    if found is None or wanted is None:
        return 0.0
    a, b = [int(v) for v in found.groups()], [int(v) for v in wanted.groups()]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = sum(max(x1 - x0, 0) * max(y1 - y0, 0) for x0, y0, x1, y1 in (a, b))
    return both / (areas - both) if areas > both else 0.0


class Asker:
    """A model, its tokenizer, and questions in the words of the training chats."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint)
        vision = model.config.vision
        self.geometry = PictureGeometry(
            vision.image_size, vision.patch_size, vision.pixel_shuffle_ratio
        )
        self.engine = Engine(model, num_token_ids=self.tokenizer.vocab_size)

    def ask(self, path: Path) -> dict[str, str]:
        """Every kind of question about one picture, each in a conversation of its own."""
        picture = open_picture(path.read_bytes())
        pixels = torch.from_numpy(tiles_of(picture, self.geometry))
        grid = grid_of(picture.width, picture.height, self.geometry)
        prompts = [self._prompt(questions[0], grid) for questions in QUESTIONS.values()]
        shared = _common_length(prompts)
        cache = self.engine.prefill(prompts[0][:shared], pixels)
        requests = [
            Request(
                prompt[shared:],
                max_new_tokens=24,
                stop_ids=self.tokenizer.stop_ids,
                sampling=SamplingOptions(temperature=0.0),
                cache=fork,
            )
            for prompt, fork in zip(prompts, cache.fork(len(prompts)), strict=True)
        ]
        tokens: dict[int, list[int]] = defaultdict(list)
        for event in self.engine.generate(requests):
            if event.finish != "stop":
                tokens[event.request].append(event.token)
        return {kind: self.tokenizer.decode(tokens[i]) for i, kind in enumerate(QUESTIONS)}

    def _prompt(self, question: str, grid: tuple[int, int]) -> np.ndarray:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = render_chat(
            self.tokenizer,
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            image_grids=[grid],
            tokens_per_tile=self.geometry.tokens_per_tile,
        )
        return chat.ids


def _common_length(prompts: list[np.ndarray]) -> int:
    """How many first tokens all prompts share."""
    shortest = min(len(prompt) for prompt in prompts)
    same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def grade(asker: Asker, folder: Path) -> dict[str, float]:
    """Fractions right, and the mean overlap of boxes."""
    right: dict[str, list[float]] = defaultdict(list)
    for line in (folder / "truth.jsonl").read_text(encoding="utf-8").splitlines():
        truth = json.loads(line)
        answers = asker.ask(folder / truth["image"])
        for kind, answer in answers.items():
            is_right = answer.strip() == truth[kind]
            score = overlap(answer, truth[kind]) if kind == "box" else float(is_right)
            right["unseen " + kind if truth["is_unseen_pair"] else kind].append(score)
    figures = {kind: sum(scores) / len(scores) for kind, scores in right.items()}
    count = {kind: len(scores) for kind, scores in right.items()}
    print(f"asked about {count.get('colour', 0)} pictures of seen pairs and", end=" ")
    print(f"{count.get('unseen colour', 0)} of pairs never seen together")
    for kind, value in sorted(figures.items()):
        print(f"  {kind:<14} {value:.3f}" + ("  mean IoU" if kind.endswith("box") else ""))
    return figures


def bits_per_byte(run: Path) -> float:
    """The last held-out figure of a training run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [event["bits_per_byte"] for event in events if event["event"] == "eval"][-1]


def compressors(folder: Path) -> dict[str, float]:
    """Bits per byte of gzip and xz at their best, on all held-out text in one piece."""
    data = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    packed = {
        "gzip": gzip.compress(data, 9),
        "xz": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(blob) / len(data) for name, blob in packed.items()}


def main() -> None:
    """Ask, compare, write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of `l4 pretrain`")
    parser.add_argument("pictures", type=Path, help="what draw.py drew")
    parser.add_argument("held_out", type=Path, help="folder of held-out text")
    parser.add_argument("-o", "--out", type=Path, required=True, help="summary.json")
    args = parser.parse_args()
    figures = grade(Asker(args.run / "latest"), args.pictures)
    summary = {kind: figures[kind] for kind in ("colour", "shape", "where")}
    summary["unseen_pairs"] = figures["unseen shape"]
    summary["iou"] = figures["box"]
    summary["bits_per_byte"] = bits_per_byte(args.run)
    summary |= compressors(args.held_out)
    summary = {name: round(value, 4) for name, value in summary.items()}
    args.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    sys.exit(main())
