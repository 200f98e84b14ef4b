"""Predicted memory of generating, by kind, in bytes.

`compiler/planner.py` asks for it. Pure arithmetic: it must never import torch.
"""

from penstock.compiler.sizes import ELEMENT_BYTES, PROCESS_BYTES
from penstock.models.architecture import WEIGHT_GROUP, Architecture


def generation_memory(
    architecture: Architecture,
    *,
    rows: int,
    capacity: int,
    compute: str,
    weights: str | None,
    device: str,
) -> dict[str, int]:
    """Peak bytes of generating `rows` texts of `capacity` tokens: weights (of blocks and head),
    embeddings, key-value cache, logits, workspace, and total.

    A head tied to the embeddings is counted apart from them: it is kept in another layout.
    """
    a, element = architecture, ELEMENT_BYTES[compute]
    table = a.table_elements(padded=True)
    matrices = a.layers * a.block_matrix_elements() + table
    others = a.layers * a.block_parameters() + a.head_parameters(padded=True) - matrices
    # Scales in float32, one for each group of a row.
    each = element if weights is None else 1 + 4 / WEIGHT_GROUP
    memory = {
        "weights": int(each * matrices) + 4 * others,
        "embeddings": element * a.embedding_parameters(padded=True),
        "cache": 2 * element * architecture.layers * rows * capacity * architecture.kv_size,
        "logits": 4 * rows * architecture.padded_vocab_size,
        "workspace": PROCESS_BYTES[device],
    }
    return {**memory, "total": sum(memory.values())}
