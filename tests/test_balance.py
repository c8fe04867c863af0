"""The account's money: told where the provider tells it, kept, and laid beside the ledger. Never needed."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.balance_file import FILE_NAME, BalanceFile
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.domain.balance import Balance, compare
from runcomfy.domain.exceptions import LocalError
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def balance(usd: str, minute: float = 0) -> Balance:
    return Balance(Decimal(usd), NOON + timedelta(minutes=minute))


# --- asking ---------------------------------------------------------------------------------------------------


async def test_the_balance_is_told_with_its_time(cloud_client: RunComfyAPIClient, clock: LoopClock) -> None:
    told = await cloud_client.balance()
    assert told is not None
    assert told.usd == 25
    assert clock.now() - told.at < timedelta(seconds=5)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 404}, {"status": 403}, {"status": 500}, {"status": 429}, {"body": {"balance_usd": "many"}},
        {"body": {}}, {"body": {"balance_usd": 5, "currency": "EUR"}}, {"reply": "html"}, {"reply": "never"},
    ],
)  # fmt: skip
async def test_whatever_goes_wrong_is_no_answer_and_asked_only_once(
    cloud_client: RunComfyAPIClient, cloud: RunComfyEmulator, fault: dict[str, Any]
) -> None:
    cloud.next_call("GET balance", **fault)
    assert await cloud_client.balance() is None
    assert len(cloud.calls) == 1
    assert list(await cloud_client.list_machines()) == []  # and it breaks nothing else


@pytest.mark.cloud(balance_usd=None)
async def test_an_account_without_that_endpoint_has_no_balance(cloud_client: RunComfyAPIClient) -> None:
    assert await cloud_client.balance() is None


async def test_within_a_minute_it_is_told_again_without_asking(
    cloud_client: RunComfyAPIClient, cloud: RunComfyEmulator
) -> None:
    first = await cloud_client.balance()
    cloud.spent_elsewhere_usd = Decimal(5)
    await asyncio.sleep(50)
    assert await cloud_client.balance() == first
    await asyncio.sleep(15)
    later = await cloud_client.balance()
    assert later is not None
    assert later.usd == 20
    cloud.next_call("GET balance", status=500)
    await asyncio.sleep(61)
    assert await cloud_client.balance() is None
    assert await cloud_client.balance() is None  # no answer is kept, too
    assert len(cloud.calls) == 3


# --- keeping --------------------------------------------------------------------------------------------------


async def test_readings_are_kept_by_account_in_order(tmp_path: Path) -> None:
    book = BalanceFile(tmp_path / "state")
    assert list(await book.readings("one")) == []
    for account, usd, minute in (("one", "25", 5), ("two", "7.50", 1), ("one", "26", 0)):
        await book.add(account, balance(usd, minute))
    assert list(await BalanceFile(tmp_path / "state").readings("one")) == [balance("26"), balance("25", 5)]
    assert list(await book.readings("two")) == [balance("7.50", 1)]
    assert list(await book.readings("three")) == []


async def test_many_readings_are_thinned_out_and_the_first_stays(tmp_path: Path) -> None:
    book = BalanceFile(tmp_path, durable=False)
    for minute in range(500):
        await book.add("one", balance(str(1000 - minute), minute))
    kept = await book.readings("one")
    assert len(kept) <= 200
    assert (kept[0], kept[-1]) == (balance("1000"), balance("501", 499))
    assert [one.at for one in kept] == sorted(one.at for one in kept)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"one": 3}', '{"one": [{"at": "x", "usd": "1"}]}', '{"one": [{"at": "2026-05-01", "usd": "1"}]}',
     json.dumps({"one": [{"at": NOON.isoformat(), "usd": "NaN"}]}), "[" * 100_000],
)  # fmt: skip
async def test_a_file_that_is_none_is_no_history(tmp_path: Path, content: str) -> None:
    await asyncio.to_thread((tmp_path / FILE_NAME).write_text, content)
    book = BalanceFile(tmp_path)
    assert list(await book.readings("one")) == []
    await book.add("one", balance("3"))
    assert list(await book.readings("one")) == [balance("3")]


async def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "file").write_text, "")
    with pytest.raises(LocalError):
        await BalanceFile(tmp_path / "file").add("one", balance("3"))


# --- comparing ------------------------------------------------------------------------------------------------


def test_one_reading_says_nothing() -> None:
    assert compare([balance("3")], Decimal(0), usd_per_hour=Decimal(0)) is None


def test_a_balance_that_falls_as_the_ledger_grows_agrees() -> None:
    found = compare([balance("25"), balance("24.9", 1), balance("23.02", 60)], Decimal(2), usd_per_hour=Decimal(0))
    assert found is not None
    assert (found.fell, found.elsewhere, found.agrees) == (Decimal("1.98"), Decimal("-0.02"), True)
    assert "the balance fell by $1.98 and our machines cost $2.00: they agree" in found.words


def test_what_went_elsewhere_is_said() -> None:
    found = compare([balance("25"), balance("20", 60)], Decimal(2), usd_per_hour=Decimal("1.75"))
    assert found is not None
    assert not found.agrees
    assert "$3.00 went to other products" in found.words


def test_money_that_came_in_is_said() -> None:
    found = compare([balance("25"), balance("45", 60)], Decimal(2), usd_per_hour=Decimal(0))
    assert found is not None
    assert "fell by -$20.00" in found.words
    assert "$22.00 came in" in found.words


def test_a_running_machine_may_be_taken_off_a_minute_later() -> None:
    readings = [balance("25"), balance("24.95", 4)]
    running = compare(readings, Decimal("0.10"), usd_per_hour=Decimal(6))
    stopped = compare(readings, Decimal("0.10"), usd_per_hour=Decimal(0))
    assert running is not None
    assert stopped is not None
    assert (running.agrees, stopped.agrees) == (True, False)
