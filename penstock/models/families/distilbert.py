"""DistilBERT: presets, its Hugging Face configuration, its weight names. Never imports torch.

Sources: Sanh et al., arXiv 1910.01108; the layout of `transformers`' DistilBertForMaskedLM.
"""

from typing import Any

from penstock.models.architecture import Architecture
from penstock.models.families import encoder
from penstock.models.families.activations import read_activation, write_activation
from penstock.models.stored import Stored

_STRUCTURE = {"token_types": 0}

PRESETS: dict[str, dict[str, Any]] = {
    "distilbert-base": encoder.shape(6, 768, 12, 30522, **_STRUCTURE),
    "distilbert-tiny": encoder.tiny(**_STRUCTURE),
}
"""Known shapes, with the vocabulary of the uncased models. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a DistilBERT config.json; its norms add 1e-12 always.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    encoder.require_expected(config)
    hidden_size = int(config.get("dim", 768))
    return {
        **encoder.STRUCTURE,
        **_STRUCTURE,
        "layers": int(config.get("n_layers", 6)),
        "hidden_size": hidden_size,
        "heads": int(config.get("n_heads", 12)),
        "mlp_size": int(config.get("hidden_dim", 4 * hidden_size)),
        "max_positions": int(config.get("max_position_embeddings", 512)),
        "vocab_size": int(config.get("vocab_size", 30522)),
        "dropout": float(config.get("dropout") or 0.0),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "activation": read_activation("activation", config.get("activation", "gelu")),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture; it names no end of text."""
    a = architecture
    return {
        "architectures": ["DistilBertForMaskedLM"],
        "model_type": "distilbert",
        "n_layers": a.layers,
        "dim": a.hidden_size,
        "n_heads": a.heads,
        "hidden_dim": a.mlp_size,
        "max_position_embeddings": a.max_positions,
        "vocab_size": a.vocab_size,
        "activation": write_activation(a.activation),
        "dropout": a.dropout,
        "attention_dropout": a.attention_rate,
        "tie_word_embeddings": a.tie_embeddings,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


PREFIX = "distilbert."
"""What files of the bare model leave out."""
_LAYOUT = encoder.Layout(
    prefix=PREFIX,
    layer="distilbert.transformer.layer.{}",
    projection="attention.{0[0]}_lin",
    names={
        "attention.output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
    dense="vocab_transform",
    norm="vocab_layer_norm",
    decoder="vocab_projector",
    bias="vocab_projector.bias",
)


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied projection has no entry."""
    return _LAYOUT.stored(architecture)


RENAMED = {name: name for name in ("vocab_transform.", "vocab_layer_norm.", "vocab_projector.")}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = encoder.IGNORED_SUFFIXES
"""What has no place in a masked language model."""
