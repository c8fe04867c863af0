"""Who of the owners still lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from runcomfy.adapters.processes import ProcessTable, this_host
from runcomfy.domain.lease import OWNER_SILENT_AFTER, Owner

NOW = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
table = ProcessTable()


@pytest.fixture
def me() -> Owner:
    return table.me(now=NOW)


CHILD = """
import json, sys
from datetime import UTC, datetime
from runcomfy.adapters.processes import ProcessTable
me = ProcessTable().me(now=datetime.now(UTC))
print(json.dumps([me.host, me.pid, me.process_started]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def test_this_process_lives(me: Owner) -> None:
    assert (me.pid, me.host, me.started_at, me.heartbeat_at, me.ended_at) == (os.getpid(), this_host(), NOW, NOW, None)
    assert table.lives(me, now=NOW)


def test_it_lives_however_long_it_was_silent(me: Owner) -> None:
    """A process that was stopped for a night, or whose loop was blocked, is not dead while it is in the table."""
    assert table.lives(me, now=NOW + timedelta(days=2))


def test_each_owner_has_a_name_of_its_own(me: Owner) -> None:
    assert table.me(now=NOW).id != me.id


def test_who_signed_off_is_dead(me: Owner) -> None:
    assert not table.lives(replace(me, ended_at=NOW), now=NOW)


@pytest.mark.parametrize("seconds", [-3600, -5, 5, 3600])
def test_a_pid_that_was_given_out_again_is_somebody_else(me: Owner, seconds: float) -> None:
    assert not table.lives(replace(me, process_started=me.process_started + seconds), now=NOW)


@pytest.mark.processes
def test_a_process_lives_while_it_is_stopped_and_dies_when_it_is_killed(
    me: Owner, child: subprocess.Popen[str]
) -> None:
    assert child.stdout is not None
    host, pid, started = json.loads(child.stdout.readline())
    owner = replace(me, host=host, pid=pid, process_started=started)
    process = psutil.Process(pid)
    assert table.lives(owner, now=NOW)
    process.suspend()
    assert table.lives(owner, now=NOW + timedelta(minutes=10))
    process.kill()
    if sys.platform != "win32":  # a child that ended and was not asked about yet keeps its row in the table
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert process.status() == psutil.STATUS_ZOMBIE
        assert not table.lives(owner, now=NOW)
    child.wait()
    assert not table.lives(owner, now=NOW)


def test_a_process_we_may_not_look_at_lives(me: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: psutil.Process) -> str:
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "status", refuse)
    assert table.lives(me, now=NOW)


def test_of_another_computer_only_the_heartbeat_is_known(me: Owner) -> None:
    there = replace(me, host="elsewhere/boot/1")
    assert table.lives(there, now=NOW + OWNER_SILENT_AFTER - timedelta(seconds=1))
    assert not table.lives(there, now=NOW + OWNER_SILENT_AFTER)
    assert table.lives(there, now=NOW - timedelta(days=1))


def test_another_boot_or_container_is_another_process_table() -> None:
    parts = this_host().split("/")
    assert all(parts)
    if sys.platform == "linux":
        assert len(parts) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system writes the start down once")
@pytest.mark.fault(60)
def test_setting_the_clock_makes_nobody_somebody_else(me: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells the time of its boot by the clock as it is now; a day later, it booted a day later."""
    boot, said = psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 86_400)
    assert psutil.Process().create_time() == pytest.approx(said + 86_400, abs=1)
    assert table.lives(me, now=NOW)
    assert replace(table.me(now=NOW), id=me.id) == me
