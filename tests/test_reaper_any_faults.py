"""Any faults in any order: nothing of ours bills afterwards, and no stranger is hurt."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runcomfy.application.finish import finish
from runcomfy.domain.exceptions import LaunchAmbiguous, RunComfyError
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Killed, Programs, discrepancies, settings_for

CALLS = ["POST servers", "GET servers", "GET servers/*", "DELETE servers/*", "*"]
SILENCES = ["lost", "never", "truncated", "html", "empty", "reset"]

call_faults = st.fixed_dictionaries(
    {"call": st.sampled_from(CALLS), "times": st.integers(1, 4), "skip": st.integers(0, 3)},
    optional={
        "works": st.booleans(),
        "reply": st.sampled_from(SILENCES),
        "status": st.sampled_from([404, 408, 429, 500, 502, 503]),
        "delay": st.sampled_from([0.5, 5.0, 45.0]),
    },
)
machine_faults = st.fixed_dictionaries(
    {},
    optional={
        "unlisted_for": st.sampled_from([0, 40, 110]),
        "hidden_for": st.sampled_from([0, 40, 110]),
        "boot_time": st.sampled_from([0, 5, 60, 400]),
        "stuck": st.booleans(),
        "fails": st.booleans(),
        "flaps": st.sampled_from([3, 11]),
        "vanishes_after": st.sampled_from([1, 30]),
        "delete_takes": st.sampled_from([0, 20]),
        "listed_after": st.sampled_from([0, 40]),
        "status": st.sampled_from(["Provisioning", None]),
    },
)
ends = st.sampled_from(["in order", "cancelled", "killed"])


@pytest.mark.fault(12)
@settings(max_examples=min(settings().max_examples // 4, 100), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    faults=st.lists(call_faults, max_size=4),
    traits=st.lists(machine_faults, max_size=2),
    jobs=st.lists(st.tuples(ends, st.sampled_from([0.0, 0.7, 4.0, 35.0, 130.0, 200.0])), min_size=1, max_size=3),
)
@example(faults=[], traits=[{}, {"hidden_for": 110, "boot_time": 0, "flaps": 3}], jobs=[("in order", 0.0)] * 2)
@example(faults=[], traits=[{"status": "Provisioning", "flaps": 3, "delete_takes": 0}], jobs=[("killed", 200.0)])
async def test_whatever_goes_wrong_nothing_of_ours_bills_afterwards_and_no_stranger_is_hurt(
    tmp_path_factory: pytest.TempPathFactory,
    faults: list[dict[str, Any]],
    traits: list[dict[str, Any]],
    jobs: list[tuple[str, float]],
) -> None:
    clock = LoopClock()
    async with RunComfyEmulator(now=clock.now, comfyui=False) as cloud:
        account = CloudSettings(
            base_url=cloud.url,
            user_id=cloud.user_id,
            tokens=(Secret(cloud.token),),
            workflow_version_id=str(cloud.workflows[0]["version_id"]),
            boot_timeout=timedelta(minutes=5),
        )
        programs = Programs(cloud, settings_for(account, tmp_path_factory.mktemp("story")), clock)
        stranger = cloud.foreign("medium", duration=36_000)
        for fault in faults:
            # A clear no to something that was done all the same is a lie that nobody can see through.
            lies = fault.get("status") in (404, 429)
            cloud.next_call(**{**fault, "works": False} if lies else fault)
        for trait in traits:
            cloud.next_machine(**trait)
        for end, after in jobs:
            await one_job(programs, end, after)
        cloud.behave()
        for machine in cloud.machines.values():
            machine.traits.status = None
        await asyncio.sleep(150)  # what was hidden is visible; what is ours has nobody any more
        async with programs.start() as later:
            done = await later.reaper.reap()
            assert [error for _, error in done.failed if not isinstance(error, LaunchAmbiguous)] == []
            assert done.unresolved == []
            assert cloud.billing == []
            assert cloud.alive == []
            assert stranger.bills
            assert not [c for c in cloud.calls if c.method == "DELETE" and stranger.server_id in c.path]
            assert await later.books.rows() == []
            if not any("vanishes_after" in trait for trait in traits) or all(end != "killed" for end, _ in jobs):
                # When a machine ended by itself with nobody looking, only the cloud knows.
                assert await discrepancies(cloud, later) == []


async def one_job(programs: Programs, end: str, after: float) -> None:
    """Rent a machine, use it for half a minute, end it; by itself, by Ctrl+C, or not at all."""
    async with programs.start() as program:
        intent = program.intent()

        async def job() -> None:
            try:
                await program.machines.wait_ready(await program.launch(intent))
                await asyncio.sleep(30)
            finally:
                await finish(program.machines.settle(intent, reason="the job is over"))

        task = asyncio.create_task(job())
        if end == "in order":
            await asyncio.wait({task})
        else:
            await asyncio.wait({task}, timeout=after)
            if end == "killed":
                await program.kill(task)
            else:
                task.cancel()
                await asyncio.wait({task})
        error = None if task.cancelled() else task.exception()
        assert error is None or isinstance(error, (RunComfyError, Killed)), repr(error)
