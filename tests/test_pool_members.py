"""One machine of a pool by itself: when it takes jobs, and what the provider's list makes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.application.pool_members import Member, Members
from runcomfy.application.pool_watch import LIST_AGAIN_MOST, Watch
from runcomfy.application.pooled import PooledMachine
from runcomfy.domain.exceptions import AnswerUnreadable, MachineLost, RunComfyError, ServerTooOld, ServerUnreachable
from runcomfy.domain.machine import MachineEvent, MachineReport, MachineState, Phase, ServerId
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import CloudSettings, PoolSettings
from runcomfy.ports.comfyui import ServerInfo
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, settings_for


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    settings = settings_for(cloud_settings, tmp_path / "state")
    return Programs(cloud, replace(settings, pool=PoolSettings(max_machines=8)), clock)


# -- one machine of a pool ---------------------------------------------------------------------------------------


class Kept:
    """The machines of a pool without its loops, and one of them."""

    def __init__(self, program: Program) -> None:
        self.told = 0
        self.members = Members(program.machines, program.placer.comfyui)
        self.members.on_change(self._changed)
        now = asyncio.get_running_loop().time()
        pooled = PooledMachine(program.intent(), launched_at=now, expected_ready_at=now + 180)
        self.member = self.members.add(Member(pooled, hold_s=30.0))
        self.pooled = pooled

    def _changed(self) -> None:
        self.told += 1


async def test_a_machine_that_is_usable_takes_jobs_and_one_that_is_void_has_lost_them(program: Program) -> None:
    kept = Kept(program)
    members, member, pooled = kept.members, kept.member, kept.pooled
    assert (len(members), list(members), members.pooled) == (1, [member], (pooled,))
    await asyncio.sleep(100)
    assert kept.told == 1
    now = asyncio.get_running_loop().time()
    members.sent(member)  # its start counts from now
    assert (pooled.launched_at, pooled.expected_ready_at, member.down_since) == (now, now + 180, now)
    assert not pooled.takes_jobs
    client: Any = object()
    pooled.warm.add("portrait")
    members.usable(member, client)
    assert (pooled.stage, pooled.server, pooled.takes_jobs, pooled.warm) == (Stage.READY, client, True, set())
    assert (member.usable, member.was_usable, member.probed_at) == (True, True, now)
    assert (pooled.hold_until, pooled.idle_since, pooled.expected_ready_at) == (now + 30, now, now)
    members.suspect(member, "it says nothing")
    changes = pooled.changes
    members.suspect(member, "it says nothing")
    assert (pooled.suspect, pooled.takes_jobs, pooled.changes) == ("it says nothing", False, changes)
    epoch = pooled.epoch
    pooled.warm.add("portrait")
    members.void(member, "it is not Ready any more")
    assert (pooled.stage, member.usable, pooled.void, pooled.epoch) == (Stage.BOOTING, False, True, epoch + 1)
    assert (pooled.warm, pooled.idle_since, pooled.outran) == (set(), None, False)
    await asyncio.sleep(10)
    members.usable(member, client)
    assert (pooled.hold_until, pooled.epoch, pooled.void, pooled.suspect) == (now + 30, epoch + 2, False, "")
    await asyncio.sleep(1)
    assert kept.told == 3  # once for what happens together


async def test_a_machine_that_goes_at_the_end_of_what_is_paid_did_not_die_of_its_jobs(program: Program) -> None:
    kept = Kept(program)
    member, now = kept.member, asyncio.get_running_loop().time()
    late = 2 * program.machines.settings.pool.status_every.total_seconds()
    assert member.left(now) is None
    member.billed_since, member.confirmed_s = now - 100, 160 + late
    assert member.left(now) == 60 + late
    for passed, outran in ((59, False), (1, True), (late + 60, True)):
        await asyncio.sleep(passed)
        kept.members.void(member, "it is gone")
        assert kept.pooled.outran == outran


async def test_a_machine_that_drains_keeps_its_first_reason_and_takes_no_jobs(program: Program) -> None:
    kept = Kept(program)
    members, member, pooled = kept.members, kept.member, kept.pooled
    members.usable(member, object())  # type: ignore[arg-type]
    changes = pooled.changes
    members.drain(member, "nothing is to do")
    assert (pooled.draining, pooled.stage, pooled.takes_jobs) == ("nothing is to do", Stage.DRAINING, False)
    assert pooled.changes == changes + 1
    members.drain(member, "another reason")
    assert (pooled.draining, pooled.changes) == ("nothing is to do", changes + 1)
    assert not member.ended  # nobody has answered its launch: there is nothing to end yet
    members.void(member, "it is not Ready any more")
    assert pooled.stage is Stage.DRAINING
    members.usable(member, object())  # type: ignore[arg-type]
    assert pooled.stage is Stage.DRAINING


async def test_a_launch_that_was_repeated_is_found_under_its_new_id_and_forgotten_with_it(program: Program) -> None:
    kept = Kept(program)
    members, member = kept.members, kept.member
    first = member.machine.id
    other = members.add(Member(PooledMachine(program.intent(), launched_at=0.0, expected_ready_at=0.0)))
    again = program.intent()
    members.answered(member, again)
    assert (members.get(first), members.get(again.id), member.seen) == (None, member, False)
    assert list(members) == [member, other]
    assert [pooled.id for pooled in members.pooled] == [again.id, other.machine.id]
    members.answered(member, replace(again, ready_at=program.books.clock.now()))
    assert member.seen
    assert member.name == "medium machine (not answered yet)"
    members.remove(member)
    assert (list(members), members.pooled, members.get(again.id)) == ([other], (other.pooled,), None)
    members.remove(member)
    assert len(members) == 1


async def test_what_fails_in_the_background_is_over_and_harms_nobody(program: Program) -> None:
    members = Kept(program).members

    async def fail() -> None:
        await asyncio.sleep(5)
        raise MachineLost("it is gone")

    failing = members.spawn(fail(), name="fails")
    await asyncio.wait_for(members.quiet(), 10)
    assert failing.done()
    members.decided("replace", "machine-1", "it is ill")
    await members.quiet()
    [decision] = await program.store.decisions(limit=9)
    assert (decision.action, decision.what, decision.why) == ("replace", "machine-1", "it is ill")
    assert (decision.by, decision.at) == (program.owner.id, program.books.clock.now())


# -- what the provider's list says of one machine ------------------------------------------------------------------


class Listed(Kept):
    """A machine that the provider has listed, and the watch over it; what it says next the test decides."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.watch = Watch(self.members)
        self.cloud, self.books, self.said = program.machines.settings.cloud, program.books, program.said

    async def begin(self) -> None:
        await self.books.add_intent(self.member.machine)
        changes = {"server_id": ServerId("srv-1")}
        listed = await self.books.record(self.member.machine, MachineEvent.LISTED, note="listed", changes=changes)
        self.pooled.machine = listed
        self.member.down_since = asyncio.get_running_loop().time()

    async def sees(self, phase: Phase, word: str = "", **changes: Any) -> None:
        report = MachineReport(ServerId("srv-1"), phase, word or str(phase), **changes)
        await self.watch._seen(self.member, report, asyncio.get_running_loop().time())

    async def over(self) -> None:
        for task in tuple(self.members._background):
            task.cancel()
        await self.members.quiet()

    def times(self, *, ago: float, lease: float = 600.0) -> dict[str, Any]:
        ready = self.books.clock.now() - timedelta(seconds=ago)
        return {"ready_at": ready, "stopping_at": ready + timedelta(seconds=lease)}


async def a_listed(program: Program) -> Listed:
    listed = Listed(program)  # by the test's own time
    await listed.begin()
    return listed


async def test_a_machine_bills_since_the_provider_says_it_was_ready(program: Program) -> None:
    listed = await a_listed(program)
    await asyncio.sleep(60)
    now = asyncio.get_running_loop().time()
    await listed.sees(Phase.READY, **listed.times(ago=10.0, lease=700.0))
    member = listed.member
    assert (member.seen, member.machine.state, member.gate) == (True, MachineState.READY, None)
    assert (member.billed_since, member.confirmed_s, member.down_since) == (now - 10, 700.0, now)
    assert member.machine.ready_at == listed.books.clock.now() - timedelta(seconds=10)
    assert member.machine.duration == timedelta(seconds=700)
    assert member.left(now) == 690
    await asyncio.sleep(listed.cloud.comfyui_timeout.total_seconds())
    await listed.sees(Phase.READY)
    assert listed.pooled.draining == ""  # it has no address yet
    await asyncio.sleep(1)
    await listed.sees(Phase.READY)
    assert member.ended
    assert "it bills and has not been usable for" in listed.pooled.draining
    assert member.down_since == now
    await listed.over()


async def test_a_machine_may_start_for_as_long_as_the_limit(program: Program) -> None:
    listed = await a_listed(program)
    limit = listed.cloud.boot_timeout.total_seconds()
    await asyncio.sleep(limit)
    await listed.sees(Phase.STARTING)
    assert (listed.member.ended, listed.member.starting_at) == (False, asyncio.get_running_loop().time())
    await asyncio.sleep(1)
    await listed.sees(Phase.STARTING)
    assert listed.member.ended
    assert listed.pooled.draining == f"ill: it was not Ready after {limit + 1:.0f} s"
    await listed.over()


async def test_a_machine_that_is_not_ready_any_more_loses_its_jobs_and_is_replaced_when_it_does_so_often(
    program: Program,
) -> None:
    listed = await a_listed(program)
    member, pooled = listed.member, listed.pooled
    await listed.sees(Phase.READY, **listed.times(ago=0.0))
    for flips in range(1, listed.members.health.rules.flip_limit + 1):
        assert not member.ended
        listed.members.usable(member, object())  # type: ignore[arg-type]
        await asyncio.sleep(5)
        await listed.sees(Phase.STARTING, "Restarting")
        assert (member.usable, pooled.flapped, pooled.void) == (False, True, True)
        assert (member.down_since, len(member.health.flips)) == (asyncio.get_running_loop().time(), flips)
        assert (member.machine.state, member.starting_at) == (MachineState.LOST, None)
        if not member.ended:
            await listed.sees(Phase.READY, **listed.times(ago=5.0 * flips))
            assert member.machine.state is MachineState.READY
    assert member.ended
    notes = [step.note for step in await listed.books.store.story(member.machine.id)]
    assert "not Ready any more (RunComfy says Restarting), 1 times of late" in notes
    await listed.over()


async def test_a_word_that_nobody_knows_bills_as_soon_as_it_has_a_time(program: Program) -> None:
    listed = await a_listed(program)
    member = listed.member
    await listed.sees(Phase.UNKNOWN, "Warming")
    assert (member.billed_since, member.seen) == (None, True)
    await asyncio.sleep(30)
    now = asyncio.get_running_loop().time()
    await listed.sees(Phase.UNKNOWN, "Warming", **listed.times(ago=20.0))
    assert (member.billed_since, member.confirmed_s, member.down_since) == (now - 20, 600.0, now)
    assert member.machine.ready_at == listed.books.clock.now() - timedelta(seconds=20)
    assert member.machine.planned_stop_at == listed.books.clock.now() + timedelta(seconds=580)
    notes = [step.note for step in await listed.books.store.story(member.machine.id)]
    assert "it bills, though RunComfy says 'Warming' and not Ready" in notes
    await asyncio.sleep(10)
    await listed.sees(Phase.UNKNOWN, "Warming", **listed.times(ago=30.0, lease=900.0))
    assert (member.billed_since, member.confirmed_s, member.down_since) == (now - 20, 900.0, now)
    assert not member.ended


async def test_a_machine_that_somebody_else_stops_takes_no_jobs_and_is_waited_for(program: Program) -> None:
    listed = await a_listed(program)
    member, pooled = listed.member, listed.pooled
    await listed.sees(Phase.READY, **listed.times(ago=0.0))
    listed.members.usable(member, object())  # type: ignore[arg-type]
    await asyncio.sleep(30)
    await listed.sees(Phase.STOPPING)
    assert pooled.draining == "RunComfy is stopping it, we did not ask"
    assert (pooled.void, pooled.takes_jobs, member.ended) == (True, False, False)
    assert member.machine.stop_accepted_at == listed.books.clock.now()
    epoch = pooled.epoch
    await asyncio.sleep(30)
    await listed.sees(Phase.STOPPING)
    assert pooled.epoch == epoch  # said already
    assert member.machine.stop_accepted_at == listed.books.clock.now() - timedelta(seconds=30)


async def test_a_longer_time_is_believed_when_a_list_that_was_asked_for_later_shows_it(program: Program) -> None:
    listed = await a_listed(program)
    member, said = listed.member, listed.said
    await listed.sees(Phase.READY, **listed.times(ago=0.0))
    told = len(said)
    member.asked, member.asked_at = timedelta(seconds=900), asyncio.get_running_loop().time() + 1
    await listed.sees(Phase.READY, **listed.times(ago=0.0, lease=900.0))
    assert (member.confirmed_s, member.asked) == (600.0, timedelta(seconds=900))
    await asyncio.sleep(1)
    await listed.sees(Phase.READY, **listed.times(ago=1.0, lease=900.0))
    assert (member.confirmed_s, member.machine.duration) == (900.0, timedelta(seconds=900))
    assert not member.asked
    assert len(said) == told
    for asked in (1_200, 1_500):
        member.asked, member.asked_at = timedelta(seconds=asked), 0.0
        await listed.sees(Phase.READY, **listed.times(ago=1.0, lease=900.0))
        assert (member.confirmed_s, bool(member.asked), member.told_not_moved) == (900.0, False, True)
    assert len(said) == told + 1  # once per machine
    assert "RunComfy did not prolong machine srv-1: it still stops 900 s after it was ready" in said[-1]


async def test_nothing_is_relied_on_of_a_machine_that_came_back_at_another_address(program: Program) -> None:
    listed = await a_listed(program)
    member, pooled = listed.member, listed.pooled
    times = listed.times(ago=0.0)
    await listed.sees(Phase.READY, **times)
    member.url = SecretUrl("https://one-comfyui.runcomfy.com")
    client = listed.members.comfyui(member.url)
    listed.members.usable(member, client)
    member.gate = listed.members.spawn(asyncio.sleep(3_600), name="gate")  # nobody is asked at these addresses
    await listed.sees(Phase.READY, url=SecretUrl("https://one-comfyui.runcomfy.com"), **times)
    assert (pooled.takes_jobs, member.client) == (True, client)
    await asyncio.sleep(5)
    await listed.sees(Phase.READY, url=SecretUrl("https://two-comfyui.runcomfy.com"), **times)
    assert (pooled.takes_jobs, pooled.void, pooled.flapped) == (False, True, True)
    assert member.url.reveal() == "https://two-comfyui.runcomfy.com"
    assert (len(member.health.flips), member.down_since) == (1, asyncio.get_running_loop().time())
    assert pooled.server is None
    await listed.over()
    steps = await listed.books.store.story(member.machine.id)
    assert (steps[-1].event, steps[-1].note) == ("silent", "another address: it was started anew")


async def test_the_list_is_read_often_while_machines_start_and_rarely_when_it_cannot_be_read(program: Program) -> None:
    listed = await a_listed(program)
    pool, watch = listed.members.settings.pool, listed.watch
    every = pool.status_every.total_seconds()
    soon = min(listed.cloud.poll_interval.total_seconds(), every)
    assert watch._pause() == soon
    listed.members.usable(listed.member, object())  # type: ignore[arg-type]
    assert watch._pause() == every
    pauses = []
    for watch._failures in (1, 2, 3, 99):
        pauses.append(watch._pause())
    assert pauses == [every, every * 2, LIST_AGAIN_MOST, LIST_AGAIN_MOST]


async def test_a_machine_that_is_started_anew_again_and_again_is_replaced(program: Program) -> None:
    listed = await a_listed(program)
    member, pooled = listed.member, listed.pooled
    times = listed.times(ago=0.0)
    await listed.sees(Phase.READY, **times)
    member.url = SecretUrl("https://comfyui-0.runcomfy.com")
    member.gate = listed.members.spawn(asyncio.sleep(3_600), name="gate")  # nobody is asked at these addresses
    for flips in range(1, listed.members.health.rules.flip_limit + 1):
        assert (member.ended, pooled.draining) == (False, "")
        listed.members.usable(member, object())  # type: ignore[arg-type]
        member.client = None
        await asyncio.sleep(5)
        member.gate = listed.members.spawn(asyncio.sleep(3_600), name="gate")
        await listed.sees(Phase.READY, url=SecretUrl(f"https://comfyui-{flips}.runcomfy.com"), **times)
    assert member.ended
    assert pooled.draining.startswith("ill: ")
    await listed.over()


async def test_a_machine_whose_end_has_begun_is_not_taken_for_one_that_was_started_anew(program: Program) -> None:
    listed = await a_listed(program)
    member = listed.member
    times = listed.times(ago=0.0)
    await listed.sees(Phase.READY, **times)
    member.url = SecretUrl("https://one-comfyui.runcomfy.com")
    async with member.writing:  # something is written down about it, which takes a while
        longer = listed.times(ago=0.0, lease=900.0)
        seen = asyncio.create_task(
            listed.sees(Phase.READY, url=SecretUrl("https://two-comfyui.runcomfy.com"), **longer), name="list"
        )
        await asyncio.sleep(1)
        listed.members.end(member, "nothing is to do")
    await seen
    assert member.confirmed_s == 900.0  # what it has run is billed
    assert member.url.reveal() == "https://one-comfyui.runcomfy.com"
    await listed.over()


async def test_a_draining_machine_that_the_provider_stops_keeps_the_reason_people_were_told(program: Program) -> None:
    listed = await a_listed(program)
    member, pooled = listed.member, listed.pooled
    await listed.sees(Phase.READY, **listed.times(ago=0.0))
    listed.members.usable(member, object())  # type: ignore[arg-type]
    pooled.draining = "nothing is to do"
    await listed.sees(Phase.STOPPING)
    assert (pooled.draining, pooled.void) == ("nothing is to do", True)
    assert member.machine.stop_accepted_at == listed.books.clock.now()
    await listed.over()


# -- whether its ComfyUI answers -------------------------------------------------------------------------------------


class Slow:
    """A ComfyUI whose answer, or what is wrong with it, comes when the test says so."""

    def __init__(self, wrong: RunComfyError | None = None) -> None:
        self.wrong, self.asked, self.closed = wrong, 0, False
        self.may_answer = asyncio.Event()

    async def probe(self, *, fresh: bool = False) -> ServerInfo:
        self.asked += 1
        await self.may_answer.wait()
        if self.wrong is not None:
            raise self.wrong
        return ServerInfo("0.3.60", interrupts_by_id=True, cancels_jobs=False)

    async def class_names(self) -> frozenset[str]:
        return frozenset({"KSampler"})

    async def close(self) -> None:
        self.closed = True


async def a_usable(program: Program, server: Slow) -> Listed:
    listed = await a_listed(program)
    await listed.sees(Phase.READY, **listed.times(ago=0.0))
    listed.members.usable(listed.member, server)  # type: ignore[arg-type]
    return listed


async def test_an_answer_that_comes_with_the_end_of_a_machine_gives_nobody_hope(program: Program) -> None:
    listed, server = await a_listed(program), Slow()
    listed.members.comfyui = lambda url: server  # type: ignore[assignment, return-value]
    await listed.sees(Phase.READY, url=SecretUrl("https://one-comfyui.runcomfy.com"), **listed.times(ago=0.0))
    await asyncio.sleep(1)
    server.may_answer.set()
    listed.members.end(listed.member, "the pool ends")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (listed.member.was_usable, listed.pooled.void) == (False, True)
    await listed.members.quiet()
    assert server.closed


@pytest.mark.fault(16)
async def test_a_silence_of_before_a_restart_does_not_end_the_machine_that_starts_again(program: Program) -> None:
    server = Slow(ServerUnreachable("nobody answers"))
    listed = await a_usable(program, server)
    listed.watch.doubt(listed.member, "a job heard nothing", within=timedelta(seconds=1))
    await asyncio.sleep(2)
    assert server.asked == 1
    await listed.sees(Phase.STARTING)
    listed.watch.listed_at = asyncio.get_running_loop().time()
    server.may_answer.set()
    await asyncio.sleep(1)
    assert (listed.member.ended, listed.pooled.draining, listed.member.health.dead) == (False, "", "")
    await listed.over()


async def test_an_answer_of_before_a_restart_vouches_for_nothing_after_it(program: Program) -> None:
    server = Slow()
    listed = await a_usable(program, server)
    listed.watch.doubt(listed.member, "a job heard nothing")
    await asyncio.sleep(1)
    await listed.sees(Phase.STARTING)
    server.may_answer.set()
    await asyncio.sleep(1)
    assert listed.pooled.suspect == "a job heard nothing"
    await listed.over()


@pytest.mark.parametrize(
    ("wrong", "ended"),
    [(ServerTooOld("it is 0.1"), True), (AnswerUnreadable("it is no JSON"), False)],
    ids=["too old to be driven", "an answer that nobody understands"],
)
async def test_a_server_that_answers_and_cannot_be_used_is_given_up_but_not_for_one_odd_answer(
    program: Program, wrong: RunComfyError, ended: bool
) -> None:
    server = Slow(wrong)
    server.may_answer.set()
    listed = await a_usable(program, server)
    listed.watch.doubt(listed.member, "a job heard nothing")
    await asyncio.sleep(1)
    assert listed.member.ended is ended
    assert listed.pooled.suspect == "a job heard nothing"
    assert listed.pooled.draining == ("ill: it is 0.1" if ended else "")
    await listed.over()


async def test_a_machine_that_is_let_go_of_before_it_is_asked_is_not_asked(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    server = Slow()
    listed = await a_usable(program, server)
    listed.member.probed_at = float("-inf")
    listed.watch._look_after_the_idle()
    listed.members.let_go(listed.member)
    await listed.members.quiet()
    assert (server.asked, server.closed, listed.pooled.suspect) == (0, True, "")
    assert "pool_defect" not in caplog.text


@pytest.mark.invariant("I7")
@pytest.mark.parametrize("news", ["a longer time", "another type", "another type, and that it failed"])
async def test_what_a_list_says_of_a_machine_that_turns_out_to_be_anothers_is_not_acted_upon(
    programs: Programs, program: Program, news: str
) -> None:
    listed, server = await a_listed(program), Slow()
    listed.members.comfyui = lambda url: server  # type: ignore[assignment, return-value]
    await listed.sees(Phase.READY, **listed.times(ago=0.0))
    listed.member.asked = timedelta(seconds=900)
    row = await program.store.machine(listed.member.machine.id)
    assert row is not None
    async with programs.start() as other:
        await other.books.take_over(row, note="it is mine by now")
        told = listed.times(ago=0.0, lease=900.0) if news == "a longer time" else {"server_type": "large"}
        phase = Phase.FAILED if news.endswith("failed") else Phase.READY
        await listed.sees(phase, url=SecretUrl("https://one-comfyui.runcomfy.com"), **told)
        await asyncio.sleep(1)
        assert len(listed.members) == 0
        assert (server.asked, listed.member.client) == (0, None)
        assert "is looked after by another process now; left to it" in listed.said[-1]
    await listed.over()
