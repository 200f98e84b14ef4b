"""Small models of `transformers`, one for each thing a family's configuration can ask for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.huggingface import load_weights, save_weights, to_stored
from penstock.models.resolve import read_hf_config
from penstock.models.transformer import Transformer

Config = transformers.PretrainedConfig

NEOX = {
    "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100,
    "max_position_embeddings": 40, "vocab_size": 97, "initializer_range": 0.08,
}  # fmt: skip


def neox(**changes: object) -> Callable[[], Config]:
    """A GPT-NeoX configuration; every other case is made the same way."""
    return lambda: transformers.GPTNeoXConfig(**{**NEOX, **changes})


GPTJ = {
    "n_layer": 2, "n_embd": 60, "n_head": 3, "n_inner": 100, "n_positions": 40, "vocab_size": 97,
    "rotary_dim": 6, "initializer_range": 0.08, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 100, "max_position_embeddings": 40, "vocab_size": 97,
    "initializer_range": 0.08,
}  # fmt: skip
WAVELENGTHS = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20,
}  # fmt: skip


def gptj(**changes: object) -> Callable[[], Config]:
    """A GPT-J configuration."""
    return lambda: transformers.GPTJConfig(**{**GPTJ, **changes})


def llama(**changes: object) -> Callable[[], Config]:
    """A Llama configuration."""
    return lambda: transformers.LlamaConfig(**{**LLAMA, **changes})


CASES: dict[str, Callable[[], Config]] = {
    "gpt_neox": neox(),
    "gpt_neox sequential": neox(use_parallel_residual=False),
    "gpt_neox all rotary, tanh, tied": neox(
        rotary_pct=1.0, hidden_act="gelu_new", tie_word_embeddings=True, layer_norm_eps=1e-3
    ),
    "gpt_neox linear scaling": neox(
        rotary_pct=0.5, rotary_emb_base=500, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "gptj": gptj(),
    "gptj all rotary, relu": gptj(rotary_dim=20, activation_function="relu", n_inner=None),
    "gptj tied": gptj(tie_word_embeddings=True, layer_norm_epsilon=1e-3),
    "llama": llama(),
    "llama ungrouped, tied": llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama one kv head, biases": llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama linear scaling": llama(rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "llama wavelengths": llama(rope_scaling=WAVELENGTHS, rope_theta=5000.0, rms_norm_eps=1e-5),
}


def reference_model(case: str, **changes: object) -> transformers.PreTrainedModel:
    """The model of `transformers`, weights random, biases and norms away from 0 and 1."""
    torch.manual_seed(5)
    config = CASES[case]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def ours_from(reference: transformers.PreTrainedModel, folder: Path) -> Transformer:
    """Our model of the folder that the reference writes."""
    reference.save_pretrained(folder)
    return ours_in(folder)


def ours_in(folder: Path) -> Transformer:
    """Our model of a folder, by its config.json and its weights."""
    family, fields = read_hf_config(folder)
    model = Transformer(Architecture(family=family, **fields))
    load_weights(folder, model)
    return model


def tokens_for(rows: int = 3, length: int = 33) -> torch.Tensor:
    """Tokens (rows, length) of the vocabulary of 97."""
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients_beside(
    model: Transformer, reference: transformers.PreTrainedModel
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Their name, our gradient as they keep it, and theirs, of every parameter they have."""
    compared = set()
    a = model.architecture
    for name, place in FAMILIES[a.family].hf_names(a).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        has_vocabulary = gradient.shape[0] == a.padded_vocab_size
        assert not gradient[a.vocab_size :].any() or not has_vocabulary
        rows = a.vocab_size if has_vocabulary else None
        for their_name, part in to_stored(place, gradient[:rows]).items():
            expected = reference.get_parameter(their_name.replace("embed_out", "lm_head"))
            compared.add(expected)
            yield their_name, part, expected.grad
    assert compared == set(reference.parameters())


def check_export(first: Transformer, kind: type, tokens: torch.Tensor, folder: Path) -> None:
    """What is written loads in `transformers` with the same logits, and comes back as it was."""
    weights = {name: value.detach() for name, value in first.named_parameters()}
    save_weights(folder, weights, first.architecture, tokenizer=None, end_of_text=96)
    theirs, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (first(tokens) - theirs.eval()(tokens).logits).abs().max() < 1e-4
    again = ours_in(folder)
    assert again.architecture == first.architecture
    for (name, ours), back in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, back), name
