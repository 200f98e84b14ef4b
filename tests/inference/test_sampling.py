"""Penalties, filters and draws against closed forms and transformers' logits processors."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from penstock.config.schema import GenerateSection
from penstock.inference.sampling import keep_likely, next_token, penalize, row_generator


def random_logits(seed: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@given(st.integers(0, 10**6), st.floats(0.3, 3.0), st.lists(st.integers(0, 49), min_size=1))
def test_penalties_equal_transformers(seed: int, penalty: float, seen: list[int]) -> None:
    logits = random_logits(seed)
    ids = torch.tensor(seen)
    reference = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None])[0]
    assert torch.equal(penalize(logits, ids, penalty), reference)


@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.05, 0.95))
def test_filters_equal_transformers(seed: int, top_k: int, top_p: float) -> None:
    logits = random_logits(seed).double()
    unused = torch.zeros(1, 1, dtype=torch.int64)
    reference = transformers.TopKLogitsWarper(top_k)(unused, logits[None])
    assert torch.equal(keep_likely(logits, top_k, None), reference[0])
    reference = transformers.TopPLogitsWarper(top_p)(unused, reference)
    assert torch.equal(keep_likely(logits, top_k, top_p), reference[0])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).double().log()
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1e-9, 1)):
        assert keep_likely(logits, None, top_p).isfinite().tolist() == [i < kept for i in range(4)]


def test_sampling_follows_the_softmax_of_what_is_kept() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = row_generator(0, 0)
    section = GenerateSection(temperature=0.5, top_k=3)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[next_token(logits, torch.tensor([0]), section, generator)] += 1
    expected = torch.softmax(torch.tensor([0.0, 2.0, 4.0, -torch.inf]), 0)
    assert counts[3] == 0
    assert torch.allclose(counts / 4000, expected, atol=0.025)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 5e-324), ("temperature", 1e-38), ("temperature", 1e308),
     ("repetition_penalty", 5e-324), ("repetition_penalty", 1e308)],
)  # fmt: skip
def test_extreme_settings_still_choose_a_token(setting: str, value: float) -> None:
    section = GenerateSection(**{"temperature": 1.0, setting: value})
    token = next_token(random_logits(1) * 20, torch.arange(30), section, row_generator(0, 0))
    assert 0 <= token < 50


def test_the_coldest_temperature_is_greedy() -> None:
    logits = random_logits(2)
    section = GenerateSection(temperature=1e-40)
    for draw in range(20):
        token = next_token(logits, torch.tensor([0]), section, row_generator(0, draw))
        assert token == int(logits.argmax())


def test_streams_differ_by_seed_and_by_prompt() -> None:
    draws = {
        (seed, prompt): tuple(torch.rand(4, generator=row_generator(seed, prompt)).tolist())
        for seed in (0, 1, 2**63 - 1)
        for prompt in (0, 1, 11)
    }
    assert len(set(draws.values())) == len(draws)
    again = torch.rand(4, generator=row_generator(1, 11)).tolist()
    assert draws[1, 11] == tuple(again)
