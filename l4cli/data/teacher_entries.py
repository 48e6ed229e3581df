"""A teacher's tokens in four bytes each, and the entropy of its distribution in one.

in: ids, probabilities and counts of a token's columns; out: U32 [n, K], and back to weights

An entry is 18 bits of id above 14 bits of value, which is a probability's code or a count.

An exact column holds a code c that means the probability exp(-c / 512), from 1 down to 32 nats;
the largest code means 0. Codes are rounded at random so that the expectation of what is decoded
is the probability itself. A drawn column holds how often its token was hit, 0 if it is unused.
The code c of an entropy means c * c / 5200 nats, up to that of 262,144 equally likely tokens,
rounded alike: with 32 entries a token takes 129 bytes.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

VALUE_BITS = 14
MAX_VOCAB_SIZE = 1 << (32 - VALUE_BITS)
MAX_COUNT = (1 << VALUE_BITS) - 1
CODE_SCALE = 512
ZERO_CODE = MAX_COUNT
ENTROPY_SCALE = 5200


def row_uniforms(seed: int, digest: str, row: int, num_targets: int) -> np.ndarray:
    """Two numbers in [0, 1) for each target of a row, float64 [n, 2]: to draw, to round.

    Only the seed, the data set and the row decide, so that no batch layout changes them.
    """
    key = hashlib.blake2b(f"{seed}/{digest}/{row}".encode(), digest_size=16).digest()
    # The raw stream of a bit generator is the same in every version of NumPy.
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(2 * num_targets)
    return (raw >> np.uint64(11)).astype(np.float64).reshape(num_targets, 2) * 2.0**-53


def encode_entries(
    ids_MK: np.ndarray,
    probabilities_MX: np.ndarray,
    counts_MN: np.ndarray | None,
    uniforms_M: np.ndarray,
) -> np.ndarray:
    """Encode tokens as U32 [M, K]; the columns without a probability have counts, if any.

    Column 0 is the label. It keeps its order to column 1: decoded it is likelier or equal if it
    was, else less likely. A column with probability or count 0 is unused.
    """
    counts_MN = np.zeros((len(ids_MK), 0), np.int64) if counts_MN is None else counts_MN
    assert ids_MK.shape[1] == probabilities_MX.shape[1] + counts_MN.shape[1]
    assert ids_MK.size == 0 or (ids_MK.min() >= 0 and ids_MK.max() < MAX_VOCAB_SIZE)
    assert counts_MN.size == 0 or (counts_MN.min() >= 0 and counts_MN.max() <= MAX_COUNT)
    codes_MX = _codes(probabilities_MX, uniforms_M[:, None])
    if codes_MX.shape[1] > 1:
        # One random number for all columns keeps their order; only a tie has to be broken.
        is_behind_M = probabilities_MX[:, 0] < probabilities_MX[:, 1]
        is_tie_M = is_behind_M & (codes_MX[:, 0] == codes_MX[:, 1])
        codes_MX[:, 0] = np.minimum(codes_MX[:, 0] + is_tie_M, ZERO_CODE)
    values_MK = np.concatenate([codes_MX, counts_MN.astype(np.uint32)], axis=1)
    return (ids_MK.astype(np.uint32) << np.uint32(VALUE_BITS)) | values_MK


def _codes(probabilities: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Round each probability to one of the two codes around it, uint32, without bias."""
    p = np.minimum(probabilities.astype(np.float64), 1.0)
    smallest = np.exp(-(ZERO_CODE - 1) / CODE_SCALE)
    steps = -CODE_SCALE * np.log(np.maximum(p, smallest))
    above = np.clip(np.floor(steps), 0, ZERO_CODE - 1)  # the likelier one
    high, low = np.exp(-above / CODE_SCALE), np.exp(-(above + 1) / CODE_SCALE)
    low = np.where(above + 1 == ZERO_CODE, 0.0, low)
    takes_high = uniforms < (p - low) / (high - low)
    return (above + ~takes_high).astype(np.uint32)


def decode_entries(entries_MK: np.ndarray, num_exact: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 and weights float32 [M, K]; a row of weights adds up to 1.

    The draws share what the exact columns leave. Where there are none, or nothing is left, the
    exact columns are scaled to a sum of 1.
    """
    ids_MK = (entries_MK >> np.uint32(VALUE_BITS)).astype(np.int64)
    values_MK = entries_MK & np.uint32(MAX_COUNT)
    weights_MK = values_MK.astype(np.float32)
    weights_MK[:, :num_exact] = _decoded()[values_MK[:, :num_exact]]
    exact_M = weights_MK[:, :num_exact].sum(1, dtype=np.float64)
    draws_M = weights_MK[:, num_exact:].sum(1, dtype=np.float64)
    is_shared_M = (draws_M > 0) & (exact_M < 1)
    exact_scale_M = np.where(is_shared_M, 1.0, 1.0 / np.where(exact_M > 0, exact_M, 1.0))
    drawn_scale_M = np.where(is_shared_M, (1.0 - exact_M) / np.where(draws_M > 0, draws_M, 1.0), 0)
    weights_MK[:, :num_exact] *= exact_scale_M[:, None].astype(np.float32)
    weights_MK[:, num_exact:] *= drawn_scale_M[:, None].astype(np.float32)
    return ids_MK, weights_MK


def encode_entropy(entropy_M: np.ndarray, uniforms_M: np.ndarray) -> np.ndarray:
    """Codes of entropies in nats, uint8 [M], without bias up to the largest one."""
    nats_M = np.clip(entropy_M.astype(np.float64), 0, 255 * 255 / ENTROPY_SCALE)
    below_M = np.minimum(np.floor(np.sqrt(nats_M * ENTROPY_SCALE)), 254)
    low_M, high_M = below_M**2 / ENTROPY_SCALE, (below_M + 1) ** 2 / ENTROPY_SCALE
    takes_high_M = uniforms_M < (nats_M - low_M) / (high_M - low_M)
    return (below_M + takes_high_M).astype(np.uint8)


def decode_entropy(codes_M: np.ndarray) -> np.ndarray:
    """Nats, float32 [M]."""
    return codes_M.astype(np.float32) ** 2 / ENTROPY_SCALE


@functools.cache
def _decoded() -> np.ndarray:
    """What each code means, float32 [16384]."""
    table = np.exp(-np.arange(ZERO_CODE + 1) / CODE_SCALE)
    table[ZERO_CODE] = 0
    return table.astype(np.float32)
