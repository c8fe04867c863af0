"""Caps on spending: what counts, in which window, against whom; and that what was allowed once stays within its cap."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runcomfy.domain.budget import (
    STARTS_WITHIN,
    Budget,
    Busy,
    Charge,
    Period,
    Window,
    busy_of,
    charge_of,
    committed,
    exceeded,
    made_out,
    refusal,
    stints_of,
)
from runcomfy.domain.exceptions import BudgetExceeded
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, MachineState, Purpose
from runcomfy.domain.money import billed_interval, meter
from runcomfy.domain.work import Work

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SIX = Decimal(6)
"""USD per hour: ten cents a minute."""


def a_machine(name: str = "m", *, at: datetime = NOON, lease: timedelta = 10 * MINUTE, **fields: Any) -> Machine:
    words: dict[str, Any] = {"usd_per_hour": SIX, "requested_at": at, "since": at, "run_id": "r"}
    return Machine(
        MachineId(name), "p", "a", Purpose.POOL, "medium", lease, rate_source="a test", **{**words, **fields}
    )


def ready(name: str = "m", *, at: datetime = NOON, lease: timedelta = 10 * MINUTE, **fields: Any) -> Machine:
    """A machine that is billed since `at`."""
    state = fields.pop("state", MachineState.READY)
    return a_machine(name, at=at, lease=lease, ready_at=at, planned_stop_at=at + lease, state=state, **fields)


def charges(machines: Collection[Machine], *, now: datetime) -> list[Charge]:
    return [charge for machine in machines if (charge := charge_of(machine, now=now)) is not None]


def spent(
    budget: Budget,
    machines: Collection[Machine],
    *,
    now: datetime,
    at: datetime | None = None,
    busy: Busy | None = None,
) -> Decimal:
    """Committed spend in the window of `at`, or of now."""
    return committed(budget, budget.window(at or now), charges(machines, now=now), busy or {}, run_id="r")


def ask(
    budgets: Collection[Budget], machines: Collection[Machine], candidate: Machine, *, now: datetime = NOON
) -> BudgetExceeded | None:
    error, _ = refusal(budgets, charges(machines, now=now), {}, candidate, now=now)
    return error


def usd(text: str) -> Decimal:
    return Decimal(text)


DAILY = Budget(Period.DAY, usd("1"))

# -- windows ---------------------------------------------------------------------------------------------------


@given(st.timedeltas(-9999 * DAY, 9999 * DAY).map(lambda span: NOON + span), st.sampled_from(Period))
def test_windows_are_without_gap_and_the_moment_is_in_its_own(at: datetime, period: Period) -> None:
    window = Budget(period).window(at)
    if period is Period.RUN:
        assert window == Window(None, None)
        return
    assert window.start is not None
    assert window.end is not None
    assert window.start <= at < window.end
    assert Budget(period).window(window.start) == window
    following = Budget(period).window(window.end)
    assert following.start == window.end
    assert Budget(period).window(window.end - timedelta(microseconds=1)) == window


def test_a_month_is_a_calendar_month() -> None:
    window = Budget(Period.MONTH).window(datetime(2024, 2, 29, 23, 59, tzinfo=UTC))
    assert window == Window(datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC))
    december = Budget(Period.MONTH).window(datetime(2026, 12, 31, tzinfo=UTC))
    assert december.end == datetime(2027, 1, 1, tzinfo=UTC)


def test_the_windows_of_a_lease_are_those_it_reaches_into() -> None:
    hourly = Budget(Period.HOUR)
    assert len(list(hourly.windows(NOON, NOON))) == 1
    assert len(list(hourly.windows(NOON, NOON + HOUR))) == 1
    assert len(list(hourly.windows(NOON, NOON + HOUR + timedelta(microseconds=1)))) == 2
    assert len(list(hourly.windows(NOON, NOON + 400 * DAY))) < 1000


# -- what counts -----------------------------------------------------------------------------------------------


def test_a_machine_that_is_paid_ahead_has_spent_its_lease() -> None:
    assert spent(DAILY, [ready()], now=NOON + MINUTE) == usd("1.00")
    assert spent(DAILY, [ready()], now=NOON + 10 * MINUTE) == usd("1.00")


def test_an_intent_counts_with_its_whole_lease() -> None:
    assert spent(DAILY, [a_machine()], now=NOON + 30 * MINUTE) == usd("1.00")


def test_a_longer_time_counts_as_soon_as_it_is_asked_for() -> None:
    asked = replace(ready(), asked_duration=20 * MINUTE)
    assert spent(DAILY, [asked], now=NOON + MINUTE) == usd("2.00")
    assert spent(DAILY, [replace(asked, asked_duration=None)], now=NOON + MINUTE) == usd("1.00")
    assert spent(DAILY, [replace(asked, asked_duration=5 * MINUTE)], now=NOON + MINUTE) == usd("1.00")


def test_what_the_provider_plans_counts_if_it_is_later() -> None:
    assert spent(DAILY, [replace(ready(), planned_stop_at=NOON + 15 * MINUTE)], now=NOON) == usd("1.50")


def test_a_machine_beyond_its_lease_counts_until_now() -> None:
    assert spent(DAILY, [ready()], now=NOON + 25 * MINUTE) == usd("2.50")


def test_a_stop_counts_only_when_the_provider_said_yes() -> None:
    stopping = ready().on(MachineEvent.STOP_ASKED, at=NOON + MINUTE)
    assert spent(DAILY, [stopping], now=NOON + 2 * MINUTE) == usd("1.00")
    accepted = replace(stopping, stop_accepted_at=NOON + 2 * MINUTE)
    assert spent(DAILY, [accepted], now=NOON + 5 * MINUTE) == usd("0.20")


def test_a_machine_nobody_hears_from_counts_like_any_other() -> None:
    lost = ready().on(MachineEvent.SILENT, at=NOON + MINUTE)
    assert spent(DAILY, [lost], now=NOON + 2 * MINUTE) == usd("1.00")


def test_what_came_back_after_it_was_gone_counts_again() -> None:
    gone = ready().on(MachineEvent.GONE, at=NOON + 3 * MINUTE)
    assert spent(DAILY, [gone], now=NOON + 5 * MINUTE) == usd("0.30")
    back = gone.on(MachineEvent.LISTED, at=NOON + 6 * MINUTE)
    assert spent(DAILY, [back], now=NOON + 6 * MINUTE) == usd("1.00")


@pytest.mark.parametrize(
    "events", [[MachineEvent.REFUSED], [MachineEvent.LISTED, MachineEvent.GONE]], ids=["refused", "gone before ready"]
)
def test_what_was_never_ready_and_is_over_costs_nothing(events: Sequence[MachineEvent]) -> None:
    machine = a_machine()
    for event in events:
        machine = machine.on(event, at=NOON)
    assert spent(DAILY, [machine], now=NOON + MINUTE) == 0


def test_each_window_counts_its_part() -> None:
    eve = NOON.replace(hour=23, minute=55)
    machine = ready(at=eve)
    assert spent(DAILY, [machine], now=eve) == usd("0.50")
    assert spent(DAILY, [machine], now=eve, at=eve + HOUR) == usd("0.50")
    assert spent(DAILY, [machine], now=eve, at=eve + DAY + HOUR) == 0
    assert spent(Budget(Period.MONTH), [machine], now=eve) == usd("1.00")


def test_a_machine_that_is_not_ready_counts_with_the_most_it_may_cost_in_each_window() -> None:
    """It may become ready at once, or at midnight: five minutes of today at most, or ten of tomorrow."""
    eve = NOON.replace(hour=23, minute=55)
    machine = a_machine(at=eve)
    assert spent(DAILY, [machine], now=eve) == usd("0.50")
    assert spent(DAILY, [machine], now=eve, at=eve + HOUR) == usd("1.00")
    assert spent(DAILY, [machine], now=eve + 4 * MINUTE) == usd("0.10")


def test_a_budget_per_run_counts_what_has_its_name() -> None:
    per_run = Budget(Period.RUN, usd("1"))
    old = ready("old", at=NOON - 300 * DAY).on(MachineEvent.GONE, at=NOON - 300 * DAY + 5 * MINUTE)
    others = [replace(ready(name), run_id=run) for name, run in (("a", "other"), ("b", ""))]
    assert spent(per_run, [old, *others], now=NOON) == usd("0.50")
    nameless = committed(per_run, per_run.window(NOON), charges([old, *others], now=NOON), {}, run_id="")
    assert nameless == 0


def test_machines_without_a_run_do_not_add_up_to_one() -> None:
    per_run = Budget(Period.RUN, usd("1"))
    others = [replace(ready(f"{n}"), run_id="") for n in range(5)]
    assert ask([per_run], others, replace(a_machine("new"), run_id="")) is None
    assert ask([per_run], others, replace(a_machine("new", lease=11 * MINUTE), run_id="")) is not None


# -- whose -----------------------------------------------------------------------------------------------------


def work(machine: Machine, user: str, start: int, end: int | None, **fields: Any) -> Work:
    """A job that computed from minute `start` to minute `end`."""
    began = NOON + start * MINUTE
    done = None if end is None else NOON + end * MINUTE
    words: dict[str, Any] = {"computing_at": began, "computed_at": done, "ended_at": done, **fields}
    return Work(machine.id, JobId(f"{user}{start}"), 1, "w", "medium", began, user=user, **words)


def busy(machines: Collection[Machine], works: Collection[Work], *, now: datetime) -> Busy:
    return busy_of(stints_of(works), charges(machines, now=now), now=now)


def test_a_machine_that_served_two_counts_by_their_busy_seconds() -> None:
    machine, now = ready(), NOON + 6 * MINUTE
    done = busy([machine], [work(machine, "ann", 0, 3), work(machine, "bob", 3, 4)], now=now)
    shares = {name: spent(Budget(Period.DAY, user=name), [machine], now=now, busy=done) for name in ("ann", "bob", "")}
    assert shares == {"ann": usd("0.75"), "bob": usd("0.25"), "": 0}


def test_one_that_served_nobody_counts_for_whom_it_was_launched() -> None:
    machine = ready(for_user="ann", for_project="x")
    assert spent(Budget(Period.DAY, user="ann"), [machine], now=NOON) == usd("1.00")
    assert spent(Budget(Period.DAY, user="ann", project="x"), [machine], now=NOON) == usd("1.00")
    assert spent(Budget(Period.DAY, user="bob"), [machine], now=NOON) == 0
    waiting = busy([machine], [replace(work(machine, "bob", 0, None), computing_at=None)], now=NOON)
    assert spent(Budget(Period.DAY, user="bob"), [machine], now=NOON, busy=waiting) == 0


def test_a_job_whose_process_died_stops_counting_with_its_machine() -> None:
    machine = ready().on(MachineEvent.GONE, at=NOON + 4 * MINUTE)
    works = [work(machine, "ann", 0, 3), work(machine, "bob", 3, None)]
    soon = busy([machine], works, now=NOON + 4 * MINUTE)
    assert soon[machine.id] == {("", "ann"): 3 * MINUTE, ("", "bob"): MINUTE}
    assert busy([machine], works, now=NOON + 30 * DAY) == soon


def test_work_on_machines_that_do_not_count_is_passed_over() -> None:
    machine, other = ready(), ready("other")
    assert busy([machine], [work(other, "ann", 0, 3)], now=NOON + HOUR) == {}
    assert busy([machine], [work(machine, "ann", 3, 1)], now=NOON + HOUR) == {}  # a clock that was set back


def test_star_is_everybody_who_is_not_named() -> None:
    budgets = [
        Budget(Period.DAY, usd("9")),
        Budget(Period.DAY, usd("2"), user="ann"),
        Budget(Period.DAY, usd("1"), user="*"),
        Budget(Period.MONTH, usd("5"), project="*"),
    ]
    ann = made_out(budgets, project="", user="ann")
    assert ann == budgets[:2]
    bob = made_out(budgets, project="x", user="bob")
    assert bob == [budgets[0], replace(budgets[2], user="bob"), replace(budgets[3], project="x")]
    assert made_out(budgets, project="", user="") == budgets[:1]


def test_nobody_gets_round_a_budget_by_being_called_star() -> None:
    starred = Budget(Period.DAY, usd("1"), user="*")
    assert made_out([starred], project="", user="*") == [starred]


def test_a_budget_of_a_user_in_a_project_is_only_theirs() -> None:
    both = Budget(Period.DAY, usd("1"), project="x", user="ann")
    assert made_out([both], project="x", user="ann") == [both]
    assert made_out([both], project="x", user="bob") == []
    assert made_out([both], project="y", user="ann") == []
    mixed = Budget(Period.DAY, usd("1"), project="*", user="ann")
    assert made_out([mixed], project="x", user="ann") == [both]


# -- saying no -------------------------------------------------------------------------------------------------


def test_the_last_dollar_is_spent_and_not_one_cent_more() -> None:
    budget = Budget(Period.DAY, usd("2.00"))
    assert ask([budget], [ready("one")], a_machine("two")) is None
    assert ask([budget], [ready("one")], a_machine("two", lease=10 * MINUTE + timedelta(seconds=1))) is not None


def test_a_refusal_tells_the_figures_and_when_it_resets() -> None:
    error = ask([Budget(Period.DAY, usd("1.50"))], [ready("one")], a_machine("two"))
    assert error is not None
    assert "budget per day is $1.50" in error.message
    assert "$1.00 is spent" in error.message
    assert "$1.00 more" in error.message
    assert "2026-03-30 00:00 UTC" in error.hint
    assert error.details["committed_usd"] == "1.000000"
    run = exceeded(refused_state(Budget(Period.RUN, usd("1"))), wanted=usd("2"))
    assert "does not reset" in run.hint


def refused_state(budget: Budget) -> Any:
    _, states = refusal([replace(budget, hard=None)], [], {}, a_machine(), now=NOON)
    return replace(states[0], budget=budget)


def test_the_window_a_lease_reaches_into_may_refuse() -> None:
    eve = NOON.replace(hour=23, minute=55)
    tomorrow = [ready(f"{n}", at=eve, lease=65 * MINUTE) for n in range(2)]
    budget = Budget(Period.DAY, usd("12.30"))
    assert ask([budget], tomorrow, ready("new", at=eve, lease=6 * MINUTE), now=eve) is None
    error = ask([budget], tomorrow, ready("new", at=eve, lease=20 * MINUTE), now=eve)
    assert error is not None
    assert error.details["resets_at"] == "2026-03-31T00:00:00+00:00"


def test_a_start_that_drags_on_is_checked_where_it_may_end_up() -> None:
    eve = NOON.replace(hour=23, minute=30)
    other = ready("other", at=eve, lease=DAY)
    budget = Budget(Period.DAY, usd("141.50"))
    assert eve + STARTS_WITHIN > NOON.replace(hour=0) + DAY
    error = ask([budget], [other], a_machine("new", at=eve), now=eve)
    assert error is not None
    assert error.details["resets_at"] == "2026-03-31T00:00:00+00:00"


def test_what_adds_nothing_is_not_refused_above_a_cap_that_was_lowered() -> None:
    budget = Budget(Period.DAY, usd("0.50"))
    machine = ready()
    assert ask([budget], [machine], replace(machine, asked_duration=10 * MINUTE), now=NOON + MINUTE) is None
    error = ask([budget], [machine], replace(machine, asked_duration=11 * MINUTE), now=NOON + MINUTE)
    assert error is not None
    assert error.details["wanted_usd"] == "0.100000"
    assert error.details["committed_usd"] == "1.000000"


def test_a_soft_budget_says_and_does_not_refuse() -> None:
    soft = Budget(Period.DAY, None, usd("0.10"))
    error, states = refusal([soft], [], {}, a_machine(), now=NOON)
    assert error is None
    assert [(state.committed, state.left) for state in states] == [(usd("1"), None)]
    assert soft.alerts_at == usd("0.10")
    assert Budget(Period.DAY, usd("10")).alerts_at == usd("8.0")


def test_budgets_of_others_do_not_refuse() -> None:
    full = Budget(Period.DAY, usd("0.50"), user="bob")
    assert ask([full], [ready("his", for_user="bob")], a_machine("hers", for_user="ann")) is None
    assert ask([full], [ready("his", for_user="bob")], a_machine("new", for_user="bob")) is not None


# -- whatever happens ------------------------------------------------------------------------------------------


@dataclass
class Books:
    """An account whose provider keeps its word: no machine is billed beyond the lease that was confirmed."""

    budgets: list[Budget]
    now: datetime
    machines: dict[MachineId, Machine] = field(default_factory=dict)
    refused: int = 0

    def step(self, kind: str, number: int, span: timedelta) -> None:
        if kind == "launch":
            price = [usd("0.99"), usd("1.75"), usd("6.1234567")][number % 3]
            new = a_machine(f"{len(self.machines)}", at=self.now, lease=span, usd_per_hour=price)
            self._try(new)
        elif kind == "pass":
            self._pass(span)
        elif machines := [m for m in self.machines.values() if m.is_open]:
            self._touch(machines[number % len(machines)], kind, span)

    def _try(self, machine: Machine) -> bool:
        error, states = refusal(self.budgets, charges(self.machines.values(), now=self.now), {}, machine, now=self.now)
        if error is None:
            self.machines[machine.id] = machine
            assert all(state.budget.hard is None or state.committed <= state.budget.hard for state in states)
        else:
            self.refused += 1
        return error is None

    def _touch(self, machine: Machine, kind: str, span: timedelta) -> None:
        if kind == "start" and machine.ready_at is None:
            state = MachineState.READY if machine.state is not MachineState.STOPPING else machine.state
            stop = self.now + machine.duration
            machine = replace(machine, state=state, ready_at=self.now, planned_stop_at=stop)
        elif kind == "refuse" and machine.state is MachineState.REQUESTED:
            machine = machine.on(MachineEvent.REFUSED, at=self.now)
        elif kind == "extend" and machine.ready_at is not None and machine.stop_accepted_at is None:
            longer = replace(machine, asked_duration=machine.duration + span)
            if self._try(longer):
                machine = longer
        elif kind == "confirm" and machine.asked_duration is not None and machine.ready_at is not None:
            asked = machine.asked_duration
            stop = machine.ready_at + asked
            machine = replace(machine, duration=asked, asked_duration=None, planned_stop_at=stop)
        elif kind == "forget":
            machine = replace(machine, asked_duration=None)
        elif kind == "silence" and machine.state is MachineState.READY:
            machine = machine.on(MachineEvent.SILENT, at=self.now)
        elif kind == "stop" and machine.state is not MachineState.REQUESTED:
            machine = machine.on(MachineEvent.STOP_ASKED, at=self.now)
        elif kind == "yes" and machine.state is MachineState.STOPPING and machine.stop_accepted_at is None:
            machine = replace(machine, stop_accepted_at=self.now)
        elif kind == "gone" and machine.state not in (MachineState.REQUESTED, MachineState.BOOTING):
            machine = machine.on(MachineEvent.GONE, at=self.now)
        self.machines[machine.id] = machine

    def _pass(self, span: timedelta) -> None:
        """Let time pass; leases run out in it, and starts that take too long are given up."""
        until = self.now + span
        for key, machine in self.machines.items():
            if not machine.is_open:
                continue
            if machine.ready_at is None:
                if machine.requested_at + STARTS_WITHIN < until:
                    self.machines[key] = replace(machine, state=MachineState.NEVER)
            elif machine.planned_stop_at is not None and machine.planned_stop_at <= until:
                self.machines[key] = machine.on(MachineEvent.GONE, at=machine.planned_stop_at)
        self.now = until

    def billed(self, window: Window) -> Decimal:
        """What the provider's bill says of a window."""
        total = Decimal(0)
        for machine in self.machines.values():
            interval = billed_interval(machine, now=self.now)
            if interval is None or machine.state is MachineState.NEVER:
                continue
            start = interval[0] if window.start is None else max(interval[0], window.start)
            end = interval[1] if window.end is None else min(interval[1], window.end)
            total += meter(start, end, machine.usd_per_hour)
        return total


KINDS = ("launch", "pass", "start", "refuse", "extend", "confirm", "forget", "silence", "stop", "yes", "gone")
STEPS = st.lists(
    st.tuples(
        st.sampled_from((*KINDS, "launch", "start", "extend", "pass")),
        st.integers(0, 9),
        st.one_of(
            st.sampled_from([timedelta(0), MINUTE, 10 * MINUTE, HOUR]), st.timedeltas(timedelta(0), timedelta(hours=5))
        ),
    ),
    max_size=60,
)
STARTS = st.sampled_from([NOON, NOON.replace(hour=23, minute=50), datetime(2026, 3, 31, 23, 40, tzinfo=UTC)])
HARD = [
    Budget(Period.RUN, usd("9")),
    Budget(Period.HOUR, usd("2")),
    Budget(Period.DAY, usd("4")),
    Budget(Period.MONTH, usd("7")),
]


@settings(max_examples=400)
@given(STARTS, STEPS)
def test_the_bill_never_passes_a_hard_cap(start: datetime, steps: list[tuple[str, int, timedelta]]) -> None:
    """I6, while every machine obeys its lease: in every window that is over, and in the one that is on."""
    books = Books(HARD, start)
    for step in steps:
        books.step(*step)
    books._pass(12 * HOUR)
    for budget in HARD:
        for window in budget.windows(start, books.now):
            assert budget.hard is not None
            assert books.billed(window) <= budget.hard


@settings(max_examples=200)
@given(STARTS, STEPS, st.lists(st.timedeltas(timedelta(0), 3 * HOUR), min_size=1, max_size=5))
def test_while_nothing_happens_committed_spend_never_grows(
    start: datetime, steps: list[tuple[str, int, timedelta]], pauses: list[timedelta]
) -> None:
    books = Books(HARD, start)
    for step in steps:
        books.step(*step)
    windows = [(budget, window) for budget in HARD for window in budget.windows(books.now, books.now + 24 * HOUR)]

    def spend() -> list[Decimal]:
        now = charges(books.machines.values(), now=books.now)
        return [committed(budget, window, now, {}, run_id="r") for budget, window in windows]

    before = spend()
    for pause in pauses:
        books._pass(pause)
        after = spend()
        assert all(new <= old for old, new in zip(before, after, strict=True))
        assert all(books.billed(window) <= new for (_, window), new in zip(windows, after, strict=True))
        before = after


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["ann", "bob", ""]), st.integers(0, 50), st.integers(0, 50)),
        max_size=12,
    ),
    st.integers(0, 90),
)
def test_what_users_count_adds_up_to_the_whole(rows: list[tuple[str, str, int, int]], minutes: int) -> None:
    machines = [ready(name, lease=HOUR, for_user="ann") for name in "ab"]
    now = NOON + minutes * MINUTE
    works = [work(machines[ord(name) - ord("a")], user, start, start + length) for name, user, start, length in rows]
    done = busy(machines, works, now=now)
    whole = spent(Budget(Period.DAY), machines, now=now)
    parts = sum(spent(Budget(Period.DAY, user=name), machines, now=now, busy=done) for name in ("ann", "bob", ""))
    assert abs(whole - parts) < usd("1e-20")


def test_a_check_over_many_machines_and_windows_looks_at_each_once() -> None:
    """A month of hours, a thousand machines: those that are over count only where they can."""
    old = [ready(f"{n}", at=NOON - 2 * HOUR).on(MachineEvent.GONE, at=NOON - HOUR) for n in range(1000)]
    looked: list[Window] = []

    class Watched(Charge):
        def within(self, window: Window) -> timedelta:
            looked.append(window)
            return super().within(window)

    over = [Watched(*charge) for charge in charges(old, now=NOON)]
    error, states = refusal([Budget(Period.HOUR, usd("7"))], over, {}, ready("new", lease=31 * DAY), now=NOON)
    assert error is None
    assert len(states) == 31 * 24
    assert len(looked) == 1000
