"""
The product for programs: `connect()`, in an async and a sync form.

The sync form has a thread with an event loop of its own, so it also works inside a running loop (though it blocks that
loop's thread while it waits, as any sync call does).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from runcomfy.application.books import quiet
from runcomfy.bootstrap import App
from runcomfy.domain.durations import parse_duration
from runcomfy.domain.job import JobRequest, JobResult
from runcomfy.domain.progress import Progress

T = TypeVar("T")
PathText = str | os.PathLike[str]
OnProgress = Callable[[Progress], None]


def connect(*, server_url: str | None = None, tell: Callable[[str], None] | None = None, **overrides: Any) -> Connector:
    """Return a connection to be entered with `async with` or `with`.

    Settings come from the environment and credentials.txt, as for the command line; `overrides` win over both, by
    their variable names (`RUNCOMFY_OUTPUT_DIR="out"`). `server_url` makes every job run on that ComfyUI: nothing is
    launched and nothing billed. `tell` takes sentences meant for the user (default: they are only logged).
    """
    return Connector(server_url, tell, overrides)


class Connector:
    """What `connect` returns: not open yet."""

    def __init__(
        self, server_url: str | None, tell: Callable[[str], None] | None, overrides: Mapping[str, Any]
    ) -> None:
        self._server_url, self._tell, self._overrides = server_url, tell or quiet, overrides
        self._async: Connection | None = None
        self._sync: SyncConnection | None = None

    def _make(self) -> Connection:
        return Connection(App(overrides=self._overrides, tell=self._tell), self._server_url)

    async def __aenter__(self) -> Connection:
        self._async = self._make()
        return self._async

    async def __aexit__(self, *_: object) -> None:
        if self._async is not None:
            await self._async.close()

    def __enter__(self) -> SyncConnection:
        self._sync = SyncConnection(self._make)
        return self._sync

    def __exit__(self, *_: object) -> None:
        if self._sync is not None:
            self._sync.close()


class Running:
    """A job under way: iterate over its progress, await its result, cancel it."""

    def __init__(self, start: Callable[[OnProgress, asyncio.Event], Coroutine[Any, Any, JobResult]]) -> None:
        self._cancel = asyncio.Event()
        # Only the newest snapshots matter to somebody who reads slowly.
        self._news: asyncio.Queue[Progress | None] = asyncio.Queue(maxsize=256)
        self._task = asyncio.create_task(start(self._put, self._cancel))
        self._task.add_done_callback(lambda _: self._put(None))

    def _put(self, item: Progress | None) -> None:
        if self._news.full():
            self._news.get_nowait()
        self._news.put_nowait(item)

    def cancel(self) -> None:
        """End the job in good order: the prompt is interrupted, what was rented is ended; await the result."""
        self._cancel.set()

    def __await__(self) -> Generator[Any, None, JobResult]:
        return self._task.__await__()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        while (item := await self._news.get()) is not None:
            yield item


class Connection:
    """Runs jobs. Several may run at once."""

    def __init__(self, app: App, server_url: str | None) -> None:
        self.app = app
        self._server_url = server_url
        self._orchestrator = app.orchestrator()

    async def close(self) -> None:
        """Close every connection; a dev server stays, what was rented for a job is long gone."""
        await self.app.close()

    async def run(
        self,
        workflow: PathText | Mapping[str, Any],
        *,
        image: PathText | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        sets: Mapping[str, Any] | None = None,
        out_dir: PathText | None = None,
        server_url: str | None = None,
        server_type: str | None = None,
        timeout: timedelta | str | float | None = None,
        convert: str | None = None,
        on_progress: OnProgress | None = None,
        check: bool = True,
    ) -> JobResult:
        """Run a workflow and return its result with verified files.

        `timeout` counts from when the machine is ready; a timedelta, seconds, or text such as `10m`. With `check`
        a job that did not succeed raises its error (`RunComfyError`); without it, look at `result.status`.
        """
        request = self._request(workflow, image, prompt, seed, sets, out_dir, server_url, server_type, timeout, convert)
        return checked(await self._orchestrator.run(request, on_progress=on_progress), check)

    def start(self, workflow: PathText | Mapping[str, Any], *, check: bool = True, **options: Any) -> Running:
        """Start a workflow (options as for `run`) and return it while it runs."""
        names = ("image", "prompt", "seed", "sets", "out_dir", "server_url", "server_type", "timeout", "convert")
        if unknown := set(options) - set(names):
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        request = self._request(workflow, *(options.get(name) for name in names))

        async def work(on_progress: OnProgress, cancel: asyncio.Event) -> JobResult:
            return checked(await self._orchestrator.run(request, on_progress=on_progress, cancel=cancel), check)

        return Running(work)

    def _request(
        self,
        workflow: PathText | Mapping[str, Any],
        image: PathText | None,
        prompt: str | None,
        seed: int | None,
        sets: Mapping[str, Any] | None,
        out_dir: PathText | None,
        server_url: str | None,
        server_type: str | None,
        timeout: timedelta | str | float | None,
        convert: str | None,
    ) -> JobRequest:
        if isinstance(timeout, str):
            timeout = parse_duration(timeout)
        elif timeout is not None and not isinstance(timeout, timedelta):
            timeout = timedelta(seconds=timeout)
        return JobRequest(
            workflow=workflow if isinstance(workflow, Mapping) else os.fspath(workflow),
            image=os.fspath(image) if image is not None else None,
            prompt=prompt,
            seed=seed,
            sets=dict(sets or {}),
            out_dir=os.fspath(out_dir) if out_dir is not None else None,
            server_url=server_url or self._server_url,
            server_type=server_type,
            timeout=timeout,
            convert=convert,
        )


def checked(result: JobResult, check: bool) -> JobResult:
    """Return the result, or raise the job's error if it has one and the caller wants it raised."""
    if check and result.exception is not None:
        raise result.exception
    return result


class SyncConnection:
    """The same for code without an event loop. Progress callbacks are called in the connection's own thread."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="runcomfy-connection", daemon=True)
        self._thread.start()
        try:
            self._connection = self._call(self._made(make))
        except BaseException:
            self._end()
            raise

    @staticmethod
    async def _made(make: Callable[[], Connection]) -> Connection:
        return make()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def run(self, workflow: PathText | Mapping[str, Any], **options: Any) -> JobResult:
        """Run a workflow; everything as in `Connection.run`. Ctrl+C ends the job in good order first."""
        future = asyncio.run_coroutine_threadsafe(self._connection.run(workflow, **options), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            # Cancelling interrupts the prompt and ends what was rented; wait for that, however long it takes.
            self._call(_cancelled(self._tasks()))
            raise

    def _tasks(self) -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks(self._loop) if task.get_name().startswith("job-")]

    def close(self) -> None:
        """Close the connection and end its thread."""
        try:
            self._call(self._connection.close())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


__all__ = ["Connection", "Connector", "Running", "SyncConnection", "connect"]
