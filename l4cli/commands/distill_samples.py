"""Distil from a teacher without logits: its answers to a file of prompts become rows to learn from.

in: prompts, an endpoint or a checkpoint; out: a folder with `answers.jsonl` (all that was paid
for), `samples.jsonl` (what is kept, for `l4 sft` and `l4 tokenize`), `summary.json`, and with a
tokenizer `shards/`, with log-probabilities `cache/` (for `l4 distill --teacher-cache`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from l4cli import terminal
from l4cli.commands.distill_samples_request import SamplesRequest as SamplesRequest
from l4cli.commands.needle_options import Api
from l4cli.commands.options import default_window
from l4cli.errors import L4Error, UsageError
from l4cli.posttraining.answer_journal import SUMMARY

if TYPE_CHECKING:
    from l4cli.posttraining.answer_journal import AnswerJournal
    from l4cli.posttraining.checkers import Checker
    from l4cli.posttraining.prompts import Prompt, PromptFile
    from l4cli.posttraining.sample_selection import Counts, Kept
    from l4cli.posttraining.sample_shards import SampleShards
    from l4cli.text import Tokenizer

SAMPLES = "samples.jsonl"
# In errors of the client, which `needle-test` wrote first.
_OPTION_NAMES = {
    "`--endpoint`": "`--teacher-endpoint`",
    "`--endpoint http": "`--teacher-endpoint http",
    "`--model`": "`--teacher-model`",
    "use shorter `--lengths` if the context is too long": "leave out the longest prompts or lower "
    "`--max-new-tokens` if the context is too long",
}


Item = tuple["Prompt", int]  # a prompt, the number of the sample
Record = dict[str, Any]


class Teacher(Protocol):
    """Whoever answers."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    def facts(self) -> dict[str, Any]: ...
    def ask(
        self, items: Sequence[Item], keep: Callable[[Record], None], *, is_resumed: bool
    ) -> None:
        """Answer all, in any order; `keep` has each on the disk when it returns."""

    def report(self) -> dict[str, Any]: ...


def run_samples(request: SamplesRequest) -> None:
    """Ask what is not answered yet, then write what is kept of all answers."""
    request.check()
    from l4cli.checkpoint import RunFolder
    from l4cli.posttraining.answer_journal import (
        AnswerJournal,
        require_usable,
        settings_of_answers,
    )
    from l4cli.posttraining.checkers import make_checker
    from l4cli.posttraining.prompts import read_prompts

    require_usable(request.out, fresh=request.fresh)
    recorded = settings_of_answers(request.out) or {}
    if request.top_logprobs is None and "top_logprobs" in recorded:
        # A tokenizer may come later, for answers that are paid for.
        request = replace(request, top_logprobs=recorded["top_logprobs"])
    found = read_prompts(request.prompts)
    checker = make_checker(request.checker, found.prompts, timeout_s=request.checker_timeout)
    teacher = _open(request, found)
    tokenizer = _tokenizer(request)
    settings = _settings(request, found, teacher)
    items = [(prompt, i) for prompt in found.prompts for i in range(request.samples_per_prompt)]
    if request.dry_run:
        journal = AnswerJournal.open(request.out, settings, only_reads=True)
        _tell_plan(request, teacher, _unanswered(items, journal))
        return
    with RunFolder(request.out):
        journal = AnswerJournal.open(request.out, settings)
        missing = _unanswered(items, journal)
        made_with = _made_with(request, tokenizer)
        if not missing and _is_made(request.out, made_with):
            terminal.say(f"`{request.out}` holds all {len(items)} answers already")
            _tell_done(request)
            return
        already = f", {len(items) - len(missing)} of them from before" if journal else ""
        terminal.say(
            f"`{teacher.name}` ({teacher.kind}): {len(items)} answers to {len(found.prompts)} "
            f"prompts{already} -> `{request.out}`"
        )
        if missing:
            _ask(teacher, missing, len(items), journal)
        else:
            terminal.say("all of them are paid for; the rows are made anew")
        writer = _Writer(request, found, journal, tokenizer, teacher)
        summary = writer.write(checker, made_with, settings)
    _tell(request, summary)


def _unanswered(items: Sequence[Item], journal: AnswerJournal) -> list[Item]:
    return [item for item in items if (item[0].id, item[1]) not in journal]


def _open(request: SamplesRequest, found: PromptFile) -> Teacher:
    if request.endpoint is None:
        from l4cli.commands.distill_samples_checkpoint import CheckpointTeacher

        return CheckpointTeacher(request)
    from l4cli.commands.distill_samples_endpoint import EndpointTeacher

    if request.api is Api.completions:
        for prompt in found.prompts:
            if prompt.text is None:
                what = f"cannot ask for a completion of the row in {prompt.place}"
                why = "it has `messages`, and a completion continues a text"
                fix = "give rows with `prompt`, or use `--api chat`"
                raise UsageError(what, why=why, fix=fix)
    with in_our_words():
        return EndpointTeacher(request)


def _tokenizer(request: SamplesRequest) -> Tokenizer | None:
    """What shards are written with; seen to have the tokens of the chat format."""
    from l4cli.text import load_tokenizer, render_chat

    if request.tokenizer is not None:
        tokenizer = load_tokenizer(request.tokenizer)
    elif request.checkpoint is not None:
        from l4cli.checkpoint import resolve_checkpoint

        tokenizer = load_tokenizer(resolve_checkpoint(request.checkpoint))
    else:
        return None
    render_chat(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=True)
    return tokenizer


def _settings(request: SamplesRequest, found: PromptFile, teacher: Teacher) -> dict[str, Any]:
    """What all answers of a folder share; more samples of a prompt may join them."""
    return {
        "prompts": found.digest,
        **teacher.facts(),
        "max_new_tokens": request.max_new_tokens,
        "sampling_temperature": request.sampling_temperature,
        "sampling_top_p": request.top_p,
        "top_logprobs": request.num_top_logprobs,
        "seed": request.seed,
    }


def _made_with(request: SamplesRequest, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides about rows and shards once the answers are there."""
    return {
        "samples_per_prompt": request.samples_per_prompt,
        "checker": request.checker,
        "keep": str(request.keep),
        "reasoning": str(request.reasoning),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "seq_len": None if tokenizer is None else request.seq_len,
    }


def _ask(teacher: Teacher, missing: list[Item], num_items: int, journal: AnswerJournal) -> None:
    num_before = len(journal)
    try:
        with terminal.progress("answers", len(missing)) as bar:

            def keep(record: Record) -> None:
                journal.append(record)
                num_new = len(journal) - num_before
                bar.update(num_new, answers=f"{num_new}/{len(missing)}")

            with in_our_words():
                teacher.ask(missing, keep, is_resumed=num_before > 0)
    except BaseException:
        kept = f"{len(journal)} of {num_items} answers are kept"
        terminal.say(f"{kept}; the same command again asks for the rest")
        raise


@contextmanager
def in_our_words() -> Iterator[None]:
    """Inside, errors name the options of this command."""
    try:
        yield
    except L4Error as error:
        for theirs, ours in _OPTION_NAMES.items():
            error.why, error.fix = error.why.replace(theirs, ours), error.fix.replace(theirs, ours)
        raise


class _Writer:
    """From the journal to rows, shards and a summary, which is written last."""

    def __init__(
        self,
        request: SamplesRequest,
        found: PromptFile,
        journal: AnswerJournal,
        tokenizer: Tokenizer | None,
        teacher: Teacher,
    ) -> None:
        self.request, self.found, self.journal = request, found, journal
        self.tokenizer, self.teacher = tokenizer, teacher

    def write(
        self, checker: Checker | None, made_with: dict[str, Any], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Write everything anew; whoever is stopped here pays nothing again."""
        from l4cli.checkpoint.atomic import replacing, write_text
        from l4cli.posttraining.sample_selection import Counts

        out, counts = self.request.out, Counts()
        (out / SUMMARY).unlink(missing_ok=True)
        shards = self._new_shards()
        with replacing(out / SAMPLES) as file:
            for kept in self._select(checker, counts):
                file.write(json.dumps(kept.row, ensure_ascii=False).encode() + b"\n")
                if shards is not None:
                    shards.add(kept)
        packed = self._pack(shards, settings) if shards is not None else None
        figures = asdict(counts)
        rates = figures.pop("pass_rates")
        summary = {
            "teacher": self.teacher.name,
            "settings": settings,
            "made_with": made_with,
            **figures,
            "num_checker_timeouts": getattr(checker, "num_timeouts", 0),
            "shards": packed,
            "last_run": self.teacher.report(),
            "pass_rates": rates,
        }
        write_text(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        return summary

    def _select(self, checker: Checker | None, counts: Counts) -> Iterator[Kept]:
        from l4cli.posttraining.sample_selection import Selection, select

        request = self.request
        numbers = range(request.samples_per_prompt)
        selection = Selection(request.keep, request.reasoning, len(numbers), self.teacher.name)
        answers = (
            (prompt, list(self.journal.read((prompt.id, i) for i in numbers)))
            for prompt in self.found.prompts
        )
        return select(answers, checker, selection, counts, request.jobs)

    def _new_shards(self) -> SampleShards | None:
        if self.tokenizer is None:
            return None
        from l4cli.posttraining.sample_shards import SampleShards, remove_old

        remove_old(self.request.out)
        return SampleShards(self.tokenizer, self.request.num_top_logprobs)

    def _pack(self, shards: SampleShards, settings: dict[str, Any]) -> dict[str, Any] | None:
        if not shards.counts.num_rows:
            terminal.warn("no answer is kept, so no shards are written")
            return None
        from l4cli.data.stream_packer import PackingOptions

        request = self.request
        window = default_window(request.seq_len)
        packing = PackingOptions("best-fit", window, shuffle=True, seed=request.seed)
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        index = shards.write(request.out, request.seq_len, packing, self.teacher.name, identity)
        names = ("num_rows", "num_tokens", "num_documents", "seq_len")
        return {name: index[name] for name in names} | shards.counts.report()


def _is_made(out: Path, made_with: dict[str, Any]) -> bool:
    """Whether rows and shards of these choices are there, whole."""
    summary = _read_summary(out)
    if summary is None or summary.get("made_with") != made_with:
        return False
    packed = summary.get("shards")
    folders = ["shards"] if packed else []
    folders += ["cache"] if packed and packed.get("num_soft_targets") else []
    return all((out / name).exists() for name in (SAMPLES, *folders))


def _read_summary(out: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def _counts_in(out: Path) -> dict[str, Any]:
    summary = _read_summary(out) or {}
    counts = {k: v for k, v in summary.items() if k.startswith("num_") and isinstance(v, int)}
    return counts | {"shards": summary.get("shards")}


def _tell_plan(request: SamplesRequest, teacher: Teacher, items: list[Item]) -> None:
    """What a run would ask for at most; prompts are counted at four bytes a token."""
    num_bytes = sum(
        len(str(message["content"]).encode()) for prompt, _ in items for message in prompt.messages
    )
    most = len(items) * request.max_new_tokens
    terminal.say(
        f"`{teacher.name}` ({teacher.kind}) would be asked for {len(items)} answers: about "
        f"{terminal.count_text(num_bytes / 4)} tokens of prompts, at most "
        f"{terminal.count_text(most)} of answers; nothing was asked"
    )
    plan = {"num_answers": len(items), "num_prompt_tokens": num_bytes // 4, "max_new_tokens": most}
    terminal.emit({"event": "plan", **plan})


def _tell(request: SamplesRequest, summary: dict[str, Any]) -> None:
    """Say what became of all answers, and what to type next."""
    counts = {name: value for name, value in summary.items() if name.startswith("num_")}
    words = ["asked", "answered", "refused", "empty", "cut", "duplicates", "kept"]
    if request.checker != "none":
        words.insert(-1, "passed")
    shown = "  ".join(f"{word} {counts[f'num_{word}']}" for word in words)
    terminal.say(f"{shown}  -> {request.out / SAMPLES}")
    packed = summary["shards"]
    if packed:
        _tell_shards(request, packed)
    _tell_done(request)


def _tell_done(request: SamplesRequest) -> None:
    terminal.emit({"event": "done", "out": str(request.out)} | _counts_in(request.out))
    terminal.result(str(request.out))


def _tell_shards(request: SamplesRequest, packed: dict[str, Any]) -> None:
    folder = request.out / "shards"
    if request.checkpoint is not None and request.tokenizer is None:
        terminal.say(
            f"shards -> {folder}; all of the teacher's probabilities: "
            f"`l4 distill {folder} --teacher {request.checkpoint} --student ...`"
        )
    elif packed["num_soft_targets"]:
        shown = packed["mean_shown_probability"]
        cache = request.out / "cache"
        terminal.say(
            f"soft targets: {packed['soft_share']:.1%} of {packed['num_targets']}, which show "
            f"{shown:.1%} of the teacher's probability  -> {cache}\n"
            f"`l4 distill {folder} --teacher-cache {cache} --student ...`"
        )
    elif packed["num_rows_with_logprobs"]:
        terminal.warn(
            "no soft targets: the tokenizer cuts no answer as the teacher does; the shards teach "
            "what was said, as data do"
        )
    else:
        terminal.say(f"shards -> {folder}")
