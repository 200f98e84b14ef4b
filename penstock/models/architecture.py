"""The sizes of a transformer and everything that follows from them by arithmetic.

`plan`, `compile` and `train` all start from an `Architecture`. It must never import torch, so
that planning answers at once.
"""

import dataclasses

from penstock.errors import ConfigError

VOCABULARY_MULTIPLE = 128
"""Rows of the token embedding are padded to a multiple of this (matrix units like it); the
padding is invisible outside the model (nanoGPT pads to 64 for the same reason)."""

WEIGHT_GROUP = 128
"""Neighbouring inputs of a matrix that share a scale in 8 bits, so that one large weight coarsens
few others (a usual size for groups of weights: GPTQ, Frantar et al., arXiv 2210.17323, §4)."""

CHOICES = {
    "activation": ("gelu_tanh", "gelu", "silu", "relu"),
    "norm": ("layer", "rms"),
    "residual": ("sequential", "parallel", "parallel_one_norm"),
    "positions": ("learned", "rotary"),
    "rotary_pairs": ("halves", "neighbours"),
    "rotary_scaling": ("none", "linear", "llama3"),
}
"""Field → its possible values."""

_SIZES = ("layers", "hidden_size", "heads", "mlp_size", "max_positions", "vocab_size")


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
    kv_heads: int | None = None
    """Key and value heads, each shared by heads / kv_heads query heads; None: one for each."""
    norm: str = "layer"
    """layer: mean and variance, weight and bias; rms: root mean square, weight alone."""
    residual: str = "sequential"
    """sequential: attention, then the MLP of the sum; parallel: both of the block's input, each
    behind its norm; parallel_one_norm: behind the same norm."""
    gated_mlp: bool = False
    """Whether the activation of one projection multiplies another (SwiGLU with silu)."""
    attention_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    positions: str = "learned"
    rotary_fraction: float = 1.0
    """Share of each head that is rotated, from its first element on."""
    rotary_base: float = 10000.0
    rotary_pairs: str = "halves"
    """What is rotated together: element i with i + half, or neighbours 2i and 2i + 1."""
    rotary_scaling: str = "none"
    """How frequencies are stretched to longer texts: linear, or by wavelength as Llama 3 does."""
    rotary_factor: float = 1.0
    """Frequencies are divided by this."""
    rotary_low: float = 1.0
    """llama3: wavelengths over rotary_trained / rotary_low are stretched in full."""
    rotary_high: float = 4.0
    """llama3: wavelengths below rotary_trained / rotary_high are left alone."""
    rotary_trained: int = 8192
    """llama3: positions before stretching."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes, naming the configuration key."""
        for name in (*_SIZES, *(["kv_heads"] if self.kv_heads is not None else [])):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(
                    f"model.{name}={value} is not a size",
                    where=f"model.{name}",
                    do="give a whole number of at least 1",
                )
        for name, size in (("heads", self.hidden_size), ("kv_heads", self.heads)):
            divisor = getattr(self, name)
            if divisor is not None and size % divisor:
                whole = "hidden_size" if name == "heads" else "heads"
                raise ConfigError(
                    f"model.{name}={divisor} does not divide model.{whole}={size}",
                    where=f"model.{name}",
                    do=f"choose {name} from the divisors of {size}",
                )
        if self.kv_heads == self.heads:  # one way to say the same: equal shapes compare equal
            object.__setattr__(self, "kv_heads", None)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"model.dropout={self.dropout} is not a probability below 1",
                where="model.dropout",
                do="give a value from 0 up to, not including, 1",
            )
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} is not known",
                    where=f"model.{name}",
                    do=f"choose {', '.join(values)}",
                )
        if self.positions == "rotary" and (self.rotary_size < 2 or self.rotary_size % 2):
            raise ConfigError(
                f"model.rotary_fraction={self.rotary_fraction} rotates {self.rotary_size} elements "
                f"of each head's {self.head_size}: not pairs",
                where="model.rotary_fraction",
                do="choose heads and rotary_fraction so that an even number is rotated",
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def group_size(self) -> int:
        """Query heads that share a key and value head."""
        return 1 if self.kv_heads is None else self.heads // self.kv_heads

    @property
    def kv_size(self) -> int:
        """Width of all keys, and of all values."""
        return self.hidden_size // self.group_size

    @property
    def rotary_size(self) -> int:
        """Elements of each head that are rotated, rounded as `transformers` does."""
        return int(self.head_size * self.rotary_fraction) if self.positions == "rotary" else 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding, a multiple of `VOCABULARY_MULTIPLE`."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    def position_parameters(self) -> int:
        """The table of learned positions."""
        return self.max_positions * self.hidden_size if self.positions == "learned" else 0

    def block_matrix_elements(self) -> int:
        """Elements of one block's matrices: attention's projections and the MLP's."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.kv_size)
        return attention + self.hidden_size * self.mlp_size * (3 if self.gated_mlp else 2)

    def block_parameters(self) -> int:
        """Parameters of one block: norms, the four attention projections, the MLP."""
        d, up = self.hidden_size, self.mlp_size * (2 if self.gated_mlp else 1)
        biases = (2 * d + 2 * self.kv_size) * self.attention_bias + (up + d) * self.mlp_bias
        norms = 1 if self.residual == "parallel_one_norm" else 2
        return norms * self.norm_parameters() + self.block_matrix_elements() + biases

    def parameter_count(self, *, padded: bool = False) -> int:
        """All trainable parameters; tied embeddings count once."""
        rows = self.padded_vocab_size if padded else self.vocab_size
        tables = rows * self.hidden_size * (1 if self.tie_embeddings else 2)
        head = self.norm_parameters() + rows * self.head_bias
        return tables + self.position_parameters() + self.layers * self.block_parameters() + head

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward: 6N + 12·L·D·T.

        N leaves out the tables that are only looked up (positions, and tokens where the head has
        its own) and counts a tied head once; the causal half of attention is not discounted, as
        is the custom (PaLM, arXiv 2204.02311, appendix B; nanoGPT `estimate_mfu`).
        """
        looked_up = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        multiplied = self.parameter_count() - self.position_parameters() - looked_up
        return 6 * multiplied + 12 * self.layers * self.hidden_size * sequence_length
