"""A model whose text half runs in C++ from packed weights; stands where a torch model stands.

in: a `KernelFile`, a `Batch`, a cache; out: normed states, logits. Only answers: no gradients
A token a row goes through all layers in one call; longer runs go layer by layer, with attention by
the cache as ever. Pictures are embedded by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l4cli.inference.cache import Cache, CacheBatch
from l4cli.inference.kept import Plain
from l4cli.inference.kernel_file import KernelFile
from l4cli.inference.layer_cache import LayerCache
from l4cli.inference.native_past import Pasts, described, is_readable, pointers, runs_in_chunks
from l4cli.inference.native_structures import Structures, described_weights
from l4cli.inference.turns import Turns
from l4cli.model import Llama4Config
from l4cli.model.text import query_scales
from l4cli.ops.batch import Batch
from l4cli.ops.choice import Choice, is_reference_forced
from l4cli.ops.moe import Routing
from l4cli.ops.weight_only import why_not as kernels_why_not
from src_kernels.cpu import engine as native

MOST_ROWS = 32  # sequences that take a token each in one call
PREFILL_CHUNK = 512  # tokens read at once: enough for each expert, and little memory


def why_not() -> str | None:
    """Why no model runs in C++ here; None when it can. raises: UsageError for a bad L4_CPU_ISA"""
    if is_reference_forced():
        return "forced by `L4_OPS=reference`"
    reason = kernels_why_not(torch.device("cpu"))
    library = native.load()
    return library if reason is None and isinstance(library, str) else reason


def instructions() -> str:
    """The processor's, that the library uses."""
    library = native.load()
    assert not isinstance(library, str), library
    return str(library.l4_cpu_isa().decode())


def decoder_choices() -> list[Choice]:
    """Which decoder answers on this machine's best device, for `l4 info --ops`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = f"not `cpp`: {device} has kernels of its own" if device != "cpu" else why_not()
    version, does = "torch", "a module after the other"
    if reason is None:
        library = native.load()
        assert not isinstance(library, str)
        of_attention = library.l4_vector_isa().decode()
        version, does = "cpp", f"a whole step in C++ ({instructions()}; attention: {of_attention})"
        reason = "the fastest there is"
    elif device == "cpu" and not reason.startswith("forced"):
        reason = f"not `cpp`: {reason}"
    return [Choice("decoder", version, does, reason, device, dtype) for dtype in ("bf16", "fp32")]


class NativeModel:
    """The interface an `Engine` uses, without modules for the text half."""

    prefill_chunk = PREFILL_CHUNK

    def __init__(
        self,
        weights: KernelFile,
        config: Llama4Config,
        vision: Any = None,
        *,
        is_prefetched: bool = False,
    ) -> None:
        """`vision`: a torch model whose picture half has weights; the text half may be meta.

        `is_prefetched`: weights may not be in memory, so experts are asked for when chosen.
        """
        library = native.load()
        assert not isinstance(library, str), library
        self.library = library
        self.config, self.vision, self.is_prefetched = config, vision, is_prefetched
        text = config.text
        self.compute_dtype = _dtype(weights.metadata["compute_dtype"])
        self.model_id: str = weights.metadata["model_id"]
        self.is_exact = weights.metadata["is_exact"] == "1"
        self.moe_layers = [i for i in range(text.num_hidden_layers) if text.is_moe(i)]
        shape = (text.vocab_size, text.hidden_size)
        kind = torch.float32 if self.is_exact else torch.int8
        self.weights = weights
        self.table_VD = weights.array("embed", kind, shape[0] * shape[1]).view(shape)
        scale = weights.array("embed_scale", torch.float32, text.vocab_size)
        self.table_scale_V1 = scale.view(-1, 1)
        self.head, self.head_form = described_weights(weights, "head")[0]
        self.structures = Structures(weights, text, is_prefetched)
        self.model = self.structures.model
        self.pasts = Pasts(text.num_key_value_heads, text.head_dim, self.compute_dtype)
        self.turns = Turns(text)
        self.scratch: dict[tuple[str, int, int], Tensor] = {}
        self.device_probe = torch.empty(0)

    # What `Engine` asks of a module.

    def eval(self) -> NativeModel:
        return self

    @property
    def instructions(self) -> str:
        """The processor's, that are used."""
        return instructions()

    def parameters(self) -> Iterator[Tensor]:
        """Something that tells the device."""
        yield self.device_probe

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """What the first layer reads, pictures fused in. shapes: [B, T] -> h_BTD fp32"""
        h_BTD = self.table_VD[input_ids]
        if not self.is_exact:
            h_BTD = h_BTD.float().mul_(self.table_scale_V1[input_ids])
        if pixel_values is None:
            return h_BTD
        assert self.vision is not None, "the engine checks that the model can see"
        features = self.vision.picture_features(pixel_values)
        return self.vision.fuse(h_BTD, input_ids, features.float())

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits in fp32. shapes: [..., D] -> [..., V]"""
        x_MD = hidden.float().reshape(-1, hidden.shape[-1]).contiguous()
        num_rows, threads = len(x_MD), torch.get_num_threads()
        head = self.head
        logits_MV = torch.empty(num_rows, head.rows)
        size = self.library.l4_rows_bytes(num_rows, head.cols, self.head_form)
        scratch = torch.empty(size, dtype=torch.uint8)
        failed = self.library.l4_linear(
            byref(head),
            x_MD.data_ptr(),
            head.cols,
            num_rows,
            logits_MV.data_ptr(),
            head.rows,
            scratch.data_ptr(),
            threads,
        )
        assert not failed
        return logits_MV.view(*hidden.shape[:-1], head.rows)

    def hidden(
        self,
        batch: Batch,
        cache: Any,
        routing: Routing | None = None,
        num_needed: int | None = None,
    ) -> Tensor:
        """The normed states that `lm_head` reads: all, or the last. shapes: -> h_BTD fp32"""
        h_BTD = self.embed(batch.input_ids, batch.pixel_values)
        rows = _rows_of(cache)
        num_rows, length, _ = h_BTD.shape
        if length == 1 and num_needed != 0 and rows is not None and num_rows <= MOST_ROWS:
            return self._step(h_BTD, batch.position_ids, rows, routing)
        return self._run(h_BTD, batch.position_ids, cache, routing, num_needed)

    # One token a row.

    def _step(
        self, h_B1D: Tensor, positions_B1: Tensor, rows: list[Cache], routing: Routing | None
    ) -> Tensor:
        positions = positions_B1.flatten().tolist()
        threads, num_rows = torch.get_num_threads(), len(rows)
        found = [self.turns.at(position) for position in positions]
        turns = torch.tensor([pair for _, pair in found], dtype=torch.int64)
        temperature, log_length = self._query_scales(positions_B1)
        pasts = pointers([self.pasts.of(cache) for cache in rows])
        out_B1D = torch.empty_like(h_B1D)
        logits = experts = None
        if routing is not None:
            text, num_moe = self.config.text, len(self.moe_layers)
            logits = torch.empty(num_moe, num_rows, text.num_local_experts)
            experts = torch.empty(num_moe, num_rows, text.num_experts_per_tok, dtype=torch.int64)
        step = native.Step(
            num_rows,
            threads,
            h_B1D.data_ptr(),
            turns.data_ptr(),
            temperature.data_ptr(),
            log_length.data_ptr(),
            pasts.data_ptr(),
            out_B1D.data_ptr(),
            None if logits is None else logits.data_ptr(),
            None if experts is None else experts.data_ptr(),
            self._scratch("l4_step_bytes", num_rows, threads).data_ptr(),
        )
        self.library.l4_step(byref(self.model), byref(step))
        for cache in rows:
            self.pasts.taken(cache)
        if routing is not None:
            assert logits is not None
            assert experts is not None
            for at, layer_idx in enumerate(self.moe_layers):
                routing.record(layer_idx, logits[at].unsqueeze(1), experts[at].unsqueeze(1))
        return out_B1D

    # Runs of tokens.

    def _run(
        self,
        h_BTD: Tensor,
        positions_BT: Tensor,
        cache: Any,
        routing: Routing | None,
        num_needed: int | None,
    ) -> Tensor:
        last = self.config.text.num_hidden_layers - 1
        num_rows, length, width = h_BTD.shape
        turns = [turn.contiguous() for turn in self.turns.of(positions_BT)]
        temperature, log_length = self._query_scales(positions_BT)
        h_MD = h_BTD.reshape(-1, width).contiguous()
        room = self._room(num_rows, length)
        run = native.Run(num_rows * length, torch.get_num_threads(), 0, h_MD.data_ptr())
        run.turns[0], run.turns[1] = turns[0].data_ptr(), turns[-1].data_ptr()
        run.temperature, run.log_length = temperature.data_ptr(), log_length.data_ptr()
        run.q, run.k, run.v = (x.data_ptr() for x in (room.q, room.k, room.v))
        run.scratch = self._scratch("l4_layer_bytes", run.num_tokens, run.threads).data_ptr()
        rows = _rows_of(cache)
        own = rows[0].layers if rows is not None and num_rows == 1 else None
        if own is not None:
            kept = self.kept_like(own[0], length)
            run.kept_k, run.kept_v = kept[0].data_ptr(), kept[1].data_ptr()
            run.kept_kind = int(kept[0].dtype == torch.bfloat16)
        first = 0
        for i in range(last + 1):
            if i == last and num_needed is not None and num_rows == 1:
                first = run.first_query = length - num_needed
            self.library.l4_before_attention(byref(self.model), i, byref(run))
            if own is not None:
                out = self._attend(own[i], room, kept, first)
            else:
                new = (x.to(self.compute_dtype) for x in (room.q[:, : length - first], room.k))
                out = cache.attend(i, *new, room.v.to(self.compute_dtype)).float().contiguous()
            run.out = out.data_ptr()
            logits, experts = self._choices(num_rows, length - first, i, routing, run)
            self.library.l4_after_attention(byref(self.model), i, byref(run))
            if logits is not None and experts is not None and routing is not None:
                routing.record(i, logits, experts)
        kept_MD = h_MD[first:]
        out_MD = torch.empty_like(kept_MD)
        self.library.l4_final_norm(
            byref(self.model), kept_MD.data_ptr(), len(kept_MD), out_MD.data_ptr()
        )
        out_BTD = out_MD.view(num_rows, -1, width) if len(out_MD) else out_MD.view(1, 0, width)
        return out_BTD if num_needed is None else out_BTD[:, out_BTD.shape[1] - num_needed :]

    def _room(self, num_rows: int, length: int) -> _Room:
        text = self.config.text
        kv_heads = text.num_key_value_heads
        heads = (text.num_attention_heads, kv_heads, kv_heads, text.num_attention_heads)
        return _Room(*(torch.empty(num_rows, length, n, text.head_dim) for n in heads))

    def kept_like(self, layer: LayerCache, length: int) -> Plain:
        """Room for new keys and values by head, in the dtype a cache keeps them in."""
        text = self.config.text
        dtype = layer.options.float_dtype(self.compute_dtype)
        shape = (text.num_key_value_heads, length, text.head_dim)
        return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def _attend(self, layer: LayerCache, room: _Room, kept: Plain, first: int) -> Tensor:
        """Attend to a layer's past and to the new tokens, which it then takes in.

        Queries are those of the tokens from `first` on. shapes: -> [T - first, N, H]
        """
        keys, values = kept
        threads, size = torch.get_num_threads(), room.q[0, 0].numel() * 4
        scratch = self._scratch("l4_attend_bytes", 0, threads)
        for run in runs_in_chunks(layer.num_tokens, keys.shape[1], layer.chunk_size):
            start = max(run.start, first)
            if start < run.stop:
                before = layer.parts()
                if run.start < start:
                    before.append((keys[:, run.start : start], values[:, run.start : start]))
                parts = described(before)
                new = (keys[:, start : run.stop], values[:, start : run.stop])
                at = (start - first) * size
                args = native.Attend(
                    run.stop - start,
                    threads,
                    len(parts),
                    parts,
                    described([new])[0],
                    room.q.data_ptr() + at,
                    room.out.data_ptr() + at,
                    scratch.data_ptr(),
                )
                self.library.l4_attend(byref(self.model), byref(args))
            layer.store(*(x[:, run].transpose(0, 1) for x in kept))
        return room.out

    def _choices(
        self, num_rows: int, length: int, layer_idx: int, routing: Routing | None, run: native.Run
    ) -> tuple[Tensor | None, Tensor | None]:
        """Room for what the router says, where somebody wants to know."""
        run.router_logits = run.experts = None
        if routing is None or layer_idx not in self.moe_layers:
            return None, None
        text = self.config.text
        logits = torch.empty(num_rows, length, text.num_local_experts)
        experts = torch.empty(num_rows, length, text.num_experts_per_tok, dtype=torch.int64)
        run.router_logits, run.experts = logits.data_ptr(), experts.data_ptr()
        return logits, experts

    def _query_scales(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`query_scales`, ones where the model has none: C reads numbers."""
        plain = torch.ones(positions.shape)
        found = query_scales(self.config.text, positions)
        temperature, log_length = (plain if scale is None else scale for scale in found)
        return temperature, log_length

    def _scratch(self, what: str, num_tokens: int, threads: int) -> Tensor:
        """Room for what lies between the phases; kept for the next call of this size."""
        key = (what, num_tokens, threads)
        found = self.scratch.get(key)
        if found is None:
            counts = (num_tokens, threads) if num_tokens else (threads,)
            size = getattr(self.library, what)(byref(self.model), *counts)
            found = torch.empty(size, dtype=torch.uint8)
            self.scratch = {k: v for k, v in self.scratch.items() if k[0] != what}
            self.scratch[key] = found
        return found


class _Room(NamedTuple):
    """What goes into attention and comes out, fp32. shapes: [B, T, N or K, H]"""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def _rows_of(cache: Any) -> list[Cache] | None:
    """The sequences of a cache whose attention the decoder can do itself."""
    rows = [cache] if isinstance(cache, Cache) else None
    if isinstance(cache, CacheBatch):
        rows = cache.rows
    return rows if rows is not None and all(map(is_readable, rows)) else None


def _dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
