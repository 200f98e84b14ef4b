"""The order of samples and the batches cut from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.data.dataset import Dataset
from penstock.data.loader import Loader
from penstock.data.objective import Objective, segments_of
from penstock.data.order import permute
from penstock.data.samples import SplitSamples


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_every_epoch_visits_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [permute(np.arange(1000), 1000, s, e) for s, e in ((0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.15
        assert all((one == other).sum() < 20 for other in orders[:i])


def test_order_needs_no_array_for_billions() -> None:
    size = 7_000_000_000
    places = permute(np.array([0, 1, size - 1]), size, 0, 3)
    assert len(set(places.tolist())) == 3
    assert ((places >= 0) & (places < size)).all()


@pytest.fixture(scope="module")
def split(dataset_folder: Path) -> object:
    return Dataset.open(dataset_folder).split("validation")


def loader(split: object, **more: object) -> Loader:
    options = {"sequence_length": 64, "batch_size": 6, "micro": 2, **more}
    return Loader(SplitSamples(split, 64, seed=1), **options)


def test_an_epoch_has_every_token_as_a_target_once(split: object) -> None:
    whole = loader(split, batch_size=1, micro=1)
    seen = torch.cat(
        [
            batch.targets[batch.loss_weights > 0]
            for position in range(whole.epoch)
            for batch in whole.micro_batches(position)
        ]
    )
    assert sorted(seen.tolist()) == sorted(split.tokens[1:].tolist())


def test_steps_equal_direct_access_from_any_position(split: object) -> None:
    whole = loader(split)
    for start in (0, 12, whole.epoch - 3):
        steps = whole.steps(start)
        for i in range(3):
            position, batches, tokens, _ = next(steps)
            assert tokens == 6 * 64
            assert position == start + 6 * (i + 1)
            for ours, theirs in zip(batches, whole.micro_batches(position - 6), strict=True):
                assert torch.equal(ours.tokens, theirs.tokens)
                assert torch.equal(ours.sequences, theirs.sequences)
        steps.close()


def test_the_micro_batch_size_does_not_change_the_global_batch(split: object) -> None:
    two, three = loader(split), loader(split, micro=3)
    for position in (0, 30):
        parts = [torch.cat([b.tokens for b in x.micro_batches(position)]) for x in (two, three)]
        assert torch.equal(*parts)


def test_documents_are_numbered_up_to_their_end_of_text_and_padding_apart() -> None:
    tokens = np.array([5, 0, 6, 7, 0, 0, 8, 0, 0, 0])
    assert segments_of(tokens, 8, 0).tolist() == [0, 0, 1, 1, 1, 2, 3, 3, -1, -1]
    assert segments_of(tokens, 8, None).tolist() == [0] * 8 + [-1] * 2


def test_confined_to_documents_nothing_is_predicted_from_another_one(split: object) -> None:
    whole, confined = loader(split), loader(split, objective=Objective(split.end_of_text))
    for plain, batch in zip(whole.micro_batches(6), confined.micro_batches(6), strict=True):
        assert plain.segments is None
        ends = batch.tokens == split.end_of_text
        assert torch.equal(batch.segments[:, 1:] - batch.segments[:, :-1], ends[:, :-1].long())
        assert torch.equal(batch.loss_weights, plain.loss_weights * ~ends)
        assert torch.equal(batch.tokens, plain.tokens)
