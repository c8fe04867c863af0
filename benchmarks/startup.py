"""How long a user waits before anything happens. Bars: `comfyctl --help` 250 ms, `import runcomfy` 100 ms."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import middle, report

TIMES = 15


def wall(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    comfyctl = str(Path(sys.executable).with_name("comfyctl"))
    empty, help_, imported = [], [], []
    for _ in range(TIMES):
        empty.append(wall([sys.executable, "-c", "pass"]))
        help_.append(wall([comfyctl, "--help"]))
        imported.append(wall([sys.executable, "-c", "import runcomfy"]))
    report(
        "startup",
        help_ms=round(1000 * middle(help_), 1),
        import_ms=round(1000 * (middle(imported) - middle(empty)), 1),
        interpreter_ms=round(1000 * middle(empty), 1),
    )
