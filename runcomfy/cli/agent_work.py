"""What `comfyctl agent start`, `monitor` and `execute` do: work until told to stop, and say what happens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runcomfy.cli.agent_voice import Narrated, Voice
from runcomfy.cli.runner import Interrupts
from runcomfy.cli.words import still_billing
from runcomfy.domain.exceptions import ValueInvalid, foreign_text

if TYPE_CHECKING:
    from runcomfy.application.executor import Executor
    from runcomfy.bootstrap import App


@dataclass(frozen=True, slots=True)
class Task:
    """What the program is to do."""

    monitor: bool
    execute: bool
    server: str | None = None
    cloud: bool = False
    slots: int | None = None
    once: bool = False
    as_json: bool = False

    def settings(self) -> dict[str, Any]:
        """Return what the options say of the queue's settings. Raises ValueInvalid."""
        if self.server is not None and self.cloud:
            raise ValueInvalid("--server and --cloud say two different places", hint="give one of them")
        where = "cloud" if self.cloud else "server" if self.server is not None else None
        return {"api_base_url": self.server, "where": where, "slots": self.slots}


async def work(interrupts: Interrupts, task: Task, where: Mapping[str, Any]) -> int:
    """Work until Ctrl+C or SIGTERM, or with `once` until there is nothing to do."""
    from runcomfy.cli.app import open_app

    given = {**where, **task.settings()}
    interrupts.listens = True
    interrupts.answer = "stopping: nothing new is begun (Ctrl+C again leaves at once)"
    with Voice(as_json=task.as_json) as voice:
        async with open_app(interrupts, queue=given, quiet=task.as_json, launches=task.execute) as app:
            app.tell = voice
            interrupts.say, interrupts.clear = voice, voice.clear
            interrupts.last_words = lambda: last_words(app, voice)
            await _greet(app, task, voice)
            await _work(interrupts, app, task, voice)
            if interrupts.event.is_set():
                voice("stopped; the next start goes on where this one ended")
    return 0


def last_words(app: App, voice: Voice) -> list[str]:
    """Return what is said when the process leaves at once: what goes on by itself, and what bills."""
    lines = []
    if voice.running:
        names = foreign_text(", ".join(voice.running), 400)
        lines.append(f"left at once while {names} ran; the next start finds what became of it and goes on")
    return [*lines, *(still_billing(app.held()) if app.held() or not lines else [])]


async def _greet(app: App, task: Task, voice: Voice) -> None:
    from runcomfy.cli.queue_display import counts_line
    from runcomfy.domain.secret import SecretUrl

    settings = app.queue_settings
    store = await app.job_store()
    voice(f"queue {app.queue_where}: {counts_line(await store.counts())}")
    if task.monitor:
        voice(f"job files are taken up from {settings.jobs_processing}")
    if task.execute:
        server = SecretUrl(settings.api_base_url).masked
        place = f"on the ComfyUI at {server}" if settings.where == "server" else "on the dev server or rented machines"
        voice(f"jobs run {place}, {settings.slots} at once; results go to {settings.jobs_finished}")


async def _work(interrupts: Interrupts, app: App, task: Task, voice: Voice) -> None:
    stop = interrupts.event
    # Before anything is begun: a second monitor on the folder is told so at once.
    monitor = await app.monitor(hold=True) if task.monitor else None
    executor = await _executor(app, voice) if task.execute else None
    if task.once:
        if monitor is not None:
            await monitor.once()
        if executor is not None:
            await executor.run(stop, once=True)
            if not stop.is_set():
                await _settle(app, executor, voice)
        return
    parts: list[Coroutine[Any, Any, None]] = []
    if monitor is not None:
        parts.append(monitor.run(stop))
    if executor is not None:
        parts.append(executor.run(stop))
    await together(parts, stop)


async def _settle(app: App, executor: Executor, voice: Voice) -> None:
    """Raise why jobs are left undone, or else that some failed: nobody is to take the queue for done."""
    from runcomfy.application.working_off import failed_here, left_behind

    left, failed = await left_behind(await app.job_store(), await executor.paused()), failed_here(executor.failed)
    if left is not None and failed is not None:
        voice(failed.message)
    if (error := left or failed) is not None:
        raise error


async def _executor(app: App, voice: Voice) -> Executor:
    store = await app.job_store()
    return await app.executor(observed=lambda orchestrator: Narrated(orchestrator, store, voice))


async def together(parts: list[Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
    """Run the parts; when one ends the others are told to stop, and the first error is raised at the end."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise
    for task in tasks:
        task.result()
