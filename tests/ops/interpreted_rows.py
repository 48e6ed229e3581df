"""Run through `test_triton_rows.py`: norms, rotation, SwiGLU and the loss, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_harness import repair_interpreter
from triton_oracles import assert_close_to_fp64, assert_near, normal

repair_interpreter()

from l4cli.ops.norm import RMS_NORM  # noqa: E402
from l4cli.ops.rope import ROTATE_UNIT, rotation  # noqa: E402
from l4cli.ops.swiglu import SWIGLU  # noqa: E402
from src_kernels.cuda import cross_entropy, norm  # noqa: E402

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def unit(x: Tensor) -> Tensor:
    """The formula: fp64 stays fp64, the rest is computed in fp32 as models do."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 3), (7, 37), (2, 3, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [normal(*shape), 1 + 0.3 * normal(shape[-1], seed=1)]
    run = RMS_NORM.named("triton").load()
    assert_close_to_fp64(lambda x, w: run(x, w, EPS), lambda x, w: unit(x) * w, inputs, dtype)


def test_rms_norm_of_rows_that_lie_apart_and_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows a stripe of the weight's gradient, the last stripe short."""
    monkeypatch.setattr(norm, "STRIPES", 3)
    wide, weight = normal(11, 40), normal(24, seed=1)
    assert_close_to_fp64(
        lambda x, w: norm.rms_norm(x[:, 8:32], w, EPS),
        lambda x, w: unit(x[:, 8:32]) * w,
        [wide, weight],
        torch.float32,
    )


def test_rms_norm_of_nothing() -> None:
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    norm.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


def turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn.to(torch.complex128).unsqueeze(2)).flatten(-2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 12), (5, 16)])
def test_rotation_with_unit_norm(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]])
    turn = rotation(positions, normal(head_dim // 2, seed=2).exp())
    run = ROTATE_UNIT.named("triton").load()
    assert_close_to_fp64(
        lambda x: run(x, turn, EPS),
        lambda x: unit(turned(x, turn)).to(x.dtype),
        [normal(2, 5, num_heads, head_dim)],
        dtype,
    )


def test_rotation_of_a_part_of_a_product_and_of_late_positions() -> None:
    """Queries are a slice of the projection; with a cache the newest positions alone are turned."""
    turn = rotation(torch.arange(6).expand(2, 6), normal(4).exp())[:, 4:]
    whole = normal(2, 2, 3 * 8 + 5)
    run = ROTATE_UNIT.named("triton").load()

    def part(x: Tensor) -> Tensor:
        return x.split([24, 5], -1)[0].unflatten(-1, (3, 8))

    assert_close_to_fp64(
        lambda x: run(part(x), turn, EPS),
        lambda x: unit(turned(part(x), turn)).to(x.dtype),
        [whole],
        torch.float32,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (2, 3, 1030)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    run = SWIGLU.named("triton").load()
    inputs = [3 * normal(*shape), normal(*shape, seed=1)]
    assert_close_to_fp64(run, lambda gate, up: F.silu(gate) * up, inputs, dtype)


def test_swiglu_of_two_halves() -> None:
    run = SWIGLU.named("triton").load()
    assert_close_to_fp64(
        lambda h: run(*h.chunk(2, -1)),
        lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        [normal(4, 26)],
        torch.float32,
    )


# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "vocabulary", "most"),
    [(1, 1, 2, 2**20), (37, 40, 101, 2**20), (37, 40, 101, 37 * 32), (67, 33, 130, 1)],
)
def test_token_losses(
    num_tokens: int, hidden: int, vocabulary: int, most: int, dtype: torch.dtype
) -> None:
    """One and several blocks of the vocabulary; nothing a multiple of anything."""
    labels = torch.arange(num_tokens) * 7 % vocabulary

    def plain(h: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((h @ weight.T).float(), labels, reduction="none")

    def exact(h: Tensor, weight: Tensor) -> Tensor:
        if h.dtype != torch.float64:
            return plain(h, weight)
        return F.cross_entropy(h @ weight.T, labels, reduction="none")

    assert_close_to_fp64(
        lambda h, w: cross_entropy.token_losses(h, w, labels, most),
        exact,
        [normal(num_tokens, hidden), 0.5 * normal(vocabulary, hidden, seed=1)],
        dtype,
    )


def test_losses_of_great_logits_stay_finite() -> None:
    h, weight = 100 * normal(3, 16), 10 * normal(50, 16, seed=1)
    labels = torch.tensor([0, 49, 7])
    want = F.cross_entropy(h.double() @ weight.double().T, labels, reduction="none")
    assert_near(cross_entropy.token_losses(h, weight, labels), want, 1e-6)


def test_a_head_in_fp32_under_hidden_states_in_bf16() -> None:
    """Master weights: computed in bf16, the weight's gradient comes back in its own dtype."""
    h, labels = normal(9, 16).bfloat16().requires_grad_(), torch.arange(9)
    weight = normal(20, 16, seed=1).requires_grad_()
    cross_entropy.token_losses(h, weight, labels).sum().backward()
    assert h.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    exact = weight.detach().bfloat16().double().requires_grad_()
    F.cross_entropy(h.detach().double() @ exact.T, labels, reduction="sum").backward()
    assert_near(weight.grad, exact.grad, 2**-7)


def test_no_tokens_lose_nothing() -> None:
    h, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    losses = cross_entropy.token_losses(h, weight, torch.zeros(0, dtype=torch.long))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(5, 8))
