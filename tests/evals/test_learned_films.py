"""A model that learned to find a frame finds it in encoded films, and guesses without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli.tiny_chat import GEOMETRY, tiny_config

from l4cli.data.longcontext.video import ShownSample, make_video_sample
from l4cli.evals.needle import GridOptions, Job, ResultsStore, Role, plan_jobs, run_grid
from l4cli.evals.needle.shown_subject import ShownSubject
from l4cli.inference import Engine
from l4cli.model import build_model
from l4cli.text import image_block, load_tokenizer

TOKENIZER = load_tokenizer("bytes")
NUM_FRAMES, ANSWER = 4, 6  # bytes of the longest colour's name


def sample_of(num_frames: int, depth: float, rng: np.random.Generator) -> ShownSample:
    return make_video_sample(
        "video-colour",
        num_frames=num_frames,
        depths=(depth,),
        fps=1,
        side=32,
        rng=rng,
        question="?",
    )


def documents(num: int, folder, rng: np.random.Generator):
    """Ids with the answer at their end, -1 where nothing is to be predicted, and tiles."""
    block = image_block(TOKENIZER, 1, 1, GEOMETRY.tokens_per_tile)
    context = [TOKENIZER.bos_id, *(block.tolist() * NUM_FRAMES), *b"?\n"]
    ids, labels, tiles = [], [], []
    for _ in range(num):
        sample = sample_of(NUM_FRAMES, float(rng.uniform(0, 100)), rng)
        answer = list(sample.questions[0].answers[0].encode())
        padding = ANSWER - len(answer)
        ids.append([*context, *answer, *[0] * padding])
        labels.append([*[-1] * (len(context) - 1), *answer, *[-1] * (padding + 1)])
        source = sample.shown.source(folder, GEOMETRY, is_whole=True)
        tiles.append(source.tiles(0, NUM_FRAMES))
    return torch.tensor(ids), torch.tensor(labels), torch.from_numpy(np.stack(tiles))


@pytest.mark.slow
def test_a_trained_model_finds_the_frame(tmp_path) -> None:
    rng = np.random.default_rng(1)
    ids_NT, labels_NT, tiles = documents(600, tmp_path, rng)
    config = tiny_config(num_hidden_layers=4, hidden_size=64, head_dim=16, attention_chunk_size=64)
    model = build_model(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    num_steps = 200
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - step / num_steps)
        pick = torch.from_numpy(rng.integers(0, len(ids_NT), 32))
        logits_BTV = model(ids_NT[pick], tiles[pick].flatten(0, 1))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_NT[pick].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    options = GridOptions(
        ("video-colour",), (NUM_FRAMES,), (0.0, 33.3, 66.7, 100.0), num_samples=8, is_separate=True
    )
    store = ResultsStore.open(tmp_path / "out", {})
    subject = ShownSubject(Engine(model, num_token_ids=TOKENIZER.vocab_size), TOKENIZER, GEOMETRY)

    def make(job: Job) -> ShownSample:
        return sample_of(job.length, job.depths[0], np.random.default_rng(job.seed(0)))

    run_grid(plan_jobs(options, lambda _: True, {}), make, subject, store)
    scores: dict[str, list[float]] = {}
    for record in store.records:
        scores.setdefault(record["role"], []).append(record["answers"][0]["score"])
    assert np.mean(scores[Role.test]) >= 0.9, scores
    # Eight colours; without the frame, or any film at all, there is nothing to know.
    assert np.mean(scores[Role.closed_book]) <= 0.4, scores
    assert np.mean(scores[Role.test]) > np.mean(scores[Role.no_needle]) + 0.3, scores
