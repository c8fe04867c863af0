"""What waits to be told, held to the same promises by every database of a queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.webhooks import SqlWebhooks
from runcomfy.domain.exceptions import LeaseLost
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import RowId
from runcomfy.domain.webhook import Delivery
from runcomfy.ports.webhooks import WEBHOOKS
from runcomfy.testing.contracts.jobs_words import StoryClock

LEASE = timedelta(seconds=60)
ME = OwnerId("me")
A, B = "https://a.example/hook", "https://b.example/hook"


@pytest.fixture
def clock() -> StoryClock:
    return StoryClock()


@pytest.fixture(params=["file", "postgres"])
async def jobs(request: pytest.FixtureRequest, tmp_path: Path, clock: StoryClock) -> AsyncIterator[SqlJobs]:
    where = tmp_path / "queue.db" if request.param == "file" else request.getfixturevalue("postgres_dsn")
    async with SqlJobs(store_from(where, clock=clock, durable=False, wake_interval=timedelta(seconds=1))) as jobs:
        yield jobs


@pytest.fixture
def book(jobs: SqlJobs) -> SqlWebhooks:
    return SqlWebhooks(jobs)


@pytest.fixture
async def epoch(jobs: SqlJobs) -> int:
    epoch = await jobs.take_role(WEBHOOKS, ME, lease=LEASE)
    assert epoch is not None
    return epoch


def message(jobs: SqlJobs, event: int, url: str = A, *, due_in: timedelta = timedelta(0)) -> Delivery:
    return Delivery(event, url, RowId(7), '{"type": "job.done"}', jobs.now(), jobs.now() + due_in)


async def test_a_new_queue_has_a_name_of_its_own_and_nothing_to_tell(book: SqlWebhooks) -> None:
    name, read_to = await book.read_to()
    assert len(name) == 12
    assert read_to == 0
    assert (await book.read_to())[0] == name
    assert await book.due(limit=10) == []
    assert await book.next_due() is None


async def test_messages_come_with_how_far_the_log_was_read(book: SqlWebhooks, jobs: SqlJobs, epoch: int) -> None:
    one = message(jobs, 3)
    await book.take_in([one, message(jobs, 4, B)], read_to=5, epoch=epoch)
    assert (await book.read_to())[1] == 5
    assert [(found.event, found.url) for found in await book.due(limit=10)] == [(3, A), (4, B)]
    found = (await book.due(limit=1))[0]
    assert (found.body, found.job_id, found.tries, found.last) == (one.body, 7, 0, "")
    assert abs(found.due_at - one.due_at) < timedelta(milliseconds=1)


async def test_a_message_that_is_known_stays_as_it_is(book: SqlWebhooks, jobs: SqlJobs, epoch: int) -> None:
    await book.take_in([message(jobs, 3)], read_to=3, epoch=epoch)
    await book.put_off((await book.due(limit=1))[0], wait=timedelta(hours=1), last="500", epoch=epoch)
    await book.take_in([message(jobs, 3)], read_to=3, epoch=epoch)
    assert await book.due(limit=10) == []


async def test_each_address_gets_its_oldest_message_first(book: SqlWebhooks, jobs: SqlJobs, epoch: int) -> None:
    waits = message(jobs, 2, B, due_in=timedelta(minutes=5))
    await book.take_in([waits, *(message(jobs, event, A) for event in (5, 4, 6))], read_to=6, epoch=epoch)
    await book.take_in([message(jobs, 7, B)], read_to=7, epoch=epoch)
    # What was put off at B holds up nothing that is due there.
    assert [(found.event, found.url) for found in await book.due(limit=10)] == [(4, A), (7, B)]


async def test_a_failed_try_is_counted_and_comes_again_at_its_time(
    book: SqlWebhooks, jobs: SqlJobs, epoch: int, clock: StoryClock
) -> None:
    await book.take_in([message(jobs, 1)], read_to=1, epoch=epoch)
    for tries in range(3):
        found = (await book.due(limit=1))[0]
        assert found.tries == tries
        await book.put_off(found, wait=timedelta(minutes=1), last="503", epoch=epoch)
        assert await book.due(limit=1) == []
        due_at = await book.next_due()
        assert due_at is not None
        assert abs(due_at - jobs.now() - timedelta(minutes=1)) < timedelta(seconds=1)
        clock.jump(timedelta(minutes=1))
    assert (await book.due(limit=1))[0].last == "503"


async def test_what_arrived_or_is_not_wanted_is_forgotten(book: SqlWebhooks, jobs: SqlJobs, epoch: int) -> None:
    await book.take_in([message(jobs, event, url) for event in (1, 2, 3) for url in (A, B)], read_to=3, epoch=epoch)
    await book.end((await book.due(limit=1))[0], epoch=epoch)
    assert [(found.event, found.url) for found in await book.due(limit=10)] == [(1, B), (2, A)]
    assert await book.end_all(B, epoch=epoch) == 3
    assert [found.url for found in await book.due(limit=10)] == [A]


async def test_only_who_has_the_role_writes(book: SqlWebhooks, jobs: SqlJobs, epoch: int) -> None:
    await book.take_in([message(jobs, 1)], read_to=1, epoch=epoch)
    delivery = (await book.due(limit=1))[0]
    await jobs.drop_role(WEBHOOKS, ME)
    assert await jobs.take_role(WEBHOOKS, OwnerId("another"), lease=LEASE) == epoch + 1
    for late in (
        book.take_in([message(jobs, 2)], read_to=2, epoch=epoch),
        book.put_off(delivery, wait=timedelta(0), last="", epoch=epoch),
        book.end(delivery, epoch=epoch),
        book.end_all(A, epoch=epoch),
    ):
        with pytest.raises(LeaseLost):
            await late
    assert (await book.read_to())[1] == 1
    assert await book.due(limit=10) == [delivery]
