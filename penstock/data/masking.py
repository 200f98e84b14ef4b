"""Which tokens a masked language model is to fill in: chosen anew for every sample it is shown.

The loader applies it to each sequence. It must never know about models or batches.
"""

import dataclasses
import hashlib

import numpy as np
from numpy.typing import NDArray

_REPLACED = 0.8
_RANDOM = 0.1


@dataclasses.dataclass(frozen=True)
class Masking:
    """Masks tokens at random; a pure function of the seed and of the sample's position."""

    mask_token: int
    special_tokens: tuple[int, ...]
    """Never chosen."""
    vocab_size: int
    probability: float
    """Of a token to be chosen."""
    seed: int

    def mask(
        self, tokens: NDArray[np.int64], length: int, position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Inputs (T,) int64 and loss weights (T,) float32, 1 where a token is to be predicted.

        tokens (T,) int64 are text up to `length`; position: the sample's, counted over all epochs,
        so that a sequence is masked otherwise each time. Of the chosen tokens 80% become the mask
        token, 10% any token, 10% stay (BERT, arXiv 1810.04805, §3.1; chosen anew each time:
        RoBERTa, arXiv 1907.11692, §4.1).
        """
        name = f"mask/{self.seed}/{position}".encode()
        key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        chance, fate = generator.random((2, len(tokens)))
        others = generator.integers(0, self.vocab_size, len(tokens))
        is_text = ~np.isin(tokens, self.special_tokens)
        is_text[length:] = False
        chosen = is_text & (chance < self.probability)
        inputs = np.where(chosen & (fate < _REPLACED), self.mask_token, tokens)
        is_random = chosen & (fate >= _REPLACED) & (fate < _REPLACED + _RANDOM)
        return np.where(is_random, others, inputs), chosen.astype(np.float32)
