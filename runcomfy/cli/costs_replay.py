"""`comfyctl costs replay` and `comfyctl costs tune`: what the plan would have cost, beside what others would have."""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from runcomfy.cli.runner import run_async

if TYPE_CHECKING:
    from runcomfy.application.replay import Arrival, World
    from runcomfy.application.replay_report import Comparison, Tuned
    from runcomfy.cli.runner import Interrupts

LONGEST_LINE: Final = 65_536
WaitPriced = click.option(
    "--wait-price",
    metavar="PRICE",
    help="What an hour of one job's waiting is worth: batch, normal, person waiting (1, 5, 20 times the machine's "
    "price), or USD.",
)
AsJson = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("trace", metavar="TRACE.csv", type=click.Path(exists=True, dir_okay=False))
@click.option("--policy", "names", multiple=True, metavar="NAME", help="Only this one; may be given again.")
@WaitPriced
@click.option(
    "--stream",
    type=click.Choice(("all", "solo", "heavy", "team", "video")),
    default="all",
    show_default=True,
    help="The whole trace, or drawn from it: a busy user, a very busy one, a random tenth of the users, those with run "
    "times six times as long.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which draw.")
@click.option("--presence", is_flag=True, help="Clients say ahead that somebody is there, and when they left.")
@click.option("--presence-lead", default="5m", show_default=True, metavar="TIME", help="How long ahead.")
@click.option(
    "--presence-gap", default="15m", show_default=True, metavar="TIME", help="A user silent for longer has left."
)
@click.option(
    "--presence-recall",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of the sessions that are announced.",
)
@click.option("--bridge", is_flag=True, help="Also offer a start within 30 s, billed, at 1.5 times the price.")
@click.option(
    "--service-s",
    type=click.FloatRange(0, 86_400, min_open=True),
    metavar="SECONDS",
    help="Run time of every job.",
)
@click.option("--usd-per-hour", type=click.FloatRange(0), default=1.75, show_default=True, help="The machine's price.")
@click.option("--boot", default="180s", show_default=True, metavar="TIME", help="From a launch to Ready; not billed.")
@click.option("--load", default="30s", show_default=True, metavar="TIME", help="Loading models at the start; billed.")
@click.option(
    "--max-machines", type=click.IntRange(1, 1000), default=32, show_default=True, help="At most so many at once."
)
@AsJson
def replay(trace: str, **options: Any) -> int:
    """Run the plan of `comfyctl serve` over a trace of jobs under virtual time, beside other policies.

    TRACE.csv has a header with arrival_s, service_s and user (times in seconds; the order of columns is free, others
    are ignored). Nothing is rented, and no account is needed.

    J is dollars plus the price of all waiting; the last column is J over a lower bound that no schedule can beat, not
    even one that knows every job before it comes.
    """
    return run_async(lambda _: _replay(trace, **options))


async def _replay(
    trace: str,
    *,
    names: tuple[str, ...],
    wait_price: str | None,
    stream: str,
    seed: int,
    service_s: float | None,
    as_json: bool,
    **surroundings: Any,
) -> int:
    from runcomfy.application.replay_report import compare, policies

    chosen = policies(names)
    world = _world(wait_price or "normal", **surroundings)
    jobs, left_out = await asyncio.to_thread(_read, trace, stream, seed, service_s)
    comparison = await asyncio.to_thread(compare, jobs, world, chosen)
    if as_json:
        from runcomfy.cli.output import show_json

        show_json({"stream": stream, "seed": seed, "left_out": left_out, **comparison.as_dict()})
        return 0
    from runcomfy.cli.output import tell

    if left_out:
        tell(f"{left_out} rows without a run time were left out")
    _show(comparison)
    return 0


def _world(
    wait_price: str,
    *,
    usd_per_hour: float,
    boot: str,
    load: str,
    max_machines: int,
    presence: bool,
    presence_lead: str,
    presence_gap: str,
    presence_recall: float,
    bridge: bool,
) -> World:
    from dataclasses import replace

    from runcomfy.application.fleet_offers import wait_usd_per_hour
    from runcomfy.application.replay import BRIDGE, STANDARD, Presence, World
    from runcomfy.domain.durations import parse_duration

    boot_s = parse_duration(boot).total_seconds()
    standard = replace(
        STANDARD,
        usd_per_hour=usd_per_hour,
        boot_s=boot_s,
        boot_p90_s=boot_s,
        load_s=parse_duration(load).total_seconds(),
    )
    offers = (standard, replace(BRIDGE, usd_per_hour=1.5 * usd_per_hour)) if bridge else (standard,)
    signals = Presence(
        gap_s=parse_duration(presence_gap).total_seconds(),
        lead_s=parse_duration(presence_lead).total_seconds(),
        recall=presence_recall,
    )
    return World(
        offers=offers,
        wait_usd_per_hour=wait_usd_per_hour(wait_price, usd_per_hour),
        max_machines=max_machines,
        presence=signals if presence else None,
    )


def _read(path: str, stream: str, seed: int, service_s: float | None) -> tuple[tuple[Arrival, ...], int]:
    from pathlib import Path

    from runcomfy.application.replay_streams import draw, read_trace
    from runcomfy.domain.exceptions import InputFileInvalid, foreign_text

    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as lines:
            trace = read_trace(_bounded(lines), service_s=service_s)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputFileInvalid(
            f"{foreign_text(path, 200)} cannot be read as a table: {foreign_text(str(error), 100)}",
            hint="it must be a CSV file in UTF-8",
        ) from error
    return trace.jobs if stream == "all" else draw(trace, stream, seed=seed)[0], trace.left_out


def _bounded(lines: TextIO) -> Iterator[str]:
    """Yield the lines; a file without any (a device, a picture) must not fill the memory."""
    while line := lines.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise csv.Error(f"a line has more than {LONGEST_LINE} characters")
        yield line


def _show(comparison: Comparison) -> None:
    from runcomfy.cli.output import table

    best = comparison.best
    rows = []
    for name, outcome in comparison.outcomes.items():
        ratio = comparison.ratio(name)
        rows.append(
            (
                name,
                f"${outcome.usd_per_1000:.2f}",
                f"{outcome.wait(0.5):.0f} s",
                f"{outcome.wait(0.95):.0f} s",
                f"{outcome.cold_share:.1%}",
                f"${outcome.cost:.2f}",
                "-" if ratio is None else f"{ratio:.2f}",
            )
        )
    click.echo(table(("policy", "per 1,000 jobs", "wait p50", "p95", "cold starts", "J", "J / bound"), rows))
    click.echo(
        f"{comparison.jobs} jobs; an hour of waiting is worth ${comparison.world.wait_usd_per_hour:.2f}. "
        f"Knowing all jobs ahead, J is at least ${best.bound_usd:.2f}; ${best.schedule_usd:.2f} is possible, "
        f"${best.zero_wait_usd:.2f} if no job ever waits."
    )


@click.command()
@click.option("--days", type=click.IntRange(1, 90), default=7, show_default=True, help="How far to look back.")
@WaitPriced
@click.option("--latency-target", metavar="TIME", help="Solve for the price of waiting: 95 of 100 jobs wait no longer.")
@AsJson
def tune(days: int, wait_price: str | None, latency_target: str | None, as_json: bool) -> int:
    """Replay your own last days with other settings and recommend those that would have been over 3 % better.

    Only reads. What is recommended are settings of `comfyctl serve`: keep-alive, most machines at once, and with
    --latency-target the price of waiting.
    """
    return run_async(lambda interrupts: _tune(interrupts, days, wait_price, latency_target, as_json=as_json))


async def _tune(
    interrupts: Interrupts, days: int, wait_price: str | None, latency_target: str | None, *, as_json: bool
) -> int:
    from datetime import timedelta

    from runcomfy.application import replay_report
    from runcomfy.application.fleet_offers import FleetOffers
    from runcomfy.application.replay_history import own_history, own_world
    from runcomfy.cli.app import open_app
    from runcomfy.domain.durations import parse_duration

    target = parse_duration(latency_target) if latency_target else None
    async with open_app(interrupts, require_cloud=True, launches=False, quiet=as_json) as app:
        cloud, _ = await app.cloud()
        pool, store = cloud.settings.pool, cloud.store
        offers = FleetOffers(store, cloud.settings, app.clock, provider=cloud.provider.name, types=app.pool_types())
        await offers.refresh(at_once=True)
        history = await own_history(
            await app.job_store(),
            store,
            since=app.clock.now() - timedelta(days=days),
            on_reference=offers.on_reference,
        )
        target = target or pool.latency_target
        world = own_world(offers, pool, history, wait_price=wait_price or "")
    if not history.jobs:
        return _nothing(days, history.left_out, as_json=as_json)
    seconds = target.total_seconds() if target is not None else None
    tuned = await asyncio.to_thread(replay_report.tune, history.jobs, world, latency_target_s=seconds)
    if as_json:
        from runcomfy.cli.output import show_json

        show_json({"days": days, "left_out": history.left_out, **_as_dict(tuned)})
        return 0
    starts = offers.own_starts.get(offers.reference, 0)
    rests = f"the median of your own last {starts}" if starts else "the default, with too few starts of your own"
    click.echo(f"A start of a {offers.reference} machine is taken as {offers.boot_s(offers.reference):.0f} s: {rests}.")
    _advise(tuned, days, latency_target_s=seconds)
    return 0


def _nothing(days: int, left_out: int, *, as_json: bool) -> int:
    from runcomfy.cli.output import show_json, tell

    if as_json:
        show_json({"days": days, "left_out": left_out, "jobs": 0, "recommended": []})
    else:
        tell(f"no job ran in the last {days} days: there is nothing to replay")
    return 0


def _as_dict(tuned: Tuned) -> dict[str, Any]:
    price = tuned.wait_price
    return {
        **tuned.comparison.as_dict(),
        "tried": {
            name: {"usd": round(o.usd, 4), "wait_p95_s": round(o.wait(0.95), 1), "j_usd": round(o.cost, 4)}
            for name, o in tuned.tried.items()
        },
        "wait_price": None
        if price is None
        else {
            "usd_per_hour": round(price.usd_per_hour, 4),
            "met": price.met,
            "wait_p95_s": round(price.outcome.wait(0.95), 1),
        },
        "recommended": [
            {
                "setting": one.setting,
                "now": one.now,
                "better": one.better,
                "saves_share": round(one.saves_share, 4),
                "why": one.why,
            }
            for one in tuned.recommended
        ],
    }


def _advise(tuned: Tuned, days: int, *, latency_target_s: float | None) -> None:
    _show(tuned.comparison)
    price = tuned.wait_price
    if price is not None and not price.met:
        click.echo(
            f"No price of waiting would have kept {latency_target_s:.0f} s for 95 of 100 jobs: "
            f"{price.outcome.wait(0.95):.0f} s is the best, at ${price.usd_per_hour:.2f} an hour. Signals of clients "
            "(`comfyctl presence`) or --min-machines 1 help where a higher price does not."
        )
    if not tuned.recommended:
        click.echo(f"Over the last {days} days no other setting would have been more than 3 % better: keep yours.")
    for one in tuned.recommended:
        saved = f" ({one.saves_share:.0%} of J)" if one.saves_share else ""
        name = one.setting.replace("_", "-")
        click.echo(f"--{name} {one.better} instead of {one.now}{saved}: {one.why}")
