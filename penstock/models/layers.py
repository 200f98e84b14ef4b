"""Small layers as functions: norms, activations, and dropout whose masks come from keys.

`models/transformer.py` and the compiler's kernels use them, so they trace to plain ATen operators.
They must never hold state or draw from a global generator.
"""

import hashlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_SITE_STRIDE = 0x9E3779B9
"""2^32 / golden ratio: spreads consecutive counters (Knuth, TAOCP 3, §6.4)."""


def layer_norm(
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"],
    epsilon: float,
) -> Float[Tensor, "... D"]:
    """Normalize the last dimension of x (..., D), computed in float32, in x's dtype.

    Source: Ba et al., arXiv 1607.06450, equation 4.
    """
    result = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), epsilon)
    return result.to(x.dtype)


def rms_norm(
    x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], epsilon: float
) -> Float[Tensor, "... D"]:
    """Divide x (..., D) by its root mean square over the last dimension, computed in float32, in
    x's dtype.

    Source: Zhang & Sennrich, arXiv 1910.07467, equation 4.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight.float()).to(x.dtype)


def normalize(
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None,
    epsilon: float,
) -> Float[Tensor, "... D"]:
    """`layer_norm`, or without a bias `rms_norm`: no family has a norm of another make-up."""
    if bias is None:
        return rms_norm(x, weight, epsilon)
    return layer_norm(x, weight, bias, epsilon)


def activate(x: Float[Tensor, "... F"], name: str) -> Float[Tensor, "... F"]:
    """The MLP's non-linearity; name: see `architecture.CHOICES`.

    Sources: GELU, exact and by tanh, Hendrycks & Gimpel, arXiv 1606.08415; SiLU, the same.
    """
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[name](x)


def dropout(
    x: Float[Tensor, "B ..."], key: Int[Tensor, " B"], rate: float, width: int | None = None
) -> Float[Tensor, "B ..."]:
    """Zero each element of x (B, ...) with probability `rate`, scaling the rest by 1/(1-rate).

    key (B,) int64 names each sequence's stream; the mask depends on the key and the element's
    place within its sequence only, so any split of a batch drops the same elements. Where x is
    some columns of a tensor, that one has `width` of them, and the key says which come before x's
    (`split_block.SplitBlock.own_keys`). Bits are lowbias32 (Chris Wellons, "Prospecting for hash
    functions", 2018) of a counter.
    """
    if rate == 0:
        return x
    size = x[0].numel()
    counter = torch.arange(size, device=x.device, dtype=torch.int64).view(1, *x.shape[1:])
    if width is not None and width != x.shape[-1]:
        rows = torch.arange(size // x.shape[-1], device=x.device, dtype=torch.int64)
        counter = counter + rows.view(*x.shape[1:-1], 1) * (width - x.shape[-1])
    seed = key.view(-1, *(1 for _ in x.shape[1:]))
    bits = _hash32((counter * _SITE_STRIDE + (seed & _MASK32)) & _MASK32) ^ ((seed >> 32) & _MASK32)
    keep = _hash32(bits) >= int(rate * 2**32)
    return torch.where(keep, x * (1.0 / (1.0 - rate)), 0.0).to(x.dtype)


def dropout_keys(
    seed: int, step: int, sequences: Int[Tensor, " B"], layer: int, sites: int
) -> Int[Tensor, "B sites"]:
    """Keys (B, sites) int64 of one layer: a pure function of all its arguments.

    sequences (B,) int64 are places in the step's global batch; layer -1 is the embedding. The
    stream's base is a SHA-256 over (seed, step, layer), mixed with sequence and site.
    """
    text = f"dropout/{seed}/{step}/{layer}".encode()
    base = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 2
    low, high = base & _MASK32, (base >> 32) & _MASK32
    site = torch.arange(sites, device=sequences.device, dtype=torch.int64)
    place = sequences.unsqueeze(1) * sites + site  # (B, sites)
    first = _hash32((place + low) & _MASK32)
    second = _hash32((place * _SITE_STRIDE + high) & _MASK32)
    return first | ((second & 0x7FFFFFFF) << 32)


def _hash32(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Mix 32-bit values held in int64: every output bit depends on every input bit.

    The second factor is lowbias32's less 2^32, equal in the low 32 bits that are kept, because
    the product with 0x846CA68B may exceed an int64, which is undefined in generated C++.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & _MASK32
    return x ^ (x >> 16)
