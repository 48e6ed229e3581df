"""A conversation: text, pictures and videos to ids, turn after turn, and answers back to text.

in: questions, pictures and videos; out: pieces of an answer as they come, `Answer` at the end
The history is ids, never text encoded again: what the model wrote is what it later reads.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from PIL import Image

from l4cli.commands.chat_model import ChatModel
from l4cli.commands.prompt_cache import PromptCache
from l4cli.commands.shown import Picture, Shown, Video
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import grid_of
from l4cli.data.tiles import Tiles
from l4cli.data.video import Film
from l4cli.errors import L4Error
from l4cli.inference import PREFILL_CHUNK, Cache, Request, SamplingOptions, Speculation
from l4cli.text import Tokenizer, image_block, render_chat

DEFAULT_NEW_TOKENS = 512
_CONTEXT_IDS = 4  # tokens before a new one that may change how its text is spelled


@dataclass
class Answer:
    """What came of one question."""

    text: str = ""
    num_prompt_tokens: int = 0
    num_known_tokens: int = 0  # of the prompt, from a `PromptCache`
    num_answer_tokens: int = 0
    finish: str = "stopped"  # or "stop", "length", "context"
    prefill_time_s: float = 0.0
    decode_time_s: float = 0.0
    num_steps: int = 0  # with a `Speculation`: passes of the model after the first token
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def accepted_per_step(self) -> float:
        """Guessed tokens that stood in each pass."""
        return self.num_accepted_tokens / max(self.num_steps, 1)

    @property
    def prefill_tok_per_sec(self) -> float:
        """Tokens of the question, template and pictures included, read in a second."""
        return (self.num_prompt_tokens - self.num_known_tokens) / max(self.prefill_time_s, 1e-9)

    @property
    def decode_tok_per_sec(self) -> float:
        """Tokens written in a second, counted after the first, which prefill has paid for."""
        return max(self.num_answer_tokens - 1, 0) / max(self.decode_time_s, 1e-9)


class Stopped(Exception):
    """The person at the keyboard has read enough."""


class Conversation:
    """What was said so far, and how to go on."""

    def __init__(
        self,
        model: ChatModel,
        sampling: SamplingOptions,
        system: str | None = None,
        max_new_tokens: int | None = None,
        *,
        is_raw: bool = False,
        prompt_cache: PromptCache | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.prompt_cache, self.speculation = prompt_cache, speculation
        self.model, self.engine, self.tokenizer = model, model.engine, model.tokenizer
        self.sampling, self.system, self.is_raw = sampling, system, is_raw
        self.max_new_tokens = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.cache: Cache | None = None
        self.unread: list[int] = []  # said, but not yet read by the model
        self.unseen = Tiles()  # of the pictures and frames in `unread`
        self.waiting: list[Shown] = []  # shown with the next question
        self.last_picture: Picture | None = None
        self.num_turns = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the history."""
        return len(self.unread) + (0 if self.cache is None else self.cache.num_tokens)

    def add_picture(self, name: str, image: Image.Image, *, must_fit: bool = False) -> Picture:
        """Show a picture with the next question, which in the end decides what fits.

        raises: L4Error when the model cannot see, or, if it must, when it does not fit already
        """
        geometry = self._geometry("picture", name)
        grid = grid_of(*image.size, geometry)
        num_tokens = len(image_block(self.tokenizer, *grid, geometry.tokens_per_tile))
        picture = Picture(name, image, grid, num_tokens)
        self._show(picture, must_fit)
        self.last_picture = picture
        return picture

    def add_video(self, name: str, film: Film, *, must_fit: bool = False) -> Video:
        """Show a video's frames with the next question, like so many pictures of one tile."""
        per_tile = self._geometry("video", name).tokens_per_tile
        per_frame = len(image_block(self.tokenizer, 1, 1, per_tile))
        video = Video(name, film, film.num_frames * per_frame)
        self._show(video, must_fit)
        return video

    def _geometry(self, medium: str, name: str) -> PictureGeometry:
        if self.model.geometry is not None:
            return self.model.geometry
        why = f"`{self.model.folder}` has no picture encoder"
        if self.engine.config.vision is not None:
            why = f"the tokenizer of `{self.model.folder}` has no tokens for pictures"
        fix = f"name a checkpoint with vision, or leave the {medium} out"
        raise L4Error(f"cannot show {medium} `{name}`", why=why, fix=fix)

    def _show(self, shown: Shown, must_fit: bool) -> None:
        self.waiting.append(shown)
        if must_fit:
            try:
                num_waiting = sum(waiting.num_tokens for waiting in self.waiting)
                self._check_context(self.num_tokens + num_waiting)
            except L4Error:
                self.waiting.pop()
                raise

    def _check_context(self, num_tokens: int) -> None:
        try:
            self.engine.check_context(num_tokens)
        except L4Error as error:
            if not any(isinstance(shown, Video) for shown in self.waiting):
                raise
            fix = "take fewer frames with `--max-frames` or `--fps`, or begin anew (`/reset`)"
            raise L4Error(error.what, why=error.why, fix=fix) from None

    def ask(
        self,
        question: str,
        answer: Answer,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[str]:
        """Give the answer piece by piece, whole characters only; `answer` is filled on the way.

        When `should_stop` says so the answer ends where it is, and stays in the history.
        raises: L4Error when it does not fit the context, or a film breaks off; then the question
        was never asked, or only as far as it was read
        """
        turn = self._turn_ids(question)
        num_new_tokens = self._room(self.num_tokens + len(turn))
        prompt_cache = None if self.num_tokens else self.prompt_cache
        if prompt_cache is not None:
            answer.num_known_tokens = self._recall(prompt_cache, turn)
        before = list(self.unread)
        self._begin_turn(turn[answer.num_known_tokens :])
        answer.num_prompt_tokens = answer.num_known_tokens + len(self.unread)
        start = time.perf_counter()
        try:
            self._read(should_stop, on_progress)
            if self.speculation is not None and self.cache is not None:
                self.speculation.drafter.follow(self.cache.tokens.tensor())
        except Stopped:
            self._end_turn([])
            return
        except L4Error:  # a film that breaks off, say: it must not stand in the way of what follows
            self._give_up(before, answer.num_prompt_tokens - len(self.unread))
            raise
        finally:
            answer.prefill_time_s = time.perf_counter() - start
        if prompt_cache is not None and self.cache is not None:
            prompt_cache.finish(self.cache)
        sampling = replace(self.sampling, seed=self.sampling.seed + self.num_turns)
        self.num_turns += 1
        request = Request(
            [],
            max_new_tokens=num_new_tokens,
            stop_ids=self.model.stop_ids,
            sampling=sampling,
            cache=self.cache,
        )
        yield from self._answer(request, answer, should_stop)

    def _answer(
        self, request: Request, answer: Answer, should_stop: Callable[[], bool]
    ) -> Iterator[str]:
        """Generate; whatever ends it, the history ends with what was said."""
        stream = TextStream(self.tokenizer)
        unread: list[int] = []  # the newest token: generated, not read back yet
        speculation = None if self.speculation is None else self.speculation.anew()
        start = time.perf_counter()
        try:
            for event in self.engine.generate([request], speculation=speculation):
                answer.decode_time_s = time.perf_counter() - start
                unread = [] if event.finish == "stop" else [event.token]
                if event.finish == "stop":
                    answer.finish = "stop"
                    break
                answer.num_answer_tokens += 1
                piece = stream.add(event.token)
                answer.text += piece
                if piece:
                    yield piece
                if event.finish is not None:
                    answer.finish = event.finish
                if should_stop():
                    break
            rest = stream.finish()
            answer.text += rest
            if rest:
                yield rest
        finally:
            if speculation is not None:
                answer.num_steps = speculation.num_steps
                answer.num_draft_tokens = speculation.num_drafted
                answer.num_accepted_tokens = speculation.num_accepted
            self._end_turn(unread)

    def _turn_ids(self, question: str) -> list[int]:
        """Ids of one more question with the waiting pictures before it."""
        per_tile = self.model.geometry.tokens_per_tile if self.model.geometry else 0
        grids = [grid for shown in self.waiting for grid in shown.grids]
        is_first = self.num_tokens == 0
        if self.is_raw:
            bos = self.tokenizer.bos_id
            ids = [bos] if is_first and bos is not None else []
            for grid in grids:
                ids += image_block(self.tokenizer, *grid, per_tile).tolist()
            ids += self.tokenizer.encode(question).tolist()
            if is_first and not ids:
                why, fix = "the prompt is empty and the tokenizer has no BOS", "give some text"
                raise L4Error("there is nothing to continue", why=why, fix=fix)
            return ids
        content = [{"type": "image"} for _ in grids] + [{"type": "text", "text": question}]
        messages: list[dict[str, object]] = [{"role": "user", "content": content}]
        if is_first and self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        tokens = render_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=True,
            image_grids=grids,
            tokens_per_tile=per_tile,
        )
        ids = tokens.ids.tolist()
        return ids if is_first else ids[1:]  # a conversation begins once

    def _room(self, num_tokens: int) -> int:
        """How long the answer may be. raises: L4Error with the numbers when it does not fit"""
        if self.max_new_tokens is not None:
            self._check_context(num_tokens + self.max_new_tokens)
            return self.max_new_tokens
        self._check_context(num_tokens + 1)
        return min(DEFAULT_NEW_TOKENS, self.engine.max_context - num_tokens)

    def _begin_turn(self, turn: list[int]) -> None:
        geometry = self.model.geometry
        if self.waiting and geometry is not None:
            self.unseen += Tiles([shown.source(geometry) for shown in self.waiting])
        self.unread += turn
        self.waiting = []

    def _recall(self, prompt_cache: PromptCache, turn: list[int]) -> int:
        """Begin with what a file knows of the prompt. raises: L4Error when pictures are in it"""
        if self.waiting:
            what = f"cannot use `{prompt_cache.path}` for this question"
            why = "pictures are the same tokens whatever they show"
            raise L4Error(what, why=why, fix="ask without pictures first, or begin anew (`/reset`)")
        self.cache = prompt_cache.begin(turn)
        return self.cache.num_tokens

    def _read(
        self,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Prefill what is unread; stopped half way, the rest stays unread."""
        before = 0 if self.cache is None else self.cache.num_tokens
        total = len(self.unread)
        if not total:  # a prompt that a file knew to its end
            return

        def after_piece(num_read: int) -> None:
            if on_progress is not None:
                on_progress(num_read, total)
            if should_stop() and num_read < total:
                raise Stopped

        self.cache = self.cache or Cache(self.engine.config.text)
        try:
            self.engine.prefill(
                self.unread,
                # Lazy, but used as a tensor is: its length, and slices of it.
                cast(torch.Tensor, self.unseen) if len(self.unseen) else None,
                cache=self.cache,
                chunk_size=PREFILL_CHUNK,
                on_progress=after_piece,
            )
        finally:
            num_read = self.cache.num_tokens - before
            placeholder = self.engine.config.image_token_index
            self.unread = self.unread[num_read:]
            per_tile = self.model.geometry.tokens_per_tile if self.model.geometry else 1
            self.unseen = self.unseen.last(self.unread.count(placeholder) // per_tile)

    def _give_up(self, before: list[int], num_read: int) -> None:
        """Forget the rest of a question; what was read of it is closed, for it cannot be unread."""
        self.unseen = self.unseen.last(0)
        self.unread = before[num_read:]
        if num_read > len(before):
            self._end_turn([])

    def _end_turn(self, newest: list[int]) -> None:
        """Close the answer in the history as the chat format does."""
        self.unread += newest
        if not self.is_raw and self.tokenizer.eot_id is not None:
            self.unread.append(self.tokenizer.eot_id)


class TextStream:
    """Tokens to text as they come; a character is given out when all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.recent: list[int] = []
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that this token completes, often a word, sometimes nothing."""
        before = self.tokenizer.decode_bytes(self.recent)
        after = self.tokenizer.decode_bytes([*self.recent, token])
        self.recent = [*self.recent, token][-_CONTEXT_IDS:]
        return self.decoder.decode(after[len(before) :])

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        return self.decoder.decode(b"", final=True)
