"""Any language model of `transformers` that is of none of our families, behind the interface of
`Transformer`: trained and evaluated as it is, without kernels.

`jobs.py` and `runs.py` make one where an architecture is generic. It must never run code that
comes with a model: only classes that `transformers` itself has.
"""

import contextlib
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from penstock.errors import CheckpointError
from penstock.models.architecture import Architecture
from penstock.models.layers import dropout_keys

_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "attn_implementation")


def generic_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields of a config.json, its parameters counted without allocating them.

    Raises:
        KeyError: a kind of model that `transformers` does not have.
        ValueError: one that is no language model, or cannot be made.
    """
    is_causal = _is_causal(config)
    try:
        read = _read(config)
        with torch.device("meta"):
            model = _class_of(is_causal).from_config(read)
    except Exception as error:  # many kinds, one meaning
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"transformers cannot make this model: {reason}") from None
    hidden_size = int(getattr(read, "hidden_size", 0) or 1)
    heads = int(getattr(read, "num_attention_heads", 0) or 1)
    text = read.to_dict() | {"architectures": [type(model).__name__]}
    return {
        "layers": int(getattr(read, "num_hidden_layers", 0) or 1),
        "hidden_size": hidden_size,
        "heads": heads if hidden_size % heads == 0 else 1,
        "mlp_size": int(getattr(read, "intermediate_size", 0) or 4 * hidden_size),
        "max_positions": int(getattr(read, "max_position_embeddings", 0) or 1 << 20),
        "vocab_size": int(read.vocab_size),
        "dropout": min(0.99, max(_rates(text), default=0.0)),
        "tie_embeddings": bool(getattr(read, "tie_word_embeddings", True)),
        "is_causal": is_causal,
        "generic": json.dumps(text, sort_keys=True, default=str),
        "generic_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _rates(config: Mapping[str, Any]) -> list[float]:
    """Every probability of dropout in a configuration."""
    named = ((key, value) for key, value in config.items() if "drop" in key)
    return [float(value) for _, value in named if isinstance(value, int | float)]


def _read(config: dict[str, Any]) -> transformers.PretrainedConfig:
    values = _without_code(config)
    return transformers.CONFIG_MAPPING[values.pop("model_type")].from_dict(values)


def _without_code(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A configuration without the keys by which one has made the library fetch and run programs,
    at any depth: auto_map (CVE-2025-66448), trust_remote_code (CVE-2026-5241), private ones such as
    _attn_implementation_internal (CVE-2026-4372).
    """
    if isinstance(value, list):
        return [_without_code(entry) for entry in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entries = cast("dict[str, Any]", value).items()
    return {
        key: _without_code(entry)
        for key, entry in entries
        if key not in _CODE and not key.startswith("_")
    }


def _is_causal(config: dict[str, Any]) -> bool:
    """Whether a model predicts the next token; else it fills in masked ones."""
    kind = config["model_type"]
    named = str((config.get("architectures") or [""])[0])
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not causal and not masked:
        raise ValueError(f"{kind} is no causal or masked language model")
    return causal and not (masked and named.endswith("ForMaskedLM"))


def _class_of(is_causal: bool) -> Any:  # noqa: ANN401 - two classes without a common type
    return transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM


class _Head(nn.Module):
    """The end of a model whose `hidden` gives its logits already."""

    def logits(self, x: Tensor) -> Tensor:
        """X itself."""
        return x


class GenericModel(nn.Module):
    """A model of `transformers` with the methods of `Transformer`."""

    def __init__(self, architecture: Architecture) -> None:
        """Build with the library's random weights.

        Where nothing drops, it runs as in evaluation; else with the rates of its configuration.
        """
        super().__init__()
        self.architecture = architecture
        config = _read(json.loads(architecture.generic or "{}"))
        self.inner: Any = _class_of(architecture.is_causal).from_config(config).float()
        self.inner.train(architecture.dropout > 0)
        self.blocks = nn.ModuleList()
        self.head = _Head()

    @staticmethod
    def load(folder: Path, architecture: Architecture, dtype: torch.dtype) -> "GenericModel":
        """With the weights of FOLDER, in safetensors or a pytorch_model.bin of weights only.

        Raises:
            CheckpointError: no weights, damaged ones, or such that do not fit.
        """
        model = GenericModel(architecture)
        kind = _class_of(architecture.is_causal)
        try:
            inner, report = kind.from_pretrained(
                folder,
                config=_read(json.loads(architecture.generic or "{}")),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # many kinds, one meaning
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"the weights in {folder} cannot be read: {reason}",
                where="model.from",
                do="copy the folder again",
            ) from None
        for what in ("missing_keys", "mismatched_keys"):
            if report[what]:
                raise CheckpointError(
                    f"the weights in {folder} do not fit: {what.replace('_', ' ')}, such as "
                    f"{sorted(map(str, report[what]))[0]}",
                    where="model.from",
                    do="use the config.json that belongs to them",
                )
        model.inner = inner.train(architecture.dropout > 0)
        return model

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        loss_weights: Float[Tensor, "B T"] | None = None,
        keys: Sequence[Tensor] | None = None,
        z_loss: Float[Tensor, ""] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """See `Transformer.forward`; of segments only the padding is made use of."""
        logits = self.hidden(tokens, segments, keys)
        if targets is None:
            return logits
        losses, normalizers = _losses(logits, targets)
        if loss_weights is None:
            loss_weights = torch.ones_like(losses)
        if z_loss is not None:
            losses = losses + z_loss * normalizers.square()
        return (losses * loss_weights).sum()

    @torch.no_grad()
    def token_losses(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T"]:
        """See `Transformer.token_losses`."""
        return _losses(self.hidden(tokens, segments), targets)[0]

    def dropout_keys(
        self, seed: int, step: int, sequences: Int[Tensor, " B"]
    ) -> list[Tensor] | None:
        """One key () int64 for a micro-batch; None without dropout. Another cut of the batch drops
        other elements: the library draws them for the whole micro-batch.
        """
        if self.architecture.dropout == 0:
            return None
        return [dropout_keys(seed, step, sequences[:1], -1, 1)[0, 0]]

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """The logits: what the library has between is its own."""
        given: dict[str, Tensor] = {}
        if segments is not None:
            given["attention_mask"] = (segments >= 0).long()
        with _drawn_from(None if keys is None else int(keys[0]), self.inner):
            return self.inner(input_ids=tokens, **given).logits[..., : self.architecture.vocab_size]


@contextlib.contextmanager
def _drawn_from(key: int | None, inner: nn.Module) -> Generator[None]:
    """Have the library's dropout draw from a key, and leave the global generator as it was; no
    key: nothing is dropped.
    """
    was_training = inner.training
    inner.train(key is not None)
    try:
        with torch.random.fork_rng(enabled=key is not None):
            if key is not None:
                torch.manual_seed(key)
            yield
    finally:
        inner.train(was_training)


def _losses(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Negative log-likelihood of each target, and the log-partition, (B, T) float32."""
    wide = logits.float()
    normalizers = torch.logsumexp(wide, -1)
    nll = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view_as(normalizers), normalizers


def save_generic(folder: Path, weights: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Write config.json and weights by `save_pretrained`; weights: float32, by our names."""
    model = GenericModel(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.inner.save_pretrained(folder)
