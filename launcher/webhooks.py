"""
Tells other programs of the end of jobs, as Standard Webhooks.

What is to be told is read from the queue's event log and written down before it is sent, so a crash loses nothing; a
message that was sent when the process died is sent again under the same id (at least once). One process of a database
delivers at a time. An address gets one message at a time, oldest first; one that does not answer holds up no other.

Addresses are chosen by clients, so they are reached like everything a client names: only if they are public.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import aiohttp

from launcher.guarding.addresses import (
    IsPublic,
    Resolve,
    check_webhook_url,
    checked_url,
    is_public,
    outbound_session,
)
from launcher.guarding.signing import SECRET_FILE, signed, webhook_secret
from launcher.plain_json import plain_json
from launcher.views import iso, job_view
from runcomfy.adapters.stores.webhooks import SqlWebhooks
from runcomfy.application.faultpoints import entered
from runcomfy.application.role import Role
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import AddressRefused, ConfigurationError, LeaseLost, LocalError, foreign_text
from runcomfy.domain.queued import EventKind, JobEvent, QueuedJob
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import HttpSettings
from runcomfy.domain.webhook import TYPES, Answer, Delivery, next_wait
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.webhooks import WEBHOOKS, WebhookBook

__all__ = ["WEBHOOK_URL", "Webhooks", "check_webhook_url"]

log = logging.getLogger("runcomfy.webhooks")

WEBHOOK_URL: Final = "webhook_url"
"""The name in a job's metadata."""
TRY_TIMEOUT_S: Final = 20.0
"""Of one try; a receiver that needs longer should say yes first and work then."""
AT_ONCE: Final = 8
"""Messages under way at the same time, each to another address."""
POLL_S: Final = 2.0
STANDBY_S: Final = 15.0
"""Between two looks whether the role is free."""
TROUBLE_S: Final = 5.0
"""After the database refused."""
_PAGE: Final = 500
TOO_OLD: Final = timedelta(days=1)
"""What ended before is not told to the address for all jobs: it was probably set only now."""


class Webhooks:
    """Delivers what must be told. `async with asyncio.TaskGroup() as group: group.create_task(webhooks.run())`."""

    def __init__(
        self,
        book: WebhookBook,
        jobs: JobStore,
        role: Role,
        http: HttpSettings,
        secret: Callable[[], Secret],
        *,
        view: Callable[[QueuedJob], Mapping[str, Any]] = job_view,
        chance: Callable[[], float] = random.random,
        resolve: Resolve | None = None,
        public: IsPublic = is_public,
    ) -> None:
        """`secret` is asked for in a thread, when something is to be sent; `view` makes what is told of a job.

        `resolve` and `public` stand in for the system's resolver and the list of public addresses.
        """
        self._book, self._jobs, self._role = book, jobs, role
        self._http, self._secret, self._view, self._chance = http, secret, view, chance
        self._resolve, self._public = resolve, public
        self._group: asyncio.TaskGroup | None = None
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._lost = False
        """Whether a write was fenced off: somebody else delivers, whatever we believe."""

    @classmethod
    async def open(cls, app: App, **options: Any) -> Webhooks:
        """Return what delivers for the queue of an app. Raises LocalError, CredentialsMalformed (of the secret)."""
        jobs = await app.job_store()
        me = app.processes.me(now=jobs.now())
        await jobs.register_owner(me)
        role = Role(WEBHOOKS, jobs, me, clock=app.clock, processes=app.processes)
        state_dir = app.settings.files.state_dir
        secret = lambda: entered(webhook_secret, "webhooks.secret")(state_dir)  # noqa: E731 - asked for in a thread
        if await asyncio.to_thread(
            (Path(state_dir) / SECRET_FILE).exists
        ):  # what is wrong with it is said at the start
            await asyncio.to_thread(webhook_secret, state_dir)
        book = entered(SqlWebhooks(jobs), "webhooks")
        return cls(book, jobs, role, app.settings.http, secret, **options)

    async def queue_name(self) -> str:
        """Return what the queue's database calls itself; another name is another queue. Raises LocalError."""
        return (await self._book.read_to())[0]

    async def run(self) -> None:
        """Deliver while this process has the role, wait for it meanwhile; until cancelled."""
        try:
            while True:
                if await self._role.take_softly():
                    await self._term()
                else:
                    await asyncio.sleep(STANDBY_S)
        finally:
            await self._role.drop()
            with suppress(LocalError):
                await self._jobs.sign_off(self._role.owner.id)

    async def _term(self) -> None:
        """Deliver until the role is lost."""
        self._under_way.clear()  # what was ended before it had begun has not taken itself out
        async with asyncio.TaskGroup() as group:
            self._group = group
            keeping = group.create_task(self._role.keep())
            await self._work()
            for task in (keeping, *self._under_way.values()):
                task.cancel()

    async def _work(self) -> None:
        mark, self._lost = 0, False
        while self._role.holds() and not self._lost:
            try:
                more = await self._take_in()
                await self._start()
                wait = timedelta(0) if more else await self._pause()
            except LeaseLost:
                return
            except LocalError as error:
                log.warning("webhooks_wait", extra={"fields": {"error": error.code}})
                await asyncio.sleep(TROUBLE_S)
                continue
            if not more:
                mark = await self._wait(wait, mark)

    async def _wait(self, wait: timedelta, mark: int) -> int:
        """Return when something may have ended, was sent, or is due."""
        changed = asyncio.create_task(self._jobs.changed(timeout=wait, seen=mark))
        woken = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait((changed, woken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (changed, woken):
                task.cancel()
            found, _ = await asyncio.gather(changed, woken, return_exceptions=True)
            self._woken.clear()
        return found if isinstance(found, int) else mark

    async def _pause(self) -> timedelta:
        due_at, wait = await self._book.next_due(), timedelta(seconds=POLL_S)
        if due_at is None or self._under_way:  # what waits behind one that is under way is woken by its end
            return wait
        return min(wait, max(timedelta(milliseconds=10), due_at - self._jobs.now()))

    # --- what is to be told -------------------------------------------------------------------------------

    async def _take_in(self) -> bool:
        """Write down what ended since the last look; return whether there may be more."""
        _, read_to = await self._book.read_to()
        events = await self._jobs.events(after=read_to, limit=_PAGE)
        if not events:
            return False
        ends = [(event, event.job_id) for event in events if event.kind in TYPES and event.job_id is not None]
        jobs = await self._jobs.jobs_with({job_id for _, job_id in ends})
        deliveries = [
            self._message(event, jobs[job_id], url)
            for event, job_id in ends
            if job_id in jobs
            for url in self._addresses(event, jobs[job_id])
        ]
        await self._book.take_in(deliveries, read_to=events[-1].number, epoch=self._epoch())
        return len(events) == _PAGE

    def _addresses(self, event: JobEvent, job: QueuedJob) -> list[str]:
        own = job.metadata.get(WEBHOOK_URL)
        urls = [own] if isinstance(own, str) and own else []
        everybodys = self._http.webhook_url
        if everybodys is not None and self._jobs.now() - event.at < TOO_OLD:
            urls.append(everybodys)
        return list(dict.fromkeys(urls))

    def _message(self, event: JobEvent, job: QueuedJob, url: str) -> Delivery:
        said = {"type": TYPES[event.kind], "timestamp": iso(event.at), "data": self._view(job)}
        now = self._jobs.now()
        return Delivery(event.number, url, job.id, plain_json(said).decode(), now, now)

    # --- telling it ---------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Send what is due, to addresses that nothing is being sent to."""
        for delivery in await self._book.due(limit=AT_ONCE * 4):
            if len(self._under_way) >= AT_ONCE or self._group is None:
                return
            if delivery.url not in self._under_way:
                self._under_way[delivery.url] = self._group.create_task(self._deliver(delivery))

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            answer = await entered(self._send, "webhooks.send")(delivery)
            while True:
                try:
                    await self._settle(delivery, answer)
                    return
                except LeaseLost:  # we slept: whoever delivers now sends it again, under the same id
                    self._lost = True
                    return
                except LocalError as error:  # it was sent and need not be sent again, if only this can be noted
                    fields = {"event": delivery.event, "error": error.code}
                    log.warning("webhook_not_noted", extra={"fields": fields})
                    await asyncio.sleep(TROUBLE_S)
        finally:
            self._under_way.pop(delivery.url, None)
            self._woken.set()

    async def _send(self, delivery: Delivery) -> Answer | AddressRefused:
        try:
            queue, _ = await self._book.read_to()
            secret = await asyncio.to_thread(self._secret)
        except (LocalError, ConfigurationError) as error:
            return Answer(None, error.code)
        body = delivery.body.encode()
        at = int(self._jobs.now().timestamp())
        headers = {"Content-Type": "application/json", **signed(secret, delivery.message_id(queue), at=at, body=body)}
        private = self._http.allow_private
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=TRY_TIMEOUT_S)
        session = outbound_session(allow_private=private, timeout=limits, resolve=self._resolve, public=self._public)
        try:
            target = checked_url(delivery.url, allow_private=private, public=self._public)
            async with (
                session,
                asyncio.timeout(TRY_TIMEOUT_S),
                # Its body is not read: nothing in it is for us.
                session.post(target, data=body, headers=headers, allow_redirects=False) as response,
            ):
                return Answer(response.status, str(response.status), _retry_after(response))
        except AddressRefused as error:
            return error
        except TimeoutError:
            return Answer(None, "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(None, f"not reached ({type(error).__name__})")
        finally:
            await session.close()

    async def _settle(self, delivery: Delivery, answer: Answer | AddressRefused) -> None:
        if isinstance(answer, AddressRefused):
            await self._give_up(delivery, answer.code)
            return
        fields = {"event": delivery.event, "job": delivery.job_id, "tries": delivery.tries + 1, "answer": answer.words}
        if answer.arrived:
            await self._book.end(delivery, epoch=self._epoch())
            log.info("webhook_delivered", extra={"fields": fields})
            return
        if answer.unwanted:
            count = await self._book.end_all(delivery.url, epoch=self._epoch())
            log.warning("webhook_unwanted", extra={"fields": {**fields, "dropped": count}})
            return
        wait = next_wait(delivery.tries + 1, answer, chance=self._chance())
        if wait is None:
            await self._give_up(delivery, answer.words)
            return
        await self._book.put_off(delivery, wait=wait, last=foreign_text(answer.words, 80), epoch=self._epoch())
        log.info("webhook_put_off", extra={"fields": {**fields, "wait": wait}})

    async def _give_up(self, delivery: Delivery, words: str) -> None:
        said = {"webhook": "given up", "event": delivery.event, "tries": delivery.tries + 1, "why": words}
        with suppress(LeaseLost):
            await self._jobs.note(EventKind.NOTE, job_id=delivery.job_id, data=said, by=WEBHOOKS)
        await self._book.end(delivery, epoch=self._epoch())
        log.warning("webhook_given_up", extra={"fields": {"job": delivery.job_id, **said}})

    def _epoch(self) -> int:
        """Return the hold on the role, for the fence. Raises LeaseLost."""
        epoch = self._role.epoch
        if epoch is None:
            raise LeaseLost("another process delivers webhooks by now", hint="nothing to do")
        return epoch


def _retry_after(response: aiohttp.ClientResponse) -> timedelta | None:
    text = response.headers.get("Retry-After", "")
    return timedelta(seconds=int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else None
