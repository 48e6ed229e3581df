"""Find out how far a model can read: needles at every depth of texts of every length.

A text is filler with needles in it (keys and values drawn anew for each text); then each needle is
asked for. One reading of a text serves all depths (`--separate`: one needle a text). What guessing
brings is measured beside it: texts without needles, questions without text, and a haystack made
of needles. The same command again continues where it was cut off; finished texts are kept.
Results go to `results.jsonl`, `summary.json` and `heatmap.png`.

examples:
  l4 needle-test runs/nano/latest --lengths 1k,4k,16k --depths 11 -o report/
  l4 needle-test runs/nano/latest --lengths 1k,4k,...,1m --haystack books/ --require 0.95
  l4 needle-test --endpoint http://127.0.0.1:8000/v1 --model scout --tokenizer tok/
  l4 needle-test --dry-run --preset scout --gpus 8xh100 --lengths 128k,1m,10m
  l4 needle-test runs/nano/latest --tasks video --frames 8,64,512 --depths 5 --chat
  l4 needle-test --dry-run --preset scout --gpus 8xh100 --hours 0.1,1,20 --fps 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l4cli import terminal
from l4cli.commands import training_options as train
from l4cli.commands.longcontext_options import (
    HaystackOption,
    KeysOption,
    NeedleOption,
    QuestionOption,
    ValuesOption,
)
from l4cli.commands.needle_frames import DEFAULT_LENGTHS, DEFAULT_TASKS
from l4cli.commands.needle_options import Api, KvDtype, Request
from l4cli.commands.options import (
    DEFAULT_FPS,
    Device,
    DeviceOption,
    Fps,
    Json,
    Quiet,
    Seed,
    WeightsDtype,
)

FRAMES_HELP = "read films of so many frames (`--tasks video`) or so many pictures (`pictures`)"
REQUIRE_HELP = "exit 1 if a task's mean over all lengths and depths is lower, as in 0.95"


def needle_test(
    checkpoint: Annotated[Path | None, typer.Argument(help="checkpoint or run folder")] = None,
    lengths: Annotated[
        str,
        typer.Option(metavar="LIST", help="in tokens, all included; dots go on by the same factor"),
    ] = DEFAULT_LENGTHS,
    depths: Annotated[
        str,
        typer.Option(metavar="N|LIST", help="how many, evenly from 0 to 100 percent, or a list"),
    ] = "11",
    samples: Annotated[int, typer.Option(min=1, help="texts at each length, of other seeds")] = 5,
    tasks: Annotated[
        str,
        typer.Option(metavar="LIST", help="what is asked: names, `ruler`, `all`, `nll`, `video`"),
    ] = DEFAULT_TASKS,
    frames: Annotated[str | None, typer.Option(metavar="LIST", help=FRAMES_HELP)] = None,
    hours: Annotated[
        str | None, typer.Option(metavar="LIST", help="the same in hours of film, at `--fps`")
    ] = None,
    fps: Fps = DEFAULT_FPS,
    haystack: HaystackOption = None,
    qa: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="with `--tasks qa,qa-hops`: JSONL rows of `question`, `answers` and `context`, a "
            "list of paragraphs  [default: invented]",
        ),
    ] = None,
    needle: NeedleOption = None,
    question: QuestionOption = None,
    keys: KeysOption = None,
    values: ValuesOption = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="where the folder has none: a folder, a file or `bytes`")
    ] = None,
    set_: train.Set = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="read a text of its own for every depth")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="ask in the chat format instead of continuing the text")
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="also measure what guessing brings")
    ] = True,
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="mean that counts as RULER's effective length"),
    ] = 0.856,
    require: Annotated[float | None, typer.Option(min=0, max=1, help=REQUIRE_HELP)] = None,
    dtype: Annotated[
        WeightsDtype, typer.Option(help="precision of the weights; auto: as stored")
    ] = WeightsDtype.auto,
    kv_dtype: Annotated[
        KvDtype, typer.Option(help="how layers that see everything keep keys and values")
    ] = KvDtype.auto,
    layer_major: Annotated[
        bool,
        typer.Option("--layer-major", help="hold one layer at a time, for texts beyond memory"),
    ] = False,
    sparse_topk: Annotated[
        int,
        typer.Option(
            min=0, help="pages of 32 tokens that a query reads where it sees all; 0: every one"
        ),
    ] = 0,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="instead of a checkpoint: an OpenAI-compatible server"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="with `--endpoint`: the model's name there")
    ] = None,
    api: Annotated[
        Api, typer.Option(help="with `--endpoint`: ask in a chat or continue a text")
    ] = Api.chat,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="variable with the key  [default: OPENAI_API_KEY]"),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="with `--endpoint`: requests at the same time")
    ] = 4,
    timeout: Annotated[
        float,
        typer.Option(min=1, max=86400, help="with `--endpoint`: seconds to wait for one answer"),
    ] = 300,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="with `--endpoint`: tokens this run may cost in all")
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="with `--endpoint`: room for one answer, thinking included  [default: a sentence]",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="with `--dry-run`: a shape instead of a checkpoint")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="8xh100", help="with `--dry-run`: the machine to plan for")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="folder of the results; continues what is there")
    ] = Path("runs/needle-test"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="refuse a folder that is not empty")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show tokens, memory and time, read nothing")
    ] = False,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    request = Request(**locals())
    terminal.configure(json=json, quiet=quiet)
    request.check()
    if request.shows:
        from l4cli.commands import needle_video

        needle_video.run(request)
    elif dry_run:
        from l4cli.commands import needle_dry_run

        needle_dry_run.show(request)
    else:
        from l4cli.commands import needle_run

        needle_run.run(request)
