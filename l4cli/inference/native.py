"""A model whose text half runs in C++ from packed weights; stands where a torch model stands.

in: a `KernelFile`, a `Batch`, a cache; out: normed states, logits. Only answers: no gradients
A token a row goes through all layers in one call; longer runs go layer by layer, with attention by
the cache as ever. Pictures are embedded by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import src_kernels.cpu as kernels
from l4cli.inference.cache import Cache, CacheBatch
from l4cli.inference.kept import Plain
from l4cli.inference.kernel_file import KernelFile
from l4cli.inference.layer_cache import LayerCache
from l4cli.inference.native_past import Pasts, described, is_readable, pointers, runs_in_chunks
from l4cli.model import Llama4Config
from l4cli.model.config import RopeOptions, TextConfig
from l4cli.ops.batch import Batch
from l4cli.ops.choice import is_reference_forced
from l4cli.ops.moe import Routing
from l4cli.ops.rope import attention_factor, inverse_frequencies, rotation
from l4cli.ops.weight_only import KINDS, Layout
from src_kernels.cpu import engine as native

MOST_ROWS = 32  # sequences that take a token each in one call
PREFILL_CHUNK = 512  # tokens read at once: enough for each expert, and little memory
_TURNS = 1024  # positions whose rotations are made together


def why_not() -> str | None:
    """Why no model runs in C++ here; None when it can."""
    if is_reference_forced():
        return "forced by `L4_OPS=reference`"
    library = native.load()
    return library if isinstance(library, str) else None


class NativeModel:
    """The interface an `Engine` uses, without modules for the text half."""

    prefill_chunk = PREFILL_CHUNK

    def __init__(self, weights: KernelFile, config: Llama4Config, vision: Any = None) -> None:
        """`vision`: a torch model whose picture half has weights; the text half may be meta."""
        library = native.load()
        assert not isinstance(library, str), library
        self.library = library
        self.weights, self.config, self.vision = weights, config, vision
        text = config.text
        self.compute_dtype = _dtype(weights.metadata.get("compute_dtype", "bf16"))
        self.model_id: str = weights.metadata["model_id"]
        shape = (text.vocab_size, text.hidden_size)
        self.is_exact = weights.metadata.get("is_exact") == "1"
        kind = torch.float32 if self.is_exact else torch.int8
        self.table_VD = weights.array("embed", kind, shape[0] * shape[1]).view(shape)
        scale = weights.array("embed_scale", torch.float32, text.vocab_size)
        self.table_scale_V1 = scale.view(-1, 1)
        self.head = _weights(weights, "head")[0]
        self.is_moe = [text.is_moe(i) for i in range(text.num_hidden_layers)]
        self.layers = (native.Layer * text.num_hidden_layers)()
        self.kept: list[Any] = []  # arrays that structures point to
        for i in range(text.num_hidden_layers):
            self._describe_layer(i)
        self.model = self._describe_model()
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
        return str(self.library.l4_cpu_isa().decode())

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
        head, form = self.head
        logits_MV = torch.empty(num_rows, head.rows)
        size = self.library.l4_rows_bytes(num_rows, head.cols, form)
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
        text, num_moe = self.config.text, sum(self.is_moe)
        logits = experts = None
        if routing is not None:
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
            layers = [i for i, is_moe in enumerate(self.is_moe) if is_moe]
            for at, layer_idx in enumerate(layers):
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
        if routing is None or not self.is_moe[layer_idx]:
            return None, None
        text = self.config.text
        logits = torch.empty(num_rows, length, text.num_local_experts)
        experts = torch.empty(num_rows, length, text.num_experts_per_tok, dtype=torch.int64)
        run.router_logits, run.experts = logits.data_ptr(), experts.data_ptr()
        return logits, experts

    def _query_scales(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What NoPE layers' queries are multiplied with: a temperature, ln of how many keys."""
        config, p = self.config.text, positions.float() + 1
        if not config.attn_temperature_tuning:
            return torch.ones_like(p), p.log()
        return 1 + config.attn_scale * (p / config.floor_scale).floor().log1p(), p

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

    # Structures.

    def _describe_layer(self, i: int) -> None:
        text, layer = self.config.text, self.layers[i]
        for letter in "qkvo":
            setattr(layer, letter, _weights(self.weights, f"{i}.{letter}_proj")[0][0])
        layer.input_norm = self.weights.place(f"{i}.input_norm")
        layer.post_norm = self.weights.place(f"{i}.post_norm")
        layer.uses_rope = text.uses_rope(i)
        layer.turn = 0 if text.is_local(i) else 1
        layer.unit_norm = text.rope_of(i).use_qk_norm
        if text.scalable_softmax and not text.uses_rope(i):
            layer.softmax_scale = self.weights.place(f"{i}.softmax_scale")
        layer.gate, layer.up, layer.down = (w for w, _ in _weights(self.weights, f"{i}.mlp"))
        layer.is_moe = text.is_moe(i)
        if text.is_moe(i):
            layer.router = self.weights.place(f"{i}.router")
            experts = (kernels.Weight * (3 * text.num_local_experts))()
            for e in range(text.num_local_experts):
                for j, (weight, _) in enumerate(_weights(self.weights, f"{i}.experts.{e}")):
                    experts[3 * e + j] = weight
            self.kept.append(experts)
            layer.experts = experts

    def _describe_model(self) -> native.Model:
        text = self.config.text
        return native.Model(
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            text.num_hidden_layers,
            text.num_local_experts,
            text.num_experts_per_tok,
            text.intermediate_size,
            text.intermediate_size_mlp,
            text.rms_norm_eps,
            0,
            self.layers,
            self.weights.place("norm"),
        )


class _Room(NamedTuple):
    """What goes into attention and comes out, fp32. shapes: [B, T, N or K, H]"""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


@dataclass(frozen=True)
class _Rope:
    inverse: Tensor
    length: float


class Turns:
    """Rotations by position: of local layers, and of full ones where they differ."""

    def __init__(self, config: TextConfig) -> None:
        layers = [i for i in range(config.num_hidden_layers) if config.uses_rope(i)]
        kinds = [RopeOptions(config.rope_theta, config.rope_scaling, config.use_qk_norm)]
        kinds += [r for r in map(config.rope_of, layers) if r != kinds[0]][:1]
        self.ropes = []
        for rope in kinds:
            inverse = inverse_frequencies(config.head_dim, rope.theta, rope.scaling)
            length = 1.0 if rope.use_qk_norm else attention_factor(rope.scaling)
            self.ropes.append(_Rope(inverse, length))
        self.tables: dict[int, list[Tensor]] = {}

    def of(self, positions_BT: Tensor) -> list[Tensor]:
        """shapes: -> complex64 [B, T, H / 2], one or two of them"""
        return [rotation(positions_BT, rope.inverse, rope.length) for rope in self.ropes]

    def at(self, position: int) -> tuple[list[Tensor], tuple[int, int]]:
        """One position's, and their addresses. Tables are made for many positions at once."""
        block, offset = divmod(position, _TURNS)
        tables = self.tables.get(block)
        if tables is None:
            if len(self.tables) >= 2 * MOST_ROWS:
                self.tables.clear()
            first = block * _TURNS
            tables = [t[0] for t in self.of(torch.arange(first, first + _TURNS)[None])]
            self.tables[block] = tables
        row_bytes = tables[0].shape[1] * 8
        addresses = [table.data_ptr() + offset * row_bytes for table in tables]
        return tables, (addresses[0], addresses[-1])


def _weights(file: KernelFile, name: str) -> list[tuple[kernels.Weight, int]]:
    """The weights of a blob as C reads them, and the form of rows each wants."""
    return [(_weight(layout, address), _form(layout)) for layout, address in file.weights(name)]


def _weight(layout: Layout, address: int) -> kernels.Weight:
    shape = (layout.num_outputs, layout.num_inputs)
    return kernels.Weight(
        address, KINDS[layout.kind], *shape, layout.group_size, int(layout.has_zero)
    )


def _form(layout: Layout) -> int:
    forms = {"fp32": kernels.AS_FP32, "bf16": kernels.AS_BF16}
    return forms.get(layout.kind, kernels.AS_INT8)


def _rows_of(cache: Any) -> list[Cache] | None:
    """The sequences of a cache whose attention the decoder can do itself."""
    rows = [cache] if isinstance(cache, Cache) else None
    if isinstance(cache, CacheBatch):
        rows = cache.rows
    return rows if rows is not None and all(map(is_readable, rows)) else None


def _dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
