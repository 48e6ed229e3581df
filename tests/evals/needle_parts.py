"""Samples made by hand and readers that parse text: what a perfect and a blind model would say."""

from __future__ import annotations

import random
import re

from l4cli.data.longcontext.sample import Question, Sample
from l4cli.evals.needle import Job, Reading
from l4cli.evals.needle.subject import straddles
from l4cli.text import load_tokenizer

HARD = {"single": "multi-key-full"}


def has_depth(task: str) -> bool:
    return task != "count"


def make_sample(job: Job) -> Sample:
    """`#k=v;` among dots, one needle a depth; the hard variant has needles for dots."""
    rng = random.Random(str(job.seed(0)))
    filler = job.length // 2
    pieces, questions = [], []
    place = 0
    for depth in job.depths or (50.0,):
        end = int(filler * depth / 100)
        pieces.append(_filler(job.task, end - place, rng))
        key, value = f"{rng.randrange(10**6):06d}", f"{rng.randrange(100):02d}"
        evidence = len(pieces)
        pieces.append(f"#{key}={value};")
        questions.append(
            Question(
                f"\n#{key}=",
                (value,),
                evidence=(evidence,),
                depth=depth if job.depths else None,
                end=";",
            )
        )
        place = end
    pieces.append(_filler(job.task, filler - place, rng))
    return Sample(job.task, tuple(pieces), tuple(questions))


def _filler(task: str, length: int, rng: random.Random) -> str:
    if task != "multi-key-full":
        return "." * length
    needles = [f"#x{rng.randrange(1000):03d}={rng.randrange(100):02d};" for _ in range(length // 9)]
    return "".join(needles).ljust(length, ".")


class PerfectReader:
    """Finds what is asked for in the text; without it, says so."""

    speaks_freely = False

    def __init__(self, chunk_size: int | None = None, *, is_cut_by_borders: bool = False) -> None:
        self.chunk_size = chunk_size
        self.is_cut_by_borders = is_cut_by_borders  # cannot bind what lies in two chunks
        self.tokenizer = load_tokenizer("bytes")
        self.num_read = 0

    def read(self, sample: Sample) -> Reading:
        self.num_read += 1
        _, offsets = sample.encode(self.tokenizer)
        apart = [straddles(q, offsets, 1, self.chunk_size) for q in sample.questions]
        answers = []
        for question, is_apart in zip(sample.questions, apart, strict=True):
            key = question.prompt.strip().strip("#=")
            found = re.search(rf"#{key}=(\d+);", sample.text)
            is_missed = found is None or (is_apart and self.is_cut_by_borders)
            answers.append("unknown" if is_missed else found[1])
        return Reading(answers, len(sample.text), apart)
