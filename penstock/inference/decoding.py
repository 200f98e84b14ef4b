"""One batch of prompts through the model, position after position: eagerly, or by kernels.

`inference/engine.py` drives a `Decoder`. It must never know about text, sampling or stopping.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from penstock.compiler.generation import (
    GenerationShapes,
    decode_kernel,
    logits_kernel,
    prefill_kernel,
)
from penstock.compiler.kernels import CompiledKernel
from penstock.compiler.region_inputs import parameters_of
from penstock.inference.cache import Cache, attention_mask
from penstock.models.embedding import Embed
from penstock.models.rotary import rotation
from penstock.models.transformer import Block, Transformer
from penstock.spans import span


@runtime_checkable
class Decoder(Protocol):
    """A model that continues a batch of token rows."""

    most_rows: int | None
    """Most prompts at once; None: any number."""
    most_tokens: int
    """Longest text."""

    def begin(self, padding: Int[Tensor, " B"], capacity: int) -> None:
        """Start a batch: padding (B,) int64 places stand before each prompt, and no row will be
        longer than `capacity`, padding included.
        """
        ...

    def extend(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """Add tokens (B, T) int64 to the rows; logits (B, V) float32 after the last of them."""
        ...


class EagerDecoder:
    """The model as it is, in any shape."""

    most_rows: int | None = None

    def __init__(self, model: Transformer) -> None:
        """The model's device and dtype are used as they are."""
        self.most_tokens = model.architecture.max_positions
        self._model = model
        self._start = 0

    def begin(self, padding: Int[Tensor, " B"], capacity: int) -> None:
        """See `Decoder.begin`."""
        self._padding = padding
        self._cache = Cache(self._model, len(padding), capacity)
        self._start = 0

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """See `Decoder.extend`."""
        start, count = self._start, tokens.shape[1]
        mask = attention_mask(start, count, start, self._padding)
        positions = _positions(start, count, self._padding)
        # The embedding itself: kernels for training may stand in its place, without positions.
        with span("region/embedding"):
            x = Embed.forward(self._model.embed, tokens, None, positions)
        turns = rotation(self._model.architecture, positions)
        for layer, block in enumerate(self._model.blocks):
            cached = self._cache.first(layer, start)
            x, keys, values = cast(Block, block).decode(x, *cached, mask, turns)
            self._cache.store(layer, start, keys, values)
        self._start += count
        return self._model.head.logits(x[:, -1]).float()


class CompiledDecoder:
    """The model's weights through the kernels of an executable for generation.

    Rows are filled up to a compiled batch size, prompts cut into compiled chunks.
    """

    def __init__(
        self, model: Transformer, kernels: Mapping[str, CompiledKernel], shapes: GenerationShapes
    ) -> None:
        """The kernels must be of the model's architecture and dtype, and on its device."""
        self.most_rows: int | None = shapes.rows[-1]
        self.most_tokens = shapes.capacity
        self._model = model
        self._kernels = kernels
        self._shapes = shapes
        block = kernels[decode_kernel(1, shapes.capacity)].contract
        head = kernels[logits_kernel(1)].contract
        self._blocks = [parameters_of(module, block) for module in model.blocks]
        self._head = parameters_of(model.head, head)
        self._start = 0

    def begin(self, padding: Int[Tensor, " B"], capacity: int) -> None:
        """See `Decoder.begin`."""
        self._rows = next(rows for rows in self._shapes.rows if rows >= len(padding))
        self._padding = padding.new_zeros(self._rows)
        self._padding[: len(padding)] = padding
        self._cache = Cache(self._model, self._rows, self._shapes.capacity)
        self._start = 0
        self._room = self._shapes.capacity - capacity

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """See `Decoder.extend`."""
        given, count = tokens.shape
        rows = tokens.new_zeros(self._rows, count)
        rows[:given] = tokens
        chunk = self._shapes.chunk
        missing = chunk - count
        if count > 1 and self._start == 0 and 0 < missing <= self._room:
            # A prompt shorter than a chunk is padded further, where the cache has room for it.
            rows = torch.cat([rows.new_zeros(self._rows, missing), rows], 1)
            self._padding += missing
            count = chunk
        # The last piece reaches back over places already cached, which get the same values again.
        name, size = (decode_kernel, 1) if count < chunk else (prefill_kernel, chunk)
        x = rows
        for offset in [*range(0, count - size, size), count - size]:
            x = self._run(name, rows[:, offset : offset + size], self._start + offset)
        self._start += count
        kernel = self._kernels[logits_kernel(self._rows)].run
        return kernel([*self._head, x[:, -1].contiguous()])[0][:given]

    def _run(
        self, name: Callable[[int, int], str], tokens: Int[Tensor, "B T"], start: int
    ) -> Float[Tensor, "B T D"]:
        """All blocks over tokens (B, T) at places from `start` on, (B, T, D)."""
        count, length = tokens.shape[1], self._shapes.length_for(start)
        kernel = self._kernels[name(self._rows, length)].run
        mask = attention_mask(start, count, length, self._padding)
        positions = _positions(start, count, self._padding)
        x = self._model.embed(tokens, None, positions)
        turns = rotation(self._model.architecture, positions)
        after = [mask] if turns is None else [mask, turns]
        for layer, parameters in enumerate(self._blocks):
            cached = self._cache.first(layer, length)
            x, keys, values = kernel([*parameters, x, *cached, *after])
            self._cache.store(layer, start, keys, values)
        return x


def _positions(start: int, count: int, padding: Int[Tensor, " B"]) -> Int[Tensor, "B T"]:
    """Positions (B, count) int64 of places from `start` on: a prompt's first token is at 0."""
    places = torch.arange(start, start + count, device=padding.device)
    return (places - padding.unsqueeze(1)).clamp(min=0)
