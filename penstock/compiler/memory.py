"""Predicted memory of one training step, by kind, in bytes.

`compiler/plan.py` adds it up. Pure arithmetic: it must never import torch or allocate.
"""

from penstock.models.architecture import Architecture

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes per element of the compute formats."""

PROCESS_BYTES = {"cpu": 430 << 20, "cuda": 900 << 20}
"""Resident size of a process that has torch and Penstock loaded: measured on torch 2.13 CPU;
the figure for CUDA is an estimate of the context."""


def step_memory(
    architecture: Architecture,
    *,
    micro: int,
    sequence_length: int,
    accumulation: int,
    compute: str,
    recompute: str,
    loss_chunks: int,
    device: str,
) -> dict[str, int]:
    """Peak bytes of weights, gradients, optimizer, activations, logits, workspace, and total.

    - weights: parameters in the compute format;
    - gradients: the same again, and float32 sums besides when micro-batches accumulate in bf16;
    - optimizer: two float32 moments, and float32 masters when the weights are not float32;
    - activations: what each block keeps for the backward pass;
    - logits: one piece of the loss in float32 and its gradient, and the projection's float32 sum;
    - workspace: the process itself, and the largest block's temporaries.
    """
    element = ELEMENT_BYTES[compute]
    parameters = architecture.parameter_count(padded=True)
    rows = micro * sequence_length
    masters = 0 if compute == "fp32" else 4
    memory = {
        "weights": element * parameters,
        "gradients": element * parameters
        + (4 * parameters if accumulation > 1 and compute != "fp32" else 0),
        "optimizer": (8 + masters) * parameters,
        "activations": _activations(architecture, micro, sequence_length, element, recompute),
        "logits": _logits(architecture, rows, element, loss_chunks),
        "workspace": PROCESS_BYTES[device] + _temporaries(architecture, rows, element),
    }
    return {**memory, "total": sum(memory.values())}


def block_activations(architecture: Architecture, rows: int, element: int) -> int:
    """Bytes one block keeps: its input, the four matrix products' outputs, attention's output
    and log-sum-exp (`compiler/graphs.py` keeps exactly the outputs of matrix products).
    """
    d, f = architecture.hidden_size, architecture.mlp_size
    per_row = element * (d + 3 * d + d + d + f) + 4 * architecture.heads
    return rows * per_row


def _activations(
    architecture: Architecture, micro: int, sequence_length: int, element: int, recompute: str
) -> int:
    """All blocks' kept activations; with recompute their inputs, and one block's in full."""
    rows = micro * sequence_length
    full = block_activations(architecture, rows, element)
    if architecture.dropout > 0:
        full += micro * architecture.heads * sequence_length**2 * (element + 4)
    if recompute == "blocks":
        return architecture.layers * rows * element * architecture.hidden_size + full
    return architecture.layers * full


def _logits(architecture: Architecture, rows: int, element: int, chunks: int) -> int:
    """One piece's logits (compute format, float32) and their gradient; the projection's sum."""
    piece = -(-rows // chunks) * architecture.padded_vocab_size
    projection = architecture.padded_vocab_size * architecture.hidden_size
    return piece * (4 + 2 * element) + (4 * projection if chunks > 1 else 0)


def _temporaries(architecture: Architecture, rows: int, element: int) -> int:
    """Gradients inside one block's backward pass: three of the residual's width, two the MLP's."""
    return rows * element * (3 * architecture.hidden_size + 2 * architecture.mlp_size)


def generation_memory(
    architecture: Architecture, *, rows: int, capacity: int, compute: str, device: str
) -> dict[str, int]:
    """Peak bytes of generating `rows` texts of `capacity` tokens: weights, key-value cache,
    logits, workspace, and total.
    """
    element = ELEMENT_BYTES[compute]
    memory = {
        "weights": element * architecture.parameter_count(padded=True),
        "cache": 2 * element * architecture.layers * rows * capacity * architecture.hidden_size,
        "logits": 4 * rows * architecture.padded_vocab_size,
        "workspace": PROCESS_BYTES[device],
    }
    return {**memory, "total": sum(memory.values())}
