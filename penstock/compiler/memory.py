"""Predicted memory of one training step, by kind, in bytes.

`compiler/layout.py` asks for each device's. Pure arithmetic: it must never import torch or
allocate.
"""

import dataclasses
import functools

from penstock.compiler.activations import (
    also_kept,
    attention_gradients,
    block_activations,
    eager_inputs,
    handed_over,
    part_parameters,
    product_outputs,
    unpacked_bytes,
)
from penstock.compiler.micro_batch import MicroBatch
from penstock.compiler.sizes import ELEMENT_BYTES, LIBRARY_BYTES, OPTIMIZER_BYTES, PROCESS_BYTES
from penstock.config.recompute import count_recomputed, is_recomputed, kept_values
from penstock.models.adapter import HELD_BYTES, held_base
from penstock.models.parameters import Frozen

_CUT_UP = 0.15
"""Share of what a step allocates and frees that the heap grows by beyond it, since small
allocations that stay cut up what was freed: about the median in docs/benchmarks.md's table."""


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """What one device holds at its peak, and what it has outside."""

    device: dict[str, int]
    """By kind, with the total."""
    outside: dict[str, int]
    """In the target's streaming memory, or in the host's where the device has its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryModel(MicroBatch):
    """Bytes of a model's step on devices of one kind.

    - weights: parameters in the compute format;
    - gradients: the same again, and float32 sums besides when those of several micro-batches or
      replicas are added in bf16;
    - optimizer: float32 moments, and of float32 masters what the weights do not hold themselves;
    - activations: what the blocks keep for the backward pass, of every micro-batch under way;
    - logits: one piece of the loss, and the float32 sum of the pieces' gradients;
    - workspace: the process itself, the largest block's temporaries, and on CPUs room that small
      allocations have cut up;
    - checkpoint: the copy that is written while training goes on, or, where there is none, what
      reading a checkpoint to resume from needs beyond a step.
    """

    accumulation: int
    loss_chunks: int
    device: str
    optimizer: str = "adamw"
    saves: bool = False
    """Whether checkpoints are saved during training, not only at its end."""
    resumes: bool = False
    """Whether training starts from a checkpoint, which is read beside the new state."""
    streams: tuple[str, ...] = ()
    """Kinds that live in the target's streaming memory."""
    own_products: bool = False
    """Whether products are our own."""
    frozen: Frozen = dataclasses.field(default_factory=Frozen)
    """Parameters without gradients and state, besides those under adapters."""
    sums: str = "fp32"
    """Format in which gradients are summed over micro-batches and pieces of the loss."""

    def stage(
        self, layers: int, *, embedding: bool, head: bool, block_passes: int, weight_passes: int = 0
    ) -> StageMemory:
        """One device with these regions; at its peak so many passes of single blocks wait for
        their backward, of which so many only for the gradients of weights.
        """
        parameters = self.parameters(layers, embedding=embedding, head=head)
        trained = self.trained(layers, embedding=embedding, head=head)
        held = self._kinds_by_parameter(parameters, trained, layers)
        held["activations"] = self._activations(block_passes - weight_passes)
        held["activations"] += weight_passes * self._waiting if weight_passes else 0
        held["gradients"] -= self._in_free_room(trained, block_passes)
        held["logits"] = self._logits() if head else 0
        held["workspace"] = PROCESS_BYTES.get(self.device, 0)
        held["workspace"] += LIBRARY_BYTES.get(self.optimizer, 0) if held["workspace"] else 0
        held["workspace"] += self._temporaries if layers else 0
        held["workspace"] += self._gathered(embedding=embedding or head)
        if self.device == "cpu":
            # Sums over micro-batches stay from one to the next.
            comes_and_goes = min(held["gradients"], self._element * trained)
            comes_and_goes += held["activations"] + held["logits"]
            comes_and_goes += held["workspace"] - PROCESS_BYTES["cpu"]
            held["workspace"] += int(_CUT_UP * comes_and_goes)
        outside = {kind: held.pop(kind) for kind in self.streams}
        state = self._state_bytes(trained, layers)
        copy = state if self.saves else 0
        if self.device == "cpu":
            # Before the first step: what is read is there, what a step makes is not.
            step = sum(held[kind] for kind in ("gradients", "activations", "logits"))
            held["checkpoint"] = max(copy, state - step) if self.resumes else copy
        elif copy:
            outside["checkpoint"] = copy
        return StageMemory({**held, "total": sum(held.values())}, outside)

    @functools.cached_property
    def _block_parameters(self) -> int:
        own = self.architecture.adapter_parameters(self.tensor)
        return part_parameters(self.architecture, self.tensor) + own

    def parameters(self, layers: int, *, embedding: bool, head: bool) -> int:
        """Parameters of these regions, the padded vocabulary counted; a tied table once."""
        a = self.architecture
        if a.generic is not None:  # never cut into stages
            return a.parameter_count()
        count = a.distinct_blocks(layers) * self._block_parameters
        count += a.embedding_parameters(padded=True) if embedding else 0
        if head:
            tied = a.table_elements(padded=True) if a.tie_embeddings and embedding else 0
            count += a.head_parameters(padded=True) - tied
        return count

    def trained(self, layers: int, *, embedding: bool, head: bool) -> int:
        """Those of them that have gradients and state: all but what is frozen, in blocks on the
        mean of all layers, or the adapters alone.
        """
        if self.architecture.adapter is not None:
            a = self.architecture
            return a.distinct_blocks(layers) * a.adapter_parameters(self.tensor)
        count = self.parameters(layers, embedding=embedding, head=head)
        count -= self.frozen.embedding * embedding + self.frozen.head * head
        return count - self.frozen.blocks * layers // (self.architecture.layers * self.tensor)

    def _activations(self, block_passes: int) -> int:
        """Kept by a device's blocks for the backward pass; of blocks that are computed again their
        inputs, and while the last one is, what its backward pass reads.
        """
        kept, read = self._block
        again = count_recomputed(self.recompute, block_passes)
        inputs = self._rows * self._element * self.architecture.hidden_size
        last = block_passes > 0 and is_recomputed(self.recompute, block_passes - 1)
        now = read if last else read - kept if block_passes else 0
        return (block_passes - again) * kept + again * inputs + now

    def _in_free_room(self, trained: int, block_passes: int) -> int:
        """Gradients that take the room of what kernels keep besides products' results, which blocks
        give back as they come: measured where products are our own, and only there
        (docs/benchmarks.md).
        """
        keeps_more = self.compiled and kept_values(self.recompute) == "everything"
        if not (self.own_products and keeps_more):
            return 0
        more = also_kept(self.architecture, self._rows, self._element, self.tensor, own=self.own)
        return min(self._element * trained, block_passes * more)

    @functools.cached_property
    def _waiting(self) -> int:
        """What one block holds of one micro-batch while only gradients of weights are to come: of
        what kernels have kept nothing of attention's scores.
        """
        a, parts, rows = self.architecture, self.tensor, self._rows
        held = self._block[0] + handed_over(a, rows, self._element, parts)
        if not self.compiled:
            return held
        scores = a.heads * self.micro * self.sequence_length**2 // parts
        kinds = 2 if kept_values(self.recompute) == "everything" else 1
        scores *= kinds * self._element
        return held - (scores if a.attention_rate > 0 else 4 * rows * a.heads // parts)

    def _kinds_by_parameter(self, parameters: int, trained: int, layers: int) -> dict[str, int]:
        """Weights, gradients, optimizer: replicas may divide them."""
        element = self._element
        addends = self.accumulation * (self.replicas if self.shard == "none" else 1)
        sums = ELEMENT_BYTES[self.sums] if self._has_sums(addends) else 0
        weights_share = self.replicas if self.shard == "weights" else 1
        gradients_share = self.replicas if self.shard in ("gradients", "weights") else 1
        return {
            "weights": (element * parameters - self._held(layers, element)) // weights_share,
            "gradients": (element + sums) * trained // gradients_share,
            "optimizer": self._state_bytes(trained, layers) - self._in_weights(trained, layers),
        }

    def _held(self, layers: int, element: int) -> int:
        """Bytes less for the blocks' matrices where they are held in few bits under adapters."""
        a = self.architecture
        base = held_base(a.adapter)
        matrices = a.distinct_blocks(layers) * a.block_matrix_elements() // self.tensor
        return 0 if base is None else int((element - HELD_BYTES[base]) * matrices)

    def _has_sums(self, addends: int) -> bool:
        """Whether gradients are summed beside the gradients themselves: in another format."""
        return addends > 1 and self.compute != self.sums

    def _in_weights(self, trained: int, layers: int) -> int:
        """Bytes of the masters that the weights are themselves: float32 ones, and, by AdamW on a
        CPU, the upper half of those in bf16 (`training/masters.py`).
        """
        size = 4 * trained if self.compute == "fp32" else 0
        if self.compute == "bf16" and self.device == "cpu":
            by_adamw = {"adamw": trained, "muon": max(0, trained - self._matrices(layers))}
            size = 2 * by_adamw.get(self.optimizer, 0)
        return size // self._optimizer_share()

    def _matrices(self, layers: int) -> int:
        """Parameters that Muon updates: the blocks' matrices, or their adapters."""
        a = self.architecture
        each = a.adapter_parameters(self.tensor) if a.adapter else a.block_matrix_elements()
        return a.distinct_blocks(layers) * each

    def _optimizer_share(self) -> int:
        return 1 if self.shard == "none" else self.replicas

    def _state_bytes(self, parameters: int, layers: int) -> int:
        """Masters and moments of one device: what a checkpoint holds of it."""
        if self.optimizer == "adamw_8bit":
            size = OPTIMIZER_BYTES["adamw_8bit"] * parameters + parameters // 32
            return size // self._optimizer_share()
        state = OPTIMIZER_BYTES[self.optimizer] * parameters
        if self.optimizer == "muon":
            others = max(0, parameters - self._matrices(layers))
            state += (OPTIMIZER_BYTES["adamw"] - OPTIMIZER_BYTES["muon"]) * others
        return state // self._optimizer_share()

    @functools.cached_property
    def _block(self) -> tuple[int, int]:
        """What one block keeps of one micro-batch where it is not computed again as a whole, and
        what its backward pass reads; attention that drops keeps its scores whole, and no
        log-sum-exp.
        """
        a, parts, rows, element = self.architecture, self.tensor, self._rows, self._element
        adapter = a.adapter
        low = 0 if adapter is None else element * rows * adapter.rank * len(adapter.sites)
        scores = a.heads * self.micro * self.sequence_length**2 // parts
        if self.compiled:
            kept = block_activations(a, rows, element, parts) + low
            kept += element * scores - 4 * rows * a.heads // parts if a.attention_rate > 0 else 0
            if kept_values(self.recompute) == "everything":
                kept += also_kept(a, rows, element, parts, own=self.own)
                kept += element * scores if a.attention_rate > 0 else 0
            return kept, kept
        read = rows * eager_inputs(a, element, parts) + low
        if a.attention_rate > 0:
            # Softmax in float32, the mask of what is dropped, and what is left.
            read += 2 * rows * a.hidden_size + (5 + element) * scores
            read += 0 if a.is_causal else rows * self.sequence_length  # who may see whom
        else:
            read += 4 * rows * a.heads // parts
            read += rows * element * a.hidden_size // parts if self.device == "cpu" else 0
            read += 0 if a.is_causal else 8 * rows * a.heads // parts  # segments
        products = rows * element * product_outputs(a, parts)
        return (read if self.recompute == "none" else products), read

    def _logits(self) -> int:
        """One piece's logits, which become their gradient in place; without kernels they are in
        float32 besides. Of several pieces, also one's gradient of the projection, and their sum.
        """
        a, element = self.architecture, self._element
        piece = -(-self._rows // self.loss_chunks) * a.padded_vocab_size
        has_sums = self.loss_chunks > 1 and a.adapter is None
        several = a.table_elements(padded=True) if has_sums else 0
        sums = ELEMENT_BYTES[self.sums] * several
        if self.compiled:
            part = several * element if self._has_sums(self.loss_chunks) else 0
            return piece * element + sums + part
        return piece * (4 + 2 * element) + sums

    @functools.cached_property
    def _temporaries(self) -> int:
        """Gradients inside one block's backward pass: three of the residual's width, two the
        MLP's, for a gated one four; or, on CPUs, attention's scores and their gradients.
        """
        a, rows, element = self.architecture, self._rows, self._element
        inner = (4 if a.gated_mlp else 2) * a.mlp_size
        widest = rows * element * (3 * a.hidden_size + inner // self.tensor)
        if self.compiled and self.device == "cpu" and not self.own:
            attention = attention_gradients(a, rows, element, self.sequence_length)
            widest = max(widest, attention // self.tensor)
        return widest + unpacked_bytes(a, element, compiled=self.compiled)

    def _gathered(self, *, embedding: bool) -> int:
        """Weights and gradients of the largest region, whole while it computes, where replicas
        share them otherwise.
        """
        if self.shard not in ("gradients", "weights") or self.replicas == 1:
            return 0
        a = self.architecture
        table = a.table_elements(padded=True) if embedding else 0
        kinds = 2 if self.shard == "weights" else 1
        block = part_parameters(a, self.tensor)
        return kinds * ELEMENT_BYTES[self.compute] * max(table, block)
