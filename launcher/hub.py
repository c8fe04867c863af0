"""
One reader of the durable event log for any number of listeners, and what is only worth saying now in between.

    durable     each event of the log, in its order, numbered: a listener that names the last number it saw gets what
                came since, without a gap and nothing twice
    transient   a running job's progress (`progress`, five times a second at most), machines when something about them
                changed (`machines`), money now and then (`money`); not numbered, the newest replaces older ones

What is said is made into bytes once, and not once per listener; listeners of everything share even the bytes of a
whole turn. A listener that does not keep up is dropped: it comes back with the number it saw last. Nothing is read or
asked while nobody listens.

What jobs, machines and money look like is not decided here (`Words`), and neither is how the bytes get to a client.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from launcher.plain_json import finite
from runcomfy.application.job_queue import EVENTS_AT_ONCE, JobQueue
from runcomfy.domain.exceptions import LocalError, RunComfyError, TooManyRequests, foreign_text
from runcomfy.domain.job import JobId
from runcomfy.domain.queued import LAST_WORDS, JobEvent, QueuedJob, QueueStatus, RowId

if TYPE_CHECKING:
    from runcomfy.application.live import Live, LiveJob

log = logging.getLogger("runcomfy.http")

PROGRESS_EVERY: Final = 0.2
"""Seconds between two snapshots of one job: five a second are as smooth as anybody needs."""
ELSEWHERE_EVERY: Final = 2.0
MACHINES_EVERY: Final = 2.0
MONEY_EVERY: Final = 10.0
HEARTBEAT: Final = 15.0
WAITING_MOST: Final = 1_000
"""Durable events that may wait for one listener; who is farther behind is dropped, and reads the log instead."""
MOVES_WAITING: Final = 10
"""Turns of progress that may wait for one listener: two seconds of it."""
WOKEN_AT_ONCE: Final = 50
"""Listeners that send in one turn of the event loop: about a millisecond of work."""
SAID_AT_ONCE: Final = 10
"""Events that are put into words in one turn of the event loop: a few milliseconds of work."""
LISTENERS_MOST: Final = 1_000
"""At once; each is an open connection."""
KEPT: Final = 2_000
"""Of the newest durable events, as bytes: many listeners that come back at once cost one reading."""
TROUBLE_FIRST, TROUBLE_MOST = 1.0, 15.0
"""Seconds between two tries while the database refuses."""

Json = Mapping[str, Any]


class Words(Protocol):
    """How things are said to clients."""

    async def job(self, job: QueuedJob) -> dict[str, Any]:
        """Return a job as it is now."""
        ...

    async def event(self, event: JobEvent, job: dict[str, Any] | None) -> Json:
        """Return a line of the log, with its job."""
        ...

    async def progress(self, job: QueuedJob, live: LiveJob | None) -> Json:
        """Return how far a job is that runs in this process; `live` None: in another one, which wrote it down."""
        ...

    async def machines(self) -> Json:
        """Return the machines. Raises RunComfyError."""
        ...

    async def money(self) -> Json:
        """Return what is spent. Raises RunComfyError."""
        ...


@dataclass(frozen=True, slots=True)
class Told:
    """An event of the log, as the bytes of an event stream."""

    frame: bytes
    number: int
    job_id: RowId | None = None
    ends: bool = False
    """Whether it is the last word of a job that has ended."""


class Turn:
    """Events that were read at once, in order."""

    __slots__ = ("events", "whole")

    def __init__(self, events: Sequence[Told]) -> None:
        self.events = events
        self.whole = b"".join(told.frame for told in events)

    def after(self, number: int) -> bytes:
        """Return what is above a number."""
        if number < self.events[0].number:
            return self.whole  # nearly always
        return b"".join(told.frame for told in self.events if told.number > number)


def frame(event: str, data: Json, *, number: int | None = None) -> bytes:
    """Return an event as Server-Sent Events have it."""
    try:
        text = _ENCODE(data)
    except ValueError:  # not a number: somebody else's data
        text = _ENCODE(finite(data))
    head = f"id: {number}\n" if number is not None else ""
    # What ends a line for SSE is escaped in JSON, so that it is one line.
    return f"{head}event: {event}\ndata: {text}\n\n".encode()


# Only ASCII gets out: text from outside may hold halves of characters, which no encoding takes.
_ENCODE: Final = json.JSONEncoder(separators=(",", ":"), default=str, allow_nan=False).encode


def comment(text: str) -> bytes:
    """Return words that a client's parser passes over."""
    return f": {foreign_text(text)}\n\n".encode()


END: Final = frame("end", {})


class Line(Protocol):
    """A client's connection, for who writes the same to many."""

    @property
    def free(self) -> bool:
        """Whether the client is there and has taken everything it got before."""
        ...

    def write(self, chunk: bytes) -> None:
        """Send without waiting."""
        ...


class Listener:
    """One client: `async for chunk in listener.chunks()`; it ends when all is told, or when the client was too slow.

    With a `line`, what many hear at the same time is written by the hub in one go, which costs a fraction of waking a
    task for each; `chunks` yields only the beginning, the end, and what slow clients get.
    """

    def __init__(self, hub: Hub, job: QueuedJob | None, after: int | None) -> None:
        self._hub, self._after = hub, after
        self.job_id = job.id if job is not None else None
        self.dropped = False
        """Whether it did not keep up."""
        self._seen = hub.at
        self._turns: deque[Turn] = deque()
        self._waiting = 0
        self._fleeting: dict[str, bytes] = {}
        """What it is about -> the newest that is to be said of it."""
        self._moves: deque[bytes] = deque(maxlen=MOVES_WAITING)
        self.line: Line | None = None
        self._awake = asyncio.Event()
        self._idle = False
        """Whether all that was heard was sent, and `chunks` waits for more."""
        self._over = False

    # -- the hub's side ------------------------------------------------------------------------------------

    def hear(self, turn: Turn) -> None:
        """Take events of the log; never waits."""
        if self._over or self.dropped:
            return
        self._waiting += len(turn.events)
        if self._waiting > WAITING_MOST:
            self.dropped = True
            self._turns.clear()
        else:
            self._turns.append(turn)

    def hear_now(self, about: str, said: bytes) -> None:
        """Take what only matters now; it replaces what was said of it before."""
        if not self.dropped:
            self._fleeting[about] = said

    def hear_moves(self, said: bytes) -> None:
        """Take how far jobs are; of one that is far behind the oldest are forgotten."""
        if not self.dropped:
            self._moves.append(said)

    def send(self) -> None:
        """Send what it has heard, or let it do so."""
        line = self.line
        if line is None or not self._idle or self._over or self.dropped or self.job_id is not None or not line.free:
            self._awake.set()
            return
        chunk, _ = self._taken()
        if chunk:
            line.write(chunk)

    def leave(self) -> None:
        """End it once everything that waits is told."""
        self._over = True
        self._awake.set()

    # -- the client's side ---------------------------------------------------------------------------------

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what is to be sent, as much at once as there is."""
        if self.job_id is not None or self._after is not None:
            async for chunk in self._replay(self._after or 0):
                yield chunk
        else:
            # From here on a client that loses the connection can say where it was, even if nothing happened yet.
            yield f"id: {self._seen}\n\n".encode()
        while True:
            chunk, over = self._taken()
            if chunk:
                yield chunk
            if over or self.dropped or (self._over and not self._turns):
                return
            self._idle = True
            await self._awake.wait()
            self._idle = False
            self._awake.clear()

    def _taken(self) -> tuple[bytes, bool]:
        """Return what waits, and whether that was the last of it."""
        # How far jobs are comes first: after its last word nothing more is to be said of a job.
        parts, over = [*self._fleeting.values(), *self._moves], False
        self._fleeting.clear()
        self._moves.clear()
        turns, self._turns, self._waiting = self._turns, deque(), 0
        for turn in turns:
            parts.append(turn.after(self._seen))
            ended = any(told.ends and told.number > self._seen for told in turn.events)
            over = over or (self.job_id is not None and ended)
            self._seen = max(self._seen, turn.events[-1].number)
        if over:
            parts.append(END)
        return b"".join(parts), over

    async def _replay(self, after: int) -> AsyncIterator[bytes]:
        """Yield the log from the number after `after` to where the hub is by now."""
        wait, begun = TROUBLE_FIRST, False
        while not self._over:
            try:
                if not begun:
                    self._seen, begun = await self._hub.known(after), True
                # Looked at before the page is read: if it has ended by then, the page has its last word.
                ended = self.job_id is not None and await self._hub.has_ended(self.job_id)
                page = await self._hub.page(self._seen, self.job_id)
            except LocalError as error:
                yield comment(f"the log cannot be read now ({error.code}); trying again")
                await asyncio.sleep(wait)
                wait = min(wait * 2, TROUBLE_MOST)
                continue
            if page:
                self._seen = page[-1].number
                yield b"".join(told.frame for told in page)
            elif ended:
                self._over = True
                self._turns.clear()
                self._fleeting.clear()
                self._moves.clear()
                yield END
            else:
                return


class Hub:
    """Tells listeners what happens. Works while somebody listens."""

    def __init__(self, queue: JobQueue, live: Live | None, words: Words) -> None:
        """`live` None: nothing runs in this process."""
        self._queue, self._live, self._words = queue, live, words
        self._store = queue.store
        self.at = 0
        """The number of the last event that was told."""
        self._listeners: set[Listener] = set()
        self._kept: deque[Told] = deque()
        self._kept_from = 0
        """Every event above this number, up to `at`, is among those kept."""
        self._work: list[asyncio.Task[None]] = []
        self._starting = asyncio.Lock()
        self._jobs: dict[JobId, QueuedJob] = {}
        """Jobs that run here, as they were when something last happened to them."""
        self._moved: dict[JobId, LiveJob] = {}
        self._moving = asyncio.Event()
        self._sleeping: dict[Listener, None] = {}
        """Those who have heard something and not sent it, in order."""
        self._waking = asyncio.Event()
        self._unsubscribe: Callable[[], None] = lambda: None
        self._fleeting: dict[str, bytes] = {}
        self._closed = False

    @property
    def listening(self) -> int:
        """How many listen now."""
        return len(self._listeners)

    @asynccontextmanager
    async def listen(self, job: QueuedJob | None, after: int | None) -> AsyncIterator[Listener]:
        """Listen for the block, to one job or to everything.

        `after`: the number of the last event that was seen. None: everything from now on, or a job's whole story.
        Raises TooManyRequests, LocalError.
        """
        if len(self._listeners) >= LISTENERS_MOST:
            raise TooManyRequests(
                f"{LISTENERS_MOST} clients listen already", hint="close some pages", details={"retry_after_s": 10}
            )
        async with self._starting:
            if not self._work and not self._closed:
                await self._start()
            listener = Listener(self, job, after)
            self._listeners.add(listener)
        if self._closed:
            listener.leave()
        if job is None:
            for about, said in self._fleeting.items():
                listener.hear_now(about, said)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._rest()

    async def close(self) -> None:
        """Let every listener go, and tell nobody anything from now on."""
        self._closed = True
        for listener in list(self._listeners):
            listener.leave()
        work = self._rest()
        if work:
            await asyncio.wait(work)

    # -- work ----------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        at = await self._store.settled()
        while page := await self._store.events(after=at, limit=EVENTS_AT_ONCE):
            at = page[-1].number
        self.at = self._kept_from = at
        self._kept.clear()
        loops = [
            self._read,
            self._wake_up,
            self._tell_progress,
            self._tell_elsewhere,
            self._tell_machines,
            self._tell_money,
            self._beat,
        ]
        self._work = [asyncio.create_task(loop(), name=f"hub{loop.__name__}") for loop in loops]
        for task in self._work:
            task.add_done_callback(self._fell)
        if self._live is not None:
            self._unsubscribe = self._live.subscribe(self._heard)

    def _fell(self, task: asyncio.Task[None]) -> None:
        """Let everybody go when a loop has died: they come back, and it begins anew."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("hub_stopped", exc_info=error)
        for listener in self._listeners:
            listener.leave()
        self._rest()

    def _rest(self) -> list[asyncio.Task[None]]:
        work, self._work = self._work, []
        for task in work:
            task.cancel()
        self._unsubscribe()
        self._unsubscribe = lambda: None
        self._jobs.clear()
        self._moved.clear()
        self._fleeting.clear()
        self._sleeping.clear()
        return work

    async def _read(self) -> None:
        mark, wait = 0, TROUBLE_FIRST
        while True:
            try:
                page, rows = await self._store.told(after=self.at, limit=EVENTS_AT_ONCE)
                if page:
                    self._tell(await self._told(page, rows))
                else:
                    mark = await self._store.changed(timeout=self._queue.settings.poll_interval, seen=mark)
                wait = TROUBLE_FIRST
            except LocalError as error:
                log.warning("events_unread", extra={"fields": {"error": error.code}})
                self._tell_now("trouble", comment(f"the log cannot be read now ({error.code}); trying again"))
                await asyncio.sleep(wait)
                wait = min(wait * 2, TROUBLE_MOST)

    def _tell(self, told: Sequence[Told]) -> None:
        # Without a break from here: who begins to listen sees all of it or nothing.
        self.at = told[-1].number
        self._kept.extend(told)
        while len(self._kept) > KEPT:
            self._kept_from = self._kept.popleft().number
        by_job: dict[RowId, list[Told]] = {}
        for each in told:
            if each.job_id is not None:
                by_job.setdefault(each.job_id, []).append(each)
        turn, turns = Turn(told), {job_id: Turn(events) for job_id, events in by_job.items()}
        hearing = []
        for listener in self._listeners:
            heard = turn if listener.job_id is None else turns.get(listener.job_id)
            if heard is not None:
                listener.hear(heard)
                hearing.append(listener)
        self._wake(hearing)

    async def _told(self, events: Sequence[JobEvent], rows: Mapping[RowId, QueuedJob]) -> list[Told]:
        """Return events as listeners get them, each with its job as it is now."""
        shown: dict[RowId, dict[str, Any]] = {}
        for each in rows.values():
            if each.status is QueueStatus.PROCESSING:
                self._jobs[each.uid] = each
            else:
                self._jobs.pop(each.uid, None)
        for number, each in enumerate(rows.values(), 1):
            shown[each.id] = await self._words.job(each)
            if number % SAID_AT_ONCE == 0:
                await asyncio.sleep(0)
        told = []
        for event in events:
            row = rows.get(event.job_id) if event.job_id is not None else None
            data = await self._words.event(event, shown[row.id] if row is not None else None)
            ends = event.kind in LAST_WORDS and row is not None and row.ended
            told.append(Told(frame("job", data, number=event.number), event.number, event.job_id, ends))
            if len(told) % SAID_AT_ONCE == 0:
                await asyncio.sleep(0)
        return told

    # -- for listeners -------------------------------------------------------------------------------------

    async def page(self, after: int, job_id: RowId | None) -> Sequence[Told]:
        """Return some events with a number above `after`, in order; none if there are none (yet). Raises LocalError."""
        if job_id is None and self._work and self._kept_from <= after:
            return [told for told in self._kept if told.number > after]
        if job_id is None:
            events, rows = await self._store.told(after=after, limit=EVENTS_AT_ONCE)
        else:
            events = await self._store.events(after=after, job_id=job_id, limit=EVENTS_AT_ONCE)
            rows = await self._store.jobs_with({job_id}) if events else {}
        return await self._told(events, rows) if events else ()

    async def known(self, after: int) -> int:
        """Return from where a listener goes on that names this number. Raises LocalError.

        One that is ahead of the log has it from a database that is no more: it goes on from now.
        """
        if after <= self.at or await self._store.events(after=after - 1, limit=1):
            return after
        return self.at

    async def has_ended(self, job_id: RowId) -> bool:
        """Return whether a job has ended; one that is not there has. Raises LocalError."""
        job = await self._store.job(job_id)
        return job is None or job.ended

    # -- what only matters now -----------------------------------------------------------------------------

    def _tell_now(self, about: str, said: bytes) -> None:
        listeners = list(self._listeners)
        for listener in listeners:
            listener.hear_now(about, said)
        self._wake(listeners)

    def _heard(self, live: LiveJob) -> None:
        """Hear of a running job; from its own loop, many times a second."""
        if live.over:
            self._moved.pop(live.uid, None)  # the durable word says it
            return
        self._moved[live.uid] = live
        self._moving.set()

    async def _tell_progress(self) -> None:
        while True:
            await self._moving.wait()
            self._moving.clear()
            moved, self._moved = self._moved, {}
            with suppress(LocalError):  # the next snapshot says it
                frames = {}
                for uid, live in moved.items():
                    job = self._jobs.get(uid)
                    if job is None:
                        found = await self._store.job(uid)
                        if found is None or found.ended:
                            continue  # not a job of the queue
                        job = self._jobs[uid] = found
                    frames[job.id] = frame("progress", await self._words.progress(job, live))
                self._tell_moves(frames)
            await asyncio.sleep(PROGRESS_EVERY)

    async def _tell_elsewhere(self) -> None:
        """Say how far jobs are that run in other processes, which write it down now and then and tell nobody."""
        told: dict[RowId, tuple[float, str]] = {}
        while True:
            await asyncio.sleep(ELSEWHERE_EVERY)
            with suppress(LocalError):
                here = self._live.jobs() if self._live is not None else {}
                running = await self._store.jobs(status=QueueStatus.PROCESSING)
                now = {job.id: (job.progress, job.message) for job in running if job.uid not in here}
                moved = [job for job in running if job.id in now and told.get(job.id, (0.0, "")) != now[job.id]]
                told = now
                self._tell_moves({job.id: frame("progress", await self._words.progress(job, None)) for job in moved})

    def _tell_moves(self, frames: Mapping[RowId, bytes]) -> None:
        if not frames:
            return
        everything, hearing = b"".join(frames.values()), []
        for listener in self._listeners:
            said = everything if listener.job_id is None else frames.get(listener.job_id)
            if said is not None:
                listener.hear_moves(said)
                hearing.append(listener)
        self._wake(hearing)

    def _wake(self, listeners: Collection[Listener]) -> None:
        self._sleeping.update(dict.fromkeys(listeners))
        self._waking.set()

    async def _wake_up(self) -> None:
        """Let listeners send, a few at a time: requests that come meanwhile are not to wait for hundreds of them.

        What happens next is read meanwhile; who has not sent yet then sends both at once.
        """
        while True:
            await self._waking.wait()
            self._waking.clear()
            while self._sleeping:
                for listener in list(islice(self._sleeping, WOKEN_AT_ONCE)):
                    del self._sleeping[listener]
                    listener.send()
                await asyncio.sleep(0)

    async def _beat(self) -> None:
        """Say a word now and then: proxies and clients give silent connections up after 30 or 60 seconds."""
        beat = comment("still here")
        while True:
            await asyncio.sleep(HEARTBEAT)
            self._tell_now("beat", beat)

    def _everybody(self) -> Collection[Listener]:
        return [listener for listener in self._listeners if listener.job_id is None]

    async def _tell_machines(self) -> None:
        await self._tell_often("machines", self._words.machines, MACHINES_EVERY)

    async def _tell_money(self) -> None:
        await self._tell_often("money", self._words.money, MONEY_EVERY)

    async def _tell_often(self, about: str, ask: Callable[[], Awaitable[Json]], every: float) -> None:
        """Say it whenever it is another than before."""
        before, failed = b"", False
        while True:
            if listeners := self._everybody():
                try:
                    said = frame(about, await ask())
                except RunComfyError:
                    pass  # whoever asks for it is told why
                except Exception:
                    if not failed:
                        failed = True
                        log.exception("not_told", extra={"fields": {"about": about}})
                else:
                    if said != before:
                        before = self._fleeting[about] = said
                        for listener in listeners:
                            listener.hear_now(about, said)
                        self._wake(listeners)
            await asyncio.sleep(every)
