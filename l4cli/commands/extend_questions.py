"""Questions about the user's own passages, written and checked by a model, as a stage's data.

in: token streams, a checkpoint or a server; out: pairs as JSONL, token streams, shards, counts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands.extend_data import Share, key_of, opened
from l4cli.commands.options import default_window
from l4cli.errors import L4Error, UsageError
from l4cli.training.stages import Stage

if TYPE_CHECKING:
    from l4cli.data.longcontext.passages import Pair, Passage
    from l4cli.evals.written_questions import Asker
    from l4cli.text import Tokenizer

PASSAGE_TOKENS = 256  # at most, and an eighth of the shortest stage
MIN_PASSAGE_TOKENS = 16
MANY_USES = 8  # of one pair in a stage, from which on it is said


@dataclass(frozen=True)
class Writer:
    """Which model writes, and how a server is asked."""

    source: str  # a checkpoint's folder, or the address of a server
    model: str | None = None
    api_key_env: str | None = None
    num_jobs: int = 4
    max_tokens: int | None = None
    num_passages: int = 200

    @property
    def is_server(self) -> bool:
        return self.source.startswith(("http://", "https://"))

    def check(self) -> None:
        """Refuse words that cannot be meant; nobody is asked yet."""
        if self.is_server and self.model is None:
            why, fix = "a server may have many models", "name one with `--model NAME`"
            raise UsageError("no model was named", why=why, fix=fix)
        if not self.is_server and (self.model or self.api_key_env or self.max_tokens):
            why = f"`{self.source}` is a checkpoint; they are for servers"
            fix = "leave `--model`, `--api-key-env` and `--max-tokens` out"
            raise UsageError("options of a server given", why=why, fix=fix)
        if self.is_server:
            self._endpoint(0)
        else:
            from l4cli.checkpoint import load_config

            load_config(self.source)

    def _endpoint(self, seed: int) -> Any:
        from l4cli.evals.endpoint import Api, EndpointOptions, api_key_from, request_url

        assert self.model is not None
        return EndpointOptions(
            url=request_url(self.source, Api.chat),
            model=self.model,
            api=Api.chat,
            api_key=api_key_from(self.api_key_env),
            num_jobs=self.num_jobs,
            seed=seed,
        )

    def identity(self) -> dict[str, Any]:
        """What tells this writer's questions from another's."""
        if self.is_server:
            return {"endpoint": self._endpoint(0).shown_url, "model": self.model}
        from l4cli.checkpoint import resolve_checkpoint
        from l4cli.training.continuation import fingerprint

        return {"checkpoint": fingerprint(resolve_checkpoint(self.source))}

    def open(self, device: str, seed: int) -> Asker:
        """A model ready to be asked."""
        if self.is_server:
            from l4cli.evals.askers import ServerAsker

            return ServerAsker(self._endpoint(seed), self.max_tokens)
        from l4cli.checkpoint import load_model, resolve_checkpoint
        from l4cli.commands.chat_model import has_chat_template
        from l4cli.evals.askers import EngineAsker
        from l4cli.inference import Engine
        from l4cli.text import load_tokenizer
        from l4cli.training.device import torch_device

        folder = resolve_checkpoint(self.source)
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, device=torch_device(device))
        engine = Engine(model, num_token_ids=tokenizer.vocab_size)
        return EngineAsker(engine, tokenizer, is_chat=has_chat_template(folder))


class Questions:
    """The pairs of a run, written once, and the documents of each stage made of them."""

    def __init__(
        self, folder: Path, passages: Sequence[Passage], pairs: Sequence[Pair], key: str
    ) -> None:
        self.folder, self.passages, self.pairs, self.key = folder, passages, pairs, key

    @classmethod
    def write(
        cls,
        folder: Path,
        writer: Writer,
        streams: Sequence[Path],
        digests: Sequence[str],
        stages: Sequence[Stage],
        tokenizer: Tokenizer,
        *,
        device: str,
        seed: int,
    ) -> Questions:
        """Draw passages, have questions written and checked; go on with those already there.

        raises: L4Error when nothing is kept
        """
        from l4cli.data.longcontext.passages import draw_passages
        from l4cli.evals.written_questions import KEPT, write_questions

        size = passage_tokens(stages)
        key = key_of(
            writer=writer.identity(),
            streams=list(digests),
            size=size,
            passages=writer.num_passages,
            seed=seed,
        )
        passages = draw_passages(streams, writer.num_passages, size, tokenizer, seed)
        if not passages:
            why, fix = "the streams hold no text without pictures", "name streams with text"
            raise L4Error("there is no passage to ask about", why=why, fix=fix)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"questions-{key}.jsonl"
        asker = _Later(writer, device, seed)
        terminal.say(f"asking `{writer.source}` about {len(passages)} passages: `{file}`")
        with terminal.progress("ask", len(passages)) as bar:

            def tell(done: int, counts: Counter[str]) -> None:
                bar.update(done, kept=str(counts[KEPT]))

            pairs, counts = write_questions(passages, asker, file, tell)
        shown = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        terminal.say(f"{len(passages)} questions: {shown}")
        names = {name.replace(" ", "_"): count for name, count in counts.items()}
        terminal.emit({"event": "questions", "num_passages": len(passages), **names})
        if not pairs:
            raise L4Error(
                f"no question of `{writer.source}` can be used",
                why=f"of {len(passages)} written: {shown}",
                fix="use a model that follows instructions, or more `--passages`; what it wrote "
                f"is in `{file}`",
            )
        return cls(folder, passages, pairs, key)

    def make(self, stage: Stage, num_tokens: int, tokenizer: Tokenizer, seed: int) -> Share:
        """Make a stage's documents, as a token stream and as shards."""
        from l4cli.checkpoint.atomic import replacing
        from l4cli.data.geometry import PictureGeometry
        from l4cli.data.longcontext.passages import question_documents
        from l4cli.data.longcontext.teaching import teaching_frames
        from l4cli.data.stream import StreamWriter
        from l4cli.data.stream_packer import PackingOptions, pack_streams

        window = default_window(stage.seq_len)
        key = key_of(
            questions=self.key,
            pairs=[asdict(pair) for pair in self.pairs],
            stage=asdict(stage),
            num_tokens=num_tokens,
            seed=seed,
            window=window,
        )
        packed = self.folder / f"questions-{stage.seq_len}-{key}"
        if packed.exists():
            return opened(packed)
        stream = packed.with_name(f"{packed.name}.tokens")
        documents = question_documents(
            self.pairs, self.passages, length=stage.seq_len, tokenizer=tokenizer, seed=int(key, 16)
        )
        with replacing(stream) as file:
            writer = StreamWriter(file, tokenizer, PictureGeometry())  # type: ignore[arg-type]
            for frame in teaching_frames(documents, num_tokens):
                writer.write(frame)
            writer.close()
        uses = writer.totals.documents / len(self.pairs)
        if uses > MANY_USES:
            terminal.warn(
                f"stage {stage.number} has {writer.totals.documents} documents on "
                f"{len(self.pairs)} questions; more `--passages` give it more to learn from"
            )
        pack_streams(
            [str(stream)], packed, stage.seq_len, PackingOptions("best-fit", window, True, seed)
        )
        return opened(packed)


class _Later:
    """Opens the model when something is left to ask: it may be large, or cost money."""

    def __init__(self, writer: Writer, device: str, seed: int) -> None:
        self._writer, self._device, self._seed = writer, device, seed
        self._asker: Asker | None = None

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        self._asker = self._asker or self._writer.open(self._device, self._seed)
        return self._asker.ask(prompts, max_tokens)


def passage_tokens(stages: Sequence[Stage]) -> int:
    """How long passages are. raises: UsageError for a stage too short to hold any"""
    size = min(PASSAGE_TOKENS, stages[0].seq_len // 8)
    if size < MIN_PASSAGE_TOKENS:
        shortest = 8 * MIN_PASSAGE_TOKENS
        raise UsageError(
            f"cannot ask about passages in rows of {stages[0].seq_len}",
            why=f"a passage would have {size} tokens, which say nothing",
            fix=f"make the first stage at least {shortest} long, or leave `--synthetic-from` out",
        )
    return size
