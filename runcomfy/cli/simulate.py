"""`comfyctl simulate`: one simulated day of everything, from a seed."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import click

from runcomfy.cli.output import tell

SHORTEST_HOURS: Final = 6
"""Days are judged by their end: with less calm than three hours, what is about to end would count as left over."""


@click.command()
@click.option("--seed", type=click.IntRange(min=0), required=True, help="Which day: everything in it follows from it.")
@click.option(
    "--hours",
    type=click.FloatRange(min=1, max=24 * 7),
    help="How long the day is (default: 24), at least 6 unless a promise is broken on purpose.",
)
@click.option("--trace", is_flag=True, help="Print every event.")
@click.option("--story", metavar="NAME", help="Print what concerns one job or machine.")
@click.option("--break", "broken", metavar="INVARIANT", help="Break a promise on purpose, for example I3.")
def simulate(seed: int, hours: float | None, trace: bool, story: str | None, broken: str | None) -> int:
    """Live through one day of service, queue, pool and guard on an emulated cloud where much goes wrong, and judge it.

    Everything runs in this process, in memory, in seconds. The oracles are the emulators' own books. The same seed is
    the same day. Exit code 1 if a promise was not kept.
    """
    from runcomfy.testing.simulation.run import simulate as live
    from runcomfy.testing.simulation.switches import SWITCHES

    switch = None
    if broken is not None:
        switch = SWITCHES.get(broken.upper())
        if switch is None:
            raise click.BadParameter(f"one of {', '.join(SWITCHES)}", param_hint="--break")
    least = SHORTEST_HOURS if switch is None else 1
    if hours is not None and not hours >= least:  # NaN is neither more nor less
        raise click.BadParameter(f"at least {least}, the last of them for everything to end in", param_hint="--hours")
    length = timedelta(hours=hours or (switch.hours if switch is not None else 24))
    day = live(seed, length=length, broken=broken.upper() if broken else "")
    if trace:
        for line in day.trace.text():
            click.echo(line)
    elif story is not None:
        for line in day.trace.story(story):
            click.echo(line)
    elif day.violations:
        for line in day.report():
            click.echo(line)
    for violation in day.violations if trace or story else ():
        click.echo(str(violation))
    tell(
        f"seed {seed}, {day.hours:g} h: {day.jobs} jobs, {day.machines} machines, {day.faults} faults, {day.kills} "
        f"kills; ledger ${day.ledger_usd:.4f}, bill ${day.bill_usd:.4f}; {len(day.violations)} promises not kept "
        f"({day.seconds:.1f} s, trace {day.digest[:16]})"
    )
    return 1 if day.violations else 0
