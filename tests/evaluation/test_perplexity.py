"""Sliding-window scores against closed forms and transformers in float64."""

import bz2
import gzip
import lzma
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.data.dataset import Dataset
from penstock.evaluation.compression import compressor_bits
from penstock.evaluation.perplexity import evaluate_split, windows
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 60))
def test_every_target_is_scored_once(targets: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    scored: list[int] = []
    for window in windows(targets, length, stride):
        assert 0 <= window.start
        end = min(window.start + length, targets)
        scored += range(window.start + window.scored, end)
    assert scored == list(range(targets))


def model_and_split(dataset_folder: Path) -> tuple[Transformer, object]:
    from penstock.config.schema import ModelSection

    dataset = Dataset.open(dataset_folder)
    model = Transformer(resolve_architecture(ModelSection(preset="gpt2-tiny"), dataset.vocab_size))
    initialize(model, 0)
    return model, dataset.split("test")


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(dataset_folder: Path) -> None:
    model, split = model_and_split(dataset_folder)
    with torch.no_grad():
        model.head.norm.weight.zero_()
    scores = evaluate_split(model, split, sequence_length=32, stride=None, batch=4)
    assert scores.loss == pytest.approx(math.log(512), rel=1e-6)
    assert scores.perplexity == pytest.approx(512, rel=1e-5)
    total_bits = math.log2(512) * split.token_count
    assert scores.bits_per_byte == pytest.approx(total_bits / split.text_bytes, rel=1e-6)
    assert scores.word_perplexity == pytest.approx(
        math.exp(math.log(512) * split.token_count / split.words), rel=1e-4
    )


def test_windows_equal_a_brute_force_reference(dataset_folder: Path) -> None:
    model, split = model_and_split(dataset_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    length, stride = 16, 5
    stream = [split.end_of_text, *split.tokens[:203].tolist()]
    Short = type("Short", (type(split),), {"token_count": 203})
    short = Short(**vars(split))
    ours = evaluate_split(model, short, sequence_length=length, stride=stride, batch=3)
    double = model.double()
    total = 0.0
    for window in windows(203, length, stride):
        inputs = torch.tensor([stream[window.start : window.start + length]])
        log_probabilities = double(inputs).log_softmax(-1)[0]
        for i in range(window.scored, length):
            total -= log_probabilities[i, stream[window.start + i + 1]].item()
    assert ours.loss == pytest.approx(total / 203, rel=1e-5)


def test_a_shorter_stride_gives_more_context(dataset_folder: Path) -> None:
    model, split = model_and_split(dataset_folder)
    for stride in (1000, 8):
        scores = evaluate_split(model, split, sequence_length=64, stride=stride, batch=8)
        assert scores.tokens == split.token_count


def test_compressors_see_the_original_bytes(dataset_folder: Path, corpus: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    split = dataset.split("test")
    text = dataset.tokenizer().decode(split.tokens.tolist()).replace("<|endoftext|>", "").encode()
    assert len(text) == split.text_bytes
    bits = compressor_bits(split, dataset.tokenizer())
    assert bits["gzip"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), rel=1e-3)
    assert bits["bzip2"] == pytest.approx(8 * len(bz2.compress(text, 9)) / len(text), rel=1e-3)
    assert bits["xz"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text), rel=1e-3)
