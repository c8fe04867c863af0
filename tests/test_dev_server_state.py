"""The dev server's published state: always whole, private, tolerant of what others write, failing only in our words."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.dev_server_state import CONJURE_FIELDS
from runcomfy.adapters.files import Disk
from runcomfy.dev_server_state import DevServerState, DevServerStateManager
from runcomfy.domain.exceptions import DiskFull, LocalError, RunComfyError

posix = pytest.mark.skipif(sys.platform == "win32", reason="permission bits are POSIX's")
SERVER = "0f6b1c1e-7a53-4c0e-9d51-2f0c3f2b9a10"


class AtNoon:
    """A clock that stands still."""

    def now(self) -> datetime:
        return datetime(2026, 11, 21, 12, 5, tzinfo=UTC)


class Failing(Disk):
    """A disk on which one call fails."""

    def __init__(self, call: str, code: int) -> None:
        self.call, self.code = call, code

    def _fail(self, call: str) -> None:
        if call == self.call:
            raise OSError(self.code, os.strerror(self.code))

    def fsync(self, fd: int) -> None:
        self._fail("fsync")
        super().fsync(fd)

    def replace(self, source: str, target: str) -> None:
        self._fail("replace")
        super().replace(source, target)

    def rename(self, source: str, target: str) -> None:
        self._fail("rename")
        super().rename(source, target)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "dev_server_state.json"


def manager(path: Path, **options: Any) -> DevServerStateManager:
    return DevServerStateManager(path, clock=AtNoon(), **options)


def running(**changes: Any) -> DevServerState:
    given: dict[str, Any] = {
        "server_id": SERVER,
        "user_id": "u-demo",
        "base_url": f"https://{SERVER}-comfyui.runcomfy.com",
        "status": "running",
        "launch_time": "2026-11-21T11:00:00+00:00",
        "workflow_version": "1f0e",
        "planned_stop_time": "2026-11-21T13:00:00+00:00",
        "usd_per_hour": "0.99",
        "total_cost": 0.9075,
        "session_cost": 0.9075,
    }
    return DevServerState(**{**given, **changes})


def test_what_is_saved_is_loaded(path: Path) -> None:
    manager(path).save_server_state(running())
    assert manager(path).load_server_state() == running()
    assert manager(path).has_active_server()


def test_the_file_has_the_fields_that_conjure_reads_and_ours(path: Path) -> None:
    manager(path).save_server_state(running(base_url=f"https://{SERVER}-comfyui.runcomfy.com/"))
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) > {
        "server_id", "user_id", "base_url", "status", "launch_time", "workflow_version", "server_type", "total_cost",
        "session_cost", "last_health_check", "health_status", "planned_stop_time", "usd_per_hour", "schema_version",
    }  # fmt: skip
    assert document["base_url"] == f"https://{SERVER}-comfyui.runcomfy.com"
    assert (document["server_type"], document["health_status"], document["last_health_check"]) == (
        "medium",
        "unknown",
        None,
    )
    assert path.read_text(encoding="utf-8").startswith('{\n  "server_id"')


def test_conjure_can_build_the_state_with_its_own_six_arguments() -> None:
    state = DevServerState("s", "u", "http://127.0.0.1:8188", "running", "2026-11-21T11:00:00Z", "v")
    assert (state.server_type, state.total_cost, state.last_health_check) == ("medium", 0.0, None)


def test_it_lies_in_the_state_folder_unless_told_otherwise(tmp_path: Path) -> None:
    assert DevServerStateManager().state_file_path == tmp_path / "state" / "dev_server_state.json"
    assert DevServerStateManager(str(tmp_path / "x.json")).state_file_path == tmp_path / "x.json"


def test_a_file_that_cannot_be_read_is_one_of_our_errors(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(LocalError):
        manager(path).load_server_state()
    with pytest.raises(LocalError):
        manager(path).clear_server_state()


def test_without_a_server_there_is_nothing(path: Path) -> None:
    assert manager(path).load_server_state() is None
    assert not manager(path).has_active_server()
    assert manager(path).get_server_info() is None
    manager(path).clear_server_state()


@pytest.mark.parametrize("status", ["stopped", "starting", "stopping", ""])
def test_a_server_that_cannot_be_used_is_not_active(path: Path, status: str) -> None:
    manager(path).save_server_state(running(status=status))
    assert not manager(path).has_active_server()


def test_the_information_for_people_has_conjures_keys_and_words(path: Path) -> None:
    manager(path).save_server_state(running(health_status="healthy", total_cost=0.0))
    assert manager(path).get_server_info() == {
        "server_id": SERVER,
        "status": "running",
        "base_url": f"https://{SERVER}-comfyui.runcomfy.com",
        "server_type": "medium",
        "uptime": "1h 5m",
        "total_cost": "$0.000",
        "session_cost": "$0.907",
        "health_status": "healthy",
        "last_health_check": None,
    }


@pytest.mark.parametrize(
    ("launched", "uptime"),
    [
        ("2026-11-21T11:00:00Z", "1h 5m"),
        ("2026-11-21T12:00:00+01:00", "1h 5m"),
        ("2026-11-21T11:00:00", "1h 5m"),
        ("2026-11-20T11:00:00Z", "25h 5m"),
        ("2026-11-22T11:00:00Z", "0h 0m"),
        ("yesterday", "unknown"),
        ("", "unknown"),
    ],
)
def test_uptime_is_counted_from_the_launch(path: Path, launched: str, uptime: str) -> None:
    manager(path).save_server_state(running(launch_time=launched))
    info = manager(path).get_server_info()
    assert info is not None
    assert info["uptime"] == uptime


def test_clearing_removes_the_file_and_its_copies(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    both = manager(path, copies=[copy])
    both.save_server_state(running())
    assert copy.exists()
    both.clear_server_state()
    assert not path.exists()
    assert not copy.exists()
    both.clear_server_state()


# --- others' fields and older files -------------------------------------------------------------------------


def test_fields_that_others_added_stay_when_the_file_is_rewritten(path: Path) -> None:
    mine = manager(path)
    mine.save_server_state(running())
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "pinned": True, "note": {"by": "ui", "é": "\ud800"}}), encoding="utf-8")
    mine.save_server_state(running(status="stopping"))
    loaded = mine.load_server_state()
    assert loaded is not None
    assert (loaded.status, loaded.extra) == ("stopping", {"pinned": True, "note": {"by": "ui", "é": "\ud800"}})
    path.unlink()
    mine.save_server_state(loaded)
    assert json.loads(path.read_text(encoding="utf-8"))["pinned"] is True


def test_fields_of_others_that_would_make_the_file_unreadable_are_left_out(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Written in lines, 900 lists in each other are more than a state file may have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '{"server_id": "a", "base_url": "http://x", "status": "running", "theirs": ' + "[" * 900 + "]" * 900 + "}"
    )
    manager = DevServerStateManager(path)
    state = manager.load_server_state()
    assert state is not None
    manager.save_server_state(state)
    again = manager.load_server_state()
    assert again is not None
    assert (again.server_id, again.extra) == ("a", {})
    assert "dev_server_foreign_fields_dropped" in caplog.text


def test_missing_fields_have_their_defaults(path: Path) -> None:
    path.parent.mkdir()
    facts = {"server_id": "s-1", "base_url": "https://s-1.example", "status": "running", "total_cost": "much"}
    path.write_text(json.dumps(facts), encoding="utf-8")
    loaded = manager(path).load_server_state()
    assert loaded is not None
    assert (loaded.server_id, loaded.user_id, loaded.server_type, loaded.total_cost) == ("s-1", "", "medium", 0.0)
    assert loaded.planned_stop_time is None


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"null", b'"text"', b'{"server_id": 5}', b'{"base_url": null}', b'{"a": NaN}', b"\xff\xfe\x00",
        b"[" * 9000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "' + b"x" * 1_100_000 + b'"}',
    ],
)  # fmt: skip
def test_a_broken_file_is_set_aside(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "runcomfy"):
        assert manager(path).load_server_state() is None
    assert not path.exists()
    (aside,) = path.parent.iterdir()
    assert aside.name == "dev_server_state.json.broken-20261121T120500.000000Z"
    assert aside.read_bytes() == content
    assert caplog.messages == ["dev_server_state_broken"]
    assert manager(path).load_server_state() is None


def test_every_broken_file_is_kept(path: Path) -> None:
    path.parent.mkdir()
    for content in ("{1", "{2", "{3"):
        path.write_text(content, encoding="utf-8")
        assert manager(path).load_server_state() is None
    assert sorted(file.read_text(encoding="utf-8") for file in path.parent.iterdir()) == ["{1", "{2", "{3"]


def test_a_broken_file_is_set_aside_before_it_is_written_over(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{broken", encoding="utf-8")
    manager(path).save_server_state(running())
    assert {file.name.partition(".broken")[1] for file in path.parent.iterdir()} == {"", ".broken"}
    assert manager(path).load_server_state() == running()


def test_an_empty_file_is_no_server_and_stays(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("\n", encoding="utf-8")
    assert manager(path).load_server_state() is None
    assert path.exists()


@pytest.mark.fault(58)
def test_a_broken_file_that_cannot_be_renamed_is_still_no_server(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{", encoding="utf-8")
    assert manager(path, disk=Failing("rename", errno.EACCES)).load_server_state() is None
    assert path.read_text(encoding="utf-8") == "{"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_DOCUMENTS = st.dictionaries(st.sampled_from([*CONJURE_FIELDS, "extra", "schema_version", "x"]), _JSON, max_size=8)


@given(data=st.one_of(st.binary(max_size=200), _DOCUMENTS.map(lambda document: json.dumps(document).encode())))
def test_any_bytes_are_a_state_or_none(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "dev_server_state.json"
    path.write_bytes(data)
    loaded = manager(path).load_server_state()
    facts = json.loads(data) if path.exists() and data.strip() else {}
    assert (loaded is not None) == all(facts.get(name) for name in ("server_id", "base_url", "status"))
    if loaded is not None:
        manager(path).save_server_state(loaded)
        assert manager(path).load_server_state() == loaded
        assert repr(loaded)


# --- the disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@posix
@pytest.mark.usefixtures("_open_umask")
@pytest.mark.threat("S4")
def test_the_file_and_its_folder_are_private_whatever_the_umask(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    manager(path, copies=[copy]).save_server_state(running())
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.fault(58)
@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize(("code", "expected"), [(errno.EIO, LocalError), (errno.ENOSPC, DiskFull)])
def test_a_write_that_fails_leaves_the_old_state_and_nothing_else(
    path: Path, call: str, code: int, expected: type[RunComfyError]
) -> None:
    manager(path).save_server_state(running())
    with pytest.raises(expected):
        manager(path, disk=Failing(call, code)).save_server_state(running(status="stopping"))
    assert manager(path).load_server_state() == running()
    assert [file.name for file in path.parent.iterdir()] == ["dev_server_state.json"]


def test_a_folder_that_is_a_file_is_one_of_our_errors(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("", encoding="utf-8")
    with pytest.raises(LocalError):
        manager(tmp_path / "state" / "dev_server_state.json").save_server_state(running())


@posix
def test_a_link_in_its_place_is_replaced_and_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched", encoding="utf-8")
    path.parent.mkdir()
    path.symlink_to(victim)
    manager(path).save_server_state(running())
    assert victim.read_text(encoding="utf-8").startswith("untouched")
    assert not path.is_symlink()


# --- copies -------------------------------------------------------------------------------------------------


def test_a_copy_has_the_fields_that_conjures_own_reader_knows_and_no_others(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runcomfy" / "dev_server_state.json"
    copy.parent.mkdir()
    manager(path, copies=[copy]).save_server_state(running(extra={"pinned": True}))
    document = json.loads(copy.read_text(encoding="utf-8"))
    assert list(document) == [
        "server_id", "user_id", "base_url", "status", "launch_time", "workflow_version", "server_type", "total_cost",
        "session_cost", "last_health_check", "health_status",
    ]  # fmt: skip
    assert document["status"] == "running"


def test_a_copy_that_cannot_be_written_is_a_warning(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = tmp_path / "good.json"
    with caplog.at_level(logging.WARNING, "runcomfy"):
        manager(path, copies=[tmp_path / "nowhere" / "x.json", good]).save_server_state(running())
    assert caplog.messages == ["dev_server_copy_failed"]
    assert path.exists()
    assert good.exists()


# --- secrets ------------------------------------------------------------------------------------------------


def test_the_address_and_the_user_are_not_in_its_repr() -> None:
    shown = repr(running(server_id="s-1", user_id="canary-user", base_url="https://canary-host-comfyui.runcomfy.com/x"))
    assert "canary" not in shown
    assert "s-1" in shown
    assert repr(running(base_url="http://["))
