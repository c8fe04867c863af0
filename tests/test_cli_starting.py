"""Garbage is not looked for while a command starts, and is as soon as it has."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import click
import pytest

from runcomfy.cli import main as commands
from runcomfy.cli import runner
from runcomfy.cli.runner import Interrupts, run_async


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.enable()


def test_a_command_that_goes_on_collects_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STARTING_SECONDS", 0.01)
    seen: list[bool] = []

    async def work(_: Interrupts) -> int:
        seen.append(gc.isenabled())
        await asyncio.sleep(0.02)
        seen.append(gc.isenabled())
        return 0

    @click.command()
    def waits() -> int:
        return run_async(work)

    monkeypatch.setattr(commands, "comfyctl", waits)
    with pytest.raises(SystemExit, match="0"):
        commands.main([])
    assert seen == [False, True]


def test_whoever_calls_main_gets_the_collector_back(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> int:
        assert not gc.isenabled()
        raise ValueError("something")

    monkeypatch.setattr(commands, "comfyctl", fails)
    with pytest.raises(SystemExit, match="1"):
        commands.main([])
    assert gc.isenabled()
