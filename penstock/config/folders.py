"""Where the user's keys and caches live.

Signing, the kernel cache and probes ask here. Only this module, `cli.py` and the process set-up
read the environment.
"""

import os
from pathlib import Path


def user_config_folder() -> Path:
    """Folder of this user's settings and keys ($XDG_CONFIG_HOME/penstock or ~/.config/penstock)."""
    return _folder("XDG_CONFIG_HOME", ".config")


def user_cache_folder() -> Path:
    """Folder for what can be made again ($XDG_CACHE_HOME/penstock or ~/.cache/penstock)."""
    return _folder("XDG_CACHE_HOME", ".cache")


def _folder(variable: str, default: str) -> Path:
    """XDG base directory specification 0.8: relative paths in the variables are ignored."""
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "penstock"
