"""What the masked families share: BERT's layout, of which the others are variants.

`bert.py`, `roberta.py`, `distilbert.py` and `albert.py` read and write with it. It must never
import torch. Source: Devlin et al., arXiv 1810.04805.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families.activations import read_activation, write_activation
from penstock.models.stored import Stored

STRUCTURE = {
    "is_causal": False,
    "norm_position": "after",
    "activation": "gelu",
    "norm_epsilon": 1e-12,
    "embedding_norm": True,
    "token_types": 2,
    "head_transform": True,
    "head_bias": True,
}
"""Fields of BERT."""

_EXPECTED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "num_hidden_groups": 1,
    "inner_group_num": 1,
}
"""Settings of `transformers` that change what is computed → the one value there is here."""

IGNORED_SUFFIXES = (
    ".position_ids",
    ".token_type_ids",
    "pooler.weight",
    "pooler.bias",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "seq_relationship.weight",
    "seq_relationship.bias",
    "sop_classifier.classifier.weight",
    "sop_classifier.classifier.bias",
    "predictions.bias",
    "predictions.decoder.bias",
    "lm_head.bias",
    "lm_head.decoder.bias",
)
"""Buffers, the head for pairs of sentences, and the second name of the projection's bias."""


def shape(
    layers: int,
    hidden_size: int,
    heads: int,
    vocab_size: int,
    **more: Any,  # noqa: ANN401 - values of any field
) -> dict[str, Any]:
    """A preset of 512 positions; mlp_size is 4 × hidden_size throughout."""
    return {
        **STRUCTURE,
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        "max_positions": 512,
        "vocab_size": vocab_size,
        **more,
    }


def tiny(**more: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """A preset to try things out with."""
    return {**shape(2, 64, 4, 512), "max_positions": 64, **more}


def read_encoder(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Architecture fields from the keys BERT, RoBERTa and ALBERT share.

    vocab_size: the family's, where the configuration has none.

    Raises:
        ConfigError: a setting that changes the result and is not computed here.
    """
    require_expected(config)
    return {
        **STRUCTURE,
        "layers": int(config.get("num_hidden_layers", 12)),
        "hidden_size": int(config["hidden_size"]),
        "heads": int(config["num_attention_heads"]),
        "mlp_size": int(config["intermediate_size"]),
        "max_positions": int(config.get("max_position_embeddings", 512)),
        "vocab_size": int(config.get("vocab_size", vocab_size)),
        "token_types": int(config.get("type_vocab_size", 2)),
        "dropout": float(config.get("hidden_dropout_prob") or 0.0),
        "attention_dropout": float(config.get("attention_probs_dropout_prob") or 0.0),
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-12)),
        "activation": read_activation("hidden_act", config.get("hidden_act", "gelu")),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def require_expected(config: dict[str, Any]) -> None:
    """Refuse settings under which `transformers` computes something else."""
    for key, expected in _EXPECTED.items():
        if config.get(key, expected) != expected:
            raise ConfigError(
                f"{key}={config[key]} is not supported",
                where="config.json",
                do=f"use a model with {key}={expected}",
            )


def write_encoder(architecture: Architecture) -> dict[str, Any]:
    """The keys BERT, RoBERTa and ALBERT share."""
    a = architecture
    return {
        "model_type": a.family,
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.heads,
        "intermediate_size": a.mlp_size,
        "max_position_embeddings": a.max_positions + a.position_offset,
        "vocab_size": a.vocab_size,
        "type_vocab_size": a.token_types,
        "hidden_act": write_activation(a.activation),
        "layer_norm_eps": a.norm_epsilon,
        "hidden_dropout_prob": a.dropout,
        "attention_probs_dropout_prob": a.attention_rate,
        "tie_word_embeddings": a.tie_embeddings,
        "pad_token_id": max(0, a.position_offset - 1),
        "torch_dtype": "float32",
    }


LAYER_NAMES = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
"""BERT's and RoBERTa's layers, without query, key and value."""


def embedding_names(architecture: Architecture, prefix: str) -> dict[str, Stored]:
    """Everything under `embeddings`."""
    tables = {"tokens": "word_embeddings", "positions": "position_embeddings"}
    if architecture.token_types:
        tables["token_types"] = "token_type_embeddings"  # noqa: S105 - no password
    names = {
        f"embed.{ours}.weight": f"{prefix}embeddings.{theirs}.weight"
        for ours, theirs in tables.items()
    }
    for kind in ("weight", "bias"):
        names[f"embed.norm.{kind}"] = f"{prefix}embeddings.LayerNorm.{kind}"
    return {ours: Stored.as_is(theirs) for ours, theirs in names.items()}


def head_names(
    architecture: Architecture, *, dense: str, norm: str, decoder: str, bias: str
) -> dict[str, Stored]:
    """The head; the projection's bias has a name of its own only where the table is tied."""
    is_tied = architecture.tie_embeddings
    names = {"head.projection.bias": bias if is_tied else f"{decoder}.bias"}
    if not is_tied:
        names["head.projection.weight"] = f"{decoder}.weight"
    for kind in ("weight", "bias"):
        names[f"head.transform.{kind}"] = f"{dense}.{kind}"
        names[f"head.norm.{kind}"] = f"{norm}.{kind}"
    return {ours: Stored.as_is(theirs) for ours, theirs in names.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a family keeps its weights in `transformers`' model."""

    prefix: str
    """What stands before the names of the model without its head."""
    layer: str
    """Path of a layer, with a place for its number."""
    projection: str
    """Name of query, key and value in a layer, with a place for which it is."""
    names: Mapping[str, str]
    """Our name of everything else in a layer → its own."""
    dense: str
    norm: str
    decoder: str
    bias: str
    """Of the head: its dense layer, its norm, its projection, and that one's bias where tied."""

    def stored(self, architecture: Architecture) -> dict[str, Stored]:
        """Our parameter name → where `transformers` keeps it. A tied projection has no entry."""
        names = embedding_names(architecture, self.prefix)
        names |= head_names(
            architecture, dense=self.dense, norm=self.norm, decoder=self.decoder, bias=self.bias
        )
        for layer in range(architecture.layers):
            theirs = self.layer.format(layer)
            names |= layer_names(
                architecture, f"blocks.{layer}", theirs, self.projection, self.names
            )
        return names


def layer_names(
    architecture: Architecture, ours: str, theirs: str, projection: str, names: Mapping[str, str]
) -> dict[str, Stored]:
    """One layer; `projection` is the name of query, key and value with a place for which it is."""
    found: dict[str, Stored] = {}
    for kind in ("weight", "bias"):
        parts = ("query", "key", "value")
        projections = tuple(f"{theirs}.{projection.format(part)}.{kind}" for part in parts)
        rows = (architecture.hidden_size,) * 3
        found[f"{ours}.attention.query_key_value.{kind}"] = Stored(projections, rows)
        for name, their_name in names.items():
            found[f"{ours}.{name}.{kind}"] = Stored.as_is(f"{theirs}.{their_name}.{kind}")
    return found
