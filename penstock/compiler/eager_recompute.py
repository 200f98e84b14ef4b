"""Recompute policies for blocks that run without kernels, by torch's own checkpointing.

`jobs.py` applies it where there are no kernels; `compiler/runtime.py` does the same with them. It
must never know about plans.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.config.recompute import is_recomputed
from penstock.models.transformer import Transformer

_KEPT_OPERATORS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""Kept under `selective`. Batched products are not among them: on a CPU attention is made of them,
and their outputs are its scores."""


def recompute_eagerly(model: Transformer, policy: str) -> None:
    """Make the blocks of `model` keep what `policy` (`config/recompute.py`) says, from now on."""
    for index, block in enumerate(dict.fromkeys(model.blocks)):  # shared layers are one block
        again = is_recomputed(policy, index)
        if again or policy != "none":
            kept = () if again else _KEPT_OPERATORS
            block.forward = functools.partial(_checkpointed, block.forward, kept)


def _checkpointed(
    forward: Callable[..., Tensor], kept: Sequence[Any], *inputs: Tensor | None
) -> Tensor:
    """What `forward(*inputs)` gives, computed again in the backward pass but for `kept` operators.

    Randomness needs no care: dropout is a function of its keys.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs)
    # Loaded only here: it brings parts of torch that training without it does not need.
    from torch.utils import checkpoint as torch_checkpoint  # noqa: PLC0415

    choose = torch_checkpoint.noop_context_fn
    if kept:
        choose = functools.partial(
            torch_checkpoint.create_selective_checkpoint_contexts, list(kept)
        )
    return torch_checkpoint.checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=choose
    )
