"""`comfyctl doctor` where a serverless deployment is set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from runcomfy.cli.main import call, comfyctl
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.in_thread import InThread, served


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread[ServerlessEmulator]]:
    with served(ServerlessEmulator) as emulator:
        for name, value in emulator.emulator.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RUNCOMFY_MAX_RETRIES", "0")
        yield emulator


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = call(comfyctl, ["doctor", "--json"])
    return code, {row["layer"]: row for row in json.loads(capsys.readouterr().out)}


def test_the_doctor_looks_at_the_deployment_and_wakes_nothing(
    deployment: InThread[ServerlessEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys)
    assert code == 0, found
    assert found["serverless deployment"]["ok"] is True
    assert "AMPERE_48" in found["serverless deployment"]["detail"]
    assert found["credentials"]["skipped"] is True  # no user id: nothing is rented here
    assert not deployment.emulator.instances


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("RUNCOMFY_DEPLOYMENT_ID", "another", "serverless-deployment-unusable"),
        ("RUNCOMFY_API_TOKEN", "not-the-token", "provider-auth-rejected"),
    ],
)
def test_the_doctor_says_what_is_wrong_with_it(
    deployment: InThread[ServerlessEmulator],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    code: str,
) -> None:
    monkeypatch.setenv(name, value)
    got, found = doctor(capsys)
    assert got == 4
    assert found["serverless deployment"]["error"]["code"] == code


def test_the_doctor_says_that_it_is_disabled(
    deployment: InThread[ServerlessEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    deployment.emulator.gate = 10002
    got, found = doctor(capsys)
    assert got == 4
    assert "disabled" in found["serverless deployment"]["detail"]


def test_the_doctor_does_not_mind_an_answer_that_says_nothing(
    deployment: InThread[ServerlessEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    deployment.emulator.next_call("GET deployment", body="<html>hello</html>", times=None)
    got, found = doctor(capsys)
    assert got == 0
    assert found["serverless deployment"]["skipped"] is True
