"""Train a model on packed shards: text, or text and pictures, from scratch or from a checkpoint.

The same command again continues where the run was cut off, bit for bit; a finished run says so.
More `--steps` continue it on the schedule of the new total. Ctrl-C or SIGTERM finish the step,
save and leave (a second one stops at once).

examples:
  l4 pretrain shards/ --preset nano
  l4 pretrain code/:0.3 web/:0.7 --preset mini --tokens 50M --eval-data held-out/ -o runs/mini
  l4 pretrain shards/ --preset nano --set num_local_experts=16 --steps 1000 --dry-run
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4cli import terminal
from l4cli.commands import shard_training as shared
from l4cli.commands import training_options as train
from l4cli.commands import training_report as report
from l4cli.commands.options import Device, DeviceOption, Json, Quiet, Seed
from l4cli.errors import UsageError

if TYPE_CHECKING:
    from l4cli.training.loop import Loop


class Freeze(StrEnum):
    """Which half keeps its weights; the projector between them always learns."""

    text = "text"
    vision = "vision"


def pretrain(
    shards: Annotated[
        list[str], typer.Argument(help="folders of packed shards, each perhaps with `:WEIGHT`")
    ],
    preset: Annotated[
        str | None, typer.Option("--preset", help="shape of the model  [default: nano]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="shape from a Hugging Face `config.json`")
    ] = None,
    set_: train.Set = None,
    init_from: train.InitFrom = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="run folder  [default: runs/PRESET]")
    ] = None,
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
    freeze: Annotated[
        Freeze | None, typer.Option("--freeze", help="keep the weights of one half")
    ] = None,
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
    request.check()
    prepared = prepare(request)
    if dry_run:
        report.show_dry_run(
            prepared.plan, prepared.source, prepared.schedule, dtype.value, prepared.device
        )
    else:
        run(request, prepared)


@dataclass(frozen=True)
class Request(shared.TrainingRequest):
    """What the command line said; the fields are the parameters of `pretrain`."""

    shards: list[str]
    preset: str | None
    config: Path | None
    set_: list[str] | None
    init_from: Path | None
    out: Path | None
    freeze: Freeze | None

    @property
    def rate(self) -> train.LearningRate:
        return self.rate_of({})

    @property
    def recipe(self) -> shared.Recipe:
        return self.recipe_of({}, freeze=self.freeze.value if self.freeze else None)

    @property
    def model_name(self) -> str:
        return str(self.config or self.init_from or self.preset or "nano")

    @property
    def folder(self) -> Path:
        has_own_shape = self.config is not None or self.init_from is not None
        return self.out or Path("runs") / ("pretrain" if has_own_shape else self.model_name)

    def check(self) -> None:
        """Refuse what needs no look at any file."""
        train.require_one_rank()
        shapes = {"--preset": self.preset, "--config": self.config, "--init-from": self.init_from}
        given = [f"`{name}`" for name, value in shapes.items() if value is not None]
        if len(given) > 1:
            why = "each brings a shape of its own"
            raise UsageError(" and ".join(given) + " given", why=why, fix="give one of them")
        self.length.check()
        self.rate.check()


def prepare(request: Request) -> shared.Prepared:
    """Open the data, make the config, refuse what cannot work."""
    from l4cli.training import data_setup, model_setup
    from l4cli.training.device import torch_device

    device = torch_device(request.device.value)
    config = model_setup.base_config(request.preset, request.config, request.init_from)
    config = model_setup.apply_overrides(config, request.set_ or [])
    if request.freeze and config.vision is None:
        why = "the model has no vision, so nothing of it would be left to train apart"
        raise UsageError(f"cannot use `--freeze {request.freeze}`", why=why, fix="leave it out")
    source = data_setup.open_source(
        request.shards,
        seq_len=request.row_tokens,
        batch_size=request.batch_size,
        micro_batch_size=request.micro_batch_size,
        seed=request.seed,
        attention_chunk_size=config.text.attention_chunk_size,
        passes_at_once=shared.passes_at_once(config, device),
    )
    if request.freeze is Freeze.text and not source.num_media:
        why = "the shards hold no pictures, so nothing would learn"
        raise UsageError("cannot use `--freeze text`", why=why, fix="leave it out")
    if request.init_from is not None:
        model_setup.require_same_tokenizer(request.init_from, source.tokenizer())
    name = request.model_name
    sets_size = model_setup.sets_vocab_size(request.set_ or [])
    grows = name in model_setup.GROWING_PRESETS and not sets_size
    config = model_setup.fit_vocabulary(config, source.tokenizer(), name=name, grows=grows)
    data_setup.require_geometry(config, source.datasets)
    data_setup.require_context(config, source.seq_len)
    if request.init_from is not None:
        model_setup.require_weights(request.init_from, config, changed=request.set_ or [])
    must_fit = not request.dry_run
    plan = shared.plan_run(request.recipe, config, source, device, name=name, must_fit=must_fit)
    held_out = None
    if request.eval_data is not None:
        held_out = data_setup.open_held_out(request.eval_data, source, config)
    num_steps = request.length.num_steps(source.num_rows, source.batch_size, source.seq_len)
    schedule = request.rate.for_steps(num_steps, config.text.hidden_size)
    return shared.Prepared(source, held_out, config, schedule, plan, device)


def run(request: Request, prepared: shared.Prepared) -> None:
    """Train, from the beginning or from where the folder's run stands."""
    from l4cli.checkpoint import load_weights
    from l4cli.training.device import make_repeatable
    from l4cli.training.run import Run

    make_repeatable(request.seed, prepared.device)
    init_from = str(request.init_from) if request.init_from else None
    options = shared.identity(request.recipe, prepared, warmup=request.warmup, init_from=init_from)
    settings = {
        "data_paths": request.shards,
        "eval_data": None if request.eval_data is None else str(request.eval_data),
        **request.recipe.settings(),
    }
    training = Run(
        "pretrain",
        request.folder,
        options,
        settings,
        prepared.schedule.num_steps,
        prepared.device,
        fresh=request.fresh,
        notes={"seq_len": prepared.source.seq_len},
    )

    def start(loop: Loop) -> None:
        if request.init_from is not None:
            load_weights(loop.trainees[0].model, request.init_from)

    report.describe(request.model_name, prepared.plan, prepared.source, prepared.schedule)
    terminal.say(
        f"{request.optim.value}, {request.dtype.value}, {prepared.device.type}; "
        f"run folder `{request.folder}`"
    )
    try:
        training.train(lambda folders: shared.build_loop(request.recipe, prepared, *folders), start)
    finally:
        prepared.source.close()
