"""
`comfyctl demo`: the whole product, end to end, on the emulated cloud.

The same verbs as for a real account, in the same order: start the dev server, run the workflow, stop the machine. Only
the cloud is emulated, and it says so. That nothing bills any more is read from the emulated cloud's own books.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from runcomfy.application.dev_server import DevServer
    from runcomfy.bootstrap import App
    from runcomfy.cli.progress_display import Display
    from runcomfy.domain.job import JobResult
    from runcomfy.domain.machine import Machine
    from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

PROMPT = "a helmet of polished steel with baroque ornament, studio light"
BOOT_SECONDS = 2.0
OURS: Final = ("RUNCOMFY_", "COMFYUI_", "CONJURE_", "HUGGINGFACE_")
"""How the variables begin that say where the user's own books, queues, machines and accounts are."""


@click.command()
@click.option("--image", metavar="PATH", help="Your own picture instead of the shipped one.")
@click.option("--prompt", metavar="TEXT", default=PROMPT, show_default=False, help="What to make of it.")
@click.option("--seed", type=int, help="For every seed; random unless given.")
@click.option("--out", metavar="DIR", default="outputs/demo", show_default=True, help="Where the results go.")
@click.option("--serve", is_flag=True, help="Then show the page over the emulated cloud, until Ctrl+C.")
def demo(image: str | None, prompt: str, seed: int | None, out: str, serve: bool) -> int:
    """Run the main job on an emulated cloud: no account, no GPU, no cost."""
    page_at = Path(out).absolute() if serve else None
    with as_a_newcomer():
        return run_async(lambda interrupts: _demo(interrupts, image, prompt, seed, out, page_at))


@contextmanager
def as_a_newcomer() -> Iterator[None]:
    """Have no settings from the environment or a credentials file: no emulated machine in real books, no real queue.

    Processes that are started in the block have none either.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(OURS)}
    for name in kept:
        del os.environ[name]
    os.environ["RUNCOMFY_CREDENTIALS_FILE"] = os.devnull
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(OURS)]:
            del os.environ[name]
        os.environ.update(kept)


async def _demo(
    interrupts: Interrupts, image: str | None, prompt: str, seed: int | None, out: str, page_at: Path | None
) -> int:
    from runcomfy.domain.job import JobRequest
    from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

    click.echo("DEMO: the cloud is emulated on this computer and no GPU model runs; nothing here costs money.")
    with TemporaryDirectory(prefix="comfyctl-demo-", ignore_cleanup_errors=True) as folder:
        cloud = RunComfyEmulator(boot_time=BOOT_SECONDS, delete_takes=0.3, requests_per_second=50.0, burst=50)
        async with cloud:
            overrides = {**cloud.environment(), **_quick(folder)}
            request = JobRequest(
                "generate_flux_mesh", image=image or str(shipped_picture()), prompt=prompt, seed=seed, out_dir=out
            )
            code = await _on(cloud, overrides, request, interrupts, Path(folder))
            if page_at is not None and code == 0 and not interrupts.event.is_set():
                from runcomfy.cli.demo_serve import serve_demo

                await serve_demo(interrupts, overrides, request, Path(folder), page_at)
            return _prove(cloud) or code


def _quick(folder: str) -> Mapping[str, str]:
    """Settings of the demo: a state folder of its own, and the emulated cloud's pace."""
    return {
        "RUNCOMFY_STATE_DIR": str(Path(folder) / "state"),
        "RUNCOMFY_POLL_INTERVAL": "0.25",
        "RUNCOMFY_REQUESTS_PER_SECOND": "40",
        "RUNCOMFY_BURST": "40",
    }


def shipped_picture() -> Path:
    """Return the picture that ships with the product."""
    here = Path(__file__).resolve()
    for candidate in (here.parents[2] / "examples" / "render.png", here.parents[1] / "data" / "render.png"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError("the demo's picture is missing from this installation")


async def _on(
    cloud: RunComfyEmulator, overrides: Mapping[str, str], request: Any, interrupts: Interrupts, folder: Path
) -> int:
    from runcomfy.application.finish import finish
    from runcomfy.bootstrap import App
    from runcomfy.cli.app import load
    from runcomfy.cli.progress_display import Display
    from runcomfy.cli.words import still_billing

    # The working directory may be a project with a queue: who ends machines looks into it.
    queue = {"root": str(folder), "database": str(folder / "queue.sqlite3")}
    async with App(load(overrides, quiet=True), overrides=overrides, queue=queue) as app:
        interrupts.last_words = lambda: still_billing(app.held())
        await app.orchestrator().prepare(request)  # bad input is told before a machine is launched
        with Display() as display:
            app.tell = display.tell
            display.attach(interrupts)
            machines, dev = await app.cloud()
            click.echo(f"1. launching a dev server at {cloud.url}")
            machine = await _start(app, dev, display)
            click.echo(
                f"   {machine.server_type} machine {machine.server_id} is ready, ${machine.usd_per_hour} per hour"
            )
            click.echo("2. running generate_flux_mesh: a depth-guided picture, then a mesh from it")
            interrupts.listens = True
            try:
                result = await app.orchestrator().run(request, on_progress=display, cancel=interrupts.event)
            finally:
                click.echo("3. stopping the machine")
                stopped = await finish(dev.shutdown(reason="the demo is over"))
        _show(result)
        for machine in stopped:
            await _show_machine_bill(machines.store, machine)
        return result.exit_code


async def _start(app: App, dev: DevServer, display: Display) -> Machine:
    from runcomfy.domain.progress import Progress, Step

    machine, _, _ = await dev.start(
        server_type=app.settings.cloud.server_type,
        duration=app.settings.cloud.duration,
        on_boot=lambda boot: display(
            Progress(Step.BOOTING, message=f"{boot.status} ({boot.elapsed.total_seconds():.0f} s)")
        ),
        on_wait=lambda why: display(Progress(Step.CHECKING, message=why)),
    )
    return machine


def _show(result: JobResult) -> None:
    from runcomfy.cli.output import show_error
    from runcomfy.domain.exceptions import RunComfyError

    for output in result.outputs:
        path = Path(output.path)
        with suppress(OSError, ValueError):
            path = path.resolve()
        click.echo(f"   {output.kind:<5} {path} ({output.size_bytes:,} bytes, verified)")
    for target, seed in result.seeds.items():
        click.echo(f"   seed  {target} = {seed}")
    if isinstance(result.exception, RunComfyError):
        show_error(result.exception)


async def _show_machine_bill(store: Any, machine: Machine) -> None:
    from runcomfy.cli.output import bill_table
    from runcomfy.domain.job import BillLine
    from runcomfy.domain.money import seconds_between

    entries = await store.ledger(machine_id=machine.id)
    lines = [
        BillLine(
            f"{machine.server_type}, {e.note}", seconds_between(e.started_at, e.ended_at), e.usd_per_hour, e.amount_usd
        )
        for e in entries
    ]
    click.echo("4. the bill, by our ledger (emulated dollars):")
    click.echo("\n".join("   " + line for line in bill_table(lines).splitlines()))


def _prove(cloud: RunComfyEmulator) -> int:
    """Read from the cloud's own books whether anything still bills; 4 if so."""
    books = cloud.books
    seconds = sum((bill.seconds for bill in books.values()), Decimal(0))
    click.echo(
        f"5. the cloud's own books: {len(books)} machine(s), {seconds:.1f} s billed, ${cloud.total_usd:.4f}; "
        f"billing now: {len(cloud.billing)}"
    )
    if cloud.billing:
        click.echo(f"error: still billing: {', '.join(cloud.billing)}", err=True)
        return 4
    click.echo("   nothing bills any more")
    return 0
