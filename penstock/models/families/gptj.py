"""GPT-J: its preset, its Hugging Face configuration, its weight names. Never imports torch.

Sources: Wang & Komatsuzaki, "GPT-J-6B" (2021), its published configuration; the layout of
`transformers`' GPTJForCausalLM.
"""

import math
from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families.activations import read_activation, write_activation
from penstock.models.stored import Stored

_STRUCTURE = {
    "residual": "parallel_one_norm",
    "attention_bias": False,
    "head_bias": True,
    "positions": "rotary",
    "rotary_fraction": 0.25,
    "rotary_pairs": "neighbours",
    "tie_embeddings": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt-j-6b": {
        "layers": 28,
        "hidden_size": 4096,
        "heads": 16,
        "max_positions": 2048,
        "vocab_size": 50400,
        **_STRUCTURE,
    },
    "gpt-j-tiny": {
        "layers": 2,
        "hidden_size": 64,
        "heads": 4,
        "max_positions": 64,
        "vocab_size": 512,
        **_STRUCTURE,
    },
}
"""Known shapes; mlp_size is 4 × hidden_size throughout. The first is the family's default."""

SCALES_RESIDUAL = False
"""Whether initialization scales the projections that write to the residual stream by depth."""


def from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from the keys of a GPT-J config.json.

    Raises:
        ConfigError: a setting that this family does not have.
    """
    hidden_size, heads = int(config["n_embd"]), int(config["n_head"])
    rotated = config.get("rotary_dim", 64)
    if not rotated:
        raise ConfigError(
            f"rotary_dim={rotated} is not supported",
            where="config.json",
            do="use a model that rotates part of each head",
        )
    return {
        **_STRUCTURE,
        "layers": int(config["n_layer"]),
        "hidden_size": hidden_size,
        "heads": heads,
        "mlp_size": int(config.get("n_inner") or 4 * hidden_size),
        "max_positions": int(config.get("n_positions", 2048)),
        "vocab_size": int(config.get("vocab_size", 50400)),
        "dropout": float(config.get("resid_pdrop") or 0.0),
        "embedding_dropout": float(config.get("embd_pdrop") or 0.0),
        "attention_dropout": float(config.get("attn_pdrop") or 0.0),
        "norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
        "activation": read_activation(
            "activation_function", config.get("activation_function", "gelu_new")
        ),
        "rotary_fraction": _share(int(rotated), hidden_size // heads),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _share(rotated: int, head_size: int) -> float:
    """`rotated` / `head_size`, so that this share of a head, rounded down, is `rotated` again."""
    share = rotated / head_size
    return share if int(share * head_size) == rotated else math.nextafter(share, 2.0)


def to_hf_config(architecture: Architecture, end_of_text: int | None) -> dict[str, Any]:
    """The config.json `transformers` reads for this architecture."""
    a = architecture
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "n_layer": a.layers,
        "n_embd": a.hidden_size,
        "n_head": a.heads,
        "n_inner": a.mlp_size,
        "n_positions": a.max_positions,
        "vocab_size": a.vocab_size,
        "rotary_dim": a.rotary_size,
        "activation_function": write_activation(a.activation),
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
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "attention.output.weight": "attn.out_proj.weight",
    "mlp.up.weight": "mlp.fc_in.weight",
    "mlp.up.bias": "mlp.fc_in.bias",
    "mlp.down.weight": "mlp.fc_out.weight",
    "mlp.down.bias": "mlp.fc_out.bias",
}


def hf_names(architecture: Architecture) -> dict[str, Stored]:
    """Our parameter name → where `transformers` keeps it. A tied head keeps its bias."""
    rows = (architecture.hidden_size,) * 3
    names = {
        "embed.tokens.weight": Stored.as_is("transformer.wte.weight"),
        "head.norm.weight": Stored.as_is("transformer.ln_f.weight"),
        "head.norm.bias": Stored.as_is("transformer.ln_f.bias"),
        "head.projection.bias": Stored.as_is("lm_head.bias"),
    }
    if not architecture.tie_embeddings:
        names["head.projection.weight"] = Stored.as_is("lm_head.weight")
    for layer in range(architecture.layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        projections = tuple(f"{theirs}.attn.{kind}_proj.weight" for kind in "qkv")
        names[f"{ours}.attention.query_key_value.weight"] = Stored(projections, rows)
        for name, their_name in _BLOCK_NAMES.items():
            names[f"{ours}.{name}"] = Stored.as_is(f"{theirs}.{their_name}")
    return names


PREFIX = "transformer."
"""What files of the bare model leave out."""
RENAMED: dict[str, str] = {}
"""Beginnings of names that some versions write → the ones above."""
IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".attn.embed_positions")
"""Constant buffers old checkpoints carry."""
