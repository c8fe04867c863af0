"""
What every provider must do, as tests: `class TestMine(ProviderContract)` with fixtures `cloud` (an emulated cloud,
empty, whose machines boot within `BOOT`) and `provider` (an adapter that talks to it).

The tests wait as long as clouds take, so run them under virtual time. Needs pytest.
"""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Protocol

import pytest

from runcomfy.domain.exceptions import (
    AuthRejected,
    LaunchRefused,
    LaunchUnclear,
    MachineNotFound,
    ProviderBusy,
    ProviderError,
)
from runcomfy.domain.machine import MachineReport, Phase, ServerId
from runcomfy.ports.provider import Provider

BOOT = timedelta(minutes=10)
TEN_MINUTES = timedelta(minutes=10)
NOBODY = ServerId("00000000-0000-4000-8000-000000000000")


class EmulatedCloud(Protocol):
    """What these tests need of an emulated cloud beside its API."""

    @property
    def launched(self) -> list[str]:
        """The ids of the machines that were launched."""
        ...

    @property
    def billing(self) -> list[str]:
        """The ids of the machines that bill now, without those of strangers."""
        ...

    def next_call(self, call: str = "*", **fault: Any) -> None:
        """Let the next calls that fit go wrong."""
        ...

    def foreign(self, server_type: str = ..., *, duration: int = ..., **traits: Any) -> Any:
        """Let a machine appear that no client launched."""
        ...

    def revoke(self, token: int = 1) -> None:
        """Refuse a token from now on."""
        ...


class ProviderContract:
    """The promises of `runcomfy.ports.provider.Provider`."""

    server_type = "large"

    async def launch(self, provider: Provider, duration: timedelta = TEN_MINUTES) -> MachineReport:
        version = (await provider.get_workflows())[0].version_id
        return await provider.launch_machine(
            server_type=self.server_type, duration=duration, workflow_version_id=version
        )

    async def ready(self, provider: Provider, server_id: ServerId) -> MachineReport:
        async with asyncio.timeout(BOOT.total_seconds()):
            while True:
                report = await provider.get_machine_status(server_id)
                if report is not None and report.usable:
                    return report
                await asyncio.sleep(5)

    async def end(self, provider: Provider, *server_ids: ServerId) -> None:
        """Stop machines and wait until the provider knows them no longer."""
        for server_id in server_ids:
            await provider.stop_machine(server_id)
        async with asyncio.timeout(600):
            left = set(server_ids)
            while left:
                left &= {report.server_id for report in await provider.list_machines(urgent=True)}
                await asyncio.sleep(5 if left else 0)

    def test_an_account_has_a_digest_that_does_not_name_the_user(self, provider: Provider) -> None:
        assert provider.name
        assert provider.account == provider.account
        assert len(provider.account) >= 8

    async def test_workflows_can_be_asked_for_again_and_again(self, provider: Provider) -> None:
        first = await provider.get_workflows()
        assert first
        assert all(workflow.version_id for workflow in first)
        assert await provider.get_workflows() == first

    async def test_an_empty_account_lists_nothing(self, provider: Provider) -> None:
        assert list(await provider.list_machines()) == []

    async def test_the_balance_is_a_courtesy(self, provider: Provider) -> None:
        told = await provider.balance()
        assert told is None or (told.usd.is_finite() and told.at.tzinfo is not None)
        assert await provider.balance() == told  # asked again within the minute

    async def test_a_launch_returns_at_once_and_the_machine_is_listed(
        self, provider: Provider, cloud: EmulatedCloud
    ) -> None:
        before = asyncio.get_running_loop().time()
        report = await self.launch(provider)
        assert asyncio.get_running_loop().time() - before < 5
        assert not report.usable
        assert cloud.launched == [report.server_id]
        listed = {entry.server_id: entry for entry in await provider.list_machines()}
        assert listed[report.server_id].server_type == self.server_type
        assert not cloud.billing  # not before it is ready
        await self.end(provider, report.server_id)

    async def test_a_ready_machine_says_where_it_is_and_when_it_will_stop(
        self, provider: Provider, cloud: EmulatedCloud
    ) -> None:
        server_id = (await self.launch(provider)).server_id
        report = await self.ready(provider, server_id)
        assert report.phase is Phase.READY
        assert report.url is not None
        assert report.ready_at is not None
        assert report.stopping_at == report.ready_at + TEN_MINUTES
        assert cloud.billing == [server_id]
        await self.end(provider, server_id)

    async def test_a_duration_is_a_total_counted_from_ready(self, provider: Provider) -> None:
        server_id = (await self.launch(provider)).server_id
        ready_at = (await self.ready(provider, server_id)).ready_at
        assert ready_at is not None
        await asyncio.sleep(60)
        total = timedelta(minutes=20)
        for _ in range(2):  # repeating it changes nothing more
            assert (await provider.change_duration(server_id, total=total)).stopping_at == ready_at + total
        report = await provider.get_machine_status(server_id)
        assert report is not None
        assert report.stopping_at == ready_at + total
        await self.end(provider, server_id)

    async def test_a_stopped_machine_bills_no_longer_and_goes_away(
        self, provider: Provider, cloud: EmulatedCloud
    ) -> None:
        server_id = (await self.launch(provider)).server_id
        await self.ready(provider, server_id)
        assert await provider.stop_machine(server_id) is True
        assert cloud.billing == []
        await self.end(provider, server_id)
        assert await provider.get_machine_status(server_id) is None
        assert await provider.stop_machine(server_id) is False

    async def test_a_machine_stops_at_its_stop_time_by_itself(self, provider: Provider, cloud: EmulatedCloud) -> None:
        server_id = (await self.launch(provider, timedelta(minutes=5))).server_id
        await self.ready(provider, server_id)
        await asyncio.sleep(301)
        assert cloud.billing == []
        await asyncio.sleep(60)
        assert await provider.get_machine_status(server_id) is None

    async def test_a_machine_that_is_not_ready_can_be_stopped(self, provider: Provider, cloud: EmulatedCloud) -> None:
        server_id = (await self.launch(provider)).server_id
        assert await provider.stop_machine(server_id) is True
        await asyncio.sleep(BOOT.total_seconds())
        assert cloud.billing == []
        assert await provider.get_machine_status(server_id) is None

    async def test_an_unknown_machine_is_none_false_or_not_found(self, provider: Provider) -> None:
        assert await provider.get_machine_status(NOBODY) is None
        assert await provider.stop_machine(NOBODY) is False
        with pytest.raises(MachineNotFound):
            await provider.change_duration(NOBODY, total=TEN_MINUTES)

    async def test_machines_of_others_are_listed_too(self, provider: Provider, cloud: EmulatedCloud) -> None:
        stranger = cloud.foreign()
        assert [report.server_id for report in await provider.list_machines()] == [stranger.server_id]

    async def test_a_list_that_cannot_be_read_raises(self, provider: Provider, cloud: EmulatedCloud) -> None:
        cloud.foreign()
        cloud.next_call("GET servers", status=500, times=None)
        with pytest.raises(ProviderBusy):
            await provider.list_machines()

    async def test_a_refused_launch_starts_nothing(self, provider: Provider, cloud: EmulatedCloud) -> None:
        with pytest.raises(LaunchRefused):
            await provider.launch_machine(
                server_type="no-such-type", duration=TEN_MINUTES, workflow_version_id="no-such-version"
            )
        assert cloud.launched == []

    @pytest.mark.parametrize("reply", ["lost", "reset", "never", "truncated", "html", "empty"])
    async def test_a_launch_without_an_answer_is_unclear_and_never_repeated(
        self, provider: Provider, cloud: EmulatedCloud, reply: str
    ) -> None:
        cloud.next_call("POST servers", reply=reply)
        with pytest.raises(LaunchUnclear):
            await self.launch(provider)
        assert len(cloud.launched) == 1
        await self.end(provider, ServerId(cloud.launched[0]))

    async def test_a_stop_whose_answer_is_lost_is_asked_again(self, provider: Provider, cloud: EmulatedCloud) -> None:
        server_id = (await self.launch(provider)).server_id
        await self.ready(provider, server_id)
        cloud.next_call("DELETE *", reply="lost")
        await provider.stop_machine(server_id)
        assert cloud.billing == []
        await self.end(provider, server_id)

    async def test_a_refused_token_is_said_so(self, provider: Provider, cloud: EmulatedCloud) -> None:
        cloud.revoke(1)
        with pytest.raises(AuthRejected):
            await provider.list_machines()

    @pytest.mark.parametrize(
        "fault", [{"status": 418}, {"status": 302}, {"body": "[1, 2"}, {"reply": "endless"}, {"reply": "drip"}]
    )
    async def test_every_error_is_one_of_ours(
        self, provider: Provider, cloud: EmulatedCloud, fault: dict[str, Any]
    ) -> None:
        cloud.foreign()
        cloud.next_call("GET servers", times=None, **fault)
        with pytest.raises(ProviderError):
            await provider.list_machines()
