"""The bar that CONJURE shows: fed with what ComfyUI really says, it moves with the work and ends at 100."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.conjure import progress_tracker as remembered
from runcomfy.conjure.progress_tracker import MAX_WORKFLOWS, FluxMeshProgressTracker
from runcomfy.domain.progress import Progress, Step
from runcomfy.testing.clock import LoopClock
from runcomfy.workflow_progress_tracker import progress_tracker

ORDER = ["4", "8", "10", "13", "30", "36", "16", "25", "34", "19", "14", "6", "3", "7", "37", "24", "32", "33"]


@pytest.fixture
def tracker() -> FluxMeshProgressTracker:
    return FluxMeshProgressTracker()


def bar(tracker: FluxMeshProgressTracker, prompt_id: str = "p") -> float:
    summary = tracker.get_workflow_summary(prompt_id)
    assert summary is not None
    return float(summary["overall_progress"])


def test_the_stages_are_those_of_the_workflow(tracker: FluxMeshProgressTracker) -> None:
    assert sum(stage.weight for stage in tracker.workflow_stages) == pytest.approx(1)
    assert sorted(tracker.node_to_stage, key=int) == sorted(ORDER, key=int)
    assert tracker.node_to_stage["33"] == "export"
    assert isinstance(progress_tracker, FluxMeshProgressTracker)


def test_a_whole_run_moves_the_bar_although_only_two_nodes_say_executed(tracker: FluxMeshProgressTracker) -> None:
    tracker.start_workflow_tracking("generate_flux_mesh", "p", "c")
    seen = []
    for node_id in ORDER:
        tracker.update_node_progress("p", node_id, "executing")
        if node_id in ("24", "33"):
            tracker.update_node_progress("p", node_id, "executed", {"title": "EXPORT"})
        seen.append(bar(tracker))
    assert seen == sorted(seen)
    assert len(set(seen)) > len(ORDER) // 2
    assert seen[-1] == 100
    tracker.handle_workflow_completion("p")
    summary = tracker.get_workflow_summary("p")
    assert summary is not None
    assert (summary["status"], summary["overall_progress"], summary["current_stage"]) == ("completed", 100.0, None)
    assert all(stage["status"] == "completed" for stage in summary["stages"])
    assert all(stage["nodes_completed"] == stage["nodes_total"] for stage in summary["stages"])
    assert summary["start_time"] <= summary["end_time"]


def test_what_was_cached_counts_once_a_node_that_needs_it_runs(tracker: FluxMeshProgressTracker) -> None:
    """A second run: the models stay loaded and ComfyUI speaks of nothing before the sampler."""
    tracker.start_workflow_tracking("generate_flux_mesh", "p", "c")
    known = tracker.update_node_progress("p", "3", "progress", None, {"value": 10, "max": 20})
    assert known is not None
    assert (known.nodes["3"].status, known.nodes["25"].status) == ("executing", "executed")
    summary = tracker.get_workflow_summary("p")
    assert summary is not None
    done = {stage["name"]: stage["status"] for stage in summary["stages"]}
    assert done["Input processing"] == done["ControlNet setup"] == done["Text encoding"] == "completed"
    assert summary["current_stage"] == "FLUX sampling"
    # four of the six loaders, the input, the prompt, the control, the empty picture and half of the sampling
    assert summary["overall_progress"] == pytest.approx(100 * (0.15 * 3 / 6 + 0.25 + 0.15), abs=0.1)


def test_our_engines_snapshots_drive_it_from_the_first_machine_to_the_end(tracker: FluxMeshProgressTracker) -> None:
    tracker.observe("p", Progress(Step.BOOTING, message="the machine starts"))
    summary = tracker.get_workflow_summary("p")
    assert summary is not None
    assert (summary["message"], summary["overall_progress"]) == ("the machine starts", 0)
    tracker.observe("p", Progress(Step.RUNNING, 40, node_id="32", value=25, maximum=50, nodes_done=15, nodes_total=18))
    half_way = bar(tracker)
    assert 60 < half_way < 100
    tracker.observe("p", Progress(Step.FETCHING, 100, nodes_done=18, nodes_total=18))
    assert bar(tracker) == 100
    tracker.observe("p", Progress(Step.FINISHED, 100))
    tracker.handle_workflow_completion("p", success=False, error_message="too late to say so")
    known = tracker.get_workflow_progress("p")
    assert known is not None
    assert (known.status, known.error_message) == ("completed", None)


def test_another_workflow_has_its_own_percent_and_no_stages(tracker: FluxMeshProgressTracker) -> None:
    tracker.observe("p", Progress(Step.RUNNING, 37.5, node_id="9"), workflow_name="wf_realistic_portrait")
    summary = tracker.get_workflow_summary("p")
    assert summary is not None
    assert (summary["stages"], summary["overall_progress"]) == ([], 37.5)


def test_a_failure_is_told_with_its_reason_made_safe(tracker: FluxMeshProgressTracker) -> None:
    tracker.start_workflow_tracking("generate_flux_mesh", "p", "c")
    tracker.update_node_progress("p", "3", "executing")
    tracker.handle_workflow_completion("p", success=False, error_message="no memory\x1b[31m" + "x" * 999)
    known = tracker.get_workflow_progress("p")
    assert known is not None
    assert known.status == known.nodes["3"].status == "failed"
    assert known.error_message is not None
    assert known.error_message.isprintable()
    assert len(known.error_message) <= 256
    tracker.update_node_progress("p", "33", "executed")
    assert tracker.get_workflow_progress("p") == known


def test_what_is_unknown_is_none_and_changes_nothing(tracker: FluxMeshProgressTracker) -> None:
    assert tracker.update_node_progress("?", "3", "executing") is None
    tracker.handle_workflow_completion("?")
    assert tracker.get_workflow_summary("?") is None
    assert tracker.get_workflow_progress("?") is None
    assert tracker.summaries() == []


def test_snapshots_are_not_the_trackers_own(tracker: FluxMeshProgressTracker) -> None:
    started = tracker.start_workflow_tracking("generate_flux_mesh", "p", "c")
    started.stages.clear()
    tracker.workflow_stages[-1].nodes.append("99")
    summary = tracker.get_workflow_summary("p")
    assert summary is not None
    assert len(summary["stages"]) == 10
    assert summary["stages"][-1]["nodes_total"] == 2


async def test_old_workflows_are_forgotten(clock: LoopClock) -> None:
    import asyncio

    tracker = FluxMeshProgressTracker(clock=clock)
    tracker.start_workflow_tracking("generate_flux_mesh", "old", "c")
    tracker.handle_workflow_completion("old")
    tracker.start_workflow_tracking("generate_flux_mesh", "runs", "c")
    await asyncio.sleep(25 * 3600)
    tracker.start_workflow_tracking("generate_flux_mesh", "new", "c")
    tracker.handle_workflow_completion("new")
    assert tracker.cleanup_completed_workflows() == 1
    assert list(tracker.active_workflows) == ["runs", "new"]


def test_memory_is_bounded_and_what_runs_stays_longest(tracker: FluxMeshProgressTracker) -> None:
    tracker.start_workflow_tracking("generate_flux_mesh", "runs", "c")
    for number in range(MAX_WORKFLOWS + 50):
        tracker.start_workflow_tracking("generate_flux_mesh", f"p{number}", "c", staged=False)
        tracker.handle_workflow_completion(f"p{number}")
    assert len(tracker.active_workflows) == MAX_WORKFLOWS
    assert "runs" in tracker.active_workflows


def test_a_workflow_of_more_nodes_than_are_remembered_goes_on_with_those_that_are(
    tracker: FluxMeshProgressTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "MAX_NODES", 30)
    tracker.start_workflow_tracking("generate_flux_mesh", "p", "c")
    for number in range(29):
        tracker.update_node_progress("p", f"other-{number}", "executed")
    tracker.update_node_progress("p", "3", "executing")  # what it needs finds no room
    known = tracker.update_node_progress("p", "24", "executed")
    assert known is not None
    assert (len(known.nodes), known.nodes["3"].status, "24" in known.nodes) == (30, "executing", False)
    tracker.observe("p", Progress(Step.RUNNING, node_id="24", value=1.0, maximum=2.0))
    tracker.observe("p", Progress(Step.FETCHING))
    known = tracker.get_workflow_progress("p")
    assert known is not None
    assert (len(known.nodes), known.nodes["3"].status, "24" in known.nodes) == (30, "executed", False)
    tracker.observe("p", Progress(Step.FINISHED))
    assert bar(tracker) == 100


def test_many_threads_may_tell_and_ask_at_once(tracker: FluxMeshProgressTracker) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(20):
                tracker.start_workflow_tracking("generate_flux_mesh", name, "c")
                for node_id in ORDER:
                    tracker.update_node_progress(name, node_id, "executing")
                    tracker.summaries()
                tracker.handle_workflow_completion(name)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"p{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(summary["overall_progress"] == 100 for summary in tracker.summaries())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*ORDER, "99", "32.0.1"]),
            st.sampled_from(["executing", "executed", "progress", "execution_cached", "?"]),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=60,
    )
)
def test_the_bar_never_goes_back_and_never_leaves_its_range(events: list[tuple[str, str, float]]) -> None:
    tracker = FluxMeshProgressTracker()
    tracker.start_workflow_tracking("generate_flux_mesh", "p", "c")
    last = 0.0
    for node_id, kind, value in events:
        tracker.update_node_progress("p", node_id, kind, None, {"value": value, "max": 20})
        now = bar(tracker)
        assert last <= now <= 100
        last = now


def test_a_workflow_is_found_by_its_jobs_id_too_until_it_is_forgotten(tracker: FluxMeshProgressTracker) -> None:
    tracker.start_workflow_tracking("generate_flux_mesh", "a-prompt", "c")
    tracker.name_also("a-prompt", "a-job")
    tracker.name_also("nobodys", "another")
    tracker.update_node_progress("a-job", "3", "executing")
    shown = tracker.get_workflow_summary("a-job")
    assert shown is not None
    assert shown == tracker.get_workflow_summary("a-prompt")
    assert (shown["prompt_id"], list(tracker.active_workflows)) == ("a-prompt", ["a-prompt"])
    assert tracker.get_workflow_summary("another") is None
    tracker.handle_workflow_completion("a-job")
    assert tracker.cleanup_completed_workflows(max_age_hours=0) == 1
    assert tracker.get_workflow_summary("a-job") is None
    for number in range(2 * MAX_WORKFLOWS):
        tracker.start_workflow_tracking("generate_flux_mesh", f"p{number}", "c")
        tracker.name_also(f"p{number}", f"j{number}")
    assert tracker.get_workflow_summary("j0") is None
    assert tracker.get_workflow_summary(f"j{2 * MAX_WORKFLOWS - 1}") is not None
