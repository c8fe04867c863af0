"""`comfyctl machines`: what the account really runs, which of it is ours and why; stop, adopt, reap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from runcomfy.application.machines import Machines
    from runcomfy.application.reaper import Reaped, Verdict
    from runcomfy.domain.machine import Machine, MachineReport


@click.group()
def machines() -> None:
    """See what the account runs; stop, adopt and reap machines."""


@machines.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(as_json: bool) -> int:
    """List every machine of the account, which of it is ours, and why. Only reads."""
    return run_async(lambda interrupts: _ls(interrupts, as_json=as_json))


async def _ls(interrupts: Interrupts, *, as_json: bool) -> int:
    from runcomfy.application.reaper import Reaper
    from runcomfy.cli.app import open_app
    from runcomfy.cli.output import show_json

    async with open_app(interrupts, require_cloud=True, launches=False, quiet=as_json) as app:
        cloud, has_books = await cloud_or_memory(app)
        reports = {report.server_id: report for report in await cloud.provider.list_machines()}
        verdicts = await Reaper(cloud).verdicts(list(reports.values()))
        rows = [_row(verdict, reports, cloud) for verdict in verdicts]
        shown = {verdict.machine.server_id for verdict in verdicts}
        closed = {row.server_id: row for row in await cloud.books.rows(open_only=False) if not row.is_open}
        for server_id, report in reports.items():
            if server_id in closed and server_id not in shown:
                rows.append(_row(_ended(closed[server_id], report), reports, cloud))
            elif server_id not in shown:
                rows.append(_foreign(report, has_books=has_books))
    if as_json:
        show_json(rows)
    else:
        _print(rows)
    return 0


async def cloud_or_memory(app: Any) -> tuple[Machines, bool]:
    """Return the account's machines with our books, without them if the database cannot be used; and whether with."""
    from runcomfy.cli.output import show_error, tell
    from runcomfy.domain.exceptions import LocalError

    try:
        cloud, _ = await app.cloud()
    except LocalError as error:
        show_error(error)
        tell("going on without our books: what is ours cannot be told, but everything is listed and can be stopped")
        cloud, _ = await app.cloud(in_memory=True)
        return cloud, False
    return cloud, True


def _ended(machine: Machine, report: MachineReport) -> Verdict:
    """Return what is to be said of a machine that our books have ended and the account still lists."""
    from runcomfy.application.reaper import Verdict
    from runcomfy.domain.machine import Phase

    back = report.phase in (Phase.READY, Phase.STARTING)
    return Verdict(machine, end=back, why="it was gone and runs again" if back else "ended; not yet off the list")


def _row(verdict: Verdict, reports: dict[Any, MachineReport], cloud: Machines) -> dict[str, Any]:
    from runcomfy.domain.money import cost_of

    machine = verdict.machine
    report = reports.get(machine.server_id)
    return {
        "server_id": machine.server_id or "(not answered yet)",
        "type": machine.server_type,
        "status": report.status if report else "not listed",
        "ours": True,
        "state": str(machine.state),
        "purpose": str(machine.purpose),
        "why": verdict.why + ("; `comfyctl machines reap` would end it" if verdict.end else ""),
        "usd_per_hour": str(machine.usd_per_hour),
        "spent_usd": format(cost_of(machine, now=cloud.clock.now()), "f"),
        "stops_at": (report.stopping_at if report else None) or machine.planned_stop_at,
        "reason": machine.reason,
    }


def _foreign(report: MachineReport, *, has_books: bool) -> dict[str, Any]:
    """Return the row of a machine that our books do not have; `ours` is None where they cannot be read."""
    why = "not in our books: never touched; `comfyctl machines adopt ID` takes it over"
    return {
        "server_id": report.server_id,
        "type": report.server_type or "?",
        "status": report.status,
        "ours": False if has_books else None,
        "state": "",
        "purpose": "",
        "why": why if has_books else "our books cannot be read; `comfyctl machines stop ID` stops it all the same",
        "usd_per_hour": None,
        "spent_usd": None,
        "stops_at": report.stopping_at,
        "reason": "",
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from decimal import Decimal

    from runcomfy.cli.output import table
    from runcomfy.cli.words import show_time
    from runcomfy.domain.money import show_usd

    if not rows:
        click.echo("the account runs no machine, and our books have none open")
        return
    shown = [
        (
            str(row["server_id"]),
            row["type"],
            row["status"],
            {True: "ours", False: "not ours"}.get(row["ours"], "unknown"),
            show_usd(Decimal(row["spent_usd"])) if row["spent_usd"] is not None else "-",
            show_time(row["stops_at"]),
            row["why"],
        )
        for row in rows
    ]
    click.echo(table(("machine", "type", "status", "whose", "spent", "stops at", "why"), shown))


@machines.command()
@click.argument("server_id", metavar="ID")
def stop(server_id: str) -> int:
    """Stop one machine by the provider's ID, whoever started it, and look until it is gone."""
    return run_async(lambda interrupts: _stop(interrupts, server_id))


async def _stop(interrupts: Interrupts, server_id: str) -> int:
    from runcomfy.application.finish import finish
    from runcomfy.cli.app import open_app

    async with open_app(interrupts, require_cloud=True, launches=False) as app:
        cloud, _ = await cloud_or_memory(app)
        ended = await finish(_stop_whosever(cloud, server_id))
        _say_ended(ended, cloud)
    return 0


async def _stop_whosever(cloud: Machines, server_id: str) -> Machine:
    note = "stop asked for by the user"
    machine = await _open_row(cloud, server_id)
    if machine is None:
        machine = await _taken(cloud, server_id, note=note)
    elif machine.owner_id != cloud.books.owner.id:
        machine = await cloud.books.take_over(machine, note=note)
    return await cloud.stop(machine, reason=note)


async def _open_row(cloud: Machines, server_id: str) -> Machine | None:
    from runcomfy.domain.machine import ServerId

    row = await cloud.books.row_of(ServerId(server_id))
    return row if row is not None and row.is_open else None


async def _taken(cloud: Machines, server_id: str, *, note: str) -> Machine:
    """Take a machine that the account runs, and that is not in our books, into them, with us as its owner."""
    from runcomfy.domain.exceptions import MachineNotFound, foreign_text
    from runcomfy.domain.machine import Purpose, ServerId

    wanted = ServerId(server_id)
    report = next((r for r in await cloud.provider.list_machines(urgent=True) if r.server_id == wanted), None)
    if report is None:
        report = await cloud.provider.get_machine_status(wanted, urgent=True)
    if report is None:
        raise MachineNotFound(
            f"the account has no machine {foreign_text(server_id, 60)}",
            hint="`comfyctl machines ls` lists what it has; a machine that is gone bills no longer",
        )
    return await cloud.adopt(report, purpose=Purpose.TAKEN, reason=note)


def _say_ended(machine: Machine, cloud: Machines) -> None:
    from runcomfy.domain.money import cost_of, show_usd

    spent = show_usd(cost_of(machine, now=cloud.clock.now()))
    click.echo(f"{machine.server_type} machine {machine.server_id}: {machine.state}; it cost {spent}")


@machines.command()
@click.argument("server_id", metavar="ID")
def adopt(server_id: str) -> int:
    """Take a machine that the account runs into our books: used as dev server, ended after its planned stop."""
    return run_async(lambda interrupts: _adopt(interrupts, server_id))


async def _adopt(interrupts: Interrupts, server_id: str) -> int:
    from runcomfy.application.finish import finish
    from runcomfy.cli.app import open_app
    from runcomfy.cli.words import show_time

    async with open_app(interrupts, require_cloud=True, launches=False) as app:
        cloud, _ = await app.cloud()
        machine = await finish(_adopted(cloud, server_id))
        click.echo(
            f"{machine.server_type} machine {machine.server_id} is ours now; it is kept until "
            f"{show_time(machine.kept_until)}"
        )
    return 0


async def _adopted(cloud: Machines, server_id: str) -> Machine:
    """Put a machine into our books as one that is kept without a process until its planned stop."""
    from runcomfy.domain.exceptions import ValueInvalid
    from runcomfy.domain.machine import MachineState, Purpose

    note = "adopted by the user"
    machine = await _open_row(cloud, server_id)
    if machine is None:
        machine = await _taken(cloud, server_id, note=note)
    else:
        owner = (await cloud.store.owners([machine.owner_id])).get(machine.owner_id) if machine.owner_id else None
        if machine.state is MachineState.STOPPING or (
            owner is not None and cloud.processes.lives(owner, now=cloud.clock.now())
        ):
            held = f"process {owner.pid} holds it" if owner is not None else "it is being stopped"
            raise ValueInvalid(
                f"machine {machine.server_id} is ours already, and {held}",
                hint="`comfyctl machines ls` says what it is for",
            )
        machine = await cloud.books.take_over(machine, note=note)
        machine = await cloud.books.change(machine, note=note, purpose=Purpose.TAKEN)
    report = await cloud.provider.get_machine_status(machine.server_id) if machine.server_id else None
    if report is None:
        kept_until = machine.planned_stop_at or machine.kept_until or cloud.clock.now() + cloud.settings.cloud.duration
    else:
        kept_until = cloud.books.kept_until(machine, report)
    return await cloud.books.hand_over(machine, kept_until=kept_until, note=note)


@machines.command()
@click.option("--no-wait", is_flag=True, help="Do not wait for launches that were never answered.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reap(no_wait: bool, as_json: bool) -> int:
    """End what is ours and has no living owner and no living job, after two full lists; never anything else."""
    return run_async(lambda interrupts: _reap(interrupts, wait=not no_wait, as_json=as_json))


async def _reap(interrupts: Interrupts, *, wait: bool, as_json: bool) -> int:
    from runcomfy.application.reaper import Reaper
    from runcomfy.cli.app import open_app
    from runcomfy.cli.output import show_json

    async with open_app(interrupts, require_cloud=True, launches=False, quiet=as_json) as app:
        cloud, _ = await app.cloud()
        done = await Reaper(cloud).reap(wait=wait)
        if as_json:
            show_json(_reaped(done))
        else:
            _say_reaped(done, cloud)
    return done.failed[0][1].exit_code if done.failed else 0


def _reaped(done: Reaped) -> dict[str, Any]:
    return {
        "ended": [m.server_id for m in done.ended],
        "closed": [m.server_id or m.id for m in done.closed],
        "kept": [{"server_id": v.machine.server_id, "why": v.why} for v in done.kept],
        "unresolved": [m.id for m in done.unresolved],
        "foreign": [r.server_id for r in done.foreign],
        "failed": [{"server_id": m.server_id, "error": e.as_dict()} for m, e in done.failed],
    }


def _say_reaped(done: Reaped, cloud: Machines) -> None:
    from runcomfy.cli.output import show_error

    for machine in done.ended:
        _say_ended(machine, cloud)
    for machine in done.closed:
        click.echo(f"{machine.server_id or 'a launch that was never answered'}: closed, nothing runs")
    for verdict in done.kept:
        click.echo(f"{verdict.machine.server_id or 'a launch under way'}: left alone, {verdict.why}")
    for machine in done.unresolved:
        click.echo(
            f"launch of {machine.requested_at:%H:%M:%S} UTC: not known yet whether it started a machine; reap again"
        )
    for report in done.foreign:
        click.echo(f"{report.server_id}: not ours, left alone ({report.server_type}, {report.status})")
    for _, error in done.failed:
        show_error(error)
    if not (done.ended or done.closed or done.failed or done.unresolved):
        click.echo("nothing to end")


@machines.command()
@click.argument("server_id", metavar="ID")
def show(server_id: str) -> int:
    """Show everything that happened to a machine, in order. Only reads our books."""
    return run_async(lambda interrupts: _show(interrupts, server_id))


async def _show(interrupts: Interrupts, server_id: str) -> int:
    from runcomfy.cli.app import open_app
    from runcomfy.cli.output import table
    from runcomfy.cli.words import show_time
    from runcomfy.domain.exceptions import MachineNotFound, foreign_text

    async with open_app(interrupts, require_cloud=True, launches=False) as app:
        cloud, _ = await app.cloud()
        rows = [m for m in await cloud.books.rows(open_only=False) if server_id in (m.server_id, m.id)]
        if not rows:
            raise MachineNotFound(
                f"our books have no machine {foreign_text(server_id, 60)}",
                hint="`comfyctl machines ls` lists what the account runs",
            )
        for machine in rows:
            story = await cloud.store.story(machine.id)
            click.echo(f"{machine.server_type} machine {machine.server_id} ({machine.reason})")
            click.echo(
                table(("at", "event", "state", "note"), [(show_time(t.at), t.event, t.state, t.note) for t in story])
            )
            for entry in await cloud.store.ledger(machine_id=machine.id):
                click.echo(
                    f"{show_time(entry.started_at)} to {show_time(entry.ended_at)}: ${entry.amount_usd} {entry.note}"
                )
    return 0
