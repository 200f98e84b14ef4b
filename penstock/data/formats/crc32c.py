"""CRC-32C (Castagnoli) of bytes, fast enough without compiled code.

`tfrecord.py` frames its records with it. A CRC is linear: that of a block is the exclusive or of
what each byte contributes at its place, so that one gather from a table serves a whole block.
Source: RFC 3720, appendix B.4; masking: TensorFlow's record format.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's polynomial, bits reversed."""
_BLOCK = 4096
"""Bytes taken at once: the table has 1 KiB for each."""


@functools.cache
def _table() -> NDArray[np.uint32]:
    """What byte b contributes with k bytes behind it, (_BLOCK, 256) by k and b."""
    table = np.empty((_BLOCK, 256), np.uint32)
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, (row >> 1) ^ np.uint32(_POLYNOMIAL), row >> 1)
    first = row
    for k in range(_BLOCK):
        table[k] = row
        row = (row >> 8) ^ first[row & 0xFF]
    return table


def crc32c(data: bytes) -> int:
    """The checksum of `data`."""
    table = _table()
    values: NDArray[Any] = np.frombuffer(data, np.uint8)
    register = 0xFFFFFFFF
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].copy()
        # The register's four bytes meet the first four of the block; a shorter block leaves some.
        head = min(4, len(block))
        block[:head] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)[:head]
        places = np.arange(len(block) - 1, -1, -1)
        rest = register >> (8 * head)
        register = rest ^ int(np.bitwise_xor.reduce(table[places, block]))
    return register ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as TensorFlow stores it: rotated and shifted, so that checksums can nest."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
