"""How long each region takes on a target: a roofline from the target's figures.

`compiler/layout.py` adds regions up to stages. Pure arithmetic: it must never import torch.

Time is matrix products at the peak, plus traffic at the memory's bandwidth, plus what crosses
links; nothing is assumed to overlap. Figures of data sheets are taken as they are, so that times
are lower bounds; of measured peaks the share is taken that whole steps were seen to reach.
"""

import dataclasses

from penstock.compiler.sizes import ELEMENT_BYTES, OPTIMIZER_BYTES
from penstock.config.recompute import recomputed_share
from penstock.hardware.target import Target
from penstock.models.architecture import Architecture

_BLOCK_ACTIVATIONS = 10
"""Activations of the residual's width that cross memory per token and block in a forward pass;
twice as many in a backward pass. Fitted to GPT-2 124M at 4 × 512 tokens on two Zen 5 cores."""
_KEPT_ACTIVATIONS = 14
"""The same of what a kernel keeps besides under recompute=none, written and read: two norms'
results, the scaled queries and the activation's of four widths."""
_LOGIT_BYTES = 10
"""Bytes that cross memory per logit, loss and gradient together; fitted likewise."""

_REACHED = 0.8
"""Share of the measured peak of large products that a model's products reach: GPT-2 124M at 4 × 512
tokens in bf16 takes whole steps at 77% of it, traffic included (docs/benchmarks.md)."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on."""

    compute: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    """Between devices, and between a device and its streaming memory."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.compute + other.compute, self.bandwidth + other.bandwidth, self.link + other.link
        )

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.compute * factor, self.bandwidth * factor, self.link * factor)

    @property
    def total(self) -> float:
        """All of it, one after the other."""
        return self.compute + self.bandwidth + self.link


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Times of one micro-batch and one step of a model on a target."""

    architecture: Architecture
    target: Target
    micro: int
    """Sequences per micro-batch."""
    sequence_length: int
    compute: str
    recompute: str
    replicas: int = 1
    shard: str = "none"
    compiled: bool = True
    """Whether blocks run through region kernels."""

    @property
    def _rows(self) -> int:
        return self.micro * self.sequence_length

    @property
    def _element(self) -> int:
        return ELEMENT_BYTES[self.compute]

    def block(self) -> tuple[Seconds, Seconds]:
        """Forward and backward of one block, on the mean of all; recomputing one runs it forward
        once more, recomputing selectively without kernels all but its matrix products.
        """
        a = self.architecture
        products = 2 * (a.block_parameters() + a.adapter_parameters())
        flops = self._rows * (products + 4 * a.hidden_size * self.sequence_length)
        # Frozen weights have no gradient: one product of two, in a backward pass.
        frozen = 0 if a.adapter is None else 2 * self._rows * a.block_parameters()
        traffic = _BLOCK_ACTIVATIONS * self._rows * a.hidden_size * self._element
        forward = self._work(flops, traffic) + self._fetch(a.block_parameters())
        backward = self._work(2 * flops - frozen, 2 * traffic)
        backward += self._fetch(2 * a.block_parameters())
        backward += self._work(flops, traffic) * recomputed_share(self.recompute)
        if self.recompute == "none" and self.compiled:
            # Written once more and read once more, where a kernel had it in registers.
            backward += self._work(0, _KEPT_ACTIVATIONS * traffic / _BLOCK_ACTIVATIONS)
        if self.recompute == "selective" and not self.compiled:
            backward += self._work(0, traffic)
        return forward, backward

    def embedding(self) -> tuple[Seconds, Seconds]:
        """Forward and backward of the look-up, which is traffic only, and what follows it."""
        traffic = 2 * self._rows * self.architecture.hidden_size * self._element
        flops = 2 * self._rows * self.architecture.embedding_multiplied()
        return self._work(flops, traffic), self._work(2 * flops, traffic)

    def head(self) -> tuple[Seconds, Seconds]:
        """Forward and backward of the last norm, the projection and the loss."""
        a = self.architecture
        parameters = a.head_parameters()
        flops = 2 * self._rows * parameters
        traffic = _LOGIT_BYTES * self._rows * a.padded_vocab_size / 3
        forward = self._work(flops, traffic) + self._fetch(parameters)
        back = flops if a.adapter is not None else 2 * flops
        return forward, self._work(back, 2 * traffic) + self._fetch(2 * parameters)

    def boundary(self) -> Seconds:
        """One micro-batch's activations, or their gradients, from a stage to the next."""
        size = self._rows * self.architecture.hidden_size * self._element
        return self._over_link(size)

    def update(self, parameters: int) -> Seconds:
        """Once per step, for a device's parameters: sum gradients over replicas, then optimize.

        The optimizer reads and writes masters and moments, reads gradients and writes weights.
        """
        share = parameters / (1 if self.shard == "none" else self.replicas)
        state = 2 * OPTIMIZER_BYTES["adamw"] * share
        # 16-bit gradients in and weights out, or float32 gradients in: masters are the weights.
        seconds = Seconds(bandwidth=4 * share / self.target.bandwidth_bytes_per_second)
        if "optimizer" in self.target.streams:
            seconds += self._over_streaming(state)
        else:
            seconds += Seconds(bandwidth=state / self.target.bandwidth_bytes_per_second)
        if self.shard == "weights":
            return seconds  # gradients were reduced after each micro-batch, see _fetch
        others = (self.replicas - 1) / self.replicas
        return seconds + self._over_link(2 * others * parameters * self._element)

    def _work(self, flops: float, traffic: float) -> Seconds:
        target = self.target
        peak = target.peak(self.compute) * (_REACHED if target.measured else 1.0)
        return Seconds(flops / peak, traffic / target.bandwidth_bytes_per_second)

    def _fetch(self, parameters: int) -> Seconds:
        """Weights or gradients that do not live on the device, to or from it."""
        size = parameters * self._element
        seconds = Seconds()
        if "weights" in self.target.streams:
            seconds += self._over_streaming(size)
        if self.shard == "weights":
            seconds += self._over_link(size * (self.replicas - 1) / self.replicas)
        return seconds

    def _over_link(self, size: float) -> Seconds:
        speed = self.target.link_bytes_per_second
        return Seconds(link=size / speed) if speed and size else Seconds()

    def _over_streaming(self, size: float) -> Seconds:
        speed = self.target.streaming_bytes_per_second
        return Seconds(link=size / speed) if speed else Seconds()
