"""The loop on a tiny model: it learns, adds up, stops, and continues bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import CountingSource, batch_of, tiny_config, tiny_trainee, train

from l4cli.checkpoint import RunFolder
from l4cli.errors import L4Error, Terminated
from l4cli.model import build_model
from l4cli.training.interrupts import EvaluationCut
from l4cli.training.loop import Loop
from l4cli.training.objectives.language_model import LanguageModel

TIMINGS = {"tok_per_sec", "mfu", "mem_gib"}


def _metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def _weights(loop: Loop) -> dict[str, torch.Tensor]:
    return dict(loop.trainees[0].model.state_dict())


def _assert_same(one: Loop, other: Loop) -> None:
    for name, weight in _weights(one).items():
        assert torch.equal(weight, _weights(other)[name]), name
    mine, theirs = (loop.trainees[0].optimizer.state_dict() for loop in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_overfits_one_batch(tmp_path: Path) -> None:
    train(tmp_path, 60, source=CountingSource(is_constant=True), lr=2e-2)
    events = _metrics(tmp_path)
    assert events[0]["loss"] > 3.5  # ln 64 is 4.16
    assert events[-1]["loss"] < 0.05


def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    """Compared where gradients enter linearly: Muon's bf16 products magnify their last bits."""
    loops = [
        train(tmp_path / str(size), 1, source=CountingSource(size), log_every=1) for size in (4, 1)
    ]
    whole, parts = (loop.trainees[0].optimizer.state_dict() for loop in loops)
    linear = [key for key in whole if key.endswith((".momentum_buffer", ".exp_avg"))]
    assert len(linear) == len(_weights(loops[0]))
    for key in linear:
        scale = float(whole[key].abs().max())
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=1e-5 * scale, msg=key)


def test_passes_at_once_give_the_same_bits(tmp_path: Path) -> None:
    """Compared on one thread an operation: with more, sums inside them come in another order."""

    def at_once(loop: Loop) -> None:
        loop.passes_at_once = 3  # four micro-batches: the last one waits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train(tmp_path / "alone", 4, source=CountingSource(1))
        together = train(tmp_path / "together", 4, source=CountingSource(1), change=at_once)
    finally:
        torch.set_num_threads(threads)
    _assert_same(alone, together)
    assert _metrics(tmp_path / "alone") == _metrics(tmp_path / "together")


def test_a_bad_pass_among_several_stops_with_the_reason(tmp_path: Path) -> None:
    def poison(loop: Loop) -> None:
        loop.passes_at_once = 2
        with torch.no_grad():
            loop.trainees[0].model.lm_head.weight[5] = float("inf")

    threads = torch.get_num_threads()
    with pytest.raises(L4Error, match="diverged at step 1"):
        train(tmp_path, 2, source=CountingSource(1), change=poison)
    assert torch.get_num_threads() == threads


def test_micro_batches_give_the_same_figures(tmp_path: Path) -> None:
    for size in (4, 1):
        train(tmp_path / str(size), 3, source=CountingSource(size), log_every=1)
    for whole, parts in zip(_metrics(tmp_path / "4"), _metrics(tmp_path / "1"), strict=True):
        for key in ("loss", "balance_loss", "grad_norm"):
            assert whole[key] == pytest.approx(parts[key], rel=1e-4), key
        assert whole["expert_load"] == parts["expert_load"]
        assert whole["num_tokens"] == parts["num_tokens"]


def test_packed_documents_give_the_loss_of_each_alone(tmp_path: Path) -> None:
    trainee = tiny_trainee(RunFolder(tmp_path), 1)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 64, (1, 24), generator=generator)
    documents_BT = torch.tensor([[1] * 11 + [2] * 9 + [0] * 4])
    packed = LanguageModel()([trainee], batch_of(ids_BT, documents_BT))
    alone = [
        LanguageModel()([trainee], batch_of(ids_BT[:, a:b], torch.ones(1, b - a, dtype=torch.long)))
        for a, b in ((0, 11), (11, 20))
    ]
    assert packed["loss"].weight == sum(part["loss"].weight for part in alone) == 18
    total = sum(part["loss"].sum.item() for part in alone)
    assert packed["loss"].sum.item() == pytest.approx(total, rel=1e-5)


def test_continues_bit_for_bit_and_writes_the_same_metrics(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 7, save_every=3)
    with pytest.raises(Terminated):
        train(tmp_path / "cut", 7, stop_after=3, save_every=3)
    with pytest.raises(Terminated):
        train(tmp_path / "cut", 7, stop_after=4, save_every=3)  # in the middle of a window
    cut = train(tmp_path / "cut", 7, save_every=3)
    _assert_same(straight, cut)
    assert _metrics(tmp_path / "straight") == _metrics(tmp_path / "cut")
    assert [e["step"] for e in _metrics(tmp_path / "cut")] == [2, 4, 6, 7]


def test_metrics_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 6)
    with pytest.raises(Terminated):
        train(tmp_path / "cut", 6, stop_after=2)
    file = tmp_path / "cut" / "metrics.jsonl"
    with file.open("a") as lines:  # as if killed later, in the middle of a line
        lines.write('{"event": "step", "step": 4, "loss": 9.0}\n{"event": "st')
    _assert_same(straight, train(tmp_path / "cut", 6))
    assert _metrics(tmp_path / "straight") == _metrics(tmp_path / "cut")


def test_an_evaluation_cut_short_is_done_when_the_run_continues(tmp_path: Path) -> None:
    def evaluate_at_last(loop: Loop) -> None:
        loop.evaluations = [lambda between_batches: (between_batches(), {"bits_per_byte": 1.5})[1]]

    with pytest.raises(Terminated):
        train(tmp_path, 4, stop_after=4, change=evaluate_at_last)  # the signal comes first
    assert all(event["event"] == "step" for event in _metrics(tmp_path))
    for _ in range(2):
        train(tmp_path, 4, change=evaluate_at_last)
        assert _metrics(tmp_path)[-1] == {"event": "eval", "step": 4, "bits_per_byte": 1.5}
        assert len(_metrics(tmp_path)) == 3


def test_a_cut_evaluation_does_not_escape() -> None:
    assert issubclass(EvaluationCut, Exception)


def test_a_gradient_that_is_no_number_stops_with_a_name(tmp_path: Path) -> None:
    def poison(loop: Loop) -> None:
        weight = loop.trainees[0].model.model.layers[0].self_attn.q_proj.weight
        weight.register_hook(lambda grad: grad * float("nan") if loop.step == 3 else grad)

    with pytest.raises(L4Error) as caught:
        train(tmp_path, 6, save_every=2, change=poison)
    assert "step 4" in caught.value.what
    assert "model.layers.0.self_attn.q_proj.weight" in caught.value.why
    assert "step-000002" in caught.value.why
    assert (tmp_path / "latest").resolve().name == "step-000002"


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    def poison(loop: Loop) -> None:
        with torch.no_grad():
            loop.trainees[0].model.lm_head.weight[5] = float("inf")

    with pytest.raises(L4Error) as caught:
        train(tmp_path, 3, change=poison)
    assert "`loss` of step 1" in caught.value.why


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    def recompute(loop: Loop) -> None:
        loop.trainees[0].model.checkpoint_layers = True

    plain = train(tmp_path / "plain", 3, log_every=1)
    recomputed = train(tmp_path / "recomputed", 3, log_every=1, change=recompute)
    _assert_same(plain, recomputed)
    assert _metrics(tmp_path / "plain") == _metrics(tmp_path / "recomputed")


def test_bf16_keeps_fp32_masters_and_learns(tmp_path: Path) -> None:
    def in_bf16(loop: Loop) -> None:
        loop.trainees[0].model.compute_dtype = torch.bfloat16

    loop = train(tmp_path, 40, source=CountingSource(is_constant=True), lr=2e-2, change=in_bf16)
    assert all(weight.dtype == torch.float32 for weight in _weights(loop).values())
    assert _metrics(tmp_path)[-1]["loss"] < 0.5


def test_a_balanced_model_is_exported_without_need_of_its_bias(tmp_path: Path) -> None:
    loop = train(tmp_path, 20)
    balance = loop.trainees[0].balance
    assert balance is not None
    assert balance.bias_LE.abs().sum() > 0
    assert balance.bias(1) is None  # in the last step already
    # What was trained at the end is what `model.hidden` computes for everybody else.
    batch = CountingSource().next()[0]
    model = loop.trainees[0].model
    watch = balance.watch(batch.document_ids != 0)
    assert torch.equal(model.hidden(batch, routing=watch), model.hidden(batch))


def test_frozen_half_keeps_its_weights(tmp_path: Path) -> None:
    from l4cli.model import load_preset
    from l4cli.training.optim import Optimizer, OptimizerOptions
    from l4cli.training.trainee import freeze

    model = build_model(load_preset("nano"), device="meta")
    freeze(model, "text")
    trained = set(Optimizer(model.named_parameters(), OptimizerOptions()).parameters)
    assert trained
    assert not any(name.startswith("language_model.") for name in trained)
    assert "multi_modal_projector.linear_1.weight" in trained
    model = build_model(load_preset("nano"), device="meta")
    freeze(model, "vision")
    trained = set(Optimizer(model.named_parameters(), OptimizerOptions()).parameters)
    assert not any(name.startswith("vision_model.") for name in trained)
    assert "language_model.lm_head.weight" in trained
    assert tiny_config().vision is None
