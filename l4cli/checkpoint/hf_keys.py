"""Which stored tensor fills which parameter: nearly the identity.

in: names and shapes of a checkpoint and of a model; out: pieces, what is missing, what is left over
source: HF Llama4 state dicts (transformers 5.23); unfused experts as compressed-tensors keeps them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TEXT_PREFIX = "language_model."
VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
# Tables that some writers store; every reader computes them from the config.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_embedding.freqs_ci", "vision_model.freqs_ci")
_UNFUSED = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Piece:
    """One stored tensor and its place: all of a parameter, or one expert's part of it."""

    key: str
    name: str
    shape: tuple[int, ...]  # as it must be stored
    expert: int | None = None  # an nn.Linear weight [out, in], to be transposed
    columns: tuple[int, int] = (0, 0)  # of the fused [in, out]


@dataclass
class Matching:
    """How a checkpoint and a model fit together."""

    pieces: list[Piece] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def match(stored: Iterable[str], parameters: Mapping[str, tuple[int, ...]]) -> Matching:
    """Find each parameter's stored tensors.

    A text model takes the text half of a multimodal checkpoint; its vision keys are passed over.
    """
    is_text = not any(name.startswith(VISION_PREFIXES) for name in parameters)
    found = Matching()
    filling: dict[str, list[Piece]] = {name: [] for name in parameters}
    for key in stored:
        if key.endswith(_COMPUTED) or (is_text and key.startswith(VISION_PREFIXES)):
            continue
        piece = _piece(key, _model_name(key, is_text), parameters)
        if piece is None:
            found.unexpected.append(key)
        else:
            found.pieces.append(piece)
            filling[piece.name].append(piece)
    for name, pieces in filling.items():
        found.missing += _missing(name, parameters[name], pieces)
    return found


def _model_name(key: str, is_text: bool) -> str:
    """The name a stored key has in the model."""
    if is_text:
        return key.removeprefix(TEXT_PREFIX)
    if key.startswith((*VISION_PREFIXES, TEXT_PREFIX)):
        return key
    return TEXT_PREFIX + key


def _piece(key: str, name: str, parameters: Mapping[str, tuple[int, ...]]) -> Piece | None:
    if name in parameters:
        return Piece(key, name, parameters[name])
    unfused = _UNFUSED.fullmatch(name)
    if unfused is None:
        return None
    experts, index, proj = unfused[1], int(unfused[2]), unfused[3]
    fused = f"{experts}.{'down_proj' if proj == 'down_proj' else 'gate_up_proj'}"
    if fused not in parameters or index >= parameters[fused][0]:
        return None
    _, rows, columns = parameters[fused]  # [E, in, out]
    if proj == "down_proj":
        return Piece(key, fused, (columns, rows), index, (0, columns))
    half = columns // 2
    start = 0 if proj == "gate_proj" else half  # gate columns come before up
    return Piece(key, fused, (half, rows), index, (start, start + half))


def _missing(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> list[str]:
    """The stored keys whose absence leaves a parameter unfilled."""
    if any(piece.expert is None for piece in pieces):
        return []
    if not pieces:
        return [name]
    experts, _, _ = pieces[0].key.rpartition(f".{pieces[0].expert}.")
    projs = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    keys = [f"{experts}.{e}.{proj}.weight" for e in range(shape[0]) for proj in projs]
    have = {piece.key for piece in pieces}
    return [key for key in keys if key not in have]
