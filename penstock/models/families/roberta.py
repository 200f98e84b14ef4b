"""RoBERTa: presets, its Hugging Face configuration, its weight names. Never imports torch.

Sources: Liu et al., arXiv 1907.11692; the layout of `transformers`' RobertaForMaskedLM, whose
positions are counted from the row after the padding token's id.
"""

from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families import encoder
from penstock.models.stored import Stored

_OFFSET = 2
_STRUCTURE = {"norm_epsilon": 1e-5, "token_types": 1, "position_offset": _OFFSET}

PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": encoder.shape(12, 768, 12, 50265, **_STRUCTURE),
    "roberta-large": encoder.shape(24, 1024, 16, 50265, **_STRUCTURE),
    "roberta-tiny": encoder.tiny(**_STRUCTURE),
}
"""Known shapes. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a RoBERTa config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    fields = encoder.read_encoder(config, vocab_size=50265)
    if fields["activation"] != "gelu":
        raise ConfigError(
            f"hidden_act={config['hidden_act']} is not RoBERTa's: its head has gelu",
            where="config.json",
            do="use a model with hidden_act=gelu",
        )
    padding = config.get("pad_token_id", _OFFSET - 1)
    offset = int(padding) + 1
    return {
        **fields,
        "position_offset": offset,
        "max_positions": fields["max_positions"] - offset,
    }


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture."""
    return {
        "architectures": ["RobertaForMaskedLM"],
        **encoder.write_encoder(architecture),
        "eos_token_id": end_of_text,
    }


PREFIX = "roberta."
"""What files of the bare model leave out."""
_LAYOUT = encoder.Layout(
    prefix=PREFIX,
    layer="roberta.encoder.layer.{}",
    projection="attention.self.{}",
    names=encoder.LAYER_NAMES,
    dense="lm_head.dense",
    norm="lm_head.layer_norm",
    decoder="lm_head.decoder",
    bias="lm_head.bias",
)


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied projection has no entry."""
    return _LAYOUT.stored(architecture)


RENAMED: dict[str, str] = {}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = encoder.IGNORED_SUFFIXES
"""What has no place in a masked language model."""
