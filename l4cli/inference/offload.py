"""Keep experts in host memory and bring to the device those that the router calls.

in: a model whose experts are on the host and all else on the device; out: the same model, which
copies experts on a stream of their own and keeps the most recently used
source: guessing the next layer's experts from this layer's input: arXiv 2312.17238
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l4cli.checkpoint import load_config, load_weights
from l4cli.errors import L4Error
from l4cli.model import Llama4ForCausalLM, Llama4ForConditionalGeneration, build_model
from l4cli.model.text import Experts, MoE
from l4cli.ops.moe import in_turn
from l4cli.ops.swiglu import swiglu
from l4cli.planning import available_memory

GUESS_TOKENS = 8  # more tokens at once call nearly every expert: nothing to guess
# Above it the C library gives every tensor pages of its own; smaller ones share theirs.
_OWN_PAGES = 2**25

Key = tuple[int, int]  # layer, expert


class Slot:
    """Room for one expert on the device, and when it is filled and free again."""

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        self.tensors = [torch.empty_like(tensor, device=device) for tensor in like]
        self.filled: Any = None  # CUDA events; None: nothing to wait for
        self.read: Any = None


class ExpertPool:
    """The experts on the device; of those that nobody waits for, the least recently used goes."""

    def __init__(self, like: Sequence[Tensor], num_slots: int, device: torch.device) -> None:
        self.device = device
        self.free = [Slot(like, device) for _ in range(num_slots)]
        self.num_slots = num_slots
        self.held: OrderedDict[Key, Slot] = OrderedDict()
        self.wanted: set[Key] = set()  # of the layer at work, not yet computed with
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # what lay in this memory before may still be read
            self.stream.wait_stream(torch.cuda.current_stream(device))
            for slot in self.free:  # nor is it given away while a guess is still being copied in
                for tensor in slot.tensors:
                    tensor.record_stream(self.stream)
        self.num_copies = self.num_found = 0

    def start(self, key: Key, tensors: Sequence[Tensor], *, is_guess: bool = False) -> bool:
        """Begin to copy an expert in, if it is not there and there is room that may be taken."""
        if key in self.held:
            if not is_guess:
                self.held.move_to_end(key)
            return True
        slot = self._room()
        if slot is None:
            return False
        self.num_copies += 1
        self.held[key] = slot
        if self.stream is None:
            for room, tensor in zip(slot.tensors, tensors, strict=True):
                room.copy_(tensor)
            return True
        if slot.read is not None:
            self.stream.wait_event(slot.read)
        with torch.cuda.stream(self.stream):
            for room, tensor in zip(slot.tensors, tensors, strict=True):
                room.copy_(tensor, non_blocking=True)
            slot.filled = self.stream.record_event()
        return True

    @contextlib.contextmanager
    def using(self, key: Key) -> Any:
        """An expert's tensors, to compute with now."""
        slot = self.held[key]
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        yield slot.tensors
        if self.stream is not None:
            slot.read = torch.cuda.current_stream(self.device).record_event()
        self.wanted.discard(key)

    def _room(self) -> Slot | None:
        """A slot that is free, or of the expert that was not used for longest."""
        if self.free:
            return self.free.pop()
        for key in self.held:
            if key not in self.wanted:
                return self.held.pop(key)
        return None


class OffloadedExperts(nn.Module):
    """Routed experts whose weights lie on the host."""

    def __init__(self, experts: Experts, layer_idx: int, pool: ExpertPool) -> None:
        super().__init__()
        self.layer_idx, self.pool = layer_idx, pool
        stored = [experts.gate_up_proj.detach(), experts.down_proj.detach()]
        if pool.stream is not None:  # only from pinned memory a copy runs beside the computing
            stored = [_pinned(tensor, self, pool.stream) for tensor in stored]
        self.weights = list(zip(*stored, strict=True))  # of each expert: [D, 2F], [F, D]
        self.waiting: list[int] = []

    def announce(self, called: Iterable[int]) -> None:
        """Begin to bring in what a router has called; those that are there go first."""
        there: list[int] = []
        away: list[int] = []
        for expert in sorted(set(called)):
            (there if (self.layer_idx, expert) in self.pool.held else away).append(expert)
        self.pool.num_found += len(there)
        self.pool.wanted = {(self.layer_idx, expert) for expert in there}
        self.waiting = [*there, *away]
        for expert in there:
            self.pool.start((self.layer_idx, expert), self.weights[expert])
        self._start_more()

    def guess(self, called: Iterable[int]) -> None:
        """Begin to bring in what may be called next, where nobody needs the room."""
        for expert in dict.fromkeys(called):
            self.pool.start((self.layer_idx, expert), self.weights[expert], is_guess=True)

    def forward(self, x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor) -> Tensor:
        return in_turn(x_MD, gate_MA, expert_MA, len(self.weights), self._run_all)

    def _run_all(self, rows: list[Tensor]) -> list[Tensor]:
        """Each expert's rows in its place, in the order in which the experts arrive."""
        called = [expert for expert, run in enumerate(rows) if len(run)]
        if sorted(self.waiting) != called:
            self.announce(called)
        while self.waiting:
            expert = self.waiting.pop(0)
            key = (self.layer_idx, expert)
            is_there = self.pool.start(key, self.weights[expert])
            assert is_there, "every slot is waited for"
            with self.pool.using(key) as (w_in_DF, w_out_FD):
                dtype = rows[expert].dtype
                gate_RF, up_RF = (rows[expert] @ w_in_DF.to(dtype)).chunk(2, dim=-1)
                rows[expert] = swiglu(gate_RF, up_RF) @ w_out_FD.to(dtype)
            self._start_more()
        return rows

    def _start_more(self) -> None:
        """As many copies ahead as there is room for."""
        for expert in self.waiting:
            key = (self.layer_idx, expert)
            if not self.pool.start(key, self.weights[expert]):
                return
            self.pool.wanted.add(key)


def _pinned(tensor: Tensor, owner: Any, stream: Any) -> Tensor:
    """The same in locked memory, until `owner` goes.

    A large one is locked where it lies: `pin_memory` would copy, and round up to a power of two.
    """
    if tensor.nbytes <= _OWN_PAGES:
        return tensor.pin_memory()
    cuda = torch.cuda.cudart()
    torch.cuda.check_error(cuda.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    # What stays locked when its memory is given back cannot be locked again by the next owner.
    weakref.finalize(owner, _unlock, tensor.data_ptr(), stream).atexit = False
    return tensor


def _unlock(address: int, stream: Any) -> None:
    stream.synchronize()  # a guess may still be on its way
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


class Forecast:
    """Listens to a layer's router: tells its experts, and those of the next layer, to get ready."""

    def __init__(self, moe: MoE, following: MoE | None) -> None:
        self.moe, self.following = moe, following

    def __call__(self, router: nn.Module, inputs: tuple[Tensor, ...], logits_ME: Tensor) -> None:
        num_chosen = self.moe.num_experts_per_tok
        calls = [logits_ME.topk(num_chosen).indices]
        if self.following is not None and len(logits_ME) <= GUESS_TOKENS:
            # States change little from layer to layer. `forward`: nobody must listen to this.
            guess_ME = self.following.router.forward(inputs[0])
            calls.append(guess_ME.topk(num_chosen).indices)
        called, *guessed = torch.stack(calls).tolist()  # the host waits once for both
        _experts_of(self.moe).announce(expert for row in called for expert in row)
        if self.following is not None:
            for rows in guessed:
                _experts_of(self.following).guess(expert for row in rows for expert in row)


def _experts_of(moe: MoE) -> OffloadedExperts:
    assert isinstance(moe.experts, OffloadedExperts)
    return moe.experts


def open_offloaded(
    path: Path | str,
    device: torch.device,
    dtype: torch.dtype | None,
    memory_bytes: int | None = None,
) -> Any:
    """A checkpoint's model with its experts on the host; by default half of what is free holds
    some of them."""
    model = build_model(load_config(path), device="meta")
    load_weights(model, path, device=device, dtype=dtype, only=lambda name: not _is_expert(name))
    load_weights(model, path, device="cpu", dtype=dtype, only=_is_expert)
    model.compute_dtype = _text(model).embed_tokens.weight.dtype
    if memory_bytes is None:
        memory_bytes = available_memory(str(device)) // 2
    offload_experts(model, device, memory_bytes)
    return model


def _text(model: Any) -> Any:
    return getattr(model, "language_model", model).model


def _is_expert(name: str) -> bool:
    return ".experts." in name


def offload_experts(
    model: Llama4ForCausalLM | Llama4ForConditionalGeneration,
    device: torch.device,
    memory_bytes: int,
) -> ExpertPool:
    """Let a model compute on `device` with its experts on the host, some copied at a time.

    raises: L4Error where so much memory holds too few experts. It can no longer be trained
    """
    blocks = [layer.feed_forward for layer in _text(model).layers if layer.is_moe]
    if not blocks:
        why = "the model has none: every layer is dense"
        raise L4Error("cannot offload experts", why=why, fix="leave `--offload` out")
    first = blocks[0].experts
    like = (first.gate_up_proj.detach()[0], first.down_proj.detach()[0])
    size = sum(tensor.nbytes for tensor in like)
    num_experts = sum(len(block.experts.down_proj) for block in blocks)
    num_slots = min(memory_bytes // size, num_experts)
    if num_slots < 2:
        why = f"it holds {num_slots} of {size} bytes, and one is computed with while one arrives"
        fix = f"give at least `--offload-memory {2 * size}`"
        raise L4Error(f"{memory_bytes} bytes hold too few experts", why=why, fix=fix)
    pool = ExpertPool(like, num_slots, device)
    for block in blocks:
        block.experts = OffloadedExperts(block.experts, block.layer_idx, pool)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        block.router.register_forward_hook(Forecast(block, following))
    return pool
