"""Antialiased bilinear resizing in whole numbers, bit for bit what torchvision gives on a CPU.

in: uint8 pixels; out: uint8 pixels of another size
source: torch 2.13 `interpolate(uint8, mode="bilinear", antialias=True)`, which HF's picture
processor uses; Pillow's filter is the same but rounds its weights elsewhere, so that one pixel in
a hundred differs by one level
"""

from __future__ import annotations

import functools

import numpy as np

_BLOCK_ELEMENTS = 1 << 18  # of int32: one block of rows stays in the cache
_MAX_BITS = 22


def resize(pixels_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize a picture, columns first and rows second, rounding to levels in between.

    shapes: uint8 [H, W, C] -> uint8 [height, width, C]
    """
    if width != pixels_HWC.shape[1]:
        # Turned, so that whole runs of memory are added and not single pixels.
        turned = _resize_first_dim(pixels_HWC.transpose(1, 0, 2), width)
        pixels_HWC = turned.transpose(1, 0, 2)
    if height != pixels_HWC.shape[0]:
        pixels_HWC = _resize_first_dim(pixels_HWC, height)
    return pixels_HWC


@functools.lru_cache(maxsize=64)
def _taps(num_in: int, num_out: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Which inputs make each output, and their weights as whole numbers over a power of two.

    shapes: -> int64 [num_out, taps], int32 [num_out, taps], bits
    """
    scale = num_in / num_out
    support = max(scale, 1.0)  # the triangle widens when shrinking: that is the antialiasing
    centers = scale * (np.arange(num_out) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), num_in)
    inputs = first[:, None] + np.arange(int((last - first).max()))
    weights = np.maximum(0.0, 1 - np.abs((inputs - centers[:, None] + 0.5) / support))
    weights[inputs >= last[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    # As many bits as keep the largest weight below 2^15, as torch's 16-bit kernels have it.
    bits = 0
    while bits < _MAX_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    rounded = (weights * (1 << bits) + 0.5).astype(np.int32)
    return np.minimum(inputs, num_in - 1), rounded, bits


def _resize_first_dim(pixels: np.ndarray, num_out: int) -> np.ndarray:
    """shapes: uint8 [num_in, ...] -> uint8 [num_out, ...]"""
    lines = np.ascontiguousarray(pixels).reshape(pixels.shape[0], -1)
    inputs, weights, bits = _taps(lines.shape[0], num_out)
    out = np.empty((num_out, lines.shape[1]), np.uint8)
    step = max(1, _BLOCK_ELEMENTS // lines.shape[1])
    for start in range(0, num_out, step):
        block = slice(start, min(start + step, num_out))
        total = np.full((block.stop - start, lines.shape[1]), 1 << (bits - 1), np.int32)
        product = np.empty_like(total)
        for tap in range(inputs.shape[1]):
            np.multiply(lines[inputs[block, tap]], weights[block, tap, None], out=product)
            total += product
        total >>= bits
        out[block] = np.clip(total, 0, 255)
    return out.reshape(num_out, *pixels.shape[1:])
