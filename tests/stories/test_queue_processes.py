"""
The queue's real processes on the real clock: killed, stopped, starved of files, told to go (I10, I11, I20, I23).

Few and short: what needs neither signals nor limits of the system is told in virtual time elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, NewJob, QueuedJob, QueueStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.queue_programs import drawing

pytestmark = [
    pytest.mark.processes,
    pytest.mark.looptime(False),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and limits as Unix has them"),
]

PATIENCE = 100.0
"""Seconds after which something that should have happened did not; a busy machine is slow."""
LEASE, HEARTBEAT, REAP = 3.0, 0.4, 0.5


class Crew:
    """Processes of `comfyctl` over one database and one ComfyUI."""

    def __init__(self, folder: Path, database: str, comfyui: ComfyUIEmulator, store: SqlJobs) -> None:
        self.folder, self.database, self.comfyui, self.store = folder, database, comfyui, store
        self.processes: list[asyncio.subprocess.Process] = []

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
        return kept | {
            "COMFYUI_AGENT_DATABASE": self.database,
            "COMFYUI_AGENT_LEASE_SECONDS": str(LEASE),
            "COMFYUI_AGENT_HEARTBEAT_SECONDS": str(HEARTBEAT),
            "COMFYUI_AGENT_REAP_SECONDS": str(REAP),
            "RUNCOMFY_STATE_DIR": str(self.folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "NO_COLOR": "1",
        }

    async def run(self, *command: str, **options: Any) -> asyncio.subprocess.Process:
        """Start a program."""
        given: dict[str, Any] = {
            "cwd": self.folder,
            "env": self.environment(),
            "stdin": asyncio.subprocess.DEVNULL,
            "stdout": asyncio.subprocess.PIPE,
            "stderr": asyncio.subprocess.STDOUT,
        }
        process = await asyncio.create_subprocess_exec(*command, **(given | options))
        self.processes.append(process)
        return process

    async def comfyctl(self, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        return await self.run(sys.executable, "-m", "runcomfy.cli.main", *arguments, **options)

    async def executor(self, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        return await self.comfyctl("agent", "execute", "--server", self.comfyui.url, *arguments, **options)

    async def end(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            await process.wait()

    # -- jobs ----------------------------------------------------------------------------------------------

    def target(self, number: int) -> Path:
        return self.folder / "out" / f"{number}.png"

    async def put(self, number: int = 1, *, seconds: float = 0.5) -> QueuedJob:
        request = JobRequest(drawing(seconds, number), out_file=str(self.target(number)))
        [job] = await self.store.add([NewJob(request, "story")])
        return job

    async def job(self, job: QueuedJob) -> QueuedJob:
        found = await self.store.job(job.id)
        assert found is not None
        return found

    async def when(self, condition: Callable[[], Any], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    found = condition()
                    if await found if asyncio.iscoroutine(found) else found:
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"did not happen: {what}")

    async def done(self, job: QueuedJob) -> QueuedJob:
        async def ended() -> bool:
            return (await self.job(job)).ended

        await self.when(ended, f"job {job.id} ends")
        found = await self.job(job)
        assert found.status is QueueStatus.DONE, found.error_trace
        return found

    async def processing(self, job: QueuedJob) -> bool:
        return (await self.job(job)).status is QueueStatus.PROCESSING

    def ran(self) -> list[str]:
        return [record.outcome for record in self.comfyui.run_log]


@pytest_asyncio.fixture
async def crew(queue_database: str, tmp_path: Path) -> AsyncIterator[Crew]:
    async with ComfyUIEmulator() as comfyui, SqlJobs(store_from(queue_database, clock=SystemClock())) as store:
        crew = Crew(tmp_path, queue_database, comfyui, store)
        try:
            yield crew
        finally:
            await crew.end()


async def heard(process: asyncio.subprocess.Process, word: str) -> str:
    """Read what it says until `word` is said."""
    assert process.stdout is not None
    words = ""
    async with asyncio.timeout(PATIENCE):
        while word not in words:
            line = (await process.stdout.readline()).decode()
            assert line, f"it never said {word}: {words}"
            words += line
    return words


async def said(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(PATIENCE):
        out, _ = await process.communicate()
    return out.decode()


# -- kill -9 -------------------------------------------------------------------------------------------------

ENQUEUE = """
import asyncio, sys
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob

async def main():
    async with SqlJobs(store_from(sys.argv[1], clock=SystemClock())) as store:
        for number in range(1_000_000):
            jobs = await store.add([NewJob(JobRequest("image_invert"), "w") for _ in range(1 + number % 3)])
            print(*(job.uid for job in jobs), flush=True)

asyncio.run(main())
"""


@pytest.mark.fault(57)
async def test_every_job_whose_ack_was_heard_is_there_after_kill_9(crew: Crew) -> None:
    """I10: committed before it is said; nothing is half there."""
    heard: list[str] = []
    for enough in (1, 30, 90):
        process = await crew.run(
            sys.executable, "-c", ENQUEUE, crew.database, stderr=None, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        while len(heard) < enough:
            heard += (await process.stdout.readline()).decode().split()
        process.kill()
        heard += (await process.stdout.read()).decode().split()
        await process.wait()
    there = {job.uid: job for job in await crew.store.jobs()}
    assert set(heard) <= there.keys()
    assert {job.status for job in there.values()} == {QueueStatus.PENDING}
    enqueued = [event.job_id for event in await crew.store.events(limit=10_000) if event.kind is EventKind.ENQUEUED]
    assert sorted(filter(None, enqueued)) == sorted(job.id for job in there.values())


async def test_an_executor_that_is_killed_is_followed_at_once_by_the_next_start(crew: Crew) -> None:
    """I20, I12: on the same computer its death is seen; its prompt is gone on with, three times."""
    job = await crew.put(seconds=4)
    for _ in range(2):
        process = await crew.executor()
        await crew.when(lambda: crew.processing(job), "somebody works on the job")
        await crew.when(lambda: crew.comfyui.run_log, "the prompt runs")
        process.kill()
        await process.wait()
        assert (await crew.job(job)).status is QueueStatus.PROCESSING
    await crew.executor()
    done = await crew.done(job)
    assert done.run_count == 1
    assert crew.ran() == ["success"]
    assert len(crew.comfyui.run_log) == 1


@pytest.mark.fault(64)
async def test_an_executor_that_was_stopped_for_longer_than_its_lease_publishes_nothing(crew: Crew) -> None:
    """I11: SIGSTOP while it watches; another finishes the job; it says so when it goes on."""
    job = await crew.put(seconds=6)
    stale = await crew.executor()
    await crew.when(lambda: crew.comfyui.run_log, "the prompt runs")
    await stop_between_writes(crew, stale, job)
    await crew.executor()
    done = await crew.done(job)
    before = crew.target(1).stat()
    stale.send_signal(signal.SIGCONT)
    await heard(stale, "discarded")
    after = crew.target(1).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (await crew.job(job)).token == done.token
    assert crew.ran() == ["success"]


async def stop_between_writes(crew: Crew, process: asyncio.subprocess.Process, job: QueuedJob) -> None:
    """Stop it, but not within a transaction: whoever holds a lock then holds up everybody, until it goes on or ends."""
    async with SqlJobs(store_from(crew.database, clock=SystemClock(), busy_timeout=timedelta(seconds=0.3))) as store:
        while True:
            process.send_signal(signal.SIGSTOP)
            try:
                await store.set_priority(job.id, 50)
                return
            except LocalError:
                process.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.1)


# -- told to go ------------------------------------------------------------------------------------------------


@pytest.mark.fault(61)
async def test_a_first_signal_lets_the_job_end_and_begins_nothing_more(crew: Crew) -> None:
    """I20: a drained executor leaves nothing behind."""
    first, second = await crew.put(1, seconds=4), await crew.put(2)
    process = await crew.executor()
    await crew.when(lambda: crew.comfyui.run_log, "the first job runs")
    process.terminate()
    words = await said(process)
    assert process.returncode == 0, words
    assert "stopping" in words
    assert (await crew.job(first)).status is QueueStatus.DONE
    assert (await crew.job(second)).status is QueueStatus.PENDING
    assert await crew.store.owners() == {}


@pytest.mark.fault(61)
async def test_a_second_signal_leaves_at_once_and_the_next_start_goes_on(crew: Crew) -> None:
    """I20, I12: the prompt runs on meanwhile, and is not sent again."""
    job = await crew.put(seconds=6)
    process = await crew.executor()
    await crew.when(lambda: crew.comfyui.run_log, "the job runs")
    process.send_signal(signal.SIGINT)
    words = await heard(process, "stopping")  # two signals that nobody has looked at yet are one
    process.send_signal(signal.SIGINT)
    words += await said(process)
    assert process.returncode == 130, words
    assert "goes on" in words
    await crew.executor()
    done = await crew.done(job)
    assert done.run_count == 1
    assert crew.ran() == ["success"]


@pytest.mark.fault(61)
async def test_an_executor_whose_parent_and_terminal_are_gone_goes_on(crew: Crew) -> None:
    """I20: nobody reads what it says any more; that ends no job."""
    start = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    words = [sys.executable, "-m", "runcomfy.cli.main", "agent", "execute", "--server", crew.comfyui.url]
    reads, writes = os.pipe()
    parent = await crew.run(sys.executable, "-c", start, *words, stdout=writes, stderr=writes)
    os.close(writes)
    child = int((await asyncio.to_thread(os.read, reads, 100)).decode().split()[0])
    try:
        parent.kill()
        await parent.wait()
        os.close(reads)
        jobs = [await crew.put(number) for number in range(2)]
        for job in jobs:
            await crew.done(job)
        assert crew.ran() == ["success"] * 2
    finally:
        os.kill(child, signal.SIGKILL)


# -- starved -----------------------------------------------------------------------------------------------------

STARVED = """
import resource, runpy, sys
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
sys.argv = ["comfyctl", *sys.argv[2:]]
runpy.run_module("runcomfy.cli.main", run_name="__main__")
"""


@pytest.mark.fault(59)
@pytest.mark.parametrize("most", [11, 13])
async def test_with_too_few_open_files_it_says_what_is_missing_and_loses_no_job(crew: Crew, most: int) -> None:
    """I23: it works, waits, or ends with a word; nothing fails for it, and the next executor does what is left."""
    image, workflow = crew.folder / "in.png", crew.folder / "own.json"
    Image.new("RGB", (32, 32), (200, 30, 60)).save(image)
    workflow.write_text(json.dumps(drawing(0.2, 7)))
    requests = [
        JobRequest("image_invert", image=str(image), out_file=str(crew.target(1))),
        JobRequest(str(workflow), out_file=str(crew.target(2))),
    ]
    jobs = await crew.store.add([NewJob(request, "story") for request in requests])
    process = await crew.run(
        sys.executable, "-c", STARVED, str(most), "agent", "execute", "--server", crew.comfyui.url, "--once",
    )  # fmt: skip
    words = await said(process)
    assert "Traceback" not in words, words
    assert process.returncode in (0, 9), words
    assert "done" in words or "open" in words, words
    assert {(await crew.job(job)).status for job in jobs} <= {QueueStatus.PENDING, QueueStatus.DONE}, words
    await crew.store.resume()
    last = await crew.executor("--once")
    assert "done" in (words + await said(last))
    for job in jobs:
        now = await crew.job(job)
        assert (now.status, now.run_count, now.retries_attempted) == (QueueStatus.DONE, 1, 0), words
    assert crew.ran() == ["success"] * 2


# -- a database that cannot be used ------------------------------------------------------------------------------


async def damage(crew: Crew, how: str) -> None:
    if how == "newer":
        statement = "UPDATE alembic_version SET version_num = '0999'"
        await crew.store.run(lambda connection: connection.exec_driver_sql(statement))
        return
    await crew.store.close()
    data = bytearray(content(crew))
    for page in range(4096, len(data), 4096):
        data[page : page + 64] = b"\xff" * 64
    Path(crew.database).write_bytes(data)  # noqa: ASYNC240 - nobody else is there


def content(crew: Crew) -> bytes:
    return Path(crew.database).read_bytes()


def books_too(crew: Crew) -> None:
    """Let the books of machines be in the same state."""
    state = crew.folder / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    (state / "runcomfy.sqlite3").write_bytes(content(crew))


@pytest.mark.fault(56)
@pytest.mark.parametrize("how", ["newer", "damaged"])
async def test_a_database_that_cannot_be_used_is_refused_and_machines_are_still_listed(crew: Crew, how: str) -> None:
    """I23: exit 9 with what to do; what costs money can be seen, although its books are in the same database."""
    on_server = crew.store.dialect == "postgresql"
    if on_server and how == "damaged":
        pytest.skip("a server looks after its own pages")
    await crew.put()
    await damage(crew, how)
    await crew.store.close()
    before = b"" if on_server else content(crew)
    process = await crew.executor("--once")
    words = await said(process)
    assert process.returncode == 9, words
    assert ("revision 0999" if how == "newer" else "damaged") in words
    assert "Traceback" not in words
    assert on_server or content(crew) == before
    async with RunComfyEmulator() as cloud:
        stranger = cloud.foreign("medium")
        books = {"RUNCOMFY_DATABASE_URL": crew.database} if on_server else {}
        if not on_server:
            books_too(crew)
        listing = await crew.comfyctl(
            "machines", "ls", "--json", env=crew.environment() | cloud.environment() | books,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        rows = json.loads(await said(listing))
        assert listing.returncode == 0
        assert [row["server_id"] for row in rows] == [stranger.server_id]
