"""Small masked models of `transformers`, one for each thing a configuration can ask for."""

from collections.abc import Callable

import torch
import transformers

Config = transformers.PretrainedConfig

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100,
    "max_position_embeddings": 42, "vocab_size": 97, "initializer_range": 0.08,
}  # fmt: skip
DISTIL = {
    "n_layers": 2, "dim": 48, "n_heads": 3, "hidden_dim": 100, "max_position_embeddings": 42,
    "vocab_size": 97, "initializer_range": 0.08,
}  # fmt: skip


def bert(**changes: object) -> Callable[[], Config]:
    """A BERT configuration; every other case is made the same way."""
    return lambda: transformers.BertConfig(**{**SMALL, **changes})


def roberta(**changes: object) -> Callable[[], Config]:
    """A RoBERTa configuration."""
    given = {**SMALL, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, **changes}
    return lambda: transformers.RobertaConfig(**given)


def distilbert(**changes: object) -> Callable[[], Config]:
    """A DistilBERT configuration."""
    return lambda: transformers.DistilBertConfig(**{**DISTIL, **changes})


def albert(**changes: object) -> Callable[[], Config]:
    """An ALBERT configuration."""
    given = {**SMALL, "num_hidden_layers": 3, "embedding_size": 20, **changes}
    return lambda: transformers.AlbertConfig(**given)


CASES: dict[str, Callable[[], Config]] = {
    "bert": bert(),
    "bert relu, one type, loose norms": bert(
        hidden_act="relu", type_vocab_size=1, layer_norm_eps=1e-3
    ),
    "roberta": roberta(),
    "roberta padding at 4": roberta(pad_token_id=4),
    "distilbert": distilbert(),
    "distilbert tanh": distilbert(activation="gelu_new"),
    "albert": albert(),
    "albert of one width": albert(embedding_size=48, hidden_act="gelu"),
}


def reference_model(case: str) -> transformers.PreTrainedModel:
    """The model of `transformers`, weights random, biases and norms away from 0 and 1."""
    torch.manual_seed(5)
    model = transformers.AutoModelForMaskedLM.from_config(CASES[case]()).eval().float()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def tokens_for(rows: int = 3, length: int = 33) -> torch.Tensor:
    """Tokens (rows, length) of the vocabulary of 97, none of them padding."""
    return torch.randint(5, 97, (rows, length), generator=torch.Generator().manual_seed(1))
