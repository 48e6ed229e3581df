"""The one loop: steps, schedules, checkpoints, evaluations, and stopping at any instant.

in: trainees, a source of batches, an objective; out: checkpoints, `metrics.jsonl`, progress
source: DESIGN section 5

The order within a step never changes: train, write the line, evaluate, save. A checkpoint holds
everything the later steps depend on, so a run that was cut off anywhere continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from l4cli import terminal
from l4cli.errors import L4Error
from l4cli.ops.batch import Batch
from l4cli.training.interrupts import EvaluationCut, Interrupts
from l4cli.training.metrics import LossSum, Means, MetricsFile, Stopwatch, peak_memory_gib
from l4cli.training.passes import Loss, Passes
from l4cli.training.trainee import Trainee


class BatchSource(Protocol):
    """Where steps come from; its state counts global samples of steps consumed."""

    def next(self) -> list[Batch]:
        """The micro-batches of one global step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """What is minimised: the sum over names of sum / weight.

    With several trainees the names of each one's losses and metrics begin with `NAME/`.
    """

    def start_step(self, step: int, num_steps: int) -> None:
        """Told before the micro-batches of a step, counted from 0."""

    def weights(self, batch: Batch) -> dict[str, float]:
        """What each loss is divided by, whoever's it is; known before the forward pass."""

    def __call__(self, trainees: Sequence[Trainee], batch: Batch) -> dict[str, LossSum]:
        """Run the models over one micro-batch."""


# Gets what to call between batches (it may raise), gives figures for `metrics.jsonl`.
Evaluation = Callable[[Callable[[], None]], dict[str, float]]

_Figures = list[tuple[str, float, float]]  # name, sum, weight


@dataclass(frozen=True)
class LoopOptions:
    """How far, how often, how hard. A count of 0 means never."""

    num_steps: int
    clip_grad: float = 1.0  # 0: gradients are measured, not clipped
    save_every: int = 0  # the last step is always saved
    keep: int | None = 2
    eval_every: int = 0  # the last step is always evaluated
    log_every: int = 10


@dataclass
class Loop:
    """State of a run in progress; `run()` is the only entry."""

    trainees: Sequence[Trainee]
    source: BatchSource
    objective: Objective
    options: LoopOptions
    device: torch.device
    passes_at_once: int = 1
    evaluations: Sequence[Evaluation] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)  # saved with every checkpoint
    flops_per_token: float = 0.0
    flops_per_tile: float = 0.0
    peak_flops: float = 0.0  # of this machine, measured; 0 leaves MFU out

    def __post_init__(self) -> None:
        self.step = 0  # steps done
        self.num_tokens = 0
        self.resumed_num_steps: int | None = None  # what the run was planned for before
        self._saved_step: int | None = None
        self._owes_evaluation = False
        self._means = Means()
        self._interrupts = Interrupts()
        self._files = [MetricsFile(trainee.run.path) for trainee in self.trainees]
        self._grad_norms = [0.0] * len(self.trainees)
        self._last_figures = ""
        self._window_tokens = self._window_tiles = 0
        self._window = Stopwatch()

    def resume(self, folders: Sequence[Path]) -> None:
        """Go back to a checkpoint of every trainee."""
        for trainee, folder in zip(self.trainees, folders, strict=True):
            state = trainee.load(folder)  # what is shared is the same in all of them
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.resumed_num_steps = state["identity"].get("num_steps")
        self._owes_evaluation = state["owes_evaluation"]
        self._means.load_state_dict(state["means"])
        self.source.load_state_dict(state["source"])
        torch.set_rng_state(state["rng"])
        self._saved_step = self.step

    def run(self) -> list[Path]:
        """Train to the last step; return the newest checkpoints, one a trainee.

        raises: L4Error for a loss or gradient that is no number; KeyboardInterrupt and
        Terminated after a signal, once a checkpoint is saved
        """
        for file in self._files:
            file.rewind(self.step, keeps_evaluation=not self._owes_evaluation)
        with (
            self._interrupts.caught(),
            Passes[_Figures](self.passes_at_once) as self._passes,
            terminal.progress("train", self.options.num_steps) as bar,
        ):
            self._started = time.perf_counter()
            self._first_step = self.step
            self._window.read()
            if self._owes_evaluation:
                self._evaluate()
                # A finished run must remember that it owes nothing any more.
                if self.step == self.options.num_steps and not self._owes_evaluation:
                    self._saved_step = None
            while self.step < self.options.num_steps and self._interrupts.signal is None:
                self._train_step()
                try:
                    self._report(bar)
                    if self._is_due(self.options.eval_every):
                        self._evaluate()
                except BrokenPipeError:  # nobody reads our lines; what was trained is kept
                    self._save()
                    raise
                if self._is_due(self.options.save_every):
                    self._save()
            if self._saved_step != self.step:
                self._save()
        if self._interrupts.signal is not None:
            folder = self.trainees[0].run.step_folder(self.step)
            terminal.say(f"saved `{folder}`; the same command continues from there")
            raise self._interrupts.as_exception()
        elapsed = terminal.time_text(time.perf_counter() - self._started)
        terminal.say(f"trained to step {self.step} in {elapsed}{self._last_figures}")
        return [trainee.run.step_folder(self.step) for trainee in self.trainees]

    def _is_due(self, every: int) -> bool:
        return self.step == self.options.num_steps or (every > 0 and self.step % every == 0)

    def _train_step(self) -> None:
        batches = [batch.to(self.device) for batch in self.source.next()]
        weights: dict[str, float] = {}
        for batch in batches:
            for name, weight in self.objective.weights(batch).items():
                weights[name] = weights.get(name, 0.0) + weight
            self._count_tokens(batch)
        for trainee in self.trainees:
            if trainee.balance is not None:
                trainee.balance.start_step(self.step, self.options.num_steps)
        self.objective.start_step(self.step, self.options.num_steps)
        parameters = [p for t in self.trainees for p in t.optimizer.parameters.values()]
        for figures in self._passes.run(batches, self._loss_of(weights), parameters):
            for name, value, weight in figures:
                self._means.add(name, value, weight)
        for i, trainee in enumerate(self.trainees):
            self._grad_norms[i] = self._clip(trainee)
            trainee.optimizer.step(trainee.schedule.lr(self.step), self._passes.each)
            trainee.optimizer.zero_grad()
            if trainee.balance is not None:
                trainee.balance.finish_step()
        self.step += 1

    def _count_tokens(self, batch: Batch) -> None:
        num_tokens = int((batch.document_ids != 0).sum())
        self.num_tokens += num_tokens
        self._window_tokens += num_tokens
        if batch.pixel_values is not None:
            self._window_tiles += len(batch.pixel_values)

    def _loss_of(self, weights: Mapping[str, float]) -> Loss[_Figures]:
        """What one micro-batch adds to the step's loss, and its figures."""
        step = self.step + 1

        def loss_of(batch: Batch) -> tuple[Tensor | None, _Figures]:
            losses = self.objective(self.trainees, batch)
            # Divided by the weight of the whole step: micro-batches may hold unequal numbers of
            # targets, and a mean of means would favour the short ones.
            shares = [
                loss.sum / (weights[name.rpartition("/")[2]] or 1.0)
                for name, loss in losses.items()
            ]
            total = torch.stack(shares).sum()
            figures = []
            for name, loss in losses.items():
                value = loss.sum.item()
                if not math.isfinite(value):
                    raise self._not_finite(f"`{name}` of step {step} is {value}")
                figures.append((name, value, loss.weight))
                prefix = name.rpartition("/")[0]
                figures += [
                    (f"{prefix}/{key}" if prefix else key, metric.item(), loss.weight)
                    for key, metric in loss.metrics.items()
                ]
            # Nothing to learn with frozen text and a batch without pictures.
            return total if total.requires_grad else None, figures

        return loss_of

    def _clip(self, trainee: Trainee) -> float:
        """Scale the gradients down to `clip_grad`; return their norm before."""
        grads = [p.grad for p in trainee.optimizer.parameters.values() if p.grad is not None]
        if not grads:
            return 0.0
        norm = torch.nn.utils.get_total_norm(grads)
        value = norm.item()
        if not math.isfinite(value):
            raise self._not_finite(self._worst_gradient(trainee))
        if 0 < self.options.clip_grad < value:
            torch._foreach_mul_(grads, self.options.clip_grad / value)
        return value

    def _worst_gradient(self, trainee: Trainee) -> str:
        bad = [
            name
            for name, parameter in trainee.optimizer.parameters.items()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        if not bad:
            return f"the norm of all gradients of step {self.step + 1} overflows"
        more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
        return f"in step {self.step + 1} the gradient of `{bad[0]}`{more} is not finite"

    def _not_finite(self, why: str) -> L4Error:
        last = self.trainees[0].run.latest()
        kept = f"; `{last}` is the last good checkpoint" if last else "; nothing was saved yet"
        return L4Error(
            f"training diverged at step {self.step + 1}",
            why=why + kept,
            fix="start a new run with a lower `--lr`, a longer `--warmup` or a lower `--clip-grad`",
        )

    def _report(self, bar: terminal.Progress) -> None:
        if not self._is_due(self.options.log_every):
            return
        means, speed = self._means.take(), self._speed()
        events = []
        for i, (trainee, file) in enumerate(zip(self.trainees, self._files, strict=True)):
            event: dict[str, Any] = {"event": "step", "step": self.step}
            event |= {**trainee.own(means), **speed}
            event["lr"] = trainee.schedule.lr(self.step - 1)
            event["grad_norm"] = self._grad_norms[i]
            if trainee.balance is not None:
                loads = trainee.balance.load()
                event["expert_load"] = {
                    str(load.layer_idx): round(load.max_over_mean, 3) for load in loads
                }
                event["dead_experts"] = sum(load.num_dead for load in loads)
            file.write(event)
            events.append(event)
            terminal.emit(trainee.labelled(event))
        self._show(bar, events)

    def _speed(self) -> dict[str, Any]:
        """Speed since the last line, without saving and evaluation; memory; tokens in all."""
        elapsed_s = self._window.read()
        work = self._window_tokens * self.flops_per_token + self._window_tiles * self.flops_per_tile
        figures: dict[str, Any] = {"tok_per_sec": round(self._window_tokens / elapsed_s, 1)}
        if self.peak_flops:
            figures["mfu"] = round(work / elapsed_s / self.peak_flops, 4)
        self._window_tokens = self._window_tiles = 0
        figures["mem_gib"] = round(peak_memory_gib(self.device), 3)
        return {**figures, "num_tokens": self.num_tokens}

    def _show(self, bar: terminal.Progress, events: Sequence[Mapping[str, Any]]) -> None:
        """One line for people: of several trainees what differs, one after the other."""
        done, total = self.step, self.options.num_steps
        per_step_s = (time.perf_counter() - self._started) / (done - self._first_step)
        event = events[0]
        figures = {
            "step": f"{done}/{total}",
            "loss": "/".join(f"{e['loss']:.3f}" if "loss" in e else "-" for e in events),
            "grad_norm": "/".join(f"{e['grad_norm']:.2f}" for e in events),
            "lr": "/".join(dict.fromkeys(f"{e['lr']:.1e}" for e in events)),
            "tok_per_sec": f"{event['tok_per_sec']:.0f}",
        }
        if "mfu" in event:
            figures["mfu"] = f"{event['mfu']:.2f}"
        figures["mem_gib"] = f"{event['mem_gib']:.1f}"
        loads = [max(e["expert_load"].values(), default=1.0) for e in events if "expert_load" in e]
        if loads:
            figures["load"] = f"{max(loads):.1f}"
        self._last_figures = f"  loss {figures['loss']}  tok_per_sec {figures['tok_per_sec']}"
        figures["eta"] = terminal.time_text(per_step_s * (total - done))
        bar.update(done, **figures)

    def _evaluate(self) -> None:
        """Run the evaluations of this step; cut short by a signal, they are owed."""
        self._owes_evaluation = bool(self.evaluations)
        figures: dict[str, float] = {}
        try:
            with self._window.paused():
                for evaluation in self.evaluations:
                    self._interrupts.cut_evaluation()
                    figures |= evaluation(self._interrupts.cut_evaluation)
        except EvaluationCut:
            return
        if figures:
            for trainee, file in zip(self.trainees, self._files, strict=True):
                event = {"event": "eval", "step": self.step, **trainee.own(figures)}
                file.write(event)
                terminal.emit(trainee.labelled(event))
            shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            terminal.say(f"step {self.step}  {shown}")
        self._owes_evaluation = False

    def _save(self) -> None:
        with self._window.paused():
            for file in self._files:
                file.sync()
            shared = {
                "step": self.step,
                "num_tokens": self.num_tokens,
                "owes_evaluation": self._owes_evaluation,
                "means": self._means.state_dict(),
                "source": self.source.state_dict(),
                "rng": torch.get_rng_state(),
                "identity": dict(self.identity),
            }
            for trainee in self.trainees:
                trainee.save(self.step, shared)
            # Only now: a run cut off between two saves goes back to a step that all of them have.
            for trainee in self.trainees:
                if self.options.keep is not None:
                    trainee.run.prune(self.options.keep)
        self._saved_step = self.step
