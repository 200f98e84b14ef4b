"""ALBERT: presets, its Hugging Face configuration, its weight names. Never imports torch.

Sources: Lan et al., arXiv 1909.11942, with the published configuration of version 2; the layout
of `transformers`' AlbertForMaskedLM. Its layers are one block, its tables narrower than it.
"""

from typing import Any

from penstock.models.architecture import Architecture
from penstock.models.families import encoder
from penstock.models.stored import Stored

_STRUCTURE = {"shared_layers": True, "activation": "gelu_tanh"}

PRESETS: dict[str, dict[str, Any]] = {
    "albert-base-v2": encoder.shape(12, 768, 12, 30000, embedding_size=128, **_STRUCTURE),
    "albert-tiny": encoder.tiny(embedding_size=32, **_STRUCTURE),
}
"""Known shapes. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of an ALBERT config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    given = {"hidden_act": "gelu_new", **config}
    return {
        **encoder.read_encoder(given, vocab_size=30000),
        "shared_layers": True,
        "embedding_size": int(config.get("embedding_size", 128)),
    }


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture."""
    return {
        "architectures": ["AlbertForMaskedLM"],
        **encoder.write_encoder(architecture),
        "embedding_size": architecture.embedding_width,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
        "eos_token_id": end_of_text,
    }


_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
_LAYER_NAMES = {
    "attention.output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "mlp.up": "ffn",
    "mlp.down": "ffn_output",
    "mlp_norm": "full_layer_layer_norm",
}


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied projection has no entry."""
    projection = {
        f"embed.projection.{kind}": Stored.as_is(
            f"albert.encoder.embedding_hidden_mapping_in.{kind}"
        )
        for kind in ("weight", "bias")
    }
    return {
        **encoder.embedding_names(architecture, PREFIX),
        **projection,
        **encoder.head_names(
            architecture,
            dense="predictions.dense",
            norm="predictions.LayerNorm",
            decoder="predictions.decoder",
            bias="predictions.bias",
        ),
        **encoder.layer_names(architecture, "blocks.0", _LAYER, "attention.{}", _LAYER_NAMES),
    }


PREFIX = "albert."
"""What files of the bare model leave out."""
RENAMED = {"predictions.": "predictions."}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = encoder.IGNORED_SUFFIXES
"""What has no place in a masked language model."""
