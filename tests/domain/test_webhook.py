"""When a message to another program is tried again, and when it is given up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.queued import RowId
from runcomfy.domain.webhook import JITTER, LONGEST_WAIT, WAITS, Answer, Delivery, next_wait

AT = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
DOWN = Answer(500, "500")


def test_ten_tries_within_76_hours() -> None:
    waits = [next_wait(tries, DOWN, chance=0.0) for tries in range(1, 11)]
    assert waits == [*WAITS, None]
    assert sum(WAITS, timedelta(0)) == timedelta(hours=75, minutes=35, seconds=5)


def test_the_same_message_has_the_same_id_at_every_try() -> None:
    first = Delivery(12, "https://a.example", RowId(3), "{}", AT, AT)
    later = Delivery(12, "https://a.example", RowId(3), "{}", AT, AT + LONGEST_WAIT, tries=4, last="500")
    assert first.message_id("abc") == later.message_id("abc") == "msg_abc_12"


def test_only_a_2xx_means_that_it_arrived() -> None:
    arrived = [status for status in range(100, 600) if Answer(status, "").arrived]
    assert arrived == list(range(200, 300))
    assert not Answer(None, "no answer").arrived
    assert [status for status in range(100, 600) if Answer(status, "").unwanted] == [410]


def test_a_receiver_says_when_to_come_again_but_not_sooner_than_planned_nor_next_year() -> None:
    def wait(seconds: float, status: int = 429) -> timedelta | None:
        return next_wait(1, Answer(status, "", timedelta(seconds=seconds)), chance=0.0)

    assert wait(60) == timedelta(seconds=60)
    assert wait(60, 503) == timedelta(seconds=60)
    assert wait(1) == WAITS[0]
    assert wait(10**9) == LONGEST_WAIT
    assert wait(60, 500) == WAITS[0], "only 429 and 503 mean it"


@given(st.integers(1, 9), st.floats(0, 1))
def test_waits_are_spread_a_little(tries: int, chance: float) -> None:
    wait = next_wait(tries, DOWN, chance=chance)
    assert wait is not None
    assert WAITS[tries - 1] <= wait <= WAITS[tries - 1] * (1 + JITTER)
