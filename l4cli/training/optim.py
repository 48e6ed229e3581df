"""AdamW and Muon behind one face: one step, one flat dictionary of state tensors.

in: named parameters with gradients; out: updated parameters (fp32 masters)
source: torch.optim.AdamW (fused) and torch.optim.Muon of torch 2.13, whose arithmetic Muon here
repeats bit for bit, batched over equal shapes and over the experts of a fused tensor;
`match_rms_adamw` (arXiv 2502.16982) lets one learning rate serve both
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("adamw", "muon")

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MAX_STACK = 2**26  # elements orthogonalised at once: 128 MiB in bf16
# Vectors in disguise: rows looked up or compared one by one, not maps between hidden states.
_NOT_HIDDEN = (
    "embed_tokens.weight",
    "positional_embedding_vlm",
    "class_embedding",
    "feed_forward.router.weight",
)

# Calls a function with each item, in any order, perhaps several at once.
Each = Callable[[Callable[[Any], None], Sequence[Any]], None]


def one_by_one(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """The plain `Each`."""
    for item in items:
        work(item)


@dataclass(frozen=True)
class OptimizerOptions:
    """What `--optim` and its neighbours say."""

    kind: str = "adamw"  # one of KINDS
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # of Muon, with Nesterov's look ahead


def parameter_group(name: str, parameter: Tensor) -> str:
    """Name the group of a parameter: `hidden` (Muon's), `head` or `vector` (no weight decay)."""
    if parameter.ndim < 2 or name.endswith(_NOT_HIDDEN):
        return "vector"
    return "head" if name.endswith("lm_head.weight") else "hidden"


class Optimizer:
    """AdamW for everything, or Muon for hidden matrices and AdamW for the rest.

    Parameters without a gradient (the vision tower in a step without pictures) are left alone.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions
    ) -> None:
        assert options.kind in KINDS
        self.parameters = {n: p for n, p in named_parameters if p.requires_grad}
        groups: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in self.parameters.items():
            groups[parameter_group(name, parameter)][name] = parameter
        uses_muon = options.kind == "muon" and bool(groups["hidden"])
        self.muon = Muon(groups.pop("hidden"), options) if uses_muon else None
        decay = {"vector": 0.0}
        self._adamw = torch.optim.AdamW(
            [
                {"params": list(g.values()), "weight_decay": decay.get(k, options.weight_decay)}
                for k, g in groups.items()
                if g
            ],
            lr=0.0,  # set at every step
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=True,
        )

    def step(self, lr: float, each: Each = one_by_one) -> None:
        """Apply the gradients at this learning rate; `each` runs what is independent."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        if self.muon is not None:
            self.muon.step(lr, each)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """State tensors by `PARAMETER.exp_avg` and the like, no copies; none before a step."""
        state = {} if self.muon is None else self.muon.state_dict()
        for name, parameter in self.parameters.items():
            for key, tensor in self._adamw.state.get(parameter, {}).items():
                state[f"{name}.{key}"] = tensor.reshape(1) if key == "step" else tensor
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for full_name, tensor in state.items():
            name, _, key = full_name.rpartition(".")
            parameter = self.parameters[name]
            if key == "momentum_buffer":
                assert self.muon is not None
                self.muon.momentum[name] = tensor.to(parameter.device, copy=True)
            elif key == "step":
                # Counts live where the fused kernel wants them: beside the parameter.
                own = tensor.reshape(()).to(parameter.device, torch.float32, copy=True)
                self._adamw.state[parameter][key] = own
            else:
                self._adamw.state[parameter][key] = tensor.to(parameter.device, copy=True)


class Muon:
    """Momentum, made orthogonal by Newton-Schulz, matrix by matrix but many at a time."""

    def __init__(self, parameters: dict[str, nn.Parameter], options: OptimizerOptions) -> None:
        self.parameters, self.options = parameters, options
        self.momentum: dict[str, Tensor] = {}
        self.dtype = _iteration_dtype(next(iter(parameters.values())).device)

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum tensors by `PARAMETER.momentum_buffer`, no copies."""
        return {f"{name}.momentum_buffer": tensor for name, tensor in self.momentum.items()}

    @torch.no_grad()
    def step(self, lr: float, each: Each = one_by_one) -> None:
        """Decay and update every parameter that has a gradient."""
        named = [(n, p) for n, p in self.parameters.items() if p.grad is not None]
        if not named:
            return
        for name, parameter in named:
            if name not in self.momentum:
                self.momentum[name] = torch.zeros_like(parameter)
        parameters: list[Tensor] = [p for _, p in named]
        grads = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.momentum[name] for name, _ in named]
        torch._foreach_lerp_(buffers, grads, 1 - self.options.momentum)
        torch._foreach_mul_(parameters, 1 - lr * self.options.weight_decay)
        pieces: dict[tuple[torch.device, int, int], list[_Piece]] = defaultdict(list)
        for (name, parameter), grad, buffer in zip(named, grads, buffers, strict=True):
            for views in zip(*(_matrices(name, t) for t in (parameter, grad, buffer)), strict=True):
                piece = _Piece(*views)
                pieces[parameter.device, *piece.shape].append(piece)
        each(
            lambda stack: self._update(stack, lr),
            [stack for same in pieces.values() for stack in _stacks(same)],
        )

    @torch.no_grad()  # once more: a thread of its own knows nothing of its caller's
    def _update(self, stack: list[_Piece], lr: float) -> None:
        rows, cols = stack[0].shape
        num_matrices = sum(len(piece.parameter) for piece in stack)
        x = torch.empty(
            num_matrices, rows, cols, dtype=self.dtype, device=stack[0].parameter.device
        )
        start = 0
        for piece in stack:
            end = start + len(piece.parameter)
            x[start:end] = piece.wide(piece.grad.lerp(piece.momentum, self.options.momentum))
            start = end
        x = orthogonalize(x)
        # 0.2 sqrt(larger side): the update's root mean square becomes that of AdamW.
        step_size = lr * 0.2 * math.sqrt(cols)
        start = 0
        for piece in stack:
            end = start + len(piece.parameter)
            piece.wide(piece.parameter).add_(x[start:end], alpha=-step_size)
            start = end


@dataclass(frozen=True)
class _Piece:
    """Equal matrices of one parameter: views [n, A, B] of it, its gradient and its momentum."""

    parameter: Tensor
    grad: Tensor
    momentum: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns once laid wide, so that a matrix and its transpose share a stack."""
        rows, cols = self.parameter.shape[1:]
        return min(rows, cols), max(rows, cols)

    def wide(self, matrices: Tensor) -> Tensor:
        return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


def _matrices(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """The matrices inside a parameter; gate and up of fused experts are apart."""
    if name.endswith("gate_up_proj"):
        return tensor.chunk(2, dim=-1)
    return (tensor.unsqueeze(0),) if tensor.ndim == 2 else (tensor,)


def _stacks(pieces: list[_Piece]) -> Iterable[list[_Piece]]:
    """Split equal pieces into stacks of bounded size (one piece may be larger)."""
    stack: list[_Piece] = []
    size = 0
    for piece in pieces:
        if stack and size + piece.parameter.numel() > _MAX_STACK:
            yield stack
            stack, size = [], 0
        stack.append(piece)
        size += piece.parameter.numel()
    yield stack


def _iteration_dtype(device: torch.device) -> torch.dtype:
    """bf16 as in torch, since singular values only have to come near one; fp32 where it is faster.

    On a CPU without bf16 products they run at a half to a sixth of the fp32 rate.
    """
    has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def orthogonalize(x: Tensor) -> Tensor:
    """Bring the singular values of each matrix near one. shapes: [n, rows <= cols] -> same"""
    a, b, c = _NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norm.clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x
