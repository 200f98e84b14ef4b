"""Llama 2 and 3: presets, their Hugging Face configuration, their weight names. Never imports
torch.

Sources: Touvron et al., arXiv 2307.09288, and "The Llama 3 Herd of Models", arXiv 2407.21783,
table 3, with the published configurations; the layout of `transformers`' LlamaForCausalLM.
"""

from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families.activations import read_activation, write_activation
from penstock.models.families.rotary_config import read_rotary, rotary_scaling
from penstock.models.stored import Stored

_STRUCTURE = {
    "norm": "rms",
    "activation": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
    "positions": "rotary",
}


def _llama2(layers: int, hidden_size: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp_size": inner,
        "max_positions": 4096,
        "vocab_size": 32000,
        "tie_embeddings": False,
        **_STRUCTURE,
    }


def _llama3(
    layers: int, hidden_size: int, heads: int, inner: int, positions: int
) -> dict[str, Any]:
    return {
        **_llama2(layers, hidden_size, heads, 8, inner),
        "max_positions": positions,
        "vocab_size": 128256,
        "rotary_base": 500000.0,
    }


def _stretched(factor: float) -> dict[str, Any]:
    return {"rotary_scaling": "llama3", "rotary_factor": factor}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama2(32, 4096, 32, 32, 11008),
    "llama-2-13b": _llama2(40, 5120, 40, 40, 13824),
    "llama-2-70b": _llama2(80, 8192, 64, 8, 28672),
    "llama-3-8b": _llama3(32, 4096, 32, 14336, 8192),
    "llama-3-70b": _llama3(80, 8192, 64, 28672, 8192),
    "llama-3.1-8b": {**_llama3(32, 4096, 32, 14336, 131072), **_stretched(8.0)},
    "llama-3.2-1b": {
        **_llama3(16, 2048, 32, 8192, 131072),
        **_stretched(32.0),
        "tie_embeddings": True,
    },
    "llama-tiny": {
        **_llama2(2, 64, 4, 2, 176),
        "max_positions": 64,
        "vocab_size": 512,
    },
}
"""Known shapes; Llama 2's norms add 1e-5 as all others do. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a Llama config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    hidden_size, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_size = config.get("head_dim") or hidden_size // heads
    if head_size * heads != hidden_size:
        raise ConfigError(
            f"head_dim={head_size} is not hidden_size / num_attention_heads",
            where="config.json",
            do="use a model whose heads fill the hidden size",
        )
    rotary = read_rotary(config, base="rope_theta", fraction="partial_rotary_factor")
    if rotary.get("rotary_fraction", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor={rotary['rotary_fraction']} is not Llama's",
            where="config.json",
            do="use a model that rotates whole heads",
        )
    return {
        **_STRUCTURE,
        "layers": int(config["num_hidden_layers"]),
        "hidden_size": hidden_size,
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "mlp_size": int(config["intermediate_size"]),
        "max_positions": int(config.get("max_position_embeddings", 2048)),
        "vocab_size": int(config["vocab_size"]),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "activation": read_activation("hidden_act", config.get("hidden_act", "silu")),
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **rotary,
    }


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture."""
    a = architecture
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads // a.group_size,
        "head_dim": a.head_size,
        "intermediate_size": a.mlp_size,
        "max_position_embeddings": a.max_positions,
        "vocab_size": a.vocab_size,
        "hidden_act": write_activation(a.activation),
        "rms_norm_eps": a.norm_epsilon,
        "attention_bias": a.attention_bias,
        "mlp_bias": a.mlp_bias,
        "rope_theta": a.rotary_base,
        "rope_scaling": rotary_scaling(a),
        "tie_word_embeddings": a.tie_embeddings,
        "attention_dropout": a.attention_rate,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied head has no entry."""
    a = architecture
    names = {
        "embed.tokens.weight": Stored.as_is("model.embed_tokens.weight"),
        "head.norm.weight": Stored.as_is("model.norm.weight"),
    }
    if not a.tie_embeddings:
        names["head.projection.weight"] = Stored.as_is("lm_head.weight")
    for layer in range(a.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        names[f"{ours}.attention_norm.weight"] = Stored.as_is(f"{theirs}.input_layernorm.weight")
        names[f"{ours}.mlp_norm.weight"] = Stored.as_is(f"{theirs}.post_attention_layernorm.weight")
        for kind in ("weight", "bias") if a.attention_bias else ("weight",):
            projections = tuple(f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            rows = (a.hidden_size, a.kv_size, a.kv_size)
            names[f"{ours}.attention.query_key_value.{kind}"] = Stored(projections, rows)
            output = f"{theirs}.self_attn.o_proj.{kind}"
            names[f"{ours}.attention.output.{kind}"] = Stored.as_is(output)
        for kind in ("weight", "bias") if a.mlp_bias else ("weight",):
            for part in ("gate", "up", "down"):
                place = Stored.as_is(f"{theirs}.mlp.{part}_proj.{kind}")
                names[f"{ours}.mlp.{part}.{kind}"] = place
    return names


PREFIX = "model."
"""What files of the bare model leave out."""
RENAMED: dict[str, str] = {}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Constant buffers old checkpoints carry."""
