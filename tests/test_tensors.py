"""Tensors made on demand, and the file they are written to one by one."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from penstock.tensors import OnDemand, in_pieces, write_float32
from penstock.training.masters import joined_in_pieces, split


def test_a_tensor_is_made_when_it_is_asked_for_and_not_kept() -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros(2)

    tensors = OnDemand(["b", "a"], make)
    assert list(tensors) == ["b", "a"]
    assert len(tensors) == 2
    assert "a" in tensors.keys() - {"b"}
    assert made == []
    assert tensors["a"] is not tensors["a"]
    assert made == ["a", "a"]
    with pytest.raises(KeyError, match="c"):
        tensors["c"]


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (3, 5, 7), 'quoted "é"': (2,), "scalar": (), "empty": (0, 4), "last": (9, 1)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_float32(tmp_path / "file", tensors | {"turned": torch.randn(4, 6).t()})
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys() | {"turned"}
    assert read["turned"].shape == (6, 4)
    for name, value in tensors.items():
        assert torch.equal(read[name], value), name


def test_the_file_says_what_it_is_given_to_say(tmp_path: Path) -> None:
    write_float32(tmp_path / "file", {"a": torch.ones(2)}, {"blocks": "1", "cuts": '{"a": [0]}'})
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"blocks": "1", "cuts": '{"a": [0]}'}
        assert torch.equal(file.get_tensor("a"), torch.ones(2))


def test_a_file_of_nothing_reads_as_that(tmp_path: Path) -> None:
    write_float32(tmp_path / "file", {})
    assert safetensors.torch.load_file(tmp_path / "file") == {}


def test_a_master_is_written_by_pieces_and_is_nowhere_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact = torch.randn(5000, 1000)
    master, weight = exact.clone(), torch.empty(5000, 1000, dtype=torch.bfloat16)
    rest = torch.empty(5000, 1000, dtype=torch.int16)
    split([master], [weight], [rest])

    def whole(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was made whole")

    cut = OnDemand(["master.w"], whole, lambda name: joined_in_pieces(weight, rest))
    sizes = [part.numel() for part in in_pieces(cut, "master.w").parts]
    assert sum(sizes) == exact.numel()
    assert 1 < len(sizes)
    assert max(sizes) <= 2 << 20
    write_float32(tmp_path / "file", OnDemand.chosen(["w"], cut, lambda name: f"master.{name}"))
    assert torch.equal(safetensors.torch.load_file(tmp_path / "file")["w"], exact)
    for small in (torch.zeros(0, 3), torch.zeros(()), torch.zeros(7)):
        low = torch.zeros(small.shape, dtype=torch.int16)
        parts = joined_in_pieces(small.bfloat16(), low).parts
        assert [part.shape for part in parts] == [small.shape]
