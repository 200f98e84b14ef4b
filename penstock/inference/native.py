"""Generating through the native kernel: all blocks in one call, no padding, any prompt lengths.

`runs.py` chooses it where an executable holds that kernel. It must never know about text.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from penstock.compiler.kernels import CompiledKernel
from penstock.compiler.native import STEP_KERNEL, cache_places
from penstock.compiler.plan import Plan
from penstock.inference.packing import pack
from penstock.models.rotary import rotation
from penstock.models.transformer import Transformer

_MOST_TOKENS = 256
"""Prompt tokens per call: enough that weights are read seldom, few enough that activations stay
small."""


class NativeDecoder:
    """The model's weights, packed, and a cache for as many texts as the kernel was made for."""

    def __init__(
        self,
        model: Transformer,
        kernels: Mapping[str, CompiledKernel],
        plan: Plan,
        *,
        release: bool = False,
    ) -> None:
        """The kernel must be `plan`'s, and that of the model's architecture.

        With `release` the model's blocks and head are emptied once they are packed.
        """
        a = model.architecture
        self.most_rows: int | None = plan.micro
        self.most_tokens = plan.sequence_length
        self._kernel = kernels[STEP_KERNEL].run
        self._embed = model.embed
        self._vocab_size = a.vocab_size
        self._weights, self._offsets = pack(model, plan.weights or plan.compute, release=release)
        spec = self._kernel.spec.inputs[2]
        dtype = torch.float32 if spec.dtype == "float32" else torch.bfloat16
        # Not zeroed: only places that have been written are read.
        self._cache = torch.empty((a.layers, *spec.shape[1:]), dtype=dtype)
        places = torch.arange(cache_places(plan.sequence_length))
        turns = rotation(a, places.unsqueeze(0))  # (2, 1, 1, places, P)
        if turns is None:
            turns = torch.empty(2, 1, 1, len(places), 0)
        self._turns = turns.flatten(0, 2).transpose(0, 1).contiguous()  # (places, 2, P)

    def begin(self, padding: Int[Tensor, " B"], capacity: int) -> None:
        """See `Decoder.begin`; room is always for the longest text."""
        self._padding = padding
        self._most_padding = int(padding.max())
        self._start = 0

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """See `Decoder.extend`. Padding is left out; a row of nothing else gets zeros."""
        given, count = tokens.shape
        start, self._start = self._start, self._start + count
        if count == 1 and start >= self._most_padding:  # every row has one new token: its last
            every = torch.arange(given)
            logits = torch.empty(given, self._vocab_size)
            self._run(tokens[:, 0], every, start - self._padding, every, logits)
            return logits
        positions = torch.arange(start, self._start) - self._padding.unsqueeze(1)
        texts, columns = (positions >= 0).nonzero(as_tuple=True)
        chosen, positions = tokens[texts, columns], positions[texts, columns]
        logits = torch.zeros(given, self._vocab_size)
        for first in range(0, len(texts), _MOST_TOKENS):
            piece = slice(first, first + _MOST_TOKENS)
            last = (columns[piece] == count - 1).nonzero().flatten()
            self._run(chosen[piece], texts[piece], positions[piece], last, logits)
        return logits

    def _run(
        self,
        tokens: Int[Tensor, " N"],
        texts: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        last: Int[Tensor, " W"],
        logits: Float[Tensor, "B V"],
    ) -> None:
        """One call: tokens (N) of texts (N) at positions (N); the logits after the tokens `last`
        (W) go into their texts' rows.
        """
        x = self._embed(tokens.unsqueeze(0), None, positions.unsqueeze(0))[0].float()
        out = (
            logits[: len(last)]
            if len(last) == len(logits)
            else logits.new_empty(len(last), self._vocab_size)
        )
        turns = self._turns[positions]
        self._kernel(
            [self._weights, self._offsets, self._cache, x, texts, positions, turns, last, out]
        )
        if out.data_ptr() != logits.data_ptr():
            logits[texts[last]] = out
