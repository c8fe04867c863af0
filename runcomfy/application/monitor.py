"""
The monitor: what is dropped into the folder of job files gets into the database.

A file is read once it has kept its size and time for a moment, so that one that is still being written is left alone.
Its content decides, not its time: what the database has already is not put in again, and a file that is deleted changes
nothing. A file that cannot be used is told once, with line and field, and looked at again when it, or something it
depends on, has changed. No file keeps the others from being taken up, and while the database cannot be written to,
nothing is lost: the files are still there.

What a job file may hold, and where the folder is, is `JobFiles`' business; what becomes of a known name, the store's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from typing import Final

from runcomfy.application.books import Tell, quiet
from runcomfy.domain.exceptions import (
    BadInput,
    FolderWatched,
    JobFileInvalid,
    LocalError,
    RunComfyError,
    StoreCorrupt,
    StoreTooNew,
    foreign_text,
)
from runcomfy.domain.job_file import blamed
from runcomfy.domain.queued import EventKind, Ingested, NewJob, QueuedJob, QueueStatus
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.job_files import FolderScan, FoundFile, JobFiles, ReadJob
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.monitor")

Check = Callable[[NewJob], Awaitable[None]]
"""Finds out whether a job can be run as it is written; raises BadInput if not."""

YOUNG: Final = timedelta(seconds=2)
"""How long a broken file may still be one that is being written."""
LOOK_AGAIN: Final = timedelta(seconds=10)
"""How often refused files are looked at unasked: an input file may have come meanwhile."""
LOOKED_AT_AGAIN: Final = 20
"""How many of them in one scan."""
LONGEST_PAUSE: Final = timedelta(milliseconds=300)
LONGEST_TROUBLE: Final = timedelta(seconds=5)
BATCH: Final = 64
"""Files read, compared and written down together."""
MOST_AT_ONCE: Final = 512
"""Files taken up in one look: after about a second it is time to see whether to stop, and what else has come."""
GROWING: Final = timedelta(seconds=10)
"""How long a single look (`once`) waits for files that are being written."""

_MOST_SAID: Final = 10_000

Known = tuple[str, str, QueueStatus, str]
"""What the database says of a name: content, held content, status, path."""


class _Phase(StrEnum):
    SETTLING = "settling"
    """Seen, not read yet."""
    TAKEN = "taken"
    """In the database; nothing to do until it changes."""
    WAITING = "waiting"
    """The database does not want it now, and may when the job's row has changed."""
    REFUSED = "refused"


@dataclass(slots=True)
class _Seen:
    """What is remembered of a file."""

    mark: tuple[int, int, int]
    since: float
    """Loop time at which it was first seen like this."""
    due: float
    """Loop time before which it is not read."""
    phase: _Phase = _Phase.SETTLING
    known: Known | None = None
    told: tuple[str, str] = ("", "")
    """(content, what was said of it): nothing is said twice."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of one file."""

    path: str
    what: Ingested
    job: QueuedJob


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that cannot be used."""

    path: str
    error: RunComfyError


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What one look into the folder did. What was said before is not repeated."""

    files: int = 0
    taken: tuple[Taken, ...] = ()
    refused: tuple[Refused, ...] = ()
    settling: int = 0
    """Files that are still being written, as far as one can tell, or whose turn comes with the next look."""
    read: int = 0
    """Files that were read."""
    pause: timedelta = LONGEST_PAUSE
    """When to look again."""

    def then(self, later: ScanReport) -> ScanReport:
        """Return both looks as one."""
        return replace(later, taken=self.taken + later.taken, refused=self.refused + later.refused)


@dataclass(slots=True)
class _Scan:
    """One look, while it lasts."""

    present: frozenset[str]
    taken: list[Taken] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class Monitor:
    """Watches one folder. `run` until told to stop, `once`, or `add` a single file."""

    def __init__(
        self,
        store: JobStore,
        files: JobFiles,
        settings: QueueSettings,
        *,
        check: Check | None = None,
        tell: Tell = quiet,
        clock: Clock,
        on_scan: Callable[[ScanReport], None] | None = None,
    ) -> None:
        """`on_scan` is called after every look that did something."""
        self._store = store
        self._files = files
        self._settings = settings
        self._check = check
        self._tell = tell
        self._clock = clock
        self._on_scan = on_scan
        self._seen: dict[str, _Seen] = {}
        self._said: set[str] = set()
        self._surroundings: Hashable = None
        self._interval = min(settings.poll_interval / 2, LONGEST_PAUSE)

    # -- watching ------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until `stop` is set. What the disk or the database refuse is said, and tried again.

        Raises FolderWatched (another monitor has the folder), StoreCorrupt, StoreTooNew.
        """
        trouble, patience = "", self._interval
        try:
            while not stop.is_set():
                try:
                    pause = (await self.scan()).pause
                except (FolderWatched, StoreCorrupt, StoreTooNew):
                    raise
                except LocalError as error:
                    if error.message != trouble:
                        self._tell(f"{_sentence(error)}; trying again")
                        log.warning("monitor_trouble", extra={"fields": error.as_dict()})
                    trouble, patience = error.message, min(patience * 2, LONGEST_TROUBLE)
                    pause = patience
                else:
                    if trouble:
                        self._tell("the monitor goes on")
                    trouble, patience = "", self._interval
                await _wait(stop, pause)
        finally:
            await self.close()

    async def once(self) -> ScanReport:
        """Take up what is there, waiting a moment for files that are being written; return all that was done.

        Raises FolderWatched, LocalError.
        """
        loop = asyncio.get_running_loop()
        patience = max(GROWING, self._settings.stable_for * 4).total_seconds()
        done, progress = ScanReport(), loop.time()
        try:
            while True:
                report = await self.scan()
                if report.read:
                    progress = loop.time()
                done = done.then(report)
                if not done.settling or loop.time() >= progress + patience:
                    return done
                await asyncio.sleep(done.pause.total_seconds())
        finally:
            await self.close()

    async def close(self) -> None:
        """Let another monitor have the folder. Harmless when repeated."""
        await asyncio.to_thread(self._files.release)

    async def scan(self) -> ScanReport:
        """Look once and take up what is ready; the folder stays held until `close`.

        Raises FolderWatched, LocalError: what was not taken up is taken up by a later look.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for words in await asyncio.to_thread(self._files.hold):
            self._say_once(words)
        found = await asyncio.to_thread(self._files.scan)
        took = loop.time() - begun
        if await self._surroundings_changed():
            self._forgive()
        scan = _Scan(frozenset(each.path for each in found.files))
        for path in self._seen.keys() - scan.present:
            del self._seen[path]
        self._tell_strange(found)
        await self._recall(scan.present)
        due = self._due(found.files, loop.time())[:MOST_AT_ONCE]
        try:
            for start in range(0, len(due), BATCH):
                await self._take_up(due[start : start + BATCH], scan)
        finally:
            report = self._report(scan, len(found.files), len(due), took=took)
            if self._on_scan is not None and (report.taken or report.refused):
                self._on_scan(report)
        return report

    async def add(self, path: str) -> tuple[Ingested, QueuedJob]:
        """Take up one file now, wherever it lies.

        Raises InputFileMissing, JobFileInvalid (with line and field), ConfigurationError, LocalError.
        """
        found, data = await self._whole(path)
        read = await asyncio.to_thread(self._files.job, found, data)
        await self._checked(read)
        known = (await self._store.known_files([found.name])).get(found.name)
        if known is not None and self._inside(known[3]):
            files = (await asyncio.to_thread(self._files.scan)).files
            read = self._as_known(found, read, known, frozenset(each.path for each in files))
        return await self._ingest(read)

    async def _whole(self, path: str) -> tuple[FoundFile, bytes]:
        """Return a file and what is in it, once nobody writes to it while it is read."""
        loop = asyncio.get_running_loop()
        until = loop.time() + GROWING.total_seconds()
        while True:
            found = await asyncio.to_thread(self._files.find, path)
            data = await asyncio.to_thread(self._files.read, found)
            if isinstance(data, JobFileInvalid):
                raise data
            if data is not None:
                return found, data
            if loop.time() >= until:
                raise JobFileInvalid(
                    f"{foreign_text(found.name)} is still being written", hint="add it when it is done"
                )
            await asyncio.sleep(LONGEST_PAUSE.total_seconds() / 10)

    # -- which files ---------------------------------------------------------------------------------------

    async def _surroundings_changed(self) -> bool:
        now = await asyncio.to_thread(self._files.surroundings)
        before, self._surroundings = self._surroundings, now
        return before is not None and before != now

    def _forgive(self) -> None:
        """Let every file that was refused be read again."""
        for seen in self._seen.values():
            if seen.phase is _Phase.REFUSED:
                seen.phase, seen.due = _Phase.SETTLING, seen.since

    def _due(self, files: Iterable[FoundFile], now: float) -> list[FoundFile]:
        """Return the files to be read now."""
        due = []
        again = LOOKED_AT_AGAIN
        for found in files:
            seen = self._seen.get(found.path)
            if seen is None or seen.mark != found.mark:
                settled = now + self._settings.stable_for.total_seconds()
                told = seen.told if seen is not None else ("", "")
                seen = self._seen[found.path] = _Seen(found.mark, since=now, due=settled, told=told)
            if now < seen.due or seen.phase in (_Phase.TAKEN, _Phase.WAITING):
                continue
            if seen.phase is _Phase.REFUSED:
                if not again:
                    continue
                again -= 1
            due.append(found)
        return due

    async def _recall(self, present: frozenset[str]) -> None:
        """Let files be looked at again whose job has ended or was retried, or whose name has become free."""
        waiting = {path: seen for path, seen in self._seen.items() if seen.phase is _Phase.WAITING}
        if not waiting:
            return
        known = await self._store.known_files({_name(path) for path in waiting})
        for path, seen in waiting.items():
            source = seen.known[3] if seen.known is not None and seen.told[1] == Ingested.TAKEN else ""
            if known.get(_name(path)) != seen.known or (self._inside(source) and source not in present):
                seen.phase, seen.due = _Phase.SETTLING, seen.since

    # -- taking up -----------------------------------------------------------------------------------------

    async def _take_up(self, batch: Sequence[FoundFile], scan: _Scan) -> None:
        """Read, compare, check and write down some files, in order. Raises LocalError."""
        contents = await asyncio.to_thread(self._contents, batch)
        known = await self._store.known_files([found.name for found in batch])
        ready: list[tuple[FoundFile, ReadJob]] = []
        for found, data, digest in contents:
            seen = self._seen[found.path]
            if data is None:
                seen.mark = (-1, -1, -1)  # it is being written; the next look sees it as new
            elif isinstance(data, JobFileInvalid):
                await self._refuse(found, str(found.mark), data, scan)
            elif self._is_known(found, digest, known.get(found.name)):
                seen.phase = _Phase.TAKEN
            elif (read := await self._read(found, data, digest, scan)) is not None:
                ready.append((found, self._as_known(found, read, known.get(found.name), scan.present)))
        # Begun in order, so numbered in order; the database commits them together.
        results = await asyncio.gather(*(self._ingest(read) for _, read in ready), return_exceptions=True)
        failed: BaseException | None = None
        for (found, read), result in zip(ready, results, strict=True):
            if isinstance(result, BadInput):
                await self._refuse(found, read.job.content_sha256, result, scan)
            elif isinstance(result, BaseException):
                failed = failed or result
            else:
                self._note_taken(found, *result, scan)
        if failed is not None:
            raise failed

    def _contents(self, batch: Sequence[FoundFile]) -> list[tuple[FoundFile, bytes | JobFileInvalid | None, str]]:
        """Read some files, in a thread."""
        contents = []
        for found in batch:
            data = self._files.read(found)
            contents.append((found, data, hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else ""))
        return contents

    @staticmethod
    def _is_known(found: FoundFile, digest: str, known: Known | None) -> bool:
        return known is not None and (known[0], known[1], known[3]) == (digest, "", found.path)

    async def _read(self, found: FoundFile, data: bytes, digest: str, scan: _Scan) -> ReadJob | None:
        """Return the job of a file that can be used."""
        try:
            read = await asyncio.to_thread(self._files.job, found, data)
            await self._checked(read)
        except BadInput as error:
            await self._refuse(found, digest, error, scan)
        except LocalError:
            raise
        except RunComfyError as error:
            self._postpone(found, error)
        except Exception as error:  # one file must not keep the others from being taken up
            log.exception("monitor_failed", extra={"fields": {"file": found.path}})
            words = f"{foreign_text(found.name)} could not be read: {foreign_text(repr(error))}"
            await self._refuse(found, digest, JobFileInvalid(words, hint="this is a defect; please report it"), scan)
        else:
            return read
        return None

    async def _checked(self, read: ReadJob) -> None:
        if self._check is None:
            return
        try:
            await self._check(read.job)
        except BadInput as error:
            inputs = read.job.request.inputs
            raise blamed(error, read.lines, file_name=read.job.config_name, inputs=inputs) from error

    def _inside(self, path: str) -> bool:
        folder = self._settings.jobs_processing
        return path.startswith(folder) and path[len(folder) : len(folder) + 1] in ("/", "\\")

    def _as_known(self, found: FoundFile, read: ReadJob, known: Known | None, present: frozenset[str]) -> ReadJob:
        """A file that was moved within the folder goes on under the path it came from."""
        source = known[3] if known is not None else ""
        if source == found.path or not self._inside(source) or source in present:
            return read
        return replace(read, job=replace(read.job, source_path=source))

    async def _ingest(self, read: ReadJob) -> tuple[Ingested, QueuedJob]:
        try:
            return await self._store.ingest(read.job, default_priority=self._settings.default_priority)
        except BadInput as error:  # another job writes to that file
            inputs = read.job.request.inputs
            raise blamed(error, read.lines, file_name=read.job.config_name, inputs=inputs) from error

    # -- telling -------------------------------------------------------------------------------------------

    def _note_taken(self, found: FoundFile, what: Ingested, job: QueuedJob, scan: _Scan) -> None:
        seen = self._seen[found.path]
        if what is Ingested.SAME and job.source_path not in ("", found.path) and job.source_path in scan.present:
            what = Ingested.TAKEN  # a second copy: which of the two is meant, once they differ, nobody can say
        waits = what in (Ingested.HELD, Ingested.CANCELLED, Ingested.TAKEN)
        seen.phase = _Phase.WAITING if waits else _Phase.TAKEN
        seen.known = (job.content_sha256, job.held_sha256, job.status, job.source_path)
        said = (f"{found.mark}", str(what))
        if what is Ingested.SAME or seen.told == said:
            return
        seen.told = said
        scan.taken.append(Taken(found.path, what, job))
        self._tell(_TOLD[what].format(name=foreign_text(found.name), other=foreign_text(job.source_path) or "no file"))

    async def _refuse(self, found: FoundFile, digest: str, error: RunComfyError, scan: _Scan) -> None:
        seen, now = self._seen[found.path], asyncio.get_running_loop().time()
        age = self._clock.now().timestamp() - found.modified
        if now < seen.since + YOUNG.total_seconds() and age < YOUNG.total_seconds():
            seen.phase, seen.due = _Phase.SETTLING, seen.since + YOUNG.total_seconds()
            return
        said = (digest, error.message)
        if seen.told != said:
            data = {"file": found.path, **error.as_dict()}
            await self._store.note(EventKind.FILE_REFUSED, data=data)
            seen.told = said
            scan.refused.append(Refused(found.path, error))
            self._tell(f"job file refused: {_sentence(error)}")
            log.warning("job_file_refused", extra={"fields": data})
        seen.phase, seen.due = _Phase.REFUSED, now + LOOK_AGAIN.total_seconds()

    def _postpone(self, found: FoundFile, error: RunComfyError) -> None:
        """What is wrong is not the file's: say it once, and look again."""
        seen = self._seen[found.path]
        seen.phase = _Phase.REFUSED
        seen.due = asyncio.get_running_loop().time() + LOOK_AGAIN.total_seconds()
        self._say_once(f"job files wait: {_sentence(error)}")

    def _tell_strange(self, found: FolderScan) -> None:
        for each in found.strange:
            self._say_once(f"not taken: {foreign_text(each.path, 1024)}: {each.why} ({each.hint})")

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            if len(self._said) >= _MOST_SAID:
                self._said.clear()
            self._said.add(words)
            self._tell(words)

    def _report(self, scan: _Scan, files: int, read: int, *, took: float) -> ScanReport:
        now = asyncio.get_running_loop().time()
        settling = [seen.due for seen in self._seen.values() if seen.phase is _Phase.SETTLING]
        # A folder so large that looking takes long is looked at less often.
        pause = max(self._interval.total_seconds(), 4 * took)
        if settling:
            pause = min(pause, max(0.01, min(settling) - now + 0.001))
        return ScanReport(files, tuple(scan.taken), tuple(scan.refused), len(settling), read, timedelta(seconds=pause))


_TOLD: Final[Mapping[Ingested, str]] = {
    Ingested.NEW: "{name}: in the queue",
    Ingested.UPDATED: "{name}: changed while it waited; it waits with the new content",
    Ingested.PRIORITY: "{name}: changed after it was done; only its priority was taken over",
    Ingested.AGAIN: "{name}: changed; it waits to run again",
    Ingested.HELD: "warning: {name} was changed while it runs; the new content is taken up when it has ended",
    Ingested.CANCELLED: "warning: {name} was cancelled; only `e3 retry {name}` starts it again",
    Ingested.TAKEN: "warning: {name} is not taken: a job of that name came from {other}; give the file another name",
}


def _sentence(error: RunComfyError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


async def _wait(stop: asyncio.Event, pause: timedelta) -> None:
    try:
        async with asyncio.timeout(pause.total_seconds()):
            await stop.wait()
    except TimeoutError:
        return
