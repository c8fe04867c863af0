"""`comfyctl page`: a fresh address, from a service that runs."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from launcher.page_command import fresh_address
from runcomfy.domain.exceptions import LocalError
from runcomfy.testing.web import Web


@pytest.fixture
def port(api: Web) -> int:
    return int(api.address.rpartition(":")[2])


async def test_the_address_logs_in_one_browser_once(api: Web, port: int) -> None:
    address = await fresh_address(port=port)
    assert address.startswith(api.address + "/?code=")
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
        async with browser.get(address) as answer:
            assert answer.status == 200
            assert "code=" not in str(answer.url)
        async with browser.get(f"{api.address}/session") as answer:
            assert (await answer.json())["kind"] == "session"
    async with aiohttp.ClientSession() as another, another.get(address) as answer:
        assert answer.status == 403


async def test_it_says_when_the_service_is_another_one_or_none(
    api: Web, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LocalError, match="no service answers"):
        await fresh_address(port=9)
    (tmp_path / "other").mkdir(mode=0o700)
    monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(tmp_path / "other"))
    with pytest.raises(LocalError, match="no service has run"):
        await fresh_address(port=port)
    token = tmp_path / "other" / "http_token"
    token.touch(mode=0o600)
    token.write_text("x" * 43)
    with pytest.raises(LocalError, match="does not know our token"):
        await fresh_address(port=port)
