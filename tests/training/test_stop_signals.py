"""Stop signals: the first one only asks, and one that is ignored stays ignored."""

import os
import signal

import pytest

from penstock.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    came: list[int] = []
    # Whoever runs the tests in the background has some of them ignored.
    inherited = signal.signal(number, lambda which, _: came.append(which))
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), number)
            assert (stop.requested, came) == (number.name, [])
            os.kill(os.getpid(), number)
            assert came == [number]  # a second one acts as usual
    finally:
        signal.signal(number, inherited)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)
