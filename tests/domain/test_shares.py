"""A machine's bill, shared out over its jobs: to the millionth of a dollar, by one rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId, MachineState, Purpose
from runcomfy.domain.money import LedgerEntry, meter
from runcomfy.domain.shares import Billed, Share, apportion, billed, share
from runcomfy.domain.work import Work

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
MACHINE = MachineId("m-1")
SILENCE = timedelta(seconds=600)
RATE = Decimal(36)
"""A cent per second."""


def at(second: float) -> datetime:
    return NOON + timedelta(seconds=second)


Cents = tuple[str, Decimal | int, Decimal | int]
"""Job, busy cents, idle cents."""


def cents(share: Share) -> Cents:
    return share.job_id or "-", share.busy_usd * 100, share.idle_usd * 100


def job(name: str, began: float, computing: float | None, computed: float | None, ended: float | None) -> Work:
    moments = [None if second is None else at(second) for second in (computing, computed, ended)]
    return Work(MACHINE, JobId(name), 1, "w", "medium", at(began), "", "", moments[0], moments[1], moments[2], "done")


def shared(*works: Work, until: float = 1000) -> list[Cents]:
    """Return the shares of a machine that costs a cent a second from 0 on."""
    piece = Billed(at(0), at(until), meter(at(0), at(until), RATE))
    return [cents(one) for one in share(MACHINE, [piece], works, silence=SILENCE)]


def test_a_job_pays_loading_computing_and_the_tail() -> None:
    assert shared(job("a", 0, 30, 90, 95), until=200) == [("a", 60, 140)]


def test_idle_time_is_shared_by_busy_seconds() -> None:
    assert shared(job("a", 0, 10, 40, 41), job("b", 50, 55, 115, 120), until=180) == [("a", 30, 30), ("b", 60, 60)]


def test_what_lies_beyond_the_silence_after_the_last_job_is_nobodys() -> None:
    assert shared(job("a", 0, 0, 100, 100), until=1000) == [("a", 100, 600), ("-", 0, 300)]


def test_a_silence_cuts_the_time_into_episodes_that_do_not_pay_for_each_other() -> None:
    works = job("a", 0, 0, 100, 100), job("b", 800, 850, 860, 860)
    assert shared(*works, until=900) == [("a", 100, 600), ("b", 10, 90), ("-", 0, 100)]


def test_a_gap_of_just_the_silence_is_none() -> None:
    assert shared(job("a", 0, 0, 100, 100), job("b", 700, 700, 800, 800), until=800) == [
        ("a", 100, 300),
        ("b", 100, 300),
    ]


def test_a_long_wait_for_the_first_job_is_nobodys_but_for_its_end() -> None:
    assert shared(job("a", 700, 700, 800, 800), until=800) == [("a", 100, 600), ("-", 0, 100)]


def test_jobs_that_compute_at_once_pay_equal_parts_of_that_time() -> None:
    # 0-60 a alone, 60-100 both, 100-120 b alone, then 40 s of tail: weights 80 and 40.
    found = shared(job("a", 0, 0, 100, 100), job("b", 50, 60, 120, 120), until=160)
    assert [name for name, _, _ in found] == ["a", "b"]
    assert [busy for _, busy, _ in found] == [80, 40]
    assert sum(idle for _, _, idle in found) == 40
    assert abs(found[0][2] - Decimal(80) / 3) < Decimal("0.0001")


def test_a_job_that_never_computed_pays_nothing_where_others_did() -> None:
    assert shared(job("a", 0, 0, 50, 50), job("b", 50, None, None, 90), until=100) == [("a", 50, 50), ("b", 0, 0)]


def test_where_nobody_computed_the_seats_count() -> None:
    assert shared(job("a", 0, None, None, 30), job("b", 30, None, None, 90), until=90) == [("a", 0, 30), ("b", 0, 60)]
    assert shared(job("a", 10, None, None, 10), job("b", 20, None, None, 20), until=90) == [("a", 0, 45), ("b", 0, 45)]


def test_a_machine_without_jobs_is_nobodys() -> None:
    assert shared() == [("-", 0, 1000)]


def test_a_row_that_was_never_completed_is_idle_unless_it_may_be_there_still() -> None:
    left = job("a", 0, 20, None, None)
    assert shared(left, until=100) == [("a", 0, 100)]
    running = [Billed(at(0), at(100), Decimal(1), so_far=True)]
    assert [cents(one) for one in share(MACHINE, running, [left], silence=SILENCE)] == [("a", 80, 20)]
    again = replace(job("a", 60, 70, 80, 80), attempt=2)
    assert shared(left, again, until=100) == [("a", 10, 90)]
    assert [cents(one) for one in share(MACHINE, running, [left, again], silence=SILENCE)] == [("a", 10, 90)]


def test_a_job_outside_of_what_is_billed_pays_nothing() -> None:
    assert shared(job("a", -50, -40, -10, -5), job("b", 2000, 2000, 2010, 2010), until=100) == [("-", 0, 100)]


def test_time_that_was_not_billed_costs_nobody_anything() -> None:
    pieces = [Billed(at(0), at(100), Decimal(1)), Billed(at(200), at(300), Decimal(3))]
    found = share(MACHINE, pieces, [job("a", 0, 0, 250, 250), job("b", 250, 250, 300, 300)], silence=SILENCE)
    assert [cents(one) for one in found] == [("a", 250, 0), ("b", 150, 0)]
    assert [one.busy.total_seconds() for one in found] == [150, 50]


def test_a_third_of_a_millionth_goes_to_the_first_of_equals() -> None:
    found = share(
        MACHINE,
        [Billed(at(0), at(90), Decimal("0.000100"))],
        [job(name, 30 * number, 30 * number, 30 * number + 30, 30 * number + 30) for number, name in enumerate("abc")],
        silence=SILENCE,
    )
    assert [one.busy_usd for one in found] == [Decimal("0.000034"), Decimal("0.000033"), Decimal("0.000033")]


def test_slots_say_when_the_money_was_spent() -> None:
    piece = Billed(at(0), at(200), Decimal(2))
    found = share(MACHINE, [piece], [job("a", 0, 50, 150, 150)], silence=timedelta(seconds=10), cuts=[at(100), at(155)])
    assert [(one.slot, *cents(one), one.there) for one in found] == [
        (0, "a", 50, 50, True), (1, "a", 50, 5, True), (2, "a", 0, 5, False), (2, "-", 0, 40, False),
    ]  # fmt: skip


def machine(**facts: object) -> Machine:
    base = Machine(
        MACHINE, "runcomfy", "account", Purpose.POOL, "medium", timedelta(minutes=10), RATE, "table", at(-180),
        at(-180), state=MachineState.READY, ready_at=at(0),
    )  # fmt: skip
    return replace(base, **facts)  # type: ignore[arg-type]


def test_a_running_machine_is_billed_up_to_now_beyond_what_its_ledger_has() -> None:
    assert billed(machine(), [], now=at(10)) == [Billed(at(0), at(10), Decimal("0.1"), so_far=True)]
    entry = LedgerEntry(MACHINE, at(0), at(10), RATE, Decimal("0.1"), at(10))
    assert billed(machine(), [entry], now=at(15)) == [
        Billed(at(0), at(10), Decimal("0.1")), Billed(at(10), at(15), Decimal("0.05"), so_far=True),
    ]  # fmt: skip
    gone = machine(state=MachineState.STOPPED, stop_accepted_at=at(10), gone_at=at(20))
    assert billed(gone, [entry], now=at(900)) == [Billed(at(0), at(10), Decimal("0.1"))]
    assert billed(machine(ready_at=None, state=MachineState.NEVER), [], now=at(10)) == []


seconds = st.integers(-500, 3000).map(lambda tenth: tenth / 10)
maybe = st.none() | seconds


@st.composite
def works(draw: st.DrawFn) -> Work:
    name = draw(st.sampled_from("abcdef"))
    row = job(name, draw(seconds), draw(maybe), draw(maybe), draw(maybe))
    return replace(row, attempt=draw(st.integers(0, 3)))


@st.composite
def bills(draw: st.DrawFn) -> list[Billed]:
    amounts = st.decimals(0, 100, places=6, allow_nan=False)
    return [
        Billed(at(draw(seconds)), at(draw(seconds)), draw(amounts)) for _ in range(draw(st.integers(0, 4)))
    ]  # some end before they begin, some overlap


cut_lists = st.lists(seconds, max_size=4, unique=True).map(lambda found: [at(second) for second in sorted(found)])
silences = st.integers(0, 900).map(lambda tenth: timedelta(seconds=tenth / 10))


@given(bills(), st.lists(works(), max_size=8), silences, cut_lists)
def test_the_parts_always_add_up_to_the_bill(
    pieces: list[Billed], rows: list[Work], silence: timedelta, cuts: list[datetime]
) -> None:
    found = share(MACHINE, pieces, rows, silence=silence, cuts=cuts)
    assert sum((one.usd for one in found), Decimal(0)) == sum((piece.usd for piece in pieces), Decimal(0))
    assert all(one.busy_usd >= 0 and one.idle_usd >= 0 and one.busy >= timedelta(0) for one in found)
    assert {one.job_id for one in found} <= {row.job_id for row in rows} | {None}
    assert len({(one.job_id, one.slot) for one in found}) == len(found)
    assert found == share(MACHINE, pieces, list(reversed(rows)), silence=silence, cuts=cuts)


@given(st.lists(works(), max_size=8), silences, cut_lists)
def test_cuts_move_nothing_by_more_than_rounding(rows: list[Work], silence: timedelta, cuts: list[datetime]) -> None:
    piece = Billed(at(0), at(200), Decimal("1.234567"))
    whole = share(MACHINE, [piece], rows, silence=silence)
    parts = share(MACHINE, [piece], rows, silence=silence, cuts=cuts)
    for one in whole:
        mine = [part for part in parts if part.job_id == one.job_id]
        slack = Decimal("0.000001") * (len(mine) + 1)
        assert abs(sum((part.busy_usd for part in mine), Decimal(0)) - one.busy_usd) <= slack
        assert abs(sum((part.idle_usd for part in mine), Decimal(0)) - one.idle_usd) <= slack


@given(st.lists(works(), max_size=8), silences)
def test_busy_time_is_never_longer_than_what_is_billed(rows: list[Work], silence: timedelta) -> None:
    found = share(MACHINE, [Billed(at(0), at(200), Decimal(2))], rows, silence=silence)
    computed = sum((one.busy for one in found), timedelta(0))
    assert computed <= timedelta(seconds=200, microseconds=len(found))
    assert abs(sum(one.busy_usd for one in found) - Decimal(str(computed.total_seconds())) / 100) < Decimal("0.00001")


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9), st.integers(1, 10**9))
def test_apportioned_parts_are_within_a_unit_of_what_they_round(weights: Sequence[int], micros: int) -> None:
    whole = sum(weights) or 1
    parts = [Fraction(micros, 10**6) * weight / whole for weight in weights]
    if not sum(weights):
        parts[0] = Fraction(micros, 10**6)
    total = Decimal(micros).scaleb(-6)
    amounts = apportion(parts, total)
    assert sum(amounts) == total
    for amount, part in zip(amounts, parts, strict=True):
        assert abs(Fraction(amount) - part) < Fraction(1, 10**6)
