"""One stage of a transformer: some of its blocks, with the embedding or the head at the ends.

`pipeline.py` runs them. A stage is the same `Transformer` with what others hold left out, so that
names, kernels and arithmetic are the whole model's. It must never know about processes.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import Parameter

from penstock.models.rotary import positions_within, rotation
from penstock.models.transformer import Transformer
from penstock.spans import span

TABLE = "embed.tokens.weight"
"""Name of the token embeddings, also where the head projects with them."""


def layers_of_pieces(layers_per_stage: Sequence[int], pieces: int) -> list[range]:
    """The blocks of each piece of the depth, in order. Devices take pieces in turns, `pieces` each;
    a device's first pieces are the longer ones where its blocks cannot be divided evenly.
    """
    counts = [
        total // pieces + (total % pieces > piece)
        for piece in range(pieces)
        for total in layers_per_stage
    ]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


class Stage(Transformer):
    """A piece of the depth of `whole`, whose modules it shares; the others need no memory."""

    def __init__(
        self, whole: Transformer, pieces: Sequence[range], index: int, z_loss: float
    ) -> None:
        """The blocks of `pieces[index]`; the first piece comes with the embedding, the last one
        with the head. `z_loss` is the factor of the log-partition penalty.
        """
        nn.Module.__init__(self)  # Not Transformer's: that would make all parameters anew.
        self.architecture = whole.architecture
        self.index = index
        self.is_last = index == len(pieces) - 1
        self.layers = pieces[index]
        # Adapters and frozen parameters: what lies before the first that is trained needs none.
        trained = {
            _piece_of(name, pieces) for name, p in whole.named_parameters() if p.requires_grad
        }
        self.takes_gradient = any(piece <= index for piece in trained)
        """Whether this stage wants the gradient of what it gives."""
        self.gives_gradient = any(piece < index for piece in trained)
        """Whether the stage before wants that of what this one gets."""
        # Modules without parameters stand where other stages have theirs.
        blocks = [b if i in self.layers else nn.Module() for i, b in enumerate(whole.blocks)]
        parts: dict[str, Any] = {
            "embed": whole.embed if index == 0 else nn.Module(),
            "blocks": nn.ModuleList(blocks),
            "head": whole.head if self.is_last else nn.Module(),
        }
        if self.is_last and index > 0 and self.architecture.tie_embeddings:
            # The head's copy of the table goes by the table's name, as in the whole model.
            parts["embed"].tokens = whole.embed.tokens
        for name, module in parts.items():
            setattr(self, name, module)
        self.z_loss = torch.tensor(z_loss, device=next(self.parameters()).device)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - a stage takes what the one before gives
        self,
        x: Int[Tensor, "B T"] | Float[Tensor, "B T D"],
        targets: Int[Tensor, "B T"],
        loss_weights: Float[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "B T D"] | Float[Tensor, "B T"] | Float[Tensor, ""]:
        """Tokens or the residual stream (B, T, D) → the residual stream; from the last stage the
        weighted loss () float32, or without loss_weights (B, T) each target's. For the others see
        `Transformer.forward`.
        """
        x = self.hidden(x, segments, keys)
        if not self.is_last:
            return x
        if loss_weights is None:
            return self.head.token_losses(x, targets)
        return _loss_at_once(self.head, x, targets, loss_weights, self.z_loss)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"] | Float[Tensor, "B T D"],
        segments: Int[Tensor, "B T"] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after this stage's last block, from tokens or from the one before."""
        positions = None if segments is None else positions_within(segments)
        x = tokens
        if self.index == 0:
            learned = None if self.embed.positions is None else positions
            x = self.embed(tokens, None if keys is None else keys[0], learned)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        turns = rotation(self.architecture, positions)
        for index in self.layers:
            x = self.blocks[index](x, None if keys is None else keys[index + 1], turns, segments)
        return x


def _loss_at_once(head: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    """The head's loss, its backward pass done: its gradients are as large as the projection, and
    schedules that begin backward passes late would keep those of every micro-batch.
    """
    first = x.detach().requires_grad_()
    loss: Tensor = head(first, *rest)
    with span("phase/backward"):
        loss.backward()
    return _Loss.apply(x, loss.detach(), first.grad)


class _Loss(torch.autograd.Function):
    """A loss whose gradient of x is there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:  # noqa: ANN401 - torch's context type is not public
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


def holds(name: str, pieces: Sequence[range], own: Collection[int], *, is_tied: bool) -> bool:
    """Whether a process with the pieces `own` has a parameter or tensor of the optimizer, named as
    the whole model's: PARAMETER or KIND.PARAMETER. `is_tied`: the table is also the head's.
    """
    if name.partition(".")[0] not in ("embed", "blocks", "head"):
        name = name.partition(".")[2]
    return _piece_of(name, pieces) in own or (is_tied and name == TABLE and len(pieces) - 1 in own)


def _piece_of(name: str, pieces: Sequence[range]) -> int:
    """The piece a parameter of the whole model is in; a tied table is the embedding's."""
    region, _, inside = name.partition(".")
    if region != "blocks":
        return 0 if region == "embed" else len(pieces) - 1
    layer = int(inside.partition(".")[0])
    return next(index for index, piece in enumerate(pieces) if layer in piece)


def named_parameters(stages: Sequence[Stage]) -> Iterator[tuple[str, Parameter]]:
    """All parameters of a process's stages, under the names the whole model gives them."""
    for stage in stages:
        yield from stage.named_parameters()
