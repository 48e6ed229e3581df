"""What quantization lost: against the whole models' logits, and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from l4cli.checkpoint import load_model, plan_quantization, quantize_checkpoint, save_model
from l4cli.errors import L4Error
from l4cli.evals.quality import _Tally, compare
from l4cli.model import Llama4Config, build_model
from l4cli.ops.batch import Batch
from l4cli.quantization import RoundingQuantizer, WeightFormat
from l4cli.text import load_tokenizer

SHAPE = {
    "model_type": "llama4_text",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    model = build_model(Llama4Config.from_dict(SHAPE), seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    save_model(model, folder / "model", load_tokenizer("bytes").files())
    plan = plan_quantization(folder / "model", {"experts": WeightFormat("int4", 32)})
    quantize_checkpoint(plan, folder / "int4", RoundingQuantizer())
    return folder / "model", folder / "int4"


def rows(seed: int = 0) -> Batch:
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(seed))
    return Batch.from_tokens(ids, attention_chunk_size=8)


def test_equals_the_whole_models(pair: tuple[Path, Path]) -> None:
    data = [rows(0), rows(1)]
    token_bytes = load_tokenizer("bytes").num_bytes()
    found = compare(*pair, data, token_bytes)
    kl, nats, same, num_bytes = [], [0.0, 0.0], 0, 0
    with torch.no_grad():
        for batch in data:
            logps = []
            for i, path in enumerate(pair):
                model = load_model(path, dtype=torch.float32)
                logp = model.lm_head(model.hidden(batch))[:, :-1].double().log_softmax(-1)
                labels = batch.input_ids[:, 1:]
                nats[i] -= float(logp.gather(-1, labels[..., None]).sum())
                logps.append(logp.flatten(0, 1))
            kl.append((logps[0].exp() * (logps[0] - logps[1])).sum(-1))
            same += int((logps[0].argmax(-1) == logps[1].argmax(-1)).sum())
            num_bytes += int(token_bytes[labels].sum())
    count = 2 * 3 * 23
    assert (found.num_tokens, found.num_bytes) == (count, num_bytes)
    assert found.original_loss == pytest.approx(nats[0] / count, rel=1e-5)
    assert found.loss == pytest.approx(nats[1] / count, rel=1e-5)
    assert found.original_bits_per_byte == pytest.approx(nats[0] / math.log(2) / num_bytes)
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.kl_99 == pytest.approx(float(torch.cat(kl).sort().values[136]), rel=1e-3)
    assert found.top1_agreement == same / count
    assert 0 < found.kl_mean < found.kl_99
    assert found.router_agreement is not None
    assert 0.5 < found.router_agreement <= 1


def test_a_model_agrees_with_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    states = (tmp_path / "a", tmp_path / "b")
    seen: list[tuple[int, int]] = []
    found = compare(
        pair[0],
        pair[0],
        [rows()],
        load_tokenizer("bytes").num_bytes(),
        states=states,
        on_layer=lambda done, total: seen.append((done, total)),
    )
    assert (found.kl_mean, found.kl_99, found.relative_loss) == (0, 0, 0)
    assert (found.top1_agreement, found.router_agreement) == (1, 1)
    assert seen == [(1, 2), (2, 2)]
    assert not any(path.exists() for path in states)


def test_counts_worked_by_hand() -> None:
    tally = _Tally(np.array([1, 3], np.int32))
    ours = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    other = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    tally.add(ours, other, torch.tensor([0, 1]))
    found = tally.quality(None)
    assert found.num_bytes == 4
    assert found.original_bits_per_byte == pytest.approx((1 + math.log2(4 / 3)) / 4)
    assert found.bits_per_byte == pytest.approx((1 + 2) / 4)
    # 1/4 ln(1/3) + 3/4 ln(3) on one token of two
    assert found.kl_mean == pytest.approx(math.log(3) / 2 / 2)
    assert found.kl_99 == pytest.approx(math.log(3) / 2)
    assert found.top1_agreement == 0.5
    assert found.router_agreement is None


def test_nothing_to_predict_is_refused(pair: tuple[Path, Path]) -> None:
    token_bytes = load_tokenizer("bytes").num_bytes()
    with pytest.raises(L4Error, match="no token to predict"):
        compare(*pair, [Batch.from_tokens(torch.zeros(1, 1, dtype=torch.int64))], token_bytes)
