"""Programs under test can be interrupted, also where the tests themselves run in the background."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from runcomfy.testing.signals import no_longer_ignored

IGNORED = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
SHOW = "import signal; print([signal.getsignal(number) is signal.SIG_IGN for number in {}])"


@pytest.fixture
def _in_the_background() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in IGNORED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="processes inherit no ignored signals on Windows")
@pytest.mark.usefixtures("_in_the_background")
def test_what_was_ignored_is_not_handed_on_to_programs() -> None:
    def ignored_by_a_program() -> str:
        program = [sys.executable, "-I", "-S", "-c", SHOW.format([int(number) for number in IGNORED])]
        return subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    assert ignored_by_a_program() == "[True, True, True]"
    no_longer_ignored()
    assert ignored_by_a_program() == "[False, False, False]"

    signal.raise_signal(IGNORED[-1])  # still does nothing here
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_tests_themselves_ignore_no_ctrl_c() -> None:
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
