"""No remote call and no durable write without a named point: where ports are entered, points stand round every call."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from PIL import Image

import runcomfy.ports
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application import faultpoints
from runcomfy.application.faultpoints import OPENS, UNVISITED, Entered, entered, inside, listening, plan_of
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.store import Store
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import settings_for
from runcomfy.testing.queue_programs import drawing

# -- what FAULT says -----------------------------------------------------------------------------------------


def test_a_plan_is_read_and_strangers_words_are_ignored() -> None:
    plan = plan_of("launch.sent:1:kill, store.open.before:2:sleep=2.5,a:0:kill,b:1:dance,c:1:sleep=x,d:1:sleep,yes")
    assert plan == {"launch.sent": (1, "kill"), "store.open.before": (2, "sleep=2.5"), "d": (1, "sleep")}


def test_a_point_fails_at_the_visit_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faultpoints, "_plan", plan_of("here:2:raise"))
    faultpoints.faultpoint("here")
    with pytest.raises(RunComfyError, match="fault point here"):
        faultpoints.faultpoint("here")
    faultpoints.faultpoint("here")


def test_a_point_blocks_its_thread_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(faultpoints, "_plan", plan_of("here:1:sleep=2.5,there:1:sleep"))
    faultpoints.faultpoint("here")
    faultpoints.faultpoint("there")
    assert waits == [2.5, faultpoints.SLEEP_SECONDS]


# -- round every call of every port ----------------------------------------------------------------------------


def ports() -> list[type]:
    """Every protocol of `runcomfy.ports`."""
    found = {
        thing
        for module in pkgutil.iter_modules(runcomfy.ports.__path__)
        for thing in vars(importlib.import_module(f"runcomfy.ports.{module.name}")).values()
        if inspect.isclass(thing) and getattr(thing, "_is_protocol", False) and "runcomfy" in thing.__module__
    }
    return sorted(found, key=lambda port: port.__name__)


PURE = {"Clock", "Processes"}
"""Ports without an effect: they look at this computer's clock and process table."""


def calls() -> list[tuple[type, str]]:
    return [
        (port, name)
        for port in ports()
        if port.__name__ not in PURE
        for name, what in vars(port).items()
        if inspect.isfunction(what) and not name.startswith("_") and name not in UNVISITED
    ]


def test_the_ports_are_all_there() -> None:
    names = {port.__name__ for port in ports()}
    assert names >= {"Provider", "ComfyUI", "Store", "JobStore", "Results", "JobFolder", "JobFiles", "DevServerFile"}
    assert names >= {"Balances", "WebhookBook", "Serverless", "Limiter"} | PURE
    assert len(calls()) > 100


@pytest.mark.parametrize(("port", "name"), calls(), ids=lambda value: getattr(value, "__name__", value))
async def test_each_call_of_each_port_passes_two_points(port: type, name: str) -> None:
    declared = getattr(port, name)
    passed: list[str] = []

    @asynccontextmanager
    async def block(*_: Any) -> AsyncIterator[str]:
        passed.append(f"in {inside()[-1]}")
        yield "answer"

    async def later(*_: Any) -> str:
        passed.append(f"in {inside()[-1]}")
        return "answer"

    def now(*_: Any) -> str:
        passed.append(f"in {inside()[-1]}")
        return "answer"

    is_block = "AbstractAsyncContextManager" in str(get_type_hints(declared).get("return", ""))
    call = block if is_block else later if inspect.iscoroutinefunction(declared) else now
    made = type("Made", (), {name: staticmethod(call)})()
    with listening(passed.append):
        held = entered(made, "port")
        if is_block:
            async with getattr(held, name)() as answer:
                pass
        else:
            answer = getattr(held, name)()
            if inspect.isawaitable(answer):
                answer = await answer
    assert passed == [f"port.{name}.before", f"in port.{name}", f"port.{name}.after"]
    assert answer == "answer" or (name in OPENS and type(answer) is Entered)
    assert inside() == ()


async def test_what_fails_passes_both_points_too() -> None:
    class Port:
        async def fails(self) -> None:
            raise OSError("no")

    passed: list[str] = []
    with listening(passed.append), pytest.raises(OSError, match="no"):
        await entered(Port(), "port").fails()
    assert passed == ["port.fails.before", "port.fails.after"]


async def test_what_a_call_calls_back_inside_its_transaction_has_points_of_its_own() -> None:
    class Jobs:
        async def finish(self, *, publish: Any) -> None:
            publish()

    passed: list[str] = []
    with listening(passed.append):
        await entered(Jobs(), "jobs").finish(publish=lambda: passed.append("named"))
    points = ["jobs.finish.before", "jobs.finish.publish.before", "named", "jobs.finish.publish.after"]
    assert passed == [*points, "jobs.finish.after"]


def test_while_nobody_asks_a_port_is_itself() -> None:
    port = object()
    assert entered(port, "port") is port


# -- the product is put together of entered ports ----------------------------------------------------------------


async def test_what_the_wiring_hands_out_is_entered(
    cloud: RunComfyEmulator, cloud_settings: Any, tmp_path: Path
) -> None:
    with listening(lambda _: None):
        app = App(settings_for(cloud_settings, tmp_path / "state"), queue={"database": str(tmp_path / "q.sqlite3")})
        async with app:
            machines, dev = await app.cloud()
            orchestrator, monitor = app.orchestrator(), await app.monitor()
            queue, costs = await app.job_queue(looks_often=True), await app.costs()
            server = app.comfyui(SecretUrl("http://127.0.0.1:1"))
            folder = await orchestrator._results.open_folder("job", under=str(tmp_path / "out"))  # type: ignore[arg-type]
            handed_out = [
                *(machines.provider, machines.store, machines.books.store, dev._file, await app.books(), server),
                *(orchestrator._results, folder, folder._disk, monitor._store, monitor._files, await app.job_store()),  # type: ignore[attr-defined]
                *(queue.store, costs._balances, app.given_server("http://127.0.0.1:1")),
            ]
            assert [type(port) for port in handed_out] == [Entered] * len(handed_out)
            assert isinstance(await app.books(), type(machines.store))
            store: Store = machines.store
            assert await store.owners() != {}
            await server.close()


AUDITED = """
import asyncio, contextvars, json, os, sys
from sqlalchemy import Engine, event

asked = json.loads(sys.argv[1])
from runcomfy.application.faultpoints import inside
from runcomfy.cli.main import main

outside, seen = [], set()

def audit(name, args):
    what = None
    if name == "open" and isinstance(args[0], str):
        flags = args[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in (args[1] or "") for c in "wax+")
        what = args[0] if writes else None
    elif name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "sqlite3.connect"):
        what = os.fspath(args[0]) if not isinstance(args[0], int) else None
    elif name in ("socket.connect", "socket.sendto"):
        what = "socket"
    if what is None or (what != "socket" and not str(what).startswith(asked["folder"])) or str(what) in asked["logs"]:
        return
    seen.add(name)
    if not inside():
        outside.append(f"{name} {what}")

# Threads that a call waits for work inside it.
really = asyncio.BaseEventLoop.run_in_executor
def run_in_executor(self, executor, func, *args):
    return really(self, executor, contextvars.copy_context().run, func, *args)
asyncio.BaseEventLoop.run_in_executor = run_in_executor

@event.listens_for(Engine, "commit")
def committed(connection):
    seen.add("commit")
    if not inside():
        outside.append("commit")

sys.addaudithook(audit)
codes = []
for command in asked["commands"]:
    sys.argv = ["comfyctl", *command]
    try:
        main(command)
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps({"codes": codes, "outside": outside, "seen": sorted(seen)}))
"""


@pytest.mark.processes
@pytest.mark.looptime(False)
async def test_no_command_writes_or_calls_outside_of_a_point(tmp_path: Path) -> None:
    """Every file that is changed, every commit and every connection lies between two points."""
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    run = ["run", "image_invert", "--image", str(tmp_path / "in.png"), "--out", str(tmp_path / "out")]
    async with (
        RunComfyEmulator(boot_time=0.1, delete_takes=0.1, rate_limit=False, folder=tmp_path / "machines") as cloud,
        ComfyUIEmulator() as comfyui,
    ):
        async with SqlJobs(store_from(str(tmp_path / "queue.sqlite3"), clock=SystemClock())) as store:
            for number in range(2):
                out = str(tmp_path / f"{number}.png")
                await store.add([NewJob(JobRequest(drawing(0.1, number), out_file=out), "audited")])
                await asyncio.sleep(0)
        commands = [
            run,
            ["dev", "start", "--no-interactive"],
            ["dev", "extend", "10m"],
            run,
            ["dev", "shutdown"],
            ["machines", "reap"],
            ["agent", "execute", "--once", "--server", comfyui.url],
            ["serve", "--once", "--no-http", "--no-guard", "--no-monitor"],
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
        environment |= cloud.environment() | {
            "FAULT": "nowhere:1:kill",
            "COMFYUI_AGENT_DATABASE": str(tmp_path / "queue.sqlite3"),
            "RUNCOMFY_STATE_DIR": str(tmp_path / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "RUNCOMFY_GUARD": "false",
            "RUNCOMFY_POLL_INTERVAL": "0.1",
            "RUNCOMFY_VISIBILITY_WINDOW": "1",
            "RUNCOMFY_REQUESTS_PER_SECOND": "50",
            "RUNCOMFY_BURST": "50",
        }
        log = tmp_path / "state" / "logs"  # what is said is no fact; the log makes its folders itself
        logs = [str(path) for path in (log.parent, log, log / "comfyctl.log")]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            AUDITED,
            json.dumps({"commands": commands, "folder": str(tmp_path), "logs": logs}),
            cwd=tmp_path,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(100):
            said, err = await process.communicate()
    told = json.loads(said.decode().splitlines()[-1])
    assert told["codes"] == [0] * len(commands), err.decode()
    assert told["outside"] == []
    assert {"commit", "open", "os.rename", "socket.connect", "sqlite3.connect"} <= set(told["seen"])
