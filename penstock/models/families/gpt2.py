"""GPT-2: presets, its Hugging Face configuration, its weight names. Never imports torch.

Sources: Radford et al. (2019), table 2; the layout of `transformers`' GPT2LMHeadModel.
"""

from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.stored import Stored


def _shape(
    layers: int, hidden_size: int, heads: int, positions: int, vocabulary: int
) -> dict[str, int]:
    return {
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        "max_positions": positions,
        "vocab_size": vocabulary,
    }


PRESETS = {
    "gpt2": _shape(12, 768, 12, 1024, 50257),
    "gpt2-medium": _shape(24, 1024, 16, 1024, 50257),
    "gpt2-large": _shape(36, 1280, 20, 1024, 50257),
    "gpt2-xl": _shape(48, 1600, 25, 1024, 50257),
    "gpt2-demo": _shape(6, 256, 4, 256, 8192),
    "gpt2-tiny": _shape(2, 64, 4, 64, 512),
}
"""Known shapes; mlp_size is 4 × hidden_size throughout. The first is the family's default."""

SCALES_RESIDUAL = True
"""Whether initialization scales the projections that write to the residual stream by depth."""

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
"""Names `transformers` has for the tanh-approximated GELU."""

_EXPECTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Settings of `transformers` that change what is computed → the one value this family has."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a GPT-2 config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    if config.get("activation_function", "gelu_new") not in _ACTIVATIONS:
        raise ConfigError(
            f"activation_function={config['activation_function']} is not GPT-2's",
            where="config.json",
            do=f"use a model with {' or '.join(_ACTIVATIONS)}",
        )
    for key, expected in _EXPECTED.items():
        if bool(config.get(key, expected)) != expected:
            raise ConfigError(
                f"{key}={config[key]} is not supported", where="config.json", do="use another model"
            )
    hidden_size = int(config["n_embd"])
    return {
        "layers": int(config["n_layer"]),
        "hidden_size": hidden_size,
        "heads": int(config["n_head"]),
        "mlp_size": int(config.get("n_inner") or 4 * hidden_size),
        "max_positions": int(config.get("n_positions", 1024)),
        "vocab_size": int(config.get("vocab_size", 50257)),
        "dropout": float(config.get("resid_pdrop", 0.0)),
        "embedding_dropout": float(config.get("embd_pdrop", 0.0)),
        "attention_dropout": float(config.get("attn_pdrop", 0.0)),
        "norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture."""
    a = architecture
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": a.layers,
        "n_embd": a.hidden_size,
        "n_head": a.heads,
        "n_inner": a.mlp_size,
        "n_positions": a.max_positions,
        "vocab_size": a.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": a.norm_epsilon,
        "tie_word_embeddings": a.tie_embeddings,
        "attn_pdrop": a.attention_rate,
        "embd_pdrop": a.embedding_rate,
        "resid_pdrop": a.dropout,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


_BLOCK_NAMES = {
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied head has no entry.

    `transformers` keeps GPT-2's linear layers as Conv1D, (in, out).
    """
    names = {
        "embed.tokens.weight": Stored.as_is("transformer.wte.weight"),
        "embed.positions.weight": Stored.as_is("transformer.wpe.weight"),
        "head.norm.weight": Stored.as_is("transformer.ln_f.weight"),
        "head.norm.bias": Stored.as_is("transformer.ln_f.bias"),
    }
    if not architecture.tie_embeddings:
        names["head.projection.weight"] = Stored.as_is("lm_head.weight")
    for layer in range(architecture.layers):
        for ours, theirs in _BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                transposed = kind == "weight" and "norm" not in ours
                names[f"blocks.{layer}.{ours}.{kind}"] = Stored(
                    (f"transformer.h.{layer}.{theirs}.{kind}",), transposed=transposed
                )
    return names


PREFIX = "transformer."
"""What files of the bare model leave out."""
RENAMED: dict[str, str] = {}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias")
"""Constant buffers old checkpoints carry."""
