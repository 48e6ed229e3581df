"""A conversation at a terminal, driven through a pty, and its history to the last id."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_chat import save_checkpoint, save_picture

from l4cli.commands import chat_model
from l4cli.commands.boxes import Box, draw_boxes, find_boxes
from l4cli.commands.conversation import Answer, Conversation, TextStream
from l4cli.data.media import tiles_of
from l4cli.errors import L4Error
from l4cli.inference import SamplingOptions
from l4cli.text import load_tokenizer, render_chat


class Terminal:
    """`l4 chat` with a terminal on all three streams."""

    def __init__(self, *words: object) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "l4cli", "chat", *map(str, words)]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, timeout_s: float = 120) -> str:
        """Read until `text` has come; give what came before it and forget both."""
        end = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], 1.0)
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if ready:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


@pytest.fixture
def open_terminal():
    """Start terminals that do not outlive the test."""
    opened = []

    def start(*words: object) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()


def test_talk_look_interrupt_and_leave(open_terminal, tmp_path):
    folder = save_checkpoint(
        tmp_path / "endless", "abc", ends=False, max_position_embeddings=1_000_000
    )
    picture = save_picture(tmp_path / "a picture.png")
    terminal = open_terminal(folder, "--max-new-tokens", "900000", "--image", picture)
    terminal.wait_for("greedy; 1000000 tokens of context; `/help` lists commands")
    terminal.wait_for("27 tokens")
    terminal.wait_for("> ")
    terminal.type("/help")
    terminal.wait_for("/image PATH")
    terminal.wait_for("> ")
    terminal.type("/imgae x")
    terminal.wait_for("error: unknown command `/imgae`")
    terminal.wait_for("fix: did you mean `/image`?")
    terminal.wait_for("> ")
    terminal.type("/image nowhere.png")
    terminal.wait_for("error: cannot use picture `nowhere.png`")
    terminal.wait_for("> ")
    # At the prompt there is nothing to stop. Between its prompt and its wait for a key Python
    # takes a signal for later, so a key has to follow.
    terminal.interrupt()
    terminal.type("")
    terminal.wait_for("(Ctrl-D or `/exit` ends)")
    terminal.wait_for("> ")
    terminal.type("hello")
    terminal.wait_for("abcabcabc")
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    numbers = re.search(r"\((\d+) tokens read.*, (\d+) written", terminal.wait_for(" tok/s)\r\n"))
    assert numbers is not None
    assert int(numbers[1]) == 1 + (2 + 4 + 2 + 27 + 5 + 1) + (2 + 9 + 2)
    assert int(numbers[2]) >= 9
    terminal.wait_for("> ")
    terminal.type(f"/image '{picture}'")
    terminal.wait_for("5 tiles (2 x 2 and an overview), 27 tokens")
    terminal.wait_for("> ")
    terminal.type("/reset")
    terminal.wait_for("the conversation is empty")
    terminal.wait_for("> ")
    terminal.type("/exit")
    assert terminal.close() == 0


def test_end_of_input_ends(open_terminal, tmp_path):
    terminal = open_terminal(save_checkpoint(tmp_path / "says", "ok"), "--quiet")
    terminal.wait_for("> ")
    terminal.type("hello")
    terminal.wait_for("ok\r\n> ")
    os.write(terminal.master, b"\x04")
    assert terminal.close() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_checkpoint(
        tmp_path_factory.mktemp("chat") / "random", max_position_embeddings=4096
    )
    loaded = chat_model.load(folder, "cpu", "auto", is_raw=False)
    with chat_model.fitting_threads(loaded):
        yield loaded


def conversation(model, **options) -> Conversation:
    options.setdefault("max_new_tokens", 20)
    return Conversation(model, SamplingOptions(temperature=2.0), **options)


def said(talk: Conversation) -> list[int]:
    """Every id of the history, read or not."""
    return [*([] if talk.cache is None else talk.cache.tokens), *talk.unread]


def test_history_is_what_a_whole_rendering_would_be(model):
    """Two turns with pictures; answers stand in it as the ids that were generated."""
    talk = conversation(model, system=" be brief ")
    tokenizer, eot = model.tokenizer, model.tokenizer.eot_id
    image = Image.new("RGB", (40, 24), "red")
    talk.add_picture("one", image)
    messages = [{"role": "system", "content": "be brief"}]
    shown = [{"type": "image"}, {"type": "text", "text": "and?"}]
    messages.append({"role": "user", "content": shown})
    grids, per_tile = [(2, 2)], model.geometry.tokens_per_tile

    def rendered():
        options = {"image_grids": grids, "tokens_per_tile": per_tile}
        return render_chat(tokenizer, messages, add_generation_prompt=True, **options).ids.tolist()

    first = rendered()
    answer = Answer()
    text = "".join(talk.ask("and?", answer))
    assert text == answer.text
    assert answer.num_prompt_tokens == len(first)
    history = said(talk)
    assert history[: len(first)] == first
    generated = history[len(first) : -1]
    assert history[-1] == eot
    assert len(generated) == answer.num_answer_tokens
    assert tokenizer.decode_bytes(generated).decode(errors="replace") == text

    talk.add_picture("two", image.resize((16, 16)))
    list(talk.ask("more", Answer()))
    turn = render_chat(
        tokenizer,
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "more"}]}],
        add_generation_prompt=True,
        image_grids=[(1, 1)],
        tokens_per_tile=per_tile,
    ).ids.tolist()[1:]
    assert said(talk)[len(history) :][: len(turn)] == turn

    # What the cache holds is what reading the same ids anew gives.
    cache = talk.cache
    tiles = torch.cat([tiles_for(model, image), tiles_for(model, image.resize((16, 16)))])
    again = model.engine.prefill(cache.tokens, tiles)
    torch.testing.assert_close(again.logits_V, cache.logits_V, atol=1e-4, rtol=1e-4)


def tiles_for(model, image) -> torch.Tensor:
    return torch.from_numpy(tiles_of(image, model.geometry))


def test_a_stopped_answer_stays_in_the_history(model):
    talk = conversation(model)
    answer = Answer()
    pieces = talk.ask("go on", answer, should_stop=lambda: answer.num_answer_tokens >= 3)
    text = "".join(pieces)
    assert (answer.finish, answer.num_answer_tokens) == ("stopped", 3)
    history = said(talk)
    assert history[-1] == model.tokenizer.eot_id
    assert model.tokenizer.decode_bytes(history[-4:-1]).decode(errors="replace") == text
    list(talk.ask("and then", Answer()))
    assert said(talk)[: len(history)] == history


def test_stopped_while_reading(model, monkeypatch):
    monkeypatch.setattr("l4cli.commands.conversation.PREFILL_CHUNK", 8)
    talk = conversation(model)
    image = Image.new("RGB", (40, 24), "blue")
    talk.add_picture("one", image)
    answer = Answer()
    assert list(talk.ask("x" * 50, answer, should_stop=lambda: True)) == []
    assert answer.finish == "stopped"
    assert 0 < talk.cache.num_tokens < 20
    history = said(talk)
    list(talk.ask("again", Answer()))
    assert said(talk)[: len(history)] == history
    again = model.engine.prefill(talk.cache.tokens, tiles_for(model, image))
    torch.testing.assert_close(again.logits_V, talk.cache.logits_V, atol=1e-4, rtol=1e-4)


def test_a_question_that_does_not_fit_was_never_asked(model):
    talk = conversation(model)
    list(talk.ask("first", Answer()))
    history = said(talk)
    with pytest.raises(L4Error, match="tokens are needed"):
        list(talk.ask("x" * 5000, Answer()))
    assert said(talk) == history
    list(talk.ask("second", Answer()))
    talk.reset()
    assert said(talk) == []


def test_turns_draw_differently_but_repeatably(model):
    def answers():
        talk = conversation(model)
        return ["".join(talk.ask("same", Answer())) for _ in range(2)]

    first = answers()
    assert first == answers()
    assert first[0] != first[1]


def test_plain_text_is_continued_without_headers(model):
    talk = Conversation(model, SamplingOptions(), max_new_tokens=3, is_raw=True)
    list(talk.ask("ab", Answer()))
    bos = model.tokenizer.bos_id
    assert said(talk)[:3] == [bos, *b"ab"]
    assert model.tokenizer.eot_id not in said(talk)[:-1]


def test_characters_come_whole():
    tokenizer = load_tokenizer("bytes")
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in "a\u00e9\U0001f600".encode()]
    assert pieces == ["a", "", "\u00e9", "", "", "", "\U0001f600"]
    assert stream.finish() == ""
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in (0xF0, 0x9F, 0x41)] == ["", "", "\ufffdA"]
    assert stream.add(0xC3) == ""
    assert stream.finish() == "\ufffd"
    assert stream.add(tokenizer.eot_id) == ""


def test_boxes_in_an_answer():
    text = "a [10 20 30 40], b [1,2, 3 ,4] c [ 5, 6 7 8 ] d [1 2 3] e [1 2 3 1000] f[0 0 100 100]"
    boxes = find_boxes(text)
    assert boxes == [Box(10, 20, 30, 40), Box(1, 2, 3, 4), Box(5, 6, 7, 8), Box(0, 0, 100, 100)]
    assert [box.is_real for box in boxes] == [True] * 4
    assert not Box(30, 20, 10, 40).is_real
    assert not Box(0, 0, 101, 50).is_real
    assert Box(0, 0, 10, 10).overlap(Box(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert Box(0, 0, 10, 10).overlap(Box(10, 10, 20, 20)) == 0


def test_boxes_at_the_edges_stay_in_the_picture():
    image = Image.new("RGB", (200, 100), "white")
    drawn = draw_boxes(image, [Box(0, 0, 100, 100), Box(99, 99, 100, 100)])
    assert image.getpixel((0, 0)) == (255, 255, 255)
    for corner in ((0, 0), (199, 0), (0, 99), (199, 99)):
        assert drawn.getpixel(corner) != (255, 255, 255)
    assert drawn.getpixel((100, 50)) == (255, 255, 255)


def test_control_characters_do_not_reach_a_terminal(open_terminal, tmp_path):
    terminal = open_terminal(save_checkpoint(tmp_path / "says", "a\x1b]0;b\x07"), "hello", "-q")
    terminal.wait_for("a\\x1b]0;b\\x07")
    assert terminal.close() == 0


def test_templates_are_found(tmp_path: Path):
    assert not chat_model.has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{ not json")
    assert not chat_model.has_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert chat_model.has_chat_template(tmp_path)
