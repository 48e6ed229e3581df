"""What `l4 quantize` does with text: calibrate, spend a budget of bits, measure what was lost.

in: the words of the command line and a plan; out: a quantizer, choices, tables and JSON
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands.options import COUNTS, parse_number
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    from l4cli.checkpoint import QuantizationPlan
    from l4cli.data.text_rows import TextRows
    from l4cli.inference.calibration import CalibratedQuantizer
    from l4cli.inference.calibration_walk import CalibrationWalk, Coverage

CALIBRATION_TOKENS = "128k"


@dataclass(frozen=True)
class TextWords:
    """What the command line says about text; `budget`: bits per weight."""

    calibration: Path | None
    calibration_tokens: str | None
    eval_data: Path | None
    eval_tokens: str | None
    budget: float | None
    device: str

    def check(self, *, is_calibrated: bool, has_out: bool) -> None:
        """Refuse what does not go together. raises: UsageError"""
        if is_calibrated and self.calibration is None:
            raise UsageError(
                "`--method gptq` needs text",
                why="it quantizes each layer against the inputs that text gives it",
                fix="name a token stream or shards: `--calibration text.tokens`",
            )
        uses_text = is_calibrated or self.budget is not None
        if self.calibration is not None and not uses_text:
            raise UsageError(
                f"cannot use `--calibration {self.calibration}`",
                why="neither rounding nor searching looks at inputs",
                fix="add `--method gptq`, or leave it out",
            )
        if self.calibration_tokens is not None and self.calibration is None:
            why, fix = "`--calibration` names no text", "name it, or leave this out"
            raise UsageError("cannot use `--calibration-tokens`", why=why, fix=fix)
        if self.eval_tokens is not None and self.eval_data is None:
            why, fix = "`--eval-data` names no text", "name it, or leave this out"
            raise UsageError("cannot use `--eval-tokens`", why=why, fix=fix)
        if self.eval_data is not None and not has_out:
            why = "`--dry-run` writes nothing that could be measured"
            raise UsageError("cannot use `--eval-data`", why=why, fix="leave one of them out")
        self.num_calibration_tokens, self.num_eval_tokens  # noqa: B018

    @property
    def num_calibration_tokens(self) -> int:
        text = self.calibration_tokens or CALIBRATION_TOKENS
        return parse_number(text, "--calibration-tokens", CALIBRATION_TOKENS, COUNTS)

    @property
    def num_eval_tokens(self) -> int | None:
        """None: all there are."""
        if self.eval_tokens is None:
            return None
        return parse_number(self.eval_tokens, "--eval-tokens", "100k", COUNTS)


def said(words: TextWords) -> dict[str, Any]:
    """What `quantize.json` repeats of it."""
    found: dict[str, Any] = {}
    if words.calibration is not None:
        found["calibration"] = str(words.calibration)
    if words.budget is not None:
        found["budget"] = words.budget
    return found


def read_calibration(plan: QuantizationPlan, words: TextWords) -> TextRows | None:
    """The text to calibrate on, if any is named."""
    count, option = words.num_calibration_tokens, "--calibration-tokens"
    return _text(plan, words.calibration, count, "cannot calibrate on", option)


def read_eval_data(plan: QuantizationPlan, words: TextWords) -> TextRows | None:
    """The text to measure on, if any is named."""
    count, option = words.num_eval_tokens, "--eval-tokens"
    return _text(plan, words.eval_data, count, "cannot measure on", option)


def _text(
    plan: QuantizationPlan, path: Path | None, num_tokens: int | None, what: str, option: str
) -> TextRows | None:
    if path is None:
        return None
    rows = _rows(plan, path, num_tokens, what)
    _require_memory(plan, rows, option)
    return rows


def _rows(plan: QuantizationPlan, path: Path, num_tokens: int | None, what: str) -> TextRows:
    """raises: L4Error for too little text, or another tokenizer's"""
    from l4cli.data.text_rows import ROW_TOKENS, read_text_rows
    from l4cli.text import load_tokenizer

    most = plan.config.text.max_position_embeddings
    rows = read_text_rows(path, num_tokens, what, min(ROW_TOKENS, most))
    folder = plan.stored.folder
    if rows.fingerprint != load_tokenizer(folder).fingerprint:
        why = "it was tokenized with another tokenizer than the checkpoint was trained with"
        raise L4Error(f"{what} `{path}`", why=why, fix=f"tokenize with `--tokenizer {folder}`")
    if len(rows.rows[0].input_ids) > most:
        why = f"its rows have {len(rows.rows[0].input_ids)} tokens, and the model reads {most}"
        raise L4Error(f"{what} `{path}`", why=why, fix=f"pack with `l4 pack --seq-len {most}`")
    return rows


def _require_memory(plan: QuantizationPlan, rows: TextRows, option: str) -> None:
    """The states of all the text are held in fp32; of two models when they are compared."""
    from l4cli.planning import available_memory

    num_models = 2 if option == "--eval-tokens" else 1
    per_token = 4 * num_models * plan.config.text.hidden_size
    needed, free = per_token * rows.num_tokens, available_memory()
    if needed > free:
        text = terminal.bytes_text
        why = f"its {rows.num_tokens} tokens take {text(needed)}, and {text(free)} are free"
        fix = f"take less of it: `{option} {free // (2 * per_token)}`"
        raise L4Error(f"cannot read all of `{rows.path}`", why=why, fix=fix)


@contextmanager
def calibration_walk(
    plan: QuantizationPlan, rows: TextRows, words: TextWords
) -> Iterator[CalibrationWalk]:
    """The text at the first layer of the plain model."""
    from l4cli.inference.calibration_walk import CalibrationWalk
    from l4cli.inference.text_walk import TextWalk
    from l4cli.training.device import torch_device

    batches = rows.batches(plan.config.text.attention_chunk_size)
    device = torch_device(words.device)
    with TextWalk(plan.stored.folder, batches, device=device) as walk:
        yield CalibrationWalk(walk)


@contextmanager
def calibrated_quantizer(
    plan: QuantizationPlan, rows: TextRows, words: TextWords
) -> Iterator[CalibratedQuantizer]:
    """GPTQ on the text."""
    from l4cli.inference.calibration import CalibratedQuantizer

    with calibration_walk(plan, rows, words) as walk:
        yield CalibratedQuantizer(walk)


def spend_budget(
    plan: QuantizationPlan,
    rows: TextRows | None,
    words: TextWords,
    parts: Collection[str],
    zero_points: bool,
) -> None:
    """Choose the format of every map of some parts, by what its outputs (or itself) lose."""
    from l4cli.checkpoint.linear_maps import MapValues
    from l4cli.inference.calibration import measure_sensitivity
    from l4cli.quantization.budget import budget_formats, choose_within, weight_sensitivity

    formats = budget_formats(zero_points)
    assert words.budget is not None
    maps = [each for each in plan.maps if each.part in parts]
    measured = {}
    if rows is None:
        values = MapValues(plan.stored, maps)
        with terminal.progress("measure", len(maps)) as progress:
            for i, each in enumerate(maps):
                measured[each.name] = weight_sensitivity(values[each.name], formats)
                progress.update(i + 1)
    else:
        terminal.say(f"measure on {rows.num_tokens} tokens what each map loses in each format")
        with calibration_walk(plan, rows, words) as walk:
            measured = measure_sensitivity(walk, [each.name for each in maps], formats)
    for name, format in choose_within(measured, words.budget).items():
        plan.choices.pop(name, None)
        if format is not None:
            plan.choices[name] = format
            plan.left.pop(name, None)
    if not plan.choices:
        why = "within it every map may stay bf16"
        raise L4Error("there is nothing to quantize", why=why, fix="write a smaller `--budget`")


# For people


def show_budget(plan: QuantizationPlan, parts: Collection[str]) -> None:
    """How many weights of each part got which format."""
    counts: dict[tuple[str, str], int] = {}
    for each in plan.maps:
        if each.part in parts:
            key = (each.part, plan.format_text(each))
            counts[key] = counts.get(key, 0) + each.shape[0] * each.shape[1]
    rows = [(part, text, terminal.count_text(n)) for (part, text), n in sorted(counts.items())]
    terminal.table("what the budget bought", ("part", "format", "weights"), rows)


def show_calibration(quantizer: CalibratedQuantizer) -> None:
    """A line for each layer with experts, and what was unusual."""
    layers: dict[int, list[Coverage]] = {}
    for each in quantizer.walk.coverage:
        layers.setdefault(each.layer, []).append(each)
    rows = []
    for layer, experts in layers.items():
        routed = [each.num_tokens - each.num_borrowed for each in experts]
        borrowed = [each for each in experts if each.num_borrowed]
        rows.append(
            (
                layer,
                len(experts),
                f"{min(routed)} to {max(routed)}",
                min(each.num_tokens for each in experts),
                len(borrowed),
                sum(each.num_borrowed for each in experts),
            )
        )
    if rows:
        columns = ("layer", "experts", "routed", "least used", "borrowers", "tokens borrowed")
        terminal.table("calibration tokens of the experts", columns, rows)
    unusual: dict[str, list[str]] = {}
    for name, note in quantizer.notes.items():
        unusual.setdefault(note, []).append(name)
    for note, names in unusual.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        terminal.warn(f"`{names[0]}`{others}: {note}")


def measure(plan: QuantizationPlan, out: Path, rows: TextRows, words: TextWords) -> dict[str, Any]:
    """Compare what was written with the original; the figures are shown, kept beside it, given."""
    from l4cli.checkpoint import add_to_report
    from l4cli.evals.quality import compare
    from l4cli.text import load_tokenizer
    from l4cli.training.device import torch_device

    token_bytes = load_tokenizer(plan.stored.folder).num_bytes()
    batches = rows.batches(plan.config.text.attention_chunk_size)
    with terminal.progress("measure", plan.config.text.num_hidden_layers) as progress:
        found = compare(
            plan.stored.folder,
            out,
            batches,
            token_bytes,
            device=torch_device(words.device),
            on_layer=lambda done, total: progress.update(done),
        )
    shown = [
        ("bits per byte, original", _number(found.original_bits_per_byte, 4)),
        ("bits per byte, quantized", _number(found.bits_per_byte, 4)),
        ("more bits", f"{found.relative_loss:+.3%}"),
        ("KL divergence, mean", f"{found.kl_mean:.5f}"),
        ("KL divergence, 99%", f"{found.kl_99:.4f}"),
        ("same likeliest token", f"{found.top1_agreement:.2%}"),
    ]
    if found.router_agreement is not None:
        shown.append(("same experts", f"{found.router_agreement:.2%}"))
    title = f"what was lost, on {found.num_tokens} held-out tokens"
    terminal.table(title, ("what", "value"), shown)
    lost = {"eval_data": str(rows.path), **found.to_dict()}
    add_to_report(out, {"quality": lost})
    return lost


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
