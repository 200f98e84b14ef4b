"""Where the user's keys and caches lie."""

from pathlib import Path

import pytest

from penstock.config.folders import user_cache_folder, user_config_folder


def test_xdg_variables_are_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "k"))
    assert user_config_folder() == tmp_path / "c" / "penstock"
    assert user_cache_folder() == tmp_path / "k" / "penstock"


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_absent_empty_and_relative_variables_mean_home(
    value: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert user_config_folder() == tmp_path / ".config" / "penstock"
    assert user_cache_folder() == tmp_path / ".cache" / "penstock"


def test_asking_makes_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    user_cache_folder()
    assert list(tmp_path.iterdir()) == []
