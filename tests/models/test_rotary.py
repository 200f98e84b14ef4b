"""Rotary positions: against complex numbers in float64, and the frequencies of `transformers`."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.config.schema import ModelSection
from penstock.models.architecture import Architecture
from penstock.models.resolve import resolve_architecture
from penstock.models.rotary import frequencies, rotate, rotation
from tests.numerics import assert_matches


def architecture(preset: str = "llama-tiny", **fields: object) -> Architecture:
    a = resolve_architecture(ModelSection(preset=preset))
    return Architecture(**{**vars(a), **fields})


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_pairs_turn_by_position_times_frequency(pairs: str, fraction: float) -> None:
    a = architecture(rotary_pairs=pairs, rotary_fraction=fraction)
    size = a.rotary_size
    x = torch.randn(2, 3, 7, a.head_size, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([range(7), range(100, 107)])
    turns = rotation(a, positions)
    assert turns is not None
    ours = rotate(x, turns, pairs)
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = positions[:, None, :, None] * 10000.0**-exponents
    wide = x[..., :size].double()
    halves = (wide[..., : size // 2], wide[..., size // 2 :])
    first, second = halves if pairs == "halves" else (wide[..., ::2], wide[..., 1::2])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    parts = [turned.real, turned.imag]
    expected = torch.cat(parts, -1) if pairs == "halves" else torch.stack(parts, -1).flatten(-2)
    assert_matches(ours[..., :size], expected, 1e-5)
    assert torch.equal(ours[..., size:], x[..., size:])


def test_scores_depend_on_distance_alone() -> None:
    a = architecture()
    g = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 1, 1, a.head_size, generator=g) for _ in range(2))

    def score(query_at: int, key_at: int) -> torch.Tensor:
        at = [rotation(a, torch.tensor([[place]])) for place in (query_at, key_at)]
        return (rotate(query, at[0], "halves") * rotate(key, at[1], "halves")).sum()

    assert_matches(score(40, 33), score(7, 0), 1e-5)
    assert (score(40, 33) - score(40, 32)).abs() > 1e-2


def test_models_with_learned_positions_have_no_rotation() -> None:
    assert rotation(architecture("gpt2-tiny"), torch.zeros(1, 3, dtype=torch.int64)) is None


@pytest.mark.parametrize("preset", ["llama-3-8b", "llama-3.1-8b", "llama-3.2-1b"])
def test_frequencies_equal_transformers_bit_for_bit(preset: str) -> None:
    a = architecture(preset)
    scaling = {
        "rope_type": "llama3", "rope_theta": a.rotary_base, "factor": a.rotary_factor,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    if a.rotary_scaling == "none":
        scaling = {"rope_type": "linear", "rope_theta": a.rotary_base, "factor": 1.0}
    config = LlamaConfig(
        hidden_size=a.hidden_size, num_attention_heads=a.heads, max_position_embeddings=131072,
        rope_parameters=scaling,
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    assert factor == 1
    assert torch.equal(frequencies(a), expected)


def test_rotation_is_float32_whatever_the_models_format() -> None:
    a = architecture()
    turns = rotation(a, torch.arange(64)[None])
    assert turns is not None
    assert turns.dtype == torch.float32
    x = torch.randn(1, 1, 64, a.head_size).bfloat16()
    ours = rotate(x, turns, "halves")
    assert ours.dtype == torch.bfloat16
    assert_matches(ours, rotate(x.float(), turns, "halves"), 2**-8)
