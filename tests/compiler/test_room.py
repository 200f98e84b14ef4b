"""What is kept free for the logits between two calls of the head."""

import subprocess
import sys

import torch

from penstock.compiler.room import Room

SCRIPT = """
from penstock.hardware.process import prepare_process
prepare_process()
import torch
from penstock.compiler.room import Room
size, device = 64 << 20, torch.device("cpu")
room = Room(size)
with room.given(device):
    first = torch.empty(size, dtype=torch.uint8).data_ptr()
others = [torch.empty(size >> shift, dtype=torch.uint8).data_ptr() for shift in range(1, 21)]
print(sum(first <= other < first + size for other in others))
with room.given(device):
    print(torch.empty(size, dtype=torch.uint8).data_ptr() - first)
"""


def test_nothing_else_comes_to_lie_where_the_largest_tensor_was() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["0", "0"], ran.stderr


def test_nothing_is_kept_for_a_device_with_memory_of_its_own() -> None:
    room = Room(1 << 20)
    with room.given(torch.device("meta")):
        pass
    assert room._kept is None
