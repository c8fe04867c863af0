"""One reader tells any number of listeners: nothing missing and nothing twice, and nobody is held up by another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import hub as module
from launcher.hub import Hub, Listener, frame
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.job_queue import JobQueue
from runcomfy.application.live import Live, LiveJob
from runcomfy.domain.exceptions import StoreUnavailable, TooManyRequests
from runcomfy.domain.job import JobRequest
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import Ending, EventKind, JobEvent, Outcome, QueuedJob, WorkerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings
from runcomfy.testing.clock import LoopClock

WORKER = WorkerId("worker-1")
LEASE = timedelta(seconds=60)


class Words:
    """Says the least there is to say."""

    def __init__(self) -> None:
        self.jobs_said = 0
        self.fleet: list[str] = []
        self.asked = 0

    async def job(self, job: QueuedJob) -> dict[str, Any]:
        self.jobs_said += 1
        return {"id": job.uid, "status": str(job.status)}

    async def event(self, event: JobEvent, job: dict[str, Any] | None) -> Mapping[str, Any]:
        return {"number": event.number, "kind": str(event.kind), "job": job}

    async def progress(self, job: QueuedJob, live: LiveJob | None) -> Mapping[str, Any]:
        return {"number": job.id, "percent": live.progress.percent if live is not None else job.progress}

    async def machines(self) -> Mapping[str, Any]:
        self.asked += 1
        return {"machines": self.fleet}

    async def money(self) -> Mapping[str, Any]:
        return {"today": "0"}


@dataclass
class Heard:
    """What a client made of its stream."""

    events: list[tuple[str, Any]] = field(default_factory=list)
    last_id: int | None = None
    comments: list[str] = field(default_factory=list)

    def take(self, chunk: bytes) -> None:
        for block in chunk.decode().split("\n\n"):
            name, data = "", ""
            for line in block.splitlines():
                head, _, value = line.partition(": ")
                if head == "id":
                    self.last_id = int(value)
                elif head == "event":
                    name = value
                elif head == "data":
                    data = value
                elif head == "":
                    self.comments.append(value)
            if name:
                self.events.append((name, json.loads(data)))

    def numbers(self) -> list[int]:
        return [data["number"] for name, data in self.events if name == "job"]

    def of(self, kind: str) -> list[Any]:
        return [data for name, data in self.events if name == kind]


@pytest.fixture
def queue_settings(tmp_path: Path) -> QueueSettings:
    return QueueSettings(
        root=str(tmp_path),
        jobs_processing=str(tmp_path / "p"),
        jobs_finished=str(tmp_path / "f"),
        database=Secret(str(tmp_path / "queue.sqlite3")),
    )


@asynccontextmanager
async def opened(where: QueueSettings, clock: LoopClock) -> AsyncIterator[JobQueue]:
    wake = timedelta(seconds=1)
    async with SqlJobs(store_from(where.database, clock=clock, durable=False, wake_interval=wake)) as store:
        yield JobQueue(store, where)


@pytest_asyncio.fixture
async def queue(queue_settings: QueueSettings, clock: LoopClock) -> AsyncIterator[JobQueue]:
    async with opened(queue_settings, clock) as queue:
        yield queue


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def live(clock: LoopClock) -> Live:
    return Live(clock)


@pytest_asyncio.fixture
async def hub(queue: JobQueue, live: Live, words: Words) -> AsyncIterator[Hub]:
    hub = Hub(queue, live, words)
    yield hub
    await hub.close()
    assert hub.listening == 0


async def put(queue: JobQueue, count: int = 1) -> list[QueuedJob]:
    return [await queue.enqueue(JobRequest({"1": {"class_type": "A", "inputs": {}}})) for _ in range(count)]


async def work_off(queue: JobQueue, outcome: Outcome = Outcome.DONE) -> None:
    for job in await queue.store.claim(WORKER, count=100, lease=LEASE):
        await queue.store.finish(job.id, job.token, Ending(outcome))


class Client:
    """Listens in a task of its own."""

    def __init__(self, hub: Hub, job: QueuedJob | None = None, after: int | None = None) -> None:
        self.heard = Heard()
        self.ready = asyncio.Event()
        self.listener: Listener | None = None
        self.task = asyncio.create_task(self._listen(hub, job, after))

    async def _listen(self, hub: Hub, job: QueuedJob | None, after: int | None) -> None:
        async with hub.listen(job, after) as self.listener:
            self.ready.set()
            async with aclosing(self.listener.chunks()) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    self.heard.take(chunk)

    async def gone(self) -> Heard:
        self.task.cancel()
        await asyncio.wait({self.task})
        return self.heard


async def test_a_listener_hears_what_comes_and_where_it_is(hub: Hub, queue: JobQueue) -> None:
    await put(queue)
    client = Client(hub)
    await client.ready.wait()
    await asyncio.sleep(1)
    assert client.heard.last_id == 1, "it could come back from here, though nothing happened yet"
    await put(queue, 2)
    await asyncio.sleep(2)
    await work_off(queue)
    await asyncio.sleep(2)
    heard = await client.gone()
    assert heard.numbers() == list(range(2, 10))
    assert [data["kind"] for data in heard.of("job")][-1] == "done"
    assert heard.of("job")[-1]["job"]["status"] == "done"


async def test_who_names_a_number_gets_what_came_since(hub: Hub, queue: JobQueue) -> None:
    await put(queue, 5)
    client = Client(hub, after=2)
    await asyncio.sleep(2)
    await put(queue)
    await asyncio.sleep(2)
    assert (await client.gone()).numbers() == [3, 4, 5, 6]


async def test_a_number_of_another_database_means_from_now(hub: Hub, queue: JobQueue) -> None:
    await put(queue, 3)
    client = Client(hub, after=4_711)
    await asyncio.sleep(2)
    await put(queue)
    await asyncio.sleep(2)
    assert (await client.gone()).numbers() == [4]


async def test_a_jobs_story_is_told_from_its_beginning_and_ends(hub: Hub, queue: JobQueue) -> None:
    first, second = await put(queue, 2)
    client = Client(hub, first)
    await asyncio.sleep(2)
    await work_off(queue)
    await asyncio.wait_for(client.task, 10)
    kinds = [data["kind"] for data in client.heard.of("job")]
    assert kinds == ["enqueued", "claimed", "done"]
    assert client.heard.events[-1] == ("end", {})
    late = Client(hub, second)
    await asyncio.wait_for(late.task, 10)
    assert [data["kind"] for data in late.heard.of("job")] == ["enqueued", "claimed", "done"]
    assert late.heard.events[-1] == ("end", {})


async def test_a_job_that_was_run_again_is_followed_on(hub: Hub, queue: JobQueue) -> None:
    [job] = await put(queue)
    await work_off(queue, Outcome.FAILED)
    await queue.retry(job)
    client = Client(hub, job)
    await asyncio.sleep(2)
    assert not client.task.done(), "its first failure is not its end"
    await work_off(queue)
    await asyncio.wait_for(client.task, 10)
    assert [data["kind"] for data in client.heard.of("job")] == [
        "enqueued", "claimed", "failed", "retried", "claimed", "done",
    ]  # fmt: skip


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 4)),
            st.tuples(st.just("pass"), st.floats(0, 1.5)),
            st.tuples(st.just("join"), st.integers(0, 12)),
            st.tuples(st.just("rejoin"), st.integers(0, 3)),
        ),
        max_size=14,
    ),
    kept=st.sampled_from([1, 3, 2_000]),
    page=st.sampled_from([1, 2, 500]),
)
@settings(max_examples=60)
def test_nothing_is_missing_and_nothing_comes_twice_at_the_seam(
    steps: list[tuple[str, Any]], kept: int, page: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However joining, coming back, writing and reading meet, and however much of the log is kept in memory."""
    import looptime

    folder = tmp_path_factory.mktemp("seam")
    loop = looptime.new_event_loop(start=0, idle_step=None)
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "KEPT", kept)
    patch.setattr(module, "EVENTS_AT_ONCE", page)
    try:
        loop.run_until_complete(_seam(steps, folder))
    finally:
        patch.undo()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _seam(steps: list[tuple[str, Any]], folder: Path) -> None:
    where = QueueSettings(
        root=str(folder), jobs_processing="p", jobs_finished="f", database=Secret(str(folder / "queue.sqlite3"))
    )
    async with opened(where, LoopClock()) as queue:
        hub = Hub(queue, None, Words())
        written, clients = 0, list[tuple[int, Client]]()
        for what, how in steps:
            if what == "put":
                written += len(await put(queue, how))
            elif what == "pass":
                await asyncio.sleep(how)
            elif what == "join":
                after = min(how, written)
                clients.append((after, Client(hub, after=after)))
            elif clients:
                after, client = clients.pop(how % len(clients))
                heard = await client.gone()
                assert heard.numbers() == list(range(after + 1, after + 1 + len(heard.numbers())))
                last = heard.last_id if heard.last_id is not None else after
                clients.append((last, Client(hub, after=last)))
        await asyncio.sleep(5)
        for after, client in clients:
            assert (await client.gone()).numbers() == list(range(after + 1, written + 1))
        await hub.close()


async def test_many_listeners_cost_one_reading(hub: Hub, queue: JobQueue, words: Words) -> None:
    clients = [Client(hub) for _ in range(200)]
    await asyncio.sleep(1)
    assert hub.listening == 200
    await put(queue, 10)
    await asyncio.sleep(2)
    for client in clients:
        assert (await client.gone()).numbers() == list(range(1, 11))
    assert words.jobs_said == 10, "each is put together once, and not once per listener"
    assert hub.listening == 0


async def test_who_does_not_keep_up_is_let_go_and_comes_back(
    hub: Hub, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_MOST", 5)
    quick = Client(hub)
    async with hub.listen(None, None) as slow:
        chunks = slow.chunks()
        heard = Heard()
        heard.take(await anext(chunks))
        assert heard.last_id == 0
        await asyncio.sleep(1)
        for _ in range(8):
            await put(queue)
            await asyncio.sleep(1)  # it reads nothing meanwhile
        rest = [chunk async for chunk in chunks]
        assert slow.dropped
        assert b"event: job" not in b"".join(rest), "no piece of the log is sent that has a hole before it"
    back = Client(hub, after=heard.last_id)
    await asyncio.sleep(1)
    assert (await back.gone()).numbers() == list(range(1, 9))
    assert (await quick.gone()).numbers() == list(range(1, 9)), "nobody else was held up"


class Wire:
    """A client's connection, as the server lends it to the hub: taken at once, or not while it is full."""

    def __init__(self) -> None:
        self.free = True
        self.heard = Heard()
        self.written = 0

    def write(self, chunk: bytes) -> None:
        assert self.free
        self.written += 1
        self.heard.take(chunk)


@pytest.mark.parametrize("after", [None, 0, 1])
async def test_what_is_written_at_once_and_what_waits_keep_their_order(
    hub: Hub, queue: JobQueue, after: int | None
) -> None:
    await put(queue, 2)
    wire = Wire()

    async def send() -> None:
        async with hub.listen(None, after) as listener:
            listener.line = wire
            async with aclosing(listener.chunks()) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    while not wire.free:  # noqa: ASYNC110 - as the server waits for a slow client
                        await asyncio.sleep(0.1)
                    wire.heard.take(chunk)

    sending = asyncio.create_task(send())
    await asyncio.sleep(1)
    for number in range(12):
        wire.free = number % 4 != 1
        await put(queue, 1 + number % 3)
        await asyncio.sleep((0, 0.05, 3)[number % 3])
        wire.free = True
        await asyncio.sleep((0, 2)[number % 2])
    await asyncio.sleep(5)
    assert wire.written
    assert wire.heard.numbers() == list(range((2 if after is None else after) + 1, 27))
    await hub.close()
    await asyncio.wait_for(sending, 5)


async def test_a_listener_of_a_job_ends_though_its_connection_is_free(hub: Hub, queue: JobQueue) -> None:
    [job] = await put(queue)
    wire = Wire()
    async with hub.listen(job, None) as listener:
        listener.line = wire
        work = asyncio.create_task(work_off(queue))
        async with asyncio.timeout(30):
            async for chunk in listener.chunks():
                wire.heard.take(chunk)
        await work
    assert wire.heard.of("end") == [{}]


async def test_progress_is_told_five_times_a_second_at_most_and_the_newest_wins(
    hub: Hub, queue: JobQueue, live: Live
) -> None:
    job, other = await put(queue, 2)
    await queue.store.claim(WORKER, count=2, lease=LEASE)
    everything, one, another = Client(hub), Client(hub, job), Client(hub, other)
    await asyncio.sleep(1)
    watching = live.begin(job.uid, "w")
    for percent in range(101):
        watching.progress(Progress(Step.RUNNING, percent=percent))
        await asyncio.sleep(0.02)
    await asyncio.sleep(1)
    watching.over()
    for client in (everything, one):
        told = [data["percent"] for data in (await client.gone()).of("progress")]
        assert len(told) <= 13, "two seconds, five a second, and the first and the last"
        assert told == sorted(told)
        assert told[-1] == 100
    assert (await another.gone()).of("progress") == []


async def test_progress_of_other_processes_is_read_from_the_queue(hub: Hub, queue: JobQueue) -> None:
    [job] = await put(queue)
    await queue.store.claim(WORKER, count=1, lease=LEASE)
    client = Client(hub)
    await asyncio.sleep(1)
    await queue.store.report(WORKER, {job.id: (42.0, "sampling")})
    await asyncio.sleep(5)
    assert (await client.gone()).of("progress") == [{"number": job.id, "percent": 42.0}]


async def test_machines_are_told_when_something_changed_and_asked_for_only_while_somebody_listens(
    hub: Hub, words: Words
) -> None:
    await asyncio.sleep(60)
    assert words.asked == 0
    client = Client(hub)
    await asyncio.sleep(30)
    words.fleet.append("srv-1")
    await asyncio.sleep(30)
    late = Client(hub)
    await asyncio.sleep(0.5)
    assert (await late.gone()).of("machines") == [{"machines": ["srv-1"]}], "who comes is told how it is"
    assert (await client.gone()).of("machines") == [{"machines": []}, {"machines": ["srv-1"]}]
    asked = words.asked
    await asyncio.sleep(60)
    assert words.asked == asked


async def test_silence_is_broken_now_and_then(hub: Hub) -> None:
    client = Client(hub)
    await asyncio.sleep(46)
    assert (await client.gone()).comments == ["still here"] * 3


async def test_a_database_that_refuses_is_said_and_asked_again(
    hub: Hub, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(hub)
    await asyncio.sleep(1)
    real, refuses = queue.store.told, [True]

    async def told(**asked: Any) -> Any:
        if refuses[0]:
            raise StoreUnavailable("locked")
        return await real(**asked)

    monkeypatch.setattr(queue.store, "told", told)
    await put(queue)
    await asyncio.sleep(10)
    refuses[0] = False
    await asyncio.sleep(20)
    heard = await client.gone()
    assert any("store-unavailable" in comment for comment in heard.comments)
    assert heard.numbers() == [1]


async def test_a_loop_that_dies_lets_everybody_go_and_begins_anew(
    hub: Hub, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(hub)
    await asyncio.sleep(1)
    with monkeypatch.context() as patched:
        patched.setattr(queue.store, "told", None)  # calling it fails as a defect would
        await put(queue)
        await asyncio.wait_for(client.task, 30)
    back = Client(hub, after=client.heard.last_id)
    await asyncio.sleep(2)
    assert (await back.gone()).numbers() == [1]


async def test_everybody_leaves_when_the_service_ends(hub: Hub, queue: JobQueue) -> None:
    clients = [Client(hub), Client(hub, (await put(queue))[0])]
    await asyncio.sleep(1)
    await hub.close()
    await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), 1)
    late = Client(hub)
    await asyncio.wait_for(late.task, 1)


async def test_a_note_after_the_last_word_does_not_keep_a_slow_listener(hub: Hub, queue: JobQueue) -> None:
    """As when a webhook is given up: it is noted after the job has ended."""
    [job] = await put(queue)
    async with hub.listen(job, None) as listener:
        chunks, heard = listener.chunks(), Heard()
        heard.take(await anext(chunks))
        pulling = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(1)
        [taken] = await queue.store.claim(WORKER, count=1, lease=LEASE)
        heard.take(await pulling)
        await queue.store.finish(job.id, taken.token, Ending(Outcome.DONE))
        await asyncio.sleep(2)
        await queue.store.note(EventKind.NOTE, job_id=job.id, data={"webhook": "given up"}, by="webhooks")
        await asyncio.sleep(2)
        async with asyncio.timeout(30):
            async for chunk in chunks:
                heard.take(chunk)
    assert [data["kind"] for data in heard.of("job")][-2:] == ["done", "note"]
    assert heard.of("end") == [{}]


async def test_there_is_a_most(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTENERS_MOST", 1)
    async with hub.listen(None, None):
        with pytest.raises(TooManyRequests):
            async with hub.listen(None, None):
                pytest.fail("one too many")


@pytest.mark.parametrize("text", ["a\nb\r\nc", "\ud800", "\u2028", "data: x\n\nevent: job", "\x00"])
def test_foreign_text_stays_one_line(text: str) -> None:
    said = frame("job", {"text": text, "odd": float("nan")}, number=7)
    head, event, data, *rest = said.decode().split("\n")
    assert (head, event, rest) == ("id: 7", "event: job", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {"text": text, "odd": None}
