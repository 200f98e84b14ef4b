"""Bytes of what a training process holds, by the element, the parameter and the process.

`memory.py` and `cost.py` count with them. It must never import torch.
"""

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes per element of the compute formats."""

PROCESS_BYTES = {"cpu": 290 << 20, "cuda": 900 << 20}
"""Resident size of a process with torch and Penstock loaded: measured on torch 2.13 CPU, for CUDA
an estimate of the context. Other devices hold no process."""

OPTIMIZER_BYTES = {
    **{"adamw": 12, "nadam": 12, "radam": 12, "adamax": 12, "adadelta": 12},
    **{"muon": 8, "sgd": 8, "rmsprop": 8, "adagrad": 8, "adamw_8bit": 6, "adafactor": 4},
}
"""Bytes of state per parameter, the float32 master counted; muon's is of the blocks' matrices.
With adamw_8bit, scales take 1/32 of a byte besides, and small tensors' moments float32."""
LIBRARY_BYTES = {"adamw_8bit": 120 << 20}
"""Resident size of an optimizer's library: bitsandbytes 0.50 and the parts of torch it loads."""
