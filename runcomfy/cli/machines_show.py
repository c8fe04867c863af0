"""What `comfyctl machines ls` and `show` print: every machine with its state, its jobs, its money and its why."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import click

from runcomfy.application.machine_rows import machine_rows
from runcomfy.cli.output import show_json, table, tell
from runcomfy.cli.words import show_span, show_time
from runcomfy.domain.exceptions import LocalError, MachineNotFound, ProviderError, foreign_text
from runcomfy.domain.machine import Machine, MachineReport
from runcomfy.domain.money import cost_of, show_usd, total
from runcomfy.domain.work import Work

if TYPE_CHECKING:
    from runcomfy.application.machines import Machines
    from runcomfy.cli.runner import Interrupts

HEADERS: Final = ("machine", "type", "state", "jobs", "whose", "price", "spent", "stops at", "why")
LOOK_EVERY: Final = 1.0
"""Seconds between two looks of `--watch` into our books; the provider is asked as rarely as the settings say."""
Row = dict[str, Any]


# -- ls ----------------------------------------------------------------------------------------------------


async def list_machines(interrupts: Interrupts, *, as_json: bool, watch: bool) -> int:
    """Print every machine of the account, once or for as long as the user looks."""
    from runcomfy.cli.app import open_app
    from runcomfy.cli.machines import cloud_or_memory

    async with open_app(interrupts, require_cloud=True, launches=False, quiet=as_json, to_stop=True) as app:
        cloud, has_books = await cloud_or_memory(app)
        if watch:
            await _watch(interrupts, cloud, has_books=has_books, as_json=as_json)
            return 0
        rows = await rows_of(cloud, await cloud.provider.list_machines(), has_books=has_books)
    if as_json:
        show_json(rows)
    elif not rows:
        books = "our books have none open" if has_books else "what our books have cannot be told"
        click.echo(f"the account runs no machine, and {books}")
    else:
        click.echo(table(HEADERS, [_cells(row) for row in rows]))
        if has_books:
            click.echo(_sum_line(rows))
    return 0


async def rows_of(cloud: Machines, listed: Sequence[MachineReport], *, has_books: bool) -> list[Row]:
    """Return a row for each machine that our books have open or the account lists."""
    return [row.as_dict() for row in await machine_rows(cloud, listed, has_books=has_books)]


def _cells(row: Row) -> tuple[str, ...]:
    why = f"{row['why']} ({row['reason']})" if row["reason"] else row["why"]
    return (
        str(row["server_id"]),
        row["type"],
        row["shown"],
        ", ".join(row["jobs"]) or "-",
        {True: "ours", False: "not ours"}.get(row["ours"], "unknown"),
        f"${row['usd_per_hour']}/h" if row["usd_per_hour"] is not None else "-",
        show_usd(Decimal(row["spent_usd"])) if row["spent_usd"] is not None else "-",
        show_time(row["stops_at"]),
        why,
    )


def _sum_line(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if row["ours"]]
    billing = [Decimal(row["usd_per_hour"]) for row in ours if row["state"] in ("ready", "lost")]
    spent = sum((Decimal(row["spent_usd"]) for row in ours), Decimal(0))
    bills = "none bills"
    if billing:
        bills = f"{len(billing)} {'bills' if len(billing) == 1 else 'bill'} ${sum(billing, Decimal(0))} per hour"
    return f"{len(ours)} of ours, {bills}; spent {show_usd(spent)}"


async def _watch(interrupts: Interrupts, cloud: Machines, *, has_books: bool, as_json: bool) -> None:
    """Show the list until Ctrl+C: a live table in a terminal, else a line for each machine that changed."""
    interrupts.listens, interrupts.answer = True, ""
    if sys.stdout.isatty() and not as_json:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(), auto_refresh=False) as live:
            interrupts.clear = live.stop
            async for rows in _looks(interrupts, cloud, has_books=has_books):
                live.update(_rich(rows), refresh=True)
        return
    last: dict[str, tuple[Any, ...]] = {}
    async for rows in _looks(interrupts, cloud, has_books=has_books):
        seen = {str(row["machine_id"] or row["server_id"]): row for row in rows}
        for key, row in seen.items():
            # Without what moves by itself: how long it idles, what it has cost.
            mark = (row["status"], row["state"], tuple(row["jobs"]), row["draining"], str(row["stops_at"]), row["why"])
            if last.get(key) != mark:
                last[key] = mark
                click.echo(json.dumps(row, default=str) if as_json else "  ".join(_cells(row)))
        for key in last.keys() - seen.keys():
            del last[key]
            click.echo(json.dumps({"machine_id": key, "state": "gone"}) if as_json else f"{key}  gone")
        sys.stdout.flush()


async def _looks(interrupts: Interrupts, cloud: Machines, *, has_books: bool) -> AsyncIterator[list[Row]]:
    """Yield the rows at once, then every second, until Ctrl+C. What cannot be read now is said, and read later."""
    loop = asyncio.get_running_loop()
    every = max(cloud.settings.pool.status_every, cloud.settings.cloud.poll_interval).total_seconds()
    listed: Sequence[MachineReport] = ()
    asked_at, said = float("-inf"), ""
    while not interrupts.event.is_set():
        try:
            if loop.time() - asked_at >= every:
                listed, asked_at = await cloud.provider.list_machines(), loop.time()
            rows = await rows_of(cloud, listed, has_books=has_books)
        except (ProviderError, LocalError) as error:
            if asked_at == float("-inf"):
                raise
            if said != error.code:
                said = error.code
                tell(f"cannot be read now: {error.message}")
        else:
            said = ""
            yield rows
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY):
                await interrupts.event.wait()


def _rich(rows: Sequence[Row]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    for header in HEADERS:
        shown.add_column(header, no_wrap=True, overflow="ellipsis", ratio=2 if header in ("jobs", "why") else None)
    for row in rows:
        shown.add_row(*(Text(foreign_text(cell, 120)) for cell in _cells(row)))
    return Group(shown, Text(_sum_line(rows)))


# -- show --------------------------------------------------------------------------------------------------


async def show_machine(interrupts: Interrupts, server_id: str, *, as_json: bool) -> int:
    """Print everything that happened to a machine: its steps, who worked on it, what it cost."""
    from runcomfy.cli.app import open_app

    async with open_app(interrupts, require_cloud=True, launches=False, quiet=as_json) as app:
        cloud, _ = await app.cloud()
        rows = [m for m in await cloud.books.rows(open_only=False) if server_id in (m.server_id, m.id)]
        if not rows:
            raise MachineNotFound(
                f"our books have no machine {foreign_text(server_id, 60)}",
                hint="`comfyctl machines ls` lists what the account runs",
            )
        stories = [await _story(cloud, machine) for machine in rows]
    if as_json:
        show_json([_facts(*story) for story in stories])
        return 0
    for story in stories:
        _tell_story(*story)
    return 0


async def _story(cloud: Machines, machine: Machine) -> tuple[Machine, Any, Sequence[Work], Any, datetime]:
    return (
        machine,
        await cloud.store.story(machine.id),
        await cloud.store.works(machine_ids=[machine.id]),
        await cloud.store.ledger(machine_id=machine.id),
        cloud.clock.now(),
    )


def _tell_story(machine: Machine, steps: Any, works: Sequence[Work], entries: Any, now: datetime) -> None:
    click.echo(f"{machine.server_type} machine {machine.server_id} ({machine.reason})")
    whose = [f"for user {machine.for_user}"] if machine.for_user else []
    whose += [f"for project {machine.for_project}"] if machine.for_project else []
    facts = [str(machine.state), f"${machine.usd_per_hour} per hour, {machine.rate_source}", *whose]
    if machine.draining:
        facts.append(f"takes no further jobs: {machine.draining}")
    if machine.is_open and machine.planned_stop_at is not None:
        facts.append(f"stops {show_time(machine.planned_stop_at)}")
    click.echo("; ".join(facts))
    click.echo(table(("at", "event", "state", "note"), [(show_time(t.at), t.event, t.state, t.note) for t in steps]))
    until = now if machine.bills else None
    if works:
        click.echo("")
        headers = ("job", "workflow", "began", "computed", "ended", "outcome")
        click.echo(table(headers, [_work_cells(work, until) for work in works]))
    for entry in entries:
        click.echo(f"{show_time(entry.started_at)} to {show_time(entry.ended_at)}: ${entry.amount_usd} {entry.note}")
    busy = sum((work.busy(until) for work in works), timedelta(0))
    spent = total(entries) if not machine.is_open else cost_of(machine, now=now)
    click.echo(f"it {'has cost' if machine.is_open else 'cost'} {show_usd(spent)}; {show_span(busy)} of work")


def _work_cells(work: Work, now: datetime | None) -> tuple[str, ...]:
    return (
        f"{work.job_id[:8]}{f' try {work.attempt}' if work.attempt else ''}",
        work.workflow,
        show_time(work.began_at),
        show_span(work.busy(now)) + (" cold" if work.cold else ""),
        show_time(work.ended_at),
        work.outcome or ("there" if now is not None else "not known"),
    )


def _facts(machine: Machine, steps: Any, works: Sequence[Work], entries: Any, now: datetime) -> Row:
    """Return the story for programs."""
    return {
        "machine_id": machine.id,
        "server_id": machine.server_id,
        "type": machine.server_type,
        "state": str(machine.state),
        "reason": machine.reason,
        "user": machine.for_user,
        "project": machine.for_project,
        "usd_per_hour": str(machine.usd_per_hour),
        "spent_usd": format(cost_of(machine, now=now), "f"),
        "steps": [{"at": t.at, "event": t.event, "state": t.state, "note": t.note, "by": t.by} for t in steps],
        "works": [
            {
                "job_id": work.job_id,
                "attempt": work.attempt,
                "workflow": work.workflow,
                "user": work.user,
                "project": work.project,
                "began_at": work.began_at,
                "computing_at": work.computing_at,
                "computed_at": work.computed_at,
                "ended_at": work.ended_at,
                "outcome": work.outcome,
                "cold": work.cold,
            }
            for work in works
        ],
        "ledger": [
            {"from": e.started_at, "to": e.ended_at, "amount_usd": format(e.amount_usd, "f"), "note": e.note}
            for e in entries
        ],
    }
