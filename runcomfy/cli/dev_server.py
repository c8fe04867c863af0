"""
The dev server's commands, for `comfyctl dev` and for the script `runcomfy/dev_server_startup.py`.

The script keeps the flags that CONJURE's own has; what each verb does is in `runcomfy.application.dev_server`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from runcomfy.application.dev_server import DevServer, DevServerStatus
    from runcomfy.bootstrap import App
    from runcomfy.domain.machine import Machine, MachineReport
    from runcomfy.domain.settings import Settings

NONE_RUNS = "there is no active development server"
SCRIPT = "dev_server_startup.py"
LEFT_RUNNING = "left running, and billing; `comfyctl dev shutdown` stops it"


# -- start and restart -------------------------------------------------------------------------------------


def start_command(
    *, server_type: str | None, duration: str | None, warm_up: bool, monitor: bool, show_url: bool, no_interactive: bool
) -> int:
    """Launch or reuse the dev server; return the exit code."""

    async def work(interrupts: Interrupts) -> int:
        async with _app(interrupts, launches=True) as app:
            seconds = _duration(duration) or app.settings.cloud.duration
            kind = server_type or app.settings.cloud.server_type
            await _start(app, kind, seconds, warm_up=warm_up, show_url=show_url, interrupts=interrupts)
            if monitor:
                return await _monitor(app, interrupts, ask=not no_interactive)
        return 0

    return run_async(work)


def restart_command(
    *, server_type: str | None, duration: str | None, warm_up: bool, monitor: bool, show_url: bool, no_interactive: bool
) -> int:
    """Stop the dev server and launch one like it; return the exit code."""

    async def work(interrupts: Interrupts) -> int:
        async with _app(interrupts, launches=True) as app:
            await _restart(app, server_type, duration, warm_up=warm_up, show_url=show_url, interrupts=interrupts)
            if monitor:
                return await _monitor(app, interrupts, ask=not no_interactive)
        return 0

    return run_async(work)


async def _restart(
    app: App,
    server_type: str | None,
    duration: str | None,
    *,
    warm_up: bool,
    show_url: bool,
    interrupts: Interrupts | None = None,
) -> None:
    machines, dev = await app.cloud()
    rows = await dev.rows()
    kind = server_type or (rows[-1].server_type if rows else app.settings.cloud.server_type)
    seconds = _duration(duration) or (rows[-1].duration if rows else None) or app.settings.cloud.duration
    machines.books.price(kind)  # what cannot be launched again is not stopped
    await _shutdown(app, dev)
    await _start(app, kind, seconds, warm_up=warm_up, show_url=show_url, interrupts=interrupts)


def _app(interrupts: Interrupts, *, launches: bool = False) -> App:
    from runcomfy.cli.app import open_app
    from runcomfy.cli.words import ended_well

    app = open_app(interrupts, require_cloud=True, launches=launches)
    if launches:
        interrupts.good_end = lambda: ended_well(app.held())
    return app


def _duration(text: str | None) -> timedelta | None:
    from runcomfy.domain.durations import parse_duration
    from runcomfy.domain.exceptions import ValueInvalid

    if text is None:
        return None
    span = parse_duration(text)
    if not span:
        raise ValueInvalid("a dev server cannot run for no time", hint="give --duration in seconds, e.g. 3600")
    return span


async def _start(
    app: App,
    server_type: str,
    duration: timedelta,
    *,
    warm_up: bool,
    show_url: bool,
    interrupts: Interrupts | None = None,
) -> None:
    from runcomfy.cli.progress_display import Display
    from runcomfy.cli.words import show_span
    from runcomfy.domain.progress import Progress, Step

    with Display() as display:
        app.tell = display.tell
        if interrupts is not None:
            display.attach(interrupts)
        _, dev = await app.cloud()
        await app.start_guard()

        def on_boot(boot: Any) -> None:
            usual = f", usually {show_span(boot.expected)}" if boot.expected else ""
            percent = 0.0
            if boot.expected:
                percent = min(95.0, 100.0 * boot.elapsed / boot.expected)
            display(Progress(Step.BOOTING, percent=percent, message=f"{boot.status}{usual}; starting is free"))

        display(Progress(Step.LAUNCHING, message=f"looking for the dev server, else launching a {server_type} machine"))
        machine, report, reused = await dev.start(
            server_type=server_type,
            duration=duration,
            on_boot=on_boot,
            on_wait=lambda why: display(Progress(Step.CHECKING, message=why)),
        )
        if reused and machine.server_type != server_type:
            display.tell(
                f"a {machine.server_type} dev server was there already; "
                f"`comfyctl dev restart --server-type {server_type}` replaces it"
            )
    idle_after = app.settings.app.idle_timeout if app.settings.pool.guard else None
    _describe_start(machine, report, reused=reused, show_url=show_url, idle_after=idle_after)
    if warm_up:
        with Display() as display:
            app.tell = display.tell
            done = await _warm_up(app, display)
        click.echo(f"  warm-up  {done}")


def _describe_start(
    machine: Machine, report: MachineReport, *, reused: bool, show_url: bool, idle_after: timedelta | None
) -> None:
    from runcomfy.cli.words import show_span, show_time

    url = (report.url.reveal() if show_url else report.url.masked) if report.url else "-"
    click.echo(f"dev server {'reused' if reused else 'ready'}: {machine.server_type} machine {machine.server_id}")
    hidden = report.url is not None and url != report.url.reveal()
    click.echo(f"  address  {url}" + ("  (--show-url shows it whole)" if hidden else ""))
    click.echo(f"  price    ${machine.usd_per_hour} per hour ({machine.rate_source})")
    click.echo(f"  stops    {show_time(report.stopping_at or machine.planned_stop_at)} (planned)")
    if idle_after is not None:
        click.echo(f"  idle     ended when nothing runs on it for {show_span(idle_after)} (CONJURE_IDLE_TIMEOUT)")


async def _warm_up(app: App, display: Any) -> str:
    """Run the workflow once on a plain grey picture; return what came of it. The server stays up either way."""
    import tempfile

    from runcomfy.domain.exceptions import foreign_text
    from runcomfy.domain.job import JobRequest

    with tempfile.TemporaryDirectory(prefix="comfyctl-warm-up-") as folder:
        image = await asyncio.to_thread(_grey_picture, folder)
        request = JobRequest("generate_flux_mesh", image=image, prompt="a grey sphere", out_dir=folder)
        result = await app.orchestrator().run(request, on_progress=display)
    if result.exception is None:
        return f"done in {result.timings.get('execute', 0.0):.0f} s"
    return f"failed ({foreign_text(result.exception)}); the dev server stays up"


def _grey_picture(folder: str) -> str:
    from pathlib import Path

    from PIL import Image

    path = Path(folder) / "grey.png"
    Image.new("RGB", (512, 512), (128, 128, 128)).save(path)
    return str(path)


# -- status ------------------------------------------------------------------------------------------------


def status_command(*, show_url: bool = False, as_json: bool = False) -> int:
    """Show the dev server as it really is; return 0 also when there is none."""

    async def work(interrupts: Interrupts) -> int:
        from runcomfy.cli.output import show_json

        async with _app(interrupts) as app:
            _, dev = await app.cloud()
            status = await dev.status()
            idle_after, warning = app.settings.app.idle_timeout, app.settings.pool.idle_warning
        facts = _facts(status, show_url=show_url) if status is not None else None
        if as_json:
            show_json(facts)
        elif status is None or facts is None:
            click.echo(NONE_RUNS)
        else:
            _print_status(status, facts, idle_after, warning)
        return 0

    return run_async(work)


def _facts(status: DevServerStatus, *, show_url: bool) -> dict[str, Any]:
    from runcomfy.adapters.clock import SystemClock
    from runcomfy.cli.words import show_span, show_time

    machine, report, now = status.machine, status.report, SystemClock().now()
    url = None
    if report is not None and report.url is not None:
        url = report.url.reveal() if show_url else report.url.masked
    up = None
    if machine.ready_at is not None:
        up = show_span(now - machine.ready_at)
    return {
        "Server ID": machine.server_id,
        "Status": report.status if report else "not found at the provider",
        "Base URL": url,
        "Server Type": machine.server_type,
        "Uptime": up,
        "Total Cost": f"${status.cost_usd:.4f}",
        "Session Cost": f"${status.cost_usd:.4f}",  # a machine is one session
        "Health Status": "healthy" if status.usable else "unhealthy",
        "Last Health Check": show_time(now),
        "Price": f"${machine.usd_per_hour} per hour",
        "Stops At": show_time(machine.planned_stop_at),
        "Jobs Running": status.jobs_running,
        "Idle For": show_span(status.idle) if status.idle is not None else None,
        "Idle Cost": f"${status.idle_cost_usd:.4f}",
        "Monitored": status.monitored,
        "Ends Idle In": show_span(status.ends_idle_in) if status.ends_idle_in is not None else None,
        "Health": [{"layer": layer.name, "ok": layer.ok, "detail": layer.detail} for layer in status.layers],
        "Usable": status.usable,
    }


def _print_status(status: DevServerStatus, facts: dict[str, Any], idle_after: timedelta, warning: timedelta) -> None:
    from runcomfy.domain.exceptions import foreign_text
    from runcomfy.domain.machine import Phase

    click.echo("development server")
    for name, value in facts.items():
        if name in ("Health", "Usable", "Monitored") or value is None:
            continue
        click.echo(f"  {name + ':':<18} {value}")
    for layer in status.layers:
        click.echo(f"  {'ok ' if layer.ok else 'BAD'} {layer.name}: {foreign_text(layer.detail)}")
    if status.report is not None and status.report.phase is Phase.STARTING:
        click.echo("still starting, which is free; `comfyctl dev start` waits for it")
    else:
        click.echo("healthy" if status.usable else "not reachable or not usable")
    if status.ends_idle_in is not None and status.ends_idle_in <= warning:
        click.echo(
            f"WARNING: it is idle, and ended in {facts['Ends Idle In']} unless a job uses it or `comfyctl dev monitor` "
            "looks at it (CONJURE_IDLE_TIMEOUT)"
        )
    elif status.idle is not None and status.idle > idle_after:
        click.echo(
            f"nothing ran on it for {facts['Idle For']}, which cost {facts['Idle Cost']}: "
            "`comfyctl dev shutdown` ends that"
        )


# -- shutdown, extend --------------------------------------------------------------------------------------


def shutdown_command() -> int:
    """Stop the dev server; nothing running counts as success."""

    async def work(interrupts: Interrupts) -> int:
        from runcomfy.cli.machines import cloud_or_memory

        async with _app(interrupts) as app:
            await cloud_or_memory(app)
            _, dev = await app.cloud()
            await _shutdown(app, dev)
        return 0

    return run_async(work)


async def _shutdown(app: App, dev: DevServer) -> None:
    from runcomfy.application.finish import finish
    from runcomfy.cli.output import tell
    from runcomfy.domain.money import cost_of, show_usd

    for machine in await dev.rows():
        tell(f"stopping {machine.server_type} machine {machine.server_id} and looking until it is gone")
    ended = await finish(dev.shutdown())
    if not ended:
        click.echo(NONE_RUNS)
    for machine in ended:
        spent = show_usd(cost_of(machine, now=app.clock.now()))
        click.echo(f"{machine.server_type} machine {machine.server_id}: {machine.state}; it cost {spent}")


def extend_command(time: str) -> int:
    """Let the dev server run longer."""

    async def work(interrupts: Interrupts) -> int:
        from runcomfy.cli.words import show_time

        by = _duration(time)
        async with _app(interrupts) as app:
            _, dev = await app.cloud()
            machine = await dev.extend(by=by or timedelta(0))
        click.echo(f"machine {machine.server_id} now stops at {show_time(machine.planned_stop_at)}")
        return 0

    return run_async(work)


# -- monitor -----------------------------------------------------------------------------------------------


def monitor_command(*, no_interactive: bool) -> int:
    """Stay and watch the dev server."""

    async def work(interrupts: Interrupts) -> int:
        async with _app(interrupts) as app:
            return await _monitor(app, interrupts, ask=not no_interactive)

    return run_async(work)


async def _monitor(app: App, interrupts: Interrupts, *, ask: bool) -> int:
    from runcomfy.cli.monitor import watch_dev_server

    machines, dev = await app.cloud()
    interrupts.listens = True
    before = interrupts.answer, interrupts.last_words
    interrupts.last_words = lambda: [LEFT_RUNNING]
    interrupts.answer = ""  # nothing ends: the question, or the word that it is left running, follows
    ended_by_itself = await watch_dev_server(machines, dev, app.comfyui, interrupts.event)
    if ended_by_itself:
        return 0
    if ask and sys.stdin is not None and sys.stdin.isatty():
        # Another Ctrl+C now leaves at once; from the answer on it counts from one again.
        answer = await asyncio.to_thread(_ask, "[s]top the machine, or [l]eave it running? ")
        interrupts.again()
        interrupts.answer, interrupts.last_words = before
        if answer.strip().lower().startswith("s"):
            await _shutdown(app, dev)
            return 0
    click.echo(LEFT_RUNNING)
    return 0


def _ask(question: str) -> str:
    try:
        return input(question)
    except (EOFError, KeyboardInterrupt):
        return ""


# -- the script --------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--server-type", metavar="TYPE", help="medium, large, extra-large, 2x-large, 2xl-turbo.")
@click.option("--duration", metavar="SECONDS", help="How long it runs, from ready (default 3600).")
@click.option("--no-interactive", is_flag=True, help="Never read stdin.")
@click.option("--status", "verb", flag_value="status", help="Show the dev server as it really is.")
@click.option("--shutdown", "verb", flag_value="shutdown", help="Stop the dev server.")
@click.option("--restart", "verb", flag_value="restart", help="Stop it and start one like it.")
@click.option("--extend", metavar="SECONDS", help="Let it run longer by this much.")
@click.option("--warm-up", is_flag=True, help="Run the workflow once, so that its models are loaded.")
@click.option("--monitor", is_flag=True, help="Stay and show queue, progress and cost.")
@click.option("--show-url", is_flag=True, help="Show the whole address; who knows it can use the machine.")
def script(verb: str | None, extend: str | None, **options: Any) -> int:
    """Launch (or reuse) one warm development server, look at it, stop it."""
    if extend is not None:
        return extend_command(extend)
    if verb == "status":
        return status_command(show_url=options["show_url"])
    if verb == "shutdown":
        return shutdown_command()
    return restart_command(**options) if verb == "restart" else start_command(**options)


def main() -> Awaitable[None]:
    """Run the script and exit with its code.

    CONJURE's own is a coroutine. So, called within a running event loop, this returns one: `await main()` does the same
    with the `DevServerManager` of `runcomfy.dev_server_startup`, whoever stands in for it there. So does
    `asyncio.run(main())` while somebody does.
    """
    from runcomfy.cli.main import call

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if _manager_class() is DevServerManager:
            sys.exit(call(script, name=SCRIPT))
    return _main_in_loop(sys.argv[1:])


async def _main_in_loop(arguments: list[str]) -> None:
    from runcomfy.cli.main import call
    from runcomfy.cli.output import show_error
    from runcomfy.domain.exceptions import RunComfyError

    try:
        with script.make_context(SCRIPT, list(arguments)) as context:
            given = dict(context.params)
    except (click.ClickException, click.exceptions.Exit):  # wrong, or a question for help: the script says it
        sys.exit(await asyncio.to_thread(call, script, arguments, name=SCRIPT))
    verb, extras = given.pop("verb"), ("extend", "warm_up", "monitor", "show_url")
    if any(given[name] for name in extras):
        sys.exit(await asyncio.to_thread(call, script, arguments, name=SCRIPT))
    try:
        done = await _through_manager(verb, given)
    except RunComfyError as error:
        show_error(error)
        sys.exit(error.exit_code)
    sys.exit(0 if done else 1)


def _manager_class() -> Any:
    """Return the class that the public door shows, which may be a stand-in."""
    return getattr(sys.modules.get("runcomfy.dev_server_startup"), "DevServerManager", DevServerManager)


async def _through_manager(verb: str | None, given: dict[str, Any]) -> bool:
    manager: DevServerManager = _manager_class()()
    interactive = not given["no_interactive"]
    if verb == "status":
        await manager.show_status()
        return True
    if verb == "shutdown":
        return await manager.shutdown_server()
    if verb == "restart":
        return await manager.restart_server(interactive=interactive)
    span = _duration(given["duration"])
    seconds = int(span.total_seconds()) if span is not None else None
    return await manager.launch_server(server_type=given["server_type"], duration=seconds, interactive=interactive)


class DevServerManager:
    """The verbs as coroutines, for programs; credentials come from the environment and credentials.txt."""

    def __init__(self) -> None:
        """Read the credentials; nothing is sent. Raises CredentialsMissing, a FileNotFoundError: there are none."""
        from runcomfy.adapters.config import load_settings
        from runcomfy.conjure.client import ConjureAPIClient
        from runcomfy.conjure.dev_server_state import DevServerStateManager

        settings = load_settings()
        self.credentials: dict[str, str] = _credentials(settings)
        self.state_manager = DevServerStateManager(
            os.path.join(settings.files.state_dir, "dev_server_state.json"),  # noqa: PTH118 - text in, text out
            copies=settings.files.state_copies,
        )
        self.client: ConjureAPIClient = ConjureAPIClient(settings=settings)

    async def launch_server(
        self, server_type: str | None = None, duration: float | None = 3600, interactive: bool = True
    ) -> bool:
        """Launch or reuse the dev server, for `duration` seconds (None: RUNCOMFY_DEFAULT_DURATION); whether it is up.

        What went wrong is said on stderr. `interactive`: nothing is asked, either way.
        """

        async def work() -> None:
            async with self._open() as app:
                span = timedelta(seconds=duration) if duration is not None else app.settings.cloud.duration
                await _start(app, server_type or app.settings.cloud.server_type, span, warm_up=False, show_url=False)

        return await _done(work())

    async def shutdown_server(self) -> bool:
        """Stop the dev server; nothing running counts as success. What went wrong is said on stderr."""

        async def work() -> None:
            async with self._open() as app:
                _, dev = await app.cloud()
                await _shutdown(app, dev)

        return await _done(work())

    async def restart_server(self, interactive: bool = True) -> bool:
        """Stop the dev server and launch one like it; whether it is up. What went wrong is said on stderr."""

        async def work() -> None:
            async with self._open() as app:
                await _restart(app, None, None, warm_up=False, show_url=False)

        return await _done(work())

    async def show_status(self) -> None:
        """Print the dev server as it really is."""
        async with self._open() as app:
            _, dev = await app.cloud()
            status = await dev.status()
            idle_after, warning = app.settings.app.idle_timeout, app.settings.pool.idle_warning
        if status is None:
            click.echo(NONE_RUNS)
        else:
            _print_status(status, _facts(status, show_url=False), idle_after, warning)

    async def get_status(self) -> DevServerStatus | None:
        """Return the dev server as it really is."""
        async with self._open() as app:
            _, dev = await app.cloud()
            return await dev.status()

    def _open(self) -> App:
        from runcomfy.bootstrap import App
        from runcomfy.cli.app import load

        return App(load(require_cloud=True))


async def _done(work: Awaitable[None]) -> bool:
    from runcomfy.cli.output import show_error
    from runcomfy.domain.exceptions import RunComfyError

    try:
        await work
    except RunComfyError as error:
        show_error(error)
        return False
    return True


def _credentials(settings: Settings) -> dict[str, str]:
    """Return the credentials by CONJURE's keys. Raises CredentialsMissing if there are none at all."""
    from runcomfy.conjure.errors import also
    from runcomfy.domain.exceptions import CredentialsMissing

    cloud = settings.cloud
    if not cloud.user_id and not cloud.tokens:
        missing = CredentialsMissing(
            "no RunComfy credentials were found",
            hint="write userID and RUNCOMFY_API_TOKEN into credentials.txt (see credentials.example.txt), or set "
            "RUNCOMFY_USER_ID and RUNCOMFY_API_TOKEN",
        )
        raise also(missing, FileNotFoundError)
    token = cloud.tokens[0].reveal() if cloud.tokens else ""
    return {"userID": cloud.user_id, "RUNCOMFY_API_TOKEN": token, "version_id": cloud.workflow_version_id}
