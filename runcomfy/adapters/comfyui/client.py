"""
The client of one ComfyUI server: HTTP for what is true, a socket for what is quick.

One client serves many jobs at once. It keeps one warm connection and one socket, and asks what the server can do only
once per server process: a lost socket means it may be another process now. What a job does with it (watching, checking
results) is left to the application; single concerns live beside this file (exchange, socket, upload, submit, download).
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp

from runcomfy.adapters.comfyui import download, upload, wire
from runcomfy.adapters.comfyui.exchange import Exchange
from runcomfy.adapters.comfyui.socket import Socket, Subscription
from runcomfy.adapters.comfyui.submit import Submission
from runcomfy.domain.exceptions import AnswerUnreadable, ServerTooOld
from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.progress import HistoryEntry, QueueView
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import ComfySettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import Fetched, ServerInfo, Submitted

OLDEST: Final = (0, 3, 45)
"""First release with client-chosen prompt ids, `progress_state` and `/features` (ComfyUI releases, July 2025)."""
INTERRUPTS_BY_ID: Final = (0, 3, 57)
WITHDRAWALS: Final = 20
WITHDRAWAL_GAP_SECONDS: Final = 0.25
"""A waiting prompt goes at the first word; a server that says yes and keeps it is told no more than this often."""
CONCURRENT_QUESTIONS: Final = 4
"""Node infos asked for at once: the server answers them in its only event loop."""
KNOWLEDGE_WITHOUT_SOCKET: Final = timedelta(seconds=60)
"""How long what is known about a server holds while no open socket vouches for it being the same process."""
QUEUE_GAP: Final = 10.0
"""Queue readings keep a distance of this many times the duration of the last one: the answer holds every waiting
graph, and a thousand watchers must not spend their time on it."""
QUEUE_GAP_CAP_SECONDS: Final = 1.0


@dataclass(slots=True)
class _Boot:
    """What is known about one server process."""

    losses: int
    at: float
    info: ServerInfo | None = None
    nodes: dict[str, Any] = field(default_factory=dict)
    """Class -> its entry, None for a class the server does not have."""
    names: frozenset[str] | None = None
    uploads: dict[tuple[str, int, str], asyncio.Task[str]] = field(default_factory=dict)


class ComfyUIWorkflowClient:
    """A client of one ComfyUI server; keeps the `ComfyUI` port.

    Reading is repeated up to `settings.max_retries` times within one `request_timeout` when the connection fails or the
    server answers 5xx; a prompt is never sent twice without looking for it first. `http` is used if given and never
    closed; otherwise a session is opened and closed with the client. `client_id`: as whom prompts are sent and their
    events heard; random unless given.

    Raises SettingInvalid for an address that is none.
    """

    def __init__(
        self,
        url: str | SecretUrl,
        settings: ComfySettings,
        *,
        clock: Clock,
        http: aiohttp.ClientSession | None = None,
        client_id: str | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._exchange = Exchange(url, settings, http)
        self._socket = Socket(self._exchange.address, settings)
        if client_id is not None:
            self._socket.client_id = client_id
        self._boot = _Boot(losses=0, at=float("-inf"))
        self._probing = asyncio.Lock()
        self._asking = asyncio.Semaphore(CONCURRENT_QUESTIONS)
        self._queue_reading: asyncio.Task[QueueView] | None = None
        self._queue_next = float("-inf")
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See the port."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for task in self._boot.uploads.values() if not task.done()]
        if self._queue_reading is not None:
            tasks.append(self._queue_reading)  # type: ignore[arg-type]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._socket.close()
        await self._exchange.close()

    @property
    def masked_url(self) -> str:
        """See the port."""
        return self._exchange.address.masked

    @property
    def dropped(self) -> int:
        """How many frames of the socket made no sense, or came too fast to be kept."""
        return self._socket.dropped

    def __repr__(self) -> str:
        return f"ComfyUIWorkflowClient({self.masked_url!r})"

    # --- what is there ------------------------------------------------------------------------------------

    def _known(self, *, fresh: bool = False) -> _Boot:
        """What is known about the process that answers now; begun anew when it may be another one."""
        boot, now = self._boot, asyncio.get_running_loop().time()
        same = boot.losses == self._socket.losses
        if fresh or not same or (not self._socket.is_open and now - boot.at > KNOWLEDGE_WITHOUT_SOCKET.total_seconds()):
            self._boot = boot = _Boot(self._socket.losses, now, uploads=boot.uploads if same else {})
        return boot

    async def probe(self, *, fresh: bool = False) -> ServerInfo:
        """See the port."""
        async with self._probing:
            boot = self._known(fresh=fresh)
            if boot.info is None:
                boot.info = await self._probe()
            return boot.info

    async def _probe(self) -> ServerInfo:
        stats = await self._exchange.read("/system_stats")
        try:
            version = wire.read_version(stats)
        except wire.Unreadable:
            raise self._exchange.not_comfyui("answers, but not as ComfyUI does") from None
        number = wire.parse_version(version)
        (has_features, upload_limit), cancels = await asyncio.gather(self._features(), self._cancels_jobs())
        if (number is not None and number < OLDEST) or (number is None and not has_features):
            raise ServerTooOld(
                f"{self.masked_url} runs ComfyUI {version or 'of unknown version'}, too old to be driven safely",
                hint="update ComfyUI there to 0.3.45 (July 2025) or newer",
                details={"version": version, "oldest": ".".join(map(str, OLDEST))},
            )
        by_id = cancels or (number >= INTERRUPTS_BY_ID if number is not None else await self._has_jobs())
        details = {**wire.read_devices(stats), "asked_at": self._clock.now().isoformat()}
        return ServerInfo(version, by_id, cancels, upload_limit, details)

    async def _features(self) -> tuple[bool, int | None]:
        answer = await self._exchange.ask("GET", "/features")
        if answer.status != 200:
            return False, None
        try:
            return True, wire.read_upload_limit(wire.read_json(answer.body, lenient=True))
        except wire.Unreadable:
            return False, None

    async def _cancels_jobs(self) -> bool:
        """Try the route with an id nobody has: older servers answer 405, newer ones that nothing was cancelled."""
        answer = await self._exchange.ask("POST", f"/api/jobs/{uuid.uuid4()}/cancel")
        if answer.status != 200:
            return False
        try:
            return isinstance(wire.read_json(answer.body).get("cancelled"), bool)
        except (wire.Unreadable, AttributeError):
            return False

    async def _has_jobs(self) -> bool:
        answer = await self._exchange.ask("GET", "/api/jobs?limit=1")
        try:
            return answer.status == 200 and "jobs" in wire.read_json(answer.body, lenient=True)
        except (wire.Unreadable, TypeError):
            return False

    async def node_info(self, classes: Collection[str], *, fresh: bool = False) -> Mapping[str, Any]:
        """See the port."""
        boot = self._known()
        wanted = dict.fromkeys(classes)
        missing = [name for name in wanted if fresh or name not in boot.nodes]
        boot.nodes.update(zip(missing, await asyncio.gather(*map(self._ask_node, missing)), strict=True))
        return {name: info for name in wanted if (info := boot.nodes[name]) is not None}

    async def _ask_node(self, name: str) -> Any:
        async with self._asking:
            answer = await self._exchange.read("/object_info/" + quote(name, safe=""))
        if not isinstance(answer, dict):
            raise self._exchange.not_comfyui("answers, but not as ComfyUI does")
        return answer.get(name)

    async def class_names(self) -> Collection[str]:
        """See the port."""
        async with self._probing:
            boot = self._known()
            if boot.names is None:
                answer = await self._exchange.read("/object_info")
                if not isinstance(answer, dict):
                    raise self._exchange.not_comfyui("answers, but not as ComfyUI does")
                boot.names = frozenset(answer)
            return boot.names

    # --- files --------------------------------------------------------------------------------------------

    async def upload(self, path: str, *, kind: str = "image") -> str:
        """See the port. `kind` is for messages only: the server takes any file by the same route."""
        content = await asyncio.to_thread(upload.read_content, path)
        boot = self._known()
        limit = boot.info.max_upload_bytes if boot.info is not None else None
        if limit is not None and content.size_bytes + upload.FORM_BYTES > limit:
            raise upload.too_large(content, limit)
        extension = content.name.rpartition(".")[2]
        key = (content.sha256, content.size_bytes, extension)
        task = boot.uploads.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            # Its own task: of two jobs with the same input one may be cancelled without hurting the other.
            task = boot.uploads[key] = asyncio.create_task(upload.store(self._exchange, content), name=f"upload {kind}")
        return await asyncio.shield(task)

    async def fetch(self, file: FileRef, destination: str) -> Fetched:
        """See the port."""
        return await download.fetch(self._exchange, file, destination)

    # --- prompts ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def listen(self, prompt_id: PromptId) -> AsyncIterator[Subscription]:
        """See the port."""
        async with self._socket.listen(prompt_id) as subscription:
            yield subscription

    def renew_socket(self, reason: str) -> None:
        """See the port."""
        self._socket.renew(reason)

    async def submit(self, graph: Mapping[str, Any], *, prompt_id: PromptId) -> Submitted:
        """See the port."""
        return await Submission(
            self._exchange,
            self._socket,
            graph,
            prompt_id,
            queue=self.queue,
            history=self.history,
            take_back=self._take_back,
        ).run()

    async def queue(self) -> QueueView:
        """See the port."""
        # A reading that has begun may be older than what the caller knows; one that still waits is shared.
        if self._queue_reading is None:
            self._queue_reading = asyncio.create_task(self._read_queue(), name="read queue")
            self._queue_reading.add_done_callback(_noticed)
        return await asyncio.shield(self._queue_reading)

    async def _read_queue(self) -> QueueView:
        loop = asyncio.get_running_loop()
        if (pause := self._queue_next - loop.time()) > 0:
            await asyncio.sleep(pause)
        # From here on newcomers get a reading of their own.
        self._queue_reading = None
        began = loop.time()
        answer = await self._exchange.read("/queue")
        self._queue_next = loop.time() + min((loop.time() - began) * QUEUE_GAP, QUEUE_GAP_CAP_SECONDS)
        try:
            view = wire.read_queue(answer)
        except wire.Unreadable as error:
            raise self._unreadable(error) from None
        await self._remove_duplicates(view)
        return view

    async def _remove_duplicates(self, view: QueueView) -> None:
        """Take extra copies of our own prompts out of the queue: a lost answer can leave two (I11, I12)."""
        counts = Counter((*view.running, *view.pending))
        for prompt_id, count in counts.items():
            if count > 1 and self._socket.listens_to(prompt_id):
                for _ in range(count - 1):
                    # One deletion removes one waiting copy; a running one is not touched.
                    await self._exchange.ask("POST", "/queue", repeat=False, json={"delete": [prompt_id]})

    async def history(self, prompt_id: PromptId) -> HistoryEntry | None:
        """See the port."""
        answer = await self._exchange.read("/history/" + quote(prompt_id, safe=""))
        try:
            return wire.read_history(answer, prompt_id)
        except wire.Unreadable as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: wire.Unreadable) -> AnswerUnreadable:
        return AnswerUnreadable(
            f"the answer of {self.masked_url} cannot be read: {error}",
            hint="something between here and ComfyUI may change what it sends",
            details={"ended": isinstance(error, wire.EntryUnreadable)},
        )

    async def cancel(self, prompt_id: PromptId, *, alone: bool) -> bool:
        """See the port."""
        info = await self.probe()
        if info.cancels_jobs:
            answer = await self._exchange.ask("POST", f"/api/jobs/{quote(prompt_id, safe='')}/cancel")
            said = self._exchange.json(answer) if answer.status == 200 else None
            told = isinstance(said, dict) and said.get("cancelled") is True
            # It acts on one copy only; a lost answer may have left another one waiting.
            copies = (await self.queue()).pending.count(prompt_id)
            for _ in range(copies):
                await self._exchange.ask("POST", "/queue", json={"delete": [prompt_id]})
            return told or copies > 0
        return await self._cancel_by_old_routes(prompt_id, by_id=info.interrupts_by_id, alone=alone)

    async def withdraw(self, prompt_id: PromptId) -> bool:
        """See the port. The route deletes what waits, and nothing else, in every version."""
        for _ in range(WITHDRAWALS):
            await self._exchange.ask("POST", "/queue", json={"delete": [prompt_id]})
            view = await self.queue()
            if prompt_id in view.running:
                return False
            if prompt_id not in view.pending:  # a second copy would still be there
                return await self.history(prompt_id) is None
            await asyncio.sleep(WITHDRAWAL_GAP_SECONDS)
        raise AnswerUnreadable(
            f"{self.masked_url} keeps a prompt in its queue that it was told to delete",
            hint="look at that machine's queue; something between here and ComfyUI may answer in its place",
            details={"prompt_id": prompt_id},
        )

    async def _cancel_by_old_routes(self, prompt_id: PromptId, *, by_id: bool, alone: bool) -> bool:
        view = await self.queue()
        if prompt_id in view.pending:
            await self._exchange.ask("POST", "/queue", json={"delete": [prompt_id]})
            view = await self.queue()
            if prompt_id not in view.running:
                return True
        if prompt_id not in view.running:
            return False
        if by_id:
            await self._exchange.ask("POST", "/interrupt", json={"prompt_id": prompt_id})
            return True
        if alone:
            # This server interrupts whatever runs. It is ours alone, and ours runs.
            await self._exchange.ask("POST", "/interrupt", repeat=False, json={})
            return True
        return False

    async def _take_back(self, prompt_id: PromptId) -> None:
        """Remove a prompt that was accepted only in part, wherever it is by now."""
        await self.cancel(prompt_id, alone=False)


def _noticed(task: asyncio.Task[Any]) -> None:
    """Take note of an error that everyone who waited for it was cancelled before hearing of."""
    if not task.cancelled():
        task.exception()
