"""Packed weights give what plain ones give, in every place a model has them."""

from __future__ import annotations

import pytest
import torch
from test_engine import picture_prompt
from tiny_llama4 import full_logits, random_ids, text_model, vision_model

from l4cli.inference import Engine, Request, pack_weights
from l4cli.ops.packed_linear import pack, packed_linear, reference_packed_linear, why_not


@pytest.fixture(autouse=True)
def _needs_packing():
    reason = why_not(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_product(dtype, rows):
    if why_not(torch.device("cpu"), dtype) is not None:
        pytest.skip("no such layout here")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, 70, generator=generator).to(dtype)
    weight, bias = torch.randn(33, 70, generator=generator), torch.randn(33, generator=generator)
    with torch.inference_mode():
        for offset in (None, bias.to(dtype)):
            exact = reference_packed_linear(x.double(), weight.to(dtype).double(), None)
            exact = exact if offset is None else exact + offset.double()
            plain = reference_packed_linear(x, weight.to(dtype), offset)
            packed = packed_linear(x, pack(weight, dtype), offset)
            assert packed.shape == plain.shape
            assert packed.dtype == dtype
            error, allowed = (packed - exact).abs().max(), (plain - exact).abs().max()
            assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_packed_model_answers_alike(top_k):
    plain, packed = (text_model(num_experts_per_tok=top_k) for _ in range(2))
    assert pack_weights(packed) is None
    ids = random_ids(21)
    torch.testing.assert_close(
        full_logits(packed, ids), full_logits(plain, ids), atol=1e-4, rtol=1e-4
    )
    requests = [Request(ids[:n], max_new_tokens=10) for n in (1, 9, 21)]
    answers = [
        [(event.request, event.token) for event in Engine(model).generate(requests)]
        for model in (plain, packed)
    ]
    assert answers[0] == answers[1]
    torch.testing.assert_close(Engine(packed).score(ids), Engine(plain).score(ids))


def test_a_packed_model_sees_alike():
    plain, packed = vision_model(), vision_model()
    assert pack_weights(packed) is None
    ids, pixels = picture_prompt()
    torch.testing.assert_close(
        Engine(packed).prefill(ids, pixels).logits_V,
        Engine(plain).prefill(ids, pixels).logits_V,
        atol=1e-4,
        rtol=1e-4,
    )


def test_masters_are_packed_in_the_compute_dtype():
    if why_not(torch.device("cpu"), torch.bfloat16) is not None:
        pytest.skip("no bf16 layout here")
    plain, packed = text_model(), text_model()
    plain.compute_dtype = packed.compute_dtype = torch.bfloat16
    assert pack_weights(packed) is None
    ids = random_ids(9)
    exact = full_logits(text_model(), ids).double()
    error = (full_logits(packed, ids).double() - exact).abs().mean()
    assert error <= 2 * (full_logits(plain, ids).double() - exact).abs().mean()


def test_what_cannot_be_packed_says_why():
    assert "float16" in why_not(torch.device("cpu"), torch.float16)
    assert "cuda" in why_not(torch.device("cuda"), torch.bfloat16)
