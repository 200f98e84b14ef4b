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


PREFIX = "bert."
"""What files of the bare model leave out."""
_LAYOUT = encoder.Layout(
    prefix=PREFIX,
    layer="bert.encoder.layer.{}",
    projection="attention.self.{}",
    names=encoder.LAYER_NAMES,
    dense="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    decoder="cls.predictions.decoder",
    bias="cls.predictions.bias",
)


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied projection has no entry."""
    return _LAYOUT.stored(architecture)


RENAMED = {"cls.": "cls."}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = encoder.IGNORED_SUFFIXES
"""What has no place in a masked language model."""
