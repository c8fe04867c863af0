"""Staying with the dev server: its queue, what runs, what it costs, until Ctrl+C or until it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import click

from runcomfy.application.dev_server import DevServer
from runcomfy.application.machines import Machines
from runcomfy.cli.words import show_span, show_time
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.machine import Machine, MachineReport
from runcomfy.domain.money import cost_of, show_usd
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI

LOOK_EVERY = 2.0
ASK_PROVIDER_EVERY = 15.0
SIGN_OF_LIFE_EVERY = 30.0


async def watch_dev_server(
    machines: Machines, dev: DevServer, comfyui: Callable[[SecretUrl], ComfyUI], stop: asyncio.Event
) -> bool:
    """Print what changes until `stop` is set (False) or there is no dev server any more (True).

    As long as somebody looks, the dev server is not ended for being idle.
    """
    found = await dev.find()
    if found is None or found[1].url is None:
        click.echo("there is no active development server")
        return True
    server = comfyui(found[1].url)
    try:
        async with dev.monitored(found[0]):
            return await _watch(machines, dev, server, found, stop)
    finally:
        await server.close()


async def _watch(
    machines: Machines, dev: DevServer, server: ComfyUI, found: tuple[Machine, MachineReport], stop: asyncio.Event
) -> bool:
    loop = asyncio.get_running_loop()
    last, said_at, asked_at = "", 0.0, loop.time()
    began: dict[str, float] = {}
    while True:
        line = await _line(server, began)
        now = loop.time()
        if now - asked_at >= ASK_PROVIDER_EVERY:
            asked_at = now
            again = await dev.find()
            if again is None:
                click.echo("the dev server is gone")
                return True
            found = again
        if line != last or now - said_at >= SIGN_OF_LIFE_EVERY:
            machine = found[0]
            cost = show_usd(cost_of(machine, now=machines.clock.now()))
            click.echo(f"{line}; {cost} so far, stops {show_time(machine.planned_stop_at)}")
            last, said_at = line, now
        try:
            async with asyncio.timeout(LOOK_EVERY):
                await stop.wait()
            return False
        except TimeoutError:
            continue


async def _line(server: ComfyUI, began: dict[str, float]) -> str:
    """Return what the server is doing in a line."""
    from datetime import timedelta

    try:
        queue = await server.queue()
    except RunComfyError as error:
        return f"ComfyUI does not answer ({error.code})"
    now = asyncio.get_running_loop().time()
    if not queue.running:
        began.clear()
        return f"idle, {len(queue.pending)} waiting" if queue.pending else "idle"
    prompt = queue.running[0]
    since = began.setdefault(prompt, now)
    tenth = timedelta(seconds=int(now - since) // 10 * 10)
    return f"running prompt {prompt} for {show_span(tenth)}, {len(queue.pending)} waiting"
