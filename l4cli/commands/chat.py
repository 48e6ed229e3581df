"""Talk to a model, with pictures and videos.

The first word is the checkpoint, the second the question. Without a checkpoint it is `$L4_MODEL`,
else the newest `runs/*/latest` that knows the chat format. With a terminal and no question it
opens a conversation (`/help` there); piped text joins the question, and stdout then holds the
answer and nothing else. Of a video the model sees `--fps` frames a second, of a long one
`--max-frames`, spread evenly over it.

examples:
  l4 chat
  l4 chat --image photo.jpg
  l4 chat runs/chat/latest "Compare these." --image a.png --image b.png
  l4 chat --video film.mp4 --fps 2 -p "What happens?"
  cat notes.txt | l4 chat -p "Summarise this." > summary.txt
  cat book.txt | l4 chat -p "Who is Ishmael?" --prompt-cache book.cache
  l4 chat runs/big/latest --draft runs/small/latest
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4cli import terminal
from l4cli.commands.options import (
    DEFAULT_FPS,
    DEFAULT_MAX_FRAMES,
    Device,
    DeviceOption,
    Fps,
    Json,
    MaxFrames,
    Quiet,
    Seed,
    WeightsDtype,
)
from l4cli.errors import UsageError

if TYPE_CHECKING:
    from l4cli.commands.conversation import Conversation
    from l4cli.inference import SamplingOptions

DEFAULT_QUESTION = "Describe the picture."
DEFAULT_VIDEO_QUESTION = "Describe the video."


class Offloaded(StrEnum):
    """What stays in host memory while a GPU computes."""

    experts = "experts"


SYSTEM_HELP = "what the model is told before the conversation"
CACHE_HELP = "file that keeps what was read of a long prompt; made when it is not there"
DRAFT_HELP = "small checkpoint with the same tokenizer that guesses ahead; answers stay as they are"
OFFLOAD_HELP = "keep experts in host memory and copy those that are called to the GPU"
OFFLOAD_MEMORY_HELP = "GiB on the GPU for experts  [default: half of what is free]"
PENALTY_HELP = "above 1: what was said before becomes less likely"


def chat(
    ctx: typer.Context,
    checkpoint: Annotated[Path | None, typer.Argument(help="checkpoint or run folder")] = None,
    question: Annotated[str | None, typer.Argument(help="what to ask")] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="the question, without a checkpoint before")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="PNG or JPEG to show; may be given several times")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="video to show; may be given several times")
    ] = None,
    fps: Fps = DEFAULT_FPS,
    max_frames: MaxFrames = DEFAULT_MAX_FRAMES,
    system: Annotated[str | None, typer.Option(help=SYSTEM_HELP)] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue plain text, without the chat format")
    ] = False,
    boxes: Annotated[
        Path | None, typer.Option(help="write the picture here with the boxes an answer names")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer  [default: 512, less near the end]")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: the likeliest  [default: the checkpoint's, else 0]"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="choose among so many; 0: all")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="choose among the likeliest that make up this share"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="drop what is less likely than this share of the best"),
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help=PENALTY_HELP)] = None,
    prompt_cache: Annotated[Path | None, typer.Option(help=CACHE_HELP)] = None,
    draft: Annotated[Path | None, typer.Option(help=DRAFT_HELP)] = None,
    lookup: Annotated[
        bool, typer.Option("--lookup", help="guess ahead from what was said before")
    ] = False,
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="guesses a step  [default: as many as pay]")
    ] = None,
    offload: Annotated[Offloaded | None, typer.Option(help=OFFLOAD_HELP)] = None,
    offload_memory: Annotated[float | None, typer.Option(min=0, help=OFFLOAD_MEMORY_HELP)] = None,
    seed: Seed = 0,
    dtype: Annotated[
        WeightsDtype, typer.Option(help="precision; auto: as stored")
    ] = WeightsDtype.auto,
    device: DeviceOption = Device.auto,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    if question is not None and prompt is not None:
        why = "both name the question"
        raise UsageError(f"`{question}` and `--prompt` given", why=why, fix="give one of them")
    if raw and system is not None:
        why = "plain text has no system message"
        raise UsageError("`--raw` and `--system` given", why=why, fix="leave one of them out")
    images, videos = image or [], video or []
    default = DEFAULT_QUESTION if images else DEFAULT_VIDEO_QUESTION if videos else None
    text = _question(checkpoint, question if question is not None else prompt, default, raw)
    if boxes is not None:
        _check_boxes(boxes, images, is_conversation=text is None)
    if prompt_cache is not None:
        _check_prompt_cache(prompt_cache, len(images) + len(videos))
    flags = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    from l4cli.commands.pictures import open_image, open_video
    from l4cli.data.video import Sampling

    frames = Sampling(fps, max_frames)
    # Before torch: a wrong path is told at once.
    opened_images = [(str(path), open_image(path)) for path in images]
    opened_videos = [(str(path), open_video(path, frames)) for path in videos]
    _check_sampling(flags)
    _check_drafting(draft, lookup, draft_tokens)
    room = _offload_bytes(offload, offload_memory)

    from l4cli.commands import chat_model, chat_speed, repl
    from l4cli.commands.boxes import show_boxes
    from l4cli.commands.conversation import Conversation
    from l4cli.commands.prompt_cache import PromptCache
    from l4cli.commands.shown import named_in_order

    small = None if draft is None else chat_speed.find_draft(draft)
    model = chat_model.load(
        checkpoint,
        device.value,
        dtype.value,
        is_raw=raw,
        offload=None if offload is None else chat_model.Offload(room),
        before_weights=None if small is None else small.require_same_tokenizer,
    )
    sampling = model.sampling(flags, seed)
    kept = None if prompt_cache is None else PromptCache(prompt_cache, model.engine)
    guesses = chat_speed.speculation(
        model, small, dtype.value, uses_lookup=lookup, num_tokens=draft_tokens
    )
    conversation = Conversation(
        model,
        sampling,
        system,
        max_new_tokens,
        is_raw=raw,
        prompt_cache=kept,
        speculation=guesses,
    )
    pictures, films = iter(opened_images), iter(opened_videos)
    for kind, _ in named_in_order(ctx.meta.get("l4.words", []), images, videos):
        if kind == "image":
            conversation.add_picture(*next(pictures))
        else:
            conversation.add_video(*next(films))
    with chat_model.fitting_threads(model):
        if text is None:
            _describe(conversation, sampling)
            return repl.talk(conversation, frames, boxes)
        answer = repl.answer_once(conversation, text)
        if boxes is not None and conversation.last_picture is not None:
            show_boxes(answer.text, conversation.last_picture.image, boxes)


def _question(
    checkpoint: Path | None, given: str | None, default: str | None, is_raw: bool
) -> str | None:
    """What to ask: piped text and the given words. None: there is a terminal to ask on."""
    if given is not None:
        try:
            given.encode()
        except UnicodeEncodeError:
            fix = "write it as UTF-8, or pipe it"
            raise UsageError("cannot read the question", why="it is not UTF-8", fix=fix) from None
    has_terminal = sys.stdin is not None and sys.stdin.isatty()
    if has_terminal and given is None:
        return None
    parts = [part for part in ("" if has_terminal else _piped_text(), given) if part]
    if parts:
        return "\n\n".join(parts)
    if is_raw and (default is not None or given is not None):
        return ""  # a caption, or a text from its very beginning
    if default is not None and given is None:
        return default
    if given is not None:
        why, fix = "it is empty", '`l4 chat -p "..."`'
        raise UsageError("no question", why=why, fix=fix)
    if checkpoint is None:
        from l4cli.commands import chat_model

        chat_model.find(None)  # for who has no model yet, that is the first thing to know
    why = "there is no terminal to type on, and standard input is empty"
    fix = '`l4 chat -p "..."`, or pipe the question in'
    raise UsageError("no question", why=why, fix=fix)


def _piped_text() -> str:
    if sys.stdin is None:
        return ""
    from l4cli.data.standard_input import standard_input

    data = standard_input().read()
    try:
        return data.decode().rstrip("\n")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} of standard input is not UTF-8"
        fix = "pipe text; pictures go with `--image`"
        raise UsageError("cannot read the question", why=why, fix=fix) from None


def _check_boxes(path: Path, images: list[Path], *, is_conversation: bool) -> None:
    """Refuse what could not be drawn, before anything is loaded."""
    what = f"cannot draw boxes into `{path}`"
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        why = "its name ends in neither `.png` nor `.jpg`"
        raise UsageError(what, why=why, fix="name it like `--boxes out.png`")
    if not path.absolute().parent.is_dir():
        why = f"there is no folder `{path.parent}`"
        raise UsageError(what, why=why, fix=f"make it: `mkdir -p {path.parent}`")
    if not is_conversation and len(images) != 1:
        why = f"{len(images)} pictures were given, and boxes belong to one"
        raise UsageError(what, why=why, fix="give one `--image`")


def _check_prompt_cache(path: Path, num_shown: int) -> None:
    """Refuse what could not be used or written, before anything is loaded."""
    what = f"cannot keep the prompt in `{path}`"
    if num_shown:
        why = "pictures are the same tokens whatever they show"
        fix = "leave `--prompt-cache` out, or the pictures"
    elif path.is_dir():
        why, fix = "it is a folder", f"name a file: `--prompt-cache {path}/prompt.cache`"
    elif not path.absolute().parent.is_dir():
        why, fix = f"there is no folder `{path.parent}`", f"make it: `mkdir -p {path.parent}`"
    else:
        return
    raise UsageError(what, why=why, fix=fix)


def _check_drafting(draft: Path | None, lookup: bool, draft_tokens: int | None) -> None:
    """Refuse two who guess, and a number of guesses where nobody does."""
    if draft is not None and lookup:
        why = "both guess what comes next"
        raise UsageError(f"`--draft {draft}` and `--lookup` given", why=why, fix="give one of them")
    if draft_tokens is not None and draft is None and not lookup:
        why = "nobody guesses"
        fix = "give `--draft CHECKPOINT` or `--lookup` as well"
        raise UsageError(f"`--draft-tokens {draft_tokens}` given", why=why, fix=fix)


def _offload_bytes(offload: Offloaded | None, memory_gib: float | None) -> int | None:
    """Room for experts on the device; None: as it comes."""
    if memory_gib is None:
        return None
    if offload is None:
        why = "nothing is offloaded"
        fix = "give `--offload experts` as well"
        raise UsageError(f"`--offload-memory {memory_gib:g}` given", why=why, fix=fix)
    return int(memory_gib * 2**30)


def _check_sampling(flags: dict[str, float | int | None]) -> None:
    """Refuse impossible values, and filters that greedy decoding would ignore."""
    from l4cli.inference.sampler import SamplingOptions

    given = {name: value for name, value in flags.items() if value is not None}
    SamplingOptions(**given)  # type: ignore[arg-type]
    filters = [name for name in ("top_k", "top_p", "min_p") if name in given]
    if given.get("temperature") == 0 and filters:
        flag = "--" + filters[0].replace("_", "-")
        why = "temperature 0 always takes the likeliest token"
        fix = f"leave `{flag}` out, or raise `--temperature`"
        raise UsageError(f"`{flag}` and `--temperature 0` given", why=why, fix=fix)


def _describe(conversation: Conversation, sampling: SamplingOptions) -> None:
    room = conversation.engine.max_context
    terminal.say(f"{_sampling_text(sampling)}; {room} tokens of context; `/help` lists commands")


def _sampling_text(sampling: SamplingOptions) -> str:
    if sampling.temperature == 0:
        return "greedy"
    shown = [f"temperature {sampling.temperature:g}"]
    shown += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    shown += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    shown += [f"min-p {sampling.min_p:g}"] if sampling.min_p else []
    return ", ".join([*shown, f"seed {sampling.seed}"])
