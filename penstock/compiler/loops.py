"""Arithmetic between the matrix products: norms, activations, softmax, masks, sums.

`compiler/cost.py` adds its time on machines whose speeds were measured. Pure arithmetic: it must
never import torch.

Vectors do it, by the same instructions as products in fp32, so it is given as what it takes of
those: FLOPs in whose place, at the measured fp32 peak, a loop runs. From marks around the loops of
GPT-2 124M's kernels, 4 x 512 tokens on two Zen 4 cores with 200 GFLOP/s in fp32
(docs/performance.md); nothing was fitted to other machines.
"""

from penstock.models.architecture import Architecture

QUERIES = 256
"""Of which attention is computed at a time, each with all keys before its end
(`models/blockwise.py`)."""
_SCORE = (174, 174)
"""For each score, forward and backward. 8.2 ms of 9.4 million."""
_INNER = (64, 89)
"""For each value of the activation, forward and backward: GELU, 2.0 and 2.8 ms of 6.3 million."""
_RESIDUAL = (430, 860)
"""For each value of the residual: two norms, two sums, and what is turned and laid out for
attention; 3.4 and 6.8 ms of 1.6 million."""
_LOGIT = 204
"""For each logit: softmax, loss and gradient, 105 ms of 103 million; a third of it forward."""
_OWN_SCORE, _OWN_LOGIT = (8, 16), 41
"""The same by operators of our own (`compiler/operators.py`): of GPT-2 124M on two cores of a Xeon
with AMX, where loops run at 0.12e+12, attention takes 2.4 and 5 ms, its products included, and the
loss 35 ms."""


def scores_seen(a: Architecture, rows: int, length: int) -> int:
    """Scores that one block computes of so many tokens."""
    seen = min(length, (length + QUERIES) // 2) if a.is_causal else length
    return a.heads * rows * seen


def block_loops(
    a: Architecture, micro: int, length: int, *, own: bool = False
) -> tuple[float, float]:
    """FLOPs of one block's loops over so many sequences, forward and backward; `own`: whether
    attention is an operator of ours.
    """
    rows = micro * length
    scores = scores_seen(a, rows, length)
    kinds = zip(_OWN_SCORE if own else _SCORE, _INNER, _RESIDUAL, strict=True)
    forward, backward = (
        score * scores + rows * (inner * a.mlp_size + residual * a.hidden_size)
        for score, inner, residual in kinds
    )
    return forward, backward


def head_loops(a: Architecture, rows: int, *, own: bool = False) -> tuple[float, float]:
    """FLOPs of the head's loops over so many tokens, forward and backward; `own`: whether the loss
    is an operator of ours.
    """
    each = (_OWN_LOGIT if own else _LOGIT) * rows * a.padded_vocab_size / 3
    return each, 2 * each
