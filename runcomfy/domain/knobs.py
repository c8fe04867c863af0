"""The numbers that decide when machines are rented and let go (`scaling`), as replays have tuned them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Knobs:
    """What replays have tuned; times in seconds."""

    pays_within_s: float = 100.0
    """A launch for arrivals to come must earn its start back so soon."""
    window_s: float = 300.0
    """A rate rests on what came in about this time, however much came before."""
    overlap_most: float = 1.2
    """How much more often than by chance arrivals are believed to meet."""
    stop_rate: float = 0.85
    """A machine too many is one too many even at this share of the rate. Below 1, so that nothing oscillates."""
    linger_s: float = 30.0
    """A machine is kept so long after the last person left; shorter once enough silences have taught it."""
    linger_silences: int = 20
    hold_s: float = 300.0
    """A machine launched for an intent is kept so long."""
    long_step_s: float = 60.0
    """From here on billing steps decide when to stop and whether to launch."""
    step_margin_s: float = 10.0
    """A stop is asked for so long before a paid step ends: asked at its very end, another one would be billed."""
    present_keep: float = 1.0
    """While somebody is there, the machine is kept so many times as long as after a silence without signals."""
    present_rate: float = 0.4
    """While somebody is there, arrivals are believed in at this share of the rate at which people work."""
    cancel_s: float = 20.0
    """A machine that is not needed any more is taken back so long before it would be ready, since until then it is
    free; not earlier, because the need may return."""
