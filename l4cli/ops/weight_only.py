"""A linear map whose weight stays int4, int8 or bf16 in memory, in the layout of the CPU kernels.

in: x [..., I] and a weight [O, I] laid out once as bytes; out: y [..., O] as x's dtype
The contract: weights count exactly, (code - zero) * scale; for int4 and int8 each 32 inputs of a
token are rounded to int8 with a scale of their own (about 5e-3 of the result), for bf16 to bf16.
The reference rounds no inputs. The layout is written down in src_kernels/cpu/linear.h.
"""

from __future__ import annotations

import functools
from ctypes import CDLL, byref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import src_kernels.cpu as kernels
from l4cli import terminal
from l4cli.errors import L4Error, UsageError
from l4cli.ops.choice import REFERENCE, Op, Version, forced

LAYOUT_VERSION = kernels.LAYOUT_VERSION
ALIGNMENT = 64  # of every block, so of a weight's first byte too
BLOCK = 16  # outputs that lie together
SEGMENT = 4  # groups whose scales lie together, in front of their codes
GROUP_SIZES = (32, 64, 128)  # inputs that can share a scale
_FILL = 32  # inputs are filled up to a multiple
KINDS = {
    "fp32": kernels.FP32,
    "bf16": kernels.BF16,
    "int8": kernels.INT8,
    "int4": kernels.INT4,
}
_FORMS = {
    "fp32": kernels.AS_FP32,
    "bf16": kernels.AS_BF16,
    "int8": kernels.AS_INT8,
    "int4": kernels.AS_INT8,
}
_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LayoutError(L4Error):
    """There is no layout that keeps a weight exactly."""


@dataclass(frozen=True)
class Layout:
    """What the bytes of a laid out weight mean."""

    kind: str  # of KINDS
    num_outputs: int
    num_inputs: int
    group_size: int = 0  # inputs that share a scale; 0: all (int8), or none (fp32, bf16)
    has_zero: bool = False  # int4 only

    @property
    def num_blocks(self) -> int:
        """Blocks of 16 outputs."""
        return -(-self.num_outputs // BLOCK)

    @property
    def block_bytes(self) -> int:
        """Of a block of 16 outputs."""
        num_entries = _up(self.num_inputs, _FILL) * BLOCK
        if self.kind in _FLOATS:
            return num_entries * _FLOATS[self.kind].itemsize
        num_bytes = num_entries // 2 if self.kind == "int4" else num_entries
        if not self.group_size:
            return num_bytes + 4 * BLOCK
        whole, last = divmod(self.num_inputs // self.group_size, SEGMENT)
        headers = whole * self.header_bytes(SEGMENT) + self.header_bytes(last)
        return _up(num_bytes + headers, ALIGNMENT)

    def header_bytes(self, num_groups: int) -> int:
        """Of the scales and zero points in front of the codes of some groups."""
        return _up(num_groups * BLOCK * (3 if self.has_zero else 2), ALIGNMENT)

    def segments(self) -> list[tuple[int, int, int]]:
        """Equal pieces of a block. out: first byte, number of pieces, groups in each"""
        num_groups = self.num_inputs // self.group_size if self.group_size else 1
        whole, last = divmod(num_groups, SEGMENT)
        if not self.group_size:
            return [(0, 1, 1)]
        end = whole * self.segment_bytes(SEGMENT)
        pieces = [(0, whole, SEGMENT), (end, 1, last)]
        return [piece for piece in pieces if piece[1] and piece[2]]

    def segment_bytes(self, num_groups: int) -> int:
        """Of some groups with their header."""
        if not self.group_size:
            return self.block_bytes
        codes = num_groups * self.group_size * BLOCK
        return self.header_bytes(num_groups) + codes // (2 if self.kind == "int4" else 1)

    @property
    def num_bytes(self) -> int:
        """Of the whole weight."""
        return self.num_blocks * self.block_bytes

    def problem(self) -> str | None:
        """Why there is no such layout; None when there is."""
        if self.kind not in KINDS:
            return f"no layout for `{self.kind}`, only for {', '.join(KINDS)}"
        if self.kind in _FLOATS:
            return None if not (self.group_size or self.has_zero) else "values have no groups"
        if self.kind == "int8" and (self.has_zero or not self.group_size):
            return "int8 has no zero points" if self.has_zero else None
        if self.group_size not in GROUP_SIZES:
            return f"groups are of 32, 64 or 128 inputs, not {self.group_size}"
        if self.num_inputs % self.group_size:
            return f"{self.num_inputs} inputs are no multiple of the group, {self.group_size}"
        return None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def lay_out(kind: str, codes_OI: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Bring codes and scales into the kernels' order; as bytes, ready for a file.

    shapes: codes [O, I] int8; scale, zero [O, I / G] ([O, 1] for int8: a scale a row) -> [bytes]
    raises: LayoutError for a scale of a group that bf16 does not hold exactly, and for odd shapes
    """
    layout = layout_of(kind, codes_OI, scale, zero)
    offset = 8 if kind == "int4" else 128
    codes = (codes_OI.to(torch.int16) + offset).to(torch.uint8)
    fill = _up(layout.num_inputs, _FILL) - layout.num_inputs
    codes = F.pad(codes, (0, fill, 0, layout.num_blocks * BLOCK - layout.num_outputs), value=offset)
    if kind == "int4":
        codes = codes.view(-1, BLOCK, codes.shape[1] // 8, 2, 4)
        codes = codes[..., 0, :] | codes[..., 1, :] << 4
    else:
        codes = codes.view(-1, BLOCK, codes.shape[1] // 4, 4)
    if layout.group_size:
        if not is_bf16(scale):
            why = "the kernels keep scales of groups in bf16, and rounding would change the weight"
            raise LayoutError("cannot lay out a weight", why=why, fix="round the scales to bf16")
        scale = scale.bfloat16()
    else:
        scale = scale.float()
    codes = codes.transpose(1, 2).reshape(layout.num_blocks, -1)
    parts = [codes, _by_block(layout, scale, 0)]
    if zero is not None:
        parts.append(_by_block(layout, (zero.to(torch.int16) + 8).to(torch.uint8), 8))
    return _joined(layout, *parts)


def is_bf16(values: Tensor) -> bool:
    """Whether bf16 holds all of them exactly."""
    return torch.equal(values.bfloat16().to(values.dtype), values)


def lay_out_values(weight_OI: Tensor) -> Tensor:
    """The same for a weight in fp32 or bf16, whose kind is its dtype. shapes: [O, I] -> [bytes]"""
    kind = next(name for name, dtype in _FLOATS.items() if dtype == weight_OI.dtype)
    layout = Layout(kind, *weight_OI.shape)
    fill = _up(layout.num_inputs, _FILL) - layout.num_inputs
    weight = F.pad(weight_OI, (0, fill, 0, layout.num_blocks * BLOCK - layout.num_outputs))
    step = 4 // weight.itemsize  # inputs that make a word of 32 bits
    weight = weight.reshape(-1, BLOCK, weight.shape[1] // step, step)
    return weight.transpose(1, 2).contiguous().view(torch.uint8).flatten()


def layout_of(kind: str, codes_OI: Tensor, scale: Tensor, zero: Tensor | None = None) -> Layout:
    """The layout that `lay_out` gives. raises: LayoutError"""
    num_outputs, num_inputs = codes_OI.shape
    is_by_row = kind == "int8" and scale.shape[1] == 1
    group_size = 0 if is_by_row else num_inputs // scale.shape[1]
    layout = Layout(kind, num_outputs, num_inputs, group_size, zero is not None)
    problem = layout.problem()
    if problem is None and group_size and scale.shape != (num_outputs, num_inputs // group_size):
        problem = f"scales {tuple(scale.shape)} do not fit"
    if problem:
        what = f"cannot lay out a weight of {num_outputs} x {num_inputs} in {kind}"
        raise LayoutError(what, why=problem, fix="keep it in bf16")
    return layout


def _by_block(layout: Layout, values: Tensor, fill: int) -> Tensor:
    """[O, groups] -> [blocks, groups, 16]"""
    missing = layout.num_blocks * BLOCK - layout.num_outputs
    return F.pad(values, (0, 0, 0, missing), value=fill).view(-1, BLOCK, values.shape[1]).mT


def _joined(layout: Layout, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Segments of scales, zero points and codes. shapes: [blocks, ...] each -> [bytes]"""
    out, first = [], 0
    for _, count, num_groups in layout.segments():
        last = first + count * num_groups
        share = codes.shape[1] // scale.shape[1]  # bytes of a group
        headers = [scale[:, first:last]] + ([] if zero is None else [zero[:, first:last]])
        shape = (layout.num_blocks, count, -1)
        parts = [part.contiguous().view(torch.uint8).reshape(shape) for part in headers]
        missing = layout.header_bytes(num_groups) - sum(part.shape[2] for part in parts)
        parts.append(codes.new_zeros(layout.num_blocks, count, missing if layout.group_size else 0))
        parts.append(codes[:, first * share : last * share].reshape(shape))
        out.append(torch.cat(parts, 2).flatten(1))
        first = last
    missing = layout.block_bytes - sum(part.shape[1] for part in out)
    return F.pad(torch.cat(out, 1), (0, missing)).flatten()


def take_apart(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points back, exactly. shapes: [bytes] -> as given to `lay_out`"""
    blocks = packed.view(layout.num_blocks, layout.block_bytes)
    codes, scales, zeros = [], [], []
    for start, count, num_groups in layout.segments():
        size = layout.segment_bytes(num_groups)
        pieces = blocks[:, start : start + count * size].unflatten(1, (count, size))
        end = num_groups * BLOCK * 2 if layout.group_size else 4 * BLOCK
        shape = (layout.num_blocks, count * num_groups, BLOCK)
        dtype = torch.bfloat16 if layout.group_size else torch.float32
        scales.append(pieces[..., :end].contiguous().view(dtype).view(shape))
        if layout.has_zero:
            zeros.append(pieces[..., end : end + num_groups * BLOCK].reshape(shape))
        header = layout.header_bytes(num_groups) if layout.group_size else end
        codes.append(pieces[..., header:].flatten(1))
    scale = _by_output(layout, torch.cat(scales, 1))
    zero = None
    if zeros:
        zero = (_by_output(layout, torch.cat(zeros, 1)).to(torch.int16) - 8).to(torch.int8)
    return _codes(layout, torch.cat(codes, 1)), scale, zero


def _codes(layout: Layout, stored: Tensor) -> Tensor:
    """[blocks, bytes] -> [O, I] int8"""
    is_int4 = layout.kind == "int4"
    codes = stored[:, : _up(layout.num_inputs, _FILL) * BLOCK // (2 if is_int4 else 1)]
    codes = codes.unflatten(1, (-1, BLOCK, 4)).transpose(1, 2)
    if is_int4:
        codes = torch.stack([codes & 15, codes >> 4], 3)
    codes = codes.reshape(layout.num_blocks * BLOCK, -1)[: layout.num_outputs, : layout.num_inputs]
    return (codes.to(torch.int16) - (8 if is_int4 else 128)).to(torch.int8)


def _by_output(layout: Layout, values: Tensor) -> Tensor:
    """[blocks, groups, 16] -> [O, groups]"""
    return values.mT.reshape(layout.num_blocks * BLOCK, -1)[: layout.num_outputs]


def dequantize(packed: Tensor, layout: Layout) -> Tensor:
    """The weight the bytes stand for, in fp32. shapes: [bytes] -> [O, I]"""
    if layout.kind in _FLOATS:
        step = 4 // _FLOATS[layout.kind].itemsize
        values = packed.view(_FLOATS[layout.kind]).view(layout.num_blocks, -1, BLOCK, step)
        values = values.transpose(1, 2).reshape(layout.num_blocks * BLOCK, -1)
        return values[: layout.num_outputs, : layout.num_inputs].float()
    codes, scale, zero = take_apart(packed, layout)
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        groups = groups - zero.float().unsqueeze(-1)
    return (groups * scale.float().unsqueeze(-1)).flatten(1)


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels cannot run; None when they can. raises: UsageError for a bad L4_CPU_ISA"""
    if device.type != "cpu":
        return f"{device.type} has kernels of its own"
    if kernels.must_compile():
        terminal.say("compiling the CPU kernels, once")
    library = kernels.load()
    if isinstance(library, str):
        return library
    unknown = library.l4_cpu_isa_error()
    if unknown:
        word = unknown.decode()
        why = "this variable forces a version of the CPU kernels that this processor can run"
        fix = f"one of avx512, avx2, portable; unset, it is {library.l4_cpu_isa().decode()}"
        raise UsageError(f"cannot use `L4_CPU_ISA={word}`", why=why, fix=fix)
    return None


@functools.cache
def _say_slow(reason: str) -> None:
    """Once: a slow way that nobody asked for is no secret."""
    terminal.warn(f"CPU kernels are missing, torch answers instead: {reason}")


def _library() -> CDLL:
    library = kernels.load()
    assert not isinstance(library, str)
    return library


def linear(x: Tensor, packed: Tensor, layout: Layout, index: Tensor | None = None) -> Tensor:
    """x @ weight.T on the bytes as they are. No gradients.

    shapes: [..., I] -> [..., O]; with index [R] (int32), of rows of x [M, I]: -> [R, O]
    """
    run = WEIGHT_ONLY.pick(x)
    if run is reference_linear and x.is_cpu and forced(WEIGHT_ONLY)[0] != REFERENCE:
        _say_slow(str(why_not(x.device)))
    return run(x, packed, layout, index)


def kernel_linear(x: Tensor, packed: Tensor, layout: Layout, index: Tensor | None = None) -> Tensor:
    """The same by the C++ kernels, in as many threads as torch has."""
    assert packed.is_contiguous()
    assert packed.numel() == layout.num_bytes
    assert packed.data_ptr() % ALIGNMENT == 0
    assert x.shape[-1] == layout.num_inputs
    rows = x.detach().float().reshape(-1, layout.num_inputs).contiguous()
    num_rows = num_out = rows.shape[0]
    if index is not None:
        assert index.dtype == torch.int32
        assert index.is_contiguous()
        num_out = len(index)
    y = torch.empty(num_out, layout.num_outputs)
    library = _library()
    weight = kernels.Weight(
        packed.data_ptr(),
        KINDS[layout.kind],
        layout.num_outputs,
        layout.num_inputs,
        layout.group_size,
        layout.has_zero,
    )
    size = library.l4_rows_bytes(num_rows, layout.num_inputs, _FORMS[layout.kind])
    scratch = torch.empty(size, dtype=torch.uint8)  # torch aligns to 64
    failed = library.l4_linear_at(
        byref(weight),
        rows.data_ptr(),
        layout.num_inputs,
        num_rows,
        None if index is None else index.data_ptr(),
        num_out,
        y.data_ptr(),
        layout.num_outputs,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    assert not failed, layout
    shape = (num_out,) if index is not None else x.shape[:-1]
    return y.view(*shape, layout.num_outputs).to(x.dtype)


def reference_linear(
    x: Tensor, packed: Tensor, layout: Layout, index: Tensor | None = None
) -> Tensor:
    """The same from the weight the bytes stand for, in x's dtype."""
    return F.linear(x if index is None else x[index], dequantize(packed, layout).to(x.dtype))


WEIGHT_ONLY = Op(
    "weight_only_linear",
    [
        Version("cpp", lambda: kernel_linear, "products on packed weights, in C++", why_not),
        Version(REFERENCE, lambda: reference_linear, "unpacks the weight on every call"),
    ],
)
