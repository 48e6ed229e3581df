"""The objective of distilling on tiny models: one teacher pass, no gradient where it agrees."""

from __future__ import annotations

import copy
import json
import math
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tiny_training import CountingSource, tiny_config, tiny_trainee

from l4cli.checkpoint import RunFolder
from l4cli.model import build_model
from l4cli.ops.batch import Batch, Segments
from l4cli.training.hidden_match import HiddenMatch, spread_pairs
from l4cli.training.loop import Loop, LoopOptions
from l4cli.training.objectives.distillation import Distillation, _document_starts
from l4cli.training.objectives.language_model import LanguageModel
from l4cli.training.optim import Optimizer, OptimizerOptions
from l4cli.training.soft_share import SoftShare, StudentLoss, parse_share
from l4cli.training.trainee import Trainee

NUM_STEPS = 4


def students_of(stack: ExitStack, folder: Path, names: list[str]) -> list[Trainee]:
    """Trainees of different widths of the experts, without a loss of their own for balance."""
    found = []
    for i, name in enumerate(names):
        run = stack.enter_context(RunFolder(folder / name))
        trainee = tiny_trainee(run, NUM_STEPS)
        trainee.name, trainee.balance = name, None
        if i:
            with torch.no_grad():
                for parameter in trainee.model.parameters():
                    parameter.mul_(1.01)
        found.append(trainee)
    return found


def backward(objective: Distillation, trainees: list[Trainee], batch: Batch) -> None:
    objective.start_step(0, NUM_STEPS)
    losses = objective(trainees, batch)
    torch.stack([loss.sum for loss in losses.values()]).sum().backward()


def test_a_teacher_equal_to_the_student_gives_no_gradient(tmp_path: Path) -> None:
    (batch,) = CountingSource().next()
    with ExitStack() as stack:
        (student,) = students_of(stack, tmp_path, ["s"])
        teacher = copy.deepcopy(student.model).requires_grad_(False)
        for rule in (StudentLoss("soft"), StudentLoss("soft", temperature=2.0)):
            backward(Distillation([rule], teacher), [student], batch)
            for name, parameter in student.model.named_parameters():
                assert not parameter.grad.any(), name
                parameter.grad = None


def test_a_better_teacher_gives_one(tmp_path: Path) -> None:
    """What the test above would miss: gradients that never come."""
    (batch,) = CountingSource().next()
    with ExitStack() as stack:
        (student,) = students_of(stack, tmp_path, ["s"])
        teacher = build_model(tiny_config(), seed=7)
        backward(Distillation([StudentLoss("soft")], teacher), [student], batch)
        assert all(parameter.grad.any() for parameter in student.model.parameters())
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_runs_once_a_batch(tmp_path: Path) -> None:
    teacher = build_model(tiny_config(), seed=7)
    calls = []
    hidden = teacher.hidden
    teacher.hidden = lambda *args, **kwargs: calls.append(1) or hidden(*args, **kwargs)
    with ExitStack() as stack:
        trainees = students_of(stack, tmp_path, ["a", "b", "c"])
        objective = Distillation([StudentLoss()] * 3, teacher)
        source = CountingSource(micro_batch_size=2)
        loop = Loop(trainees, source, objective, LoopOptions(NUM_STEPS), torch.device("cpu"))
        loop.run()
    assert len(calls) == NUM_STEPS * 2  # two micro-batches a step


def test_two_students_in_one_run_equal_two_runs(tmp_path: Path) -> None:
    """Bit for bit, hidden states matched and all; also one that reads nothing of the teacher."""
    rules = {
        "a": StudentLoss("hybrid", SoftShare(0.9, 0.9, gap_scale=1.0), match_weight=0.1),
        "b": StudentLoss("hybrid", SoftShare(0.1, 0.9), hard_from_teacher=True),
        "c": StudentLoss("hard"),
    }

    def train(folder: Path, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        teacher = build_model(tiny_config(), seed=7).requires_grad_(False)
        with ExitStack() as stack:
            trainees = students_of(stack, folder, list(rules))
            trainees[0] = with_match(trainees[0])
            trainees = [trainee for trainee in trainees if trainee.name in names]
            # As the command does: without a student that needs it there is no teacher.
            is_needed = any(rules[name].needs_teacher for name in names)
            objective = Distillation(
                [rules[name] for name in names], teacher if is_needed else None
            )
            Loop(
                trainees, CountingSource(), objective, LoopOptions(NUM_STEPS), torch.device("cpu")
            ).run()
            return {trainee.name: trainee.model.state_dict() for trainee in trainees}

    together = train(tmp_path / "together", list(rules))
    for name in rules:
        alone = train(tmp_path / name, [name])[name]
        assert all(torch.equal(alone[key], together[name][key]) for key in alone)


def with_match(trainee: Trainee) -> Trainee:
    """The trainee with maps to the teacher's layers, and an optimizer that knows them."""
    trainee.extra = HiddenMatch([(0, 0), (1, 1)], 32, 32, seed=3)
    named = [
        *trainee.model.named_parameters(),
        *trainee.extra.named_parameters(prefix="extra"),
    ]
    trainee.optimizer = Optimizer(named, OptimizerOptions("muon"))
    return trainee


def test_matching_brings_states_together_and_continues(tmp_path: Path) -> None:
    """The maps are kept beside the weights, so that a resumed run goes on with them."""
    teacher = build_model(tiny_config(), seed=7).requires_grad_(False)

    def distances(folder: Path, num_steps: int, stop_after: int | None = None) -> list[float]:
        rule = StudentLoss("hard", match_weight=1.0)
        with RunFolder(folder) as run:
            trainee = with_match(tiny_trainee(run, num_steps))
            trainee.balance = None  # its bias follows the number of steps
            objective = Distillation([rule], teacher)
            options = LoopOptions(stop_after or num_steps, log_every=1)
            source = CountingSource(is_constant=True)
            loop = Loop([trainee], source, objective, options, torch.device("cpu"))
            if (newest := run.latest()) is not None:
                loop.resume([newest])
            loop.run()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["hidden_loss"] for line in lines]

    straight = distances(tmp_path / "straight", 20)
    assert straight[-1] < 0.75 * straight[0]
    distances(tmp_path / "cut", 20, stop_after=5)
    assert distances(tmp_path / "cut", 20) == straight


def test_codistilling_leaves_the_teacher_alone(tmp_path: Path) -> None:
    """It trains exactly as it would without a student; the student burns in on data first."""

    def train(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            trainees = students_of(stack, folder, ["teacher", "s"])[: len(names)]
            rule = StudentLoss("soft", burn_in=0.5)
            objective = Distillation([rule], codistills=True) if names[1:] else LanguageModel()
            options = LoopOptions(NUM_STEPS, log_every=1)
            Loop(trainees, CountingSource(), objective, options, torch.device("cpu")).run()
            return trainees[0].model.state_dict()

    together = train(tmp_path / "both", ["teacher", "s"])
    alone = train(tmp_path / "alone", ["teacher"])
    assert all(torch.equal(alone[key], together[key]) for key in alone)
    lines = (tmp_path / "both" / "s" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["soft_weight"] for line in lines] == [0, 0, 1, 1]


def test_models_with_other_chunks_get_their_own_borders(tmp_path: Path) -> None:
    """A batch is cut by one model's chunk; the other's attention must not see those borders."""
    (batch,) = CountingSource(seq_len=24).next()
    teacher = build_model(tiny_config(), seed=7)
    teacher.config.text.attention_chunk_size = 5
    wanted = Segments.from_document_ids(batch.document_ids, 5)
    seen = []
    hidden = teacher.hidden
    teacher.hidden = lambda own, **kwargs: seen.append(own.segments) or hidden(own, **kwargs)
    with ExitStack() as stack:
        (student,) = students_of(stack, tmp_path, ["s"])
        objective = Distillation([StudentLoss()], teacher, attention_chunk_size=8)
        backward(objective, [student], batch)
    assert torch.equal(seen[0].local_starts, wanted.local_starts)


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ("0.3", [0.3, 0.3, 0.3]),
        ("0.1..0.9", [0.1, 0.5, 0.9]),
        ("0.9..0.1", [0.9, 0.5, 0.1]),
        ("token:0.2..1", [0.2, 0.6, 1.0]),
        ("lr:0.8", [0.8, 0.4, 0.0]),
    ],
)
def test_shares_over_the_steps(words: str, shares: list[float]) -> None:
    rule = StudentLoss("hybrid", parse_share(words))
    got = [rule.soft_share(step, 3, lambda s: 1 - s / 2) for step in range(3)]
    assert got == pytest.approx(shares)


@pytest.mark.parametrize(
    "words", ["", "2", "-0.1", "0.1..", "token:x", "token:1:0", "token:1:1:x", "nan", "gap:1"]
)
def test_shares_that_mean_nothing(words: str) -> None:
    with pytest.raises(ValueError, match=r"share|number|scale|window"):
        parse_share(words)


def test_targets_know_where_their_document_begins() -> None:
    """A plain loop over rows of two documents with some targets masked."""
    (batch,) = CountingSource().next()
    index_M = (batch.loss_weight.flatten() != 0).nonzero().flatten()
    wanted, seen = [], {}
    for place, position in enumerate(index_M.tolist()):
        row, column = divmod(position, batch.input_ids.shape[1])
        document = (row, int(batch.document_ids[row, column]))
        wanted.append(seen.setdefault(document, place))
    assert _document_starts(batch, index_M).tolist() == wanted
    assert len(seen) == 8


def test_layers_are_matched_at_the_same_depth() -> None:
    assert spread_pairs(2, 8) == [(0, 3), (1, 7)]
    assert spread_pairs(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert spread_pairs(3, 48)[-1] == (2, 47)


def test_the_distance_by_hand() -> None:
    """Two states of two numbers, brought to mean square 1."""
    match = HiddenMatch([(0, 0)], 2, 2, seed=0)
    with torch.no_grad():
        match.maps[0].copy_(torch.eye(2))
    mine, theirs = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 7.0]]])
    got = match({0: mine}, {0: theirs}, torch.tensor([0])).item()
    scale = math.sqrt(2) / 5
    wanted = ((3 * scale) ** 2 + (4 * scale - math.sqrt(2)) ** 2) / 2
    assert got == pytest.approx(wanted, rel=1e-5)
