"""Train students on packed shards and on what a teacher predicts there, one forward of it for all.

Students may differ in shape: `--student preset:nano`, a checkpoint, a `config.json`, or `teacher`
(a smaller copy of it); after commas come what is theirs alone: `name=`, `lr=`, `loss=`, `alpha=`,
`layers=0+2+5` to keep, any key of the model's config. The same command again continues.

A teacher without logits answers a file of prompts (JSONL with `messages` or `prompt`) with
`--teacher-endpoint`, or `--from-samples` for a checkpoint; what it says becomes rows, and shards.

examples:
  l4 distill shards/ --teacher runs/big/latest --student preset:nano -o runs/small
  l4 distill shards/ --teacher big/ --student preset:nano --student dense.json,lr=4e-3
  l4 distill shards/ --teacher big/ --student teacher,num_hidden_layers=4 --alpha token:0.9
  l4 distill shards/ --teacher preset:mini --codistill --burn-in 0.1 --student preset:nano
  l4 distill shards/ --teacher big/ --write-cache cache/
  l4 distill shards/ --teacher-cache cache/ --student preset:nano --epochs 3
  l4 distill prompts.jsonl --teacher-endpoint http://127.0.0.1:8000/v1 --teacher-model big
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from l4cli import terminal
from l4cli.commands import distill_samples_options as answers
from l4cli.commands import training_options as train
from l4cli.commands.distill_request import HardTargets, LossKind, Request
from l4cli.commands.options import Device, DeviceOption, Json, Quiet, Seed


def distill(
    shards: Annotated[
        list[str],
        typer.Argument(help="folders of packed shards, each perhaps with `:WEIGHT`; or prompts"),
    ],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="checkpoint whose predictions are learned from")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            "--student",
            metavar="WHAT[,key=value...]",
            help="preset:NAME, a checkpoint, a config.json or `teacher`; once for each",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="run folder; of several students each has one below it"),
    ] = None,
    init_from_teacher: Annotated[
        bool, typer.Option("--init-from-teacher", help="first weights are cut from the teacher's")
    ] = False,
    codistill: Annotated[
        bool,
        typer.Option("--codistill", help="train the teacher, too, from the data: preset or shape"),
    ] = False,
    burn_in: Annotated[
        float,
        typer.Option(
            "--burn-in", min=0.0, max=1.0, help="share of the steps before the teacher counts"
        ),
    ] = 0.0,
    write_cache: Annotated[
        Path | None,
        typer.Option("--write-cache", help="write what the teacher predicts there, train nothing"),
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option("--teacher-cache", help="learn from a cache, without the teacher")
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="likeliest tokens in a cache, beside the true one")
    ] = 15,
    tail_samples: Annotated[
        int,
        typer.Option("--tail-samples", min=0, help="tokens drawn from the others; 0 cuts them off"),
    ] = 16,
    teacher_endpoint: answers.TeacherEndpoint = None,
    from_samples: answers.FromSamples = False,
    teacher_model: answers.TeacherModel = None,
    api: answers.ApiOption = None,
    api_key_env: answers.ApiKeyEnv = None,
    jobs: answers.Jobs = None,
    timeout: answers.Timeout = None,
    max_tokens: answers.MaxTokens = None,
    samples_per_prompt: answers.SamplesPerPrompt = None,
    max_new_tokens: answers.MaxNewTokens = None,
    sampling_temperature: answers.SamplingTemperature = None,
    sampling_top_p: answers.SamplingTopP = None,
    top_logprobs: answers.TopLogprobs = None,
    tokenizer: answers.TokenizerOption = None,
    checker: answers.CheckerOption = None,
    checker_timeout: answers.CheckerTimeout = None,
    keep_samples: answers.KeepSamples = None,
    reasoning: answers.ReasoningOption = None,
    loss: Annotated[
        LossKind, typer.Option("--loss", help="hard, soft, or hybrid: both")
    ] = LossKind.hybrid,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha",
            metavar="SHARE",
            help="of soft targets in hybrid: 0.9, 0.1..0.9 over the steps, lr:0.9 or token:0.9; "
            "hard ones have the rest  [default: hard + F * soft]",
        ),
    ] = None,
    scaling_factor: Annotated[
        float | None, typer.Option("--scaling-factor", help="F: soft targets count times this")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="of both softmaxes of the soft targets")
    ] = 1.0,
    hard_targets: Annotated[
        HardTargets, typer.Option("--hard-targets", help="the data's, or the teacher's likeliest")
    ] = HardTargets.data,
    match_weight: Annotated[
        float,
        typer.Option("--match-weight", min=0.0, help="of the distance between hidden states"),
    ] = 0.0,
    steps: train.Steps = None,
    tokens: train.Tokens = None,
    epochs: train.Epochs = None,
    seq_len: train.SeqLen = None,
    batch_size: train.BatchSize = 16,
    micro_batch_size: train.MicroBatchSize = None,
    lr: train.Lr = None,
    min_lr: train.MinLr = 0.0,
    warmup: train.Warmup = None,
    schedule: train.ScheduleOption = train.ScheduleKind.wsd,
    decay_frac: train.DecayFrac = 0.2,
    decay_shape: train.DecayShapeOption = train.DecayShape.sqrt,
    weight_decay: train.WeightDecay = 0.1,
    clip_grad: train.ClipGrad = 1.0,
    optim: train.OptimOption = train.Optim.muon,
    dtype: train.DtypeOption = train.Dtype.fp32,
    balance: train.BalanceOption = train.BalanceKind.both,
    balance_rate: train.BalanceRate = 1e-3,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="less memory, a third more time")
    ] = False,
    save_every: train.SaveEvery = None,
    keep: train.Keep = 2,
    eval_every: train.EvalEvery = None,
    eval_data: train.EvalData = None,
    log_every: train.LogEvery = 10,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    fresh: train.Fresh = False,
    dry_run: train.DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    request = Request(**locals())
    terminal.configure(json=json, quiet=quiet)
    request.check({name: of.default for name, of in signature(distill).parameters.items()})
    if (samples := request.samples) is not None:
        from l4cli.commands.distill_samples import run_samples

        run_samples(samples)
    elif write_cache is not None:
        from l4cli.commands.distill_cache import write

        write(request)
    else:
        from l4cli.commands.distill_run import run

        run(request)
