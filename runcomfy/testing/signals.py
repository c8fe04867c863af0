"""
Processes that tests start are to heed Ctrl-C and hang-ups, whatever started the tests.

A shell without job control ignores Ctrl-C for what it puts into the background, `nohup` ignores the hang-up, and a
process hands what it ignores on to those that it starts: `nohup make test &` would test programs that cannot be
interrupted. What the product does where it is started so itself is not decided here.
"""

from __future__ import annotations

import signal
from types import FrameType

_UNHEARD = ("SIGHUP", "SIGTERM", "SIGQUIT")


def _unheeded(number: int, frame: FrameType | None) -> None:
    """Do nothing: this process goes on as before. Unlike an ignored signal, a handled one is not handed on."""


def no_longer_ignored() -> None:
    """Start processes from here on with the signals' own meaning; call it in the main thread.

    A Ctrl-C that was ignored raises KeyboardInterrupt here, too; other signals that were ignored still do nothing.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _UNHEARD:
        number: signal.Signals | None = getattr(signal, name, None)  # Windows has not all of them
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _unheeded)
