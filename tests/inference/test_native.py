"""The C++ decoder gives what the torch model gives, in every place a model has."""

from __future__ import annotations

import pytest
import torch
from test_engine import picture_prompt
from tiny_llama4 import CHUNK, full_logits, random_ids, text_model, vision_model

import src_kernels.cpu as kernels
from l4cli.inference import Cache, CacheBatch, CacheOptions, Engine, Request, SamplingOptions
from l4cli.inference.log_sums import log_sums
from l4cli.inference.native import NativeModel, why_not
from l4cli.inference.native_loading import native_from_model
from l4cli.ops.batch import Batch

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "plain": {},
    "wide heads": {"head_dim": 64},
    "five queries a key": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16},
    "two experts": {"num_experts_per_tok": 2},
    "dense": {"moe_layers": []},
    "experts everywhere": {"interleave_moe_layer_step": 1},
    "odd sizes": {"hidden_size": 40, "intermediate_size": 24, "vocab_size": 71, "head_dim": 6},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn without norm": {"rope_scaling": YARN, "use_qk_norm": False},
    "one chunk": {"attention_chunk_size": None},
    "no temperature": {"attn_temperature_tuning": False},
    "scalable softmax": {"attn_temperature_tuning": False, "scalable_softmax": True},
    "own rotation in full layers": {
        "no_rope_layers": [1, 1, 1, 1, 1],
        "layer_types": ["chunked_attention", "full_attention"] * 2 + ["chunked_attention"],
        "full_rope": {"rope_theta": 500.0, "rope_scaling": YARN, "use_qk_norm": False},
    },
}


@pytest.fixture(autouse=True)
def _needs_the_library():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def _each_instruction_set(request):
    library = kernels.load()
    before = library.l4_cpu_isa()
    if library.l4_cpu_use_isa(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield
    library.l4_cpu_use_isa(before)


def pair(**changes) -> tuple[torch.nn.Module, NativeModel]:
    """A model and the same in C++, nothing rounded."""
    model = text_model(**changes)
    return model, native_from_model(model, is_exact=True)


@torch.inference_mode()
def decoded(model, ids: torch.Tensor, first: int, options: CacheOptions | None = None):
    """Logits of every position from `first` on, read one by one after a prefill."""
    engine = Engine(model, cache_options=options)
    cache = engine.prefill(ids[:first])
    rows = [cache.logits_V]
    for i in range(first, len(ids)):
        batch = Batch.continuing(ids[None, i : i + 1], torch.tensor([[i]]))
        rows.append(model.lm_head(model.hidden(batch, cache)[0, -1]).float())
        cache.tokens.append(int(ids[i]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", SHAPES)
def test_reading_and_decoding_equal_the_full_forward(name):
    model, native = pair(**SHAPES[name])
    ids = random_ids(3 * CHUNK + 5)
    expected = full_logits(model, ids)
    for first in (1, CHUNK - 1, CHUNK, len(ids)):
        found = decoded(native, ids, first)
        torch.testing.assert_close(found, expected[first - 1 :], atol=1e-4, rtol=1e-4)
    expected = expected.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    for size in (5, 100):
        scores = Engine(native).score(ids, chunk_size=size)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("head_dim", [8, 64])
def test_every_instruction_set(head_dim):
    model, native = pair(head_dim=head_dim)
    ids = random_ids(2 * CHUNK + 3)
    expected = full_logits(model, ids)
    torch.testing.assert_close(decoded(native, ids, 3), expected[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("width", [1, 5, 16, 71, 1000])
def test_log_sums(width):
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 20
    expected = logits.double().logsumexp(-1).float()
    torch.testing.assert_close(log_sums(logits), expected, atol=1e-5, rtol=1e-6)
    logits[1, width // 2] = torch.nan
    assert log_sums(logits).isnan().tolist() == [False, True, False]


def test_greedy_answers_and_threads():
    model, native = pair()
    requests = [Request(random_ids(n, n), max_new_tokens=9) for n in (1, 6, 13, 20)]
    expected = [(e.request, e.token, e.finish) for e in Engine(model).generate(requests)]
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        events = [(e.request, e.token, e.finish) for e in Engine(native).generate(requests)]
        assert events == expected
    torch.set_num_threads(before)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_kept_in_every_format(kv_dtype, head_dim):
    model, native = pair(head_dim=head_dim, max_position_embeddings=512)
    options = CacheOptions(kv_dtype)
    ids = random_ids(360)
    # Old tokens are packed before position 384: both sides read the same codes until then.
    expected = decoded(model, ids, 300, options)
    found = decoded(native, ids, 300, options)
    if kv_dtype == "bf16":
        # Queries are rounded as well: no worse than twice what torch loses by such keys.
        exact = decoded(model, ids, 300)
        assert float((found - exact).abs().mean()) < 2 * float((expected - exact).abs().mean())
        return
    allowed = 1e-4 if kv_dtype == "fp32" else 2e-2  # codes of later tokens may be neighbours
    torch.testing.assert_close(found, expected, atol=allowed, rtol=allowed)
    assert float((found - expected).abs().mean()) < 2e-3


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@torch.inference_mode()
def test_packing_while_decoding(kv_dtype):
    _, native = pair(max_position_embeddings=512)
    ids = random_ids(300)
    cache = Engine(native, cache_options=CacheOptions(kv_dtype)).prefill(ids[:250])
    for i in range(250, 300):
        batch = Batch.continuing(ids[None, i : i + 1], torch.tensor([[i]]))
        native.hidden(batch, cache)
        cache.tokens.append(int(ids[i]))
    full = cache.layers[3]
    assert full.num_tokens == 300
    packed = 0 if full.packed is None else full.packed.num_tokens
    assert (packed, full.tail_length) == ((128, 172) if kv_dtype == "int8" else (0, 300))
    assert cache.layers[0].tail_length == 300 % CHUNK


def test_forks_of_forks_side_by_side():
    model, native = pair()
    engine = Engine(native)
    roots = [engine.prefill(random_ids(n, n)) for n in (5, CHUNK, 19)]
    caches = [fork for root in roots for fork in root.fork(2)]
    caches += caches[-1].fork(2)
    ids = random_ids(12, seed=7)
    texts = [cache.tokens.tensor() for cache in caches]
    for i in range(len(ids)):
        tokens = (ids[i] + torch.arange(len(caches))) % 60  # each goes its own way
        positions = torch.tensor([[cache.num_tokens] for cache in caches])
        batch = Batch.continuing(tokens[:, None], positions)
        logits = native.lm_head(native.hidden(batch, CacheBatch(caches))[:, -1])
        for row, cache in enumerate(caches):
            cache.tokens.append(int(tokens[row]))
            texts[row] = torch.cat([texts[row], tokens[row : row + 1]])
            if i in (2, len(ids) - 1):
                expected = full_logits(model, texts[row])[-1]
                torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def test_more_rows_than_one_call_takes():
    model, native = pair()
    requests = [Request(random_ids(3, n), max_new_tokens=3) for n in range(35)]
    answers = [
        sorted((e.request, i, e.token) for i, e in enumerate(Engine(m).generate(requests, 35)))
        for m in (model, native)
    ]
    assert answers[0] == answers[1]


def test_scoring_many_continuations():
    model, native = pair()
    texts = [random_ids(n, n) for n in (1, 4, 11)]
    found, expected = (
        Engine(m).score_many(Engine(m).prefill(random_ids(13)), texts) for m in (native, model)
    )
    for (logprobs, likeliest), (exact, chosen) in zip(found, expected, strict=True):
        torch.testing.assert_close(logprobs, exact, atol=1e-4, rtol=1e-4)
        assert likeliest.tolist() == chosen.tolist()


def test_which_experts_were_chosen():
    model, native = pair(num_experts_per_tok=2)
    requests = [Request(random_ids(n, n), max_new_tokens=5, wants_experts=True) for n in (3, 12)]
    found, expected = ([e.experts for e in Engine(m).generate(requests)] for m in (native, model))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_pictures():
    model = vision_model()
    native = native_from_model(model, is_exact=True)
    ids, pixels = picture_prompt()
    expected = full_logits(model, ids, pixels)[-1]
    for chunk_size in (3, 100):
        cache = Engine(native).prefill(ids, pixels, chunk_size=chunk_size)
        torch.testing.assert_close(cache.logits_V, expected, atol=1e-4, rtol=1e-4)


def test_caches_change_hands(tmp_path):
    model, native = pair()
    ids = random_ids(21)
    for writer, reader in ((model, native), (native, model)):
        Engine(writer).prefill(ids).save(tmp_path / "cache")
        cache = Engine(reader).load_cache(tmp_path / "cache")
        tokens = [e.token for e in Engine(reader).generate([Request([], cache=cache)])]
        assert tokens == [e.token for e in Engine(model).generate([Request(ids)])]
        (tmp_path / "cache").unlink()


def test_sampling_is_the_engines_own():
    model, native = pair()
    options = SamplingOptions(temperature=1.0, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=4)
    answers = [
        [e.token for e in Engine(m).generate([Request(random_ids(9), sampling=options)])][:40]
        for m in (model, native)
    ]
    assert answers[0] == answers[1]


def test_a_cache_that_torch_wrote_to_between_steps():
    model, native = pair()
    ids = random_ids(20)
    expected = full_logits(model, ids)
    cache = Cache(model.config.text)
    for i in range(20):
        reader = model if i % 3 else native
        batch = Batch.continuing(ids[None, i : i + 1], torch.tensor([[i]]))
        with torch.inference_mode():
            logits = reader.lm_head(reader.hidden(batch, cache)[0, -1])
        cache.tokens.append(int(ids[i]))
        torch.testing.assert_close(logits, expected[i], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_packing_that_leaves_the_tail_as_long_as_it_was():
    ids, steps = random_ids(530), []
    for model in pair(max_position_embeddings=1024):
        engine = Engine(model, cache_options=CacheOptions("int8"))
        cache = engine.prefill(ids[:400])
        for first in (400, 401 + 128):  # a decoded token, a group of read ones, a decoded token
            batch = Batch.continuing(ids[None, first : first + 1], torch.tensor([[first]]))
            logits = model.lm_head(model.hidden(batch, cache)[0, -1])
            cache.tokens.append(int(ids[first]))
            if first == 400:
                engine.prefill(ids[401 : 401 + 128], cache=cache)
        steps.append(logits)
    torch.testing.assert_close(steps[1], steps[0], atol=1e-4, rtol=1e-4)
