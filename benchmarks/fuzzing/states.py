"""Files of ours, and of programs beside us, as a crash, another version or another program may have left them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

from benchmarks.fuzzing import running
from benchmarks.fuzzing.scratch import scratch, written
from benchmarks.fuzzing.target import Seeds, Target, demand, only_ours, plain
from launcher.announced import announced
from launcher.conjure.state_file import StateFile, as_json, check
from runcomfy.adapters.balance_file import FILE_NAME as BALANCES
from runcomfy.adapters.balance_file import BalanceFile
from runcomfy.adapters.canary_file import canary_file, last_outcome
from runcomfy.adapters.dev_server_state import FILE_NAME, DevServerStateManager
from runcomfy.adapters.stores.columns import read_amount, read_time
from runcomfy.domain.balance import Balance
from runcomfy.testing.clock import START

LABEL: Final = "hidden-label"
FAR: Final = timedelta(days=400 * 365)


def dev_server(data: bytes) -> None:
    """`dev_server_state.json`, as it is read, shown, and written again with what others put there."""
    path = written(FILE_NAME, data)
    manager = DevServerStateManager(path)
    with only_ours():
        state = manager.load_server_state()
        if state is not None:
            manager.has_active_server()
            manager.get_server_info()
            shown = repr(replace(state, server_id="", status="", launch_time="", machine_id=None, extra={}))
            demand(LABEL not in shown or LABEL not in state.base_url, "an address is shown")
            written(FILE_NAME, data)
            manager.save_server_state(state)
            again = manager.load_server_state()
            demand(again is not None and again.server_id == state.server_id, "another state than was written")
    for litter in scratch().glob(f"{FILE_NAME}.broken-*"):
        litter.unlink()


def _dev_server_seeds() -> Iterator[tuple[str, bytes]]:
    said: dict[str, Any] = {
        "server_id": "srv-1",
        "user_id": "u",
        "base_url": "https://hidden-label-77-comfyui.runcomfy.com/",
        "status": "running",
        "launch_time": "2026-11-20T10:00:00",
        "workflow_version": "v1",
        "server_type": "medium",
        "total_cost": 1.5,
        "session_cost": 2,
        "last_health_check": None,
        "health_status": "healthy",
        "planned_stop_time": "2026-11-20T11:00:00+00:00",
        "estimated_duration": 3600,
        "schema_version": 1,
        "theirs": {"a": [1, 2.5]},
    }
    yield "whole", json.dumps(said).encode()
    yield "half", json.dumps(said).encode()[:200]
    yield "first-year", json.dumps({**said, "launch_time": "0001-01-01T00:00:00+14:00"}).encode()
    for depth in (100, 300):
        yield (
            f"deep-{depth}",
            json.dumps({**said, "theirs": 0})
            .encode()
            .replace(b'"theirs": 0', b'"theirs": ' + b"[" * depth + b"]" * depth),
        )


def shared_state(data: bytes) -> None:
    """CONJURE's `state.json`, which others write as they like."""
    path = written("state.json", data)
    file = StateFile(path, tries=1, pause_seconds=0.0)
    with only_ours():
        state = file.read()
        json.loads(as_json(state), parse_constant=_none)
        with only_ours():
            check(state)
            file.update(state)


def _none(word: str) -> Any:
    raise AssertionError(f"{word} in what everybody can read")


def _shared_seeds() -> Seeds:
    yield "whole", json.dumps({"command": "idle", "generation_mode": "cloud", "user_prompt": "a", "n": 1.5}).encode()
    yield "no-numbers", b'{"a": NaN, "b": [Infinity, -Infinity], "c": "NaN \\ud800"}'
    yield "deep", b'{"a":' + b"[" * 950 + b"]" * 950 + b"}"


def small_files(data: bytes) -> None:
    """Files of ours that another version, another program or a full disk may have left in any shape."""
    account = "account"
    written(BALANCES, data)
    for balance in running.run(BalanceFile(scratch(), durable=False).readings(account)):
        demand(balance.usd.is_finite() and abs(balance.at - START) < FAR, f"a reading {balance}")
    running.run(BalanceFile(scratch(), durable=False).add(account, Balance(Decimal(1), START)))
    canary_file(str(scratch()), account).write_bytes(data)
    outcome = last_outcome(str(scratch()), account)
    if outcome is not None:
        plain(outcome.sentence, "what a canary found", limit=1_000)
        json.dumps(outcome.as_dict())
    folder = scratch() / "listening"
    folder.mkdir(exist_ok=True)
    (folder / "own-1.json").write_bytes(data)
    for service in announced(scratch()):
        demand(0 < service.port < 65_536, f"port {service.port}")
        plain(service.address, "an address", limit=300)


def _small_seeds() -> Seeds:
    yield "balances", b'{"account": [{"at": "2026-11-20T10:00:00+00:00", "usd": "12.5"}]}'
    yield "balance-of-a-billion-digits", b'{"account": [{"at": "2026-11-20T10:00:00+00:00", "usd": "1e999999999"}]}'
    outcome = {
        "at": "2026-11-20T10:00:00+00:00",
        "server_type": "medium",
        "lease_seconds": 300.0,
        "ended_by_itself": True,
        "lag_seconds": 12.5,
        "looked_every_seconds": 5,
        "cost_usd": "0.2",
    }
    yield "canary", json.dumps(outcome).encode()
    yield "a-list", b"[1]"
    yield "deep", b"[" * 990 + b"]" * 990
    service = {
        "host": "127.0.0.1",
        "port": 8765,
        "computer": "here",
        "pid": 12,
        "process_started": 1.5,
        "since": "2026-11-20T10:00:00+00:00",
    }
    yield "service", json.dumps(service).encode()


def stored(data: bytes) -> None:
    """Times and amounts as an older version, or another program, may have left them in the database."""
    for text in data.decode("utf-8", "replace").split("\n")[:20]:
        with only_ours():
            demand(read_time(text).tzinfo is not None, "a time without a zone")
        with only_ours():
            read_amount(text)


def _stored_seeds() -> Seeds:
    yield (
        "times",
        b"2026-11-20 10:00:00.123456\n2026-11-20T10:00:00Z\n0001-01-01T00:00:00+14:00\n9999-12-31T23:59:59-12:00",
    )
    yield "amounts", b"12.50\n1e999999999\nNaN\n-0"


TARGETS: Final = (
    Target(
        "dev_server",
        dev_server,
        _dev_server_seeds,
        share=6,
        words=(
            "server_id",
            "base_url",
            "launch_time",
            "total_cost",
            "session_cost",
            "schema_version",
            "estimated_duration",
        ),
    ),
    Target("shared_state", shared_state, _shared_seeds, share=5),
    Target("small_files", small_files, _small_seeds, share=8, words=("lease_seconds", "cost_usd", "usd", "since")),
    Target("stored", stored, _stored_seeds, share=10, max_bytes=512, is_json=False),
)
