"""
The process table of this computer: who of the owners in the store still lives.

A pid means something only in the process table it was given out in, and only together with the time its process
started. `host` therefore names the computer, its boot, and where there are several process tables on one computer
(containers) the table itself.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final
from uuid import uuid4

import psutil

from runcomfy.domain.lease import OWNER_SILENT_AFTER, Owner
from runcomfy.domain.machine import OwnerId

START_TOLERANCE_SECONDS: Final = 1.0
"""How far two readings of one process's start may lie apart; a pid is not handed out twice within that time."""

DEAD: Final = frozenset({psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})


class ProcessTable:
    """Keeps `runcomfy.ports.processes.Processes` with psutil."""

    def __init__(self, *, host: str | None = None, command: str | None = None) -> None:
        """Name this computer's process table and this program; by default both are found out.

        `command` is kept in the store and shown to people. It must hold no arguments: they may hold prompts.
        """
        self.host = host if host is not None else this_host()
        self._command = command if command is not None else Path(sys.argv[0]).name

    def me(self, *, now: datetime) -> Owner:
        """Return a new owner for this process."""
        pid = os.getpid()
        return Owner(
            id=OwnerId(str(uuid4())),
            host=self.host,
            pid=pid,
            process_started=_started(psutil.Process(pid)),
            command=self._command,
            started_at=now,
            heartbeat_at=now,
        )

    def lives(self, owner: Owner, *, now: datetime) -> bool:
        """Return whether the owner's process still runs.

        A process that we may not look at lives. An owner in another process table lives while its heartbeat is
        younger than `OWNER_SILENT_AFTER`; one from the future means that a clock was set, and proves no death.
        """
        if owner.ended_at is not None:
            return False
        if owner.host != self.host:
            return now - owner.heartbeat_at < OWNER_SILENT_AFTER
        try:
            process = psutil.Process(owner.pid)
            return (
                process.status() not in DEAD
                and abs(_started(process) - owner.process_started) <= START_TOLERANCE_SECONDS
            )
        except psutil.AccessDenied:
            return True
        except psutil.NoSuchProcess:
            return False


@cache
def this_host() -> str:
    """Return the name of the process table this process is in: computer, boot, and namespace where there is one."""
    return "/".join(filter(None, (socket.gethostname(), _boot(), _namespace())))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        # Some systems count it from the clock, which is adjusted by fractions of a second: whole minutes are steady.
        # Where two readings still fall apart, the heartbeat decides.
        return str(round(timedelta(seconds=psutil.boot_time()) / timedelta(minutes=1)))


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""


if sys.platform == "linux":

    def _started(process: psutil.Process) -> float:
        """Return when a process started, in seconds since the boot.

        psutil turns that into a time of day with the clock as it is now, so after the clock was set every living
        process would seem to be another one; the count itself stays.
        """
        try:
            stat = Path(f"/proc/{process.pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            raise psutil.NoSuchProcess(process.pid) from None
        except PermissionError:
            raise psutil.AccessDenied(process.pid) from None
        # The name, in parentheses, may hold anything, spaces and parentheses too; the start is field 22 (proc(5)).
        return int(stat.rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")

else:

    def _started(process: psutil.Process) -> float:
        """Return when a process started, in seconds since the epoch, as the system wrote it down then."""
        return process.create_time()
