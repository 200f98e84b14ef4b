"""From logits to the next token: penalties, temperature, top-k, top-p, the draw.

`inference/engine.py` calls `next_token` per row. It must never know about text or caches.
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from penstock.config.schema import GenerateSection


def row_generator(seed: int, prompt: int) -> torch.Generator:
    """The stream of one prompt: its draws do not depend on what else is in the batch."""
    digest = hashlib.sha256(f"generate/{seed}/{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def is_greedy(section: GenerateSection) -> bool:
    """Whether the next token is always that of the largest logit, whatever came before."""
    return section.temperature == 0 and section.repetition_penalty == 1.0


def next_token(
    logits: Float[Tensor, " V"],
    seen: Int[Tensor, " n"],
    section: GenerateSection,
    generator: torch.Generator,
) -> int:
    """Choose a token from finite logits (V,) float32; seen (n,) int64 are the tokens so far."""
    # In float64, and with the largest logit at 0, no temperature and no penalty overflows to NaN.
    logits = penalize(logits.double(), seen, section.repetition_penalty)
    if section.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / section.temperature
    logits = keep_likely(logits, section.top_k, section.top_p)
    return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))


def penalize(
    logits: Float[Tensor, " V"], seen: Int[Tensor, " n"], penalty: float
) -> Float[Tensor, " V"]:
    """Make tokens already seen less likely: positive logits / penalty, negative × penalty.

    Source: CTRL (Keskar et al., arXiv 1909.05858, §4.1), with the sign rule of `transformers`.
    """
    if penalty == 1.0:
        return logits
    seen = seen.unique()
    chosen = logits[seen]
    bound = torch.finfo(logits.dtype).max / 4
    changed = torch.where(chosen > 0, chosen / penalty, chosen * penalty).clamp(-bound, bound)
    return logits.index_put((seen,), changed)


def keep_likely(
    logits: Float[Tensor, " V"], top_k: int | None, top_p: float | None
) -> Float[Tensor, " V"]:
    """Minus infinity for all but the `top_k` likeliest, then all outside the smallest set whose
    probability reaches `top_p` (nucleus sampling, Holtzman et al., arXiv 1904.09751, §3.1).
    """
    if top_k is not None and top_k < logits.numel():
        smallest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.index_fill(0, order[before >= top_p], float("-inf"))
    return logits
