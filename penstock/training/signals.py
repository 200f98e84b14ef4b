"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP turned into a request to stop after the step at hand.

The trainer asks between steps. A second signal acts as usual, so that nobody is held up.
"""

import signal
import threading
from types import FrameType, TracebackType


class StopSignals:
    """Context manager: inside, the first of them only sets `requested`.

    SIGUSR1 is what Slurm's --signal is often told to send, SIGHUP what a lost terminal sends.
    """

    requested: str | None = None
    """Name of the signal that came, such as "SIGTERM"; None so far."""

    def __enter__(self) -> "StopSignals":
        """Take over the handlers; only the main thread may, others leave them alone."""
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue  # as under nohup
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the handlers back."""
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
