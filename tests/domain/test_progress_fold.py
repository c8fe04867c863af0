"""How a prompt goes and ends, from any mixture of messages and readings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import (
    HistoryEntry,
    NodeLabel,
    NodeText,
    Preview,
    QueueView,
    Said,
    SocketDown,
    SocketUp,
    Step,
)
from runcomfy.domain.progress_fold import (
    Ending,
    Limits,
    Polled,
    PollFailed,
    Tick,
    WatchEvent,
    WatchState,
    fold,
    progress_of,
    watching,
)

ID = PromptId("6d1f7a1e-0000-4000-8000-000000000001")
OTHER = "6d1f7a1e-0000-4000-8000-000000000002"
LABELS = {"1": NodeLabel("Load", "LoadImage"), "2": NodeLabel("", "KSampler"), "3": NodeLabel("Save", "SaveImage")}
LIMITS = Limits(stall=900, blind=3600, unreachable=120, worker_dead=20)

WAITING = Polled(QueueView((), (ID,)))
BEHIND = Polled(QueueView((OTHER,), (OTHER, ID)))
RUNNING = Polled(QueueView((ID,), ()))
ABSENT = Polled(QueueView((), ()))


def said(kind: str, **data: Any) -> Said:
    return Said(kind, {"prompt_id": ID, **data})


START = said("execution_start", timestamp=1)
END = said("executing", node=None)
SUCCESS = said("execution_success", timestamp=2)


def entry(status: str = "success", *messages: tuple[str, dict[str, Any]]) -> Polled:
    return Polled(history=HistoryEntry(ID, {"3": {"images": []}}, status, messages))


def told(*events: WatchEvent | tuple[float, WatchEvent], state: WatchState | None = None) -> WatchState:
    """Fold events, each at its time (or a second after the one before)."""
    state = state or watching(ID, LABELS, now=0.0, limits=LIMITS)
    now = 0.0
    for event in events:
        now, happened = event if isinstance(event, tuple) else (now + 1.0, event)
        state = fold(state, happened, now)
    return state


# --- ends ---------------------------------------------------------------------------------------------------


def test_only_the_history_makes_a_success() -> None:
    state = told(SocketUp(), START, SUCCESS, END)
    assert state.ending is None
    assert state.evidence.marked
    assert told(entry(), state=state).ending is Ending.SUCCESS


def test_success_said_without_an_end_is_no_end() -> None:
    assert told(SocketUp(), START, SUCCESS, RUNNING).ending is None


def test_an_end_marker_that_the_queue_contradicts_is_forgotten() -> None:
    state = told(SocketUp(), START, END, RUNNING)
    assert state.ending is None
    assert not state.evidence.marked


@pytest.mark.parametrize(
    ("history", "ending"),
    [
        (entry("success"), Ending.SUCCESS),
        (entry("error", ("execution_error", {"node_id": "2", "exception_type": "ValueError"})), Ending.ERROR),
        (entry("error", ("execution_interrupted", {"node_id": "2"})), Ending.INTERRUPTED),
        (entry("error"), Ending.ERROR),
        (entry(""), Ending.SUCCESS),
        (entry("success", ("execution_error", {"exception_type": "ExecutionBlocked"})), Ending.SUCCESS),
    ],
)
def test_what_the_history_says_is_what_happened(history: Polled, ending: Ending) -> None:
    assert told(START, history).ending is ending


def test_a_blocked_branch_ends_nothing() -> None:
    blocked = said("execution_error", node_id="2", exception_type="ExecutionBlocked")
    state = told(SocketUp(), START, blocked, SUCCESS, END)
    assert state.evidence.failure is None
    assert told(entry(), state=state).ending is Ending.SUCCESS


@pytest.mark.fault(37)
def test_one_miss_is_no_loss_and_two_are() -> None:
    once = told(SocketUp(), ABSENT)
    assert once.ending is None
    assert told(ABSENT, state=once).ending is Ending.REMOVED
    assert told(WAITING, ABSENT, state=once).ending is None, "it was there in between"
    assert told(START, ABSENT, state=once).ending is None, "it was heard of in between"


@pytest.mark.fault(38)
@pytest.mark.parametrize("sign", [SocketDown("cut", lost=True), PollFailed("refused", broke=True)])
def test_a_broken_connection_tells_a_restart_from_a_removal(sign: WatchEvent) -> None:
    assert told(SocketUp(), START, sign, SocketUp(), ABSENT, ABSENT).ending is Ending.RESTARTED


@pytest.mark.parametrize("sign", [SocketDown("refused"), PollFailed("silent", broke=False)])
def test_what_no_restart_explains_is_a_removal(sign: WatchEvent) -> None:
    assert told(sign, ABSENT, ABSENT).ending is Ending.REMOVED


def test_a_history_deleted_after_a_heard_success_is_still_a_success() -> None:
    output = said("executed", node="3", output={"images": [{"filename": "a.png"}]})
    state = told(SocketUp(), START, output, SUCCESS, END, ABSENT, ABSENT)
    assert state.ending is Ending.SUCCESS
    assert state.evidence.outputs == {"3": {"images": [{"filename": "a.png"}]}}


def test_a_heard_failure_survives_the_loss_of_the_history() -> None:
    error = said("execution_error", node_id="2", exception_type="RuntimeError", exception_message="CUDA error")
    state = told(SocketUp(), START, error, SocketDown("cut", lost=True), ABSENT, ABSENT)
    assert state.ending is Ending.ERROR
    assert state.evidence.failure is not None
    assert state.evidence.failure.exception_type == "RuntimeError"


def test_a_dead_worker_is_told_by_prompts_that_wait_while_nothing_runs() -> None:
    polls = [(5.0 * n, WAITING) for n in range(1, 5)]
    assert told(*polls).ending is None
    assert told(*polls, (25.0, WAITING)).ending is Ending.WORKER_DEAD


def test_a_worker_that_takes_prompts_is_alive() -> None:
    polls = [(5.0 * n, WAITING if n % 2 else BEHIND) for n in range(1, 40)]
    assert told(*polls).ending is None


@pytest.mark.fault(39)
def test_a_node_that_moves_nothing_is_stuck() -> None:
    step = said("progress", node="2", value=97, max=100)
    state = told(SocketUp(), START, said("executing", node="2"), (10.0, step))
    assert told((909.0, Tick()), state=state).ending is None
    assert told((910.0, Tick()), state=state).ending is Ending.STUCK
    repeated = told(*[(10.0 + 60 * n, step) for n in range(20)], state=state)
    assert repeated.ending is Ending.STUCK, "the same step again and again is no progress"
    moving = told(*[(10.0 + 600 * n, said("progress", node="2", value=n, max=100)) for n in range(20)], state=state)
    assert moving.ending is None


def test_a_socket_that_is_renewed_again_and_again_does_not_hide_a_stuck_prompt() -> None:
    """Some proxies end every socket after a minute; what the node did not say before, it did not say."""
    minutes: list[tuple[float, WatchEvent]] = [
        (60.0 * n, one) for n in range(1, 70) for one in (SocketDown("cut", lost=True), SocketUp(), RUNNING)
    ]
    state = told(SocketUp(), START, said("executing", node="2"), *minutes)
    assert state.ending is Ending.STUCK


def test_what_was_missed_while_nothing_could_be_heard_is_no_sign_of_a_stall() -> None:
    away: list[tuple[float, WatchEvent]] = [
        (850.0, SocketDown("cut", lost=True)),
        (4_000.0, SocketUp()),
        (4_001.0, RUNNING),
    ]
    assert told(SocketUp(), START, said("executing", node="2"), *away).ending is None


def test_a_server_that_names_new_nodes_for_ever_fills_no_memory() -> None:
    outputs = [said("executed", node=f"n{n}", output={"text": [str(n)]}) for n in range(1_100)]
    many = said("progress_state", nodes={f"m{n}": {"value": 1, "max": 2} for n in range(20_001)})
    state = told(SocketUp(), START, *outputs, many, said("executed", node="one more", output={}))
    assert len(state.evidence.outputs) == 1_000
    assert "one more" not in state.run.shares


def test_what_a_server_calls_a_node_reaches_no_terminal() -> None:
    state = told(SocketUp(), START, said("executing", node="\x1b]0;owned\x07"))
    assert "\x1b" not in progress_of(state).message + progress_of(state).node_title


@pytest.mark.fault(44)
def test_blind_watching_is_more_patient() -> None:
    state = told(SocketDown("refused (403)"), (5.0, RUNNING))
    assert told((1800.0, RUNNING), state=state).ending is None
    assert told((3605.0, RUNNING), state=state).ending is Ending.STUCK


def test_a_server_that_stays_away_is_given_up() -> None:
    away = PollFailed("refused", broke=True)
    state = told(SocketUp(), START, (10.0, away), (60.0, away))
    assert told((129.0, away), state=state).ending is None
    assert told((130.0, away), state=state).ending is Ending.UNREACHABLE
    assert told((100.0, RUNNING), (131.0, away), (140.0, away), state=state).ending is None, "it answered in between"


def test_what_has_ended_stays_ended() -> None:
    state = told(entry())
    assert told(ABSENT, ABSENT, START, PollFailed("x"), (1e9, Tick()), state=state) is state


# --- progress -----------------------------------------------------------------------------------------------


def test_cached_nodes_count_and_the_current_one_counts_in_part() -> None:
    state = told(SocketUp(), START, said("execution_cached", nodes=["1"]), said("executing", node="2"))
    assert progress_of(state).percent == pytest.approx(100 / 3)
    state = told(said("progress", node="2", value=10, max=20), state=state)
    shown = progress_of(state)
    assert shown.percent == pytest.approx(50)
    assert (shown.node_id, shown.node_title, shown.value, shown.maximum) == ("2", "KSampler", 10, 20)
    assert (shown.nodes_done, shown.nodes_total, shown.step) == (1, 3, Step.RUNNING)


def test_everything_cached_ends_at_once_and_at_100() -> None:
    state = told(START, said("execution_cached", nodes=["1", "2", "3"]), SUCCESS, END)
    assert progress_of(state).percent == 99
    assert progress_of(told(entry(), state=state)).percent == 100


def test_a_failure_never_shows_100() -> None:
    state = told(START, said("execution_cached", nodes=["1", "2", "3"]), entry("error"))
    assert progress_of(state).percent == 99


def test_a_waiting_prompt_knows_its_place() -> None:
    shown = progress_of(told(SocketUp(), BEHIND))
    assert (shown.step, shown.queue_position) == (Step.QUEUED, 1)
    assert "1 ahead" in shown.message
    assert progress_of(told(SocketUp(), BEHIND, RUNNING)).queue_position is None


def test_parts_of_an_expanded_node_move_it_but_do_not_finish_it() -> None:
    def parts(*values: float) -> Said:
        nodes = {
            f"2.0.0.{n}": {"value": value, "max": 10, "state": "running", "display_node_id": "2"}
            for n, value in enumerate(values)
        }
        return said("progress_state", nodes={"2": {"value": 0, "max": 1, "state": "running"}, **nodes})

    state = told(SocketUp(), START, parts(5))
    half = state.run.percent
    state = told(parts(10, 0), state=state)
    assert half < state.run.percent < 100 / 3
    assert progress_of(told(said("executing", node="2.0.0.1", display_node="2"), state=state)).node_id == "2"


def test_foreign_messages_change_nothing() -> None:
    state = told(SocketUp(), START)
    for kind in ("executing", "execution_error", "execution_success", "progress"):
        assert told(Said(kind, {"prompt_id": OTHER, "node": None, "value": 1, "max": 1}), state=state) == state


def test_the_word_that_greets_a_new_socket_counts_only_while_we_run() -> None:
    greeting = Said("executing", {"node": "2"})
    assert told(SocketUp(), greeting).run.node is None
    state = told(SocketUp(), RUNNING, greeting)
    assert state.run.node == "2"
    assert state.health.heard


def test_a_preview_is_shown_once() -> None:
    state = told(START, Preview(b"jpeg", "image/jpeg", "2"))
    assert progress_of(state).preview == b"jpeg"
    assert progress_of(told(Tick(), state=state)).preview is None


# --- any sequence -------------------------------------------------------------------------------------------

wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["1", "2", "3", "2.0.0.1", ID, "é\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["1", "node", "value"]), inner),
    max_leaves=6,
)
node_states = st.dictionaries(
    st.sampled_from(["1", "2", "3", "2.0.0.1", "zz"]),
    st.fixed_dictionaries(
        {"value": st.floats() | st.integers(), "max": st.floats() | st.integers()},
        optional={"state": st.sampled_from(["running", "finished"]), "display_node_id": st.sampled_from(["2", "x"])},
    )
    | wild,
)
messages = st.builds(
    Said,
    st.sampled_from(
        [
            "execution_start",
            "execution_cached",
            "executing",
            "progress",
            "progress_state",
            "executed",
            "execution_success",
            "execution_error",
            "execution_interrupted",
            "status",
            "pack.news",
        ]
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "prompt_id": st.sampled_from([ID, ID, ID, OTHER]) | wild,
            "node": wild,
            "nodes": node_states | wild,
            "value": st.integers(0, 20) | wild,
            "max": st.just(20) | wild,
            "output": wild,
            "display_node": wild,
            "exception_type": wild,
        },
    ),
)
readings = st.sampled_from([WAITING, BEHIND, RUNNING, Polled()])
silences: st.SearchStrategy[WatchEvent] = st.sampled_from(
    [SocketUp(), SocketDown("x"), SocketDown("x", lost=True), Tick(), PollFailed("x", broke=True), NodeText("2", "hi")]
)
harmless: st.SearchStrategy[WatchEvent] = messages | readings | silences


@given(st.lists(st.tuples(st.floats(0, 1.0), harmless | st.sampled_from([ABSENT, entry(), entry("error")]))))
def test_percent_never_goes_back(events: list[tuple[float, WatchEvent]]) -> None:
    state, now = watching(ID, LABELS, now=0.0, limits=LIMITS), 0.0
    for pause, event in events:
        before, now = state, now + pause
        state = fold(state, event, now)
        assert state.run.percent >= before.run.percent
        assert 0 <= state.run.percent <= 100
        assert math.isfinite(state.run.percent)
        assert (state.run.percent == 100) is (state.ending is Ending.SUCCESS)
        progress_of(state)


@given(st.lists(harmless, max_size=30))
def test_nothing_ends_without_history_absence_or_time(events: list[WatchEvent]) -> None:
    state = watching(ID, LABELS, now=0.0, limits=LIMITS)
    for event in events:
        state = fold(state, event, 1.0)
    assert state.ending is None


@given(st.lists(harmless, max_size=12), st.randoms(use_true_random=False))
def test_repeated_and_reordered_messages_end_the_same(events: list[WatchEvent], random: Any) -> None:
    said_only = [event for event in events if isinstance(event, Said)]
    twice = [event for event in said_only for _ in range(2)]
    random.shuffle(twice)
    outcome = told(*[(1.0, event) for event in said_only], (2.0, entry()))
    other = told(*[(1.0, event) for event in twice], (2.0, entry()))
    assert (outcome.ending, outcome.history) == (other.ending, other.history)


@given(st.lists(harmless, max_size=12))
def test_a_state_is_never_changed_in_place(events: list[WatchEvent]) -> None:
    state = watching(ID, LABELS, now=0.0, limits=LIMITS)
    for event in events:
        frozen = replace(state, run=replace(state.run, shares=dict(state.run.shares)))
        later = fold(state, event, 1.0)
        assert state == frozen
        state = later
