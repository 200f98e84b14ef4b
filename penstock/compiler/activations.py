"""What one block keeps for its backward pass and needs for a while, in bytes or elements.

`compiler/memory.py` counts with it. Pure arithmetic: it must never import torch.
"""

from penstock.compiler.loops import QUERIES, scores_seen
from penstock.compiler.sizes import ELEMENT_BYTES
from penstock.models.adapter import held_base
from penstock.models.architecture import Architecture

_ATTENTION_WIDTHS = 9
"""Other activations of the residual's width meanwhile: of GPT-2 124M's, by the resident set of the
kernel's calls at 1 x 256 to 8 x 1024 tokens."""


def part_parameters(architecture: Architecture, parts: int) -> int:
    """Parameters of one of the equal parts a block is divided into: its share of all but the norms
    and the biases of the two projections back, which every part has.
    """
    a = architecture
    norms = 1 if a.residual == "parallel_one_norm" else 2
    whole = norms * a.norm_parameters() + (a.attention_bias + a.mlp_bias) * a.hidden_size
    return (a.block_parameters() - whole) // parts + whole


def block_activations(architecture: Architecture, rows: int, element: int, parts: int = 1) -> int:
    """Bytes one block keeps: its input, the matrix products' outputs but the last, attention's
    output and log-sum-exp (`compiler/graphs.py` keeps exactly the outputs of matrix products).
    A parallel block's gradients need no sum, hence not what attention's projection gave; those of
    a norm after the MLP need that product too. Of a divided block what one of its parts keeps.
    """
    a = architecture
    attention = a.hidden_size + 2 * a.kv_size + a.hidden_size
    projected = a.hidden_size if a.residual == "sequential" else 0
    projected += a.hidden_size if a.norm_position == "after" else 0
    inner = (2 if a.gated_mlp else 1) * a.mlp_size
    shared = attention + inner
    kept = element * (a.hidden_size + projected + shared // parts)
    return rows * (kept + 4 * a.heads // parts)


def also_kept(
    architecture: Architecture, rows: int, element: int, parts: int = 1, *, own: bool = False
) -> int:
    """Bytes one block keeps besides when nothing is to be computed twice: what goes into its matrix
    products, and the norms' statistics in float32; `own`: attention is one operator, no product.
    """
    a = architecture
    norms = 1 if a.residual == "parallel_one_norm" else 2
    inputs = 1 if a.norm_position == "after" else norms  # the last gives the next block's input
    turned = a.kv_size if a.positions == "rotary" else 0
    statistics = norms * (8 if a.norm == "layer" else 4)
    shared = a.mlp_size + (0 if own else a.hidden_size + turned)
    return rows * (element * (inputs * a.hidden_size + shared // parts) + statistics)


def eager_inputs(architecture: Architecture, element: int, parts: int = 1) -> int:
    """Bytes per position that a block without kernels keeps beside attention's own: norms' inputs
    in float32 with their statistics (RMS norms their results besides), and every product's input.
    """
    a = architecture
    norms = 1 if a.residual == "parallel_one_norm" else 2
    # In float32 two norms of the same input share it.
    inputs = 1 if a.residual == "parallel" and element == ELEMENT_BYTES["fp32"] else norms
    wide = 4 * a.hidden_size * (inputs + (norms if a.norm == "rms" else 0))
    statistics = norms * (8 if a.norm == "layer" else 4)
    inner = (4 if a.gated_mlp else 2) * a.mlp_size
    shared = 4 * a.hidden_size + inner
    return element * (norms * a.hidden_size + shared // parts) + wide + statistics


def product_outputs(architecture: Architecture, parts: int = 1) -> int:
    """Elements per position of one block's input and of all its products' outputs, attention's own
    left out.
    """
    a = architecture
    inner = (2 if a.gated_mlp else 1) * a.mlp_size
    return 3 * a.hidden_size + (a.hidden_size + 2 * a.kv_size + inner) // parts


def handed_over(architecture: Architecture, rows: int, element: int, parts: int = 1) -> int:
    """Bytes one block holds besides between the gradient of its input and those of its weights:
    gradients at the outputs of norms, of the block and its two projections back, and of the MLP's
    inner width (`compiler/backward_parts.py`). That at the queries, keys and values takes the place
    of these. A block's gradient is also that of what it adds, if nothing is dropped there.
    """
    a = architecture
    norms = 1 if a.residual == "parallel_one_norm" else 2
    drops = a.dropout > 0 and a.norm_position == "before"
    added = 2 if drops else int(a.residual == "sequential")
    inner = (2 if a.gated_mlp else 1) * a.mlp_size
    return rows * element * ((norms + 1 + added) * a.hidden_size + inner // parts)


def attention_gradients(architecture: Architecture, rows: int, element: int, length: int) -> int:
    """Bytes in a block's backward kernel on a CPU while attention's gradients are computed: scores
    and their gradients, of each block of queries its part of the keys' and values' gradients.
    """
    a = architecture
    widths = _ATTENTION_WIDTHS + -(-length // QUERIES) + 1
    return element * (rows * widths * a.hidden_size + 2 * scores_seen(a, rows, length))


def unpacked_bytes(architecture: Architecture, element: int, *, compiled: bool) -> int:
    """Bytes of matrices held in few bits while they are computed with: one in float32 twice as it
    is unpacked, and in the compute format it alone, or, for kernels, all of its block.
    """
    a = architecture
    if held_base(a.adapter) is None:
        return 0
    largest = max(a.mlp_size, a.hidden_size + 2 * a.kv_size) * a.hidden_size
    return 2 * 4 * largest + element * (a.block_matrix_elements() if compiled else largest)
