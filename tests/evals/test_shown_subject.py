"""A model asked about films and pictures: what it reads, how it is scored, its controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.tiny_chat import GEOMETRY, save_checkpoint

from l4cli.checkpoint import load_model
from l4cli.data.longcontext.video import make_video_sample
from l4cli.evals.needle import GridOptions, Job, ResultsStore, Role, plan_jobs, run_grid
from l4cli.evals.needle.grid import as_read
from l4cli.evals.needle.shown_subject import ShownSubject
from l4cli.inference import Engine, Request
from l4cli.text import image_block, load_tokenizer

TOKENIZER = load_tokenizer("bytes")


def subject_of(folder: Path, *, is_chat: bool = False) -> ShownSubject:
    engine = Engine(load_model(folder), num_token_ids=TOKENIZER.vocab_size)
    return ShownSubject(engine, TOKENIZER, GEOMETRY, is_chat=is_chat)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="module")
def red_folder(tmp_path_factory) -> Path:
    """A model that always says `red`."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "red", "red")


def make(job: Job):
    rng = np.random.default_rng(job.seed(0))
    return make_video_sample(
        job.task, num_frames=job.length, depths=job.depths, fps=1, side=16, rng=rng
    )


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("task", ["video", "pictures"])
def test_reading_is_prefilling_all_tiles_and_decoding(random_folder, tmp_path, task, is_chat):
    subject = subject_of(random_folder, is_chat=is_chat)
    depths = (50.0,) if task == "video" else (0.0, 100.0)
    sample = make(Job(Role.test, task, 6, 0, depths))
    reading = subject.read(sample)
    tiles = torch.from_numpy(sample.shown.source(tmp_path, GEOMETRY, is_whole=True).tiles(0, 6))
    block = image_block(TOKENIZER, 1, 1, GEOMETRY.tokens_per_tile)
    before, after = subject.frame.before, subject.frame.after
    asked = 0
    for question, answer in zip(sample.questions, reading.answers, strict=True):
        ids = [*before, *(list(block) * 6), *question.prompt.encode(), *after]
        request = Request(ids, tiles, max_new_tokens=len(answer.encode()) + 1)
        written = [event.token for event in subject.engine.generate([request])]
        assert TOKENIZER.decode(written).startswith(answer) or answer == ""
        asked = max(asked, len(question.prompt) + len(question.answers[0]) + len(after))
    assert reading.num_tokens == len(before) + 6 * len(block) + asked


def test_straddled_frames(random_folder) -> None:
    """Chunks of 16 tokens, frames of 7 after BOS: against a plain loop."""
    subject = subject_of(random_folder)
    depths = tuple(100 * i / 11 for i in range(12))
    reading = subject.read(make(Job(Role.test, "pictures", 12, 0, depths)))
    want = []
    for place in range(12):
        tokens = range(1 + 7 * place, 1 + 7 * place + 7)
        want.append(len({token // 16 for token in tokens}) > 1)
    assert reading.is_straddled == want
    assert True in want
    assert False in want


def test_a_grid_of_films_is_scored_by_what_they_show(red_folder, tmp_path) -> None:
    options = GridOptions(("video-colour",), (3, 5), (0.0, 100.0), num_samples=6, is_separate=True)
    jobs = plan_jobs(options, lambda _: True, {})
    store = ResultsStore.open(tmp_path / "out", {})
    run_grid(jobs, make, subject_of(red_folder), store)
    tested = [job for job in jobs if job.role is Role.test]
    right = {job.key: make(job).questions[0].answers == ("red",) for job in tested}
    found = {record["key"]: record["answers"][0]["score"] == 1.0 for record in store.records}
    assert {key: found[key] for key in right} == right
    assert any(right.values())
    assert {record["role"] for record in store.records} == {"test", "no_needle", "closed_book"}


def test_controls_show_nothing_to_find(random_folder, tmp_path) -> None:
    job = Job(Role.test, "video", 4, 0, (50.0,))
    sample = make(job)
    assert sample.is_whole
    blind = as_read(replace(job, role=Role.no_needle), sample)
    assert not blind.is_whole
    assert blind.pieces
    whole, without = (
        sample.shown.source(tmp_path, GEOMETRY, is_whole=is_whole).tiles(0, 4)
        for is_whole in (True, False)
    )
    differ = np.abs(whole - without).mean(axis=(1, 2, 3)) > 0.1
    assert differ.tolist() == [False, False, True, False]
    subject = subject_of(random_folder)
    alone = subject.read(as_read(replace(job, role=Role.closed_book), sample))
    question = sample.questions[0]
    assert alone.num_tokens == 1 + len(question.prompt) + len(question.answers[0])
    assert subject.read(blind).num_tokens == subject.read(sample).num_tokens
