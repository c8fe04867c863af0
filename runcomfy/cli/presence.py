"""`comfyctl presence`: say ahead that somebody is there or that work comes, so that a machine is warm when it does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from runcomfy.cli.runner import run_async
from runcomfy.domain.durations import parse_duration
from runcomfy.domain.exceptions import ValueInvalid, foreign_text

if TYPE_CHECKING:
    from runcomfy.cli.runner import Interrupts
    from runcomfy.domain.signal import Signal

Command = TypeVar("Command", bound=Callable[..., Any])


def _common(command: Command) -> Command:
    options = (
        click.option(
            "--source", metavar="NAME", default="here", show_default=True, help="Who says it; each is scored."
        ),
        click.option("--user", metavar="NAME", default="", help="For whose jobs it is said."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    )
    for option in reversed(options):  # help lists what was put on last first
        command = option(command)
    return command


@click.group()
def presence() -> None:
    """Say ahead that somebody is there, or that work comes: `comfyctl serve` has a machine warm by then.

    Whoever says it and sends no work is listened to no more, until its word is worth something again.
    """


@presence.command("open")
@click.option("--for", "lasts", metavar="TIME", default="15m", show_default=True, help="How long it holds.")
@_common
def opened(lasts: str, **common: Any) -> int:
    """Somebody is there. Say it again before it runs out."""
    return _say(lambda said, source, user: said.opened(source, lasts=parse_duration(lasts), user=user), **common)


@presence.command()
@_common
def left(**common: Any) -> int:
    """Nobody of this source is there any more."""
    return _say(lambda said, source, user: said.left(source, user=user), **common)


@presence.command()
@click.option("--for", "lasts", metavar="TIME", default="5m", show_default=True, help="Within what time work comes.")
@_common
def intent(lasts: str, **common: Any) -> int:
    """A job is about to come: a workflow was loaded, an upload has begun."""
    return _say(lambda said, source, user: said.intent(source, lasts=parse_duration(lasts), user=user), **common)


@presence.command()
@click.option("--jobs", type=click.IntRange(1, 1_000_000), required=True, help="How many come.")
@click.option("--work", metavar="TIME", help="How long all of them take together, if that is known.")
@click.option("--at", "comes", metavar="TIME", help="When: 2026-11-20T18:00, 18:00, or +30m (default: now).")
@_common
def batch(jobs: int, work: str | None, comes: str | None, **common: Any) -> int:
    """So many jobs come at once."""
    span = parse_duration(work) if work else timedelta(0)
    return _say(
        lambda said, source, user: said.batch(jobs, source, work=span, at=parse_when(comes, now=_now()), user=user),
        **common,
    )


def _now() -> datetime:
    return datetime.now(UTC)


def parse_when(text: str | None, *, now: datetime) -> datetime | None:
    """Return the time that a text names: `+30m`, `18:00` (the next one), or a date with a time; local unless it says.

    Raises ValueInvalid.
    """
    if text is None:
        return None
    words = text.strip()
    if words.startswith("+"):
        return now + parse_duration(words[1:])
    try:
        if ":" in words and len(words) <= 8:
            clock = datetime.strptime(words, "%H:%M" if words.count(":") == 1 else "%H:%M:%S").time()  # noqa: DTZ007
            local = datetime.combine(now.astimezone().date(), clock).astimezone()
            at = local if local >= now else local + timedelta(days=1)
        else:
            at = datetime.fromisoformat(words)
        return at.astimezone(UTC)
    except (ValueError, OverflowError):  # a time of the years 1 and 9999 may be in none of ours
        raise ValueInvalid(
            f"{foreign_text(text, 40)!r} is not a time", hint="write 2026-11-20T18:00, 18:00, or +30m"
        ) from None


def _say(what: Callable[[Any, str, str], Any], *, source: str, user: str, as_json: bool) -> int:
    async def say(interrupts: Interrupts) -> int:
        from runcomfy.cli.app import open_app
        from runcomfy.cli.output import show_json

        async with open_app(interrupts, launches=False, quiet=as_json) as app:
            signal: Signal = await what(app.presence(), source, user)
        if as_json:
            show_json(_facts(signal))
        else:
            click.echo(_sentence(signal))
        return 0

    return run_async(say)


def _facts(signal: Signal) -> dict[str, Any]:
    return {
        "kind": str(signal.kind),
        "source": signal.source,
        "user": signal.user,
        "at": signal.at.isoformat(),
        "until": signal.until.isoformat() if signal.until else None,
        "jobs": signal.jobs,
        "work_seconds": signal.work.total_seconds(),
        "expected_at": signal.expected_at.isoformat() if signal.expected_at else None,
    }


def _sentence(signal: Signal) -> str:
    from runcomfy.cli.words import show_time
    from runcomfy.domain.signal import SignalKind

    match signal.kind:
        case SignalKind.OPENED:
            return f"{signal.source} is there until {show_time(signal.until)}, unless it is said again"
        case SignalKind.LEFT:
            return f"{signal.source} has left"
        case SignalKind.INTENT:
            return f"work of {signal.source} is expected until {show_time(signal.until)}"
        case SignalKind.BATCH:
            return f"{signal.jobs} jobs of {signal.source} are expected at {show_time(signal.expected_at)}"
