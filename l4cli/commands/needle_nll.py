"""The `nll` task: files of the user's own as one long run, in order and shuffled.

in: a haystack of files, a model; out: two curves, kept like other results, a table
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from l4cli import terminal
from l4cli.commands.needle_options import NLL
from l4cli.data.inputs import HEAD_BYTES, Inputs, Kind, binary_kind
from l4cli.errors import L4Error, UsageError
from l4cli.evals.cells import length_text
from l4cli.evals.curves import Axes, Curve, draw_curves
from l4cli.evals.needle import ResultsStore
from l4cli.evals.needle.engine_subject import EngineSubject
from l4cli.evals.needle.nll import curve, cut_to_length, tally
from l4cli.text import Tokenizer

PICTURE = "nll.png"
ORDERS = ("in_order", "shuffled")


def key_of(order: str) -> str:
    """Tells a finished run from other records."""
    return f"{NLL} {order}"


def documents_of(haystack: Sequence[str] | None, length: int, tokenizer: Tokenizer) -> list[Any]:
    """The files of the haystack as ids, in order, `length` tokens in all.

    raises: UsageError without a haystack; L4Error where it is too short
    """
    if not haystack:
        why = "it reads files of your own, and generated filler has nothing to remember"
        fix = "name them: `--haystack src/`"
        raise UsageError("`--tasks nll` needs a haystack", why=why, fix=fix)
    found: list[np.ndarray] = []
    total = 0
    for text in _texts(haystack):
        found.append(tokenizer.encode(text if text.endswith("\n") else text + "\n"))
        total += len(found[-1])
        if total >= length:
            return cut_to_length(found, length)
    raise L4Error(
        "the haystack is too short for `nll`",
        why=f"its {len(found)} files have {total} tokens, and one run of {length} is read",
        fix="give more text with `--haystack`, or ask for shorter lengths",
    )


def _texts(haystack: Sequence[str]) -> Iterator[str]:
    """Plain text files, whole ones, in the order in which they lie."""
    for source in Inputs(list(haystack)).sources():
        if source.path is None or source.kind is not Kind.text:
            continue
        text = _text(source.path)
        if text:
            yield text


def _text(path: Path) -> str | None:
    what, fix = f"cannot use `{path}` as a haystack", "leave it out, or convert it to UTF-8"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if binary_kind(head) is not None:
                return None
            return (head + file.read()).decode()
    except UnicodeDecodeError as error:
        raise L4Error(what, why=f"byte {error.start} is not UTF-8", fix=fix) from error
    except OSError as error:
        raise L4Error(what, why=(error.strerror or str(error)).lower(), fix=fix) from error


def run(
    subject: EngineSubject,
    documents: Sequence[np.ndarray],
    seed: int,
    store: ResultsStore,
    on_progress: Callable[[str, int], None],
) -> None:
    """Read what is not read yet; each order is kept as soon as it is done."""
    tokenizer = subject.tokenizer
    for order in ORDERS:
        if key_of(order) in store.finished:
            continue
        start = time.perf_counter()
        arranged = list(documents)
        if order == "shuffled":
            np.random.default_rng([seed, len(arranged)]).shuffle(arranged)
        found = tally(
            subject.engine,
            tokenizer.bos_id,
            arranged,
            tokenizer.num_bytes(),
            partial(on_progress, order),
        )
        spent_s = round(time.perf_counter() - start, 4)
        record = {"key": key_of(order), "role": NLL, "task": NLL, "order": order, "answers": []}
        store.append({**record, "curve": curve(found), "time_s": spent_s})


def summarized(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The curves by order, for the summary."""
    return {record["order"]: record["curve"] for record in records if record.get("role") == NLL}


def show(curves: Mapping[str, Any]) -> None:
    """Both curves by doubling position, and whether they fall."""
    orders = [order for order in ORDERS if order in curves]
    rows = []
    for buckets in zip(*(curves[order]["doubling"] for order in orders), strict=True):
        place = f"{length_text(buckets[0]['first'])} to {length_text(buckets[0]['end'])}"
        rows.append([place, *(_text_of(bucket["bits_per_byte"]) for bucket in buckets)])
    names = [order.replace("_", " ") for order in orders]
    terminal.table("bits per byte by position", ("tokens", *names), rows)
    for order, name in zip(orders, names, strict=True):
        terminal.result(f"{name}: {verdict(curves[order])}")


def draw(folder: Path, curves: Mapping[str, Any], name: str) -> None:
    """Both curves as a picture."""
    drawn = [
        Curve(
            order.replace("_", " "),
            tuple(bucket["end"] for bucket in curves[order]["doubling"]),
            tuple(bucket["bits_per_byte"] for bucket in curves[order]["doubling"]),
        )
        for order in ORDERS
        if all(bucket["bits_per_byte"] is not None for bucket in curves[order]["doubling"])
    ]
    if drawn:
        caption = "; ".join(
            f"{order.replace('_', ' ')}: {verdict(curves[order])}" for order in ORDERS
        )
        axes = Axes(y_title="bits per byte", x_title="position (tokens)", is_share=False)
        title = f"Bits per byte of {name} by position"
        draw_curves(drawn, folder / PICTURE, title=title, caption=caption, axes=axes)


def _text_of(bits_per_byte: float | None) -> str:
    return "-" if bits_per_byte is None else f"{bits_per_byte:.4f}"


def verdict(found: Mapping[str, Any]) -> str:
    """Whether a curve falls, in words."""
    if found["falls"] is None:
        return "too short to say whether it falls"
    said = "it falls" if found["falls"] else "it does not fall"
    return (
        f"{said}: {found['slope']:+.4f} bits per byte with every doubling of the position, "
        f"95% interval {found['slope_low']:+.4f} to {found['slope_high']:+.4f}"
    )
