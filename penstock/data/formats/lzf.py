"""LZF, h5py's own compression of HDF5 chunks: unpacked here, so that no file decides how much.

Source: liblzf 3.6 (M. Lehmann), lzf_d.c, which h5py bundles as filter 32000.
"""

FILTER = 32000
"""Number h5py has registered for it."""
_LONG = 7
"""A length of this many goes on in the next byte."""


def decompress(data: bytes, expected: int) -> bytes:
    """Unpack `data`; stops as soon as there is more than `expected` bytes.

    Raises:
        ValueError: the data ends too soon, or copies what is not there.
    """
    out = bytearray()
    at, end = 0, len(data)
    while at < end and len(out) <= expected:
        control = data[at]
        at += 1
        if control < 32:
            run = data[at : at + control + 1]
            if len(run) != control + 1:
                raise ValueError("it ends inside a run")
            out += run
            at += len(run)
            continue
        length = control >> 5
        extra = length == _LONG
        if at + extra >= end:
            raise ValueError("it ends inside a copy")
        length += 2 + (data[at] if extra else 0)
        back = ((control & 31) << 8) + data[at + extra] + 1
        at += 1 + extra
        if back > len(out):
            raise ValueError("it copies from before its start")
        piece = out[len(out) - back :][:length]
        # What is copied may go on into what the copy itself makes.
        out += (piece * (length // len(piece) + 1))[:length]
    return bytes(out)
