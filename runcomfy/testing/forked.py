"""
`comfyctl` as real processes that start within milliseconds: forked from one that has imported everything already.

    async with Commands() as commands:
        process = await commands.start(["run", "image_invert"], environment, folder, folder / "log")
        code = await process.wait()

Hundreds of processes that are killed and started again would spend all their time importing. Otherwise nothing differs
from a command that was typed: a process of its own, with its own environment, folder, connections and files. Only where
there is `fork` (not on Windows).
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from runcomfy.application.faultpoints import obey

_IMPORTED: Final = (
    "runcomfy.bootstrap", "runcomfy.wiring.serving", "runcomfy.cli.run", "runcomfy.cli.runner", "runcomfy.cli.dev",
    "runcomfy.cli.dev_server", "runcomfy.cli.machines", "runcomfy.cli.serve", "runcomfy.cli.serve_work",
    "runcomfy.cli.agent", "runcomfy.cli.agent_work", "runcomfy.cli.queue_commands", "runcomfy.cli.queue_work",
    "runcomfy.cli.app", "runcomfy.cli.guard", "runcomfy.adapters.stores.sql", "runcomfy.adapters.stores.jobs",
    "runcomfy.adapters.stores.postgres", "runcomfy.adapters.stores.sqlite", "runcomfy.adapters.stores.choose",
    "runcomfy.adapters.stores.jobs_beside", "runcomfy.adapters.comfyui.client", "runcomfy.adapters.providers.runcomfy",
    "runcomfy.adapters.results", "runcomfy.adapters.job_files", "runcomfy.adapters.workflow_registry",
    "runcomfy.adapters.processes", "runcomfy.application.executor", "runcomfy.application.service",
    "runcomfy.application.fleet", "runcomfy.application.machine_pool", "runcomfy.application.pool_station",
    "runcomfy.application.reconciler", "runcomfy.application.monitor", "runcomfy.application.job_queue",
    "runcomfy.application.cost_optimizer", "runcomfy.application.aftermath", "alembic.migration", "psycopg",
)  # fmt: skip
_OWN: Final = "runcomfy.testing.forked"
_COMMANDS: Final = "runcomfy.cli.main"
"""By name, as somebody types it: the commands stand above this floor."""


class Forked:
    """One process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._code.result() if self._code.done() else None

    async def wait(self) -> int:
        """Return its exit code once it has ended."""
        return await asyncio.shield(self._code)

    def send(self, number: int) -> None:
        """Send it a signal; harmless when it has ended."""
        if not self._code.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Commands:
    """Starts commands. `async with Commands()`: what still runs at the end is killed."""

    def __init__(self) -> None:
        self._nursery: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._born: dict[int, asyncio.Future[Forked]] = {}
        self._running: dict[int, Forked] = {}
        self._number = 0

    async def __aenter__(self) -> Self:
        self._nursery = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _OWN, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self._reader = asyncio.create_task(self._hear(), name="nursery")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        nursery, reader = self._nursery, self._reader
        if nursery is None or reader is None or nursery.stdin is None:
            return
        nursery.stdin.close()  # it kills what still runs, and ends
        await nursery.wait()
        await reader

    async def start(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> Forked:
        """Start `comfyctl` with these arguments; what it prints is appended to `log`."""
        if self._nursery is None or self._nursery.stdin is None:
            raise RuntimeError("commands are started inside `async with`")
        self._number += 1
        born = self._born[self._number] = asyncio.get_running_loop().create_future()
        order = {
            "number": self._number,
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder),
            "log": str(log),
        }
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        forked: Forked = await born
        return forked

    async def _hear(self) -> None:
        if self._nursery is None or self._nursery.stdout is None:
            return
        while line := await self._nursery.stdout.readline():
            told = json.loads(line)
            if "number" in told:
                process = self._running[told["pid"]] = Forked(told["pid"])
                self._born.pop(told["number"]).set_result(process)
            else:
                self._running.pop(told["pid"])._code.set_result(told["code"])


# -- in the process that is forked from --------------------------------------------------------------------------


def _nursery() -> None:
    """Fork what is asked for on stdin, tell pids and exit codes on stdout, until stdin is closed."""
    for name in _IMPORTED:
        importlib.import_module(name)
    hears, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    living: set[int] = set()
    rest = b""
    while True:
        ready, _, _ = select.select([0, hears], [], [])
        if hears in ready:
            os.read(hears, 4_096)
            _bury(living)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if (pid := os.fork()) == 0:
                os.close(hears)
                os.close(wakes)
                _live(order)
            living.add(pid)
            _say({"number": order["number"], "pid": pid})
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    while living:
        _bury(living, wait=True)


def _bury(living: set[int], *, wait: bool = False) -> None:
    while living:
        pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
        if pid == 0:
            return
        living.discard(pid)
        _say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _say(told: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(told).encode() + b"\n")


def _live(order: Mapping[str, Any]) -> None:
    """Be the command, to its end."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    nothing, log = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
    )
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    sys.argv = ["comfyctl", *order["arguments"]]
    code = 1
    try:
        obey(os.environ)
        importlib.import_module(_COMMANDS).main(order["arguments"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - it ends here, whatever it was
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()  # type: ignore[attr-defined] # what the interpreter does at its end
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _nursery()
