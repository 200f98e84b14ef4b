"""Masters divided into a bf16 weight and 16 bits more: exact, and the weight as near as can be."""

import torch

from penstock.training.masters import is_split, join, joined, split


def test_every_master_comes_back_bit_for_bit() -> None:
    low = torch.arange(1 << 16, dtype=torch.int32)
    # 1, its neighbour with an odd upper half, -2, a denormal, the largest finite one, infinity.
    tops = (0x3F80, 0x3F81, -0x4000, 0x0001, 0x7F7F)
    bits = torch.cat([*(low + (top << 16) for top in tops), torch.tensor([0x7F800000, 0])])
    masters = bits.to(torch.int32).view(torch.float32)
    weight = torch.empty(len(masters), dtype=torch.bfloat16)
    rest = torch.empty(len(masters), dtype=torch.int16)
    split([masters.clone()], [weight], [rest])
    again = torch.zeros_like(masters)
    join([again], [weight], [rest])
    assert torch.equal(again.view(torch.int32), masters.view(torch.int32))
    assert torch.equal(joined(weight, rest).view(torch.int32), masters.view(torch.int32))


def test_weights_are_the_nearest_and_of_two_the_larger() -> None:
    masters = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    weight, rest = masters.bfloat16(), torch.empty(len(masters), dtype=torch.int16)
    nearest = masters.bfloat16()
    split([masters.clone()], [weight], [rest])
    tie = masters.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(weight[~tie], nearest[~tie])
    halfway = torch.tensor([1 + 2**-8, -1 - 2**-8])
    split([halfway], [weight[:2]], [rest[:2]])
    assert weight[:2].tolist() == [1 + 2**-7, -1 - 2**-7]


def test_only_bf16_on_a_cpu_is_split() -> None:
    assert is_split(torch.zeros(1, dtype=torch.bfloat16))
    assert not is_split(torch.zeros(1))
    assert not is_split(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
