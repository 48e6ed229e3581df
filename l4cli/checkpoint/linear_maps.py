"""The linear maps of a plain checkpoint, one by one: experts unfused, weights [O, I].

in: a folder's headers and its config; out: names, places, and values when asked for
source: HF Llama 4 modules; unfused experts as compressed-tensors keeps them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from l4cli.checkpoint.hf_keys import Piece
from l4cli.checkpoint.reader import LastRead
from l4cli.checkpoint.stored import StoredWeights
from l4cli.quantization.parts import layer_of, part_of


@dataclass(frozen=True)
class LinearMap:
    """One nn.Linear of the exchange format, and where its weight is now."""

    name: str  # the module's, as in the exchange format
    key: str  # the stored tensor with its values
    shape: tuple[int, int]
    expert: int | None = None  # of a fused tensor [E, in, out]
    columns: tuple[int, int] = (0, 0)  # of the fused [in, out]

    @property
    def part(self) -> str:
        return part_of(self.name)

    @property
    def layer_idx(self) -> int | None:
        return layer_of(self.name)


def linear_maps(piece: Piece) -> list[LinearMap]:
    """The maps in one stored tensor; none for norms, biases and embeddings."""
    module = piece.name.removesuffix(".weight")
    if piece.expert is not None:
        _, _, proj = piece.key.removesuffix(".weight").rpartition(".")
        experts, _, _ = piece.name.rpartition(".")
        shape = (piece.shape[0], piece.shape[1])
        return [LinearMap(f"{experts}.{piece.expert}.{proj}", piece.key, shape)]
    if len(piece.shape) == 3:
        return _unfused(piece)
    is_map = len(piece.shape) == 2 and piece.name != module and "embed_tokens" not in module
    return [LinearMap(module, piece.key, (piece.shape[0], piece.shape[1]))] if is_map else []


def _unfused(piece: Piece) -> list[LinearMap]:
    experts, _, leaf = piece.name.rpartition(".")
    num_experts, rows, columns = piece.shape  # [E, in, out]
    half = columns // 2
    places = {"gate_proj": (0, half), "up_proj": (half, columns)}  # gate comes before up
    if leaf == "down_proj":
        places = {"down_proj": (0, columns)}
    return [
        LinearMap(f"{experts}.{e}.{proj}", piece.key, (end - start, rows), e, (start, end))
        for e in range(num_experts)
        for proj, (start, end) in places.items()
    ]


class MapValues(Mapping[str, Tensor]):
    """The weights [O, I] of some maps by module name, each read when it is asked for, as stored.

    raises: L4Error for values that are NaN or infinite
    """

    def __init__(self, stored: StoredWeights, maps: list[LinearMap]) -> None:
        self._maps = {each.name: each for each in maps}
        self._read = LastRead(stored)

    def __getitem__(self, name: str) -> Tensor:
        place = self._maps[name]
        tensor = self._read(place.key, place.expert)
        if place.expert is None:
            return tensor
        start, end = place.columns
        return tensor[:, start:end].T

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)
