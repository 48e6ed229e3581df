"""Options of a teacher that only answers; all are None unless given, the request has the defaults.

in: nothing; out: annotations for the command line (no torch)
"""

from __future__ import annotations

from typing import Annotated

import typer

from l4cli.commands.needle_options import Api
from l4cli.posttraining.sample_choices import Keep, Reasoning

TeacherEndpoint = Annotated[
    str | None,
    typer.Option(
        "--teacher-endpoint", metavar="URL", help="OpenAI-compatible server that answers prompts"
    ),
]
FromSamples = Annotated[
    bool, typer.Option("--from-samples", help="--teacher answers prompts; learn from its answers")
]
TeacherModel = Annotated[
    str | None, typer.Option("--teacher-model", help="name of the model at the endpoint")
]
ApiOption = Annotated[
    Api | None, typer.Option("--api", help="how the server is asked  [default: chat]")
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env", help="environment variable with the key  [default: OPENAI_API_KEY]"
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="requests, and checks, at one time  [default: 4]"),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=0.1, help="seconds to wait for one answer  [default: 300]"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="stop before so many are asked and answered"),
]
SamplesPerPrompt = Annotated[
    int | None,
    typer.Option("--samples-per-prompt", min=1, help="answers to each prompt  [default: 1]"),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="most tokens of an answer  [default: 1024]"),
]
SamplingTemperature = Annotated[
    float | None,
    typer.Option(
        "--sampling-temperature",
        min=0.0,
        help="answers are drawn at  [default: 1 with several samples, else 0]",
    ),
]
SamplingTopP = Annotated[
    float | None,
    typer.Option(
        "--sampling-top-p", min=0.0, max=1.0, help="draw from the likeliest that sum to this"
    ),
]
TopLogprobs = Annotated[
    int | None,
    typer.Option(
        "--top-logprobs",
        help="likely tokens to ask a server for, 0 to 20  [default: 20 with --tokenizer, "
        "5 for completions, else 0]",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="write shards of the answers with it  [default: the checkpoint's]"
    ),
]
CheckerOption = Annotated[
    str | None,
    typer.Option(
        "--checker",
        help="none, exact, contains, number, regex (with a row's `answer`), or command:PROGRAM",
    ),
]
CheckerTimeout = Annotated[
    float | None,
    typer.Option("--checker-timeout", min=0.1, help="seconds a program may take  [default: 30]"),
]
KeepSamples = Annotated[
    Keep | None,
    typer.Option(
        "--keep-samples",
        help="all: also those that failed or were cut by length  [default: passed]",
    ),
]
ReasoningOption = Annotated[
    Reasoning | None,
    typer.Option(
        "--reasoning",
        help="thoughts a server shows apart; keep: as <think> before the answer  [default: drop]",
    ),
]


# Parameter of the command -> field of `SamplesRequest`.
ANSWER_OPTIONS = {
    "teacher_model": "model",
    "api": "api",
    "api_key_env": "api_key_env",
    "jobs": "jobs",
    "timeout": "timeout",
    "max_tokens": "max_tokens",
    "samples_per_prompt": "samples_per_prompt",
    "max_new_tokens": "max_new_tokens",
    "sampling_temperature": "temperature",
    "sampling_top_p": "top_p",
    "top_logprobs": "top_logprobs",
    "tokenizer": "tokenizer",
    "checker": "checker",
    "checker_timeout": "checker_timeout",
    "keep_samples": "keep",
    "reasoning": "reasoning",
}


def option_of(parameter: str) -> str:
    """How a parameter is written on the command line."""
    return "--" + parameter.replace("_", "-")
