"""Serves the page over an emulated cloud until it is told to stop; run by the tests as a process of its own.

    python serve_page.py FOLDER [PORT]

Its one line on stdout is the page's address with a code that logs in once.
"""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App
from runcomfy.cli.app import load
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator


async def main(folder: Path, port: int) -> None:
    stop = asyncio.Event()
    if sys.platform != "win32":  # where it is ended at once, and everything it emulates with it
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    cloud = RunComfyEmulator(boot_time=0.5, delete_takes=0.3, requests_per_second=50.0, burst=50)
    async with cloud:
        overrides = {
            **cloud.environment(),
            "RUNCOMFY_STATE_DIR": str(folder / "state"),
            "RUNCOMFY_POLL_INTERVAL": "0.25",
            "RUNCOMFY_REQUESTS_PER_SECOND": "40",
            "RUNCOMFY_BURST": "40",
            "RUNCOMFY_BUDGET_MONTH": "25",
            "RUNCOMFY_BUDGET_DAY": "5",
            "RUNCOMFY_CREDENTIALS_FILE": "",
        }
        queue = {"where": "pool", "root": str(folder), "database": str(folder / "queue.sqlite3")}
        async with App(load(overrides, quiet=True), overrides=overrides, tell=_note, queue=queue) as app:
            http = {"enabled": True, "host": "127.0.0.1", "port": port, "listening": _say}
            await app.serve(ServeOptions(guard=False, extra={"http": http}), stop)


def _say(where: Any) -> None:
    print(where.page, flush=True)


def _note(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
