"""BERT: presets, its Hugging Face configuration, its weight names. Never imports torch.

Sources: Devlin et al., arXiv 1810.04805, §3; the layout of `transformers`' BertForMaskedLM.
"""

from typing import Any

from penstock.models.architecture import Architecture
from penstock.models.families import encoder
from penstock.models.stored import Stored

PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": encoder.shape(12, 768, 12, 30522),
    "bert-large": encoder.shape(24, 1024, 16, 30522),
    "bert-tiny": encoder.tiny(),
}
"""Known shapes, with the vocabulary of the uncased models. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a BERT config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    return encoder.read_encoder(config, vocab_size=30522)


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture; BERT's names no end of text."""
    return {"architectures": ["BertForMaskedLM"], **encoder.write_encoder(architecture)}


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied projection has no entry."""
    head = "cls.predictions"
    names = {
        **encoder.embedding_names(architecture, PREFIX),
        **encoder.head_names(
            architecture,
            dense=f"{head}.transform.dense",
            norm=f"{head}.transform.LayerNorm",
            decoder=f"{head}.decoder",
            bias=f"{head}.bias",
        ),
    }
    for layer in range(architecture.layers):
        names |= encoder.layer_names(
            architecture,
            f"blocks.{layer}",
            f"bert.encoder.layer.{layer}",
            "attention.self.{}",
            encoder.LAYER_NAMES,
        )
    return names


PREFIX = "bert."
"""What files of the bare model leave out."""
RENAMED = {"cls.": "cls."}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = encoder.IGNORED_SUFFIXES
"""What has no place in a masked language model."""
