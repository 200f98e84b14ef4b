"""GPT-NeoX and Pythia: presets, their Hugging Face configuration, their weight names. Never
imports torch.

Sources: Black et al., arXiv 2204.06745; Biderman et al., arXiv 2304.01373, table 1 and the
published configurations; the layout of `transformers`' GPTNeoXForCausalLM.
"""

from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families.activations import read_activation, write_activation
from penstock.models.families.rotary_config import read_rotary, rotary_scaling
from penstock.models.stored import Stored

_STRUCTURE = {
    "activation": "gelu",
    "residual": "parallel",
    "positions": "rotary",
    "rotary_fraction": 0.25,
    "tie_embeddings": False,
}


def _shape(layers: int, hidden_size: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        "max_positions": 2048,
        "vocab_size": vocabulary,
        **_STRUCTURE,
    }


PRESETS = {
    "pythia-70m": _shape(6, 512, 8, 50304),
    "pythia-160m": _shape(12, 768, 12, 50304),
    "pythia-410m": _shape(24, 1024, 16, 50304),
    "pythia-1b": _shape(16, 2048, 8, 50304),
    "pythia-1.4b": _shape(24, 2048, 16, 50304),
    "pythia-2.8b": _shape(32, 2560, 32, 50304),
    "pythia-6.9b": _shape(32, 4096, 32, 50432),
    "pythia-12b": _shape(36, 5120, 40, 50688),
    "gpt-neox-20b": {**_shape(44, 6144, 64, 50432), "activation": "gelu_tanh"},
    "pythia-tiny": {**_shape(2, 64, 4, 512), "max_positions": 64},
}
"""Known shapes; mlp_size is 4 × hidden_size throughout. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a GPT-NeoX config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    if not config.get("attention_bias", True):
        raise ConfigError(
            "attention_bias=False is not supported", where="config.json", do="use another model"
        )
    hidden_size = int(config["hidden_size"])
    rotary = read_rotary(config, base="rotary_emb_base", fraction="rotary_pct")
    is_parallel = bool(config.get("use_parallel_residual", True))
    return {
        **_STRUCTURE,
        "layers": int(config["num_hidden_layers"]),
        "hidden_size": hidden_size,
        "heads": int(config["num_attention_heads"]),
        "mlp_size": int(config.get("intermediate_size") or 4 * hidden_size),
        "max_positions": int(config.get("max_position_embeddings", 2048)),
        "vocab_size": int(config["vocab_size"]),
        "dropout": float(config.get("hidden_dropout") or 0.0),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-5)),
        "activation": read_activation("hidden_act", config.get("hidden_act", "gelu")),
        "residual": "parallel" if is_parallel else "sequential",
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **rotary,
    }


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture."""
    a = architecture
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.heads,
        "intermediate_size": a.mlp_size,
        "max_position_embeddings": a.max_positions,
        "vocab_size": a.vocab_size,
        "hidden_act": write_activation(a.activation),
        "layer_norm_eps": a.norm_epsilon,
        "use_parallel_residual": a.residual == "parallel",
        "attention_bias": True,
        "rotary_pct": a.rotary_fraction,
        "rotary_emb_base": a.rotary_base,
        "rope_scaling": rotary_scaling(a),
        "tie_word_embeddings": a.tie_embeddings,
        "attention_dropout": a.attention_rate,
        "hidden_dropout": a.dropout,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.output": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied head has no entry."""
    names = {
        "embed.tokens.weight": Stored.as_is("gpt_neox.embed_in.weight"),
        "head.norm.weight": Stored.as_is("gpt_neox.final_layer_norm.weight"),
        "head.norm.bias": Stored.as_is("gpt_neox.final_layer_norm.bias"),
    }
    if not architecture.tie_embeddings:
        names["head.projection.weight"] = Stored.as_is("embed_out.weight")
    for layer in range(architecture.layers):
        for ours, theirs in _BLOCK_NAMES.items():
            heads = architecture.heads if ours.endswith("query_key_value") else None
            for kind in ("weight", "bias"):
                theirs_in_full = f"gpt_neox.layers.{layer}.{theirs}.{kind}"
                names[f"blocks.{layer}.{ours}.{kind}"] = Stored((theirs_in_full,), heads=heads)
    return names


PREFIX = "gpt_neox."
"""What files of the bare model leave out."""
RENAMED = {"lm_head.": "embed_out."}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Constant buffers old checkpoints carry."""
