"""What the command line said of a teacher that only answers, checked as far as words can be.

in: words; out: a `SamplesRequest` (no torch)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l4cli.commands.needle_options import Api
from l4cli.commands.options import Device
from l4cli.errors import UsageError
from l4cli.posttraining.sample_choices import Keep, Reasoning

MOST_TOP_LOGPROBS = 20  # what chat servers show
_COMPLETIONS_LOGPROBS = 5  # what the oldest ones show


@dataclass(frozen=True)
class SamplesRequest:
    """What is asked, of whom, and what becomes of it; None: as the teacher has it."""

    prompts: Path
    out: Path
    endpoint: str | None = None  # one of the two
    checkpoint: Path | None = None
    model: str | None = None  # of the endpoint
    api: Api = Api.chat
    api_key_env: str | None = None
    jobs: int = 4
    timeout: float = 300.0
    max_tries: int = 6
    max_tokens: int | None = None  # of the whole run, prompts and answers
    samples_per_prompt: int = 1
    max_new_tokens: int = 1024
    temperature: float | None = None  # None: 1 with several samples, else 0
    top_p: float | None = None
    top_logprobs: int | None = None  # None: as many as servers show, where there is a tokenizer
    tokenizer: str | None = None  # None: the checkpoint's, or no shards
    seq_len: int = 1024
    checker: str = "none"
    checker_timeout: float = 30.0
    keep: Keep = Keep.passed
    reasoning: Reasoning = Reasoning.drop
    seed: int = 0
    device: Device = Device.auto
    fresh: bool = False
    dry_run: bool = False

    @property
    def sampling_temperature(self) -> float:
        """The temperature answers are drawn at."""
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.samples_per_prompt > 1 else 0.0

    @property
    def num_top_logprobs(self) -> int:
        """So many likely tokens are asked for at each place; 0: none."""
        if self.top_logprobs is not None:
            return self.top_logprobs
        if self.tokenizer is None or self.endpoint is None:
            return 0
        return MOST_TOP_LOGPROBS if self.api is Api.chat else _COMPLETIONS_LOGPROBS

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is read. raises: UsageError"""
        if (self.endpoint is None) == (self.checkpoint is None):
            why = "there is no teacher" if self.endpoint is None else "there are two teachers"
            fix = "give `--teacher-endpoint URL --teacher-model NAME`, or `--teacher CHECKPOINT`"
            raise UsageError("cannot ask for answers", why=f"{why} to give them", fix=fix)
        if self.endpoint is not None and self.model is None:
            why, fix = "a server may have many models", "name one with `--teacher-model NAME`"
            raise UsageError("no teacher was named", why=why, fix=fix)
        if self.checkpoint is not None:
            self._check_checkpoint()
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            what, fix = f"`--top-logprobs {self.top_logprobs}` given", "ask for 0 to 20"
            raise UsageError(what, why=f"servers show up to {MOST_TOP_LOGPROBS}", fix=fix)
        if self.top_p is not None and self.sampling_temperature == 0:
            why = "at temperature 0 the likeliest token is taken, whatever the others are"
            fix = "add `--sampling-temperature 1`, or leave it out"
            raise UsageError(f"`--sampling-top-p {self.top_p:g}` given", why=why, fix=fix)
        if self.samples_per_prompt > 1 and self.sampling_temperature == 0:
            why = "at temperature 0 all samples of a prompt are the same"
            fix = "leave out `--sampling-temperature 0`, or take one sample"
            raise UsageError(
                f"`--samples-per-prompt {self.samples_per_prompt}` given", why=why, fix=fix
            )

    def _check_checkpoint(self) -> None:
        fix = "leave it out, or name a server with `--teacher-endpoint URL`"
        if self.top_logprobs:
            why = "`l4 distill OUT/shards --teacher CHECKPOINT` learns from all its probabilities"
            raise UsageError(f"`--top-logprobs {self.top_logprobs}` given", why=why, fix=fix)
        for name in ("timeout", "max_tokens", "api_key_env"):
            if getattr(self, name) != getattr(SamplesRequest, name):
                what, why = (
                    f"`--{name.replace('_', '-')}` given",
                    "only servers are asked like this",
                )
                raise UsageError(what, why=why, fix=fix)
        if self.model is not None:
            why = "a checkpoint is one model"
            raise UsageError(f"`--teacher-model {self.model}` given", why=why, fix=fix)
        if self.api is not Api.chat:
            why = "a checkpoint is asked in its chat format"
            raise UsageError(f"`--api {self.api}` given", why=why, fix=fix)
