"""Rotary positions: pairs of each head's elements turned by an angle that grows with position.

The transformer makes one rotation for all its blocks and hands it to them as an input, so that
kernels hold no table and no position. It must never know about weights or caches.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from penstock.models.architecture import Architecture


def rotation(
    architecture: Architecture, positions: Int[Tensor, "B T"]
) -> Float[Tensor, "2 B 1 T P"] | None:
    """Cosines and sines for positions (B, T) int64, of the P pairs of a head; None where
    positions are not rotary.

    In float32, as angles of late positions need it (Su et al., arXiv 2104.09864, equation 15).
    """
    if architecture.positions != "rotary":
        return None
    angles = positions.unsqueeze(-1).float() * frequencies(architecture).to(positions.device)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def frequencies(architecture: Architecture) -> Float[Tensor, " P"]:
    """Radians per position of each pair, float32, with `transformers`' operations in its order.

    Source of the stretching by wavelength: Llama 3.1's `apply_scaling`.
    """
    a = architecture
    exponents = torch.arange(0, a.rotary_size, 2).float() / a.rotary_size
    plain = 1.0 / a.rotary_base**exponents
    if a.rotary_scaling == "none":
        return plain
    if a.rotary_scaling == "linear":
        return plain / a.rotary_factor
    wavelengths = 2 * math.pi / plain
    share = (a.rotary_trained / wavelengths - a.rotary_low) / (a.rotary_high - a.rotary_low)
    between = (1 - share) * plain / a.rotary_factor + share * plain
    longest, shortest = a.rotary_trained / a.rotary_low, a.rotary_trained / a.rotary_high
    stretched = torch.where(wavelengths > longest, plain / a.rotary_factor, between)
    return torch.where(wavelengths < shortest, plain, stretched)


def rotate(
    x: Float[Tensor, "B H T S"], turns: Float[Tensor, "2 #B 1 T P"], pairs: str
) -> Float[Tensor, "B H T S"]:
    """Queries or keys x (B, H, T, S) turned by `rotation`; elements beyond 2P stay.

    pairs: see `Architecture.rotary_pairs`. Computed in float32, in x's dtype.
    """
    cosine, sine = turns[0], turns[1]
    count = turns.shape[-1]
    turned, rest = x[..., : 2 * count].float(), x[..., 2 * count :]
    if pairs == "halves":
        first, second = turned[..., :count], turned[..., count:]
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
    result = [first * cosine - second * sine, second * cosine + first * sine]
    joined = torch.cat(result, -1) if pairs == "halves" else torch.stack(result, -1).flatten(-2)
    return torch.cat([joined.to(x.dtype), rest], -1)


def positions_within(segments: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How far each position is from the first of its run of equal segments (B, T) int64."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.zeros_like(segments)
    starts[:, 1:] = places[:, 1:] * (segments[:, 1:] != segments[:, :-1])
    return places - torch.cummax(starts, 1).values
