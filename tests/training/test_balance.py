"""The bias, the loss and the way down, by hand and from a collapsed router."""

from __future__ import annotations

import torch

from l4cli.ops.moe import route
from l4cli.training.balance import Balance, BalanceOptions, bias_scale


def test_bias_moves_towards_the_mean_and_stays_centred() -> None:
    balance = Balance([1], 4, BalanceOptions("bias", rate=0.1))
    balance.start_step(0, 100)
    balance.counts_LE[0] = torch.tensor([10, 2, 2, 2])  # mean 4
    balance.finish_step()
    # -0.1 for the busy one, +0.1 for the others, minus their mean 0.05
    expected = torch.tensor([[-0.15, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(balance.bias_LE, expected)
    assert abs(balance.bias_LE.sum().item()) < 1e-6


def test_bias_is_gone_before_the_last_step() -> None:
    assert [bias_scale(s, 100) for s in (0, 50, 80, 99)] == [1.0, 1.0, 0.0, 0.0]
    assert abs(bias_scale(60, 100) - 20 / 30) < 1e-9
    assert all(bias_scale(n - 1, n) == 0.0 for n in range(1, 30))
    balance = Balance([0], 4, BalanceOptions("both"))
    balance.bias_LE += 1.0
    balance.start_step(99, 100)
    assert balance.bias(0) is None
    before = balance.bias_LE.clone()
    balance.counts_LE[0, 0] = 5
    balance.finish_step()
    assert torch.equal(balance.bias_LE, before)


def test_a_longer_run_does_not_bring_the_bias_back() -> None:
    balance = Balance([0], 4, BalanceOptions("both"))
    balance.bias_LE += 1.0
    balance.start_step(39, 40)
    again = Balance([0], 4, BalanceOptions("both"))
    again.load_state_dict(balance.state_dict())
    again.start_step(40, 80)
    assert again.bias(0) is None


def test_sequence_loss_by_hand() -> None:
    balance = Balance([0], 2, BalanceOptions("loss", loss_scale=1.0))
    balance.start_step(0, 10)
    # Scores 0.75 and 0.25: shares are the same, since they sum to one.
    logit = torch.log(torch.tensor(3.0))
    logits_BTE = torch.stack([logit, -logit]).expand(1, 4, 2).clone().requires_grad_()
    watch = balance.watch(torch.tensor([[True, True, True, False]]))
    watch.record(0, logits_BTE, torch.zeros(1, 4, 1, dtype=torch.int64))
    loss = watch.sequence_loss()
    assert loss is not None
    # 3 tokens, f = (2, 0), P = (0.75, 0.25): 3 * 1.5
    torch.testing.assert_close(loss, torch.tensor(4.5))
    loss.backward()
    assert logits_BTE.grad is not None
    assert logits_BTE.grad[0, 3].abs().sum() == 0  # padding has no say
    assert logits_BTE.grad[0, 0, 0] > 0
    assert balance.counts_LE.tolist() == [[3, 0]]


def test_recording_is_over_after_the_loss_is_taken() -> None:
    balance = Balance([0], 2, BalanceOptions("both"))
    balance.start_step(0, 10)
    logits, expert = torch.zeros(1, 3, 2), torch.zeros(1, 3, 1, dtype=torch.int64)
    watch = balance.watch(torch.ones(1, 3, dtype=torch.bool))
    watch.record(0, logits, expert)
    watch.sequence_loss()
    watch.record(0, logits, expert)  # the same layer again, recomputed in the backward pass
    assert balance.counts_LE.tolist() == [[3, 0]]


def test_bias_rescues_a_collapsed_router() -> None:
    generator = torch.Generator().manual_seed(0)
    num_experts, balance = 8, Balance([0], 8, BalanceOptions("bias", rate=0.01))
    logits_ME = torch.randn(2048, num_experts, generator=generator) * 0.3
    logits_ME[:, 0] += 3.0  # everything goes to expert 0
    loads = []
    for _ in range(200):
        balance.start_step(0, 1000)
        watch = balance.watch(torch.ones(1, 2048, dtype=torch.bool))
        gate_MA, expert_MA = route(logits_ME, 1, balance.bias(0))
        # The gate is the score without the bias.
        assert torch.equal(gate_MA, logits_ME.gather(-1, expert_MA).sigmoid())
        watch.record(0, logits_ME.unsqueeze(0), expert_MA.unsqueeze(0))
        watch.sequence_loss()
        balance.finish_step()
        loads.append(balance.load()[0])
    assert loads[0].max_over_mean > 7.9
    assert loads[0].num_dead >= 1
    assert loads[-1].max_over_mean < 1.5
    assert loads[-1].num_dead == 0
