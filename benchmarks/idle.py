"""
What a service takes of the processor that has nothing to do, a minute after minute: it looks at the queue, the account,
its own leases and its listeners.

Three at once, each with a database and a folder of its own: `comfyctl serve` over the emulated cloud with a page that
listens; `comfyctl serve --no-queue`, the API alone; `comfyctl agent start`, which takes up job files and works on a
ComfyUI of the user's.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import Findings, report
from benchmarks.http import line_with, listeners, program, read_out
from benchmarks.results import Result

SETTLE = 8.0
SECONDS = 40.0


def looked(process: psutil.Process) -> tuple[float, int]:
    """Return the processor seconds of a process, and how often it has waited."""
    times, switches = process.cpu_times(), process.num_ctx_switches()
    return times.user + times.system, switches.voluntary


async def service(
    stack: AsyncExitStack, folder: Path, account: Mapping[str, str], *flags: str, listening: bool
) -> psutil.Process:
    """Start a service that ends with the stack; return its process when it is ready."""
    await asyncio.to_thread(folder.mkdir)
    env = {**account, "RUNCOMFY_STATE_DIR": str(folder / "state"), "RUNCOMFY_CREDENTIALS_FILE": ""}
    process = await stack.enter_async_context(program(*flags, env=env, cwd=folder))
    if listening:
        host = str((await line_with(process, "address"))["address"]).removeprefix("http://")
        token = (folder / "state" / "http_token").read_text(encoding="utf-8").split()[0]
        if "--no-queue" not in flags:
            await stack.enter_async_context(listeners(1, host, token, folder))
    await stack.enter_async_context(read_out(process))
    return psutil.Process(process.pid)


async def measure(folder: Path) -> Result:
    found = Findings("idle", f"Three services at once, {SECONDS:.0f} s, a browser's page attached to the first.")
    async with AsyncExitStack() as stack:
        quick = ("--boot-seconds", "1", "--delete-seconds", "0.2", "--json")
        cloud = await stack.enter_async_context(program("emulator", *quick, env={}, cwd=folder))
        account = {key: str(value) for key, value in (await line_with(cloud, "RUNCOMFY_API_BASE_URL")).items()}
        http = ("--json", "--port", "0")
        known = {
            "`comfyctl serve` over a cloud, a page listening": await service(
                stack, folder / "pool", account, "serve", *http, "--no-guard", listening=True
            ),
            "`comfyctl serve --no-queue`": await service(
                stack, folder / "api", {}, "serve", *http, "--no-queue", listening=True
            ),
            "`comfyctl agent start`": await service(
                stack, folder / "agent", {"RUNCOMFY_API_BASE_URL": ""}, "agent", "start", "--json", listening=False
            ),
        }
        await asyncio.sleep(SETTLE)
        before, began = {name: looked(process) for name, process in known.items()}, time.monotonic()
        await asyncio.sleep(SECONDS)
        took = time.monotonic() - began
        figures: dict[str, Any] = {}
        for name, process in known.items():
            (cpu, waits), (cpu_before, waits_before) = looked(process), before[name]
            figures[name] = {
                "cpu_percent": round(100 * (cpu - cpu_before) / took, 2),
                "wakes_per_s": round((waits - waits_before) / took, 1),
                "rss_mb": round(process.memory_info().rss / 1e6, 1),
            }
            found.told(f"{name}, share of a core", 100 * (cpu - cpu_before) / took, "%")
            found.told(f"{name}, memory", process.memory_info().rss / 1e6, "MB")
    report(
        "idle",
        seconds=SECONDS,
        services=figures,
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    )
    return found.result()


def main() -> Result:
    with tempfile.TemporaryDirectory(prefix="bench-idle-", ignore_cleanup_errors=True) as name:
        return asyncio.run(measure(Path(name)))
