"""Where an executor's jobs run, at moments when something else is under way or goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import pytest

from runcomfy.application.placing import Place
from runcomfy.application.station import CloudStation
from runcomfy.domain.exceptions import MachineLost, ServerUnreachable, StoreUnavailable, WorkerDead
from runcomfy.domain.job import JobId
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Killed, Program, Programs, discrepancies, end

IDLE = timedelta(minutes=2)


def station_of(program: Program) -> CloudStation:
    return CloudStation(program.placer, server_type=None, idle_after=IDLE)


@pytest.fixture
async def station(program: Program) -> AsyncIterator[CloudStation]:
    station = station_of(program)
    yield station
    await station.close()  # tests end what they rented themselves, in virtual time


class Stay:
    """One job's stay at a place, until the test lets it end."""

    def __init__(self, station: CloudStation, prefer: str | None = None) -> None:
        self.bills: list[Any] = []
        self.there: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._stay(station, prefer))

    async def _stay(self, station: CloudStation, prefer: str | None) -> None:
        try:
            async with station.at(
                job_id=JobId("job"), show=lambda _: None, step=lambda _: None, on_bill=self.bills.append, prefer=prefer
            ) as place:
                self.there.set_result(place)
                await self._end
        except BaseException as error:
            if not self.there.done():
                self.there.set_exception(error)
                self.there.exception()  # told by the task as well
            raise

    async def leave(self, error: Exception | None = None) -> BaseException | None:
        """End; `error` is what the job failed with. Returned is what the station made of it."""
        await self.there
        self._end.set_exception(error) if error else self._end.set_result(None)
        await asyncio.wait({self.task})
        return self.task.exception()


def requested(place: Place) -> datetime:
    assert place.machine is not None
    return place.machine.requested_at


async def stay(station: CloudStation, prefer: str | None = None) -> Place:
    job = Stay(station, prefer)
    place = await job.there
    assert await job.leave() is None
    return place


def comfyui_of(cloud: RunComfyEmulator, number: int = -1) -> ComfyUIEmulator:
    server = list(cloud.machines.values())[number].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


def comfyui_at(cloud: RunComfyEmulator, place: Place) -> ComfyUIEmulator:
    assert place.machine is not None
    server = cloud.machines[str(place.machine.server_id)].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


async def crashed(programs: Programs) -> str:
    """Let an executor be killed while a job is on its machine; return the machine's key."""
    with suppress(Killed):
        async with programs.start() as program:
            job = Stay(station_of(program))
            place = await job.there
            await program.kill(job.task)
            await place.server.close()
            return place.key
    raise AssertionError


# -- the machine that is kept ------------------------------------------------------------------------------


async def test_a_job_whose_prompt_is_on_the_machine_that_is_kept_goes_on_there(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    first = await stay(station)
    again = await stay(station, prefer=first.key)
    assert again.key == first.key
    assert len(cloud.launched) == 1
    await station.close()


async def test_a_kept_machine_whose_comfyui_restarts_is_waited_for_and_nothing_is_rented_instead(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    first = await stay(station)
    server = comfyui_of(cloud)
    await server.kill()
    with pytest.raises(ServerUnreachable):
        await first.server.probe(fresh=True)
    job = Stay(station)
    await asyncio.sleep(20)
    assert not job.there.done()
    await server.start(port=server.port)
    assert (await job.there).key == first.key
    assert await job.leave() is None
    assert len(cloud.launched) == 1
    await station.close()


async def test_two_jobs_that_both_found_the_worker_dead_retire_the_machine_once_and_a_third_goes_elsewhere(
    cloud: RunComfyEmulator, station: CloudStation
) -> None:
    one, two = Stay(station), Stay(station)
    dead = (await one.there).key
    await two.there
    assert isinstance(await one.leave(WorkerDead("nothing runs")), WorkerDead)
    assert set(station.places()) == set()
    assert cloud.billing == cloud.launched  # the other job is still there
    third = await stay(station, prefer=dead)
    assert third.key != dead
    assert isinstance(await two.leave(WorkerDead("nothing runs here either")), WorkerDead)
    await asyncio.sleep(60)
    assert cloud.billing == cloud.launched[1:]
    assert set(station.places()) == {third.key}
    await station.close()


@pytest.mark.fault(22)
async def test_a_server_that_fell_silent_because_its_machine_is_gone_is_told_as_a_lost_machine(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    job = Stay(station)
    place = await job.there
    cloud.lose(list(cloud.machines.values())[-1])
    error = await job.leave(ServerUnreachable("it does not answer"))
    assert isinstance(error, MachineLost)
    assert error.details["cause"] == "comfyui-unreachable"
    assert len(job.bills) == 1  # what the job has used is billed all the same
    assert place.key not in station.places()
    await asyncio.sleep(60)
    assert await program.books.rows() == []


async def test_a_dev_server_with_the_prompt_that_is_gone_is_not_waited_for(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    machine, _, _ = await program.dev.start(server_type="medium", duration=timedelta(hours=1))
    cloud.lose(list(cloud.machines.values())[-1])
    place = await stay(station, prefer=f"machine:{machine.id}")
    assert (place.kind, len(cloud.launched)) == ("own machine", 2)
    await station.close()


async def test_a_machine_that_nobody_could_be_made_to_stop_is_told_and_stays_in_the_books(
    cloud: RunComfyEmulator, program: Program, station: CloudStation
) -> None:
    await stay(station)
    refused = cloud.next_call("DELETE servers/*", status=401, works=False, times=None)
    await asyncio.sleep(IDLE.total_seconds() + 120)
    assert "it may still bill" in program.said[-1]
    assert "then `comfyctl machines reap`" in program.said[-1]
    cloud.forget_call(refused)
    [row] = await program.books.rows()
    assert cloud.billing == [row.server_id]
    await end(program, row)
    assert await discrepancies(cloud, program) == []


# -- after a crash -----------------------------------------------------------------------------------------


async def test_two_jobs_with_prompts_on_an_abandoned_machine_take_it_over_together(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    key = await crashed(programs)
    async with programs.start() as program:
        station = station_of(program)
        jobs = [Stay(station, prefer=key) for _ in range(2)]
        assert [(await job.there).key for job in jobs] == [key, key]
        assert sum("went on with machine" in sentence for sentence in program.said) == 1
        for job in jobs:
            assert await job.leave() is None
        await station.close()
        assert len(cloud.launched) == 1
        assert cloud.alive == []


async def test_any_job_rents_when_the_abandoned_machine_has_stopped_by_itself(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    key = await crashed(programs)
    await asyncio.sleep(700)  # longer than its lease
    assert cloud.billing == []
    async with programs.start() as program:
        station = station_of(program)
        place = await stay(station)
        assert place.key != key
        assert any("of an executor that is gone is not usable" in sentence for sentence in program.said)
        await station.close()
        assert await program.books.rows() == []
        assert await discrepancies(cloud, program) == []


async def test_a_job_that_waits_for_a_silent_abandoned_machine_goes_to_the_one_taken_over_meanwhile(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one, programs.start() as two:
        olds = [station_of(one), station_of(two)]
        theirs = [Stay(old) for old in olds]
        silent, answers = sorted([await job.there for job in theirs], key=requested)
        await comfyui_at(cloud, silent).kill()
        for program in (one, two):
            program.die()
        async with programs.start() as heir:
            station = station_of(heir)
            any_job = Stay(station)
            await asyncio.sleep(20)
            assert not any_job.there.done()
            with_prompt = Stay(station, prefer=answers.key)
            assert (await with_prompt.there).key == answers.key
            assert (await any_job.there).key == answers.key
            assert len(cloud.launched) == 2
            for each in (any_job, with_prompt):
                assert await each.leave() is None
            await station.close()
            assert cloud.alive == []
        for job, old in zip(theirs, olds, strict=True):
            await asyncio.wait({job.task})
            assert isinstance(job.task.exception(), MachineLost)
            await old.close()


async def test_an_executor_that_ends_while_it_takes_a_machine_over_ends_that_machine(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    key = await crashed(programs)
    await comfyui_of(cloud).kill()
    async with programs.start() as program:
        station = station_of(program)
        job = Stay(station, prefer=key)
        await asyncio.sleep(20)
        assert not job.there.done()
        await station.close()
        await asyncio.wait({job.task})
        assert cloud.alive == []
        assert await program.books.rows() == []


async def test_a_machine_that_the_books_cannot_hand_over_is_left_to_whoever_comes_next(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    key = await crashed(programs)
    locked = True

    def visit(place: str) -> None:
        if locked and place == "before store.take_over":
            raise StoreUnavailable("the database is locked")

    async with programs.start(visit=visit) as program:
        station = station_of(program)
        elsewhere = await stay(station, prefer=key)
        assert elsewhere.key != key
        assert "is not usable: the database is locked" in program.said[0]
        assert cloud.billing == cloud.launched  # nobody has ended what is not ours
        locked = False
        assert (await stay(station, prefer=key)).key == key
        await station.close()
        assert cloud.alive == []


# -- taken for dead ----------------------------------------------------------------------------------------


async def test_an_executor_that_was_taken_for_dead_leaves_its_machine_to_the_one_that_took_it_over(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as slow, programs.start() as other:
        old, new = station_of(slow), station_of(other)
        key = (await stay(old)).key
        slow.die()
        job = Stay(new, prefer=key)
        assert (await job.there).key == key
        await asyncio.sleep(60)
        lost = Stay(old)
        with pytest.raises(MachineLost, match="another process has ended it or looks after it now"):
            await lost.task
        await asyncio.sleep(60)
        assert cloud.billing == cloud.launched[:1]
        assert await job.leave() is None
        await new.close()
        await old.close()
        assert cloud.alive == []


@pytest.mark.parametrize("blip", [1, 2])
async def test_a_machine_that_one_answer_denies_is_kept_with_its_job(
    cloud: RunComfyEmulator, program: Program, station: CloudStation, blip: int
) -> None:
    job = Stay(station)
    await job.there
    cloud.next_call("GET servers/*", status=404, times=blip)
    await asyncio.sleep(120)
    assert cloud.billing == cloud.launched
    assert await job.leave() is None
    await station.close()
    assert await discrepancies(cloud, program) == []
