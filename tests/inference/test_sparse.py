"""Reading some pages of a long past: exact when all are read, else by Quest's bounds."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import full_logits, random_ids, text_model

from l4cli.errors import UsageError
from l4cli.inference import CacheOptions, Engine
from l4cli.inference.attention import attend_rows
from l4cli.inference.kept import KEY_GROUP, PAGE, Packed, load, page_tokens
from l4cli.inference.sparse import Pages, Recall, attend_pages
from l4cli.ops.parts_attention import reference_attention


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 256 tokens, so that a past of a few hundred has sealed ones."""
    monkeypatch.setattr("l4cli.inference.layer_cache.BLOCK", 256)
    monkeypatch.setattr("l4cli.inference.kept.BLOCK", 256)


def past(num_heads: int, lengths: list[int]):
    torch.manual_seed(0)
    return [tuple(torch.randn(2, num_heads, n, 16)) for n in lengths]


@pytest.mark.parametrize("bits", [8, 4])
def test_pages_of_codes_are_those_of_the_whole_part(bits):
    keys, values = torch.randn(2, 2, 2 * KEY_GROUP, 16)
    for part in ((keys, values), Packed.of(keys, values, bits)):
        whole = load(part, torch.float32)
        pages = torch.tensor([0, 3, 4, 7])
        for head in range(2):
            got = page_tokens(part, head, pages, torch.float32)
            for some, everything in zip(got, whole, strict=True):
                rows = everything[head].unflatten(0, (-1, PAGE))[pages].flatten(0, 1)
                torch.testing.assert_close(some, rows)


@pytest.mark.parametrize("lengths", [[256, 256], [70, 256, 33]])
def test_chosen_pages_against_a_plain_loop(lengths):
    parts, topk, group, positions = past(2, lengths), 3, 2, 5
    newest = past(2, [9])
    q = torch.randn(2, positions * group, 16)
    recall = Recall()
    out, lse = attend_pages(q, parts, newest, positions, topk, Pages(), recall)
    shares = []
    for head in range(2):
        for position in range(positions):  # so few positions choose alone, the heads together
            rows = slice(position * group, (position + 1) * group)
            query = q[head, rows]
            pages, rest = [], [newest[0]]
            for keys, values in parts:
                whole = keys.shape[1] // PAGE * PAGE
                for start in range(0, whole, PAGE):
                    inside = slice(start, start + PAGE)
                    low, high = keys[head, inside].amin(0), keys[head, inside].amax(0)
                    bound = torch.maximum(query * low, query * high).sum(-1).max()
                    pages.append((float(bound), keys[:, inside], values[:, inside]))
                rest.append((keys[:, whole:], values[:, whole:]))
            best = sorted(pages, key=lambda page: -page[0])[:topk]
            keys = torch.cat([*(k for _, k, _ in best), *(k for k, _ in rest)], 1)[head]
            values = torch.cat([*(v for _, _, v in best), *(v for _, v in rest)], 1)[head]
            expected, expected_lse = reference_attention(query, keys, values)
            torch.testing.assert_close(out[head, rows], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[head, rows], expected_lse, atol=1e-5, rtol=1e-5)
            everything = torch.cat([k for k, _ in [*parts, *newest]], 1)[head]
            exact = (query @ everything.T * 16**-0.5).logsumexp(-1)
            if position == 0:  # of the first sixteen blocks the first is measured
                shares.append((expected_lse - exact).exp())
    assert recall.num_queries == 2 * group
    assert recall.num_blocks == positions
    assert recall.mean == pytest.approx(float(torch.stack(shares).mean()), abs=1e-5)
    assert recall.least == pytest.approx(float(torch.stack(shares).min()), abs=1e-5)
    assert 0 < recall.mean < 1


def test_all_pages_are_exact():
    parts, q = past(2, [256, 100]), torch.randn(2, 6, 16)
    out, lse = attend_pages(q, parts, [], 3, 11, Pages(), Recall())
    expected, expected_lse = attend_rows(q, parts)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_an_engine_that_reads_all_pages_reads_everything(short_blocks, kv_dtype):
    model = text_model(max_position_embeddings=2048, floor_scale=64)
    ids, question = random_ids(900), random_ids(6, 2)
    exact = Engine(model, cache_options=CacheOptions(kv_dtype))
    sparse = Engine(model, cache_options=CacheOptions(kv_dtype, sparse_topk=100))
    one, two = exact.prefill(ids, chunk_size=300), sparse.prefill(ids, chunk_size=300)
    assert torch.equal(one.logits_V, two.logits_V)
    (a, b), (c, d) = exact.score_many(one, [question])[0], sparse.score_many(two, [question])[0]
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert two.recall == {}


def test_few_pages_come_close_and_say_how_close(short_blocks):
    model = text_model(max_position_embeddings=2048, floor_scale=64)
    ids = random_ids(900)
    expected = full_logits(model, ids)[-1]
    errors, recalls = [], []
    for topk in (2, 8, 20):
        engine = Engine(model, cache_options=CacheOptions(sparse_topk=topk))
        cache = engine.prefill(ids[:-1], chunk_size=300)
        engine.prefill(ids[-1:], cache=cache)
        assert list(cache.recall) == [3]
        recalls.append(cache.recall[3].mean)
        errors.append(float((cache.logits_V - expected).abs().mean()))
    assert 0 < recalls[0] < recalls[1] < recalls[2] < 1
    assert errors[2] < errors[0]


def test_a_needle_is_found_by_its_page():
    """One key that fits the query, among thousands that do not: its page alone tells all."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 4096, 16)
    q = torch.randn(1, 1, 16)
    keys[0, 1234] = 20 * q[0, 0] / q.norm()
    recall = Recall()
    out, _ = attend_pages(q, [(keys, values)], [], 1, 4, Pages(), recall)
    assert recall.mean > 0.999
    torch.testing.assert_close(out[0, 0], values[0, 1234], atol=0.05, rtol=0)


def test_a_saved_past_can_be_read_by_pages(short_blocks, tmp_path):
    model = text_model(max_position_embeddings=2048)
    Engine(model).prefill(random_ids(600)).save(tmp_path / "past")
    cache = Engine(model, cache_options=CacheOptions(sparse_topk=4)).load_cache(tmp_path / "past")
    Engine(model).prefill(random_ids(3), cache=cache)
    assert cache.recall[3].num_queries > 0


def test_a_negative_count_is_refused():
    with pytest.raises(UsageError, match="`sparse_topk` is -1"):
        CacheOptions(sparse_topk=-1)
