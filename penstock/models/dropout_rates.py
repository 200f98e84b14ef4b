"""How much a transformer drops in training, and where.

`models/architecture.py` builds on it. It must never import torch.
"""

import dataclasses

from penstock.errors import ConfigError

BLOCK_DROPOUT_SITES = 3
"""Places in a block that drop: attention's probabilities, its output, the MLP's output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutRates:
    """Probabilities of dropping an element, in training."""

    dropout: float = 0.0
    """Of the residual branches; of embeddings and attention too, where they have no own rate."""
    embedding_dropout: float | None = None
    attention_dropout: float | None = None

    def _check_dropout(self) -> None:
        """Refuse what is no probability; a rate that is the residual's is not said twice."""
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ConfigError(
                    f"model.{name}={rate} is not a probability below 1",
                    where=f"model.{name}",
                    do="give a value from 0 up to, not including, 1",
                )
            if name != "dropout" and rate == self.dropout:
                object.__setattr__(self, name, None)

    @property
    def embedding_rate(self) -> float:
        """Probability of dropping an element of the embeddings' sum."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    @property
    def attention_rate(self) -> float:
        """Probability of dropping one of attention's."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout
