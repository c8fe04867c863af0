"""The soak: its plan is the seed's, its oracles turn red when they have to, and a short one comes out clean."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.soak import Soak, result_of
from benchmarks.soak_clients import Books, Put
from benchmarks.soak_oracles import Found, Judge, Owned, Rows
from benchmarks.soak_plan import plan
from benchmarks.soak_processes import course, growth
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.job import JobRequest
from runcomfy.domain.machine import MachineId, ServerId, Transition
from runcomfy.domain.queued import EventKind, JobEvent, NewJob, QueuedJob, QueueStatus
from runcomfy.testing.contracts.store_words import a_machine, an_entry

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
RED = (255, 0, 0)


def test_the_seed_decides_the_plan_and_another_seed_another_one() -> None:
    assert plan(1, 5) == plan(1, 5)
    assert plan(1, 5) != plan(2, 5)
    deeds = plan(1, 20)
    assert sum(deed.kind == "kill" for deed in deeds) >= 350
    assert {deed.target for deed in deeds} >= {"api", "machine", "own", "http", "cloud", "service", "guard", "client"}
    assert {deed.name for deed in deeds} >= {"latency", "bandwidth", "slow_close", "timeout", "reset_peer", "slicer",
                                            "limit_data", "half_close"}  # fmt: skip
    assert "database" in {deed.target for deed in plan(1, 20, database=True)}
    assert any(deed.kind == "stop" and deed.seconds > 60 for deed in deeds), "longer than the role's lease"
    assert [deed.at for deed in deeds] == sorted(deed.at for deed in deeds)


def test_memory_is_compared_after_the_warm_up() -> None:
    sizes = [(float(at), 100 if at < 300 else 200 + at // 100) for at in range(0, 1_200, 10)]
    found = growth(sizes, warm=300, until=1_190)
    assert found == pytest.approx((211 - 203) / 203, abs=0.01)
    assert growth([], warm=1, until=2) is None
    assert course([(1.0, 5_000_000), (2.0, 7_900_000), (61.0, 9_000_000), (200.0, 1)], every=60) == [7, 9, 0]


class Happened:
    """A small past, right in everything; a test spoils one thing of it."""

    def __init__(self, folder: Path, job: QueuedJob) -> None:
        self.folder = folder
        picture = folder / "1.png"
        Image.new("RGB", (4, 4), RED).save(picture)
        data = picture.read_bytes()
        outputs = [{"path": str(picture), "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
        self.job = replace(job, status=QueueStatus.DONE, result={"outputs": outputs})
        self.books = Books(puts={"soak-1": Put("soak-1", 1, RED, {}, 0.0, asked=1, job_id=str(job.uid))})
        self.events = [self.event(1, EventKind.SUBMITTING, prompt_id="p1"), self.event(2, EventKind.DONE)]
        self.bill: dict[str, Any] = {
            "server_id": "s1", "account": "near", "traits": "{}", "log": str(folder / "s1.jsonl"), "seconds": "30",
            "ready_at": NOW.isoformat(), "ended_at": (NOW + timedelta(seconds=30)).isoformat(),
        }  # fmt: skip
        self.runs = [self.run("p1", 5.0, 6.0)]
        self.taken_over: list[float] = []
        self.ledger_s = 30.0

    def event(self, number: int, kind: EventKind, **data: Any) -> JobEvent:
        return JobEvent(number, NOW, kind, self.job.id, 1, None, data)

    def run(self, prompt: str, began: float, ended: float, pid: int = 7) -> dict[str, Any]:
        start = NOW.timestamp()
        return {"prompt": prompt, "pid": pid, "began": start + began, "ended": start + ended, "outcome": "success"}

    def judged(self) -> Found:
        (self.folder / "s1.jsonl").write_text("".join(json.dumps(run) + "\n" for run in self.runs))
        story = [
            Transition(MachineId("m1"), n, NOW + timedelta(seconds=at), "taken-over", "ready", "", "")
            for n, at in enumerate(self.taken_over)
        ]
        machine = a_machine(server_id=ServerId("s1"))
        entry = an_entry(machine, started_at=NOW, ended_at=NOW + timedelta(seconds=self.ledger_s))
        rows = Rows([self.job], {self.job.id: ()}, self.events, {"s1": Owned(machine, (entry,), story)})
        outside = {"bills": [self.bill], "own": str(self.folder / "own.jsonl"), "kills": []}
        return Judge(rows, self.books, outside, timeout_s=40.0, grace_s=45.0).judge()


@pytest.fixture
async def happened(tmp_path: Path) -> Happened:
    async with SqlJobs(store_from(tmp_path / "queue.sqlite3", clock=SystemClock())) as jobs:
        [job] = await jobs.add([NewJob(JobRequest(workflow="w"), "w")])
    return Happened(tmp_path, job)


async def test_where_everything_is_right_nothing_is_said(happened: Happened) -> None:
    found = happened.judged()
    assert found.violations == []
    assert found.leaked_s == 0
    assert (found.jobs, found.ran, found.machines, found.billed_s) == (1, 1, 1, 30.0)


async def test_a_job_that_is_not_there_or_not_done_is_lost(happened: Happened) -> None:
    happened.books.puts["soak-2"] = Put("soak-2", 2, RED, {}, 0.0, asked=3, job_id="never seen")
    [lost] = happened.judged().lost
    assert "soak-2 was asked for 3 times and is not in the queue" in lost
    happened.job = replace(happened.job, status=QueueStatus.FAILED, reason="timeout")
    assert len(happened.judged().lost) == 2


async def test_a_job_that_nobody_asked_for_is_doubled(happened: Happened) -> None:
    happened.books.puts.clear()
    assert any("nobody asked for it" in told for told in happened.judged().doubled)


async def test_a_prompt_that_ran_twice_is_doubled_and_so_is_one_of_nobody(happened: Happened) -> None:
    happened.runs += [happened.run("p1", 8.0, 9.0), happened.run("p9", 10.0, 11.0)]
    told = "\n".join(happened.judged().doubled)
    assert "prompt p1 ran 2 times" in told
    assert "prompt p9 is no job's" in told


async def test_a_job_run_again_is_doubled_unless_its_first_result_could_not_be_had(happened: Happened) -> None:
    happened.events.append(happened.event(3, EventKind.SUBMITTING, prompt_id="p2"))
    happened.runs.append(happened.run("p2", 20.0, 21.0))
    assert any("ran twice" in told for told in happened.judged().doubled)
    happened.runs[-1]["pid"] = 8  # another process of the same server: the first one was killed
    found = happened.judged()
    assert found.doubled == []
    assert sum(found.again.values()) == 1


async def test_a_job_that_was_committed_twice_is_doubled(happened: Happened) -> None:
    happened.events.append(happened.event(3, EventKind.DONE))
    assert any("committed 2 times" in told for told in happened.judged().doubled)


async def test_another_picture_or_another_file_than_recorded_is_wrong(happened: Happened) -> None:
    happened.books.puts["soak-1"].colour = (0, 0, 255)
    assert any("was asked for" in told for told in happened.judged().wrong)
    Image.new("RGB", (9, 9), RED).save(happened.folder / "1.png")
    assert any("not the file that was recorded" in told for told in happened.judged().wrong)


async def test_what_a_listener_was_told_twice_or_never_is_wrong(happened: Happened) -> None:
    happened.books.told = [1, 1]
    told = "\n".join(happened.judged().wrong)
    assert "more than once" in told
    assert "never told 1 events: [2]" in told


async def test_seconds_that_are_billed_and_not_in_the_ledger_leak(happened: Happened) -> None:
    happened.ledger_s = 20.0
    found = happened.judged()
    assert found.leaked_s == 10
    assert "the cloud bills 30 s, our ledger has 20" in found.leaks[0]


async def test_a_machine_that_outlives_its_need_leaks_unless_somebody_took_it_over(happened: Happened) -> None:
    happened.bill |= {"seconds": "150", "ended_at": (NOW + timedelta(seconds=150)).isoformat()}
    happened.ledger_s = 150.0
    found = happened.judged()
    assert found.leaked_s == pytest.approx(150 - 6 - 40 - 60)
    happened.taken_over = [70.0]
    assert happened.judged().leaked_s == 0


@pytest.mark.campaign
@pytest.mark.processes
@pytest.mark.looptime(False)
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9 on Windows")
async def test_a_short_soak_comes_out_clean(tmp_path: Path) -> None:
    """The bars for twenty minutes are another matter: `make soak`."""
    soak = Soak(tmp_path, minutes=0.4, seed=3)
    began = time.monotonic()
    found = await asyncio.wait_for(soak.run(), timeout=600)
    assert found.violations == []
    assert soak.unwell == []
    assert found.jobs > 0
    assert sum(soak.kills.values()) > 0
    told = result_of(soak, found, time.monotonic() - began)
    assert {figure.what for figure in told.figures} >= {"jobs lost", "machine seconds leaked"}
