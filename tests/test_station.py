"""Where an executor's jobs run: the machine stays between jobs, is shared, outlives a crash, and is ended when idle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from runcomfy.application.placing import Place, Placer, owed
from runcomfy.application.prompting import find_prompt
from runcomfy.application.station import CloudStation, GivenStation, Station
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    GpuOutOfMemory,
    MachineLost,
    NodeFailed,
    ProviderError,
    ServerUnreachable,
    WorkerDead,
)
from runcomfy.domain.job import JobId, PromptId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Killed, Program, Programs, discrepancies
from runcomfy.testing.queue_programs import drawing

IDLE = timedelta(minutes=2)


@pytest.fixture
async def station(program: Program) -> AsyncIterator[CloudStation]:
    station = station_of(program)
    yield station
    await station.close()  # tests end what they rented themselves, in virtual time


def station_of(program: Program) -> CloudStation:
    return CloudStation(program.placer, server_type=None, idle_after=IDLE)


class Stay:
    """One job's stay at a place, for as long as the test wants."""

    def __init__(self, station: Station, **options: Any) -> None:
        self.steps: list[str] = []
        self.bills: list[Any] = []
        self.shown: list[Any] = []
        self.place: Place | None = None
        self._leave, self._there = asyncio.Event(), asyncio.Event()
        self._error: BaseException | None = None
        self.task = asyncio.create_task(self._stay(station, options))

    async def _stay(self, station: Station, options: dict[str, Any]) -> None:
        async with station.at(
            job_id=JobId("job"), show=self.shown.append, step=self.steps.append, on_bill=self.bills.append, **options
        ) as self.place:
            self._there.set()
            await self._leave.wait()
            if self._error is not None:
                raise self._error

    async def there(self) -> Place:
        entered = asyncio.create_task(self._there.wait())
        await asyncio.wait({self.task, entered}, return_when=asyncio.FIRST_COMPLETED)
        entered.cancel()
        if not self._there.is_set():
            self.task.result()
        assert self.place is not None
        return self.place

    async def leave(self, error: BaseException | None = None) -> Place:
        self._error = error
        self._leave.set()
        if error is None:
            await self.task
        else:
            with suppress(type(error), MachineLost):
                await self.task
        assert self.place is not None
        return self.place


async def stay(station: Station, seconds: float = 0.0, **options: Any) -> Place:
    job = Stay(station, **options)
    await job.there()
    await asyncio.sleep(seconds)
    return await job.leave()


def comfyui_of(cloud: RunComfyEmulator, number: int = -1) -> ComfyUIEmulator:
    server = list(cloud.machines.values())[number].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


# -- a given server ----------------------------------------------------------------------------------------


async def test_a_given_server_is_one_place_by_whatever_name_this_computer_calls_itself(clock: LoopClock) -> None:
    async with ComfyUIEmulator() as comfyui, App(clock=clock) as app:
        placer = Placer(app.comfyui, app.given_server, app.cloud, tell=app.tell)
        station = GivenStation(placer, comfyui.url)
        await station.ready()
        place = await stay(station)
        assert (place.kind, place.alone, place.bill) == ("server", False, ())
        assert set(station.places()) == {place.key}
        same = GivenStation(placer, comfyui.url.replace("127.0.0.1", "localhost"))
        assert same.key == station.key
        await station.idle()
        await station.close()
        await comfyui.kill()
        with pytest.raises(ServerUnreachable):
            await station.ready()
        with pytest.raises(ServerUnreachable):
            await stay(station)
        await comfyui.start(port=comfyui.port)


# -- a machine of its own ----------------------------------------------------------------------------------


async def test_one_machine_serves_job_after_job_and_is_ended_when_it_had_nothing_to_do(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    places = [await stay(station, 30) for _ in range(3)]
    assert len(cloud.launched) == 1
    assert {place.key for place in places} == set(station.places())
    assert all(place.kind == "own machine" and not place.alone for place in places)
    await asyncio.sleep(IDLE.total_seconds() - 5)
    assert cloud.billing
    await stay(station, 1)
    await asyncio.sleep(IDLE.total_seconds() - 5)
    assert cloud.billing
    await asyncio.sleep(30)
    assert cloud.alive == []
    assert station.places() == set()
    assert await discrepancies(cloud, program) == []
    await stay(station, 1)
    assert len(cloud.launched) == 2
    await station.close()
    assert cloud.alive == []


async def test_jobs_at_the_same_time_share_the_machine_and_its_price(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    jobs = [Stay(station) for _ in range(4)]
    keys = {(await job.there()).key for job in jobs}
    assert len(keys) == len(cloud.launched) == 1
    await asyncio.sleep(100)
    seconds = []
    for job in jobs:
        seconds.append((await job.leave()).bill[0].seconds)
        await asyncio.sleep(60)
    # 100 s among four, then 60 s among three, two and one
    assert [round(float(s)) for s in seconds] == [25, 45, 75, 135]
    assert [job.bills[0] for job in jobs] == [job.place.bill for job in jobs if job.place]
    assert all(job.shown for job in jobs)
    assert all("boot" in job.steps for job in jobs)
    await station.close()


async def test_what_a_job_owes_is_known_before_it_leaves(station: CloudStation, clock: LoopClock) -> None:
    job = Stay(station)
    place = await job.there()
    await asyncio.sleep(36)
    [line] = owed(place, now=clock.now())
    assert 36 <= line.seconds < 37
    assert line.amount_usd == (line.usd_per_hour * line.seconds / 3600).quantize(Decimal("0.000001"))
    await job.leave()
    await station.close()


async def test_the_lease_is_renewed_between_jobs_too(cloud: RunComfyEmulator, program: Program) -> None:
    station = CloudStation(program.placer, server_type=None, idle_after=timedelta(hours=2))
    await stay(station)
    for _ in range(60):
        await asyncio.sleep(60)
        machine = cloud.machines[cloud.launched[0]]
        assert machine.bills
        assert machine.stops_at is not None
        assert timedelta(0) < machine.stops_at - cloud.now() <= timedelta(minutes=10, seconds=1)
    await station.close()
    assert cloud.alive == []


async def test_a_start_that_nobody_waits_for_any_more_is_broken_off(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    first, second = Stay(station), Stay(station)
    await asyncio.sleep(60)
    first.task.cancel()
    await asyncio.sleep(10)
    assert len(cloud.alive) == 1
    second.task.cancel()
    await asyncio.sleep(60)
    assert cloud.alive == []
    await stay(station)
    assert len(cloud.launched) == 2
    await station.close()


async def test_a_start_that_fails_is_told_to_everybody_and_the_next_job_tries_anew(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    cloud.next_machine(comfyui="502")
    jobs = [Stay(station) for _ in range(3)]
    outcomes = await asyncio.gather(*(job.task for job in jobs), return_exceptions=True)
    assert [getattr(error, "code", "") for error in outcomes] == ["machine-failed"] * 3
    assert cloud.alive == []
    await stay(station)
    assert len(cloud.launched) == 2
    await station.close()


@pytest.mark.fault(22)
@pytest.mark.fault(68)
async def test_a_machine_that_went_away_between_jobs_is_replaced(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    cloud.next_machine(vanishes_after=60)
    first = await stay(station)
    await asyncio.sleep(90)
    second = await stay(station)
    assert second.key != first.key
    assert set(station.places()) == {second.key}
    await station.close()
    assert cloud.alive == []
    assert await program.books.rows() == []


@pytest.mark.fault(22)
async def test_a_machine_that_goes_away_under_a_job_is_a_lost_machine_and_no_place_any_more(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    cloud.next_machine(vanishes_after=60)
    job = Stay(station)
    place = await job.there()
    await asyncio.sleep(90)
    with pytest.raises(ServerUnreachable) as caught:
        await place.server.probe(fresh=True)
    await job.leave(caught.value)
    assert isinstance(job.task.exception(), MachineLost)
    assert place.key not in station.places()
    await asyncio.sleep(30)
    assert cloud.alive == []


@pytest.mark.fault(41)
async def test_a_machine_that_is_out_of_order_is_not_used_again(cloud: RunComfyEmulator, station: CloudStation) -> None:
    job = Stay(station)
    await job.there()
    await job.leave(NodeFailed("a node burst"))
    assert len(station.places()) == 1
    for error in (GpuOutOfMemory("1"), GpuOutOfMemory("2")):
        job = Stay(station)
        await job.there()
        await job.leave(error)
    await asyncio.sleep(60)
    assert cloud.alive == []
    job = Stay(station)
    await job.there()
    await job.leave(WorkerDead("nothing runs"))
    await asyncio.sleep(60)
    assert cloud.alive == []
    assert len(cloud.launched) == 2


async def test_what_cannot_be_paid_for_is_known_without_renting(
    cloud: RunComfyEmulator, programs: Programs, program: Program, station: CloudStation
) -> None:
    await station.ready()
    async with programs.start(max_usd_per_hour=Decimal("0.01")) as poor:
        with pytest.raises(BudgetExceeded):
            await station_of(poor).ready()
    cloud.next_call("GET servers", status=401, times=10)
    with pytest.raises(ProviderError):
        await station.ready()
    assert cloud.launched == []


# -- the dev server ----------------------------------------------------------------------------------------


async def test_the_dev_server_is_used_while_it_lives_and_then_a_machine_of_its_own(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    machine, _, _ = await program.dev.start(server_type="medium", duration=timedelta(hours=1))
    station.places()
    await asyncio.sleep(1)
    assert set(station.places()) == {f"machine:{machine.id}"}
    place = await stay(station, 60)
    assert (place.kind, place.key) == ("dev server", f"machine:{machine.id}")
    assert await program.store.uses([machine.id]) == []
    await program.dev.shutdown()
    place = await stay(station, 1)
    assert place.kind == "own machine"
    assert len(cloud.launched) == 2
    await station.close()


async def test_a_dev_server_that_has_a_prompt_and_does_not_answer_is_waited_for(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    """Invariant I12: the prompt may go on there; nothing is decided, and nothing is rented."""
    machine, _, _ = await program.dev.start(server_type="medium", duration=timedelta(hours=1))
    key = f"machine:{machine.id}"
    await comfyui_of(cloud).kill()
    with pytest.raises(ServerUnreachable, match="does not answer"):
        await stay(station, prefer=key)
    assert len(cloud.launched) == 1
    await program.dev.shutdown()
    place = await stay(station, prefer=key)
    assert place.key != key
    await station.close()


# -- after a crash -----------------------------------------------------------------------------------------

GRAPH = {
    "1": {"class_type": "EmulatorDelay", "inputs": {"seconds": 600, "steps": 10, "previews": False, "seed": 1}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "late"}},
}
PROMPT = PromptId("3f0e8a52-7d6b-4c1e-9d57-0b8f5a4c2e11")


async def crash_with_a_prompt(programs: Programs) -> str:
    """Let an executor be killed while its prompt runs on its machine; return the machine's key."""
    with suppress(Killed):
        async with programs.start() as program:
            job = Stay(station_of(program))
            place = await job.there()
            async with place.server.listen(PROMPT):
                await place.server.submit(GRAPH, prompt_id=PROMPT)
            await asyncio.sleep(30)
            await program.kill(job.task)
            await place.server.close()
            return place.key
    raise AssertionError


@pytest.mark.parametrize("hint", [True, False], ids=["job with a prompt", "any job"])
async def test_the_machine_of_a_killed_executor_is_taken_over_with_the_prompt_on_it(
    cloud: RunComfyEmulator, programs: Programs, hint: bool
) -> None:
    """Invariant I20: nothing runs twice, and nothing is rented anew."""
    key = await crash_with_a_prompt(programs)
    assert cloud.billing
    async with programs.start() as program:
        station = station_of(program)
        assert station.places() == set()
        await asyncio.sleep(1)
        assert set(station.places()) == {key}
        job = Stay(station, prefer=key if hint else None)
        place = await job.there()
        assert place.key == key
        assert await find_prompt(place.server, PROMPT) is not None
        await asyncio.sleep(1500)  # its lease is renewed, too
        assert cloud.billing == cloud.launched
        assert len(cloud.launched) == 1
        await job.leave()
        assert set(station.places()) == {key}
        await station.close()
        assert cloud.alive == []
        assert await discrepancies(cloud, program) == []


async def test_only_one_of_two_executors_takes_a_machine_over(cloud: RunComfyEmulator, programs: Programs) -> None:
    key = await crash_with_a_prompt(programs)
    async with programs.start() as one, programs.start() as other:
        stations = [station_of(one), station_of(other)]
        jobs = [Stay(station, prefer=key) for station in stations]
        places = [await job.there() for job in jobs]
        assert sorted(place.key == key for place in places) == [False, True]
        assert len(cloud.launched) == 2
        for job in jobs:
            await job.leave()
        for station in stations:
            await station.close()
    assert cloud.alive == []


async def test_a_machine_that_stopped_by_itself_before_it_was_taken_over_is_let_go(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    key = await crash_with_a_prompt(programs)
    await asyncio.sleep(700)  # longer than its lease
    assert cloud.billing == []
    async with programs.start() as program:
        station = station_of(program)
        place = await stay(station, prefer=key)
        assert place.key != key
        assert len(cloud.launched) == 2
        await station.close()
        assert await program.books.rows() == []


async def test_the_machine_of_a_living_executor_or_of_a_single_run_is_no_place_of_ours(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program, programs.start() as other:
        theirs = Stay(station_of(other))
        await theirs.there()
        single = asyncio.create_task(_single_run(program))
        await asyncio.sleep(400)
        station = station_of(program)
        station.places()
        await asyncio.sleep(1)
        assert station.places() == set()
        place = await theirs.leave()
        single.cancel()
        await asyncio.wait({single})
        assert place.key
        await asyncio.sleep(IDLE.total_seconds() + 30)
    assert cloud.alive == []


async def _single_run(program: Program) -> None:
    async with program.placer.at(
        server_url=None, server_type=None, job_id=JobId("single"), show=lambda _: None, step=lambda _: None
    ):
        await asyncio.sleep(3600)


async def test_the_stations_keep_the_protocol(program: Program) -> None:
    stations: list[Station] = [station_of(program), GivenStation(program.placer, "http://127.0.0.1:8188")]
    assert [station.places() != () for station in stations] == [True, True]
    for station in stations:
        await station.close()


# -- use by hand -------------------------------------------------------------------------------------------


@pytest.mark.fault(69)
async def test_a_machine_where_somebody_computes_by_hand_is_not_ended_for_having_no_job(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    """Invariant I8: also beyond the lease; it is ended as soon as that is done."""
    place = await stay(station, 5)
    server = comfyui_of(cloud)
    by_hand = PromptId(str(uuid4()))
    await place.server.submit(drawing(1_500, 1), prompt_id=by_hand)
    await asyncio.sleep(IDLE.total_seconds() + 60)
    await station.idle()
    await asyncio.sleep(1_200)
    assert len(cloud.billing) == 1
    assert sum("a prompt that somebody has sent by hand" in sentence for sentence in program.said) == 1
    await asyncio.sleep(200)
    assert cloud.alive == []
    assert [(run.prompt_id, run.outcome) for run in server.run_log] == [(by_hand, "success")]
    assert await discrepancies(cloud, program) == []


@pytest.mark.fault(39)
@pytest.mark.fault(69)
async def test_a_prompt_that_waits_at_a_dead_worker_keeps_no_machine(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    """Nothing computes there, and nothing ever would: it is ended, and not paid for until somebody looks."""
    place = await stay(station, 5)
    server = comfyui_of(cloud)
    server.kill_worker()
    await place.server.submit(drawing(5, 1), prompt_id=PromptId(str(uuid4())))
    await asyncio.sleep(IDLE.total_seconds() + 15)
    assert len(cloud.billing) == 1
    await asyncio.sleep(90)
    assert cloud.alive == []
    assert server.run_log == []
