"""`comfyctl run --dry-run`: where a job would run and what that would cost, by settings and the state file alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Comfy = Callable[..., tuple[int, str, str]]
ACCOUNT = {
    "RUNCOMFY_USER_ID": "11111111-2222-4333-8444-555555555555",
    "RUNCOMFY_API_TOKEN": "66666666-7777-4888-8999-000000000000",
    "RUNCOMFY_WORKFLOW_VERSION_ID": "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
}


@pytest.fixture
def dry(comfy: Comfy, picture: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Dry-runs a shipped workflow with an account; returns what programs are told, and checks what people are."""
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)

    def run(*options: str) -> dict[str, Any]:
        words = ("run", "image_invert", "--image", str(picture), "--dry-run", *options)
        code, out, err = comfy(*words)
        assert (code, err) == (0, "")
        assert out.endswith("dry run: nothing was sent\n")
        facts: dict[str, Any] = json.loads(comfy(*words, "--json")[1])
        for key in ("note", "problem", "credentials"):
            assert (f"\n{key}: {facts[key]}\n" in out) if key in facts else (f"\n{key}: " not in out)
        return facts

    return run


def test_a_server_of_the_users_own_bills_nothing_and_its_password_is_not_shown(
    dry: Callable[..., dict[str, Any]],
) -> None:
    facts = dry("--server", "http://me:secret-word@127.0.0.1:1")
    assert facts["where"].startswith("the server http://")
    assert "secret-word" not in json.dumps(facts)
    assert (facts["usd_per_hour"], facts["note"]) == ("0", "nothing is billed")
    assert "credentials" not in facts


def test_a_type_without_a_price_is_said_to_be_refused(dry: Callable[..., dict[str, Any]]) -> None:
    facts = dry("--server-type", "huge")
    assert facts["problem"] == "no price is known for huge: it would be refused"
    assert facts["usd_per_hour"] is None
    assert "usd_at_most" not in facts


@pytest.mark.parametrize(("limit", "refused"), [("0.98", True), ("0.99", False)])
def test_a_type_that_is_dearer_than_allowed_is_said_to_be_refused(
    dry: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, limit: str, refused: bool
) -> None:
    monkeypatch.setenv("RUNCOMFY_MAX_USD_PER_HOUR", limit)
    facts = dry()
    assert facts["usd_per_hour"] == "0.99"
    assert facts.get("problem") == (f"dearer than RUNCOMFY_MAX_USD_PER_HOUR (${limit}): refused" if refused else None)
    assert ("usd_at_most" in facts) is not refused


@pytest.mark.parametrize("missing", [None, *ACCOUNT])
def test_credentials_that_a_real_run_would_miss_are_told(
    dry: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    if missing is not None:
        monkeypatch.delenv(missing)
    facts = dry()
    assert facts.get("credentials", "").startswith("missing: ") is (missing is not None)
    assert facts["where"] == "a machine of its own, stopped at the end"


@pytest.mark.parametrize(
    ("state", "reuse", "where"),
    [
        ('{"status": "running", "server_id": "s-1", "server_type": "large"}', "true", "the dev server s-1"),
        ('{"status": "running", "server_id": "s-1", "server_type": "large"}', "false", "a machine of its own"),
        ('{"status": "stopped", "server_id": "s-1", "server_type": "large"}', "true", "a machine of its own"),
        ("{broken", "true", "a machine of its own"),
    ],
    ids=["runs", "not to be used", "stopped", "broken"],
)
def test_the_dev_server_of_the_state_file_is_named_with_its_own_price(
    dry: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    state: str,
    reuse: str,
    where: str,
) -> None:
    monkeypatch.setenv("CONJURE_MACHINE_REUSE", reuse)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "dev_server_state.json").write_text(state, encoding="utf-8")
    facts = dry()
    assert facts["where"].startswith(where)
    assert (facts["server_type"], facts["usd_per_hour"]) == (
        ("large", "1.75") if where == "the dev server s-1" else ("medium", "0.99")
    )
