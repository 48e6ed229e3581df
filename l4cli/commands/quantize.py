"""Make a checkpoint small: int4, int8 or fp8, in a folder that transformers and vLLM open too.

CHECKPOINT is a bf16 or fp32 folder, or a run folder (its latest). Every linear map of the decoder
is quantized, routers, norms and embeddings are not. Layers are read and written one by one, so a
model may be larger than memory.

examples:
  l4 quantize runs/chat/latest --format int4 -o nano-int4/
  l4 quantize scout/ --format int4 --group-size 128 --attention bf16 -o scout-int4/
  l4 quantize maverick/ --format fp8 --attention bf16 --shared bf16 -o maverick-fp8/
  l4 quantize runs/nano/latest --format int4 --lm-head int8 --dry-run
  l4 quantize runs/nano/latest --method gptq --calibration books.tokens --eval-data held-out/ -o q/
  l4 quantize runs/nano/latest --budget 4.5 --method gptq --calibration books.tokens -o q/
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4cli import terminal
from l4cli.commands import quantize_calibrate as text
from l4cli.commands.options import Device, DeviceOption, Json, Quiet
from l4cli.commands.quantize_options import (
    BLOCK,
    DECODER_PARTS,
    DEFAULT_GROUP,
    Attention,
    Blocks,
    Budget,
    Calibration,
    CalibrationTokens,
    Dense,
    EvalData,
    EvalTokens,
    Experts,
    Format,
    FormatOption,
    FormatWords,
    GroupSizeOption,
    LmHead,
    Method,
    MethodOption,
    PartFormat,
    Shared,
    Vision,
    ZeroPoints,
    check_words,
    parse_group_size,
)
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    from l4cli.checkpoint import LayerReport, QuantizationPlan
    from l4cli.quantization import Quantizer, WeightFormat

_MAX_LISTED = 5
_SAMPLE = (256, 4096)  # weights that a time estimate rounds


def quantize(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="what to quantize")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="new folder, must not exist yet")
    ] = None,
    format: FormatOption = None,
    group_size: GroupSizeOption = None,
    zero_points: ZeroPoints = False,
    blocks: Blocks = False,
    method: MethodOption = Method.search,
    attention: Attention = None,
    experts: Experts = None,
    shared: Shared = None,
    dense: Dense = None,
    lm_head: LmHead = PartFormat.bf16,
    vision: Vision = PartFormat.bf16,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    budget: Budget = None,
    eval_data: EvalData = None,
    eval_tokens: EvalTokens = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="sizes before and after, and the time; write nothing")
    ] = False,
    device: DeviceOption = Device.auto,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    if budget is not None:
        _check_budget({"--format": format, "--group-size": group_size})
    format = format or Format.int4
    chosen = dict(zip(DECODER_PARTS, (attention, experts, shared, dense), strict=True))
    names = {part: str(name or format) for part, name in chosen.items()}
    names |= {"lm-head": str(lm_head), "vision": str(vision)}
    words = FormatWords(parse_group_size(group_size), zero_points, blocks)
    check_words(set(names.values()), words)
    if out is None and not dry_run:
        fix = f"name a new folder: `-o {checkpoint.name or 'model'}-{format}`"
        raise UsageError("nowhere to write", why="`-o` is missing", fix=fix)
    wanted = text.TextWords(
        calibration, calibration_tokens, eval_data, eval_tokens, budget, device.value
    )
    wanted.check(is_calibrated=method == Method.gptq, has_out=not dry_run)
    free = {part for part, name in chosen.items() if name is None}
    if budget is not None and not free:
        why = "every part has a format of its own, so there is nothing to choose"
        raise UsageError("cannot use `--budget`", why=why, fix="leave one of the parts out")
    _run(checkpoint, out, names, words, method, device, dry_run, wanted, free)


def _check_budget(words: dict[str, object]) -> None:
    """Refuse what a budget takes no notice of."""
    for option, value in words.items():
        if value is not None:
            what = f"cannot use `{option}` with `--budget`"
            why = "a budget chooses the formats and the groups"
            fix = "leave it out; parts may have formats of their own, as in `--attention int8`"
            raise UsageError(what, why=why, fix=fix)


def _run(
    checkpoint: Path,
    out: Path | None,
    names: dict[str, str],
    words: FormatWords,
    method: Method,
    device: Device,
    dry_run: bool,
    wanted: text.TextWords,
    free: set[str],
) -> None:
    from l4cli.checkpoint import plan_quantization, require_new

    if out is not None:
        require_new(out)
    formats = {part: _format(name, words) for part, name in names.items()}
    plan = plan_quantization(checkpoint, formats)
    rows, held_out = text.read_calibration(plan, wanted), text.read_eval_data(plan, wanted)
    texts = {part: str(format or "bf16") for part, format in formats.items()}
    if wanted.budget is not None:
        text.spend_budget(plan, rows, wanted, free, words.zero_points)
        text.show_budget(plan, free)
        texts |= {part: f"within {wanted.budget:g} bits" for part in free}
    _show_plan(plan, texts, method)
    rounding = _quantizer(method, device)
    if dry_run:
        _show_estimate(plan, rounding, method)
        return
    assert out is not None
    _require_space(out, plan.size_bytes)
    start_s = time.monotonic()
    if method == Method.gptq:
        assert rows is not None
        with text.calibrated_quantizer(plan, rows, wanted) as quantizer:
            reports = _write(plan, out, quantizer, texts, method, quantizer.report, wanted)
        text.show_calibration(quantizer)
    else:
        reports = _write(plan, out, rounding, texts, method, dict, wanted)
    time_s = time.monotonic() - start_s
    _show_layers(plan, reports)
    lost = None if held_out is None else text.measure(plan, out, held_out, wanted)
    _show_result(plan, out, time_s, lost)


def _write(
    plan: QuantizationPlan,
    out: Path,
    quantizer: Quantizer,
    formats: dict[str, str],
    method: Method,
    describe: Callable[[], dict[str, Any]],
    wanted: text.TextWords,
) -> list[LayerReport]:
    from l4cli.checkpoint import quantize_checkpoint

    options = {
        "source": str(plan.stored.folder),
        **text.said(wanted),
        "method": str(method),
        "formats": formats,
    }
    start_s = time.monotonic()
    with terminal.progress("quantize", plan.num_quantized) as progress:

        def show(num_done: int) -> None:
            rate = num_done / max(time.monotonic() - start_s, 1e-9)
            left_s = (plan.num_quantized - num_done) / rate
            figures = {"weights_per_sec": terminal.count_text(rate)}
            progress.update(num_done, **figures, eta=terminal.time_text(left_s))

        return quantize_checkpoint(
            plan,
            out,
            quantizer,
            on_layer=lambda report: terminal.emit({"event": "layer", **report.to_dict()}),
            on_weights=show,
            describe=lambda: {**options, **describe()},
        )


def _format(name: str, words: FormatWords) -> WeightFormat | None:
    from l4cli.quantization import WeightFormat

    if name == "bf16":
        return None
    if name == "fp8":
        return WeightFormat("fp8", block=BLOCK if words.blocks else None)
    if name == "int8":
        return WeightFormat("int8", words.group_size)
    group_size = words.group_size or DEFAULT_GROUP
    return WeightFormat("int4", group_size, symmetric=not words.zero_points)


def _quantizer(method: Method, device: Device) -> Quantizer:
    from l4cli.quantization import RoundingQuantizer
    from l4cli.training.device import torch_device

    return RoundingQuantizer(method != Method.round, torch_device(device))


def _require_space(out: Path, size_bytes: int) -> None:
    """Refuse before hours of work what the disk cannot hold."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if size_bytes > free:
        text = terminal.bytes_text
        why = f"it takes {text(size_bytes)}, and {text(free)} of the disk are free"
        raise L4Error(f"cannot write to `{out}`", why=why, fix="write to another disk")


# For people


def _show_plan(plan: QuantizationPlan, formats: dict[str, str], method: Method) -> None:
    parts = {each.part for each in plan.maps}
    shown = [f"{part} {format}" for part, format in formats.items() if part in parts]
    terminal.say(f"quantize `{plan.stored.folder}` by {method}: {', '.join(shown)}")
    before, after = plan.stored.size_bytes, plan.size_bytes
    terminal.say(
        f"{terminal.bytes_text(before)} -> {terminal.bytes_text(after)}, "
        f"{plan.bits_per_weight:.2f} bits per weight "
        f"({plan.bits_per_quantized_weight:.2f} of those quantized)"
    )
    for name, why in list(plan.left.items())[:_MAX_LISTED]:
        terminal.warn(f"`{name}` stays bf16: {why}")
    if len(plan.left) > _MAX_LISTED:
        terminal.warn(f"{len(plan.left) - _MAX_LISTED} more stay bf16, listed in `quantize.json`")


def _show_estimate(plan: QuantizationPlan, quantizer: Quantizer, method: Method) -> None:
    """Round a sample of each format; reading and writing go at the disk's speed beside it.

    What a calibration takes is up to its text: no sample foretells it.
    """
    import torch

    from l4cli.checkpoint import plan_facts

    time_s = 0.0
    sample = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0))
    for format in set(plan.choices.values()):
        start_s = time.monotonic()
        list(quantizer.quantize_layer(None, {"sample": sample}, {"sample": format}))
        per_weight_s = (time.monotonic() - start_s) / sample.numel()
        sizes = {each.name: each.shape[0] * each.shape[1] for each in plan.maps}
        num_weights = sum(sizes[name] for name, chosen in plan.choices.items() if chosen == format)
        time_s += per_weight_s * num_weights
    facts = plan_facts(plan)
    took = f"about {terminal.time_text(time_s)} on this machine, without the disk's"
    if method == Method.gptq:
        took = f"{took}, and far more for the calibration"
    told_s = None if method == Method.gptq else time_s
    terminal.emit({"event": "dry_run", **facts, "time_s": told_s})
    rows = [
        ("weights", terminal.count_text(plan.num_parameters)),
        ("quantized", terminal.count_text(plan.num_quantized)),
        ("before", terminal.bytes_text(facts["bytes_before"])),
        ("after", terminal.bytes_text(facts["size_bytes"])),
        ("bits per weight", f"{facts['bits_per_weight']:.3f}"),
        ("time", took),
    ]
    terminal.table("", ("what", "value"), rows)


def _show_layers(plan: QuantizationPlan, reports: list[LayerReport]) -> None:
    parts = [p for p in (*DECODER_PARTS, "lm-head", "vision") if any(p in r.parts for r in reports)]
    rows = [_row(report, parts) for report in reports]
    terminal.table("relative error and size of each layer", ("layer", *parts, "size"), rows)


def _show_result(
    plan: QuantizationPlan, out: Path, time_s: float, lost: dict[str, Any] | None
) -> None:
    from l4cli.checkpoint import plan_facts

    facts = plan_facts(plan)
    done: dict[str, Any] = {"event": "done", "checkpoint": str(out), **facts, "time_s": time_s}
    if lost is not None:
        done["quality"] = lost
    terminal.emit(done)
    terminal.result(f"bits per weight: {facts['bits_per_weight']:.3f}")
    terminal.say(f"wrote `{out}` in {terminal.time_text(time_s)}; look at it with `l4 info {out}`")


def _row(report: LayerReport, parts: list[str]) -> list[str]:
    cells = []
    for part in parts:
        found = report.parts.get(part)
        is_coded = found is not None and found.squared_norm > 0
        cells.append(f"{found.error:.4f}" if found and is_coded else "-" if found else "")
    layer = "outside" if report.layer_idx is None else str(report.layer_idx)
    return [layer, *cells, terminal.bytes_text(report.to_dict()["size_bytes"])]
