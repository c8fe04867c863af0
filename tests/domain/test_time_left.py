"""How long a job still takes, from what its nodes took before: what is compared with what, and what is told when."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.past_runs import RunPast, past_of
from runcomfy.domain.progress import NodeLabel, Progress, Step
from runcomfy.domain.time_left import Asked, Experience, TimeLeft
from runcomfy.domain.timeline import Timeline
from runcomfy.domain.work import Work

MESH = "flux_mesh"
DAY = datetime(2026, 11, 20, tzinfo=UTC)
CLASSES = {"load": "CheckpointLoader", "sample": "KSampler", "mesh": "MakeMesh", "save": "SaveGLB"}
LABELS = {node: NodeLabel(node, kind) for node, kind in CLASSES.items()}
USUAL = {"load": 20.0, "sample": 60.0, "mesh": 40.0, "save": 2.0}


def result(
    took: dict[str, float] | None = None,
    *,
    server_type: str = "large",
    place: str = "machine:a",
    cached: str = "",
    **more: Any,
) -> dict[str, Any]:
    """What the queue keeps of a run; `cached` is a node that was."""
    nodes, at = [], 3.0
    for node, seconds in (took or USUAL).items():
        spent = 0.0 if node == cached else seconds
        nodes.append({"node_id": node, "title": node, "class_type": CLASSES.get(node, node), "started_s": at,
                      "seconds": spent, "cached": node == cached})  # fmt: skip
        at += spent
    timings = {"check": 0.5, "upload": 1.0, "submit": 0.5, "execute": at, "fetch": 4.0}
    return {"nodes": nodes, "server_type": server_type, "place": place, "timings": timings, **more}


def run(number: int, took: dict[str, float] | None = None, *, workflow: str = MESH, **more: Any) -> RunPast:
    past = past_of(workflow, DAY + timedelta(hours=number), result(took, **more))
    assert past is not None
    return past


def scaled(factor: float, **other: float) -> dict[str, float]:
    return {node: seconds * factor for node, seconds in USUAL.items()} | other


def at(
    node: str | None = None,
    *,
    began_s: float = 0.0,
    now_s: float = 0.0,
    done: tuple[str, ...] = (),
    cached: str = "",
    took: dict[str, float] | None = None,
    value: float | None = None,
    **more: Any,
) -> Asked:
    """A job whose nodes ran one after the other; `node` runs since `began_s`, with `value` of 20 steps done now."""
    line, at_s = Timeline(), began_s - sum((took or USUAL)[name] for name in done if name != cached)
    facts: dict[str, Any] = {"labels": LABELS, "cached": frozenset({cached} - {""})}
    so_far = frozenset({cached} - {""})
    line = line.seen(Progress(Step.RUNNING, done=so_far, **facts), max(0.0, at_s))
    for name in done:
        if name == cached:
            continue
        line = line.seen(Progress(Step.RUNNING, node_id=name, done=so_far, **facts), max(0.0, at_s))
        at_s += (took or USUAL)[name]
        so_far |= {name}
        line = line.seen(Progress(Step.RUNNING, node_id=name, done=so_far, **facts), max(0.0, at_s))
    if node is not None:
        line = line.seen(Progress(Step.RUNNING, node_id=node, done=so_far, **facts), began_s)
        if value is not None:
            steps: dict[str, Any] = {"value": value, "maximum": 20.0}
            line = line.seen(Progress(Step.RUNNING, node_id=node, done=so_far, **steps, **facts), now_s)
    more = {"server_type": "large", "place": "machine:a", "labels": LABELS} | more
    return Asked(MESH, timeline=line, now_s=now_s, heard_s=line.at_s, **more)


def left(experience: Experience, asked: Asked) -> TimeLeft:
    told = experience.left(asked)
    assert told is not None
    assert 0 <= told.low_s <= told.expected_s <= told.high_s
    return told


ALIKE = [run(number) for number in range(10)]


# -- the parts -----------------------------------------------------------------------------------------------


def test_what_is_left_is_the_rest_of_the_node_the_nodes_after_it_and_fetching() -> None:
    told = left(Experience(ALIKE), at("sample", began_s=20, now_s=40, done=("load",)))
    assert told.expected_s == pytest.approx(40 + 40 + 2 + 4, rel=0.03)
    assert (told.sure, told.runs) == (True, 10)


def test_before_the_first_node_it_is_the_whole_run() -> None:
    waits = Asked(MESH, "large", timeline=Timeline().seen(Progress(Step.UPLOADING), 0), now_s=0)
    assert left(Experience(ALIKE), waits).expected_s == pytest.approx(2 + 122 + 4, rel=0.05)


def test_while_the_machine_boots_its_usual_start_counts_too() -> None:
    line = Timeline().seen(Progress(Step.BOOTING), 5)
    boots = Asked(MESH, "large", timeline=line, now_s=65, boot_s=180)
    assert left(Experience(ALIKE), boots).expected_s == pytest.approx(120 + 2 + 122 + 4, rel=0.05)


def test_who_waits_behind_others_on_the_server_waits_for_their_runs() -> None:
    line = Timeline().seen(Progress(Step.QUEUED), 5)
    asked = [Asked(MESH, "large", timeline=line, now_s=5, heard_s=5, queue_position=ahead) for ahead in (None, 0, 2)]
    alone, next_one, third = (left(Experience(ALIKE), one).expected_s for one in asked)
    assert next_one - alone == pytest.approx(61, rel=0.05)
    assert third - next_one == pytest.approx(244, rel=0.05)


def test_after_the_last_node_only_fetching_is_left_and_in_the_end_nothing() -> None:
    line = Timeline().seen(Progress(Step.RUNNING, node_id="save", labels=LABELS), 120)
    line = line.seen(Progress(Step.FETCHING), 122)
    fetching = left(Experience(ALIKE), Asked(MESH, "large", timeline=line, now_s=123))
    assert fetching.expected_s == pytest.approx(3, rel=0.1)
    line = line.seen(Progress(Step.FINISHED), 126)
    assert left(Experience(ALIKE), Asked(MESH, "large", timeline=line, now_s=127)).high_s == 0


def test_a_node_that_tells_its_own_progress_is_believed_the_more_the_farther_it_is() -> None:
    experience = Experience(ALIKE)
    rest = 40 + 2 + 4
    # Half of the steps took 60 s, the usual time of all of them: this one will take 120 s.
    slow = left(experience, at("sample", began_s=20, now_s=80, done=("load",), value=10))
    assert 40 < slow.expected_s - rest < 60
    early = left(experience, at("sample", began_s=20, now_s=26, done=("load",), value=1))
    assert 54 < early.expected_s - rest < 75


def test_the_first_of_very_many_steps_says_nothing_of_the_rest() -> None:
    asked = at("sample", began_s=20, now_s=25, done=("load",))
    assert asked.timeline is not None
    facts: dict[str, Any] = {"node_id": "sample", "done": frozenset({"load"}), "labels": LABELS}
    line = asked.timeline.seen(Progress(Step.RUNNING, value=1.0, maximum=1e9, **facts), 25)
    assert line.pace is not None
    told = left(Experience(ALIKE), replace(asked, timeline=line))
    assert told.expected_s == pytest.approx(55 + 40 + 2 + 4, rel=0.03)


def test_a_run_of_which_no_node_is_heard_counts_down_as_a_whole() -> None:
    line = Timeline().seen(Progress(Step.RUNNING), 10)
    told = left(Experience(ALIKE), Asked(MESH, "large", timeline=line, now_s=40))
    assert told.expected_s == pytest.approx(122 - 30 + 4, rel=0.05)


def test_a_node_that_takes_longer_than_ever_is_expected_to_end_soon() -> None:
    told = [left(Experience(ALIKE), at("sample", began_s=20, now_s=now, done=("load",))) for now in (80, 95, 300)]
    rests = [one.expected_s - 46 for one in told]
    assert rests == sorted(rests, reverse=True)
    assert 0 <= rests[-1] < 0.5 < rests[0] < 12


def test_slow_beginnings_are_followed_by_slow_ends_where_that_was_so_before() -> None:
    together = Experience([run(number, scaled(0.7 + 0.06 * number)) for number in range(12)])
    apart = Experience(
        [run(number, {**USUAL, "load": 20 * (0.7 + 0.06 * number), "mesh": 40 + (number % 3)}) for number in range(12)]
    )
    slow = at("sample", began_s=30, now_s=30, done=("load",), took={**USUAL, "load": 30.0})
    usual = at("sample", began_s=20, now_s=20, done=("load",))
    assert left(together, slow).expected_s > 1.08 * left(together, usual).expected_s
    assert left(apart, slow).expected_s == pytest.approx(left(apart, usual).expected_s, rel=0.05)


def test_of_nodes_that_run_beside_each_other_the_one_that_takes_longer_counts() -> None:
    def beside(number: int) -> RunPast:
        nodes = [
            {"node_id": "load", "class_type": "CheckpointLoader", "started_s": 0, "seconds": 60},
            {"node_id": "sample", "class_type": "KSampler", "started_s": 0.1, "seconds": 40},
            {"node_id": "save", "class_type": "SaveGLB", "started_s": 60, "seconds": 2},
        ]
        past = past_of(MESH, DAY + timedelta(hours=number), {"nodes": nodes, "server_type": "large"})
        assert past is not None
        return past

    experience, labels = Experience([beside(number) for number in range(10)]), dict(LABELS)
    del labels["mesh"]
    line = Timeline().seen(Progress(Step.RUNNING, node_id="load", active=frozenset({"load"}), labels=labels), 0)
    both = Progress(Step.RUNNING, node_id="sample", active=frozenset({"load", "sample"}), labels=labels)
    told = left(experience, Asked(MESH, "large", timeline=line.seen(both, 0.1), labels=labels, now_s=10))
    assert told.expected_s == pytest.approx(52, rel=0.03)


# -- like with like --------------------------------------------------------------------------------------------


def test_runs_in_which_the_models_were_cached_tell_of_those_in_which_they_are() -> None:
    warm = [run(number, cached="load", place="") for number in range(5)]
    # Cold, the models go to the GPU while sampling: that node takes longer, too.
    cold = [run(number + 10, {**USUAL, "sample": 100.0}, place="") for number in range(5)]
    experience = Experience([*warm, *cold])
    first = left(experience, at("sample", began_s=20, now_s=20, done=("load",), place=""))
    again = left(experience, at("sample", began_s=0, now_s=0, cached="load", place=""))
    assert first.expected_s == pytest.approx(100 + 42 + 4, rel=0.05)
    assert again.expected_s == pytest.approx(60 + 42 + 4, rel=0.05)


def test_the_first_run_on_a_machine_is_compared_with_first_runs_where_those_take_longer() -> None:
    places = ["machine:a", "machine:b", "machine:c"]
    runs = [run(number, {**USUAL, "load": 120.0}, place=place) for number, place in enumerate(places)]
    runs += [run(number + 10, {**USUAL, "load": 2.0}, place=places[number % 3]) for number in range(12)]
    asked = {place: at(None, place=place) for place in ("machine:new", "machine:b")}
    told = {place: left(Experience(runs), one).expected_s for place, one in asked.items()}
    assert told["machine:new"] == pytest.approx(222 + 4, rel=0.05)
    assert told["machine:b"] == pytest.approx(104 + 4, rel=0.05)


def test_first_runs_that_take_no_longer_are_not_kept_apart() -> None:
    told = left(Experience(ALIKE), at(None, place="machine:new"))
    assert told.runs == 10


def test_another_type_of_machine_is_scaled_by_what_both_took() -> None:
    other = [run(number, scaled(0.5), workflow="other", server_type="2xl", place="machine:b") for number in range(5)]
    same = [run(number, workflow="other") for number in range(5)]
    there = [run(number) for number in range(10)]
    told = left(Experience([*other, *same, *there]), at(None, server_type="2xl", place="machine:b"))
    assert told.expected_s == pytest.approx(61 + 4, rel=0.08)
    assert not told.sure


def test_a_type_that_nothing_links_is_told_with_a_wide_range() -> None:
    told = left(Experience(ALIKE), at(None, server_type="2xl", place="machine:b"))
    known = left(Experience(ALIKE), at(None))
    assert told.high_s - told.low_s > 2 * (known.high_s - known.low_s)
    assert not told.sure


def test_a_workflow_that_was_never_run_is_told_by_the_classes_of_its_nodes() -> None:
    others = [run(number, workflow=name) for number, name in enumerate(("one", "two", "three"))]
    told = left(Experience(others), at("sample", began_s=20, now_s=40, done=("load",)))
    assert told.expected_s == pytest.approx(40 + 42, rel=0.25)
    assert (told.sure, told.runs) == (False, 0)


def test_a_changed_graph_keeps_what_is_known_of_its_nodes_and_takes_new_ones_by_class() -> None:
    others = [run(number, {"up": 30.0}, workflow="upscale") for number in range(3)]
    past = [run(number, {**USUAL, "old": 5.0}) for number in range(10)]
    changed = {**LABELS, "new": NodeLabel("new", "up")}
    told = left(Experience([*others, *past]), at(None, labels=changed))
    assert told.expected_s == pytest.approx(122 + 30 + 4, rel=0.1)


def test_without_any_runs_nothing_is_told() -> None:
    assert Experience([]).left(at("sample", now_s=20)) is None
    assert Experience([]).left(Asked("never", None)) is None
    unlike = [run(number, {"other": 5.0}, workflow="unlike") for number in range(3)]
    assert Experience(unlike).left(at("sample", now_s=20)) is None


def test_the_books_of_machines_tell_of_workflows_without_a_timeline() -> None:
    def work(number: int, seconds: float) -> Work:
        began = DAY + timedelta(hours=number)
        return Work(
            MachineId("a"), JobId(str(number)), 1, MESH, "large", began,
            computing_at=began, computed_at=began + timedelta(seconds=seconds), outcome="done",
        )  # fmt: skip

    experience = Experience([], [work(number, 100.0) for number in range(6)])
    told = left(experience, at("sample", began_s=20, now_s=40))
    assert told.expected_s == pytest.approx(80, rel=0.15)
    assert not told.sure


def test_runs_without_a_timeline_are_told_as_a_whole() -> None:
    old = [past_of(MESH, DAY, {"timings": {"execute": 90.0, "fetch": 4.0}, "server_type": "large"}) for _ in range(6)]
    told = left(Experience([one for one in old if one is not None]), at("sample", began_s=0, now_s=30))
    assert told.expected_s == pytest.approx(64, rel=0.1)


def test_runs_that_were_cached_whole_tell_only_what_comes_before_and_after() -> None:
    nodes = [{"node_id": node, "class_type": kind, "cached": True} for node, kind in CLASSES.items()]
    said = {"nodes": nodes, "timings": {"upload": 3.0, "fetch": 4.0}, "server_type": "large"}
    cached = [past_of(MESH, DAY + timedelta(hours=number), said) for number in range(10)]
    told = left(Experience([one for one in cached if one is not None]), Asked(MESH, "large"))
    assert told.expected_s == pytest.approx(7, rel=0.1)


def test_a_job_of_another_process_counts_down_from_when_it_was_begun() -> None:
    told = [left(Experience(ALIKE), Asked(MESH, "large", unheard_s=gone)) for gone in (0.0, 60.0, 200.0)]
    assert [one.expected_s for one in told] == [
        pytest.approx(128, rel=0.05), pytest.approx(68, rel=0.05), pytest.approx(0, abs=0.5),
    ]  # fmt: skip
    assert not any(one.sure for one in told)


# -- when it is sure -------------------------------------------------------------------------------------------


def test_few_runs_give_a_range_and_many_alike_ones_a_number() -> None:
    widths = []
    for count in (1, 2, 4, 8, 10):
        told = left(Experience(ALIKE[:count]), at(None))
        assert told.sure is (count >= 8)
        widths.append(told.high_s - told.low_s)
    assert widths == sorted(widths, reverse=True)


def test_runs_that_differ_wildly_are_never_told_as_a_number() -> None:
    wild = [run(number, scaled(3.0 if number % 2 else 0.4)) for number in range(20)]
    assert not left(Experience(wild), at(None)).sure


@pytest.mark.parametrize(
    ("low", "expected", "high", "sure", "words"),
    [
        (100, 125, 150, True, "about 2 min left"),
        (60, 100, 185, False, "1 to 3 min left"),
        (0, 1, 2, True, "about 1 s left"),
        (12, 33, 58, False, "10 to 60 s left"),
        (3, 5, 17, False, "3 to 17 s left"),
        (118, 120, 122, False, "about 2 min left"),
        (3_600, 7_300, 14_400, False, "1.0 to 4.0 h left"),
    ],
)
def test_people_are_told_a_number_or_a_range(low: float, expected: float, high: float, sure: bool, words: str) -> None:
    assert TimeLeft(low, expected, high, sure, 7).words == words


# -- what users wrote into the rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"nodes": "none"},
        {"nodes": [1, {}, {"node_id": 3}, {"node_id": "a", "seconds": "x"}]},
        {"nodes": [{"node_id": "a", "seconds": math.nan, "started_s": math.inf}], "timings": 3},
        {"timings": {"execute": -4}},
        {"timings": {"execute": True}, "server_type": 5, "place": []},
        {"text": "not JSON"},
        result(timings={"attach": 0.1, "execute": 4.0}),
    ],
)
def test_results_that_make_no_sense_teach_nothing(said: dict[str, Any]) -> None:
    assert past_of(MESH, DAY, said) is None


# -- properties ----------------------------------------------------------------------------------------------------

SECONDS = st.floats(0, 1e6)
NODES = st.sampled_from([*CLASSES, "other", "x"])
PASTS = st.builds(
    lambda took, number, cached, kind, place: past_of(
        MESH if number % 3 else "other", DAY + timedelta(minutes=number),
        result(took or {"x": 1.0}, server_type=kind, place=place, cached=cached),
    ),
    st.dictionaries(NODES, SECONDS, max_size=6), st.integers(0, 5_000), NODES, st.sampled_from(["", "large", "2xl"]),
    st.sampled_from(["", "machine:a", "machine:b"]),
)  # fmt: skip
SNAPSHOTS = st.builds(
    Progress,
    step=st.sampled_from([*Step, Step.RUNNING, Step.RUNNING, Step.RUNNING]),
    node_id=st.none() | NODES,
    value=st.none() | st.floats(),
    maximum=st.none() | st.floats(),
    done=st.frozensets(NODES),
    cached=st.frozensets(NODES),
    active=st.frozensets(NODES),
    labels=st.just(LABELS),
)


@given(
    st.lists(PASTS, max_size=12),
    st.lists(st.tuples(SNAPSHOTS, SECONDS), max_size=12),
    st.lists(SECONDS, min_size=2, max_size=5),
    st.none() | st.integers(0, 100),
    st.none() | st.sampled_from(["", "large", "2xl", "small"]),
)
def test_it_is_never_negative_and_goes_down_with_time_whatever_was_heard(
    pasts: list[RunPast | None],
    tale: list[tuple[Progress, float]],
    later: list[float],
    position: int | None,
    server_type: str | None,
) -> None:
    experience = Experience([past for past in pasts if past is not None])
    line = Timeline()
    for progress, at_s in tale:
        line = line.seen(progress, at_s)
    before: TimeLeft | None = None
    for seconds in sorted(later):
        now = line.at_s + seconds
        asked = Asked(
            MESH, server_type, "machine:a", line, LABELS, now_s=now, heard_s=line.at_s, queue_position=position
        )
        told = experience.left(asked)
        if told is None:
            assert before is None
            continue
        assert 0 <= told.low_s <= told.expected_s <= told.high_s < math.inf
        if before is not None:
            slack = 1e-6 * (1 + before.high_s)
            assert told.expected_s <= before.expected_s + slack
            assert told.high_s <= before.high_s + slack
        before = told
