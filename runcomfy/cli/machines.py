"""`comfyctl machines`: what the account really runs, which of it is ours and why; stop, adopt, reap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from runcomfy.application.machines import Machines
    from runcomfy.application.reaper import Reaped
    from runcomfy.domain.machine import Machine


@click.group()
def machines() -> None:
    """See what the account runs; stop, adopt and reap machines."""


@machines.command()
@click.option("--watch", is_flag=True, help="Keep it live until Ctrl+C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch a line for each change.")
def ls(watch: bool, as_json: bool) -> int:
    """List every machine of the account: what it does, what it costs, which of it is ours, and why. Only reads."""
    from runcomfy.cli.machines_show import list_machines

    return run_async(lambda interrupts: list_machines(interrupts, as_json=as_json, watch=watch))


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


@machines.command()
@click.argument("server_id", metavar="ID")
def stop(server_id: str) -> int:
    """Stop one machine by the provider's ID, whoever started it, and look until it is gone."""
    return run_async(lambda interrupts: _stop(interrupts, server_id))


async def _stop(interrupts: Interrupts, server_id: str) -> int:
    from runcomfy.application.by_order import stop_whosever
    from runcomfy.application.finish import finish
    from runcomfy.cli.app import open_app

    _checked(server_id)
    async with open_app(interrupts, require_cloud=True, launches=False, to_stop=True) as app:
        cloud, _ = await cloud_or_memory(app)
        ended = await finish(stop_whosever(cloud, server_id, note="stop asked for by the user"))
        _say_ended(ended, cloud)
    return 0


def _checked(server_id: str) -> None:
    """Refuse an id that is none, such as a shell variable that is not set. Raises ValueInvalid."""
    from runcomfy.domain.exceptions import ValueInvalid

    if not server_id.strip():
        raise ValueInvalid("the machine's id is empty", hint="`comfyctl machines ls` lists the machines with their ids")


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

    _checked(server_id)
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
    from runcomfy.application.by_order import open_row, taken
    from runcomfy.domain.exceptions import ValueInvalid
    from runcomfy.domain.machine import MachineState, Purpose

    note = "adopted by the user"
    machine = await open_row(cloud, server_id)
    if machine is None:
        machine = await taken(cloud, server_id, note=note)
    else:
        owner = (await cloud.store.owners([machine.owner_id])).get(machine.owner_id) if machine.owner_id else None
        held = ""
        if machine.state is MachineState.STOPPING:
            held = "it is being stopped"
        elif owner is not None and cloud.processes.lives(owner, now=cloud.clock.now()):
            held = f"process {owner.pid} holds it"
        if held:
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

    async with open_app(interrupts, require_cloud=True, launches=False, quiet=as_json, to_stop=True) as app:
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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(server_id: str, as_json: bool) -> int:
    """Show everything that happened to a machine: its steps, its jobs, its ledger. Only reads our books."""
    from runcomfy.cli.machines_show import show_machine

    return run_async(lambda interrupts: show_machine(interrupts, server_id, as_json=as_json))
