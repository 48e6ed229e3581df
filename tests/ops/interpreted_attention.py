"""Run through `test_triton_attention.py`: attention in segments and over splits, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_harness import repair_interpreter
from triton_oracles import assert_close_to_fp64, assert_near, normal

repair_interpreter()

from l4cli.inference.kept import KEY_GROUP, Packed  # noqa: E402
from l4cli.ops.attention import SEGMENT_ATTENTION, plan_attention  # noqa: E402
from l4cli.ops.parts_attention import ATTEND_PARTS  # noqa: E402
from src_kernels.cuda import decode, segments  # noqa: E402
from src_kernels.cuda.segments import Blocks, Sizes  # noqa: E402

# Small, so that short segments have several tiles; each kernel's two sizes unequal.
SMALL = Sizes(Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2))


def plain(starts: Tensor, lengths: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A softmax a segment, every score of it at once."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, group = q * 0, q.shape[1] // k.shape[1]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            rows = slice(start, start + length)
            keys, values = (x[rows].repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qnh,knh->nqk", q[rows], keys) * q.shape[-1] ** -0.5
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            own = torch.einsum("nqk,knh->qnh", probs, values)
            out = torch.cat([out[:start], own, out[start + length :]])
        return out

    return attend


def check_segments(
    borders: list[tuple[int, int]], num_positions: int, heads: tuple[int, int], head_dim: int,
    dtype: torch.dtype, sizes: Sizes = SMALL,
) -> None:  # fmt: skip
    starts, lengths = torch.tensor(borders, dtype=torch.long).reshape(-1, 2).unbind(1)
    tiles = segments.make_tiles(starts, lengths, num_positions, sizes, "cpu")
    assert_close_to_fp64(
        lambda q, k, v: segments.segment_attention(q, k, v, tiles, sizes),
        plain(starts, lengths),
        [normal(num_positions, n, head_dim, seed=n + i) for i, n in enumerate((*heads, heads[1]))],
        dtype,
    )


UNEQUAL = [(0, 1), (1, 37), (40, 32), (75, 5)]  # a length of one, a prime, a whole tile, padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_of_unequal_length_with_padding_between(dtype: torch.dtype) -> None:
    check_segments(UNEQUAL, 83, (2, 1), 16, dtype)


@pytest.mark.parametrize(
    ("borders", "heads", "head_dim"),
    [
        ([(0, 1)], (1, 1), 16),
        ([(0, 33), (33, 31)], (6, 2), 24),  # a head no power of two wide
        ([(2, 35)], (2, 2), 8),
    ],
)
def test_few_segments(
    borders: list[tuple[int, int]], heads: tuple[int, int], head_dim: int
) -> None:
    check_segments(borders, borders[-1][0] + borders[-1][1], heads, head_dim, torch.float32)


def test_segments_in_fp16() -> None:
    check_segments([(0, 33), (33, 7)], 40, (2, 1), 32, torch.float16)


@pytest.mark.parametrize(
    ("arch", "dtype", "length"),
    [(90, torch.bfloat16, 130), (100, torch.bfloat16, 130), (90, torch.float32, 41)],
)
def test_sizes_that_a_gpu_gets(arch: int, dtype: torch.dtype, length: int) -> None:
    sizes = segments.choose_sizes(dtype, 128, arch)
    check_segments([(0, 3), (3, length)], length + 5, (2, 1), 128, dtype, sizes)


def test_no_segment_gives_zeros() -> None:
    q, k = normal(5, 2, 16).requires_grad_(), normal(5, 1, 16).requires_grad_()
    tiles = segments.make_tiles(torch.zeros(0).long(), torch.zeros(0).long(), 5, SMALL, "cpu")
    out = segments.segment_attention(q, k, k, tiles, SMALL)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(5, 2, 16))
    assert torch.equal(q.grad, torch.zeros(5, 2, 16))


def test_what_lies_between_segments_is_never_read() -> None:
    """Not even multiplied by zero: padding may hold anything."""
    starts, lengths = torch.tensor([1, 40]), torch.tensor([37, 5])
    tiles = segments.make_tiles(starts, lengths, 48, SMALL, "cpu")
    inputs = [normal(48, n, 16, seed=n) for n in (2, 1, 1)]
    outside = torch.ones(48, dtype=torch.bool)
    outside[1:38] = outside[40:45] = False
    for x in inputs:
        x[outside] = torch.nan
    leaves = [x.requires_grad_() for x in inputs]
    out = segments.segment_attention(*leaves, tiles, SMALL)
    out.backward(torch.where(outside[:, None, None], torch.nan, torch.ones_like(out)))
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_results_repeat_bit_by_bit() -> None:
    starts, lengths = torch.tensor(UNEQUAL).unbind(1)
    tiles = segments.make_tiles(starts, lengths, 83, SMALL, "cpu")
    runs = []
    for _ in range(2):
        leaves = [normal(83, n, 16, seed=n).requires_grad_() for n in (2, 1, 1)]
        segments.segment_attention(*leaves, tiles, SMALL).square().sum().backward()
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_position_of_a_segment_has_one_tile_and_long_ones_come_first() -> None:
    starts, lengths = torch.tensor(UNEQUAL).unbind(1)
    tiles = segments.make_tiles(starts, lengths, 83, SMALL, "cpu")
    for table in (tiles.by_queries, tiles.by_keys):
        found = [
            start + position
            for start, length, first in table.tolist()
            for position in range(first, min(first + 32, length))
        ]
        wanted = [start + i for start, length in UNEQUAL for i in range(length)]
        assert sorted(found) == wanted
    assert tiles.by_queries[:, 2].diff().max() <= 0
    assert (tiles.by_keys[:, 1] - tiles.by_keys[:, 2]).diff().max() <= 0
    assert not tiles.covers_all


def test_the_door_takes_rows_of_a_batch_and_slices_of_a_projection() -> None:
    starts, lengths = torch.tensor([0, 9, 20]), torch.tensor([9, 7, 20])  # 16 to 19 are padding
    plan = plan_attention(starts, lengths, 40, torch.device("cpu"))
    door = SEGMENT_ATTENTION.named("triton").load()
    reference = SEGMENT_ATTENTION.named("reference").load()

    def through(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def attend(whole: Tensor) -> Tensor:
            q, k, v = whole.split([4, 2, 2], 2)
            return run(q, k, v, plan)

        return attend

    assert_close_to_fp64(through(door), through(reference), [normal(2, 20, 8, 16)], torch.float32)
    assert len(plan.tiles) == 1
    assert plan.covers_all is False


# Split over keys


def exact_softmax(
    q: Tensor, keys: Tensor, values: Tensor, factor_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, keys, values = (x.double() for x in (q, keys, values))
    scores = torch.einsum("krh,ksh->krs", q, keys) * q.shape[-1] ** -0.5
    if factor_R is not None:
        scores = scores * factor_R.double()[None, :, None]
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def plain_parts(heads: int, head_dim: int, lengths: list[int], dtype: torch.dtype) -> list:
    pairs = [
        (normal(heads, n, head_dim, seed=n), normal(heads, n, head_dim, seed=n + 1))
        for n in lengths
    ]
    return [decode.Part(0, *(x.to(dtype) for x in pair)) for pair in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "rows", "head_dim", "lengths", "span"),
    [
        (1, 1, 16, [1], None),
        (2, 5, 16, [1, 37, 200], 64),
        (1, 70, 24, [65], 128),  # more rows than one program takes
        (2, 3, 8, [64, 64], 64),
    ],
)
def test_splits(
    heads: int, rows: int, head_dim: int, lengths: list[int], span: int | None, dtype: torch.dtype
) -> None:
    q = normal(heads, rows, head_dim, seed=9).to(dtype)
    parts = plain_parts(heads, head_dim, lengths, dtype)
    keys, values = (torch.cat([part[i] for part in parts], 1) for i in (1, 2))
    for factor_R in (None, 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(1))):
        out, lse = decode.attend_parts(q, parts, None, factor_R, span)
        want, want_lse = exact_softmax(q, keys, values, factor_R)
        assert_near(out, want, 1e-6 if dtype == torch.float32 else 2**-8)
        assert_near(lse, want_lse, 1e-6)


def test_splits_join_what_was_seen_before() -> None:
    q, parts = normal(2, 3, 16, seed=9), plain_parts(2, 16, [20, 70, 5], torch.float32)
    seen = decode.attend_parts(q, parts[:1])
    out, lse = decode.attend_parts(q, parts[1:], before=seen, span=64)
    want, want_lse = decode.attend_parts(q, parts)
    assert_near(out, want, 1e-6)
    assert_near(lse, want_lse, 1e-6)
    none, _ = decode.attend_parts(q, [], before=seen)
    assert torch.equal(none, seen[0])


def test_more_splits_than_one_program_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels; the keys far apart in size, so that shares differ by powers of ten."""
    monkeypatch.setattr(decode, "GROUP", 2)
    q, (part,) = normal(1, 2, 16, seed=9), plain_parts(1, 16, [140], torch.float32)
    part = part._replace(keys=part.keys * torch.linspace(0, 8, 140)[None, :, None])
    out, lse = decode.attend_parts(q, [part], span=32)
    want, want_lse = exact_softmax(q, part.keys, part.values, None)
    assert_near(out, want, 1e-6)
    assert_near(lse, want_lse, 1e-6)


def test_parts_with_room_to_grow_and_in_another_dtype() -> None:
    """A cache grows in place: heads lie further apart than its tokens need."""
    q, room = normal(2, 3, 16, seed=9).bfloat16(), normal(2, 2, 90, 16)
    keys, values = room[0, :, :70], room[1, :, :70]
    out, _ = decode.attend_parts(q, [decode.Part(0, keys, values)], span=64)
    want, _ = exact_softmax(q, keys.bfloat16(), values.bfloat16(), None)
    assert_near(out, want, 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_parts_in_codes_as_a_cache_keeps_them(bits: int, dtype: torch.dtype) -> None:
    """Packed and plain parts in one call, against what the cache itself unpacks, in fp64."""
    head_dim = 24
    packed = Packed.of(normal(2, 2 * KEY_GROUP, head_dim), normal(2, 2 * KEY_GROUP, head_dim), bits)
    packed.append(Packed.of(normal(2, KEY_GROUP, head_dim), normal(2, KEY_GROUP, head_dim), bits))
    newest = (normal(2, 5, head_dim, seed=3), normal(2, 5, head_dim, seed=4))
    q = normal(2, 3, head_dim, seed=9).to(dtype)
    factor_R = torch.tensor([1.0, 1.3, 0.7])
    run = ATTEND_PARTS.named("triton").load()
    out, lse = run(q, [packed, newest], None, factor_R)
    parts = [packed.load(torch.float32), newest]
    keys, values = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
    want, want_lse = exact_softmax(q, keys, values, factor_R)
    assert_near(out, want, 1e-6 if dtype == torch.float32 else 2**-7)
    assert_near(lse, want_lse, 1e-6 if dtype == torch.float32 else 2**-9)


def test_every_version_of_the_door_gives_the_same() -> None:
    q, keys = normal(2, 3, 16, seed=9), normal(2, 40, 16, seed=1)
    seen = (normal(2, 3, 16), normal(2, 3))
    factor_R = torch.tensor([1.0, 1.3, 0.7])
    results = [
        version.load()(q, [(keys[:, :9], keys[:, :9]), (keys, keys)], seen, factor_R)
        for version in ATTEND_PARTS.versions
    ]
    for out, lse in results[1:]:
        assert_near(results[0][0], out, 1e-6)
        assert_near(results[0][1], lse, 1e-6)


def test_decoding_goes_through_the_door() -> None:
    """One token and one part too, where the version splits keys."""
    from l4cli.inference import attention

    q, keys, values = normal(1, 6, 16, seed=9), normal(2, 40, 16, seed=1), normal(2, 40, 16)
    out = attention.attend_to_all(q, [(keys, values)])
    want, _ = exact_softmax(q.view(2, 3, 16), keys, values, None)
    assert_near(out, want.reshape(1, 6, 16), 1e-6)
