"""One emulated machine: its life, what the API says about it, and what it costs.

The server (`runcomfy.testing.emulators.runcomfy.server`) moves machines along; this module holds their facts and the
emulated cloud's own books, which tests compare with the client's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from enum import StrEnum
from typing import Any, Final, Protocol

Span = timedelta | float
"""A time: timedelta, or seconds."""

DEFAULT_RATES: Final[Mapping[str, Decimal]] = {
    "medium": Decimal("0.99"),
    "large": Decimal("1.75"),
    "extra-large": Decimal("2.50"),
    "2x-large": Decimal("4.99"),
    "2xl-turbo": Decimal("7.49"),
}
"""USD per hour, pay as you go, for the documented machine types (RunComfy billing page, as of 2026)."""

_MICRODOLLAR: Final = Decimal("0.000001")


def in_seconds(span: Span) -> float:
    """Return a span in seconds."""
    return span.total_seconds() if isinstance(span, timedelta) else float(span)


def billed_usd(seconds: Decimal, usd_per_hour: Decimal) -> Decimal:
    """Return what so many seconds cost, to the millionth of a dollar."""
    return (seconds * usd_per_hour / 3600).quantize(_MICRODOLLAR, ROUND_HALF_UP)


def stamp(at: datetime) -> str:
    """Write a time as the API does: RFC 3339 with microseconds and `Z`."""
    return at.strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"


class ComfyServer(Protocol):
    """What runs on an emulated machine."""

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen there (port 0: at any free one), and return the address."""
        ...

    async def stop(self) -> None:
        """Go away."""
        ...


class Stage(StrEnum):
    """Where a machine is in its life; the value is the word the API uses."""

    STARTING = "Starting"
    READY = "Ready"
    DELETING = "Deleting"
    FAILED = "Error"
    GONE = "Stopped"


@dataclass(kw_only=True, slots=True)
class Traits:
    """How one machine misbehaves; the default does not. Times are timedeltas, or seconds.

    Attributes:
        boot_time: how long it is `Starting`; None: the cloud's own.
        stuck: `Starting` for ever.
        fails: becomes `Error` instead of `Ready`.
        hidden_for: its status is 404 for so long after the launch.
        unlisted_for: it is missing from the list for so long after the launch.
        answers_as: the id that the launch's answer shows instead of its own.
        comfyui: what its address does when `Ready`: "works", "refused", "502", "html" (a splash page).
        comfyui_for: how long it does that before ComfyUI works; None: for ever.
        flaps: turns from `Ready` to `Starting` and back each time so long has passed.
        vanishes_after: it is gone, without a word, so long after `Ready`.
        ignores_stop_time: it runs on when its time is up.
        ignores_delete: DELETE is answered with yes, and it runs on (or still becomes `Ready`).
        delete_takes: how long it is `Deleting`; None: the cloud's own.
        listed_after: how long it stays in the list when it is gone.
        listed_as: under which word.
        status: the word that the API shows, whatever the truth.
        fields: laid over the object that the API shows; a value of `LEFT_OUT` removes the field.
    """

    boot_time: Span | None = None
    stuck: bool = False
    fails: bool = False
    hidden_for: Span = 0.0
    unlisted_for: Span = 0.0
    answers_as: str | None = None
    comfyui: str = "works"
    comfyui_for: Span | None = None
    flaps: Span | None = None
    vanishes_after: Span | None = None
    ignores_stop_time: bool = False
    ignores_delete: bool = False
    delete_takes: Span | None = None
    listed_after: Span = 0.0
    listed_as: str = Stage.GONE.value
    status: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


LEFT_OUT: Final = object()
"""As a value in `Traits.fields`: the field is missing."""


@dataclass(kw_only=True, slots=True, eq=False)
class EmulatedMachine:
    """One machine of the emulated cloud."""

    server_id: str
    user_id: str
    server_type: str
    estimated_duration: int
    workflow_version_id: str
    usd_per_hour: Decimal
    launched_at: datetime
    traits: Traits
    foreign: bool = False
    """Started by the user elsewhere (the website): no client here launched it."""
    stage: Stage = Stage.STARTING
    ready_at: datetime | None = None
    billed_until: datetime | None = None
    gone_at: datetime | None = None
    url: str | None = None
    comfyui: ComfyServer | None = None
    """What listens at `url`, if anything does."""
    comfyui_was: ComfyServer | None = None
    """What listened there last, when it does no more: what ran there can still be asked."""
    port: int = 0
    """The port that ComfyUI will take, when something else has it before."""
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    work: set[asyncio.Task[None]] = field(default_factory=set)
    errors: list[BaseException] = field(default_factory=list)
    """What went wrong in the emulator itself; `stop` raises it."""

    @property
    def bills(self) -> bool:
        """Whether it costs money now: from Ready until DELETE was accepted, or it stopped."""
        return self.ready_at is not None and self.billed_until is None

    @property
    def stops_at(self) -> datetime | None:
        """When it is stopped by itself: ready time plus duration, exactly."""
        return None if self.ready_at is None else self.ready_at + timedelta(seconds=self.estimated_duration)

    def seconds(self, now: datetime) -> Decimal:
        """Return how long it has been billed, in seconds."""
        if self.ready_at is None:
            return Decimal(0)
        micros = ((self.billed_until or now) - self.ready_at) // timedelta(microseconds=1)
        return Decimal(max(0, micros)) / 1_000_000

    def usd(self, now: datetime) -> Decimal:
        """Return what it has cost so far: machine seconds x hourly rate / 3600."""
        return billed_usd(self.seconds(now), self.usd_per_hour)

    def is_listed(self, now: datetime) -> bool:
        """Return whether it is in the list of machines."""
        if self.gone_at is not None:
            return (now - self.gone_at).total_seconds() < in_seconds(self.traits.listed_after)
        return (now - self.launched_at).total_seconds() >= in_seconds(self.traits.unlisted_for)

    def is_visible(self, now: datetime) -> bool:
        """Return whether its status can be asked for."""
        if self.gone_at is not None:
            return self.is_listed(now)
        return (now - self.launched_at).total_seconds() >= in_seconds(self.traits.hidden_for)

    def word(self, now: datetime) -> str:
        """Return the status word that the API shows."""
        if self.traits.status is not None:
            return self.traits.status
        if self.stage is Stage.GONE:
            return self.traits.listed_as
        if self.stage is Stage.READY and self.traits.flaps is not None and self.ready_at is not None:
            turns = int((now - self.ready_at).total_seconds() // in_seconds(self.traits.flaps))
            return (Stage.STARTING if turns % 2 else Stage.READY).value
        return self.stage.value

    def view(self, now: datetime) -> dict[str, Any]:
        """Return the machine object as the API shows it: eight fields, three of them null until Ready."""
        word = self.word(now)
        shows = self.ready_at is not None and word != Stage.STARTING.value
        stops_at = self.stops_at
        seen: dict[str, Any] = {
            "server_id": self.server_id,
            "user_id": self.user_id,
            "server_type": self.server_type,
            "estimated_duration": self.estimated_duration,
            "current_status": word,
            "main_service_url": self.url if shows else None,
            "service_ready_at": stamp(self.ready_at) if shows and self.ready_at else None,
            "estimated_stopping_at": stamp(stops_at) if shows and stops_at else None,
        }
        seen.update(self.traits.fields)
        return {name: value for name, value in seen.items() if value is not LEFT_OUT}

    def cancel_timers(self) -> None:
        """Forget everything that was going to happen to it."""
        for timer in self.timers.values():
            timer.cancel()
        self.timers.clear()


@dataclass(frozen=True, slots=True)
class Bill:
    """One line of the emulated cloud's books."""

    server_id: str
    server_type: str
    ready_at: datetime | None
    ended_at: datetime | None
    """None while it bills."""
    seconds: Decimal
    usd: Decimal
    foreign: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the line as JSON shows it."""
        return {
            "server_id": self.server_id,
            "server_type": self.server_type,
            "ready_at": stamp(self.ready_at) if self.ready_at else None,
            "ended_at": stamp(self.ended_at) if self.ended_at else None,
            "seconds": str(self.seconds),
            "usd": str(self.usd),
            "foreign": self.foreign,
        }


def bill_of(machine: EmulatedMachine, now: datetime) -> Bill:
    """Return the line of a machine as of now."""
    return Bill(
        server_id=machine.server_id,
        server_type=machine.server_type,
        ready_at=machine.ready_at,
        ended_at=machine.billed_until,
        seconds=machine.seconds(now),
        usd=machine.usd(now),
        foreign=machine.foreign,
    )


async def call(answer: Awaitable[None] | None) -> None:
    """Await what a method that may or may not be async returned."""
    if answer is not None:
        await answer
