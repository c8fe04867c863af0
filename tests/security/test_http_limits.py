"""Threat S14 at the door of the HTTP API: what is too much is refused before it is read or done."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from launcher.guarding.middleware import CHUNK_TIMEOUT_S
from runcomfy.domain.exceptions import TooManyRequests
from runcomfy.domain.settings import HttpSettings


async def test_a_body_that_says_it_is_too_large_is_not_read(door: Any) -> None:
    for headers in (door.bearer, dict[str, str]()):
        answer = await door.ask("POST", "/flux/generate", headers, body=b" " * (1024**2 + 1))
        assert answer.status == 413
        assert answer.header("connection") == "close"
    assert door.done == []


async def test_a_body_that_does_not_say_is_counted(door: Any) -> None:
    kind = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    chunks = [b" " * 65_536] * 17
    assert (await door.ask("POST", "/flux/generate", kind, chunks=chunks)).status == 413
    assert door.done == []
    assert (await door.ask("POST", "/flux/generate", kind, chunks=chunks[:16])).status == 200


async def test_a_body_that_lies_about_its_length_is_counted_too(door: Any) -> None:
    kind = {"Content-Type": "application/json", "Content-Length": "10"}
    assert (await door.ask("POST", "/flux/generate", kind, chunks=[b" " * 1024**2, b" "])).status == 413
    for length in ("-1", "1e9", "ten", "١٢"):
        with_length = [*door.bearer.items(), ("Content-Type", "application/json")]
        header = ("Content-Length", length.encode().decode("latin-1"))
        assert (await door.ask("POST", "/jobs", [*with_length, header])).status == 400
    assert door.done == []


async def test_files_and_pictures_in_json_may_be_as_large_as_set(guarded: Any, tmp_path: Path) -> None:
    door = guarded(tmp_path / "state", HttpSettings(max_body_bytes=1_000, max_upload_bytes=30_000))
    multipart = {**door.bearer, "Content-Type": "multipart/form-data; boundary=x"}
    assert (await door.ask("POST", "/uploads", multipart, body=b" " * 121_000)).status == 200
    assert (await door.ask("POST", "/uploads", multipart, body=b" " * 121_001)).status == 413
    assert (await door.ask("POST", "/jobs", door.bearer, body=b" " * 41_000)).status == 200
    assert (await door.ask("POST", "/jobs", door.bearer, body=b" " * 41_001)).status == 413
    assert (await door.ask("POST", "/presence", door.bearer, body=b" " * 1_001)).status == 413


async def test_a_body_that_never_comes_is_not_waited_for(door: Any) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    kind = {"Content-Type": "application/json", "Content-Length": "10"}
    assert (await door.ask("POST", "/flux/generate", kind, silent=True)).status == 408
    assert loop.time() - began == pytest.approx(CHUNK_TIMEOUT_S, abs=1)
    assert door.done == []


async def test_a_head_that_is_too_large_is_refused(door: Any) -> None:
    many = [(f"X-{n}", "1") for n in range(101)]
    assert (await door.ask("GET", "/health", many)).status == 431
    assert (await door.ask("GET", "/health", {"X": "1" * 33_000})).status == 431
    assert (await door.ask("GET", "/health?" + "a" * 9_000)).status == 414
    assert door.done == []


@pytest.mark.threat("S14")
async def test_a_client_that_floods_is_stopped_at_the_cap_and_let_in_again_later(guarded: Any, tmp_path: Path) -> None:
    guard = guarded(tmp_path / "state", HttpSettings(max_per_minute=10, max_waiting=50)).guard
    token, page = guard.principal("token"), guard.principal("session")
    for put_in in range(10):
        guard.admit_jobs(token, 1, waiting=put_in)
    for _ in range(100):
        with pytest.raises(TooManyRequests) as caught:
            guard.admit_jobs(token, 1, waiting=10)
        assert 0 < caught.value.details["retry_after_s"] <= 6
    guard.admit_jobs(page, 10)  # another client is not kept waiting by this one
    with pytest.raises(TooManyRequests):
        guard.admit_jobs(token, 1)
    await asyncio.sleep(6.1)
    guard.admit_jobs(token, 1)
    with pytest.raises(TooManyRequests):
        guard.admit_jobs(token, 1)
    await asyncio.sleep(3600)
    with pytest.raises(TooManyRequests, match="at most 50"):
        guard.admit_jobs(token, 1, waiting=50)
    with pytest.raises(TooManyRequests):
        guard.admit_jobs(token, 11)
    guard.admit_jobs(token, 10)  # what was refused was not counted
