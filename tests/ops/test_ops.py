"""Every fast version against the plain one: values and gradients, in fp64 where it can run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.ops.attention import (
    full_attention,
    plan_attention,
    reference_segment_attention,
    segment_attention,
)
from l4cli.ops.batch import Segments
from l4cli.ops.cross_entropy import linear_cross_entropy, token_losses
from l4cli.ops.moe import ROUTED_EXPERTS, reference_routed_experts, route, routed_experts
from l4cli.ops.norm import reference_rms_norm, rms_norm, unit_rms
from l4cli.ops.rope import rotate, rotate_unit, rotation
from l4cli.ops.swiglu import swiglu


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_and_gradients(op: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    (out.float() * normal(*out.shape, seed=99)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_like_reference(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """fp32 closely; bf16 no worse against fp32 than twice what the plain version loses."""
    wanted = values_and_gradients(plain, inputs)
    for got, want in zip(values_and_gradients(fast, inputs), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    low = [x.bfloat16() for x in inputs]
    exact = values_and_gradients(plain, [x.float() for x in low])
    theirs, ours = values_and_gradients(plain, low), values_and_gradients(fast, low)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x.float() - want).norm() for x in (got, other))
        assert error <= 2 * allowed + 1e-6 * want.norm()


def test_rms_norm() -> None:
    inputs = [normal(3, 7, 32), 1 + 0.3 * normal(32, seed=1)]
    assert_like_reference(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: reference_rms_norm(x, w, 1e-5), inputs
    )


def test_rotation_with_unit_norm() -> None:
    turn = rotation(torch.arange(14).view(2, 7), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    assert_like_reference(
        lambda x: rotate_unit(x, turn, 1e-5),
        lambda x: unit_rms(rotate(x, turn), 1e-5),
        [normal(2, 7, 3, 8)],
    )


def test_swiglu() -> None:
    inputs = [3 * normal(5, 16), normal(5, 16, seed=1)]
    assert_like_reference(swiglu, lambda gate, up: F.silu(gate) * up, inputs)


@pytest.mark.parametrize("version", ["sorted", "grouped-mm"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_routed_experts(top_k: int, version: str) -> None:
    """Also with experts that nobody chose."""
    if version == "grouped-mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no `grouped_mm`")
    run = ROUTED_EXPERTS.named(version).load()
    logits_ME = normal(23, 5, seed=3)
    logits_ME[:, 1] = -50.0
    _, expert_MA = route(logits_ME, top_k)
    inputs = [normal(23, 8), normal(23, top_k).sigmoid()]
    width = 8 if version == "grouped-mm" else 6  # torch's wants rows of whole 16 bytes
    inputs += [0.4 * normal(5, 8, 2 * width, seed=1), 0.4 * normal(5, width, 8, seed=2)]
    assert_like_reference(
        lambda x, g, a, b: run(x, g, expert_MA, a, b),
        lambda x, g, a, b: reference_routed_experts(x, g, expert_MA, a, b),
        inputs,
    )


def test_sizes_that_torch_cannot_group_are_refused_with_a_way_out() -> None:
    run = ROUTED_EXPERTS.named("grouped-mm").load()
    chosen = torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(L4Error, match="multiples of 4, or 16 bytes") as caught:
        run(normal(3, 8), torch.ones(3, 1), chosen, normal(2, 8, 12), normal(2, 6, 8))
    assert "L4_OPS=routed_experts=triton" in caught.value.fix


def test_no_expert_touches_a_token_it_was_not_given() -> None:
    expert_MA = torch.tensor([[0], [2], [0]])
    w_in, w_out = normal(3, 4, 8), normal(3, 4, 4)
    w_in[1] = float("nan")  # would spread if expert 1 ran on anything
    y = routed_experts(normal(3, 4), torch.ones(3, 1), expert_MA, w_in, w_out)
    assert y.isfinite().all()


def test_routing_by_hand() -> None:
    """D=2, E=2, logits [0, 2]: the second expert, at sigmoid(2)."""
    gate, expert = route(torch.tensor([[0.0, 2.0]]), 1)
    assert expert.tolist() == [[1]]
    assert gate.item() == pytest.approx(0.880797, abs=1e-6)


def test_a_bias_moves_the_choice_and_not_the_gate() -> None:
    logits = torch.tensor([[0.0, 2.0]])
    gate, expert = route(logits, 1, torch.tensor([1.0, 0.0]))
    assert expert.tolist() == [[0]]
    assert gate.item() == pytest.approx(0.5)


ROWS = {
    "equal": [[1] * 16, [1] * 16],
    "packed": [[1] * 5 + [2] * 10 + [0], [1] * 1 + [2] * 15],
    "padding first": [[0, 0, 0] + [1] * 13, [1] * 16],
    "all padding": [[0] * 16, [1] * 3 + [0] * 13],
}


@pytest.mark.parametrize("chunk", [None, 4, 6])
@pytest.mark.parametrize("rows", ROWS)
def test_segment_attention(rows: str, chunk: int | None) -> None:
    segments = Segments.from_document_ids(torch.tensor(ROWS[rows]), chunk)
    starts, lengths = segments.local_starts, segments.local_lengths
    plan = plan_attention(starts, lengths, 32, torch.device("cpu"))
    inputs = [normal(2, 16, 6, 8), normal(2, 16, 2, 8, seed=1), normal(2, 16, 2, 8, seed=2)]
    assert_like_reference(
        lambda q, k, v: segment_attention(q, k, v, plan),
        lambda q, k, v: reference_segment_attention(q, k, v, starts, lengths),
        inputs,
    )


@pytest.mark.parametrize("length", [100, 128, 300])
def test_blocked_attention_past_its_block(length: int) -> None:
    starts, lengths = torch.tensor([0, length]), torch.tensor([length, length])
    plan = plan_attention(starts, lengths, 2 * length, torch.device("cpu"))
    inputs = [
        normal(2, length, 4, 8),
        normal(2, length, 2, 8, seed=1),
        normal(2, length, 2, 8, seed=2),
    ]
    assert_like_reference(
        lambda q, k, v: segment_attention(q, k, v, plan),
        lambda q, k, v: reference_segment_attention(q, k, v, starts, lengths),
        inputs,
    )


@pytest.mark.parametrize("length", [17, 128, 300])
def test_full_attention(length: int) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probs = (torch.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5).softmax(-1)
        return torch.einsum("bnts,bsnh->btnh", probs, v)

    inputs = [normal(2, length, 3, 8, seed=seed) for seed in range(3)]
    assert_like_reference(full_attention, plain, inputs)


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_cross_entropy_in_chunks(chunk: int | None) -> None:
    labels = torch.arange(20) % 11
    weights = torch.tensor([0.0, 1.0, 0.5, 2.0]).repeat(5)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        losses = F.cross_entropy((h @ w.T).float(), labels, reduction="none")
        return (losses * weights).sum()

    def fast(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, weights, chunk)

    assert_like_reference(fast, plain, [normal(20, 8), normal(11, 8, seed=1)])


def test_cross_entropy_of_uniform_logits_is_log_of_the_vocabulary() -> None:
    weight = torch.zeros(16, 4)
    loss = linear_cross_entropy(normal(3, 4), weight, torch.tensor([0, 5, 9]), torch.ones(3))
    assert loss.item() == pytest.approx(3 * 2.7725887, abs=1e-5)
    assert token_losses(normal(3, 4), weight, torch.tensor([0, 5, 9])).tolist() == pytest.approx(
        [2.7725887] * 3, abs=1e-6
    )


def test_no_target_is_no_loss_and_no_gradient() -> None:
    h = normal(3, 4).requires_grad_()
    weight = normal(5, 4).requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.zeros(3, dtype=torch.long), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()
    assert not weight.grad.any()
