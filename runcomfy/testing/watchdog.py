"""
Runs a program for as long as somebody holds the other end of its standard input; a script of its own.

A test run that is killed closes the pipe, whatever killed it, and so leaves neither server nor files behind:
`python watchdog.py '{"command": [...], "user": null, "group": null, "log": FILE, "folder": FOLDER}'`.
The folder is removed then, unless the last word was KEEP. Nothing of ours is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

KEEP = b"keep"
STOP_TIMEOUT_SECONDS = 20


def main(order: dict[str, Any]) -> int:
    """Run the command until it ends or standard input does; return its exit status."""
    rights: dict[str, Any] = {}
    if order["user"] is not None:
        rights = {"user": order["user"], "group": order["group"], "extra_groups": []}
    with Path(order["log"]).open("ab") as log:
        program = subprocess.Popen(  # noqa: S603 - the caller's own command
            order["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **rights
        )
    last_words: list[bytes] = []
    threading.Thread(target=_until_let_go, args=(program, last_words), daemon=True).start()
    status = program.wait()
    if last_words and last_words[0] != KEEP:
        shutil.rmtree(order["folder"], ignore_errors=True)
    return status


def _until_let_go(program: subprocess.Popen[bytes], last_words: list[bytes]) -> None:
    heard = b""
    while some := os.read(0, 64):  # not sys.stdin: its lock must be free when this process ends
        heard += some
    last_words.append(heard)
    # PostgreSQL: end at once and recover at the next start.
    program.send_signal(getattr(signal, "SIGQUIT", signal.SIGTERM))
    try:
        program.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        program.kill()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
