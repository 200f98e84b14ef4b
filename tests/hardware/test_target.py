"""Targets: every figure has a source, every mistake in a file names its key in one line."""

import dataclasses
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.hardware.target import Target, load_target, target_names

GOOD = """
name: mine
device: cpu
memory_bytes: 8e9
peak_flops: {bf16: 1e12, fp32: 2.0e+11}
bandwidth_bytes_per_second: 40.0e9
fast_bf16: true
"""
FIGURES = (
    "devices",
    "memory_bytes",
    "peak_flops",
    "products_flops",
    "loops_flops",
    "bandwidth_bytes_per_second",
    "link_bytes_per_second",
    "node_devices",
    "network_bytes_per_second",
    "reached",
    "streaming_memory_bytes",
    "streaming_bytes_per_second",
    "sums",
)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", target_names())
def test_each_target_loads_and_names_a_source_for_each_figure(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    plain = Target(
        name="",
        device="",
        memory_bytes=0,
        peak_flops={},
        bandwidth_bytes_per_second=0,
        fast_bf16=True,
    )
    given = {key for key in FIGURES if getattr(target, key) != getattr(plain, key)}
    assert set(target.sources) == given
    assert all(len(source) > 20 for source in target.sources.values())


def test_the_systems_users_come_from_are_there() -> None:
    expected = {
        "a100-80gb", "a100-cluster", "cerebras-cs2", "gaudi2", "graphcore-pod16", "graphcore-pod64", "h100",
        "h100-cluster", "h200", "sambanova-sn30-tile", "xeon-amx-2core",
        "zen5-2core",
    }  # fmt: skip
    assert expected <= set(target_names())
    assert load_target("graphcore-pod16").memory_bytes == 900_000_000
    assert load_target("graphcore-pod16").devices == 16
    assert load_target("graphcore-pod64").devices == 64


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, GOOD))
    assert target.memory_bytes == 8_000_000_000
    assert target.peak_flops == {"bf16": 1e12, "fp32": 2e11}
    assert (target.devices, target.streams, target.measured) == (1, (), False)
    assert dataclasses.asdict(target) == target.to_json()


def test_a_format_without_a_figure_is_refused_where_it_is_used(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, GOOD.replace(", fp32: 2.0e+11", "")))
    assert target.peak("bf16") == 1e12
    with pytest.raises(ConfigError, match=r"no figure for fp32 \(precision.compute\): use"):
        target.peak("fp32")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("memory_bytes: 8e9\n", "", "lacks memory_bytes"),
        ("name: mine\n", "", "lacks name"),
        ("fast_bf16: true\n", "", "lacks fast_bf16"),
        ("peak_flops: {bf16: 1e12, fp32: 2.0e+11}\n", "", "lacks peak_flops"),
        ("8e9", "-8e9", "memory_bytes=-8e9 .*: give a finite figure greater than zero"),
        ("8e9", "0", "memory_bytes=0 .*: give a finite figure"),
        ("8e9", ".inf", "memory_bytes=inf .*: give a finite figure"),
        ("8e9", ".nan", "memory_bytes=nan .*: give a finite figure"),
        ("8e9", "1e999", "memory_bytes=1e999 .*: give a finite figure"),
        ("8e9", "lots", "memory_bytes=lots, not a number"),
        ("8e9", "true", "memory_bytes=True, not a number"),
        ("8e9", "[8]", r"memory_bytes=\[8\], not a number"),
        ("bf16: 1e12", "bf16: -1", "peak_flops.bf16=-1 .*: give a finite figure"),
        ("bf16: 1e12", "fp8: 1e12", "peak_flops for fp8"),
        ("{bf16: 1e12, fp32: 2.0e+11}", "1e12", "peak_flops=1e12, not a mapping"),
        ("{bf16: 1e12, fp32: 2.0e+11}", "{}", "peak_flops for nothing"),
        ("fast_bf16: true", "fast_bf16: maybe", "fast_bf16=maybe .*: write true or false"),
        ("fast_bf16: true", "fast_bf16: true\nown_operators: 2", "own_operators=2 .*: write true"),
        ("fast_bf16: true", "fast_bf16: true\nown_products: 2", "own_products=2 .*: write true"),
        ("device: cpu", "device: cpu\ndevices: 2", "lacks link_bytes_per_second"),
        ("device: cpu", "device: cpu\ndevices: 1.5\nlink_bytes_per_second: 1", "devices=1.5"),
        ("device: cpu", "device: cpu\nproducts_flops: {bf16: -1}", "products_flops.bf16=-1 .*: give"),
        ("device: cpu", "device: cpu\nproducts_flops: {fp8: 1}", "products_flops for fp8"),
        ("device: cpu", "device: cpu\nmemory: 9", "unknown key memory .*: did you mean"),
        ("device: cpu", "device: cpu\nsums: fp8", "sums=fp8 .*: use bf16 or fp32"),
        ("device: cpu", "device: cpu\nstreams: [cats]", "streams=.*list some of optimizer, weights"),
        ("device: cpu", "device: cpu\nstreaming_memory_bytes: 1", "lacks streaming_bytes_per_second"),
    ],
)  # fmt: skip
def test_mistakes_in_a_target_are_one_line_that_names_the_key(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = write(tmp_path, GOOD.replace(before, after))
    with pytest.raises(ConfigError, match=message) as caught:
        load_target(path)
    assert "plan.target" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1\n", "{", "name: [", "\x00", "a: &a [*a]\n"])
def test_what_is_no_target_at_all_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="mine.yaml"):
        load_target(write(tmp_path, text))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_target(str(path))


def test_unknown_names_are_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean graphcore-pod16"):
        load_target("graphcore-pod1")
    with pytest.raises(ConfigError, match="choose detect, cpu, a100-80gb"):
        load_target("moon")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("devices: 16\nnode_devices: 5\nnetwork_bytes_per_second: 1e9", "multiple of node_devices"),
        ("devices: 16\nnode_devices: 8", "lacks network_bytes_per_second"),
        ("devices: 16\nnetwork_bytes_per_second: 1e9", "lacks node_devices"),
        ("devices: 16\nreached: 1.2", "reached=1.2"),
    ],
)
def test_hosts_are_described_whole_or_not_at_all(lines: str, message: str, tmp_path: Path) -> None:
    link = "link_bytes_per_second: 1e10\n"
    with pytest.raises(ConfigError, match=message):
        load_target(write(tmp_path, GOOD + link + lines))
