"""Other programs are told of the end of jobs: signed, at least once, under one id, and never inside."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from launcher.guarding.addresses import Address
from launcher.guarding.signing import SECRET_FILE, signed, webhook_secret
from launcher.webhooks import TRY_TIMEOUT_S, WEBHOOK_URL, Webhooks
from runcomfy.adapters.log import redact
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.webhooks import SqlWebhooks
from runcomfy.application.role import ROLE_LEASE, Role
from runcomfy.domain.exceptions import CredentialsMalformed, DiskFull
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import Ending, EventKind, Outcome, QueuedJob, Reason
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import HttpSettings
from runcomfy.domain.webhook import WAITS, Delivery
from runcomfy.ports.webhooks import WEBHOOKS
from runcomfy.testing.contracts.jobs_words import DONE, StoryClock, a_job, an_owner, failing, put, take
from runcomfy.testing.programs import EmulatedProcesses

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"


def outside(address: Address) -> bool:
    """Stands in for the list of public addresses: in these stories the internet is 127.0.0.2."""
    return str(address) == OUTSIDE


async def says_outside(host: str, port: int) -> Sequence[str]:
    return [INSIDE if host.startswith("inside") else OUTSIDE]


@dataclass
class Receiver:
    """A program that is told of jobs; it says yes unless told otherwise."""

    port: int = 0
    replies: list[Any] = field(default_factory=list)
    """Status, "never", or (status, headers), one for each message to come."""
    got: list[tuple[float, dict[str, str], bytes]] = field(default_factory=list)
    """When, headers, body."""
    came: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0
    most_at_once: int = 0

    def url(self, host: str = "hooks.example", path: str = "/told") -> str:
        return f"http://{host}:{self.port}{path}"

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for _, headers, _ in self.got]

    @property
    def said(self) -> list[Any]:
        return [json.loads(body) for _, _, body in self.got]

    async def handle(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.got.append((asyncio.get_running_loop().time(), headers, await request.read()))
        self.came.set()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            reply = self.replies.pop(0) if self.replies else 204
            if reply == "never":
                await asyncio.sleep(10_000)
                return web.Response(status=500)
            status, more = reply if isinstance(reply, tuple) else (reply, {})
            await asyncio.sleep(0.1)
            return web.Response(status=status, headers=more)
        finally:
            self.at_once -= 1

    @asynccontextmanager
    async def listening(self, address: str = OUTSIDE) -> AsyncIterator[Receiver]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, address, self.port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            pytest.skip(f"{address} is not on this computer: {error}")  # macOS has 127.0.0.1 only
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()


@pytest.fixture
def clock() -> StoryClock:
    return StoryClock()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().listening() as receiver:
        yield receiver


@pytest.fixture(params=["file", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "queue.db") if request.param == "file" else request.getfixturevalue("postgres_dsn")


@pytest.fixture
async def jobs(database: str, clock: StoryClock) -> AsyncIterator[SqlJobs]:
    async with SqlJobs(store_from(database, clock=clock, durable=False, wake_interval=timedelta(seconds=1))) as jobs:
        yield jobs


@dataclass
class Office:
    """Processes that deliver for one queue."""

    jobs: SqlJobs
    clock: StoryClock
    secret: Secret
    processes: EmulatedProcesses
    http: HttpSettings = field(default_factory=HttpSettings)

    async def webhooks(self, name: str = "alice", jobs: SqlJobs | None = None) -> Webhooks:
        owner, jobs = an_owner(name), jobs or self.jobs
        await jobs.register_owner(owner)
        role = Role(WEBHOOKS, jobs, owner, clock=self.clock, processes=self.processes)
        return Webhooks(
            SqlWebhooks(jobs),
            jobs,
            role,
            self.http,
            lambda: self.secret,
            chance=lambda: 0.0,
            resolve=says_outside,
            public=outside,
        )

    @asynccontextmanager
    async def delivering(self, name: str = "alice") -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task((await self.webhooks(name)).run())
        try:
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture
def office(jobs: SqlJobs, clock: StoryClock, tmp_path: Path) -> Office:
    return Office(jobs, clock, webhook_secret(tmp_path / "state"), EmulatedProcesses())


async def ended(jobs: SqlJobs, url: str | None, ending: Ending = DONE, **fields: Any) -> QueuedJob:
    """Put a job in that tells an address, and bring it to its end."""
    metadata = {} if url is None else {WEBHOOK_URL: url}
    (job,) = await put(jobs, a_job(metadata=metadata, **fields))
    taken = await take(jobs, only=job.id)
    return await jobs.finish(job.id, taken.token, ending)


async def waits_for(receiver: Receiver, count: int, *, longest: float = 30.0) -> None:
    async with asyncio.timeout(longest):
        while len(receiver.got) < count:
            receiver.came.clear()
            await receiver.came.wait()


async def later(clock: StoryClock, by: timedelta) -> None:
    """Let time pass that nobody counts in seconds."""
    clock.jump(by)
    await asyncio.sleep(30)


async def empty(jobs: SqlJobs) -> bool:
    return await SqlWebhooks(jobs).next_due() is None


# --- what is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (DONE, "job.done"),
        (failing(Outcome.FAILED), "job.failed"),
        (failing(Outcome.QUARANTINED), "job.quarantined"),
    ],
)
@pytest.mark.fault(67)
async def test_the_end_of_a_job_is_told_once_and_signed(
    office: Office, jobs: SqlJobs, receiver: Receiver, ending: Ending, kind: str
) -> None:
    async with office.delivering():
        job = await ended(jobs, receiver.url(), ending)
        await ended(jobs, None)
        await waits_for(receiver, 1)
        await asyncio.sleep(60)
    assert len(receiver.got) == 1
    _, headers, body = receiver.got[0]
    told = json.loads(body)
    assert (told["type"], told["data"]["id"], told["data"]["number"]) == (kind, job.uid, job.id)
    assert told["timestamp"].endswith("Z")
    assert headers["content-type"] == "application/json"
    assert headers["host"].startswith("hooks.example:")
    assert "cookie" not in headers
    assert await empty(jobs)


async def test_cancelling_and_trying_again_are_told_each_by_itself(
    office: Office, jobs: SqlJobs, receiver: Receiver
) -> None:
    async with office.delivering():
        (job,) = await put(jobs, a_job(metadata={WEBHOOK_URL: receiver.url()}))
        await jobs.cancel(job.id)
        await waits_for(receiver, 1)
        await jobs.retry(job.id)
        taken = await take(jobs)
        await jobs.finish(job.id, taken.token, DONE)
        await waits_for(receiver, 2)
    assert [said["type"] for said in receiver.said] == ["job.cancelled", "job.done"]
    assert receiver.said[0]["data"]["reason"] == Reason.CANCELLED
    assert len(set(receiver.ids)) == 2


async def test_what_is_told_holds_no_path_of_this_computer(
    office: Office, jobs: SqlJobs, receiver: Receiver, tmp_path: Path
) -> None:
    ending = Ending(Outcome.DONE, result={"outputs": [{"path": str(tmp_path / "finished" / "a.png")}]})
    async with office.delivering():
        await ended(jobs, receiver.url(), ending, inputs={"3.image": str(tmp_path / "private" / "cat.png")})
        await waits_for(receiver, 1)
    assert str(tmp_path) not in receiver.got[0][2].decode()
    assert "a.png" in receiver.got[0][2].decode()


async def test_text_that_is_no_unicode_is_told_all_the_same(office: Office, jobs: SqlJobs, receiver: Receiver) -> None:
    async with office.delivering():
        await ended(jobs, receiver.url(), inputs={"prompt": "half \ud83d of a face"})
        await waits_for(receiver, 1)
    assert receiver.said[0]["data"]["prompt"] in ("half ? of a face", "half \\ud83d of a face")


async def test_an_address_for_all_jobs_is_told_beside_the_jobs_own(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    await ended(jobs, None)
    clock.jump(timedelta(days=2))  # that one is old by now
    office.http = HttpSettings(webhook_url=receiver.url(path="/all"))
    async with office.delivering():
        job = await ended(jobs, receiver.url(path="/own"))
        await ended(jobs, receiver.url(path="/all"))
        await waits_for(receiver, 3)
        await asyncio.sleep(60)
    assert len(receiver.got) == 3, "one message per address, and nothing of before"
    assert [said["data"]["id"] for said in receiver.said].count(job.uid) == 2


# --- the signature, by somebody else's verification ---------------------------------------------------------


@pytest.mark.fault(67)
async def test_a_receiver_verifies_it_and_notices_every_change(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    clock.follow_the_wall()  # the verification looks at the real time
    async with office.delivering():
        await ended(jobs, receiver.url())
        await waits_for(receiver, 1)
    _, headers, body = receiver.got[0]
    verifier = Webhook(office.secret.reveal())
    told = verifier.verify(body.decode(), headers)
    assert told["type"] == "job.done"
    assert headers["webhook-signature"].startswith("v1,")
    spoiled = [
        (body.replace(b"job.done", b"job.fail"), headers),
        (body, {**headers, "webhook-id": headers["webhook-id"] + "0"}),
        (body, {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}),
        (body, {**headers, "webhook-signature": "v1," + "A" * 43 + "="}),
    ]
    for changed_body, changed in spoiled:
        with pytest.raises(WebhookVerificationError):
            verifier.verify(changed_body.decode(), changed)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(body.decode(), headers)


def test_the_signature_of_the_specifications_example() -> None:
    secret = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", at=1_614_265_330, body=b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.threat("S3")
def test_the_secret_is_made_once_private_and_kept_out_of_the_log(tmp_path: Path) -> None:
    secret = webhook_secret(tmp_path / "state")
    assert secret == webhook_secret(tmp_path / "state")
    assert secret.reveal().startswith("whsec_")
    path = tmp_path / "state" / SECRET_FILE
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret.reveal() not in redact(f"signed with {secret.reveal()}")
    path.write_text("whsec_" + "A" * 30)
    with pytest.raises(CredentialsMalformed, match="unreadable"):
        webhook_secret(tmp_path / "state")


# --- when it does not arrive --------------------------------------------------------------------------------


@pytest.mark.fault(67)
async def test_it_is_tried_again_under_the_same_id_until_it_arrives(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    receiver.replies = [500, "never", 404, (302, {"Location": "http://127.0.0.1:1/"})]
    async with office.delivering():
        await ended(jobs, receiver.url())
        await waits_for(receiver, 2)
        assert receiver.got[1][0] - receiver.got[0][0] == pytest.approx(WAITS[0].total_seconds(), abs=3)
        await asyncio.sleep(TRY_TIMEOUT_S + 5)
        for n, wait in enumerate(WAITS[1:4], start=2):
            await later(clock, wait - timedelta(minutes=1))
            assert len(receiver.got) == n, "not before its time"
            await later(clock, timedelta(minutes=1))
            assert len(receiver.got) == n + 1
        assert await empty(jobs)
    assert len(set(receiver.ids)) == 1
    assert len({body for _, _, body in receiver.got}) == 1
    stamps = [int(headers["webhook-timestamp"]) for _, headers, _ in receiver.got]
    assert stamps == sorted(set(stamps)), "each try has its own time, or a receiver would take it for a replay"


@pytest.mark.fault(67)
async def test_after_ten_tries_it_is_given_up_and_the_log_says_so(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    receiver.replies = [503] * 100
    async with office.delivering():
        job = await ended(jobs, receiver.url())
        for wait in (timedelta(0), *WAITS, timedelta(days=5)):
            await later(clock, wait)
    assert len(receiver.got) == 10
    assert await empty(jobs)
    notes = [event.data for event in await jobs.events(job_id=job.id) if event.kind is EventKind.NOTE]
    assert [(note["webhook"], note["tries"], note["why"]) for note in notes] == [("given up", 10, "503")]


@pytest.mark.fault(67)
async def test_a_receiver_that_asks_for_time_gets_it(office: Office, jobs: SqlJobs, receiver: Receiver) -> None:
    receiver.replies = [(429, {"Retry-After": "120"})]
    async with office.delivering():
        await ended(jobs, receiver.url())
        await waits_for(receiver, 2, longest=300)
    assert receiver.got[1][0] - receiver.got[0][0] == pytest.approx(120, abs=3)


async def test_gone_ends_everything_for_that_address_and_nothing_else(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    receiver.replies = [500, 500, 410]
    async with office.delivering():
        await ended(jobs, receiver.url())
        await waits_for(receiver, 1)
        await ended(jobs, receiver.url())
        await waits_for(receiver, 3, longest=60)
        await later(clock, timedelta(days=5))
        assert len(receiver.got) == 3
        await ended(jobs, receiver.url(path="/other"))
        await waits_for(receiver, 4)


@pytest.mark.fault(67)
async def test_one_that_does_not_answer_holds_up_no_other_and_each_gets_one_at_a_time(
    office: Office, jobs: SqlJobs, receiver: Receiver
) -> None:
    async with Receiver().listening() as silent, office.delivering():
        silent.replies = ["never"] * 100
        for _ in range(5):
            await ended(jobs, silent.url())
        for _ in range(5):
            await ended(jobs, receiver.url())
        began = asyncio.get_running_loop().time()
        await waits_for(receiver, 5)
        assert asyncio.get_running_loop().time() - began < 10
    assert receiver.most_at_once == silent.most_at_once == 1
    assert [said["data"]["number"] for said in receiver.said] == sorted(
        said["data"]["number"] for said in receiver.said
    )


# --- who delivers, and when it dies -------------------------------------------------------------------------


@pytest.mark.fault(67)
async def test_what_was_not_told_when_its_process_died_is_told_under_the_same_id(
    office: Office, jobs: SqlJobs, receiver: Receiver, database: str, clock: StoryClock
) -> None:
    receiver.replies = ["never"]
    alices = SqlJobs(store_from(database, clock=clock, durable=False, wake_interval=timedelta(seconds=1)))
    await alices.open()
    killed = asyncio.create_task((await office.webhooks("alice", alices)).run())
    await ended(jobs, receiver.url())
    await waits_for(receiver, 1)
    await alices.close()  # from here on nothing that alice does has an effect
    killed.cancel()
    await asyncio.gather(killed, return_exceptions=True)
    office.processes.dead.add(OwnerId("alice"))
    await ended(jobs, receiver.url())  # nobody listens
    async with office.delivering("bob"):
        await waits_for(receiver, 3, longest=200)
        await asyncio.sleep(60)
    assert len(receiver.got) == 3
    assert receiver.ids[0] == receiver.ids[1] != receiver.ids[2]
    assert receiver.got[0][2] == receiver.got[1][2]


async def test_of_two_processes_one_delivers(office: Office, jobs: SqlJobs, receiver: Receiver) -> None:
    async with office.delivering("alice"), office.delivering("bob"):
        for _ in range(10):
            await ended(jobs, receiver.url())
        await waits_for(receiver, 10)
        await asyncio.sleep(60)
    assert len(receiver.got) == len(set(receiver.ids)) == 10


async def test_a_process_that_lost_its_role_while_it_slept_notes_nothing(
    office: Office, jobs: SqlJobs, receiver: Receiver
) -> None:
    receiver.replies = [500]
    async with office.delivering("alice"):
        await ended(jobs, receiver.url())
        await waits_for(receiver, 1)
        await jobs.drop_role(WEBHOOKS, OwnerId("alice"))
        assert await jobs.take_role(WEBHOOKS, OwnerId("bob"), lease=ROLE_LEASE) is not None
        await asyncio.sleep(40)
        (left,) = await SqlWebhooks(jobs).due(limit=10)
    assert len(receiver.got) == 1
    assert left.tries == 0


async def test_what_arrived_is_not_sent_again_because_the_disk_is_full(
    office: Office, jobs: SqlJobs, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhooks, end = await office.webhooks(), SqlWebhooks.end
    refused: list[Delivery] = []

    async def full(self: SqlWebhooks, delivery: Delivery, *, epoch: int) -> None:
        if len(refused) < 3:
            refused.append(delivery)
            raise DiskFull("no room")
        await end(self, delivery, epoch=epoch)

    monkeypatch.setattr(SqlWebhooks, "end", full)
    delivering = asyncio.create_task(webhooks.run())
    await ended(jobs, receiver.url())
    await asyncio.sleep(60)
    delivering.cancel()
    await asyncio.gather(delivering, return_exceptions=True)
    assert len(refused) == 3
    assert len(receiver.got) == 1
    assert await empty(jobs)


# --- where it may not go ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://2130706433:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://inside.example:{port}/",
        "file:///etc/passwd",
    ],
)
@pytest.mark.threat("S2")
async def test_a_webhook_cannot_be_aimed_inside(office: Office, jobs: SqlJobs, clock: StoryClock, url: str) -> None:
    async with Receiver().listening(INSIDE) as inside, office.delivering():
        job = await ended(jobs, url.format(port=inside.port))
        await asyncio.sleep(30)
        await later(clock, timedelta(days=4))
        assert inside.got == []
    notes = [event.data for event in await jobs.events(job_id=job.id) if event.kind is EventKind.NOTE]
    assert [note["why"] for note in notes] == ["address-refused"]
    assert await empty(jobs)


async def test_a_name_that_no_resolver_takes_ends_its_own_message_and_no_other(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    """Labels of more than 63 characters, and empty ones, make Python's resolver raise what is no OSError."""
    async with office.delivering() as delivering:
        for name in ("a" * 64 + ".example", "a..example"):
            await ended(jobs, f"http://{name}/told")
        await ended(jobs, receiver.url())
        await waits_for(receiver, 1)
        await later(clock, timedelta(days=4))
        assert not delivering.done()
    assert await empty(jobs)


@pytest.mark.threat("S2")
async def test_a_redirect_is_not_followed_inside(
    office: Office, jobs: SqlJobs, receiver: Receiver, clock: StoryClock
) -> None:
    async with Receiver().listening(INSIDE) as inside, office.delivering():
        receiver.replies = [(307, {"Location": f"http://127.0.0.1:{inside.port}/"})] * 100
        await ended(jobs, receiver.url())
        for wait in (timedelta(0), *WAITS, timedelta(days=5)):
            await later(clock, wait)
        assert inside.got == []
    assert len(receiver.got) == 10


async def test_a_setting_lets_it_go_inside(office: Office, jobs: SqlJobs) -> None:
    office.http = HttpSettings(allow_private=True)
    async with Receiver().listening(INSIDE) as inside, office.delivering():
        await ended(jobs, f"http://127.0.0.1:{inside.port}/")
        await waits_for(inside, 1)
