"""What ran when, from snapshots of a job's progress: whole ones, and ones with gaps and nonsense."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.job import PromptId
from runcomfy.domain.past_runs import past_of
from runcomfy.domain.progress import NodeLabel, Progress, Said, Step
from runcomfy.domain.progress_fold import WatchState, fold, progress_of, watching
from runcomfy.domain.timeline import MOST_NODES, Timeline

LABELS = {
    "1": NodeLabel("Load the model", "CheckpointLoader"),
    "2": NodeLabel("", "KSampler"),
    "3": NodeLabel("Save", "SaveImage"),
    "4": NodeLabel("Notes", "PreviewAny"),
}
RECORDINGS = Path(__file__).parent.parent / "recordings"
ID = PromptId("6d1f7a1e-0000-4000-8000-000000000001")


def running(node: str | None = None, *, done: str = "", cached: str = "", **more: Any) -> Progress:
    """A snapshot while the prompt runs; `done` and `cached` are nodes of one letter."""
    return Progress(
        Step.RUNNING,
        node_id=node,
        done=frozenset(done) | frozenset(cached),
        cached=frozenset(cached),
        labels=LABELS,
        **more,
    )


def told(*snapshots: tuple[float, Progress]) -> Timeline:
    line = Timeline()
    for at_s, progress in snapshots:
        line = line.seen(progress, at_s)
    return line


def times(line: Timeline) -> dict[str, tuple[float, float | None]]:
    return {node.node_id: (node.started_s, node.seconds) for node in line.nodes}


def test_nodes_follow_each_other_with_their_titles_classes_and_seconds() -> None:
    line = told(
        (0, Progress(Step.UPLOADING)),
        (2, Progress(Step.QUEUED)),
        (5, running()),
        (5, running(cached="1")),
        (5.5, running("2", cached="1")),
        (30, running("2", done="2", cached="1")),
        (30, running("3", done="2", cached="1")),
        (31, running("3", done="23", cached="1")),
        (32, Progress(Step.FETCHING)),
        (33, Progress(Step.FINISHED)),
    )
    assert line.as_list() == [
        {"node_id": "1", "title": "Load the model", "class_type": "CheckpointLoader", "started_s": 5, "seconds": 0,
         "cached": True},
        {"node_id": "2", "title": "KSampler", "class_type": "KSampler", "started_s": 5.5, "seconds": 24.5,
         "cached": False},
        {"node_id": "3", "title": "Save", "class_type": "SaveImage", "started_s": 30, "seconds": 1, "cached": False},
    ]  # fmt: skip
    assert [(step.step, step.started_s) for step in line.steps] == [
        (Step.UPLOADING, 0), (Step.QUEUED, 2), (Step.RUNNING, 5), (Step.FETCHING, 32), (Step.FINISHED, 33),
    ]  # fmt: skip
    assert (line.step, line.step_since_s, line.running) == (Step.FINISHED, 33, frozenset())


def test_a_node_that_runs_has_no_seconds_yet_and_says_how_far_it_is() -> None:
    line = told((1, running("2")), (4, running("2", value=5, maximum=20)), (6, running("2", value=5, maximum=20)))
    assert times(line) == {"2": (1, None)}
    assert line.running == {"2"}
    assert line.pace is not None
    assert (line.pace.node_id, line.pace.value, line.pace.maximum, line.pace.at_s) == ("2", 5, 20, 4)


def test_where_no_end_is_told_the_next_node_ends_the_one_before() -> None:
    """Servers before 0.3.4x say which node runs and no more."""
    line = told((0, running("1")), (10, running("2")), (25, running("3")), (26, Progress(Step.FETCHING)))
    assert times(line) == {"1": (0, 10), "2": (10, 15), "3": (25, 1)}


def test_a_node_that_goes_on_beside_the_next_ends_when_it_is_told() -> None:
    line = told((0, running("1")), (1, running("2")), (9, running("2", done="1")), (12, running("2", done="12")))
    assert times(line) == {"1": (0, 9), "2": (1, 11)}


def test_nodes_that_the_server_says_to_run_beside_each_other_do_not_end_each_other() -> None:
    both = frozenset("12")
    line = told(
        (0, running("1", active=frozenset("1"))),
        (1, running("2", active=both)),
        (2, running("1", active=both, value=1, maximum=3)),
        (5, running("2", active=both, value=1, maximum=3)),
    )
    assert line.running == both
    line = line.seen(running("2", active=frozenset("1"), done="2"), 9)
    line = line.seen(running("3", active=frozenset("13"), done="2"), 9)
    assert line.running == {"1", "3"}
    line = line.seen(running("3", done="123"), 14)
    assert times(line) == {"1": (0, 14), "2": (1, 8), "3": (9, 5)}


def test_a_node_that_waits_for_inputs_it_asked_for_counts_its_own_time_only() -> None:
    line = told(
        (0, running("2")),
        (0.5, running("1")),
        (8, running("1", done="1")),
        (8, running("2", done="1")),
        (10, running("2", done="12")),
    )
    assert times(line) == {"2": (0, 2.5), "1": (0.5, 7.5)}


def test_after_missed_messages_what_is_not_known_is_left_open() -> None:
    line = told(
        (0, running("1")),
        (60, running("3", done="12")),  # 2 came and went unheard: when 1 ended and 3 began is not known
        (70, running("3", done="123")),
        (70, running("4", done="123")),
        (72, running("4", done="1234")),
    )
    assert times(line) == {"1": (0, None), "2": (60, None), "3": (60, None), "4": (70, 2)}


def test_of_a_prompt_that_others_began_the_first_node_has_no_beginning() -> None:
    line = told((0, running("2", joined=True)), (9, running("3", done="2", joined=True)), (11, Progress(Step.FETCHING)))
    assert times(line) == {"2": (0, None), "3": (9, 2)}
    waited = told((0, Progress(Step.QUEUED, joined=True)), (5, running("2", joined=True)), (9, Progress(Step.FETCHING)))
    assert times(waited) == {"2": (5, 4)}


def test_a_prompt_that_is_sent_again_begins_its_nodes_anew() -> None:
    line = told((0, running("1")), (5, running("2", done="1")), (9, Progress(Step.QUEUED)), (12, running("1")))
    assert times(line) == {"1": (12, None)}
    assert [step.step for step in line.steps] == [Step.RUNNING, Step.QUEUED, Step.RUNNING]


def test_a_job_whose_nodes_nobody_heard_has_none() -> None:
    line = told((0, Progress(Step.QUEUED)), (3, running()), (60, Progress(Step.FETCHING)))
    assert line.nodes == ()
    assert line.as_list() == []


def test_nodes_that_others_expanded_into_are_the_time_of_the_node_they_came_from() -> None:
    """The fold of the server's messages and the timeline together, hidden nodes and all."""
    state = watching(ID, LABELS, now=0)
    line = Timeline()
    heard: list[tuple[float, str, dict[str, Any]]] = [
        (0, "execution_start", {}),
        (1, "executing", {"node": "1", "display_node": "1"}),
        (2, "executing", {"node": "1.0.0.7", "display_node": "1"}),
        (6, "progress_state", {"nodes": {"1.0.0.7": {"value": 1, "max": 1, "state": "finished",
                                                     "display_node_id": "1"}}}),
        (9, "progress_state", {"nodes": {"1": {"value": 1, "max": 1, "state": "finished"}}}),
        (9, "executing", {"node": "2", "display_node": "2"}),
    ]  # fmt: skip
    for now, kind, data in heard:
        state = fold(state, Said(kind, {"prompt_id": ID, **data}), now)
        line = line.seen(progress_of(state), now)
    assert times(line) == {"1": (1, 8), "2": (9, None)}


def recorded(name: str) -> list[Timeline]:
    """Return the timeline of each prompt in a recording of a real server's socket."""
    graph: dict[str, Any] = {}
    graphs: dict[str, dict[str, Any]] = {}
    runs: dict[str, tuple[WatchState, Timeline, float]] = {}
    for text in (RECORDINGS / name).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        said = line.get("json")
        if not isinstance(said, dict):
            continue
        graph = said["prompt"] if isinstance(said.get("prompt"), dict) else graph
        if "number" in said:
            graphs[said["prompt_id"]] = graph
        prompt_id = said.get("data", {}).get("prompt_id") if line["dir"] == "ws-text" else None
        if prompt_id is None:
            continue
        if prompt_id not in runs:
            sent = graphs.get(prompt_id) or graph
            labels = {node: NodeLabel("", entry["class_type"]) for node, entry in sent.items()}
            runs[prompt_id] = watching(prompt_id, labels, now=line["t"]), Timeline(), line["t"]
        state, timeline, began = runs[prompt_id]
        state = fold(state, Said(said["type"], said["data"]), line["t"])
        runs[prompt_id] = state, timeline.seen(progress_of(state), line["t"] - began), began
    return [timeline for _, timeline, _ in runs.values()]


def test_what_real_servers_say_makes_timelines() -> None:
    cold, again, *_ = recorded("01-success-simple-image.jsonl") + recorded("02-cached-rerun.jsonl")
    assert [(node.class_type, node.cached, node.seconds is not None) for node in cold.nodes] == [
        (kind, False, True) for kind in ("LoadImage", "ImageScale", "ImageBlur", "ImageInvert", "SaveImage")
    ]
    assert [node.class_type for node in again.nodes if node.cached] == ["LoadImage", "ImageScale"]


@pytest.mark.parametrize("name", ["05-progress-and-previews", "16-older-server-0.3.64", "17-older-server-0.10.0"])
def test_what_the_nodes_of_real_servers_took_alone_adds_up_to_the_time_that_passed(name: str) -> None:
    for line in recorded(f"{name}.jsonl"):
        past = past_of(name, datetime(2026, 11, 20, tzinfo=UTC), {"nodes": line.as_list()})
        took = [node.seconds for node in past.nodes.values()] if past is not None else []
        if past is not None and past.computing_s is not None and None not in took:
            assert sum(seconds or 0.0 for seconds in took) == pytest.approx(past.computing_s, abs=0.1)


def test_nodes_that_a_real_server_ran_beside_each_other_overlap() -> None:
    [both] = [line for line in recorded("05-progress-and-previews.jsonl") if "ProbeAsync" in str(line.as_list())]
    spans = {node.node_id: node.seconds for node in both.nodes}
    assert spans["1"] == pytest.approx(0.305, abs=0.01)
    assert spans["2"] == pytest.approx(0.244, abs=0.01)
    past = past_of("both", datetime(2026, 11, 20, tzinfo=UTC), {"nodes": both.as_list()})
    assert past is not None
    assert past.nodes["1"].span_s == pytest.approx(0.305, abs=0.01)
    assert past.nodes["1"].seconds == pytest.approx(0.061, abs=0.01)


def test_a_server_that_makes_nodes_up_without_end_is_listened_to_only_so_long() -> None:
    made_up = frozenset(str(number) for number in range(MOST_NODES + 50))
    line = Timeline().seen(Progress(Step.RUNNING, done=made_up), 1).seen(Progress(Step.RUNNING, node_id="new"), 2)
    line = line.seen(Progress(Step.RUNNING, node_id="newer", done=made_up | {"new"}), 3)
    assert len(line.nodes) == MOST_NODES


# -- properties --------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["1", "2", "3", "4", "x", "1.0.0.7", "\x00", "é" * 300])
NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-5, 50).map(float))
SNAPSHOTS = st.builds(
    Progress,
    step=st.sampled_from([*Step, Step.RUNNING, Step.RUNNING, Step.RUNNING]),
    percent=st.floats(),
    node_id=st.none() | NAMES,
    value=NUMBERS,
    maximum=NUMBERS,
    done=st.frozensets(NAMES),
    cached=st.frozensets(NAMES),
    active=st.frozensets(NAMES),
    labels=st.just(LABELS),
)
TALES = st.lists(st.tuples(SNAPSHOTS, st.floats()), max_size=40)


@given(TALES)
def test_no_tale_breaks_it_and_time_never_goes_back(tale: list[tuple[Progress, float]]) -> None:
    line = Timeline()
    for progress, at_s in tale:
        before, line = line, line.seen(progress, at_s)
        assert math.isfinite(line.at_s)
        assert line.at_s >= before.at_s
        assert line.steps[: len(before.steps)] == before.steps
        if line.by_id:  # it was not begun anew
            assert before.by_id.keys() <= line.by_id.keys()
        for node in line.nodes:
            assert 0 <= node.started_s <= line.at_s
            assert node.seconds is None or 0 <= node.seconds <= line.at_s - node.started_s + 1e-6 * line.at_s
        assert not line.running & line.done
        assert len(line.as_list()) == len(line.nodes)


@given(TALES, st.integers(0, 39))
def test_a_repeated_snapshot_changes_nothing_but_the_time(tale: list[tuple[Progress, float]], at: int) -> None:
    line = Timeline()
    for progress, at_s in tale[: at + 1]:
        line = line.seen(progress, at_s)
    if tale:
        again = line.seen(tale[min(at, len(tale) - 1)][0], line.at_s)
        assert (again.nodes, again.steps, again.done, again.running) == (
            line.nodes, line.steps, line.done, line.running,
        )  # fmt: skip
