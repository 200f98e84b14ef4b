"""The sizes of a transformer and everything that follows from them by arithmetic.

`plan`, `compile` and `train` all start from an `Architecture`. It must never import torch, so
that planning answers at once.
"""

import dataclasses

from penstock.errors import ConfigError

VOCABULARY_MULTIPLE = 128
"""Rows of the token embedding are padded to a multiple of this (matrix units like it); the
padding is invisible outside the model (nanoGPT pads to 64 for the same reason)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One decoder's shape. Sizes are counts of elements; `dropout` is a probability."""

    family: str
    layers: int
    hidden_size: int
    heads: int
    mlp_size: int
    max_positions: int
    vocab_size: int
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible shapes, naming the configuration key."""
        for name in ("layers", "hidden_size", "heads", "mlp_size", "max_positions", "vocab_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(
                    f"model.{name}={value} is not a size",
                    where=f"model.{name}",
                    do="give a whole number of at least 1",
                )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.heads={self.heads} does not divide model.hidden_size={self.hidden_size}",
                where="model.heads",
                do=f"choose heads from the divisors of {self.hidden_size}",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"model.dropout={self.dropout} is not a probability below 1",
                where="model.dropout",
                do="give a value from 0 up to, not including, 1",
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding, a multiple of `VOCABULARY_MULTIPLE`."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def block_parameters(self) -> int:
        """Parameters of one block: two norms, the four attention projections, the MLP."""
        d, f = self.hidden_size, self.mlp_size
        return 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d)

    def parameter_count(self, *, padded: bool = False) -> int:
        """All trainable parameters; tied embeddings count once."""
        rows = self.padded_vocab_size if padded else self.vocab_size
        tables = rows * self.hidden_size * (1 if self.tie_embeddings else 2)
        positions = self.max_positions * self.hidden_size
        return tables + positions + self.layers * self.block_parameters() + 2 * self.hidden_size

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward: 6N + 12·L·D·T.

        N leaves out the position table (it multiplies nothing) and counts a tied head once;
        the causal half of attention is not discounted, as is the custom (PaLM, arXiv
        2204.02311, appendix B; nanoGPT `estimate_mfu`).
        """
        multiplied = self.parameter_count() - self.max_positions * self.hidden_size
        return 6 * multiplied + 12 * self.layers * self.hidden_size * sequence_length
