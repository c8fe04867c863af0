"""
How long a user waits before anything happens: help, the package, a look at a queue, a service that is ready.

`queue ls` looks into a new folder first (its database is made) and then into the one that is there. `serve` is ready
when it has said where it answers HTTP; it rents nothing and runs nothing meanwhile. Bars: `comfyctl --help` 250 ms,
`import runcomfy` 100 ms beyond the interpreter's own start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.common import Findings, middle, report
from benchmarks.results import Result

TIMES = 15
SLOW_TIMES = 7
BAR_HELP_MS = 250.0
BAR_IMPORT_MS = 100.0
COMFYCTL = str(Path(sys.executable).with_name("comfyctl"))


def wall(command: list[str], folder: Path) -> tuple[float, float]:
    """Return the seconds and the processor seconds of a command."""
    env = {**os.environ, "RUNCOMFY_STATE_DIR": str(folder / "state"), "RUNCOMFY_CREDENTIALS_FILE": ""}
    before = children()
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=env)
    return time.perf_counter() - started, children() - before


def children() -> float:
    """Return the processor seconds of all processes that were started here and have ended."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def ready(folder: Path) -> tuple[float, float]:
    """Return the seconds until `serve` says where it answers, and what it has computed by then."""
    env = {**os.environ, "RUNCOMFY_STATE_DIR": str(folder / "state"), "RUNCOMFY_CREDENTIALS_FILE": ""}
    flags = ["serve", "--json", "--port", "0", "--no-queue"]
    started = time.perf_counter()
    with subprocess.Popen(
        [COMFYCTL, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "address" in json.loads(line):
                break
        took = time.perf_counter() - started
        times = psutil.Process(process.pid).cpu_times()
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    return took, times.user + times.system


def main() -> Result:
    found = Findings("startup", f"Medians of {TIMES} and {SLOW_TIMES} starts, bytecode compiled.")
    ms: dict[str, float] = {}
    cpu: dict[str, float] = {}
    commands = {
        "interpreter": [sys.executable, "-c", "pass"],
        "import": [sys.executable, "-c", "import runcomfy"],
        "help": [COMFYCTL, "--help"],
        "queue_ls": [COMFYCTL, "queue", "ls"],
    }
    with TemporaryDirectory(prefix="comfyctl-bench-") as name:
        folder = Path(name)
        first = wall(commands["queue_ls"], folder)
        for key, command in commands.items():
            took = [wall(command, folder) for _ in range(TIMES)]
            ms[key], cpu[key] = (1000 * middle([one[part] for one in took]) for part in (0, 1))
        served = [ready(folder) for _ in range(SLOW_TIMES)]
        ms["serve"], cpu["serve"] = (1000 * middle([one[part] for one in served]) for part in (0, 1))
    report(
        "startup",
        **{f"{key}_ms": round(value, 1) for key, value in ms.items()},
        **{f"{key}_cpu_ms": round(value, 1) for key, value in cpu.items()},
        queue_ls_first_ms=round(1000 * first[0], 1),
    )
    found.at_most("`comfyctl --help`", ms["help"], BAR_HELP_MS, "ms")
    found.at_most("`import runcomfy`, beyond the interpreter", ms["import"] - ms["interpreter"], BAR_IMPORT_MS, "ms")
    found.told("`comfyctl queue ls`", ms["queue_ls"], "ms")
    found.told("`comfyctl queue ls`, processor time", cpu["queue_ls"], "ms")
    found.told("`comfyctl queue ls` that makes the database", 1000 * first[0], "ms")
    found.told("`comfyctl serve --no-queue` until it answers HTTP", ms["serve"], "ms")
    found.told("`comfyctl serve --no-queue`, processor time until then", cpu["serve"], "ms")
    found.told("the interpreter alone", ms["interpreter"], "ms")
    return found.result()
