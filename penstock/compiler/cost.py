"""How long each region takes on a target: a roofline from the target's figures.

`compiler/layout.py` adds regions up to stages. Pure arithmetic: it must never import torch.

Time is matrix products at the peak, plus traffic at the memory's bandwidth, plus what crosses
links; nothing is assumed to overlap, but what torch's FSDP2 sends beside a GPU's work. Figures of
data sheets are taken as they are, so that times are lower bounds. On measured machines products run
as such products were measured, and the arithmetic between them counts (`compiler/loops.py`): where
products have units of their own, such as AMX, it is no small part. For GPUs whose share is known
from published runs (`reached` of the target), products, attention and the traffic between are as
GPUs' programs are.
"""

import dataclasses

from penstock.compiler.activations import part_parameters
from penstock.compiler.loops import block_loops, head_loops
from penstock.compiler.micro_batch import MicroBatch
from penstock.compiler.sizes import OPTIMIZER_BYTES
from penstock.config.recompute import recomputed_share
from penstock.hardware.target import Target

_BLOCK_ACTIVATIONS = 10
"""Activations of the residual's width that cross memory per token and block in a forward pass;
twice as many in a backward pass. Fitted to GPT-2 124M at 4 × 512 tokens on two Zen 5 cores."""
_WHOLE_TRAFFIC = 0.5
"""Share of it that every part of a divided block has: norms, sums, what the parts read. Not
fitted."""
_KEPT_ACTIVATIONS = 14
"""The same of what a kernel keeps besides under recompute=none, written and read: two norms'
results, the scaled queries and the activation's of four widths."""
_LOGIT_BYTES = 10
"""Bytes that cross memory per logit, loss and gradient together; fitted likewise."""

_REACHED = 0.9
"""Share of the measured peak that a model's products reach where they were not measured themselves:
88 to 93% inside the kernels of GPT-2 124M on two Zen 4 cores (docs/performance.md)."""

_HALF_WIDTH, _HALF_ROWS = 400, 1000
"""Width of the residual, and tokens of a micro-batch, with which a GPU's products reach half of
what the largest do. With `reached` of the two GPUs and the three figures below, fitted to
MosaicML's tables (docs/plan.md has the rows, and rows of others that nothing was fitted to)."""
_ATTENTION_SHARE, _ATTENTION_BACKWARD = 0.3, 2.5
"""FLOP/s of fused attention beside those of products; its backward pass makes five products of its
forward's two (arXiv 2307.08691, §3.1)."""
_GPU_BLOCK_ACTIVATIONS = 20
"""As _BLOCK_ACTIVATIONS, where each operation between products is a kernel of its own."""


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
class CostModel(MicroBatch):
    """Times of one micro-batch and one step of a model on a target."""

    target: Target
    stages: int = 1

    def block(self) -> tuple[Seconds, Seconds]:
        """Forward and backward of one block, on the mean of all; recomputing one runs it forward
        once more, recomputing selectively without kernels all but its matrix products.
        """
        a = self.architecture
        parameters = part_parameters(a, self.tensor)
        flops = self._rows * 2 * (parameters + a.adapter_parameters(self.tensor))
        # Frozen weights have no gradient: one product of two, in a backward pass.
        frozen = 0 if a.adapter is None else 2 * self._rows * parameters
        traffic = self._activations * self._rows * a.hidden_size * self._element
        traffic *= _WHOLE_TRAFFIC + (1 - _WHOLE_TRAFFIC) / self.tensor
        attention, attention_back = self._attention()
        loops, loops_back = self._loops(
            block_loops(a, self.micro, self.sequence_length, own=self.own)
        )
        loops, loops_back = loops * (1 / self.tensor), loops_back * (1 / self.tensor)
        forward = self._work(flops, traffic) + loops + attention + self._meetings(2)
        # A parallel block's two halves read the same, whose gradient is summed once.
        sums = self._meetings(2 if a.residual == "sequential" else 1)
        backward = self._work(2 * flops - frozen, 2 * traffic) + loops_back + attention_back + sums
        backward += forward * recomputed_share(self.recompute)
        if self.recompute == "none" and self.compiled:
            # Written once more and read once more, where a kernel had it in registers.
            backward += self._work(0, _KEPT_ACTIVATIONS * traffic / _BLOCK_ACTIVATIONS)
        if self.recompute == "selective" and not self.compiled:
            backward += self._work(0, traffic)
        return (
            self._beside(forward, self._fetch(parameters)),
            self._beside(backward, self._fetch(2 * parameters)),
        )

    def _meetings(self, count: int) -> Seconds:
        """So many sums of activations over the parts of a block, in rings, while all wait; parts
        are neighbours.
        """
        size = self._rows * self.architecture.hidden_size * self._element
        speed = self.target.link_bytes_per_second
        if self._crosses_hosts(self.tensor):
            speed = self.target.network_bytes_per_second or speed
        others = (self.tensor - 1) / self.tensor
        return Seconds(link=count * 2 * others * size / speed) if speed else Seconds()

    def _attention(self) -> tuple[Seconds, Seconds]:
        """Scores and their use, forward and backward, of one block."""
        a = self.architecture
        flops = 4 * self._rows * a.hidden_size * self.sequence_length / self.tensor
        if self._reached is None:
            return self._work(flops, 0), self._work(2 * flops, 0)
        # Fused kernels leave out what lies in the future.
        flops /= 2 if a.is_causal else 1
        forward = self._work(flops / _ATTENTION_SHARE, 0)
        return forward, forward * _ATTENTION_BACKWARD

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
        back = flops if a.adapter is not None else 2 * flops
        loops, loops_back = self._loops(head_loops(a, self._rows, own=self.own))
        return (
            self._beside(self._work(flops, traffic) + loops, self._fetch(parameters)),
            self._beside(self._work(back, 2 * traffic) + loops_back, self._fetch(2 * parameters)),
        )

    def boundary(self) -> Seconds:
        """One micro-batch's activations, or their gradients, from a stage to the next.

        Replicas of a stage are neighbours: between stages lies the network where there is one.
        """
        size = self._rows * self.architecture.hidden_size * self._element
        speed = self.target.link_bytes_per_second
        if self._crosses_hosts(self.stages * self.replicas * self.tensor):
            speed = self.target.network_bytes_per_second
        return Seconds(link=size / speed) if speed else Seconds()

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
        peak = target.peak(self.compute)
        if target.measured:
            peak = target.products_flops.get(self.compute, _REACHED * peak)
        if self._reached is not None:
            width = self.architecture.hidden_size
            peak *= self._reached * width / (width + _HALF_WIDTH)
            peak *= self._rows / (self._rows + _HALF_ROWS)
        return Seconds(flops / peak, traffic / target.bandwidth_bytes_per_second)

    def _loops(self, flops: tuple[float, float]) -> tuple[Seconds, Seconds]:
        """Arithmetic between products, forward and backward. Lower bounds leave it out."""
        peak = self.target.loops_flops or self.target.peak_flops.get("fp32")
        if not self.target.measured or peak is None:
            return Seconds(), Seconds()
        return Seconds(compute=flops[0] / peak), Seconds(compute=flops[1] / peak)

    @property
    def _reached(self) -> float | None:
        """Of a data sheet's peak, where it is known."""
        return None if self.target.measured else self.target.reached

    @property
    def _activations(self) -> int:
        is_known = self._reached is not None and not self.compiled
        return _GPU_BLOCK_ACTIVATIONS if is_known else _BLOCK_ACTIVATIONS

    def _beside(self, work: Seconds, sent: Seconds) -> Seconds:
        """Work, and what is sent meanwhile or after it: FSDP2 sends on a stream of its own."""
        if self._reached is None or self.shard != "weights":
            return work + sent
        return work + Seconds(link=max(0.0, sent.total - work.total))

    def _crosses_hosts(self, devices: int) -> bool:
        node = self.target.node_devices
        return node is not None and devices > node

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
        """Among all replicas, in rings: between hosts every device uses its own card, so that a
        host's cards together bring what each of its devices gets.
        """
        target = self.target
        speed = target.link_bytes_per_second
        if speed and self._crosses_hosts(self.replicas * self.tensor):
            network = target.network_bytes_per_second or speed
            speed = min(speed, network * (target.node_devices or 1))
        return Seconds(link=size / speed) if speed and size else Seconds()

    def _over_streaming(self, size: float) -> Seconds:
        speed = self.target.streaming_bytes_per_second
        return Seconds(link=size / speed) if speed else Seconds()
