"""A file being written under a temporary name, for the writers of formats.

Each writer holds one for as long as its split lasts. It must never know what is written.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.files import fsync_file, fsync_folder


class OutputFile:
    """Opens PATH's temporary sibling; PATH appears only by `finish`."""

    def __init__(self, path: Path) -> None:
        """Create the folder and the temporary file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._close: Callable[[], Any] = lambda: None

    def opened(self, close: Callable[[], Any]) -> None:
        """Note how to close whatever handle has been opened on `temporary`."""
        self._close = close

    def finish(self) -> Path:
        """Close, make durable, and give the file its name."""
        self._close()
        fsync_file(self.temporary)
        self.temporary.replace(self.path)
        fsync_folder(self.path.parent)
        return self.path

    def abandon(self) -> None:
        """Close and remove the temporary file."""
        try:
            self._close()
        finally:
            self.temporary.unlink(missing_ok=True)
