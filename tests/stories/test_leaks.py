"""Nothing of ours lives on: then the lease at most is billed. The benchmark `leaks` tells it for every kill point."""

from __future__ import annotations

from pathlib import Path

import pytest

from runcomfy.testing.leaks import STORIES, Death, allowed, kill_points, leak_of

WORST = (
    Death("after provider.launch_machine", 1),
    Death("launch.answered", 1),
    Death("during provider.launch_machine", 1),
    Death("extend.answered", 1),
    Death("during provider.change_duration", 1),
    Death("before provider.stop_machine", 1),
    Death("during provider.stop_machine", 1),
)
"""Places where something was asked for and is not written down yet, or was written down and is not asked for."""


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("death", WORST, ids=str)
async def test_where_the_provider_keeps_its_word_a_lease_at_most_is_billed(
    story: str, death: Death, tmp_path: Path
) -> None:
    leak = await leak_of(story, death, tmp_path, keeps_word=True)
    assert leak.died
    assert not leak.still_bills
    assert leak.seconds <= allowed(story, keeps_word=True).total_seconds()


@pytest.mark.fault(23)
@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("death", WORST, ids=str)
async def test_where_it_ignores_leases_the_guard_ends_them_within_a_period(
    story: str, death: Death, tmp_path: Path
) -> None:
    leak = await leak_of(story, death, tmp_path, keeps_word=False)
    assert leak.died
    assert not leak.still_bills
    assert leak.seconds <= allowed(story, keeps_word=False).total_seconds()
    assert leak.ledger_usd == leak.bill_usd


@pytest.mark.parametrize("story", STORIES)
async def test_every_durable_write_and_remote_call_is_a_kill_point(story: str, tmp_path: Path) -> None:
    places = {death.place for death in await kill_points(story, tmp_path / "points")}
    for call in ("launch_machine", "change_duration", "stop_machine"):
        assert {f"{when} provider.{call}" for when in ("before", "during", "after")} <= places
    named = {"launch.intended", "launch.answered", "launch.recorded", "extend.asked", "extend.answered", "stop.asked"}
    assert named <= places
    if story == "dev server":
        assert {"use.begun", "use.ended"} <= places
