"""TensorBoard's event files of a run, which a full disk may end but never the run.

`metrics.py` writes through here. It must never know where the figures come from.
"""

import contextlib
import threading
from pathlib import Path
from typing import Any

from penstock.console import get_console


class Board:
    """Figures by name and step; those a full disk has no room for are in metrics.jsonl alone."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Figures after `resume_step` will come again; `OSError` where nothing can be written."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - heavy

        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=resume_step + 1)
        # Its thread ends with a traceback on the terminal; the next call tells the same.
        self._hook, threading.excepthook = threading.excepthook, self._of_thread

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Take a step's numbers; what else is in the record is left out."""
        if self._writer is None:
            return
        try:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            get_console().warning(f"TensorBoard ends at step {step}: {error.strerror or error}")
            self.close()

    def close(self) -> None:
        """Write out what is buffered, if there is room; closing twice is fine."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
            threading.excepthook = self._hook

    def _of_thread(self, ended: threading.ExceptHookArgs) -> None:
        if not issubclass(ended.exc_type, OSError):
            self._hook(ended)
