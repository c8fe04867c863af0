"""Threats S3 and S4: the token's file is private, secrets show nowhere, and every answer is sealed."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.guarding.guard import COOKIE, token_file
from runcomfy.adapters.log import redact
from runcomfy.domain.exceptions import CredentialsMalformed


@pytest.mark.threat("S10")
async def test_every_answer_is_sealed(door: Any) -> None:
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/", {}),
        ("GET", "/jobs", {}),
        ("GET", "/jobs", door.bearer),
        ("GET", "/?code=wrong", {}),
        ("POST", "/jobs", {**door.bearer, "Origin": "null"}),
        ("GET", "/assets/page.js", {}),
    ]
    for method, path, headers in requests:
        answer = await door.ask(method, path, headers)
        assert answer.header("x-frame-options") == "DENY"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("referrer-policy") == "no-referrer"
        assert answer.header("cross-origin-resource-policy") == "same-origin"
        policy = answer.header("content-security-policy") or ""
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-" not in policy
        assert ("sandbox" in policy) == (path not in ("/", "/assets/page.js") and "code" not in path)
        assert answer.header("cache-control") == ("no-store" if "sandbox" in policy else "no-cache")


async def test_an_answer_to_a_defect_is_sealed_too(door: Any) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(RuntimeError):
        await door.ask("GET", "/broken", door.bearer)
    scope = door.scopes[-1]

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    with pytest.raises(RuntimeError):
        await door.web(dict(scope), receive, send)
    assert sent[0]["status"] == 500
    assert (b"x-frame-options", b"DENY") in sent[0]["headers"]
    assert b"a defect" not in sent[1]["body"]


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.usefixtures("_open_umask")
@pytest.mark.threat("S4")
def test_what_the_guard_writes_is_private_whatever_the_umask(guarded: Any, tmp_path: Path) -> None:
    guarded(tmp_path / "made" / "state")
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").rglob("*")}
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}
    assert [path.name for path in found if path.is_file()] == ["http_token"]


def test_the_token_stays_the_same_and_every_folder_has_its_own(guarded: Any, tmp_path: Path) -> None:
    first, again = guarded(tmp_path / "a").guard, guarded(tmp_path / "a").guard
    assert first.token == again.token
    assert guarded(tmp_path / "b").guard.token != first.token
    assert len(first.token.reveal()) == 43


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o666])
@pytest.mark.threat("S4")
def test_a_token_that_others_can_read_is_refused(guarded: Any, tmp_path: Path, mode: int) -> None:
    token = guarded(tmp_path).guard.token.reveal()
    token_file(tmp_path).chmod(mode)
    with pytest.raises(CredentialsMalformed, match="others can read") as caught:
        guarded(tmp_path)
    assert "remove" in caught.value.hint
    assert token not in str(caught.value.as_dict())
    token_file(tmp_path).unlink()
    assert guarded(tmp_path).guard.token.reveal() != token


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
@pytest.mark.threat("S16")
def test_a_link_that_was_planted_is_not_followed(guarded: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("a" * 43)
    elsewhere.chmod(0o600)
    for target in (elsewhere, tmp_path / "nowhere"):
        (tmp_path / "state").mkdir(exist_ok=True)
        token_file(tmp_path / "state").symlink_to(target)
        with pytest.raises(CredentialsMalformed, match="not an ordinary file"):
            guarded(tmp_path / "state")
        token_file(tmp_path / "state").unlink()
    assert not (tmp_path / "nowhere").exists()
    assert elsewhere.read_text() == "a" * 43


@pytest.mark.parametrize("text", ["", "short", "two words " * 8, "\x00" * 50, "é" * 50])
def test_a_file_that_holds_no_token_is_refused(guarded: Any, tmp_path: Path, text: str) -> None:
    tmp_path.joinpath("state").mkdir()
    path = token_file(tmp_path / "state")
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(CredentialsMalformed, match="unreadable"):
        guarded(tmp_path / "state")


@pytest.mark.threat("S3")
async def test_secrets_show_nowhere(door: Any, caplog: pytest.LogCaptureFixture) -> None:
    code, cookie = door.guard.new_code(), (await door.log_in()).partition("=")[2]
    token = door.guard.token.reveal()
    with caplog.at_level(logging.DEBUG):
        answers = [
            await door.ask("GET", f"/?code={code}x"),
            await door.ask("GET", "/jobs", {"Authorization": f"Bearer {token}x"}),
            await door.ask("GET", "/jobs", {"Cookie": f"{COOKIE}={cookie}x"}),
            await door.ask("POST", "/jobs", door.bearer, body=b"{", chunks=None),
        ]
    shown = repr(door.guard) + repr(vars(door.guard)) + caplog.text + "".join(map(repr, answers))
    for secret in (token, code, cookie):
        assert secret not in shown
    assert redact(f"a line with {token} and {code}") == "a line with *** and ***"
