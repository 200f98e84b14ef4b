"""The sizes of a transformer and everything that follows from them by arithmetic.

`plan`, `compile` and `train` all start from an `Architecture`. It must never import torch, so
that planning answers at once.
"""

import dataclasses
from typing import Any

from penstock.errors import ConfigError
from penstock.models.adapter import Adapter
from penstock.models.dropout_rates import BLOCK_DROPOUT_SITES, DropoutRates

VOCABULARY_MULTIPLE = 128
"""Rows of the token embedding are padded to a multiple of this (matrix units like it); the
padding is invisible outside the model (nanoGPT pads to 64 for the same reason)."""

WEIGHT_GROUP = 128
"""Neighbouring inputs of a matrix that share a scale in 8 bits, so that one large weight coarsens
few others (a usual size for groups of weights: GPTQ, Frantar et al., arXiv 2210.17323, §4)."""

CHOICES = {
    "activation": ("gelu_tanh", "gelu", "silu", "relu"),
    "norm": ("layer", "rms"),
    "norm_position": ("before", "after"),
    "residual": ("sequential", "parallel", "parallel_one_norm"),
    "positions": ("learned", "rotary"),
    "rotary_pairs": ("halves", "neighbours"),
    "rotary_scaling": ("none", "linear", "llama3"),
}
"""Field → its possible values."""

_SIZES = (
    *("layers", "hidden_size", "heads", "mlp_size", "max_positions", "vocab_size"),
    *("kv_heads", "embedding_size"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(DropoutRates):
    """One transformer's shape. Sizes are counts of elements."""

    family: str
    layers: int
    hidden_size: int
    heads: int
    mlp_size: int
    max_positions: int
    vocab_size: int
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    tie_embeddings: bool = True
    kv_heads: int | None = None
    """Key and value heads, each shared by heads / kv_heads query heads; None: one for each."""
    norm: str = "layer"
    """layer: mean and variance, weight and bias; rms: root mean square, weight alone."""
    norm_position: str = "before"
    """before: norms of what attention and MLP read, and a last one in the head; after: of the
    residual stream once each has been added to it (Vaswani et al., arXiv 1706.03762, §3.1)."""
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
    adapter: Adapter | None = None
    """Low-rank adapters beside the blocks' layers; with them, nothing else is trained."""
    is_causal: bool = True
    """Whether a position sees earlier ones alone; else all: masked language models."""
    shared_layers: bool = False
    """Whether all layers are one block, run again and again."""
    embedding_size: int | None = None
    """Width of the token and position tables, which a matrix projects to hidden_size; None: they
    have that width, and there is no matrix."""
    embedding_norm: bool = False
    token_types: int = 0
    """Rows of a table of segment types; every token is of the first."""
    position_offset: int = 0
    """Rows of the position table before the one of the first position."""
    head_transform: bool = False
    """Whether the head has a dense layer with an activation before its norm."""
    generic: str | None = None
    """The config.json of a model that `transformers` computes (`models/generic.py`), as text."""
    generic_parameters: int = 0
    """All it has."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes, naming the configuration key."""
        self._require_sizes()
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
        self._check_dropout()
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
    def adapter_rate(self) -> float:
        """Probability of dropping an element on its way into an adapter."""
        return 0.0 if self.adapter is None else self.adapter.dropout

    @property
    def has_dropout(self) -> bool:
        """Whether anything drops in training."""
        return max(self.dropout, self.embedding_rate, self.attention_rate, self.adapter_rate) > 0

    @property
    def dropout_sites(self) -> int:
        """Places of a block that have dropout keys."""
        adapters = self.adapter.sites if self.adapter is not None and self.adapter_rate else ()
        return BLOCK_DROPOUT_SITES + len(adapters)

    def for_generation(self) -> "Architecture":
        """The same, without what only training has: adapters are merged, nothing is dropped."""
        return dataclasses.replace(
            self, dropout=0.0, embedding_dropout=None, attention_dropout=None, adapter=None
        )

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Architecture":
        """Read what `dataclasses.asdict` made; TypeError or KeyError when it is none."""
        fields = dict(value)
        if fields.get("adapter") is not None:
            fields["adapter"] = Adapter.from_json(fields["adapter"])
        return Architecture(**fields)

    def _require_sizes(self) -> None:
        """Refuse sizes below 1."""
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"model.{name}={value} is not a size",
                    where=f"model.{name}",
                    do="give a whole number of at least 1",
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

    @property
    def embedding_width(self) -> int:
        """Width of the token and position tables, and of what the head projects."""
        return self.embedding_size or self.hidden_size

    @property
    def has_head_norm(self) -> bool:
        """Whether the head normalizes: not where the last block has just done so."""
        return self.norm_position == "before" or self.head_transform

    def norm_parameters(self, width: int | None = None) -> int:
        """Parameters of one norm, of the hidden size unless another width is given."""
        return (width or self.hidden_size) * (2 if self.norm == "layer" else 1)

    def table_elements(self, *, padded: bool) -> int:
        """The table of tokens, or a projection to the vocabulary."""
        return (self.padded_vocab_size if padded else self.vocab_size) * self.embedding_width

    def position_parameters(self) -> int:
        """The table of learned positions."""
        rows = self.max_positions + self.position_offset
        return rows * self.embedding_width if self.positions == "learned" else 0

    def embedding_projection_parameters(self) -> int:
        """The matrix and bias from the tables' width to the hidden size, where there is one."""
        if self.embedding_size is None:
            return 0
        return self.embedding_size * self.hidden_size + self.hidden_size

    def embedding_multiplied(self) -> int:
        """Parameters of the embedding that are not looked up: its norm and projection."""
        norm = self.norm_parameters(self.embedding_width) if self.embedding_norm else 0
        return norm + self.embedding_projection_parameters()

    def embedding_parameters(self, *, padded: bool = False) -> int:
        """Everything that turns tokens into the residual stream."""
        tables = self.table_elements(padded=padded) + self.position_parameters()
        return tables + self.token_types * self.embedding_width + self.embedding_multiplied()

    def head_parameters(self, *, padded: bool = False) -> int:
        """Everything after the blocks, the projection counted also where it is tied."""
        rows, width = self.padded_vocab_size if padded else self.vocab_size, self.embedding_width
        transform = (self.hidden_size + 1) * width if self.head_transform else 0
        norm = self.norm_parameters(width) if self.has_head_norm else 0
        return rows * width + rows * self.head_bias + transform + norm

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

    def distinct_blocks(self, layers: int) -> int:
        """Blocks with weights of their own among so many layers."""
        return min(layers, 1) if self.shared_layers else layers

    def parameter_count(self, *, padded: bool = False) -> int:
        """All trainable parameters; tied embeddings and shared layers count once."""
        if self.generic is not None:
            return self.generic_parameters
        tied = self.table_elements(padded=padded) if self.tie_embeddings else 0
        ends = self.embedding_parameters(padded=padded) + self.head_parameters(padded=padded)
        return ends - tied + self.distinct_blocks(self.layers) * self.block_parameters()

    def adapter_parameters(self, parts: int = 1) -> int:
        """Of one block's adapters, or of those of one of its parts."""
        return 0 if self.adapter is None else self.adapter.part(parts).parameters()

    def trained_parameters(self) -> int:
        """All that training changes."""
        if self.adapter is None:
            return self.parameter_count()
        return self.distinct_blocks(self.layers) * self.adapter_parameters()

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward: 6N + 12·L·D·T; where only adapters are
        trained, 4N + 6·(adapters) + 12·L·D·T, as frozen weights have no gradient.

        N leaves out the tables that are only looked up (positions, types, and tokens where the
        head has its own), counts a tied head once and shared layers as often as they run; the
        causal half of attention is not discounted, as is the custom (PaLM, arXiv 2204.02311,
        appendix B; nanoGPT `estimate_mfu`).
        """
        if self.generic is not None:
            looked_up = 0 if self.tie_embeddings else self.table_elements(padded=False)
            multiplied = self.generic_parameters - looked_up
            return 6 * multiplied + 12 * self.layers * self.hidden_size * sequence_length
        ends = self.embedding_multiplied() + self.head_parameters()
        multiplied = self.layers * self.block_parameters() + ends
        weights = 6 * multiplied
        if self.adapter is not None:
            weights = 4 * multiplied + 6 * self.layers * self.adapter_parameters()
        return weights + 12 * self.layers * self.hidden_size * sequence_length
