"""Ask once, or talk until the end: streaming answers, commands, Ctrl-C.

in: a conversation and a keyboard or a pipe; out: answers on stdout, everything else on stderr
"""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l4cli import terminal
from l4cli.commands.boxes import show_boxes
from l4cli.commands.conversation import Answer, Conversation
from l4cli.commands.pictures import open_image, open_video
from l4cli.data.video import Sampling
from l4cli.errors import L4Error, suggest

HELP = """\
/image PATH   show a picture with the next question
/video PATH   show a video with the next question
/reset        forget the conversation and what was shown
/help         this list
/exit         end; so does Ctrl-D
Ctrl-C        stop the answer; what was said stays in the conversation"""
COMMANDS = ("/image", "/video", "/reset", "/help", "/exit")
_COMMAND = re.compile(r"/[a-z]+")
PROMPT = "> "
_PROGRESS_TOKENS = 8192  # shorter prompts are read before anyone wonders


def answer_once(conversation: Conversation, question: str) -> Answer:
    """Ask one question and write the answer, or the JSON object, to stdout."""
    for shown in conversation.waiting:
        terminal.say(shown.describe())
    answer = Answer()
    _speak(conversation, question, answer)
    return answer


def talk(conversation: Conversation, frames: Sampling, boxes: Path | None = None) -> None:
    """Read questions and commands until the end of input."""
    for shown in conversation.waiting:
        terminal.say(shown.describe())
    while True:
        try:
            line = _read_line().strip()
            if line == "/exit":
                return
            if _COMMAND.fullmatch(line.split(" ")[0]):
                _obey(conversation, line, frames)
            elif line:
                _exchange(conversation, line, boxes)
        except EOFError:
            return terminal.say("")
        except KeyboardInterrupt:
            terminal.say("\n(Ctrl-D or `/exit` ends)")
        except L4Error as error:
            terminal.show_error(error)


def _exchange(conversation: Conversation, question: str, boxes: Path | None) -> None:
    answer = Answer()
    with _interrupts() as was_interrupted:
        _speak(conversation, question, answer, was_interrupted)
    picture = conversation.last_picture
    if boxes is not None and picture is not None:
        show_boxes(answer.text, picture.image, boxes)


def _obey(conversation: Conversation, line: str, frames: Sampling) -> None:
    """Carry out a line that begins with a slash."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        path = _path(rest.strip(), "picture", "/image photo.jpg")
        picture = conversation.add_picture(str(path), open_image(path), must_fit=True)
        terminal.say(picture.describe())
    elif command == "/video":
        path = _path(rest.strip(), "video", "/video film.mp4")
        video = conversation.add_video(str(path), open_video(path, frames), must_fit=True)
        terminal.say(video.describe())
    elif command == "/reset":
        conversation.reset()
        terminal.say("the conversation is empty")
    elif command == "/help":
        terminal.say(HELP)
    else:
        what, why = f"unknown command `{command}`", "a line that begins with `/` is a command"
        raise L4Error(what, why=why, fix=f"{suggest(command, COMMANDS)}, or see `/help`")


def _path(text: str, medium: str, example: str) -> Path:
    """A path as typed, or as terminals paste it: quoted, or with escaped spaces."""
    if not text:
        why = f"`{example.split()[0]}` wants a path"
        raise L4Error(f"no {medium} named", why=why, fix=f"`{example}`")
    path = Path(text).expanduser()
    if not path.exists():
        try:
            words = shlex.split(text)
        except ValueError:  # an apostrophe in a name
            return path
        if len(words) == 1:
            return Path(words[0]).expanduser()
    return path


def _read_line() -> str:
    """One line, edited and remembered where there is a terminal."""
    with contextlib.suppress(ImportError):  # some platforms have none
        import readline  # noqa: F401  (`input` then edits lines and recalls old ones)
    try:
        if sys.stdout.isatty():
            return input(PROMPT)
        # `input` would print its prompt to stdout, where only answers belong.
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return input()
    except UnicodeDecodeError:
        what, why = "cannot read the line", "it is not valid text in the terminal's encoding"
        raise L4Error(what, why=why, fix="set a UTF-8 locale, e.g. `LANG=C.UTF-8`") from None


def _speak(
    conversation: Conversation,
    question: str,
    answer: Answer,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Stream the answer, then say what there is to say about it."""
    for piece in conversation.ask(question, answer, should_stop, _progress):
        terminal.stream(piece)
    terminal.stream("\n")
    terminal.emit(_event(answer, guesses=conversation.speculation is not None))
    if answer.finish == "length":
        terminal.say(f"(cut at {answer.num_answer_tokens} tokens: `--max-new-tokens` allows more)")
    elif answer.finish == "context":
        limit = conversation.engine.max_context
        terminal.warn(f"the answer was cut: the context of {limit} tokens is full")
    elif answer.finish == "stopped":
        terminal.say("(stopped)")
    guesses = ""
    if conversation.speculation is not None:
        guesses = (
            f", {answer.num_accepted_tokens} of {answer.num_draft_tokens} guesses accepted, "
            f"{answer.accepted_per_step:.2f} a step"
        )
    terminal.say(
        f"({answer.num_prompt_tokens} tokens read at {answer.prefill_tok_per_sec:.0f} tok/s, "
        f"{answer.num_answer_tokens} written at {answer.decode_tok_per_sec:.1f} tok/s{guesses})"
    )


def _progress(num_read: int, total: int) -> None:
    if total >= _PROGRESS_TOKENS:
        terminal.say(f"read {num_read} of {total} tokens")


def _event(answer: Answer, *, guesses: bool) -> dict[str, Any]:
    event: dict[str, Any] = {
        "answer": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_answer_tokens": answer.num_answer_tokens,
        "prefill_tok_per_sec": round(answer.prefill_tok_per_sec, 2),
        "decode_tok_per_sec": round(answer.decode_tok_per_sec, 2),
    }
    if guesses:
        names = ("num_steps", "num_draft_tokens", "num_accepted_tokens")
        event |= {name: getattr(answer, name) for name in names}
        event["accepted_per_step"] = round(answer.accepted_per_step, 3)
    return event


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a question to be asked between tokens, so that no forward is cut."""
    was_pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal was_pressed
        was_pressed = True

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: was_pressed
    finally:
        signal.signal(signal.SIGINT, previous)
