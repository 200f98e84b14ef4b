"""A reshuffled order of samples without an array: a keyed permutation computed per index.

The loader asks for sample `index` of epoch `epoch`. It must never hold state.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MIX = np.uint64(0x9E3779B97F4A7C15)


def permute(index: NDArray[Any], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where in 0…size each of `index` (int64, each in 0…size) goes in this epoch.

    A balanced Feistel network over the next even number of bits, walked until the value is in
    range (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, §3), so that it
    is a bijection, with O(1) memory for any size. On average fewer than 4 walks are needed.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = np.asarray(index, np.uint64).copy()
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.sha512(f"order/{seed}/{epoch}".encode()).digest()
    return np.frombuffer(digest, np.uint64, _ROUNDS)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass of the network over 2·half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        mixed = (right + key) * _MIX
        mixed ^= mixed >> np.uint64(29)
        mixed *= _MIX
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << bits) | right
